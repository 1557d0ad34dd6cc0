"""Fine-tune a Llama with QLoRA on the data set of build_dataset.py: 4-bit NF4 base, loss on the completion.

Works on one CUDA GPU and, really in 4-bit, on the CPU. The defaults fit an 8B model on one GPU of 24 GB.

Reads:  OUTPUT_DIR/dataset/ (train and validation) and the base model.
Writes: OUTPUT_DIR/checkpoints/ and OUTPUT_DIR/adapter/ (PEFT adapter, tokenizer, run.json, log.jsonl, loss.png).

    python train_llama.py
    python train_llama.py --model tests/fixtures/tiny_llama3 --learning-rate 3e-3 --output-dir outputs/demo
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

MODELS = {
    "llama2": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3": "meta-llama/Meta-Llama-3-8B",
    "llama3.1": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
}

# Settings: edit here, or override for one run on the command line.
# An 8B model on 24 GB (estimate): 5.5 GB of 4-bit weights and 16-bit embeddings, 0.1 GB of adapter and optimizer, and
# with activation checkpointing some 4 GB for one packed row of 2048 tokens.
MODEL = "llama3"  # a key of MODELS, a hub id or a local folder
LOAD_IN_4BIT = True  # NF4 with double quantisation; False loads 16-bit weights
LORA_R = 8  # rank of the update
LORA_ALPHA = 16  # the update is scaled by LORA_ALPHA / LORA_R
LORA_DROPOUT = 0.05  # fraction, 0 to below 1
TARGET_MODULES = ["all-linear"]  # or names: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
NUM_TRAIN_EPOCHS = 1.0  # passes over the training rows
MAX_STEPS = 0  # optimizer steps; 0 = NUM_TRAIN_EPOCHS decides
PER_DEVICE_TRAIN_BATCH_SIZE = 1  # packed rows of MAX_LENGTH tokens (attention cost grows with its square: keep 1)
GRADIENT_ACCUMULATION_STEPS = 4  # micro-batches per optimizer step
LEARNING_RATE = 2e-4  # for 7B to 13B; halve it above
WARMUP_STEPS = 10  # optimizer steps with a rising learning rate; then it falls on a cosine
MAX_LENGTH = 2048  # tokens; longer rows are dropped and counted, never cut
PACKING = True  # several rows to a sequence, none attending to another
ACTIVATION_CHECKPOINTING = (
    "auto"  # on, off, or auto: on with CUDA, off on the CPU (memory for about a third more time)
)
LOGGING_STEPS = 5  # optimizer steps
SAVE_STEPS = 100  # optimizer steps between checkpoints
SAVE_TOTAL_LIMIT = 2  # checkpoints kept
REPORT_TO = "none"  # none, tensorboard, trackio, wandb (whichever is installed)
SEED = 0
OUTPUT_DIR = "outputs"

# Fixed
TASKS = ("samsum", "trivia_qa")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", default=MODEL, help=f"one of {', '.join(MODELS)}, a hub id or a local folder")
    add("--load-in-4bit", action=boolean, default=LOAD_IN_4BIT, help="NF4, double quantisation")
    add("--lora-r", type=int, default=LORA_R, help="rank")
    add("--lora-alpha", type=int, default=LORA_ALPHA, help="scale is alpha / r")
    add("--lora-dropout", type=float, default=LORA_DROPOUT, help="fraction")
    add("--target-modules", nargs="+", default=TARGET_MODULES, help="names, or all-linear")
    add("--num-train-epochs", type=float, default=NUM_TRAIN_EPOCHS, help="passes over the rows")
    add("--max-steps", type=int, default=MAX_STEPS, help="optimizer steps; 0 = by epochs")
    add("--per-device-train-batch-size", type=int, default=PER_DEVICE_TRAIN_BATCH_SIZE, help="sequences")
    add("--gradient-accumulation-steps", type=int, default=GRADIENT_ACCUMULATION_STEPS, help="micro-batches")
    add("--learning-rate", type=float, default=LEARNING_RATE, help="peak")
    add("--warmup-steps", type=int, default=WARMUP_STEPS, help="optimizer steps")
    add("--max-length", type=int, default=MAX_LENGTH, help="tokens; longer rows are dropped")
    add("--packing", action=boolean, default=PACKING, help="several rows to a sequence")
    add("--activation-checkpointing", choices=["auto", "on", "off"], default=ACTIVATION_CHECKPOINTING, help="memory")
    add("--logging-steps", type=int, default=LOGGING_STEPS, help="optimizer steps")
    add("--save-steps", type=int, default=SAVE_STEPS, help="optimizer steps")
    add("--save-total-limit", type=int, default=SAVE_TOTAL_LIMIT, help="checkpoints kept")
    add("--report-to", choices=TRACKERS, default=REPORT_TO, help="experiment tracker")
    add("--seed", type=int, default=SEED, help="of adapter, dropout and order")
    add("--output-dir", default=OUTPUT_DIR, help="holds dataset/, gets adapter/")
    args = parser.parse_args(argv)
    for name in ("lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
                 "logging_steps", "save_steps", "save_total_limit", "num_train_epochs"):  # fmt: skip
        if not 0 < getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} must be above 0 and below 2**31")
    if not 0 < args.learning_rate < math.inf:
        parser.error("--learning-rate must be above 0")
    for name in ("max_steps", "warmup_steps", "seed"):
        if not 0 <= getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} must be 0 or more and below 2**31")
    if not 0 <= args.lora_dropout < 1:
        parser.error("--lora-dropout must be at least 0 and below 1")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        parser.error(f"--report-to {args.report_to} is not installed: pip install {args.report_to}")
    return args


def fail(message):
    """Print one sentence on stderr and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def quiet():
    """Turn the libraries' noise down: progress bars where nobody watches, deprecations of their own calls."""
    import logging
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.disable_caching()  # else the tokens of every run stay behind in dataset/
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says that its optional CPU kernels are not installed


def load_rows(output_dir, split):
    """One split of OUTPUT_DIR/dataset as a datasets.Dataset; exits 2 where it is missing, broken, empty or foreign."""
    from datasets import List, Value, load_from_disk

    text, folder = Value("string"), Path(output_dir) / "dataset"
    columns = {"id": text, "task": text, "prompt": text, "completion": text, "references": List(text)}
    if not folder.is_dir():
        fail(f"no dataset at {folder}: run build_dataset.py first")
    try:
        rows = load_from_disk(str(folder / split))
        missing = [name for name, kind in columns.items() if rows.features.get(name) != kind]
        missing = missing or [name for name in columns if rows.data.column(name).null_count]
    except IndexError:  # how datasets reads back a split that was saved without rows
        rows, missing = [], []
    except Exception as error:  # whatever the libraries raise, the folder is not a whole data set
        fail(f"cannot read {split} of {folder} ({first_line(error)}): run build_dataset.py again")
    if missing:
        fail(f"{split} of {folder} has no column {', '.join(missing)}, or not as text: run build_dataset.py again")
    if len(rows) == 0:
        fail(f"{split} of {folder} is empty: run build_dataset.py with more examples")
    if unknown := set(rows.unique("task")) - set(TASKS):
        fail(f"{split} of {folder} holds an unknown task {min(unknown)}: run build_dataset.py again")
    return rows


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def find_model(model):
    """The hub id or local folder that `model` names; exits 2 where it can be neither."""
    model = MODELS.get(model, model)
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            fail(f"{model} has no config.json: give a folder laid out like a model's hub repository")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        fail(f"unknown model {model}: neither one of {', '.join(MODELS)}, nor a hub id (owner/name), nor a folder")
    return model


def explain_load_error(model, error):
    """End with one sentence that says why `model` did not load and what to do."""
    text = f"{type(error).__name__} {error} {error.__cause__}"
    if "gated" in text.lower() or "401" in text or "403" in text:
        fail(f"{model} is gated: accept its licence at https://huggingface.co/{model}, then run: hf auth login")
    if Path(model).is_dir():
        fail(f"cannot load the model in {model} ({first_line(error)}): a file of it is missing or broken")
    fail(f"cannot load {model} ({first_line(error)}): check the name and the network, or give a local folder")


def load_weights(model, **options):
    """AutoModelForCausalLM of a Llama whose every weight comes from its files; exits 2 otherwise."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        kind = AutoConfig.from_pretrained(model).model_type
        if kind != "llama":
            fail(f"{model} is a {kind} model: these scripts train Llamas")
        loaded, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **options)
    except Exception as error:
        explain_load_error(model, error)
    if info["missing_keys"]:  # transformers only warns, and draws them at random
        fail(f"{model} lacks weights ({min(info['missing_keys'])}, {len(info['missing_keys'])} in all): get it again")
    return loaded


def load_tokenizer(model):
    """The tokenizer with one BOS in front; a missing pad token is set to an existing one, nothing is added."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        explain_load_error(model, error)
    if tokenizer.pad_token is None:  # labels and attention are masked by length, so EOS is still learned
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer("a").input_ids[:2].count(tokenizer.bos_token_id) != 1:
        fail(f"the tokenizer of {model} does not put exactly one BOS in front: this is no Llama tokenizer")
    return tokenizer


def load_model(model, load_in_4bit):
    """The base model on this process' device: NF4 with double quantisation, or 16-bit (float32 on the CPU)."""
    import torch
    from transformers import BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float16 if cuda else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device = {"": int(os.environ.get("LOCAL_RANK", 0)) if cuda else "cpu"}
    config = config if load_in_4bit else None
    loaded = load_weights(model, dtype=dtype, device_map=device, quantization_config=config)
    for module in loaded.modules():
        # bitsandbytes 0.50.2 repacks the weights in a CPU's first evaluation, for a bf16 kernel without a backward:
        # what is trained after that gets no gradient through the base. Keep the float32 path, which has one.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def encode(tokenizer, rows):
    """Token ids of a batch of rows: {"prompt_ids", "completion_ids"}, lists of lists; the completion ends with EOS.

    The prompt is encoded as in generation, with its one BOS; the completion is what follows it when both are encoded
    together. A row whose prompt would be split otherwise in the two encodings raises ValueError.
    """
    prompts = tokenizer(rows["prompt"], verbose=False).input_ids
    wholes = tokenizer(
        [p + c for p, c in zip(rows["prompt"], rows["completion"], strict=True)], verbose=False
    ).input_ids
    completions = []
    for row_id, prompt, whole in zip(rows["id"], prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ValueError(f"{row_id}: the tokens of the prompt are not those of prompt and completion together")
        completions.append(whole[len(prompt) :] + [tokenizer.eos_token_id])
    return {"prompt_ids": prompts, "completion_ids": completions}


def tokenize(rows, tokenizer, max_length, what):
    """The rows with `input_ids` and `labels` (-100 on the prompt); those longer than max_length tokens are dropped."""

    def batch(examples):
        ids = encode(tokenizer, examples)
        pairs = list(zip(ids["prompt_ids"], ids["completion_ids"], strict=True))
        return {"input_ids": [p + c for p, c in pairs], "labels": [[-100] * len(p) + c for p, c in pairs]}

    try:
        tokens = rows.map(batch, batched=True, remove_columns=[c for c in rows.column_names if c != "task"])
    except ValueError as error:
        fail(f"cannot train on {what}: {first_line(error)}")
    kept = tokens.filter(lambda ids: [len(i) <= max_length for i in ids], input_columns="input_ids", batched=True)
    if len(kept) < len(tokens):
        print(f"{what}: {len(tokens) - len(kept)} of {len(tokens)} rows are longer than {max_length} tokens and were "
              "dropped (raise --max-length to keep them)")  # fmt: skip
    if not len(kept):
        fail(f"{what}: every row is longer than --max-length {max_length}")
    return kept


def make_trainer(args, model, tokenizer, train, validation):
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    checkpointing = args.activation_checkpointing == "on" or (args.activation_checkpointing == "auto" and cuda)
    name = "activation_checkpointing"
    if name not in SFTConfig.__dataclass_fields__:  # its old name, in the transformers that Python 3.10 gets
        name = "gradient_checkpointing"
    config = SFTConfig(
        output_dir=str(Path(args.output_dir) / "checkpoints"),
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_steps,
        optim="paged_adamw_8bit" if cuda else "adamw_torch",
        max_length=args.max_length,
        packing=args.packing,
        **{name: checkpointing},
        bf16=cuda and torch.cuda.is_bf16_supported(),
        fp16=cuda and not torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        logging_steps=args.logging_steps,
        eval_strategy="epoch",
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        report_to=args.report_to,
        seed=args.seed,
        dataloader_pin_memory=cuda,
        disable_tqdm=None if sys.stderr.isatty() else True,
    )
    modules = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    try:
        return SFTTrainer(
            model,
            config,
            train_dataset=train.remove_columns("task"),
            eval_dataset={t: rows.remove_columns("task") for t, rows in validation.items()},
            processing_class=tokenizer,
            peft_config=lora,
        )
    except ValueError as error:  # PEFT names the modules that it did not find
        if "arget modules" not in str(error):
            raise
        fail(f"no layer of the model is called {' '.join(args.target_modules)}: check --target-modules")


def draw_loss(history, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    names = {"loss": "train"} | {key: "validation " + key[5:-5] for e in history for key in e if is_eval_loss(key)}
    for key, label in names.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), marker="o" if key != "loss" else None, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per completion token)", title="Training")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def is_eval_loss(key):
    return key.startswith("eval_") and key.endswith("_loss")


def save(args, base, trainer, tokenizer, run):
    """Write adapter/ beside and rename it, so that a whole one stands there at any moment."""
    output = Path(args.output_dir)
    target, fresh, old = output / "adapter", output / ".adapter.new", output / ".adapter.old"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    trainer.model.peft_config["default"].base_model_name_or_path = base
    trainer.model.save_pretrained(fresh, save_embedding_layers=False)  # "auto" would ask the hub
    tokenizer.save_pretrained(fresh)
    history = trainer.state.log_history
    (fresh / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    draw_loss(history, fresh / "loss.png")
    (fresh / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main(argv=None):
    args = parse_args(argv)
    base = find_model(args.model)
    output = Path(args.output_dir)
    train_rows, validation_rows = load_rows(output, "train"), load_rows(output, "validation")
    if not os.access(output, os.W_OK):
        fail(f"cannot write to {output}")
    quiet()
    import peft
    import torch
    import transformers
    import trl

    tokenizer = load_tokenizer(base)
    train = tokenize(train_rows, tokenizer, args.max_length, "train")
    tasks = sorted(set(validation_rows["task"]))
    validation = {
        task: tokenize(validation_rows.filter(lambda t, task=task: t == task, input_columns="task"),
                       tokenizer, args.max_length, f"validation {task}")
        for task in tasks
    }  # fmt: skip
    model = load_model(base, args.load_in_4bit)
    trainer = make_trainer(args, model, tokenizer, train, validation)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    start = time.time()
    result = trainer.train()
    seconds = time.time() - start
    finite = all(p.isfinite().all() for p in trainer.model.parameters() if p.requires_grad)
    if not finite or not math.isfinite(result.training_loss):
        fail("training diverged (a weight or the loss is no number): lower --learning-rate; no adapter was written")
    tokens = int(trainer.state.num_input_tokens_seen or sum(map(len, train["input_ids"])) * trainer.state.epoch)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    losses = {k: v for entry in trainer.state.log_history for k, v in entry.items() if is_eval_loss(k)}
    run = {
        "base_model": base,
        "settings": vars(args),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)},
        "train_rows": len(train),
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        **losses,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "trainable_parameters": trainable,
    }
    save(args, base, trainer, tokenizer, run)
    print()
    for key in ("base_model", "train_rows", "steps", "train_loss", *losses, "tokens", "tokens_per_second", "seconds"):
        value = run[key]
        print(f"{key + ':':<26}{value:,.4g}" if isinstance(value, float) else f"{key + ':':<26}{value}")
    print(f"\nwrote {output / 'adapter'}")


if __name__ == "__main__":
    main()
