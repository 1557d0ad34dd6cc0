"""Build one data set for two tasks: samsum (dialogue summarisation) and trivia_qa (answering from a context).

Cleans the rows, renders each with its task's prompt template, drops what cannot be learned from and what train and
validation share with test, and shuffles the tasks. The context of a question is chosen by the question alone.

Reads:  samsum and trivia_qa, each a hub id or a local folder laid out like the hub repository.
Writes: OUTPUT_DIR/dataset/ (a DatasetDict: train, validation, test) and OUTPUT_DIR/dataset_report.json.

    python build_dataset.py
    python build_dataset.py --samsum tests/fixtures/samsum --trivia-qa tests/fixtures/trivia_qa
"""

import csv
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import huggingface_hub  # loads its parts where they are used
import pyarrow.parquet

from pipeline.files import only_run_in, put_back, sha256, whole_folder, write_whole
from pipeline.script import fail, first_line, git_commit, progress, say, script, versions
from pipeline.settings import flag_of, parse_settings
from pipeline.texts import WORDS, holds, normalized

# Settings: edit here, or override for one run on the command line.
SAMSUM = "knkarthick/samsum"  # hub id or local folder with train.csv, validation.csv, test.csv
TRIVIA_QA = "mandarjoshi/trivia_qa"  # hub id or local folder with TRIVIA_QA_CONFIG/*.parquet
TRIVIA_QA_CONFIG = "rc.wikipedia"  # a folder of the trivia_qa repository
TASKS = ["samsum", "trivia_qa"]  # one alone trains a single-task model
CONTEXT = "question"  # question: the passages nearest to it; first: the first words; none: closed book, a control
MAX_CONTEXT_WORDS = 300  # words of the pages that go into a trivia_qa prompt
TRAIN_EXAMPLES_PER_TASK = 5000  # 0 = all; sampled before the work, so that a small run is quick
VALIDATION_EXAMPLES_PER_TASK = 200  # 0 = all (trivia_qa carves validation out of train: there, a tenth of it)
TEST_EXAMPLES_PER_TASK = 500  # 0 = all
SEED = 0  # of drawing and shuffling
NUM_PROC = 0  # processes that choose contexts; 0 = one per CPU
OUTPUT_DIR = "outputs"  # gets dataset/ and dataset_report.json

# Fixed
CHOICES = {
    "TASKS": (list, "samsum", "trivia_qa"),
    "CONTEXT": ("question", "first", "none"),
    "MAX_CONTEXT_WORDS": (int,),
}
CHOICES |= {"MAX_CONTEXT_WORDS": (int,)}
CHOICES |= dict.fromkeys(("TRAIN_EXAMPLES_PER_TASK", "VALIDATION_EXAMPLES_PER_TASK"), (0, int))
CHOICES |= dict.fromkeys(("TEST_EXAMPLES_PER_TASK", "SEED", "NUM_PROC"), (0, int))
PROMPTS = {  # the prompt ends without a blank and the completion begins with one, so both tokenizers split there
    "samsum": "Summarize the dialogue.\n\nDialogue:\n{dialogue}\n\nSummary:",
    "trivia_qa": "Answer the question from the context.\n\nContext:\n{context}\n\nQuestion: {question}\nAnswer:",
    "closed book": "Answer the question.\n\nQuestion: {question}\nAnswer:",
}
LICENCES = {"samsum": "CC BY-NC-ND 4.0", "trivia_qa": "Apache 2.0; its pages: Wikipedia, CC BY-SA"}
SPLITS = ("train", "validation", "test")
TRIVIA_QA_TEXTS = ("question", "question_id", "answer.value", "answer.aliases.*", "entity_pages.wiki_context.*")
PASSAGE_WORDS = 100  # a passage ends at the first sentence or line end after so many words
NEAR = 0.8  # share of the word 5-grams that two texts have in common from which they are near duplicates
LONG = 10  # 5-grams of a text (14 words) from which it is one that another may contain
BM25_K1, BM25_B = 1.2, 0.75  # Robertson & Zaragoza 2009; among a question's own pages, after Clark & Gardner 2017
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
SENTENCE_END = re.compile(r"([.!?\n][ \n]+)")  # after a blank was put behind every \n: 4 times as fast as with a |
STOP_WORDS = (  # left out of the query: rare in a page or not, they say nothing about where the answer stands
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in is it its "
    "may might must my no not of on or our s she should so t than that the their then there these they this those to "
    "was we were what when where which who whom whose why will with would you your"
)


class Row(NamedTuple):  # as it was drawn, not yet rendered
    id: str
    key: str  # what two rows must share to be the same; "" where there is no text
    place: tuple  # samsum: (dialogue, summary); trivia_qa: (file, row group, row), where question and pages are


class NearTexts:
    """Texts by the word 5-grams they hold: an inverted index, so that every similarity found is exact."""

    def __init__(self, keys):
        self.sizes = {}  # of a text: how many different 5-grams it has
        self.holders = defaultdict(list)
        for key in filter(None, dict.fromkeys(keys)):
            grams = word_5_grams(key)
            self.sizes[key] = len(grams)
            for gram in grams:
                self.holders[gram].append(key)

    def near(self, key):
        """The texts that share NEAR of the shorter one's 5-grams with this one, itself among them."""
        grams, near = word_5_grams(key), []
        shared = Counter(other for gram in grams for other in self.holders.get(gram, ()))
        for other, n in shared.items():
            sizes = len(grams), self.sizes[other]  # a text below LONG may be in others by chance: Jaccard
            if n / (min(sizes) if min(sizes) >= LONG else sum(sizes) - n) >= NEAR:
                near.append(other)
        return near


def word_5_grams(key):
    words = key.translate(WORDS).split() or [key]  # also where a script has no blanks between them, or of emoji
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def parse_args(argv=None):
    args = parse_settings(sys.modules[__name__], argv, CHOICES)
    if not re.fullmatch(r"[\w.-]+", args.trivia_qa_config):
        fail("--trivia-qa-config must be the name of a folder")
    args.tasks = sorted(set(args.tasks))
    return args


def find_files(task, args):
    """{split: sorted paths} of a task's source, and what the report says of it."""
    source, revision = getattr(args, task), None
    patterns = {split: f"{split}.csv" for split in SPLITS}
    if task == "trivia_qa":  # the hub's test has no answers: its validation is our test, ours is carved out of train
        folder = args.trivia_qa_config
        patterns = {"train": f"{folder}/train-*.parquet", "test": f"{folder}/validation-*.parquet"}
    root, place, remedy = source, source, "get it again, laid out like the hub repository, and nothing else into it"
    network = f"check name and network, or give a local folder with {flag_of(task)}"
    if not Path(root).is_dir():
        try:
            root = huggingface_hub.snapshot_download(source, repo_type="dataset", allow_patterns=[*patterns.values()])
            reached = Path(root, f"../../trees/{Path(root).name}.json").exists()  # what the hub says that it has
        except huggingface_hub.errors.IncompleteSnapshotError as error:
            root, reached = error.snapshot_path, False
        except Exception as error:  # a dozen kinds, from no network to a full disk
            fail(f"{task}: cannot load {source} ({first_line(error)}): {network}")
        revision = Path(root).name  # the hub's cache names a folder by its commit
        if not reached:
            place, remedy = f"the cache of {source}, and the hub could not be reached", network
    files, faults = {}, []
    for split, pattern in patterns.items():
        files[split] = sorted(Path(root).glob(pattern))
        parts = {int(number) for path in files[split] for number in re.findall(r"-of-(\d+)\.", path.name)}
        if not files[split]:
            faults.append(f"no {pattern}")
        elif parts - {len(files[split])}:
            faults.append(f"{len(files[split])} files {pattern} where there should be {max(parts)}")
    if faults:
        fail(f"{task}: {' and '.join(faults)} in {place}: {remedy}")
    hashes = {path.relative_to(root).as_posix(): sha256(path) for paths in files.values() for path in paths}
    return files, {"source": source, "revision": revision, "licence": LICENCES[task], "sha256": hashes}


def clean(text):
    """Text without control characters, zero-width ones (not the joiners of emoji) and stray blanks; None if empty."""
    text = "\n".join((text or "").splitlines())
    text = INVISIBLE.sub("", text.replace("\t", " ").replace("\xa0", " "))
    text = re.sub(" *\n *", "\n", re.sub("  +", " ", text))
    return re.sub("\n\n\n+", "\n\n", text).strip() or None


def one_line(text):
    return " ".join((clean(text) or "").split()) or None


def comparison_key(text):
    """What two texts must share to be the same; "" where there is no text."""
    return normalized(unicodedata.normalize("NFKC", clean(text) or ""))


def read_samsum(path, counts):
    """The Rows of a CSV file; a line that has not the header's columns is counted."""
    csv.field_size_limit(2**31 - 1)
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="more", strict=True)
            if missing := {"id", "dialogue", "summary"} - set(reader.fieldnames or []):
                fail(f"samsum: {path} has no column {', '.join(sorted(missing))}")
            for row in reader:
                if "more" in row or None in row.values():
                    counts["broken CSV line"] += 1
                else:
                    place = (row["dialogue"], row["summary"])
                    rows.append(Row(one_line(row["id"]), comparison_key(row["dialogue"]), place))
    except (OSError, UnicodeDecodeError, csv.Error) as error:  # past a stray quote, nobody knows what is a row
        fail(f"samsum: cannot read {path} ({first_line(error)}): it is cut off, has stray quotes or is no UTF-8 CSV")
    return rows


@contextmanager
def open_parquet(path):
    """A pyarrow ParquetFile; what is wrong with it ends the script, in whatever process it is read."""
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            yield file
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        fail(f"trivia_qa: cannot read {path} ({first_line(error)}): the file is cut off or no parquet file")


def read_trivia_qa(path, _):
    """The Rows of a parquet file, without touching the pages."""
    rows = []
    with open_parquet(path) as file:
        kinds = {re.sub(r"\.list\.\w+$", ".*", leaf.path): str(leaf.logical_type) for leaf in file.schema}
        for name in TRIVIA_QA_TEXTS:
            if kinds.get(name) != "String":
                fail(f"trivia_qa: {path} has no column {name} of texts: give files as the hub has them")
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["question_id", "question"])
            for number, row in enumerate(table.to_pylist()):
                place = (str(path), group, number)
                rows.append(Row(one_line(row["question_id"]), comparison_key(row["question"]), place))
    return rows


def draw_rows(task, files, args, counts):
    """{split: [Row]}: all rows, in an order drawn with the seed."""
    read = {"samsum": read_samsum, "trivia_qa": read_trivia_qa}[task]
    rows = {split: [row for path in paths for row in read(path, counts[split])] for split, paths in files.items()}
    if task == "trivia_qa":  # a tenth of train becomes validation, or as many rows as can be needed
        drawn = random.Random(args.seed).sample(rows["train"], len(rows["train"]))
        size = min(max(1, len(drawn) // 10), with_spares(args.validation_examples_per_task) or len(drawn))
        rows["validation"], rows["train"] = drawn[:size], drawn[size:]
    return {split: random.Random(args.seed).sample(rows[split], len(rows[split])) for split in SPLITS}


def with_spares(limit):
    return limit and 2 * limit + 50  # some rows are dropped later


def take(rows, limit, others, render, counts):
    """{key: rendered row} of the first `limit` rows that can be used and some spares; counts all others by reason."""
    kept, ids = {}, set()
    while drawn := list(islice(rows, with_spares(max(0, limit - len(kept))) if limit else None)):
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
    """Why a row cannot be used beside other splits and those kept of its own, or None."""
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


def passages(pages):
    """Split pages into passages of about PASSAGE_WORDS words that end at a sentence or line end."""
    result = []
    for page in pages:
        result.append("")
        for part in SENTENCE_END.split(page.replace("\n", "\n ")):
            result[-1] += part
            if part.endswith((" ", "\n")) and result[-1].count(" ") >= PASSAGE_WORDS:
                result.append("")
    return [text for passage in result if (text := passage.replace("\n ", "\n").strip())]


def nearest_first(question, texts):
    """The indices of texts by their BM25 with the question, best first; a tie goes to the earlier one."""
    query = set(re.findall(r"\w+", question.lower())) - set(STOP_WORDS.split())
    wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, query)) or '(?!)'})\b")
    counts = [Counter(wanted.findall(text.lower())) for text in texts]
    mean = sum(map(len, texts)) / max(len(texts), 1)
    in_passages = Counter(word for count in counts for word in count)
    idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in in_passages.items()}
    scores = []
    for text, count in zip(texts, counts, strict=True):
        norm = BM25_K1 * (1 - BM25_B + BM25_B * len(text) / mean)
        scores.append(sum(idf[word] * tf * (BM25_K1 + 1) / (tf + norm) for word, tf in sorted(count.items())))
    return sorted(range(len(texts)), key=scores.__getitem__, reverse=True)


def choose_context(question, pages, max_words):
    """The passages nearest to the question, in document order, at most max_words words, whole sentences."""
    texts = passages(pages)
    chosen, left = {}, max_words
    for i in nearest_first(question, texts):
        words = len(texts[i].split())
        if words > left:
            cut = first_words([texts[i]], left)
            if whole := re.match(r"(?s).*([.!?]\s|\n)", cut + " "):
                chosen[i] = whole[0].strip()
            elif not chosen:  # better half a sentence than nothing
                chosen[i] = cut
            break
        chosen[i] = texts[i]
        left -= words
    return "\n".join(chosen[i] for i in sorted(chosen))


def first_words(pages, max_words):
    """The first words of the pages, line ends kept: what the official converter takes."""
    text = "\n".join(pages)
    ends = [word.end() for word in islice(re.finditer(r"\S+", text), max_words)]
    return text[: ends[-1]].strip() if ends else ""


def template(task, context):
    return PROMPTS["closed book" if task == "trivia_qa" and context == "none" else task]


def rendered_row(task, row_id, prompt, completion, references, answer_in_context):
    row = {"id": f"{task}:{one_line(row_id)}", "task": task, "prompt": prompt, "completion": f" {completion}"}
    return row | {"references": references, "answer_in_context": answer_in_context}


def render_dialogue(row):
    """The rendered row, or the reason (a string) why there is none."""
    dialogue, summary = clean(row.place[0]), one_line(row.place[1])
    prompt = PROMPTS["samsum"].format(dialogue=dialogue)
    return rendered_row("samsum", row.id, prompt, summary, [summary], True) if summary else "empty summary"


def render_question(row, split, context, max_words):
    """The rendered row, or the reason (a string) why there is none."""
    question, answer = one_line(row["question"]), row["answer"] or {}
    value = one_line(answer.get("value"))
    aliases = [alias for alias in map(one_line, answer.get("aliases") or []) if alias and normalized(alias)]
    if not value or not aliases:
        return "no answer or no aliases"
    references, text = list(dict.fromkeys([value, *aliases])), ""
    if context != "none":
        pages = [page for page in map(clean, (row["entity_pages"] or {}).get("wiki_context") or []) if page]
        if not pages:
            return "no pages"
        # By the question alone: a context that was found by its answer would be a leak in test.
        first = context == "first"
        text = first_words(pages, max_words) if first else choose_context(question or "", pages, max_words)
    found = holds(text, references)
    if not found and context != "none" and split != "test":
        return "answer not in context"
    prompt = template("trivia_qa", context).format(context=text, question=question)
    return rendered_row("trivia_qa", row["question_id"], prompt, value, references, found)


def render_row_group(places, split, context, max_words):
    """{place: rendered row or reason} for places in one row group of one file; runs in another process."""
    path, group, _ = places[0]
    columns = ["question", "question_id", "answer"] + ["entity_pages.wiki_context"] * (context != "none")
    wanted, results = set(places), {}
    with open_parquet(path) as file:
        batches = file.iter_batches(batch_size=16, row_groups=[group], columns=columns)  # memory stays small
        rows = (batch.slice(i, 1) for batch in batches for i in range(len(batch)))
        for number, row in enumerate(rows):
            place = (path, group, number)
            if place in wanted:
                results[place] = render_question(row.to_pylist()[0], split, context, max_words)
    return results


def render_trivia_qa(split, args, each, rows):
    """[rendered row or reason]; `each` is map, over processes or not."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.place[:2]].append(row.place)
    render = partial(render_row_group, split=split, context=args.context, max_words=args.max_context_words)
    parts = each(render, groups.values())
    results = {}
    for part in progress(parts, f"trivia_qa {split}", total=len(groups)):
        results |= part
    return [results[row.place] for row in rows]


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


def build_task(task, files, args, each):
    """({split: rendered rows}, the task's part of the report)."""
    counts, result, rates = {split: Counter() for split in SPLITS}, {}, {}
    drawn, others = draw_rows(task, files, args, counts), {}
    for split in ("test", "train", "validation"):  # test goes before train, and train before validation
        rows, limit = iter(drawn[split]), getattr(args, f"{split}_examples_per_task")
        question = partial(render_trivia_qa, split, args, each)
        render = partial(map, render_dialogue) if task == "samsum" else question
        usable = take(rows, limit, others, render, counts[split])
        kept = dict(islice(usable.items(), limit or None))
        result[split] = list(kept.values())
        found = sum(row["answer_in_context"] for row in usable.values())
        rates[split] = {args.context: found / max(1, len(usable) + counts[split]["answer not in context"])}
        counts[split] = {"available": len(drawn[split])} | counts[split]
        counts[split] |= {"usable but not needed": len(usable) - len(kept), "kept": len(kept)}
        if not kept:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in counts[split].items())
            fail(f"{task}: no usable row for {split} ({reasons}): check the source and the example counts")
        # Spares and rows that were not looked at stay test's own, too: a later test may take more rows.
        others[split] = NearTexts([*usable, *(row.key for row in rows)] if split == "test" else kept)
    return result, {"counts": counts} | ({"answer_in_context": rates} if task == "trivia_qa" else {})


def save(tasks, seed, folder):
    """Combine and shuffle the tasks' rows, write them into `folder`; {split: {rows, sha256}} for the report."""
    from datasets import Dataset, DatasetDict, disable_progress_bars
    from datasets.table import InMemoryTable

    disable_progress_bars()
    splits, report = {}, {}
    for split in SPLITS:
        rows = [row for task in tasks for row in task.pop(split)]
        random.Random(seed).shuffle(rows)
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        report[split] = {"rows": len(rows), "sha256": digest.hexdigest()}
        table = InMemoryTable(pyarrow.Table.from_pylist(rows))  # Dataset.from_list takes six times the rows' memory
        # The fingerprint by which train and test know these rows: of their content, on every machine the same.
        splits[split] = Dataset(table, fingerprint=digest.hexdigest()[:32])
    DatasetDict(splits).save_to_disk(folder)
    return report


def print_report(task, part, row):
    """A row as the model sees it, and a table of what came in, what was dropped and why, and what was kept."""
    say(f"\n--- {row['id']} (prompt, then [completion]) ---\n{row['prompt']}[{row['completion']}]")
    say(f"\n{task:<28}" + "".join(f"{split:>17}" for split in SPLITS))
    reasons = dict.fromkeys(name for split in SPLITS for name in part["counts"][split])
    for name in sorted(reasons, key=lambda name: name in ("usable but not needed", "kept")):  # these two last
        say(f"  {name:<26}" + "".join(f"{part['counts'][split].get(name, 0):>17,}" for split in SPLITS))
    if rates := part.get("answer_in_context"):
        cells = [f"{rate:>17.1%}" for split in SPLITS for rate in rates[split].values()]
        say(f"  {'answer in context, of all':<26}" + "".join(cells))


@script
def main(argv=None):
    args = parse_args(argv)
    output, folder = Path(args.output_dir), Path(args.output_dir) / "dataset"
    with only_run_in(output):
        put_back(folder)
        if folder.exists() and not (folder / "dataset_dict.json").exists() and any(folder.iterdir()):
            fail(f"{folder} is no data set: move it away, or choose another --output-dir")
        say(f"making {folder} of {' and '.join(args.tasks)}")
        sources = {task: find_files(task, args) for task in args.tasks}
        report = {
            "settings": {name: value for name, value in vars(args).items() if name not in ("num_proc", "output_dir")},
            "sources": {task: source for task, (_, source) in sources.items()},
            "prompts": {task: template(task, args.context) for task in args.tasks},
            "versions": versions("datasets"),
            "git_commit": git_commit(),
            "tasks": {},
        }
        rows = []
        for task, (files, _) in sources.items():
            number = args.num_proc or len(os.sched_getaffinity(0))  # CPUs that this process may use
            with processes(number if task == "trivia_qa" else 1) as each:
                of_task, report["tasks"][task] = build_task(task, files, args, each)
            print_report(task, report["tasks"][task], of_task["train"][0])
            rows.append(of_task)
        with whole_folder(folder) as fresh:
            report["splits"] = save(rows, args.seed, fresh)
        write_whole(output / "dataset_report.json", json.dumps(report, indent=2) + "\n")
        say(f"\nwrote {folder} and {output / 'dataset_report.json'}")


if __name__ == "__main__":
    main()
