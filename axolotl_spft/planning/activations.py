"""The bytes that one forward and backward pass of a decoder needs beside its parameters.

Counted are the tensors that autograd keeps for a frozen base (a frozen linear layer keeps no input), with fused
attention, and the largest of what is alive for a moment on top.
"""

from __future__ import annotations

from typing import NamedTuple

from axolotl_spft.planning.settings import Settings
from axolotl_spft.planning.shapes import ModelShape

# how many columns of a matrix a mask uses, as a multiple of its density, by salience and scope: as drawn masks of 0.5%
# on Llama 8B's shape, and trained ones, have it; all others use every column
_COLUMNS_PER_DENSITY = {"gradient": 15.0, "balanced": 30.0}
_COLUMNS_PER_DENSITY_BY_ROW = 42.0


class Activations(NamedTuple):
    """Bytes on one rank.

    Attributes:
        blocks: kept by all blocks between forward and backward; with checkpointing their inputs alone.
        block: of one block that is computed again, which live beside those with checkpointing; else 0.
        head: kept behind the last block: the last norm and the loss.
        loss: alive on top at the start of the backward pass: two float32 copies of the logits.
        moment: alive on top while a block runs backward: gradients of the widest tensors, a weight made afresh.
    """

    blocks: int
    block: int
    head: int
    loss: int
    moment: int

    def peak(self, gradients: int, keeps_gradients: bool) -> int:
        """The most at any time, with the gradients of the values; ``keeps_gradients`` from the pass before."""
        at_loss = self.blocks + self.head + self.loss + (gradients if keeps_gradients else 0)
        in_blocks = self.blocks + self.block + self.moment + gradients
        if not keeps_gradients and not self.block:
            # what the blocks keep goes as the gradients come
            in_blocks = max(self.blocks + self.moment, self.moment + gradients)
        return max(at_loss, in_blocks)


def activations(shape: ModelShape, run: Settings, density: float | None) -> Activations:
    """The activations of one pass of ``run.rows`` sequences.

    Args:
        density: the share that is trained; None: the salience pass, whose dense gradients need whole inputs.
    """
    tokens = run.rows * run.sequence_len
    kept = _per_token(shape, run.dtype_bytes) * tokens
    if run.eager:
        # the softmax in float32, and its copy that the values are multiplied by
        kept += run.rows * shape.heads * run.sequence_len**2 * (4 + run.dtype_bytes)
    if density is None:
        inputs = float(sum(shape.dense_inputs))
    else:
        salience, scope = str(run.options.get("salience", "gradient")), run.options.get("scope", "layer")
        inputs = sum(shape.kept_targets) * column_share(salience, scope, density)
    kept += round(inputs / max(1, shape.blocks) * run.dtype_bytes * tokens)
    # which experts keep whole: a token's input once for each of its experts
    kept += shape.expert_inputs * run.dtype_bytes * tokens
    logits = 4 * tokens * shape.vocabulary
    capped = run.dtype_bytes * tokens * shape.vocabulary if shape.capped_logits else 0
    fresh = run.bits < 16 or run.engine == "zero3"
    widest = max((rows * columns for rows, columns in shape.quantizable or shape.targets), default=0)
    # a dense gradient of the weights of all experts of a layer, and where ZeRO-3 has gathered them W and W + S
    of_experts = run.dtype_bytes * shape.expert_entries * (3 if run.engine == "zero3" else 1)
    return Activations(
        blocks=shape.blocks * (run.dtype_bytes * shape.hidden * tokens if run.checkpointing else kept),
        block=kept if run.checkpointing else 0,
        head=4 * shape.hidden * tokens + (0 if run.fused_loss else logits + capped),
        loss=logits // 8 if run.fused_loss else 2 * logits,
        moment=2 * run.dtype_bytes * shape.intermediate * tokens
        + max(run.dtype_bytes * widest if fresh else 0, of_experts),
    )


def _per_token(shape: ModelShape, dtype_bytes: int) -> int:
    """What one block keeps of one token.

    That is the input of its norms in float32; q, k, v and the output of attention; gate, its activation and up.
    """
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    # norms of single heads run once for each of them
    norms = sum(width if width > shape.head_dim or width == shape.hidden else queries for width in shape.block_norms)
    attention = dtype_bytes * (2 * queries + 2 * keys) + 4 * shape.heads
    return 4 * norms + attention + 3 * dtype_bytes * shape.intermediate


def column_share(salience: str, scope: str, density: float) -> float:
    """The share of a matrix' columns that its mask uses, as far as it is known before there is one."""
    per_density = _COLUMNS_PER_DENSITY.get(salience)
    if per_density is None:
        return 1.0
    return min(1.0, density * (_COLUMNS_PER_DENSITY_BY_ROW if scope == "row" else per_density))
