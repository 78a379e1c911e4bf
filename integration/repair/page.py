"""Writes README.md from the recorded lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.repair.measure import ROWS

PAGE, RESULTS = Path(__file__).with_name("README.md"), Path(__file__).with_name("results.jsonl")
_HEAD = """# A repaired base before any training

Made by `python -m integration.repair page` from `results.jsonl`; measured by
`python -m integration.repair run smollm2-135m-instruct --data FOLDER`, and the same with `gemma-3-270m`, where FOLDER
holds GSM8K (openai/gsm8k) as JSON lines and ARC as JSON lists. Losses are means a token, of answers that the statistics
have not seen, and of English questions of another kind. The gap is that of NF4 (double quantization, blocks of 64) to
bf16; entries are chosen by |W - Q(W)| times the root mean square of the input column, the low rank is the best one of
the error weighted alike. Both models come from packages with about 4 bits a weight, so that their bf16 form is rounded
already, and NF4 rounds it once more: the error of a model that never was may look otherwise.
"""
_FOOT = """
A quantization error is nearly of full rank, so a few exact entries mend more of it than a low-rank product of many more
numbers, for the kind of text that the statistics are of. The English questions, of another kind and few, gained nothing
from repair on SmolLM2 and lost with more entries, as with the low rank of 1.15%; on Gemma they gained with each more
entry, and more than by the low rank of as many numbers. What of such a start is left after a fine-tuning is another
question, and one for [the experiments](../evidence/README.md#d-quantized-bases).

## Least squares instead of the exact entries

Tried once and left out: values on the same support that minimize ||(W - Q - S) X||, with the whole second moments of
the inputs (64 examples; SmolLM2-135M-Instruct, 48 answers, loss 1.535 in bf16 and 1.747 in NF4). At 0.1% of the entries
the loss was 1.629 instead of 1.649, at 0.5% 1.618 instead of 1.639, at 1% 1.629 instead of 1.630, while the error
||(W - Q - S) X|| / ||(W - Q) X|| fell from 0.47 to 0.43, from 0.40 to 0.34 and from 0.37 to 0.31. It needs a matrix of
in_features x in_features for each group of layers with one input (some 40 GiB for Llama 8B, so passes one after the
other) and a linear system for each row, fits the sample rather than the weight, and its entries are no longer those of
the unquantized model, onto which the adapter could then not be merged exactly.
"""


def gap_closed(record: Mapping[str, Any], others: Sequence[Mapping[str, Any]], loss: str = "task_loss") -> float | None:
    """The share of the gap between NF4 and bf16 that a row closes; None without these two."""
    ends = {other["row"]: other[loss] for other in others if other["row"] in ("bf16", "NF4")}
    if len(ends) < 2:
        return None
    return (ends["NF4"] - record[loss]) / (ends["NF4"] - ends["bf16"])


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """The page; equal lines give equal bytes."""
    parts = [_HEAD]
    for setting in dict.fromkeys((each["base"], each["judged"], each["samples"]) for each in lines):
        of_it = {each["row"]: each for each in lines if (each["base"], each["judged"], each["samples"]) == setting}
        base, judged, samples = setting
        parts.append(f"\n## {base}, {judged} answers and questions, statistics of {samples} examples\n\n")
        parts.append("| weights | numbers | share | answers | gap closed | English |\n|---|---|---|---|---|---|\n")
        for row in (of_it[name] for name in ROWS if name in of_it):
            closed = gap_closed(row, list(of_it.values()))
            parts.append(
                f"| {row['row']} | {row['values']:,} | {row['share']:.2%} | {row['task_loss']:.4f} | "
                f"{'' if closed is None or row['row'] == 'bf16' else f'{closed:.0%}'} | {row['english_loss']:.4f} |\n"
            )
    return "".join([*parts, _FOOT])
