"""MetaMathQA to train, GSM8K to judge, and encyclopedia text that shows forgetting.

Without a folder the hub's data sets are read, which PEFT's comparison names. A folder holds JSON lines:
``metamath_train.jsonl`` (``query``, ``response``; without it GSM8K's training part is trained), ``gsm8k_train.jsonl``
and ``gsm8k_test.jsonl`` (``question``, ``answer``), and ``wiki.jsonl`` (``text``; without it GSM8K's test questions).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from integration.evidence.hub import rows_of_hub

_LONGEST, _VALID, _TEXTS = 1300, 50, 100


class Pair(NamedTuple):
    """A question and its answer."""

    query: str
    response: str


class Data(NamedTuple):
    """What is trained, judged on the way, judged at the end, and not touched."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]
    texts: list[str]


def load_data(folder: Path | None) -> Data:
    """All of it; training pairs of more than 1,300 characters are left out.

    Raises:
        SystemExit: a file is missing.
    """
    if folder is None:
        maths, train, test, texts = _from_hub()
    else:
        train, test = (_pairs(folder / f"gsm8k_{part}.jsonl", "question", "answer") for part in ("train", "test"))
        maths_file, texts_file = folder / "metamath_train.jsonl", folder / "wiki.jsonl"
        maths = _pairs(maths_file, "query", "response") if maths_file.is_file() else train
        texts = [row["text"] for row in _rows(texts_file)] if texts_file.is_file() else [each.query for each in test]
    order = np.arange(len(train))
    np.random.RandomState(0).shuffle(order)
    kept = [pair for pair in maths if len(f"{pair.query} {pair.response}") <= _LONGEST]
    return Data(kept, [train[i] for i in order[:_VALID]], test, texts[:_TEXTS])


def _from_hub() -> tuple[list[Pair], list[Pair], list[Pair], list[str]]:
    from datasets import load_dataset

    maths = [Pair(row["query"], row["response"]) for row in load_dataset("meta-math/MetaMathQA", split="train")]
    train, test = (
        [Pair(row["question"], row["answer"]) for row in rows_of_hub("gsm8k", part)] for part in ("train", "test")
    )
    texts = load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True).take(_TEXTS)
    return maths, train, test, [row["text"] for row in texts]


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: name the folder that holds it with --data, or leave --data out")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pairs(path: Path, query: str, response: str) -> list[Pair]:
    return [Pair(row[query], row[response]) for row in _rows(path)]
