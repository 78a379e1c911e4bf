"""The files of a tokenizer, its chat template and the processor around it, and how an adapter hands them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from axolotl_spft.errors import SpftFileError
from axolotl_spft.files import copy_files

# of one tokenizer, so that files of two never stand together
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
# of what reads pictures and sounds, which training on text alone saves none of
PROCESSOR = (
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json",
)  # fmt: skip


def tokenizer_of(folder: Path) -> dict[str, Path]:
    """The files of the tokenizer and the processor that a folder holds; none where it has no tokenizer."""
    if not (folder / "tokenizer_config.json").is_file():
        return {}
    return {name: folder / name for name in (*TOKENIZER, *PROCESSOR) if (folder / name).is_file()}


def padding_of(folder: Path, config: PretrainedConfig) -> int | None:
    """The number of the padding token of the tokenizer in a folder, if it has one that can be read.

    Args:
        config: of the tokenizer's model.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False).pad_token_id
    except Exception:
        return None


def hand_on_tokenizer(folders: Sequence[Path], target: Path) -> dict[str, Any]:
    """Copy the tokenizer of the first folder that has one into that of the adapter made of them all.

    What another tokenizer has left there is removed, unless it is that of a model (a ``config.json`` beside it).

    Returns:
        ``tokenizer_of``: the name of that folder, None where no folder has a tokenizer; ``other_tokenizers``: those of
        the folders that have another one.

    Raises:
        SpftFileError: it cannot be written.
    """
    found = {folder: files for folder in folders if (files := tokenizer_of(folder))}
    if not found:
        return {"tokenizer_of": None, "other_tokenizers": []}
    first, contents = next(iter(found)), {}
    try:
        for folder, files in found.items():
            contents[folder] = {name: path.read_bytes() for name, path in files.items()}
        copy_files(found[first], target)
        left = [] if (target / "config.json").exists() else {*TOKENIZER, *PROCESSOR} - found[first].keys()
        for name in left:
            (target / name).unlink(missing_ok=True)
    except OSError as error:
        raise SpftFileError(f"the tokenizer of {first} cannot be copied into {target}: {error}") from error
    others = [str(folder) for folder in found if contents[folder] != contents[first]]
    return {"tokenizer_of": str(first), "other_tokenizers": others}
