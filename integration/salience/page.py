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

_CHOOSING = """
## Choosing

**Density.** Start at 0.005 on a 7B model. A larger budget is better ([the evidence](../../integration/evidence/README.md), SmolLM2-135M: `random` goes from 0.862 of loss at 0.05% to 0.815 at 5%, `gradient` from 0.886 to 0.819) and costs little time:
from 0.05% to 5% a step on a CPU went from 1.04 to 1.15 of the limit, memory takes about 20 bytes a value ([records](../../integration/bench/README.md)). `axolotl spft plan config.yml` tells the bytes before a run.

**Rate.** It decides as much as the method, and belongs to the metric. Its unit is rms(W) (0.005 / density)^0.75, with rms(W) the root mean square of the
targeted weights. In the evidence (models of 135 and 270 million parameters whose rms(W) differ by a factor of 5.6, 60 steps, rates a factor of three apart)
the best rates of `random` are 0.05 to 0.16 of it, from 0.05% to 5% and in 16 and 4 bits, those of `gradient` 0.005 to 0.03, more at a higher density. A rate three times too high
costs more than one three times too low: of `random` 0.5% on SmolLM2 0.136 of loss and 0.029. `relative_step: true` reads `learning_rate` in this unit, so that
0.1 or 0.01 is where to begin; try a third and three times of it. A Llama that was pretrained for minutes (`make evidence`) wants more of it, and much the same for both metrics. Without the option the log says at the start how many units
the rate is. Other rates (`embedding_lr`, `min_lr` of a schedule) stay absolute. In a loop of your own: `lr=0.1 * axolotl_spft.step_unit(model)`. A comparison at LoRA's rate says little.

**Metric and scope.** At 0.5%, each at its best rate (differences by seed, ± their standard error): no mask has a lower loss on the task than `random`. On SmolLM2 `magnitude` (0.003 ± 0.006) and `lift` (0.005 ± 0.008) are level with it, `scope: row` of
`gradient` is behind by 0.010 ± 0.006, `fisher` and `balanced` by 0.013, `gradient` by 0.017 ± 0.008, `scope: global` by 0.021 ± 0.007; on Gemma `gradient` by 0.034 ± 0.005, by rows or not. Gradient masks sit on few rows and columns, and forget most
of what was not trained: on Python's source the loss rises by 0.40 on SmolLM2 and 0.52 on Gemma, with `random` by 0.05 and 0.07.
LoRA of as many values is ahead of `random` by 0.007 ± 0.003 on SmolLM2 where its alpha is tuned as well (16 at rank 2) and level on Gemma (0.000 ± 0.008), and behind with an alpha of 2 r (0.008 ± 0.001 and 0.003 ± 0.005);
it forgets a little less on SmolLM2, and more than twice as much on Gemma. On ARC-Easy it is ahead, by 3.5 points of accuracy, and with four times the values by 0.006 on either model. In 4 bits [`repair`](../tuner/REPAIR.md) helps `gradient`.
`random` needs no salience pass, so no memory for it either; its steps take a little longer than those of `gradient`. The front page and the examples of supervised training therefore write `salience: random` with its rate, but where they
show something that takes the gradient (`dynamic`, `repair`), the paper's own task, preferences, experts, or the quickstart. `gradient`, the paper's choice, remains what a block without the key means: its rates are ten times smaller, so that
another default would silently train existing configurations hardly at all. `axolotl spft mask` and `axolotl spft inspect` show a mask [before it is trained](../inspection/README.md). Where the values go, how many samples a mask needs,
dynamic masks, low rank beside sparse: [in short](../../integration/evidence/README.md#in-short). `make evidence` repeats a small comparison in ten minutes: random masks and LoRA are level, gradient masks not ahead, and at equal gain `gradient` forgets most.

## Budgets

- The total is `num_values`, or r (out_features + in_features) over all matrices (`match_lora_rank`), or round(density x entries), at least 1. Each key
  of `density_pattern` takes out the matrices that it matches first and gives them together its own density; `num_values` stays the total.
- `scope: layer` and `row` share it in proportion to the entries, rounded down, and the rest one by one to the largest remainders.
  `scope: global` selects the total over all matrices, between `min_density` and `max_density` of each.
- `repair` has its share of each matrix' values first, the salience the rest: [quantization and repair](../tuner/REPAIR.md).
- `pattern: block` trains whole blocks, and never more values than the budget. The exact statement heads `axolotl_spft/budget.py`.
- A matrix that no gradient reached on the sample, that nothing calls, or that the run freezes gets nothing. Its share goes to the others, and the
  report names it once with the remedy: more `samples` for experts, `exclude_modules` for towers and poolers. Saliences that need no sample
  (`magnitude`, `lift`, `random`) read of it as much as shows that every matrix is used, mostly one batch.
- `score_after: N` computes the salience after N optimizer steps of a throw-away warm-up of a random mask, of which nothing stays, however the pass ends. Not under
  ZeRO-3, and not with `grasp` and `synflow`, which are defined at the pretrained weights.
- The sums of the pass are kept on the GPU where half of its free memory holds them, else on the host. `salience_memory_gib` sets another
  limit; for more than that, several passes over the same batches are made, with the same mask to the bit. Under `scope: global` and with
  `pattern: block`, which need all sums at once, the sums then go to the host. Not with `grasp` and `synflow`.
- With `auto_find_batch_size: true` a pass that runs out of memory starts anew with half the rows.
- The pass leaves no trace: the run is the one that it would be with the mask from a file. The adapter records where its mask came from.
  Only a dataset that cannot be read twice (a socket, a queue, a generator) has lost the examples that the pass read: make its mask in a run of its own
  (`axolotl spft mask`), and name it in `mask_path`.
"""  # noqa: E501

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
of the model allows it (eager attention, plain torch operations, no gradient checkpointing, weights that are not
quantized), else it takes a central difference: the report says which, and it is the same one on every engine.

## Where each is tested

The pass runs before DeepSpeed's engine exists: under ZeRO-1 and ZeRO-2 it meets the weights that DDP has, under ZeRO-3
plain weights in parts and 4-bit ones whole on each rank. "tested" means, of a small model with odd shapes:

- one process: the scores are those of the textbook's formula in float64, of a quantized base on the dequantized model;
  of `random` those drawn from the seed. (float: Llama, Qwen2 and GPT-2; 8bit and 4bit: Llama.)
- DDP, ZeRO: two ranks give the mask of one process (Llama), but for one entry of a matrix at most, whose score is that
  of another up to rounding.

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
    return _HEAD + _table(rows) + _CHOOSING + own + _table(cells) + foot


def _cell(metric: str, base: str, engine: str) -> str:
    case = (metric, base, engine)
    return f"refused: {REFUSED[case]}" if case in REFUSED else "tested" if case in TESTED else "not tested"


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")
