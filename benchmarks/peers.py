"""Measure this project beside its peers: training, merging, scoring, and how soon each script answers.

Each peer has a virtual environment of its own, made from benchmarks/peers/NAME.txt where it is not there yet. Every
result goes to benchmarks/results/ with a description of the machine; report.py makes the tables of RESULTS.md of it.

Training is the same job for all: tests/fixtures/tiny_llama3 in NF4 with double quantisation, float32 arithmetic, the
demo's training rows as the same token ids and labels (checked row by row), LoRA with r = 8 and alpha = 16 on all
linear layers without dropout, AdamW, the same peak learning rate, warm-up steps and a cosine, nothing longer than
1024 tokens, one epoch. What differs is what each of them is: how rows are batched, and so the number of optimizer
steps, attention, loss and checkpointing. Without a remark the batch size (8) and activation checkpointing (on) are the
peer's own; with one they are its documented flags for speed. train_llama.py packs its steps to 1024 tokens, and in its
second row to 1536, which comes to as many steps as the peers' 8 rows. It alone also validates, once, within its loop.
The plain loop, in benchmarks/peers/plain_loop.py, is the floor. With --model and --samsum the job is another model and
dialogues of a folder, tested on 60 others.

Seconds in the loop are each trainer's own figure; seconds of the command, from its start to the adapter on disk, and
peak memory are taken from outside. Quality is test_llama.py's perplexity of every adapter on the test split: a faster
loop with a higher one is no better.

    python benchmarks/peers.py
    python benchmarks/peers.py --stages training --only train_llama.py "trl sft" --rows 100 --runs 1
    python benchmarks/peers.py --model FOLDER --samsum FOLDER --rows 120
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RUNS = 3
MAX_LENGTH = 1024
LEARNING_RATE, WARMUP_STEPS = 4e-3, 10
FOLDER = Path(tempfile.gettempdir()) / "llama_peers"

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "benchmarks" / "peers"
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "tests" / "fixtures" / "tiny_llama3"
DEMO = ROOT / "outputs" / "demo"
SCRIPTS = ("build_dataset.py", "train_llama.py", "test_llama.py", "evaluations.py", "merge_llama.py")

PEFT_MERGE = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
adapter, output = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto").merge_and_unload()
model.save_pretrained(output)
AutoTokenizer.from_pretrained(adapter).save_pretrained(output)
"""

# The log-likelihood of each completion and of the EOS that test_llama.py scores too; per row, in nats.
LM_EVAL = """
import json, sys, time
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model, rows, output = sys.argv[1:]
rows = [json.loads(line) for line in open(rows)]
lm = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=8, add_bos_token=True)
pairs = [(row["prompt"], row["completion"] + lm.tokenizer.eos_token) for row in rows]
start = time.time()
scores = lm.loglikelihood([Instance("loglikelihood", row, pair, i) for i, (row, pair) in enumerate(zip(rows, pairs))])
seconds = time.time() - start
tokens = [len(lm._encode_pair(*pair)[1]) for pair in pairs]
json.dump({"seconds": seconds, "nll": [-score for score, _ in scores], "tokens": tokens}, open(output, "w"))
"""

# The rows as `trl sft` trains on them: its trainer, with the same rows, length and model.
TRL_TOKENS = """
import json, sys
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
model, rows, length, output = sys.argv[1:]
config = SFTConfig(output_dir=output + ".folder", max_length=int(length), use_cpu=True, bf16=False, report_to="none")
trainer = SFTTrainer(model, args=config, train_dataset=load_dataset(rows, split="train"))
rows = [[row["input_ids"], [int(label != -100) for label in row["labels"]]] for row in trainer.train_dataset]
json.dump(rows, open(output, "w"))
"""


# A process begins with the peak memory of the one that started it: a small one starts what is measured.
WAIT = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
os.write(int(sys.argv[1]), str(usage.ru_maxrss).encode())
os._exit(min(1, abs(os.waitstatus_to_exitcode(status))))
"""


def machine():
    """What a result was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    sys.path.insert(0, str(ROOT))
    from pipeline.script import git_commit

    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load_at_start": round(os.getloadavg()[0], 2),
        "commit": (git_commit() or "unknown")[:7],
        "date": datetime.date.today().isoformat(),
    }


def save(name, result):
    """results/NAME.json, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    beside = RESULTS / f".{name}.new"
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(RESULTS / f"{name}.json")


def table(head, rows):
    """A Markdown table."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def timed(command, log, more=None):
    """Seconds and peak resident memory (GB, of the largest process) of a command; exits where it fails."""
    here = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment, words = os.environ | here | (more or {}), [str(word) for word in command]
    reading, writing = os.pipe()
    start = time.time()
    with open(log, "w") as file:
        options = {"stdout": file, "stderr": file, "env": environment, "cwd": ROOT, "pass_fds": [writing]}
        code = subprocess.run([sys.executable, "-c", WAIT, str(writing), *words], **options).returncode
    seconds = time.time() - start
    os.close(writing)
    with open(reading) as file:
        peak = int(file.read() or 0) * 1024 / 1e9
    if code:
        sys.exit(f"{' '.join(words)} failed, see {log}:\n{Path(log).read_text()[-3000:]}")
    return seconds, peak


def environment_of(peer, folder):
    """The bin folder of the peer's virtual environment, made from its requirements where it does not stand yet."""
    requirements = REQUIREMENTS / f"{peer}.txt"
    home = folder / "environments" / peer
    stamp = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not (home / "stamp").exists() or (home / "stamp").read_text() != stamp:
        print(f"making the environment of {peer}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        log = folder / f"{peer}_install.txt"
        timed([home / "bin" / "pip", "install", "--disable-pip-version-check", "-r", requirements], log)
        if peer == "llamafactory":
            mend_llamafactory(home / "bin", log)
        (home / "stamp").write_text(stamp)
    return home / "bin"


def mend_llamafactory(binaries, log):
    """It requires torchvision and torchaudio, which text does not use and which may be built for another torch."""
    timed([binaries / "pip", "uninstall", "-y", "torchvision", "torchaudio"], log)
    site = subprocess.run([binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip
    (Path(site) / "torchaudio.py").touch()


def write_alpaca(rows, tokenizer, folder):
    """The rows as LLaMA-Factory reads them, with BOS and EOS in their text, for its template "empty"."""
    start = tokenizer.bos_token * (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    pairs = [{"instruction": start + row["prompt"], "input": "", "output": row["completion"] + tokenizer.eos_token}
             for row in rows]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(pairs))
    (folder / "dataset_info.json").write_text(json.dumps({"train": {"file_name": "train.json"}}))


def prepare(folder, count=0, model=MODEL, samsum=None):
    """A data set with `count` training rows (0: all), rows and base for the peers; returns the rows' token ids.

    The demo's, or of the dialogues in the folder `samsum` alone.
    """
    import datasets
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(ROOT))
    import train_llama
    from pipeline import models
    from pipeline.files import load_rows
    from pipeline.tokens import load_tokenizer

    models.quiet()
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    build = ["--samsum", ROOT / "tests/fixtures/samsum", "--trivia-qa", ROOT / "tests/fixtures/trivia_qa"]
    build += ["--max-context-words", 120, "--test-examples-per-task", 100]
    if samsum:
        build = ["--samsum", samsum, "--tasks", "samsum", "--validation-examples-per-task", 2]
        build += ["--test-examples-per-task", 60]
    timed([sys.executable, "build_dataset.py", *build, "--output-dir", data], folder / "build.txt")
    if count:
        parts = datasets.load_from_disk(str(data / "dataset"))
        parts["train"] = parts["train"].select(range(min(count, len(parts["train"]))))
        parts.save_to_disk(str(data / "fewer"))
        shutil.rmtree(data / "dataset")
        (data / "fewer").rename(data / "dataset")
    rows, tokenizer = load_rows(data, "train"), load_tokenizer(str(model), "off")
    rows.select_columns(["prompt", "completion"]).to_parquet(str(data / "rows" / "train.parquet"))
    write_alpaca(rows, tokenizer, data / "alpaca")
    # LLaMA-Factory computes in the dtype of the files: the same numbers, in float32
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(data / "float32")
    for path in model.glob("*token*.json"):
        shutil.copy(path, data / "float32")
    tokens = train_llama.tokenize(rows, tokenizer, MAX_LENGTH, "train").select_columns(["input_ids", "labels"])
    (data / "tokens.json").write_text(json.dumps(tokens.to_list()))
    return tokens


def ours(args, output, *more, length=MAX_LENGTH):
    output.mkdir()
    shutil.copytree(args.folder / "data" / "dataset", output / "dataset")
    command = [sys.executable, "train_llama.py", "--model", args.model, "--output-dir", output]
    command += ["--chat-template", "off", "--max-length", length, "--num-train-epochs", 1]
    command += ["--learning-rate", args.learning_rate, "--warmup-steps", args.warmup_steps]
    command += ["--gradient-accumulation-steps", 1, "--eval-steps", 10**6, "--save-steps", 10**6]
    return [*command, *more], output / "adapter"


def trl(args, output, *more):
    command = [environment_of("trl", args.folder) / "trl", "sft", "--model_name_or_path", args.model]
    command += ["--dataset_name", args.folder / "data" / "rows", "--load_in_4bit", "--use_bnb_nested_quant"]
    command += ["--use_peft", "--lora_r", 8, "--lora_alpha", 16, "--lora_dropout", 0.0]
    command += ["--lora_target_modules", "all-linear", "--max_length", MAX_LENGTH, "--num_train_epochs", 1]
    command += ["--learning_rate", args.learning_rate, "--warmup_steps", args.warmup_steps]
    command += ["--lr_scheduler_type", "cosine", "--use_cpu", "--bf16", "false"]
    return [*command, "--output_dir", output, "--report_to", "none", *more], output


def llamafactory(args, output, *more):
    settings = {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "quantization_bit": 4,
        "model_name_or_path": str(args.folder / "data" / "float32"), "double_quantization": True,
        "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target": "all", "template": "empty",
        "dataset_dir": str(args.folder / "data" / "alpaca"), "dataset": "train", "cutoff_len": MAX_LENGTH,
        "output_dir": str(output), "num_train_epochs": 1, "use_cpu": True, "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine", "warmup_steps": args.warmup_steps, "report_to": "none", "overwrite_cache": True,
    }  # fmt: skip
    settings |= dict(more)
    file = output.with_suffix(".yaml")  # JSON is YAML
    file.write_text(json.dumps(settings, indent=1))
    return [environment_of("llamafactory", args.folder) / "llamafactory-cli", "train", file], output


def plain_loop(args, output):
    command = [sys.executable, REQUIREMENTS / "plain_loop.py", args.model, args.folder / "data" / "tokens.json"]
    return [*command, output, args.learning_rate, args.warmup_steps], output


NO_CHECKPOINTING = ("disable_gradient_checkpointing", True)
TRAINERS = {
    "train_llama.py": ours,
    "train_llama.py, larger steps": lambda args, output: ours(args, output, length=1536),
    "trl sft": trl,
    "trl sft, by length": lambda args, output: trl(
        args, output, "--train_sampling_strategy", "group_by_length", "--activation_checkpointing", "false"
    ),
    "LLaMA-Factory": llamafactory,
    "LLaMA-Factory, neat_packing": lambda args, output: llamafactory(
        args, output, ("packing", True), ("neat_packing", True), ("per_device_train_batch_size", 1), NO_CHECKPOINTING
    ),
    "LLaMA-Factory, by length": lambda args, output: llamafactory(
        args, output, ("train_sampling_strategy", "group_by_length"), NO_CHECKPOINTING
    ),
    "plain loop": plain_loop,
}
NOT_RUN = {  # what came of trying them on a CPU
    "trl sft --packing": "slower than as shipped on a CPU: 3,280 to 3,473 tokens/s, one run each, on 2 cores",
    "Unsloth": 'needs a GPU: "Unsloth cannot find any torch accelerator? You need a GPU." (its source; not tried)',
    "LitGPT 0.5.13": '`litgpt finetune_lora --quantize bnb.nf4-dq`: "Bitsandbytes is only supported on CUDA GPUs."',
    "Axolotl 0.21.0": "needs Python 3.12; there its installation was not done after six minutes and 5.9 GB",
}


def same_tokens(peer, args, tokens):
    """Whether the peer trains on the same ids and labels, row by row."""
    from datasets import load_from_disk

    where, log = args.folder / f"tokenized_{peer}", args.folder / "tokenize.txt"
    ours = [[row["input_ids"], row["labels"]] for row in tokens]
    if peer == "trl":
        python = environment_of("trl", args.folder) / "python"
        timed([python, "-c", TRL_TOKENS, args.model, args.folder / "data" / "rows", MAX_LENGTH, where], log)
        return json.loads(where.read_text()) == [[ids, [int(label != -100) for label in row]] for ids, row in ours]
    for folder in (where, args.folder / "tokenize"):  # stored as asked; a model's before it would be gone on from
        shutil.rmtree(folder, ignore_errors=True)
    timed(llamafactory(args, args.folder / "tokenize", ("tokenized_path", str(where)), ("max_steps", 1))[0], log)
    return [[row["input_ids"], row["labels"]] for row in load_from_disk(str(where))["train"]] == ours


def perplexities(folder, system, name):
    """test_llama.py's perplexity of the system (its flags), by task and together, its seconds, and each row's nll."""
    command = [sys.executable, "test_llama.py", *system, "--output-dir", folder / "data", "--name", name]
    command += ["--overwrite", "--no-compare-with-base", "--chat-template", "off", "--general-text", ""]
    command += ["--samsum-max-new-tokens", 1, "--trivia-qa-max-new-tokens", 1]
    log = folder / f"test_{name}.txt"
    seconds, _ = timed(command, log)
    inner = sum(float(number) for number in re.findall(r" tokens in ([\d.]+) s", log.read_text()))
    result, nll = {"command_seconds": seconds, "scoring_seconds": inner}, {}
    for path in sorted((folder / "data").glob(f"*_predictions_{name}.json")):
        content = json.loads(path.read_text())
        result[content["task"]] = content["perplexity"]["tuned"]["perplexity"]
        nll |= {example["id"]: (example["nll"], example["tokens"]) for example in content["examples"]}
    result["together"] = math.exp(math.fsum(n for n, _ in nll.values()) / sum(t for _, t in nll.values()))
    return result, nll


def train(name, args, number):
    """One run: loop's and command's seconds, peak GB, optimizer steps, FLOP/s of a matrix product; and its adapter."""
    from pipeline.training.estimate import matrix_rate

    output = args.folder / f"{name.replace(' ', '_').replace(',', '')}_{number}"
    shutil.rmtree(output, ignore_errors=True)
    log = output.with_suffix(".txt")
    command, adapter = TRAINERS[name](args, output)
    rate = matrix_rate()
    seconds, peak = timed(command, log)
    if (adapter / "run.json").exists():
        loop, steps = map(json.loads((adapter / "run.json").read_text()).get, ("seconds", "steps"))
    elif (adapter / "train_results.json").exists():
        loop = json.loads((adapter / "train_results.json").read_text())["train_runtime"]
        steps = json.loads((adapter / "trainer_state.json").read_text())["global_step"]
    else:
        loop = float(log.read_text().split("'train_runtime': ")[1].split(",")[0].strip("' "))
        states = adapter.glob("checkpoint-*/trainer_state.json")
        steps = max(json.loads(path.read_text())["global_step"] for path in states)
    run = {"loop_seconds": loop, "command_seconds": seconds, "peak_gb": peak, "steps": steps}
    return run | {"matrix_rate": (rate + matrix_rate()) / 2}, adapter


def training(args):
    tokens = prepare(args.folder, args.rows, args.model, args.samsum)
    import train_llama
    from pipeline import models
    from pipeline.training.estimate import labelled, model_shape, operations
    from pipeline.training.trainer import lora_config

    lora = lora_config(train_llama.parse_args([]))
    shape = model_shape(args.model, models.load_config(str(args.model)), lora)
    lengths, completions = list(map(len, tokens["labels"])), sum(map(labelled, tokens["labels"]))
    total, flop = sum(lengths), operations(shape, lengths, completions, "off")
    print(f"{len(tokens)} rows, {total:,} tokens, {completions:,} of them with a loss, {flop:.3g} FLOP", flush=True)
    result = {"machine": machine(), "model": args.model.name, "parameters": shape["parameters"], "flop": flop}
    result |= {"rows": len(tokens), "tokens": total, "completion_tokens": completions, "trainers": {}}
    result |= {"learning_rate": args.learning_rate, "not_run": NOT_RUN}
    names = args.only or list(TRAINERS)
    for peer, start in {"trl": "trl", "llamafactory": "LLaMA-Factory"}.items():
        if any(name.startswith(start) for name in names):
            result[f"{peer}_tokens_are_ours"] = same_tokens(peer, args, tokens)
            print(f"{peer} has the same ids and labels: {result[f'{peer}_tokens_are_ours']}", flush=True)
    measured = {}  # perplexity by the adapter's hash: the same weights are not tested again
    for number in range(args.runs):
        for name in names:
            if number and name in args.once:
                continue
            run, adapter = train(name, args, number)
            digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
            if digest not in measured:
                system = ["--adapter", adapter, "--model", args.model, "--load-in-4bit"]
                measured[digest], _ = perplexities(args.folder, system, "peer")
            run |= {"tokens_per_second": total / run["loop_seconds"], "perplexity": measured[digest]}
            run["share_of_rate"] = flop / run["loop_seconds"] / run["matrix_rate"]
            result["trainers"].setdefault(name, []).append(run)
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in run.items() if key != "perplexity")
                  + f", perplexity {run['perplexity']['together']:.4f}", flush=True)  # fmt: skip
            if args.samsum or not (args.rows or args.only or args.model != MODEL):
                save("training_real" if args.samsum else "training", result)


def merging(args):
    """merge_llama.py, PEFT's own merge and LLaMA-Factory's export of the demo's adapter."""
    peft, factory = environment_of("trl", args.folder) / "python", environment_of("llamafactory", args.folder)
    work = args.folder / "merge"
    shutil.rmtree(work, ignore_errors=True)
    (work / "ours").mkdir(parents=True)
    for name in ("adapter", "dataset"):
        (work / "ours" / name).symlink_to(DEMO / name)
    export = {"model_name_or_path": str(MODEL), "adapter_name_or_path": str(DEMO / "adapter"), "template": "empty",
              "finetuning_type": "lora", "export_dir": str(work / "factory"), "export_device": "cpu"}  # fmt: skip
    (work / "export.yaml").write_text(json.dumps(export))
    commands = {
        "merge_llama.py": ([sys.executable, "merge_llama.py", "--output-dir", work / "ours"], work / "ours/merged"),
        "PEFT merge_and_unload": ([peft, "-c", PEFT_MERGE, DEMO / "adapter", work / "peft"], work / "peft"),
        "LLaMA-Factory export": ([factory / "llamafactory-cli", "export", work / "export.yaml"], work / "factory"),
    }
    result = {"machine": machine(), "mergers": {name: [] for name in commands}}
    for _ in range(args.runs):
        for name, (command, output) in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            seconds, peak = timed(command, work / "log.txt")
            result["mergers"][name].append({"command_seconds": seconds, "peak_gb": peak})
    for name, runs in result["mergers"].items():
        output = commands[name][1]
        quality, _ = perplexities(args.folder, ["--model", output, "--no-load-in-4bit"], "merged")
        dtype = json.loads((output / "config.json").read_text())["dtype"]
        result["mergers"][name] = {"runs": runs, "perplexity": quality, "dtype": dtype}
    save("merging", result)
    print(json.dumps(result["mergers"], indent=1))


def scoring(args):
    """Log-likelihood of the test rows' completions: lm-evaluation-harness beside test_llama.py, both in float32."""
    import datasets

    folder = args.folder
    python, work = environment_of("lm_eval", folder) / "python", folder / "scoring.json"
    rows = datasets.load_from_disk(str(folder / "data" / "dataset" / "test"))
    lines = folder / "test_rows.jsonl"
    rows.select_columns(["prompt", "completion"]).to_json(lines)
    model = DEMO / "merged"
    seconds, inner = ({"lm_eval": [], "test_llama.py": []} for _ in range(2))
    for _ in range(args.runs):
        seconds["lm_eval"].append(timed([python, "-c", LM_EVAL, model, lines, work], folder / "lm_eval.txt")[0])
        theirs = json.loads(work.read_text())
        inner["lm_eval"].append(theirs["seconds"])
        quality, nll = perplexities(folder, ["--model", model, "--no-load-in-4bit"], "scored")
        seconds["test_llama.py"].append(quality["command_seconds"])
        inner["test_llama.py"].append(quality["scoring_seconds"])
    ids = rows["id"]
    totals = math.fsum(theirs["nll"]), math.fsum(nll[i][0] for i in ids)
    tokens = sum(theirs["tokens"]), sum(nll[i][1] for i in ids)
    worst = max(abs(a - nll[i][0]) for i, a in zip(ids, theirs["nll"], strict=True))
    result = {"machine": machine(), "rows": len(ids), "command_seconds": seconds, "scoring_seconds": inner}
    result |= {"largest_difference_of_a_row": worst, "relative_difference": abs(totals[0] / totals[1] - 1)}
    result |= {"nll_sum": dict(zip(seconds, totals, strict=True)), "tokens": dict(zip(seconds, tokens, strict=True))}
    save("scoring", result)
    print(json.dumps(result, indent=1))
    if tokens[0] != tokens[1] or result["relative_difference"] > 1e-3:
        sys.exit("error: the two do not score the same completions alike: see results/scoring.json")


def startup(args):
    """Seconds of each script's --help, and from train_llama.py's command to its first optimizer step on the demo."""
    result = {"machine": machine(), "help_seconds": {}, "first_step_seconds": []}
    for script in SCRIPTS:
        runs = [timed([sys.executable, script, "--help"], args.folder / "help.txt")[0] for _ in range(args.runs + 1)]
        result["help_seconds"][script] = runs[1:]  # the first one fills the disk's cache
    for _ in range(args.runs):
        output = args.folder / "first_step"
        shutil.rmtree(output, ignore_errors=True)
        command, _ = ours(args, output, "--logging-steps", 1)
        start = time.time()
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                   stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
        for line in process.stdout:
            if line.startswith("step"):
                result["first_step_seconds"].append(time.time() - start)
                break
        process.kill()
        process.communicate()
    if len(result["first_step_seconds"]) < args.runs:
        sys.exit("error: train_llama.py made no step")
    save("startup", result)
    print(json.dumps(result, indent=1))


STAGES = {"training": training, "merging": merging, "scoring": scoring, "startup": startup}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, in turn")
    parser.add_argument("--only", nargs="+", choices=list(TRAINERS), help="of training; the demo's are not kept then")
    parser.add_argument("--once", nargs="+", choices=list(TRAINERS), default=[], help="in the first of the runs alone")
    parser.add_argument("--rows", type=int, default=0, help="training rows, 0: all; fewer of the demo are not kept")
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder, to train on --samsum")
    parser.add_argument("--samsum", type=Path, help="a folder of dialogues; training alone, kept as training_real")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for environments, logs and adapters: some 10 GB")
    args = parser.parse_args(argv)
    args.folder, args.model = args.folder.resolve(), args.model.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.learning_rate, args.warmup_steps = (1e-3, 5) if args.samsum else (LEARNING_RATE, WARMUP_STEPS)
    if args.samsum:
        args.samsum, args.stages = args.samsum.resolve(), ["training"]
    if {"merging", "scoring"} & set(args.stages) and not (DEMO / "merged" / "config.json").is_file():
        sys.exit("error: outputs/demo is not there: run `bash run.sh demo` first")
    if "training" not in args.stages:
        prepare(args.folder)
    for stage in args.stages:
        print(f"\n## {stage}", flush=True)
        STAGES[stage](args)


if __name__ == "__main__":
    main()
