"""Writes integration/families/README.md: the families of models that the tests run, from their own parametrization.

python -m integration.families.page
"""

from __future__ import annotations

from pathlib import Path

from axolotl_spft.files import atomic_path
from tests.families import FAMILIES, Family

PAGE = Path(__file__).with_name("README.md")

_HEAD = """# Model families

What `target_modules: all-linear` finds in each family: every `nn.Linear`, subclass that multiplies by its weight, and `Conv1D`, but the output head
and what `exclude_modules` names. `tests/tuner/test_families.py` holds each row, on a random model of two layers, in float32 and loaded by
transformers in 4 bits (nf4):

- the targets are those of the table, and a gradient reaches each of them in the salience pass;
- the values' gradients are those of dense training at the mask, by autograd on the merged (4-bit: dequantized) model, to 1e-4;
- layers that read one tensor keep one copy of its columns ("one copy"), and behind an RMS norm none at all ("norm": made again from what the norm
  keeps); the gradients have the bits that they have without either;
- four steps of `SparseAdamW` lower the loss; saved, loaded, merged and generating, the model gives the same logits and tokens (4-bit: the merged
  weights are those of quantizing W + S); unloaded, the base is the one that was loaded, bit for bit.

"""  # noqa: E501

_FOOT = """
Left alone are the output head and what the table names: experts that are one parameter (`target_parameters` takes them), routers that are one too,
convolutions. Of a vision-language model `exclude_modules: '.*(vision_tower|multi_modal_projector).*'` leaves the tower and its projector out, which
pictures still pass; without it they are targets like others.

Mamba's float models read `dt_proj`'s weight without calling the module, so no gradient reaches it and it gets no values; the report of the mask
names it. In 4 bits it is called and trained: such an adapter takes effect on a float base only when it is merged. With Mamba's CUDA kernels, which
were not run here, models of Mamba 2 (Bamba, Falcon-H1) read `out_proj` in the same way while they train.
"""  # noqa: E501


def page() -> str:
    rows = [("family", "model", "`all-linear` takes", "left alone", "one copy", "norm", "4-bit"), ("---",) * 7]
    rows += [_row(family) for family in FAMILIES]
    return _HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows) + _FOOT


def _row(family: Family) -> tuple[str, ...]:
    return (
        family.name,
        type(family.make()).__name__,
        _names(family.targets.split()),
        _names(part.strip(".") for part in family.left.split()),
        "; ".join(_names(group.split()) for group in family.together) or "-",
        "made again" if family.normed else "-",
        "tested" if family.quantized else "tested; transformers leaves its layers in float",
    )


def _names(names) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


if __name__ == "__main__":
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")
