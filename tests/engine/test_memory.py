"""The announced memory against the bytes of real tensors after a training step."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SparseAdamW, SpftConfig, select_mask
from axolotl_spft.engine.memory import memory_per_rank
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.salience.collect import gathered_gradients
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.metric import accumulators_of, load_metric
from axolotl_spft.salience.sample_pass import collect_statistics
from axolotl_spft.trainer.memory import memory_of_run
from tests.engine.test_ranks import LiveBytes
from tests.models import tiny_llama, token_batch
from tests.tuner.test_quantized import quantize

ARGUMENTS = SimpleNamespace(bf16=False, fp16=False)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "4bit"])
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_announced_bytes_are_those_of_the_tensors(base, state_bits, modules_to_save):
    model = tiny_llama(torch.bfloat16 if base == "bfloat16" else torch.float32, hidden_size=128, intermediate_size=256)
    if base == "4bit":
        model = quantize(model, "4bit")
    model = get_peft_model(model, SpftConfig(density=0.05, samples=2, modules_to_save=modules_to_save))
    before = memory_of_run(model, ARGUMENTS, "single", Ranks(), state_bits)
    select_mask(model, [token_batch()])
    announced = memory_of_run(model, ARGUMENTS, "single", Ranks(), state_bits)
    assert before[:-1] == announced[:-1]
    assert (before.salience > 0, announced.salience) == (True, 0)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SparseAdamW(trained, state_bits=state_bits)
    model(**token_batch()).loss.backward()
    optimizer.step()
    layers = adapted_layers(model).values()
    indices = [tensor for layer in layers for tensor in layer.mask("default")]
    indices.extend(model.base_model._ahead.originals())
    state = [tensor for entry in optimizer.state.values() for name, tensor in entry.items() if name != "step"]

    assert announced.base == bytes_of(p for p in model.parameters() if not p.requires_grad)
    assert announced.values == bytes_of(trained)
    assert announced.indices == bytes_of(indices)
    assert announced.gradients == bytes_of(parameter.grad for parameter in trained)
    # the last block of each tensor's 8-bit moments has a scale of its own
    assert announced.optimizer <= bytes_of(state) <= announced.optimizer + 16 * len(trained) * (state_bits == 8)


def test_the_salience_pass_holds_what_was_announced():
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05))
    layers = adapted_layers(model)
    with gathered_gradients(model, layers) as sums:
        accumulators = bytes_of(sums.values())
    largest = max(layer.out_features * layer.in_features for layer in layers.values())
    assert memory_of_run(model, ARGUMENTS, "single", Ranks(), 32).salience == accumulators + 4 * largest


@pytest.mark.parametrize("salience", ["gradient", "fisher", "grasp", "synflow"])
def test_the_sums_of_each_kind_of_metric_are_announced(monkeypatch, salience):
    model = get_peft_model(tiny_llama(), SpftConfig(salience=salience))
    layers, needs = adapted_layers(model), load_metric(salience).needs
    shapes = {(layer.out_features, layer.in_features) for layer in layers.values()}
    # one process lets go of its memory at once
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with LiveBytes(shapes, list(model.parameters())) as tracker:
        collect_statistics(model, layers, needs, [token_batch()], None, 2, Ranks())
    sums = 4 * accumulators_of(needs) * sum(layer.out_features * layer.in_features for layer in layers.values())
    announced = memory_of_run(model, ARGUMENTS, "single", Ranks(), 32).salience
    assert sums < announced and sums <= tracker.peak <= 1.1 * announced


def test_stages_share_more_and_more():
    def of(engine: str, world: int):
        return memory_per_rank(1000, [(10, 20), (30, 10)], 50, 2, 2, engine, world)

    single, ddp, *stages = of("single", 1), of("ddp", 4), *(of(f"zero{stage}", 4) for stage in (1, 2, 3))
    assert ddp.optimizer == single.optimizer == 50 * 12
    assert [stage.optimizer for stage in stages] == [150] * 3
    assert [stage.gradients for stage in stages] == [200, 50, 50]
    assert [stage.base for stage in stages] == [1000, 1000, 250]
    assert [stage.salience for stage in stages] == [2000 + 1200, 2000 + 1200, 500 + 1200]
    assert "in training" in str(single)


def test_deepspeeds_buckets_are_counted():
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05))
    zero = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}
    arguments = SimpleNamespace(
        bf16=True, fp16=False, hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": zero})
    )
    with_buckets, without = (memory_of_run(model, each, "zero2", Ranks(0, 2), 32) for each in (arguments, ARGUMENTS))
    assert with_buckets.gradients - without.gradients == 2 * 1000 * 2
