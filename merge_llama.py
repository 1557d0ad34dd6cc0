"""Merge the adapter of train_llama.py into its base, and prove it: a plain transformers folder, ready to serve.

Base and adapter answer validation rows; the base is merged shard by shard, in the memory of its largest; then every
tensor is compared with PEFT's merge, and the folder, loaded as a user loads it, with base and adapter (verify.py). In
float32 the two have to agree; what rounding to the stored type costs is reported, and refuses nothing. The check needs
4 bytes a parameter of the GPU, or of RAM without one; with less it compares in 16 bit. Only what passes takes the
place of OUTPUT_DIR/merged; what does not is left beside it, marked.

Reads:  OUTPUT_DIR/adapter/, its base model, the validation rows of OUTPUT_DIR/dataset/; dataset_report.json and
        evaluation.json for the model card, where they are of this adapter.
Writes: OUTPUT_DIR/merged/ (safetensors, tokenizer, generation config, model card, Modelfile, merge.json), or
        merged.unverified/.

    python merge_llama.py
    python merge_llama.py --merge-base 4bit --check-rows 32 --output-dir outputs/demo
"""

import gc
import json
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from pipeline import machine, models
from pipeline.files import load_rows, only_run_in, read_json, refuse_another, rows_of, sha256, whole_folder
from pipeline.merging import merged_folder
from pipeline.script import fail, first_line, git_commit, out_of_memory, progress, say, script, versions
from pipeline.settings import parse_settings
from pipeline.tokens import encode, load_tokenizer, tokenizer_of

# Settings: edit here, or override for one run on the command line.
MODEL = "auto"  # a folder or hub id with the same weights; auto: the base that the adapter names
MERGE_BASE = "auto"  # 16bit: weights as stored; 4bit: those quantised to NF4 and back; auto: 16bit
MERGE_DTYPE = "auto"  # float16, bfloat16, float32; auto: float16 where it holds every weight, else bfloat16
CHECK_ROWS = 4  # validation rows, in equal shares of the tasks, on which the models are compared
OUTPUT_DIR = "outputs"  # holds adapter/ and dataset/, gets merged/

# Fixed
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a weight
TRACE = 1e-4  # share of the weights that may be smaller than float16's smallest number, 6e-8
SMALL_FILES = 2**26  # bytes of room for all that is not weights
QUANTISED = "_proj.weight"  # how the names of the weights end that models.load_model quantises
# What adapter_config.json may have besides PEFT's defaults: what a later PEFT invents is refused, too.
FOLLOWED = (
    *("base_model_name_or_path", "peft_version", "task_type", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
)


def parse_args(argv=None):
    choices = {"MERGE_BASE": ("auto", "16bit", "4bit"), "MERGE_DTYPE": ("auto", *DTYPES), "CHECK_ROWS": (int,)}
    return parse_settings(sys.modules[__name__], argv, choices)


def refuse_more_than_lora(folder):
    """Exit 2, naming it, on anything in adapter_config.json that is more than LoRA on linear layers."""
    from peft import LoraConfig

    config, plain = read_json(folder / "adapter_config.json"), LoraConfig().to_dict()
    # "init_lora_weights" too: PiSSA, OLoRA and so on start from other base weights
    strange = {name: value for name, value in config.items() if value and value != plain.get(name)}
    if strange.get("init_lora_weights") == "gaussian":  # another start, the base's own weights
        del strange["init_lora_weights"]
    if names := ", ".join(f"{name} {strange[name]}" for name in sorted(strange.keys() - set(FOLLOWED))):
        fail(f"{folder} has {names}, which this script does not merge: use PEFT's merge_and_unload")


def read_run(folder, base):
    """run.json of the adapter with "adapter_sha256" and the base's "weights"; exits 2 where it names others."""
    run = models.read_run(folder)
    found = {"adapter_sha256": sha256(folder / "adapter_model.safetensors")}
    found["weights"] = models.weights_identity(base)
    named = {"adapter_sha256": run.get("adapter_sha256"), "weights": run["run"].get("weights")}
    named = {name: value or found[name] for name, value in named.items()}  # an adapter from elsewhere names nothing
    remedy = f"put back what {folder}/run.json names, give --model where it is now, or run train_llama.py again"
    refuse_another(f"the adapter in {folder}, or its base {base},", named, found, remedy)
    return run | found


def check_rows(args, tokenizer):
    """CHECK_ROWS validation rows, the first of each task in turn, and their ids as encode gives them."""
    from datasets import interleave_datasets

    rows = load_rows(args.output_dir, "validation")
    tasks = [rows_of(rows, task) for task in sorted(rows.unique("task"))]
    rows = interleave_datasets(tasks, stopping_strategy="all_exhausted_without_replacement")
    try:
        return rows[: args.check_rows], encode(tokenizer, rows[: args.check_rows])
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


def changes_of(model, folder, into):
    """(tensors of the adapter, {weight: its scale}, whether the base's are those of 4 bits), for merge_tensor."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors"), scales_of(model, folder), into == "4bit"


def merge_tensor(name, stored, lora, scales, in_4bit):
    """`stored`, a base weight [out, in], with scale x B A added, in float32; as it is where nothing changes it."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    quantised = in_4bit and name.endswith(QUANTISED)
    if name not in scales and not quantised:
        return stored
    weight = stored.float()
    if quantised:  # as models.load_model does, and back
        weight = weight.to("cuda" if torch.cuda.is_available() else "cpu")
        weight = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).float().cpu()
    if name in scales:
        prefix = f"base_model.model.{name.removesuffix('weight')}lora_"
        a, b = lora[f"{prefix}A.weight"].float(), lora[f"{prefix}B.weight"].float()
        weight = weight.addmm(b, a, alpha=scales[name])
    if not finite(weight):
        fail(f"merged, {name} is not finite: run train_llama.py again, with a lower learning rate")
    return weight


def finite(tensor):
    """Whether all of its numbers are finite; isfinite().all() takes a CPU many times as long."""
    return all(end.isfinite() for end in tensor.aminmax())


def merged_tensors(path, changes):
    """(name, the base's tensor in `path`, what the adapter makes of it) in turn; see merge_tensor."""
    for name, stored in models.tensors_in(path):
        if name != "model.embed_tokens.weight" and not finite(stored):  # there it may be rows of unused tokens
            fail(f"{path.name} of the base has numbers in {name} that are not finite: get it again")
        yield name, stored, merge_tensor(name, stored, *changes)


def rounded_away(stored, weight, rounded):
    """How many numbers of `weight` its rounded copy does not hold, by kind."""
    import torch

    count = torch.count_nonzero  # the sum of a bool tensor takes a CPU twenty times as long
    limits = torch.finfo(rounded.dtype)
    smallest = limits.smallest_normal * limits.eps
    beyond = count(~rounded.isfinite())
    not_finite = count(~weight.isfinite()) if beyond else 0
    changed = (rounded.to(stored.dtype) != stored) & (stored == stored) if weight is stored else stored[:0]
    counts = {
        "weights": weight.numel(),
        "not_finite": not_finite,
        "too_large": beyond - not_finite,
        "too_small": count(weight.abs() < smallest) - weight.numel() + count(weight),
        "not_adapted_yet_changed": count(changed),
    }
    return {name: int(number) for name, number in counts.items()}


def merge(base, changes, fresh, dtype):
    """Write the merged shards of `base` into `fresh`, rounded to `dtype`; returns what rounded_away counts in all."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    counts = Counter()
    # the base's own names and shards: its index holds for the merged folder too
    for path in progress(models.weight_files(base), "merging", unit="shard"):
        tensors, target = {}, fresh / path.name
        for name, stored, weight in merged_tensors(path, changes):
            tensors[name] = weight.to(getattr(torch, dtype))
            counts.update(rounded_away(stored, weight, tensors[name]))
        try:
            save_file(tensors, target, metadata={"format": "pt"})
        except SafetensorError as error:  # how a full disk reaches us
            fail(f"cannot write {target} ({first_line(error)}): make room, then give the same command again")
        with suppress(OSError):  # some mounts have no permissions
            target.chmod(0o644)  # a server may be another user
    return dict(counts)


def merge_in_its_type(args, model, base, changes, fresh):
    """Write the merged shards in the type that MERGE_DTYPE comes to; that, and what rounding to it took away."""
    auto = args.merge_dtype == "auto"
    dtype = "float16" if auto else args.merge_dtype
    needed = model.num_parameters() * DTYPES[dtype] + SMALL_FILES
    if (free := shutil.disk_usage(fresh).free) < needed:
        fail(f"merging needs {needed / 1e9:.2f} GB, {fresh.parent} has {free / 1e9:.2f} GB free: make room")
    counts = merge(base, changes, fresh, dtype)
    if auto and (counts["too_large"] or counts["too_small"] > TRACE * counts["weights"]):
        dtype = "bfloat16"
        counts = merge(base, changes, fresh, dtype)
    if counts["too_large"]:
        fail(f"{counts['too_large']} merged weights are beyond the range of {dtype}: give --merge-dtype bfloat16")
    if counts["not_finite"]:
        say(f"warning: {counts['not_finite']} numbers in the embeddings of the base are not finite: they stay so")
    return dtype, counts


def merged_weights(base, changes):
    for path in models.weight_files(base):
        for name, _, weight in merged_tensors(path, changes):
            yield name, weight


def merge_and_check(args, base, run, fresh):
    """Merge into the folder `fresh` and compare it with base and adapter. Returns what merge.json says of that."""
    from pipeline.merging import verify  # and torch, transformers, PEFT

    folder = Path(args.output_dir) / "adapter"
    into = "16bit" if args.merge_base == "auto" else args.merge_base
    tokenizer = tokenizer_of(base, folder, run["settings"].get("chat_template", "auto"))
    rows, ids = check_rows(args, tokenizer)
    begun, place = time.time(), verify.roomy_place(base)
    exact = place[1] == "float32"
    if not exact:
        say("no room for the model in float32: its logits are compared in 16 bit, which tells less")
    model = verify.load_tuned(base, folder, into, *place)
    tuned, golds = verify.logits_of(model, ids)
    ready, changes = time.time(), changes_of(model, folder, into)
    dtype, counts = merge_in_its_type(args, model, base, changes, fresh)
    merged_folder.write_small_files(base, model, tokenizer, fresh, dtype, counts["weights"] * DTYPES[dtype])
    merged_at = time.time()
    problems, comparison = [], {}
    try:
        if encode(load_tokenizer(str(fresh)), rows) != ids:
            problems.append("the base's tokenizer makes other tokens than the adapter's")
        problems += verify.wrong_tensors(model, base, fresh, dtype)
        model = None  # one in memory at a time; torch's modules and PEFT's refer to one another
        gc.collect()
        weights = merged_weights(base, changes) if exact and dtype != "float32" else None
        comparison = verify.compare_folder(fresh, dtype, weights, ids, tuned, golds, place)
        problems += verify.problems_of(comparison, dtype, exact)
    except Exception as error:  # whatever the libraries raise, it is no whole folder
        if out_of_memory(error):
            raise
        problems.append(f"it cannot be loaded ({first_line(error)})")
    return {
        "verified": not problems,
        "problems": problems,
        "merge_base": into,
        # an adapter from elsewhere says nothing: most are QLoRA's
        "trained_on": "4bit" if run["settings"].get("load_in_4bit", True) else "16bit",
        "dtype": dtype,
        "rounding": counts,
        "chat_template": bool(tokenizer.chat_template),
        "check_rows": len(ids["prompt_ids"]),
        "answer_tokens": len(golds),
        "adapter_perplexity": verify.perplexity(tuned, golds),
        "comparison": comparison,
        "seconds_merging": merged_at - ready,
        "seconds_verifying": time.time() - merged_at + ready - begun,
    }


def show(report):
    """The comparison as a table of at most 80 columns, and what it took."""
    say(f"{'':<28}{'perplexity':>11}{'logits off':>12}{'at most':>9}{'same tokens':>13}")
    say(f"{report['merge_base'] + ' base + adapter':<28}{report['adapter_perplexity']:>11.4g}")
    line = "{:<28}{merged_perplexity:>11.4g}{mean_logit_difference:>12.3g}"
    line += "{largest_logit_difference:>9.3g}{equal_greedy_tokens:>13.1%}"
    for name, figures in report["comparison"].items():
        written = " (written)" if name == report["dtype"] else ""
        say(line.format(f"merged {name}{written}", **figures))
    took = "{check_rows} validation rows, merged in {seconds_merging:.1f} s, checked in {seconds_verifying:.1f} s"
    say(f"{took.format(**report)}, peak memory {machine.peak_memory():.2f} GB")


def finish(args, base, run, report, fresh):
    """Write model card and merge.json, the latter last: with it the folder is whole. Neither has a path of ours."""
    report |= {
        "base_model": Path(base).name if Path(base).is_dir() else base,
        "base_weights": run["weights"],
        "adapter_sha256": run["adapter_sha256"],
        "dataset": {name: value for name, value in run["run"].items() if name.endswith(" rows")},
        "versions": versions("torch", "transformers", "peft", "bitsandbytes", "safetensors"),
        "git_commit": git_commit(),
    }
    (fresh / "README.md").write_text(merged_folder.model_card(args.output_dir, base, run, report), encoding="utf-8")
    report["sha256"] = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
    (fresh / "merge.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@script
def main(argv=None):
    args = parse_args(argv)
    folder, target = Path(args.output_dir) / "adapter", Path(args.output_dir) / "merged"
    named = models.read_adapter(folder)
    base = models.find_model(named if args.model == "auto" else args.model)
    with only_run_in(args.output_dir):
        models.quiet()
        refuse_more_than_lora(folder)
        run = read_run(folder, base)
        say(f"merging {folder} into {base}")
        with whole_folder(target) as fresh:
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
        if report["trained_on"] != report["merge_base"]:
            told = f"it is another model than the adapter on its {report['trained_on']} base"
            where = "" if args.output_dir == OUTPUT_DIR else f" --output-dir {args.output_dir}"
            say(f"{told}; for its own scores: python test_llama.py --model {target} --name merged{where}")


if __name__ == "__main__":
    main()
