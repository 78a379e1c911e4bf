"""Which metric is tested on which base and under which engine."""

from __future__ import annotations

from axolotl_spft.metrics import METRICS

BASES = ("float", "8bit", "4bit")
ENGINES = ("one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
# (metric, base, engine): why it is refused
REFUSED: dict[tuple[str, str, str], str] = {
    (metric, "8bit", "ZeRO-3"): "ZeRO-3 cannot partition int8 weights" for metric in METRICS
}
TESTED = [
    (metric, base, engine)
    for metric in METRICS
    for base in BASES
    for engine in ENGINES
    if (metric, base, engine) not in REFUSED
]
