"""The AdamW update as a pure function of tensors (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

from torch import Tensor


def adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place on ``values``, ``exp_avg`` (m) and ``exp_avg_sq`` (v), all of one shape and dtype.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        values = (1 - lr weight_decay) values - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    On the values of a sparse delta the decay pulls W + S toward the pretrained W.

    Args:
        step: t, counted from 1.
    """
    beta1, beta2 = betas
    if weight_decay:
        values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    values.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
