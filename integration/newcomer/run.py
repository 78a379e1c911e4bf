"""From an empty folder to a merged model that answers, by the commands of the project's README alone.

    mkdir empty && cd empty && python CHECKOUT/integration/newcomer/run.py CHECKOUT [--base FOLDER] [--python PYTHON]

Prints every step before it runs; the first that fails ends it. The environment variable TORCH says which build of
torch is installed, as in the Makefile. Needs nothing but Python, and an accelerator where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import venv
from pathlib import Path

# the README's keys, for a small model on any machine
CONFIG = """\
base_model: {base}
plugins: [axolotl_spft.SpftPlugin]
adapter: spft
spft: {{density: 0.01}}
optimizer: sparse_adamw
learning_rate: 3e-3
datasets: [{{path: train.jsonl, type: alpaca}}]
micro_batch_size: 2
bf16: {bf16}
output_dir: outputs/run
"""
STEPS = (
    "accelerate launch -m axolotl.cli.train config.yml",
    "axolotl spft inspect outputs/run",
    "axolotl spft merge config.yml",
)
# the merged model is a plain one; the prompt is written as `type: alpaca` writes it for training
GENERATE = """\
from transformers import pipeline

prompt = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n"
    "### Instruction:\\nAdd 3 and 4.\\n\\n### Response:\\n"
)
answers = pipeline("text-generation", "outputs/run/merged")(prompt, max_new_tokens=20)
print(answers[0]["generated_text"])
"""
NAMED = ("pip install .", *STEPS, 'pipeline("text-generation", "outputs/run/merged")')


def not_named(readme: str) -> list[str]:
    """The steps of this script that the text of a README does not name."""
    return [step for step in NAMED if step not in readme]


def rows() -> list[dict[str, str]]:
    """What the user brings: instructions and answers, as Axolotl's ``type: alpaca`` reads them."""
    pairs = [(a, a * 7 % 13) for a in range(40)]
    return [{"instruction": f"Add {a} and {b}.", "output": f"The sum is {a + b}."} for a, b in pairs]


def write(name: str, text: str) -> None:
    """Write a file into the current folder, and show its beginning."""
    print(f"\n# {name}", *text.splitlines()[:12], sep="\n", flush=True)
    Path(name).write_text(text, encoding="utf-8")


def run(python: Path, command: list[str]) -> None:
    """Show a command and run it with the programs of ``python``'s environment first."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    # given once more by its folder: a bare name would be looked up on this process' path
    beside = python.parent / command[0]
    program = str(beside) if beside.exists() else command[0]
    done = subprocess.run([program, *command[1:]], env={**os.environ, "PATH": path})
    if done.returncode:
        raise SystemExit(f"`{shlex.join(command)}` ended with status {done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the project")
    parser.add_argument("--base", help="folder of a causal language model, or its name on the hub (made here)")
    parser.add_argument("--python", type=Path, help="of an environment that has the project: nothing is installed")
    options = parser.parse_args()
    if any(Path.cwd().iterdir()):
        raise SystemExit(f"{Path.cwd()} holds files: start in an empty folder")
    checkout = options.checkout.resolve()
    if options.python:
        python = options.python.absolute()
    else:
        venv.create(".venv", with_pip=True)
        python = Path(".venv/bin/python").absolute()
        torch = os.environ.get("TORCH", "torch==2.13.0")
        run(python, ["pip", "install", "--quiet", "--disable-pip-version-check", torch, str(checkout)])
        # the wheel that was built and installed, beside axolotl and all that it pins
        run(python, ["pip", "check"])
    if not options.base:
        run(python, ["python", str(checkout / "integration" / "newcomer" / "base.py"), "base"])
    write("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows()))
    has_gpu = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    bf16 = "auto" if subprocess.run([str(python), "-c", has_gpu]).returncode == 0 else "false"
    write("config.yml", CONFIG.format(base=options.base or "base", bf16=bf16))
    for command in STEPS:
        run(python, shlex.split(command))
    write("generate.py", GENERATE)
    run(python, ["python", "generate.py"])
    if missing := not_named((checkout / "README.md").read_text(encoding="utf-8")):
        raise SystemExit(f"newcomer's path: every step ran, but README.md does not name {', '.join(missing)}")
    print("\nnewcomer's path: passed")


if __name__ == "__main__":
    main()
