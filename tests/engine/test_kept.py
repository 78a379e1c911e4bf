"""Under DDP and ZeRO, which gives each layer an alias of its input at stage 3, layers keep what they keep without."""

from __future__ import annotations

import os

import torch

from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.prepare import gather_what_layers_read
from tests.engine.processes import on_ranks
from tests.models import tiny_llama, token_batch, with_adapter

TOKENS = 8 * 32
# ZeRO-3 last: DeepSpeed partitions every later model of the process
ENGINES = ("ddp", "zero2", "zero3")


def wrapped(model, engine: str | None):
    if engine is None:
        return model
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(torch.distributed.get_rank())}
    import deepspeed

    if engine == "zero3":
        # as a run does
        gather_what_layers_read(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(engine[-1])},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def kept_by_layer(engine: str | None) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of what layers keep with a row a token, in the second pass: ZeRO-3 learns the model in the first."""
    model = with_adapter(tiny_llama(), density=0.1)
    model.enable_input_require_grads()
    run = wrapped(model, engine)
    kept = {name: [] for name in adapted_layers(model)}
    running = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if running and tensor.numel() == TOKENS * tensor.shape[-1]:
            kept[running[-1]].append((TOKENS, tensor.shape[-1]))
        return tensor

    for name, layer in adapted_layers(model).items():
        layer.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        layer.register_forward_hook(lambda *_: running.clear())
    for _ in range(2):
        kept.update({name: [] for name in kept})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run(**token_batch(rows=8, length=32)).loss
        backward = getattr(run, "backward", torch.Tensor.backward)
        backward(loss)
    return kept


def kept_by_engine() -> dict[str, dict]:
    return {engine: kept_by_layer(engine) for engine in ENGINES}


def test_engines_keep_no_more():
    expected = kept_by_layer(None)
    assert {name.rpartition(".")[2] for name, shapes in expected.items() if shapes} == {"o_proj", "down_proj"}
    assert on_ranks(2, kept_by_engine) == [dict.fromkeys(ENGINES, expected)] * 2
