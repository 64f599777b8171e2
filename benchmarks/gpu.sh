#!/usr/bin/env bash
# Parity and benchmarks on a machine with a GPU: needs this repository and, installed, jax for that
# GPU, flax, torch, transformers and pytest. Leaves benchmarks/results/*.json and the table in
# docs/parity.md. DEVICE=cpu runs the same on the CPU, to see that the script is in order.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# JAX would take most of the GPU's memory when it starts, and leave torch none.
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"
device="${DEVICE:-gpu}"
results=benchmarks/results
mkdir -p "$results"
kind="$(cd benchmarks && python -c 'import sys, common; print(common.machine(sys.argv[1]))' "$device")"
failed=0

step() {
    echo "== $*" >&2
    "$@" || { echo "== failed: $*" >&2; failed=1; }
}

step python -m vit_cli info --json
step python benchmarks/parity.py --devices "$device"
step python -m vit_cli verify vit_common/digits --device "$device" \
    --dtype float32,bfloat16,float16 --gradients --report "$results/verify-$device-$kind.json"
# The tests that need no Transformers 4.57.6, which a machine for GPUs need not have.
step python -m pytest -q --device "$device" tests/test_suite.py tests/test_training_parity.py \
    tests/test_attention.py tests/test_engine.py tests/test_verify.py
if [ -f benchmarks/inference.py ]; then
    step python benchmarks/inference.py --device "$device"
fi
exit "$failed"
