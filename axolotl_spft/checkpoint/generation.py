"""The ``generation_config.json`` of a merged model, which knows the tokens of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_spft.checkpoint.adapter import read_json_object
from axolotl_spft.checkpoint.run_config import TOKENS
from axolotl_spft.files import write_json

GENERATION_CONFIG = "generation_config.json"
_END = "eos_token_id"


def give_tokens(folder: Path, changes: Mapping[tuple[str, ...], Any]) -> None:
    """Change the special tokens in the file in ``folder``, if there is one, as a run changed those of the config.

    Generation ends at the run's token and at those that ended it before, as trainers give it to the model.

    Args:
        changes: of `axolotl_spft.checkpoint.run_config.RunConfig`.
    """
    path = folder / GENERATION_CONFIG
    tokens = {names[-1]: value for names, value in changes.items() if names[-1] in TOKENS and value is not None}
    if not tokens or not path.is_file():
        return
    found = read_json_object(path, "copy the base model again")
    changed = dict(found) | {name: value for name, value in tokens.items() if name != _END}
    if _END in tokens:
        ends, before = _list_of(tokens[_END]), _list_of(found.get(_END))
        if not set(ends) <= set(before):
            changed[_END] = [*ends, *(token for token in before if token not in ends)]
    if changed != found:
        write_json(path, changed)


def _list_of(tokens: Any) -> list:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
