"""Fine-tune a Llama with QLoRA on the data set of build_dataset.py: 4-bit NF4 base, loss on the completion.

Works on CUDA, on one GPU or several, and, really in 4-bit, on the CPU. The defaults fit an 8B model on one GPU of
24 GB; --dry-run says beforehand what a run costs. A killed run goes on where it was when its command is given again.

Reads:  OUTPUT_DIR/dataset/ (train and validation) and the base model.
Writes: OUTPUT_DIR/checkpoints/ and OUTPUT_DIR/adapter/ (PEFT adapter, tokenizer, run.json, log.jsonl, loss.png).

    python train_llama.py --dry-run
    python train_llama.py --model tests/fixtures/tiny_llama3 --learning-rate 3e-3 --output-dir outputs/demo
    accelerate launch --num_processes 2 train_llama.py
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
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
# An 8B model on 24 GB, by --dry-run: 5.7 GB of 4-bit weights and 16-bit embeddings, 0.2 GB of adapter, gradients and
# optimizer, and with activation checkpointing some 2 GB for one packed row of 2048 tokens.
MODEL = "llama3"  # a key of MODELS, a hub id or a local folder
LOAD_IN_4BIT = True  # NF4 with double quantisation; False loads 16-bit weights
LORA_R = 8  # rank of the update
LORA_ALPHA = 16  # the update is scaled by LORA_ALPHA / LORA_R
LORA_DROPOUT = 0.0  # fraction, 0 to below 1; costs a copy and a mask of each adapted layer's input, and some speed
TARGET_MODULES = ["all-linear"]  # or names: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
NUM_TRAIN_EPOCHS = 1.0  # passes over the training rows
MAX_STEPS = 0  # optimizer steps; 0 = NUM_TRAIN_EPOCHS decides
PER_DEVICE_TRAIN_BATCH_SIZE = 1  # packed rows in a pass; flattened, so a larger MAX_LENGTH comes to the same
GRADIENT_ACCUMULATION_STEPS = 4  # passes per optimizer step
LEARNING_RATE = 2e-4  # for 7B to 13B; halve it above
WARMUP_STEPS = 10  # optimizer steps with a rising learning rate; then it falls on a cosine
MAX_LENGTH = 2048  # tokens of a packed row; longer rows are dropped and counted, never cut
PACKING = True  # several rows to a sequence, none attending to another
ATTN_IMPLEMENTATION = "auto"  # auto, packed, flash_attention_2, sdpa, eager; auto: flash where installed, else packed
ACTIVATION_CHECKPOINTING = "auto"  # on, off; auto: on where the memory estimate without it exceeds 3/4 of the GPU
EVAL_STEPS = 50  # optimizer steps between validations; the adapter of the lowest validation loss is kept
EARLY_STOPPING_PATIENCE = 0  # validations without a lower loss after which training ends; 0 = never
LOGGING_STEPS = 5  # optimizer steps
SAVE_STEPS = 50  # optimizer steps between checkpoints; a new best is saved as well
SAVE_TOTAL_LIMIT = 2  # checkpoints kept, beside the best
REPORT_TO = "none"  # none, tensorboard, trackio, wandb (whichever is installed)
SEED = 0
DRY_RUN = False  # only say what the run would cost; loads no weights
DRY_RUN_TFLOPS = 35.0  # TFLOP/s that the dry run reckons with: half of what an RTX 3090 can do in bf16
OVERWRITE = False  # start afresh where checkpoints or an adapter of another run stand
OUTPUT_DIR = "outputs"

# Fixed
TASKS = ("samsum", "trivia_qa")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
ATTENTIONS = ("auto", "packed", "flash_attention_2", "sdpa", "eager")
UNBOUND = ("output_dir", "overwrite", "dry_run", "dry_run_tflops", "logging_steps", "save_steps", "save_total_limit",
           "report_to")  # settings that may differ when a run goes on: they do not touch the weights  # fmt: skip
MANIFEST = "whole.json"  # written last into a checkpoint: what it holds, with hashes, and of which run it is
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: 4 bits, 8-bit scale per 64, float32 scale per 256 of those
GPU_MEMORY = 24e9  # bytes the dry run compares with where there is no GPU


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
    add("--per-device-train-batch-size", type=int, default=PER_DEVICE_TRAIN_BATCH_SIZE, help="packed rows in a pass")
    add("--gradient-accumulation-steps", type=int, default=GRADIENT_ACCUMULATION_STEPS, help="passes per step")
    add("--learning-rate", type=float, default=LEARNING_RATE, help="peak")
    add("--warmup-steps", type=int, default=WARMUP_STEPS, help="optimizer steps")
    add("--max-length", type=int, default=MAX_LENGTH, help="tokens of a packed row; longer rows are dropped")
    add("--packing", action=boolean, default=PACKING, help="several rows to a sequence")
    add("--attn-implementation", choices=ATTENTIONS, default=ATTN_IMPLEMENTATION, help="attention kernel")
    add("--activation-checkpointing", choices=["auto", "on", "off"], default=ACTIVATION_CHECKPOINTING, help="memory")
    add("--eval-steps", type=int, default=EVAL_STEPS, help="optimizer steps between validations")
    add("--early-stopping-patience", type=int, default=EARLY_STOPPING_PATIENCE, help="validations; 0 = never")
    add("--logging-steps", type=int, default=LOGGING_STEPS, help="optimizer steps")
    add("--save-steps", type=int, default=SAVE_STEPS, help="optimizer steps between checkpoints")
    add("--save-total-limit", type=int, default=SAVE_TOTAL_LIMIT, help="checkpoints kept")
    add("--report-to", choices=TRACKERS, default=REPORT_TO, help="experiment tracker")
    add("--seed", type=int, default=SEED, help="of adapter, dropout and order")
    add("--dry-run", action=boolean, default=DRY_RUN, help="only say what the run would cost")
    add("--dry-run-tflops", type=float, default=DRY_RUN_TFLOPS, help="TFLOP/s it reckons with")
    add("--overwrite", action=boolean, default=OVERWRITE, help="start afresh, whatever stands there")
    add("--output-dir", default=OUTPUT_DIR, help="holds dataset/, gets adapter/")
    args = parser.parse_args(argv)
    for name in ("lora_r", "lora_alpha", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
                 "logging_steps", "save_steps", "eval_steps", "save_total_limit", "num_train_epochs"):  # fmt: skip
        if not 0 < getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} must be above 0 and below 2**31")
    for name in ("learning_rate", "dry_run_tflops"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in ("max_steps", "warmup_steps", "early_stopping_patience", "seed"):
        if not 0 <= getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} must be 0 or more and below 2**31")
    if not 0 <= args.lora_dropout < 1:
        parser.error("--lora-dropout must be at least 0 and below 1")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        parser.error(f"--report-to {args.report_to} is not installed: pip install {args.report_to}")
    return args


def is_main():
    """Whether this process is the only one or the first: it alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def say(message):
    if is_main():
        print(message, flush=True)


def fail(message):
    """Print one sentence on stderr and exit with code 2."""
    if is_main():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def quiet():
    """Turn the libraries' noise down: progress bars where nobody watches, deprecations of their own calls."""
    import logging
    import warnings

    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says that its optional CPU kernels are not installed


def load_rows(output_dir, split):
    """One split of OUTPUT_DIR/dataset as a datasets.Dataset; exits 2 where it is missing, broken, empty or foreign."""
    from datasets import List, Value, disable_caching, disable_progress_bars, load_from_disk

    disable_progress_bars()
    disable_caching()  # else the tokens of every run stay behind in dataset/
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


def load_config(model):
    """The model's config; exits 2 where it is no Llama's."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:
        explain_load_error(model, error)
    if config.model_type != "llama":
        fail(f"{model} is a {config.model_type} model: these scripts train Llamas")
    return config


def load_weights(model, **options):
    """AutoModelForCausalLM of a Llama whose every weight comes from its files; exits 2 otherwise."""
    from transformers import AutoModelForCausalLM

    load_config(model)
    try:
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

    cuda, fsdp = torch.cuda.is_available(), under_fsdp()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float16 if cuda else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if fsdp else torch.uint8,  # FSDP shards only tensors of one dtype
    )
    device = {"": int(os.environ.get("LOCAL_RANK", 0)) if cuda else "cpu"}
    config = config if load_in_4bit else None
    loaded = load_weights(model, dtype=dtype, device_map=None if fsdp else device, quantization_config=config)
    for module in loaded.modules():
        # bitsandbytes 0.50.2 repacks the weights in a CPU's first evaluation, for a bf16 kernel without a backward:
        # what is trained after that gets no gradient through the base. Keep the float32 path, which has one.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def under_fsdp():
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def fuse_lora(model):
    """Let the adapted layers of a PEFT model compute x W' + scale x A' B', W frozen, in one autograd function.

    PEFT copies the first product, scales the second and adds the two, forward and backward; summing them in place
    spares some eight passes over the memory of a layer's input and output.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    class FusedLoRA(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b, layer, scale):
            y = layer(x)
            a, b = a.to(y.dtype), b.to(y.dtype)
            inner = x.flatten(0, -2).to(y.dtype) @ a.T
            y.view(-1, y.shape[-1]).addmm_(inner, b.T, alpha=scale)
            ctx.save_for_backward(x, inner, a, b)
            ctx.layer, ctx.scale = layer, scale
            return y

        @staticmethod
        def backward(ctx, grad):
            x, inner, a, b = ctx.saved_tensors
            grad, weight, grad_x = grad.flatten(0, -2), ctx.layer.weight, None
            grad_inner = (grad @ b).mul_(ctx.scale)
            if ctx.needs_input_grad[0]:
                weight = dequantize_4bit(weight, weight.quant_state) if hasattr(weight, "quant_state") else weight
                grad_x = (grad @ weight.to(grad.dtype)).addmm_(grad_inner, a).view_as(x).to(x.dtype)
            grad_a = grad_inner.T @ x.flatten(0, -2).to(grad.dtype)
            return grad_x, grad_a, (grad.T @ inner).mul_(ctx.scale), None, None

    def fused(module, x):
        a, b, scale = (part["default"] for part in (module.lora_A, module.lora_B, module.scaling))
        return FusedLoRA.apply(x, a.weight, b.weight, module.get_base_layer(), scale)

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = functools.partial(fused, module)


def packed_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
                     **_):  # fmt: skip
    """Causal attention within each row of a packed sequence, for transformers' AttentionInterface.

    A dense mask over the sequence, as sdpa needs it, costs its square; this costs the sum of the rows' squares.
    query [1, heads, tokens, head_dim], key and value the same with fewer heads, cu_seq_lens_q [rows + 1]: where each
    row begins, and the end (TRL's collator passes it). Returns [1, tokens, heads, head_dim] and None.
    """
    import torch

    if cu_seq_lens_q is None:  # never guess: plain causal attention would let the rows see one another
        raise ValueError("packed attention was not told where the rows begin (cu_seq_lens_q)")
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        out = varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        return out[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = [attend(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in rows]
    return torch.cat(out, dim=2).transpose(1, 2), None


def choose_attention(name):
    """Register packed_attention and resolve "auto": flash attention where it is installed, else packed attention.

    On CUDA packed attention runs torch's varlen kernel, which needs an Ampere GPU or newer: it is compared with plain
    attention on random numbers first, and sdpa taken where it fails.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import is_flash_attn_2_available

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)  # the rows' bounds say it all
    if name == "auto" and is_flash_attn_2_available():
        return "flash_attention_2"
    if name not in ("auto", "packed") or not torch.cuda.is_available():
        return "packed" if name == "auto" else name
    q, k, v = torch.randn(3, 1, 2, 96, 64, device="cuda", dtype=torch.float16)
    bounds = torch.tensor([0, 33, 96], device="cuda", dtype=torch.int32)
    attend = torch.nn.functional.scaled_dot_product_attention
    alone = [attend(*(x[:, :, a:b] for x in (q, k, v)), is_causal=True) for a, b in ((0, 33), (33, 96))]
    try:
        out = packed_attention(None, q, k, v, None, scaling=64**-0.5, cu_seq_lens_q=bounds, max_length_q=63)[0]
        if torch.allclose(out.transpose(1, 2), torch.cat(alone, 2), atol=1e-2):
            return "packed"
        problem = "differs from plain attention"
    except RuntimeError as error:
        problem = first_line(error)
    say(f"packed attention does not run on this GPU ({problem}): taking sdpa, which is slower with long sequences")
    return "sdpa"


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
    lengths = [len(ids) for ids in tokens.with_format(columns=["input_ids"])["input_ids"]]
    kept = tokens.select([i for i, length in enumerate(lengths) if length <= max_length])
    if len(kept) < len(tokens):
        say(f"{what}: {len(tokens) - len(kept)} of {len(tokens)} rows are longer than {max_length} tokens and were "
            f"dropped (--max-length {max(lengths)} keeps all of them)")  # fmt: skip
    if not len(kept):
        fail(f"{what}: every row is longer than --max-length {max_length}")
    return kept


def pack(rows, args):
    """Sequences of at most MAX_LENGTH tokens, made of whole rows, best fit first; `seq_lengths` are those rows'."""
    from trl import pack_dataset

    rows = rows.select_columns(["input_ids", "labels"])
    return pack_dataset(rows, args.max_length, "bfd") if args.packing else rows


def lora_config(args):
    from peft import LoraConfig

    modules = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )


def model_shape(base, args):
    """Sizes of the model with its adapter, counted on the meta device, where tensors have shapes and no numbers."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = load_config(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        try:
            model = get_peft_model(model, lora_config(args), low_cpu_mem_usage=True)
        except ValueError as error:
            explain_target_error(args, error)
    head = model.get_output_embeddings()
    linear = [m for name, m in model.named_modules()
              if isinstance(m, torch.nn.Linear) and m is not head and "lora_" not in name]  # fmt: skip
    adapted = [m for m in model.modules() if hasattr(m, "lora_A")]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "linear": sum(m.weight.numel() for m in linear),  # what 4 bits are for; embeddings and head stay in 16
        "largest": max(m.weight.numel() for m in linear),
        "lora_inputs": sum(m.in_features for m in adapted) / config.num_hidden_layers,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "mlp": config.intermediate_size,
        "query": config.num_attention_heads * head_dim,
        "key_value": config.num_key_value_heads * head_dim,
        "vocabulary": config.vocab_size,
    }


def memory(shape, args, tokens, labels, checkpointing):
    """Estimated peak bytes on one GPU by part, in bf16, for a pass of `tokens` tokens, `labels` of them with a loss.

    A layer keeps for its backward pass, per token: both norms' input in float32, the inputs of the adapters (shared;
    with dropout each has a copy and a mask), q, k, v and attention output, and three tensors of the MLP.
    Checkpointing keeps a layer's input alone, and one layer at a time in full.
    """
    n = shape
    inputs = 3 * n["lora_inputs"] if args.lora_dropout else 2 * (2 * n["hidden"] + n["query"] + n["mlp"])
    layer = tokens * (8 * n["hidden"] + inputs + 4 * (n["query"] + n["key_value"]) + 6 * n["mlp"])
    layers = layer + n["layers"] * tokens * 2 * n["hidden"] if checkpointing else n["layers"] * layer
    weight = NF4_BYTES if args.load_in_4bit else 2
    return {
        "weights": weight * n["linear"] + 2 * (n["parameters"] - n["linear"]),
        "adapter and gradients": 8 * n["trainable"],  # float32
        "optimizer": 2 * n["trainable"],  # two 8-bit moments
        "activations": layers + 12 * labels * n["vocabulary"],  # logits: 16 bit, float32, gradients
        "working copies": 2 * n["largest"] * args.load_in_4bit + 4 * tokens * n["mlp"],  # 16 bit
    }


def operations(shape, rows, labels, checkpointing):
    """Floating point operations of one pass over `rows` (lengths in tokens), forward and backward.

    A frozen weight costs 2 per token forward and 2 backward, a trainable one 2 and 4; the head only where there is a
    loss; causal attention 2 n^2 per layer and query channel forward, 5 n^2 backward. Checkpointing adds a forward.
    """
    tokens, squares, again = sum(rows), sum(n * n for n in rows), 2 if checkpointing else 0
    return (
        (4 + again) * shape["linear"] * tokens
        + (6 + again) * shape["trainable"] * tokens
        + 4 * shape["hidden"] * shape["vocabulary"] * labels
        + (7 + again) * shape["layers"] * shape["query"] * squares
    )


def pass_size(packed, args):
    """Tokens of the largest pass over packed rows, and the most labels in one."""
    labels = [sum(label != -100 for label in row) for row in packed["labels"]]
    most = [sum(sorted(sizes)[-args.per_device_train_batch_size :]) for sizes in (map(len, packed["labels"]), labels)]
    return most[0], most[1]


def gpu_memory():
    """Bytes of this process' GPU, or GPU_MEMORY where there is none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else GPU_MEMORY


def wants_checkpointing(base, packed, args):
    """What ACTIVATION_CHECKPOINTING comes to: on where the GPU is too small without, off on the CPU."""
    import torch

    if args.activation_checkpointing != "auto":
        return args.activation_checkpointing == "on"
    without = memory(model_shape(base, args), args, *pass_size(packed, args), checkpointing=False)
    return torch.cuda.is_available() and sum(without.values()) > 0.75 * gpu_memory()


def memory_advice(base, packed, args):
    """The settings that save most memory, with what they save, as a piece of a sentence."""
    shape, (tokens, labels) = model_shape(base, args), pass_size(packed, args)
    batch, half = args.per_device_train_batch_size, argparse.Namespace(**vars(args) | {"load_in_4bit": True})
    no_dropout = argparse.Namespace(**vars(args) | {"lora_dropout": 0})
    checkpointing = wants_checkpointing(base, packed, args)
    now = sum(memory(shape, args, tokens, labels, checkpointing).values())
    changes = {
        "--activation-checkpointing on": memory(shape, args, tokens, labels, True),
        f"--max-length {args.max_length // 2}": memory(shape, args, tokens // 2, labels // 2, checkpointing),
        "--per-device-train-batch-size 1": memory(shape, args, tokens // batch, labels // batch, checkpointing),
        "--load-in-4bit": memory(shape, half, tokens, labels, checkpointing),
        "--lora-dropout 0": memory(shape, no_dropout, tokens, labels, checkpointing),
    }
    saved = sorted(((now - sum(parts.values())) / 1e9, flag) for flag, parts in changes.items())[::-1]
    return ", ".join(f"{flag} saves about {size:.1f} GB" for size, flag in saved[:3] if size >= 0.05)


def optimizer_steps(packed, args):
    """As the Trainer counts them."""
    passes = math.ceil(len(packed) / (args.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", 1))))
    return args.max_steps or math.ceil(args.num_train_epochs * math.ceil(passes / args.gradient_accumulation_steps))


def dry_run(base, tokens, packed, args):
    """Print what the run would cost: tokens, steps, memory, operations and the time they take at a stated rate."""
    shape, (largest, most_labels) = model_shape(base, args), pass_size(packed, args)
    lengths = {task: [] for task in sorted(set(tokens["task"]))}
    labels = dict.fromkeys(lengths, 0)
    for row in tokens:
        lengths[row["task"]].append(len(row["labels"]))
        labels[row["task"]] += sum(label != -100 for label in row["labels"])
    print(f"{'':<26}" + "".join(f"{name:>14}" for name in (*lengths, "together")))
    for name, values in {
        "rows": {task: len(sizes) for task, sizes in lengths.items()},
        "tokens": {task: sum(sizes) for task, sizes in lengths.items()},
        "completion tokens": labels,
    }.items():
        print(f"{name:<26}" + "".join(f"{n:>14,}" for n in (*values.values(), sum(values.values()))))
    total, everything = sum(map(sum, lengths.values())), [n for sizes in lengths.values() for n in sizes]
    steps = optimizer_steps(packed, args)
    print(f"\n{'sequences':<26}{len(packed):>14,}, {total / len(packed) / args.max_length:.1%} of {args.max_length} "
          f"tokens filled\n{'optimizer steps':<26}{steps:>14,}\n{'parameters':<26}{shape['parameters']:>14,}\n"
          f"{'trainable':<26}{shape['trainable']:>14,}, {shape['trainable'] / shape['parameters']:.2%}")  # fmt: skip
    parts = [memory(shape, args, largest, most_labels, checkpointing) for checkpointing in (True, False)]
    print(f"\n{'peak memory of a GPU, GB':<26}{'checkpointing':>14}{'without':>14}")
    for name in parts[0]:
        print(f"{name:<26}" + "".join(f"{part[name] / 1e9:>14.2f}" for part in parts))
    print(f"{'estimate':<26}" + "".join(f"{sum(part.values()) / 1e9:>14.2f}" for part in parts))
    share = steps * args.gradient_accumulation_steps * args.per_device_train_batch_size / len(packed)
    work = [share * operations(shape, everything, sum(labels.values()), c) for c in (True, False)]
    print(f"{'petaflop':<26}" + "".join(f"{flop / 1e15:>14,.1f}" for flop in work))
    times = [str(timedelta(seconds=round(flop / args.dry_run_tflops / 1e12))) for flop in work]
    print(f"{f'time at {args.dry_run_tflops:g} TFLOP/s':<26}" + "".join(f"{text:>14}" for text in times))
    print("validation, loading and the driver's own memory (about 0.5 GB) come on top")
    checkpointing = args.activation_checkpointing != "off"
    if sum(parts[not checkpointing].values()) > gpu_memory():
        print(f"warning: that is more than the GPU's {gpu_memory() / 1e9:.0f} GB: "
              f"{memory_advice(base, packed, args) or 'take a smaller model'}")  # fmt: skip


def trainer_class():
    """TRL's SFTTrainer, with the loss, validation, log and checkpoints of this script; made here to import late."""
    import torch
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import rotate_checkpoints
    from trl import SFTTrainer

    class QLoRATrainer(SFTTrainer):
        """`run` is what the checkpoints belong to (see run_identity), `seconds` what earlier sessions took."""

        run, seconds, tokens, stop_signal, save_total_limit = None, 0.0, 0, None, None

        def summed_loss(self, model, inputs):
            """Negative log likelihood (nats) of the labelled tokens of a flattened batch, and how many those are.

            Only their logits are computed. Float32, 512 at a time, and again in the backward pass: the float32 copies
            of all of them would be the largest tensors there are.
            """
            labels = inputs.pop("labels")[0, 1:]
            if "cu_seq_lens_q" not in inputs:  # trl 1.14, for Python 3.10, marks the rows by their positions alone
                starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].int()
                bounds = torch.cat([starts, starts.new_tensor([len(labels) + 1])])
                longest = int(bounds.diff().max())
                inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
                inputs |= {"max_length_q": longest, "max_length_k": longest}
            kept = (labels != -100).nonzero()[:, 0]
            logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits[0]
            total = logits.new_zeros((), dtype=torch.float32)
            for some, gold in zip(logits.split(512), labels[kept].split(512), strict=True):
                total = total + torch.utils.checkpoint.checkpoint(nll, some, gold, use_reentrant=False)
            return total, len(kept)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Mean over the labelled tokens of the whole accumulated batch of all processes."""
            self.tokens += inputs["input_ids"].numel()
            total, count = self.summed_loss(model, inputs)
            count = count if num_items_in_batch is None else num_items_in_batch
            return total / count * self.accelerator.num_processes  # DDP divides the gradients by it

        def floating_point_ops(self, inputs):  # the Trainer would walk the model for it at every pass
            return 0

        def probe(self):
            """One pass over the longest sequences, its gradients thrown away: memory fails now or not at all."""
            sizes = [(len(row), sum(label != -100 for label in row)) for row in self.train_dataset["labels"]]
            order = sorted(range(len(sizes)), key=lambda i: sizes[i])
            rows = [self.train_dataset[i] for i in order[-self.args.per_device_train_batch_size :]]
            before = self.tokens
            with torch.random.fork_rng(), self.compute_loss_context_manager():
                self.model_wrapped.train()
                inputs = self._prepare_inputs(self.data_collator(rows))
                self.accelerator.backward(self.compute_loss(self.model_wrapped, inputs))
            self.model_wrapped.zero_grad()
            self.tokens = before

        def evaluate(self, *args, **kwargs):
            """Validation loss per task, nats per completion token over all its rows; their mean is eval_loss."""
            started, world = time.time(), self.accelerator.num_processes
            self.model_wrapped.eval()
            metrics = {}
            for task, rows in self.eval_dataset.items():
                sums = torch.zeros(2, dtype=torch.float64)
                for start in range(0, len(rows), world):  # every process as many passes, as FSDP needs
                    mine = start + self.accelerator.process_index
                    inputs = self._prepare_inputs(self.data_collator([rows[min(mine, len(rows) - 1)]]))
                    with torch.no_grad(), self.compute_loss_context_manager():
                        total, count = self.summed_loss(self.model_wrapped, inputs)
                    sums += torch.tensor([total.item(), count], dtype=torch.float64) * (mine < len(rows))
                total, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
                metrics[f"eval_{task}_loss"] = total / count
            metrics["eval_loss"] = sum(metrics.values()) / len(metrics)
            best = self.state.best_metric is None or metrics["eval_loss"] < self.state.best_metric
            self.control.should_save |= best
            self.log(metrics)
            losses = ", ".join(f"{task} {metrics[f'eval_{task}_loss']:.4f}" for task in self.eval_dataset)
            say(f"step {self.state.global_step:>5}  validation loss {losses}{' (best so far)' if best else ''}")
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            self.mark += time.time() - started  # not training time
            return metrics

        def log(self, logs, start_time=None):
            if "loss" in logs:
                seen, self.state.num_input_tokens_seen = self.state.num_input_tokens_seen, self.all_tokens()
                speed = (self.state.num_input_tokens_seen - seen) / (time.time() - self.mark)
                logs |= {"tokens": self.state.num_input_tokens_seen, "tokens_per_second": speed}
                logs["memory_gb"] = peak_memory()
                self.mark = time.time()
            Trainer.log(self, logs, start_time)  # not TRL's, whose entropy and accuracy nobody here reads
            if "loss" in logs:
                self.watch(logs)
                done, left = self.state.global_step - self.first_step, self.state.max_steps - self.state.global_step
                left = timedelta(seconds=round((time.time() - self.started) / done * left))
                say(f"step {self.state.global_step:>5}/{self.state.max_steps}  loss {logs['loss']:.4f}  "
                    f"grad {logs['grad_norm']:.2f}  lr {logs['learning_rate']:.2e}  {speed:>7,.0f} tokens/s  "
                    f"{left} left")  # fmt: skip

        def all_tokens(self):
            tokens = torch.tensor(self.tokens, device=self.args.device)
            return self._initial_num_input_tokens_seen + int(self.accelerator.reduce(tokens, "sum"))

        def watch(self, logs):
            """Stop a run that learns nothing, instead of letting it go on for hours."""
            if not math.isfinite(logs["loss"]) or not math.isfinite(logs["grad_norm"]):
                self.diverged(f"loss {logs['loss']:g}, gradient norm {logs['grad_norm']:g}")
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry][-3:]
            if losses == [0, 0, 0]:
                fail(f"the loss was exactly 0 three times up to step {self.state.global_step}: nothing is learned; "
                     "look at the completions of the data set, or try --no-load-in-4bit")  # fmt: skip

        def diverged(self, what):
            fail(f"training diverged at step {self.state.global_step} ({what}): lower --learning-rate or raise "
                 "--warmup-steps and start again with --overwrite; older checkpoints and adapter stay")  # fmt: skip

        def _save_checkpoint(self, model, trial):
            """Transformers' checkpoint, then the manifest that makes it count, then the oldest ones go."""
            started = time.time()
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
                self.diverged("a weight is no number")
            self.state.num_input_tokens_seen = self.all_tokens()
            try:
                if is_main():
                    shutil.rmtree(folder, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                Trainer._save_checkpoint(self, model, trial)
                self.accelerator.wait_for_everyone()
                if is_main():
                    seconds = self.seconds + started - self.started
                    write_manifest(folder, {"run": self.run, "seconds": seconds})
                    best = self.state.best_model_checkpoint
                    rotate_checkpoints(self.args.output_dir, self.save_total_limit + bool(best), best)
            except disk_errors() as error:
                shutil.rmtree(folder, ignore_errors=True)
                fail(f"cannot write {folder} ({first_line(error)}): make room, then give the same command again; the "
                     "checkpoints before it are whole")  # fmt: skip
            self.mark += time.time() - started

    class Watch(TrainerCallback):
        """Where training begins and where a step ends; the trainer itself is not told."""

        trainer = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.trainer.probe()
            self.trainer.started = self.trainer.mark = time.time()
            self.trainer.first_step = state.global_step

        def on_step_end(self, args, state, control, **kwargs):
            stop = torch.tensor(self.trainer.stop_signal or 0, device=args.device)
            if args.world_size > 1:  # all of them at the same step
                stop = self.trainer.accelerator.reduce(stop, "sum")
            if stop and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    return QLoRATrainer, Watch


def nll(logits, gold):
    """Summed negative log likelihood (nats) of token ids [n] under logits [n, vocabulary], in float32."""
    import torch

    return torch.nn.functional.cross_entropy(logits.float(), gold, reduction="sum")


def peak_memory():
    """Highest memory so far of this process, in GB: on the GPU, or on the host where there is none."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make_trainer(args, base, model, tokenizer, train, validation, run):
    """A QLoRATrainer of packed sequences `train` and {task: sequences} `validation`."""
    import torch
    from transformers import EarlyStoppingCallback, set_seed
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    cuda = torch.cuda.is_available()
    checkpointing = "activation_checkpointing"
    if checkpointing not in SFTConfig.__dataclass_fields__:  # its old name, in the transformers that Python 3.10 gets
        checkpointing = "gradient_checkpointing"
    config = SFTConfig(
        output_dir=str(Path(args.output_dir) / "checkpoints"),
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_steps,
        optim="paged_adamw_8bit" if cuda and not under_fsdp() else "adamw_torch_fused",
        dataset_kwargs={"skip_prepare_dataset": True},  # sequences come tokenised and packed
        **{checkpointing: wants_checkpointing(base, train, args)},
        bf16=cuda and torch.cuda.is_bf16_supported(),
        fp16=cuda and not torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,  # it would hide them from watch
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_steps=args.save_steps,
        report_to=args.report_to,
        seed=args.seed,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
    )
    config.load_best_model_at_end = True  # set late: at once it would ask that SAVE_STEPS be a multiple of EVAL_STEPS
    flatten = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)  # no pass holds padding
    trainer_type, watch_type = trainer_class()
    set_seed(args.seed)  # the adapter is drawn at random below; trl 1.14 would seed only after that
    try:
        trainer = trainer_type(
            model,
            config,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=flatten,
            peft_config=lora_config(args),
        )
    except ValueError as error:
        explain_target_error(args, error)
    trainer.run, trainer.save_total_limit = run, args.save_total_limit
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch := watch_type())
    watch.trainer = trainer
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes them bf16, in which small updates are lost
            parameter.data = parameter.data.float()
    if not args.lora_dropout and not under_fsdp():  # FSDP takes the weights away between forward and backward
        fuse_lora(trainer.model)
    trainer.model.peft_config["default"].base_model_name_or_path = base
    keep = trainer.model.save_pretrained
    # its default, "auto", asks the hub whether the vocabulary has grown
    trainer.model.save_pretrained = lambda *a, **k: keep(*a, **k | {"save_embedding_layers": False})
    return trainer


def explain_target_error(args, error):
    """End with one sentence where PEFT did not find the modules to adapt; anything else is raised again."""
    if "arget modules" not in str(error):
        raise error
    fail(f"no layer of the model is called {' '.join(args.target_modules)}: check --target-modules")


def run_identity(args, base, rows):
    """What has to be the same for a run to go on where it was: settings, model, data, number of processes."""
    settings = {name: value for name, value in vars(args).items() if name not in UNBOUND}
    data = {f"{split} rows": part._fingerprint for split, part in rows.items()}
    return settings | {"model": base, "processes": int(os.environ.get("WORLD_SIZE", 1))} | data


def refuse_another_run(where, old, new):
    """Exit 2 where `old` and `new` (both run_identity) differ, with every difference by name."""
    differences = [
        f"{name.replace('_', ' ')} {old.get(name, 'unknown')} there, {value} now"
        for name, value in new.items()
        if old.get(name) != value
    ]
    if differences:
        fail(f"{where} is of another run ({'; '.join(differences)}): give its settings again to go on with it, or "
             "--overwrite to start afresh, or another --output-dir")  # fmt: skip


def sha256(path):
    """Hexadecimal digest of a file, read in pieces: a model's shard need not fit into memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**22):
            digest.update(data)
    return digest.hexdigest()


def write_manifest(folder, content):
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    beside = folder / (MANIFEST + ".new")
    beside.write_text(json.dumps(content | {"sha256": files}, indent=1) + "\n")
    os.replace(beside, folder / MANIFEST)


def last_checkpoint(folder, run):
    """The newest whole checkpoint of this run and its manifest, or None; exits 2 where they are of another run.

    Those that a killed process left half-written, or whose files have changed since, are passed over and removed.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name[11:])):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            broken = [name for name, digest in manifest["sha256"].items() if sha256(path / name) != digest]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            broken = ["unfinished"]
        if not broken:
            refuse_another_run(path, manifest["run"], run)
            return path, manifest
        say(f"warning: {path} is broken ({', '.join(broken)}): going back to the one before")
        if is_main():
            shutil.rmtree(path, ignore_errors=True)
    return None


def finished(adapter, run):
    """Whether a whole adapter of this run stands there; exits 2 where it is of another one."""
    if not (adapter / "run.json").is_file():
        return False
    try:
        old = json.loads((adapter / "run.json").read_text()).get("run", {})
    except (OSError, ValueError, AttributeError):
        old = {}
    refuse_another_run(adapter, old, run)
    return (adapter / "adapter_model.safetensors").is_file()


def catch_signals(trainer):
    """SIGTERM and Ctrl-C end the run after a checkpoint at the next step; a second one ends it at once."""

    def note(number, frame):
        trainer.stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        say(f"{signal.Signals(number).name}: saving a checkpoint first")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def train_until_done(args, base, trainer, checkpoint):
    """Run trainer.train; what ends it early ends the script in one sentence."""
    import torch

    catch_signals(trainer)
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except torch.OutOfMemoryError as error:
        advice = memory_advice(base, trainer.train_dataset, args)
        print(f"error: out of GPU memory ({first_line(error)}): {advice}", file=sys.stderr)
        raise SystemExit(2) from None
    state = trainer.state
    if trainer.stop_signal and state.global_step < state.max_steps:
        say(f"stopped at step {state.global_step} of {state.max_steps}: the same command goes on from there")
        raise SystemExit(128 + trainer.stop_signal)


def draw_loss(history, best_step, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    tasks = sorted({key for entry in history for key in entry if key.startswith("eval_") and key != "eval_loss"})
    names = {"loss": "training"} | {key: "validation " + key[5:-5] for key in tasks}
    for key, label in names.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if key != "loss" else None, label=label)
    if best_step:
        axes.axvline(best_step, color="gray", linestyle=":", label="adapter kept")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per completion token)", title="Training")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def disk_errors():
    """What torch, safetensors and the file system raise where a disk is full or cannot be written to."""
    from safetensors import SafetensorError

    return OSError, RuntimeError, SafetensorError


def git_commit():
    """The commit of this script's repository, or None where there is none."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def summary(args, base, trainer, train_rows, seconds):
    """What run.json holds."""
    from importlib.metadata import version

    state, history = trainer.state, trainer.state.log_history
    best = next((entry for entry in history if "eval_loss" in entry and entry["step"] == state.best_global_step), {})
    logged = [entry for entry in history if "loss" in entry]
    spans = [entry["step"] - before["step"] for before, entry in zip([{"step": 0}, *logged], logged, strict=False)]
    weighted = sum(span * entry["loss"] for span, entry in zip(spans, logged, strict=True))
    return {
        "base_model": base,
        "settings": vars(args),
        "run": trainer.run,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")},
        "git_commit": git_commit(),
        "attention": trainer.model.config._attn_implementation,
        "train_rows": train_rows,
        "sequences": len(trainer.train_dataset),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "train_loss": weighted / max(1, sum(spans)),
        **{key: value for key, value in best.items() if key.startswith("eval_")},
        "tokens": state.num_input_tokens_seen,
        "tokens_per_second": state.num_input_tokens_seen / seconds,
        "peak_memory_gb": peak_memory(),
        "seconds": seconds,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def save(args, trainer, run):
    """Write adapter/ beside and rename it: a whole one stands there at any moment."""
    output = Path(args.output_dir)
    target, fresh, old = output / "adapter", output / ".adapter.new", output / ".adapter.old"
    try:
        if is_main():
            for leftover in (fresh, old):
                shutil.rmtree(leftover, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(fresh))
        if not is_main():
            return
        (fresh / "training_args.bin").unlink()  # a pickle
        history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        (fresh / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
        draw_loss(history, run["best_step"], fresh / "loss.png")
        (fresh / "run.json").write_text(json.dumps(run, indent=2) + "\n")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except disk_errors() as error:
        fail(f"cannot write {target} ({first_line(error)}): make room, then give the same command again; the "
             "checkpoints are whole")  # fmt: skip


def main(argv=None):
    args = parse_args(argv)
    base = find_model(args.model)
    output = Path(args.output_dir)
    rows = {split: load_rows(output, split) for split in ("train", "validation")}
    checkpoint, run = None, run_identity(args, base, rows)
    if not args.overwrite and not args.dry_run:
        if finished(output / "adapter", run):
            say(f"{output / 'adapter'} is finished, by the same settings on the same rows: nothing to do")
            return
        checkpoint = last_checkpoint(output / "checkpoints", run)
    if not os.access(output, os.W_OK):
        fail(f"cannot write to {output}")
    quiet()
    tokenizer = load_tokenizer(base)
    tokens = tokenize(rows["train"], tokenizer, args.max_length, "train")
    train = pack(tokens, args)
    if args.dry_run:
        dry_run(base, tokens, train, args)
        return
    validation = {
        task: pack(tokenize(rows["validation"].filter(lambda t, task=task: t == task, input_columns="task"),
                            tokenizer, args.max_length, f"validation {task}"), args)
        for task in sorted(rows["validation"].unique("task"))
    }  # fmt: skip
    model = load_model(base, args.load_in_4bit)
    model.set_attn_implementation(choose_attention(args.attn_implementation))
    for config in (model.config, model.generation_config):  # or transformers would, with a word about it
        config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    trainer = make_trainer(args, base, model, tokenizer, train, validation, run)
    if args.overwrite and is_main():
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    if checkpoint:
        trainer.seconds = checkpoint[1]["seconds"]
        say(f"going on from {checkpoint[0]}")
    train_until_done(args, base, trainer, checkpoint and checkpoint[0])
    seconds = trainer.seconds + time.time() - trainer.started
    result = summary(args, base, trainer, len(tokens), seconds)
    save(args, trainer, result)
    say("")
    hidden = ("settings", "run", "versions", "git_commit")
    for key, value in result.items():
        if key not in hidden:
            say(f"{key + ':':<26}{value:,.4g}" if isinstance(value, float) else f"{key + ':':<26}{value}")
    say(f"\nwrote {output / 'adapter'}")


if __name__ == "__main__":
    main()
