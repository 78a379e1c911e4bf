"""The AdamW update as a function of tensors (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_(
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step for every tensor of the lists, in place on the values, ``exp_avgs`` (m) and ``exp_avg_sqs`` (v).

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        values = (1 - lr weight_decay) values - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    On the values of a sparse delta the decay pulls W + S toward the pretrained W.

    Args:
        values, grads, exp_avgs, exp_avg_sqs: lists of equal length; tensors at one index have one shape; float32.
        step: t, counted from 1.
    """
    beta1, beta2 = betas
    if weight_decay:
        torch._foreach_mul_(values, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(values, exp_avgs, denominators, -lr / (1 - beta1**step))
