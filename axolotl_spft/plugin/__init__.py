"""The Axolotl plugin: `adapter: spft`."""

from axolotl_spft.plugin.args import SpftArgs
from axolotl_spft.plugin.plugin import SpftPlugin

__all__ = ["SpftArgs", "SpftPlugin"]
