"""The optimizer of sparse values."""

from axolotl_spft.optim.sparse_adamw import SparseAdamW

__all__ = ["SparseAdamW"]
