"""Merge the adapter of train_llama.py into its base, and prove it: a plain transformers folder, ready to serve.

Base and adapter answer validation rows; the base is merged shard by shard, in the memory of its largest; then every
tensor is compared with PEFT's merge, and the folder, loaded as a user loads it, with base and adapter. The check needs
memory for both: 4 bytes a parameter without a GPU, 2 on one, 0.6 to 1.2 where the base is in 4 bits. Only what passes
takes the place of OUTPUT_DIR/merged; what does not is left beside it, marked.

Reads:  OUTPUT_DIR/adapter/, its base model, the validation rows of OUTPUT_DIR/dataset/; dataset_report.json and
        evaluation.json for the model card, where they are of this adapter.
Writes: OUTPUT_DIR/merged/ (safetensors, tokenizer, generation config, model card, Modelfile, merge.json), or
        merged.unverified/.

    python merge_llama.py
    python merge_llama.py --merge-base 4bit --check-rows 32 --output-dir outputs/demo
"""

import gc
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import common
import llama
from common import fail, first_line, say

# Settings: edit here, or override for one run on the command line.
MERGE_BASE = "auto"  # 16bit: weights as stored; 4bit: quantised to NF4 and back; auto: what the adapter was trained on
CHECK_ROWS = 16  # validation rows, in equal shares of the tasks, on which the models are compared
PUSH_TO_HUB = "none"  # OWNER/NAME of a hub repository that gets the verified folder, or none
PRIVATE = True  # whether that repository is
OUTPUT_DIR = "outputs"  # holds adapter/ and dataset/, gets merged/

# Fixed
# Mean logit difference over the logits' standard deviation. Rounding to bfloat16 alone costs 0.025 on a real model and
# is no fault: the tensors are compared one by one. This finds a folder that is another model altogether.
MAX_RELATIVE_DIFFERENCE = 0.1
SMALL_FILES = 2**26  # bytes of room for all that is not weights
ROWS_AT_A_TIME = 8  # in one pass of the check: layers that lie on the disk are read once for all of them
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json")
# What adapter_config.json may have besides PEFT's defaults: what a later PEFT invents is refused, too.
FOLLOWED = (
    *("base_model_name_or_path", "peft_version", "task_type", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
)


def parse_args(argv=None):
    args = common.parse_settings(sys.modules[__name__], argv, choices={"MERGE_BASE": ("auto", "16bit", "4bit")})
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
    """Ids of CHECK_ROWS validation rows, the first of each task in turn, as llama.encode gives them."""
    from datasets import interleave_datasets

    rows = llama.load_rows(args.output_dir, "validation")
    tasks = [llama.rows_of(rows, task) for task in sorted(rows.unique("task"))]
    rows = interleave_datasets(tasks, stopping_strategy="all_exhausted_without_replacement")
    try:
        return llama.encode(tokenizer, rows[: args.check_rows])
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


def merge_tensor(name, stored, lora, scales, nf4):
    """`stored`, a base weight [out, in], with scale x B A added in float32 and rounded once, to its own dtype."""
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
    weight = weight.to(stored.dtype)
    if not weight.isfinite().all():
        fail(f"merged, {name} is not finite in {stored.dtype}: run train_llama.py again, with a lower learning rate")
    return weight


def merge(model, base, folder, fresh):
    """Write the merged shards of `base` into `fresh`; `model` says what the adapter changes. Returns the dtypes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    files = llama.weight_files(base)
    needed, free = sum(path.stat().st_size for path in files) + SMALL_FILES, shutil.disk_usage(fresh).free
    if free < needed:
        fail(f"merging needs {needed / 1e9:.2f} GB, {fresh.parent} has {free / 1e9:.2f} GB free: make room")
    scales = scales_of(model, folder)
    held = {name for name, module in model.named_modules() if hasattr(module, "quant_state")}
    nf4 = {name.removesuffix(".base_layer") + ".weight" for name in held}
    lora, dtypes = load_file(folder / "adapter_model.safetensors"), {}
    # the base's own names and shards: its index holds for the merged folder too
    for path in tqdm(files, desc="merging", unit="shard", disable=None, leave=False):
        tensors, target = {}, fresh / path.name
        for name, stored in tensors_in(path):
            if stored.dtype.itemsize < 2:
                fail(f"{path.name} of the base has {name} as {stored.dtype}: take its 16-bit weights")
            tensors[name] = merge_tensor(name, stored, lora, scales, nf4)
            dtypes[name] = str(stored.dtype).removeprefix("torch.")
        try:
            save_file(tensors, target, metadata={"format": "pt"})
        except SafetensorError as error:  # how a full disk reaches us
            fail(f"cannot write {target} ({first_line(error)}): make room, then give the same command again")
        target.chmod(0o644)  # a server may be another user
    if lost := scales.keys() - dtypes.keys():
        fail(f"the weight files of {base} name their tensors otherwise: no {min(lost)}; save it with transformers")
    return sorted(set(dtypes.values()))


def write_small_files(base, model, tokenizer, target):
    """Tokenizer, index, config, generation config, Modelfile: with the chat template of training or without one.

    The last two are greedy and end at every end token, as tested.
    """
    source = llama.fetch(base)
    # beside a single file an index is a leftover of other weights
    whole = (target / "model.safetensors").exists()
    patterns = TOKENIZER_FILES if whole else (*TOKENIZER_FILES, "model.safetensors.index.json")
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        shutil.copyfile(path, target / path.name)  # saved again, an older transformers could not read them
    if tokenizer.chat_template:
        (target / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    config = common.read_json(target / "tokenizer_config.json")
    if config.pop("chat_template", None):  # where older folders have it
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    config = common.read_json(source / "config.json")
    config.pop("auto_map", None)  # names code, which is not copied
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
    from tqdm import tqdm

    attention = llama.choose_attention("packed")
    model.set_attn_implementation(attention)
    step = ROWS_AT_A_TIME if attention == "packed" else 1
    found = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(ids["prompt_ids"]), step), desc="checking", disable=None, leave=False):
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


def wrong_tensors(model, base, fresh):
    """Sentences on the tensors in `fresh` that are not those of `model`, base and adapter under PEFT."""
    import torch

    layers = dict(model.named_modules())
    for path in llama.weight_files(base):
        pairs = zip(tensors_in(path), tensors_in(fresh / path.name), strict=True)
        for (name, stored), (same_name, merged) in pairs:
            expected = merged_by_peft(layers.get(name.removesuffix(".weight")), stored)
            if (same_name, merged.dtype, merged.shape) != (name, stored.dtype, stored.shape):
                yield f"{same_name} has another dtype, shape or name than {name} of the base"
            elif expected is None:
                if not torch.equal(merged.view(torch.uint8), stored.view(torch.uint8)):
                    yield f"{name} differs from the base, and should not"
            else:
                limits, off = torch.finfo(merged.dtype), (merged.float() - expected).abs()
                # a step of rounding is fine, and 1e-6 of the largest value: float32 sums depend on their order
                slack = 1e-6 * expected.abs().max() + limits.smallest_normal * limits.eps
                if not (off <= limits.eps * expected.abs() + slack).all():  # NaN: no
                    yield f"{name} differs from PEFT's merge, by up to {off.max().item():.3g}"


def compare(tuned, merged, golds):
    """How far the merged model's logits [tokens, vocabulary] are from base and adapter's, and both perplexities."""
    from torch.nn.functional import cross_entropy

    apart = (tuned - merged).abs()
    return {
        "adapter_perplexity": cross_entropy(tuned, golds).exp().item(),
        "merged_perplexity": cross_entropy(merged, golds).exp().item(),
        "largest_logit_difference": apart.max().item(),
        "mean_logit_difference": apart.mean().item(),
        "relative_difference": (apart.mean() / tuned.std()).item(),
        "equal_greedy_tokens": (tuned.argmax(-1) == merged.argmax(-1)).float().mean().item(),
    }


def read_merged(folder, ids):
    """Logits of the merged model, loaded as a user loads it; layers that have no room stay on the disk."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as offload:
        places = {"dtype": llama.compute_dtype(), "device_map": "auto", "offload_folder": offload}
        return logits_of(AutoModelForCausalLM.from_pretrained(folder, **places), ids)[0]


def merge_and_check(args, base, run, fresh):
    """Merge into the folder `fresh` and compare it with base and adapter. Returns what merge.json says of that."""
    folder = Path(args.output_dir) / "adapter"
    # an adapter from elsewhere says nothing: most are QLoRA's
    trained = "4bit" if run.get("settings", {}).get("load_in_4bit", True) else "16bit"
    into = trained if args.merge_base == "auto" else args.merge_base
    tokenizer = llama.tokenizer_of(base, folder)
    ids = check_rows(args, tokenizer)
    begun, logits, model = time.time(), {}, None
    for kind in dict.fromkeys((trained, into)):
        model = None  # one in memory at a time; torch's modules and PEFT's refer to one another
        gc.collect()
        # in 4 bits the rest is float32: else NF4 would be made of weights that were rounded first
        dtype = "float32" if kind == "4bit" else llama.compute_dtype()
        model = llama.load_model(base, kind == "4bit", dtype=dtype)
        model = llama.load_adapter(model, folder).get_base_model()
        logits[kind], golds = logits_of(model, ids)
    ready = time.time()
    dtypes = merge(model, base, folder, fresh)
    write_small_files(base, model, tokenizer, fresh)
    merged_at = time.time()
    problems, comparison = [], {}
    try:
        problems += wrong_tensors(model, base, fresh)
        model = None
        gc.collect()
        merged = read_merged(fresh, ids)
        comparison = {kind: compare(tuned, merged, golds) for kind, tuned in logits.items()}
        off = comparison[into]["relative_difference"]
        if not off <= MAX_RELATIVE_DIFFERENCE:  # NaN is beyond it
            problems.append(f"the logits are {off:.3g} of their deviation from base and adapter's")
    except Exception as error:  # whatever the libraries raise, it is no whole folder
        problems.append(f"it cannot be loaded ({first_line(error)})")
    return {
        "verified": not problems,
        "problems": problems,
        "merge_base": into,
        "trained_on": trained,
        "dtypes": dtypes,
        "chat_template": bool(tokenizer.chat_template),
        "check_rows": len(ids["prompt_ids"]),
        "answer_tokens": len(golds),
        "comparison": comparison,
        "seconds_merging": merged_at - ready,
        "seconds_verifying": time.time() - merged_at + ready - begun,
    }


def show(report):
    """The comparison as a table of at most 80 columns, and what it took."""
    say(f"{'base + adapter':<18}{'perplexity':>11}{'merged':>9}{'logits off':>12}{'at most':>9}{'same tokens':>13}")
    line = "{:<18}{adapter_perplexity:>11.4g}{merged_perplexity:>9.4g}{mean_logit_difference:>12.3g}"
    line += "{largest_logit_difference:>9.3g}{equal_greedy_tokens:>13.1%}"
    for kind, figures in report["comparison"].items():
        say(line.format(kind + " (as trained)" * (kind == report["trained_on"]), **figures))
    took = "{check_rows} validation rows, merged in {seconds_merging:.1f} s, checked in {seconds_verifying:.1f} s"
    say(f"{took.format(**report)}, peak memory {llama.peak_memory():.2f} GB")


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
    (fresh / "merge.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


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
        say(f"wrote {target} ({report['merge_base']} base, {', '.join(report['dtypes'])})")
        if args.push_to_hub != "none":
            push(args, target)


if __name__ == "__main__":
    main()
