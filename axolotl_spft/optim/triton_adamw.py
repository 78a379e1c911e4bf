"""Triton kernel of `axolotl_spft.optim.adamw`: moments, master, values and weight in one pass over the values.

Every number is read and written once at most, so memory sets the time and there is nothing to tune.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from axolotl_spft.ops.backends.dispatch import blocks
from axolotl_spft.ops.backends.launch import launching_on

_BLOCK = 1024


@triton.jit
def adamw_kernel(
    values,
    grads,
    master,
    exp_avg,
    exp_avg_sq,
    step,
    weight,
    positions,
    originals,
    n,
    lr,
    log_beta1,
    log_beta2,
    beta1,
    beta2,
    rest1,
    rest2,
    keep,
    eps,
    WRITES_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step t = step + 1 of `adamw_`; rest = 1 - beta and keep = 1 - lr weight_decay, worked out in float64."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < n
    t = (tl.load(step) + 1.0).to(tl.float64)
    # 1 - beta^t loses in float32 all but a few digits while t is small
    correction1 = (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(t * log_beta2)).to(tl.float32)
    g = tl.load(grads + at, mask=exists, other=0.0).to(tl.float32)
    m = beta1 * tl.load(exp_avg + at, mask=exists, other=0.0) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq + at, mask=exists, other=0.0) + rest2 * g * g
    w = tl.load(master + at, mask=exists, other=0.0)
    value = tl.load(values + at, mask=exists, other=0.0)
    # something else has set the others
    w = keep * tl.where(w.to(values.dtype.element_ty) == value, w, value.to(tl.float32))
    w -= tl.div_rn(lr, correction1) * tl.div_rn(m, tl.sqrt_rn(tl.div_rn(v, correction2)) + eps)
    tl.store(exp_avg + at, m, mask=exists)
    tl.store(exp_avg_sq + at, v, mask=exists)
    tl.store(master + at, w, mask=exists)
    rounded = w.to(values.dtype.element_ty)
    tl.store(values + at, rounded, mask=exists)
    if WRITES_WEIGHT:
        position = tl.load(positions + at, mask=exists, other=0).to(tl.int64)
        # the rounded values: the weight must hold what the next forward pass would write
        total = tl.load(originals + at, mask=exists, other=0.0).to(tl.float32) + rounded.to(tl.float32)
        tl.store(weight + position, total.to(weight.dtype.element_ty), mask=exists)


def adamw_one_pass_(
    values: Tensor,
    grad: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """See `axolotl_spft.optim.adamw.adamw_low_precision_`; ``master`` may be ``values`` where these are float32."""
    n = values.numel()
    if not n:
        return
    weight, positions, originals = (values, step, values) if into is None else into
    with launching_on(values.device):
        adamw_kernel[(blocks(n, _BLOCK),)](
            values,
            grad,
            master,
            exp_avg,
            exp_avg_sq,
            step,
            weight,
            positions,
            originals,
            n,
            lr,
            *(math.log(beta) if beta else -math.inf for beta in betas),
            *map(float, betas),
            *(1.0 - beta for beta in betas),
            1.0 - lr * weight_decay,
            eps,
            WRITES_WEIGHT=into is not None,
            BLOCK=_BLOCK,
        )
        # afterwards: all programs read the old one
        step += 1
