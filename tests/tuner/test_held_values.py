"""Another mask under values that an optimizer holds: it trains on, or refuses, and never trains nothing."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from axolotl_spft import SparseAdamW, SpftConfig, select_mask
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.ops.mask.csr import mask_from_positions
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.state import mask_checksum, slots_of
from tests.models import tiny_llama, token_batch

BATCHES = [token_batch(seed=seed) for seed in range(2)]


def one_layer(at: list[int], base: nn.Module | None = None, columns: int = 3) -> PeftModel:
    """One or more values at the given positions of a linear layer (2, columns)."""
    torch.manual_seed(0)
    model = nn.Sequential(base or nn.Linear(columns, 2))
    model = get_peft_model(model, SpftConfig(target_modules=["0"], num_values=len(at)))
    install(model, at)
    return model


def install(model: PeftModel, at: list[int]) -> None:
    layer = adapted_layers(model)["0"]
    layer.set_mask("default", mask_from_positions(torch.tensor(at), layer.out_features, layer.in_features))


def values_of(model: PeftModel) -> nn.Parameter:
    return adapted_layers(model)["0"].spft_values["default"]


def step(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    columns = adapted_layers(model)["0"].in_features
    model(torch.linspace(-1, 2, 4 * columns).view(4, columns)).square().sum().backward()
    optimizer.step()


def loaded_by_load_state_dict(model, other):
    model.load_state_dict(other.state_dict())


def loaded_by_peft(model, other):
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def test_the_parameter_stays_itself_and_is_trained():
    other, model = one_layer([4]), one_layer([1])
    values_of(other).data.fill_(0.5)
    parameter, optimizer = values_of(model), SparseAdamW(model.parameters(), lr=0.1)
    for load in (loaded_by_load_state_dict, loaded_by_peft):
        install(model, [1])
        load(model, other)
        assert values_of(model) is parameter
        assert parameter.item() == 0.5
        expected = copy.deepcopy(other)
        step(expected, SparseAdamW([values_of(expected)], lr=0.1))
        step(model, optimizer)
        assert torch.equal(adapted_layers(model)["0"].get_delta_weight("default"),
                           adapted_layers(expected)["0"].get_delta_weight("default"))  # fmt: skip
        optimizer = SparseAdamW(model.parameters(), lr=0.1)


def test_an_optimizer_from_before_the_mask_trains_its_values():
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.02))
    optimizer = SparseAdamW(model.parameters(), lr=0.1)
    select_mask(model, BATCHES[:1])
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    assert all(layer.spft_values["default"].all() for layer in adapted_layers(model).values())


@pytest.mark.parametrize("kind", [SparseAdamW, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_of_another_number_of_values_refuses_its_next_step(kind):
    model, other = one_layer([1, 2]), one_layer([5])
    model.peft_config["default"].nnz = None
    optimizer = kind(model.parameters(), lr=0.1)
    step(model, optimizer)
    loaded_by_load_state_dict(model, other)
    with pytest.raises(SpftError, match="holds values of adapter `default` that no longer belong to the model"):
        step(model, optimizer)
    step(model, kind(model.parameters(), lr=0.1))
    assert values_of(model).item() != 0


def test_an_adapter_that_is_deleted_and_loaded_again(tmp_path):
    """As the error of a file with other numbers of values says; an optimizer of another adapter goes on."""
    model = one_layer([1])
    model.save_pretrained(tmp_path)
    optimizer = SparseAdamW(model.parameters(), lr=0.1)
    model.add_adapter("kept", SpftConfig(target_modules=["0"], num_values=1, init_weights=False))
    of_kept = SparseAdamW([adapted_layers(model)["0"].spft_values["kept"]], lr=0.1)
    model.delete_adapter("default")
    # nothing has taken their place yet
    optimizer.step()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.set_adapter("default")
    with pytest.raises(SpftError, match=r"no longer belong to the model: .* deleted and made again"):
        step(model, optimizer)
    step(model, SparseAdamW([values_of(model)], lr=0.1))
    assert values_of(model).item() != 0
    model.set_adapter("kept")
    step(model, of_kept)


def test_values_that_are_assigned_instead_of_copied():
    model, other = one_layer([1]), one_layer([1])
    optimizer = SparseAdamW(model.parameters(), lr=0.1)
    model.load_state_dict(other.state_dict(), assign=True)
    with pytest.raises(SpftError, match="no longer belong to the model"):
        step(model, optimizer)


def test_moments_of_another_mask_are_refused():
    model, other = one_layer([1]), one_layer([4])
    optimizer, of_other = SparseAdamW(model.parameters(), lr=0.1), SparseAdamW(other.parameters(), lr=0.1)
    step(model, optimizer)
    step(other, of_other)
    before = values_of(model)
    loaded_by_load_state_dict(model, one_layer([1]))
    # of the same positions: as with any other parameter
    step(model, optimizer)
    loaded_by_load_state_dict(model, other)
    with pytest.raises(SpftError, match="moments belong to positions of before another mask was loaded"):
        step(model, optimizer)
    optimizer.load_state_dict(of_other.state_dict())
    step(model, optimizer)
    step(other, of_other)
    assert values_of(model) is before
    assert torch.equal(values_of(model), values_of(other))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9), torch.optim.Adagrad])
def test_moments_of_another_mask_are_refused_for_every_optimizer(kind):
    model, other = one_layer([1]), one_layer([4])
    optimizer, of_other = kind(model.parameters(), lr=0.1), kind(other.parameters(), lr=0.1)
    step(model, optimizer)
    step(other, of_other)
    loaded_by_load_state_dict(model, one_layer([1]))
    # of the same positions
    step(model, optimizer)
    loaded_by_load_state_dict(model, other)
    with pytest.raises(SpftError, match=f"{type(optimizer).__name__}'s moments belong to positions of before another"):
        step(model, optimizer)
    # each is done about them: the state that belongs to the mask, one that begins anew, one that is brought to it
    optimizer.load_state_dict(of_other.state_dict())
    step(model, optimizer)
    install(model, [2])
    optimizer.state.clear()
    step(model, optimizer)
    for tensor in optimizer.state[values_of(model)].values():
        tensor.zero_()
    install(model, [3])
    step(model, optimizer)
    install(model, [0])
    with pytest.raises(SpftError, match="moments belong to positions of before another"):
        step(model, optimizer)
    step(model, kind(model.parameters(), lr=0.1))


def test_the_recorded_slots_are_those_of_the_mask_of_now():
    def optimizer_of(model):
        return SparseAdamW(model.parameters(), lr=0.1, slots=slots_of(adapted_layers(model), "default"))

    model, other, third = one_layer([1]), one_layer([4]), one_layer([5])
    optimizers = [optimizer_of(each) for each in (model, other, third)]
    for each, optimizer in zip((model, other, third), optimizers):
        step(each, optimizer)
    loaded_by_load_state_dict(model, other)
    with pytest.raises(SpftFileError, match="belongs to another mask"):
        optimizers[0].load_state_dict(optimizers[2].state_dict())
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert optimizers[0].param_groups[0]["slots"] == slots_of(adapted_layers(other), "default")


def test_a_graph_from_before_the_change_is_refused_by_autograd():
    model = one_layer([1])
    loss = model(torch.ones(1, 3)).square().sum()
    install(model, [4])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Rows(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        return {name: tensor[0] for name, tensor in token_batch(rows=1, seed=index).items()}


def trainer_of(folder, selected_on: dict, steps: int = 4) -> Trainer:
    model = get_peft_model(tiny_llama(torch.bfloat16), SpftConfig(density=0.02))
    select_mask(model, [selected_on])
    optimizer = SparseAdamW(model.parameters(), lr=0.01, slots=slots_of(adapted_layers(model), "default"))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
        use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, None))


def test_resumed_with_an_optimizer_from_before_is_uninterrupted(tmp_path):
    whole = trainer_of(tmp_path / "whole", BATCHES[0])
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", BATCHES[1])
    of_now = mask_checksum(slots_of(adapted_layers(resumed.model), "default"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, got = (get_peft_model_state_dict(each.model) for each in (whole, resumed))
    assert mask_checksum(slots_of(adapted_layers(resumed.model), "default")) != of_now
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (whole, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("way", ["accelerate", "load_adapter"])
def test_other_ways_to_go_on(tmp_path, way):
    def prepared(selected_on):
        accelerator = Accelerator(cpu=True)
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.02))
        select_mask(model, [selected_on])
        model, optimizer = accelerator.prepare(model, SparseAdamW(model.parameters(), lr=0.01))
        return accelerator, model, optimizer

    def steps(model, optimizer, count):
        for number in range(count):
            optimizer.zero_grad()
            model(**token_batch(seed=10 + number)).loss.backward()
            optimizer.step()

    accelerator, model, optimizer = prepared(BATCHES[0])
    steps(model, optimizer, 2)
    accelerator.save_state(tmp_path / "state")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(model, optimizer, 2)
    accelerator, again, optimizer_again = prepared(BATCHES[1])
    if way == "accelerate":
        accelerator.load_state(tmp_path / "state")
    else:
        again.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
        optimizer_again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(again, optimizer_again, 2)
    for one, other in zip(adapted_layers(model).values(), adapted_layers(again).values()):
        assert torch.equal(one.spft_values["default"], other.spft_values["default"])
        assert torch.equal(one.mask("default").columns, other.mask("default").columns)
