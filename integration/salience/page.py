"""Writes axolotl_spft/salience/README.md: the metrics, and which is tested where, from the tests' own parametrization.

python -m integration.salience.page
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from axolotl_spft.files import atomic_path
from axolotl_spft.metrics import METRICS
from axolotl_spft.salience.metrics.metric import NEEDS, load_metric
from tests.salience.metrics.cases import BASES, ENGINES, REFUSED, TESTED

PAGE = Path(__file__).parents[2] / "axolotl_spft" / "salience" / "README.md"

_HEAD = """# Salience metrics

`salience:` in the YAML block names one of these, or a function of your own. Higher scores are more salient; `g` is the
gradient of the loss summed over the sample, `w` the weight, dequantized where it is quantized.

"""

_OWN = """
## A metric of your own

`salience: my_package.my_module:my_score` takes a function of one argument, what the pass found for one matrix
(`axolotl_spft.salience.metrics.statistics.Statistics`), that returns a float score for each entry of this rank's rows:

```python
from axolotl_spft.salience.metrics.metric import needs

@needs("weight", "input_squares")
def my_score(statistics):
    return statistics.weight.abs() * statistics.input_squares.sqrt()
```

It may declare: {needs};
without `@needs` it gets the gradient. It may not write to what it gets. A metric for everybody is one such file in
`metrics/` and one line in `axolotl_spft/metrics.py`.

Examples of `squared_gradient` (fisher) are the rows of a batch, or with sample packing the sequences of a row, where
`position_ids` begin anew; sequences must not attend to each other, as Axolotl's do not. Of pairs of texts (DPO) each
text counts as an example. `input_squares` leaves padding out: tokens that `attention_mask` masks, or without one the
sequences without any label. `hessian_gradient` (grasp) reads the sample twice. It differentiates twice where every step
of the model allows it (eager attention, plain torch operations, no gradient checkpointing, weights that are neither
quantized nor partitioned), else it takes a central difference; the report says which.

## Where each is tested

The pass runs before DeepSpeed's engine exists: under ZeRO-1 and ZeRO-2 it meets the weights that DDP has, under ZeRO-3
plain weights in parts and 4-bit ones whole on each rank. "tested" means, of a small model with odd shapes:

- one process: the scores are those of the textbook's formula in float64, of a quantized base on the dequantized model;
  of `random` those drawn from the seed. (float: Llama, Qwen2 and GPT-2; 8bit and 4bit: Llama.)
- DDP, ZeRO: two ranks give the mask of one process (Llama), but for one entry of a matrix at most, whose score is that
  of another up to rounding; `grasp` under ZeRO-3 on a float base, a difference instead of a derivative, but for 15%.

"refused" is said before the model loads.

"""


def page() -> str:
    rows = [("metric", "score", "needs")]
    for name, path in METRICS.items():
        score = importlib.import_module(path.partition(":")[0]).score
        formula = inspect.getdoc(score).splitlines()[0].replace("|", "\\|")
        rows.append((f"`{name}`", formula, ", ".join(sorted(load_metric(name).needs)) or "nothing"))
    cells = [("metric", "base", *ENGINES)]
    for metric in METRICS:
        for base in BASES:
            cells.append((f"`{metric}`", base, *(_cell(metric, base, engine) for engine in ENGINES)))
    own = _OWN.replace("{needs}", ", ".join(f"`{need}`" for need in NEEDS))
    foot = (
        "\nA base whose weights cannot be read (GPTQ, AWQ, AQLM, EETQ) is refused for every metric that needs the\n"
        "weight: before the model loads where the configuration says what it is, else before the pass.\n"
    )
    return _HEAD + _table(rows) + own + _table(cells) + foot


def _cell(metric: str, base: str, engine: str) -> str:
    case = (metric, base, engine)
    return f"refused: {REFUSED[case]}" if case in REFUSED else "tested" if case in TESTED else "not tested"


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")
