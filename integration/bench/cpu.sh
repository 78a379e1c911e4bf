#!/bin/sh
# A training step of a Llama of 45 million parameters on a CPU, in about 35 minutes on 2 cores:
#   integration/bench/cpu.sh
# All methods; a 4-bit base; and how the step grows with tokens, density, width and the mask's area. Figures and pictures
# land in integration/bench/results. In bf16, or in fp32 on a processor without instructions for bf16.
set -eu
cd "$(dirname "$0")/../.."

: "${PYTHON:=.venv/bin/python}" "${BENCH_THREADS:=2}" "${BENCH_ROUNDS:=11}" "${BENCH_SWEEP_ROUNDS:=4}"
: "${BENCH_TOKENS:=256 512 1024 2048 4096}" "${BENCH_WIDTHS:=512 1024 2048 4096}"
: "${BENCH_OUT:=integration/bench/results}"
[ -x "$PYTHON" ] || PYTHON=python3

# the interpreter's own copy of the package may be another version than this checkout's
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$BENCH_OUT"

# name options
bench() {
    name=$1
    shift
    echo "== $name"
    "$PYTHON" -m axolotl_spft bench --device cpu --threads "$BENCH_THREADS" \
        --output "$BENCH_OUT/cpu-$name.json" --plot "$BENCH_OUT/cpu-$name.png" "$@"
}

# a process for each method: a CPU tells the peak memory of processes only
bench methods --rounds "$BENCH_ROUNDS" --isolate
bench 4bit --rounds "$BENCH_ROUNDS" --quantization 4bit --method limit --method spft-gradient --method lora --no-serving
bench area --rounds "$BENCH_SWEEP_ROUNDS" --sweep area 0.02 0.05 0.1 0.2 0.4 1
bench density --rounds "$BENCH_SWEEP_ROUNDS" --sweep density 0.0005 0.002 0.005 0.01 0.02 0.05
# shellcheck disable=SC2086  # the lists are words
bench tokens --rounds "$BENCH_SWEEP_ROUNDS" --sweep tokens $BENCH_TOKENS
# shellcheck disable=SC2086
bench width --rounds "$BENCH_SWEEP_ROUNDS" --mask drawn --sweep width $BENCH_WIDTHS
