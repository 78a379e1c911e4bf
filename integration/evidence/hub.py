"""The data sets of the experiments on the Hugging Face hub, as questions with their answers."""

from __future__ import annotations

from typing import Any, NamedTuple


class Source(NamedTuple):
    """A data set's name (or folder), its configuration, and the name of its test split."""

    name: str
    configuration: str | None
    test: str = "test"


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main"),
    "arc-easy": Source("allenai/ai2_arc", "ARC-Easy"),
    "arc-challenge": Source("allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": Source("allenai/openbookqa", "main"),
    "boolq": Source("google/boolq", None, "validation"),
}


def rows_of_hub(task: str, part: str) -> list[dict[str, Any]]:
    """The rows of ``part``: ``train`` or ``test``."""
    from datasets import load_dataset

    source = SOURCES[task]
    return list(load_dataset(source.name, source.configuration, split=part if part == "train" else source.test))


def choice_of(row: dict[str, Any]) -> tuple[str, str, tuple[str, ...]] | None:
    """Question, right answer and all answers of a row of ARC, OpenBookQA or BoolQ; None where no answer is the right
    one."""
    if "choices" not in row:
        return row["question"], "yes" if row["answer"] else "no", ("yes", "no")
    answers = dict(zip(row["choices"]["label"], row["choices"]["text"]))
    if row["answerKey"] not in answers:
        return None
    return row.get("question") or row["question_stem"], answers[row["answerKey"]], tuple(answers.values())
