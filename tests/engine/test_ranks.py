"""Selection and collection on several ranks equal those on one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from axolotl_spft import SpftConfig, select_mask
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.errors import SpftError, SpftMemoryError
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.salience import collect
from axolotl_spft.salience.collect import gathered_gradients
from axolotl_spft.salience.hessian import BY_AUTOGRAD
from axolotl_spft.salience.install import adapted_layers, check_same_mask
from axolotl_spft.salience.metrics.balanced import score as balanced_score
from axolotl_spft.salience.metrics.statistics import GRADIENT, HESSIAN_GRADIENT, Statistics
from axolotl_spft.salience.sample_pass import collect_statistics
from axolotl_spft.salience.select import top_k, top_k_per_row
from tests.engine.processes import on_ranks
from tests.models import tiny_llama, token_batch
from tests.salience.test_select import KINDS, score_matrices
from tests.tuner.test_quantized import quantize

COUNTS = (1, 2, 50, 333, 334)
SHARES = (
    {"pattern": "block", "block_size": [4, 5]},
    {"pattern": "block", "block_size": [7, 3], "scope": "global", "max_density": 0.1},
    {"density_pattern": {"q_proj": 0.1, r"layers\.1\.mlp\.down_proj": 0.01}},
    {"density_pattern": {"up_proj": 0.08}, "scope": "global", "min_density": 0.02, "max_density": 0.04},
    {"score_after": 2},
    {"score_after": 3, "salience": "snip", "scope": "row"},
)
REPAIRS = ({}, {"salience": "magnitude", "scope": "row"}, {"scope": "global", "salience": "snip"})
CASES = (("global", "gradient"), ("row", "balanced"), ("layer", "magnitude"))


def select_everything() -> list[torch.Tensor]:
    ranks, selected = Ranks.current(), []
    for kind in KINDS:
        scores = score_matrices(kind)
        shapes = [tuple(matrix.shape) for matrix in scores]
        mine = [matrix[ranks.rows(matrix.shape[0])] for matrix in scores]
        for count in COUNTS:
            selected += top_k(lambda index, mine=mine: mine[index], shapes, count, ranks)
        for part, shape in zip(mine, shapes):
            selected.append(top_k_per_row(part, shape, max(1, shape[0] * shape[1] // 3), ranks))
        balanced = [
            balanced_score(Statistics(shape, ranks=ranks, collected={"gradient": part}))
            for part, shape in zip(mine, shapes)
        ]
        selected += [ranks.concatenate(part.flatten()) for part in balanced]
    return selected


def repaired_masks(folder: str) -> list:
    """Positions, originals and errors of a quantized base whose folder is there already, by scope."""
    ranks, found = Ranks.current(), []
    for options in REPAIRS:
        config = SpftConfig(density=0.03, samples=12, repair=0.5, repair_from=f"{folder}/base", **options)
        model = get_peft_model(quantize(tiny_llama(), "4bit"), config)
        batches = [token_batch(rows=1, seed=seed) for seed in range(12)]
        errors = select_mask(model, batches[ranks.rank :: ranks.world]).errors
        layers = adapted_layers(model)
        found.append([positions(layer.mask("default"), layer.in_features).tolist() for layer in layers.values()])
        found.append([layer.originals("default").tolist() for name, layer in layers.items() if name in errors])
        found.append([number for error in errors.values() for number in error])
    return found


def everything(folder: str) -> dict:
    return {
        "selected": select_everything(),
        "masks": [mask_of_model(*case) for case in CASES],
        "shares": [mask_with(options) for options in SHARES],
        "too large": masks_where_one_gpu_is_too_small(),
        "tracked": tracked_bytes(),
        "refused": differing_masks(),
        "half": mask_on_one_node(folder),
        "out of memory": mask_after_one_rank_ran_out_of_memory(),
        "repaired": repaired_masks(folder),
    }


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    tiny_llama().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def by_rank(nodes):
    """What each of two ranks found."""
    return on_ranks(2, everything, str(nodes))


def test_selection_on_shards_is_that_of_one_process(by_rank):
    expected = select_everything()
    # one of the matrices has fewer rows than there are ranks
    for got in (found["selected"] for found in by_rank):
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def mask_of_model(scope: str, salience: str) -> tuple[list[list[int]], int]:
    ranks = Ranks.current()
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, scope=scope, salience=salience, samples=12))
    batches = [token_batch(rows=1, seed=seed) for seed in range(12)]
    report = select_mask(model, batches[ranks.rank :: ranks.world])
    return [
        positions(layer.mask("default"), layer.in_features).tolist() for layer in adapted_layers(model).values()
    ], report.samples


def test_ranks_read_their_share_and_end_with_one_mask(by_rank):
    expected = [mask_of_model(*case) for case in CASES]
    assert [found["masks"] for found in by_rank] == [expected, expected]


def test_a_repaired_base_is_the_same_on_ranks_that_read_their_rows(by_rank, nodes):
    expected = repaired_masks(str(nodes))
    for got in (found["repaired"] for found in by_rank):
        assert got[0::3] == expected[0::3] and got[1::3] == expected[1::3]
        for one, other in zip(got[2::3], expected[2::3]):
            assert one == pytest.approx(other, rel=1e-5)
    assert sum(map(len, expected[1])) > 100


class StepsOfTwo(list):
    """Batches of which one process trains two in a step, as two ranks do."""

    batches_per_step = 2


def mask_with(options: dict) -> list[list[int]]:
    ranks = Ranks.current()
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=12, **options))
    batches = [token_batch(rows=1, seed=seed) for seed in range(12)]
    mine = batches[ranks.rank :: 2] if ranks.world > 1 else StepsOfTwo(batches)
    # the mean of two ranks' gradients is the sum of halves
    scale = 1 if ranks.world > 1 else 0.5
    select_mask(model, mine, lambda model, batch: scale * model(**batch).loss, learning_rate=0.02)
    return [positions(layer.mask("default"), layer.in_features).tolist() for layer in adapted_layers(model).values()]


def test_blocks_own_densities_bounds_and_warm_ups_on_ranks(by_rank):
    expected = [mask_with(options) for options in SHARES]
    assert [found["shares"] for found in by_rank] == [expected, expected]
    # what each option asks for is there at all
    assert len({str(mask) for mask in (*expected, mask_with({}), mask_with({"scope": "global"}))}) == len(SHARES) + 2


def masks_where_one_gpu_is_too_small() -> tuple[list, bool]:
    """The same where rank 1 alone has no room for whole accumulators; and whether each rank had its rows only."""
    ranks, entries = Ranks.current(), []

    def fits(count: int, *_) -> bool:
        entries.append(count)
        return ranks.rank == 0 or count < max(entries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "fits", fits)
        masks = [mask_of_model(*case) for case in CASES]
    # of the question for all entries, and of that for what is then made
    return masks, min(entries) < 0.6 * max(entries)


def test_ranks_share_rows_where_one_has_no_room_for_all(by_rank):
    expected = [mask_of_model(*case) for case in CASES]
    assert [found["too large"] for found in by_rank] == [(expected, True), (expected, True)]


def mask_after_one_rank_ran_out_of_memory() -> tuple[list[str], list[list[int]]]:
    """What rank 0, then rank 1, then both say, of which each runs out in another batch; and the mask afterwards."""
    ranks, said = Ranks.current(), []
    model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, samples=12))
    batches = [token_batch(rows=1, seed=seed) for seed in range(12)][ranks.rank :: ranks.world]

    def run_out(module, args, kwargs):
        if kwargs["input_ids"] is failing["input_ids"]:
            raise torch.OutOfMemoryError(f"CUDA out of memory. On rank {ranks.rank}")

    handle = model.base_model.model.register_forward_pre_hook(run_out, with_kwargs=True)
    for failed in ([0], [1], [0, 1]):
        failing = batches[2] if ranks.rank in failed else {"input_ids": None}
        try:
            select_mask(model, batches)
        except SpftMemoryError as error:
            said.append(str(error).partition(": lower")[0])
    handle.remove()
    select_mask(model, batches)
    return said, [positions(layer.mask("default"), layer.in_features).tolist()
                  for layer in adapted_layers(model).values()]  # fmt: skip


def test_out_of_memory_on_one_rank_is_told_on_all_and_tried_again(by_rank):
    whys = ("CUDA out of memory. On rank 0", "CUDA out of memory. On rank 1", "on another rank")
    told = [f"the salience pass ran out of memory ({why})" for why in whys]
    (first, mask), (second, same) = (found["out of memory"] for found in by_rank)
    assert first == [told[0], told[2], told[0]]
    assert second == [told[2], told[1], told[1]]
    assert mask == same == mask_of_model("layer", "gradient")[0]


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes at a time of tensors whose shape is a weight's, or that of some of its rows."""

    def __init__(self, shapes: set[tuple[int, int]], known: list[torch.Tensor]):
        super().__init__()
        self.shapes, self.live, self.peak = shapes, {}, 0
        self.known = {tensor.data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in self.shapes:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
                    if self.live_bytes() > self.peak:
                        # the threads of gloo let go a moment after their operation has ended
                        time.sleep(0.1)
                        self.peak = max(self.peak, self.live_bytes())
        return result

    def live_bytes(self) -> int:
        self.live = {at: each for at, each in self.live.items() if not each[0].expired()}
        return sum(nbytes for _, nbytes in self.live.values())


def tracked_bytes() -> tuple[int, int, int, bool]:
    ranks = Ranks.current()
    model = tiny_llama()
    layers = {name: layer for name, layer in model.named_modules() if "_proj" in name}
    model.requires_grad_(False)
    shapes = {(layer.out_features, layer.in_features) for layer in layers.values()}
    shapes |= {(out_features // 2 + extra, in_features) for out_features, in_features in shapes for extra in (0, 1)}
    dense = {name: torch.zeros(layer.out_features, layer.in_features) for name, layer in layers.items()}
    for seed in range(ranks.world):
        copy = tiny_llama()
        copy(**token_batch(seed=seed)).loss.backward()
        for name in dense:
            dense[name] += copy.get_submodule(name).weight.grad
    with gathered_gradients(model, layers, ranks, sharded=True) as sums:
        accumulators = sum(total.nbytes for total in sums.values())
        tracker = LiveBytes(shapes, [*model.parameters(), *sums.values()])
        with tracker:
            model(**token_batch(seed=ranks.rank)).loss.backward()
        right = all(
            torch.allclose(total, dense[name][ranks.rows(dense[name].shape[0])], rtol=1e-5, atol=1e-6)
            for name, total in sums.items()
        )
    return tracker.peak, accumulators, 4 * max(layer.weight.numel() for layer in layers.values()), right


def test_a_sharded_pass_holds_its_accumulators_and_one_dense_gradient(by_rank):
    whole = sum(4 * layer.weight.numel() for name, layer in tiny_llama().named_modules() if "_proj" in name)
    for peak, accumulators, largest, right in (found["tracked"] for found in by_rank):
        assert right
        assert accumulators == whole / 2
        # beside the accumulators, which were made before
        assert 0 < peak <= largest


def loss_that_writes(model, batch) -> torch.Tensor:
    """As TRL's losses, which divide the logits by a temperature in place; half of the model's own."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    logits.div_(2).mul_(2)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()) / 2


def summed_gradients(model, layers, loss_fn, ranks: Ranks) -> dict[str, torch.Tensor]:
    batches = [token_batch(rows=1, seed=ranks.rank)]
    return collect_statistics(model, layers, {GRADIENT}, batches, loss_fn, 2, ranks).sums[GRADIENT]


def _shape_of(layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def partitioned_pass() -> tuple[int, int, list[int], bool]:
    """Of a ZeRO-3 pass, and of one that differentiates twice: the most bytes at a time in matrices as large as a
    weight. Further the weights' own in float32, and whether these are in parts again.
    """
    # before deepspeed is imported: it would look for an accelerator
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(Ranks.current().rank)}
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    deepspeed.init_distributed("gloo")
    held = HfDeepSpeedConfig(config)
    with deepspeed.zero.Init(config_dict_or_path=config):
        base = tiny_llama()
    ranks, model = Ranks.current(), get_peft_model(base, SpftConfig(density=0.03))
    layers = adapted_layers(model)
    shapes = set(map(_shape_of, layers.values()))
    with LiveBytes(shapes, []) as tracker:
        sums = summed_gradients(model, layers, None, ranks)
    batches = [token_batch(rows=1, seed=ranks.rank)]
    with LiveBytes(shapes, []) as twice:
        found = collect_statistics(model, layers, {HESSIAN_GRADIENT}, batches, None, 2, ranks)
    assert found.notes == {"hessian": BY_AUTOGRAD}
    # this rank's rows of the gradient, of H g and of what a batch adds to it have the shape of another layer's weight
    parts = sum(4 * out // 2 * width for out, width in map(_shape_of, layers.values()) if (out // 2, width) in shapes)
    writing = summed_gradients(model, layers, loss_that_writes, ranks)
    for name, total in sums.items():
        torch.testing.assert_close(writing[name], total / 2)
    assert held.is_zero3()
    partitioned = [parameter.numel() == 0 for parameter in base.parameters() if hasattr(parameter, "ds_id")]
    sizes = [4 * layer.out_features * layer.in_features for layer in layers.values()]
    return tracker.peak, twice.peak - 3 * parts, sizes, all(partitioned) and len(partitioned) > len(layers)


def test_a_pass_over_partitioned_weights_never_has_all_gradients_on_a_rank():
    for peak, peak_twice, sizes, partitioned_again in on_ranks(2, partitioned_pass):
        # a gathered weight and what DeepSpeed makes of it; the accumulators are parts
        assert 0 < peak <= 3 * max(sizes) < sum(sizes) / 3
        # or one layer's direction
        assert 0 < peak_twice <= 3 * max(sizes)
        assert partitioned_again


def differing_masks() -> str:
    ranks = Ranks.current()
    base = tiny_llama()
    torch.manual_seed(ranks.rank)
    model = get_peft_model(base, SpftConfig(density=0.03, init_weights=False))
    try:
        return check_same_mask(model, ranks)
    except SpftError as error:
        return str(error)


def mask_on_one_node(folder: str) -> list[str]:
    """What is said about a mask file that one rank alone has, and one that is damaged for it."""
    ranks, said = Ranks.current(), []
    for name, contents in (("absent", [b"mine", None]), ("damaged", [b"torn", b"torn"])):
        path = Path(folder, f"{name}-{ranks.rank}")
        if contents[ranks.rank] is not None:
            path.write_bytes(contents[ranks.rank])
        model = get_peft_model(tiny_llama(), SpftConfig(density=0.03, mask_path=str(path)))
        try:
            select_mask(model, [token_batch()])
        except SpftError as error:
            said.append(str(error))
        if path.exists():
            assert path.read_bytes() == contents[ranks.rank]
    return said


def test_a_mask_file_of_some_nodes_only_is_neither_used_nor_replaced(by_rank):
    for found in by_rank:
        absent, damaged = found["half"]
        assert "exists for 1 of 2 ranks only: copy the file to every node" in absent
        assert "not a complete safetensors file" in damaged


def test_ranks_with_different_masks_refuse_to_train(by_rank):
    assert all("the ranks hold different masks" in found["refused"] for found in by_rank)
