"""Comparisons and sweeps from options to files."""

from __future__ import annotations

import builtins
import json
import math
import time
from contextlib import contextmanager, nullcontext
from multiprocessing import Pipe
from threading import Lock, Thread

import pytest
import torch

from axolotl_spft.bench import contestant as contestant_module
from axolotl_spft.bench import main, rounds
from axolotl_spft.bench import sweep as sweep_module
from axolotl_spft.bench.contestant import Contestant
from axolotl_spft.bench.options import PROCESSES
from axolotl_spft.bench.rounds import compare
from axolotl_spft.bench.sweep import parse_values
from axolotl_spft.errors import SpftError
from axolotl_spft.tools.bench import METHODS

PART_NAMES = {"values", "gradients", "optimizer_state", "masks", "originals", "derived"}


def numbers(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from numbers(each)
    elif isinstance(content, (int, float)):
        yield content


def test_a_comparison_writes_every_figure(tiny_options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    main.run_comparison(tiny_options(), output, picture)
    content = json.loads(output.read_text())
    assert all(map(math.isfinite, numbers(content)))
    assert content["machine"].keys() >= {"date", "cpu", "gpu", "threads", "versions"}
    assert content["options"]["tokens"] == 24 and content["options"]["model"] == "config.json"
    assert [row["method"] for row in content["rows"]] == list(METHODS)
    for row in content["rows"]:
        name = row["method"]
        assert len(row["seconds"]) == 2 and row["median_seconds"] > 0 and row["tokens_per_second"] > 0
        assert row["kept_bytes"] >= row["kept_by_adapted_bytes"] >= 0
        assert (row["area"] is None) == (not name.startswith("spft"))
        assert (row["mask"] is None) == (not name.startswith("spft"))
        if name.startswith("spft"):
            assert row["mask"]["selection_seconds"] > 0 and row["mask"]["pass_seconds"] > 0
        if name == "limit":
            assert row["trained"] == 0 and row["bytes_per_value"] is None
        else:
            assert row["bytes_per_value"].keys() == PART_NAMES
        if name in ("limit", "full"):
            assert row["file_bytes"] is None and row["serving_seconds"] is None
        else:
            assert row["file_bytes"] > row["trained"]
            assert row["serving_seconds"].keys() == {"forward", "switch", "merge", "unmerge"}
    assert picture.stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "bytes per trained value" in printed and all(f"| {name} " in printed for name in METHODS)


def test_what_cannot_run_on_4_bits_is_left_out_with_the_reason(tiny_options, capsys):
    options = tiny_options(methods=("limit", "lora", "shira", "full"), quantization="4bit", serving=True)
    rows, left_out = compare(options)
    assert [row["method"] for row in rows] == ["limit", "lora"]
    assert left_out.keys() == {"shira", "full"}
    assert "full is left out: quantized weights take no gradient" in capsys.readouterr().out


@pytest.mark.parametrize("processes", ["shared", "isolated"])
def test_a_rank_that_shira_cannot_have_leaves_it_out(tiny_options, processes):
    rows, left_out = compare(tiny_options(methods=("limit", "shira"), rank=18, serving=False, processes=processes))
    assert [row["method"] for row in rows] == ["limit"]
    assert left_out["shira"].startswith("SHiRA of rank 18 would train more than all of model.layers.0.self_attn.")


def test_a_method_in_a_process_of_its_own(tiny_options):
    (row,), left_out = compare(tiny_options(methods=("spft-gradient",), processes="isolated"))
    assert row["method"] == "spft-gradient" and len(row["seconds"]) == 2 and not left_out
    assert row["peak_bytes"] is None or row["peak_bytes"] > 2**20


def test_methods_one_after_the_other(tiny_options, monkeypatch):
    events = []

    @contextmanager
    def worker(name, options):
        events.append(f"{name} begins")
        contestant = Contestant(name, options, own_process=False)
        contestant.wait_until_started = contestant.prepare = lambda: None
        yield contestant
        events.append(f"{name} ends")

    monkeypatch.setattr(contestant_module, "_WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(rounds, "_worker", worker)
    rows, _ = compare(tiny_options(methods=("limit", "lora"), processes="sequential", serving=False))
    assert [row["method"] for row in rows] == ["limit", "lora"]
    assert events == ["limit begins", "limit ends", "lora begins", "lora ends"]


def test_a_method_that_runs_alone_gets_warm_first(tiny_options, monkeypatch):
    steps = []
    monkeypatch.setattr(contestant_module, "_WARM_UP_SECONDS", 0.3)
    monkeypatch.setattr(Contestant, "_step", lambda self: steps.append(self.options.processes) or time.sleep(0.05))
    monkeypatch.setattr(contestant_module, "kept_for_backward", lambda *_: None)
    for processes in PROCESSES:
        Contestant("limit", tiny_options(processes=processes), own_process=False)
    assert [steps.count(processes) for processes in ("shared", "isolated")] == [2, 2]
    assert 2 < steps.count("sequential") <= 8


def in_a_thread(name, options):
    here, there = Pipe()
    Thread(target=rounds._serve, args=(there, name, options), daemon=True).start()
    return nullcontext(rounds._Worker(name, here))


@pytest.mark.parametrize("shared", [True, False])
def test_a_method_that_does_not_fit_is_left_out(tiny_options, monkeypatch, shared, capsys):
    def out_of_memory(name, options, own_process):
        if name == "lora":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried much.")
        return Contestant(name, options, own_process)

    monkeypatch.setattr(rounds, "_worker", in_a_thread)
    monkeypatch.setattr(rounds, "Contestant", out_of_memory)
    processes = "shared" if shared else "isolated"
    rows, left_out = compare(tiny_options(methods=("limit", "lora"), processes=processes, serving=False))
    assert [row["method"] for row in rows] == ["limit"] and "CUDA out of memory" in left_out["lora"]
    assert "lora is left out: it does not fit" in capsys.readouterr().out


def test_an_error_in_another_process_is_shown(tiny_options):
    here, there = Pipe()
    worker = rounds._Worker("spft-gradient", here)
    here.send("prepare")
    rounds._serve(there, "spft-gradient", tiny_options(mask="drawn", mask_statistics="none.json"))
    worker.wait_until_started()
    with pytest.raises(SpftError, match=r"(?s)the process of spft-gradient failed:.*none\.json"):
        worker.prepare()
    there.close()
    for request in (worker.wait_until_started, worker.round):
        with pytest.raises(SpftError, match="ended without a word"):
            request()


def test_methods_are_prepared_one_at_a_time(tiny_options, monkeypatch):
    busy, seen = Lock(), []

    def prepared(name, options, own_process):
        seen.append((name, busy.acquire(blocking=False)))
        time.sleep(0.2)
        busy.release()
        return Contestant(name, options, own_process)

    monkeypatch.setattr(rounds, "_worker", in_a_thread)
    monkeypatch.setattr(rounds, "Contestant", prepared)
    compare(tiny_options(methods=("limit", "lora", "full"), processes="isolated", serving=False))
    assert seen == [("limit", True), ("lora", True), ("full", True)]


def test_a_sweep_repeats_the_comparison(tiny_options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    options = tiny_options(methods=("limit", "spft-gradient", "lora"), serving=False)
    main.run_sweep(options, "density", ["0.05", "0.2"], output, picture)
    content = json.loads(output.read_text())
    assert content["sweep"] == "density" and [point["value"] for point in content["points"]] == [0.05, 0.2]
    low, high = (point["rows"][1]["trained"] for point in content["points"])
    assert high == pytest.approx(4 * low, rel=0.01)
    assert picture.stat().st_size > 1000
    assert capsys.readouterr().out.count("| 0.05 ") == 3


def test_a_sweep_that_is_broken_off_leaves_what_it_has_measured(tiny_options, tmp_path, monkeypatch):
    def once(options):
        monkeypatch.setattr(sweep_module, "compare", lambda _: pytest.exit("as Ctrl-C does"))
        return compare(options)

    monkeypatch.setattr(sweep_module, "compare", once)
    options = tiny_options(methods=("limit",), serving=False)
    with pytest.raises(pytest.exit.Exception):
        main.run_sweep(options, "tokens", ["16", "24"], tmp_path / "sweep.json", None)
    (point,) = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert point["value"] == 16 and point["rows"][0]["seconds"]


@pytest.mark.parametrize("over, value, key", [("tokens", 32, None), ("width", 96, None), ("area", 0.5, "area")])
def test_each_option_can_be_swept(tiny_options, over, value, key):
    from axolotl_spft.bench.sweep import sweep

    ((at, rows, _),) = sweep(tiny_options(methods=("spft-gradient",), serving=False), over, [value])
    assert at == value
    if key:
        assert rows[0][key] == pytest.approx(value, abs=0.05)


def test_values_of_a_sweep_are_checked():
    assert parse_values("tokens", ["8", "16"]) == [8, 16]
    with pytest.raises(SpftError, match="needs values"):
        parse_values("tokens", [])
    with pytest.raises(SpftError, match=r"0\.5"):
        parse_values("tokens", ["0.5"])


def test_without_matplotlib_nothing_is_measured(tiny_options, tmp_path, monkeypatch):
    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    monkeypatch.setattr(main, "compare", lambda options: pytest.fail("measured"))
    with pytest.raises(SpftError, match="pip install matplotlib"):
        main.run_comparison(tiny_options(), None, tmp_path / "bench.png")


def test_all_mistakes_are_reported_together(tiny_options):
    with pytest.raises(SpftError, match=r"`density 2` must be in \(0, 1\].*`rounds 0` must be at least 1"):
        tiny_options(rank=None, density=2, rounds=0)


@pytest.mark.parametrize(
    ("output", "picture", "message"),
    [
        ("file/a.json", None, "nothing can be written to"),
        (".", None, "name a file"),
        (None, "a.xyz", r"must end in \.png, \.pdf, \.svg"),
    ],
)
def test_files_that_cannot_be_written_are_found_before_anything_is_measured(
    output, picture, message, tiny_options, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    monkeypatch.setattr(main, "compare", lambda _: pytest.fail("it was measured"))
    paths = (None if name is None else tmp_path / name for name in (output, picture))
    with pytest.raises(SpftError, match=message):
        main.run_comparison(tiny_options(), *paths)


def test_a_bad_value_of_a_sweep_is_found_before_the_good_ones_are_measured(tiny_options, monkeypatch):
    monkeypatch.setattr(sweep_module, "compare", lambda _: pytest.fail("it was measured"))
    with pytest.raises(SpftError, match="`width 49` must be a multiple of"):
        sweep_module.sweep(tiny_options(), "width", [48, 49])


def test_a_picture_names_the_processor_that_ran(tiny_options, monkeypatch):
    what = {"gpu": "a GPU", "cpu": "a CPU", "date": "2026-01-01T00:00"}
    monkeypatch.setattr(main, "machine", lambda: what)
    assert "; a CPU, 2026-01-01" in main._title(tiny_options(device="cpu"))
    assert "; a GPU, 2026-01-01" in main._title(tiny_options(device="cuda"))
