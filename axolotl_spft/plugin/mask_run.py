"""The salience pass of an Axolotl configuration by itself: everything that a run does before its first step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.files import check_writable
from axolotl_spft.plugin.args import ADAPTER

# would take the mask of a checkpoint, or write or upload something for the training that does not follow
_NOT_FOR_A_MASK = ("resume_from_checkpoint", "auto_resume_from_checkpoints", "hub_model_id")


def compute_mask(config: Path, output: Path) -> bool:
    """Compute the mask that training with ``config`` would, and save it to ``output``.

    Axolotl validates the configuration and makes the model, the dataset and the trainer as for training, on every rank
    of the launch; the plugin's own salience pass follows. A run with ``mask_path: <output>`` equals the run that
    computes the mask itself, bit for bit. The configuration's ``output_dir`` is neither read nor written.

    Returns:
        Whether this process is the one that wrote the file: rank 0.

    Raises:
        SpftError: the configuration is not one whose run would compute a mask.
        SpftFileError: ``output`` exists already, or cannot be written.
    """
    _check_config(config)
    if output.exists():
        raise SpftFileError(f"{output} exists: delete it, or name another file for the new mask")
    check_writable(output)
    with _own_output_dir() as folder:
        nothing = dict.fromkeys(_NOT_FOR_A_MASK)
        first = _prepare(_validated(str(config), output_dir=folder, spft__mask_path=str(output.absolute()), **nothing))
    if first and not output.is_file():
        raise SpftFileError(f"the mask could not be saved to {output}: the warning above says why")
    return first


def _check_config(config: Path) -> None:
    """Check by the text of ``config`` that its run would compute a mask."""
    try:
        options = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SpftFileError(f"{config}: no readable YAML ({' '.join(str(error).split())})") from error
    if not isinstance(options, Mapping) or options.get("adapter") != ADAPTER:
        raise SpftError(f"{config}: a mask belongs to `adapter: {ADAPTER}`: set it, with the plugin and a block `spft`")
    if options.get("lora_model_dir"):
        raise SpftError(
            f"{config}: `lora_model_dir: {options['lora_model_dir']}` has its mask already: leave the key out to "
            "compute another"
        )
    if options.get("use_ray"):
        raise SpftError(f"{config}: `use_ray: true` starts trainings only: leave it out, and launch with accelerate")


def _validated(config: str, **changes: Any) -> Any:
    from axolotl.cli.config import load_cfg
    from pydantic import ValidationError

    try:
        return load_cfg(config, **changes)
    except ValidationError as error:
        problems = [
            ": ".join(filter(None, [".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")]))
            for each in error.errors()
        ]
        raise SpftError(f"{config}: {'; '.join(problems)}") from error


def _prepare(cfg: Any) -> bool:
    """What `axolotl.cli.train` and `axolotl.train.train` do before the first step; whether this is rank 0."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.distributed import cleanup_distributed

    dataset_meta = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    if dataset_meta is None:
        load = load_preference_datasets if cfg.rl else load_datasets
        dataset_meta = load(cfg=cfg, cli_args=TrainerCliArgs())
    setup_model_and_trainer(cfg, dataset_meta)
    first = Ranks.current().rank == 0
    cleanup_distributed()
    return first


@contextmanager
def _own_output_dir() -> Iterator[str]:
    """A folder for what Axolotl writes beside a run, such as its log, that is gone at the end."""
    from axolotl.utils.tee import close_debug_log

    with tempfile.TemporaryDirectory(prefix="axolotl-spft-mask-") as folder:
        try:
            yield folder
        finally:
            close_debug_log()
