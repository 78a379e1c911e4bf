"""Run ``axolotl.cli.train`` on several CPU ranks, under DDP or the DeepSpeed stage of the configuration.

    python -m integration.launch.cpu_ranks --ranks 2 config.yml

What `accelerate launch` does on GPUs, with gloo between the ranks; one thread each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
OFFLINE = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# torch.load does not know the "cpu:0" that accelerate would call the device otherwise
_DEVICE = {"ACCELERATE_TORCH_DEVICE": "cpu"}
ON_CPU = {**_DEVICE, "ACCELERATE_USE_CPU": "true"}
# without ACCELERATE_USE_CPU, which keeps accelerate from using DeepSpeed at all
DEEPSPEED_ON_CPU = {**_DEVICE, "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


def command(configs: Sequence[Path], ranks: int, masks: Mapping[Path, Path] | None = None) -> list[str]:
    """The command line that starts the ranks; it needs `environment`.

    Args:
        masks: configurations that are not trained: their mask is computed and saved to this file.
    """
    tasks = [
        f"{config.resolve()}={masks[config]}" if config in (masks or {}) else str(config.resolve())
        for config in configs
    ]
    worker = ["-m", "integration.launch.worker", *tasks]
    if ranks == 1:
        return [sys.executable, *worker]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *launcher, *worker]


def environment(config: Path) -> dict[str, str]:
    """This process' environment with what the ranks of ``config`` need."""
    settings = yaml.safe_load(config.read_text())
    own = {**os.environ, **OFFLINE, **(DEEPSPEED_ON_CPU if settings.get("deepspeed") else ON_CPU)}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
    return own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an Axolotl configuration")
    parser.add_argument("--mask", type=Path, help="compute the mask alone, as `axolotl spft mask`, and save it here")
    parser.add_argument("--ranks", type=int, default=2, help="how many processes (2)")
    arguments = parser.parse_args()
    masks = {arguments.config: arguments.mask} if arguments.mask else None
    done = subprocess.run(command([arguments.config], arguments.ranks, masks), env=environment(arguments.config))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
