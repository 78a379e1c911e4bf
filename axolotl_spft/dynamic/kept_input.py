"""An input of a module that is kept from its forward pass until the backward pass has come by."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from axolotl_spft.errors import SpftError
from axolotl_spft.ops.gradient.saved_hooks import checkpointed_pass, save


class KeptInput:
    """A tensor that modules read, one after the other, and that is to be kept once.

    Until the backward pass it is kept as autograd would: in a checkpoint the pass of then has it again.

    Attributes:
        kept: it, where it is kept; None until `keep` is called.
    """

    def __init__(self, x: Tensor):
        self._place, self._pass = _place_of(x), checkpointed_pass()
        self._given: Callable[[], Tensor] | None = save(x.detach())
        self._version, self.kept = x._version, None

    def is_of(self, x: Tensor) -> bool:
        """Whether ``x`` is this tensor, unchanged, read in the same pass, and it is not kept yet."""
        return (
            self._given is not None
            # a checkpoint's second pass must keep what its first one kept
            and self._pass is checkpointed_pass()
            and self._version == x._version
            and self._place == _place_of(x)
        )

    def keep(self, name: str, place: Callable[[Tensor], Tensor]) -> Tensor:
        """Keep the tensor, which a backward pass through the module ``name`` has come to, where ``place`` puts it.

        Raises:
            SpftError: it was changed in place since the module read it.
        """
        if self.kept is None:
            given = self._given()
            if given._version != self._version:
                raise SpftError(
                    f"the model changes the input of {name} in place after that layer has read it, so that the "
                    "gradient of its weight cannot be had: name the layer in `exclude_modules`, or leave `reselect` out"
                )
            self.kept, self._given = place(given), None
        return self.kept


def _place_of(x: Tensor) -> tuple:
    # whose storage is told from a later one at its address
    return StorageWeakRef(x.untyped_storage()), x.storage_offset(), x.shape, x.stride()
