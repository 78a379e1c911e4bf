"""What computes: torch, the C kernels, Triton, and which of them an operation uses."""
