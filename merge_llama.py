"""Merge the adapter of train_llama.py into its base, as a plain transformers folder, and check that folder.

The weights are merged one file at a time, so the merge needs memory for the largest file only. Then every tensor is
compared with PEFT's merge. On validation rows, the outputs of the merged model are compared with those of the base
with its adapter: in float32 the two must agree; the cost of rounding to the stored type is reported, and is no reason
to fail. The check needs 4 bytes per parameter, on the GPU or, without one, in RAM; with less memory it compares in 16
bits. Only a merge that passes replaces OUTPUT_DIR/merged; one that fails is left in merged.unverified/, and its model
card says so. A merged/ with other files than a merge writes is not replaced: move them away first.

Reads:  OUTPUT_DIR/adapter/, its base model and the validation rows of OUTPUT_DIR/dataset/. For the model card also
        dataset_report.json and evaluation.json, if they belong to this adapter.
Writes: OUTPUT_DIR/merged/ (safetensors, tokenizer, generation config, model card, Modelfile, merge.json).

    python merge_llama.py
    python merge_llama.py --merge-base 4bit --check-rows 32 --output-dir outputs/demo
"""

import gc
import json
import shutil
import sys
import time
from pathlib import Path
from shlex import quote

from pipeline import machine, models
from pipeline.files import load_rows, only_run_in, read_json, refuse_another, rows_of, sha256, whole_folder
from pipeline.merging import merged_folder
from pipeline.script import command, fail, first_line, git_commit, out_of_memory, say, script, table, versions
from pipeline.settings import parse_settings
from pipeline.tokens import encode, load_tokenizer, tokenizer_of
from tasks import TASKS

# Settings: edit here, or override for one run on the command line.
MODEL = "auto"  # base model: a folder or hub id with the weights as in training; auto: the base that the adapter names
MERGE_BASE = "auto"  # weights to merge into: 16bit (as stored), 4bit (quantised to NF4, then unpacked); auto: 16bit
MERGE_DTYPE = "auto"  # type of merged weights: float16, bfloat16, float32; auto: float16 if they fit, else bfloat16
CHECK_ROWS = 4  # number of validation rows, equally from each task, on which merged and unmerged model are compared
OUTPUT_DIR = "outputs"  # folder that contains adapter/ and dataset/ and gets merged/

# Fixed
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a weight
TRACE = 1e-4  # share of the weights that may be smaller than float16's smallest number, 6e-8
SMALL_FILES = 2**26  # bytes of room for all that is not weights


def parse_args(argv=None):
    choices = {"MERGE_BASE": ("auto", "16bit", "4bit"), "MERGE_DTYPE": ("auto", *DTYPES), "CHECK_ROWS": (int,)}
    return parse_settings(sys.modules[__name__], argv, choices)


def read_run(folder, base):
    """run.json of the adapter with "adapter_sha256" and the base's "weights"; exits 2 where it names others."""
    run = models.read_run(folder)
    weights_file = folder / "adapter_model.safetensors"
    found = {"adapter_sha256": sha256(weights_file), "weights": models.weights_identity(base)}
    named = {"adapter_sha256": run.get("adapter_sha256"), "weights": run["run"].get("weights")}
    checked = {name: found[name] for name in named if named[name]}  # an adapter from elsewhere names nothing
    remedy = f"put back what {folder}/run.json names, give --model where it is now, or run train_llama.py again"
    refuse_another(f"the adapter in {folder}, or its base {base},", named, checked, remedy)
    return run | found


def check_rows(args, run, tokenizer):
    """CHECK_ROWS validation rows, the first of each task in turn that training kept, and their ids as encode gives."""
    from datasets import interleave_datasets

    validation = load_rows(args.output_dir, "validation")
    of_tasks = [rows_of(validation, task) for task in sorted(validation.unique("task"))]
    in_turn = interleave_datasets(of_tasks, stopping_strategy="all_exhausted_without_replacement")
    try:
        ids = encode(tokenizer, in_turn[:])
    except ValueError as error:
        fail(f"cannot compare on the validation rows: {first_line(error)}")
    limit = min(tokenizer.model_max_length, run["settings"].get("max_length", tokenizer.model_max_length))
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(*ids.values(), strict=True)]
    fitting = [place for place, length in enumerate(lengths) if length <= limit][: args.check_rows]
    if not fitting:
        fail(f"no validation row has at most {limit} tokens: build the data set with shorter ones")
    return in_turn[fitting], {name: [values[place] for place in fitting] for name, values in ids.items()}


def merge_in_its_type(args, model, base, changes, into, fresh):
    """Write the merged shards in the type that MERGE_DTYPE comes to; that, and what rounding to it took away."""
    from pipeline.merging import tensors

    dtypes = ("float16", "bfloat16") if args.merge_dtype == "auto" else (args.merge_dtype,)
    needed = model.num_parameters() * DTYPES[dtypes[0]] + SMALL_FILES
    free = shutil.disk_usage(fresh).free
    if free < needed:
        fail(f"merging needs {needed / 1e9:.2f} GB, {fresh.parent} has {free / 1e9:.2f} GB free: make room")
    for dtype in dtypes:
        counts = tensors.merge(base, changes, into, fresh, dtype)
        if not counts["too_large"] and counts["too_small"] <= TRACE * counts["weights"]:
            break
    if counts["too_large"]:
        fail(f"{counts['too_large']} merged weights are beyond the range of {dtype}: give --merge-dtype bfloat16")
    if counts["not_finite"]:
        say(f"warning: {counts['not_finite']} numbers in the embeddings of the base are not finite: they stay so")
    return dtype, counts


def merge_and_check(args, base, run, fresh):
    """Merge into the folder `fresh` and compare it with base and adapter. Returns what merge.json says of that."""
    from pipeline.merging import tensors, verify

    folder = Path(args.output_dir) / "adapter"
    into = "16bit" if args.merge_base == "auto" else args.merge_base
    tokenizer = tokenizer_of(base, folder, run["settings"].get("chat_template", "auto"))
    rows, ids = check_rows(args, run, tokenizer)
    begun = time.time()
    place = verify.roomy_place(base)
    model = verify.load_tuned(base, folder, into, *place)
    tuned, golds = verify.logits_of(model, ids)
    ready = time.time()
    changes = tensors.changes_of(model, folder)
    dtype, counts = merge_in_its_type(args, model, base, changes, into, fresh)
    merged_folder.write_small_files(base, model, tokenizer, fresh, dtype, counts["weights"] * DTYPES[dtype])
    merged_at = time.time()
    problems, comparison = [], {}
    try:
        if encode(load_tokenizer(str(fresh)), rows) != ids:
            problems.append("the base's tokenizer makes other tokens than the adapter's")
        problems += verify.wrong_tensors(model, base, fresh, dtype)
        model = None  # one in memory at a time; torch's modules and PEFT's refer to one another
        gc.collect()
        shards = (tensors.merged_tensors(path, changes, into) for path in models.weight_files(base))
        unrounded = ((name, weight) for shard in shards for name, _, weight in shard)
        comparison, too_far = verify.compare_folder(fresh, dtype, unrounded, ids, tuned, golds, place)
        problems += too_far
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
    """The comparison as a table, and what it took."""
    numbers = "{merged_perplexity:.4g} {mean_logit_difference:.3g} {largest_logit_difference:.3g}"
    numbers += " {equal_greedy_tokens:.1%}"
    rows = [("", "perplexity", "logit difference", "largest", "same tokens")]
    rows.append((f"{report['merge_base']} base + adapter", f"{report['adapter_perplexity']:.4g}", "", "", ""))
    for dtype, figures in report["comparison"].items():
        written = " (written)" if dtype == report["dtype"] else ""
        rows.append((f"merged {dtype}{written}", *numbers.format(**figures).split()))
    table(rows)
    took = "{check_rows} validation rows, merged in {seconds_merging:.1f} s, checked in {seconds_verifying:.1f} s"
    say(f"{took.format(**report)}, peak memory {machine.peak_memory():.2f} GB")


def finish(args, base, run, report, fresh):
    """Write model card and merge.json, the latter last: with it the folder is whole. Neither has a path of ours."""
    report |= {
        "base_model": Path(base).name if Path(base).is_dir() else base,
        "base_weights": run["weights"],
        "adapter_sha256": run["adapter_sha256"],
        "tasks": run["tasks"],  # for --ask of test_llama.py
        "dataset": {name: value for name, value in run["run"].items() if name.endswith(" rows")},
        "versions": versions("torch", "transformers", "peft", "bitsandbytes", "safetensors"),
        "git_commit": git_commit(),
    }
    card = merged_folder.model_card(args.output_dir, base, run, report, TASKS)
    (fresh / "README.md").write_text(card, encoding="utf-8")
    report["sha256"] = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
    report = json.loads(json.dumps(report), parse_constant=lambda name: None)  # a failed check may have NaN, JSON none
    (fresh / "merge.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def refuse_foreign_files(target):
    """Exit 2 where the folder to be replaced has files that no merge has put there."""
    known = read_json(target / "merge.json").get("sha256")
    ours = {"merge.json", *(known if isinstance(known, dict) else ())}
    others = sorted(path.name for path in target.glob("[!.]*") if path.name not in ours)
    if others:
        fail(f"{target} has files that are not of a merge ({', '.join(others[:3])}): move them away")


@script
def main(argv=None):
    args = parse_args(argv)
    folder, target = Path(args.output_dir) / "adapter", Path(args.output_dir) / "merged"
    named = models.read_adapter(folder)
    base = models.find_model(named if args.model == "auto" else args.model)
    with only_run_in(args.output_dir):
        models.quiet()  # before torch's friends are imported
        from pipeline.merging import tensors

        tensors.refuse_more_than_lora(folder)
        refuse_foreign_files(target)
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
            where = "" if args.output_dir == OUTPUT_DIR else f" --output-dir {quote(args.output_dir)}"
            test = f"{command('python')} test_llama.py --model {quote(str(target))} --name merged{where}"
            bits = report["trained_on"]
            say(f"it is not identical to the adapter on its {bits} base that you tested; to test it, too: {test}")


if __name__ == "__main__":
    main()
