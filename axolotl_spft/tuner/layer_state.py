"""What a sparse layer gives to a state dict, and what it takes of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_spft.errors import SpftFileError
from axolotl_spft.ops.mask.csr import Mask, problems_of
from axolotl_spft.optim.mask_changes import note_replacement
from axolotl_spft.tuner.offloading import fill_in
from axolotl_spft.tuner.originals import problems_of_originals

_MASK = ("spft_columns", "spft_row_offsets")


class LayerState(nn.Module):
    """Mixin of a tuner layer: W and S in state dicts, and masks that come in them."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # before the base layer adds its weight: a state dict holds W and S, not W + S and S
        self.revert()
        super()._save_to_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """As torch's, with the tensors of an adapter that is offloaded as they are where they are kept."""
        state_dict = super().state_dict(*args, prefix=prefix, **kwargs)
        for part in ("spft_values", *_MASK, "spft_originals"):
            fill_in(state_dict, f"{prefix}{part}.", self._modules[part])
        return state_dict

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args: Any) -> None:
        """As torch's, after the masks that the dict brings, whichever module it is loaded into.

        Raises:
            SpftFileError: a mask does not fit; nothing of this layer has been changed.
        """
        self.revert()
        # copied into the tensors that plans were made from, another mask would leave the plans as they are
        for adapter_name in list(self.spft_columns):
            self._take_given_mask(adapter_name, state_dict, prefix)
            values = self.spft_values[adapter_name]
            given = f"{prefix}spft_values.{adapter_name}" in state_dict
            if given and local_metadata.get("assign_to_params_buffers", False) and self.mask(adapter_name).nnz:
                note_replacement(values, adapter_name)
        self._forget_derived()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _take_given_mask(self, adapter_name: str, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        keys = {part: f"{prefix}{part}.{adapter_name}" for part in (*_MASK, "spft_values")}
        given = {part: state_dict[key] for part, key in keys.items() if key in state_dict}
        if all(self._holds_part(part, adapter_name, given[part]) for part in _MASK if part in given):
            return
        absent = [part for part in keys if part not in given]
        if absent:
            problems = [f"a mask without its {', '.join(absent)}"]
        else:
            values = given["spft_values"]
            mask = Mask(*(given[part] for part in _MASK))
            problems = problems_of(mask, values, self.out_features, self.in_features)
            originals = state_dict.get(f"{prefix}spft_originals.{adapter_name}")
            if not problems and originals is not None:
                problems = problems_of_originals(originals, values.numel())
        if problems:
            raise SpftFileError(
                f"{prefix.removesuffix('.')}: adapter `{adapter_name}`: {'; '.join(problems)}: the state dict is "
                "damaged or belongs to another model; load an intact one, of this model"
            )
        self.take_mask(adapter_name, state_dict, prefix)

    def take_mask(self, adapter_name: str, state_dict: Mapping[str, Tensor], prefix: str) -> bool:
        """Install the mask of a checked ``state_dict`` where it differs from the adapter's own; whether it did."""
        given = {part: state_dict[f"{prefix}{part}.{adapter_name}"] for part in _MASK}
        same = all(self._holds_part(part, adapter_name, tensor) for part, tensor in given.items())
        originals = state_dict.get(f"{prefix}spft_originals.{adapter_name}")
        if originals is not None or adapter_name in self.spft_originals:
            self.set_originals(adapter_name, None if originals is None else originals.clone())
        if not same:
            mask = Mask(*(tensor.clone() for tensor in given.values()))
            self.set_mask(adapter_name, mask, originals=self.originals(adapter_name))
        return not same

    def _holds_part(self, part: str, adapter_name: str, given: Tensor) -> bool:
        """Whether a tensor of the adapter's mask is ``given``."""
        own = self.mask(adapter_name)[_MASK.index(part)]
        if own.shape != given.shape:
            return False
        return own.data_ptr() == given.data_ptr() or torch.equal(
            own.to("cpu", torch.int64), given.to("cpu", torch.int64)
        )
