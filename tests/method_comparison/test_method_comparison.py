"""PEFT's comparison of methods: its reading of answers, its batches, and a result file of a run from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from integration.method_comparison.__main__ import run
from integration.method_comparison.answers import accuracy, final_answer
from integration.method_comparison.data import Pair, load_data
from integration.method_comparison.protocol import batches
from integration.method_comparison.settings import DEFAULTS, read_settings
from tests.byte_llama import save_byte_llama

EXPERIMENTS = Path(__file__).parents[2] / "integration" / "method_comparison" / "experiments" / "spft"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A saved Llama of 2 layers with a tokenizer of bytes."""
    return save_byte_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def data(tmp_path) -> Path:
    for part in ("train", "test"):
        rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)]
        (tmp_path / f"gsm8k_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so $4^2 = 16$.The answer is: 16", "16"),
        ("The answer is: 3\nQuestion: more", "3"),
        ("first #### 1 then\n#### $1,000.", "1,000"),
        ("#### 5 The answer is 50%.", "50"),
        ("sixteen", None),
    ],
)
def test_the_last_marked_answer_counts(text, answer):
    assert final_answer(text) == answer


def test_answers_are_equal_as_numbers_or_as_text():
    right = ["#### 0.5", "#### 16", "#### red", "#### 3", "#### 7", "#### 1"]
    given = ["The answer is: 1/2", "#### 16.0", "The answer is: red", "#### 4", "no idea", "#### 1/0"]
    assert accuracy(given, right) == 3 / 6


def test_batches_are_sorted_in_buckets_and_end_with_one_counted_token(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    pairs = [Pair("q", "a" * n) for n in (1, 5, 3, 2)]
    settings = {**DEFAULTS, "batch_size": 2, "query_template": "{query}"}
    first, second, third = (batch for _, batch in zip(range(3), batches(pairs, tokenizer, settings, "cpu")))
    assert first["attention_mask"].sum(1).tolist() == [6, 4] and second["attention_mask"].sum(1).tolist() == [3, 2]
    assert first["labels"][1].tolist() == [*first["input_ids"][1, :4].tolist(), tokenizer.eos_token_id, -100]
    assert torch.equal(first["input_ids"], third["input_ids"]), "an epoch follows the other"


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS.iterdir()), ids=lambda path: path.name)
def test_a_shipped_experiment_goes_the_whole_way(experiment, base, data, tmp_path):
    count = json.loads((experiment / "adapter_config.json").read_text())
    changed = tmp_path / "spft" / experiment.name
    changed.mkdir(parents=True)
    # the count of a model of 3 billion parameters does not fit
    small = {"num_values": 500} if "num_values" in count else {"match_lora_rank": 2}
    (changed / "adapter_config.json").write_text(json.dumps({**count, **small}))
    (changed / "training_params.json").write_text((experiment / "training_params.json").read_text())
    changes = {"model_id": str(base), "dtype": "float32", "max_steps": 4, "eval_steps": 2, "batch_size": 2,
               "generation_kwargs": {"max_length": 90, "max_new_tokens": 8}, "batch_size_eval": 3}  # fmt: skip
    path = run(changed, data, tmp_path / "results", changes)
    assert path.name == f"spft--{experiment.name}.json"
    result = json.loads(path.read_text())
    assert result["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == float(experiment.name.rpartition("_")[2])
    assert result["run_info"]["peft_config"]["peft_type"] == "SPFT"
    assert set(result["run_info"]["train_config"]) == set(DEFAULTS)
    train_info = result["train_info"]
    # q and v of 2 layers: 64 x 64 and 32 x 64 weights
    expected = 500 if "num_values" in count else 2 * 2 * (64 + 64 + 32 + 64)
    assert train_info["num_trainable_params"] == expected and train_info["file_size"] > 4 * expected
    assert [set(each) & {"step", "valid accuracy", "test accuracy"} for each in train_info["metrics"]] == [
        {"step", "valid accuracy"}, {"step", "valid accuracy"}, {"step", "test accuracy"},
    ]  # fmt: skip
    assert all("mem allocated avg" in each for each in train_info["metrics"][:-1])
    last = train_info["metrics"][-1]
    assert last["train samples"] == 8 and last["forgetting"] != 0 and 0 <= last["test accuracy"] <= 1


def test_what_is_missing_or_unknown_is_said(tmp_path, data):
    with pytest.raises(SystemExit, match=r"gsm8k_train.jsonl is missing"):
        load_data(tmp_path / "none")
    assert load_data(data).train[1] == Pair("What is 1 + 1?", "It is 2.\n#### 2")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit) as error:
        read_settings(tmp_path, {"max_stepps": 3, "dtype": "int4", "compile": True})
    message = str(error.value)
    for part in (
        "`max_stepps` is unknown: known are model_id",
        "`dtype: int4` must be one of float32",
        "`compile: True`",
    ):
        assert part in message
