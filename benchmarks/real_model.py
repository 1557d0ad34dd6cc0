"""Fine-tune a real small Llama on real dialogues and questions, and say what came out: the README's first table.

The five scripts as they are, at a size that two CPU cores finish in about half an hour: built, trained, tested (base
and tuned, in 4 bits), merged into 16 bits, evaluated. The base is also tested with three solved examples in front of
each prompt, in 4 bits, and without any in 16 bits. Further variants, some 15 minutes each, are trained and tested on
the same rows: without quantisation (lora), on plain prompts (plain). An interrupted run resumes. Seconds and peak
memory are those of the commands.

    python benchmarks/make_questions.py --output questions
    python benchmarks/real_model.py --model smollm2-135m-instruct --samsum knkarthick/samsum --trivia-qa questions
    python benchmarks/real_model.py --model FOLDER --samsum FOLDER --trivia-qa FOLDER --variants lora plain
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from peers import FOLDER, RESULTS, machine, save, table, timed

BUILD = ("--max-context-words", 200, "--train-examples-per-task", 250, "--validation-examples-per-task", 16)
TRAIN = ("--max-length", 1024, "--gradient-accumulation-steps", 2, "--warmup-steps", 5, "--eval-steps", 15)
# timed() hides GPU and hub, which the comparison with the peers does without
AS_HERE = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "ACCELERATE_USE_CPU": "false",
           "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}  # fmt: skip
VARIANTS = {"qlora": (), "lora": ("--no-load-in-4bit",), "plain": ("--chat-template", "off")}
BASES = {  # tested by themselves, with the first variant: options of test_llama.py
    # on plain prompts, where examples help this model most: see benchmarks/RESULTS.md
    "base-3-shot": ("--adapter", "none", "--shots", 3, "--chat-template", "off"),
    "base-16bit": ("--adapter", "none", "--no-load-in-4bit"),
}
TASKS = {"samsum": ("rouge1", "rougeL", "perplexity"), "trivia_qa": ("exact_match", "f1", "perplexity")}


class Chain:
    """The commands of one variant in OUTPUT_DIR; what each took is kept beside it, so that a second run skips it."""

    def __init__(self, output):
        self.output, self.kept = output, output / "costs.json"
        output.mkdir(parents=True, exist_ok=True)
        self.costs = json.loads(self.kept.read_text()) if self.kept.exists() else {}

    def run(self, name, script, *options):
        if name not in self.costs:
            command = [sys.executable, f"{script}.py", *options, "--output-dir", self.output]
            log = self.output / f"{name.replace(' ', '_')}.txt"
            seconds, peak = timed(command, log, AS_HERE)
            print(f"{self.output.name}: {name} {seconds:.0f} s, {peak:.2f} GB", flush=True)
            self.costs[name] = {"seconds": seconds, "peak_gb": peak}
            self.kept.write_text(json.dumps(self.costs))

    def file(self, task, name=""):
        return self.output / f"{task}_predictions{name and '_' + name}.json"


def scores_of(evaluation, system, tasks=tuple(TASKS)):
    """{task: {metric: score, its interval, and the difference to the first system}} of evaluation.json."""
    found = {}
    for task in tasks:
        part, found[task] = evaluation[task], {}
        for metric in TASKS[task]:
            score = part[system].get(metric)
            score = part["perplexity"][system]["perplexity"] if score is None else score
            found[task][metric] = {"score": score, "interval": part["intervals"][system][metric]}
            if metric in part["comparisons"].get(system, ()):  # none of perplexities over other tokens
                found[task][metric]["difference"] = part["comparisons"][system][metric]
    return found


def general_text(path):
    """{system: perplexity of the general text} of a predictions file."""
    found = json.loads(path.read_text()).get("general_text", {})
    return {system: figures["perplexity"] for system, figures in found.items()}


def measure(args, variant, first):
    """One variant, from its data set to its scores. `first`: the folder that has the data set."""
    chain = Chain(args.folder / variant)
    output = chain.output
    test = ("--test-examples-per-task", args.test_examples)
    if output == first:
        sources = ("--samsum", args.samsum, "--trivia-qa", args.trivia_qa)
        chain.run("build", "build_dataset", *sources, *BUILD, *test)
    elif not (output / "dataset").exists():
        shutil.copytree(first / "dataset", output / "dataset")
        shutil.copy(first / "dataset_report.json", output)
    chain.run("train", "train_llama", "--model", args.model, *TRAIN, *VARIANTS[variant])
    chain.run("test", "test_llama", *(() if output == first else ("--no-compare-with-base",)))
    named = []  # systems with a predictions file by themselves
    if output == first:
        for name, options in BASES.items():
            chain.run(f"test {name}", "test_llama", *options, "--name", name)
        chain.run("merge", "merge_llama")
        chain.run("test merged", "test_llama", "--model", output / "merged", "--name", "merged")
        named = [*BASES, "merged"]
    files = [chain.file(task) for task in TASKS]
    files += [f"{name}={chain.file(task, name)}" for name in named for task in TASKS]
    chain.run("evaluate", "evaluations", "--predictions", *files)
    evaluation = json.loads((output / "evaluation.json").read_text())
    run = json.loads((output / "adapter" / "run.json").read_text())
    result = {"costs": chain.costs, "systems": {}, "general_text": general_text(chain.file("samsum"))}
    result |= {key: run[key] for key in ("steps", "train_rows", "tokens", "tokens_per_second", "settings")}
    result["settings"] |= {"model": Path(args.model).name, "output_dir": "outputs"}  # places are nobody's business
    for name in ("base", *BASES, "tuned", "merged") if output == first else ("tuned",):
        result["systems"][name] = scores_of(evaluation, name)
    for name in named:
        result["general_text"][name] = general_text(chain.file("samsum", name)).get("tuned")
    if (merge := output / "merged" / "merge.json").exists():
        result["merge"] = json.loads(merge.read_text())
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="key, hub id or folder, as train_llama.py takes it")
    parser.add_argument("--samsum", required=True)
    parser.add_argument("--trivia-qa", required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["qlora"])
    parser.add_argument("--test-examples", type=int, default=100, help="a task")
    parser.add_argument("--folder", type=Path, default=FOLDER / "real_model")
    args = parser.parse_args(argv)
    args.folder = args.folder.resolve()
    for name in ("model", "samsum", "trivia_qa"):  # the commands run in the repository
        if Path(value := getattr(args, name)).exists():
            setattr(args, name, Path(value).resolve())
    kept = RESULTS / "real_model.json"
    result = json.loads(kept.read_text()) if kept.exists() else {}
    result |= {"machine": machine(), "model": Path(args.model).name, "test_examples": args.test_examples}
    result |= {name: Path(getattr(args, name)).name for name in ("samsum", "trivia_qa")}
    for variant in args.variants:
        result.setdefault("variants", {})[variant] = found = measure(args, variant, args.folder / args.variants[0])
        save("real_model", result)
        head = ["", *(f"{task} {metric}" for task, metrics in TASKS.items() for metric in metrics), "general text"]
        cells = [[f"{part[metric]['score']:.2f}" for task, part in scores.items() for metric in part]
                 for scores in found["systems"].values()]  # fmt: skip
        text = [f"{found['general_text'].get(name) or 0:.2f}" for name in found["systems"]]
        table(head, [[name, *row, last] for name, row, last in zip(found["systems"], cells, text, strict=True)])


if __name__ == "__main__":
    main()
