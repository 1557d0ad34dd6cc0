"""What a training run will cost: tokens, steps, memory, operations and time."""

import importlib.util
import math
import os

from pipeline import machine
from pipeline.script import duration, fail, say, table

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: 4 bits, 8-bit scale per 64, float32 scale per 256 of those
WAYS = ("off", "mlp", "on", "host")  # of ACTIVATION_CHECKPOINTING, the fastest first; layer.py has what they do
HOST_COPIES = 1.4  # times what autograd keeps: attention's copies on a CPU, and what the allocator keeps; measured
SAVERS = "try --activation-checkpointing on or host, --per-device-train-batch-size 1, a smaller --max-length or model"
LOSS_CHUNK = 256  # labelled tokens whose logits there are at a time
PIECE = 2**24  # numbers of the MLP's element-wise work at a time, where there is no kernel for it
USABLE = 0.88  # of the memory there is: the driver takes some, and the allocator's pieces do not fill it
# GB, and TFLOP/s to reckon with: half of the dense bf16 rate (T4: fp16) in NVIDIA's data sheets. A step on an H200
# came to 171 to 480 (benchmarks/RESULTS.md).
GPUS = {"h200": (141, 495), "h100": (80, 495), "a100": (80, 156), "l40s": (48, 181)}
GPUS |= {"4090": (24, 83), "3090": (24, 36), "a10": (24, 62), "t4": (16, 32)}
# Of the MODELS, for an estimate without their files: vocabulary, width, MLP's width, layers, heads, heads of keys and
# values, whether the head is the embeddings
SHAPES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (49152, 576, 1536, 30, 9, 3, True),
    "HuggingFaceTB/SmolLM2-135M": (49152, 576, 1536, 30, 9, 3, True),
    "HuggingFaceTB/SmolLM2-360M": (49152, 960, 2560, 32, 15, 5, True),
    "HuggingFaceTB/SmolLM2-1.7B": (49152, 2048, 8192, 24, 32, 32, True),
    "TinyLlama/TinyLlama_v1.1": (32000, 2048, 5632, 22, 32, 4, False),
    "meta-llama/Llama-2-7b-hf": (32000, 4096, 11008, 32, 32, 32, False),
    "meta-llama/Llama-2-13b-hf": (32000, 5120, 13824, 40, 40, 40, False),
    "meta-llama/Meta-Llama-3-8B": (128256, 4096, 14336, 32, 32, 8, False),
    "meta-llama/Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8, False),
    "meta-llama/Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, True),
    "meta-llama/Llama-3.2-3B": (128256, 3072, 8192, 28, 24, 8, True),
}
# {task: (rows, tokens of each, those of its completion)} where there is no data set: build_dataset.py's defaults
ASSUMED = {"samsum": (5000, 200, 30), "trivia_qa": (5000, 470, 6)}
BYTES = 4  # of a token, where there is no tokenizer


def model_shape(base, config, lora):
    """Sizes of a Llama with its adapter (config and LoraConfig); exits 2 where a target module is no linear layer."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from pipeline.lora import fusable

    with torch.device("meta"):  # tensors have shapes and no numbers there: an 8B model takes two seconds
        model = AutoModelForCausalLM.from_config(config)
        modules = model.model.named_modules()  # without the head
        linear = {name: module.weight.numel() for name, module in modules if isinstance(module, torch.nn.Linear)}
        for target in [] if lora.target_modules == "all-linear" else lora.target_modules:
            if not any(f".model.{name}".endswith(f".{target}") for name in linear):  # PEFT wants one of them alone
                remedy = f"take all-linear alone, or of {' '.join(sorted({name.split('.')[-1] for name in linear}))}"
                fail(f"--target-modules {target}: no layer to adapt in {base}; {remedy}")
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    trainable, parameters = model.get_nb_trainable_parameters()
    return {
        "fusable": fusable(model),
        "parameters": parameters - trainable,
        "trainable": trainable,
        "linear": sum(linear.values()),  # what 4 bits are for; embeddings and head stay in 16
        "largest": max(linear.values()),
        "lora_inputs": sum(module.in_features for module in adapted) / config.num_hidden_layers,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "mlp": config.intermediate_size,
        "query": config.num_attention_heads * config.head_dim,
        "key_value": config.num_key_value_heads * config.head_dim,
        "vocabulary": config.vocab_size,
    }


def known_config(model):
    """The LlamaConfig of one of the MODELS, as far as an estimate needs it."""
    from transformers import LlamaConfig

    vocabulary, hidden, mlp, layers, heads, key_value_heads, tied = SHAPES[model]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
    )


def assumed_rows(rows, max_length):
    """Rows that stand for those of train, with `task`, `input_ids` and `labels`: of their bytes, or of ASSUMED."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    if rows is None:
        lengths = [(task, *sizes) for task, (count, *sizes) in ASSUMED.items() for _ in range(count)]
        known = [f"{count:,} of {task}, {tokens} tokens each" for task, (count, tokens, _) in ASSUMED.items()]
        say(f"there is no data set yet: the rows are assumed, {', '.join(known)}")
    else:
        lengths = []
        for row in rows:
            labels = 1 + len(row["completion"].encode()) // BYTES
            lengths.append((row["task"], len(row["prompt"].encode()) // BYTES + labels, labels))
        say(f"without the model's tokenizer, {BYTES} bytes are taken for a token")
    kept = [sizes for sizes in lengths if sizes[1] <= max_length]
    if len(kept) < len(lengths):
        say(f"{len(lengths) - len(kept):,} of {len(lengths):,} rows are longer than {max_length} tokens: left out")
    if not kept:
        fail("no row is left: give a larger --max-length")
    labels = [[-100] * (tokens - labels) + [0] * labels for _, tokens, labels in kept]
    columns = {"task": [task for task, _, _ in kept], "input_ids": [[0] * tokens for _, tokens, _ in kept]}
    return Dataset.from_dict(columns | {"labels": labels})


def fuses(shape, way, width):
    """Whether layers are those of layer.py. On a CPU they are slower than autograd's, which keeps more."""
    return shape["fusable"] and (width == 2 or way != "off")


def memory(shape, args, tokens, labels, way, width=2, unpacked=False):
    """Estimated peak bytes by part, for a pass of `tokens` tokens, `labels` of them with a loss.

    way: one of layer.WAYS. width: bytes of a number, 2 on a GPU, 4 on a CPU. unpacked: 4-bit weights stay unpacked.

    The peak comes in the backward pass of the last layer's attention, or of the MLP of the one before, or with the
    loss. A layer keeps the input of both norms (without Liger's kernels in float32, too), q, k, v, attention's output,
    and gate and up; one that is not fused also both norms' outputs (with dropout a copy and a mask for each adapter)
    and the product of gate and up. Within 3 % of the peaks that benchmarks/layers.py finds.
    """
    n, liger, fused = shape, args.use_liger_kernel == "on", fuses(shape, way, width)
    hidden, query, mlp = (width * tokens * n[name] for name in ("hidden", "query", "mlp"))
    key_value = width * tokens * n["key_value"]
    norm = hidden if liger else 4 * tokens * n["hidden"] + hidden * (fused and width == 2)
    attention = norm + hidden * (not fused) + 2 * query + 2 * key_value
    if fused:
        layer = attention + norm + 2 * mlp * (way == "off")
        backward = norm + 3 * mlp
        if not liger:  # the norms of transformers have up to seven float32 copies of their input
            pieces = 2 * width * min(PIECE, tokens * n["mlp"])
            backward += max(0, pieces - width * n["largest"])
            backward = max(backward, 24 * tokens * n["hidden"] + 2 * hidden)
        backward += (attention + hidden) * (way in ("on", "host")) + hidden * (way == "host")
    else:
        inputs = (width + 1) * tokens * n["lora_inputs"] if args.lora_dropout else 2 * hidden + mlp
        layer = attention + norm + inputs - hidden + mlp * (2 if liger else 3)
        backward = layer * (way == "on") + (mlp if liger else 2 * mlp + hidden)
    # in float32 the gradient of the queries, and in 16 bits those of keys and values for every query's head
    copies = 4 * tokens * n["query"] + 2 * query * (key_value < query)
    attention_backward = attention + hidden + 2 * query + 2 * key_value + copies
    loss = (width + 4) * n["vocabulary"] * min(labels, LOSS_CHUNK)
    kept = {"on": hidden, "host": hidden * (width == 4)}.get(way, layer)
    last = kept if way in ("on", "host") else attention + (layer - attention) * labels / tokens
    packed = args.load_in_4bit and not unpacked
    backward += width * n["largest"] * packed  # a weight is unpacked where it is needed
    activations = (n["layers"] - 1) * kept + max(attention_backward, backward, last + loss)
    weight = NF4_BYTES if packed else width
    return {
        "weights": weight * n["linear"] + width * (n["parameters"] - n["linear"]),
        "adapter and gradients": 8 * n["trainable"],  # float32
        "optimizer": 8 * n["trainable"],  # two moments
        "activations": activations * (HOST_COPIES if width == 4 else 1),
        "libraries": machine.LIBRARIES if width == 4 else 0,
    }


def operations(shape, rows, labels, way, width=2):
    """Floating point operations of one pass over `rows` (lengths in tokens), forward and backward.

    A frozen weight costs 2 per token forward and 2 backward, a trainable one 2 and 4; the head and most of the last
    layer only where there is a loss; causal attention 2 n^2 per layer and query channel forward, 5 n^2 backward.
    What a layer computes again adds to that.
    """
    tokens, squares = sum(rows), sum(n * n for n in rows)
    layer, trained = shape["linear"] / shape["layers"], shape["trainable"] / shape["layers"]
    down = shape["mlp"] * shape["hidden"]
    in_attention = layer - 3 * down - shape["query"] * shape["hidden"]  # q, k and v, of all tokens in the last layer
    again, attention_again = 0, 0
    if way == "mlp":
        again = 4 * down  # gate and up
    elif way != "off":
        again, attention_again = 2 * layer - 2 * down * fuses(shape, way, width), 2
    of_all = (shape["layers"] - 1) * tokens + labels
    return (
        (4 * layer + again + 6 * trained) * of_all
        + (4 + attention_again) * in_attention * (tokens - labels)
        + 4 * shape["hidden"] * shape["vocabulary"] * labels
        + (7 + attention_again) * shape["layers"] * shape["query"] * squares
    )


def labelled(labels):
    return sum(label != -100 for label in labels)


def pass_size(packed, batch):
    """Tokens of the largest pass over `batch` packed rows, and the most labels in one."""
    tokens = sorted(map(len, packed["labels"]))
    labels = sorted(map(labelled, packed["labels"]))
    return sum(tokens[-batch:]), sum(labels[-batch:])


def host_room():
    """Bytes of the host's memory for each process on it."""
    return machine.host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def room_and_width(args):
    """Bytes of memory there are to train in, and bytes of a number there: of the GPU, or of a host without one."""
    import torch

    if args.dry_run and args.dry_run_gpu in GPUS:
        return GPUS[args.dry_run_gpu][0] * 1e9, 2
    if torch.cuda.is_available():
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return min(gpu.total_memory for gpu in gpus), 2  # all processes have to settle alike
    return host_room(), 4


def ways_here(shape, args):
    """Those of WAYS that there are here, the fastest first; exits 2 where ACTIVATION_CHECKPOINTING needs more."""
    if shape["fusable"]:
        return WAYS if room_and_width(args)[1] == 2 else WAYS[:3]
    if args.activation_checkpointing in ("mlp", "host"):
        reason = "needs LoRA on all linear layers, without dropout, biases or FSDP, and silu in the MLP"
        fail(f"--activation-checkpointing {args.activation_checkpointing} {reason}: take on")
    return "off", "on"


def fits(shape, packed, args, batch, way, unpacked=False):
    room, width = room_and_width(args)
    tokens, labels = pass_size(packed, batch)
    inputs = shape["layers"] * 2 ** math.ceil(math.log2(width * tokens * shape["hidden"]))  # as pinned memory is given
    if way == "host" and args.dry_run_gpu == "here" and inputs > USABLE * host_room():
        return False
    return sum(memory(shape, args, tokens, labels, way, width, unpacked).values()) <= USABLE * room


def fits_unpacked(shape, packed, args):
    """Whether a settled run has room for 4-bit weights that are unpacked once; FSDP shards them packed."""
    batch, way = args.per_device_train_batch_size, args.activation_checkpointing
    packed_now = args.load_in_4bit and not machine.under_fsdp()
    return packed_now and fits(shape, packed, args, batch, way, unpacked=True)


def rows_of_a_pass(shape, packed, args, way):
    """As many of an optimizer step's packed rows as fit a GPU, faster so; a CPU gains nothing by more than one."""
    if args.per_device_train_batch_size:
        return args.per_device_train_batch_size
    rows = args.gradient_accumulation_steps
    for size in range(rows, 1, -1) if room_and_width(args)[1] == 2 else []:
        if rows % size == 0 and fits(shape, packed, args, size, way):
            return size
    return 1


def choose_kernels(args):
    """Put into `args` what USE_LIGER_KERNEL = "auto" comes to."""
    import torch

    if args.use_liger_kernel == "auto":
        found = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")
        args.use_liger_kernel = "on" if found else "off"


def settle(shape, packed, args, before=None):
    """Put into `args` what "auto" and 0 come to here: fused kernels, what is computed again, rows of a pass.

    before: the ACTIVATION_CHECKPOINTING that a run which resumes came to; another one rounds differently.
    """
    choose_kernels(args)
    ways = ways_here(shape, args)
    if args.activation_checkpointing == "auto":
        alone = args.per_device_train_batch_size or 1
        fitting = [way for way in ways if fits(shape, packed, args, alone, way)]
        args.activation_checkpointing = before if before in fitting else [*fitting, ways[-1]][0]
        if before in ways and before != args.activation_checkpointing:
            change = f"--activation-checkpointing {args.activation_checkpointing} now, {before} before"
            reason = "there is less memory than before the interruption"
            say(f"warning: {reason} ({change}): the last digits of the adapter may differ")
    if not args.per_device_train_batch_size:
        args.per_device_train_batch_size = rows_of_a_pass(shape, packed, args, args.activation_checkpointing)
        args.gradient_accumulation_steps //= args.per_device_train_batch_size  # as many tokens to a step as before
    steps = optimizer_steps(packed, args)
    if args.warmup_steps > steps // 2:  # a short run would never reach the learning rate
        say(f"warm-up of {steps // 2} optimizer steps instead of {args.warmup_steps}: this run has only {steps}")
        args.warmup_steps = steps // 2


def matrix_rate():
    """FLOP/s of a large matrix product here, in half a second."""
    import torch
    from torch.utils.benchmark import Timer

    cuda = torch.cuda.is_available()
    size, kind = (8192, {"device": "cuda", "dtype": machine.compute_dtype()}) if cuda else (1024, {})
    matrix = torch.randn(size, size, **kind)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.5).median


def optimizer_steps(packed, args):
    """As the Trainer counts them."""
    batch = args.per_device_train_batch_size or 1
    passes = math.ceil(len(packed) / (batch * int(os.environ.get("WORLD_SIZE", 1))))
    return args.max_steps or math.ceil(args.num_train_epochs * math.ceil(passes / args.gradient_accumulation_steps))


def show(corner, columns):
    """Print a table of columns {head: {name of a row: text}}, without rows of zeros."""
    lines = [[corner, *columns]]
    for name in next(iter(columns.values())):
        cells = [column[name] for column in columns.values()]
        if any(cell.strip("0.:") for cell in cells):
            lines.append([name, *cells])
    table(lines)


def dry_run(shape, tokens, packed, args):
    """Print what the run would cost: tokens, steps, memory, operations and the time they take at a stated rate."""
    sizes = [(row["task"], len(row["labels"]), labelled(row["labels"])) for row in tokens]
    by_task = {}
    for task in (*sorted(set(tokens["task"])), "together"):
        lengths = [length for name, length, _ in sizes if task in (name, "together")]
        labels = sum(count for name, _, count in sizes if task in (name, "together"))
        by_task[task] = {
            "rows": f"{len(lengths):,}",
            "tokens": f"{sum(lengths):,}",
            "completion tokens": f"{labels:,}",
        }
    show("", by_task)
    steps = optimizer_steps(packed, args)
    filled = sum(lengths) / len(packed) / args.max_length  # the last ones were all
    say(f"\n{'sequences':<26}{len(packed):>14,}, {filled:.1%} of {args.max_length} tokens filled")
    say(f"{'optimizer steps':<26}{steps:>14,}")
    say(f"{'parameters':<26}{shape['parameters']:>14,}")
    say(f"{'trainable':<26}{shape['trainable']:>14,}, {shape['trainable'] / shape['parameters']:.2%}\n")
    room, width = room_and_width(args)
    passes = args.num_train_epochs
    if args.max_steps:
        passes = steps * args.gradient_accumulation_steps * (args.per_device_train_batch_size or 1) / len(packed)
    rate = GPUS[args.dry_run_gpu][1] if args.dry_run_gpu in GPUS else matrix_rate() / 2e12
    by_way, needed = {}, {}
    for way in ways_here(shape, args):
        batch = rows_of_a_pass(shape, packed, args, way)
        parts = memory(shape, args, *pass_size(packed, batch), way, width)
        needed[way] = parts["estimate"] = sum(parts.values())
        flop = passes * operations(shape, lengths, labels, way, width)
        seconds = flop / rate / 1e12
        by_way[way] = {"packed rows in a pass": str(batch)}
        by_way[way] |= {name: f"{size / 1e9:.2f}" for name, size in parts.items()}
        by_way[way]["petaflop"] = f"{flop / 1e15:,.3g}"
        by_way[way][f"time, at least, at {rate:.3g} TFLOP/s"] = duration(seconds)
        if args.dry_run_price:
            by_way[way]["price"] = f"{seconds / 3600 * args.dry_run_price:,.2f}"
    say(f"peak memory of a {'GPU' if width == 2 else 'CPU'} in GB, for each value of ACTIVATION_CHECKPOINTING:")
    show("", by_way)
    say("validation, loading and the driver's own memory (about 0.5 GB) come on top")
    if needed.get(args.activation_checkpointing, min(needed.values())) > room:
        say(f"warning: that is more than the {room / 1e9:.0f} GB available: {SAVERS}")
