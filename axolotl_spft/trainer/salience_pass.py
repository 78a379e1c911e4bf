"""The salience pass on a trainer: its own batches, its own loss, no trace afterwards."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from axolotl_spft.errors import SpftMemoryError
from axolotl_spft.salience import MaskReport, select_mask
from axolotl_spft.salience.release import give_back_memory
from axolotl_spft.salience.untouched import untouched_rng
from axolotl_spft.trainer.untouched_collator import untouched_collator

# keeps the gradients of a float16 run above its smallest number; a common factor does not change the order of scores
_FLOAT16_LOSS_SCALE = 2.0**10


def select_mask_with_trainer(trainer: Any, model: nn.Module, learning_rate: float | None = None) -> MaskReport:
    """`select_mask` on the training set of a `transformers.Trainer` that has not started yet.

    Args:
        trainer: its dataloader, collator, batch counting, autocast and ``compute_loss`` are used.
        model: the trainer's `PeftModel`.
        learning_rate: that the run will have, by default the one of the trainer's arguments.

    Raises:
        SpftMemoryError: there is no room for a batch; with ``auto_find_batch_size`` not even for one row.
    """
    rows = trainer._train_batch_size
    rate = trainer.args.learning_rate if learning_rate is None else learning_rate
    while True:
        try:
            with _rows_per_batch(trainer, rows):
                return _select_mask(trainer, model, rate)
        except SpftMemoryError:
            if not trainer.args.auto_find_batch_size or rows == 1:
                raise
        # after the error is gone, and with it the frames that hold the accumulators
        rows //= 2
        give_back_memory()
        warnings.warn(
            f"the salience pass ran out of memory and starts anew with {rows} rows in a batch (`auto_find_batch_size`)",
            stacklevel=2,
        )


def _select_mask(trainer: Any, model: nn.Module, learning_rate: float) -> MaskReport:
    sample = _TrainerSample(trainer)
    with (
        untouched_rng(),
        _untouched_trainer(trainer),
        untouched_collator(trainer.data_collator),
        _training_mode(trainer, model),
    ):
        return select_mask(model, sample, sample.loss, learning_rate=learning_rate)


@contextmanager
def _rows_per_batch(trainer: Any, rows: int) -> Iterator[None]:
    """Let the trainer's dataloader give batches of ``rows`` examples, or of as many tokens with sample packing."""
    args, before = trainer.args, (trainer._train_batch_size, trainer.args.per_device_train_batch_size)
    try:
        if rows != trainer._train_batch_size:
            # transformers reads the first, Axolotl's sampler of packed rows the second
            trainer._train_batch_size = args.per_device_train_batch_size = rows
        yield
    finally:
        trainer._train_batch_size, args.per_device_train_batch_size = before


class _TrainerSample:
    """The trainer's batches in groups of one optimizer step, and the loss that the trainer gives each."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.batches_per_step = trainer.args.gradient_accumulation_steps
        self.num_items_in_batch: Tensor | int | None = None

    def __iter__(self) -> Iterator[dict]:
        trainer = self.trainer
        _note_one_shot(trainer.train_dataset)
        batches = iter(trainer.get_train_dataloader())
        while True:
            group, self.num_items_in_batch = trainer.get_batch_samples(
                batches, trainer.args.gradient_accumulation_steps, trainer.args.device
            )
            if not group:
                return
            trainer.current_gradient_accumulation_steps = len(group)
            yield from (trainer._prepare_inputs(batch) for batch in group)

    def loss(self, model: nn.Module, batch: dict) -> Tensor:
        trainer = self.trainer
        with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=self.num_items_in_batch)
        return loss * _FLOAT16_LOSS_SCALE if trainer.accelerator.mixed_precision == "fp16" else loss


def _note_one_shot(dataset: Any) -> None:
    """Warn of a dataset whose examples may be there once only."""
    if isinstance(dataset, Iterator) and iter(dataset) is dataset:
        warnings.warn(
            f"the training set, a {type(dataset).__name__}, is its own iterator: where it cannot begin anew, the run "
            "lacks the examples that the salience pass reads; then make the mask in a run of its own, and name it in "
            "`mask_path`",
            stacklevel=2,
        )


@contextmanager
def _training_mode(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Train mode, with gradient checkpointing where the run will have it."""
    modes = [(module, module.training) for module in model.modules()]
    checkpoint = trainer.args.gradient_checkpointing and not getattr(model, "is_gradient_checkpointing", False)
    model.train()
    try:
        if checkpoint:
            kwargs = dict(trainer.args.gradient_checkpointing_kwargs or {})
            kwargs.pop("every_n_layers", None)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)
        yield
    finally:
        if checkpoint:
            model.gradient_checkpointing_disable()
        for module, mode in modes:
            module.training = mode


@contextmanager
def _untouched_trainer(trainer: Any) -> Iterator[None]:
    """Put the trainer's counters, metrics and state, and the accelerator's dataloaders, back at the end."""
    gradient_state = trainer.accelerator.gradient_state
    dataloaders = list(trainer.accelerator._dataloaders)
    references = list(gradient_state.dataloader_references)
    state = copy.deepcopy(vars(trainer.state))
    names = set(vars(trainer))
    plain = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _is_plain(value)}
    try:
        yield
    finally:
        trainer.accelerator._dataloaders[:] = dataloaders
        gradient_state.dataloader_references[:] = references
        vars(trainer.state).clear()
        vars(trainer.state).update(state)
        for name in set(vars(trainer)) - names:
            delattr(trainer, name)
        vars(trainer).update(plain)


def _is_plain(value: Any) -> bool:
    """Whether a value is data through and through, like metrics and counters are."""
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(item) for item in value)
    return value is None or (isinstance(value, (bool, int, float, str, Tensor)) and not isinstance(value, nn.Parameter))


def peft_model_of(trainer: Any) -> nn.Module:
    """The trainer's `PeftModel`, without the wrappers of accelerate."""
    return trainer.accelerator.unwrap_model(trainer.model)


def has_mask(model: nn.Module) -> bool:
    """Whether the active adapter has a mask already."""
    from axolotl_spft.salience.install import adapted_layers

    return any(layer.has_values(name) for layer in adapted_layers(model).values() for name in layer.active_adapters)
