"""How much memory a run will need, and what fits, before anything is downloaded or allocated."""
