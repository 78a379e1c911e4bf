"""Salience and selection: which entries of the frozen weights are trained."""

from axolotl_spft.salience.orchestrate import select_mask
from axolotl_spft.salience.report import MaskReport

__all__ = ["MaskReport", "select_mask"]
