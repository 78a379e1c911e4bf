#!/bin/sh
# A training step of the Llama 8B and 70B shapes on one GPU with 80 GB, in under 8 minutes:
#   integration/bench/gpu.sh
# 8B in bf16 and in 4 bits, 70B in 4 bits; 4,096 tokens; the limit, spft at a density of 0.5%, and LoRA of rank 16 (on a
# 4-bit base that is QLoRA), which trains 0.6% of the 8B's linear weights. On 120 GB or more the methods of the 8B take
# turns in one process; on less, and for the 70B, each has the card to itself. Figures land in integration/bench/results.
#
# To try the script without a GPU, with a tiny shape:
#   BENCH_DEVICE=cpu BENCH_MODEL_8B=config.json BENCH_MODEL_70B=config.json BENCH_TOKENS=64 BENCH_OUT=build/dry \
#     integration/bench/gpu.sh
set -eu
cd "$(dirname "$0")/../.."

: "${PYTHON:=.venv/bin/python}"
: "${BENCH_DEVICE:=cuda}" "${BENCH_MODEL_8B:=llama-8b}" "${BENCH_MODEL_70B:=llama-70b}"
: "${BENCH_TOKENS:=4096}" "${BENCH_RANK:=16}" "${BENCH_DENSITY:=0.005}" "${BENCH_ROUNDS:=9}" "${BENCH_ROUNDS_70B:=3}"
: "${BENCH_OUT:=integration/bench/results}"
[ -x "$PYTHON" ] || PYTHON=python3

# the interpreter's own copy of the package may be another version than this checkout's
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
# fewer unused gaps between the large buffers of the 70B shape
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

processes=$("$PYTHON" - "$BENCH_DEVICE" <<'PYTHON'
import sys
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no GPU: install a CUDA build of torch, or set BENCH_DEVICE=cpu (see the script's head)")
print("" if torch.cuda.is_available() and torch.cuda.mem_get_info()[1] >= 120e9 else "--sequential")
PYTHON
)
mkdir -p "$BENCH_OUT"

# name model rounds further options
bench() {
    name=$1 model=$2 rounds=$3
    shift 3
    echo "== $name"
    "$PYTHON" -m axolotl_spft bench --device "$BENCH_DEVICE" --model "$model" --tokens "$BENCH_TOKENS" \
        --rank "$BENCH_RANK" --density "$BENCH_DENSITY" --mask drawn --rounds "$rounds" \
        --method limit --method spft-gradient --method lora --output "$BENCH_OUT/$name.json" "$@"
}

# shellcheck disable=SC2086  # none is no argument
bench gpu-8b-bf16 "$BENCH_MODEL_8B" "$BENCH_ROUNDS" $processes
# merging into a 4-bit base takes bitsandbytes 12 seconds each time
# shellcheck disable=SC2086
bench gpu-8b-4bit "$BENCH_MODEL_8B" "$BENCH_ROUNDS" --quantization 4bit --no-serving $processes
bench gpu-70b-4bit "$BENCH_MODEL_70B" "$BENCH_ROUNDS_70B" --quantization 4bit --gradient-checkpointing --no-serving \
    --sequential
