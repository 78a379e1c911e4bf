"""What a quantized weight was at the entries of an adapter that repairs it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import Mask, positions
from axolotl_spft.tuner.merged_weight import Part
from axolotl_spft.tuner.offloading import tensor_in


class Originals:
    """Mixin of a tuner layer: ``spft_originals``, by adapter what its values are added to in place of a quantized W.

    Attributes:
        repairs: whether W is quantized, and the forward pass puts the originals in their places.
    """

    repairs: bool = False
    spft_originals: BufferDict

    def originals(self, adapter_name: str) -> Tensor | None:
        """W before quantization at the entries of an adapter's mask, if it repairs it: (nnz)."""
        return tensor_in(self.spft_originals, adapter_name) if adapter_name in self.spft_originals else None

    def set_originals(self, adapter_name: str, originals: Tensor | None) -> None:
        """Say what a quantized weight was at the positions of an adapter (nnz), or that it stays as it is there.

        Raises:
            SpftError: the weight is quantized in a way that does not let any entry be replaced.
        """
        if originals is None:
            self.spft_originals._buffers.pop(adapter_name, None)
        else:
            if self.quantization_backend is not None and not self.repairs:
                raise SpftError(
                    f"adapter `{adapter_name}` repairs a quantized base, and the entries of a "
                    f"{self.quantization_backend.backend_name} layer cannot be replaced: load it on the base that it "
                    "was trained on, or merge it (`axolotl spft merge`)"
                )
            self.spft_originals[adapter_name] = originals.to(self.spft_columns[adapter_name].device)
        self._forget_derived()

    def _union_originals(self, adapter_names: tuple[str, ...], mask: Mask, places: tuple[Tensor, ...]) -> Tensor | None:
        """What stands under the values of several adapters: originals where one has them, else W; None: W everywhere.

        Args:
            mask, places: of `_union`.
        """
        given = [(self.originals(name), at) for name, at in zip(adapter_names, places) if name in self.spft_originals]
        if not given:
            return None
        own = self.read_weight().reshape(-1)[positions(mask, self.in_features)]
        for originals, at in given:
            own = own.to(torch.promote_types(own.dtype, originals.dtype))
            own[at] = originals.to(own.dtype)
        return own

    def values_added(self, adapter_name: str) -> Tensor:
        """What an adapter adds to W at the entries of its mask, those that repair it included: (nnz)."""
        return self.added_to_weight(*self._part(adapter_name))

    def added_to_weight(self, values: Tensor, mask: Mask, originals: Tensor | None) -> Tensor:
        """``originals`` + ``values`` - W at the entries of ``mask``, or the values where nothing is replaced: (nnz)."""
        if originals is None:
            return values
        own = self.read_weight().reshape(-1)[positions(mask, self.in_features)]
        return (originals.to(torch.float32) + values - own).to(values.dtype)

    def _part(self, adapter_name: str) -> Part:
        # an unquantized W has the originals itself
        originals = self.originals(adapter_name) if self.repairs else None
        return Part(self.values(adapter_name), self.mask(adapter_name), originals)

    def refuse_to_forget_originals(self, adapter_name: str, originals: Tensor | None) -> None:
        """Raise where an adapter's values would suddenly be added to something else than before."""
        if originals is None and adapter_name in self.spft_originals:
            raise SpftError(
                f"adapter `{adapter_name}` repairs a quantized base: with other positions it needs what the weight was "
                "there before it was quantized (`originals`)"
            )

    def refuse_to_replace_merged(self, deltas: Mapping[str, Part]) -> None:
        """Raise where a merge of these adapters would replace entries that hold one which was merged before."""
        replacing = [name for name, part in deltas.items() if part.originals is not None]
        if replacing and self.merged_adapters:
            raise SpftError(
                f"adapter `{replacing[0]}` repairs the quantized base and {self.merged_adapters} is merged already: "
                "call unmerge_adapter() first, and merge all of them at once"
            )


def problems_of_originals(originals: Tensor, nnz: int) -> list[str]:
    """What makes the original weights of a repaired matrix unfit for ``nnz`` values; empty when nothing does."""
    if not originals.is_floating_point() or tuple(originals.shape) != (nnz,):
        return [f"original weights are {originals.dtype} {tuple(originals.shape)}, must be floating point ({nnz},)"]
    return [] if torch.isfinite(originals).all() else ["an original weight is NaN or infinite"]
