"""What one use of a weight adds to the sums of the salience pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.ops.backends.products import matmul
from axolotl_spft.ops.embedding import row_gradients
from axolotl_spft.salience.examples import Tokens
from axolotl_spft.salience.metrics.statistics import GRADIENT, SQUARED_GRADIENT
from axolotl_spft.tuner.embedding import lookup_of, scale_of

# of x and dY of a layer, each (..., features), this rows' part of what is added up
_Part = Callable[[Tensor, Tensor, slice], Tensor]


def _gradient_part(name: str, tokens: Tokens) -> _Part:
    def part(grad_y: Tensor, x: Tensor, rows: slice) -> Tensor:
        return matmul(_flat(grad_y)[:, rows].t(), _flat(x))

    return part


def _squares_part(name: str, tokens: Tokens) -> _Part:
    def part(grad_y: Tensor, x: Tensor, rows: slice) -> Tensor:
        grad_rows, x_rows, total = _flat(grad_y)[:, rows], _flat(x), None
        for example in tokens.examples(x, name):
            gradient = matmul(grad_rows[example].t(), x_rows[example]).to(torch.float32)
            total = gradient.square_() if total is None else total.addcmul_(gradient, gradient)
        return total

    return part


_PARTS: dict[str, Callable[[str, Tokens], _Part]] = {GRADIENT: _gradient_part, SQUARED_GRADIENT: _squares_part}


def _rows_part(embedding: nn.Embedding) -> _Part:
    def part(grad_y: Tensor, ids: Tensor, rows: slice) -> Tensor:
        tokens, sums = _row_gradients(embedding, grad_y, ids)
        inside = ((tokens >= rows.start) & (tokens < rows.stop)).nonzero().squeeze(1)
        of_rows = sums.new_zeros(rows.stop - rows.start, sums.shape[1])
        return of_rows.index_add_(0, tokens[inside] - rows.start, sums[inside])

    return part


def _adder_of_rows(embedding: nn.Embedding, total: Tensor) -> Callable[[Tensor, Tensor], None]:
    # without a dense gradient beside the accumulator: a vocabulary has rows for many more tokens than a batch
    def add(grad_y: Tensor, ids: Tensor) -> None:
        tokens, sums = _row_gradients(embedding, grad_y, ids)
        total.index_add_(0, tokens.to(total.device), sums.to(total.device, total.dtype))

    return add


def _row_gradients(embedding: nn.Embedding, grad_y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale_of(embedding)
    return row_gradients(grad_y if scale is None else grad_y * scale, ids, lookup_of(embedding))


def embedding_of(module: nn.Module) -> nn.Embedding | None:
    """The embedding that a sparse layer looks tokens up in; None for one that multiplies."""
    base_layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return base_layer if isinstance(base_layer, nn.Embedding) else None


def gradient_part_of(module: nn.Module) -> _Part:
    """How rows of a module's dW are made of its dY and X, each (..., features), of an embedding of its dY and ids."""
    embedding = embedding_of(module)
    return _gradient_part("", Tokens({})) if embedding is None else _rows_part(embedding)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def adder_of(
    need: str, name: str, module: nn.Module, total: Tensor, tokens: Tokens, shard: tuple[int, Ranks] | None
) -> Callable[[Tensor, Tensor], None]:
    """What adds one use of a weight to its accumulator; of ``input_squares`` see `SquaresAdder`."""
    embedding = embedding_of(module)
    if embedding is not None and shard is None:
        return _adder_of_rows(embedding, total)
    part = _PARTS[need](name, tokens) if embedding is None else _rows_part(embedding)
    return _adder(part, total) if shard is None else _adder_to_shard(part, total, *shard)


def _adder(part: _Part, total: Tensor) -> Callable[[Tensor, Tensor], None]:
    def add(grad_y: Tensor, x: Tensor) -> None:
        total.add_(part(grad_y, x, slice(None)).to(total.device))

    return add


def _adder_to_shard(part: _Part, total: Tensor, out_features: int, ranks: Ranks) -> Callable[[Tensor, Tensor], None]:
    def add(grad_y: Tensor, x: Tensor) -> None:
        for rank in range(ranks.world):
            of_rank = part(grad_y, x, ranks.rows(out_features, rank)).to(torch.float32)
            ranks.sum_to_(of_rank, rank)
            if rank == ranks.rank:
                total.add_(of_rank.to(total.device))

    return add


def adder_of_experts(total: Tensor, ranks: Ranks | None) -> Callable[[Tensor, int], None]:
    """Adds the dense gradient of some experts, of which the first has this index, to ``total``.

    Args:
        ranks: that each keep their own rows of the gradients' sum; None where this one keeps all of its own.
    """

    def add(gradient: Tensor, first_expert: int) -> None:
        matrix = gradient.flatten(0, 1)
        if ranks is None:
            first = first_expert * gradient.shape[1]
            total[first : first + len(matrix)].add_(matrix.to(total.device))
            return
        for rank in range(ranks.world):
            of_rank = ranks.sum_to_(matrix[ranks.rows(len(matrix), rank)].to(torch.float32), rank)
            if rank == ranks.rank:
                total.add_(of_rank.to(total.device))

    return add


class SquaresAdder:
    """Adds x_j^2 of the tokens of one use of a weight to ``total`` (in_features).

    Args:
        tokens: of the batch that runs.
    """

    def __init__(self, total: Tensor, tokens: Tokens):
        self._total, self.tokens = total, tokens

    def add(self, x: Tensor, counted: Tensor | None) -> None:
        """Add those of x (..., in_features) that ``counted`` says, of `Tokens.counted`."""
        rows = _flat(x)
        self._total.add_((rows if counted is None else rows[counted]).to(torch.float32).square().sum(0))


def gradient_adder(total: Tensor, out_features: int, ranks: Ranks, sharded: bool) -> Callable[[Tensor, Tensor], None]:
    """Adds dY^T X of a layer's dY and X, each (..., features), to ``total``: all of it, or this rank's rows of it.

    Args:
        sharded: whether that is this rank's rows, of the sum over all ranks, which then must all call it.
    """
    part = _gradient_part("", Tokens({}))
    return _adder_to_shard(part, total, out_features, ranks) if sharded else _adder(part, total)
