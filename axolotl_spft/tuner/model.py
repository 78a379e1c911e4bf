"""`SpftModel`: the PEFT tuner that puts sparse layers into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils import TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING, _get_submodules, get_quantization_kwargs
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from axolotl_spft.config import RECORDED, SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.tuner.adapter_names import check_adapter_names
from axolotl_spft.tuner.biases import hold_biases, let_go_of_biases
from axolotl_spft.tuner.embedding import SpftEmbedding
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from axolotl_spft.tuner.expert_targets import inject_parameters
from axolotl_spft.tuner.experts import SpftExperts
from axolotl_spft.tuner.fused_reading import allow_fused_reading, stop_fused_reading
from axolotl_spft.tuner.holders import release
from axolotl_spft.tuner.layer import SpftLinear, mark_shared_inputs
from axolotl_spft.tuner.mixed_batch import adapters_by_row
from axolotl_spft.tuner.model_state import ModelState
from axolotl_spft.tuner.random_values import fill_randomly
from axolotl_spft.tuner.record import NAME as RECORD
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import spft_layers
from axolotl_spft.tuner.targets import check_target, settle_targets, whole_names
from axolotl_spft.tuner.tied import TiedLayer, mark_shared_weights, refuse_to_part, tied_modules
from axolotl_spft.tuner.weighted_sum import add_weighted_adapter
from axolotl_spft.tuner.without_mask import refuse_training_without_mask
from axolotl_spft.tuner.write_ahead import WriteAhead

_SAME_ON_ALL_RANKS = (".spft_values.", ".spft_columns.", ".spft_row_offsets.", ".spft_originals.")


class SpftModel(ModelState):
    """A model whose targeted layers carry sparse deltas (Liu et al., ACL 2025, arXiv 2412.13488).

    Targets are `torch.nn.Linear`, GPT-2's `Conv1D`, the quantized linear layers that PEFT knows, `torch.nn.Embedding`,
    and parameters of three dimensions, which hold the weights of experts.
    """

    prefix = "spft_"
    tuner_layer_cls = SparseLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING
    _handles: Sequence[RemovableHandle] = ()
    _guards: Sequence[RemovableHandle] = ()
    _ahead: WriteAhead | None = None
    # while an adapter is injected: of each module that is tied, all that hold its weight
    _tied: Mapping[nn.Module, Mapping[str, nn.Module]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        # PEFT's own way in gives a dict
        if isinstance(peft_config, SpftConfig) and peft_config.is_saved:
            raise SpftError(
                f"adapter `{adapter_name}` is a saved SPFT adapter of {peft_config.nnz} values, which is not loaded by "
                "transformers or inject_adapter_in_model(): load the base model, then "
                "`peft.PeftModel.from_pretrained(model, folder)`"
            )
        # adapters whose values' dtype is settled
        self._has_dtype: set[str] = set()
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add a combination of adapters, ``linear``: S = sum over i of weights[i] S_i, on the positions of all of them.

        It is not made active. Where there is an adapter of that name already it stays, with a warning.

        Args:
            adapters: names of adapters of this model.
            weights: one of each.
            adapter_name: a new name.
            combination_type: ``linear``, or PEFT's ``ties`` (arXiv 2306.01708), ``dare_linear``, ``dare_ties`` (arXiv
                2311.03099) or ``magnitude_prune``, on the values at these positions.
            density: share of the positions at which each adapter keeps its value, in (0, 1]; of the others than linear.
            majority_sign_method: how ``ties`` and ``dare_ties`` elect a sign: by ``total`` or by ``frequency``.

        Raises:
            SpftError: the arguments, or the adapters, do not allow it.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, density, majority_sign_method)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # read by DistributedDataParallel, which would broadcast every buffer before each forward pass, and cannot for
        # uint16; the names are those in the PeftModel around this one
        return [f"base_model.{RECORD}.{name}" for name in self.spft_record] + [
            f"base_model.model.{name}"
            for name, _ in self.model.named_buffers()
            if any(part in name for part in _SAME_ON_ALL_RANKS)
        ]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if RECORD not in self._modules:
            # persistent, so that state dicts, checkpoints of every engine and an adapter's file carry it
            self.spft_record = BufferDict(persistent=True)
        # the caller may use the object again, for another adapter or another model: what is recorded of one is not true
        # of the other
        self.peft_config[adapter_name] = config = copy.copy(self.peft_config[adapter_name])
        # a saved adapter's record is what its file has to bring; until that is loaded there is nothing
        config.awaited = {name: getattr(config, name) for name in RECORDED} if config.is_saved else None
        for name in RECORDED:
            setattr(config, name, None)
        check_adapter_names(self.peft_config, model)
        settle_targets(config, model)
        self._tied = tied_modules(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._tied = {}
        holders = [
            name
            for name, layer in spft_layers(model).items()
            if adapter_name in layer.spft_columns and not isinstance(layer, ExpertMatrix)
        ]
        config.target_modules = whole_names(config.target_modules, holders, model)
        if config.bias == "all":
            hold_biases(self, adapter_name, trained=not config.inference_mode)
        mark_shared_weights(model)
        mark_shared_inputs(model)
        stop_fused_reading(model)
        self._write_ahead(model)
        self._refuse_training_without_mask(model)
        # on the meta device, values are about to be loaded
        if not config.init_weights and not config.is_saved and not kwargs.get("low_cpu_mem_usage"):
            fill_randomly(self, adapter_name)
        # what the model holds from now on is a record of its own, which another adapter does not begin with
        config.is_saved = False

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        if not isinstance(peft_config, SpftConfig):
            # another method's, in a mixed model
            return super()._inject_parameters(peft_config, model, adapter_name, low_cpu_mem_usage)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            found = inject_parameters(model, peft_config, adapter_name, adapter_name in self.active_adapters)
        # PEFT reads the list of the model; since 0.21 it takes what is returned, and adds to the list what is not in it
        self.targeted_parameter_names.extend(found)
        return found

    def _check_target_module_exists(self, peft_config: SpftConfig, key: str) -> Any:
        # PEFT asks for a layer's index only where a name is the ending of a module's; those of all-linear are whole
        targets = peft_config.target_modules
        if not isinstance(targets, str) and f".{key}" in targets:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = {key}
        elif peft_config.layers_to_transform is not None and not isinstance(targets, str) and key in targets:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = {key.rpartition(".")[2]}
        return super()._check_target_module_exists(peft_config, key)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # once: a trainer loads its checkpoint into the adapter it resumes, whose values have the dtype that was chosen
        if adapter_name in self._has_dtype:
            return
        layers = [layer for layer in spft_layers(self.model).values() if adapter_name in layer.spft_values]
        trained = [layer.spft_values[adapter_name].requires_grad for layer in layers]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, requires_grad in zip(layers, trained):
            # since 0.21 PEFT makes new parameters, which are all trained
            layer.spft_values[adapter_name].requires_grad_(requires_grad)
        self._has_dtype.add(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Raises:
            SpftError: it is merged: the base weights would keep it.
        """
        for layer in spft_layers(self.model).values():
            layer.refuse_if_merged(adapter_name)
        super().delete_adapter(adapter_name)
        self._has_dtype.discard(adapter_name)
        self.spft_record._buffers.pop(adapter_name, None)
        let_go_of_biases(self, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._ahead is None or torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        with self._ahead.ended():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, in which the weights are written once for all tokens."""
        with self._ahead.running(self) if self._ahead else nullcontext():
            return self.model.generate(*args, **kwargs)

    def _write_ahead(self, model: nn.Module) -> None:
        self._stop_writing_ahead()
        self._ahead = WriteAhead(model)
        self._handles = self._ahead.attach(model)

    def _stop_writing_ahead(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._ahead = [], None

    def _refuse_training_without_mask(self, model: nn.Module) -> None:
        for handle in self._guards:
            handle.remove()
        # PEFT calls, depending on the task, one or the other
        self._guards = [module.register_forward_pre_hook(refuse_training_without_mask) for module in (self, model)]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        layers = None if self._ahead is None else self._ahead.layers
        if layers is not None:
            self._ahead.restore()
        if layers is None or self._has_auxiliary_modules() or any(layer.merged_adapters for layer in layers):
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            return
        # without PEFT's walks through all modules, which take longer than all the rest
        for layer in layers:
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        with ExitStack() as stack:
            if self._ahead is not None and not torch.compiler.is_compiling():
                stack.enter_context(self._ahead.ended())
            if adapter_names is not None:
                stack.enter_context(adapters_by_row(self, spft_layers(self.model), adapter_names, args, kwargs))
                if self._ahead is not None:
                    stack.enter_context(self._ahead.paused())
            yield

    def disable_adapter_layers(self) -> None:
        if self._ahead is not None:
            self._ahead.restore()
        super().disable_adapter_layers()

    def _has_auxiliary_modules(self) -> bool:
        return any(config.modules_to_save for config in self.peft_config.values())

    def _create_and_replace(
        self, peft_config: SpftConfig, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if isinstance(target, TiedLayer):
            target = target.owner
        if isinstance(target, SparseLayer):
            # of tied modules each name leads to the same layer
            if adapter_name not in target.spft_columns:
                target.add_empty_adapter(adapter_name)
            return
        quantization = get_quantization_kwargs(self)
        tied = self._tied.get(target, {})
        for name, module in (tied or {current_key: target}).items():
            check_target(module, name if name == current_key else f"{name} (tied to {current_key})", quantization)
        excluded = [
            name for name in tied if isinstance(self._check_target_module_exists(peft_config, name), _ExcludedModule)
        ]
        refuse_to_part(current_key, excluded)
        if tied:
            owner_name = next(name for name, module in tied.items() if isinstance(module, nn.Embedding))
            parent, target, target_name = _get_submodules(self.model, owner_name)
        if isinstance(target, nn.Embedding):
            new_module = SpftEmbedding(target, adapter_name)
        else:
            new_module = SpftLinear(target, adapter_name, **quantization)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)
        for name, module in tied.items():
            if name != owner_name:
                other_parent, _, other_name = _get_submodules(self.model, name)
                self._replace_module(other_parent, other_name, TiedLayer(module, new_module), module)
        if new_module.spft_values[adapter_name].is_meta:
            # PEFT has moved it to where an offloaded base layer's weight seems to lie
            new_module.add_empty_adapter(adapter_name)

    def _check_tied_modules(self, model: nn.Module, peft_config: SpftConfig) -> None:
        # what PEFT warns of for targets does not happen here
        peft_config = copy.copy(peft_config)
        peft_config.target_modules = set()
        super()._check_tied_modules(model, peft_config)

    def _get_tied_target_modules(self, *args: Any, **kwargs: Any) -> list[str]:
        return []  # a merge changes tied modules together

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, (SpftExperts, AuxiliaryTrainingWrapper)):
            # PEFT looks for a `weight`, which experts have not, nor a head of several layers that is trained whole
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        # before PEFT brings any weight in
        for layer in spft_layers(self.model).values():
            layer.refuse_if_quantized_and_offloaded()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._stop_writing_ahead()
        for handle in self._guards:
            handle.remove()
        for layer in spft_layers(self.model).values():
            layer.revert()
            release(layer)
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        allow_fused_reading(unloaded)
        return unloaded
