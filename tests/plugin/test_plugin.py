"""The hooks of the plugin, on models without a run."""

from __future__ import annotations

import pytest
from axolotl.utils.dict import DictDefault
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from axolotl_spft import SpftConfig, SpftPlugin, select_mask
from axolotl_spft.errors import SpftConfigError, SpftError
from axolotl_spft.plugin.args import check_run
from axolotl_spft.salience.install import adapted_layers
from tests.hub import fill_cache
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama, with_adapter


def config(**changes) -> DictDefault:
    return DictDefault({"adapter": "spft", "output_dir": "out", **changes})


def test_modules_to_save_go_where_axolotl_looks_for_them():
    cfg = config(spft={"modules_to_save": ["embed_tokens", "lm_head"]}, tokens=["<new>"])
    for _ in range(2):  # some commands read their configuration twice
        SpftPlugin().register(cfg)
        assert cfg["lora_modules_to_save"] == ["embed_tokens", "lm_head"]
        assert check_run(cfg) == []


@pytest.mark.parametrize("options", [None, 3, {}, {"modules_to_save": "lm_head"}])
def test_no_modules_to_save_go_nowhere(options):
    cfg = config(spft=options)
    SpftPlugin().register(cfg)
    assert "lora_modules_to_save" not in cfg


@pytest.mark.parametrize("config_only", [False, True])
def test_names_that_match_nothing_are_refused(config_only):
    with pytest.raises(SpftConfigError, match="`target_modules: v_prj` matches no module"):
        SpftPlugin().load_adapter(
            tiny_llama(), config(spft={"target_modules": ["q_proj", "v_prj"]}), config_only=config_only
        )


def test_an_adapter_of_another_kind_is_refused_before_the_model_loads(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(SpftError, match="an adapter of the kind LORA"):
        SpftPlugin().pre_model_load(config(lora_model_dir=str(tmp_path)))
    SpftPlugin().pre_model_load(config(adapter="lora", lora_model_dir=str(tmp_path)))


@pytest.mark.parametrize("given", [{}, {"merge_method": None}, {"merge_method": "legacy"}])
def test_the_merge_is_the_one_that_is_not_for_lora_alone(given):
    cfg = config(**given)
    SpftPlugin().register(cfg)
    assert cfg["merge_method"] == "legacy"


@pytest.mark.parametrize(
    ("tokens", "passes"),
    [
        ({"tokens": ["<new>"]}, True),
        ({"special_tokens": {"eos_token": "<end>"}}, True),
        ({"special_tokens": {"pad_token": "<pad>"}}, False),
        ({}, False),
    ],
)
def test_embeddings_of_another_name_where_tokens_are_added(tokens, passes):
    cfg = config(spft={"modules_to_save": ["wte", "lm_head", "embed_tokens"]}, model_config_type="gpt2", **tokens)
    if not passes:
        with pytest.raises(SpftConfigError, match="`modules_to_save: embed_tokens` matches no module"):
            SpftPlugin().load_adapter(tiny_gpt2(), cfg)
        return
    model, _ = SpftPlugin().load_adapter(tiny_gpt2(), cfg)
    assert any("wte.modules_to_save" in name for name, each in model.named_parameters() if each.requires_grad)


def test_a_mask_path_is_checked_before_the_model_loads(tmp_path):
    (tmp_path / "text").write_text("no mask")
    for path, reason in (("text", "not a complete safetensors file"), ("text/mask", "nothing can be written to")):
        with pytest.raises(SpftError, match=rf"`mask_path: .*{path}`: .*{reason}"):
            SpftPlugin().pre_model_load(config(spft={"mask_path": str(tmp_path / path)}))
    SpftPlugin().pre_model_load(config(spft={"mask_path": str(tmp_path / "new" / "mask")}))


def test_options_that_a_saved_adapter_does_not_have_are_named(tmp_path, caplog):
    made = {"density": 0.05, "salience": "magnitude"}
    model = get_peft_model(tiny_llama(), SpftConfig(**made))
    select_mask(model, None)
    model.save_pretrained(tmp_path)

    def warnings_of(**options):
        caplog.clear()
        with caplog.at_level("WARNING"):
            SpftPlugin().load_adapter(tiny_llama(), config(spft=options, lora_model_dir=str(tmp_path)))
        return [record.getMessage() for record in caplog.records if "axolotl_spft" in record.name]

    assert warnings_of(**made) == warnings_of() == []
    (text,) = warnings_of(**(made | {"density": 0.2}))
    assert text == "`spft.density: 0.2` is not read beside `lora_model_dir`, whose adapter has 0.05"


def test_the_branch_of_the_base_is_recorded_where_peft_has_it():
    for revision, config_only in (("v2", False), ("v2", True), (None, False)):
        cfg = config(spft={"density": 0.05}, revision_of_model=revision)
        assert SpftPlugin().load_adapter(tiny_llama(), cfg, config_only=config_only)[1].revision == revision


def test_a_commit_of_another_repository_than_the_weights_is_not_recorded():
    for base_model_config, commit in ((None, "a" * 40), ("of/us", "a" * 40), ("of/others", None)):
        model = tiny_llama()
        model.config._commit_hash = "a" * 40
        SpftPlugin().post_model_build(config(base_model="of/us", base_model_config=base_model_config), model)
        assert model.config._commit_hash == commit


def test_a_run_that_goes_on_has_the_commit_of_its_own_base(tmp_path, monkeypatch, caplog):
    tiny_llama().save_pretrained(tmp_path / "base")
    commits = fill_cache(tmp_path / "hub", "of/us", dict.fromkeys(("main", "v2"), tmp_path / "base"), monkeypatch)
    base = AutoModelForCausalLM.from_pretrained("of/us", revision="v2")
    with_adapter(base, revision="v2", density=0.05).save_pretrained(tmp_path / "run")
    for branch, base_model, told in (("main", "of/us", True), ("v2", "of/us", False), ("main", "other", False)):
        base = AutoModelForCausalLM.from_pretrained("of/us", revision=branch)
        caplog.clear()
        cfg = config(lora_model_dir=str(tmp_path / "run"), base_model=base_model, revision_of_model=branch)
        with caplog.at_level("WARNING"):
            model, _ = SpftPlugin().load_adapter(base, cfg)
        said = f"was trained on the commit {commits['v2']} of of/us, and this is {commits['main']}"
        assert (said in caplog.text) == told
        assert model.peft_config["default"].revision == (branch if base_model == "of/us" else "v2")


@pytest.mark.parametrize("kind", [LlamaForTokenClassification, LlamaForSequenceClassification])
@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens"]])
def test_the_head_of_a_classifier_is_trained_whole(kind, modules_to_save):
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = kind(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    model, _ = SpftPlugin().load_adapter(base, config(spft={"modules_to_save": modules_to_save}))
    assert len(adapted_layers(model)) == 7
    whole = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "spft" not in name]
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in whole} == {"score", *(modules_to_save or [])}
