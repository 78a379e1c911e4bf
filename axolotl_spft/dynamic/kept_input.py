"""An input of a module that is kept from its forward pass until the backward pass has come by."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from axolotl_spft.errors import SpftError


class KeptInput:
    """A tensor that modules read, one after the other, and that is to be kept once.

    Attributes:
        kept: it, where it is kept; None until `keep` is called.
    """

    def __init__(self, x: Tensor):
        self._given, self._version, self.kept = x.detach(), x._version, None

    def is_of(self, x: Tensor) -> bool:
        """Whether ``x`` is this tensor, unchanged, and it is not kept yet."""
        given = self._given
        return (
            given is not None
            and (given.data_ptr(), given.shape, given.stride()) == (x.data_ptr(), x.shape, x.stride())
            and self._version == x._version
        )

    def keep(self, name: str, place: Callable[[Tensor], Tensor]) -> Tensor:
        """Keep the tensor, which a backward pass through the module ``name`` has come to, where ``place`` puts it.

        Raises:
            SpftError: it was changed in place since the module read it.
        """
        if self.kept is None:
            if self._given._version != self._version:
                raise SpftError(
                    f"the model changes the input of {name} in place after that layer has read it, so that the "
                    "gradient of its weight cannot be had: name the layer in `exclude_modules`, or leave `reselect` out"
                )
            self.kept, self._given = place(self._given), None
        return self.kept
