from __future__ import annotations

import warnings

import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="Could not find a config file")
