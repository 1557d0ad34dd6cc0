"""Measure training and testing on one GPU with random Llamas of real shapes: exactness, rates, speed and memory.

Speed and memory of random weights are those of real ones; only the text is noise. Smallest things first, each printed
and saved to benchmarks/results/gpu.json as it comes. Where there is no GPU, `--shapes tiny` runs each part on the CPU,
in float32, to see that it works. 8B and 7B each need 16 GB of disk in the folder for as long as they are measured.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --shapes tiny --folder /tmp/gpu_benchmark
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

from peers import FOLDER, MODEL, ROOT, machine, save, table, timed
from scaling import random_model

STEPS = 12  # optimizer steps of a training, the first two of which are not counted
BUILD = ("--max-context-words", 300, "--test-examples-per-task", 60)
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 2048},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "llama3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "llama2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip


def rates(size):
    """TFLOP/s of 16-bit matrix products and GB/s of copies: what the other numbers cannot exceed."""
    import torch

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)

    def seconds(work, repeats=10):
        for _ in range(2):
            work()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    target = torch.empty_like(a)
    return {"tflops": 2 * size**3 / seconds(lambda: torch.mm(a, b, out=target)) / 1e12,
            "copy_gb_per_second": 2 * a.nbytes / seconds(lambda: target.copy_(b)) / 1e9}  # fmt: skip


def packing_difference(rows):
    """Relative difference of the summed loss of packed rows from that of the same rows one by one under sdpa."""
    import torch

    import llama

    llama.quiet()
    tokenizer = llama.load_tokenizer(str(MODEL))
    ids = llama.encode(tokenizer, rows)
    pairs = list(zip(ids["prompt_ids"], ids["completion_ids"], strict=True))
    model = llama.load_model(str(MODEL), load_in_4bit=True).eval()

    def loss(packed, **bounds):
        tokens = torch.tensor([[i for p, c in packed for i in p + c]], device=model.device)
        positions = torch.cat([torch.arange(len(p) + len(c)) for p, c in packed])[None].to(model.device)
        with torch.no_grad():
            logits = model(tokens, position_ids=positions, use_cache=False, **bounds).logits[0].float()
        gold = torch.tensor([x for p, c in packed for x in [-100] * (len(p) - 1) + c + [-100]], device=model.device)
        return torch.nn.functional.cross_entropy(logits, gold, reduction="sum").item()

    model.set_attn_implementation("sdpa")
    apart = sum(loss([pair]) for pair in pairs)
    attention = llama.choose_attention("auto")
    model.set_attn_implementation(attention)
    lengths = torch.tensor([0] + [len(p) + len(c) for p, c in pairs])
    bounds, longest = lengths.cumsum(0).int().to(model.device), int(lengths.max())
    more = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {"attention": attention, "packed_loss_difference": abs(loss(pairs, **more) / apart - 1)}


def train(model, folder, length, extra=()):
    """Tokens/s and peak GB of train_llama.py, and the GB that its dry run says."""
    output = folder / "out"
    shutil.rmtree(output / "adapter", ignore_errors=True)
    command = [sys.executable, "train_llama.py", "--model", model, "--output-dir", output, "--max-length", length]
    command += ["--gradient-accumulation-steps", 1, "--overwrite", *extra]
    log = folder / "train.txt"
    run_on_gpu([*command, "--dry-run"], log)
    said = log.read_text()
    estimate = [float(number) for number in re.findall(r"^estimate +([\d.]+) +([\d.]+)", said, re.MULTILINE)[0]]
    limits = ["--max-steps", STEPS, "--logging-steps", 1, "--eval-steps", 10**6, "--save-steps", 10**6]
    seconds = run_on_gpu([*command, *limits], log)
    run = json.loads((output / "adapter" / "run.json").read_text())
    entries = [json.loads(line) for line in (output / "adapter" / "log.jsonl").read_text().splitlines()]
    speeds = [entry["tokens_per_second"] for entry in entries if "loss" in entry][2:]
    checkpointing = "on" in extra
    return {"tokens_per_second": statistics.median(speeds), "command_seconds": seconds,
            "peak_gb": run["peak_memory_gb"], "dry_run_gb": estimate[not checkpointing],
            "attention": run["attention"]}  # fmt: skip


def test(folder, log):
    """Tokens/s of test_llama.py's tuned system by task, and whether single rows give the same predictions."""
    found = {}
    for name, limit in {"batched": 16384, "single": 1}.items():
        more = ["--max-batch-tokens", limit, "--name", name, "--no-compare-with-base", "--overwrite"]
        run_on_gpu([sys.executable, "test_llama.py", "--output-dir", folder / "out", *more], log)
        speeds = re.findall(r"^(\w+): .* ([\d,]+) tokens in ([\d.]+) s", log.read_text(), re.MULTILINE)
        found[name] = {task: int(tokens.replace(",", "")) / float(seconds) for task, tokens, seconds in speeds}
    same = []
    for task in ("samsum", "trivia_qa"):
        pair = [json.loads((folder / "out" / f"{task}_predictions_{name}.json").read_text())["examples"]
                for name in found]  # fmt: skip
        same += [a["prediction"] == b["prediction"] for a, b in zip(*pair, strict=True)]
    return {"tokens_per_second": found, "same_predictions": sum(same) / len(same)}


def run_on_gpu(command, log):
    """Seconds of a command that sees the GPU; timed() hides it from the peers on the CPU."""
    import torch

    more = {} if not torch.cuda.is_available() else {"CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_USE_CPU": "false"}
    return timed(command, log, more)[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1B", "llama3-8B", "llama2-7B"])
    parser.add_argument("--folder", type=Path, default=FOLDER / "gpu", help="for models, data and logs: some 20 GB")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    import datasets
    import torch

    folder, cuda = args.folder.resolve(), torch.cuda.is_available()
    if not cuda and args.shapes != ["tiny"]:
        sys.exit("error: there is no GPU: give --shapes tiny to see that every part works on the CPU")
    shutil.rmtree(folder / "out", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    sources = ["--samsum", ROOT / "tests/fixtures/samsum", "--trivia-qa", ROOT / "tests/fixtures/trivia_qa"]
    timed([sys.executable, "build_dataset.py", *sources, *BUILD, "--output-dir", folder / "out"], folder / "build.txt")
    result = {"machine": machine() | {"gpu": torch.cuda.get_device_name() if cuda else None}, "training": {}}

    def note(**found):
        result.update(found)
        print(json.dumps(found), flush=True)
        if cuda:
            save("gpu", result)

    note(rates=rates(8192 if cuda else 512))
    rows = datasets.load_from_disk(str(folder / "out" / "dataset" / "train")).select(range(12)).to_dict()
    note(packing=packing_difference(rows))
    for shape in args.shapes:
        model = folder / "model"
        random_model(SHAPES[shape], model)
        if cuda:
            torch.cuda.empty_cache()
        for extra in ((), ("--activation-checkpointing", "on")):
            found = train(model, folder, 2048, extra)
            note(training=result["training"] | {" ".join([shape, *extra[1:]]): found})
        note(**{f"testing {shape}": test(folder, folder / "test.txt")})
        shutil.rmtree(model)
    head = ["", "tokens/s", "peak GB", "dry run, GB"]
    table(head, [[name, f"{run['tokens_per_second']:,.0f}", f"{run['peak_gb']:.2f}", f"{run['dry_run_gb']:.2f}"]
                 for name, run in result["training"].items()])  # fmt: skip


if __name__ == "__main__":
    main()
