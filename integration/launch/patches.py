"""Every patch of a third-party package that CPU ranks need; real GPUs need none of them.

Checked with accelerate 1.13, axolotl 0.19 and deepspeed 0.18.9.
"""

from __future__ import annotations

import os

import torch
import torch.distributed


def use_gloo() -> None:
    """accelerate: it would ask for MPI or oneCCL on CPU ranks, and for a GPU under DeepSpeed; gloo does for both."""
    from accelerate import state

    original = state.PartialState._prepare_backend

    def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return original(self, cpu, sagemaker_dp, backend)
        under_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        kind = state.DistributedType.MULTI_GPU if under_deepspeed else state.DistributedType.MULTI_CPU
        return "gloo", kind

    state.PartialState._prepare_backend = prepare_backend


def leave_device_map_out() -> None:
    """axolotl: on several ranks it sets ``device_map`` to a GPU's number, which a CPU has not."""
    import axolotl.cli.config
    import axolotl.utils.config

    original = axolotl.utils.config.normalize_config

    def normalize_config(cfg):
        original(cfg)
        cfg.device_map = None

    axolotl.utils.config.normalize_config = normalize_config
    axolotl.cli.config.normalize_config = normalize_config


def step_without_grad() -> None:
    """DeepSpeed ZeRO-1 and 2: gloo's all-gather writes into views of parameters, which autograd forbids."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    DeepSpeedZeroOptimizer.step = torch.no_grad()(DeepSpeedZeroOptimizer.step)


def gather_one_by_one() -> None:
    """DeepSpeed ZeRO-3: it starts a transfer for each parameter of a module and awaits the last one alone.

    On a GPU they end in that order. The threads of gloo end them in any, and one that is late writes over the weights
    that transformers loads in the meantime, of modules with several parameters of their own: experts, biases.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    original = Init._allgather_params_coalesced

    def allgather(self, param_list, *args, **kwargs):
        for param in param_list:
            original(self, [param], *args, **kwargs)

    Init._allgather_params_coalesced = allgather


def allow_bf16() -> None:
    """transformers: bf16 without a GPU needs ``use_cpu``, which would switch DeepSpeed off."""
    from transformers import training_args

    training_args.is_torch_bf16_gpu_available = lambda: True


def keep_process_group() -> None:
    """torch: axolotl destroys the process group after a run, and DeepSpeed would go on with the dead one."""
    torch.distributed.destroy_process_group = lambda *args, **kwargs: None


def forget_run() -> None:
    """accelerate and axolotl: what they remember of the run before this one in the same process."""
    import axolotl.utils.distributed
    from accelerate.state import AcceleratorState

    axolotl.utils.distributed.distributed_state = None
    AcceleratorState._reset_state(reset_partial_state=True)


def apply_all() -> None:
    """Apply every patch; before axolotl's command line is imported."""
    use_gloo()
    leave_device_map_out()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        step_without_grad()
        gather_one_by_one()
        allow_bf16()
