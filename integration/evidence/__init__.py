"""Experiments on real models: what is fine-tuned how, at which rate, and what comes of it."""
