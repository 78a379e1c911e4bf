"""`select_mask` against a full sort of the gradients that autograd computes."""

from __future__ import annotations

import random
import warnings
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.budget import layer_budgets, total_budget
from axolotl_spft.errors import SpftConfigError, SpftError, SpftFileError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.salience import compute, mask_file, orchestrate
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.balanced import score as balanced_score
from axolotl_spft.salience.metrics.statistics import Statistics
from axolotl_spft.salience.sample_pass import collect_statistics
from tests.models import ARCHITECTURES, same_weights, tiny_llama, token_batch, weights_of, with_adapter
from tests.salience.test_select import sorted_top_k, sorted_top_k_per_row

BATCHES = [token_batch(rows=2, seed=seed) for seed in range(5)]


def chosen(model, adapter_name: str = "default") -> dict[str, list[int]]:
    return {
        name: positions(layer.mask(adapter_name), layer.in_features).tolist()
        for name, layer in adapted_layers(model).items()
        if adapter_name in layer.spft_values
    }


def dense_gradients(architecture: str, names, count: int, **changes) -> list[torch.Tensor]:
    """What autograd gives for the weights themselves: (out_features, in_features) each."""
    model = ARCHITECTURES[architecture](**changes)
    for batch in BATCHES[:count]:
        model(**batch).loss.backward()
    gradients = [model.get_submodule(name).weight.grad for name in names]
    return [gradient.t().contiguous() if architecture == "gpt2" else gradient for gradient in gradients]


def expected_positions(config: SpftConfig, scores: list[torch.Tensor]) -> list[list[int]]:
    shapes = [tuple(score.shape) for score in scores]
    budget = (config.density, config.num_values, config.match_lora_rank)
    if config.scope == "global":
        return [part.tolist() for part in sorted_top_k(scores, total_budget(shapes, *budget))]
    counts = layer_budgets(shapes, *budget)
    if config.scope == "row":
        return [sorted_top_k_per_row(score, count).tolist() for score, count in zip(scores, counts)]
    return [sorted_top_k([score], count)[0].tolist() for score, count in zip(scores, counts)]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("scope", ["layer", "global", "row"])
@pytest.mark.parametrize("salience", ["gradient", "balanced", "magnitude"])
def test_the_mask_is_that_of_a_full_sort(architecture, scope, salience):
    config = SpftConfig(density=0.03, scope=scope, salience=salience, samples=6)
    model = get_peft_model(ARCHITECTURES[architecture](), config)
    report = select_mask(model, BATCHES)
    names = list(adapted_layers(model))
    gradients = dense_gradients(architecture, names, 3)
    if salience == "magnitude":
        scores = [layer.get_base_weight().abs() for layer in adapted_layers(model).values()]
    else:
        scores = [
            gradient.abs()
            if salience == "gradient"
            else balanced_score(Statistics(gradient.shape, collected={"gradient": gradient}))
            for gradient in gradients
        ]
    got = chosen(model)
    for name, expected, score in zip(names, expected_positions(config, scores), scores, strict=True):
        if got[name] == expected:
            continue
        # autograd sums in another order: entries that differ by its rounding may change places at the threshold
        differing = torch.tensor(sorted(set(got[name]) ^ set(expected)))
        values = score.flatten()[differing]
        assert scope != "layer" or len(got[name]) == len(expected)
        assert len(differing) <= 2
        assert values.max() - values.min() <= 1e-5 * score.max()
    assert report.selected == sum(map(len, got.values()))
    assert report.samples == (0 if salience == "magnitude" else 6)
    assert (model.peft_config["default"].nnz, report.entries) == (
        report.selected,
        sum(score.numel() for score in scores),
    )


@pytest.mark.parametrize("salience", ["gradient", "balanced", "magnitude", "random"])
def test_two_runs_give_one_mask(salience):
    masks = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, salience=salience, samples=4, seed=5))
        select_mask(model, BATCHES)
        masks.append(chosen(model))
    assert masks[0] == masks[1]


def test_random_masks_follow_the_seed():
    masks = []
    for seed in (1, 2):
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, salience="random", seed=seed))
        select_mask(model, None)
        masks.append(chosen(model))
    assert masks[0] != masks[1]


@pytest.mark.parametrize("budget", [{"density": 0.01}, {"num_values": 33}, {"match_lora_rank": 2}])
def test_the_budget_is_met_exactly(budget):
    model = get_peft_model(tiny_llama(), SpftConfig(samples=2, **budget))
    report = select_mask(model, BATCHES)
    shapes = [(layer.out_features, layer.in_features) for layer in adapted_layers(model).values()]
    assert report.selected == total_budget(shapes, **budget)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradient_checkpointing_gives_the_same_mask(checkpointing):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=6))
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    select_mask(model, BATCHES)
    plain = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=6))
    select_mask(plain, BATCHES)
    assert chosen(model) == chosen(plain)


def test_no_trace_is_left():
    base = tiny_llama(attention_dropout=0.5)
    model = get_peft_model(base, SpftConfig(density=0.03, samples=4, modules_to_save=["lm_head"]))
    model.train()
    model.base_model.model.model.layers[0].eval()
    trained = next(p for n, p in model.named_parameters() if "modules_to_save" in n)
    trained.grad = torch.ones_like(trained)
    weights = weights_of(tiny_llama(attention_dropout=0.5))
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters() if "spft_values" not in n}

    def hooks():
        return sum(
            len(module._forward_hooks) + len(module._backward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        )

    before = hooks()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = (random.random(), np.random.rand(), torch.rand(3).tolist())
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    select_mask(model, BATCHES)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected
    assert hooks() == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters() if "spft_values" not in n} == flags
    assert torch.equal(trained.grad, torch.ones_like(trained))
    assert all(p.grad is None for p in model.parameters() if p is not trained)
    trained.grad = None
    assert same_weights(model.unload(), weights)


def test_the_pass_stops_at_the_sample():
    read = []

    def batches():
        for batch in BATCHES:
            read.append(batch)
            yield batch

    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=3))
    assert select_mask(model, batches()).samples == 4
    assert len(read) == 2


def test_a_loss_function_of_the_user():
    def loss_fn(model, batch):
        return -model(**batch).loss

    masks = []
    for loss in (None, loss_fn):
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=4))
        select_mask(model, BATCHES, loss)
        masks.append(chosen(model))
    assert masks[0] == masks[1]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"salience": "random"}, ["`salience: random` is not read", "was made with magnitude"]),
        ({"scope": "row"}, ["`scope: row` is not read"]),
        ({"salience": "magnitude", "score_after": 5}, ["`score_after: 5` is not read", "was made without"]),
        ({"density_pattern": {"q_proj": 0.03}}, ["`density_pattern: {'q_proj': 0.03}` is not read"]),
        ({"samples": 5, "seed": 1, "lift_rank": 3}, []),
    ],
)
def test_options_that_a_saved_mask_was_not_made_with_are_told(tmp_path, changes, parts):
    options = {"num_values": 300, "salience": "magnitude", "mask_path": str(tmp_path / "mask.safetensors")}
    select_mask(get_peft_model(tiny_llama(), SpftConfig(**options)), None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        select_mask(get_peft_model(tiny_llama(), SpftConfig(**(options | changes))), None)
    said = [str(each.message) for each in caught if "is not read" in str(each.message)]
    assert len(said) == bool(parts) and all(part in said[0] for part in parts)


def test_mask_path_saves_and_reads(tmp_path):
    path = tmp_path / "masks" / "mask.safetensors"
    first = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=4, mask_path=str(path)))
    select_mask(first, BATCHES)
    assert path.is_file()
    second = get_peft_model(tiny_llama(), SpftConfig(density=0.03, mask_path=str(path)))
    report = select_mask(second, None)
    assert chosen(second) == chosen(first)
    assert str(path) in str(report)
    assert second.peft_config["default"].mask_source == first.peft_config["default"].mask_source

    first.save_pretrained(tmp_path / "adapter")
    third = get_peft_model(
        tiny_llama(), SpftConfig(density=0.03, mask_path=str(tmp_path / "adapter" / "adapter_model.safetensors"))
    )
    select_mask(third, None)
    assert chosen(third) == chosen(first)

    other = get_peft_model(tiny_llama(), SpftConfig(density=0.05, mask_path=str(path)))
    with pytest.raises(SpftFileError, match=r"but the config asks for .* set `num_values: "):
        select_mask(other, None)
    wider = get_peft_model(tiny_llama(hidden_size=40), SpftConfig(density=0.03, mask_path=str(path)))
    with pytest.raises(SpftFileError, match=r"damaged or belongs to another model.*\. Name another `mask_path`"):
        select_mask(wider, None)


def test_a_second_adapter_gets_a_mask_of_its_own():
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=4))
    select_mask(model, BATCHES)
    first = chosen(model)
    model.add_adapter("other", SpftConfig(density=0.05, salience="magnitude", target_modules=["q_proj"]))
    model.set_adapter("other")
    select_mask(model, None)
    assert len(chosen(model, "other")) == 2
    assert chosen(model) == first


def test_an_adapter_is_chosen_once(tmp_path):
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=4))
    select_mask(model, BATCHES)
    with pytest.raises(SpftError, match="`default` has a mask already"):
        select_mask(model, BATCHES)
    model.save_pretrained(tmp_path)
    with pytest.raises(SpftError, match="has a mask already"):
        select_mask(PeftModel.from_pretrained(tiny_llama(), tmp_path), BATCHES)


@pytest.mark.parametrize("batches", [None, []])
def test_no_batches_is_an_error(batches):
    model = get_peft_model(tiny_llama(), SpftConfig())
    with pytest.raises(SpftError, match="found no batches"):
        select_mask(model, batches)


def test_batches_without_labels_are_an_error():
    model = get_peft_model(tiny_llama(), SpftConfig())
    with pytest.raises(SpftError, match="gave no loss: put `labels` into the batches"):
        select_mask(model, [{"input_ids": BATCHES[0]["input_ids"]}])


class Reads(torch.nn.Module):
    """Reads one weight without calling its module, as Mamba does with that of dt_proj."""

    def __init__(self):
        super().__init__()
        self.called, self.read = torch.nn.Linear(5, 7), torch.nn.Linear(5, 7)

    def forward(self, x):
        return self.called(x) * (x @ self.read.weight.t())


def test_modules_that_no_gradient_reaches_are_named():
    model = get_peft_model(Reads(), SpftConfig(target_modules=["called", "read"], density=0.2))
    with pytest.warns(UserWarning, match="no gradient reached read on the sample"):
        select_mask(model, [{"x": torch.randn(3, 5)}], lambda model, batch: model(**batch).sum())


def test_gradients_that_are_not_finite_are_an_error_that_changes_nothing():
    model = get_peft_model(tiny_llama(), SpftConfig(samples=2))
    with pytest.raises(SpftError, match="is not finite on the sample"):
        select_mask(model, BATCHES, lambda model, batch: model(**batch).loss * float("nan"))
    assert all(layer.mask("default").nnz == 0 for layer in adapted_layers(model).values())
    select_mask(model, BATCHES)


def test_too_many_values_is_an_error():
    model = get_peft_model(tiny_llama(), SpftConfig(num_values=10**6, salience="magnitude"))
    with pytest.raises(SpftConfigError, match="asks for 1,000,000 values"):
        select_mask(model, None)


def test_random_adapters_keep_their_mask():
    with pytest.raises(SpftError, match="has a mask already"):
        select_mask(with_adapter(tiny_llama()), BATCHES)


def test_memory_is_given_back_once_the_accumulators_are_gone(monkeypatch):
    accumulators, alive = [], []

    def collected(*args):
        found = collect_statistics(*args)
        accumulators.extend(weakref.ref(total) for sums in found.sums.values() for total in sums.values())
        return found

    monkeypatch.setattr(compute, "collect_statistics", collected)
    monkeypatch.setattr(
        orchestrate, "give_back_memory", lambda: alive.append(sum(total() is not None for total in accumulators))
    )
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=2))
    select_mask(model, BATCHES)
    assert len(accumulators) == len(adapted_layers(model))
    assert alive == [0]


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"scope": "global"}, {"scope": "row"}, {"salience": "balanced"}, {"salience": "random"}], ids=str
)
def test_torchs_default_dtype_does_not_matter(options, dtype):
    def masks():
        # not the model's own calculation, which the default changes
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.05, samples=2, **options))
        select_mask(model, [{"seed": 0}, {"seed": 1}], loss_of_weights)
        return chosen(model)

    expected = masks()
    with default_dtype(dtype):
        assert masks() == expected


def loss_of_weights(model, batch: dict) -> torch.Tensor:
    """A loss of the sparse layers alone, in float32."""
    generator = torch.Generator().manual_seed(batch["seed"])
    return sum(
        layer(torch.randn(3, layer.in_features, generator=generator, dtype=torch.float32)).square().sum()
        for layer in adapted_layers(model).values()
    )


def test_a_mask_that_cannot_be_written_is_found_before_the_pass(tmp_path):
    (tmp_path / "file").touch()
    model = get_peft_model(tiny_llama(), SpftConfig(mask_path=str(tmp_path / "file" / "mask.safetensors")))
    with pytest.raises(SpftFileError, match="nothing can be written to"):
        select_mask(model, BATCHES, lambda *_: pytest.fail("the pass ran"))


def test_a_mask_that_could_not_be_written_costs_the_file_alone(tmp_path, monkeypatch):
    model = get_peft_model(tiny_llama(), SpftConfig(samples=2, mask_path=str(tmp_path / "mask.safetensors")))
    monkeypatch.setattr(mask_file, "save_file", disk_is_full)
    with pytest.warns(UserWarning, match=r"could not be saved to .*mask\.safetensors"):
        report = select_mask(model, BATCHES)
    assert model.peft_config["default"].nnz == report.selected > 0
    assert list(tmp_path.iterdir()) == []


def disk_is_full(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_mask_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = SpftConfig(salience="random", mask_path="~/masks/mask.safetensors")
    report = select_mask(get_peft_model(tiny_llama(), config), None)
    assert (tmp_path / "masks" / "mask.safetensors").is_file()
    again = select_mask(get_peft_model(tiny_llama(), config), None)
    assert again.selected == report.selected and "mask.safetensors" in again.source


def test_embeddings_that_are_changed_in_place():
    def loss(model, batch):
        hidden = model.get_input_embeddings()(batch["input_ids"])
        hidden += 1
        return model(inputs_embeds=hidden, labels=batch["labels"]).loss

    model = get_peft_model(tiny_llama(), SpftConfig(samples=2))
    assert select_mask(model, BATCHES, loss).selected > 0


def test_rotary_embeddings_that_grow_with_the_sample_do_not_stay_grown():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = get_peft_model(tiny_llama(max_position_embeddings=16, rope_parameters=rope), SpftConfig(samples=2))
    with torch.no_grad():
        select_mask(model, [token_batch(length=40)])
        # what a text leaves behind decides about the longer ones that are shorter than it was
        expected = tiny_llama(max_position_embeddings=16, rope_parameters=rope)
        batch = token_batch(length=20)
        assert torch.equal(model(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_that_has_run(in_place):
    expected, model = (get_peft_model(tiny_llama(), SpftConfig(samples=2)) for _ in range(2))
    # in evaluation: training an adapter without a mask is refused
    expected.eval(), model.eval()
    select_mask(expected, BATCHES)
    if in_place:
        model.compile(backend="eager")
    else:
        model.base_model.model.model = torch.compile(model.base_model.model.model, backend="eager")
    model(**BATCHES[0])
    select_mask(model, BATCHES)
    assert list(chosen(model).values()) == list(chosen(expected).values())


def test_within_inference_mode():
    model = get_peft_model(tiny_llama(), SpftConfig(samples=2))
    with torch.inference_mode():
        assert select_mask(model, BATCHES).selected > 0
    model(**BATCHES[0]).loss.backward()
