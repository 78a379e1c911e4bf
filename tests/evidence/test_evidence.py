"""The evidence runs: a queue that resumes, figures that follow from recorded lines, every method on a tiny model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from integration.evidence import hub, tasks
from integration.evidence.__main__ import run_files
from integration.evidence.comparison import ranking, rises, uncertainty_of_start
from integration.evidence.experiment import key_of, queue, read_experiment, runs_of
from integration.evidence.judge import IGNORED, batch_of, encode, judge
from integration.evidence.plan import plan
from integration.evidence.records import EXPERIMENTS, RESULTS, append, records_of, rounded
from integration.evidence.report import write_report
from integration.evidence.table import Price, Row, best_rows, difference, prices_of_gain, rows_of
from integration.evidence.tasks import Example, Task, load_task
from integration.evidence.train import _with_mask_file
from tests.byte_llama import save_byte_llama

PAGE = Path(RESULTS).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A saved Llama of 2 layers with a tokenizer of bytes."""
    return save_byte_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    maths = [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(12)
    ]
    for part in ("train", "test"):
        (folder / f"gsm8k_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in maths))
        instruction = (
            "Please choose the correct answer to the question: Which is red?\n\n"
            "Answer1: a rose Answer2: the sea Answer3: snow\n\nAnswer format: answer1/answer2/answer3"
        )
        rows = [{"instruction": instruction, "answer": f"answer{1 + i % 3}", "output": ""} for i in range(6)]
        (folder / f"ARC-Easy_{part}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def short_python(monkeypatch):
    """The standard library is read once for all tests, and little of it."""
    monkeypatch.setattr(tasks, "_held_out_source", lambda number: ["def f(x):\n    return x\n"] * min(number, 2))


def experiment_of(base: Path, **changes) -> dict:
    methods = [
        {"label": "base", "method": "none"},
        {"label": "spft", "method": "spft", "options": {"density": 0.05}, "learning_rates": [0.01, 0.03]},
    ]
    return {
        "question": "a", "title": "t", "base": str(base), "task": "gsm8k", "steps": 2, "batch": 2, "length": 64,
        "judged": 3, "texts": 2, "samples": 4, "dtype": "float32", "methods": methods, **changes,
    }  # fmt: skip


def test_what_is_wrong_in_an_experiment_is_said_together(tmp_path):
    path = tmp_path / "e.json"
    path.write_text(
        json.dumps(
            {"title": "t", "task": "chess", "reference": "no", "methods": [{"method": "magic", "rate": 1}], "sedes": []}
        )
    )
    with pytest.raises(SystemExit) as error:
        read_experiment(path)
    message = str(error.value)
    for part in ("unknown key `sedes`", "`question` is missing", "methods[0]: unknown key `rate`", "`method: magic`",
                 "`task: chess`", "`base` is missing", "`learning_rates` is missing", "`label` is",
                 "`reference: no` is the label of no"):  # fmt: skip
        assert part in message


def test_all_shipped_experiments_are_sound_and_name_different_runs():
    files = sorted(EXPERIMENTS.glob("*.json"))
    assert files
    made = set()
    for path in files:
        keys = [key_of(run) for run in runs_of(read_experiment(path), records_of(RESULTS))]
        assert len(keys) == len(set(keys)) > 1
        made |= set(keys)
    assert records_of(RESULTS).keys() <= made, "a record that no run of the experiments makes"


def test_the_page_is_what_the_recorded_lines_give(tmp_path):
    write_report(EXPERIMENTS, RESULTS, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (PAGE / "README.md").read_bytes()
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in PAGE.glob("*.png")}


def test_the_conclusions_hold_no_loss_that_their_tables_lack():
    parts = re.split(r"^## ", (PAGE / "README.md").read_text(), flags=re.MULTILINE)
    sections = {part[0]: part for part in parts if re.match(r"[a-h]\. ", part)}
    conclusions = json.loads((RESULTS / "conclusions.json").read_text())
    assert list(sections) == sorted(conclusions) == list("abcdefgh")
    for question, text in conclusions.items():
        figures = re.findall(r"\d\.\d{3}\b", text)
        assert figures, question
        named = [question, *re.findall(r"\(([a-h])\)", text)]
        for figure in figures:
            assert any(figure in sections[each] for each in named), (question, figure)


def test_seeds_come_one_after_the_other_and_only_where_asked_for():
    runs = runs_of(experiment_of("b", seeds=[0, 1], methods=[
        {"label": "base", "method": "none"},
        {"label": "s", "method": "spft", "learning_rates": [0.1, 0.3]},
    ]))  # fmt: skip
    assert [(run["method"], run["learning_rate"], run["seed"]) for run in runs] == [
        ("none", 0.0, 0), ("spft", 0.1, 0), ("spft", 0.3, 0), ("spft", 0.1, 1), ("spft", 0.3, 1),
    ]  # fmt: skip
    assert key_of(runs[0]) == key_of(dict(reversed(runs[0].items())))


@pytest.mark.parametrize(
    ("start", "best", "tried"),
    [
        ([1e-3, 3e-3], 1e-3, [1e-3, 3e-3, 3e-4]),
        ([1e-3, 3e-3], 1e-2, [1e-3, 3e-3, 1e-2, 3e-2]),
        ([1e-3], 1e-3, [1e-3, 3e-3, 3e-4]),
        ([1e-2], 0.3, [1e-2, 3e-2, 0.1, 0.3]),
    ],
)
def test_a_grid_grows_until_its_best_rate_lies_inside(start, best, tried):
    method = {"label": "s", "method": "spft", "learning_rates": start, "repeats": [1, 2]}
    experiment, records, done = experiment_of("b", methods=[method]), {}, []
    while waiting := [run for run in runs_of(experiment, records) if key_of(run) not in records]:
        run = waiting[0]
        done.append((run["learning_rate"], run["seed"]))
        # a diverged run is infinitely bad, and the repeats must not move the choice
        rate = run["learning_rate"]
        loss = math.inf if rate > 5 * best else abs(math.log(rate / best)) + 9 * run["seed"]
        records[key_of(run)] = {"result": {"after_task_loss": loss}}
    assert done == [*((rate, 0) for rate in tried), (best, 1), (best, 2)]


def test_a_line_that_was_cut_off_is_done_again(tmp_path):
    path, run = tmp_path / "r.jsonl", {"method": "none", "seed": 0}
    append(path, {**run, "result": rounded({"task_loss": 1.23456789})})
    path.write_bytes(path.read_bytes()[:-20])
    assert records_of(tmp_path) == {}
    append(path, {**run, "result": rounded({"task_loss": 1.23456789})})
    (record,) = records_of(tmp_path).values()
    assert record["result"] == {"task_loss": 1.23457} and record["made"]["versions"]["torch"]


def test_a_queue_resumes_and_sums_up(base, data, tmp_path, short_python):
    experiment, results = experiment_of(base), tmp_path / "results"
    path = tmp_path / "small.json"
    path.write_text(json.dumps(experiment))
    threads = torch.get_num_threads()
    run_files([path], data, tmp_path / "bases", threads, results)
    lines = (results / "small.jsonl").read_text().splitlines()
    # of two rates one is at the edge, so the grid has grown
    assert len(lines) >= 4
    (results / "small.jsonl").write_text("\n".join(lines[:2]) + "\n")
    run_files([path], data, tmp_path / "bases", threads, results)
    again = (results / "small.jsonl").read_text().splitlines()
    assert again[:2] == lines[:2] and len(again) == len(lines)
    exact = ("before_task_loss", "after_task_loss", "after_english_loss", "trained")
    first, second = (json.loads(each)["result"] for each in (lines[2], again[2]))
    assert {name: first[name] for name in exact} == {name: second[name] for name in exact}
    rows = rows_of(experiment, records_of(results))
    assert (rows[0].label, rows[0].learning_rate) == ("base", 0.0) and {row.label for row in rows[1:]} == {"spft"}
    assert len(list((tmp_path / "bases" / "masks").iterdir())) == 1, "all rates share one mask"
    winner, inner = best_rows(rows)["spft"]
    assert winner.mean("after_task_loss") == min(row.mean("after_task_loss") for row in rows[1:]) and inner
    write_report(path.parent, results, tmp_path / "page")
    (rms,) = (json.loads(line)["result"]["weight_rms"] for line in again if "weight_rms" in line)
    units = winner.learning_rate / (rms * (0.005 / experiment["methods"][1]["options"]["density"]) ** 0.75)
    page = (tmp_path / "page" / "README.md").read_text()
    assert "12 rows of the training set are that short" in page
    assert {json.loads(line)["made"]["data"] for line in again} == {"files"}
    assert f"| {winner.trained:,} | **{winner.learning_rate:g}** | {units:.2g} |" in page


@pytest.mark.parametrize(
    "options, same_for_all_seeds, same_for_all_rates",
    [
        ({}, True, True),
        ({"salience": "random"}, False, True),
        ({"salience": "integration.evidence.own_scores:sampled"}, False, True),
        ({"score_after": 2}, False, False),
    ],
)
def test_a_mask_is_shared_where_it_is_the_same(options, same_for_all_seeds, same_for_all_rates, tmp_path):
    entry = {"label": "spft", "method": "spft", "options": options, "learning_rates": [0.01, 0.03], "seeds": [0, 1]}
    runs = {(run["seed"], run["learning_rate"]): run for run in runs_of(experiment_of("b", methods=[entry]))}
    file = {which: _with_mask_file(run, tmp_path)["mask_path"] for which, run in runs.items()}
    assert (file[0, 0.01] == file[1, 0.01]) is same_for_all_seeds
    assert (file[0, 0.01] == file[0, 0.03]) is same_for_all_rates


def row_of(label, rate, task, english=3.0, method="spft", before=(2.0, 3.0)) -> Row:
    """A row of the task losses by seed, with one loss on English for all."""
    task = task if isinstance(task, dict) else {0: task}
    figures = {"before_task_loss": before[0], "before_english_loss": before[1], "after_english_loss": english}
    figures = {name: dict.fromkeys(task, value) for name, value in figures.items()}
    return Row(label, method, rate, 1, figures | {"after_task_loss": task}, frozenset(task))


def test_what_is_paid_for_the_same_gain_is_read_off_the_curves():
    rows = [row_of("a", 0.1, 1.5, 3.1), row_of("a", 0.3, 1.0, 3.5), row_of("a", 1.0, 1.2, 9.0), row_of("b", 0.1, 1.4)]
    target, prices = prices_of_gain(rows, "english", 0.9)
    assert target == pytest.approx(1.1) and prices["b"] is None
    assert prices["a"] == (pytest.approx(0.1 + 0.8 * 0.4), False)
    target, prices = prices_of_gain(rows, "english", 0.25)
    assert prices == {"a": (pytest.approx(0.05), True), "b": (pytest.approx(0.0), True)}
    assert prices_of_gain([*rows, row_of("a", 0.01, math.inf)], "english", 0.9)[1]["a"].rise == pytest.approx(0.42)


def test_prices_of_a_method_that_starts_elsewhere_are_over_the_bases_loss():
    base = Row("base", "none", 0.0, 0, {"before_english_loss": {0: 3.0}}, frozenset({0}))
    rows = [base, row_of("repaired", 0.1, 1.0, 2.9, before=(1.8, 2.8)), row_of("plain", 0.1, 1.0, 3.1)]
    prices = prices_of_gain(rows, "english", 1.0)[1]
    assert prices == {"repaired": (pytest.approx(-0.1), True), "plain": (pytest.approx(0.1), True)}
    assert all(isinstance(price, Price) for price in prices.values())


def cells_of(table: str) -> dict[str, list[str]]:
    """A markdown table's first column -> the others."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    return {first: others for first, *others in lines}


def test_methods_are_compared_seed_by_seed():
    rows = [row_of("a", rate, loss) for rate, loss in ((0.1, 2.0), (0.3, {0: 1.0, 1: 1.1, 2: 1.2}), (1.0, 2.0))]
    # its second seed was cut off
    rows += [row_of("b", rate, loss) for rate, loss in ((0.1, 2.0), (0.3, {0: 1.3, 2: 1.4}), (1.0, 2.0))]
    rows += [row_of("c", 0.1, 1.5), row_of("c", 0.3, 0.9)]
    table = cells_of(ranking(best_rows(rows), "a"))
    assert [*table][2:] == ["c", "a", "b"]
    assert table["a"] == ["1", "0.3", "1.100 ± 0.100", "", ""]
    assert table["b"] == ["1", "0.3", "1.350 ± 0.050", "+0.250 ± 0.050 (2 seeds)", "+0.200"]
    assert table["c"] == ["1", "0.3 (edge)", "0.900", "-0.100 (1 seed)", ""]


def test_a_difference_has_the_standard_error_of_its_mean():
    found = difference({0: 1.0, 1: 2.0, 2: 4.0, 7: 9.0}, {0: 0.9, 1: 1.7, 2: 3.8})
    deviations = [0.1 - 0.2, 0.3 - 0.2, 0.2 - 0.2]
    assert found.mean == pytest.approx(0.2) and found.seeds == 3
    assert found.error == pytest.approx(math.sqrt(sum(each**2 for each in deviations) / 2 / 3))
    assert difference({0: 1.0}, {1: 1.0}) is None and difference({0: 1.0}, {0: 1.5}) == (-0.5, None, 1)


def test_rises_are_over_the_base_and_over_a_start_of_its_own():
    base = Row("base", "none", 0.0, 0, {"before_english_loss": {0: 3.0}}, frozenset({0}))
    plain, repaired = row_of("plain", 0.1, 1.0, 3.1), row_of("repaired", 0.1, {0: 1.0, 1: 1.0}, 2.9, before=(1.8, 2.8))
    table = cells_of(rises(best_rows([base, plain]), [base, plain], ["english"]))
    assert table["method"] == ["task loss", "rise on english"] and table["plain"] == ["1.000", "+0.100"]
    rows = [base, plain, repaired]
    table = cells_of(rises(best_rows(rows), rows, ["english"]))
    assert [*table][2:] == ["repaired", "plain"]
    assert table["repaired"] == ["1.000 ± 0.000", "-0.100 ± 0.000", "+0.100 ± 0.000"]
    assert table["plain"] == ["1.000", "+0.100", "+0.100"]


def test_the_untouched_model_is_judged_as_nearly_equal_by_all_runs():
    base = Row(
        "base", "none", 0.0, 0, {f"before_{name}_loss": {0: 2.0} for name in ("task", "english")}, frozenset({0})
    )
    rows = [
        base,
        row_of("another machine", 0.1, 1.0, before=(2.003, 2.001)),
        row_of("moved", 0.1, 1.0, before=(1.8, 2.8)),
    ]
    assert uncertainty_of_start(rows, ["english"]) == pytest.approx(0.003)


def test_the_plan_counts_what_a_search_will_need(tmp_path):
    method = {"label": "s", "method": "spft", "learning_rates": [1e-3, 3e-3], "repeats": [1, 2]}
    experiment, records = experiment_of("b", methods=[{"label": "base", "method": "none"}, method]), {}
    path = tmp_path / "e.json"
    path.write_text(json.dumps({**experiment, "order": 1}))
    assert queue(tmp_path) == [path]
    # the base, two rates, one that is not known yet, two repeats
    assert plan([path, path], records).splitlines()[1].split()[:3] == ["e", "0", "6"]
    for run, loss in zip(runs_of(experiment), (9.0, 1.0, 2.0)):
        records[key_of(run)] = {**run, "result": {"after_task_loss": loss, "cpu_seconds": 1800.0}}
    lines = plan([path, path], records).splitlines()
    assert lines[1].split() == ["e", "3", "3", "1.5", "h"] and lines[2].split() == ["e", "6", "0", "0.0", "h"]


METHODS = [
    {"method": "spft", "options": {"density": 0.05, "relative_rate": 0.5, "scope": "global"}},
    {"method": "spft", "options": {"match_lora_rank": 2}, "bits": 4},
    {"method": "spft", "options": {"density": 0.05, "reselect": {"every": 3, "fraction": 0.2}}},
    {"method": "spft", "options": {"match_lora_rank": 2, "repair": 0.2}, "bits": 4},
    {"method": "lora", "options": {"r": 2, "use_dora": True}},
    {"method": "lora", "options": {"r": 2, "init_lora_weights": "pissa"}},
    {"method": "lora", "options": {"r": 8, "start": "quantization_error"}, "bits": 4},
    {"method": "both", "options": {"r": 2, "low_rank_rate": 0.01, "match_lora_rank": 2, "salience": "random"}},
    {"method": "shira", "options": {"r": 2}},
    {"method": "full"},
]


@pytest.mark.parametrize(
    "entry", METHODS, ids=lambda entry: f"{entry['method']}-{'-'.join(map(str, entry.get('options', {})))}"
)
def test_every_method_lowers_the_loss_of_what_it_trains(entry, base, data, tmp_path, short_python):
    from integration.evidence.train import train

    entry = {"label": "x", "learning_rates": [0.03], "steps": 12, **entry}
    (run,) = runs_of(experiment_of(base, methods=[entry]))
    result = train(run, data, tmp_path)
    assert result["after_task_loss"] < result["before_task_loss"] - 0.1
    assert result["trained"] > 0 and all(math.isfinite(value) for value in result.values())


def test_the_low_rank_start_comes_nearer_to_the_unquantized_model(base, data, tmp_path, short_python):
    from integration.evidence.train import train

    def loss(bits, **options):
        entry = {
            "label": "x",
            "method": "lora",
            "options": {"r": 32, **options},
            "bits": bits,
            "learning_rates": [1e-3],
        }
        (run,) = runs_of(experiment_of(base, methods=[entry], steps=1))
        return train(run, data, tmp_path)["before_task_loss"]

    exact, plain, repaired = loss(16), loss(4), loss(4, start="quantization_error")
    assert abs(repaired - exact) < abs(plain - exact) / 2


def test_choices_and_questions_are_read_as_text(data, short_python):
    task = load_task("arc-easy", data, 4, 2)
    assert task.train[1] == Example("Question: Which is red?\nAnswer:", " the sea", (" a rose", " the sea", " snow"))
    assert set(task.untouched) == {"english", "python"}
    assert load_task("gsm8k", data, 4, 2).train[0].answer == " It is 1.\n#### 1"
    with pytest.raises(SystemExit, match=r"boolq_train.json is missing: name the folder that holds it with --data"):
        load_task("boolq", data, 4, 2)


def test_the_hubs_data_sets_are_read_as_the_files_are(data, tmp_path, monkeypatch, short_python):
    choices = {"text": ["a rose", "the sea", "snow"], "label": ["A", "B", "C"]}
    rows = {
        "gsm8k": [json.loads(line) for line in (data / "gsm8k_train.jsonl").read_text().splitlines()],
        "arc-easy": [{"question": "Which is red?", "choices": choices, "answerKey": "ABC"[i % 3]} for i in range(6)],
        "openbookqa": [{"question_stem": "Snow is", "choices": choices, "answerKey": "C"}] * 2,
        "boolq": [{"question": "is it", "answer": answer, "passage": "-"} for answer in (True, False)],
    }
    for task, source in hub.SOURCES.items():
        folder = tmp_path / "hub" / task
        folder.mkdir(parents=True)
        for part in ("train", source.test):
            lines = [json.dumps(row) for row in rows.get(task, rows["arc-easy"])]
            (folder / f"{part}.jsonl").write_text("\n".join(lines))
        monkeypatch.setitem(hub.SOURCES, task, hub.Source(str(folder), None, source.test))
    assert load_task("gsm8k", None, 4, 2) == load_task("gsm8k", data, 4, 2)
    assert load_task("arc-easy", None, 4, 2) == load_task("arc-easy", data, 4, 2)
    (stem, *_), (yes, no) = load_task("openbookqa", None, 4, 2).train, load_task("boolq", None, 4, 2).train
    assert stem == Example("Question: Snow is\nAnswer:", " snow", (" a rose", " the sea", " snow"))
    assert (yes.answer, no.answer, yes.choices) == (" yes", " no", (" yes", " no"))


def test_a_run_that_fails_does_not_hold_up_the_others(base, data, tmp_path, short_python, capsys):
    experiment = experiment_of(base)
    experiment["methods"].insert(1, {"label": "no", "method": "lora", "options": {"r": 0}, "learning_rates": [1e-3]})
    path = tmp_path / "small.json"
    path.write_text(json.dumps(experiment))
    assert run_files([path], data, tmp_path / "bases", torch.get_num_threads(), tmp_path / "results") == 1
    assert "should be a positive integer" in capsys.readouterr().err
    assert {each["method"] for each in records_of(tmp_path / "results").values()} == {"none", "spft"}


def test_losses_are_those_of_the_answers_tokens_alone(base):
    from integration.evidence.bases import load_base, load_tokenizer

    model, tokenizer = load_base(str(base), 16, torch.float32, "cpu"), load_tokenizer(str(base))
    examples = [Example("ab", " c", (" c", " dd")), Example("abcd", " e", (" e", " ff"))]
    results = judge(model, tokenizer, Task([], examples, {"english": ["some text"]}), 64)
    losses, scores = [], {}
    for example in examples:
        for choice in example.choices:
            ids, labels = encode(tokenizer, example.prompt, choice, 64)
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            each = [-logits[at - 1, ids[at]].item() for at in range(1, len(ids)) if labels[at] != IGNORED]
            scores[example.prompt, choice] = sum(each) / len(choice)
            losses += each if choice == example.answer else []
    assert results["task_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    right = sum(scores[e.prompt, e.answer] == min(scores[e.prompt, c] for c in e.choices) for e in examples)
    assert results["accuracy"] == right / 2
    padded = batch_of([([1, 2], [IGNORED, 2]), ([3], [3])], 9, "cpu")
    assert padded["input_ids"].tolist() == [[1, 2], [3, 9]] and padded["labels"].tolist() == [
        [IGNORED, 2],
        [3, IGNORED],
    ]
    assert padded["attention_mask"].tolist() == [[1, 1], [1, 0]]
