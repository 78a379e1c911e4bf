"""Matrices that nothing trains get no values, and the budget stays whole."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2DoubleHeadsModel,
)

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.budget import total_budget
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftConfigError, SpftError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.sample_pass import collect_statistics
from tests.models import VOCABULARY, tiny_llama, token_batch

BATCH = token_batch()


def selected(model, batches=(BATCH,), loss_fn=None):
    """The report, after checking that the budget is whole and who has nothing is said once in it."""
    with pytest.warns(UserWarning) as caught:
        report = select_mask(model, batches, loss_fn)
    layers, config = adapted_layers(model), model.peft_config["default"]
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    assert report.selected == total_budget(shapes, **config.budget(list(layers)))
    nothing = {name for name, layer in layers.items() if not layer.mask("default").nnz}
    assert set(report.untrained) <= nothing
    assert config.scope == "global" or set(report.untrained) == nothing
    assert str(report).count("share went to the others") == len(report.notes) == 1
    assert sum("share went to the others" in str(each.message) for each in caught) == 1
    return report


def tiny_gemma3() -> nn.Module:
    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 12, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=1)
    return Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")


GEMMA_BATCH = {"input_ids": BATCH["input_ids"].clamp_min(2), "labels": BATCH["labels"].clamp_min(2)}
GEMMA_BATCH["token_type_ids"] = torch.zeros_like(GEMMA_BATCH["input_ids"])


@pytest.mark.parametrize("scope", ["layer", "global", "row"])
def test_the_tower_of_a_model_that_reads_text_alone(scope):
    model = get_peft_model(tiny_gemma3(), SpftConfig(density=0.02, scope=scope, samples=2))
    report = selected(model, [GEMMA_BATCH])
    assert all("vision_tower" in name for name in report.untrained)
    assert sum("vision_tower" in matrix.name and matrix.selected > 0 for matrix in report.matrices) == 0
    assert "reaches no tower for pictures" in report.notes[0]
    assert "experts" not in report.notes[0] and "pooler" not in report.notes[0]


@pytest.mark.parametrize("salience", ["gradient", "magnitude", "random"])
def test_a_tower_that_the_run_freezes(salience):
    from axolotl.utils.freeze import freeze_mm_modules

    model = get_peft_model(tiny_gemma3(), SpftConfig(density=0.02, salience=salience, samples=2))
    freeze_mm_modules(model)
    report = selected(model, [GEMMA_BATCH])
    assert all("vision_tower" in name for name in report.untrained) and len(report.untrained) > 2
    assert "the run freezes" in report.notes[0] and "`freeze_mm_modules`" in report.notes[0]


def test_a_mask_from_a_file_in_what_the_run_freezes(tmp_path):
    path, (first, *_) = str(tmp_path / "mask.safetensors"), ("model.layers.0.", "")
    models = [get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=2, mask_path=path)) for _ in range(3)]
    assert not select_mask(models[0], [BATCH]).notes
    assert not select_mask(models[1], None).notes
    for name, parameter in models[2].named_parameters():
        if first in name:
            parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match="which the run freezes .* so nothing trains them: name another `mask_path`"):
        report = select_mask(models[2], None)
    wasted = sum(matrix.selected for matrix in report.matrices if first in matrix.name)
    assert len(report.notes) == 1 and report.notes[0].startswith(f"{wasted:,} of the values of the mask in {path} lie")


class Attends(nn.Module):
    """Whose attention reads the weight of out_proj without calling it."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("salience", ["gradient", "magnitude"])
def test_the_projection_that_torchs_attention_does_not_call(salience):
    torch.manual_seed(0)
    model = get_peft_model(Attends(), SpftConfig(target_modules=["first", "out_proj"], num_values=9, salience=salience))
    batches = [{"x": torch.randn(2, 3, 5)}]
    report = selected(model, batches, lambda model, batch: model(**batch).square().sum())
    assert report.untrained == ("attention.out_proj",)
    assert "nn.MultiheadAttention's out_proj" in report.notes[0]


def test_the_pooler_of_a_head_that_does_not_read_it():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForTokenClassification(BertConfig(**sizes, vocab_size=VOCABULARY, num_labels=3))
    base.bert.pooler = nn.ModuleDict({"dense": nn.Linear(24, 24)})
    base.bert.forward, run = None, base.bert.forward

    def forward(*args, **kwargs):
        base.bert._modules["pooler"], pooler = None, base.bert.pooler
        try:
            output = run(*args, **kwargs)
        finally:
            base.bert._modules["pooler"] = pooler
        pooler["dense"](output[0][:, 0])
        return output

    base.bert.forward = forward
    model = get_peft_model(base, SpftConfig(density=0.05, samples=2))
    report = selected(model, [{"input_ids": BATCH["input_ids"], "labels": BATCH["labels"] % 3}])
    assert report.untrained == ("bert.pooler.dense",)
    assert "a pooler" in report.notes[0]


@pytest.mark.parametrize("salience", ["gradient", "magnitude", "lift", "random"])
def test_a_pooler_and_a_second_head_whose_output_no_loss_reads(salience):
    torch.manual_seed(0)
    options = {"density": 0.05, "samples": 2, "salience": salience}
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = get_peft_model(BertModel(BertConfig(**sizes, vocab_size=VOCABULARY)), SpftConfig(**options))
    report = selected(
        model, [{"input_ids": BATCH["input_ids"]}], lambda model, batch: model(**batch)[0].square().mean()
    )
    assert report.untrained == ("pooler.dense",)
    config = GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=VOCABULARY, num_labels=1)
    model = get_peft_model(GPT2DoubleHeadsModel(config), SpftConfig(**options, scope="global"))
    assert selected(model).untrained == ("multiple_choice_head.summary",)


class Counting(list):
    """Batches that are counted as they are read."""

    read = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.read += 1
            yield batch


def test_a_salience_without_a_sample_reads_no_more_than_shows_what_is_used():
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=12, salience="magnitude"))
    batches = Counting([BATCH] * 4)
    report = select_mask(model, batches)
    assert (batches.read, report.samples, report.untrained) == (1, 0, ())
    # as long as a module is not reached, up to the end of the sample
    model = get_peft_model(Experts(), SpftConfig(target_modules=r"experts\.\d", num_values=9, salience="random"))
    batches = Counting([{"x": torch.randn(3, 6)}] * 4)
    with pytest.warns(UserWarning, match=r"no gradient reached experts\.1 "):
        select_mask(model, batches, lambda model, batch: model(**batch).square().sum())
    assert batches.read == 4
    # nothing is known without a loss, or without any label
    for batch in ({"input_ids": BATCH["input_ids"]}, {**BATCH, "labels": torch.full_like(BATCH["labels"], -100)}):
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=2, salience="magnitude"))
        assert select_mask(model, [batch]).untrained == ()


class Experts(nn.Module):
    """Of three experts the tokens come to two."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

    def forward(self, x):
        return self.experts[0](x) + self.experts[2](x[:1])


def test_an_expert_that_no_token_came_to():
    torch.manual_seed(0)
    model = get_peft_model(Experts(), SpftConfig(target_modules=r"experts\.\d", density=0.5))
    report = selected(model, [{"x": torch.randn(3, 6)}], lambda model, batch: model(**batch).square().sum())
    assert report.untrained == ("experts.1",)
    assert report.selected == 45
    assert "may need more `samples`" in report.notes[0] and "tower" not in report.notes[0]


@pytest.mark.parametrize(
    ("need", "world", "said"),
    [
        ("squared_gradient", 1, r"`salience: fisher` squares .* \(experts\.0, .*\) no longer tell whose tokens"),
        ("hessian_gradient", 2, r"`salience: grasp` exchanges .* \(experts\.0, .*\) would not take part"),
    ],
)
def test_what_experts_that_are_modules_cannot_give(need, world, said):
    model = get_peft_model(Experts(), SpftConfig(target_modules=r"experts\.\d"))
    with pytest.raises(SpftError, match=said):
        collect_statistics(model, adapted_layers(model), {need}, [{"x": torch.ones(3, 6)}], None, 4, Ranks(0, world))


def test_a_budget_that_what_is_left_cannot_hold():
    model = get_peft_model(Experts(), SpftConfig(target_modules=r"experts\.\d", density=0.9))
    with pytest.raises(SpftConfigError, match="81 values is more than the 60 entries of the matrices that can be"):
        select_mask(model, [{"x": torch.randn(3, 6)}], lambda model, batch: model(**batch).square().sum())


def test_of_an_adapter_that_is_not_trained_nothing_is_frozen():
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, salience="magnitude"))
    model.add_adapter("other", SpftConfig(density=0.03, salience="magnitude"))
    assert not select_mask(model, None, adapter_name="other").untrained
