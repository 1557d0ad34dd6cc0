"""Is one adapter for both tasks as good as one for each? A real small Llama, real rows, several seeds.

For each seed three trainings: both tasks, samsum alone, trivia_qa alone, of the same training rows a task, one epoch
each; both are tested on the same rows. Scores, intervals (over rows and seeds) and tests are those of evaluations.py.
An interrupted run goes on where it was; some 13 minutes a seed of 125 rows a task on two cores.

    python benchmarks/joint.py --model smollm2-135m --samsum knkarthick/samsum --trivia-qa mandarjoshi/trivia_qa
    python benchmarks/joint.py --model FOLDER --samsum FOLDER --trivia-qa FOLDER --seeds 5
"""

import argparse
import json
import shutil
from pathlib import Path

from peers import FOLDER, machine, save, table
from real_model import BUILD, TASKS, TRAIN, Chain, scores_of

SYSTEMS = {"joint": tuple(TASKS)} | {task: (task,) for task in TASKS}


def train_and_test(args, system, seed):
    """A system of one seed: {"steps", "tokens", "train_rows"} of its training."""
    chain, data = Chain(args.folder / f"{system}_{seed}"), args.folder / f"{system}_0"
    if seed:
        shutil.copytree(data / "dataset", chain.output / "dataset", dirs_exist_ok=True)
    else:
        sources = ("--samsum", args.samsum, "--trivia-qa", args.trivia_qa, "--tasks", *SYSTEMS[system])
        sizes = ("--train-examples-per-task", args.train_examples, "--test-examples-per-task", args.test_examples)
        chain.run("build", "build_dataset", *sources, *BUILD, *sizes)
    chain.run("train", "train_llama", "--model", args.model, *TRAIN, "--seed", seed)
    chain.run("test", "test_llama", "--no-compare-with-base")
    run = json.loads((chain.output / "adapter" / "run.json").read_text())
    return {key: run[key] for key in ("steps", "best_step", "tokens", "train_rows", "seconds")}


def compare(args, task, seeds):
    """{system: {metric: score, interval, difference}} of a task over all seeds so far, by evaluations.py."""
    output = args.folder / f"compared_{task}_{seeds}"
    output.mkdir(exist_ok=True)
    files = [
        f"{name}@{seed}={args.folder / f'{system}_{seed}' / f'{task}_predictions.json'}"
        for name, system in (("alone", task), ("joint", "joint"))
        for seed in range(seeds)
    ]
    Chain(output).run("evaluate", "evaluations", "--predictions", *files)
    evaluation = json.loads((output / "evaluation.json").read_text())
    return {name: scores_of(evaluation, name, [task])[task] for name in ("alone", "joint")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="key, hub id or folder, as train_llama.py takes it")
    parser.add_argument("--samsum", required=True)
    parser.add_argument("--trivia-qa", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-examples", type=int, default=250, help="a task")
    parser.add_argument("--test-examples", type=int, default=100, help="a task")
    parser.add_argument("--folder", type=Path, default=FOLDER / "joint")
    args = parser.parse_args(argv)
    args.folder = args.folder.resolve()
    for name in ("model", "samsum", "trivia_qa"):  # the commands run in the repository
        if Path(value := getattr(args, name)).exists():
            setattr(args, name, Path(value).resolve())
    result = {"machine": machine(), "model": Path(args.model).name, "test_examples": args.test_examples}
    result |= {"training": {name: [] for name in SYSTEMS}}
    for seed in range(args.seeds):
        for system in SYSTEMS:
            result["training"][system].append(train_and_test(args, system, seed))
        result["scores"] = {task: compare(args, task, seed + 1) for task in TASKS}
        save("joint", result)
    rows = []
    for task, systems in result["scores"].items():
        for metric in TASKS[task]:
            cells = ["{score:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]".format(**systems[name][metric])
                     for name in ("alone", "joint")]  # fmt: skip
            difference = systems["joint"][metric]["difference"]
            low, high = difference["interval"]
            rows.append([f"{task} {metric}", *cells, f"{difference['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"])
    table(["", "alone", "joint", "joint - alone"], rows)


if __name__ == "__main__":
    main()
