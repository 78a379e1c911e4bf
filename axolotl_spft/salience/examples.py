"""What the examples in a batch are, and which of its tokens belong to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axolotl_spft.errors import SpftError

Batch = Mapping[str, Any]
# how the names of a batch's text end, those of pairs of texts too
_TEXT = ("input_ids", "inputs_embeds", "labels")


def count_examples(batch: Batch) -> int:
    """The examples in a batch: rows, or with sample packing the sequences (``position_ids`` from 0) with a label."""
    tensors = {name: tensor for name, tensor in batch.items() if isinstance(tensor, Tensor) and tensor.ndim}
    # of pictures and packed rows others have a row for each patch or each boundary
    text = [tensor for name, tensor in tensors.items() if name.endswith(_TEXT)]
    rows = max((len(tensor) for tensor in text or tensors.values()), default=1)
    position_ids, labels = batch.get("position_ids"), batch.get("labels")
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2:
        sequences = (position_ids.flatten() == 0).cumsum(0)
        if isinstance(labels, Tensor) and labels.shape == position_ids.shape:
            # Axolotl's padding has positions from 0 too, but no label
            sequences = sequences[labels.flatten() != -100]
        return max(rows, len(sequences.unique()))
    return rows


class Tokens:
    """Which tokens of a batch belong to which example, and which are padding.

    Args:
        batch: that the model reads; its text is (batch, length).

    Attributes:
        is_running: whether the loss of the batch is being computed.
    """

    def __init__(self, batch: Batch):
        self.read(batch)

    def read(self, batch: Batch) -> None:
        """Take the place of another batch, whose loss is computed from now on."""
        self.is_running, self._of_call = True, None
        text = next(
            (batch[n] for n in ("input_ids", "inputs_embeds", "labels") if isinstance(batch.get(n), Tensor)), None
        )
        self.shape = tuple(text.shape[:2]) if text is not None and text.ndim >= 2 else None
        self._first: Tensor | None = None
        self._counted: Tensor | None = None
        if self.shape is None:
            return
        # every row starts an example, and with sample packing every position 0
        first = torch.zeros(self.shape, dtype=torch.bool)
        position_ids = batch.get("position_ids")
        if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and position_ids.shape[1] == self.shape[1]:
            first |= position_ids.cpu() == 0
        first[:, 0] = True
        self._first = first.flatten()
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        if isinstance(mask, Tensor) and mask.shape == self.shape:
            self._counted = (mask != 0).flatten()
        elif isinstance(labels, Tensor) and labels.shape == self.shape:
            number = self._first.cumsum(0) - 1
            labelled = torch.zeros(int(number[-1]) + 1, dtype=torch.bool)
            labelled[number[(labels != -100).flatten().cpu()]] = True
            self._counted = labelled[number]

    def end(self) -> None:
        """The batch's loss has been computed: other passes, such as those that make the next batch, are none of it."""
        self.is_running = False

    def read_call(self, mask: Tensor | None) -> None:
        """Take the padding from the ``attention_mask`` of a call of the model: a loss may make its own batch."""
        self._of_call = (mask != 0).flatten() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def examples(self, x: Tensor, name: str) -> list[slice]:
        """The rows of x, flattened to (tokens, in_features), of each example.

        Where x is another text than the batch's (pairs of texts that a loss concatenates), each of its rows is one.

        Raises:
            SpftError: the rows of x have lost their place in the batch, as in an expert.
        """
        rows = x.shape[:-1]
        if self._first is not None and rows.numel() == self._first.numel() and self._is_of_batch(rows):
            starts = self._first.nonzero().squeeze(1).tolist()
        elif len(rows) == 2:
            starts = list(range(0, rows.numel(), rows[1]))
        else:
            raise SpftError(
                f"{name} reads an input of shape {tuple(x.shape)}, whose examples cannot be told apart, as "
                "`salience: fisher` needs: name the module in `exclude_modules`, or use `salience: gradient`"
            )
        return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], rows.numel()])]

    def _is_of_batch(self, rows: torch.Size) -> bool:
        return len(rows) == 1 or tuple(rows) == self.shape or rows[0] == 1

    def counted(self, x: Tensor) -> Tensor | None:
        """Which of the rows of x, flattened, are no padding: bool; None where all count, or it cannot be known.

        The ``attention_mask`` of the call or the batch says so, where it has one number for each token; else the tokens
        of an example count that has any label.
        """
        for counted in (self._of_call, self._counted):
            if counted is not None and x.shape[:-1].numel() == counted.numel():
                return counted.to(x.device)
        return None
