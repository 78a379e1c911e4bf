"""`PeftMixedModel` takes sparse adapters beside those of other methods: LoRA and SPFT in one model, on any modules.

PEFT's `MixedModel` (0.20) knows a closed list of methods, which `register_peft_method` does not extend. What is
registered here replaces, in PEFT's modules, that class by the one below, and adds SPFT to the lists of methods beside
it. The test of the same name shows that PEFT's own class refuses an `SpftConfig`.
"""

from __future__ import annotations

from typing import Any

import peft.mixed_model
import peft.tuners.mixed
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.mixed import model as mixed
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs
from torch import nn

from axolotl_spft.config import SpftConfig
from axolotl_spft.errors import SpftError
from axolotl_spft.peft_type import SPFT
from axolotl_spft.tuner.biases import let_go_of_biases
from axolotl_spft.tuner.fused_reading import allow_fused_reading
from axolotl_spft.tuner.layer import SpftLinear
from axolotl_spft.tuner.model import SpftModel
from axolotl_spft.tuner.record import NAME as RECORD
from axolotl_spft.tuner.sparse_layer import SparseLayer
from axolotl_spft.tuner.state import spft_layers
from axolotl_spft.tuner.targets import check_target
from axolotl_spft.tuner.tied import TiedLayer


class SparseMixedModel(mixed.MixedModel, SpftModel):
    """PEFT's `MixedModel`, whose adapters may be sparse ones.

    A module that two methods adapt has the layer of the second one around that of the first. A sparse layer that is
    outside adds x S^T to what the other one computes; one that is inside multiplies with W + S as ever. Nothing is
    written ahead, and unmerging subtracts what merging has added, since each layer may be merged by itself.
    """

    tuner_layer_cls = BaseTunerLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if RECORD not in self._modules:
            self.spft_record = BufferDict(persistent=True)
        if isinstance(config, SpftConfig):
            if config.target_parameters:
                raise SpftError(
                    f"`target_parameters: {list(config.target_parameters)}` are not adapted in a mixed model: use "
                    "`get_peft_model(model, config)` without `mixed`, or leave them out"
                )
            # PEFT gives the PeftMixedModel, in which names are others and nothing tells the output head
            super().inject_adapter(self.model, adapter_name, *args, **kwargs)
        else:
            BaseTuner.inject_adapter(self, model, adapter_name, *args, **kwargs)
        for layer in spft_layers(self.model).values():
            layer.shares_base = True

    def _write_ahead(self, model: nn.Module) -> None:
        """Each layer writes by itself."""

    def _check_new_adapter_config(self, config: Any) -> None:
        if isinstance(config, SpftConfig):
            BaseTuner._check_new_adapter_config(self, config)
        else:
            super()._check_new_adapter_config(config)

    def _inject_parameters(self, *args: Any, **kwargs: Any) -> Any:
        # of other methods alone
        return BaseTuner._inject_parameters(self, *args, **kwargs)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        if isinstance(peft_config, SpftConfig):
            return super()._check_target_module_exists(peft_config, key)
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        if isinstance(peft_config, SpftConfig):
            super()._check_tied_modules(model, peft_config)
        else:
            BaseTuner._check_tied_modules(self, model, peft_config)

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if not isinstance(peft_config, SpftConfig):
            super()._create_and_replace(
                peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
            )
            return
        inside = target
        while isinstance(inside, BaseTunerLayer) and not isinstance(inside, (SparseLayer, TiedLayer)):
            inside = inside.base_layer
        if inside is target or isinstance(inside, (SparseLayer, TiedLayer)):
            SpftModel._create_and_replace(
                self, peft_config, adapter_name, inside, target_name, parent, current_key=current_key, **kwargs
            )
            return
        quantization = get_quantization_kwargs(self)
        check_target(inside, current_key, quantization)
        if isinstance(inside, nn.Embedding):
            raise SpftError(
                f"`{current_key}` is an embedding that another adapter is on already: give the sparse adapter to the "
                "model first, or name the module in `exclude_modules`"
            )
        new_module = SpftLinear(target, adapter_name, **quantization)
        if adapter_name not in self.active_adapters:
            new_module.spft_values.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove adapters.

        Raises:
            SpftError: a sparse one is merged: the base weights would keep it.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in spft_layers(self.model).values():
            for name in names:
                layer.refuse_if_merged(name)
        super().delete_adapter(adapter_name)
        for name in names:
            self._has_dtype.discard(name)
            self.spft_record._buffers.pop(name, None)
            let_go_of_biases(self, name)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._refuse_to_merge_repaired()
        for handle in self._guards:
            handle.remove()
        unloaded = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        allow_fused_reading(unloaded)
        return unloaded

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        self._refuse_to_merge_repaired()

    def _refuse_to_merge_repaired(self) -> None:
        # neither layer of a module knows whether the other one's is in the weight already
        for layer in spft_layers(self.model).values():
            for name in layer.spft_originals if layer.repairs else ():
                raise SpftError(
                    f"adapter `{name}` repairs the quantized base by assigning entries, which would lose what another "
                    "method's adapter has merged there: keep the adapters of this mixed model unmerged, or "
                    f"delete_adapter({name!r}) first"
                )


def register_in_mixed_models() -> None:
    """Let `PeftMixedModel` take sparse adapters, once `register_peft_method` knows them."""
    types = (*mixed.COMPATIBLE_TUNER_TYPES, SPFT)
    mixed.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = types
    mixed.PREFIXES.append(SpftModel.prefix)
    mixed.Layers = (*mixed.Layers, SparseLayer)
    peft.mixed_model.MixedModel = PEFT_TYPE_TO_MIXED_MODEL_MAPPING[SPFT] = SparseMixedModel
