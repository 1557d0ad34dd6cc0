"""Prediction files: the unfinished work beside them, their figures, what is shown of them at the end."""

import contextlib
import hashlib
import json
import math
import textwrap
from pathlib import Path

from pipeline.attention import MAX_NLL
from pipeline.files import read_json, refuse_another, write_whole
from pipeline.script import say

SHOWN = 3  # examples of each task printed at the end
FIGURES = dict.fromkeys(("perplexity", "bits_per_byte", "word_perplexity"), ",.5g")  # and how they are printed
FIGURES |= dict.fromkeys(("hit_max_new_tokens", "empty_predictions"), ",d")
MEANINGLESS = 1e6  # a word perplexity above it says no more than the perplexity


def template_of(tokenizer):
    """What a prompt goes through, by content."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest()[:16] if template else "none"


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


def append_work(file, run, examples):
    """Add a line to a work file: [(place, what is known of it)]."""
    file.write("\n" + json.dumps({"settings": run, "examples": examples}))  # apart from what a kill cut off
    file.flush()


def remove_work(path):
    for part in work_files(path):
        part.unlink()


def finished(args, path, run):
    """Whether the predictions of this run stand at `path`; exits 2 where they, or work for them, are of another."""
    stored = [read_json(path).get("settings")] if path.exists() else []
    begun = [item["settings"] for item in read_work(path)]
    if not args.overwrite and run not in begun:  # else what stands there was to be replaced
        for other in begun + stored:
            other = other if isinstance(other, dict) else {}  # another system's predictions
            refuse_another(path, other, run, "give its settings again, or --overwrite, or --name for more files")
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
    scored = [done[place] for place in sorted(done)]
    texts = [rows[place]["completion"] for place in sorted(done)]
    too_long = {prefix + "prediction": "" for prefix in systems(run).values()} | {"too_long": True}
    kept = [key for key in ("id", "references", "answer_in_context", "swapped") if key in rows.column_names]
    examples = [row | done.get(place, too_long) for place, row in enumerate(rows.select_columns(kept))]
    left_out = [rows[place]["id"] for place in range(len(rows)) if "server" in run and place not in done]
    examples = [example for example in examples if example["id"] not in left_out]
    content = {
        "task": task,
        "model": run["model"],
        "adapter": folder and str(folder),
        "settings": run,
        "perplexity": {name: perplexity(scored, prefix, texts) for name, prefix in systems(run).items()},
        "general_text": general,
        "too_long": [example["id"] for example in examples if "too_long" in example],
        "left_out": left_out,
        "examples": examples,
    }
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def show(contents, prompts):
    """Print the first examples of each task, then the table, base before tuned, within 80 columns."""
    names = {"base": "base", "tuned": "tuned" if contents[0]["adapter"] else "model"}
    names = {system: names[system] for system in reversed(contents[0]["perplexity"])}
    for content in contents:
        for example in content["examples"][:SHOWN]:
            texts = {"prompt": prompts[example["id"]][-66:], "reference": " | ".join(example["references"][:3])}
            texts |= {"swapped": example["swapped"]} if "swapped" in example else {}
            for system, name in names.items():
                texts[name] = example["base_prediction" if system == "base" else "prediction"]
            say(f"\n{example['id']}")
            for name, text in texts.items():
                say(f"  {name:<10} {textwrap.shorten(text, 67, placeholder='...')}")
    say(f"\n{'':<30}" + "".join(f"{name:>18}" for name in names.values()))
    general = {"task": "general text", "settings": {}, "perplexity": contents[-1]["general_text"]}
    for content in [*contents, general]:
        task = "swapped" if content["settings"].get("swap_answers") else content["task"]
        for key, form in FIGURES.items():
            values = [content["perplexity"].get(name, {}).get(key, 0) for name in names]
            if any(values) and (key != "word_perplexity" or max(values) <= MEANINGLESS):
                say(f"{task + ' ' + key:<30}" + "".join(f"{value:>18{form}}" for value in values))
