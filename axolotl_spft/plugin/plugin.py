"""`SpftPlugin`: Axolotl's hooks, a few lines each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.logging import get_logger
from torch import nn

from axolotl_spft.plugin.args import ADAPTER, OPTIMIZERS

LOG = get_logger(__name__)


class SpftPlugin(BasePlugin):
    """Adds ``adapter: spft`` and ``optimizer: sparse_adamw`` to Axolotl."""

    _saved_before: int | None = None

    def register(self, cfg: dict) -> None:
        if cfg.get("adapter") != ADAPTER:
            return
        import axolotl_spft.tuner  # noqa: F401  registers the PEFT method
        from axolotl_spft.plugin.quantization import request_quantization

        # Axolotl's own default reads LoRA files only
        cfg["merge_method"] = cfg.get("merge_method") or "legacy"
        options = cfg.get("spft")
        saved = options.get("modules_to_save") if isinstance(options, Mapping) else None
        if isinstance(saved, list) and not cfg.get("lora_modules_to_save"):
            # where tokens are added, Axolotl asks for this key whatever the adapter
            cfg["lora_modules_to_save"] = list(saved)
        request_quantization(cfg)

    def get_input_args(self) -> str:
        return "axolotl_spft.SpftArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        if cfg.adapter != ADAPTER:
            return {}
        arguments: dict[str, Any] = {}
        if cfg.optimizer in OPTIMIZERS:
            # a name that TrainingArguments knows: post_trainer_create puts ours in its place
            arguments["optim"] = "adamw_torch"
        if not torch.accelerator.is_available() and not cfg.deepspeed:
            # without it, bf16 on a CPU is refused; with it, DeepSpeed would not be used
            arguments["use_cpu"] = True
        if cfg.gradient_checkpointing and cfg.ddp_find_unused_parameters is None:
            # as transformers has it for models without an adapter: DDP's search for unused parameters and reentrant
            # checkpoints exclude each other
            arguments["ddp_find_unused_parameters"] = False
        return arguments

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.adapter == ADAPTER:
            from axolotl_spft.engine.ranks import Ranks
            from axolotl_spft.plugin.quantization import make_exceptions
            from axolotl_spft.plugin.repair_rules import check_unquantized_weights
            from axolotl_spft.plugin.saved_adapter import check_lora_model_dir
            from axolotl_spft.plugin.versions import installed, untested
            from axolotl_spft.salience.mask_file import check_mask_path

            first = Ranks.current().rank == 0
            if first and (said := untested(installed())):
                LOG.warning("%s", said)
            check_lora_model_dir(cfg)
            mask_path = (cfg.spft or {}).get("mask_path")
            # a saved adapter has its mask
            if mask_path and not cfg.lora_model_dir and first:
                check_mask_path(Path(mask_path).expanduser())
            make_exceptions(cfg)
            if first:
                check_unquantized_weights(cfg)
            if cfg.merge_lora:
                from axolotl_spft.plugin.streamed_merge import merge_instead

                if merge_instead(cfg):
                    # Axolotl has no hook in place of its merge; this one is before the model loads
                    raise SystemExit(0)

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        if cfg.adapter == ADAPTER:
            from axolotl_spft.plugin.quantization import check_quantized

            check_quantized(model, bool(cfg.load_in_4bit), bool(cfg.load_in_8bit))
            if cfg.base_model_config not in (None, cfg.base_model):
                # of another repository than the weights
                model.config._commit_hash = None

    def load_adapter(self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False):
        if cfg.adapter != ADAPTER:
            return None
        from peft import PeftModel, get_peft_model
        from transformers import GenerationConfig

        from axolotl_spft.plugin.module_names import check_module_names
        from axolotl_spft.plugin.quantization import prepare_for_training
        from axolotl_spft.plugin.saved_adapter import commit_not_trained_on, options_not_read

        config = _adapter_config(cfg, model)
        if not cfg.lora_model_dir:
            check_module_names(cfg.spft or {}, model, _asked_for(cfg))
        if config_only:
            return None, config
        if (cfg.load_in_4bit or cfg.load_in_8bit) and not inference:
            checkpointing = dict(cfg.gradient_checkpointing_kwargs or {}) if cfg.gradient_checkpointing else None
            model = prepare_for_training(model, cfg.torch_dtype, checkpointing)
        autocast = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            autocast["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **autocast)
            saved = model.peft_config[model.active_adapter]
            of_base = commit_not_trained_on(cfg, saved, getattr(model.config, "_commit_hash", None))
            for warning in [*options_not_read(cfg.spft or {}, saved), *of_base]:
                LOG.warning("%s", warning)
            # how it goes on is this run's choice, and what that reads is where this run has it
            saved.reselect, saved.repair_from = config.reselect, config.repair_from or saved.repair_from
            saved.relative_step = config.relative_step
            if saved.base_model_name_or_path == cfg.base_model:
                saved.revision = config.revision
        else:
            model = get_peft_model(model, config, **autocast)
        if cfg.merge_lora and getattr(model.base_model.model, "generation_config", None) is None:
            # Axolotl's merge writes to it, whatever the model does
            model.base_model.model.generation_config = GenerationConfig()
        return model, config

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if cfg.adapter != ADAPTER:
            return
        from axolotl_spft.engine.kind import engine_of
        from axolotl_spft.engine.ranks import Ranks
        from axolotl_spft.plugin.checkpoints import checkpoint_to_resume
        from axolotl_spft.trainer.prepare import prepare_run

        self._saved_before = _time_of_saving(cfg)
        checkpoint = checkpoint_to_resume(cfg, Ranks.current(), engine_of(trainer.accelerator))
        prepare_run(trainer, checkpoint, cfg.optimizer, LOG.info)

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        # Axolotl calls this twice, before and after it saves; by then the ranks' group has ended, so that only the
        # environment tells which rank this is, and Axolotl's own logger would ask the group
        if cfg.adapter != ADAPTER or os.environ.get("RANK", "0") != "0" or _time_of_saving(cfg) == self._saved_before:
            return
        from axolotl_spft.trainer.ending import describe_adapter

        LOG.logger.info("%s", describe_adapter(Path(cfg.output_dir), _next_commands(cfg)))


def _time_of_saving(cfg: Any) -> int | None:
    """When the adapter in ``output_dir`` was written, if there is one."""
    from axolotl_spft.trainer.checkpoints import ADAPTER_FILE

    path = Path(cfg.output_dir, ADAPTER_FILE)
    return path.stat().st_mtime_ns if path.is_file() else None


def _next_commands(cfg: Any) -> list[str]:
    config = cfg.axolotl_config_path or "CONFIG.yml"
    return [
        f"axolotl spft inspect {cfg.output_dir}",
        f"axolotl inference {config} --lora-model-dir={cfg.output_dir}",
        f"axolotl merge-lora {config} --lora-model-dir={cfg.output_dir}",
    ]


def _asked_for(cfg: Any) -> list[str]:
    """The names that Axolotl asks for where tokens are added, whatever the model calls its embeddings."""
    from axolotl.loaders.utils import get_linear_embedding_layers

    adds_tokens = cfg.tokens or set(cfg.special_tokens or ()) - {"pad_token"}
    return get_linear_embedding_layers(cfg.model_config_type) if adds_tokens else []


def _adapter_config(cfg: Any, model: nn.Module):
    from peft import TaskType
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    from axolotl_spft.config import SpftConfig

    options = dict(cfg.spft or {})
    if options.get("seed") is None:
        options["seed"] = cfg.seed or 0
    architecture = type(model).__name__
    task_type = (
        TaskType.SEQ_CLS
        if "SequenceClassification" in architecture
        else TaskType.TOKEN_CLS
        if "TokenClassification" in architecture
        else TaskType.CAUSAL_LM
    )
    if task_type == TaskType.TOKEN_CLS:
        # PEFT trains the head whole, but says so only after it has chosen the targets, and the head among them
        options["modules_to_save"] = [*(options.get("modules_to_save") or []), *SEQ_CLS_HEAD_NAMES]
    # PEFT's key of the base's branch, tag or commit, which its loaders read
    return SpftConfig(task_type=task_type, revision=cfg.revision_of_model or None, **options)
