"""Score the predictions of test_llama.py, or of any other system, with intervals, tests and one page to read them on.

Scores run from 0 to 100, each with a 95 % bootstrap interval; every other system is compared with the first one, the
base, on the same rows. The main scores of a task are tested, the others are exploratory. NAME@SEED are trainings of
one system: its score is their mean, and its intervals and tests allow for other rows and other seeds. A language
model judges the predictions where JUDGE_MODEL names one; its key is read from OPENAI_API_KEY alone. Needs neither
torch nor, without a judge, the network.

Reads:  OUTPUT_DIR/samsum_predictions.json and the same file of each other task, if it exists. Each
        samsum_predictions_NAME.json of the same rows is one more system, called NAME.
        With --predictions, only the files that it names. A file needs no more than {"task": "samsum", "examples":
        [{"references": ["..."], "prediction": "..."}]}. It may also contain only the examples, one on each line, each
        with its "task" or with a prompt that ends like those of build_dataset.py.
        For the page also OUTPUT_DIR/dataset/, dataset_report.json and adapter/, if they belong to the predictions.
Writes: OUTPUT_DIR/evaluation.html and evaluation.json, which has every number of the page; with a judge also
        judge_cache.jsonl, which a rerun or an interrupted run reads instead of asking again.

    python evaluations.py
    python evaluations.py --predictions base=base.json mine=mine.json theirs=theirs.json --output-dir outputs/mine
    python evaluations.py --predictions base=0.json tuned@0=0.json tuned@1=1.json tuned@2=2.json  # trained three times
    python evaluations.py --judge-model Qwen3-8B --judge-url http://127.0.0.1:8000/v1 --judge-max-examples 200
"""

import json
import os
import re
import sys
import tempfile
import textwrap
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from pipeline import figures
from pipeline.files import built_tasks, read_json, refuse_another, sha256, write_whole
from pipeline.scoring import page, significance
from pipeline.scoring.prediction_files import RESERVED, SWAPPED, Rows, find_files, leave_out, read_file, systems_of
from pipeline.script import fail, say, script, table, versions
from pipeline.settings import check_url, parse_settings
from pipeline.texts import BadData
from tasks import TASKS, swapped

# Settings: edit here, or override for one run on the command line.
PREDICTIONS = ()  # prediction files: FILE, NAME=FILE or NAME@SEED=FILE (one training of NAME); empty: OUTPUT_DIR's
RESAMPLES = 10_000  # number of resamples of the bootstrap and of the randomisation tests
SEED = 0  # random seed of the resamples and of the rows a judge sees
JUDGE_MODEL = ""  # a model that judges the predictions; empty: none
JUDGE_URL = "https://api.openai.com/v1"  # any OpenAI-compatible server: OpenAI, vLLM, transformers serve
JUDGE_MAX_EXAMPLES = 0  # rows per task to judge; required with a judge, because requests cost money
JUDGE_CONCURRENCY = 8  # number of parallel requests
JUDGE_TIMEOUT = 60.0  # a request is given up after this many seconds times JUDGE_CONCURRENCY
OUTPUT_DIR = "outputs"  # folder that contains the predictions and gets evaluation.json and evaluation.html

# Fixed
CHOICES = {"PREDICTIONS": (0, list), "RESAMPLES": (int,), "JUDGE_CONCURRENCY": (int,), "JUDGE_TIMEOUT": (float,)}
CHOICES |= dict.fromkeys(("SEED", "JUDGE_MAX_EXAMPLES"), (0, int))
SCORED = TASKS | {SWAPPED: swapped}
NAME = re.compile(r"([^\s/@=]+(?:@[^\s/@=]+)?)=(.+)", re.DOTALL)  # --predictions NAME=FILE or NAME@SEED=FILE
OTHER_ADAPTER = "these scores are of another adapter than adapter/ has now: run test_llama.py --overwrite for its own"
OTHER_ROWS = "these scores are of other test rows than dataset/ has now: run test_llama.py --overwrite for those"
SAME_RUN = ("adapter", "weights", "rows", "4_bit")  # what the predictions of two tasks must have in common


def parse_args(argv=None):
    args = parse_settings(sys.modules[__name__], argv, CHOICES)
    check_url("--judge-url", args.judge_url)
    if args.resamples > 1_000_000:
        fail("--resamples can be at most 1000000: memory grows with them, and 10000 give stable intervals")
    if args.judge_model and not args.judge_max_examples:
        fail("a judge costs time or money: say how many examples of each task with --judge-max-examples")
    return args


def read_all(args):
    """{task: Rows} of the files of --predictions, or of those of test_llama.py in OUTPUT_DIR."""
    default = [f"{args.output_dir}/{task}_predictions{end}.json" for end in ("", f"_{SWAPPED}") for task in TASKS]
    paths = args.predictions or [path for path in default if Path(path).exists()]
    if not paths:
        fail(f"no predictions at {args.output_dir}: run test_llama.py first")
    templates = {task: built["prompt"] for task, built in built_tasks(args.output_dir, TASKS).items()}
    remedy = "" if args.predictions else ": run test_llama.py --overwrite"
    tasks, files = {}, []
    for text in paths:
        named = None if Path(text).exists() else NAME.fullmatch(text)
        name, path = named.groups() if named else (None, text)
        path = os.path.expanduser(path)
        if name and name.partition("@")[0] in RESERVED:
            fail(f"--predictions {text}: a system cannot be called {name}, choose another name")
        try:
            files += [(name, path, data) for data in read_file(path, templates)]
        except BadData as error:
            fail(f"{error}{remedy}")
    if not args.predictions:
        files += find_files(args.output_dir, templates, [data for _, _, data in files])
    leave_out([data for _, _, data in files])
    for name, path, data in files:
        if data.task not in tasks:
            tasks[data.task] = Rows(
                task=SCORED[data.task],
                template=templates.get(data.task),
                file=path,
                examples=data.examples,
            )
        rows = tasks[data.task]
        for system, values in systems_of(name, path, data, rows).items():
            if system in rows.systems:
                fail(f"{path} is a second file for {data.task}: name both, --predictions a={rows.file} b={path}")
            values.found = bool(name) and not args.predictions
            rows.systems[system] = values
        for system, seeds in significance.by_system(rows.systems).items():
            if "" in seeds and len(seeds) > 1:
                fail(f"{path}: {system} is there without a seed, too: name each of its files {system}@SEED=FILE")
    if not args.predictions:
        refuse_two_runs(tasks)
    add_prompts(args.output_dir, tasks)
    if list(tasks) == [SWAPPED]:
        fail("swapped questions are shown beside the plain ones: give the files of those, too")
    return {task: tasks[task] for task in SCORED if task in tasks}


def refuse_two_runs(tasks):
    """Exit 2 where the tasks' predictions in OUTPUT_DIR are of two adapters, bases or data sets."""
    first, *others = [next(iter(rows.systems.values())) for rows in tasks.values()]
    for other in others:
        expected, found = first.made_from or {}, other.made_from or {}
        shared = {name: expected[name] for name in SAME_RUN if name in expected and name in found}
        flag = " --swap-answers" if found.get("swap_answers") else ""
        refuse_another(f"{other.file}, beside {first.file},", found, shared, f"run test_llama.py{flag} --overwrite")


def add_prompts(output_dir, tasks):
    """The prompts of the test split in OUTPUT_DIR/dataset, for examples without one that have the same references.

    Files that note their rows get the prompts of those alone: another build may ask the same with other contexts.
    """
    from datasets import load_from_disk

    folder, noted = f"{output_dir}/dataset/test", made_from(tasks, "rows")
    if noted not in ("unknown", read_json(f"{folder}/state.json").get("_fingerprint")):
        return
    prompts = {}
    with suppress(Exception):  # whatever the libraries raise, it is no data set of ours: the page shows no prompts
        prompts = {(row["id"], *row["references"]): row["prompt"] for row in load_from_disk(folder)}
    for example in [example for rows in tasks.values() for example in rows.examples]:
        if not example.swapped:  # else its context was another one
            example.prompt = example.prompt or prompts.get((example.id, *example.references))


def adjust(results):
    """Put `p_holm` and `significant` into every test; those of two systems on one task are a family."""
    for result in results.values():
        judged = result.get("judge", {"comparisons": {}})["comparisons"]
        for system, by_metric in result["comparisons"].items():
            tests = [*by_metric.values(), *judged.get(system, {}).values()]
            tests = [test for test in tests if "p_value" in test]
            for test, adjusted in zip(tests, significance.holm([test["p_value"] for test in tests]), strict=True):
                test |= {"p_holm": adjusted, "significant": adjusted < significance.LEVEL}


def percent_of(systems, column):
    """{system: percent of the answers of all its seeds for which a column of System is true}, where it is known."""
    known = {name: [getattr(system, column) for system in seeds.values()] for name, seeds in systems.items()}
    return {name: round(100 * float(np.mean(answers)), 4) for name, answers in known.items() if None not in answers}


def measure_groups(by_sums, tables, inside, args):
    """Scores of the rows whose context holds the answer and of the others; {} where there are no others."""
    groups = {}
    for label, wanted in (("in the context", True), ("not in the context", False)):
        pick = np.array([value is wanted for value in inside])
        if pick.any() and not all(inside):
            part = {name: table[pick] for name, table in tables.items()}
            groups[label] = significance.measure(by_sums, part, args)
    return {"answer_in_context": groups} if groups else {}


def score_task(rows, args):
    """Everything evaluation.json says about a task; {system: {metric: 0 to 100}} is at its top level."""
    from pipeline.scoring import metrics

    references, task, tables = rows.column("references"), rows.task, {}
    for name, system in rows.systems.items():
        swapped_in = rows.column(SWAPPED)
        tables[name] = metrics.table_of(task, references, system.predictions, swapped_in, system.losses)
    columns, by_sums = metrics.means(task), partial(metrics.corpus_scores, task)
    whole = significance.measure(by_sums, tables, args)
    systems, with_rows = significance.by_system(rows.systems), columns | {"perplexity": -2}
    result = {
        "examples": len(references),
        "ids": rows.column("id"),
        "files": {name: system.file for name, system in rows.systems.items()},
        "made_from": {name: system.made_from for name, system in rows.systems.items()},
        "bits": {name: [*seeds.values()][0].bits for name, seeds in systems.items()},
        "cut_off": percent_of(systems, "cut_off"),
        "empty": percent_of(systems, "empty"),
        "too_long": {name: system.too_long for name, system in rows.systems.items() if system.too_long},
        "perplexity": {},
        "general_text": {name: system.general_text for name, system in rows.systems.items() if system.general_text},
        "intervals": whole["intervals"],
        "seeds": whole["seeds"],
        "rouge_note": metrics.rouge_note(references) if set(metrics.ROUGES) & set(task.SCORES) else "",
        "blanks_note": metrics.blanks_note(references) if "f1" in task.SCORES or "bleu" in task.SCORES else "",
        "comparisons": significance.compare(by_sums, tables, with_rows, whole["differences"], task.MAIN_SCORES, args),
        "groups": measure_groups(by_sums, tables, rows.column("answer_in_context") or [], args),
        "per_example": {},
    }
    for name, scored in tables.items():
        result["per_example"][name] = {metric: np.round(scored[:, i], 4).tolist() for metric, i in columns.items()}
    single = {name: system for name, seeds in systems.items() for system in seeds.values() if len(seeds) == 1}
    for name in systems:
        result[name] = whole["scores"][name] | metrics.signatures(task, references)
        perplexity = {"perplexity": result[name].pop("perplexity", None)}
        if name in single and single[name].perplexity:
            perplexity = single[name].perplexity  # as the file says, with its tokens
        if perplexity["perplexity"] and "perplexity" in task.SCORES:
            result["perplexity"][name] = perplexity
    result["equal_predictions"] = [
        [one, other, sum(map(str.__eq__, single[one].predictions, single[other].predictions))]
        for one, other in combinations(single, 2)
    ]
    return result


def made_from(tasks, name):
    """The fingerprint that all prediction files note under `name`; "unknown" where they differ, or one has none.

    Files that were found beside those of test_llama.py do not count: an adapter's training is shown beside any others.
    """
    systems = [system for rows in tasks.values() for system in rows.systems.values() if not system.found]
    noted = {str((system.made_from or {}).get(name)) for system in systems}
    return noted.pop() if len(noted) == 1 and len(min(noted)) >= 16 else "unknown"


def read_run(args, tasks):
    """What OUTPUT_DIR says of the run that made the predictions: its training, its data, each None of another run.

    training: facts, settings and loss {curve: [[step, loss]]}; data: {task: {split: {reason: rows}}} of the data set
    with the predictions' test rows and, where the training is known, its train rows.
    """
    folder, tested, tested_on = Path(args.output_dir), made_from(tasks, "adapter"), made_from(tasks, "rows")
    weights, training, data = folder / "adapter" / "adapter_model.safetensors", None, None
    adapter = sha256(weights) if weights.is_file() else ""
    run = read_json(folder / "adapter" / "run.json")
    if adapter.startswith(tested) and run.get("adapter_sha256") == adapter:
        facts = {name: value for name, value in run.items() if isinstance(value, str | int | float)}
        loss = figures.read_losses(folder / "adapter" / "log.jsonl")
        training = {"facts": facts, "settings": run.get("settings", {}), "loss": loss}
    with suppress(KeyError, TypeError, AttributeError):  # of what is not there, or not ours
        report = read_json(folder / "dataset_report.json")
        trained_on = run["run"]["train rows"] if training else ""
        train, test = (report["splits"][split]["sha256"] for split in ("train", "test"))
        if train.startswith(trained_on) and test.startswith(tested_on):
            data = {task: part["counts"] for task, part in report["tasks"].items()}
    rows = read_json(folder / "dataset" / "test" / "state.json").get("_fingerprint")
    other_adapter = adapter and not (args.predictions or adapter.startswith(tested) or tested == "unknown")
    other_rows = rows and not args.predictions and tested_on not in ("unknown", rows)
    return {
        "other_adapter": OTHER_ADAPTER if other_adapter else None,
        "other_rows": OTHER_ROWS if other_rows else None,
        "training": training,
        "data": data,
    }


def shown(systems):
    """{system: its name as tables show it}: long ones lose their middle, unless two would be the same then."""
    short = {name: name if len(name) <= 18 else f"{name[:8]}..{name[-8:]}" for name in systems}
    return short if len(set(short.values())) == len(short) else {name: name for name in systems}


def score_lines(task, result):
    """The table of a task's scores, main ones first: one other system is beside the first, several are below it."""
    scores, (first, *others), names = page.scores_of(result), result["intervals"], shown(result["intervals"])
    several = len(others) > 1 or max(map(len, result["intervals"])) > 7
    head = ["", names[first], "95 % interval"]
    if others:
        head = ["", first if len(first) <= 7 else "first", "" if several else others[0]]
        head += ["diff.", "95 % interval", "p (Holm)"]
    lines = [head]

    def add(label, of_first, cells):
        if several:
            lines.append([label, *of_first])
            lines.extend([f"  {names[other]}", "", *cells[other]] for other in cells)
        else:
            lines.append([label, *of_first, *sum(cells.values(), [])])

    for metric in page.main_first(task, scores[first]):
        if metric in task.MAIN_SCORES or any(by_metric.get(metric) for by_metric in scores.values()):  # else zeros
            of_first = [short(scores[first][metric])]
            if not others:
                of_first.append(between(result["intervals"][first].get(metric)))
            both = [other for other in others if metric in scores[other]]
            add(metric, of_first, {other: compared(task, result, metric, scores, other) for other in both})
    for label, shares in page.endings(result).items():
        texts = {system: [f"{shares[system]:.0f} %" if system in shares else ""] for system in (first, *others)}
        add(label, texts.pop(first), texts)
    return [line + [""] * (len(head) - len(line)) for line in lines]


def compared(task, result, metric, scores, other):
    """A system's score, its difference to the first system's, its interval, p after Holm."""
    first = next(iter(scores))
    before, after = scores[first][metric], scores[other][metric]
    test = result["comparisons"][other].get(metric, {})
    p = page.p_value(test["p_holm"]) if "p_holm" in test else "" if metric in task.MAIN_SCORES else "expl."
    counted = metric == "perplexity" and any("nll_sum" in result[metric][system] for system in (first, other))
    difference = short(after - before, "+") if test or not counted else ""  # over other tokens it means nothing
    return [short(after), difference, between(test.get("interval"), "+"), p]


def print_task(name, task, result):
    """The scores of one task, and what there is to say of them."""
    (first, *others), names = result["intervals"], shown(result["intervals"])
    main = (task.MAIN_SCORES[0], "perplexity")
    say(f"\n{name} ({result['examples']:,} examples{f'; first: {first}' if others and len(first) > 7 else ''})")
    table(score_lines(task, result))
    for other in others:
        tests = result["comparisons"][other]
        least = {metric: tests.get(metric, {}).get("minimum_detectable") for metric in main}
        if visible := ", ".join(f"{short(value)} in {metric}" for metric, value in least.items() if value):
            say(f"visible from: {visible}{f' (of {names[other]})' if len(others) > 1 else ''}")
    if bits := ", ".join(f"{names[system]} {count}" for system, count in result["bits"].items() if count):
        say(f"bits of the weights: {bits}")
    for system, seeds in result["seeds"].items():
        values = {metric: [scores[metric] for scores in seeds.values() if metric in scores] for metric in main}
        ranges = [f"{metric} {short(min(of))} to {short(max(of))}" for metric, of in values.items() if of]
        say(f"{len(seeds)} trainings of {names[system]}: {', '.join(ranges)}")
    for one, other, count in result["equal_predictions"]:
        say(f"equal predictions of {names[one]} and {names[other]}: {count:,} of {result['examples']:,}")
    notes = [textwrap.fill(note, 80) for note in page.notes(name, task, result)]
    for note in filter(None, (result["rouge_note"], result["blanks_note"], getattr(task, "ABOUT", ""), *notes)):
        say(note)
    judge = result.get("judge", {"scores": {}})
    for system, judged in judge["scores"].items():  # never the judge's alone
        values = ", ".join(f"{metric} {value:.2f}" for metric, value in judged.items())
        agrees = ", ".join(f"{m} {part['agreement']:.0f} %" for m, part in judge["agreement"][system].items())
        say(f"judged, {judge['examples']:,} examples, {system}: {values}; agrees with {agrees}")


def short(value, sign=""):
    """Two decimals, or the magnitude of a number too long for its column."""
    return f"{value:{sign}.2f}" if abs(value) < 10_000 else f"{value:{sign}.1e}"


def between(ends, sign=""):
    return "[" + ", ".join(short(end, sign) for end in ends) + "]" if ends else ""


@script
def main(argv=None):
    args = parse_args(argv)
    tasks = read_all(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):  # an OSError, if any, before a judge is paid
        pass
    report = {task: score_task(rows, args) for task, rows in tasks.items()}
    if args.judge_model:
        from pipeline.scoring import judge

        judge.judge(tasks, report, args)
    adjust(report)
    report |= read_run(args, tasks) | {
        "date": page.date_of_evaluation(),
        "versions": versions("evaluate", "matplotlib", "numpy", "rouge_score", "sacrebleu"),
        "settings": {**vars(args), "stemmer": True},
    }
    html = page.page(report, tasks)
    write_whole(folder / "evaluation.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "evaluation.html", html)
    for task, rows in tasks.items():
        print_task(task, rows.task, report[task])
    if any(report[task]["comparisons"] for task in tasks):
        say("\np is corrected for the main scores of two systems, intervals are not;")
        say("visible from: the smallest true difference that 4 of 5 such tests would show;")
        say("expl.: an exploratory score, not tested")
    for warning in filter(None, (report["other_adapter"], report["other_rows"])):
        say(f"\nwarning: {warning}")
    say(f"\nwrote {folder / 'evaluation.html'} and {folder / 'evaluation.json'}")


if __name__ == "__main__":
    main()
