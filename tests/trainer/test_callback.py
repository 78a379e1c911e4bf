"""`SpftCallback` with the real trainers of TRL and transformers."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from axolotl_spft import SparseAdamW, SpftCallback, SpftConfig, select_mask, step_unit
from axolotl_spft.errors import SpftConfigError, SpftError
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.trainer.salience_pass import has_mask, peft_model_of
from axolotl_spft.tuner.state import mask_checksum, slots_of
from tests.models import VOCABULARY, tiny_llama

WORDS = [f"w{number}" for number in range(VOCABULARY - 4)]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def sentence(start: int) -> str:
    return " ".join(WORDS[(start + 5 * step) % len(WORDS)] for step in range(7))


def arguments(kind, folder, **changes):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2}
    options |= {"learning_rate": 0.01, "use_cpu": True, "report_to": [], "seed": 3, "logging_steps": 1, "bf16": False}
    return kind(output_dir=str(folder), **(options | changes))


def sft(folder, callback=None, **changes) -> SFTTrainer:
    return SFTTrainer(
        tiny_llama(),
        args=arguments(SFTConfig, folder, max_length=16, **changes),
        train_dataset=Dataset.from_list([{"text": sentence(start)} for start in range(12)]),
        processing_class=tokenizer(),
        peft_config=SpftConfig(density=0.05, samples=8),
        callbacks=[callback or SpftCallback()],
    )


def dpo(folder, **changes) -> DPOTrainer:
    rows = [{"prompt": sentence(i), "chosen": sentence(i + 1), "rejected": sentence(i + 9)} for i in range(12)]
    return DPOTrainer(
        tiny_llama(),
        args=arguments(DPOConfig, folder, max_length=32, **changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=SpftConfig(density=0.05, samples=8),
        callbacks=[SpftCallback()],
    )


def figures(trainer) -> tuple[list[float], str, torch.Tensor]:
    """The losses, the mask and the values of a trained trainer."""
    layers = adapted_layers(peft_model_of(trainer))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    values = torch.cat([layer.spft_values["default"].detach().clone() for layer in layers.values()])
    return losses, mask_checksum(slots_of(layers, "default")), values


def assert_same(one, other) -> None:
    assert one[:2] == other[:2]
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("make", [sft, dpo])
def test_trl_trains_the_values_and_resumes_to_the_same_bits(tmp_path, make, capsys):
    trainer = make(tmp_path / "whole")
    assert not has_mask(peft_model_of(trainer))
    trainer.train()
    whole = figures(trainer)
    assert len(whole[0]) == 4
    assert whole[2].any()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is SparseAdamW
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == whole[2].numel()
    told = capsys.readouterr().out
    assert "Memory per rank" in told
    assert "Sparse mask: " in told and "v_proj" in told
    assert f"Sparse adapter: {tmp_path}/whole/checkpoint-4" in told

    resumed = make(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(figures(resumed), whole)


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    kept, recomputed = (sft(tmp_path / str(on), gradient_checkpointing=on, save_strategy="no") for on in (False, True))
    kept.train()
    recomputed.train()
    assert_same(figures(recomputed), figures(kept))


def plain(folder, model=None, callbacks=None, **options) -> Trainer:
    tokens = torch.arange(60).reshape(6, 10)
    return Trainer(
        model=model if model is not None else get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=4)),
        args=arguments(TrainingArguments, folder, max_steps=2, save_strategy="no", disable_tqdm=True),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=callbacks if callbacks is not None else [SpftCallback()],
        **options,
    )


def test_an_adapter_with_a_mask_keeps_it_and_eight_bits_and_foreign_optimizers_are_choices(tmp_path):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, salience="magnitude"))
    select_mask(model, None)
    before = mask_checksum(slots_of(adapted_layers(model), "default"))
    trainer = plain(tmp_path, model, [SpftCallback("sparse_adamw_8bit")])
    trainer.train()
    assert mask_checksum(slots_of(adapted_layers(model), "default")) == before
    assert trainer.optimizer.optimizer.param_groups[0]["state_bits"] == 8
    trainer = plain(tmp_path, callbacks=[SpftCallback(None)])
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert figures(trainer)[2].any()


def test_one_callback_prepares_every_trainer_and_two_prepare_one_once(tmp_path, capsys):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=4, relative_step=True))
    callback, rates = SpftCallback(), []
    for callbacks in ([callback], [callback], [callback, SpftCallback()]):
        trainer = plain(tmp_path, model, callbacks)
        trainer.args.learning_rate = 0.25
        trainer.train()
        assert type(trainer.optimizer.optimizer) is SparseAdamW
        assert "RunRecord" in trainer.state.stateful_callbacks
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert "spft/values_norm" in logged
        rates.append(logged["learning_rate"])
        trainer.train()  # once more: it is prepared already
    assert rates == [pytest.approx(0.25 * step_unit(model))] * 3
    assert capsys.readouterr().out.count("Memory per rank") == 3
    late = plain(tmp_path, model, [])
    late.add_callback(callback)
    with pytest.raises(SpftError, match="came too late"):
        late.train()


def test_what_cannot_work_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(SpftConfigError, match=r"`optimizer: adam` must be sparse_adamw, sparse_adamw_8bit, or None"):
        SpftCallback("adam")
    with pytest.raises(SpftError, match="is a LlamaForCausalLM without a sparse adapter: pass `peft_config"):
        plain(tmp_path, tiny_llama()).train()
    late = plain(tmp_path, callbacks=[])
    late.add_callback(SpftCallback())
    with pytest.raises(SpftError, match="came too late"):
        late.train()
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(SpftError, match="made before the mask is chosen"):
        plain(tmp_path, model, optimizers=(optimizer, None)).train()
    with pytest.raises(SpftError, match="not a complete checkpoint"):
        (tmp_path / "checkpoint-1").mkdir()
        plain(tmp_path).train(resume_from_checkpoint=True)


def test_the_saved_adapter_is_the_trained_one(tmp_path):
    trainer = plain(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["mask_source"]["samples"] == 4
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    values = torch.cat([layer.spft_values["default"].detach() for layer in adapted_layers(loaded).values()])
    assert torch.equal(values, figures(trainer)[2])
