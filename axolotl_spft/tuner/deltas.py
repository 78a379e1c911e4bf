"""Where the values of the adapters stand that are active together, and what they are added to."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_spft.ops.linear import Delta, owner_of
from axolotl_spft.ops.mask.csr import Mask, mask_from_positions, positions
from axolotl_spft.ops.mask.plan import make_plan
from axolotl_spft.tuner.originals import Originals


class Deltas(Originals):
    """Mixin of a tuner layer: one delta for any choice of its adapters, made when it is first asked for."""

    _owner: int
    _deltas: dict[tuple[str, ...], tuple[Delta, tuple[Tensor, ...]]]

    def delta_of(self, names: tuple[str, ...]) -> tuple[Delta, Tensor]:
        """Where the values of these adapters together stand, and the values: (nnz)."""
        have_delta(self._owner, names)
        delta, places = self._deltas[names]
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
    """Make the delta of these adapters if there is none yet: torch.compile runs this while it traces the layer."""
    # by its number: some versions of torch.compile take no module here
    layer = owner_of(owner)
    if names not in layer._deltas:
        layer._deltas[names] = layer._make_delta(names)
