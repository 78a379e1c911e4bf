"""The model card that a trainer writes anew over the one that was saved with the adapter."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from axolotl_spft.card import say_how_to_load


def keep_section_of_card(trainer: Any) -> None:
    """Put the adapter's section into every card that the trainer makes in its output folder."""
    create = trainer.create_model_card

    @functools.wraps(create)
    def create_with_section(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        folder = Path(trainer.args.output_dir)
        if trainer.is_world_process_zero() and (folder / "adapter_config.json").is_file():
            say_how_to_load(folder)

    trainer.create_model_card = create_with_section
