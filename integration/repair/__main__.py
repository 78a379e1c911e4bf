"""Records the loss of a model in bf16, in NF4, and in NF4 with its error repaired, and draws the table.

python -m integration.repair run smollm2-135m-instruct --data FOLDER
python -m integration.repair page

FOLDER holds GSM8K as ``gsm8k_train.jsonl`` and ``gsm8k_test.jsonl``, and ``ARC-Easy_test.json``. Forward passes alone:
some minutes of one core; what is recorded already is not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from integration.evidence.records import append, lines_of, rounded
from integration.repair.measure import ROWS, measure
from integration.repair.page import PAGE, RESULTS, page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what is not recorded yet")
    run.add_argument("base", help="a name of integration.evidence.bases, or a folder")
    run.add_argument("--data", type=Path, required=True, help="folder with GSM8K and ARC")
    run.add_argument("--bases", type=Path, default=Path("build/evidence"), help="folder for models that are made here")
    run.add_argument("--judged", type=int, default=96, help="test examples, and questions of other text")
    run.add_argument("--samples", type=int, default=48, help="training examples that the statistics are of")
    run.add_argument("--results", type=Path, default=RESULTS, help="file of the recorded lines")
    commands.add_parser("page", help="draw the table from the recorded lines")
    arguments = parser.parse_args()
    if arguments.command == "page":
        PAGE.write_text(page(lines_of(RESULTS)), encoding="utf-8")
        return
    setting = {"base": arguments.base, "judged": arguments.judged, "samples": arguments.samples}
    for name in ROWS:
        run_of = {**setting, "row": name}
        if any(run_of.items() <= record.items() for record in lines_of(arguments.results)):
            continue
        found = measure(**run_of, data=arguments.data, bases=arguments.bases)
        append(arguments.results, rounded(run_of | found))
        print(run_of | found, flush=True)


if __name__ == "__main__":
    main()
