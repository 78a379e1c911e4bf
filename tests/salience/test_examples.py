"""What counts as an example."""

from __future__ import annotations

import pytest
import torch

from axolotl_spft.salience.examples import count_examples


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": torch.zeros(3, 7)}, 3),
        ({"input_ids": torch.zeros(1, 9), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])}, 3),
        ({"input_ids": torch.zeros(1, 3), "position_ids": torch.tensor([[4, 5, 6]])}, 1),
        # four rows without a second sequence in any
        ({"input_ids": torch.zeros(4, 3), "position_ids": torch.tensor([[0, 1, 2]])}, 4),
        ({"input_ids": torch.zeros(4, 3), "position_ids": torch.tensor([[2, 3, 4]] * 4)}, 4),
        # pictures have a row for each patch
        ({"input_ids": torch.zeros(2, 9), "labels": torch.zeros(2, 9), "pixel_values": torch.zeros(64, 5)}, 2),
        ({"chosen_input_ids": torch.zeros(3, 7), "boundaries": torch.zeros(8)}, 3),
        ({"values": torch.zeros(5, 7)}, 5),
        ({"label": "none"}, 1),
    ],
)
def test_counted_examples(batch, expected):
    assert count_examples(batch) == expected


@pytest.mark.parametrize("with_attention_mask", [True, False])
@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([[50]], 1), ([[15, 15, 15]], 3), ([[64]], 1), ([[20, 44], [10]], 3)],
)
def test_padding_is_no_example_in_axolotls_packs(lengths, expected, with_attention_mask):
    from axolotl.utils.collators.batching import V2BatchSamplerDataCollatorForSeq2Seq
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")

    def example(length: int) -> dict:
        # the prompt has no labels
        columns = {"input_ids": [5] * length, "labels": [-100] * 4 + [5] * (length - 4)}
        columns["position_ids"] = list(range(length))
        return columns | ({"attention_mask": [1] * length} if with_attention_mask else {})

    collate = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64)
    batch = collate([[example(length) for length in row] for row in lengths])
    assert batch["input_ids"].shape == (len(lengths), 64)
    assert count_examples(batch) == expected
