"""The section of a saved adapter's model card (``README.md``) that says what it is, and how it is loaded and merged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from axolotl_spft.files import atomic_path

_START, _END = "<!-- axolotl_spft -->", "<!-- /axolotl_spft -->"
_SECTION = re.compile(re.escape(_START) + ".*?" + re.escape(_END), re.DOTALL)
_FRONT_MATTER = "---\nlibrary_name: peft\n---\n"
# what of the record tells how the mask was chosen: name -> how the card calls it
_SOURCE = {
    "salience": "salience",
    "scope": "scope",
    "samples": "training examples read for it",
    "seed": "seed",
    "repair": "share of the values that repair quantization",
    "repaired": "values that begin at the weight before quantization",
    "repair_from": "which was read from",
}
_REPAIRED = """
It repairs a quantized base: give `from_pretrained` the `quantization_config` of the training. `axolotl spft merge`
merges it from the files, without quantizing the result.
"""
_BUDGETS = ("density", "num_values", "match_lora_rank")


def say_how_to_load(folder: Path) -> None:
    """Write the section into the folder's card, in the place of an older one; make the card where there is none.

    Args:
        folder: holds ``adapter_config.json``.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else _FRONT_MATTER
    # a function: the section's backslashes are no references to groups
    changed, found = _SECTION.subn(lambda _: _section(config), text)
    with atomic_path(card) as temporary:
        temporary.write_text(changed if found else f"{text.rstrip()}\n\n{_section(config)}\n", encoding="utf-8")


def _section(config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path") or "the base model"
    rows = [("base model", base)]
    if config.get("nnz") is not None:
        rows.append(("trained values", f"{config['nnz']:,}"))
    rows += [(f"`{name}`", config[name]) for name in _BUDGETS if config.get(name) is not None]
    source = config.get("mask_source") or {}
    rows += [(text, source[name]) for name, text in _SOURCE.items() if source.get(name) not in (None, 0.0)]
    if not source.get("repaired"):
        # of another adapter with this mask, from whose file it came
        rows = [(text, value) for text, value in rows if text != _SOURCE["repair"]]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    repaired = _REPAIRED if source.get("repaired") else ""
    return f"""{_START}
## Sparse adapter

A sparse delta on frozen weights, trained with axolotl_spft (SPEFT, arXiv 2412.13488).

| | |
|---|---|
{table}

### How to load this adapter

PEFT knows the type of this adapter, SPFT, once `axolotl_spft.tuner` is imported:

```python
import axolotl_spft.tuner  # registers the method
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
{repaired}
To merge it into the base model, for programs that know nothing of adapters:

```python
model.merge_and_unload().save_pretrained("merged")
```
{_END}"""
