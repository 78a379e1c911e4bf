"""Sparse adapters on models that PEFT knows nothing of: applied to plain weights in place, and reverted bit for bit."""

from axolotl_spft.serving.switch import Applied, Switch, apply_adapter

__all__ = ["Applied", "Switch", "apply_adapter"]
