"""Tokenizers that a GGUF file describes by pieces and scores alone."""

from __future__ import annotations

from types import SimpleNamespace

from integration.evidence.gguf_models import _sentencepiece_tokenizer


def test_pairs_merge_in_the_order_of_their_scores():
    letters = "helowrd▁"
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "  ", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    kinds = [3, 3, 3, 3, 4, 4, *[6] * 256, *[1] * len(letters)]
    scores = [-1000.0] * 6 + [0.0] * 256 + [-900.0 - number for number in range(len(letters))]
    # "lo" is merged before "ll", so that "hello" ends as "hel" and "lo"
    for number, piece in enumerate(["lo", "he", "ll", "▁w", "hel", "llo", "▁wo"]):
        pieces.append(piece)
        kinds.append(1)
        scores.append(-float(number))
    held = {"tokens": pieces, "scores": scores, "token_type": kinds, "bos_token_id": 2, "eos_token_id": 1,
            "unknown_token_id": 3, "padding_token_id": 0}  # fmt: skip
    fields = {f"tokenizer.ggml.{name}": SimpleNamespace(contents=lambda it=it: it) for name, it in held.items()}
    tokenizer = _sentencepiece_tokenizer(fields)
    text = "hello world\n  é"
    assert tokenizer.tokenize(text) == [
        "hel", "lo", "▁wo", "r", "l", "d", "\n", "  ", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 2 and tokenizer.decode(ids[1:]) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 3)
