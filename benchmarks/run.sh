#!/usr/bin/env bash
# bash benchmarks/run.sh          this project beside its peers, and scaling, on the CPU; into benchmarks/results/ and RESULTS.md
# RUNS=2 makes fewer runs of each than the 3 by default (the trainings are half of the time).
# FOLDER=/some/folder keeps the peers' environments (10 GB) and logs there; by default they go to the temporary folder.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${FOLDER:-${TMPDIR:-/tmp}/llama_peers}
export HF_HUB_OFFLINE=1
start=$SECONDS
bash run.sh setup >/dev/null
[[ -f outputs/demo/merged/config.json ]] || bash run.sh demo
.venv/bin/python benchmarks/peers.py --folder "$folder" --runs "${RUNS:-3}"
.venv/bin/python benchmarks/scaling.py --folder "$folder"
.venv/bin/python benchmarks/report.py
echo "$((SECONDS - start)) s in all; the logs are in $folder"
