"""Score the predictions of test_llama.py, or of any other system, with intervals, tests and one page to read them on.

metrics.py computes the scores, from 0 to 100, each with a 95 % bootstrap interval; every other system is compared with
the first one, the base, on the same rows. NAME@SEED are trainings of one system: its score is their mean, and what
is said of it holds for other rows and other seeds. A language model judges the predictions where JUDGE_MODEL names one
(judge.py); its key is read from OPENAI_API_KEY alone. Needs neither torch nor, without a judge, the network.

Reads:  OUTPUT_DIR/samsum_predictions.json and trivia_qa_predictions.json, whichever exist, or the files of
        --predictions: {"task": "samsum", "examples": [{"references": ["..."], "prediction": "..."}]} is enough,
        or the examples alone, one a line, each with its "task" or a prompt that ends as ours do.
        For the page, where they are of the same run: OUTPUT_DIR/dataset/ (prompts), dataset_report.json,
        adapter/ (its weights alone say whether it is the predictions' own; run.json, log.jsonl).
Writes: OUTPUT_DIR/evaluation.html and evaluation.json, which holds every number of the page; with a judge also
        judge_cache.jsonl, which a rerun or an interrupted run reads instead of asking again.

    python evaluations.py
    python evaluations.py --predictions base=base.json mine=mine.json theirs=theirs.json --output-dir outputs/mine
    python evaluations.py --predictions base=0.json tuned@0=0.json tuned@1=1.json tuned@2=2.json  # trained three times
    python evaluations.py --judge-model Qwen3-8B --judge-url http://127.0.0.1:8000/v1 --judge-max-examples 200
"""

import json
import re
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from pipeline.files import read_json, refuse_another, sha256, write_whole
from pipeline.scoring import page, significance
from pipeline.script import fail, say, script, versions
from pipeline.settings import check_url, parse_settings
from tasks import TASKS
from tasks import swapped as swap

# Settings: edit here, or override for one run on the command line.
PREDICTIONS = ()  # FILE: base and tuned, of test_llama.py; NAME=FILE, NAME@SEED=FILE: another; none: OUTPUT_DIR's
RESAMPLES = 10_000  # of the bootstrap and of the randomisation tests
SEED = 0  # of the resamples, and of the rows a judge sees
JUDGE_MODEL = ""  # a model that judges the predictions; empty: none
JUDGE_URL = "https://api.openai.com/v1"  # any OpenAI-compatible server: OpenAI, vLLM, transformers serve
JUDGE_MAX_EXAMPLES = 0  # per task; 0 = not said: a judge costs, so it asks; each is one request per system
JUDGE_CONCURRENCY = 8  # requests at once
JUDGE_TIMEOUT = 60.0  # seconds for a request, times those at once: a local server answers one after the other
OUTPUT_DIR = "outputs"  # holds the predictions, gets evaluation.json and evaluation.html

# Fixed
CHOICES = {"PREDICTIONS": (0, list), "RESAMPLES": (int,), "JUDGE_CONCURRENCY": (int,), "JUDGE_TIMEOUT": (float,)}
CHOICES |= dict.fromkeys(("SEED", "JUDGE_MAX_EXAMPLES"), (0, int))
# Keys of evaluation.json beside a task's systems: no system's name
RESERVED = ("examples", "ids", "files", "made_from", "too_long", "perplexity", "general_text", "intervals", "seeds")
RESERVED += ("equal_predictions", "rouge_note", "comparisons", "groups", "per_example", "judge")
PROMPT_ENDS = {"samsum": "Summary:", "trivia_qa": "Answer:"}  # build_dataset.py's, for examples without a task
SWAPPED = "swapped"  # column and part of the report of test_llama.py --swap-answers
NAME = re.compile(r"([^\s/@=]+(?:@[^\s/@=]+)?)=(.+)", re.DOTALL)  # --predictions NAME=FILE or NAME@SEED=FILE
OTHER_ADAPTER = "these scores are of another adapter than adapter/ has now: run test_llama.py --overwrite for its own"
SAME_RUN = ("adapter", "weights", "rows", "4_bit")  # what the predictions of two tasks must have in common


def parse_args(argv=None):
    args = parse_settings(sys.modules[__name__], argv, CHOICES)
    check_url("--judge-url", args.judge_url)
    if args.judge_model and not args.judge_max_examples:
        fail("a judge costs time or money: say how many examples of each task with --judge-max-examples")
    return args


def lower(value):
    return value.lower() if isinstance(value, str) else value


def listed(value):
    return [value] if isinstance(value, str) else value


class Example(BaseModel, strict=True):
    """A row of a prediction file: `references` and `prediction` are enough."""

    references: Annotated[list[str], BeforeValidator(listed), Field(min_length=1)]
    prediction: str
    id: Annotated[str, Field(strict=False, coerce_numbers_to_str=True)] | None = None
    base_prediction: str | None = None
    prompt: str | None = None
    answer_in_context: bool | None = None
    swapped: str | None = None  # what the context says in the place of the answer
    nll: float | None = None
    base_nll: float | None = None
    tokens: int | None = None
    too_long: bool = False  # for its model: test_llama.py left it out, so it has no nll


class PredictionFile(BaseModel, strict=True):
    """What test_llama.py writes for a task; of another system's file `task` and `examples` are enough."""

    task: Annotated[Literal[tuple(TASKS)], BeforeValidator(lower)]
    examples: list[Example]
    perplexity: dict[str, dict[str, int | float]] = {}
    general_text: dict[str, dict[str, int | float]] = {}
    left_out: list[str] = []  # ids of rows that its server was not asked for, or did not answer
    settings: Any = None

    @model_validator(mode="after")
    def all_or_none(self):
        if not self.examples and not self.left_out:
            raise ValueError("examples: List should have at least 1 item")
        for name in ("id", "base_prediction", SWAPPED):
            given = [getattr(example, name) is not None for example in self.examples]
            if any(given) and not all(given):
                raise ValueError(f"examples.{given.index(False)} has no {name}: give it to all examples or none")
        times = Counter(example.id for example in self.examples if example.id is not None)
        if twice := [row_id for row_id, count in times.items() if count > 1]:
            raise ValueError(f"id {twice[0]!r} stands there more than once: every example needs its own")
        if column(self.examples, SWAPPED):
            self.task = SWAPPED  # from here on: told apart from the plain questions
        return self


@dataclass
class System:
    """The column of one system; `losses` (nll, tokens) per example, if known; `made_from` as its file says."""

    file: str
    predictions: list
    losses: list | None
    perplexity: dict | None
    made_from: dict | None
    too_long: int = 0  # examples that its model could not read
    general_text: dict | None = None


@dataclass
class Rows:
    """A task: what its systems share, as lists (None where an example lacks it), and the systems by name."""

    file: str
    references: list
    ids: list | None
    prompts: list | None
    inside: list | None
    swapped: list | None
    systems: dict = field(default_factory=dict)


def parse(raw):
    """The values in the bytes of a JSON file, with or without a BOM: one, or one a task of rows without a frame."""
    try:
        value = json.loads(raw)
        rows = [value] if isinstance(value, dict) and "prediction" in value else value  # a single line
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # more than one value: one a line
            raise
        rows = [json.loads(line) for line in raw.decode(json.detect_encoding(raw)).split("\n") if line.strip()]
    # Python's json reads NaN, 1e999 and half a character without a word: none may get into the scores.
    json.dumps(rows, ensure_ascii=False, allow_nan=False).encode()
    return by_task(rows) if rows and isinstance(rows, list) else [rows]


def by_task(rows):
    """Rows as the values of files, one a task: that of the row itself, or the one that its prompt ends like."""
    tasks = {}
    for row in rows:
        prompt = str(row.get("prompt")).rstrip()
        asked = next((task for task, end in PROMPT_ENDS.items() if prompt.endswith(end)), "none")
        tasks.setdefault(str(row.get("task") or asked).lower(), []).append(row)
    return [{"task": task, "examples": examples} for task, examples in tasks.items()]


def read_file(path, remedy=""):
    """The checked PredictionFiles of a file, one a task; anything wrong with it ends the script in one sentence."""
    files = []
    try:
        values = parse(Path(path).read_bytes())
        for value in values:
            files.append(PredictionFile.model_validate(value))
        return files
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        fault = f"{place}: {first['msg']}".removeprefix(": ").removeprefix("Value error, ")
        if {one["loc"] for one in error.errors() if one["type"] == "missing"} >= {("task",), ("examples",)}:
            fault = "it has neither task nor examples: it is no file of predictions"
        if len(values) > 1:
            fault = f"its rows of task {value['task']}: {fault}"
    except (ValueError, RecursionError, AttributeError) as error:
        fault = f"not valid JSON ({error})"
    fail(f"{path}: {fault}{remedy}")


def column(examples, name):
    """The values of a column as a list, or None where an example has none."""
    values = [getattr(example, name) for example in examples]
    return None if None in values else values


def systems_of(name, path, data, examples):
    """{system: System}: base and tuned of a file of test_llama.py, or one of them: its base if `name` is base."""
    systems = {}
    read = [example for example in examples if not example.too_long]  # the others add nothing to a sum
    prefixes = {"base": "base_", "tuned": ""} if column(examples, "base_prediction") else {"tuned": ""}
    if name:
        prefixes = {name: prefixes.get(name.partition("@")[0], "")}  # base@SEED, too
    for system, prefix in prefixes.items():
        side = "base" if prefix else "tuned"
        known = column(read, f"{prefix}nll") and min(column(read, "tokens") or [0]) > 0
        losses = [(getattr(example, f"{prefix}nll") or 0.0, example.tokens or 0) for example in examples]
        perplexity = data.perplexity.get(side, {})
        systems[system] = System(
            file=str(path),
            predictions=column(examples, f"{prefix}prediction"),
            losses=losses if known else None,
            perplexity=perplexity if "perplexity" in perplexity else None,
            made_from=data.settings if isinstance(data.settings, dict) else None,
            too_long=len(examples) - len(read),
            general_text=data.general_text.get(side),
        )
    return systems


def aligned(rows, path, examples):
    """The examples in the order of `rows`, by id or else by place; exits 2 where they are not the same ones."""
    order = rows.ids or range(len(rows.references))
    place = {i if example.id is None else example.id: example for i, example in enumerate(examples)}
    odd = sorted(set(order) ^ set(place), key=str)
    if odd:
        told = f"{path} and {rows.file} differ in {len(odd)} examples, such as {odd[0]}"
        fail(f"{told}: systems are compared on the same rows")
    for row_id, references in zip(order, rows.references, strict=True):
        if place[row_id].references != references:
            fail(f"{path}: example {row_id} has other references than in {rows.file}")
    return [place[row_id] for row_id in order]


def leave_out(files):
    """Take the rows that one of the files leaves out from all files of its task."""
    for task in (*TASKS, SWAPPED):
        of_task = [data for data in files if data.task == task]
        left_out = {row_id for data in of_task for row_id in data.left_out}
        for data in of_task:
            examples = [example for example in data.examples if example.id not in left_out]
            if len(examples) < len(data.examples):
                data.examples, data.perplexity = examples, {}  # that of all its rows is another one
        if left_out:
            say(f"{task}: {len(left_out)} rows left out, for which a server's file has no answer")
        if of_task and not min(len(data.examples) for data in of_task):
            fail(f"no row of {task} is in all files: ask the server for more, see test_llama.py --server-max-examples")


def read_all(args):
    """{task: Rows} of the files of --predictions, or of those of test_llama.py in OUTPUT_DIR."""
    names = (*(f"{task}_predictions" for task in TASKS), "trivia_qa_predictions_swapped")
    default = [f"{args.output_dir}/{name}.json" for name in names]
    paths = args.predictions or [path for path in default if Path(path).exists()]
    if not paths:
        fail(f"no predictions at {args.output_dir}: run test_llama.py first")
    tasks, files = {}, []
    for text in paths:
        named = None if Path(text).exists() else NAME.fullmatch(text)
        name, path = named.groups() if named else (None, text)
        if name and name.partition("@")[0] in RESERVED:
            fail(f"--predictions {text}: a system cannot be called {name}, choose another name")
        remedy = "" if args.predictions else ": run test_llama.py --overwrite"
        files += [(name, path, data) for data in read_file(path, remedy)]
    leave_out([data for _, _, data in files])
    for name, path, data in files:
        shared = (column(data.examples, key) for key in ("references", "id", "prompt", "answer_in_context", SWAPPED))
        rows = tasks.setdefault(data.task, Rows(path, *shared))
        examples = aligned(rows, path, data.examples)
        if rows.swapped != column(examples, SWAPPED):
            fail(f"{path}: other answers were swapped in than in {rows.file}")
        for system, values in systems_of(name, path, data, examples).items():
            if system in rows.systems:
                fail(f"{path} is a second file for {data.task}: name both, --predictions a={rows.file} b={path}")
            rows.systems[system] = values
        for system, seeds in significance.by_system(rows.systems).items():
            if "" in seeds and len(seeds) > 1:
                fail(f"{path}: {system} stands there without a seed, too: name each of its files {system}@SEED=FILE")
    if not args.predictions:
        refuse_two_runs(tasks)
    add_prompts(args.output_dir, tasks)
    return {task: tasks[task] for task in (*TASKS, SWAPPED) if task in tasks}


def refuse_two_runs(tasks):
    """Exit 2 where the tasks' predictions in OUTPUT_DIR are of two adapters, bases or data sets."""
    one, *others = [next(iter(rows.systems.values())) for rows in tasks.values()]
    for other in others:
        mine, its = one.made_from or {}, other.made_from or {}
        told = {name: mine[name] for name in SAME_RUN if name in mine and name in its}
        flag = " --swap-answers" if its.get("swap_answers") else ""
        refuse_another(f"{other.file}, beside {one.file},", its, told, f"run test_llama.py{flag} --overwrite")


def add_prompts(output_dir, tasks):
    """The prompts of the test split in OUTPUT_DIR/dataset, for files without them; only where the references agree.

    Files that note their rows get the prompts of those alone: another build may ask the same with other contexts.
    """
    from datasets import load_from_disk

    folder, noted = f"{output_dir}/dataset/test", made_from(tasks, "rows")
    if noted not in ("unknown", read_json(f"{folder}/state.json").get("_fingerprint")):
        return
    with suppress(OSError, ValueError, KeyError):  # the page then shows no prompts
        known = {row["id"]: row for row in load_from_disk(folder)}
        for rows in tasks.values():
            found = [known.get(row_id, {}) for row_id in rows.ids or []]
            if not rows.prompts and [row.get("references") for row in found] == rows.references:
                rows.prompts = [row["prompt"] for row in found]


def adjust(results):
    """Put `p_holm` and `significant` into every comparison: all tests of this evaluation are one family."""
    parts = [*results.values(), *(result["judge"] for result in results.values() if "judge" in result)]
    by_system = [tests for part in parts for tests in part["comparisons"].values()]
    tests = [test for by_metric in by_system for test in by_metric.values() if "p_value" in test]
    for test, adjusted in zip(tests, significance.holm([test["p_value"] for test in tests]), strict=True):
        test |= {"p_holm": adjusted, "significant": adjusted < significance.LEVEL}


def measure_groups(by_sums, tables, inside, args):
    """Scores of the rows whose context holds the answer and of the others; {} where there are no others."""
    if not inside or all(inside):
        return {}
    groups = {"in the context": np.array(inside), "not in the context": ~np.array(inside)}
    groups = {label: pick for label, pick in groups.items() if pick.any()}
    parts = {label: {name: table[pick] for name, table in tables.items()} for label, pick in groups.items()}
    return {"answer_in_context": {label: significance.measure(by_sums, part, args) for label, part in parts.items()}}


def score_task(task, rows, args):
    """Everything evaluation.json says about a task; {system: {metric: 0 to 100}} stands at its top level."""
    from pipeline.scoring import metrics

    scores = {name: metrics.score(task, rows.references, system.predictions) for name, system in rows.systems.items()}
    tables = {name: metrics.table_of(task, scores[name], system.losses) for name, system in rows.systems.items()}
    columns = {metric: i for i, metric in enumerate(metrics.MEANS[task])}
    by_sums = partial(metrics.corpus_scores, task)
    whole = significance.measure(by_sums, tables, args)
    result = {
        "examples": len(rows.references),
        "ids": rows.ids or [str(i) for i in range(len(rows.references))],
        "files": {name: system.file for name, system in rows.systems.items()},
        "made_from": {name: system.made_from for name, system in rows.systems.items()},
        "too_long": {name: system.too_long for name, system in rows.systems.items() if system.too_long},
        "perplexity": {},
        "general_text": {name: system.general_text for name, system in rows.systems.items() if system.general_text},
        "intervals": whole["intervals"],
        "seeds": whole["seeds"],
        "rouge_note": metrics.rouge_note(rows.references),
        "comparisons": significance.compare(by_sums, tables, columns | {"perplexity": -2}, whole["differences"], args),
        "equal_predictions": equal_predictions(rows),
        "groups": measure_groups(by_sums, tables, rows.inside, args),
    }
    for name, seeds in significance.by_system(rows.systems).items():
        perplexity = whole["scores"][name].pop("perplexity", None)
        told = [*seeds.values()][0].perplexity if len(seeds) == 1 else None
        if told or perplexity:
            result["perplexity"][name] = told or {"perplexity": perplexity}
        exact = [scores[member] for member in rows.systems if member.partition("@")[0] == name]
        bleu, key = float(np.mean([one["bleu"] for one in exact])), metrics.BLEU_NAME[task]
        result[name] = whole["scores"][name] | {key: bleu, f"{key}_signature": exact[0]["bleu_signature"]}
    result["per_example"] = {
        name: {metric: np.round(table[:, i], 4).tolist() for metric, i in columns.items()}
        for name, table in tables.items()
    }
    return result


def equal_predictions(rows):
    """[[system, other system, how many predictions are equal]] of any two systems of one training each."""
    systems = significance.by_system(rows.systems).items()
    texts = {name: [*seeds.values()][0].predictions for name, seeds in systems if len(seeds) == 1}
    return [[one, other, sum(map(str.__eq__, texts[one], texts[other]))] for one, other in combinations(texts, 2)]


def made_from(tasks, name):
    """The fingerprint that all prediction files note under `name`; "unknown" where they differ, or one has none."""
    systems = [system for rows in tasks.values() for system in rows.systems.values()]
    noted = {str((system.made_from or {}).get(name)) for system in systems}
    return noted.pop() if len(noted) == 1 and len(min(noted)) >= 16 else "unknown"


def read_training(output_dir, adapter_sha256):
    """What train_llama.py noted of this adapter: facts, settings, loss {curve: [[step, loss]]}; None of another's."""
    folder = Path(output_dir) / "adapter"
    run, loss = read_json(folder / "run.json"), {}
    if run.get("adapter_sha256") != adapter_sha256:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            for name in entry:
                if re.fullmatch(r"loss|eval_(\w+_)?loss", name) and np.isfinite(entry[name]):
                    loss.setdefault(name, []).append([entry["step"], entry[name]])
    facts = {name: value for name, value in run.items() if isinstance(value, str | int | float)}
    return {"facts": facts, "settings": run.get("settings", {}), "loss": loss}


def read_data(output_dir, rows, training):
    """{task: {split: {reason: rows}}} of the data set with these test rows, as build_dataset.py counted; or None.

    Where `training` is shown beside it, it must be that of its train rows, too.
    """
    report = read_json(Path(output_dir) / "dataset_report.json")
    with suppress(KeyError, TypeError, AttributeError):
        trained_on = read_json(Path(output_dir) / "adapter" / "run.json")["run"]["train rows"] if training else ""
        splits = report["splits"]
        if splits["test"]["sha256"].startswith(rows) and splits["train"]["sha256"].startswith(trained_on):
            return {task: part["counts"] for task, part in report["tasks"].items()}


def print_table(task, result):
    """The scores of one task; per comparison: the first system, the other, difference, its interval, p after Holm."""
    scores, (first, *others) = page.scores_of(result), result["intervals"]
    main, title = (page.MAIN_SCORE[task], "perplexity"), f"{task} ({result['examples']} examples)"
    for name in others or [first]:
        shown = [first, name] if others else [first]
        heads = "".join(f"{system[:8]:>9}" for system in shown)[1:]
        say(f"\n{title:<25}{heads}  {'difference, 95 % interval  p (Holm)' if others else '95 % interval'}")
        for metric in [metric for metric in scores[first] if metric in scores[name]]:
            values = "".join(f"{short(scores[system][metric]):>9}" for system in shown)
            beside = "  " + between(result["intervals"][first].get(metric))
            if others:
                test = result["comparisons"][name].get(metric, {})
                p = p_value(test["p_holm"]) if "p_holm" in test else ""
                gain = short(scores[name][metric] - scores[first][metric], "+")
                beside = f"{gain:>9} {between(test.get('interval'), '+'):<20}{p:>8}"
            say(f"{metric:<24}{values}{beside}".rstrip())
        tests = result["comparisons"].get(name, {})
        least = {metric: tests.get(metric, {}).get("minimum_detectable") for metric in main}
        if told := ", ".join(f"{short(value)} in {metric}" for metric, value in least.items() if value):
            say(f"visible from: {told} (by 4 of 5 such tests)")
    for name, seeds in result["seeds"].items():
        values = {metric: [scores[metric] for scores in seeds.values() if metric in scores] for metric in main}
        told = [f"{metric} {short(min(of))} to {short(max(of))}" for metric, of in values.items() if of]
        say(f"{len(seeds)} trainings of {name[:16]}: {', '.join(told)}")
    for one, other, count in result.get("equal_predictions", ()):
        say(f"equal predictions of {one[:16]} and {other[:16]}: {count} of {result['examples']}")
    if note := result.get("rouge_note"):
        say(note)
    for name, count in result["too_long"].items():
        more = "" if task == SWAPPED else ": wrong answers, and not in its perplexity"
        say(f"{count} of them were too long for the model of {name}{more}")


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


@script
def main(argv=None):
    args = parse_args(argv)
    tasks = read_all(args)
    swapped = tasks.pop(SWAPPED, None)
    if not tasks:
        fail("swapped questions are told beside the plain ones: give the files of those, too")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):  # an OSError, if any, before a judge is paid
        pass
    judged, counts = {}, {}
    if args.judge_model:
        from pipeline.scoring import judge

        judged, counts = judge.judge(tasks, args)
    report = {task: score_task(task, rows, args) for task, rows in tasks.items()}
    for task, judgements in judged.items():
        report[task]["judge"] = judge.report(task, report[task], judgements, args) | counts
    if swapped:
        report[SWAPPED] = swap.score(swapped, args)
    adjust(report)
    tested, weights = made_from(tasks, "adapter"), folder / "adapter" / "adapter_model.safetensors"
    adapter = sha256(weights) if weights.is_file() else ""
    training = read_training(folder, adapter) if adapter.startswith(tested) else None
    stale = adapter and not (args.predictions or adapter.startswith(tested) or tested == "unknown")
    report |= {
        "other_adapter": OTHER_ADAPTER if stale else None,
        "training": training,
        "data": read_data(folder, made_from(tasks, "rows"), training),
        "versions": versions("evaluate", "matplotlib", "numpy", "rouge_score", "sacrebleu"),
        "settings": {**vars(args), "stemmer": True},
    }
    html = page.page(report, tasks)
    write_whole(folder / "evaluation.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "evaluation.html", html)
    for task in tasks:
        print_table(task, report[task])
        if "judge" in report[task]:
            print_judge(report[task]["judge"])
    if swapped:
        print_table(SWAPPED, report[SWAPPED])
        say("% of answers: follows_context, the one in the context; from_memory, the true one")
    if stale:
        say(f"\nwarning: {OTHER_ADAPTER}")
    say(f"\nwrote {folder / 'evaluation.html'} and {folder / 'evaluation.json'}")


if __name__ == "__main__":
    main()
