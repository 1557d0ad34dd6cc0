"""Merge the adapter of train_llama.py into its base, and prove it: a plain transformers folder, ready to serve.

The base is read, changed and written in a stream, tensor by tensor: memory does not grow with the model. Then the
folder is loaded back layer by layer and compared with base and adapter under PEFT, every tensor and the logits on
validation rows. Only what passes takes the place of OUTPUT_DIR/merged; what does not is left beside it, marked.

Reads:  OUTPUT_DIR/adapter/, its base model, the validation rows of OUTPUT_DIR/dataset/, and evaluation.json, if any.
Writes: OUTPUT_DIR/merged/ (safetensors, tokenizer, generation config, model card, merge.json), or merged.unverified/.

    python merge_llama.py
    python merge_llama.py --merge-base 4bit --check-rows 32 --output-dir outputs/demo
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import train_llama
from build_dataset import LICENCES, PROMPTS
from test_llama import END_TOKENS, read_adapter
from train_llama import TASKS, encode, explain_load_error, fail, first_line, load_rows, load_tokenizer, quiet, sha256

# Settings: edit here, or override for one run on the command line.
MERGE_BASE = "auto"  # 16bit: weights as stored; 4bit: quantised to NF4 and back; auto: what the adapter was trained on
CHECK_ROWS = 16  # validation rows, in equal shares of the tasks, on which the models are compared
PUSH_TO_HUB = "none"  # OWNER/NAME of a hub repository that gets the verified folder
PRIVATE = True  # whether that repository is
OUTPUT_DIR = "outputs"

# Fixed
MAX_RELATIVE_DIFFERENCE = 0.02  # mean logit difference over the logits' standard deviation; bf16 gives some 0.005
MIN_EQUAL_TOKENS = 0.85  # share of greedy tokens; of a random model, whose logits are flat, bf16 changes one in 20
MAX_PERPLEXITY_RATIO = 1.02  # either way
SMALL_FILES = 2**26  # bytes of room for all that is not weights
KEPT = ("model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
BLOCK = 2**22  # bytes read at a time
POSITIONS = 64  # whose logits are in memory at a time
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names and torch's
# Of adapter_config.json, what this script follows or what has no influence on a merge. Any other is refused where set.
HANDLED = ("base_model_name_or_path", "peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping",
           "revision", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
           "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
           "megatron_core", "qalora_group_size", "ensure_weight_tying")  # fmt: skip
# On the model card:
SHOWN = {
    "samsum": ("rouge1", "rouge2", "rougeLsum", "bleu", "perplexity"),
    "trivia_qa": ("exact_match", "f1", "perplexity"),
}
FACTS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "load_in_4bit", "num_train_epochs", "learning_rate",
         "max_length", "seed")  # fmt: skip
EXAMPLE = "The Quaren is a river. For many years its main cargo was cheese.", "What was the main cargo on the Quaren?"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    bases = ["auto", "16bit", "4bit"]
    add("--merge-base", choices=bases, default=MERGE_BASE, help="weights as stored, or NF4 and back")
    add("--check-rows", type=int, default=CHECK_ROWS, help="validation rows to compare on")
    add("--push-to-hub", default=PUSH_TO_HUB, help="OWNER/NAME of a hub repository, or none")
    add("--private", action=argparse.BooleanOptionalAction, default=PRIVATE, help="whether that repository is")
    add("--output-dir", default=OUTPUT_DIR, help="holds adapter/ and dataset/, gets merged/")
    args = parser.parse_args(argv)
    if args.check_rows < 1:
        parser.error("--check-rows must be at least 1")
    if args.push_to_hub != "none" and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push_to_hub):
        parser.error("--push-to-hub must be OWNER/NAME, or none")
    return args


def read_lora_config(folder):
    """adapter_config.json; exits 2, naming it, on anything that is more than LoRA on linear layers."""
    config = json.loads((folder / "adapter_config.json").read_text())
    strange = [name for name, value in config.items() if value and name not in HANDLED]
    for name, plain in {
        "peft_type": ["LORA"],
        "bias": ["none"],
        "init_lora_weights": [True, False, "gaussian"],
    }.items():
        if config.get(name, plain[0]) not in plain:  # PiSSA, OLoRA and so on change the base weights
            strange.append(f"{name} {config[name]}")
    if strange:
        fail(f"{folder} has {', '.join(strange)}, which this script does not merge: it handles LoRA on linear layers, "
             "with rank and alpha patterns and rsLoRA; use PEFT's merge_and_unload")  # fmt: skip
    return config


def find_base(base, revision):
    """Folder of the base, downloaded where it is a hub id, and {tensor: its shard}; exits 2 if one is missing."""
    from huggingface_hub import snapshot_download
    from safetensors import SafetensorError, safe_open

    def get(*patterns):
        try:
            return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
        except Exception as error:
            explain_load_error(base, error)

    folder = Path(base)
    hub = not folder.is_dir()
    if hub:
        folder = get("*.json", "tokenizer*", "*.jinja")
    index, shards = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = {Path(name).name for name in weight_map.values()}
    if hub:
        folder = get("*.json", "tokenizer*", "*.jinja", *shards)
    where = {}
    for path in sorted(folder / shard for shard in shards):
        if not path.is_file():
            pickles = [*folder.glob("*.bin"), *folder.glob("*.pth")]
            fail(f"{base} has no {path.name}" + (f", only {pickles[0].name}, a pickle: convert it to safetensors"
                 if pickles else ": get the missing file"))  # fmt: skip
        try:
            with safe_open(path, "pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            fail(f"{base} has a broken {path.name} ({first_line(error)}): get it again")
    if index.is_file() and (lost := {name for name, shard in weight_map.items() if where.get(name) != folder / shard}):
        fail(f"{base} has no {min(lost)} in {weight_map[min(lost)]}, where its index says it is: get it again")
    return folder, where


def header_of(path):
    """Of a safetensors file: {tensor: {"dtype", "shape", "data_offsets"}} and where the data begins, in bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def empty_models(config, folder):
    """The plain model and the one with the adapter, as transformers and PEFT build them, on the meta device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plain, adapted = (AutoModelForCausalLM.from_config(config, attn_implementation="sdpa") for _ in "12")
        try:
            adapted = get_peft_model(adapted, LoraConfig.from_pretrained(folder), low_cpu_mem_usage=True)
        except ValueError as error:
            fail(f"the adapter in {folder} does not fit its base ({first_line(error)}): run train_llama.py again")
    return plain.eval(), adapted.eval()


def check_shapes(base, where, folder, plain, adapted):
    """Exit 2 unless base and adapter have the tensors that the two models need, in their shapes.

    Returns {weight: scale} of the adapted weights, the scale as PEFT resolves it for that layer.
    """
    from peft.tuners.lora import LoraLayer

    entries = {name: entry for path in set(where.values()) for name, entry in header_of(path)[0].items()}
    stored = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    tied = plain.config.tie_word_embeddings
    for name, tensor in plain.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if stored.get(name) != tuple(tensor.shape):
            fail(f"{base} has {stored.get(name, 'no')} for {name}, its config asks for {tuple(tensor.shape)}: "
                 "its files do not belong together, get it again")  # fmt: skip
        if entries[name]["dtype"] not in DTYPES:
            fail(f"{base} has {name} as {entries[name]['dtype']}: take its 16-bit weights")
    needed = {name.replace(".default", ""): tuple(tensor.shape)
              for name, tensor in adapted.state_dict().items() if "lora_" in name}  # fmt: skip
    header = header_of(folder / "adapter_model.safetensors")[0]
    held = {name: tuple(entry["shape"]) for name, entry in header.items()}
    for name in sorted(needed.keys() | held.keys()):
        if needed.get(name) != held.get(name):
            fail(f"the adapter in {folder} has {held.get(name, 'no')} for {name}, its config on {base} asks for "
                 f"{needed.get(name, 'none')}: it is of another base, or broken; run train_llama.py")  # fmt: skip
    layers = {name.removeprefix("base_model.model.") + ".weight": module
              for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}  # fmt: skip
    if strange := [name for name, module in layers.items() if not hasattr(module.get_base_layer(), "in_features")]:
        fail(f"the adapter in {folder} trains {strange[0]}, no linear layer: use PEFT's merge_and_unload")
    if tied and "lm_head.weight" in layers:
        fail(f"the adapter in {folder} trains lm_head, whose weights are also the embeddings of {base}: merging would "
             "change those too")  # fmt: skip
    return {name: module.scaling["default"] for name, module in layers.items()}


def quantised_weights(model):
    """Names of the weights that loading in 4 bits quantises: all linear layers but the output layer."""
    import torch

    return {name + ".weight" for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"}  # fmt: skip


def through_nf4(weight):
    """`weight` quantised as train_llama.load_model loads it, and back, in float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).float()


def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def merge_shard(source, target, scales, nf4, adapter, bar):
    """Write `target`: the shard `source` with its adapted weights merged, all else byte for byte.

    scales: {weight: scale}; nf4: names of weights that go through NF4. Returns the SHA-256 of both files.
    """
    import torch
    from safetensors import safe_open

    header, start = header_of(source)
    digests = hashlib.sha256(), hashlib.sha256()
    with source.open("rb") as old, target.open("wb") as new:

        def read(size):
            data = bytearray(size)
            if old.readinto(data) != size:
                raise OSError(f"{source} was cut off while it was read")
            digests[0].update(data)
            bar.update(size)
            return data

        def write(data):
            digests[1].update(data)
            new.write(data)

        write(read(start))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            if name not in scales and name not in nf4:
                for first in range(0, size, BLOCK):
                    write(read(min(BLOCK, size - first)))
                continue
            dtype, (rows, columns) = getattr(torch, DTYPES[entry["dtype"]]), entry["shape"]
            if name in scales:
                with safe_open(adapter, "pt") as file:
                    prefix = f"base_model.model.{name.removesuffix('weight')}lora_"
                    a, b = (file.get_tensor(f"{prefix}{x}.weight").float() for x in "AB")
            step = rows if name in nf4 else max(1, BLOCK // (size // rows))  # NF4's scales need the whole tensor
            for first in range(0, rows, step):
                data = read(min(step, rows - first) * (size // rows))
                weight = torch.frombuffer(data, dtype=dtype).view(-1, columns).float()
                if name in nf4:
                    weight = through_nf4(weight.to(device())).cpu()
                if name in scales:
                    weight.addmm_(b[first : first + step], a, alpha=scales[name])
                weight = weight.to(dtype)
                if not weight.isfinite().all():
                    fail(f"merged, {name} is not finite in {DTYPES[entry['dtype']]}: run train_llama.py again, with a "
                         "lower learning rate")  # fmt: skip
                write(weight.view(torch.uint8).numpy())
    return [digest.hexdigest() for digest in digests]


def validation_rows(output_dir):
    """{column: list}; read in a process of its own, with which `datasets` leaves memory (85 MB) again."""
    return load_rows(output_dir, "validation").to_dict()


def check_rows(args, rows, tokenizer, limit):
    """Pairs of prompt and completion ids (lists), CHECK_ROWS in all: the first validation rows of each task."""
    try:
        ids = encode(tokenizer, rows)
    except ValueError as error:
        fail(f"cannot compare on the validation rows: {first_line(error)}")
    pairs, tasks = list(zip(ids["prompt_ids"], ids["completion_ids"], strict=True)), {task: [] for task in TASKS}
    for task, pair in zip(rows["task"], pairs, strict=True):
        if sum(map(len, pair)) <= limit:
            tasks[task].append(pair)
    turns = sorted((n, task) for task, some in tasks.items() for n in range(len(some)))
    if not turns:
        fail(f"no validation row fits the model's {limit} tokens: lower MAX_CONTEXT_WORDS of build_dataset.py")
    return [tasks[task][n] for n, task in turns[: args.check_rows]]


def read_tensor(where, name):
    """A tensor out of the files {name: path}, copied in float32; opened anew: mapped files count as memory."""
    import torch
    from safetensors import safe_open

    with safe_open(where[name], "pt") as file:
        return file.get_tensor(name).to(device(), torch.float32, copy=True)


def mapped_tensor(where, name):
    """A tensor as it lies in the file: only the rows that are used are read."""
    from safetensors import safe_open

    with safe_open(where[name], "pt") as file:
        return file.get_tensor(name)


def fill(module, prefix, where, nf4=()):
    """Load `module`, which lies on the meta device as `prefix` of the model, in float32 from {tensor: path}."""
    state, shapes = {}, {key: tensor.numel() for key, tensor in module.state_dict().items()}
    for key in sorted(shapes, key=shapes.get, reverse=True):  # quantising takes most room: while least is loaded
        name = (prefix + key).replace(".base_layer", "")
        if "lora_" in name:
            name = "base_model.model." + name.replace(".default", "")
        state[key] = read_tensor(where, name)
        if name in nf4:
            state[key] = through_nf4(state[key])
    module.load_state_dict(state, assign=True)


def merge_by_peft(module, prefix):
    """PEFT's own merge of the module's LoRA layers, in place: {tensor: its merged values}."""
    from peft.tuners.lora import LoraLayer

    for part in module.modules():
        if isinstance(part, LoraLayer):
            part.merge()
    weights = {(prefix + key).replace(".base_layer", ""): value for key, value in module.state_dict().items()}
    return {name: value for name, value in weights.items() if "lora_" not in name}


def release(module):
    """Back to the meta device, without a merge."""
    from peft.tuners.lora import LoraLayer

    for part in module.modules():
        if isinstance(part, LoraLayer):
            part.merged_adapters.clear()
    module.to("meta")
    keep_no_freed_memory()


def stored_as(name, where):
    """The dtype (torch) of a stored tensor."""
    import torch

    return getattr(torch, DTYPES[header_of(where[name])[0][name]["dtype"]])


def differing(expected, where, changed):
    """Sentences on the tensors in the files that are not what they should be ({name: float32 tensor}).

    A changed one may be a rounding step away: float32 sums depend on their order, by some 1e-7 of the largest value.
    """
    import torch

    for name, tensor in expected.items():
        actual, limits, furthest, fine = mapped_tensor(where, name), torch.finfo(stored_as(name, where)), 0.0, True
        slack = 1e-6 * max(abs(x.item()) for x in tensor.aminmax()) + limits.smallest_normal * limits.eps
        for one, two in zip(actual.split(512), tensor.split(512), strict=True):
            difference = (one.to(two) - two).abs()
            fine &= bool((difference <= (limits.eps * two.abs() + slack if name in changed else 0)).all())  # NaN: no
            furthest = max(furthest, difference.max().item())
        if not fine:
            source = "PEFT's merge" if name in changed else "the base, and should not"
            yield f"{name} differs from {source}, by up to {furthest:.3g}"


def differing_outside_layers(where, merged, changed):
    """The same for unchanged tensors outside the layers, block by block: embeddings and head are the largest."""
    from safetensors import safe_open

    for name in where:
        if name.startswith("model.layers.") or name in changed:
            continue
        with safe_open(where[name], "pt") as one, safe_open(merged[name], "pt") as two:
            pair = one.get_slice(name), two.get_slice(name)
            shapes = [part.get_shape() for part in pair]
            step = max(1, BLOCK // (4 * math.prod(shapes[0][1:])))
            if shapes[0] != shapes[1] or any((pair[0][i : i + step] != pair[1][i : i + step]).any()
                                             for i in range(0, shapes[0][0], step)):  # fmt: skip
                yield f"{name} differs from the base, and should not"


def compare_models(args, rows, where, merged, lora, plain, adapted, scales, trained):
    """Go through the layers once, one in memory at a time, all in float32; `merged` is read as it lies on the disk.

    where, merged, lora: {tensor: path} of base, merged model and adapter. Models are called by the weights they start
    from, 16bit or 4bit (through NF4), and what is done to them: `adapter`, PEFT's LoRA layers on top, or `merged`,
    rounded. The merged one of MERGE_BASE comes from the files; PEFT makes the other one here, to tell which is better.
    Returns what `figures` does, and sentences on what is wrong with the files.
    """
    import torch
    from tqdm import tqdm
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    llama, nf4 = adapted.get_base_model(), quantised_weights(plain)
    kinds = [kind for kind in ("16bit", "4bit") if kind in ("16bit", trained, args.merge_base)]
    ids = [torch.tensor(prompt + completion) for prompt, completion in rows]
    table = mapped_tensor(merged, "model.embed_tokens.weight")
    inputs = [table[row].to(device(), torch.float32)[None] for row in ids]
    del table
    states = {(kind, how): list(inputs) for kind in kinds for how in ("adapter", "merged")}
    rotary = LlamaRotaryEmbedding(config=plain.config).to(device())
    problems = list(differing_outside_layers(where, merged, scales))

    def run(layer, model):
        for i, x in enumerate(states[model]):
            positions = torch.arange(x.shape[1], device=x.device)[None]
            states[model][i] = layer(x, position_embeddings=rotary(x, positions), position_ids=positions)

    for number, layer in enumerate(tqdm(llama.model.layers, desc="verifying", disable=None, leave=False)):
        prefix = f"model.layers.{number}."
        for kind in kinds:
            quantised = nf4 if kind == "4bit" else set()
            fill(layer, prefix, where | lora, quantised)
            run(layer, (kind, "adapter"))
            weights = merge_by_peft(layer, prefix)
            if kind == args.merge_base:
                problems += differing(weights, merged, scales.keys() | quantised)
            else:
                for name, weight in weights.items():
                    weight.copy_(weight.to(stored_as(name, merged)))
                run(layer, (kind, "merged"))
            del weights
            release(layer)
        fill(plain.model.layers[number], prefix, merged)
        run(plain.model.layers[number], (args.merge_base, "merged"))
        release(plain.model.layers[number])
    fill(plain.model.norm, "model.norm.", merged)
    head = mapped_tensor(merged, "lm_head.weight" if "lm_head.weight" in merged else "model.embed_tokens.weight")

    def plain_head(x):
        return torch.cat([x @ rows.to(x).T for rows in head.split(4096)], dim=-1)  # all of it in float32 is too much

    heads = {"merged": plain_head, "adapter": plain_head}
    if "lm_head.weight" in scales:
        fill(llama.lm_head, "lm_head.", where | lora)
        heads["adapter"] = llama.lm_head
    results = figures(rows, states, plain.model.norm, heads)
    if "lm_head.weight" in scales:
        problems += differing(merge_by_peft(llama.lm_head, "lm_head."), merged, scales)
    return results, problems


def figures(rows, states, norm, heads):
    """{model: perplexity of the completions}, and {(merged model, adapter model): how far their logits are apart}."""
    import torch

    hidden = {model: torch.cat([x[0, len(p) - 1 : -1] for x, (p, _) in zip(some, rows, strict=True)]).split(POSITIONS)
              for model, some in states.items()}  # fmt: skip
    golds = torch.tensor(sum((completion for _, completion in rows), []), device=device())
    nll = dict.fromkeys(states, 0.0)
    pairs = {(one, two): [] for one in states for two in states if one[1] == "merged" and two[1] == "adapter"}
    for i, gold in enumerate(golds.split(POSITIONS)):
        logits = {model: heads[model[1]](norm(parts[i])) for model, parts in hidden.items()}
        for model, some in logits.items():
            nll[model] += torch.nn.functional.cross_entropy(some, gold, reduction="sum").item()
        for (one, two), sums in pairs.items():
            a, b = logits[one], logits[two]
            difference = (a - b).abs()
            sums.append([difference.max().item(), difference.double().sum().item(), b.double().sum().item(),
                         b.double().square().sum().item(), (a.argmax(-1) == b.argmax(-1)).sum().item(),
                         b.numel()])  # fmt: skip
    for pair, sums in pairs.items():
        largest, *others = zip(*sums, strict=True)
        apart, total, squares, equal, count = map(sum, others)
        spread = math.sqrt(max(0, squares / count - (total / count) ** 2)) or 1.0
        pairs[pair] = {"largest_logit_difference": max(largest) if apart == apart else math.nan,
                       "mean_logit_difference": apart / count, "relative_difference": apart / count / spread,
                       "equal_greedy_tokens": equal / len(golds)}  # fmt: skip
    return {model: math.exp(min(700, total / len(golds))) for model, total in nll.items()}, pairs


def beyond(comparison, perplexities):
    """Sentences on the figures of merged against adapter model that are beyond the thresholds; NaN is beyond all."""
    ratio = perplexities[0] / perplexities[1]
    if not comparison["relative_difference"] <= MAX_RELATIVE_DIFFERENCE:
        yield f"the logits are {comparison['relative_difference']:.3g} of their deviation from base and adapter's"
    if not comparison["equal_greedy_tokens"] >= MIN_EQUAL_TOKENS:
        yield f"only {comparison['equal_greedy_tokens']:.1%} of the greedy tokens are base and adapter's"
    if not 1 / MAX_PERPLEXITY_RATIO <= ratio <= MAX_PERPLEXITY_RATIO:
        yield f"the perplexity is {ratio:.3g} times base and adapter's"


def write_small_files(source, tokenizer, target):
    """Index, config, tokenizer and generation config; the last ends at every end token and is greedy, as tested."""
    for pattern in KEPT:  # as they are: saved again, an older transformers, or vLLM with one, could not read them
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path")}
    path, vocabulary = source / "generation_config.json", tokenizer.get_vocab()
    generation = json.loads(path.read_text()) if path.is_file() else {}
    ends = [tokenizer.eos_token_id, *(vocabulary[token] for token in END_TOKENS if token in vocabulary)]
    for ids in (generation.get("eos_token_id"), config.get("eos_token_id")):
        ends += ids if isinstance(ids, list) else [ids]
    generation = {key: value for key, value in generation.items() if key not in ("temperature", "top_p", "top_k")}
    generation |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": sorted(set(ends) - {None}),
                   "pad_token_id": tokenizer.pad_token_id, "do_sample": False}  # fmt: skip
    for name, content in {"config": config, "generation_config": generation}.items():
        (target / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def merge(args, source, where, folder, scales, plain, fresh):
    """Write the shards into `fresh`. Returns {path: SHA-256} of what was read and written, and the seconds taken."""
    from tqdm import tqdm

    start, shards = time.time(), sorted(set(where.values()))
    needed = sum(path.stat().st_size for path in shards)
    free = shutil.disk_usage(fresh.parent).free
    if free < needed + SMALL_FILES:
        fail(f"merging needs {(needed + SMALL_FILES) / 1e9:.2f} GB, {fresh.parent} has {free / 1e9:.2f} GB free: make "
             "room")  # fmt: skip
    adapter, nf4 = folder / "adapter_model.safetensors", quantised_weights(plain) if args.merge_base == "4bit" else ()
    digests = {adapter: sha256(adapter)}
    fresh.mkdir()
    with tqdm(total=needed, desc="merging", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for path in shards:
            digests[path], digests[fresh / path.name] = merge_shard(path, fresh / path.name, scales, nf4, adapter, bar)
    return digests, time.time() - start


def keep_no_freed_memory():
    """Tell glibc to give freed tensors back at once: it would keep them in pieces, more with every layer."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another libc
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, in bytes
        ctypes.CDLL(None).malloc_trim(0)


def verify(args, base, rows, where, folder, plain, adapted, scales, trained, digests, fresh):
    """What merge.json says of the comparison of `fresh` with base and adapter, and the seconds it took."""
    import torch
    from safetensors import safe_open

    start, results, problems = time.time(), None, []
    keep_no_freed_memory()
    adapter = folder / "adapter_model.safetensors"
    merged = {name: fresh / path.name for name, path in where.items()}
    with safe_open(adapter, "pt") as file:
        lora = dict.fromkeys(file.keys(), adapter)
    try:
        with torch.inference_mode():
            results, problems = compare_models(args, rows, where, merged, lora, plain, adapted, scales, trained)
    except (*train_llama.disk_errors(), KeyError) as error:
        problems = [f"it cannot be loaded ({first_line(error)})"]
    for path, digest in digests.items():
        if not path.is_file() or sha256(path) != digest:
            problems.append(f"{path} has changed since it was {'written' if path.parent == fresh else 'read'}")
    dtypes = sorted({DTYPES.get(entry["dtype"], entry["dtype"])
                     for path in set(where.values()) for entry in header_of(path)[0].values()})  # fmt: skip
    return report_of(args, base, trained, dtypes, rows, results, problems), time.time() - start


def finish(args, base, run, report, digests, fresh):
    """Write model card and merge.json, the latter last: with it the folder is whole."""
    from importlib.metadata import version

    (fresh / "README.md").write_text(model_card(args, base, run, report), encoding="utf-8")
    files = {path.name: digests.get(path) or sha256(path) for path in sorted(fresh.iterdir())}
    # no path of this machine: the file may be published
    read = {f"{'adapter' if path.name == 'adapter_model.safetensors' else 'base'}/{path.name}": digest
            for path, digest in digests.items() if path.parent != fresh}  # fmt: skip
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "safetensors")}
    report |= {"read_sha256": read, "sha256": files, "versions": versions, "git_commit": train_llama.git_commit()}
    (fresh / "merge.json").write_text(json.dumps(report, indent=2) + "\n")
    for path in fresh.iterdir():  # on the disk before the folder gets its name; after the check most of it is
        with path.open("rb") as file:
            os.fsync(file.fileno())


def score_rows(output, run):
    """Rows of the card's table from evaluation.json; none where there is none of this adapter."""
    rows = []
    try:
        scores = json.loads((output / "evaluation.json").read_text())
        if scores["training"]["facts"]["seconds"] != run["seconds"]:
            return []
        for task, names in SHOWN.items():
            for name in names if task in scores else ():
                part, cells = scores[task], []
                for system in ("base", "tuned"):
                    value = part["perplexity"][system][name] if name == "perplexity" else part[system][name]
                    low, high = part["intervals"][system][name]
                    cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
                rows.append([f"{task}, {part['examples']}", name, *cells])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return rows


def licence_of(base):
    """The hub's name of the licence of Meta's model `base`, a hub id; `other` for any other model or a folder."""
    found = re.search(r"^meta-llama/.*llama-?(2|3(\.\d)?)(?!\d)", base.lower())
    return f"llama{found[1]}" if found and not Path(base).is_dir() else "other"


def public_name(base):
    """A hub id as it is, of a folder its name: the whole path is nobody's business."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def model_card(args, base, run, report):
    """README.md of the merged folder: model_card.md.jinja, filled in."""
    from importlib.metadata import version

    import jinja2
    from huggingface_hub import ModelCardData

    settings, output, built = run.get("settings", {}), Path(args.output_dir), {}
    with contextlib.suppress(OSError, ValueError):
        built = json.loads((output / "dataset_report.json").read_text())
    sources = {task: source["source"] if source["revision"] else None  # a folder has no revision
               for task, source in built.get("sources", {}).items()}  # fmt: skip
    data = ModelCardData(base_model=None if Path(base).is_dir() else base, language="en",
                         datasets=[source for source in sources.values() if source] or None,
                         library_name="transformers", license=licence_of(base),
                         pipeline_tag="text-generation")  # fmt: skip
    facts = [(key, " ".join(settings[key]) if isinstance(settings[key], list) else settings[key])
             for key in FACTS if key in settings]  # fmt: skip
    facts += [(key, f"{run[key]:,}") for key in ("train_rows", "steps", "tokens") if key in run]
    facts += [("weights kept from step", f"{run['best_step']:,}")] if run.get("best_step") else []
    example = PROMPTS["trivia_qa"].format(context=EXAMPLE[0], question=EXAMPLE[1])
    template = jinja2.Template(Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        metadata=data.to_yaml(), name=public_name(base), report=report, licences=LICENCES, facts=facts,
        example=example, example_json=json.dumps(example), scores=score_rows(output, run), sources=sources,
        transformers=version("transformers"), words=built.get("settings", {}).get("max_context_words"),
        licence=licence_of(base),
        here="." if args.push_to_hub == "none" else args.push_to_hub,
        samsum=PROMPTS["samsum"].format(dialogue="Nora: ...\nPaul: ..."),
        trivia_qa=PROMPTS["trivia_qa"].format(context="...", question="..."),
    ) + "\n"  # fmt: skip


def report_of(args, base, trained, dtypes, rows, results, problems):
    """What merge.json says of the comparison."""
    comparison = {}
    if results:
        perplexities, pairs = results
        mine = (args.merge_base, "merged"), (args.merge_base, "adapter")
        problems += beyond(pairs[mine], [perplexities[model] for model in mine])
        comparison = {
            "answer_perplexity": {f"{how} {kind}": value for (kind, how), value in perplexities.items()},
            "merged_to_adapter": pairs[mine],
            "to_the_model_trained": {f"merged {one[0]}": figures for (one, two), figures in pairs.items()
                                     if two[0] == trained},
        }  # fmt: skip
    thresholds = {"relative_difference": MAX_RELATIVE_DIFFERENCE, "equal_greedy_tokens": MIN_EQUAL_TOKENS,
                  "perplexity_ratio": MAX_PERPLEXITY_RATIO, "tensors": "one rounding step"}  # fmt: skip
    return {"verified": not problems, "problems": problems, "base_model": public_name(base),
            "merge_base": args.merge_base, "trained_on": trained, "dtypes": dtypes, "check_rows": len(rows),
            "answer_tokens": sum(len(completion) for _, completion in rows), "computed_in": f"float32 on {device()}",
            "thresholds": thresholds, "comparison": comparison}  # fmt: skip


def show(report):
    """The comparison as a table of at most 80 columns."""
    comparison, base = report["comparison"], report["merge_base"]
    if not comparison:
        return
    perplexity = comparison["answer_perplexity"]
    print(f"{report['check_rows']} validation rows, {report['answer_tokens']} answer tokens\n")
    print(f"{'logit difference':>45}{'same':>10}{'answer':>13}")
    print(f"{'':<27}{'mean':>8}{'largest':>10}{'tokens':>10}{'perplexity':>13}")

    def line(label, figures, key):
        cells = [f"{figures[f'{name}_logit_difference']:.4g}" for name in ("mean", "largest")] if figures else ["", ""]
        same = f"{figures['equal_greedy_tokens']:.1%}" if figures else ""
        print(f"{label:<27}{cells[0]:>8}{cells[1]:>10}{same:>10}{perplexity[key]:>13.5g}")

    print(f"to the adapter on {base}")
    line("  itself", None, f"adapter {base}")
    line("  the merged folder", comparison["merged_to_adapter"], f"merged {base}")
    print(f"to the adapter on {report['trained_on']}, as it was trained")
    line("  itself", None, f"adapter {report['trained_on']}")
    for key, figures in comparison["to_the_model_trained"].items():
        line(f"  merged into {key[7:]}", figures, key)


def install(fresh, target):
    """Put the finished folder in place of an old one."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def push(args, folder):
    """Upload the verified folder; the token is the one of `hf auth login`, or HF_TOKEN."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(args.push_to_hub, private=args.private, exist_ok=True)
        if args.private and not api.model_info(args.push_to_hub).private:
            raise ValueError("it is there already, and public: give --no-private if that is meant")
        api.upload_folder(repo_id=args.push_to_hub, folder_path=folder, commit_message="Merged model")
        print(f"pushed to {url}")
    except Exception as error:  # no login, no network, no right to
        fail(f"cannot push to {args.push_to_hub} ({first_line(error)}): {folder} stays as it is; if it says "
             "that you may not: hf auth login")  # fmt: skip


def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output_dir)
    target, fresh = output / "merged", output / ".merged.new"
    folder, base = read_adapter(output)
    lora_config = read_lora_config(folder)
    with ProcessPoolExecutor(1) as pool:
        rows = pool.submit(validation_rows, args.output_dir).result()
    quiet()
    base = train_llama.find_model(base)
    config = train_llama.load_config(base)
    if getattr(config, "quantization_config", None):
        fail(f"{base} is quantised: take the 16-bit model it was made from")
    source, where = find_base(base, lora_config.get("revision"))
    plain, adapted = empty_models(config, folder)
    scales = check_shapes(base, where, folder, plain, adapted)
    tokenizer = load_tokenizer(str(source))
    rows = check_rows(args, rows, tokenizer, config.max_position_embeddings)
    if not os.access(output, os.W_OK):
        fail(f"cannot write to {output}")
    run = json.loads((folder / "run.json").read_text()) if (folder / "run.json").is_file() else {}
    trained = "4bit" if run.get("settings", {}).get("load_in_4bit", True) else "16bit"
    args.merge_base = trained if args.merge_base == "auto" else args.merge_base
    if not target.exists() and (output / ".merged.old").is_dir():  # killed between two renames
        (output / ".merged.old").rename(target)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        digests, seconds = merge(args, source, where, folder, scales, plain, fresh)
        write_small_files(source, tokenizer, fresh)
        report, took = verify(args, base, rows, where, folder, plain, adapted, scales, trained, digests, fresh)
        finish(args, base, run, report | {"seconds_merging": seconds, "seconds_verifying": took}, digests, fresh)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        fail(f"cannot write {target} ({first_line(error)}): make room, then give the same command again")
    except KeyboardInterrupt:
        shutil.rmtree(fresh, ignore_errors=True)
        print(f"\ninterrupted; {target} was not touched", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit:  # a sentence was said
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    show(report)
    print(f"\nmerged in {seconds:.1f} s, verified in {took:.1f} s, peak memory {train_llama.peak_memory():.2f} GB")
    if not report["verified"]:
        install(fresh, output / "merged.unverified")
        print(f"error: the merge failed its check ({'; '.join(report['problems'][:3])}): left in "
              f"{output / 'merged.unverified'}; {target} was not touched", file=sys.stderr)  # fmt: skip
        raise SystemExit(1)
    install(fresh, target)
    print(f"wrote {target} ({args.merge_base} base, {', '.join(report['dtypes'])})")
    if args.push_to_hub != "none":
        push(args, target)


if __name__ == "__main__":
    main()
