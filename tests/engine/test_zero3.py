"""Under ZeRO-3's engine layers find whole what they read of other modules, and each value gets its own gradient."""

from __future__ import annotations

import os

import pytest
import torch

from axolotl_spft.dynamic.collect import Collector
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer import prepare
from axolotl_spft.trainer.prepare import gather_what_layers_read, ties_in_zero3
from integration.launch.patches import gather_one_by_one
from tests.engine.processes import on_ranks
from tests.experts import PARAMETERS, tiny_gpt_oss, tiny_mixtral
from tests.models import tiny_llama, token_batch, with_adapter

# of micro-batches that two ranks share
STEPS, PER_STEP = 2, 4
MODELS = {
    # the first of them read what needs no gradient
    "linear": lambda: with_adapter(tiny_llama(), target_modules=["q_proj", "v_proj"]),
    "embedding": lambda: with_adapter(tiny_llama(), target_modules=["embed_tokens", "lm_head"]),
    "tied": lambda: with_adapter(tiny_llama(tie_word_embeddings=True), target_modules=["lm_head", "down_proj"]),
    "experts": lambda: with_adapter(tiny_mixtral(), target_modules=[], target_parameters=PARAMETERS),
}
# the first in a block that DeepSpeed knows, the second not
EXPERTS = {
    "mixtral": MODELS["experts"],
    "gpt_oss": lambda: with_adapter(tiny_gpt_oss(), target_modules=[], target_parameters=PARAMETERS),
}
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
}


def micro_batches() -> list[list[dict]]:
    return [[token_batch(seed=PER_STEP * step + n) for n in range(PER_STEP)] for step in range(STEPS)]


def parts_of(name: str) -> tuple:
    """A model, its values by layer, and an optimizer whose steps are as large as the gradients."""
    model = MODELS[name]().train()
    values = {layer: each.spft_values["default"] for layer, each in adapted_layers(model).items()}
    return model, values, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def trained_alone(name: str) -> dict[str, torch.Tensor]:
    """What the steps have changed each layer's values by."""
    model, values, optimizer = parts_of(name)
    start = {layer: each.detach().clone() for layer, each in values.items()}
    for batches in micro_batches():
        for batch in batches:
            (model(**batch).loss / PER_STEP).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {layer: each.detach() - start[layer] for layer, each in values.items()}


def trained_by_zero3(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    import deepspeed

    model, values, optimizer = parts_of(name)
    start = {layer: each.detach().clone() for layer, each in values.items()}
    gather_what_layers_read(model)
    config = {**CONFIG, "gradient_accumulation_steps": PER_STEP // world}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for batches in micro_batches():
        for batch in batches[rank::world]:
            engine.backward(engine(**batch).loss)
            engine.step()
    changed = {}
    for layer, each in values.items():
        with deepspeed.zero.GatheredParameters([each]):
            changed[layer] = each.detach() - start[layer]
    return changed


def dense_gradients(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """This rank's rows of the sums that a dynamic mask makes of experts by running them again, of two batches."""
    model = EXPERTS[name]().train()
    layers, batches = adapted_layers(model), [token_batch(seed=seed) for seed in range(2)]
    collector, run = Collector(model.base_model.model, layers, "default"), model
    if world > 1:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        # asked by PEFT before it gathers; transformers would partition a model that is made from now on
        held = HfDeepSpeedConfig(CONFIG)
        assert held.is_zero3()
        gather_what_layers_read(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        run, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    else:
        model.enable_input_require_grads()
    collector.start()
    for batch in batches[rank::world]:
        loss = run(**batch).loss
        run.backward(loss) if world > 1 else loss.backward()
    collector.stop()
    return {name: collector.take_gradient(name, Ranks(rank, world)) for name in layers}


def lost_writes() -> int:
    """How often a module's first parameter has lost what one rank wrote into all of them, as when a model loads."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        module = torch.nn.Linear(1500, 1200)
    lost = 0
    for turn in range(1, 31):
        with torch.no_grad(), deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                for parameter in module.parameters():
                    parameter.fill_(turn)
        with deepspeed.zero.GatheredParameters([module.weight]):
            lost += int((module.weight != turn).any())
    return lost


def everything() -> tuple[dict, dict, int]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # before deepspeed is imported: it would look for an accelerator
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed

    deepspeed.init_distributed("gloo")
    gather_one_by_one()
    trained = {name: trained_by_zero3(name, rank, world) for name in MODELS}
    return trained, {name: dense_gradients(name, rank, world) for name in EXPERTS}, lost_writes()


@pytest.fixture(scope="module")
def by_rank() -> list[tuple]:
    return on_ranks(2, everything)


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_train_as_one_process(by_rank, name):
    if name == "tied" and not ties_in_zero3():
        pytest.skip("refused with this release of DeepSpeed, as tests/engine/test_engines.py has it")
    expected = trained_alone(name)
    for changed in (found[name] for found, *_ in by_rank):
        assert changed.keys() == expected.keys()
        for layer, want in expected.items():
            assert (changed[layer] - want).norm() <= 1e-4 * want.norm(), layer


def test_tied_modules_are_refused_where_deepspeed_takes_another_gradient(monkeypatch):
    model = MODELS["tied"]()
    monkeypatch.setattr(prepare, "version", lambda _: "0.18.9")
    prepare._check_tied(model)
    monkeypatch.setattr(prepare, "version", lambda _: "0.19.8")
    with pytest.raises(SpftError, match=r"is tied to another module, and DeepSpeed 0\.19\.8 .*deepspeed<0\.19"):
        prepare._check_tied(model)
    prepare._check_tied(MODELS["embedding"]())


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_run_again_find_their_weights(by_rank, name):
    expected = dense_gradients(name, 0, 1)
    for rank, (_, found, _) in enumerate(by_rank):
        for matrix, want in expected.items():
            rows = Ranks(rank, 2).rows(want.shape[0])
            assert (found[name][matrix] - want[rows]).norm() <= 1e-5 * want.norm(), matrix


def test_what_is_loaded_into_modules_of_several_parameters_stays(by_rank):
    assert [lost for *_, lost in by_rank] == [0, 0]
