"""Merge the adapter of train_llama.py into its base, and prove it: a plain transformers folder, ready to serve.

Base and adapter answer validation rows; the base is merged shard by shard, in the memory of its largest; then every
tensor is compared with PEFT's merge, and the folder, loaded as a user loads it, with base and adapter. In float32 the
two have to agree; what rounding to the stored type then costs, and to others, is reported, and refuses nothing. The
check needs 4 bytes a parameter, on the GPU or else of RAM; with less it compares in 16 bit. Only what passes takes the
place of OUTPUT_DIR/merged; what does not is left beside it, marked.

Reads:  OUTPUT_DIR/adapter/, its base model, the validation rows of OUTPUT_DIR/dataset/; dataset_report.json and
        evaluation.json for the model card, where they are of this adapter.
Writes: OUTPUT_DIR/merged/ (safetensors, tokenizer, generation config, model card, Modelfile, merge.json), or
        merged.unverified/.

    python merge_llama.py
    python merge_llama.py --merge-base 4bit --check-rows 32 --output-dir outputs/demo
"""

import contextlib
import gc
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import common
import llama
from common import fail, first_line, say

# Settings: edit here, or override for one run on the command line.
MERGE_BASE = "auto"  # 16bit: weights as stored; 4bit: those quantised to NF4 and back; auto: 16bit
MERGE_DTYPE = "auto"  # float16, bfloat16, float32; auto: float16 where it holds every weight, else bfloat16
CHECK_ROWS = 16  # validation rows, in equal shares of the tasks, on which the models are compared
PUSH_TO_HUB = "none"  # OWNER/NAME of a hub repository that gets the verified folder, or none
PRIVATE = True  # whether that repository is
OUTPUT_DIR = "outputs"  # holds adapter/ and dataset/, gets merged/

# Fixed
# Mean logit difference over the logits' standard deviation, nothing rounded: a real model's is 1e-6. Beside it the
# limit where memory allows 16 bit alone, in which rounding costs 0.025: that finds another model altogether.
MAX_RELATIVE_DIFFERENCE = 1e-4
MAX_RELATIVE_DIFFERENCE_16BIT = 0.1
DTYPES = ("float32", "float16", "bfloat16")
FLOAT16_MAX = 65504
TRACE = 1e-4  # share of the weights that may be smaller than float16's smallest number, 6e-8
SMALL_FILES = 2**26  # bytes of room for all that is not weights
ROWS_AT_A_TIME = 8  # in one pass of the check: layers that lie on the disk are read once for all of them
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json")
# What adapter_config.json may have besides PEFT's defaults: what a later PEFT invents is refused, too.
FOLLOWED = (
    *("base_model_name_or_path", "peft_version", "task_type", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
)


def parse_args(argv=None):
    choices = {"MERGE_BASE": ("auto", "16bit", "4bit"), "MERGE_DTYPE": ("auto", *DTYPES)}
    args = common.parse_settings(sys.modules[__name__], argv, choices)
    if args.push_to_hub != "none" and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push_to_hub):
        fail("--push-to-hub must be OWNER/NAME, or none")
    return args


def refuse_more_than_lora(folder):
    """Exit 2, naming it, on anything in adapter_config.json that is more than LoRA on linear layers."""
    from peft import LoraConfig

    config, plain = common.read_json(folder / "adapter_config.json"), LoraConfig().to_dict()
    # "init_lora_weights" too: PiSSA, OLoRA and so on start from other base weights
    strange = {name: value for name, value in config.items() if value and value != plain.get(name)}
    if strange.get("init_lora_weights") == "gaussian":  # another start, the base's own weights
        del strange["init_lora_weights"]
    if names := ", ".join(f"{name} {strange[name]}" for name in sorted(strange.keys() - set(FOLLOWED))):
        fail(f"{folder} has {names}, which this script does not merge: use PEFT's merge_and_unload")


def read_run(folder, base):
    """run.json of the adapter with "adapter_sha256" and the base's "weights"; exits 2 where it names others."""
    run = common.read_json(folder / "run.json")
    found = {"adapter_sha256": common.sha256(folder / "adapter_model.safetensors")}
    found["weights"] = llama.weights_identity(base)
    named = {"adapter_sha256": run.get("adapter_sha256"), "weights": run.get("run", {}).get("weights")}
    named = {name: value or found[name] for name, value in named.items()}  # an adapter from elsewhere names nothing
    remedy = f"put back what {folder}/run.json names, or run train_llama.py again"
    common.refuse_another(f"the adapter in {folder}, or its base {base},", named, found, remedy)
    return run | found


def check_rows(args, tokenizer):
    """CHECK_ROWS validation rows, the first of each task in turn, and their ids as llama.encode gives them."""
    from datasets import interleave_datasets

    rows = llama.load_rows(args.output_dir, "validation")
    tasks = [llama.rows_of(rows, task) for task in sorted(rows.unique("task"))]
    rows = interleave_datasets(tasks, stopping_strategy="all_exhausted_without_replacement")
    try:
        return rows[: args.check_rows], llama.encode(tokenizer, rows[: args.check_rows])
    except ValueError as error:
        fail(f"cannot compare on the validation rows: {first_line(error)}")


def scales_of(model, folder):
    """{weight: scale} of what the adapter changes, as PEFT resolved rank, alpha, their patterns and rsLoRA."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        tied = name == "lm_head" and model.config.tie_word_embeddings
        if tied or not hasattr(layer.get_base_layer(), "in_features"):
            fail(f"the adapter in {folder} trains {name}, no linear layer of its own: use PEFT's merge_and_unload")
    return {f"{name}.weight": layer.scaling["default"] for name, layer in layers.items()}


def tensors_in(path):
    """(name, tensor) in turn, each opened for it alone: what was read of a mapped file counts as memory."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


def changes_of(model, folder):
    """(tensors of the adapter, {weight: its scale}, weights that `model` holds in 4 bits), for merge_tensor."""
    from safetensors.torch import load_file

    held = {name for name, module in model.named_modules() if hasattr(module, "quant_state")}
    nf4 = {name.removesuffix(".base_layer") + ".weight" for name in held}
    return load_file(folder / "adapter_model.safetensors"), scales_of(model, folder), nf4


def merge_tensor(name, stored, lora, scales, nf4):
    """`stored`, a base weight [out, in], with scale x B A added, in float32; as it is where nothing changes it."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if name not in scales and name not in nf4:
        return stored
    weight = stored.float()
    if name in nf4:  # quantised as llama.load_model loads it in 4 bits, and back
        weight = weight.to("cuda" if torch.cuda.is_available() else "cpu")
        weight = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).float().cpu()
    if name in scales:
        prefix = f"base_model.model.{name.removesuffix('weight')}lora_"
        a, b = lora[f"{prefix}A.weight"].float(), lora[f"{prefix}B.weight"].float()
        weight = weight.addmm(b, a, alpha=scales[name])
    if not weight.isfinite().all():
        fail(f"merged, {name} is not finite: run train_llama.py again, with a lower learning rate")
    return weight


def merged_tensors(path, changes):
    """(name, the base's tensor in `path`, what the adapter makes of it) in turn; see merge_tensor."""
    for name, stored in tensors_in(path):
        if stored.dtype.itemsize < 2:
            fail(f"{path.name} of the base has {name} as {stored.dtype}: take its 16-bit weights")
        if not stored.isfinite().all():
            fail(f"{path.name} of the base has numbers in {name} that are not finite: get it again")
        yield name, stored, merge_tensor(name, stored, *changes)


def rounded_away(stored, weight, rounded):
    """How many numbers of `weight` its rounded copy does not hold, by kind."""
    import torch

    limits = torch.finfo(rounded.dtype)
    smallest = limits.smallest_normal * limits.eps
    return {
        "weights": weight.numel(),
        "too_large": (~rounded.isfinite()).sum().item(),
        "too_small": ((weight.abs() < smallest) & (weight != 0)).sum().item(),
        "not_adapted_yet_changed": (rounded.to(stored.dtype) != stored).sum().item() if weight is stored else 0,
    }


def merge(base, changes, fresh, dtype):
    """Write the merged shards of `base` into `fresh`, rounded to `dtype`; returns what rounded_away counts in all."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    names, counts = set(), Counter()
    # the base's own names and shards: its index holds for the merged folder too
    for path in common.progress(llama.weight_files(base), "merging", unit="shard"):
        tensors, target = {}, fresh / path.name
        for name, stored, weight in merged_tensors(path, changes):
            tensors[name] = weight.to(getattr(torch, dtype))
            counts.update(rounded_away(stored, weight, tensors[name]))
        names |= tensors.keys()
        try:
            save_file(tensors, target, metadata={"format": "pt"})
        except SafetensorError as error:  # how a full disk reaches us
            fail(f"cannot write {target} ({first_line(error)}): make room, then give the same command again")
        target.chmod(0o644)  # a server may be another user
    if lost := changes[1].keys() - names:
        fail(f"the weight files of {base} name their tensors otherwise: no {min(lost)}; save it with transformers")
    return dict(counts)


def merge_in_its_type(args, model, base, changes, fresh):
    """Write the merged shards in the type that MERGE_DTYPE comes to; that, and what rounding to it took away."""
    import torch

    auto = args.merge_dtype == "auto"
    dtype = "float16" if auto else args.merge_dtype
    needed = model.num_parameters() * getattr(torch, dtype).itemsize + SMALL_FILES
    if (free := shutil.disk_usage(fresh).free) < needed:
        fail(f"merging needs {needed / 1e9:.2f} GB, {fresh.parent} has {free / 1e9:.2f} GB free: make room")
    counts = merge(base, changes, fresh, dtype)
    if auto and (counts["too_large"] or counts["too_small"] > TRACE * counts["weights"]):
        dtype = "bfloat16"
        counts = merge(base, changes, fresh, dtype)
    if counts["too_large"]:
        fail(f"{counts['too_large']} merged weights are beyond the range of {dtype}: give --merge-dtype bfloat16")
    return dtype, counts


def write_small_files(base, model, tokenizer, target, dtype, weights):
    """Tokenizer, index, config, generation config, Modelfile: with the chat template of training or without one.

    The last two are greedy and end at every end token, as tested.
    dtype, weights: how the weights are stored, and how many they are.
    """
    import torch

    source = llama.fetch(base)
    # beside a single file an index is a leftover of other weights
    whole = (target / "model.safetensors").exists()
    for path in (path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        shutil.copyfile(path, target / path.name)  # saved again, an older transformers could not read them
    if tokenizer.chat_template:
        (target / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    config = common.read_json(target / "tokenizer_config.json")
    if config.pop("chat_template", None):  # where older folders have it
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not whole:
        index = common.read_json(source / INDEX)
        index["metadata"] = {"total_size": weights * getattr(torch, dtype).itemsize}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = common.read_json(source / "config.json")
    config.pop("auto_map", None)  # names code, which is not copied
    config |= {"dtype": dtype, "torch_dtype": dtype}  # the second is how transformers 4 and servers call it
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = model.generation_config
    # samplers' settings beside do_sample=False make transformers warn, and servers sample
    generation.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    generation.update(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    ends = sorted(llama.end_tokens(model, tokenizer))
    generation.update(eos_token_id=ends)
    generation.save_pretrained(target)
    (target / "Modelfile").write_text(modelfile(tokenizer, ends), encoding="utf-8")


def modelfile(tokenizer, ends):
    """What `ollama create` needs to ask and to stop as in training; `ends`: ids of the end tokens."""
    text = prompt = "{{ .Prompt }}"
    if tokenizer.chat_template:
        message = {"role": "user", "content": prompt}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:  # Ollama puts it there as the tokenizer does
        text = text.removeprefix(tokenizer.bos_token)
    row = {"id": ["sample"], "prompt": ["What is it?"], "completion": [" It is a sample."]}
    same = tokenizer(text.replace(prompt, row["prompt"][0])).input_ids == llama.encode(tokenizer, row)["prompt_ids"][0]
    notes = [] if same else ["# Ollama reads other tokens than in training: a BOS or a blank in front."]
    stops = [f'PARAMETER stop "{token}"' for token in filter(None, tokenizer.convert_ids_to_tokens(ends))]
    greedy = ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]  # Ollama's own are 0.8 and 1.1
    return "\n".join([*notes, "FROM .", f'TEMPLATE """{text}"""', *stops, *greedy, ""])


def logits_of(model, ids):
    """Logits [answer tokens, vocabulary] before each completion token of all rows, and those tokens' ids."""
    import torch

    attention = llama.choose_attention("packed")
    model.set_attn_implementation(attention)
    step = ROWS_AT_A_TIME if attention == "packed" else 1
    found = []
    with torch.inference_mode():
        for start in common.progress(range(0, len(ids["prompt_ids"]), step), "checking"):
            part = slice(start, start + step)
            logits, golds = llama.read(model, ids["prompt_ids"][part], ids["completion_ids"][part])
            found.append((logits.float().cpu(), golds.cpu()))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def merged_by_peft(layer, stored):
    """What a merged weight must be, in float32, by its module in base + adapter; None: as `stored`, the base's."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    adapted = isinstance(layer, LoraLayer)
    # PEFT's own merge of 4-bit layers would quantise the sum again, so only its update is asked for
    weight = getattr(layer.get_base_layer() if adapted else layer, "weight", None)
    nf4 = getattr(weight, "quant_state", None)
    if not adapted and nf4 is None:
        return None
    weight = stored.float() if nf4 is None else dequantize_4bit(weight.data, nf4).float().cpu()
    return weight + layer.get_delta_weight("default").float().cpu() if adapted else weight


def wrong_tensors(model, base, fresh, dtype):
    """Sentences on the tensors in `fresh` that are not those of `model`, base and adapter under PEFT, in `dtype`."""
    import torch

    layers, dtype = dict(model.named_modules()), getattr(torch, dtype)
    for path in llama.weight_files(base):
        pairs = zip(tensors_in(path), tensors_in(fresh / path.name), strict=True)
        for (name, stored), (same_name, merged) in pairs:
            expected = merged_by_peft(layers.get(name.removesuffix(".weight")), stored)
            if (same_name, merged.dtype, merged.shape) != (name, dtype, stored.shape):
                yield f"{same_name} has another dtype, shape or name than {name} of the base"
            elif expected is None:
                if not torch.equal(merged.view(torch.uint8), stored.to(dtype).view(torch.uint8)):
                    yield f"{name} differs from the base, and should not"
            else:
                limits, off = torch.finfo(merged.dtype), (merged.float() - expected).abs()
                # a step of rounding is fine, and 1e-6 of the largest value: float32 sums depend on their order
                slack = 1e-6 * expected.abs().max() + limits.smallest_normal * limits.eps
                if not (off <= limits.eps * expected.abs() + slack).all():  # NaN: no
                    yield f"{name} differs from PEFT's merge, by up to {off.max().item():.3g}"


def perplexity(logits, golds):
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, golds).exp().item()


def compare(tuned, merged, golds):
    """How far the merged model's logits [tokens, vocabulary] are from base and adapter's, and its perplexity."""
    apart = (tuned - merged).abs()
    return {
        "merged_perplexity": perplexity(merged, golds),
        "largest_logit_difference": apart.max().item(),
        "mean_logit_difference": apart.mean().item(),
        "relative_difference": (apart.mean() / tuned.std()).item(),
        "equal_greedy_tokens": (tuned.argmax(-1) == merged.argmax(-1)).float().mean().item(),
    }


def roomy_device(base):
    """The device that has room for the model in float32, or None; beside a GPU, a CPU would take half an hour."""
    import psutil
    import torch

    needed = 2 * sum(path.stat().st_size for path in llama.weight_files(base))  # of 16-bit files
    if torch.cuda.is_available():  # activations besides
        return "cuda:0" if 1.2 * needed < torch.cuda.mem_get_info()[0] else None
    return "cpu" if needed < psutil.virtual_memory().available else None


def load_merged(folder, offload, **places):
    """The merged model as a user loads it; layers that have no room go to the disk, into the folder `offload`."""
    from transformers import AutoModelForCausalLM

    places = {"dtype": llama.compute_dtype(), "device_map": "auto", "offload_folder": offload} | places
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **places)
    if info["missing_keys"]:  # transformers only warns, and draws them at random
        raise ValueError(f"no {min(info['missing_keys'])}")
    return model


def put_weights(model, base, changes, dtype):
    """Give the loaded merged model the merged weights of `base`, rounded to `dtype`."""
    import torch

    parameters = dict(model.named_parameters())
    for path in llama.weight_files(base):
        for name, _, weight in merged_tensors(path, changes):
            if name in parameters:  # a tied head has none of its own
                parameters[name].data.copy_(weight.to(getattr(torch, dtype)))


@contextlib.contextmanager
def activations_seen(model):
    """A list that gets the largest number that went into a layer of the model, or came out."""
    import torch

    def look(module, inputs, output):
        for tensor in (*inputs, output):
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                largest[0] = max(largest[0], tensor.abs().max().item())

    largest = [0.0]
    hooks = [module.register_forward_hook(look) for module in model.modules() if not [*module.children()]]
    yield largest
    for hook in hooks:
        hook.remove()


def linear_weights(model):
    """The weights that llama.load_model would quantise."""
    import torch

    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {f"{name}.weight" for name in layers if name != "lm_head"}


def compare_folder(fresh, dtype, base, into, changes, ids, tuned, golds, device):
    """The problems of the merged folder, {what is compared: figures} beside base + adapter, its largest activation.

    dtype: as stored. device: where it is compared in float32, with each type's weights in turn; None: in 16 bit.
    """
    lora, scales, nf4 = changes
    places = {} if device is None else {"dtype": "float32", "device_map": {"": device}}
    with tempfile.TemporaryDirectory() as offload:
        model = load_merged(fresh, offload, **places)
        with activations_seen(model) as largest:
            merged, _ = logits_of(model, ids)
        comparison = {dtype: compare(tuned, merged, golds)}
        if device is not None:
            for other in (other for other in DTYPES if other != dtype):
                put_weights(model, base, changes, other)
                comparison[other] = compare(tuned, logits_of(model, ids)[0], golds)
            put_weights(model, base, (lora, scales, set() if nf4 else linear_weights(model)), dtype)
            other = {"16bit": "4bit", "4bit": "16bit"}[into]
            comparison[f"into {other}"] = compare(tuned, logits_of(model, ids)[0], golds)
    strictly = device is not None
    limit = MAX_RELATIVE_DIFFERENCE if strictly else MAX_RELATIVE_DIFFERENCE_16BIT
    off, problems = comparison["float32" if strictly else dtype]["relative_difference"], []
    if not off <= limit:  # NaN is beyond it
        problems.append(
            f"{'in float32 ' * strictly}the logits are {off:.3g} of their deviation from base and adapter's"
        )
    elif not merged.isfinite().all():
        problems.append(f"in {dtype} it has logits that are no numbers")
    return problems, comparison, largest[0]


def merge_and_check(args, base, run, fresh):
    """Merge into the folder `fresh` and compare it with base and adapter. Returns what merge.json says of that."""
    folder = Path(args.output_dir) / "adapter"
    into = "16bit" if args.merge_base == "auto" else args.merge_base
    tokenizer = llama.tokenizer_of(base, folder)
    rows, ids = check_rows(args, tokenizer)
    begun, device = time.time(), roomy_device(base)
    options = {} if device is None else {"device_map": {"": device}}
    if device is None:
        say("no room for the model in float32: its logits are compared in 16 bit, which tells less")
    # in 4 bits the rest is float32 all the same: else NF4 would be made of weights that were rounded first
    options["dtype"] = llama.compute_dtype() if device is None and into == "16bit" else "float32"
    model = llama.load_model(base, into == "4bit", **options)
    model = llama.load_adapter(model, folder).get_base_model()
    tuned, golds = logits_of(model, ids)
    ready, changes = time.time(), changes_of(model, folder)
    dtype, counts = merge_in_its_type(args, model, base, changes, fresh)
    write_small_files(base, model, tokenizer, fresh, dtype, counts["weights"])
    merged_at = time.time()
    problems, comparison, largest = [], {}, None
    try:
        if llama.encode(llama.load_tokenizer(str(fresh)), rows) != ids:
            problems.append("the base's tokenizer makes other tokens than the adapter's")
        problems += wrong_tensors(model, base, fresh, dtype)
        model = None  # one in memory at a time; torch's modules and PEFT's refer to one another
        gc.collect()
        more, comparison, largest = compare_folder(fresh, dtype, base, into, changes, ids, tuned, golds, device)
        problems += more
    except Exception as error:  # whatever the libraries raise, it is no whole folder
        problems.append(f"it cannot be loaded ({first_line(error)})")
    return {
        "verified": not problems,
        "problems": problems,
        "merge_base": into,
        # an adapter from elsewhere says nothing: most are QLoRA's
        "trained_on": "4bit" if run.get("settings", {}).get("load_in_4bit", True) else "16bit",
        "dtype": dtype,
        "rounding": counts,
        "chat_template": bool(tokenizer.chat_template),
        "check_rows": len(ids["prompt_ids"]),
        "answer_tokens": len(golds),
        "adapter_perplexity": perplexity(tuned, golds),
        "comparison": comparison,
        "largest_activation": largest,
        "seconds_merging": merged_at - ready,
        "seconds_verifying": time.time() - merged_at + ready - begun,
    }


def show(report):
    """The comparison as a table of at most 80 columns, and what it took."""
    say(f"{'':<28}{'perplexity':>11}{'logits off':>12}{'at most':>9}{'same tokens':>13}")
    say(f"{report['merge_base'] + ' base + adapter':<28}{report['adapter_perplexity']:>11.4g}")
    line = "{:<28}{merged_perplexity:>11.4g}{mean_logit_difference:>12.3g}"
    line += "{largest_logit_difference:>9.3g}{equal_greedy_tokens:>13.1%}"
    for name in (*DTYPES, "into 16bit", "into 4bit"):
        if name in report["comparison"]:
            more = f", {report['dtype']}" if name not in DTYPES else " (written)" if name == report["dtype"] else ""
            say(line.format(f"merged {name}{more}", **report["comparison"][name]))
    took = "{check_rows} validation rows, merged in {seconds_merging:.1f} s, checked in {seconds_verifying:.1f} s"
    say(f"{took.format(**report)}, peak memory {llama.peak_memory():.2f} GB")
    if report["dtype"] == "float16" and (largest := report["largest_activation"] or 0) > FLOAT16_MAX:
        reason = f"activations reach {largest:,.0f}, beyond float16's range"
        say(f"warning: {reason}: have servers compute in bfloat16 or float32, or give --merge-dtype bfloat16")


def model_card(args, base, run, report):
    """README.md of the merged folder: model_card.md.jinja, filled in with what is of this adapter."""
    import jinja2

    output, hub_id = Path(args.output_dir), None if Path(base).is_dir() else base
    built = common.read_json(output / "dataset_report.json")
    rows = built.get("splits", {}).get("train", {}).get("sha256", "")[:32]
    metas = re.search(r"^meta-llama/.*llama-?(2|3(\.\d)?)(?!\d)", base.lower())
    template = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    options = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": jinja2.ChainableUndefined}
    return jinja2.Template(template, **options).render(
        hub_id=hub_id,
        licence=f"llama{metas[1]}" if metas else "other",
        report=report,
        run=run,
        built=built if rows == run.get("run", {}).get("train rows") else {},
        evaluation=common.read_json(output / "evaluation.json"),
        here="." if args.push_to_hub == "none" else args.push_to_hub,
    )


def without_nan(value):
    """What JSON can say of it: None for the figures of a type that does not hold the weights."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finish(args, base, run, report, fresh):
    """Write model card and merge.json, the latter last: with it the folder is whole. Neither has a path of ours."""
    report |= {
        "base_model": Path(base).name if Path(base).is_dir() else base,
        "base_weights": run["weights"],
        "adapter_sha256": run["adapter_sha256"],
        "dataset": {name: value for name, value in run.get("run", {}).items() if name.endswith(" rows")},
        "versions": common.versions("torch", "transformers", "peft", "bitsandbytes", "safetensors"),
        "git_commit": common.git_commit(),
    }
    (fresh / "README.md").write_text(model_card(args, base, run, report), encoding="utf-8")
    report["sha256"] = {path.name: common.sha256(path) for path in sorted(fresh.iterdir())}
    content = without_nan(report)
    (fresh / "merge.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def push(args, folder):
    """Upload the verified folder; the token is the one of `hf auth login`, or HF_TOKEN."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(args.push_to_hub, private=args.private, exist_ok=True)
        if args.private and not api.model_info(args.push_to_hub).private:
            raise ValueError("it is there already, and public: give --no-private if that is meant")
        api.upload_folder(repo_id=args.push_to_hub, folder_path=folder, commit_message="Merged model")
        say(f"pushed to {url}")
    except Exception as error:  # no login, no network, no right to
        fail(
            f"cannot push to {args.push_to_hub} ({first_line(error)}): see to that, or: hf auth login; {folder} stays"
        )


@common.script
def main(argv=None):
    args = parse_args(argv)
    folder, target = Path(args.output_dir) / "adapter", Path(args.output_dir) / "merged"
    base = llama.find_model(llama.read_adapter(folder))
    with common.only_run_in(args.output_dir):
        llama.quiet()
        refuse_more_than_lora(folder)
        run = read_run(folder, base)
        say(f"merging {folder} into {base}")
        with common.whole_folder(target) as fresh:
            report = merge_and_check(args, base, run, fresh)
            finish(args, base, run, report, fresh)
            show(report)
            if not report["verified"]:
                place = fresh.with_name("merged.unverified")  # on the same disk, where merged/ is a link
                shutil.rmtree(place, ignore_errors=True)
                fresh.rename(place)
                problems = f"the merge failed its check ({'; '.join(report['problems'][:3])})"
                print(f"error: {problems}: left in {place}, merged/ was not touched", file=sys.stderr)
                raise SystemExit(1)
        say(f"wrote {target} ({report['merge_base']} base, {report['dtype']})")
        if args.push_to_hub != "none":
            push(args, target)


if __name__ == "__main__":
    main()
