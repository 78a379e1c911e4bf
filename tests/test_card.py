"""The section of an adapter's model card."""

from __future__ import annotations

import re

import torch
from peft import PeftModel, get_peft_model

from axolotl_spft import SpftConfig, select_mask
from tests.models import logits, tiny_llama, token_batch
from tests.trainer.test_callback import plain


def trained(folder):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=2, scope="row"))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    select_mask(model, [token_batch()])
    for name, values in model.named_parameters():
        if name.endswith("spft_values.default"):
            torch.nn.init.normal_(values, std=0.1)
    return model


def test_the_card_says_what_the_adapter_is_once_however_often_it_is_saved(tmp_path):
    model = trained(tmp_path)
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert text.startswith("---\n")
    assert text.count("## Sparse adapter") == 1
    for row in (f"| base model | {tmp_path}/base |", "| `density` | 0.05 |", "| salience | gradient |",
                "| scope | row |", "| training examples read for it | 2 |"):  # fmt: skip
        assert row in text
    assert f"| trained values | {model.peft_config['default'].nnz:,} |" in text
    assert "repair" not in text
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    # with the mask of a repaired adapter, and then repaired itself
    model.peft_config["default"].mask_source["repair"] = 0.25
    model.save_pretrained(tmp_path / "adapter")
    assert "repair" not in (tmp_path / "adapter" / "README.md").read_text()
    model.peft_config["default"].mask_source["repaired"] = 7
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "Mine." in text and "license: mit" in text
    assert "| share of the values that repair quantization | 0.25 |" in text


def test_its_lines_of_python_load_and_merge_the_adapter(tmp_path):
    model = trained(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        code = code.replace("path/to/this/folder", str(tmp_path / "adapter")).replace(
            '"merged"', f'"{tmp_path}/merged"'
        )
        exec(code, names)
    expected = logits(model.eval())
    merged = type(tiny_llama()).from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert isinstance(names["model"], PeftModel)


def test_a_trainers_own_card_keeps_the_section(tmp_path):
    trainer = plain(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path))
    trainer.create_model_card(model_name="mine")
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Sparse adapter") == 1
    assert "mine" in text
