"""What is planned against what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Llama4TextConfig,
    LlamaConfig,
    Qwen2Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from axolotl_spft import DynamicMask, SpftConfig, select_mask
from axolotl_spft.bench.kept import kept_for_backward
from axolotl_spft.errors import SpftError
from axolotl_spft.planning.activations import activations
from axolotl_spft.planning.advice import alternatives, changes_that_help
from axolotl_spft.planning.estimate import GIB, base_bytes, estimate
from axolotl_spft.planning.model import model_class
from axolotl_spft.planning.settings import Settings
from axolotl_spft.planning.shapes import ModelShape, find_config, read_shape
from axolotl_spft.salience.install import adapted_layers
from tests.experts import PARAMETERS, tiny_mixtral

RESULTS = Path(__file__).parents[2] / "integration" / "bench" / "results"
BASE = Settings(
    base_model="base", options={}, bits=16, dtype_bytes=2, value_bytes=4, engine="single", gpus=1, rows=1,
    sequence_len=4096, accumulates=False, checkpointing=False, fused_loss=False, eager=False, state_bits=32, buckets=0,
    prefetched=0, reused=0,
    offload_optimizer=False, offload_base=False,
)  # fmt: skip
SHAPES: dict[str, ModelShape] = {}


def shape_of(name: str) -> ModelShape:
    if name not in SHAPES:
        SHAPES[name] = read_shape(find_config(name, name)[0], {})
    return SHAPES[name]


def recorded(name: str) -> tuple[ModelShape, Settings, dict]:
    """The shape and settings of a recorded benchmark, and its row of the sparse adapter."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    options, row = record["options"], next(row for row in record["rows"] if row["method"] == "spft-gradient")
    run = BASE._replace(
        options={"num_values": row["trained"]},
        bits=4 if options["quantization"] == "4bit" else 16,
        dtype_bytes={"bf16": 2, "fp32": 4}[options["dtype"]],
        sequence_len=options["tokens"],
        checkpointing=options["gradient_checkpointing"],
    )
    return shape_of(options["model"]), run, row


def test_a_repaired_base_keeps_two_bytes_more_for_each_value():
    shape, run, _ = recorded("gpu-8b-4bit")
    plain, repaired = (estimate(shape, run._replace(options={**run.options, **each}), 140 * GIB)
                       for each in ({}, {"repair": 0.2}))  # fmt: skip
    assert repaired.indices - plain.indices == repaired.file - plain.file == 2 * plain.values
    assert estimate(shape, run._replace(bits=16, options={**run.options, "repair": 0.2}), 140 * GIB).file == plain.file


@pytest.mark.parametrize("name", ["gpu-8b-bf16", "gpu-8b-4bit", "gpu-70b-4bit"])
def test_the_peak_is_within_a_tenth_of_the_recorded_one(name):
    shape, run, row = recorded(name)
    found = estimate(shape, run, 140 * GIB)
    assert found.values == row["trained"]
    assert found.peak == pytest.approx(row["peak_bytes"], rel=0.1)
    parts = row["footprint_bytes"]
    assert found.trained == parts["values"]
    assert found.gradients == parts["gradients"]
    assert found.optimizer == pytest.approx(parts["optimizer_state"], rel=1e-3)
    assert found.indices == pytest.approx(parts["masks"] + parts["originals"], rel=1e-3)
    if row["file_bytes"]:
        assert found.file == pytest.approx(row["file_bytes"], rel=1e-3)


def test_models_that_see_are_of_the_class_that_axolotl_loads():
    """Of all kinds in its table, whose other names no configuration has."""
    from axolotl.loaders.constants import MULTIMODAL_AUTO_MODEL_MAPPING

    for name in set(MULTIMODAL_AUTO_MODEL_MAPPING) & set(CONFIG_MAPPING_NAMES):
        found, expected = model_class(SimpleNamespace(model_type=name)), MULTIMODAL_AUTO_MODEL_MAPPING[name]
        assert found is (AutoModelForImageTextToText if isinstance(expected, str) else expected), name
    assert model_class(LlamaConfig()) is None


def test_a_model_whose_layers_differ_is_planned_by_the_widest():
    config = getattr(transformers, "Gemma4TextConfig", None)
    if config is None:
        pytest.skip("a later transformers has models whose layers differ in size")
    shape = read_shape(config(num_hidden_layers=6, vocab_size=512, vocab_size_per_layer_input=512), {})
    assert (shape.head_dim, len(shape.targets) > 6 * 7) == (512, True)


def test_a_target_that_cannot_be_adapted_is_one_sentence_and_its_remedy_helps():
    config = Llama4TextConfig(num_hidden_layers=2, vocab_size=512, hidden_size=64, intermediate_size=64)
    with pytest.raises(SpftError, match=r"router` is a Llama4Router, which is not supported.*exclude_modules"):
        read_shape(config, {})
    assert read_shape(config, {"exclude_modules": ["router"]}).targets


KEPT = ["gpu-8b-bf16", "gpu-70b-4bit", "cpu-amx-methods", "cpu-fp32-methods", "cpu-fp32-4bit"]


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_for_backward_is_within_a_tenth_of_the_recorded_bytes(name):
    """On a CPU the peak is the process' resident size, in which these bytes are a few percent; they are the same."""
    shape, run, row = recorded(name)
    passed = activations(shape, run, row["trained"] / sum(rows * columns for rows, columns in shape.targets))
    assert passed.blocks + passed.head == pytest.approx(row["kept_bytes"], rel=0.1)


SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 512}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Gemma2Config])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_small_models_keep(kind, checkpointing):
    config = kind(**SIZES, **({"head_dim": 32} if kind is Gemma2Config else {}), use_cache=False)
    if not MODEL_FOR_CAUSAL_LM_MAPPING[kind]._supports_sdpa:
        pytest.skip("this release of transformers has no sdpa for it")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, SpftConfig(density=0.02, salience="magnitude"))
    select_mask(model, None)
    model.train()
    tokens = torch.arange(2 * 200).reshape(2, 200) % 96
    targets = sorted({name.rpartition(".")[2] for name in adapted_layers(model)})
    kept = kept_for_backward(model, {"input_ids": tokens, "labels": tokens}, targets)
    run = BASE._replace(rows=2, sequence_len=200, checkpointing=checkpointing, options={"salience": "magnitude"})
    shape = read_shape(config, {"density": 0.02})
    passed = activations(shape, run, 0.02)
    assert passed.blocks + passed.head == pytest.approx(kept.all, rel=0.1)
    frozen = sum(p.numel() * 2 for p in model.parameters() if not p.requires_grad)
    assert base_bytes(shape, run) == frozen


def test_each_engine_and_precision_needs_less_than_the_one_before():
    run = BASE._replace(engine="zero3", gpus=8, checkpointing=True, buckets=50_000_000)
    table = alternatives(shape_of("llama-70b"), run, 80 * GIB)
    assert list(table) == ["single", "ddp", "zero1", "zero2", "zero3"]
    for row in table.values():
        peaks = [each.peak for each in row.values() if each is not None]
        assert peaks == sorted(peaks, reverse=True)
    assert table["zero3"][8] is None
    for bits in (16, 4):
        peaks = [row[bits].peak for name, row in table.items() if name != "single"]
        assert peaks == sorted(peaks, reverse=True)
    # the announcement of such a run
    announced = estimate(shape_of("llama-70b"), run, 140 * GIB)
    assert announced.base / GIB == pytest.approx(16.4, abs=0.1)
    assert announced.salience / GIB == pytest.approx(32.8, abs=0.1)


def test_changes_lead_to_a_run_that_fits():
    run = BASE._replace(rows=4)
    changes = changes_that_help(shape_of("llama-8b"), run, 24 * GIB)
    assert changes[0].text == "gradient_checkpointing: true"
    needs = [change.estimate.needed for change in changes]
    assert needs == sorted(needs, reverse=True)
    assert needs[-2] > 24 * GIB >= needs[-1]
    assert changes_that_help(shape_of("llama-8b"), run, 200 * GIB) == []


def test_where_the_accumulators_go():
    shape = shape_of("llama-8b")
    # a quarter of one kind of matrix is trained, and of the others half a percent
    kind = sum(rows * columns for name, (rows, columns) in zip(shape.names, shape.targets) if "q_proj" in name)
    patterned = estimate(shape, BASE._replace(options={"density_pattern": {"q_proj": 0.25}}), 80 * GIB)
    assert patterned.values == round(0.25 * kind) + round(0.005 * (patterned.entries - kind))
    whole = 4 * sum(rows * columns for rows, columns in shape.targets)
    run = BASE._replace(bits=4, checkpointing=True)
    roomy, tight = (estimate(shape, run, gib * GIB) for gib in (80, 24))
    assert (roomy.salience > whole, roomy.salience_host) == (True, 0)
    assert (tight.salience < GIB, tight.salience_host) == (True, whole)
    shared = estimate(shape, run._replace(engine="ddp", gpus=8), 24 * GIB)
    assert (shared.salience < whole / 4, shared.salience_host) == (True, 0)
    # as much at a time as the key says, in passes; or what is needed at once, on the host
    for options, kept in (({}, 0), ({"scope": "global"}, whole), ({"pattern": "block"}, whole)):
        limited = estimate(shape, run._replace(options={"salience_memory_gib": 2, **options}), 80 * GIB)
        assert (limited.salience_host, limited.salience < 3 * GIB) == (kept, True)
    one, three = (
        estimate(shape, run._replace(options={"salience": name}), 999 * GIB) for name in ("gradient", "grasp")
    )
    assert three.salience - one.salience == 2 * whole
    ready = estimate(shape, run._replace(options={"salience": "magnitude"}), 80 * GIB)
    assert (ready.salience, ready.salience_host, ready.salience_peak) == (0, 0, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_re_selection_collects(tied):
    config = LlamaConfig(**SIZES, use_cache=False, tie_word_embeddings=tied)
    options = {"density": 0.05, "target_modules": ["embed_tokens", "lm_head", "q_proj", "k_proj", "down_proj"]}
    shape = read_shape(config, options)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), SpftConfig(**options, salience="magnitude"))
    select_mask(model, None)
    model.peft_config["default"].salience = "gradient"
    dynamic, tokens = DynamicMask(model), torch.arange(40).reshape(2, 20)
    for _ in range(2):
        with dynamic.collecting():
            model(input_ids=tokens, labels=tokens).loss.backward()
    pairs = [pair for pairs in dynamic.collector._pairs.values() for pair in pairs]
    kept = {id(x): x.kept for _, x, _ in pairs if x.kept.is_floating_point()}
    numbers = sum(map(torch.numel, kept.values())) + sum(dy.numel() for _, _, dy in pairs)
    assert numbers == 2 * 40 * shape.collected
    run = BASE._replace(rows=2, sequence_len=20, options={**options, "reselect": {"every": 9, "collect": 2}})
    found, static = (estimate(shape, each, GIB * 8) for each in (run, run._replace(options=options)))
    assert (found.collected, found.collected_host) == (2 * numbers, 0)
    assert found.peak >= static.peak + 2 * numbers
    tight = estimate(shape, run, static.peak + GIB + 1000)
    assert tight.collected == 500 and tight.collected + tight.collected_host == 2 * numbers
    assert (static.collected, static.collected_host) == (0, 0)


def test_what_a_re_selection_of_experts_collects():
    config = tiny_mixtral().config
    shape = read_shape(config, {"target_modules": ["q_proj"], "target_parameters": PARAMETERS})
    # q_proj of as many, and the module of the experts, in each of two layers
    assert shape.collected == 2 * (28 + 28 + 28 + 28)
