"""Selection against a full sort."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.salience import select
from axolotl_spft.salience.select import top_k, top_k_per_row


def sorted_top_k(scores: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """The oracle: sort everything, ties in the order of (matrix, position)."""
    flat = torch.cat([matrix.flatten() for matrix in scores])
    chosen = flat.sort(descending=True, stable=True).indices[:k].sort().values
    parts, start = [], 0
    for matrix in scores:
        stop = start + matrix.numel()
        parts.append(chosen[(chosen >= start) & (chosen < stop)] - start)
        start = stop
    return parts


def sorted_top_k_per_row(scores: torch.Tensor, k: int) -> torch.Tensor:
    quota, rest = divmod(k, scores.shape[0])
    order = [sorted(range(scores.shape[1]), key=lambda c: (-row[c], c)) for row in scores.tolist()]
    chosen = [(r, c) for r, columns in enumerate(order) for c in columns[:quota]]
    if rest:
        rows = sorted(range(scores.shape[0]), key=lambda r: (-scores[r, order[r][quota]].item(), r))[:rest]
        chosen += [(r, order[r][quota]) for r in rows]
    return torch.tensor(sorted(r * scores.shape[1] + c for r, c in chosen), dtype=torch.int64)


def score_matrices(kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 13), (1, 1), (29, 3), (5, 31)]
    matrices = [torch.randn(shape, generator=generator).abs() for shape in shapes]
    if kind == "ties":
        return [(matrix * 3).round() for matrix in matrices]
    if kind == "equal":
        return [torch.full(shape, 0.25) for shape in shapes]
    if kind == "zeros":
        return [torch.zeros(shape) * torch.where(torch.arange(shape[1]) % 2 == 0, 1.0, -1.0) for shape in shapes]
    if kind == "extreme":
        return [matrix * 10.0 ** torch.randint(-44, 38, matrix.shape, generator=generator) for matrix in matrices]
    if kind == "close":  # differ in the low bits only
        return [1 + torch.randint(0, 40, m.shape, generator=generator) * torch.finfo(m.dtype).eps for m in matrices]
    return matrices


KINDS = ["random", "ties", "equal", "zeros", "extreme", "close", "signed", "negative ties"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 2, 50, 333, 334])
@pytest.mark.parametrize("chunk_entries", [4, 2**24])
def test_top_k_equals_a_full_sort(monkeypatch, kind, k, chunk_entries):
    monkeypatch.setattr(select, "CHUNK_ENTRIES", chunk_entries)
    scores = score_matrices(kind)
    got = top_k(lambda index: scores[index], [tuple(matrix.shape) for matrix in scores], k)
    assert sum(part.numel() for part in got) == k
    assert all(torch.equal(one, other) for one, other in zip(got, sorted_top_k(scores, k), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_entries", [4, 2**24])
def test_top_k_per_row_equals_a_full_sort(monkeypatch, kind, chunk_entries):
    monkeypatch.setattr(select, "CHUNK_ENTRIES", chunk_entries)
    for scores in score_matrices(kind):
        for k in {0, 1, 2, scores.numel() // 3, scores.numel() // 2 + 1, scores.numel()}:
            if k <= scores.numel():
                assert torch.equal(top_k_per_row(scores, tuple(scores.shape), k), sorted_top_k_per_row(scores, k))


def test_transposed_scores_keep_their_positions():
    scores = torch.rand(9, 5, generator=torch.Generator().manual_seed(1)).t()
    assert torch.equal(top_k(lambda _: scores, [(5, 9)], 7)[0], sorted_top_k([scores], 7)[0])
