"""Preference trainers compare with a repaired base as it is when training starts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from axolotl_spft import SpftCallback, SpftConfig
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.memory import memory_of_run
from axolotl_spft.trainer.salience_pass import peft_model_of
from axolotl_spft.trainer.saved_adapter import compare_with_repaired_start
from tests.checkpoint.saved import save_base
from tests.models import logits, tiny_llama
from tests.quantizers import load_quantized
from tests.trainer.test_callback import arguments, assert_same, figures, sentence, tokenizer

PAIRS = [{"prompt": sentence(i), "chosen": sentence(i + 1), "rejected": sentence(i + 9)} for i in range(12)]
KINDS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {"max_length": 32}),
    "kto": (
        KTOTrainer,
        KTOConfig,
        [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)],
        {"max_length": 32},
    ),
    "sft": (SFTTrainer, SFTConfig, [{"text": row["prompt"]} for row in PAIRS], {"max_length": 16}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), tiny_llama)


def make(kind, base, folder, wrapped=False, reselect=None, **changes):
    trainer, config, rows, options = KINDS[kind]
    model = load_quantized(base, "nf4")
    sparse = SpftConfig(density=0.05, samples=8, repair=0.4, reselect=reselect)
    return trainer(
        get_peft_model(model, sparse) if wrapped else model,
        args=arguments(config, folder, **(options | {"gradient_accumulation_steps": 1} | changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=None if wrapped else sparse,
        callbacks=[SpftCallback()],
    )


# to a model that has an adapter, as GRPO's trainer is given one, TRL adds an empty one to compare with
@pytest.mark.parametrize("kind, wrapped", [("dpo", False), ("dpo", True), ("kto", False)])
def test_the_reference_is_the_repaired_start(base, tmp_path, kind, wrapped):
    trainer = make(kind, base, tmp_path, wrapped, max_steps=3, save_strategy="no")
    assert ("ref" in peft_model_of(trainer).peft_config) == wrapped
    trainer.train()
    model = peft_model_of(trainer)
    first = trainer.state.log_history[0]["loss"]
    # policy and reference are the same model in the first step
    assert first == pytest.approx(math.log(2) if kind == "dpo" else 0.5, abs=1e-6)
    trained = logits(model)
    for layer in adapted_layers(model).values():
        assert layer.originals("ref") is layer.originals("default") or torch.equal(
            layer.originals("ref"), layer.originals("default")
        )
        assert layer.values("default").any() and not layer.values("ref").any()
        assert not layer.values("ref").requires_grad
    model.set_adapter("ref")
    start = logits(model)
    model.set_adapter("default")
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.values("default").zero_()
    assert torch.equal(logits(model), start) and not torch.equal(start, trained)
    with model.disable_adapter():
        assert not torch.equal(logits(model), start)


@pytest.mark.parametrize(
    "kind, reselect",
    [("sft", None), ("dpo", None), ("sft", {"every": 1, "until": 1.0}), ("dpo", {"every": 1, "until": 1.0})],
)
def test_a_repaired_run_resumes_to_the_same_bits(base, tmp_path, kind, reselect):
    trainer = make(kind, base, tmp_path, reselect=reselect)
    trainer.train()
    whole = figures(trainer)
    resumed = make(kind, base, tmp_path, reselect=reselect)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(figures(resumed), whole)
    for one, other in zip(*(adapted_layers(peft_model_of(each)).values() for each in (trainer, resumed))):
        for name in one.spft_values:
            assert all(torch.equal(*pair) for pair in zip(one.mask(name), other.mask(name)))
            assert torch.equal(one.originals(name), other.originals(name))
            assert reselect is None or name == "default" or not torch.equal(one.mask(name)[0], one.mask("default")[0])
    # two bytes a value beside the columns' two
    memory = memory_of_run(peft_model_of(trainer), trainer.args, "single", Ranks(), 32)
    nnz, rows = (
        whole[2].numel(),
        sum(layer.out_features + 1 for layer in adapted_layers(peft_model_of(trainer)).values()),
    )
    assert memory.indices == 4 * nnz + 4 * rows
    # the trainer that has been to the end, too
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(figures(trainer), whole)


def test_a_reference_that_would_be_another_one_is_refused(base, tmp_path):
    trainer = make("sft", base, tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    model = peft_model_of(trainer)
    compare_with_repaired_start(trainer, model)
    assert "ref" not in model.peft_config
    asked = SimpleNamespace(ref_model=None, beta=0.1, args=SimpleNamespace(precompute_ref_log_probs=True))
    with pytest.raises(SpftError, match="has asked the reference before the base was repaired"):
        compare_with_repaired_start(asked, model)
    without = SimpleNamespace(ref_model=None, beta=0.1, args=SimpleNamespace())
    with pytest.raises(SpftError, match="compares with the base without any adapter"):
        compare_with_repaired_start(without, model)
    compare_with_repaired_start(SimpleNamespace(ref_model=None, beta=0.0, args=SimpleNamespace()), model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_was_refused_once_is_refused_again(base, tmp_path, wrapped):
    trainer = make("dpo", base, tmp_path, wrapped, precompute_ref_log_probs=True, max_steps=1, save_strategy="no")
    for _ in range(2):
        with pytest.raises(SpftError, match="has asked the reference before the base was repaired"):
            trainer.train()


@pytest.mark.parametrize("callback, told", [(SpftCallback(None), True), (SpftCallback(), False)])
def test_values_that_trl_makes_half_precision_are_told_where_no_optimizer_keeps_copies(
    base, tmp_path, capsys, callback, told
):
    trainer, config, rows, options = KINDS["sft"]
    run = trainer(
        load_quantized(base, "nf4"),
        args=arguments(config, tmp_path, **(options | {"max_steps": 1, "save_strategy": "no"})),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=SpftConfig(density=0.05, samples=8),
        callbacks=[callback],
    )
    run.train()
    assert {layer.values("default").dtype for layer in adapted_layers(peft_model_of(run)).values()} == {torch.bfloat16}
    assert ("Sparse values: bfloat16, which rounds small updates away" in capsys.readouterr().out) is told
