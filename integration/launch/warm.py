"""Starts Python modules in processes that have their imports behind them.

Importing axolotl, TRL and DeepSpeed takes longer than training a tiny model. One process imports them and forks itself
for each run: a run has memory, environment, folder and output of its own, as if it had been started by itself.

    warm.run("axolotl.cli.main", ["merge-lora", "config.yml"], environment, folder)
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from select import select

_ROOT = Path(__file__).parents[2]
# what the runs import sooner or later
_PRELOADED = (
    "axolotl.cli.main", "axolotl.cli.config", "axolotl.cli.evaluate", "axolotl.cli.merge_lora", "axolotl.train",
    "axolotl.common.datasets", "axolotl.core.builders", "axolotl.loaders", "axolotl.utils.trainer",
    "axolotl_spft.plugin", "axolotl_spft.tuner", "axolotl_spft.salience", "axolotl_spft.optim", "bitsandbytes",
    "deepspeed", "torch.distributed.run", "transformers.models.llama.modeling_llama", "trl",
)  # fmt: skip


def run(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    stdin: str = "",
    timeout_seconds: float = 600,
) -> tuple[int | None, str]:
    """What ``python -m module arguments`` returns, and prints.

    Args:
        environment: added to that of the process that was forked.
        folder: the working directory.

    Returns:
        (exit status, negative for a signal, or None where the time ran out; output and errors).
    """
    server = _server()
    with tempfile.TemporaryDirectory() as place:
        Path(place, "stdin").write_text(stdin)
        request = {"module": module, "arguments": [*arguments], "environment": {**environment},
                   "folder": str(folder), "place": place}  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        process = int(server.stdout.readline())
        in_time = bool(select([server.stdout], [], [], timeout_seconds)[0])
        if not in_time:
            os.killpg(process, signal.SIGKILL)
        status = int(server.stdout.readline())
        return status if in_time else None, Path(place, "output").read_text(errors="replace")


@cache
def _server() -> subprocess.Popen:
    # what is read while the packages are imported
    own = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
           "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), own.get("PYTHONPATH")]))
    server = subprocess.Popen(
        [sys.executable, "-m", "integration.launch.warm"],
        env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def main() -> None:
    """Serve requests, one JSON object a line, until the input ends: the child's id, and later its exit status."""
    answers = os.fdopen(os.dup(1), "w")
    # nothing that an import prints may be taken for an answer
    os.dup2(2, 1)
    for module in _PRELOADED:
        import_module(module)
    # a child reads nothing of what lies buffered here
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    while line := requests.readline():
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(**request)
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        # what it has started and left behind, as a run does that is killed
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become(module: str, arguments: Sequence[str], environment: Mapping[str, str], folder: str, place: str) -> None:
    """Run the module in this process, and end it."""
    os.setsid()
    for number, name, mode in ((0, "stdin", os.O_RDONLY), (1, "output", os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(Path(place, name), mode, 0o600), number)
    os.dup2(1, 2)
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # without the handlers of the process that was forked
        os._exit(status & 0xFF)


if __name__ == "__main__":
    main()
