"""Measure one adapter for both tasks beside one for each: scores with intervals, and the time of training.

The fixtures' sample, the demo's settings (run.sh), and for each seed three trainings: both tasks, samsum alone,
trivia_qa alone. Each task's test rows are the same for both. Scores, their intervals and the paired comparison are
those of evaluations.py, for each seed and, over rows and seeds, for all together.

    python benchmarks/joint.py
    python benchmarks/joint.py --seeds 1 --epochs 0.2
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from peers import FOLDER, MODEL, ROOT, machine, save, table, timed

SEEDS = 3
EPOCHS = 4
TASKS = ("samsum", "trivia_qa")
METRICS = {"samsum": ("rouge1", "rougeL", "perplexity"), "trivia_qa": ("exact_match", "f1", "perplexity")}


def build(tasks, output):
    sources = ["--samsum", ROOT / "tests/fixtures/samsum", "--trivia-qa", ROOT / "tests/fixtures/trivia_qa"]
    command = [sys.executable, "build_dataset.py", *sources, "--max-context-words", 120]
    shutil.rmtree(output, ignore_errors=True)
    command += ["--test-examples-per-task", 100, "--tasks", *tasks, "--output-dir", output]
    timed(command, output.with_suffix(".txt"))


def train_and_test(output, seed, epochs):
    """Trains on OUTPUT_DIR/dataset and predicts its test split; returns what run.json says."""
    log = output.with_suffix(".txt")
    command = [sys.executable, "train_llama.py", "--model", MODEL, "--learning-rate", "4e-3"]
    command += ["--num-train-epochs", epochs, "--max-length", 1024, "--gradient-accumulation-steps", 1]
    command += ["--eval-steps", 190, "--save-steps", 190, "--seed", seed, "--overwrite", "--output-dir", output]
    seconds, _ = timed(command, log)
    test = [sys.executable, "test_llama.py", "--no-compare-with-base", "--overwrite", "--output-dir", output]
    timed(test, log)
    run = json.loads((output / "adapter" / "run.json").read_text())
    return {"command_seconds": seconds, **{key: run[key] for key in ("seconds", "steps", "best_step", "tokens")}}


def compare(task, folder, seeds, output):
    """Scores, intervals and the paired comparison of the two over these seeds, by evaluations.py."""
    of = {"alone": task, "joint": "joint"}
    systems = [f"{name}@{s}={folder / f'{of[name]}_{task}_{s}.json'}" for name in of for s in seeds]
    output.mkdir(exist_ok=True)
    command = [sys.executable, "evaluations.py", "--predictions", *systems, "--output-dir", output]
    timed(command, output.with_suffix(".txt"))
    scores, found = json.loads((output / "evaluation.json").read_text())[task], {}
    for metric in METRICS[task]:
        found[metric] = {"difference": scores["comparisons"]["joint"][metric]}
        for name in ("alone", "joint"):
            value = scores[name].get(metric)
            value = scores["perplexity"][name]["perplexity"] if value is None else value
            found[metric][name] = {"score": value, "interval": scores["intervals"][name][metric]}
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="the demo's; with others nothing is kept")
    parser.add_argument("--folder", type=Path, default=FOLDER / "joint", help="for data, adapters and logs")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    systems = {"joint": TASKS} | {task: (task,) for task in TASKS}
    for name, tasks in systems.items():
        build(tasks, folder / name)
    result = {"machine": machine(), "training": {name: [] for name in systems}, "scores": {task: [] for task in TASKS}}
    result["all_seeds"] = {}
    for seed in range(args.seeds):
        for name in systems:
            result["training"][name].append(train_and_test(folder / name, seed, args.epochs))
            for task in systems[name]:
                shutil.copy(folder / name / f"{task}_predictions.json", folder / f"{name}_{task}_{seed}.json")
            print(f"seed {seed}, {name}: {result['training'][name][-1]['command_seconds']:.0f} s", flush=True)
        for task in TASKS:
            result["scores"][task].append(compare(task, folder, [seed], folder / f"compare_{task}"))
            result["all_seeds"][task] = compare(task, folder, range(seed + 1), folder / f"all_{task}")
        if args.epochs == EPOCHS:
            save("joint", result)
    rows = []
    for task, runs in result["scores"].items():
        for seed, scores in [*enumerate(runs), ("all", result["all_seeds"][task])]:
            for metric, pair in scores.items():
                cells = [f"{pair[n]['score']:.2f} [{pair[n]['interval'][0]:.2f}, {pair[n]['interval'][1]:.2f}]"
                         for n in ("joint", "alone")]  # fmt: skip
                low, high = pair["difference"]["interval"]
                difference = f"{pair['difference']['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
                rows.append([f"{task} {metric}", str(seed), *cells, difference])
    table(["", "seed", "joint", "alone", "joint - alone"], rows)
    seconds = {name: [run["command_seconds"] for run in runs] for name, runs in result["training"].items()}
    alone = [sum(pair) for pair in zip(*(seconds[task] for task in TASKS), strict=True)]
    means = [statistics.mean(values) for values in (seconds["joint"], alone)]
    print(f"training of one seed, mean: {means[0]:.0f} s for the joint adapter, {means[1]:.0f} s for the two")


if __name__ == "__main__":
    main()
