"""Measure how time and memory of train_llama.py grow with rows, sequence length, model size and processes.

Everything runs on the CPU in NF4, one epoch, no validation to speak of. Rows are the demo's; for sequence length each
row fills its sequence and the number of tokens stays the same; models are random Llamas of 1 M to 1 B parameters with
the tiny one's tokenizer, the large ones on fewer rows: theirs are the seconds of 1,000 tokens. Seconds are of the
training loop, memory is the peak of the first process, some 0.5 GB of it libraries. The exponent is the slope of
log(seconds or GB) over log(size), by least squares: 1 means linear.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --only rows processes --shrink 4
"""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

from peers import FOLDER, LEARNING_RATE, MODEL, RESULTS, machine, prepare, save, table, timed

ROWS = (100, 200, 400, 800)
LENGTHS = (256, 512, 1024, 2048)  # tokens of a row and of a sequence
TOKENS = 65_536  # of a run over lengths
SIZES = ((128, 4, 60), (256, 6, 60), (512, 10, 60), (1024, 12, 24), (2048, 20, 24))  # hidden size, layers, rows
PROCESS_ROWS = 400
AXES = {"rows": "training rows", "lengths": "tokens of a sequence", "sizes": "parameters", "processes": "processes"}


def data_of(source, rows, folder):
    """OUTPUT_DIR with `rows` (a datasets.Dataset) to train on, and two of each task to validate on."""
    import datasets

    output = folder / "scaling"
    shutil.rmtree(output, ignore_errors=True)
    parts = datasets.load_from_disk(str(source))
    few = [i for task in ("samsum", "trivia_qa") for i, t in enumerate(parts["validation"]["task"]) if t == task][::60]
    datasets.DatasetDict(train=rows, validation=parts["validation"].select(few)).save_to_disk(str(output / "dataset"))
    return output


def train(output, folder, model=MODEL, length=1024, accumulation=1, processes=1, threads=None):
    """Loop seconds, peak GB, tokens and parameters of one run."""
    command = [sys.executable]
    more = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    if processes > 1:
        command = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", processes]
    command += ["train_llama.py", "--model", model, "--output-dir", output, "--max-length", length]
    command += ["--gradient-accumulation-steps", accumulation, "--learning-rate", LEARNING_RATE / 4]
    timed([*command, "--eval-steps", 10**6, "--save-steps", 10**6], folder / "scaling.txt", more)
    run = json.loads((output / "adapter" / "run.json").read_text())
    return {"seconds": run["seconds"], "peak_gb": run["peak_memory_gb"], "tokens": run["tokens"]}


def long_rows(rows, length, count, folder):
    """`count` rows of exactly `length` tokens, EOS included: the prompts of `rows` one after the other, cut."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    completion = rows[0]["completion"]
    text = [token for prompt in rows["prompt"] for token in tokenizer(prompt, add_special_tokens=False).input_ids]
    end = len(tokenizer(completion, add_special_tokens=False).input_ids) + 1

    def encoded(prompt):
        return len(tokenizer(prompt).input_ids) + end

    made, start = [], 0
    while len(made) < count:
        size = length - end - 1
        prompt = tokenizer.decode(text[start : start + size], clean_up_tokenization_spaces=False).strip()
        while encoded(prompt) > length:  # what was cut apart may be encoded in more pieces
            prompt = prompt[: -(encoded(prompt) - length)].strip()
        made.append(rows[0] | {"id": str(len(made)), "prompt": prompt})
        start = (start + size) % (len(text) - length)
    return datasets.Dataset.from_list(made, features=rows.features)


def random_model(sizes, folder):
    """Write a random bf16 Llama of these sizes and the tiny model's tokenizer; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig.from_pretrained(folder)
    config.update(sizes | {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"]})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.do_sample = True  # or its temperature would be refused
    model.save_pretrained(folder, max_shard_size="4GB")
    return model.num_parameters()


def exponent(sizes, values):
    """Slope of log(values) over log(sizes)."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in values]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def measure(axis, folder, shrink):
    """The runs along an axis, each with its `size`."""
    import datasets

    source = folder / "data" / "dataset"
    rows, runs = datasets.load_from_disk(str(source / "train")), []

    def run(size, some, **options):
        runs.append({"size": size} | options.pop("note", {}) | train(data_of(source, some, folder), folder, **options))
        print(f"{axis} {size}: {runs[-1]['seconds']:.1f} s, {runs[-1]['peak_gb']:.2f} GB", flush=True)

    if axis == "rows":
        for count in ROWS:
            run(count // shrink, rows.select(range(count // shrink)))
    elif axis == "lengths":
        for length in LENGTHS:
            some = long_rows(rows, length, TOKENS // length // shrink, folder)
            run(length, some, length=length)
    elif axis == "sizes":
        for hidden, layers, count in SIZES:
            model = folder / "random_model"
            parameters = random_model({"hidden_size": hidden, "intermediate_size": 3 * hidden,
                                       "num_hidden_layers": layers, "num_attention_heads": hidden // 32,
                                       "num_key_value_heads": hidden // 64}, model)  # fmt: skip
            run(parameters, rows.select(range(count // shrink)), model=model)
            shutil.rmtree(model)
    else:
        some = rows.select(range(PROCESS_ROWS // shrink))
        for processes, threads in ((1, 1), (1, 2), (2, 1)):
            run(processes, some, processes=processes, threads=threads, accumulation=2 // processes,
                note={"threads": threads})  # fmt: skip
    return runs


def values_of(axis, key, runs):
    """The peak GB or seconds of runs; over sizes, the seconds of 1,000 tokens."""
    return [1000 * run[key] / run["tokens"] if (axis, key) == ("sizes", "seconds") else run[key] for run in runs]


def draw(result, path):
    os.environ["MPLBACKEND"] = "agg"  # before the import: a notebook's shell names one that is not installed
    from matplotlib import pyplot

    axes = [axis for axis in result["axes"] if axis != "processes"]
    figure, plots = pyplot.subplots(2, len(axes), figsize=(4 * len(axes), 6), squeeze=False)
    for column, axis in enumerate(axes):
        runs = result["axes"][axis]
        sizes = [run["size"] for run in runs]
        for row, (key, label) in enumerate({"seconds": "training loop, s", "peak_gb": "peak memory, GB"}.items()):
            plot, values = plots[row][column], values_of(axis, key, runs)
            label = "s for 1,000 tokens" if (axis, key) == ("sizes", "seconds") else label
            plot.loglog(sizes, values, marker="o")
            plot.set(xlabel=AXES[axis], ylabel=label, title=f"exponent {result['exponents'][axis][key]:.2f}")
            plot.set_xticks(sizes, [f"{size / 1e6:.0f} M" if size >= 1e6 else str(size) for size in sizes])
            plot.set_ylim(min(values) / 2, max(values) * 2)
            plot.minorticks_off()
            plot.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--shrink", type=int, default=1, help="divides the rows of each run; results are not kept")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for data, adapters and logs")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, 0)
    result = {"machine": machine(), "axes": {}, "exponents": {}}
    for axis in args.only:
        runs = result["axes"][axis] = measure(axis, folder, args.shrink)
        if axis != "processes":
            keys = ("seconds", "peak_gb")
            sizes = [run["size"] for run in runs]
            result["exponents"][axis] = {key: exponent(sizes, values_of(axis, key, runs)) for key in keys}
    kept = args.shrink == 1 and args.only == list(AXES)
    if kept:
        save("scaling", result)
    if result["exponents"]:
        draw(result, RESULTS / "scaling.png" if kept else folder / "scaling.png")
    for axis, runs in result["axes"].items():
        head = [AXES[axis], *(["threads of each"] if axis == "processes" else []), "loop, s", "peak GB", "tokens/s"]
        rows = [[f"{run['size']:,}", *([str(run["threads"])] if axis == "processes" else []), f"{run['seconds']:.1f}",
                 f"{run['peak_gb']:.2f}", f"{run['tokens'] / run['seconds']:,.0f}"] for run in runs]  # fmt: skip
        table(head, rows)
        if axis in result["exponents"]:
            print("exponent: " + ", ".join(f"{key} {value:.2f}" for key, value in result["exponents"][axis].items()))
    print(f"{os.cpu_count()} cores")


if __name__ == "__main__":
    main()
