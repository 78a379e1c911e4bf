"""Masks that come without the model's own `SpftModel`: by state dicts of the base model inside, and in place."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from axolotl_spft import SparseAdamW, SpftConfig
from axolotl_spft.checkpoint.adapter import WEIGHTS_FILE
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.tuner.load import record_mask, recorded_base
from axolotl_spft.tuner.record import read_record
from axolotl_spft.tuner.state import spft_layers
from tests.experts import PARAMETERS, tiny_mixtral
from tests.interpreter import DEVICE
from tests.models import same_weights, tiny_llama, token_batch, weights_of, with_adapter

MODELS = {
    "llama": lambda seed: with_adapter(tiny_llama(num_hidden_layers=1), seed),
    "experts": lambda seed: with_adapter(
        tiny_mixtral(num_hidden_layers=1), seed, target_modules=[], target_parameters=PARAMETERS
    ),
}


def small_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))


def small(seed: int = 0, **options) -> nn.Module:
    base = small_base()
    torch.manual_seed(seed)
    options = {"density": 0.05, "target_modules": ["0", "1"], "init_weights": False} | options
    return get_peft_model(base, SpftConfig(**options)).to(DEVICE)


def run(model: nn.Module) -> list[torch.Tensor]:
    """The loss and the gradients."""
    values = [layer.spft_values["default"] for layer in spft_layers(model).values()]
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        loss = model(**token_batch()).loss
    else:
        loss = model(torch.linspace(-1, 1, 200, device=DEVICE).view(5, 40)).square().sum()
    return [loss, *torch.autograd.grad(loss, values)]


def by_load_state_dict(model: nn.Module, other: nn.Module) -> None:
    model.get_base_model().load_state_dict(other.get_base_model().state_dict())


def by_assigning(model: nn.Module, other: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in other.get_base_model().state_dict().items()}
    model.get_base_model().load_state_dict(state, assign=True)


def in_place(model: nn.Module, other: nn.Module) -> None:
    """As torch.distributed.checkpoint loads: into the tensors that a state dict of the model holds."""
    with torch.no_grad():
        for own, given in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            own.copy_(given)


def in_place_and_loaded(model: nn.Module, other: nn.Module) -> None:
    state = model.state_dict()
    in_place(model, other)
    model.load_state_dict(state)


@pytest.mark.parametrize("load", [by_load_state_dict, by_assigning, in_place, in_place_and_loaded])
@pytest.mark.parametrize("kind", [small, *MODELS.values()], ids=["small", *MODELS])
def test_gradients_are_those_of_the_mask_that_came(kind, load):
    model, other = kind(1), kind(2)
    # so that in place there is room
    for layer, given in zip(spft_layers(model).values(), spft_layers(other).values()):
        assert layer.mask("default").nnz == given.mask("default").nnz
    for _ in range(2):
        run(model)
    load(model, other)
    for _ in range(2):
        assert all(map(torch.equal, run(model), run(other)))
    assert same_weights(model, weights_of(other))


def test_a_mask_of_another_size():
    model, other = small(), small(1, density=0.1)
    run(model)
    by_load_state_dict(model, other)
    assert all(map(torch.equal, run(model), run(other)))


def one_layer(model: nn.Module, other: nn.Module) -> None:
    model.get_base_model()[1].load_state_dict(other.get_base_model()[1].state_dict())


@pytest.mark.parametrize("load", [by_load_state_dict, by_assigning, one_layer])
def test_what_is_saved_records_the_mask_that_came(tmp_path, load):
    model = small()
    record_mask(model.base_model, "default", {"salience": "gradient"})
    load(model, small(1, density=0.1))
    model.save_pretrained(tmp_path)
    config = model.peft_config["default"]
    assert config.nnz == sum(layer.mask("default").nnz for layer in spft_layers(model).values())
    assert config.mask_source is None
    assert read_record(tmp_path / WEIGHTS_FILE)["mask_source"] is None
    loaded = PeftModel.from_pretrained(small_base(), tmp_path).to(DEVICE)
    x = torch.linspace(-1, 1, 200, device=DEVICE).view(5, 40)
    assert torch.equal(loaded(x), model(x))
    # the record of before is no obstacle to what comes next
    by_load_state_dict(model, small())
    model.load_state_dict(small().state_dict())


def test_the_record_of_a_mask_that_came_again_stays():
    model = small()
    record_mask(model.base_model, "default", {"salience": "gradient"})
    state = weights_of(model)
    by_load_state_dict(model, small())
    assert model.peft_config["default"].mask_source == {"salience": "gradient"}
    assert same_weights(model, state)


def test_the_base_of_values_that_came_to_an_adapter_that_is_only_read_is_not_known(tmp_path):
    small(1, density=0.1).save_pretrained(tmp_path)
    for trainable in (False, True):
        model = PeftModel.from_pretrained(small_base(), tmp_path, is_trainable=trainable)
        assert recorded_base(model.base_model, "default")
        by_load_state_dict(model, small())
        model.state_dict()
        assert bool(recorded_base(model.base_model, "default")) == trainable


def test_an_optimizer_refuses_the_moments_of_before():
    model = small()
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def backward():
        for layer, gradient in zip(spft_layers(model).values(), run(model)[1:]):
            layer.spft_values["default"].grad = gradient

    for _ in range(2):
        backward()
        optimizer.step()
    by_load_state_dict(model, small(1))
    backward()
    with pytest.raises(SpftError, match="moments belong to positions of before"):
        optimizer.step()


def without(state: dict, part: str) -> None:
    for name in [name for name in state if part in name]:
        del state[name]


def out_of_range(state: dict, part: str) -> None:
    columns = next(tensor for name, tensor in state.items() if "1.spft_columns" in name)
    columns.view(torch.int16)[-1] = 99


@pytest.mark.parametrize(
    ("change", "part", "message"),
    [
        (without, "1.spft_values", "1: adapter `default`: a mask without its spft_values"),
        (without, "1.spft_columns", "1: adapter `default`: a mask without its spft_columns"),
        (out_of_range, "", r"1: adapter `default`: a column lies outside 0\.\.29"),
    ],
)
def test_a_mask_that_does_not_fit_is_one_clear_error(change, part, message):
    model, other = small(), small(1)
    before = run(model)
    state = {name: tensor.clone() for name, tensor in other.get_base_model().state_dict().items()}
    change(state, part)
    layer = model.base_model.model[1]
    held = [tensor.clone() for tensor in (layer.spft_values["default"], *layer.mask("default"))]
    with pytest.raises(SpftFileError, match=message):
        model.get_base_model().load_state_dict(state, strict=False)
    assert all(map(torch.equal, held, (layer.spft_values["default"], *layer.mask("default"))))
    assert before[0].isfinite()


def test_state_without_the_adapter_leaves_it():
    model = small()
    before = run(model)
    bare = {name: tensor for name, tensor in model.get_base_model().state_dict().items() if "spft" not in name}
    model.get_base_model().load_state_dict(bare, strict=False)
    assert all(map(torch.equal, run(model), before))
