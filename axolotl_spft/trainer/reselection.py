"""The re-selections of a trainer's run: when they are due, what checkpoints hold of them, what is logged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_spft.dynamic import DynamicMask
from axolotl_spft.dynamic.dynamic_mask import metric_on_the_way
from axolotl_spft.dynamic.history import FILE
from axolotl_spft.errors import SpftError
from axolotl_spft.optim.rearrange import SUITABLE
from axolotl_spft.reselect_rules import Reselect
from axolotl_spft.trainer.watch import PREFIX


def check_reselect(trainer: Any, config: Any, engine: str, own_optimizer: bool) -> None:
    """Check that the trainer's run can change its mask, before anything runs.

    Args:
        config: the adapter's `SpftConfig`, with ``reselect``.
        engine: of `axolotl_spft.engine.kind.engine_of`.
        own_optimizer: whether the optimizer is `SparseAdamW`.

    Raises:
        SpftError: it cannot.
    """
    metric_on_the_way(config.salience)
    args = trainer.args
    optimizer = None if own_optimizer or _is_made(trainer) else str(getattr(args.optim, "value", args.optim))
    problem = problem_of_run(
        Reselect(**config.reselect), args.gradient_accumulation_steps, args.torch_compile, engine, optimizer
    )
    if problem:
        raise SpftError(problem)


def problem_of_run(
    reselect: Reselect, accumulate: int, compiles: bool, engine: str, optimizer: str | None
) -> str | None:
    """Why a run cannot have re-selections, or None.

    Args:
        accumulate: micro-batches of an optimizer step.
        compiles: whether the model is compiled.
        optimizer: Hugging Face's name of it; None for `SparseAdamW`, or one that is only known when it steps.
    """
    if reselect.collect > accumulate:
        # else a checkpoint could fall between the collected micro-batches, and a resumed run would lack some
        return (
            f"`reselect.collect: {reselect.collect}` is more than the {accumulate} micro-batches of an optimizer step: "
            f"write {accumulate} at most, or raise `gradient_accumulation_steps`"
        )
    if compiles:
        return "`reselect` reads gradients that a compiled model does not show: leave `torch_compile` out"
    if engine == "zero0":
        return "`reselect` does not know DeepSpeed's optimizer at stage 0: use stage 1, 2 or 3, or DDP"
    if optimizer is not None and optimizer not in SUITABLE:
        return (
            f"`reselect` needs an optimizer whose state follows the values, which `{optimizer}` has not: use "
            f"sparse_adamw, sparse_adamw_8bit, {' or '.join(SUITABLE)}"
        )
    return None


def add_reselections(trainer: Any, model: torch.nn.Module, checkpoint: str | None, say: Callable[[str], None]) -> None:
    """Let a trainer that was given its mask change it as the config's ``reselect`` says.

    Args:
        model: the trainer's `PeftModel`.
        checkpoint: the folder that the run resumes from.
        say: takes an announcement.
    """
    reselection = Reselection(trainer, _dynamic_mask(model, checkpoint))
    reselect = reselection.dynamic.options
    say(
        f"Dynamic mask: after every {reselect.every} steps, up to {reselect.until:.0%} of the run, "
        f"{reselect.fraction:.0%} of each of {len(reselection.dynamic.layers)} matrices' values are exchanged"
    )
    trainer.add_callback(reselection)
    save = trainer._save_rng_state

    # not an event: the one of saving comes after the file that says that a checkpoint is complete
    @functools.wraps(save)
    def save_with_history(output_dir: str, *args: Any, **kwargs: Any) -> Any:
        if trainer.args.should_save:
            reselection.dynamic.save(output_dir)
        return save(output_dir, *args, **kwargs)

    trainer._save_rng_state = save_with_history
    log = trainer.log

    @functools.wraps(log)
    def log_with_figures(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        figures = reselection.dynamic.history.figures
        if "loss" in logs and figures is not None:
            logs = {
                **logs,
                f"{PREFIX}turnover": figures.turnover,
                f"{PREFIX}of_first_mask": figures.first_mask,
                f"{PREFIX}mean_age": figures.mean_age,
            }
        log(logs, *args, **kwargs)

    trainer.log = log_with_figures


def restart_reselections(trainer: Any, model: torch.nn.Module, checkpoint: str) -> None:
    """Let a trainer of `add_reselections`, whose model was given a checkpoint's mask, go on from what is known of it.

    Does nothing where the mask does not change.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Reselection):
            callback.dynamic.collector.stop()
            callback.dynamic = _dynamic_mask(model, checkpoint)


def _dynamic_mask(model: torch.nn.Module, checkpoint: str | None) -> DynamicMask:
    dynamic = DynamicMask(model)
    if checkpoint and Path(checkpoint, FILE).is_file():
        dynamic.load(checkpoint)
    return dynamic


class Reselection(TrainerCallback):
    """Collects the last micro-batches before each re-selection, and makes it when the optimizer's step is done."""

    def __init__(self, trainer: Any, dynamic: DynamicMask):
        self.trainer, self.dynamic = trainer, dynamic
        self._seen = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen = 0
        # an interrupted step leaves it on
        self.dynamic.collector.stop()
        self.dynamic.collector.forget()
        self._collect(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen += 1
        self._collect(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.dynamic.collector.stop()
        if self.dynamic.options.is_due(state.global_step, state.max_steps):
            self.dynamic.reselect(self.trainer.optimizer, state.global_step)
            cls_and_kwargs = self.trainer.optimizer_cls_and_kwargs
            if cls_and_kwargs is not None and "slots" in cls_and_kwargs[1]:
                # for an optimizer that is made anew when a smaller batch is tried after the memory ran out
                cls_and_kwargs[1]["slots"] = self.dynamic.slots()

    def _collect(self, state: TrainerState) -> None:
        left = self.trainer.current_gradient_accumulation_steps - self._seen
        if self.dynamic.options.is_due(state.global_step + 1, state.max_steps) and left <= self.dynamic.options.collect:
            self.dynamic.collector.start()


def _is_made(trainer: Any) -> bool:
    """Whether the user chose the optimizer by its class, or made it."""
    return trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
