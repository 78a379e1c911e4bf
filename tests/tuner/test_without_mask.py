"""An adapter without a mask: its training is refused, and everything else goes on as the base model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.errors import SpftError
from axolotl_spft.ops.mask.csr import empty_mask
from axolotl_spft.salience.install import adapted_layers
from tests.models import ARCHITECTURES, VOCABULARY, logits, tiny_llama, token_batch, with_adapter

SAID = r"adapter `default` has no mask: call select_mask\(model, batches\) first"


def empty(model=None, **options) -> PeftModel:
    return get_peft_model(model or tiny_llama(), SpftConfig(density=0.05, **options))


def test_the_trainer_is_told_in_its_first_forward_pass(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {name: tensor[0] for name, tensor in token_batch(rows=1, seed=index).items()}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, gradient_checkpointing=True
    )
    trainer = Trainer(empty(), arguments, train_dataset=Rows())
    with pytest.raises(SpftError, match=SAID):
        trainer.train()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_modules_to_save_are_no_excuse(architecture):
    model = empty(ARCHITECTURES[architecture](), modules_to_save=["lm_head"]).train()
    with pytest.raises(SpftError, match=SAID):
        model(**token_batch())


def test_a_stack_of_layers_that_is_called_past_the_tuner():
    model = get_peft_model(nn.Sequential(nn.Linear(5, 3)), SpftConfig(target_modules=["0"], num_values=2))
    with pytest.raises(SpftError, match=SAID):
        model(torch.ones(2, 5))
    with pytest.raises(SpftError, match=SAID):
        model.base_model(torch.ones(2, 5))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_module_within_the_model_that_is_called_itself(architecture):
    model = empty(ARCHITECTURES[architecture](), scope="global").train()
    inner = model.base_model.model.base_model
    ids = token_batch()["input_ids"]
    with pytest.raises(SpftError, match=SAID):
        inner(ids)
    with torch.no_grad():
        inner(ids)
    model.eval()
    inner(ids)
    select_mask(model.train(), [token_batch()])
    # a matrix that gets nothing of the budget is none without a mask
    layers = adapted_layers(model)
    layers[next(iter(layers))].set_mask("default", empty_mask(*next(iter(layers.values())).get_base_weight().shape))
    inner(ids)[0].sum().backward()


def test_a_compiled_model():
    torch._dynamo.reset()
    model = empty().train()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(SpftError, match=SAID):
        compiled(**token_batch())
    select_mask(model, [token_batch()])
    compiled(**token_batch()).loss.backward()
    assert all(layer.spft_values["default"].grad.any() for layer in adapted_layers(model).values())


def test_what_does_not_train_it_goes_on():
    model, expected = empty(), logits(tiny_llama())
    assert torch.equal(logits(model.train()), expected)
    model.eval()
    assert torch.equal(model(**token_batch()).logits, expected)
    model.train()
    with model.disable_adapter():
        model(**token_batch())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(**token_batch())


def test_the_salience_pass_in_train_mode_and_training_after_it():
    model = empty(scope="global").train()
    select_mask(model, [token_batch()])
    model(**token_batch()).loss.backward()
    model.add_adapter("second", SpftConfig(density=0.05))
    model(**token_batch()).loss.backward()
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(SpftError, match="adapter `second` has no mask"):
        model(**token_batch())


def test_a_copy_is_told_of_its_own_mask():
    model = empty().train()
    again = copy.deepcopy(model)
    select_mask(again, [token_batch()])
    again(**token_batch()).loss.backward()
    with pytest.raises(SpftError, match=SAID):
        model(**token_batch())
    model.unload()(**token_batch())


WORDS = [f"w{number}" for number in range(VOCABULARY - 4)]


def preferences() -> tuple[Dataset, PreTrainedTokenizerFast]:
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    vocabulary = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rows = [{"prompt": f"w{i} w3", "chosen": f"w{i + 1} w5", "rejected": f"w{i + 9} w7"} for i in range(4)]
    return Dataset.from_list(rows), PreTrainedTokenizerFast(tokenizer_object=words, **special)


def test_dpo_whose_trainer_makes_the_adapter(tmp_path):
    """The reference pass is the model without it, in the same step; it needs no mask."""
    rows, tokenizer = preferences()
    arguments = DPOConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    trainer = DPOTrainer(
        tiny_llama(),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=SpftConfig(density=0.1),
    )
    with pytest.raises(SpftError, match=SAID):
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    select_mask(model, [token_batch()])
    trainer.train()
    assert any(layer.spft_values["default"].any() for layer in adapted_layers(model).values())


def test_sft_whose_trainer_makes_the_adapter(tmp_path):
    _, tokenizer = preferences()
    arguments = SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    trainer = SFTTrainer(
        tiny_llama(),
        args=arguments,
        train_dataset=Dataset.from_list([{"text": "w1 w2 w3 w4"}] * 4),
        processing_class=tokenizer,
        peft_config=SpftConfig(density=0.1, modules_to_save=["lm_head"]),
    )
    with pytest.raises(SpftError, match=SAID):
        trainer.train()
    select_mask(trainer.accelerator.unwrap_model(trainer.model), [token_batch()])
    trainer.train()


def test_an_empty_adapter_is_saved_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"one holds no values: call select_mask\(model, batches\), or"):
        empty(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "one")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds no values")
        with_adapter(tiny_llama()).save_pretrained(tmp_path / "two")
        # options alone are no adapter
        SpftConfig().save_pretrained(tmp_path / "three")
    assert "import axolotl_spft.tuner" in (tmp_path / "two" / "README.md").read_text()
    assert not (tmp_path / "three" / "README.md").exists()
    assert len(adapted_layers(PeftModel.from_pretrained(tiny_llama(), tmp_path / "one"))) == 14
