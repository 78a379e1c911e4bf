"""`SparseAdamW`: AdamW whose state exists only for the trained values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftConfigError, SpftError, SpftFileError
from axolotl_spft.ops.backends.dispatch import use_triton
from axolotl_spft.optim.adamw import adamw_, adamw_low_precision_, follow_values_
from axolotl_spft.optim.adamw_8bit import adamw_8bit_
from axolotl_spft.optim.mask_changes import Slot, change_of, changes_made
from axolotl_spft.optim.moments import BLOCK, MOMENTS, absmax_name, zero_moments


class SparseAdamW(torch.optim.Optimizer):
    """AdamW for the values of sparse deltas and any other trained parameters.

    Weight decay is decoupled and pulls the values toward 0, that is, the weights toward the pretrained ones. Parameters
    that are frozen or empty get no state. A parameter of lower precision keeps a float32 master copy in the state.
    Under DeepSpeed, which hands over flat float32 pieces and keeps the masters itself, it is the client optimizer.

    State of a parameter with n values: ``step`` (0-dimensional float32), ``exp_avg`` and ``exp_avg_sq`` (n, float32; or
    uint8 with ``exp_avg_absmax`` and ``exp_avg_sq_absmax``, one float32 per 256 values).

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        state_bits: precision of the moments: 32, or 8 for blockwise 8-bit numbers (bitsandbytes).
        slots: which positions the values stand for, from `axolotl_spft.tuner.state.slots_of`; saved with the state and
            compared when a state is loaded.

    Raises:
        SpftConfigError: a group's hyperparameters break their rules, all are reported together; or a parameter is
            none of float32 and lower precision.
    """

    # read by what watches the steps of all other optimizers
    knows_masks = True
    # of masks as they were after that many changes; a copy's are taken to be of the masks of now
    _moments_of: int | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        slots: Mapping[str, tuple[int, str]] | None = None,
    ):
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        defaults |= {"state_bits": state_bits, "slots": None if slots is None else dict(slots)}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; see the class for what it raises."""
        super().add_param_group(param_group)
        problems = _problems_of(self.param_groups[-1])
        if problems:
            self.param_groups.pop()
            raise SpftConfigError(problems)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient.

        Raises:
            SpftError: the mask under a parameter has changed since its moments were made or loaded.
        """
        self.check_moments()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None and p.numel()]
            if group["state_bits"] == 32:
                trained = [p for p in trained if not (p.is_cuda and self._step_in_one_pass(p, group))]
            states = [self._state_of(parameter, group["state_bits"]) for parameter in trained]
            targets = [state.get("master", parameter) for parameter, state in zip(trained, states)]
            for target, parameter in zip(targets, trained):
                if target is not parameter:
                    follow_values_(target, parameter)
            grads = [parameter.grad.to(torch.float32) for parameter in trained]
            if group["state_bits"] == 8:
                if trained:
                    # it takes flat pieces of them
                    targets = [target.contiguous() for target in targets]
                    adamw_8bit_(targets, grads, states, *_hyperparameters(group))
            else:
                moments = ([state[moment] for state in states] for moment in MOMENTS)
                adamw_(targets, grads, *moments, [state["step"] for state in states], *_hyperparameters(group))
            for target, parameter in zip(targets, trained):
                if target is not parameter:
                    parameter.copy_(target)
        return loss

    def _step_in_one_pass(self, parameter: nn.Parameter, group: dict[str, Any]) -> bool:
        """Update a parameter of lower precision, which would else take a pass for each cast, where a kernel can."""
        if parameter.dtype == torch.float32 or not use_triton("auto", parameter, parameter.grad):
            return False
        state = self._state_of(parameter, 32)
        states = state["master"], *(state[moment] for moment in MOMENTS), state["step"]
        adamw_low_precision_(parameter, parameter.grad, *states, *_hyperparameters(group))
        return True

    def check_moments(self) -> None:
        """Check that the moments belong to the masks of now.

        Raises:
            SpftError: the mask under a parameter has changed since its moments were made or loaded.
        """
        if self._moments_of == changes_made():
            return
        if self._moments_of is not None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    change = change_of(parameter)
                    if change and change.number > self._moments_of and self.state.get(parameter):
                        raise SpftError(
                            "the optimizer's moments belong to positions of before another mask was loaded: load the "
                            "optimizer state that was saved with the mask, after it, or make a new optimizer"
                        )
        self._moments_of = changes_made()

    def keep_moments(self, slots: Mapping[str, Slot]) -> None:
        """Say that the moments were brought to the masks of now, whose ``slots`` are saved with them from now on."""
        for group in self.param_groups:
            if group["slots"] is not None:
                group["slots"] = {**group["slots"], **slots}
        self._moments_of = changes_made()

    def _state_of(self, parameter: nn.Parameter, state_bits: int) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            if state_bits == 8:
                state |= zero_moments(parameter.numel(), parameter.device)
            else:
                state |= {moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in MOMENTS}
            if parameter.dtype != torch.float32:
                layout = torch.contiguous_format if state_bits == 8 else torch.preserve_format
                state["master"] = parameter.detach().to(torch.float32, memory_format=layout)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            SpftFileError: it was saved by another optimizer, or for other positions, other numbers of values, values
                of another precision or another precision of the moments; nothing is changed.
        """
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups):
            _check_group(saved_group, group)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [(parameter, group["state_bits"]) for group in self.param_groups for parameter in group["params"]]
        for number, (parameter, state_bits) in zip(numbers, parameters):
            _check_state(state_dict["state"].get(number, {}), parameter, state_bits)
        super().load_state_dict(state_dict)
        # torch casts the state to the parameter's dtype; ours is what it is whatever that is
        for number, (parameter, _) in zip(numbers, parameters):
            for name, saved in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = saved.to(parameter.device, copy=True)
        self._moments_of = changes_made()


def _problems_of(group: Mapping[str, Any]) -> list[str]:
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (lambda lr: lr >= 0, "must be at least 0"),
        "betas": (lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "must be two in [0, 1)"),
        "eps": (lambda eps: eps > 0, "must be greater than 0"),
        "weight_decay": (lambda decay: decay >= 0, "must be at least 0"),
        "state_bits": (lambda bits: bits in (8, 32), "must be 8 or 32"),
    }
    problems = [
        f"SparseAdamW `{name}: {group[name]}` {rule}" for name, (holds, rule) in rules.items() if not holds(group[name])
    ]
    other = {str(p.dtype) for p in group["params"] if p.dtype not in (torch.float32, torch.bfloat16, torch.float16)}
    if other:
        problems.append(
            f"SparseAdamW computes in float32, and parameters are {', '.join(sorted(other))}: cast them to float32 or "
            "lower precision, or use torch.optim.AdamW"
        )
    return problems


def _hyperparameters(group: dict[str, Any]) -> tuple[float, tuple[float, float], float, float]:
    return float(group["lr"]), group["betas"], group["eps"], group["weight_decay"]


def _check_group(saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    if "state_bits" not in saved:
        raise SpftFileError(
            "the optimizer state to resume from was saved by another optimizer than SparseAdamW: resume with the "
            "`optimizer` that the checkpoint was made with"
        )
    if saved["state_bits"] != group["state_bits"]:
        raise SpftFileError(
            f"the optimizer state to resume from has {saved['state_bits']}-bit moments, but this run's have "
            f"{group['state_bits']} bits: resume with the `optimizer` that the checkpoint was made with"
        )
    if saved.get("slots") is not None and group["slots"] is not None:
        changes = map(change_of, group["params"])
        _check_slots(saved["slots"], group["slots"], {change.slot() for change in changes if change})


def _check_state(saved: Mapping[str, Tensor], parameter: nn.Parameter, state_bits: int) -> None:
    """Check that a parameter's saved state is one that it could have: kernels read as far as the parameter goes."""
    # DeepSpeed fills the state of its flat pieces in afterwards
    if not saved:
        return
    count = parameter.numel()
    sizes = {"step": 1} | dict.fromkeys(MOMENTS, count)
    if state_bits == 8:
        sizes |= {absmax_name(moment): -(-count // BLOCK) for moment in MOMENTS}
    if parameter.dtype != torch.float32:
        sizes["master"] = count
    found = {name: tensor.numel() for name, tensor in saved.items()}
    if found != sizes:
        raise SpftFileError(
            f"the optimizer state to resume from has entries of sizes {found} where a parameter of {count} values in "
            f"{parameter.dtype} has {sizes}: resume with the adapter, and the dtype of its values, that the state was "
            "saved with"
        )


def _check_slots(saved: Mapping[str, Slot], slots: Mapping[str, Slot], changed: set[Slot | None]) -> None:
    """Compare the slots of a saved state with those of before, or with the ``changed`` ones of now."""
    saved = {name: tuple(slot) for name, slot in saved.items()}
    differing = [
        name
        for name in {*saved, *slots}
        if name not in saved or (saved[name] != tuple(slots.get(name, ())) and saved[name] not in changed)
    ]
    if differing:
        raise SpftFileError(
            f"the optimizer state to resume from belongs to another mask than the adapter's ({len(differing)} modules "
            f"differ, {min(differing)} among them): resume from a checkpoint whose adapter and optimizer state were "
            "saved together"
        )
