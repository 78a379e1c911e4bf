"""`SpftCallback`, and what any `transformers.Trainer` needs before it trains a sparse adapter."""

from axolotl_spft.trainer.callback import SpftCallback

__all__ = ["SpftCallback"]
