"""PEFT's comparison of methods (its method_comparison/MetaMathQA) for ``spft``: the same protocol and file format."""
