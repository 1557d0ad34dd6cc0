"""Serve what was trained in every way at hand, and say what each costs beside the local test: README's table.

Takes a finished training, copies its adapter and the first test rows of each task, tests the adapter on the 16-bit
base, and merged into each type. Then it starts the servers one after the other, by the commands below: one whose
program is not on the PATH is left out, and said. Each is asked by `test_llama.py --server`; its answers are compared
with the local test of the same weights by evaluations.py. An interrupted run goes on where it was; what was measured
stands in benchmarks/results/served.json after each.

    python benchmarks/served.py --outputs outputs
    python benchmarks/served.py --outputs outputs --only "vLLM, merged" --folder /tmp/served --port 8100
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from peers import FOLDER, RESULTS, ROOT, machine, save, timed
from real_model import AS_HERE, Chain

LLAMA = "llama-server -m {type}.gguf -c 8192 -np 2 --port {port}"
GGUF = "test -f {type}.gguf || convert_hf_to_gguf.py merged_float16 --outtype {type} --outfile {type}.gguf && "
# {what a server is given: (the local test of the same weights, the model's name there, its command)}, run in FOLDER
SERVERS = {
    "vLLM, adapter": ("adapter", "tuned", "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules "
                      "tuned=adapter --dtype float32 --max-model-len 4096 --port {port}"),
    "vLLM, merged": ("float16", "", "vllm serve merged_float16 --dtype float32 --max-model-len 4096 --port {port}"),
    "vLLM, merged, in bfloat16": ("float16", "", "vllm serve merged_float16 --dtype bfloat16 --max-model-len 4096 "
                                  "--port {port}"),
    "llama.cpp, f16, cache in f32": ("float16", "", GGUF + LLAMA + " -ctk f32 -ctv f32 -fa off"),
    "llama.cpp, f16": ("float16", "", GGUF + LLAMA),
    "llama.cpp, q8_0": ("float16", "", GGUF + LLAMA),
    "transformers serve": ("float16", "merged_float16", "transformers serve merged_float16 --dtype float32 "
                           "--port {port}"),
}  # fmt: skip
DTYPES = ("float16", "bfloat16", "float32")
LOCAL = ("adapter", *DTYPES, "adapter, 4-bit base")  # the first two are what the servers are compared with
SCORES = {"samsum": ("rouge1",), "trivia_qa": ("exact_match", "f1")}


def program(command):
    """The first program of a command that is not on the PATH, or None."""
    names = re.findall(r"(?:^|&& |\|\| )([\w.-]+)", command)
    return next((name for name in names if not shutil.which(name)), None)


def prepare(args):
    """The folder with a copy of the adapter, and of the data set with `examples` test rows a task."""
    from datasets import concatenate_datasets, load_from_disk

    if (args.folder / "dataset").exists():
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(args.outputs / "adapter", args.folder / "adapter", dirs_exist_ok=True)
    shutil.copy(args.outputs / "dataset_report.json", args.folder)
    rows = load_from_disk(str(args.outputs / "dataset"))
    parts = [rows["test"].filter(lambda task, wanted=task: task == wanted, input_columns="task") for task in SCORES]
    rows["test"] = concatenate_datasets([part.select(range(min(args.examples, len(part)))) for part in parts])
    rows.save_to_disk(args.folder / ".dataset")
    (args.folder / ".dataset").rename(args.folder / "dataset")


def local_test(chain, name):
    """Test the adapter on the base, or merge it into a type and test that."""
    options = ("--no-compare-with-base", "--general-text", "", "--name", slug(name))
    if name in DTYPES:
        merged = chain.output / f"merged_{name}"
        if not merged.exists():
            chain.costs.pop(f"merge_{name}", None)
            chain.run(f"merge_{name}", "merge_llama", "--merge-dtype", name)
            (chain.output / "merged").rename(merged)
        options = ("--model", merged, *options)
    else:
        options = ("--load-in-4bit" if "4-bit" in name else "--no-load-in-4bit", *options)
    chain.run(slug(name), "test_llama", *options)


def slug(name):
    return re.sub(r"\W+", "_", name)


@contextlib.contextmanager
def serving(command, port, folder, log):
    """The seconds that a server took to be ready; it and all that it started is stopped at the end."""
    started = time.time()
    with open(log, "w") as file:
        words = {"shell": True, "cwd": folder, "stdout": file, "stderr": file, "start_new_session": True}
        process = subprocess.Popen(command, env=os.environ | AS_HERE, **words)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except urllib.error.HTTPError as error:
                if error.code != 503:  # loading; transformers serve may have no list of models
                    break
            except OSError:
                pass
            if process.poll() is not None:
                sys.exit(f"{command} ended, see {log}:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield time.time() - started
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def compared(chain, name, against):
    """What is known of a system beside `against`: speed, and per task equal predictions, scores, perplexity."""
    files = {task: [chain.file(task, slug(system)) for system in (against, name)] for task in SCORES}
    named = [f"{system}={path}" for pair in files.values() for system, path in zip("ab", pair, strict=True)]
    output = chain.output / "compared"
    timed([sys.executable, "evaluations.py", "--predictions", *named, "--output-dir", output], f"{output}.txt")
    evaluation, found = json.loads((output / "evaluation.json").read_text()), {"against": against, "tasks": {}}
    contents = {task: [json.loads(path.read_text()) for path in pair] for task, pair in files.items()}
    for task, (_, served) in contents.items():
        [(_, _, equal)] = evaluation[task]["equal_predictions"]
        part = found["tasks"][task] = {"rows": len(served["examples"]), "equal": equal, "scores": {}}
        part["perplexity"] = served["perplexity"]["tuned"].get("perplexity")
        for metric in SCORES[task]:
            difference = evaluation[task]["comparisons"]["b"][metric]
            shown = {key: difference[key] for key in ("difference", "interval")}
            part["scores"][metric] = {"score": evaluation[task]["b"][metric], **shown}
    seconds = re.findall(r" in ([\d.]+) s|took ([\d.]+) s", (chain.output / f"{slug(name)}.txt").read_text())
    found["seconds"] = sum(float(first or second) for first, second in seconds)
    examples = [example for _, served in contents.values() for example in served["examples"]]
    found["rows"], found["new_tokens"] = len(examples), sum(example["new_tokens"] or 0 for example in examples)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="of a finished train_llama.py")
    parser.add_argument("--examples", type=int, default=30, help="test rows a task")
    parser.add_argument("--only", nargs="+", choices=[*LOCAL, *SERVERS], default=[*LOCAL, *SERVERS])
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--folder", type=Path, default=FOLDER / "served")
    args = parser.parse_args(argv)
    args.outputs, args.folder = args.outputs.resolve(), args.folder.resolve()
    prepare(args)
    chain = Chain(args.folder)
    adapter = json.loads((args.folder / "adapter" / "adapter_config.json").read_text())
    base, url = adapter["base_model_name_or_path"], f"http://127.0.0.1:{args.port}/v1"
    kept = RESULTS / "served.json"
    result = json.loads(kept.read_text()) if kept.exists() else {"systems": {}}
    result |= {"machine": machine(), "model": Path(base).name, "examples": args.examples}
    for name in (*LOCAL[:2], *args.only):
        if name in LOCAL:
            local_test(chain, name)
            result["systems"][name] = compared(chain, name, "adapter")
            save("served", result)
            continue
        against, served_name, command = SERVERS[name]
        kind = "q8_0" if "q8_0" in name else "f16"
        command = command.format(base=base, rank=adapter["r"], port=args.port, type=kind)
        if missing := program(command):
            print(f"{name} is left out: {missing} is not on the PATH", flush=True)
            continue
        if slug(name) not in chain.costs:
            with serving(command, args.port, args.folder, args.folder / f"{slug(name)}.log") as seconds:
                options = ("--server", url, "--server-model", served_name, "--name", slug(name))
                chain.run(slug(name), "test_llama", *options)
            print(f"{name}: ready after {seconds:.0f} s", flush=True)
        result["systems"][name] = compared(chain, name, against) | {"command": command.replace(base, Path(base).name)}
        save("served", result)


if __name__ == "__main__":
    main()
