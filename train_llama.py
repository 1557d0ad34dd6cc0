"""Fine-tune a Llama with QLoRA on the data set of build_dataset.py: a 4-bit NF4 base, and a loss on the completions.

Runs on one GPU, on several GPUs, or on a CPU; 4-bit weights work on a CPU, too. With the defaults an 8B model fits one
GPU of 24 GB; --dry-run estimates the cost of a run without starting it. If a run is interrupted, the same command
resumes it. The training step, with its loss and validation, is in pipeline/training/trainer.py.

Reads:  OUTPUT_DIR/dataset/ (train and validation) and the base model.
Writes: OUTPUT_DIR/checkpoints/ and OUTPUT_DIR/adapter/ (PEFT adapter, tokenizer, run.json, log.jsonl, loss.png).

    python train_llama.py --dry-run
    python train_llama.py --model tests/fixtures/tiny_llama3 --learning-rate 3e-3 --output-dir outputs/demo
    accelerate launch --num_processes 2 train_llama.py
"""

import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

from pipeline import figures, files, machine, models
from pipeline.attention import ATTENTIONS
from pipeline.script import command, fail, first_line, git_commit, is_main, say, script, versions
from pipeline.settings import parse_settings
from pipeline.tokens import CHAT_TEMPLATES, encode, tokenizer_identity, tokenizer_of, write_for_others
from pipeline.training import estimate

# Settings: edit here, or override for one run on the command line.
MODEL = "llama3"  # base model: a key of MODELS in pipeline/models.py, a hub id or a local folder
CHAT_TEMPLATE = "auto"  # chat template for prompts: on, off; auto: on if the tokenizer has one
LOAD_IN_4BIT = True  # 4-bit base weights (NF4 with double quantisation); without it 16-bit weights
LORA_R = 8  # rank of the LoRA update
LORA_ALPHA = 16  # the LoRA update is multiplied by LORA_ALPHA / LORA_R
LORA_DROPOUT = 0.0  # dropout before the adapter, 0 to below 1; above 0 training needs more memory and time
TARGET_MODULES = ["all-linear"]  # layers: all-linear or any of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
NUM_TRAIN_EPOCHS = 1.0  # passes over the training rows
MAX_STEPS = 0  # number of optimizer steps; 0 = NUM_TRAIN_EPOCHS decides
PER_DEVICE_TRAIN_BATCH_SIZE = 0  # batch size in sequences; 0 = automatic: as many as fit on a GPU, 1 on a CPU
GRADIENT_ACCUMULATION_STEPS = 4  # batches per optimizer step; if the batch size is 0: sequences per optimizer step
LEARNING_RATE = "auto"  # peak learning rate; auto: 1e-3, above 1.5 B parameters 5e-4, above 5 B 2e-4, above 20 B 1e-4
WARMUP_STEPS = 10  # optimizer steps in which the learning rate rises, before it falls along a cosine; 0 = none
MAX_LENGTH = 2048  # length limit of a sequence, in tokens; longer rows are dropped and counted, never truncated
PACKING = True  # several rows in one sequence; no row attends to another
ATTN_IMPLEMENTATION = "auto"  # attention: packed, flash_attention_2, sdpa, eager; auto: flash if there, else packed
ACTIVATION_CHECKPOINTING = "auto"  # off, mlp, on, host: each takes less memory and more time; auto: first that fits
USE_LIGER_KERNEL = "auto"  # fused GPU kernels: on, off; auto: on if there is a GPU and liger-kernel is installed
EVAL_STEPS = 50  # optimizer steps between validations; the adapter with the lowest validation loss is kept
EARLY_STOPPING_PATIENCE = 0  # training ends after this many validations in a row without a new lowest loss; 0 = never
LOGGING_STEPS = 5  # optimizer steps between log entries; validations and checkpoints are logged as well
SAVE_STEPS = 50  # optimizer steps between checkpoints; a new best adapter is saved as well
SAVE_MINUTES = 15.0  # if there was no checkpoint for so many minutes, the next step saves one; 0 = never
SAVE_TOTAL_LIMIT = 2  # number of checkpoints to keep, in addition to the best one
REPORT_TO = "none"  # experiment tracker: none, tensorboard, trackio, wandb (you install it)
SEED = 0  # random seed of the adapter, of dropout and of the order of rows
DRY_RUN = False  # only estimate what the run would cost, also before there is a data set; loads no weights
DRY_RUN_GPU = "here"  # GPU that the dry run assumes: h200, h100, a100, l40s, 4090, 3090, a10, t4; here: this machine
DRY_RUN_PRICE = 0.0  # price of an hour of the dry run's machine, in any currency; 0 = no price is shown
OVERWRITE = False  # replace a finished run or another run's output; an interrupted run still resumes
OUTPUT_DIR = "outputs"  # folder that contains dataset/ and gets checkpoints/ and adapter/

# Fixed
FEW_STEPS = 20  # optimizer steps below which a run says so
CHOICES = {
    **dict.fromkeys(("LORA_R", "LORA_ALPHA", "GRADIENT_ACCUMULATION_STEPS", "MAX_LENGTH"), (int,)),
    **dict.fromkeys(("EVAL_STEPS", "LOGGING_STEPS", "SAVE_STEPS", "SAVE_TOTAL_LIMIT"), (int,)),
    **dict.fromkeys(("MAX_STEPS", "PER_DEVICE_TRAIN_BATCH_SIZE", "WARMUP_STEPS"), (0, int)),
    **dict.fromkeys(("EARLY_STOPPING_PATIENCE", "SEED"), (0, int)),
    **dict.fromkeys(("LORA_DROPOUT", "SAVE_MINUTES", "DRY_RUN_PRICE"), (0, float)),
    **dict.fromkeys(("LOAD_IN_4BIT", "PACKING", "DRY_RUN", "OVERWRITE"), (bool,)),
    "ACTIVATION_CHECKPOINTING": ("auto", *estimate.WAYS),
    "USE_LIGER_KERNEL": ("auto", "on", "off"),
    "TARGET_MODULES": (list,),
    "NUM_TRAIN_EPOCHS": (float,),
    "CHAT_TEMPLATE": CHAT_TEMPLATES,
    "LEARNING_RATE": ("auto", float),
    "ATTN_IMPLEMENTATION": ATTENTIONS,
    "REPORT_TO": ("none", "tensorboard", "trackio", "wandb"),
    "DRY_RUN_GPU": ("here", *estimate.GPUS),
}
# Small Llamas take about 1e-3, 7B to 13B 2e-4 (QLoRA; Biderman et al. 2024, "LoRA Learns Less and Forgets Less").
LEARNING_RATES = {1.5e9: 1e-3, 5e9: 5e-4, 20e9: 2e-4, float("inf"): 1e-4}  # up to so many parameters
# Settings that may differ when a run resumes: they do not touch the weights.
UNBOUND = ["output_dir", "overwrite", "dry_run", "dry_run_gpu", "dry_run_price", "logging_steps", "report_to"]
UNBOUND += ["save_steps", "save_minutes", "save_total_limit"]
HIDDEN = ("settings", "run", "tasks", "versions", "git_commit", "adapter_sha256")  # of run.json, not printed


def parse_args(argv=None):
    args = parse_settings(sys.modules[__name__], argv, CHOICES)
    if args.lora_dropout >= 1:
        fail("--lora-dropout must be below 1")
    if args.use_liger_kernel == "on" and not importlib.util.find_spec("liger_kernel"):
        fail(f"--use-liger-kernel on: it is not installed: {command('pip')} install liger-kernel")
    flash = any(map(importlib.util.find_spec, ("flash_attn", "kernels")))  # transformers takes it from either
    if args.attn_implementation == "flash_attention_2" and not flash and not args.dry_run:
        remedy = f"it needs a GPU and {command('pip')} install flash-attn; packed needs neither"
        fail(f"--attn-implementation flash_attention_2: {remedy}")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        fail(f"--report-to {args.report_to} is not installed: {command('pip')} install {args.report_to}")
    if args.dry_run_gpu != "here" and not args.dry_run:
        fail(f"--dry-run-gpu {args.dry_run_gpu} is for an estimate: give --dry-run, too")
    return args


def choose_learning_rate(args, shape):
    """Put the number that "auto" comes to into args: run.json records it, and a run that gives it is the same one."""
    if args.learning_rate == "auto":
        args.learning_rate = next(rate for limit, rate in LEARNING_RATES.items() if shape["parameters"] <= limit)
        say(f"learning rate {args.learning_rate:g}, for {shape['parameters'] / 1e9:.2g} B parameters")


def run_identity(args, base, tokenizer, rows):
    """What has to be the same for a run to resume: settings, model, data, number of processes."""
    settings = {name: value for name, value in vars(args).items() if name not in UNBOUND}
    model = {"model": base, "weights": models.weights_identity(base), "tokenizer": tokenizer_identity(tokenizer)}
    data = {f"{split} rows": part._fingerprint for split, part in rows.items()}
    data |= {f"{split} examples": len(part) for split, part in rows.items()}
    return settings | model | data | {"processes": int(os.environ.get("WORLD_SIZE", 1))}


def last_checkpoint(folder):
    """Step and path of the newest whole checkpoint and its manifest, or (0, None, {}); broken ones are removed."""
    checkpoints = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    for step, path in sorted(checkpoints.items(), reverse=True):
        manifest, broken = files.read_manifest(path)
        if not broken:
            return step, path, manifest
        say(f"warning: {path} is broken ({', '.join(broken)}): going back to the one before")
        if is_main():
            files.remove_folder(path)
    return 0, None, {}


def where_to_start(args, run):
    """The checkpoint to resume from and its manifest, (None, {}) to begin, or None where the run is finished.

    Exits 2 where another run's files are. A stopped run resumes, with --overwrite too, beside any older adapter.
    """
    adapter = Path(args.output_dir) / "adapter"
    old, weights = files.read_json(adapter / "run.json"), adapter / "adapter_model.safetensors"
    finished = old.get("run") == run and weights.is_file() and old.get("adapter_sha256") == files.sha256(weights)
    if finished and not args.overwrite:
        return None
    step, checkpoint, manifest = last_checkpoint(Path(args.output_dir) / "checkpoints")
    if manifest.get("run") == run and not (finished and step >= old.get("steps", 0)):
        return checkpoint, manifest
    if not args.overwrite:
        resume = "give its settings again to resume it, or "
        remedy = "give --overwrite to start again, or another --output-dir"
        if checkpoint:
            files.refuse_another(checkpoint, manifest.get("run", {}), run, remedy, resume)
        if any(adapter.glob("*")):
            files.refuse_another(adapter, old.get("run", {}), run, remedy)
    return None, {}


def tokenize(rows, tokenizer, max_length, what):
    """The rows with `input_ids` and `labels` (-100 on the prompt); those longer than max_length or the model drop."""

    def batch(examples):
        ids = encode(tokenizer, examples)
        pairs = list(zip(ids["prompt_ids"], ids["completion_ids"], strict=True))
        return {"input_ids": [p + c for p, c in pairs], "labels": [[-100] * len(p) + c for p, c in pairs]}

    try:
        tokens = rows.map(batch, batched=True, remove_columns=[c for c in rows.column_names if c != "task"])
    except ValueError as error:
        fail(f"cannot train on {what}: {first_line(error)}")
    lengths = [len(ids) for ids in tokens["input_ids"]]
    longest, positions = max(lengths), tokenizer.model_max_length
    limit = min(max_length, positions)
    more = f"the model has {positions} positions" if longest > positions else f"--max-length {longest} keeps them all"
    kept = tokens.select([i for i, length in enumerate(lengths) if length <= limit])
    if dropped := len(tokens) - len(kept):
        say(f"{what}: {dropped} of {len(tokens)} rows are longer than {limit} tokens and were dropped ({more})")
    if not len(kept):
        fail(f"{what}: every row is longer than {limit} tokens ({more})")
    return kept


def pack(rows, args):
    """Sequences of at most MAX_LENGTH tokens, made of whole rows, best fit first; `seq_lengths` are those rows'."""
    from trl import pack_dataset

    rows = rows.select_columns(["input_ids", "labels"])
    length = min(args.max_length, sum(map(len, rows["input_ids"])))  # trl keeps a list as long as that
    return pack_dataset(rows, length, "bfd") if args.packing else rows


def validation_sets(rows, tokenizer, args):
    """{task: packed validation sequences}"""
    sets = {}
    for task in sorted(rows.unique("task")):
        tokens = tokenize(files.rows_of(rows, task), tokenizer, args.max_length, f"validation {task}")
        sets[task] = pack(tokens, args)
    return sets


def mean_training_loss(history):
    """Of all steps, from entries that are means over the steps since the entry before."""
    total = last = 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / max(1, last)


def summary(args, base, trainer, train_rows):
    """What run.json contains, but for the adapter's hash."""
    state, seconds = trainer.state, trainer.seconds + time.time() - trainer.started
    validations = {entry["step"]: entry for entry in state.log_history if "eval_loss" in entry}
    best = validations[state.best_global_step]
    return {
        "base_model": base,
        "settings": vars(args),
        "run": trainer.run,
        "tasks": files.read_json(Path(args.output_dir) / "dataset" / "tasks.json"),  # for --ask of test_llama.py
        "versions": versions("torch", "transformers", "trl", "peft", "bitsandbytes"),
        "git_commit": git_commit(),
        "chat_template": bool(trainer.processing_class.chat_template),
        "attention": trainer.model.config._attn_implementation,
        "train_rows": train_rows,
        "sequences": len(trainer.train_dataset),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "train_loss": mean_training_loss(state.log_history),
        **{key: value for key, value in sorted(best.items()) if key.startswith("eval_")},
        "tokens": state.num_input_tokens_seen,
        "tokens_per_second": state.num_input_tokens_seen / seconds,
        "peak_memory_gb": machine.peak_memory(),
        "seconds": seconds,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def save_adapter(args, tokenizer, trainer, run):
    """Put adapter/ in place: the files of the best checkpoint, with what a reader wants to know of the run."""
    from pipeline.training.trainer import log_lines

    output = Path(args.output_dir)
    best = output / "checkpoints" / f"checkpoint-{run['best_step']}"
    _, broken = files.read_manifest(best)
    if broken:
        fail(f"{best}, the best one, is broken ({', '.join(broken)}): something else wrote there; train again")
    with files.whole_folder(output / "adapter") as fresh:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(best / name, fresh / name)  # without its mode, which some mounts cannot set
        tokenizer.save_pretrained(fresh)
        write_for_others(fresh)
        (fresh / "log.jsonl").write_text(log_lines(trainer.state.log_history))
        try:
            curves = figures.read_losses(fresh / "log.jsonl")
            highest = max(loss for points in curves.values() for _, loss in points)
            lines = figures.loss_lines(curves)
            lines["adapter kept"] = [run["best_step"]] * 2, [0, highest], {"linestyle": ":"}
            figures.draw(fresh / "loss.png", lines, "optimizer step", "loss, nats per completion token", dpi=200)
        except Exception as error:  # a matplotlibrc that it cannot read, a font that is not here
            say(f"warning: there is no loss.png, matplotlib cannot draw it ({first_line(error)})")
        run["adapter_sha256"] = files.sha256(fresh / "adapter_model.safetensors")
        (fresh / "run.json").write_text(json.dumps(run, indent=2) + "\n")


def read_base(args, base):
    """Sizes and tokenizer of the base; exits 2 where it cannot be trained, tested or merged."""
    from pipeline.training.trainer import lora_config

    config = models.load_config(base)
    # a dry run does without weights
    if not args.dry_run or any(path.suffix in (".safetensors", ".bin", ".pth") for path in Path(base).glob("*")):
        models.check_weights(base, config)
    shape = estimate.model_shape(base, config, lora_config(args))
    choose_learning_rate(args, shape)
    return shape, tokenizer_of(base, None, args.chat_template)


def dry_run(args, base):
    """Print what the run would cost, also where there is no data set yet, or no access to a model of MODELS."""
    from pipeline.training.trainer import lora_config

    tokenizer, problem = None, base in estimate.SHAPES and models.try_to_fetch(base, weights=False)[1]
    if problem:
        say(f"{problem}. This estimate goes by the model's published sizes.")
        shape = estimate.model_shape(base, estimate.known_config(base), lora_config(args))
        choose_learning_rate(args, shape)
    else:
        shape, tokenizer = read_base(args, base)
    rows = {}
    if os.path.lexists(Path(args.output_dir, "dataset")):
        rows = {split: files.load_rows(args.output_dir, split) for split in ("train", "validation")}
    if tokenizer and rows:
        tokens = tokenize(rows["train"], tokenizer, args.max_length, "train")
        validation_sets(rows["validation"], tokenizer, args)  # says what is dropped
    else:
        tokens = estimate.assumed_rows(rows.get("train"), args.max_length)
    estimate.choose_kernels(args)
    estimate.dry_run(shape, tokens, pack(tokens, args), args)


def train(args, base, rows):
    """Train on {split: rows} from wherever this run was, and write the adapter."""
    from pipeline.training.trainer import QLoRATrainer, train_until_done

    say(f"training {base} on {len(rows['train']):,} rows, validating on {len(rows['validation']):,}")
    shape, tokenizer = read_base(args, base)
    run = run_identity(args, base, tokenizer, rows)
    adapter = Path(args.output_dir) / "adapter"
    if is_main():
        files.put_back(adapter)  # a kill may have left the one before beside it; a mount is refused
        files.make_folder(adapter.parent / "checkpoints")
    start = where_to_start(args, run)
    if not start:
        say(f"{adapter} is finished, by the same settings on the same rows: nothing to do")
        return
    checkpoint, manifest = start
    if tokenizer.chat_template:
        say("prompts go through the model's chat template (--chat-template off: plain prompts)")
    tokens = tokenize(rows["train"], tokenizer, args.max_length, "train")
    packed = pack(tokens, args)
    validation = validation_sets(rows["validation"], tokenizer, args)
    model = models.load_model(base, args.load_in_4bit)
    estimate.settle(shape, packed, args, manifest.get("activation_checkpointing"))
    if estimate.fits_unpacked(shape, packed, args):
        model = model.dequantize()  # once instead of at every use: the same numbers, in more memory
    fused = estimate.fuses(shape, args.activation_checkpointing, estimate.room_and_width(args)[1])
    trainer = QLoRATrainer(args, model, tokenizer, packed, validation, fused, run, manifest.get("seconds", 0.0))
    if not checkpoint and is_main():
        for old in (Path(args.output_dir) / "checkpoints").glob("checkpoint-*"):
            files.remove_folder(old)
    bits, steps = "4" if args.load_in_4bit else "16", estimate.optimizer_steps(packed, args)
    say(f"{steps:,} optimizer steps over {len(packed):,} packed sequences, {bits}-bit base, on {trainer.args.device}")
    if steps < FEW_STEPS:
        remedy = "more come of --num-train-epochs 5 --gradient-accumulation-steps 1 --max-length 512 --eval-steps 5"
        say(f"optimizer steps: {steps}, few for a model to learn from; {remedy}, and of more rows")
    if checkpoint:
        say(f"resuming from {checkpoint}")
    train_until_done(trainer, checkpoint)
    result = summary(args, base, trainer, len(tokens))
    if is_main():
        save_adapter(args, tokenizer, trainer, result)
    say()
    for key, value in result.items():
        if key not in HIDDEN:
            say(f"{key + ':':<26}{value:,.4g}" if isinstance(value, float) else f"{key + ':':<26}{value}")
    say(f"\nwrote {adapter}")


@script
def main(argv=None):
    args = parse_args(argv)
    base = models.find_model(args.model)
    splits = () if args.dry_run else ("train", "validation")
    rows = {split: files.load_rows(args.output_dir, split) for split in splits}
    machine.own_gpu("train_llama.py")
    machine.warn_of_load()
    models.quiet()
    if args.dry_run:
        dry_run(args, base)
        return
    with files.only_run_in(args.output_dir):
        train(args, base, rows)


if __name__ == "__main__":
    main()
