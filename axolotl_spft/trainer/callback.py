"""`SpftCallback`: sparse fine-tuning with any `transformers.Trainer`, TRL's among them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from axolotl_spft.config import SpftConfig
from axolotl_spft.engine.kind import engine_of
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftConfigError, SpftError
from axolotl_spft.trainer.checkpoints import ADAPTER_FILE, check_checkpoint
from axolotl_spft.trainer.ending import describe_adapter
from axolotl_spft.trainer.prepare import OPTIMIZERS, is_prepared, prepare_run
from axolotl_spft.trainer.resume import resume_begun
from axolotl_spft.trainer.salience_pass import has_mask, peft_model_of

_REMEDY = (
    "load its adapter with `peft.PeftModel.from_pretrained(model, checkpoint, is_trainable=True)` and train without "
    "`resume_from_checkpoint`, to go on from its values with a new optimizer state"
)


class SpftCallback(TrainerCallback):
    """Chooses the mask through the trainer's own batches and loss when `train()` is called, and sets `SparseAdamW`.

    ::

        trainer = SFTTrainer(model, peft_config=SpftConfig(density=0.005), callbacks=[SpftCallback()], ...)
        trainer.train()

    With ``trainer.train(resume_from_checkpoint=...)`` the mask is the checkpoint's; an adapter that has one keeps it.
    It also adds the figures of `axolotl_spft.trainer.watch.Watch` to the trainer's logs. One callback may serve several
    trainers, one after the other, of one model or of several.

    Args:
        optimizer: ``sparse_adamw``, ``sparse_adamw_8bit``, or None for the one that the trainer's ``optim`` names.
    """

    def __init__(self, optimizer: str | None = "sparse_adamw"):
        if optimizer is not None and optimizer not in OPTIMIZERS:
            raise SpftConfigError(
                [
                    f"SpftCallback `optimizer: {optimizer}` must be {', '.join(OPTIMIZERS)}, "
                    "or None for the trainer's own"
                ]
            )
        self.optimizer = optimizer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = _trainer_that_calls()
        train = trainer.train
        own_optimizer = True

        # not an event: the trainer makes the optimizer, and under DeepSpeed divides the parameters, before the first
        @functools.wraps(train)
        def train_with_mask(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            nonlocal own_optimizer
            if not is_prepared(trainer):
                own_optimizer = trainer.optimizer is None
                self._prepare(trainer, resume_from_checkpoint)
            elif checkpoint := _checkpoint_of(trainer, resume_from_checkpoint):
                resume_begun(trainer, checkpoint, own_optimizer, _speaker())
            return train(resume_from_checkpoint, *args, **kwargs)

        trainer.train = train_with_mask

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not is_prepared(_trainer_that_calls()):
            raise SpftError(
                "SpftCallback came too late to choose the mask: pass it when the trainer is made, "
                "`callbacks=[SpftCallback()]`, instead of `add_callback`"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and (checkpoint / ADAPTER_FILE).is_file():
            commands = [
                f"load:   import axolotl_spft.tuner; PeftModel.from_pretrained(base, {str(checkpoint)!r})",
                "merge:  PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(folder)",
            ]
            tqdm.write(describe_adapter(checkpoint, commands))

    def _prepare(self, trainer: Trainer, resume_from_checkpoint: str | bool | None) -> None:
        _check_trainer(trainer, peft_model_of(trainer))
        checkpoint = _checkpoint_of(trainer, resume_from_checkpoint)
        # an optimizer that the user chose by class, or made for an adapter with a mask, stays
        chosen = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
        prepare_run(trainer, checkpoint, None if chosen else self.optimizer, _speaker())


def _checkpoint_of(trainer: Trainer, resume_from_checkpoint: str | bool | None) -> str | None:
    """The folder that `train` was asked to resume from, which is checked."""
    checkpoint = resume_from_checkpoint or None
    if checkpoint is True:
        checkpoint = get_last_checkpoint(trainer.args.output_dir)
    if checkpoint:
        check_checkpoint(Path(checkpoint), Ranks.current().world, engine_of(trainer.accelerator), _REMEDY)
    return checkpoint


def _speaker() -> Callable[[str], None]:
    return tqdm.write if Ranks.current().rank == 0 else _say_nothing


def _check_trainer(trainer: Trainer, model: Any) -> None:
    if not any(isinstance(config, SpftConfig) for config in getattr(model, "peft_config", {}).values()):
        raise SpftError(
            f"the trainer's model is a {type(model).__name__} without a sparse adapter: pass "
            "`peft_config=SpftConfig(...)` to TRL's trainers, or `model=get_peft_model(model, SpftConfig(...))`"
        )
    if trainer.model_init is not None:
        raise SpftError("`model_init` makes a model without a mask at each start: pass `model` instead")
    if trainer.optimizer is not None and not has_mask(model):
        raise SpftError(
            "the optimizer in `optimizers` was made before the mask is chosen, so it holds none of the values: pass "
            "`optimizer_cls_and_kwargs`, or leave both out for SparseAdamW"
        )


def _trainer_that_calls() -> Trainer:
    """The trainer whose event is handled: transformers gives its callbacks everything of it but itself."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    raise SpftError("SpftCallback works with a `transformers.Trainer`: pass it in its `callbacks`")


def _say_nothing(text: str) -> None:
    pass
