"""The table of repaired bases follows from its lines, keeps its promises, and is measured as it says."""

from __future__ import annotations

import json

import pytest

from integration.evidence.records import append, lines_of
from integration.repair.measure import ROWS, measure
from integration.repair.page import PAGE, RESULTS, gap_closed, page
from tests.byte_llama import save_byte_llama


def test_the_page_is_that_of_the_lines():
    assert PAGE.read_text(encoding="utf-8") == page(lines_of(RESULTS)), "run `python -m integration.repair page`"


def test_a_tenth_of_a_percent_closes_a_third_of_the_gap_and_more_than_a_low_rank_of_many_times_the_size():
    by_base = {}
    for line in lines_of(RESULTS):
        by_base.setdefault(line["base"], {})[line["row"]] = line
    assert len(by_base) == 2 and all(rows.keys() == ROWS.keys() for rows in by_base.values())
    for base, name, times in (("smollm2-135m-instruct", "NF4, low rank 4", 10), ("gemma-3-270m", "NF4, low rank 1", 2)):
        rows = by_base[base]
        repaired, low_rank, all_rows = rows["NF4, repair of 0.1%"], rows[name], list(rows.values())
        assert low_rank["values"] > times * repaired["values"]
        assert gap_closed(repaired, all_rows) >= 0.35
        assert gap_closed(repaired, all_rows) > gap_closed(low_rank, all_rows)


def test_rows_are_measured_recorded_and_drawn(tmp_path):
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}. #### {n + 1}"} for n in range(8)]
    for part in ("train", "test"):
        (tmp_path / f"gsm8k_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"instruction": f"Please answer, question: Is {n} even?\n\nAnswer1: yes"} for n in range(8)]
    (tmp_path / "ARC-Easy_test.json").write_text(json.dumps(questions))
    base = save_byte_llama(tmp_path / "base")
    setting = {"base": str(base), "judged": 4, "samples": 4}
    for name in ("bf16", "NF4", "NF4, repair of 1%", "NF4, low rank 1"):
        append(
            tmp_path / "lines", {"row": name, **setting, **measure(row=name, data=tmp_path, bases=tmp_path, **setting)}
        )
    lines = lines_of(tmp_path / "lines")
    plain, quantized, repaired, low_rank = lines
    assert plain["values"] == quantized["values"] == 0 < repaired["values"] < low_rank["values"]
    assert repaired["share"] == pytest.approx(0.01, rel=0.05)
    assert len({line["task_loss"] for line in lines}) == 4
    assert f"| NF4, repair of 1% | {repaired['values']:,} | 1.00% | {repaired['task_loss']:.4f} |" in page(lines)
    assert gap_closed(plain, lines) == 1 and gap_closed(quantized, lines) == 0
