"""Measure train_llama.py beside `trl sft`: same base, rows, adapter shape, epochs and learning rate, in turn.

`trl sft` runs as shipped (--load_in_4bit --use_peft; batch size and checkpointing are its own) and with its packing.
Useful tokens are those of the rows, without padding; seconds are those of the training loop and of the whole command;
the validation loss of every adapter is computed here, in the same way. Another trainer is one more entry in COMMANDS.

    python benchmarks/training.py
    python benchmarks/training.py --runs 1 --epochs 1 --folder /tmp/training_benchmark
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = 3
EPOCHS = 1
MAX_LENGTH = 1024
LEARNING_RATE = 3e-3
FOLDER = "/tmp/training_benchmark"
MODEL = ROOT / "tests" / "fixtures" / "tiny_llama3"


def ours(args, output):
    shutil.copytree(Path(args.folder) / "dataset", output / "dataset")
    command = [
        sys.executable,
        ROOT / "train_llama.py",
        "--model",
        MODEL,
        "--output-dir",
        output,
        "--max-length",
        MAX_LENGTH,
    ]
    command += [
        "--num-train-epochs",
        args.epochs,
        "--learning-rate",
        LEARNING_RATE,
        "--gradient-accumulation-steps",
        1,
    ]
    command += ["--eval-steps", 10**6, "--save-steps", 10**6]  # once, at the end: trl sft does not validate at all
    return command, output / "adapter"


def trl(args, output, *more):
    command = [Path(sys.executable).parent / "trl", "sft", "--model_name_or_path", MODEL, "--output_dir", output]
    command += ["--dataset_name", Path(args.folder) / "rows", "--load_in_4bit", "--use_peft", "--lora_r", 8]
    command += [
        "--lora_alpha",
        16,
        "--lora_dropout",
        0.0,
        "--lora_target_modules",
        "all-linear",
        "--use_cpu",
        "--bf16",
        "false",
    ]
    command += ["--learning_rate", LEARNING_RATE, "--num_train_epochs", args.epochs, "--max_length", MAX_LENGTH]
    return [*command, "--report_to", "none", *more], output


COMMANDS = {
    "train_llama.py": ours,
    "trl sft as shipped": trl,
    "trl sft --packing": lambda args, output: trl(args, output, "--packing", "--per_device_train_batch_size", 1),
}


def prepare(folder):
    """The demo's data set, and its training rows once more as a folder that load_dataset reads."""
    import datasets

    sources = ["--samsum", ROOT / "tests/fixtures/samsum", "--trivia-qa", ROOT / "tests/fixtures/trivia_qa"]
    build = [sys.executable, ROOT / "build_dataset.py", *sources, "--max-context-words", "120", "--output-dir", folder]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    rows = datasets.load_from_disk(str(folder / "dataset" / "train"))
    rows.select_columns(["prompt", "completion"]).to_parquet(str(folder / "rows" / "train.parquet"))
    return rows


def count_tokens(rows):
    import train_llama

    return sum(
        map(len, train_llama.tokenize(rows, train_llama.load_tokenizer(str(MODEL)), MAX_LENGTH, "train")["labels"])
    )


def validation_loss(adapter, folder):
    """Nats per completion token over all validation rows, of an adapter on the 4-bit base."""
    import torch
    from peft import PeftModel

    import train_llama

    rows = train_llama.load_rows(folder, "validation")
    tokens = train_llama.tokenize(rows, train_llama.load_tokenizer(str(MODEL)), MAX_LENGTH, "validation")
    model = PeftModel.from_pretrained(train_llama.load_model(str(MODEL), True), str(adapter)).eval()
    total = count = 0
    with torch.no_grad():
        for row in tokens:
            ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
            n = int((labels != -100).sum())
            total += model(input_ids=ids, labels=labels).loss.item() * n
            count += n
    return total / count


def measure(name, args, number):
    """One run: seconds in the loop, seconds of the command, peak memory (GB), validation loss."""
    output = Path(args.folder) / f"{name.replace(' ', '_')}_{number}"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command, adapter = COMMANDS[name](args, output)
    log = output / "log.txt"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    start = time.time()
    with log.open("w") as file:
        process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.time() - start
    if status:
        sys.exit(f"{name} failed:\n{log.read_text()[-3000:]}")
    if (adapter / "run.json").exists():
        loop = json.loads((adapter / "run.json").read_text())["seconds"]
    else:
        loop = float(log.read_text().split("'train_runtime': ")[1].split(",")[0].strip("' "))
    peak = usage.ru_maxrss * 1024 / 1e9
    return loop, seconds, peak, validation_loss(adapter, args.folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--folder", default=FOLDER)
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    args = parser.parse_args()
    rows = prepare(Path(args.folder))
    tokens = count_tokens(rows) * args.epochs
    print(f"{len(rows)} rows, {tokens:,} tokens, {os.cpu_count()} CPUs")
    results = {name: [] for name in args.only}
    for number in range(args.runs):
        for name in args.only:
            results[name].append(measure(name, args, number))
            print(name, *(f"{value:.3f}" for value in results[name][-1]), flush=True)
    print("\n| | tokens/s in the loop | loop s | command s | peak GB | validation loss |\n|---|---|---|---|---|---|")
    for name, runs in results.items():
        loop, whole, peak, loss = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {tokens / loop:,.0f} | {loop:.1f} | {whole:.1f} | {peak:.2f} | {loss:.4f} |")


if __name__ == "__main__":
    main()
