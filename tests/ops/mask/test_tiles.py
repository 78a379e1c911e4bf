"""Tiles hold every entry once, and the product by tiles is the values' gradient."""

from __future__ import annotations

import gc

import pytest
import torch

from axolotl_spft.ops.gradient.columns import select_columns
from axolotl_spft.ops.gradient.values_grad import compact_values_grad
from axolotl_spft.ops.mask import tiles as tiles_module
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions, positions
from axolotl_spft.ops.mask.plan import block_slots, make_plan
from axolotl_spft.ops.mask.tiles import make_tiles, product_by_tiles, tiles_of

# out_features, in_features, nnz
SHAPES = [(1, 1, 1), (70, 65, 300), (130, 40, 5200), (3, 200, 150), (200, 3, 77), (64, 64, 64)]


def clustered_mask(out_features: int, in_features: int, nnz: int, seed: int = 0) -> Mask:
    """The largest entries of a matrix whose rows and columns differ much in scale."""
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.randn(size, generator=generator).mul(1.5).exp() for size in (out_features, in_features)]
    scores = torch.rand(out_features, in_features, generator=generator) * scales[0][:, None] * scales[1]
    return mask_from_positions(scores.flatten().topk(nnz).indices.sort().values, out_features, in_features)


@pytest.mark.parametrize(("out_features", "in_features", "nnz"), SHAPES)
@pytest.mark.parametrize("blocks", [(64, 64), (16, 32)])
@pytest.mark.parametrize("block_entries", [150, 2**24])
@pytest.mark.parametrize("multiple", [1, 16])
def test_tiles_partition_the_entries(out_features, in_features, nnz, blocks, block_entries, multiple):
    mask = clustered_mask(out_features, in_features, nnz)
    plan = make_plan(mask, in_features, block_entries, multiple)
    tiles = make_tiles(mask, plan, *blocks)
    assert torch.equal(tiles.slots.sort().values, torch.arange(nnz, dtype=torch.int32))
    assert tiles.offsets[0] == 0
    assert tiles.offsets[-1] == nnz
    assert (tiles.offsets.diff() > 0).all()
    columns = (torch.arange(in_features) if plan.columns is None else plan.columns)[tiles.columns]
    at = positions(mask, in_features)
    for tile in range(tiles.count):
        bits = (tiles.words[tile, :, None] >> torch.arange(tiles.block_columns)) & 1
        row, column = bits.nonzero().unbind(1)
        row += tiles.tile_rows[tile] * tiles.block_rows
        column += tiles.tile_columns[tile] * tiles.block_columns
        slots = tiles.slots[tiles.offsets[tile] : tiles.offsets[tile + 1]].to(torch.int64)
        assert torch.equal(tiles.rows[row] * in_features + columns[column], at[slots])


@pytest.mark.parametrize(("out_features", "in_features", "nnz"), SHAPES)
@pytest.mark.parametrize("blocks", [(64, 64), (16, 32)])
def test_product_by_tiles_is_the_values_gradient(out_features, in_features, nnz, blocks):
    mask = clustered_mask(out_features, in_features, nnz)
    plan = make_plan(mask, in_features, multiple=1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(11, in_features, generator=generator, dtype=torch.float64)
    grad_y = torch.randn(11, out_features, generator=generator, dtype=torch.float64)
    kept = select_columns(x, plan.columns)
    got = product_by_tiles(grad_y, kept, make_tiles(mask, plan, *blocks))
    torch.testing.assert_close(got, compact_values_grad(grad_y, kept, mask, plan))


def test_sorting_by_count_gathers_the_entries_in_few_tiles():
    mask = clustered_mask(512, 512, 5000)
    plan = make_plan(mask, 512, multiple=1)
    tiles = make_tiles(mask, plan, 32, 32)
    in_place = plan.rows // 32 * 16
    slots = block_slots(plan, mask, *next(plan.blocks()))
    entries = slots // plan.n_columns, slots % plan.n_columns
    unsorted = (in_place[entries[0]] + plan.columns[entries[1]] // 32).unique().numel()
    assert tiles.count < unsorted / 2
    assert tiles.share(plan) == tiles.count * 1024 / (plan.rows.numel() * plan.columns.numel())


def test_tiles_are_kept_with_their_plan_where_they_pay(monkeypatch):
    masks = clustered_mask(512, 512, 5000), clustered_mask(9, 512, 4000)
    clustered, spread = (make_plan(mask, 512, multiple=1) for mask in masks)
    monkeypatch.setattr(tiles_module, "TILES_UP_TO", make_tiles(masks[0], clustered).share(clustered))
    tiles = tiles_of(masks[0], clustered)
    assert tiles_of(masks[0], clustered._replace(offsets=clustered.offsets.detach(), columns=None)) is tiles
    assert tiles_of(masks[1], spread) is None
    monkeypatch.setattr(tiles_module, "make_tiles", None)
    assert tiles_of(masks[1], spread) is None
    held = len(tiles_module._kept)
    del clustered
    gc.collect()
    assert len(tiles_module._kept) == held - 1
