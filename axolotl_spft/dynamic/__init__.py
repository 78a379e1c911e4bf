"""Dynamic masks: values are exchanged while they are trained."""

from axolotl_spft.dynamic.dynamic_mask import DynamicMask

__all__ = ["DynamicMask"]
