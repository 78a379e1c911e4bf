"""Writes integration/bench/README.md: every record of results/, with the command that measures it.

python -m integration.bench.page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axolotl_spft.bench.options import DEFAULT_RANK, default_mask
from axolotl_spft.bench.report import comparison, sweep_table
from axolotl_spft.bench.shapes import DEFAULT_SHAPE
from axolotl_spft.files import atomic_path
from axolotl_spft.tools.bench import METHODS, SWEEP_METHODS

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "README.md", HERE / "results"

_HEAD = """# Records of the benchmark

Made by `python -m integration.bench.page` from the files in `results/`, whose names head the sections. `axolotl spft bench --help`
tells what is measured.

- `limit` is the frozen model's forward pass and gradient of the inputs, which every adapter must pay. `lora` on a 4-bit base is QLoRA.
- Methods take turns; a step is the median of the rounds, `spread` the distance of the quartiles over it.
- `peak` on a CPU is the resident size of a process of each method's own. `kept` is what a forward pass keeps for backward; `area` the
  share of the weights on a row and a column that the mask uses.
- Models have random weights. `--mask drawn` draws masks as concentrated, and with as many columns in common, as those of a trained
  model (`mask_statistics.json`, which `python -m integration.bench.record_mask_statistics` records).
- In all records but `cpu-fp32-methods` and `cpu-fp32-4bit` the other methods step with torch's default AdamW; the benchmark gives them the
  fused one now, as the trainer does: about 1% of LoRA's step.
- All records are from before weights held W at rest. A step now writes S into the weights and restores them twice, in the forward and in
  the backward pass: on a CPU, for 64 thousand values, it took 0.3% longer. On a GPU that was not measured.

| command | what it measures |
|---|---|
| `integration/bench/gpu.sh` | the shapes of Llama 8B and 70B on one GPU, in under 8 minutes |
| `integration/bench/cpu.sh` | all methods, a 4-bit base and four sweeps on a CPU, in about 35 minutes on 2 cores |
| `make bench` | all methods, on whatever there is |
"""  # noqa: E501

# heading, what has to be known to read the records, their names
_GROUPS = (
    (
        "One NVIDIA H200",
        """\
4,096 tokens; spft trains 0.5% of the linear weights, LoRA of rank 16 0.6% of the 8B's. Made by `gpu.sh`, while CPU
benchmarks ran on the same host: of the nine 4-bit steps of spft three took 361 to 395 ms, the others 330 to 346. With
gradient checkpointing no method keeps much between the passes; then LoRA, whose factors and moments are bf16 here,
peaks lower.""",
        ("gpu-8b-bf16", "gpu-8b-4bit", "gpu-70b-4bit"),
    ),
    (
        "Xeon with AMX, bf16",
        """\
Other programs ran on other cores. In `cpu-amx-methods` times varied by 4 to 12%, and the medians of the ratios within
each round are 1.05 of the limit and 0.87 of LoRA for `spft-gradient`, 1.07 and 0.91 for `spft-gradient-row`. The
`busy` records and the sweeps of that day ran three benchmarks at once: within the rounds 1.04 of the limit and 0.90
of LoRA, and 1.10 and 0.91 on a 4-bit base.""",
        (
            "cpu-amx-methods",
            "cpu-amx-busy-methods",
            "cpu-amx-busy-4bit",
            "cpu-amx-area",
            "cpu-amx-density",
            "cpu-amx-width",
            "cpu-amx-tokens",
        ),
    ),
    (
        "EPYC with AVX512-BF16, bf16",
        """\
An earlier version, which kept the columns behind norms too. The machine's speed varied by 10 to 17%, and
`spft-gradient` came to 1.05 to 1.10 of the limit in seven runs of that day. DoRA's kept bytes, counted again on
2026-11-28, are 152.6 and 92.4 MiB: the record's hold a graph that DoRA drops. In the sweeps four rounds each: read
the trend.""",
        ("cpu-methods", "cpu-4bit", "cpu-tokens", "cpu-width", "cpu-area", "cpu-density"),
    ),
    (
        "Xeon with AVX512, without instructions for bf16",
        """\
torch multiplies bf16 4 (here) to 100 times slower than float32 on such processors; spft's layers multiply in float32
there, a part of the weight at a time, and round once.""",
        ("cpu-avx512-methods", "cpu-avx512-4bit", "cpu-avx512-fp32-methods"),
    ),
    (
        "EPYC with AVX2",
        """\
Speed varied by 7 to 28%; five runs in two days gave `spft-gradient` 0.99 to 1.09 of the limit and 0.85 to 0.94 of
LoRA. The sweeps are of the day before.""",
        (
            "cpu-fp32-methods",
            "cpu-fp32-4bit",
            "cpu-bf16-without-instructions",
            "cpu-fp32-area",
            "cpu-fp32-density",
            "cpu-fp32-tokens",
            "cpu-fp32-width",
        ),
    ),
    (
        "Switching between two adapters",
        """\
32 layers, 224 adapted matrices. Choosing the other adapter is the difference of two passes of 55 to 85 ms: less than
4 ms in four of five runs, 11 ms in one; LoRA's merge and unmerge took 118 to 171 ms.""",
        ("cpu-switching",),
    ),
)

_FOOT = """
## Figures without a file

| figure | value | how | date, machine |
|---|---|---|---|
| held-out loss of the quickstart: base, base + adapter, merged | 6.1193, 5.3791, 5.3791, in 10 minutes | `make quickstart` | 2026-11-27, 2 cores of a Xeon without bf16 |
| 8B shape, 4-bit, an earlier version, alone on the host | 336 ms; 1.04 of the limit, 0.89 of QLoRA | `integration/bench/gpu.sh` | 2026-11-27, H200 |
| 8B shape, bf16, as many values as LoRA, an earlier version | 1.04 of the limit, 0.90 of LoRA | `axolotl spft bench --device cuda --model llama-8b --tokens 4096 --rank 16 --method limit --method spft-gradient --method lora` | 2026-11-27, H200 |
| four 8B layers under `torch.compile` | spft 43.7 to 43.1 ms, LoRA 48.1 to 45.0, limit 41.0 to 39.8 | by hand: the benchmark has no such option | 2026-11-28, H200 |
| switching on the 8B's matrices, two runs | 1.4 and 2.2 ms; LoRA's merge and unmerge 56 and 82 ms | `integration/bench/gpu.sh` | 2026-11-28, H200 |
| fused instead of torch's default AdamW | 1.5 instead of 6.8 ms of LoRA's step, 131 instead of 337 ms of full fine-tuning's | by hand | 2026-11-28, one core with AVX2, bf16 |
| salience pass in float32 | 1.7 s an example; a step of full fine-tuning 1.8 s | `axolotl spft bench --device cpu --dtype fp32 --method spft-gradient --method full` | 2026-11-28, EPYC with AVX2 |

Two ranks under every engine: [integration/engines](../engines/README.md). Losses of methods: [integration/evidence](../evidence/README.md).
"""  # noqa: E501


def page() -> str:
    sections = [_HEAD]
    for heading, text, names in _GROUPS:
        sections.append(f"\n## {heading}\n\n{text}\n")
        sections += [_section(name, json.loads((RESULTS / f"{name}.json").read_text())) for name in names]
    return "".join(sections) + _FOOT


def _section(name: str, record: dict[str, Any]) -> str:
    machine, options = record["machine"], record["options"]
    where = f"{machine['date'][:10]}, {machine['gpu'] or machine['cpu']}, torch {machine['versions']['torch']}"
    if "sweep" in record:
        points = [(point["value"], point["rows"], point["left_out"]) for point in record["points"]]
        tables = sweep_table(record["sweep"], points)
        command = command_of(options, record["sweep"], [value for value, *_ in points])
    else:
        tables, command = comparison(record["rows"]), command_of(options)
    return f"\n### {name}\n\n{where}.\n\n```sh\n{command}\n```\n\n{tables}\n"


def command_of(options: dict[str, Any], sweep: str | None = None, values: list[float] = ()) -> str:
    """The command that a record's options come from, without those that are the default."""
    shape = options["model"]
    parts = ["axolotl spft bench", f"--device {options['device']}"]
    if options["threads"]:
        parts.append(f"--threads {options['threads']}")
    if shape != DEFAULT_SHAPE:
        # a record has the name of a file, and those are here
        parts.append(f"--model {f'integration/bench/{shape}' if shape.endswith('.json') else shape}")
    if options["tokens"] != 512:
        parts.append(f"--tokens {options['tokens']}")
    if (options["rank"], options["density"]) != (DEFAULT_RANK, None):
        parts += [f"--{key} {options[key]}" for key in ("rank", "density") if options[key] is not None]
    parts.append(f"--dtype {options['dtype']}")
    if options["quantization"] != "none":
        parts.append(f"--quantization {options['quantization']}")
    if options["gradient_checkpointing"]:
        parts.append("--gradient-checkpointing")
    if options["mask"] != default_mask(shape):
        parts.append(f"--mask {options['mask']}")
    parts.append(f"--rounds {options['rounds']}")
    parts += {"isolated": ["--isolate"], "sequential": ["--sequential"]}.get(options["processes"], [])
    if not sweep and not options["serving"]:
        parts.append("--no-serving")
    if tuple(options["methods"]) != (SWEEP_METHODS if sweep else METHODS):
        parts += [f"--method {method}" for method in options["methods"]]
    if sweep:
        parts.append(f"--sweep {sweep} {' '.join(f'{value:g}' for value in values)}")
    return _wrapped(parts)


def _wrapped(parts: list[str]) -> str:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > 116:
            lines[-1] += " \\"
            lines.append(f"  {part}")
        else:
            lines[-1] += f" {part}"
    return "\n".join(lines)


if __name__ == "__main__":
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")
