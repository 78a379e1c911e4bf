"""The tasks of the experiments: prompts with answers, and text that a task does not train."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from integration.evidence.bases import QUICKSTART
from integration.evidence.hub import choice_of, rows_of_hub

# files of the folder that `--data` names, and how many examples of the test set are judged
CHOICE_TASKS = {"arc-easy": "ARC-Easy", "arc-challenge": "ARC-Challenge", "openbookqa": "openbookqa", "boolq": "boolq"}
TASKS = ("gsm8k", *CHOICE_TASKS, "docstrings")


class Example(NamedTuple):
    """A prompt and its answer; ``choices`` are all answers that are compared, the right one among them."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


class Task(NamedTuple):
    """What is trained, what is judged, and texts of other kinds (name -> texts) that should not get worse."""

    train: list[Example]
    test: list[Example]
    untouched: dict[str, list[str]]


def load_task(
    name: str, data: Path | None, judged: int, texts: int, fits: Callable[[Example], bool] = lambda example: True
) -> Task:
    """A task by name, of the examples that ``fits``: the first ``judged`` of its shuffled test set, and of texts.

    Args:
        data: Folder with the data as JSON; None for the hub's data sets.

    Raises:
        SystemExit: the name or a file is unknown.
    """
    if name not in TASKS:
        raise SystemExit(f"task {name!r} is unknown: it must be one of {', '.join(TASKS)}")
    held_out_python = _held_out_source(texts)
    if name == "docstrings":
        train, test = _docstrings(judged)
        return Task(*([each for each in part if fits(each)] for part in (train, test)), {"python": held_out_python})
    if name == "gsm8k":
        train, test = (maths(data, part) for part in ("train", "test"))
        english = _questions(data)
    else:
        train, test = (_choices_of(data, name, part) for part in ("train", "test"))
        english = [example.prompt for example in maths(data, "test")]
    return Task(
        [each for each in train if fits(each)],
        [each for each in _shuffled(test) if fits(each)][:judged],
        {"english": _shuffled(english)[:texts], "python": held_out_python},
    )


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: name the folder that holds it with --data")
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def maths(data: Path | None, part: str) -> list[Example]:
    """GSM8K's questions and answers of ``part``, without the marks of a calculator."""
    rows = rows_of_hub("gsm8k", part) if data is None else _rows(data / f"gsm8k_{part}.jsonl")
    return [_example(row["question"], re.sub(r"<<[^>]*>>", "", row["answer"])) for row in rows]


def _example(question: str, answer: str, choices: Sequence[str] = ()) -> Example:
    return Example(f"Question: {question}\nAnswer:", f" {answer}", tuple(f" {choice}" for choice in choices))


def _questions(data: Path | None) -> list[str]:
    """The bare questions of ARC-Easy's test set."""
    if data is None:
        return [row["question"] for row in rows_of_hub("arc-easy", "test")]
    return [question(row) for row in _rows(data / "ARC-Easy_test.json")]


def _choices_of(data: Path | None, name: str, part: str) -> list[Example]:
    if data is None:
        return [_example(*found) for found in map(choice_of, rows_of_hub(name, part)) if found is not None]
    return _choice(data / f"{CHOICE_TASKS[name]}_{part}.json")


def question(row: dict) -> str:
    """The bare question of a multiple-choice row of ARC, OpenBookQA or BoolQ."""
    text = re.sub(r"^Please [^:]*?(?:question:|question: )\s*", "", row["instruction"])
    text = re.sub(r"^Please answer the following question with true or false, question:\s*", "", text)
    return text.split("\n\nAnswer")[0].strip()


def _choice(path: Path) -> list[Example]:
    """The answers as text, which a small model can judge, not as the names of the answers."""
    examples = []
    for row in _rows(path):
        if row["answer"] in ("true", "false"):
            choices = {"true": "yes", "false": "no"}
        else:
            listed = row["instruction"].split("\n\n")[1]
            parts = re.split(r"\s*Answer(\d): ", " " + listed)[1:]
            choices = {f"answer{number}": text.strip() for number, text in zip(parts[::2], parts[1::2])}
        if row["answer"] in choices:
            examples.append(_example(question(row), choices[row["answer"]], tuple(choices.values())))
    return examples


def _quickstart_corpus():
    if str(QUICKSTART) not in sys.path:
        sys.path.insert(0, str(QUICKSTART))
    import corpus

    return corpus


def _docstrings(judged: int) -> tuple[list[Example], list[Example]]:
    corpus = _quickstart_corpus()
    training, held_out = corpus.split_by_module(corpus.standard_library(), 15)
    parts = corpus.train_and_validation(training, held_out, 3600, judged, 0)
    return tuple([Example(f"{row['input']}\n", row["output"]) for row in part] for part in parts)


def _held_out_source(number: int, characters: int = 200) -> list[str]:
    corpus = _quickstart_corpus()
    _, held_out = corpus.split_by_module(corpus.standard_library(), 15)
    pieces = [
        source.text[start : start + characters]
        for source in held_out
        for start in range(0, max(1, len(source.text) - characters), characters)
    ]
    return _shuffled(pieces)[:number]


def _shuffled(items: Sequence) -> list:
    mixed = list(items)
    random.Random(0).shuffle(mixed)
    return mixed
