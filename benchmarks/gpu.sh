#!/usr/bin/env bash
# bash benchmarks/gpu.sh    training and testing on one GPU, smallest things first, into benchmarks/results/gpu.json
# Meant to end within 8 minutes on a fast GPU; what is done by then stands in the file. Not run on a GPU yet.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
python=${PYTHON:-.venv/bin/python}
"$python" benchmarks/gpu.py "$@"
