"""What a model with sparse adapters gives to a state dict, and what it takes of one."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from axolotl_spft.tuner.biases import named_bias
from axolotl_spft.tuner.load import forget_counts, record_given_masks, take_state
from axolotl_spft.tuner.offloading import fill_in
from axolotl_spft.tuner.record import NAME as RECORD
from axolotl_spft.tuner.state import ORIGINALS, TENSORS


class ModelState(BaseTuner):
    """Mixin of the tuner: records of the adapters, beside what the layers give and take."""

    @classmethod
    def _get_learnable_bias_state_dict(cls, *args: Any, **kwargs: Any) -> dict:
        # since 0.21 PEFT adds the base layers' biases to a file, where they are already
        return {}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict) -> dict:
        # since 0.21 PEFT leaves the keys of modules that are not targeted, and of the record, without the adapter's
        # name, and then skips them; with the name, they are seen when the adapter's file is checked
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        endings = tuple(f".{tensor}" for tensor in (*TENSORS, ORIGINALS, RECORD))
        return {
            f"{key}.{adapter_name}" if key.endswith(endings) else named_bias(key, adapter_name): value
            for key, value in remapped.items()
        }

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """As torch's, with records of what the layers hold by now, as they are where they are kept if offloaded."""
        record_given_masks(self)
        state_dict = super().state_dict(*args, prefix=prefix, **kwargs)
        fill_in(state_dict, f"{prefix}{RECORD}.", self._modules[RECORD])
        return state_dict

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args: Any) -> None:
        """As torch's, after `take_state`; see there for what it raises."""
        forget_counts(self)
        take_state(self, state_dict, prefix, local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
