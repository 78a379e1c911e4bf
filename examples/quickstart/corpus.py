"""The Python standard library's own source as a text corpus, and its docstrings as an instruction set.

What is held out: the library is split by top-level module or package (``json``, ``asyncio``, ...). The modules
whose hashed name falls into the held-out share are never seen by the tokenizer, the pretraining or the training
rows; every validation row comes from them. Repeated rows are dropped, and so is a validation row whose
docstring also occurs in a training module. What is not held out: a training row's function was part of the
pretraining text, as is usual for public code, so only the validation loss says how well a model generalizes.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = "Write the docstring of this Python function."
# third-party code, tests, programs with a test suite inside, and tables that are data rather than code
_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__",
    "encodings", "pydoc_data",
}  # fmt: skip
_MIN_WORDS = 3
_MAX_CHARACTERS = 600


@dataclass(frozen=True)
class Source:
    """One source file: its top-level module and its text."""

    module: str
    text: str


def standard_library() -> list[Source]:
    """Read the source files of the running Python's standard library, in a fixed order.

    Raises:
        FileNotFoundError: if this Python was installed without them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    sources = [
        Source(path.parts[0].removesuffix(".py"), (root / path).read_text(encoding="utf-8", errors="replace"))
        for path in relative
        if not _SKIPPED.intersection(path.parts)
    ]
    if not sources:
        raise FileNotFoundError(f"{root} holds no Python source: use a Python that was installed with its library")
    return sources


def split_by_module(sources: Iterable[Source], held_out_percent: int) -> tuple[list[Source], list[Source]]:
    """Split into (training, held-out) files; a module's name alone decides its side."""
    training: list[Source] = []
    held_out: list[Source] = []
    for source in sources:
        share = int.from_bytes(hashlib.sha256(source.module.encode()).digest()[:8], "big") % 100
        (held_out if share < held_out_percent else training).append(source)
    return training, held_out


def instruction_rows(sources: Iterable[Source]) -> Iterator[dict[str, str]]:
    """Yield one row for each distinct pair of signature and docstring: what Axolotl's ``alpaca`` type reads."""
    seen: set[tuple[str, str]] = set()
    for source in sources:
        for signature, docstring in documented_functions(source.text):
            if (signature, docstring) not in seen:
                seen.add((signature, docstring))
                yield {"instruction": INSTRUCTION, "input": signature, "output": docstring}


def documented_functions(text: str) -> Iterator[tuple[str, str]]:
    """Yield (signature, first paragraph of the docstring) of each documented function or method in a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in old files
            tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature, docstring = _signature(node), _first_paragraph(ast.get_docstring(node) or "")
            long_enough = len(docstring.split()) >= _MIN_WORDS and not docstring.startswith(">>>")
            if long_enough and len(signature) + len(docstring) <= _MAX_CHARACTERS:
                yield signature, docstring


def train_and_validation(
    training: Iterable[Source], held_out: Iterable[Source], train_rows: int, validation_rows: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Build both parts of the instruction set, each a random choice of at most the given number of rows.

    Raises:
        ValueError: if a part would be empty.
    """
    train = list(instruction_rows(training))
    known = {row["output"] for row in train}
    validation = [row for row in instruction_rows(held_out) if row["output"] not in known]
    for name, rows in (("train", train), ("validation", validation)):
        if not rows:
            raise ValueError(f"the standard library of this Python gives no {name} rows: install its full source")
    shuffle = random.Random(seed).shuffle
    shuffle(train)
    shuffle(validation)
    return train[:train_rows], validation[:validation_rows]


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    bare = copy.copy(node)
    bare.decorator_list, bare.body = [], [ast.Pass()]
    return ast.unparse(bare).removesuffix("pass").rstrip()


def _first_paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
