"""A base model with random weights, made directly on its device in its final form, matrix by matrix."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from axolotl_spft.errors import SpftError

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# more matrices than this take seconds to make
_SHOW_PROGRESS_FROM = 100


def make_base(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A frozen model that passes gradients down to its embeddings, the same for every method.

    It is never whole in ``dtype``: with ``quantization`` 4bit (nf4, double quantization, as QLoRA's) each linear
    weight is quantized before the next one is made. Embeddings and output head stay in ``dtype``.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(0)
    std = getattr(config, "initializer_range", 0.02)
    quantized = set(target_modules(model)) if quantization == "4bit" else set()
    names = [name for name, module in model.named_modules() if module._parameters]
    made: dict[int, nn.Parameter] = {}
    for name in tqdm(names, desc="Base model", leave=False, disable=len(names) < _SHOW_PROGRESS_FROM):
        module = model.get_submodule(name)
        for key, empty in list(module._parameters.items()):
            if empty is not None:
                if id(empty) not in made:
                    made[id(empty)] = _random_parameter(empty, std, dtype, device, generator)
                module._parameters[key] = made[id(empty)]
        if name.rpartition(".")[2] in quantized:
            # else the weight in `dtype` would stay alive
            made = {number: parameter for number, parameter in made.items() if parameter is not module.weight}
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _quantized(module, dtype, device))
    # the rotary frequencies: as from_pretrained leaves them, in float32
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    model.tie_weights()
    if quantization == "4bit":
        # as `from_pretrained` sets it: PEFT chooses its layers by this
        model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    model.train()
    model.enable_input_require_grads()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _random_parameter(
    empty: nn.Parameter, std: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> nn.Parameter:
    data = torch.empty(empty.shape, dtype=dtype, device=device)
    # vectors are the weights of norms, and biases, which cost the same whatever they hold
    data = data.normal_(0, std, generator=generator) if empty.ndim > 1 else data.fill_(1)
    return nn.Parameter(data, requires_grad=False)


def _quantized(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        compute_dtype=dtype, quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to(device)  # quantizes


def target_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that the methods adapt, by name: all but the output head.

    Raises:
        SpftError: the model has none.
    """
    head = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not layers:
        raise SpftError(f"{type(model).__name__} has no torch.nn.Linear layers: measure another `--model`")
    return layers


def target_modules(model: nn.Module) -> list[str]:
    """The last parts of the names of `target_layers`, as PEFT wants them."""
    return sorted({name.rpartition(".")[2] for name in target_layers(model)})


def text_batch(vocabulary: int, tokens: int, device: torch.device, index: int = 0) -> dict[str, torch.Tensor]:
    """``tokens`` bytes of the Python standard library's source, as one row."""
    source = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
    source = source * (tokens // len(source) + 2)
    start = index * tokens % (len(source) - tokens)
    ids = torch.tensor(list(source[start : start + tokens]), device=device)[None] % vocabulary
    return {"input_ids": ids, "labels": ids}
