#!/usr/bin/env bash
# bash benchmarks/gpu.sh [PART] [FLAGS]    training, testing and merging on one GPU, into benchmarks/results/gpu.json
#
#   1   rates, layers, exactness, longest    what each way to keep less costs and saves; what 24 GB train
#   2   rates, training, peers               tokens/s, memory and loss beside trl, Unsloth and LLaMA-Factory
#   3   rates, profile, chain, float16, commands    kernels by their time; the scripts as they are
#
# Without a PART all of it. Reckoned at 8B on an H200, not measured: 5, 7 and 8 minutes. Each part adds to the file what
# it finds as it comes, and takes the random models that an earlier one left in FOLDER (in memory where there is room,
# else /tmp: 25 GB, with part 3 60, removed after part 3). FLAGS go to gpu.py: 2 --packages DIR for the peers
# (DIR/unsloth/site-packages, DIR/llamafactory/site-packages), 1 --stages rates layers. PYTHON: another one.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
memory=$(df --output=avail --block-size=G /dev/shm | tail -1 | tr -dc 0-9)
[[ -d /dev/shm/llama_gpu || $memory -ge 60 ]] && folder=/dev/shm/llama_gpu || folder=/tmp/llama_gpu
folder=${FOLDER:-$folder}
part=all options=()
case ${1:-} in
    1) part=1 options=(--minutes 7 --stages rates layers exactness longest) ;;
    2) part=2 options=(--minutes 7 --stages rates training peers) ;;
    3) part=3 options=(--minutes 6 --stages rates profile chain float16 commands) ;;
esac
[[ $part == all ]] || shift
"${PYTHON:-.venv/bin/python}" benchmarks/gpu.py --folder "$folder" "${options[@]}" "$@"
[[ $part == [12] ]] || rm -rf "$folder"/model_* "$folder/commands"
