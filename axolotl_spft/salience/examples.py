"""What the examples in a batch are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
