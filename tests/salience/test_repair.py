"""Which entries repair a quantized base, and what their values begin at."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.budget import layer_budgets
from axolotl_spft.checkpoint.base import BaseCheckpoint
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError, SpftFileError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.salience import repair as repair_module
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.salience.metrics.statistics import INPUT_SQUARES
from axolotl_spft.salience.report import relative_errors
from axolotl_spft.salience.sample_pass import collect_statistics
from axolotl_spft.tuner.state import shapes_of
from tests.checkpoint.saved import save_base
from tests.engine.test_ranks import LiveBytes
from tests.models import logits, tiny_llama, token_batch
from tests.quantizers import KINDS, PROJECTIONS, load_quantized, three_bits  # noqa: F401

pytestmark = pytest.mark.usefixtures("three_bits")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), tiny_llama)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """The same in float32."""
    return save_base(tmp_path_factory.mktemp("wide"), tiny_llama, torch.float32)


def batches(seed: int = 0, count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Of different lengths, padded on the left."""
    made = []
    for number in range(count):
        batch = token_batch(rows=2, seed=seed + number)
        mask = torch.ones_like(batch["input_ids"])
        mask[0, : 3 + number] = 0
        made.append({**batch, "labels": batch["labels"].masked_fill(mask == 0, -100), "attention_mask": mask})
    return made


def repaired(base, kind="nf4", dtype=torch.float32, quiet=True, **options):
    model = load_quantized(base, kind, dtype)
    config = SpftConfig(**{"density": 0.1, "samples": 4, "repair": 0.4, "target_modules": PROJECTIONS} | options)
    model = get_peft_model(model, config)
    return model, select_mask(model, batches())


def effective(layer, adapter: str = "default") -> torch.Tensor:
    """The weight that the layer multiplies with."""
    delta, _ = layer._make_delta((adapter,))
    with layer.effective_weight(layer.values(adapter), delta) as weight:
        return weight.clone()


def input_squares(model) -> dict[str, torch.Tensor]:
    """sum of x^2 over the tokens that are no padding, float64, by hooks of their own."""
    found, kept = {}, None

    def hook(name):
        def add(_, args):
            x = args[0].detach().double()[kept]
            found[name] = found.get(name, 0) + x.square().sum(0)

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in adapted_layers(model).items()]
    for batch in batches():
        kept = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "kind, dtype, wide",
    [
        *((kind, torch.float32, False) for kind in KINDS),
        ("nf4", torch.bfloat16, False),
        ("int8", torch.bfloat16, False),
        ("nf4", torch.float32, True),
        ("nf4", torch.bfloat16, True),
        # which is dequantized to float32 all the same
        ("int8", torch.bfloat16, True),
    ],
)
def test_entries_of_the_mask_are_the_unquantized_ones_and_the_others_quantized(base, wide_base, kind, dtype, wide):
    base = wide_base if wide else base
    model, report = repaired(base, kind, dtype)
    error = relative_errors(list(report.errors.values()))
    assert 0.001 < error[0] < 0.5 and error[1] < error[0]
    checkpoint = BaseCheckpoint(base, model.base_model.model)
    quantized = load_quantized(base, kind, dtype)
    # no more than two bytes for each value, where either the checkpoint or the model has as few
    kept = torch.float32 if wide and dtype == torch.float32 else torch.bfloat16
    changed = 0
    for name, layer in adapted_layers(model).items():
        weight, own = effective(layer), layer.quantization_backend.get_base_weight(quantized.get_submodule(name))
        at = positions(layer.mask("default"), layer.in_features)
        wanted = checkpoint.read_matrix(name).to(kept).to(weight.dtype).view(-1)
        assert torch.equal(weight.view(-1)[at], wanted[at])
        changed += int((wanted[at] != own.view(-1)[at]).sum())
        expected = own.clone().view(-1)
        expected[at] = wanted[at]
        assert torch.equal(weight.view(-1), expected)
        assert layer.originals("default").dtype == kept
        assert not layer.values("default").any()
        # what merging adds to the quantized weight
        torch.testing.assert_close((own + layer.get_delta_weight("default")).to(weight.dtype), weight)
    assert changed > 100
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(quantized))
    assert not torch.equal(logits(model), logits(quantized))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_repair_of_everything_is_the_unquantized_model(base, kind):
    model, report = repaired(base, kind, density=1.0, repair=1.0)
    unquantized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    torch.testing.assert_close(logits(model), logits(unquantized), rtol=1e-5, atol=1e-5)
    assert relative_errors(list(report.errors.values()))[0] > 1e-3
    assert relative_errors(list(report.errors.values()))[1] < 1e-9


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
@pytest.mark.parametrize("repair", [0.4, 1.0])
def test_selection_is_a_full_sort_of_the_weighted_error_and_then_of_the_salience(base, scope, repair):
    model, report = repaired(base, scope=scope, repair=repair, salience="magnitude")
    layers = adapted_layers(model)
    squares = input_squares(get_peft_model(load_quantized(base, "nf4"), SpftConfig(target_modules=PROJECTIONS)))
    checkpoint = BaseCheckpoint(base, model.base_model.model)
    shapes = list(shapes_of(layers).values())
    counts = layer_budgets(shapes, density=0.1)
    before = after = whole = 0.0
    taken = {}
    for (name, layer), count in zip(layers.items(), counts):
        weight, quantized = checkpoint.read_matrix(name).double(), layer.read_weight().double()
        error = (weight - quantized).abs() * squares[name].sqrt()
        taken[name] = highest(error, int(repair * count), scope)
        at = positions(layer.mask("default"), layer.in_features)
        assert set(taken[name].tolist()) <= set(at.tolist())
        if scope != "global":
            rest = quantized.abs().clone()
            rest.view(-1)[taken[name]] = -1
            others = highest(rest, count - len(taken[name]), scope)
            assert sorted([*taken[name].tolist(), *others.tolist()]) == at.tolist(), name
        before += error.square().sum()
        error.view(-1)[at] = 0
        after += error.square().sum()
        whole += (weight.square() * squares[name]).sum()
    if scope == "global":
        scores = torch.cat([layer.read_weight().abs().view(-1) for layer in layers.values()])
        offsets = torch.tensor([0, *(a * b for a, b in shapes)]).cumsum(0)
        aside = torch.cat([taken[name] + offset for name, offset in zip(layers, offsets)])
        scores[aside] = -1
        others = scores.sort(descending=True, stable=True).indices[: sum(counts) - len(aside)]
        expected = torch.cat([aside, others]).sort().values
        held = [positions(layer.mask("default"), layer.in_features) for layer in layers.values()]
        assert torch.equal(torch.cat([at + offset for at, offset in zip(held, offsets)]), expected)
    got = relative_errors(list(report.errors.values()))
    assert got == pytest.approx((float(before / whole) ** 0.5, float(after / whole) ** 0.5), rel=1e-5)
    assert 0 < got[1] < got[0]
    assert "Quantization error: ||(W - Q) X||" in str(report) and "repaired" in str(report)


def highest(scores: torch.Tensor, count: int, scope: str) -> torch.Tensor:
    """The positions of the highest scores; of each row where scope is row."""
    if scope != "row":
        return scores.view(-1).sort(descending=True, stable=True).indices[:count].sort().values
    rows, columns = scores.shape
    order = scores.sort(dim=1, descending=True, stable=True)
    quota, rest = divmod(count, rows)
    chosen = [row * columns + order.indices[row, :quota] for row in range(rows)]
    more = order.values[:, quota].sort(descending=True, stable=True).indices[:rest]
    chosen.append(more * columns + order.indices[more, quota])
    return torch.cat(chosen).sort().values


def test_input_statistics_leave_padding_out_forward_and_backward(base):
    model = get_peft_model(load_quantized(base, "nf4"), SpftConfig(target_modules=PROJECTIONS))
    expected, layers = input_squares(model), adapted_layers(model)
    for needs in ({INPUT_SQUARES}, {INPUT_SQUARES, "gradient"}):
        found = collect_statistics(model, layers, needs, batches(), None, 4, Ranks()).sums[INPUT_SQUARES]
        for name, squares in expected.items():
            torch.testing.assert_close(found[name].double(), squares, rtol=1e-5, atol=1e-6)
    # of rows packed into one, whose padding has no label
    one = batches(count=1)[0]
    rows = [row[keep.bool()] for row, keep in zip(one["input_ids"], one["attention_mask"])]
    packed = {
        "input_ids": torch.cat([*rows, torch.zeros(4, dtype=torch.long)])[None],
        "labels": torch.cat([*rows, torch.full((4,), -100)])[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in [*rows, range(4)]])[None],
    }
    found = collect_statistics(model, layers, {INPUT_SQUARES}, [packed], None, 2, Ranks()).sums[INPUT_SQUARES]
    first = next(iter(layers))
    embedded = model.base_model.model.model.layers[0].input_layernorm(model.get_input_embeddings()(torch.cat(rows)))
    torch.testing.assert_close(found[first], embedded.detach().square().sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", [{INPUT_SQUARES}, {INPUT_SQUARES, "gradient"}], ids=len)
def test_padding_is_that_of_the_calls_of_a_loss_that_makes_its_own_batch(base, needs):
    model = get_peft_model(load_quantized(base, "nf4"), SpftConfig(target_modules=PROJECTIONS))
    expected, layers = input_squares(model), adapted_layers(model)

    def rollouts():
        for batch in batches():
            # as a trainer that generates does, of which nothing counts
            with torch.no_grad():
                model(input_ids=batch["input_ids"])
            yield {"made": batch}

    def loss_of(model, batch):
        loss = model(**batch["made"]).loss
        if torch.is_grad_enabled():
            # as a reference is asked before the backward pass
            with torch.no_grad():
                model(
                    input_ids=batch["made"]["input_ids"], attention_mask=torch.ones(2, batch["made"]["labels"].shape[1])
                )
        return loss

    found = collect_statistics(model, layers, needs, rollouts(), loss_of, 2, Ranks()).sums[INPUT_SQUARES]
    for name, squares in expected.items():
        torch.testing.assert_close(found[name].double(), squares, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("salience", ["random", "gradient"])
def test_what_no_gradient_reaches_is_not_repaired_either(base, salience):
    config = SpftConfig(density=0.05, samples=4, repair=0.4, salience=salience, target_modules=PROJECTIONS)
    model = get_peft_model(load_quantized(base, "nf4"), config)

    def loss_of(model, batch):
        return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()

    with pytest.warns(UserWarning, match="no gradient reached model.layers.1"):
        report = select_mask(model, iter(batches()), loss_of)
    assert {name for name, layer in adapted_layers(model).items() if layer.mask("default").nnz} == {
        name for name in adapted_layers(model) if "layers.0" in name
    }
    assert report.selected == round(0.05 * report.entries)


def test_a_pass_over_the_inputs_needs_no_labels_and_names_what_is_not_finite(base):
    config = SpftConfig(density=0.05, samples=4, repair=0.4, salience="random", target_modules=PROJECTIONS)
    model = get_peft_model(load_quantized(base, "nf4"), config)
    unlabelled = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches()]
    assert select_mask(model, unlabelled).samples == 4
    broken = load_quantized(base, "nf4")
    broken.model.layers[0].input_layernorm.weight.data.fill_(1e25)
    with pytest.raises(SpftError, match=r"the input of model\.layers\.0\.self_attn\.q_proj is not finite"):
        select_mask(get_peft_model(broken, config), unlabelled)


@pytest.mark.parametrize("bounds", [{"max_density": 0.12}, {"min_density": 0.105}, {"max_density": 0.2}], ids=str)
@pytest.mark.parametrize("repair", [0.4, 1.0])
def test_bounds_of_the_global_scope_hold_for_what_is_repaired(base, bounds, repair):
    _, report = repaired(base, density=None, match_lora_rank=2, scope="global", repair=repair, **bounds)
    for matrix in report.matrices:
        assert int(bounds.get("min_density", 0) * matrix.entries) <= matrix.selected
        assert matrix.selected <= math.ceil(bounds.get("max_density", 1) * matrix.entries)
    assert report.selected == sum(2 * (matrix.out_features + matrix.in_features) for matrix in report.matrices)


def test_a_share_of_less_than_one_value_is_told(base):
    model, report = repaired(base, density=None, num_values=20, repair=0.2)
    assert "`repair: 0.2` of the few values of each matrix is less than one" in str(report)
    assert all(layer.originals("default") is not None for layer in adapted_layers(model).values())
    _, report = repaired(base, density=None, num_values=100, repair=0.2)
    assert "less than one" not in str(report)
    # in binary 0.29 * 100 is less than 29
    assert repair_module.Repair(None, {"a": None}, 0.29).count("a", 100) == 29


def test_groups_and_a_mask_file_begin_at_the_same_weights(base, tmp_path):
    whole, _ = repaired(base)
    in_groups, _ = repaired(base, salience_memory_gib=1e-5, mask_path=str(tmp_path / "mask"))
    with pytest.warns(UserWarning, match="begin at the unquantized weights all the same"):
        from_file, report = repaired(base, mask_path=str(tmp_path / "mask"), repair=0.1)
    assert "for want of inputs" in str(report)
    with pytest.warns(UserWarning, match=r"`repair: 0\.0` is not read.*begin at 0 all the same"):
        plain, _ = repaired(base, mask_path=str(tmp_path / "mask"), repair=0.0)
    assert not any(layer.originals("default") is not None for layer in adapted_layers(plain).values())
    for one, *others in zip(*(adapted_layers(model).values() for model in (whole, in_groups, from_file))):
        for other in others:
            assert torch.equal(one.mask("default").columns, other.mask("default").columns)
            assert torch.equal(one.originals("default"), other.originals("default"))


def test_what_cannot_be_read_is_told_in_one_sentence(base, tmp_path):
    plain = get_peft_model(tiny_llama(), SpftConfig(repair=0.2))
    with pytest.raises(SpftError, match=r"`repair: 0\.2` .* this one is not quantized: leave it out"):
        select_mask(plain, batches())
    with pytest.raises(SpftFileError, match=r"`repair: 0\.4` reads the unquantized weights.*repair_from"):
        repaired(base, repair_from=str(tmp_path / "nowhere"))
    # one matrix is missing, others have other shapes
    other = save_base(tmp_path / "other", lambda dtype: tiny_llama(dtype, intermediate_size=52), max_shard_size="5GB")
    tensors, own = load_file(other / "model.safetensors"), {}
    for path in base.glob("*.safetensors"):
        own |= load_file(path)
    tensors = {key: own[key] if own[key].shape == tensor.shape else tensor for key, tensor in tensors.items()}
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"the values of 7 of the 14 quantized matrices begin at 0.*q_proj is missing"):
        model, report = repaired(base, repair_from=str(other))
    layers = adapted_layers(model)
    held = {name for name, layer in layers.items() if layer.originals("default") is not None}
    assert held == {name for name in layers if "mlp" not in name and name != "model.layers.1.self_attn.q_proj"}
    assert len(report.errors) == len(held) == 7
    for name in tensors:
        tensors[name] = tensors[name][:1]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpftFileError, match="has the unquantized weight of none of the matrices"):
        repaired(base, repair_from=str(other))
    save_file(tensors | {"a.absmax": torch.zeros(2)}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpftFileError, match=r"was saved quantized.*before it was quantized.*repair_from"):
        repaired(base, repair_from=str(other))
    strange = save_base(tmp_path / "strange", lambda dtype: tiny_llama(dtype).apply(_negated))
    with pytest.raises(SpftFileError, match=r"q_proj in .*strange differs .* by \d+% of itself.*`repair_from`"):
        repaired(base, repair_from=str(strange))
    model = get_peft_model(load_quantized(base, "nf4"), SpftConfig(repair=0.2, salience="random"))
    with pytest.raises(SpftError, match=r"no batches: give at least one, as `repair`"):
        select_mask(model, None)
    model = get_peft_model(load_quantized(base, "3bit"), SpftConfig(repair=0.2, target_modules=PROJECTIONS))
    for layer in adapted_layers(model).values():
        layer.quantization_backend.supports_merge = False
    with pytest.raises(SpftError, match=r"a 3bit layer cannot be read or replaced"):
        select_mask(model, batches())


def _negated(module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data.neg_()


def test_it_loads_without_the_unquantized_weights_and_says_what_it_is(base, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    model, _ = repaired(base, repair_from=str(copy))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.values("default").normal_(std=0.01)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(copy)
    again = PeftModel.from_pretrained(load_quantized(base, "nf4"), tmp_path / "adapter")
    assert torch.equal(logits(again.train()), expected)
    source = again.peft_config["default"].mask_source
    nnz = again.peft_config["default"].nnz
    assert (source["repair"], source["repaired"], source["repair_from"]) == (0.4, nnz, str(copy))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"| values that begin at the weight before quantization | {nnz} |" in card
    assert "the `quantization_config` of the training" in card
    # an unquantized base has the originals itself
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    for layer, own in zip(adapted_layers(plain).values(), adapted_layers(model).values()):
        at = positions(layer.mask("default"), layer.in_features)
        assert torch.equal(effective(layer).view(-1)[at], effective(own).view(-1)[at])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("spft_originals"))
    for broken, message in (
        ({k: t for k, t in tensors.items() if k != key}, "original weights in the file, but it records"),
        (tensors | {key: tensors[key][1:]}, "original weights are torch.bfloat16"),
        (tensors | {key: torch.full_like(tensors[key], torch.nan)}, "an original weight is NaN"),
    ):
        save_file(broken, path, {"format": "pt"})
        with pytest.raises(SpftFileError, match=message):
            PeftModel.from_pretrained(load_quantized(base, "nf4"), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_beside_the_pass_there_is_at_most_one_matrix_in_float32(base, wide_base, dtype, monkeypatch):
    # fewer than a small matrix has
    monkeypatch.setattr(repair_module, "_ROWS", 4)
    folder = base if dtype == torch.bfloat16 else wide_base
    peaks, sizes = [], []
    for repair in (0.0, 0.4):
        model = load_quantized(folder, "nf4", dtype)
        model = get_peft_model(model, SpftConfig(density=0.1, samples=4, repair=repair, target_modules=PROJECTIONS))
        shapes = set(shapes_of(adapted_layers(model)).values())
        sizes = [4 * rows * columns for rows, columns in shapes]
        with LiveBytes(shapes, []) as tracker:
            select_mask(model, batches())
        peaks.append(tracker.peak)
    assert 0 < peaks[0] <= peaks[1] <= peaks[0] + max(sizes)


def test_options_are_checked_together():
    for options, message in (
        ({"repair": 1.5}, "must be a number from 0"),
        ({"repair": "0.2"}, "write 0.2"),
        ({"repair_from": "x"}, "is read with `repair` above 0 alone"),
        ({"repair": 0.2, "pattern": "block"}, "write `pattern: element`"),
        ({"repair": 0.2, "init_weights": False}, "which draws values"),
    ):
        with pytest.raises(SpftError, match=message):
            SpftConfig(**options)
    assert json.loads(json.dumps(SpftConfig(repair=1).to_dict()["repair"])) == 1
