"""Prediction files: the unfinished work beside them, their figures, what is shown of them at the end."""

import contextlib
import json
import math
import textwrap
from pathlib import Path

from pipeline.attention import MAX_NLL
from pipeline.files import read_json, refuse_another, write_whole
from pipeline.script import fail, first_line, say, table
from pipeline.tokens import encode

SHOWN = 3  # examples of each task printed at the end
FIGURES = dict.fromkeys(("perplexity", "bits_per_byte", "word_perplexity"), ",.5g")  # and how they are printed
FIGURES |= dict.fromkeys(("hit_max_new_tokens", "empty_predictions"), ",d")
MEANINGLESS = 1e6  # a word perplexity above it says no more than the perplexity


def encoded(tokenizer, rows, shots=()):
    """The rows of a Dataset as dicts, with their `place`, `prompt_ids`, `completion_ids`; exits 2 where it cannot."""
    try:
        ids = encode(tokenizer, rows.to_dict(), shots)
    except ValueError as error:
        fail(f"cannot test: {first_line(error)}")
    dicts = []
    for place, row in enumerate(rows):
        dicts.append(row | {"place": place} | {name: values[place] for name, values in ids.items()})
    return dicts


def paths_of(tasks, output_dir, name="", swapped=False):
    """{task: the path of its predictions file}"""
    end = "".join(f"_{part}" for part in (name, swapped and "swapped") if part)
    return {task: Path(output_dir, f"{task}_predictions{end}.json") for task in tasks}


def systems(run):
    """{name of a system: what its columns begin with}."""
    both = run["adapter"] != "none" and run.get("compare_with_base")
    return {"tuned": "", "base": "base_"} if both else {"tuned": ""}


def work_files(path):
    """The unfinished work beside a predictions file, one for each process that took part: a line a batch."""
    return sorted(path.parent.glob(f".{path.stem}.part*.jsonl"))


def read_work(path):
    """[{"settings", "examples"}] of all batches done so far; a kill costs the batch at hand, no more."""
    done = []
    for part in work_files(path):
        for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # half written
                done.append(json.loads(line))
    return done


def examples_done(path, run):
    """{place of a row in its task: what is known of it} of this run's batches."""
    done = {}
    for item in read_work(path):
        for place, known in item["examples"] if item["settings"] == run else ():
            done[place] = done.get(place, {}) | known
    return done


def append_work(path, run, examples, process=0):
    """Add a line to the work file of a process: [(place, what is known of it)]."""
    with path.with_name(f".{path.stem}.part{process}.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"settings": run, "examples": examples}))  # apart from what a kill cut off


def remove_work(path):
    for part in work_files(path):
        part.unlink()


def finished(args, path, run):
    """Whether the predictions of this run are at `path`; exits 2 where they, or work for them, are of another."""
    stored = [read_json(path).get("settings")] if path.exists() else []
    begun = [item["settings"] for item in read_work(path)]
    if not args.overwrite and run not in begun:  # else what is there was to be replaced
        resume, remedy = "give its settings again, or ", "give --overwrite, or --name for more files"
        for other in begun + stored:
            other = other if isinstance(other, dict) else {}  # {}: another system's
            refuse_another(path, {"shots": 0} | other, {"shots": 0} | run, remedy, resume)  # noted where there are any
    return stored == [run] and not args.overwrite


def perplexity(examples, prefix, texts):
    """Corpus figures of a system on the completions `texts`; bits_per_byte compares models of other tokenizers."""
    counts = {"examples": len(examples)}
    counts["hit_max_new_tokens"] = sum(example[prefix + "hit_max_new_tokens"] for example in examples)
    counts["empty_predictions"] = sum(example.get(prefix + "prediction") == "" for example in examples)
    if not examples or not all(prefix + "nll" in example for example in examples):  # a server that gives none
        return counts
    nll = math.fsum(example[prefix + "nll"] for example in examples)
    tokens = sum(example["tokens"] for example in examples)
    words = sum(max(1, len(text.split())) for text in texts)
    return {
        "perplexity": math.exp(nll / tokens),
        "nll_sum": nll,
        "tokens": tokens,
        "bits_per_byte": nll / sum(len(text.encode()) for text in texts) / math.log(2),
        "word_perplexity": math.exp(min(MAX_NLL, nll / words)),
    } | counts


def write_predictions(task, rows, folder, path, run, general):
    """Put the predictions file in place, whole, from the work files.

    Rows too long for a model that is loaded here predict "". What a server has no answer for is `left_out`.
    """
    done = examples_done(path, run)
    texts = [rows[place]["completion"] for place in sorted(done)]
    scored = [done[place] for place in sorted(done)]
    too_long = {prefix + "prediction": "" for prefix in systems(run).values()} | {"too_long": True}
    kept = [key for key in ("id", "references", "answer_in_context", "swapped") if key in rows.column_names]
    examples, left_out = [], []
    for place, row in enumerate(rows.select_columns(kept)):
        if place in done or "server" not in run:
            examples.append(row | done.get(place, too_long))
        else:
            left_out.append(row["id"])
    content = {
        "task": task,
        "model": run["model"],
        "adapter": folder and str(folder),
        "merged_from": None if folder or "server" in run else merged_from(run["model"]),
        "settings": run,
        "perplexity": {name: perplexity(scored, prefix, texts) for name, prefix in systems(run).items()},
        "general_text": general,
        "too_long": [example["id"] for example in examples if "too_long" in example],
        "left_out": left_out,
        "examples": examples,
    }
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def merged_from(model):
    """The adapter, by the first digits of its hash, that merge_llama.py merged into a model; None of another model."""
    return str(read_json(Path(model, "merge.json")).get("adapter_sha256", ""))[:16] or None


def show(paths, rows):
    """Print the first examples of each predictions file, then the table of their figures, base before tuned."""
    prompts = dict(zip(rows["id"], rows["prompt"], strict=True))
    contents = [read_json(path) for path in paths]
    names = {"base": "base", "tuned": "tuned" if contents[0]["adapter"] else "model"}
    shown = [system for system in names if system in contents[0]["perplexity"]]
    tables = {}
    for content in contents:
        task = "swapped" if content["settings"].get("swap_answers") else content["task"]
        tables[task] = content["perplexity"]
        for example in content["examples"][:SHOWN]:
            end = prompts[example["id"]][-63:].partition(" ")[2]  # from a word's beginning on
            texts = {"prompt": f"...{end}", "reference": " | ".join(example["references"][:3])}
            if "swapped" in example:
                texts["swapped"] = example["swapped"]
            for system in shown:
                texts[names[system]] = example["base_prediction" if system == "base" else "prediction"]
            say(f"\n{example['id']}")
            for name, text in texts.items():
                say(f"  {name:<10} {textwrap.shorten(text, 67, placeholder='...')}")
    tables["general text"] = contents[-1]["general_text"]
    lines = [["", *(names[system] for system in shown)]]
    for title, figures in tables.items():
        for name, form in FIGURES.items():
            values = [figures.get(system, {}).get(name, 0) for system in shown]
            if any(values) and (name != "word_perplexity" or max(values) <= MEANINGLESS):
                lines.append([f"{title} {name}", *[f"{value:{form}}" for value in values]])
    say()
    table(lines)
