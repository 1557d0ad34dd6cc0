"""Score the predictions of test_llama.py, or of any other system, with intervals, tests and one page to read them on.

samsum gets ROUGE-1/2/L/Lsum (stemmed, one sentence per line), BLEU, exact match and length ratio; trivia_qa gets
exact match and F1 by the official rules over all aliases, whether the prediction contains an alias, BLEU with
effective order, and ROUGE: metrics.py computes them. Scores run from 0 to 100, each with a 95 % bootstrap interval;
every other system is compared with the first one, the base, on the same rows. A language model judges the
predictions where JUDGE_MODEL names one (judge.py); its key is read from OPENAI_API_KEY alone. Needs neither torch
nor, without a judge, the network.

Reads:  OUTPUT_DIR/samsum_predictions.json and trivia_qa_predictions.json, whichever exist, or the files of
        --predictions: {"task": "samsum", "examples": [{"references": ["..."], "prediction": "..."}]} is enough, or
        the examples alone, one a line. For the page, where they are of the same run: OUTPUT_DIR/dataset/ (prompts),
        dataset_report.json, adapter/run.json, adapter/log.jsonl.
Writes: OUTPUT_DIR/evaluation.html and evaluation.json, which holds every number of the page; with a judge also
        judge_cache.jsonl, which a rerun or an interrupted run reads instead of asking again.

    python evaluations.py
    python evaluations.py --predictions base=base.json mine=mine.json theirs=theirs.json --output-dir outputs/mine
    python evaluations.py --judge-model Qwen3-8B --judge-url http://127.0.0.1:8000/v1 --judge-max-examples 200
"""

import json
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

import significance
from common import TASKS, fail, parse_settings, read_json, say, script, versions, write_whole

# Settings: edit here, or override for one run on the command line.
PREDICTIONS = ()  # FILE: base and tuned, as test_llama.py writes; NAME=FILE: another system; none: those in OUTPUT_DIR
RESAMPLES = 10_000  # of the bootstrap and of the randomisation tests
SEED = 0  # of the resamples, and of the rows a judge sees
JUDGE_MODEL = ""  # a model that judges the predictions; empty: none
JUDGE_URL = "https://api.openai.com/v1"  # any OpenAI-compatible server: OpenAI, vLLM, transformers serve
JUDGE_MAX_EXAMPLES = 0  # per task: a judge costs, so it asks how many; each is one request per system
JUDGE_CONCURRENCY = 8  # requests at once
JUDGE_TIMEOUT = 60.0  # seconds for a request, times those at once: a local server answers one after the other
OUTPUT_DIR = "outputs"  # holds the predictions, gets evaluation.json and evaluation.html

# Fixed
ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SCORES = {  # what each task reports, in the order of the table
    "samsum": (*ROUGES, "bleu", "exact_match", "length_ratio"),
    "trivia_qa": ("exact_match", "f1", "contains", "bleu_effective_order", *ROUGES),
}
KEYS = ("examples", "ids", "files", "made_from", "too_long", "perplexity", "intervals", "comparisons", "groups")
RESERVED = (*KEYS, "per_example", "judge")  # what evaluation.json holds beside a task's systems: no system's name
NAME = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)  # --predictions NAME=FILE
PROMPT_ENDS = {"samsum": "Summary:", "trivia_qa": "Answer:"}  # build_dataset.py's, for examples without a task
SAME_RUN = ("adapter", "weights", "rows", "4_bit")  # what the predictions of two tasks must have in common
LENGTH_GROUPS = 4  # equal parts of the rows, by words of the prompt


def parse_args(argv=None):
    args = parse_settings(sys.modules[__name__], argv)
    address = urlsplit(args.judge_url)
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc or address.query:
        fail("--judge-url must be http(s)://host/path alone: the key comes from OPENAI_API_KEY")
    if args.judge_model and not args.judge_max_examples:
        fail("a judge costs time or money: say how many examples of each task with --judge-max-examples")
    return args


def listed(value):
    return [value] if isinstance(value, str) else value


def numbered(value):
    return str(value) if type(value) in (int, float) else value


class Example(BaseModel, strict=True):
    """A row of a prediction file: `references` and `prediction` are enough."""

    references: Annotated[list[str], BeforeValidator(listed), Field(min_length=1)]
    prediction: str
    id: Annotated[str | None, BeforeValidator(numbered)] = None
    base_prediction: str | None = None
    prompt: str | None = None
    answer_in_context: bool | None = None
    nll: float | None = None
    base_nll: float | None = None
    tokens: int | None = None
    too_long: bool = False  # for its model: test_llama.py left it out, so it has no nll


class Perplexity(BaseModel, strict=True, extra="allow"):
    perplexity: float


class PredictionFile(BaseModel, strict=True):
    """What test_llama.py writes for a task; of another system's file `task` and `examples` are enough."""

    task: Literal[TASKS]
    examples: Annotated[list[Example], Field(min_length=1)]
    perplexity: dict[str, Perplexity] = {}
    settings: Any = None
    model: Any = None

    @model_validator(mode="after")
    def all_or_none(self):
        for name in ("id", "base_prediction"):
            given = [getattr(example, name) is not None for example in self.examples]
            if any(given) and not all(given):
                raise ValueError(f"examples.{given.index(False)} has no {name}: give it to all examples or none")
        counts = Counter(example.id for example in self.examples if example.id is not None)
        for row_id, times in counts.most_common(1):
            if times > 1:
                raise ValueError(f"id {row_id!r} stands there {times} times: every example needs its own")
        return self


@dataclass
class System:
    """The column of one system: `nll` and `tokens` per example, if known; `made_from` as its file says."""

    predictions: list
    file: str
    nll: list | None
    tokens: list | None
    perplexity: dict | None
    model: Any
    made_from: dict | None
    too_long: int = 0  # examples that its model could not read


@dataclass
class Rows:
    """A task: what its systems share, as lists (None where an example lacks it), and the systems by name."""

    file: str
    references: list
    ids: list | None
    prompts: list | None
    inside: list | None
    systems: dict = field(default_factory=dict)


def parse(raw):
    """The value in the bytes of a JSON file; of JSON lines a list. UTF-8 or UTF-16, with or without a BOM."""
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # more than one value: one a line
            raise
        lines = raw.decode("utf-8-sig").split("\n")
        value = json.loads("[" + ",\n".join(line for line in lines if line.strip()) + "]")
    # Python's json reads NaN, 1e999 and half a character without a word: none may get into the scores.
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def as_file(value):
    """Examples alone become a prediction file of the task that the first one names or its prompt shows."""
    if not isinstance(value, list):
        return value
    first = value[0] if value and isinstance(value[0], dict) else {}
    prompt = str(first.get("prompt")).rstrip()
    shown = [task for task, end in PROMPT_ENDS.items() if prompt.endswith(end)]
    return {"task": first.get("task") or next(iter(shown), None), "examples": value}


def read_file(path, remedy=""):
    """One checked PredictionFile; anything wrong with it ends the script in one sentence."""
    try:
        return PredictionFile.model_validate(as_file(parse(Path(path).read_bytes())))
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        fault = f"{place}: {first['msg']}".removeprefix(": ").removeprefix("Value error, ")
    except (ValueError, RecursionError) as error:
        fault = f"not valid JSON ({error})"
    fail(f"{path}: {fault}{remedy}")


def column(examples, name):
    """The values of a column as a list, or None where an example has none."""
    values = [getattr(example, name) for example in examples]
    return None if None in values else values


def systems_of(name, path, data, examples):
    """{system: System}: base and tuned of a file of test_llama.py, or its `prediction` alone as system `name`."""
    systems = {}
    for system, prefix in {name: ""}.items() if name else {"base": "base_", "tuned": ""}.items():
        predictions = column(examples, f"{prefix}prediction")
        if predictions is None:
            continue
        scored = [example for example in examples if not example.too_long]  # the others add nothing to a sum
        known = column(scored, f"{prefix}nll") and min(column(scored, "tokens") or [0]) > 0
        nll = [getattr(example, f"{prefix}nll") or 0.0 for example in examples]
        tokens = [example.tokens or 0 for example in examples]
        block = data.perplexity.get("tuned" if name else system)
        systems[system] = System(
            predictions=predictions,
            file=str(path),
            nll=nll if known else None,
            tokens=tokens if known else None,
            perplexity=block and block.model_dump(),
            model=data.model,
            made_from=data.settings if isinstance(data.settings, dict) else None,
            too_long=len(examples) - len(scored),
        )
    return systems


def aligned(rows, path, examples):
    """The examples in the order of `rows`; exits 2 where they are not the same ones."""
    if len(examples) != len(rows.references):
        count = f"{path} has {len(examples)} examples and {rows.file} has {len(rows.references)}"
        fail(f"{count}: systems are compared on the same rows")
    if (rows.ids is None) != (examples[0].id is None):
        fail(f"only one of {rows.file} and {path} has ids: give them to both")
    if rows.ids:
        place = {example.id: example for example in examples}
        missing = [row_id for row_id in rows.ids if row_id not in place]
        if missing:
            told = f"{path} lacks {len(missing)} ids of {rows.file}, such as {missing[:1]}"
            fail(f"{told}: systems are compared on the same rows")
        examples = [place[row_id] for row_id in rows.ids]
    for index, (example, references) in enumerate(zip(examples, rows.references, strict=True)):
        if example.references != references:
            fail(f"{path}: {example.id or f'example {index}'} has other references than in {rows.file}")
    return examples


def read_all(args):
    """{task: Rows} of the files of --predictions, or of those of test_llama.py in OUTPUT_DIR."""
    default = [f"{args.output_dir}/{task}_predictions.json" for task in TASKS]
    paths = args.predictions or [path for path in default if Path(path).exists()]
    if not paths:
        fail(f"no predictions at {args.output_dir}: run test_llama.py first")
    tasks = {}
    for text in paths:
        named = None if Path(text).exists() else NAME.fullmatch(text)
        name, path = named.groups() if named else (None, text)
        if name in RESERVED:
            fail(f"--predictions {text}: a system cannot be called {name}, choose another name")
        data = read_file(path, remedy="" if args.predictions else ": run test_llama.py --overwrite")
        shared = (column(data.examples, key) for key in ("references", "id", "prompt", "answer_in_context"))
        rows = tasks.setdefault(data.task, Rows(path, *shared))
        examples = aligned(rows, path, data.examples)
        for system, values in systems_of(name, path, data, examples).items():
            if system in rows.systems:
                advice = f"name the systems, --predictions a={rows.file} b={path}"
                fail(f"{path} is a second file for {data.task}: {advice}")
            rows.systems[system] = values
    if not args.predictions:
        refuse_two_runs(tasks)
    add_prompts(args.output_dir, tasks)
    return {task: tasks[task] for task in TASKS if task in tasks}


def refuse_two_runs(tasks):
    """Exit 2 where the tasks' predictions in OUTPUT_DIR are of two adapters, bases or data sets."""
    one, *others = [next(iter(rows.systems.values())) for rows in tasks.values()]
    for other in others:
        for name in SAME_RUN:
            mine, its = (system.made_from or {} for system in (one, other))
            if name in mine and name in its and mine[name] != its[name]:
                sides = f"{one.file} has {name} {mine[name]}, {other.file} has {its[name]}"
                fail(f"the predictions are of different runs: {sides}; run test_llama.py --overwrite")


def add_prompts(output_dir, tasks):
    """The prompts of the test split in OUTPUT_DIR/dataset, for files without them; only where the references agree."""
    if all(rows.prompts or not rows.ids for rows in tasks.values()):
        return
    from datasets import load_from_disk

    try:
        test = load_from_disk(str(Path(output_dir) / "dataset" / "test"))
        known = {row["id"]: (row["references"], row["prompt"]) for row in test}
    except (OSError, ValueError, KeyError):
        return  # the page then shows no prompts
    for rows in tasks.values():
        found = [known.get(row_id, (None, "")) for row_id in rows.ids or []]
        if not rows.prompts and found and [references for references, _ in found] == rows.references:
            rows.prompts = [prompt for _, prompt in found]


def score(task, references, predictions):
    """{metric: a list, a score per example}, with BLEU, its counts and its signature (metrics.Scores)."""
    import metrics

    # evaluate makes a cache folder even when nothing goes into it: not in the user's home, not in the cwd
    with tempfile.TemporaryDirectory() as cache_dir:
        metric = metrics.Scores(config_name=task, keep_in_memory=True, seed=0, cache_dir=cache_dir)
        return metric.compute(predictions=predictions, references=references)


def bleu_name(task):
    return next(name for name in SCORES[task] if name.startswith("bleu"))


def means(task):
    """The metrics of the task that are means over examples, in their order."""
    return [name for name in SCORES[task] if not name.startswith("bleu")]


def table_of(task, scores, system):
    """(examples, columns): a score per metric of `means`, BLEU's 10 counts, nll, tokens: sums make a corpus."""
    counts = scores["bleu_counts"]
    extra = [system.nll, system.tokens] if system.nll else np.zeros((2, len(counts)))
    return np.column_stack([*(scores[name] for name in means(task)), counts, *extra])


def corpus_scores(task, sums, examples):
    """{metric: (...)} of the sums (..., columns) of a table's rows; perplexity: exp(summed nll / summed tokens)."""
    from metrics import bleu_of

    names = means(task)
    found = {name: sums[..., i] / examples for i, name in enumerate(names)}
    counts, nll, tokens = sums[..., len(names) : -2], sums[..., -2], sums[..., -1]
    found[bleu_name(task)] = bleu_of(counts, effective_order=task == "trivia_qa")
    scores = {name: found[name] for name in SCORES[task]}
    if np.all(tokens > 0):
        scores["perplexity"] = np.exp(np.minimum(nll / tokens, 700))  # 700: the largest that a float holds
    return scores


def adjust(results):
    """Put `p_holm` and `significant` into every comparison: all tests of this evaluation are one family."""
    parts = [*results.values(), *(result["judge"] for result in results.values() if "judge" in result)]
    by_system = [tests for part in parts for tests in part["comparisons"].values()]
    tests = [test for by_metric in by_system for test in by_metric.values() if "p_value" in test]
    for test, adjusted in zip(tests, significance.holm([test["p_value"] for test in tests]), strict=True):
        test |= {"p_holm": adjusted, "significant": adjusted < significance.LEVEL}


def groups_of(rows):
    """{kind: {label: bool per example}}: whether the context holds the answer; equal parts by words of the prompt."""
    groups = {}
    if rows.inside and not all(rows.inside):
        inside = np.array(rows.inside)
        groups["answer_in_context"] = {"in the context": inside, "not in the context": ~inside}
    if rows.prompts:
        words = np.array([len(prompt.split()) for prompt in rows.prompts])
        edges = np.unique(np.quantile(words, np.linspace(0, 1, LENGTH_GROUPS + 1), method="higher"))
        part = np.searchsorted(edges[1:-1], words, side="right")
        picks = [part == i for i in np.unique(part)]
        groups["prompt_words"] = {f"{words[pick].min()} to {words[pick].max()}": pick for pick in picks}
    return {kind: {label: pick for label, pick in parts.items() if pick.any()} for kind, parts in groups.items()}


def score_task(task, rows, args):
    """Everything evaluation.json says about a task; {system: {metric: 0 to 100}} stands at its top level."""
    scores = {name: score(task, rows.references, system.predictions) for name, system in rows.systems.items()}
    tables = {name: table_of(task, scores[name], system) for name, system in rows.systems.items()}
    columns = {metric: i for i, metric in enumerate(means(task))}
    tested = columns | {"perplexity": -2}
    by_sums = partial(corpus_scores, task)
    whole = significance.measure(by_sums, tables, args)
    bleu = bleu_name(task)
    result = {
        "examples": len(rows.references),
        "ids": rows.ids or [str(i) for i in range(len(rows.references))],
        "files": {name: system.file for name, system in rows.systems.items()},
        "made_from": {name: system.made_from for name, system in rows.systems.items()},
        "too_long": {name: system.too_long for name, system in rows.systems.items() if system.too_long},
        "perplexity": {},
    }
    for name, system in rows.systems.items():
        perplexity = whole["scores"][name].pop("perplexity", None)
        if system.perplexity or system.nll:
            result["perplexity"][name] = system.perplexity or {"perplexity": perplexity}
        exact = {bleu: scores[name]["bleu"], f"{bleu}_signature": scores[name]["bleu_signature"]}
        result[name] = whole["scores"][name] | exact
    result["intervals"] = whole["intervals"]
    result["comparisons"] = significance.compare(by_sums, tables, tested, whole["differences"], args)
    result["groups"] = {}
    for kind, picks in groups_of(rows).items():
        result["groups"][kind] = {}
        for label, pick in picks.items():
            part = {name: table[pick] for name, table in tables.items()}
            result["groups"][kind][label] = significance.measure(by_sums, part, args)
    result["per_example"] = {
        name: {metric: np.round(table[:, i], 4).tolist() for metric, i in columns.items()}
        for name, table in tables.items()
    }
    return result


def same(short, digest):
    """Whether a fingerprint begins the SHA-256 that another script wrote."""
    return isinstance(short, str) and len(short) >= 16 and str(digest).startswith(short)


def read_training(output_dir, adapter):
    """What train_llama.py noted of this adapter: facts, settings, loss {curve: [[step, loss]]}; None of another's."""
    folder = Path(output_dir) / "adapter"
    run = read_json(folder / "run.json")
    if not same(adapter, run.get("adapter_sha256")):
        return None
    training = {
        "facts": {key: value for key, value in run.items() if isinstance(value, str | int | float)},
        "settings": run["settings"] if isinstance(run.get("settings"), dict) else {},
        "loss": {},
    }
    try:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        log = []
    for entry in (entry for entry in log if isinstance(entry, dict) and "step" in entry):
        for key, value in entry.items():
            if re.fullmatch(r"loss|eval_(\w+_)?loss", key) and isinstance(value, int | float) and np.isfinite(value):
                training["loss"].setdefault(key, []).append([entry["step"], value])
    return training


def read_data(output_dir, rows):
    """{task: {split: {reason: rows}}} of the data set with these test rows, as build_dataset.py counted; or None."""
    report = read_json(Path(output_dir) / "dataset_report.json")
    try:
        if same(rows, report["splits"]["test"]["sha256"]):
            return {task: part["counts"] for task, part in report["tasks"].items()}
    except (KeyError, TypeError):
        pass
    return None


def common_setting(tasks, name):
    """What all the prediction files say of a setting; None where they differ, or one says nothing."""
    systems = [system for rows in tasks.values() for system in rows.systems.values()]
    values = [(system.made_from or {}).get(name) for system in systems]
    return values[0] if values.count(values[0]) == len(values) else None


def print_table(task, result):
    """The scores of one task; per comparison: the first system, the other, difference, its interval, p after Holm."""
    first, *others = result["files"]
    from page import scores_of

    scores = scores_of(result)
    title = f"{task} ({result['examples']} examples)"
    if not others:
        say(f"\n{title:<25}{first[:8]:>9}  95 % interval")
        for metric in scores[first]:
            ends = result["intervals"][first].get(metric)
            say(f"{metric:<24}{short(scores[first][metric]):>10}  {between(ends)}".rstrip())
    for name in others:
        say(f"\n{title:<25}{first[:8]:>8}{name[:8]:>9}  difference, 95 % interval         p")
        for metric in [metric for metric in scores[first] if metric in scores[name]]:
            test = result["comparisons"][name].get(metric, {})
            values = [scores[first][metric], scores[name][metric]]
            gain = between(test.get("interval"), "+")
            p = p_value(test["p_holm"]) if "p_holm" in test else ""
            pair = "".join(f"{short(value):>9}" for value in values)
            say(f"{metric:<24}{pair}{short(values[1] - values[0], '+'):>9} {gain:<20}{p:>8}".rstrip())

    for name, count in result["too_long"].items():
        say(f"{count} of them were too long for the model of {name}: wrong answers, and not in its perplexity")


def short(value, sign=""):
    """Two decimals, or the magnitude of a number too long for its column."""
    return f"{value:{sign}.2f}" if abs(value) < 10_000 else f"{value:{sign}.1e}"


def between(ends, sign=""):
    return "[" + ", ".join(short(end, sign) for end in ends) + "]" if ends else ""


def p_value(p):
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def print_judge(judge):
    """The judge's scores, never alone."""
    for name, scores in judge["scores"].items():
        beside = ", ".join(f"{metric} {value:.2f}" for metric, value in scores.items())
        agrees = ", ".join(f"{m} {part['agreement']:.0f} %" for m, part in judge["agreement"][name].items())
        say(f"judged, {judge['examples']} examples, {name}: {beside}; agrees with {agrees}")
    if any(judge["failed"].values()):
        say("no readable judgement: " + ", ".join(f"{name} {count}" for name, count in judge["failed"].items()))


@script
def main(argv=None):
    args = parse_args(argv)
    tasks = read_all(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # known before a judge is paid
        fail(f"cannot write to {folder}: give another --output-dir")
    judged, counts = {}, {}
    if args.judge_model:
        import judge

        judged, counts = judge.judge(tasks, args)
    report = {task: score_task(task, rows, args) for task, rows in tasks.items()}
    for task, judgements in judged.items():
        report[task]["judge"] = judge.report(task, report[task], judgements, args) | counts
    adjust(report)
    report |= {
        "training": read_training(folder, common_setting(tasks, "adapter")),
        "data": read_data(folder, common_setting(tasks, "rows")),
        "versions": versions("evaluate", "matplotlib", "numpy", "rouge_score", "sacrebleu"),
        "settings": {**vars(args), "stemmer": True},
    }
    from page import page

    html = page(report, tasks)
    write_whole(folder / "evaluation.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "evaluation.html", html)
    for task in tasks:
        print_table(task, report[task])
        if "judge" in report[task]:
            print_judge(report[task]["judge"])
    say(f"\nwrote {folder / 'evaluation.html'} and {folder / 'evaluation.json'}")


if __name__ == "__main__":
    main()
