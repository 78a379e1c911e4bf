"""Adapters and base checkpoints as files: read, written and changed without building a model with weights."""
