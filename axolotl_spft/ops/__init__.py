"""Pure tensor functions: the sparse mask in CSR, and the linear layer with a sparse delta."""
