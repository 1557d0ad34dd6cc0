"""Build one data set from samsum (dialogue summaries), trivia_qa (question answering), your own rows, or all three.

Cleans the rows, puts each into the prompt of its task, drops rows without a usable answer and rows of train and
validation that are also in test, and shuffles the tasks together. If there is no file for validation or test, its rows
are taken out of train.

Reads:  for each task a hub id, a local folder with the files of the hub repository, or a single file.
Writes: OUTPUT_DIR/dataset/ (a DatasetDict: train, validation, test; tasks.json) and OUTPUT_DIR/dataset_report.json.

    python build_dataset.py
    python build_dataset.py --samsum tests/fixtures/samsum --trivia-qa tests/fixtures/trivia_qa
    python build_dataset.py --own rows.csv --own-prompt "Question: {question}" --own-completion answer
"""

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import huggingface_hub  # loads its parts where they are used
import pyarrow

import tasks
from pipeline.files import hub_has_listed, only_run_in, put_back, sha256, whole_folder, write_whole
from pipeline.rows import SUFFIXES, read_first, read_rows, render_places
from pipeline.script import fail, git_commit, progress, say, script, table, versions, why_no_download
from pipeline.settings import flag_of, parse_settings
from pipeline.texts import BadData, NearTexts, form_of, one_line

# Settings: edit here, or override for one run on the command line.
SAMSUM = "knkarthick/samsum"  # dialogues: a hub id, a folder with train.csv, validation.csv, test.csv, or one file
TRIVIA_QA = "mandarjoshi/trivia_qa"  # questions: a hub id, a folder with TRIVIA_QA_CONFIG/*.parquet, or one file
TRIVIA_QA_CONFIG = "rc.wikipedia"  # part of trivia_qa: a folder of its repository
OWN = ""  # your rows: a CSV, JSON, JSONL or parquet file, a folder of such files named by split, or a hub id
OWN_PROMPT = "{prompt}"  # prompt template with columns of OWN in braces, such as "Question: {question}\nAnswer:"
OWN_COMPLETION = "completion"  # column of OWN with the answers
TASKS = ["samsum", "trivia_qa"]  # tasks to build, of samsum, trivia_qa and own; --own FILE alone builds only own
CONTEXT = "question"  # context of a question: question (passages nearest to it), first (first words of pages), none
MAX_CONTEXT_WORDS = 300  # length limit of a question's context, in words
TRAIN_EXAMPLES_PER_TASK = 5000  # training rows per task, drawn at random; 0 = all
VALIDATION_EXAMPLES_PER_TASK = 200  # validation rows per task; 0 = all; if taken from train, at most a tenth of it
TEST_EXAMPLES_PER_TASK = 500  # test rows per task; 0 = all; if taken from train, at most a tenth of it
SEED = 0  # random seed for drawing and shuffling rows
NUM_PROC = 0  # number of processes that choose contexts; 0 = one per CPU
OUTPUT_DIR = "outputs"  # folder that gets dataset/ and dataset_report.json

# Fixed
CHOICES = {
    "TASKS": (list, *tasks.TASKS),
    "CONTEXT": ("question", "first", "none"),
    "MAX_CONTEXT_WORDS": (int,),
}
CHOICES |= dict.fromkeys(("TRAIN_EXAMPLES_PER_TASK", "VALIDATION_EXAMPLES_PER_TASK"), (0, int))
CHOICES |= dict.fromkeys(("TEST_EXAMPLES_PER_TASK", "SEED", "NUM_PROC"), (0, int))
SPLITS = ("train", "validation", "test")
FEW_ROWS = 10  # of test: with fewer, evaluations.py trusts no interval


class Row(NamedTuple):  # as it was drawn, not yet rendered
    id: str
    key: str  # what two rows must share to be the same; "" where there is no text
    source: dict | tuple  # its columns, or where these are: (file, row group, row)


def parse_args(argv=None):
    args = parse_settings(sys.modules[__name__], argv, CHOICES)
    if not re.fullmatch(r"[\w.-]+", args.trivia_qa_config):
        fail("--trivia-qa-config must be the name of a folder")
    flags = {str(word).split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    sources = [name for name in tasks.TASKS if getattr(args, name)]
    named = [name for name in sources if flag_of(name) in flags or name == "own"]
    if named and "--tasks" not in flags:  # whoever names a source wants that one
        if set(named) != set(args.tasks):
            say(f"building only {' and '.join(named)}; --tasks names more")
        args.tasks = named
    if "--own" in flags and args.own and "own" not in args.tasks:
        fail("--own is given, but own is not among --tasks: add it, or leave out --own")
    if "own" not in args.tasks and (args.own_prompt, args.own_completion) != (OWN_PROMPT, OWN_COMPLETION):
        fail("--own-prompt and --own-completion are for rows of --own: give that, too")
    args.own_prompt = args.own_prompt.replace("\\n", "\n").rstrip()  # as a shell writes a line's end
    args.tasks = sorted(set(args.tasks))
    return args


def find_files(name, args):
    """{split: paths} of a task's source, and what the report says of it; a single file is train's."""
    source, revision = getattr(args, name), None
    if not source:
        fail(f"--tasks names {name}, but {flag_of(name)} is empty: give a file, a folder or a hub id with it")
    path = Path(source)
    if path.is_file():
        root, files = path.parent, {"train": [path]}
    else:
        root, revision, files = find_in_folder(name, source, path, args)
    hashes = {path.relative_to(root).as_posix(): sha256(path) for paths in files.values() for path in paths}
    return files, {"source": source, "revision": revision, "licence": tasks.TASKS[name].LICENCE, "sha256": hashes}


def find_in_folder(name, source, root, args):
    """(folder, its commit on the hub or None, {split: sorted paths}) of a source that is a folder or a hub id."""
    task, revision, place = tasks.TASKS[name], None, source
    remedy = f"get it again, laid out as --help says of {flag_of(name)}, and nothing else into it"
    network = f"check name and network, or give a local folder with {flag_of(name)}"
    patterns, needed = patterns_of(task, args), task.NEEDED
    if not root.is_dir():
        if source.startswith((".", "/", "~")) or root.suffix.lower() in SUFFIXES or source.count("/") > 1:
            reason = f"cannot load {source} (no such file)"
            fail(f"{name}: {reason}: give a hub id, a file or a local folder with {flag_of(name)}")
        wanted = [pattern for of_split in patterns.values() for pattern in of_split]
        try:
            root = Path(huggingface_hub.snapshot_download(source, repo_type="dataset", allow_patterns=wanted))
            reached = hub_has_listed(root)
        except huggingface_hub.errors.IncompleteSnapshotError as error:
            root, reached = Path(error.snapshot_path), False
        except Exception as error:  # a dozen kinds, from no network to a full disk
            fail(f"{name}: cannot load {source} ({why_no_download(error)}): {network}")
        revision = root.name  # the hub's cache names a folder by its commit
        if not reached:
            place, remedy = f"the cache of {source}, and the hub could not be reached", network
    elif not any(in_folder(root, of_split) for of_split in patterns.values()):
        patterns, needed = tasks.own.FILES, tasks.own.NEEDED  # files of your own, named by split
        remedy = f"give a file, a folder with train.csv or .json and so on, or what --help says of {flag_of(name)}"
    files, faults = {}, []
    for split, of_split in patterns.items():
        found = in_folder(root, of_split)  # of the first name of a split that has any: validation goes before dev
        found = sorted(path for path in found if first_word(path) == first_word(found[0]))
        parts = {int(number) for path in found for number in re.findall(r"-\d+-of-(\d+)[-.]", path.name)} or {1}
        if found:
            files[split] = found
        elif split in needed:
            faults.append(f"no {of_split[0]}")
        if found and parts != {len(found)}:
            faults.append(f"{len(found)} files {of_split[0]} where there should be {max(parts)}")
    if faults:
        fail(f"{name}: {' and '.join(faults)} in {place}: {remedy}")
    unread = sorted(path.name for path in set(in_folder(root, ["*", "data/*"])).difference(*files.values()))
    if unread and not revision:
        say(f"{name}: not read: {', '.join(unread[:5])}{' and others' if len(unread) > 5 else ''}")
    return root, revision, files


def in_folder(root, patterns):
    """The data files in a folder that the patterns name, in their order."""
    return [path for pattern in patterns for path in root.glob(pattern) if path.suffix.lower() in SUFFIXES]


def first_word(path):
    return re.match("[a-z]*", path.name)[0]


def patterns_of(task, args):
    """{split: patterns} of a task's files, as they are on the hub."""
    return {split: [one.format_map(vars(args)) for one in of_split] for split, of_split in task.FILES.items()}


def read_file(name, path, large, args, counts):
    """The Rows of a file; of a large one only what makes their keys is read."""
    task, rows = tasks.TASKS[name], []
    if large:
        id_column, _ = task.READ_FIRST
        first = read_first(path, task.READ_FIRST, task.COLUMNS)
        return [Row(one_line(row[id_column]), task.key(row), place) for place, row in first]
    prepared = task.prepare(read_rows(path, counts), args)
    try:
        for row in prepared:
            row_id = row.get("id", f"{path.stem}-{len(rows) + 1}")
            rows.append(Row(one_line(row_id), task.key(row), row))
    except BadData as error:
        fail(f"{name}: row {len(rows) + 1} of {path}: {error}")
    return rows


def draw_rows(name, files, large, args, counts):
    """{split: [Row]}: all rows, in an order drawn with the seed."""
    rows = {
        split: [row for path in paths for row in read_file(name, path, large, args, counts[split])]
        for split, paths in files.items()
    }
    take_from_train(name, rows, args, counts["train"])
    return {split: random.Random(args.seed).sample(rows[split], len(rows[split])) for split in SPLITS}


def take_from_train(name, rows, args, counts):
    """Move a tenth of train's rows, or as many as can be needed, to each split that has no file.

    Rows that are the same go together (where many are, nothing would be left of train), and so do rows about one text:
    what a question asks about a text that was trained on, a model may know from there.
    """
    missing = [split for split in ("test", "validation") if split not in rows]
    if not missing:
        return
    left = random.Random(args.seed).sample(rows["train"], len(rows["train"]))
    # rows with an empty text go last: they are of no use, and a split of nothing else would be empty
    left.sort(key=lambda row: isinstance(row.source, dict) and "" in row.source.values())
    texts = [isinstance(row.source, dict) and row.source.get("context") for row in left]
    groups = [text or row.key or row.id for text, row in zip(texts, left, strict=True)]
    if len(set(groups)) <= len(missing):
        groups = [row.key or row.id for row in left]
        if any(texts):
            say(f"{name}: warning: rows about one text are in several splits, so scores will be too good")
    same = defaultdict(list)
    for group, row in zip(groups, left, strict=True):
        same[group].append(row)
    if len(same) <= len(missing):
        unread = "".join(f" ({reason}: {count:,})" for reason, count in counts.items())
        reason = f"{len(same)} different rows in train{unread}, out of which {' and '.join(missing)} are taken, too"
        fail(f"{name}: {reason}: give more")
    tenth = max(1, len(same) // 10)
    for split in missing:
        size = min(tenth, with_spares(getattr(args, f"{split}_examples_per_task")) or tenth)
        rows[split] = [row for key in list(islice(same, size)) for row in same.pop(key)]
        share = len(rows[split]) / len(left)
        say(f"{name}: {len(rows[split]):,} rows for {split} are drawn out of train, {share:.1%}")
    rows["train"] = [row for group, row in zip(groups, left, strict=True) if group in same]


def with_spares(limit):
    """How many rows are drawn for so many to be left, since some are dropped later; 0 = all."""
    return 2 * limit + 50 if limit else 0


def draw(rows, limit, kept):
    """The next rows to look at, a list: all where there is no limit."""
    return list(islice(rows, with_spares(max(0, limit - len(kept))) if limit else None))


def take(rows, limit, others, render, counts):
    """{key: rendered row} of the first `limit` rows that can be used and some spares; counts all others by reason."""
    kept, ids = {}, set()
    while drawn := draw(rows, limit, kept):
        counts["drawn at random"] += len(drawn)
        for row, rendered in zip(drawn, render(drawn), strict=True):
            reason = why_not(row, others, kept, ids) or (rendered if isinstance(rendered, str) else None)
            if reason:
                counts[reason] += 1
            else:
                kept[row.key] = rendered
                ids.add(row.id)
    return kept


def why_not(row, others, kept, ids):
    """Why a row cannot be used after the rows of other splits and those kept of its own, or None."""
    if not row.id or not row.key:
        return "no text" if row.id else "no id"
    for other, texts in others.items():
        if row.key in texts.sizes:
            return f"also in {other}"
        if texts.near(row.key):
            return f"nearly in {other}"
    if row.key in kept:
        return "duplicate"
    return "duplicate id" if row.id in ids else None


@contextmanager
def processes(number):
    """A `map` over so many processes that end with this one; for one process, map itself."""
    if number == 1:
        yield map
        return
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), end_with_parent)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it: Ctrl-C is for this process
        for _ in range(number):
            pool.submit(int)  # starts a worker
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield pool.map
    except BrokenExecutor:
        fail("a process that chose contexts was killed, often for want of memory: try again with a lower --num-proc")
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent():
    """In a worker: end when the parent does; a killed build would leave its workers waiting for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def render_rows(name, split, args, each, rows):
    """[rendered row or reason] of rows; `each` is map, over processes or not."""
    task = tasks.TASKS[name]
    render = partial(task.render, split=split, settings=args)
    if all(isinstance(row.source, dict) for row in rows):
        rendered = [render(row.source) for row in rows]
    else:
        groups, results = defaultdict(list), {}
        for row in rows:
            groups[row.source[:2]].append(row.source)
        parts = each(partial(render_places, columns=task.columns(args), render=render), groups.values())
        for part in progress(parts, f"{name} {split}", total=len(groups)):
            results |= part
        rendered = [results[row.source] for row in rows]
    return [
        result if isinstance(result, str) else {"id": f"{name}:{row.id}", "task": name} | result
        for row, result in zip(rows, rendered, strict=True)
    ]


def build_task(name, files, args):
    """({split: rendered rows}, the task's part of the report)."""
    task, counts = tasks.TASKS[name], {split: Counter() for split in SPLITS}
    of_hub = [pattern for of_split in patterns_of(task, args).values() for pattern in of_split]
    large = bool(task.READ_FIRST) and any(path.match(pattern) for path in files["train"] for pattern in of_hub)
    drawn = draw_rows(name, files, large, args, counts)
    form = form_of(row.key for rows in drawn.values() for row in rows[:1000]) if task.ANY_FORM else None
    result, rates, others = {}, {}, {}
    number = args.num_proc or len(os.sched_getaffinity(0))  # CPUs that this process may use
    with processes(number if large else 1) as each:
        for split in ("test", "train", "validation"):  # test goes before train, and train before validation
            rows, limit = iter(drawn[split]), getattr(args, f"{split}_examples_per_task")
            render = partial(render_rows, name, split, args, each)
            usable = take(rows, limit, others, render, counts[split])
            kept = dict(islice(usable.items(), limit or None))
            result[split] = list(kept.values())
            found = sum(row["answer_in_context"] for row in usable.values())
            rates[split] = {args.context: found / max(1, len(usable) + counts[split]["answer not in context"])}
            counts[split] = {"available": len(drawn[split])} | counts[split]
            counts[split] |= {"usable but not needed": len(usable) - len(kept), "kept": len(kept)}
            near = sum(n for reason, n in counts[split].items() if reason.startswith("nearly in"))
            remedy = "split the file yourself, so that texts of one kind are in one split (docs/own_data.md)"
            if not kept:
                reasons = ", ".join(f"{reason}: {n}" for reason, n in counts[split].items())
                remedy = remedy if near else "check the source and the example counts"
                fail(f"{name}: no usable row for {split} ({reasons}): {remedy}")
            if 2 * near > counts[split]["drawn at random"]:
                say(f"{name}: warning: {near:,} rows of {split} are dropped, much like rows of other splits: {remedy}")
            # Spares and rows that were not looked at stay test's own, too: a later test may take more rows.
            others[split] = NearTexts([*usable, *(row.key for row in rows)] if split == "test" else kept, form)
    looked_up = "{context}" in task.PROMPT and args.context != "none"
    return result, {"counts": counts} | ({"answer_in_context": rates} if looked_up else {})


def save(built, seed, folder):
    """Combine and shuffle the tasks' rows, write them into `folder`; {split: {rows, sha256}} for the report."""
    from datasets import Dataset, DatasetDict, disable_progress_bars
    from datasets.table import InMemoryTable

    disable_progress_bars()
    splits, report = {}, {}
    test_prompts = {row["prompt"] for splits_of_task in built for row in splits_of_task["test"]}
    for split in SPLITS:
        rows = [row for splits_of_task in built for row in splits_of_task.pop(split)]
        if split != "test":  # within a task these are dropped before
            drawn, rows = rows, [row for row in rows if row["prompt"] not in test_prompts]
            if len(rows) < len(drawn):
                say(f"{split}: {len(drawn) - len(rows)} rows dropped, whose prompts are in another task's test")
        random.Random(seed).shuffle(rows)
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        report[split] = {"rows": len(rows), "sha256": digest.hexdigest()}
        columns = InMemoryTable(pyarrow.Table.from_pylist(rows))  # Dataset.from_list takes six times the rows' memory
        # The fingerprint by which train and test know these rows: of their content, on every machine the same.
        splits[split] = Dataset(columns, fingerprint=digest.hexdigest()[:32])
    DatasetDict(splits).save_to_disk(folder)
    return report


def print_report(name, part, row):
    """A row as the model sees it, and a table of what came in, what was dropped and why, and what was kept."""
    say(f"\n--- {row['id']} (prompt, then [completion]) ---\n{row['prompt']}[{row['completion']}]\n")
    counts, rates = part["counts"], part.get("answer_in_context")
    lines = [[name, *SPLITS]]
    reasons = dict.fromkeys(reason for split in SPLITS for reason in counts[split])
    for reason in sorted(reasons, key=lambda reason: reason in ("usable but not needed", "kept")):  # these two last
        lines.append([f"  {reason}", *(f"{counts[split].get(reason, 0):,}" for split in SPLITS)])
    if rates:
        shares = [f"{rate:.1%}" for split in SPLITS for rate in rates[split].values()]
        lines.append(["  answer in context, of all", *shares])
    table(lines)


@script
def main(argv=None):
    args = parse_args(argv)
    output, folder = Path(args.output_dir), Path(args.output_dir) / "dataset"
    with only_run_in(output):
        put_back(folder)
        if folder.exists() and not (folder / "dataset_dict.json").exists() and any(folder.iterdir()):
            fail(f"{folder} is no data set: move it away, or choose another --output-dir")
        say(f"making {folder} of {' and '.join(args.tasks)}")
        sources = {name: find_files(name, args) for name in args.tasks}
        prompts = {name: tasks.TASKS[name].template(args) for name in args.tasks}
        report = {
            "settings": {name: value for name, value in vars(args).items() if name not in ("num_proc", "output_dir")},
            "sources": {name: source for name, (_, source) in sources.items()},
            "prompts": prompts,
            "versions": versions("datasets"),
            "git_commit": git_commit(),
            "tasks": {},
        }
        built = []
        for name, (files, _) in sources.items():
            try:
                rows, report["tasks"][name] = build_task(name, files, args)
            except BadData as error:
                fail(f"{name}: {error}")
            print_report(name, report["tasks"][name], rows["train"][0])
            built.append(rows)
        with whole_folder(folder) as fresh:
            report["splits"] = save(built, args.seed, fresh)
            # Later scripts read prompts by these, whatever the tasks' files say by then
            asked = {name: {"prompt": prompts[name], "one_line": tasks.TASKS[name].ONE_LINE} for name in args.tasks}
            write_whole(fresh / "tasks.json", json.dumps(asked, indent=2) + "\n")
        write_whole(output / "dataset_report.json", json.dumps(report, indent=2) + "\n")
        tested = {name: part["counts"]["test"]["kept"] for name, part in report["tasks"].items()}
        for name in [name for name, rows in tested.items() if rows < FEW_ROWS]:
            say(f"{name}: the scores of {tested[name]} test rows will show nothing: give more rows")
        say(f"\nwrote {folder} and {output / 'dataset_report.json'}")


if __name__ == "__main__":
    main()
