"""An embedding layer with sparse deltas on a frozen base layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from axolotl_spft.ops.embedding import Lookup, embed, sparse_embedding
from axolotl_spft.ops.mask.csr import Mask
from axolotl_spft.tuner.base_weight import WRITING
from axolotl_spft.tuner.mixed_batch import look_up_by_row_
from axolotl_spft.tuner.offloading import execution_device, is_offloaded
from axolotl_spft.tuner.sparse_layer import SparseLayer


class SpftEmbedding(SparseLayer):
    """y = (W + S)[ids] with a frozen W (tokens, embedding_dim) and one sparse S per adapter.

    As a matrix (out_features, in_features) W has a row for each token.
    """

    mixes_rows = True

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__(base_layer, adapter_name, (base_layer.num_embeddings, base_layer.embedding_dim))
        # read by models, of their embeddings
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx = base_layer.padding_idx
        self.add_empty_adapter(adapter_name)

    def forward(self, ids: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        by_row = adapter_names is not None and not self._disable_adapters
        names = () if by_row else self.adapters_to_apply()
        if not names:
            if by_row:
                self.revert()
            with self.brought_in():
                y = self.base_layer(ids, *args, **kwargs)
            return look_up_by_row_(y, ids, self, self.get_base_layer(), adapter_names) if by_row else y
        return self.look_up(ids, self.get_base_layer(), names)

    def look_up(self, ids: Tensor, embedding: nn.Embedding, names: tuple[str, ...]) -> Tensor:
        """y of an embedding that holds this layer's W, with these adapters, without its own forward pass."""
        if is_offloaded(embedding):
            ids = ids.to(execution_device(embedding))
        delta, values = self.delta_of(names)
        y = sparse_embedding(ids, values, delta, lookup_of(embedding), embedding.weight.dtype, self, self._owner)
        scale = scale_of(embedding)
        return y if scale is None else y * scale

    def rows_of_sum(self, ids: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """(W + S)[ids]: (..., embedding_dim)."""
        with WRITING:
            held = self._written
            if held is not None and self._holds(values, mask):
                return F.embedding(ids, self.get_base_layer().weight)
            writer = None if self._writer is None else self._writer()
            if writer is not None:
                writer.tell_missing()
            self.revert()
            try:
                with self.brought_in():
                    return embed(ids, self.get_base_layer().weight.detach(), values.detach(), mask)
            finally:
                if held is not None:
                    self._write(held.values, held.mask, held)


def lookup_of(embedding: nn.Embedding) -> Lookup:
    """How an embedding looks tokens up."""
    return Lookup(embedding.padding_idx, embedding.scale_grad_by_freq)


def scale_of(embedding: nn.Embedding) -> Tensor | float | None:
    """What the rows are multiplied with, by the embeddings of transformers that scale; None where there is nothing."""
    scale = getattr(embedding, "embed_scale", None)
    return scale.to(embedding.weight.dtype) if isinstance(scale, Tensor) else scale
