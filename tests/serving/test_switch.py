"""Adapters applied to plain modules, fused and divided ones too: the bits of PEFT's merge, and back to those before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from axolotl_spft.checkpoint.adapter import read_adapter, write_adapter
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.serving import Switch, apply_adapter
from axolotl_spft.serving.places import FUSED
from axolotl_spft.tuner.state import shapes_of
from integration.serving.vllm_worker import SpftWorker
from tests.models import logits, same_weights, tiny_llama, tiny_qwen2, weights_of, with_adapter

PARTS = {part for parts in FUSED.values() for part in parts}
BY_COLUMNS = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved adapters of `tiny_llama`: of all linear layers, and of some."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {"all": {}, "other": {"density": 0.3}, "some": {"target_modules": ["k_proj", "up_proj", "o_proj"]}}
    for seed, (name, options) in enumerate(made.items()):
        model = with_adapter(tiny_llama(torch.bfloat16), seed, **options)
        model.save_pretrained(folder / name)
        # with the shapes of the base's matrices
        write_adapter(folder / "served" / name, read_adapter(folder / name, shapes_of(adapted_layers(model))))
    return folder


def merged(folder, dtype=torch.bfloat16) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny_llama(dtype), folder).merge_and_unload()


class Served(nn.Module):
    """A layer of an engine: its weight, and what vLLM's tell of a fused one."""

    def __init__(self, weight: torch.Tensor, sizes: list[int] | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if sizes is not None:
            self.output_partition_sizes = sizes


def part_of_rank(name: str, weight: torch.Tensor, rank: int, ranks: int, heads: int = 2, head_dim: int = 18):
    """What vLLM gives a rank: columns of o and down, rows of others; key and value heads at least one."""
    if name in BY_COLUMNS:
        return weight.chunk(ranks, 1)[rank]
    if name in ("k_proj", "v_proj"):
        total = weight.shape[0] // head_dim
        held = max(1, total // ranks)
        first = rank * total // ranks
        return weight[first * head_dim : (first + held) * head_dim]
    return weight.chunk(ranks, 0)[rank]


def engine_model(model: nn.Module, rank: int = 0, ranks: int = 1, tells_sizes: bool = True) -> nn.Module:
    """The model as vLLM holds it, with its names: fused qkv_proj and gate_up_proj, each rank's part."""
    root = nn.Module()
    linear = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    for name in linear:
        parent, _, last = name.rpartition(".")
        fused = next((fused for fused, parts in FUSED.items() if last in parts), None)
        if fused and last != FUSED[fused][0]:
            continue
        names = [f"{parent}.{part}" for part in FUSED[fused]] if fused else [name]
        parts = [part_of_rank(each.rpartition(".")[2], linear[each].weight.data, rank, ranks) for each in names]
        owner = root
        for step in parent.split("."):
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner._modules[step]
        sizes = [len(part) for part in parts] if fused and tells_sizes else None
        owner.add_module(fused or last, Served(torch.cat(parts), sizes))
    return root


@pytest.mark.parametrize("name", ["all", "some"])
def test_a_plain_model_gets_the_merged_weights_and_its_own_back(folders, name):
    model = tiny_llama(torch.bfloat16)
    before = weights_of(model)
    applied = apply_adapter(model, folders / name)
    assert same_weights(model, weights_of(merged(folders / name)))
    assert not same_weights(model, before)
    applied.revert()
    assert same_weights(model, before)
    with pytest.raises(SpftError, match="not the last one that was applied"):
        applied.revert()


@pytest.mark.parametrize("tells_sizes", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["all", "some"])
def test_fused_projections_and_shards(folders, name, ranks, tells_sizes):
    if name == "some" and ranks == 2 and not tells_sizes:
        with pytest.raises(SpftError, match=r"qkv_proj has 54 rows, which the adapter's shapes .* do not explain"):
            apply_adapter(engine_model(tiny_llama(torch.bfloat16), 0, 2, False), folders / "served" / name, 0, 2)
        return
    for rank in range(ranks):
        model = engine_model(tiny_llama(torch.bfloat16), rank, ranks, tells_sizes)
        before = weights_of(model)
        applied = apply_adapter(model, read_adapter(folders / "served" / name), rank, ranks)
        assert same_weights(model, weights_of(engine_model(merged(folders / name), rank, ranks)))
        applied.revert()
        assert same_weights(model, before)


def test_a_switch_on_the_worker_of_an_engine(folders):
    worker = SpftWorker()
    worker.model_runner = SimpleNamespace(model=engine_model(tiny_llama(torch.bfloat16), 1, 2))
    worker.rank, worker.parallel_config = 3, SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1)
    model = worker.model_runner.model
    before, places = weights_of(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    worker.load_spft("all", str(folders / "served" / "all"))
    worker.load_spft("other", str(folders / "served" / "other"))
    assert same_weights(model, before)
    for name in ("all", "other", "other", "all"):
        worker.use_spft(name)
        assert same_weights(model, weights_of(engine_model(merged(folders / name), 1, 2)))
    with pytest.raises(SpftError, match=r"no adapter `third`: load\(\) it; there are all, other"):
        worker.use_spft("third")
    with pytest.raises(SpftError, match="adapter `all` is applied"):
        worker.load_spft("all", str(folders / "served" / "other"))
    worker.use_spft(None)
    assert same_weights(model, before)
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_weights_made_in_inference_mode_and_stages_of_a_pipeline(folders):
    with torch.inference_mode():
        model = tiny_llama(torch.bfloat16)
        before = logits(model)
    model.model.layers = model.model.layers[:1]
    with pytest.raises(SpftError, match=r"the model has no model\.layers\.1\..*and 2 more"):
        apply_adapter(model, folders / "all")
    before = logits(model)
    switch = Switch(model, partial=True)
    switch.load("all", folders / "all")
    switch.use("all")
    assert not torch.equal(logits(model), before)
    switch.use(None)
    assert torch.equal(logits(model), before)


def test_names_with_another_prefix_and_modules_that_were_trained_whole(folders, tmp_path):
    whole = with_adapter(tiny_llama(), modules_to_save=["lm_head"])
    with torch.no_grad():
        whole.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    whole.save_pretrained(tmp_path / "whole")
    model = tiny_llama()
    before = weights_of(model)
    applied = apply_adapter(model, tmp_path / "whole")
    assert torch.equal(logits(model), logits(whole.merge_and_unload()))
    applied.revert()
    assert same_weights(model, before)
    outer = nn.Module()
    outer.language_model = tiny_llama(torch.bfloat16)
    apply_adapter(outer, folders / "all")
    assert same_weights(outer.language_model, weights_of(merged(folders / "all")))


def test_what_does_not_fit_changes_nothing(folders, tmp_path):
    other = tiny_qwen2()
    before = weights_of(other)
    with pytest.raises(SpftError, match=r"has a weight of \(28.* on rank 0 of 1, but the adapter was trained on"):
        apply_adapter(other, folders / "all")
    assert same_weights(other, before)
    packed = engine_model(tiny_llama())
    last = packed.model._modules["layers"]._modules["1"].mlp.down_proj
    last.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    before = weights_of(packed)
    with pytest.raises(SpftError, match=r"down_proj has no weight of 16 bits or more.*unquantized"):
        apply_adapter(packed, folders / "all")
    assert same_weights(packed, before)
    with pytest.raises(SpftFileError, match="name the folder of a saved sparse adapter"):
        apply_adapter(packed, tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_embeddings_that_grew_under_a_delta_are_those_of_the_training(tmp_path, ranks):
    def resized(seed: int) -> nn.Module:
        model = tiny_llama(tie_word_embeddings=False)
        torch.manual_seed(seed)
        model.resize_token_embeddings(72, mean_resizing=False)
        return model.eval()

    # the new rows are drawn
    trained = with_adapter(resized(1), target_modules=["q_proj", "embed_tokens", "lm_head"])
    trained.save_pretrained(tmp_path, save_embedding_layers=True)
    saved = read_adapter(tmp_path, shapes_of(adapted_layers(trained)))
    expected, model = trained.merge_and_unload(), resized(2)
    for rank in range(ranks):
        part = nn.Module()
        part.lm_head = Served(model.lm_head.weight.data.chunk(ranks)[rank])
        before = weights_of(part)
        applied = apply_adapter(part, saved, rank, ranks, partial=True)
        assert torch.equal(part.lm_head.weight, expected.lm_head.weight.chunk(ranks)[rank])
        applied.revert()
        assert same_weights(part, before)
    apply_adapter(model, saved)
    assert torch.equal(logits(model), logits(expected))
