"""Where the values of the adapters stand that are active together, and what they are added to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_spft.ops.linear import Delta, owner_of
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions, positions
from axolotl_spft.ops.mask.plan import make_plan
from axolotl_spft.tuner.originals import Originals


class MadeDelta(NamedTuple):
    """Where the values of some adapters together stand.

    Attributes:
        delta: of all.
        places: for several adapters, where each one's values go in it.
        sources: tensors of the masks that it was made from.
        version: how often these had been changed in place then.
    """

    delta: Delta
    places: tuple[Tensor, ...]
    sources: Sequence[Tensor]
    version: int

    @property
    def is_outdated(self) -> bool:
        return _changes_in_place(self.sources) != self.version


class Deltas(Originals):
    """Mixin of a tuner layer: one delta for any choice of its adapters, made when it is first asked for."""

    _owner: int
    _deltas: dict[tuple[str, ...], MadeDelta]

    def delta_of(self, names: tuple[str, ...]) -> tuple[Delta, Tensor]:
        """Where the values of these adapters together stand, and the values: (nnz)."""
        have_delta(self._owner, names)
        delta, places, *_ = self._deltas[names]
        if len(names) == 1:
            return delta, self.values(names[0])
        each = [self.values(name) for name in names]
        total = each[0].new_zeros(delta.mask.nnz)
        for values, at in zip(each, places):
            total = total.index_add(0, at, values.to(total.dtype))
        return delta, total

    def _make_delta(self, names: tuple[str, ...]) -> tuple[Delta, tuple[Tensor, ...]]:
        (_, mask, originals), places = self._part(names[0]), ()
        # training later must be able to keep what an evaluation has made
        with torch.inference_mode(False), torch.no_grad():
            if len(names) > 1:
                mask, places = self._union(names)
                originals = self._union_originals(names, mask, places) if self.repairs else None
            plan = make_plan(mask, self.in_features, columns=self._columns_to_keep(names))
        return Delta(mask, plan, originals), places

    def _columns_to_keep(self, names: tuple[str, ...]) -> Tensor | None:
        """See ``columns`` of `make_plan`."""
        return None

    def _union(self, adapter_names: tuple[str, ...]) -> tuple[Mask, tuple[Tensor, ...]]:
        """The mask with the positions of all adapters, and where each one's values go in it."""
        each = [positions(self.mask(name), self.in_features) for name in adapter_names]
        union = torch.cat(each).unique()
        places = tuple(torch.searchsorted(union, at) for at in each)
        return mask_from_positions(union, self.out_features, self.in_features), places


@torch.compiler.assume_constant_result
def have_delta(owner: int, names: tuple[str, ...]) -> None:
    """Make the delta of these adapters if there is none yet, or their masks were changed in place.

    torch.compile runs this while it traces the layer.
    """
    # by its number: some versions of torch.compile take no module here
    layer = owner_of(owner)
    made = layer._deltas.get(names)
    if made is not None and made.is_outdated:
        # a kernel would read behind the end of what the plan of another mask has laid out
        layer._forget_derived()
        made = None
    if made is None:
        held = (part._buffers[name] for part in (layer.spft_columns, layer.spft_row_offsets) for name in names)
        # torch does not count the changes of tensors that inference mode has made
        sources = [tensor for tensor in held if not tensor.is_inference()]
        layer._deltas[names] = MadeDelta(*layer._make_delta(names), sources, _changes_in_place(sources))


def _changes_in_place(tensors: Sequence[Tensor]) -> int:
    return sum([tensor._version for tensor in tensors])
