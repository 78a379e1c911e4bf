"""Every metric on two ranks, under DDP and each stage of ZeRO, gives the mask of one process."""

from __future__ import annotations

import os

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SpftConfig
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.metrics import METRICS
from axolotl_spft.salience.choose import choose_positions
from axolotl_spft.salience.hessian import BY_AUTOGRAD, BY_DIFFERENCE
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.metric import NEEDS, load_metric
from axolotl_spft.salience.sample_pass import collect_statistics
from axolotl_spft.salience.scores import scorer
from axolotl_spft.tuner.state import shapes_of
from tests.engine.processes import on_ranks
from tests.models import tiny_llama, token_batch, weights_of
from tests.salience.metrics.cases import BASES, ENGINES, TESTED
from tests.tuner.test_quantized import quantize

Chosen = dict[str, list[list[int]]]


def base_of(base: str):
    return tiny_llama() if base == "float" else quantize(tiny_llama(), base)


def positions_by_metric(model, base: str) -> Chosen:
    """Of each metric the positions in each matrix, of one pass for all."""
    ranks, config = Ranks.current(), SpftConfig(density=0.03, seed=3, lift_rank=5)
    model = get_peft_model(model, config).train()
    layers = adapted_layers(model)
    batches = [token_batch(rows=1, seed=seed) for seed in range(4)]
    found = collect_statistics(model, layers, NEEDS, batches[ranks.rank :: ranks.world], None, 4, ranks)
    # on each engine the same way
    assert found.notes["hessian"] == (BY_AUTOGRAD if base == "float" else BY_DIFFERENCE)
    chosen = {}
    for metric in METRICS:
        score = scorer(load_metric(metric), layers, found.sums, ranks, config.seed, config.lift_rank)
        chosen[metric] = [
            at.tolist() for at in choose_positions(config, list(layers), list(shapes_of(layers).values()), score, ranks)
        ]
    return chosen


def positions_by_engine() -> dict[str, dict[str, Chosen]]:
    """engine -> base -> the positions."""
    found = {"DDP": {base: positions_by_metric(base_of(base), base) for base in BASES}}
    # before deepspeed is imported: it would look for an accelerator
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(Ranks.current().rank)}
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo")
    plain = weights_of(tiny_llama())
    # 3 last: DeepSpeed partitions every later model of the process
    for stage in (1, 2, 3):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        # transformers partitions no quantized model
        tested = {base for _, base, engine in TESTED if engine == f"ZeRO-{stage}"}
        models = {base: base_of(base) for base in BASES if base in tested and (base != "float" or stage < 3)}
        held = HfDeepSpeedConfig(config)
        assert held.is_zero3() == (stage == 3)
        if stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=config):
                models["float"] = tiny_llama()
            for name, parameter in models["float"].named_parameters():
                # whose initialization is another one
                with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(plain[name])
        found[f"ZeRO-{stage}"] = {base: positions_by_metric(model, base) for base, model in models.items()}
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Chosen]:
    return {base: positions_by_metric(base_of(base), base) for base in BASES}


@pytest.fixture(scope="module")
def by_rank() -> list[dict]:
    return on_ranks(2, positions_by_engine)


@pytest.mark.parametrize("case", [case for case in TESTED if case[2] != ENGINES[0]], ids="-".join)
def test_two_ranks_give_the_mask_of_one_process(by_rank, expected, case):
    metric, base, engine = case
    one, other = (found[engine][base][metric] for found in by_rank)
    assert one == other
    for got, want in zip(one, expected[base][metric], strict=True):
        assert len(got) == len(want)
        # sums in another order: entries that differ by rounding may change places at the threshold
        assert len(set(got) ^ set(want)) <= 2
