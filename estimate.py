"""What a training run costs, told before it starts: tokens, steps, memory, operations and time.

Sizes are counted on the meta device, where tensors have shapes and no numbers: an 8B model takes two seconds.
"""

import math
import os
from datetime import timedelta

from common import fail, say

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: 4 bits, 8-bit scale per 64, float32 scale per 256 of those
GPU_MEMORY = 24e9  # bytes to compare with where there is no GPU
SAVERS = "try --activation-checkpointing on, then a smaller --max-length or model; --dry-run shows what each takes"
CHECKPOINTING_ABOVE = 0.75  # of the GPU's memory


def model_shape(base, config, lora):
    """Sizes of a Llama with its adapter (config and LoraConfig); exits 2 where a target module is no linear layer."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = {
            name: module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        check_target_modules(base, lora.target_modules, linear)
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    return {
        "parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "linear": sum(linear.values()),  # what 4 bits are for; embeddings and head stay in 16
        "largest": max(linear.values()),
        "lora_inputs": sum(module.in_features for module in adapted) / config.num_hidden_layers,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "mlp": config.intermediate_size,
        "query": config.num_attention_heads * head_dim,
        "key_value": config.num_key_value_heads * head_dim,
        "vocabulary": config.vocab_size,
    }


def check_target_modules(base, targets, linear):
    """Exit 2 unless every target names a linear layer: PEFT says nothing as long as one of them does."""
    names = sorted({name.split(".")[-1] for name in linear})
    for target in [] if isinstance(targets, str) else targets:
        if target == "all-linear":
            fail("--target-modules: all-linear already means every linear layer, give it alone")
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            fail(f"--target-modules {target}: no layer to adapt in {base}; take all-linear, or of {' '.join(names)}")


def memory(shape, args, tokens, labels, checkpointing):
    """Estimated peak bytes on one GPU by part, in bf16, for a pass of `tokens` tokens, `labels` of them with a loss.

    A layer keeps for its backward pass, per token: both norms' input in float32, the inputs of the adapters (shared;
    with dropout each has a copy and a mask), q, k, v and attention output, and three tensors of the MLP.
    Checkpointing keeps a layer's input alone, and one layer at a time in full. The loss and the last layer's backward
    pass follow one another: the larger of the two counts.
    """
    n = shape
    inputs = 3 * n["lora_inputs"] if args.lora_dropout else 2 * (2 * n["hidden"] + n["mlp"])
    layer = tokens * (8 * n["hidden"] + inputs + 4 * (n["query"] + n["key_value"]) + 6 * n["mlp"])
    kept = n["layers"] * (tokens * 2 * n["hidden"] if checkpointing else layer)
    loss = 12 * labels * n["vocabulary"]  # logits: 16 bit, float32, gradients
    backward = layer * checkpointing + 4 * tokens * n["mlp"]
    weight = NF4_BYTES if args.load_in_4bit else 2
    return {
        "weights": weight * n["linear"] + 2 * (n["parameters"] - n["linear"]),
        "adapter and gradients": 8 * n["trainable"],  # float32
        "optimizer": 2 * n["trainable"],  # two 8-bit moments
        "activations": kept + max(loss, backward),
        "working copies": 2 * n["largest"] * args.load_in_4bit,  # 16 bit
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


def labelled(labels):
    return sum(label != -100 for label in labels)


def pass_size(packed, args):
    """Tokens of the largest pass over packed rows, and the most labels in one."""
    batch = args.per_device_train_batch_size
    tokens = sorted(map(len, packed["labels"]))
    labels = sorted(map(labelled, packed["labels"]))
    return sum(tokens[-batch:]), sum(labels[-batch:])


def gpu_memory():
    """Bytes of this process' GPU, or GPU_MEMORY where there is none."""
    import torch

    if not torch.cuda.is_available():
        return GPU_MEMORY
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory


def wants_checkpointing(shape, packed, args):
    """What ACTIVATION_CHECKPOINTING comes to: on where the GPU is too small without, off on the CPU."""
    import torch

    if args.activation_checkpointing != "auto":
        return args.activation_checkpointing == "on"
    without = memory(shape, args, *pass_size(packed, args), checkpointing=False)
    return torch.cuda.is_available() and sum(without.values()) > CHECKPOINTING_ABOVE * gpu_memory()


def optimizer_steps(packed, args):
    """As the Trainer counts them."""
    passes = math.ceil(len(packed) / (args.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", 1))))
    return args.max_steps or math.ceil(args.num_train_epochs * math.ceil(passes / args.gradient_accumulation_steps))


def line(name, cells, form=""):
    """A row of a table of at most 80 columns."""
    say(f"{name:<26}" + "".join(f"{cell:>14{form}}" for cell in cells))


def dry_run(shape, tokens, packed, args):
    """Print what the run would cost: tokens, steps, memory, operations and the time they take at a stated rate."""
    tasks = sorted(set(tokens["task"]))
    lengths = {task: [] for task in tasks}
    labels = dict.fromkeys(tasks, 0)
    for row in tokens:
        lengths[row["task"]].append(len(row["labels"]))
        labels[row["task"]] += labelled(row["labels"])
    counts = {
        "rows": [len(lengths[task]) for task in tasks],
        "tokens": [sum(lengths[task]) for task in tasks],
        "completion tokens": [labels[task] for task in tasks],
    }
    line("", (*tasks, "together"))
    for name, values in counts.items():
        line(name, (*values, sum(values)), ",")
    steps, total = optimizer_steps(packed, args), sum(counts["tokens"])
    filled = total / len(packed) / args.max_length
    say(f"\n{'sequences':<26}{len(packed):>14,}, {filled:.1%} of {args.max_length} tokens filled")
    line("optimizer steps", [steps], ",")
    line("parameters", [shape["parameters"]], ",")
    say(f"{'trainable':<26}{shape['trainable']:>14,}, {shape['trainable'] / shape['parameters']:.2%}")
    parts = [memory(shape, args, *pass_size(packed, args), checkpointing) for checkpointing in (True, False)]
    say()
    line("peak memory of a GPU, GB", ("checkpointing", "without"))
    for name in parts[0]:
        line(name, [part[name] / 1e9 for part in parts], ".2f")
    line("estimate", [sum(part.values()) / 1e9 for part in parts], ".2f")
    passes = steps * args.gradient_accumulation_steps * args.per_device_train_batch_size / len(packed)
    rows = [length for some in lengths.values() for length in some]
    work = [passes * operations(shape, rows, sum(labels.values()), checkpointing) for checkpointing in (True, False)]
    line("petaflop", [flop / 1e15 for flop in work], ",.1f")
    times = [timedelta(seconds=round(flop / args.dry_run_tflops / 1e12)) for flop in work]
    line(f"time at {args.dry_run_tflops:g} TFLOP/s", map(str, times))
    say("validation, loading and the driver's own memory (about 0.5 GB) come on top")
    if sum(parts[args.activation_checkpointing == "off"].values()) > gpu_memory():
        say(f"warning: that is more than the GPU's {gpu_memory() / 1e9:.0f} GB: {SAVERS}")
