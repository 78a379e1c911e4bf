"""The values' gradient, and what a forward pass keeps for it."""
