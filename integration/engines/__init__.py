"""Evidence that training under every engine is the same training, on CPU ranks with the real engines."""
