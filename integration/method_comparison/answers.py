"""The final answers of solutions, and how many of them are right."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

# what stands before a final answer, in MetaMathQA and in GSM8K; the first that a text has is the one that counts
_MARKS = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)


def final_answer(text: str) -> str | None:
    """What stands behind the last mark of a final answer, to the end of its line; None without a mark."""
    text = text.strip().rstrip(".!?")
    mark = next((each for each in _MARKS if each in text), None)
    if mark is None:
        return None
    return text.rpartition(mark)[-1].strip().split("\n", 1)[0].strip(" .!?$%")


def accuracy(predictions: Sequence[str], responses: Sequence[str]) -> float:
    """The share of predictions whose final answer is that of the response: as numbers, else as text."""
    pairs = [(final_answer(prediction), final_answer(response)) for prediction, response in zip(predictions, responses)]
    return sum(answer is not None and _value(answer) == _value(right) for answer, right in pairs) / len(pairs)


def _value(answer: str | None) -> float | str | None:
    try:
        # of a whole or decimal number, or of one fraction
        return float(Fraction(answer)) if "/" not in answer else _quotient(*answer.split("/"))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        return answer


def _quotient(numerator: str, denominator: str) -> float:
    return float(Fraction(numerator.strip()) / Fraction(denominator.strip()))
