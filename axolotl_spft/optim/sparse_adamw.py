"""`SparseAdamW`: AdamW whose state exists only for the trained values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftConfigError
from axolotl_spft.optim.adamw import adamw_

_FLOAT32_STATE = ("exp_avg", "exp_avg_sq", "master")


class SparseAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments, for the values of sparse deltas and any other trained parameters.

    Weight decay is decoupled and pulls the values toward 0, that is, the weights toward the pretrained ones. Parameters
    that are frozen or empty get no state. A parameter of lower precision keeps a float32 master copy in the state.

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        state_bits: precision of the moments; 32.

    Raises:
        SpftConfigError: a hyperparameter breaks its rule; all are reported together.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
    ):
        problems = [
            f"SparseAdamW `{name}: {value}` {rule}"
            for name, value, holds, rule in (
                ("lr", lr, lr >= 0, "must be at least 0"),
                ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "must be two in [0, 1)"),
                ("eps", eps, eps > 0, "must be greater than 0"),
                ("weight_decay", weight_decay, weight_decay >= 0, "must be at least 0"),
                ("state_bits", state_bits, state_bits == 32, "must be 32"),
            )
            if not holds
        ]
        if problems:
            raise SpftConfigError(problems)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None and p.numel()]
            states = [self._state_of(parameter) for parameter in trained]
            targets = [state.get("master", parameter) for parameter, state in zip(trained, states)]
            adamw_(
                targets,
                [parameter.grad.to(torch.float32) for parameter in trained],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                float(group["lr"]),
                group["betas"],
                group["eps"],
                group["weight_decay"],
            )
            for target, parameter in zip(targets, trained):
                if target is not parameter:
                    parameter.copy_(target)
        return loss

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().to(torch.float32)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts the state to the parameter's dtype; ours is float32 whatever that is
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters):
            for name in _FLOAT32_STATE:
                if name in state_dict["state"].get(number, {}):
                    saved = state_dict["state"][number][name]
                    self.state[parameter][name] = saved.to(parameter.device, torch.float32, copy=True)
