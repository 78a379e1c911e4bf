"""Real trainings on two CPU ranks: the same as one process, whatever the engine."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from axolotl_spft.trainer.prepare import ties_in_zero3
from integration.engines.cases import BASES, RANKS, STEPS, write_case
from integration.engines.figures import figures_of, optimizer_files, same_state
from integration.engines.matrix import problems_of
from integration.engines.run import TrainingFailed, train, train_all
from integration.engines.workspace import make_experts, make_tied, make_workspace

pytestmark = [pytest.mark.engine, pytest.mark.e2e]

# few values over all matrices together: most get none, some fewer than there are ranks; at a relative rate
FEW = {
    "spft": {"num_values": 7, "scope": "global", "samples": 16, "relative_step": True},
    "learning_rate": 0.1,
}
WITH_HEAD = {"density": 0.05, "samples": 16, "modules_to_save": ["lm_head"]}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# one delta of an embedding and a head, and biases
TIED = {"target_modules": ["lm_head", "q_proj", "down_proj"], "bias": "all"}
GRADIENTS = {"gradient_checkpointing": True}


def dynamic(collect: int) -> dict:
    """Re-selections after steps 2 and 4, by so many micro-batches of the step."""
    # after few steps of Adam many values are equal but for rounding, and only their gradients tell them apart
    reselect = {"every": 2, "fraction": 0.3, "collect": collect, "drop": "value_gradient"}
    return {"density": 0.05, "samples": 16, "reselect": reselect}


def repaired(collect: int) -> dict:
    """The same on a base that is repaired."""
    return BASES["4bit"] | {"spft": dynamic(collect) | {"repair": 0.3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def runs(folder):
    """Trains every case: name -> error, or None where it went well."""
    mask = {"density": 0.05, "samples": 16, "mask_path": str(folder / "mask.safetensors")}
    saved = {"lora_model_dir": str(folder / "single_plain")}
    of_experts = {"base_model": str(make_experts(folder))}
    tied = {"base_model": str(make_tied(folder)), "spft": {"density": 0.05, "samples": 16, **TIED}}

    def cases(engine: str, ranks: int = RANKS) -> list:
        def case(name: str, engine: str = engine, **changes):
            return write_case(folder, f"{engine}_{name}", engine, ranks, **changes)

        if engine == "single":
            return [
                case("plain", spft=mask), case("four_bit", **BASES["4bit"]), case("few", **FEW),
                case("head", spft=WITH_HEAD), case("bf16", bf16=True),
                case("continued", **saved), case("repaired", **repaired(4)),
                case("experts", **of_experts, spft=dynamic(4) | EXPERTS),
                case("tied", **tied), case("dynamic", spft=dynamic(4)),
            ]  # fmt: skip
        if engine == "ddp":
            return [
                case("plain", spft={**mask, "mask_path": str(folder / "ddp_mask.safetensors")}, **GRADIENTS),
                case("from_file", spft={**mask, "mask_path": str(folder / "ddp_mask.safetensors")}, **GRADIENTS),
                case("few", **FEW), case("head", spft=WITH_HEAD), case("eight_bit_base", load_in_8bit=True),
                case("repaired", **repaired(2)), case("dynamic", spft=dynamic(2)),
                case("experts", **of_experts, spft=dynamic(2) | EXPERTS),
            ]  # fmt: skip
        return [
            case("few", "zero1", **FEW),
            case("head", "zero2", spft=WITH_HEAD),
            case("experts", "zero2", **of_experts, spft=dynamic(2) | EXPERTS),
            case("bf16", "zero2", bf16=True),
            case("eight_bit", "zero1", optimizer="sparse_adamw_8bit"),
            case("four_bit", "zero2", **BASES["4bit"]),
            case("bf16", "zero1", bf16=True),
            case("repaired", "zero1", **repaired(2)),
            case("eight_bit_base", "zero2", load_in_8bit=True),
            case("plain", "zero2-offload"),
            case("dynamic", "zero2-offload", spft=dynamic(2)),
            case("dynamic_eight_bit", "zero1", spft=dynamic(2), optimizer="sparse_adamw_8bit"),
            case("tied", "zero2", **tied),
            # these last: DeepSpeed and transformers partition every later model of the process
            case("plain", "zero3", spft={**mask, "mask_path": str(folder / "zero3_mask.safetensors")}),
            case("from_file", "zero3", spft={**mask, "mask_path": str(folder / "zero3_mask.safetensors")}),
            case("alone", "zero3", spft={"density": 0.05, "samples": 16}),
            case("few", "zero3", **FEW),
            case("head", "zero3", spft=WITH_HEAD),
            case("dynamic", "zero3", spft=dynamic(2)),
            case("continued", "zero3", **saved),
            case("plain", "zero3-offload"),
            case("bf16", "zero3", bf16=True, **GRADIENTS),
            case("repaired", "zero3", **repaired(2)),
            case("tied", "zero3", **tied, **GRADIENTS),
            case("experts", "zero3", **of_experts, spft=dynamic(2) | EXPERTS, **GRADIENTS),
        ]

    sharded = cases("zero")
    alone = {config: folder / f"{config.stem}.safetensors" for config in sharded if config.stem == "zero3_alone"}
    return train_all(cases("single", 1), 1) | train_all(cases("ddp"), RANKS) | train_all(sharded, RANKS, masks=alone)


def figures(folder, name: str):
    return figures_of(folder / name, STEPS)


@pytest.mark.parametrize(
    "name",
    ["ddp_plain", "ddp_few", "ddp_head", "zero1_few", "zero2_head", "zero2_four_bit", "zero3_plain", "zero3_few",
     "zero3_head", "zero3_continued", "zero2-offload_plain", "zero3-offload_plain", "ddp_repaired", "zero1_repaired",
     "zero3_repaired", "ddp_experts", "zero2_experts", "zero2_tied", "ddp_dynamic", "zero2-offload_dynamic",
     "zero3_dynamic", "zero3_tied", "zero3_experts"],
)  # fmt: skip
def test_equals_one_process(folder, runs, name):
    reference = f"single_{name.partition('_')[2]}"
    if name == "zero3_tied" and not ties_in_zero3():
        assert "is tied to another module, and DeepSpeed" in runs[name]
        return
    assert (runs[name], runs[reference]) == (None, None)
    assert problems_of(figures(folder, name), figures(folder, reference)) == []


def test_a_repaired_base_is_saved_with_its_original_weights(folder, runs):
    names = ["single_repaired", "ddp_repaired", "zero1_repaired", "zero3_repaired"]
    assert [runs[name] for name in names] == [None] * 4
    first, *others = (
        {key: each for key, each in adapter(folder, name).items() if "originals" in key} for name in names
    )
    base = load_file(folder / "base" / "model.safetensors")
    for key, originals in first.items():
        module = key.removeprefix("base_model.model.").removesuffix(".spft_originals")
        assert torch.isin(originals, base[f"{module}.weight"]).all() and originals.numel()
        assert all(torch.equal(other[key], originals) for other in others)
    assert len(first) == 14


def test_a_rate_in_units_of_rms_is_the_same_on_all_engines(folder, runs):
    rates = [
        [entry["learning_rate"] for entry in logged(folder, f"{engine}_few") if "loss" in entry]
        for engine in ("single", "ddp", "zero1", "zero3")
    ]
    assert max(rates[0]) < FEW["learning_rate"]
    assert rates == [rates[0]] * 4


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_bf16_is_close_to_one_process(folder, runs, name):
    """The engines round the values, whose masters they keep, to bf16; one process computes with the masters."""
    assert (runs[name], runs["single_bf16"]) == (None, None)
    losses, expected = figures(folder, name).losses, figures(folder, "single_bf16").losses
    assert losses == pytest.approx(expected, rel=torch.finfo(torch.bfloat16).eps)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_salience_pass_leaves_no_trace(folder, runs, engine):
    assert (runs[f"{engine}_plain"], runs[f"{engine}_from_file"]) == (None, None)
    one, other = (folder / f"{engine}_{name}" / f"checkpoint-{STEPS}" for name in ("plain", "from_file"))
    assert same_state(one, other)
    assert figures(folder, f"{engine}_plain").losses == figures(folder, f"{engine}_from_file").losses


def test_the_mask_command_makes_the_mask_of_the_run_on_all_ranks_and_nothing_else(folder, runs):
    assert (runs["zero3_alone"], runs["zero3_plain"]) == (None, None)
    alone, of_run = (load_file(folder / f"zero3_{name}.safetensors") for name in ("alone", "mask"))
    assert alone.keys() == of_run.keys()
    assert all(torch.equal(alone[key].int(), of_run[key].int()) for key in alone)
    assert not (folder / "zero3_alone").exists()


@pytest.mark.parametrize("name", ["ddp_eight_bit_base", "zero2_eight_bit_base"])
def test_eight_bit_base_trains(folder, runs, name):
    assert runs[name] is None
    losses = figures(folder, name).losses
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("name", "moments", "masters"),
    [("ddp_plain", 8, 0), ("zero2_four_bit", 8, 4), ("zero3_plain", 8, 4), ("zero1_eight_bit", 2.1, 4)],
)
def test_optimizer_state_exists_for_the_values_only(folder, runs, name, moments, masters):
    assert runs[name] is None
    found = figures(folder, name)
    nnz = found.values.numel()
    layers = len([key for key in adapter(folder, name) if key.endswith("spft_values")])
    # each rank's part is rounded up, under ZeRO-3 of every parameter; 8-bit moments have a scale for a part of a block
    padding = RANKS * (layers + 1)
    assert moments * nnz * (0.9 if moments < 8 else 1) <= found.moment_bytes <= moments * (nnz + padding)
    assert masters * nnz <= found.master_bytes <= masters * (nnz + padding)


def test_eight_bit_moments_train_alike(folder, runs):
    assert (runs["zero1_eight_bit"], runs["single_plain"]) == (None, None)
    eight, full = figures(folder, "zero1_eight_bit"), figures(folder, "single_plain")
    assert eight.mask == full.mask
    assert (eight.values - full.values).norm() < 0.2 * full.values.norm()
    assert eight.losses == pytest.approx(full.losses, rel=5e-3)


def test_dynamic_masks_move_under_every_engine(folder, runs):
    names = ("single_dynamic", "ddp_dynamic", "zero1_dynamic_eight_bit", "zero2-offload_dynamic", "zero3_dynamic")
    assert [runs[name] for name in names] == [None] * len(names)
    turnovers = [
        [entry["spft/turnover"] for entry in log if "spft/turnover" in entry]
        for log in (logged(folder, name) for name in names)
    ]
    assert all(each == turnovers[0] and len(each) == 5 and min(each) > 0.25 for each in turnovers)
    eight, full = figures(folder, "zero1_dynamic_eight_bit"), figures(folder, "single_dynamic")
    assert eight.values.numel() == full.values.numel()
    assert eight.losses == pytest.approx(full.losses, rel=5e-3)
    assert figures(folder, "single_plain").mask != full.mask


def logged(folder, name: str) -> list[dict]:
    return json.loads((folder / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]


def adapter(folder, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["ddp_few", "zero1_few", "zero3_few", "zero2_head", "zero3_head"])
def test_the_saved_adapter_is_complete(folder, runs, name):
    assert runs[name] is None
    saved, checkpoint = (
        adapter(folder, name),
        load_file(folder / name / f"checkpoint-{STEPS}/adapter_model.safetensors"),
    )
    assert saved.keys() == checkpoint.keys() == adapter(folder, f"single_{name.partition('_')[2]}").keys()
    values = [tensor for key, tensor in saved.items() if key.endswith("spft_values")]
    nnz = json.loads((folder / name / "adapter_config.json").read_text())["nnz"]
    assert sum(map(torch.numel, values)) == nnz
    assert all((tensor != 0).any() for tensor in values if tensor.numel())
    if name.endswith("few"):
        assert (nnz, min(map(torch.numel, values))) == (7, 0)
    else:
        assert any("lm_head" in key for key in saved)


@pytest.mark.parametrize(
    ("engine", "base", "dies_at"),
    [
        ("ddp", "float", "step:4"),
        ("zero2", "repaired", "checkpoint:2"),
        ("zero3", "4bit", "salience:2"),
        ("zero3", "dynamic", "reselection:20"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(folder, engine, base, dies_at):
    bases = BASES | {"repaired": repaired(1), "dynamic": {"spft": dynamic(1)}}
    fresh, killed = (
        write_case(folder, f"{engine}_{base}_{name}", engine, **bases[base]) for name in ("whole", "killed")
    )
    train(fresh, RANKS)
    train(killed, RANKS, dies_at=dies_at)
    left = sorted(path.name for path in (folder / killed.stem).glob("checkpoint-*"))
    died_with = {"checkpoint:2": ["checkpoint-2", "checkpoint-4"], "salience:2": []}
    assert left == died_with.get(dies_at, ["checkpoint-2"])
    train(killed, RANKS)
    assert (folder / killed.stem / "incomplete-checkpoint-4").is_dir() == (dies_at == "checkpoint:2")
    one, other = (folder / config.stem / f"checkpoint-{STEPS}" for config in (fresh, killed))
    assert same_state(one, other)
    assert figures(folder, fresh.stem).losses == figures(folder, killed.stem).losses


def test_another_world_or_another_mask_is_refused(folder, runs):
    """A checkpoint of two ranks on one, and a ZeRO checkpoint beside the adapter of another mask."""
    assert (runs["ddp_plain"], runs["zero2_bf16"], runs["zero1_few"]) == (None, None, None)
    for name, source in (("alone", "ddp_few"), ("mixed", "zero1_few")):
        shutil.copytree(folder / source / "checkpoint-4", folder / name / "checkpoint-4")
    with pytest.raises(
        TrainingFailed, match=r"was made by 2 ranks under ddp, but this run has 1 under single.*lora_model"
    ):
        train(write_case(folder, "alone", "single", 1, **FEW), 1)
    # as many values elsewhere: what DeepSpeed restores would fit by its size alone
    path = folder / "mixed" / "checkpoint-4" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key, tensor in tensors.items() if key.endswith("spft_columns") and tensor.numel() == 1)
    tensors[key] = (tensors[key].to(torch.int32) ^ 1).to(tensors[key].dtype)
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    assert optimizer_files(path.parent)[0].name.endswith("optim_states.pt")
    with pytest.raises(TrainingFailed, match="belongs to another mask than the adapter's"):
        train(write_case(folder, "mixed", "zero1", **FEW), RANKS)


def test_the_memory_is_announced_once(folder):
    log = train(write_case(folder, "announced", "ddp", max_steps=1, save_steps=1), RANKS)
    assert log.count("Memory per rank") == 1
    assert log.count("on all 2 ranks") == 1
