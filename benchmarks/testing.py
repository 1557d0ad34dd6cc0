"""Measure test_llama.py beside transformers alone: `generate` on left-padded batches, then a pass for the loss.

Both test the adapter of an output dir, tuned, in a process of their own on the same machine, and their answers are
compared: `bash run.sh demo` makes outputs/demo, peers.py leaves one of the real model in its folder. The seconds are
those of the testing itself, without start-up and loading; memory is the most a process held at any moment.

    python benchmarks/testing.py
    python benchmarks/testing.py --output-dir FOLDER/train_llama.py_0 --runs 3
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

from peers import ROOT, machine, save, timed

OUTPUT_DIR = "outputs/demo"
RUNS = 1
BATCH_SIZE = 16

PLAIN = """
import json, sys, time
import torch
import test_llama
from pipeline import models
from pipeline.files import load_rows
from pipeline.tokens import encode, end_tokens, load_tokenizer
from peft import PeftModel
models.quiet()
output_dir, result, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
folder = output_dir + "/adapter"
tokenizer = load_tokenizer(folder)
base = models.read_adapter(folder)
model = PeftModel.from_pretrained(models.load_model(base, True), folder).eval()
rows = load_rows(output_dir, "test")
new = {"samsum": test_llama.SAMSUM_MAX_NEW_TOKENS, "trivia_qa": test_llama.TRIVIA_QA_MAX_NEW_TOKENS}
ends = end_tokens(base, tokenizer)
line_ends = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
ends = {"samsum": ends, "trivia_qa": ends | line_ends}
ids = encode(tokenizer, rows[:])
rows = [row | {"prompt_ids": p, "completion_ids": c} for row, p, c in zip(rows, *ids.values())]
rows.sort(key=lambda row: (row["task"], -len(row["prompt_ids"])))

def padded(ids):
    width = max(map(len, ids))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return {"input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]), "attention_mask": mask}

answers, started = [], time.time()
with torch.inference_mode():
    for task in sorted(new):
        mine = [row for row in rows if row["task"] == task]
        for some in (mine[start:start + size] for start in range(0, len(mine), size)):
            prompts, golds = [row["prompt_ids"] for row in some], [row["completion_ids"] for row in some]
            out = model.generate(**padded(prompts), do_sample=False, max_new_tokens=new[task],
                                 eos_token_id=sorted(ends[task]), pad_token_id=tokenizer.pad_token_id)
            whole = padded([prompt + gold for prompt, gold in zip(prompts, golds)])
            positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
            keep = max(map(len, golds)) + 1
            scores = model(**whole, position_ids=positions, logits_to_keep=keep).logits.float().log_softmax(-1)
            for row, ids, score in zip(some, out[:, max(map(len, prompts)):], scores):
                gold = torch.tensor(row["completion_ids"])
                nll = -score[-len(gold) - 1:-1].gather(1, gold[:, None]).sum().item()
                text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
                text = text.split("\\n")[0].strip() if task == "trivia_qa" else text
                answers.append({"id": row["id"], "prediction": text, "nll": nll, "tokens": len(gold)})
seconds = time.time() - started
json.dump({"seconds": seconds, "examples": answers}, open(result, "w"))
"""


def perplexity(examples):
    return math.exp(sum(example["nll"] for example in examples) / sum(example["tokens"] for example in examples))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="with dataset/ and adapter/")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, in turn")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir).resolve()
    plain, log = folder / "plain_benchmark.json", folder / "benchmark.txt"
    files = [folder / f"{task}_predictions_benchmark.json" for task in ("samsum", "trivia_qa")]
    commands = {
        "test_llama.py": ["test_llama.py", "--output-dir", folder, "--name", "benchmark", "--no-compare-with-base",
                          "--general-text", "", "--overwrite"],
        "transformers": ["-c", PLAIN, folder, plain, BATCH_SIZE],
    }  # fmt: skip
    systems = {name: {"seconds": [], "peak_gb": []} for name in commands}
    for _ in range(args.runs):
        for name, command in commands.items():
            _, peak = timed([sys.executable, *command], log, {"PYTHONPATH": str(ROOT)})
            systems[name]["peak_gb"].append(peak)
            took = re.findall(r" tokens in ([\d.]+) s", log.read_text())
            took = sum(map(float, took)) if took else json.loads(plain.read_text())["seconds"]
            systems[name]["seconds"].append(took)
            print(f"{name:<20}{took:>8.1f} s{peak:>8.2f} GB", flush=True)
    theirs = json.loads(plain.read_text())["examples"]
    ours = [example for path in files if path.exists() for example in json.loads(path.read_text())["examples"]]
    predictions = {example["id"]: example["prediction"] for example in ours}
    result = {"machine": machine(), "rows": len(ours), "batch_size": BATCH_SIZE, "systems": systems}
    result["same_predictions"] = sum(predictions[example["id"]] == example["prediction"] for example in theirs)
    result["perplexity"] = {"test_llama.py": perplexity(ours), "transformers": perplexity(theirs)}
    middles = [statistics.median(system["seconds"]) for system in systems.values()]
    result["times_as_fast"] = middles[1] / middles[0]
    print(json.dumps({key: result[key] for key in ("same_predictions", "rows", "perplexity", "times_as_fast")}))
    save("testing" if folder == ROOT / OUTPUT_DIR else "testing_real", result)


if __name__ == "__main__":
    main()
