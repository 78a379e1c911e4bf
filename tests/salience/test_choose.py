"""How scope, pattern and budget go together."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from axolotl_spft import SpftConfig
from axolotl_spft.budget import layer_budgets, share_bounds, total_budget
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftConfigError
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.salience.blocks import is_of_blocks
from axolotl_spft.salience.choose import choose_positions
from tests.salience.test_bounded import taken_one_by_one
from tests.salience.test_select import score_matrices, sorted_top_k, sorted_top_k_per_row

NAMES = ["layers.0.q_proj", "layers.0.gate", "layers.1.q_proj", "layers.1.k_proj"]


def positions_of(config: SpftConfig, scores: list[torch.Tensor], trainable=None) -> list[torch.Tensor]:
    shapes = [tuple(matrix.shape) for matrix in scores]
    return choose_positions(config, NAMES, shapes, scores.__getitem__, Ranks(), trainable)


@pytest.mark.parametrize("kind", ["random", "ties", "signed"])
@pytest.mark.parametrize("trainable", [None, [True, True, False, True]])
@pytest.mark.parametrize(
    ("scope", "bounds"),
    [("layer", {}), ("row", {}), ("global", {}), ("global", {"min_density": 0.05, "max_density": 0.4})],
    ids=["layer", "row", "global", "global with bounds"],
)
@pytest.mark.parametrize("pattern", [None, {"q_proj": 0.3}])
def test_the_positions_are_those_of_a_full_sort(kind, trainable, scope, pattern, bounds):
    scores = score_matrices(kind)
    shapes = [tuple(matrix.shape) for matrix in scores]
    config = SpftConfig(density=0.2, scope=scope, density_pattern=pattern, **bounds)
    options = {"density": 0.2, "density_pattern": pattern, "names": NAMES}
    total = total_budget(shapes, **options)
    counts = layer_budgets(shapes, **options, trainable=trainable)
    if scope == "global":
        own = [pattern is not None and "q_proj" in name for name in NAMES]
        able = [not is_own and (trainable is None or trainable[i]) for i, is_own in enumerate(own)]
        fixed = sum(count for count, is_own in zip(counts, own) if is_own)
        fewest, most = share_bounds(shapes, total - fixed, *(bounds.values() or (None, None)), able)
        fewest = [count if is_own else low for count, is_own, low in zip(counts, own, fewest)]
        most = [count if is_own else high for count, is_own, high in zip(counts, own, most)]
        counts = taken_one_by_one(scores, fewest, most, total)
    got = positions_of(config, scores, trainable)
    assert sum(map(len, got)) == total
    for matrix, count, chosen in zip(scores, counts, got, strict=True):
        expected = sorted_top_k_per_row(matrix, count) if scope == "row" else sorted_top_k([matrix], count)[0]
        assert torch.equal(chosen, expected)


@pytest.mark.parametrize("trainable", [None, [True, True, False, True]])
@pytest.mark.parametrize(
    ("scope", "options", "density"),
    [
        *product(["layer", "global"], [{}, {"density_pattern": {"q_proj": 0.3}}], [0.1, 0.25, 0.6]),
        *product(["global"], [{"max_density": 0.45}], [0.1, 0.25]),
    ],
)
def test_blocks_are_whole_and_never_above_the_budget(trainable, scope, options, density):
    scores = score_matrices("random")
    shapes = {name: tuple(matrix.shape) for name, matrix in zip(NAMES, scores)}
    config = SpftConfig(density=density, scope=scope, pattern="block", block_size=[2, 3], **options)
    got = positions_of(config, scores, trainable)
    assert all(
        is_of_blocks(mask_from_positions(chosen, *shape), shape, (2, 3)) for chosen, shape in zip(got, shapes.values())
    )
    total = total_budget(list(shapes.values()), **config.budget(NAMES))
    held = sum(map(len, got))
    assert held in config.allowed_counts(shapes)
    assert total - held < (6 if not options or scope == "layer" else 4 * 6)
    assert trainable is None or not len(got[2])


def test_global_blocks_are_the_highest_of_all():
    scores = score_matrices("random")
    got = positions_of(SpftConfig(num_values=40, scope="global", pattern="block", block_size=[2, 3]), scores)
    inside = [sum(rows.double().sum() for rows in [matrix.flatten()[chosen]]) for matrix, chosen in zip(scores, got)]
    blocks = []
    for index, matrix in enumerate(scores):
        for band in matrix.split(2):
            blocks += [(-block.double().sum().item(), block.numel(), index) for block in band.split(3, 1)]
    held, sums = 0, [0.0] * 4
    for score, entries, index in sorted(blocks):
        if held + entries > 40:
            break
        held, sums[index] = held + entries, sums[index] - score
    assert sum(map(len, got)) == held
    torch.testing.assert_close(torch.tensor([float(each) for each in inside]), torch.tensor(sums))


def test_a_budget_below_one_block_is_refused():
    config = SpftConfig(num_values=5, pattern="block", block_size=[2, 3], scope="global")
    with pytest.raises(SpftConfigError, match=r"5 values holds no whole block of `block_size: \[2, 3\]`"):
        positions_of(config, [matrix for matrix in score_matrices("random")[:1]] + [torch.zeros(8, 8)] * 3)
