"""The AdamW update as a function of tensors (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from axolotl_spft.ops.backends.dispatch import use_triton
from axolotl_spft.ops.weight.scatter import rounded_sum


def adamw_(
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step for every tensor of the lists, in one fused pass over each.

        t = t + 1        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        values = (1 - lr weight_decay) values - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    On the values of a sparse delta the decay pulls W + S toward the pretrained W.

    Args:
        values, grads, exp_avgs (m), exp_avg_sqs (v): lists of equal length; tensors at one index have one shape;
            float32. All but the gradients are changed in place.
        steps: t of each, 0-dimensional float32 on the values' device; changed in place.
    """
    adamw(
        values, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True,
        amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
    )  # fmt: skip


def follow_values_(master: Tensor, values: Tensor) -> None:
    """Make every value that its master does not round to the master itself.

    The step rounds masters to values, so something else has set such a value since: a loaded state, an average.

    Args:
        master: float32; changed in place.
        values: of the same shape.
    """
    master.copy_(torch.where(master.to(values.dtype) == values, master, values))


def adamw_low_precision_(
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
    backend: str = "auto",
) -> None:
    """One step of `adamw_` on the float32 ``master`` of ``values``, and its rounding to ``values``.

    The master follows values that were set since the last step, see `follow_values_`.

    Args:
        values, grad: (n) bfloat16, float16 or float32; the values are changed in place.
        master, exp_avg, exp_avg_sq: (n) float32; changed in place.
        step: 0-dimensional float32 on the values' device; changed in place.
        into: (weight, positions, originals): also assign originals + the new values to the flattened weight there,
            rounded once.
        backend: see `axolotl_spft.ops.backends.dispatch`.
    """
    written = () if into is None else (into[0], into[2])
    if use_triton(backend, values, grad, master, exp_avg, exp_avg_sq, *written):
        from axolotl_spft.optim.triton_adamw import adamw_one_pass_

        adamw_one_pass_(values, grad, master, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, into)
        return
    follow_values_(master, values)
    grads = [grad.to(torch.float32)]
    adamw_([master], grads, [exp_avg], [exp_avg_sq], [step], lr, betas, eps, weight_decay)
    values.copy_(master)
    if into is not None:
        weight, positions, originals = into
        weight.put_(positions.to(torch.int64), rounded_sum(originals, values))
