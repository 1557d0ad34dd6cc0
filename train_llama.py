"""Fine-tune a Llama with QLoRA on the data set of build_dataset.py: 4-bit NF4 base, loss on the completion.

Works on CUDA, on one GPU or several, and, really in 4-bit, on the CPU. The defaults fit an 8B model on one GPU of
24 GB; --dry-run says beforehand what a run costs. A killed run goes on where it was when its command is given again.
The training step itself, with its loss and validation, is in pipeline/training/trainer.py.

Reads:  OUTPUT_DIR/dataset/ (train and validation) and the base model.
Writes: OUTPUT_DIR/checkpoints/ and OUTPUT_DIR/adapter/ (PEFT adapter, tokenizer, run.json, log.jsonl, loss.png).

    python train_llama.py --dry-run
    python train_llama.py --model tests/fixtures/tiny_llama3 --learning-rate 3e-3 --output-dir outputs/demo
    accelerate launch --num_processes 2 train_llama.py
"""

import importlib.util
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

from pipeline import machine, models
from pipeline.attention import ATTENTIONS, choose_attention
from pipeline.files import (
    load_rows,
    only_run_in,
    put_back,
    read_json,
    read_manifest,
    refuse_another,
    rows_of,
    sha256,
    whole_folder,
)
from pipeline.script import fail, first_line, git_commit, is_main, out_of_memory, say, script, versions
from pipeline.settings import parse_settings
from pipeline.tokens import CHAT_TEMPLATES, encode, tokenizer_identity, tokenizer_of
from pipeline.training.estimate import GPUS, SAVERS, choose_kernels, dry_run, model_shape, optimizer_steps, settle

# Settings: edit here, or override for one run on the command line.
MODEL = "llama3"  # a key of MODELS in pipeline/models.py, a hub id or a local folder
CHAT_TEMPLATE = "auto"  # on, off; auto: prompts go through the tokenizer's chat template where it has one
LOAD_IN_4BIT = True  # NF4 with double quantisation; False loads 16-bit weights
LORA_R = 8  # rank of the update
LORA_ALPHA = 16  # the update is scaled by LORA_ALPHA / LORA_R
LORA_DROPOUT = 0.0  # fraction, 0 to below 1; costs a copy and a mask of each adapted layer's input, and some speed
TARGET_MODULES = ["all-linear"]  # or names: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
NUM_TRAIN_EPOCHS = 1.0  # passes over the training rows
MAX_STEPS = 0  # optimizer steps; 0 = NUM_TRAIN_EPOCHS decides
PER_DEVICE_TRAIN_BATCH_SIZE = 0  # packed rows in a pass; 0 = as many of an optimizer step's as fit a GPU, 1 on a CPU
GRADIENT_ACCUMULATION_STEPS = 4  # passes per optimizer step; its packed rows where the size of a pass is 0
LEARNING_RATE = "auto"  # or a number; auto, by parameters: 1e-3 to 1.5 B, 5e-4 to 5 B, 2e-4 to 20 B, 1e-4 above
WARMUP_STEPS = 10  # optimizer steps with a rising learning rate, 0 = none; then it falls on a cosine
MAX_LENGTH = 2048  # tokens of a packed row; longer rows are dropped and counted, never cut
PACKING = True  # several rows to a sequence, none attending to another
ATTN_IMPLEMENTATION = "auto"  # auto, packed, flash_attention_2, sdpa, eager; auto: flash where installed, else packed
ACTIVATION_CHECKPOINTING = "auto"  # on, off; auto: on where the estimate without exceeds the memory of GPU or CPU
USE_LIGER_KERNEL = "auto"  # on, off: fused kernels, faster and smaller; auto: on a GPU where liger-kernel is installed
EVAL_STEPS = 50  # optimizer steps between validations; the adapter of the lowest validation loss is kept
EARLY_STOPPING_PATIENCE = 0  # validations without a lower loss after which training ends; 0 = never
LOGGING_STEPS = 5  # optimizer steps; a validation and a checkpoint are logged as well
SAVE_STEPS = 50  # optimizer steps between checkpoints; a new best is saved as well
SAVE_MINUTES = 15.0  # after so many without a checkpoint the next step ends in one as well; 0 = never by time
SAVE_TOTAL_LIMIT = 2  # checkpoints kept, beside the best
REPORT_TO = "none"  # none, tensorboard, trackio, wandb (whichever is installed)
SEED = 0  # of adapter, dropout and order
DRY_RUN = False  # only say what the run would cost; loads no weights
DRY_RUN_GPU = "here"  # what the dry run speaks of: h200, h100, a100, l40s, 4090, 3090, a10, t4; here: this machine
DRY_RUN_PRICE = 0.0  # of an hour of the machine, in whatever currency; 0 = not told
OVERWRITE = False  # start afresh where another run stands, or this one finished; a stopped run goes on all the same
OUTPUT_DIR = "outputs"  # holds dataset/, gets checkpoints/ and adapter/

# Fixed
FEW_STEPS = 20  # optimizer steps below which a run says so
CHOICES = {
    **dict.fromkeys(("LORA_R", "LORA_ALPHA", "GRADIENT_ACCUMULATION_STEPS", "MAX_LENGTH"), (int,)),
    **dict.fromkeys(("EVAL_STEPS", "LOGGING_STEPS", "SAVE_STEPS", "SAVE_TOTAL_LIMIT"), (int,)),
    **dict.fromkeys(("MAX_STEPS", "PER_DEVICE_TRAIN_BATCH_SIZE", "WARMUP_STEPS"), (0, int)),
    **dict.fromkeys(("EARLY_STOPPING_PATIENCE", "SEED"), (0, int)),
    **dict.fromkeys(("LORA_DROPOUT", "SAVE_MINUTES", "DRY_RUN_PRICE"), (0, float)),
    **dict.fromkeys(("LOAD_IN_4BIT", "PACKING", "DRY_RUN", "OVERWRITE"), (bool,)),
    **dict.fromkeys(("ACTIVATION_CHECKPOINTING", "USE_LIGER_KERNEL"), ("auto", "on", "off")),
    "TARGET_MODULES": (list,),
    "NUM_TRAIN_EPOCHS": (float,),
    "CHAT_TEMPLATE": CHAT_TEMPLATES,
    "LEARNING_RATE": ("auto", float),
    "ATTN_IMPLEMENTATION": ATTENTIONS,
    "REPORT_TO": ("none", "tensorboard", "trackio", "wandb"),
    "DRY_RUN_GPU": ("here", *GPUS),
}
# Small Llamas take about 1e-3, 7B to 13B 2e-4 (QLoRA; Biderman et al. 2024, "LoRA Learns Less and Forgets Less").
LEARNING_RATES = {1.5e9: 1e-3, 5e9: 5e-4, 20e9: 2e-4, float("inf"): 1e-4}  # up to so many parameters
# Settings that may differ when a run goes on: they do not touch the weights.
UNBOUND = ["output_dir", "overwrite", "dry_run", "dry_run_gpu", "dry_run_price", "logging_steps", "report_to"]
UNBOUND += ["save_steps", "save_minutes", "save_total_limit"]
HIDDEN = ("settings", "run", "versions", "git_commit", "adapter_sha256")  # of run.json, not printed at the end


def parse_args(argv=None):
    args = parse_settings(sys.modules[__name__], argv, CHOICES)
    if args.lora_dropout >= 1:
        fail("--lora-dropout must be below 1")
    if args.use_liger_kernel == "on" and not importlib.util.find_spec("liger_kernel"):
        fail("--use-liger-kernel on: it is not installed: pip install liger-kernel")
    flash = any(map(importlib.util.find_spec, ("flash_attn", "kernels")))  # transformers takes it from either
    if args.attn_implementation == "flash_attention_2" and not flash and not args.dry_run:
        fail("--attn-implementation flash_attention_2: it needs a GPU and pip install flash-attn; packed does not")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        fail(f"--report-to {args.report_to} is not installed: pip install {args.report_to}")
    return args


def choose_learning_rate(args, shape):
    """Put the number that "auto" comes to into args: run.json records it, and a run that gives it is the same one."""
    if args.learning_rate == "auto":
        args.learning_rate = next(rate for limit, rate in LEARNING_RATES.items() if shape["parameters"] <= limit)
        say(f"learning rate {args.learning_rate:g}, for {shape['parameters'] / 1e9:.2g} B parameters")


def run_identity(args, base, tokenizer, rows):
    """What has to be the same for a run to go on where it was: settings, model, data, number of processes."""
    settings = {name: value for name, value in vars(args).items() if name not in UNBOUND}
    model = {"model": base, "weights": models.weights_identity(base), "tokenizer": tokenizer_identity(tokenizer)}
    data = {f"{split} rows": part._fingerprint for split, part in rows.items()}
    return settings | model | data | {"processes": int(os.environ.get("WORLD_SIZE", 1))}


def last_checkpoint(folder):
    """The newest whole checkpoint and its manifest, or (None, {}); broken ones are passed over and removed."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=step_of, reverse=True):
        manifest, broken = read_manifest(path)
        if not broken:
            return path, manifest
        say(f"warning: {path} is broken ({', '.join(broken)}): going back to the one before")
        if is_main():
            shutil.rmtree(path, ignore_errors=True)
    return None, {}


def step_of(checkpoint):
    return int(checkpoint.name[11:])


def where_to_start(args, run):
    """The checkpoint to go on from and its manifest, (None, {}) to begin, or None where the run is finished.

    Exits 2 where another run stands. A stopped run goes on, with --overwrite too, whatever older adapter is there.
    """
    adapter = Path(args.output_dir) / "adapter"
    old, weights = read_json(adapter / "run.json"), adapter / "adapter_model.safetensors"
    finished = old.get("run") == run and weights.is_file() and old.get("adapter_sha256") == sha256(weights)
    if finished and not args.overwrite:
        return None
    checkpoint, manifest = last_checkpoint(Path(args.output_dir) / "checkpoints")
    if manifest.get("run") == run and not (finished and step_of(checkpoint) >= old.get("steps", 0)):
        return checkpoint, manifest
    remedy = "give its settings again to go on with it, or --overwrite to start afresh, or another --output-dir"
    if checkpoint and not args.overwrite:
        refuse_another(checkpoint, manifest.get("run", {}), run, remedy)
    if any(adapter.glob("*")) and not args.overwrite:
        refuse_another(adapter, old.get("run", {}), run, remedy)
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
    lengths = [len(ids) for ids in tokens.with_format(columns=["input_ids"])["input_ids"]]
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
    return pack_dataset(rows, args.max_length, "bfd") if args.packing else rows


def validation_sets(rows, tokenizer, args):
    """{task: packed validation sequences}"""
    sets = {}
    for task in sorted(rows.unique("task")):
        tokens = tokenize(rows_of(rows, task), tokenizer, args.max_length, f"validation {task}")
        sets[task] = pack(tokens, args)
    return sets


def lora_config(args):
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if args.target_modules == ["all-linear"] else args.target_modules,
        task_type="CAUSAL_LM",
    )


def sft_config(args):
    """TRL's settings of a run whose "auto" ones are settled."""
    import torch
    from trl import SFTConfig

    cuda, dtype = torch.cuda.is_available(), machine.compute_dtype()
    return SFTConfig(
        output_dir=str(Path(args.output_dir) / "checkpoints"),
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_steps,
        optim="adamw_torch_fused",  # 8-bit and paged ones save little of a LoRA's memory, and cost time
        dataset_kwargs={"skip_prepare_dataset": True},  # sequences come tokenised and packed
        activation_checkpointing=args.activation_checkpointing == "on",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not cuda,
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,  # it would hide them from watch
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        metric_for_best_model="eval_loss",
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit + 1,  # the newest one counts only after the oldest went
        report_to=args.report_to,
        seed=args.seed,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
    )


def make_trainer(args, model, tokenizer, train, validation, run=None, seconds=0.0):
    """A QLoRATrainer of packed sequences `train` and {task: sequences} `validation`."""
    from transformers import set_seed
    from transformers.integrations.liger import apply_liger_kernel
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from pipeline.lora import fuse_lora
    from pipeline.training.trainer import QLoRATrainer

    model.set_attn_implementation(choose_attention(args.attn_implementation))
    # the Trainer sorts checkpoints of one second by their numbers instead
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.msg)
    if args.use_liger_kernel == "on":  # but its loss, which would compute the logits of all tokens
        logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # names each of its back ends that is not here
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
    for config in (model.config, model.generation_config):  # or transformers would, with a word about it
        config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    set_seed(args.seed)  # the adapter is drawn at random below
    trainer = QLoRATrainer(
        model,
        sft_config(args),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True),  # no padding at all
        peft_config=lora_config(args),
        run=run,
        seconds=seconds,
        patience=args.early_stopping_patience,
        save_minutes=args.save_minutes,
    )
    if not args.lora_dropout and not machine.under_fsdp():  # FSDP takes the weights away between forward and backward
        fuse_lora(trainer.model)
    return trainer


def train_until_done(trainer, checkpoint):
    """Run trainer.train, from the folder of a checkpoint or None; what ends it early ends the script in a sentence."""
    from transformers import TrainerState

    from pipeline.training.trainer import catch_signals, out_of_patience

    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps or out_of_patience(state, trainer.patience):
            trainer.state, trainer.started = state, time.time()
            return  # killed before its adapter was written; the Trainer would make one step more
    catch_signals(trainer)
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except Exception as error:
        if not out_of_memory(error):
            raise
        where = "GPU memory" if "CUDA" in str(error) else "memory"
        fail(f"out of {where} ({first_line(error)}): {SAVERS}", in_any_process=True)
    state = trainer.state
    if trainer.stop_signal and state.global_step < state.max_steps:
        say(f"stopped at step {state.global_step} of {state.max_steps}: the same command goes on from there")
        raise SystemExit(128 + trainer.stop_signal)


def draw_loss(history, best_step, path):
    """A plot of the training loss and each task's validation loss by optimizer step."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 4.5), layout="tight").subplots()
    for key in sorted({key for entry in history for key in entry if key.endswith("loss")} - {"eval_loss"}):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        label = "training" if key == "loss" else f"validation {key[5:-5]}"
        axes.plot(*zip(*points, strict=True), marker="" if key == "loss" else "o", label=label)
    axes.axvline(best_step, color="gray", linestyle=":", label="adapter kept")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per completion token)", title="Training", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def mean_training_loss(history):
    """Of all steps, from entries that are means over the steps since the entry before."""
    total = last = 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / max(1, last)


def summary(args, base, trainer, train_rows):
    """What run.json holds."""
    state, seconds = trainer.state, trainer.seconds + time.time() - trainer.started
    validations = [entry for entry in state.log_history if "eval_loss" in entry]
    best = next(entry for entry in validations if entry["step"] == state.best_global_step)
    return {
        "base_model": base,
        "settings": vars(args),
        "run": trainer.run,
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
    _, broken = read_manifest(best)
    if broken:
        fail(f"{best}, the best one, is broken ({', '.join(broken)}): something else wrote there; train again")
    log = log_lines(trainer.state.log_history)
    with whole_folder(output / "adapter") as fresh:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(best / name, fresh / name)  # without its mode, which some mounts cannot set
        tokenizer.save_pretrained(fresh)
        (fresh / "log.jsonl").write_text(log)
        try:
            draw_loss([json.loads(line) for line in log.splitlines()], run["best_step"], fresh / "loss.png")
        except Exception as error:  # a matplotlibrc that it cannot read, a font that is not here
            say(f"warning: there is no loss.png, matplotlib cannot draw it ({first_line(error)})")
        run["adapter_sha256"] = sha256(fresh / "adapter_model.safetensors")
        (fresh / "run.json").write_text(json.dumps(run, indent=2) + "\n")


def read_base(args, base):
    """Sizes and tokenizer of the base; exits 2 where it cannot be trained, tested or merged."""
    config = models.load_config(base)
    # a dry run does without weights
    if not args.dry_run or any(path.suffix in (".safetensors", ".bin", ".pth") for path in Path(base).glob("*")):
        models.check_weights(base, config)
    shape = model_shape(base, config, lora_config(args))
    choose_learning_rate(args, shape)
    return shape, tokenizer_of(base, None, args.chat_template)


def train(args, base, rows):
    """Train on {split: rows} from wherever this run was, and write the adapter."""
    say(f"training {base} on {len(rows['train']):,} rows, validating on {len(rows['validation']):,}")
    shape, tokenizer = read_base(args, base)
    run = run_identity(args, base, tokenizer, rows)
    adapter = Path(args.output_dir) / "adapter"
    if is_main():
        put_back(adapter)  # a kill may have left the one before beside it; a mount is refused
    start = where_to_start(args, run)
    if not start:
        say(f"{adapter} is finished, by the same settings on the same rows: nothing to do")
        return
    if tokenizer.chat_template:
        say("prompts go through the model's chat template (--chat-template off: plain prompts)")
    tokens = tokenize(rows["train"], tokenizer, args.max_length, "train")
    packed = pack(tokens, args)
    validation = validation_sets(rows["validation"], tokenizer, args)
    model = models.load_model(base, args.load_in_4bit)
    settle(shape, packed, args)
    checkpoint, manifest = start
    trainer = make_trainer(args, model, tokenizer, packed, validation, run, manifest.get("seconds", 0.0))
    if not checkpoint and is_main():
        for old in (Path(args.output_dir) / "checkpoints").glob("checkpoint-*"):
            shutil.rmtree(old, ignore_errors=True)
    bits, steps = "4" if args.load_in_4bit else "16", optimizer_steps(packed, args)
    say(f"{steps:,} optimizer steps over {len(packed):,} packed sequences, {bits}-bit base, on {trainer.args.device}")
    if steps < FEW_STEPS:
        remedy = "--num-train-epochs, --gradient-accumulation-steps 1, a smaller --max-length or more rows give more"
        say(f"{steps} steps are few for a model to learn from: {remedy}")
    if checkpoint:
        say(f"going on from {checkpoint}")
    train_until_done(trainer, checkpoint)
    result = summary(args, base, trainer, len(tokens))
    if is_main():
        save_adapter(args, tokenizer, trainer, result)
    say()
    for key in (key for key in result if key not in HIDDEN):
        value = result[key]
        say(f"{key + ':':<26}{value:,.4g}" if isinstance(value, float) else f"{key + ':':<26}{value}")
    say(f"\nwrote {adapter}")


@script
def main(argv=None):
    args = parse_args(argv)
    base = models.find_model(args.model)
    rows = {split: load_rows(args.output_dir, split) for split in ("train", "validation")}
    machine.own_gpu("train_llama.py")
    models.quiet()
    if not args.dry_run:
        with only_run_in(args.output_dir):
            train(args, base, rows)
        return
    shape, tokenizer = read_base(args, base)
    tokens = tokenize(rows["train"], tokenizer, args.max_length, "train")
    validation_sets(rows["validation"], tokenizer, args)  # says what is dropped of them
    choose_kernels(args)
    dry_run(shape, tokens, pack(tokens, args), args)


if __name__ == "__main__":
    main()
