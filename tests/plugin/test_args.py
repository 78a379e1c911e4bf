"""Rules of a whole Axolotl configuration."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from axolotl_spft import SpftArgs
from axolotl_spft.config import option_names
from axolotl_spft.metrics import METRICS
from axolotl_spft.plugin.args import check_run
from tests.salience.metrics.cases import BASES, ENGINES, REFUSED

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
OWN = "tests.salience.metrics.own"
GOOD = {"adapter": "spft", "optimizer": "sparse_adamw", "output_dir": "out"}


@pytest.mark.parametrize(
    "options",
    [
        None, {}, {"density": 0.01}, {"num_values": 10, "target_modules": ["q_proj"]},
        {"reselect": {"every": 200, "fraction": 0.2, "until": 0.75}}, {"reselect": {"every": 1, "drop": "value"}},
    ],
)  # fmt: skip
def test_good_configurations_pass(options):
    assert check_run({**GOOD, "spft": options}) == []
    assert SpftArgs(**GOOD, spft=options).spft == options


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"adapter": "lora", "spft": {}}, ["the block `spft` needs `adapter: spft`", "sparse_adamw` needs"]),
        ({"spft": 3}, ["`spft: 3` must be a block of keys"]),
        ({"spft": {"density": 3}}, ["`density: 3` must be a number in (0, 1]"]),
        (
            {"spft": {"re_select": {}}},
            ["unknown key `re_select` (did you mean `reselect`?)", ", ".join(option_names())],
        ),
        ({"spft": {"reselect": 200}}, ["`reselect: 200` must be a block of keys such as {every: 200"]),
        (
            {"spft": {"reselect": {"fractoin": 0.2, "until": 2, "collect": 0, "drop": "all"}}},
            [
                "`reselect` has the unknown key `fractoin` (did you mean `fraction`?)",
                "`reselect` needs `every`",
                "`reselect.until: 2` must be a number in [0, 1]",
                "`reselect.collect: 0` must be a whole number",
                "`reselect.drop: all` must be value or value_gradient",
            ],
        ),
        ({"spft": {"reselect": {"every": 9}, "salience": "magnitude"}}, ["`salience: magnitude` is not made of these"]),
        (
            {"spft": {"reselect": {"every": 9}, "salience": f"{OWN}:by_inputs"}},
            [f"`salience: {OWN}:by_inputs` needs input_squares, weight: use one made of the gradient"],
        ),
        (
            {"quantize_moe_experts": True, "lora_target_parameters": ["experts.down_proj"], "load_in_4bit": True},
            ["Axolotl quantizes experts for its LoRA adapters only", "set `spft.target_parameters`"],
        ),
        (
            {"spft": {"salience": "fisher", "target_parameters": ["a.b"]}},
            ["tell whose tokens they are (a.b)"],
        ),
        (
            {"spft": {"target_parameters": ["a.b"]}, "use_scattermoe": True, "experts_implementation": "scattermoe"},
            ["`use_scattermoe: True` computes the experts", "`experts_implementation: scattermoe` computes"],
        ),
        ({"spft": {"reselect": {"every": 9}, "pattern": "block"}}, ["tear the blocks of `pattern: block`"]),
        (
            {"spft": {"reselect": {"every": 9, "collect": 3}}, "micro_batch_size": 2, "batch_size": 4},
            ["`reselect.collect: 3` is more than the 2 micro-batches", "`gradient_accumulation_steps`"],
        ),
        (
            {"spft": {"reselect": {"every": 9}}, "torch_compile": True},
            ["`reselect` reads gradients", "`torch_compile` out"],
        ),
        (
            {"spft": {"reselect": {"every": 9}}, "optimizer": "adafactor"},
            ["which `adafactor` has not: use sparse_adamw"],
        ),
        (
            {"spft": {"reselect": {"every": 9}}, "deepspeed": {"zero_optimization": {"stage": 0}}},
            ["`reselect` does not know DeepSpeed's optimizer at stage 0"],
        ),
        (
            {"optimizer": "sparse_adam"},
            ["`optimizer: sparse_adam` must be sparse_adamw or sparse_adamw_8bit or a"],
        ),
        ({"lora_r": 8, "peft_use_dora": True}, ["`lora_r: 8` has no meaning", "set `spft.match_lora_rank`", "dora"]),
        ({"load_in_4bit": True, "load_in_8bit": True}, ["exclude each other"]),
        ({"merge_method": "memory_efficient"}, ["write `merge_method: legacy`"]),
        ({"inference": True}, ["add `lora_model_dir: out`"]),
        ({"deepspeed": "no_such.json"}, ["`deepspeed: no_such.json` cannot be read", "integration/deepspeed"]),
        ({"fsdp_config": {"a": 1}, "fsdp_version": 2}, ["`fsdp_version: 2`: leave it out", "ZeRO-3 instead"]),
        ({"fsdp_version": 1}, ["`fsdp_version: 1`: leave it out"]),
        ({"tensor_parallel_size": 2}, ["`tensor_parallel_size: 2`: leave it out", "data-parallel only"]),
        ({"dp_shard_size": 2}, ["`dp_shard_size: 2`: leave it out"]),
        ({"sequence_parallel_degree": 2}, ["`sequence_parallel_degree: 2`: leave it out"]),
        ({"save_only_model": True, "auto_resume_from_checkpoints": True}, ["cannot be resumed", "`lora_model_dir`"]),
        ({"lora_dropout": 0.1}, ["`lora_dropout: 0.1` has no meaning"]),
        ({"lora_modules_to_save": ["lm_head"]}, ["differs from `spft.modules_to_save: None`", "leave it out, and set"]),
        (
            {"lora_modules_to_save": ["lm_head"], "spft": {"modules_to_save": ["embed_tokens"]}},
            ["`lora_modules_to_save: ['lm_head']` differs from `spft.modules_to_save: ['embed_tokens']`"],
        ),
        ({"optimizer": "muon"}, ["`optimizer: muon` trains matrices only", "sparse_adamw"]),
        ({"optim_args": {"eps": 0.5}}, ["`optim_args: {'eps': 0.5}` is not read by", "`adam_epsilon`"]),
        ({"optim_args": "eps=0.5", "optimizer": "sparse_adamw_8bit"}, ["`optimizer: sparse_adamw_8bit`"]),
        ({"spft": {"target_modules": "(q"}}, ["`target_modules: (q` is not a regular expression"]),
        ({"spft": {"init_weights": False}}, ["`init_weights: False` would train random values", "`salience: random`"]),
        ({"spft": {"mask_path": "~"}}, ["`mask_path: ~` must be the path of a file"]),
        ({"spft": {"mask_path": "."}}, ["`mask_path: .` must be the path of a file"]),
        ({"deepspeed": 3}, ["`deepspeed: 3` must be the path of a JSON file"]),
        ({"deepspeed": {"zero_optimization": True}}, ['"zero_optimization": True must be a block']),
        ({"deepspeed": {"zero_optimization": {"stage": 3}, "bf16": True}}, ['"bf16": True must be a block']),
        ({"deepspeed": {"zero_optimization": {"stage": "auto"}}}, ['"stage": auto must be 0, 1, 2 or 3']),
        ({"deepspeed": {"bf16": {"enabled": True}}, "bf16": False}, ['"bf16" is enabled, but the run computes in']),
        ({"spft": {"relative_step": 1}}, ["`relative_step: 1` must be true or false"]),
        (
            {"spft": {"relative_step": True}, "deepspeed": {"scheduler": {"type": "WarmupLR"}}},
            ['"scheduler" block has an absolute rate', "set `lr_scheduler`"],
        ),
        ({"deepspeed": {"optimizer": {"type": "AdamW"}}}, ['"optimizer" block would replace', "remove the block"]),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
            ['add "zero_force_ds_cpu_optimizer": false'],
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}},
            ['"offload_optimizer" to nvme is not supported'],
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 1, "round_robin_gradients": True}}}, ["round_robin"]),
        ({"deepspeed": ZERO3, "bf16": True}, ['write "bf16": {"enabled": true}']),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, ["stage3_gather_16bit_weights_on_model_save"]),
        ({"deepspeed": ZERO3, "load_in_8bit": True}, ["write `load_in_4bit: true`, or use ZeRO-2"]),
        (
            {"deepspeed": ZERO3, "load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_storage": "uint8"}},
            ["differs from the run's"],
        ),
        ({"deepspeed": ZERO3, "gradient_checkpointing": True, "rl": "orpo"}, ["{use_reentrant: true}"]),
        ({"unfrozen_parameters": ["lm_head"]}, ["set `spft.modules_to_save`"]),
        (
            {"spft": {"salience": "no_such.module:score"}},
            ["cannot be imported (ModuleNotFoundError", "or one of "],
        ),
        ({"spft": {"salience": f"{OWN}:missing"}}, [f"`salience: {OWN}:missing` cannot be imported (AttributeError"]),
        ({"spft": {"salience": f"{OWN}:not_callable"}}, [f"`salience: {OWN}:not_callable` is no function"]),
        ({"spft": {"salience": f"{OWN}:unknown_need"}}, ["needs momentum, which the pass does not know"]),
        (
            {"spft": {"score_after": 5}, "deepspeed": ZERO3, "bf16": False},
            ["`score_after: 5` trains before DeepSpeed's engine exists", "use ZeRO-1, ZeRO-2 or DDP"],
        ),
        ({"spft": {"score_after": 5, "salience": "grasp"}}, ["`score_after: 5` has no meaning with `salience: grasp`"]),
        ({"spft": {"score_after": 5, "salience": "synflow"}}, ["has no meaning with `salience: synflow`"]),
        (
            {"spft": {"salience_memory_gib": 2, "salience": "grasp"}},
            ["`salience_memory_gib: 2` cannot be kept with `salience: grasp`"],
        ),
        ({"spft": {"salience_memory_gib": 2, "salience": "synflow"}}, ["with `salience: synflow`", "leave it out"]),
        ({"spft": {"salience": "snip"}, "gptq": True}, ["`salience: snip` reads the weights", "quantized by GPTQ"]),
    ],
)
def test_problems_name_the_key_and_the_remedy(changes, parts):
    text = "; ".join(check_run({**GOOD, **changes}))
    assert all(part in text for part in parts), text
    with pytest.raises(ValidationError) as caught:
        SpftArgs(**{**GOOD, **changes})
    assert all(problem in str(caught.value) for problem in check_run({**GOOD, **changes}))


@pytest.mark.parametrize("salience", ["magnitude", "grasp", f"{OWN}:by_inputs"])
def test_a_base_whose_weights_cannot_be_read_is_found_in_its_folder(tmp_path, salience):
    cfg = {**GOOD, "base_model": str(tmp_path), "spft": {"salience": salience}}
    for kind, count in (("awq", 1), ("bitsandbytes", 0)):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": kind}}))
        problems = check_run(cfg)
        assert len(problems) == count and all("a base quantized by AWQ cannot be read" in each for each in problems)
        # what reads gradients alone works on any
        assert check_run({**cfg, "spft": {"salience": "balanced"}}) == []


def test_what_is_trained_is_the_reference_too():
    biases = {**GOOD, "rl": "dpo", "spft": {"bias": "all"}}
    (problem,) = check_run(biases)
    assert "`bias: all` trains the base model's own biases, and `rl: dpo` compares with that base" in problem
    for passes in ({"rl": "orpo"}, {"precompute_ref_log_probs": True}, {"spft": {}}):
        assert check_run({**biases, **passes}) == []


def test_a_run_with_a_mask_already_needs_no_salience(tmp_path):
    (tmp_path / "mask.safetensors").touch()
    options = {"salience": "no_such.module:score", "mask_path": str(tmp_path / "mask.safetensors")}
    assert check_run({**GOOD, "spft": options}) == []
    assert check_run({**GOOD, "spft": {"salience": "no_such.module:score"}, "lora_model_dir": "out"}) == []
    assert len(check_run({**GOOD, "spft": {**options, "mask_path": str(tmp_path / "another")}})) == 1


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_of_the_metrics_says_what_is_refused(base, engine):
    cfg = {**GOOD, "bf16": False}
    if base != "float":
        cfg[f"load_in_{base}"] = True
    if engine.startswith("ZeRO"):
        cfg["deepspeed"] = {"zero_optimization": {**ZERO3["zero_optimization"], "stage": int(engine[-1])}}
    refused = [metric for metric in METRICS if check_run({**cfg, "spft": {"salience": metric}})]
    assert refused == [metric for metric in METRICS if (metric, base, engine) in REFUSED]


def test_all_problems_come_together():
    problems = check_run({**GOOD, "spft": {"density": 3, "scope": "x", "zzz": 1}, "lora_r": 8, "fsdp": ["full_shard"]})
    assert len(problems) == 5


def test_other_adapters_are_left_alone():
    assert check_run({"adapter": "lora", "lora_r": 8, "optimizer": "adamw_torch", "deepspeed": "zero3.json"}) == []
    assert check_run({}) == []


@pytest.mark.parametrize(
    "keys",
    [
        {"peft_trainable_token_indices": [3, 4]},
        {"peft_ensure_weight_tying": True},
        {"peft_init_lora_weights": "pissa"},
        {"peft_layer_replication": [(0, 2)]},
        {"peft": {"loftq_config": {"loftq_bits": 4}}},
        {"lora_rank_pattern": {"q_proj": 4}},
        {"lora_alpha_pattern": {"q_proj": 4}},
        {"lora_embedding_kernel": True},
        {"lora_on_cpu": True},
        {"lora_fan_in_fan_out": True},
        {"loraplus_lr_embedding": 1e-3},
    ],
)
def test_axolotls_keys_for_lora_alone_are_refused(keys):
    from axolotl.utils.schemas.config import AxolotlInputConfig

    assert keys.keys() <= AxolotlInputConfig.model_fields.keys()
    (problem,) = check_run({**GOOD, **keys})
    assert "has no meaning with `adapter: spft`: leave it out" in problem


def test_loftq_is_referred_to_what_mends_quantization_here():
    (problem,) = check_run({**GOOD, "loftq": {"loftq_config": {"loftq_bits": 4}}})
    assert "has no meaning with `adapter: spft`: set `spft.repair`" in problem


def test_what_axolotl_sets_itself_passes():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    rate = AxolotlInputConfig.model_fields["loraplus_lr_embedding"].default
    assert rate and check_run({**GOOD, "loraplus_lr_embedding": rate}) == []


def test_keys_that_another_optimizer_or_verb_reads_pass():
    assert check_run({**GOOD, "optimizer": "adamw_torch", "optim_args": {"eps": 0.5}}) == []
    # `axolotl merge-lora` reads the configuration like this
    assert check_run({**GOOD, "rl": "dpo", "lora_model_dir": "out"}) == []


def test_engines_that_accelerate_switches_on_are_refused_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "the key `deepspeed` is not set" in check_run(GOOD)[0]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "asks for FSDP" in check_run({**GOOD, "deepspeed": ZERO3, "bf16": False, "fp16": False})[0]
