"""Measure test_llama.py beside the plain loop: one row at a time, the loss by `labels`, then `generate`.

Both test the adapter of an output dir (`bash run.sh demo` makes outputs/demo), tuned and base, in a process of their
own on the same machine, and their answers are compared. The seconds are those of the testing itself, without start-up
and loading; memory is the most a process held at any moment.

    python benchmarks/testing.py
    python benchmarks/testing.py --output-dir outputs/demo --runs 3
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

OUTPUT_DIR = "outputs/demo"
RUNS = 1
ROOT = Path(__file__).resolve().parent.parent

PLAIN = """
import contextlib, json, sys, time
import torch
import llama, test_llama
from peft import PeftModel
from tqdm import tqdm
llama.quiet()
output_dir, result = sys.argv[1:]
folder = output_dir + "/adapter"
tokenizer = llama.load_tokenizer(folder)
model = PeftModel.from_pretrained(llama.load_model(llama.read_adapter(folder), True), folder).eval()
rows = llama.load_rows(output_dir, "test")
new = {"samsum": test_llama.SAMSUM_MAX_NEW_TOKENS, "trivia_qa": test_llama.TRIVIA_QA_MAX_NEW_TOKENS}
ends = llama.end_tokens(model, tokenizer)
ends = {"samsum": ends, "trivia_qa": ends | test_llama.line_ends(tokenizer)}
answers, started = [], time.time()
with torch.inference_mode():
    for row in tqdm(rows, disable=None):
        prompt, task = tokenizer(row["prompt"]).input_ids, row["task"]
        gold = tokenizer(row["prompt"] + row["completion"]).input_ids[len(prompt):] + [tokenizer.eos_token_id]
        ids, labels = torch.tensor([prompt + gold]), torch.tensor([[-100] * len(prompt) + gold])
        answer = {"id": row["id"], "task": task, "tokens": len(gold)}
        for system in ("", "base_"):
            with model.disable_adapter() if system else contextlib.nullcontext():
                answer[system + "nll"] = model(input_ids=ids, labels=labels).loss.item() * len(gold)
                out = model.generate(input_ids=ids[:, :len(prompt)], do_sample=False, max_new_tokens=new[task],
                                     eos_token_id=sorted(ends[task]), pad_token_id=tokenizer.pad_token_id)
            text = tokenizer.decode(out[0, len(prompt):], skip_special_tokens=True,
                                    clean_up_tokenization_spaces=False).strip()
            answer[system + "prediction"] = text.split("\\n")[0].strip() if task == "trivia_qa" else text
        answers.append(answer)
seconds = time.time() - started
json.dump({"seconds": seconds, "answers": answers}, open(result, "w"))
"""


def measured(command):
    """stdout of a command, and its peak memory in MB; raises where it fails."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)\n"
        "sys.exit(done.returncode)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    wrapped = [sys.executable, "-c", code, *command]
    out = subprocess.run(wrapped, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return out, int(re.search(r"^peak (\d+)$", out, flags=re.MULTILINE)[1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="with dataset/ and adapter/")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each; the median counts")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir)
    files = {task: folder / f"{task}_predictions_benchmark.json" for task in ("samsum", "trivia_qa")}
    result = folder / "plain_benchmark.json"
    seconds, peaks = {"plain": [], "script": []}, {"plain": [], "script": []}
    for _ in range(args.runs):
        _, peak = measured([sys.executable, "-c", PLAIN, args.output_dir, str(result)])
        plain = json.loads(result.read_text())
        seconds["plain"].append(plain["seconds"])
        peaks["plain"].append(peak)
        for path in files.values():
            path.unlink(missing_ok=True)
        command = [sys.executable, "test_llama.py", "--output-dir", args.output_dir, "--name", "benchmark"]
        out, peak = measured(command)
        seconds["script"].append(sum(float(number) for number in re.findall(r" tokens in ([\d.]+) s", out)))
        peaks["script"].append(peak)
    for name, label in (("plain", "one row at a time"), ("script", "test_llama.py")):
        print(f"{label:<20}{statistics.median(seconds[name]):>8.1f} s{max(peaks[name]):>8} MB")
    print(f"{statistics.median(seconds['plain']) / statistics.median(seconds['script']):.1f} times as fast")
    for task, path in files.items():
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        answers = [answer for answer in plain["answers"] if answer["task"] == task]
        pairs = list(zip(examples, answers, strict=True))
        for system in ("", "base_"):
            same = sum(a[system + "prediction"] == b[system + "prediction"] for a, b in pairs)
            ours, theirs = (
                math.exp(sum(e[system + "nll"] for e in some) / sum(e["tokens"] for e in some))
                for some in (examples, answers)
            )
            print(f"{task} {system or 'tuned_'}predictions: {same} of {len(pairs)} the same; "
                  f"perplexity {ours:.6f} and {theirs:.6f}")  # fmt: skip
        path.unlink()
    result.unlink()


if __name__ == "__main__":
    main()
