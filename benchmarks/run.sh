#!/usr/bin/env bash
# bash benchmarks/run.sh          this project beside its peers, and scaling, on the CPU; into benchmarks/results/ and RESULTS.md
# MODEL=F SAMSUM=F TRIVIA_QA=F    add a real size, first: a small Llama on real dialogues and questions (1.5 hours with
# SmolLM2-135M); folders, as train_llama.py and build_dataset.py take them.
# RUNS=2 makes fewer runs of each than the 3 by default (the trainings are half of the time).
# FOLDER=/some/folder keeps the peers' environments (10 GB) and logs there; by default they go to the temporary folder.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${FOLDER:-${TMPDIR:-/tmp}/llama_peers}
runs=${RUNS:-3}
slow=("trl sft" "trl sft, by length" "LLaMA-Factory" "train_llama.py, larger steps")
export HF_HUB_OFFLINE=1
start=$SECONDS
bash run.sh setup >/dev/null
[[ -f outputs/demo/merged/config.json ]] || bash run.sh demo
if [[ -n ${MODEL:-} ]]; then
    .venv/bin/python benchmarks/peers.py --folder "$folder" --model "$MODEL" --samsum "$SAMSUM" --rows 120 --runs "$runs" \
        --once "${slow[@]}"
    .venv/bin/python benchmarks/testing.py --output-dir "$folder/train_llama.py_0" --runs "$runs"
    .venv/bin/python benchmarks/joint.py --folder "$folder/joint" --model "$MODEL" --samsum "$SAMSUM" \
        --trivia-qa "$TRIVIA_QA" --train-examples 125
fi
.venv/bin/python benchmarks/peers.py --folder "$folder" --runs "$runs"
.venv/bin/python benchmarks/scaling.py --folder "$folder"
.venv/bin/python benchmarks/report.py
echo "$((SECONDS - start)) s in all; the logs are in $folder"
