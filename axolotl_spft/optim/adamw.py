"""The AdamW update as a function of tensors (Loshchilov and Hutter, arXiv 1711.05101)."""

from __future__ import annotations

from torch import Tensor
from torch.optim.adamw import adamw


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
