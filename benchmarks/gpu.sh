#!/usr/bin/env bash
# bash benchmarks/gpu.sh    training, testing and merging on one GPU, into benchmarks/results/gpu.json
# Some 12 minutes at 8B on an H200; each result stands in the file as it comes. Further arguments go to gpu.py.
# 40 GB go to FOLDER: in memory by default.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
"${PYTHON:-.venv/bin/python}" benchmarks/gpu.py --folder "${FOLDER:-/dev/shm/llama_gpu}" "$@"
