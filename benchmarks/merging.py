"""Measure merge_llama.py beside PEFT's merge_and_unload + save_pretrained: peak memory and seconds.

A random Llama of 1.1 B parameters (bf16, TinyLlama's shape) in 300 MB shards, with a random adapter of rank 8 on all
linear layers, merged by both in turn, each in a process of its own; then one three times as deep, by merge_llama.py
alone. Peak memory is the largest resident set, mapped files included: merging takes a shard, the check base and
adapter, in float32 here. merge_llama.py's seconds are those of the command less verification, and of verification,
which runs base and adapter, reads every tensor again and runs the merged model.

    python benchmarks/merging.py
    python benchmarks/merging.py --layers 4 --no-deeper --folder /tmp/merging_benchmark
    python benchmarks/merging.py --types-of outputs --check-rows 16  # what each base and type would cost that adapter
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from peers import ROOT, machine, save

LAYERS = 22
RUNS = 3
CHECK_ROWS = 4
FOLDER = "/tmp/merging_benchmark"
SHARD = 300e6  # bytes
TOKENIZER = ROOT / "tests" / "fixtures" / "tiny_llama2"
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(target, max_shard_size="300MB")
AutoTokenizer.from_pretrained(base).save_pretrained(target)
"""


def prepare(folder, layers, merge_base):
    """Base and adapter under `folder`, written shard by shard: the model is never in memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    base, adapter = folder / "base", folder / "out" / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True)
    for path in TOKENIZER.glob("tokenizer*"):
        shutil.copy(path, base)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=32000, bos_token_id=1, eos_token_id=2,
                         dtype="bfloat16", architectures=["LlamaForCausalLM"])  # fmt: skip
    config.save_pretrained(base)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora, low_cpu_mem_usage=True)
    shards, size = [[]], 0
    for name, shape in shapes.items():
        number = 2 * torch.Size(shape).numel()
        if size + number > SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += number
    random = torch.Generator().manual_seed(0)
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {name: torch.empty(shapes[name]).normal_(0, 0.02, generator=random).bfloat16() for name in names}
        tensors |= {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names if "norm" in name}
        save_file(tensors, base / file, metadata={"format": "pt"})
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    content = {
        name.replace(".default", ""): torch.empty(tensor.shape).normal_(0, 0.01, generator=random)
        for name, tensor in adapted.state_dict().items()
        if "lora_" in name
    }
    save_file(content, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.base_model_name_or_path, lora.target_modules = (
        str(base),
        sorted(adapted.peft_config["default"].target_modules),
    )
    lora.save_pretrained(adapter)
    run = {"settings": {"load_in_4bit": merge_base == "4bit"}}  # merged into what it was trained on: one comparison
    (adapter / "run.json").write_text(json.dumps(run))
    return parameters


def measure(command):
    """Seconds and peak memory (GB) of a process that ends well."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.time()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed:\n{error.decode()[-3000:]}")
    return time.time() - start, usage.ru_maxrss * 1024 / 1e9


def ours(folder, args):
    """Seconds without verification, of verification, and peak memory (GB)."""
    command = [sys.executable, ROOT / "merge_llama.py", "--output-dir", folder / "out"]
    seconds, peak = measure([*command, "--merge-base", args.merge_base, "--check-rows", args.check_rows])
    report = json.loads((folder / "out" / "merged" / "merge.json").read_text())
    shutil.rmtree(folder / "out" / "merged")
    return seconds - report["seconds_verifying"], report["seconds_verifying"], peak


def compare_types(output, check_rows):
    """Print how far a merge into each base and type would be from base + adapter, on validation rows in float32."""
    sys.path.insert(0, str(ROOT))
    import torch

    import merge_llama
    from pipeline import models
    from pipeline.merging import tensors, verify
    from pipeline.tokens import tokenizer_of

    args = merge_llama.parse_args(["--output-dir", output, "--check-rows", str(check_rows)])
    folder = Path(output) / "adapter"
    base = models.find_model(models.read_adapter(folder))
    _, ids = merge_llama.check_rows(args, tokenizer_of(base, folder))
    model = verify.load_tuned(base, folder, "16bit", "cpu", "float32")
    tuned, golds = verify.logits_of(model, ids)
    print(f"base + adapter: perplexity {verify.perplexity(tuned, golds):.5g}")
    merged = models.load_model(base, load_in_4bit=False, device_map="cpu", dtype=torch.float32)
    parameters, changes = dict(merged.named_parameters()), tensors.changes_of(model, folder)
    for into in ("16bit", "4bit"):
        for dtype in merge_llama.DTYPES:
            for path in models.weight_files(base):
                for name, _, weight in tensors.merged_tensors(path, changes, into):
                    if name in parameters:
                        parameters[name].data.copy_(weight.to(getattr(torch, dtype)))
            figures = verify.compare(tuned, verify.logits_of(merged, ids)[0], golds)
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in figures.items())
            print(f"into {into}, {dtype}: {shown}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--check-rows", type=int, default=CHECK_ROWS)
    parser.add_argument("--deeper", action=argparse.BooleanOptionalAction, default=True, help="three times, too")
    parser.add_argument("--merge-base", choices=["16bit", "4bit"], default="16bit")
    parser.add_argument("--folder", default=FOLDER, help="some 8 GB at a time; is removed")
    parser.add_argument("--types-of", help="an output folder: compare the types for its adapter, and measure nothing")
    args = parser.parse_args()
    if args.types_of:
        compare_types(args.types_of, args.check_rows)
        return
    root = Path(args.folder)
    shutil.rmtree(root, ignore_errors=True)
    sources = ["--samsum", ROOT / "tests/fixtures/samsum", "--trivia-qa", ROOT / "tests/fixtures/trivia_qa"]
    measure([sys.executable, ROOT / "build_dataset.py", *sources, "--max-context-words", 120, "--output-dir", root])
    described, results = machine(), {"merge_llama.py": [], "PEFT": []}
    for factor in (1, 3) if args.deeper else (1,):
        folder = root / str(factor)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a child's peak counts its parent's memory
            parameters = pool.apply(prepare, (folder, factor * args.layers, args.merge_base))
        (folder / "out" / "dataset").symlink_to(root / "dataset")
        print(f"{factor * args.layers} layers, {parameters / 1e9:.2f} B parameters", flush=True)
        for _ in range(args.runs if factor == 1 else 1):
            results["merge_llama.py"].append(ours(folder, args))
            print("merge_llama.py ", *(f"{value:.2f}" for value in results["merge_llama.py"][-1]), flush=True)
            if factor == 1:
                command = [sys.executable, "-c", PEFT, folder / "base", folder / "out" / "adapter", folder / "peft"]
                seconds, peak = measure(command)
                shutil.rmtree(folder / "peft")
                results["PEFT"].append((seconds, 0, peak))
                print("PEFT           ", f"{seconds:.2f} - {peak:.2f}", flush=True)
        shutil.rmtree(folder)
    shutil.rmtree(root)
    single, deep = results["merge_llama.py"][: args.runs], results["merge_llama.py"][args.runs :]
    if (args.layers, args.check_rows, args.merge_base, args.deeper) == (LAYERS, CHECK_ROWS, "16bit", True):
        runs = {"merge_llama.py": single, "PEFT": results["PEFT"], "deep": deep}
        save("merging_large", {"machine": described, **runs})
    print("\n| | merging, s | verification, s | peak GB |\n|---|---|---|---|")
    rows = {"merge_llama.py": single, "PEFT, not verified": results["PEFT"]}
    rows |= {"merge_llama.py, three times as deep": deep} if deep else {}
    for name, runs in rows.items():
        merging, verifying, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {merging:.1f} | {verifying:.1f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
