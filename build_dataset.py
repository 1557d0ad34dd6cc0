"""Build one data set for two tasks: samsum (dialogue summarisation) and trivia_qa (answering from a context).

Cleans the rows, renders each with its task's prompt template, drops what cannot be learned from and what train and
validation share with test, combines and shuffles the tasks, and reports all of it. The context of a question is chosen
by the question alone: nothing about the answer touches a test prompt.

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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy
import pyarrow
import pyarrow.parquet as pq
from tqdm import tqdm

import common
from common import fail, first_line, say

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
CHOICES = {"TASKS": common.TASKS, "CONTEXT": ("question", "first", "none")}
PROMPTS = {  # the prompt ends without a blank and the completion begins with one, so both tokenizers split there
    "samsum": "Summarize the dialogue.\n\nDialogue:\n{dialogue}\n\nSummary:",
    "trivia_qa": "Answer the question from the context.\n\nContext:\n{context}\n\nQuestion: {question}\nAnswer:",
    "closed book": "Answer the question.\n\nQuestion: {question}\nAnswer:",
}
LICENCES = {"samsum": "CC BY-NC-ND 4.0", "trivia_qa": "Apache 2.0; its pages: Wikipedia, CC BY-SA"}
SPLITS = ("train", "validation", "test")
SAMSUM_COLUMNS = ("id", "dialogue", "summary")
TRIVIA_QA_TEXTS = ("question", "question_id", "answer.value", "answer.aliases.*", "entity_pages.wiki_context.*")
PASSAGE_WORDS = 100  # a passage ends at the first sentence or line end after so many words
NEAR = 0.8  # Jaccard similarity of word 5-grams from which two texts are near duplicates
BM25_K1, BM25_B = 1.2, 0.75  # Robertson & Zaragoza 2009
LINE_ENDS = ("\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029")
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
SENTENCE_END = re.compile(r"([.!?\n][ \n]+)")  # after a blank was put behind every \n: 4 times as fast as with a |
STOP_WORDS = (  # left out of the query: rare in a page or not, they say nothing about where the answer stands
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in is it its "
    "may might must my no not of on or our s she should so t than that the their then there these they this those to "
    "was we were what when where which who whom whose why will with would you your"
)
normalized = common.normalize_answer.__wrapped__  # past its cache, which would keep every context in memory


class Row(NamedTuple):
    """A row as it was drawn, not yet rendered."""

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
        """The texts with a Jaccard similarity to this one of NEAR or more, itself among them, best first."""
        grams = word_5_grams(key)
        shared = Counter(other for gram in grams for other in self.holders.get(gram, ()))
        found = [(n / (len(grams) + self.sizes[other] - n), other) for other, n in shared.items()]
        return [other for similarity, other in sorted(found, reverse=True) if similarity >= NEAR]


def word_5_grams(key):
    words = key.split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def parse_args(argv=None):
    args = common.parse_settings(sys.modules[__name__], argv, CHOICES)
    if not args.tasks or isinstance(args.tasks, str):
        fail(f"--tasks must be a list of one or both of {', '.join(common.TASKS)}")
    if not re.fullmatch(r"[\w.-]+", args.trivia_qa_config):
        fail("--trivia-qa-config must be the name of a folder")
    args.tasks = sorted(set(args.tasks))
    return args


def find_files(task, args):
    """{split: sorted paths} of a task's source, and what the report says of it."""
    source = getattr(args, task)
    patterns = {split: f"{split}.csv" for split in SPLITS}
    if task == "trivia_qa":  # the hub's test has no answers: its validation is our test, ours is carved out of train
        folder = args.trivia_qa_config
        patterns = {"train": f"{folder}/train-*.parquet", "test": f"{folder}/validation-*.parquet"}
    local = Path(source).is_dir()
    root = Path(source) if local else fetch(task, source, list(patterns.values()))
    files = {split: sorted(root.glob(pattern)) for split, pattern in patterns.items()}
    for split, pattern in patterns.items():
        if not files[split]:
            fail(f"{task}: no {pattern} in {source}: the folder must be laid out like the hub repository")
    hashes = {path.relative_to(root).as_posix(): common.sha256(path) for paths in files.values() for path in paths}
    revision = None if local else root.name
    return files, {"source": source, "revision": revision, "licence": LICENCES[task], "sha256": hashes}


def fetch(task, source, patterns):
    """The folder in the hub's cache that holds these files of a dataset repository; its name is the commit."""
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        fail(f"{task}: no folder {source}, and it is no hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # a dozen kinds, from no network to a full disk
        flag = f"--{task.replace('_', '-')}"
        remedy = f"check the name and the network, or give a local folder with {flag}"
        fail(f"{task}: cannot load {source} ({first_line(error)}): {remedy}")


def clean(text):
    """Text with `\\n` as its only line end, without control and zero-width characters and stray blanks, or None.

    The joiners U+200C and U+200D stay: they make emoji and letters of one piece.
    """
    if not text:
        return None
    for end in LINE_ENDS:
        text = text.replace(end, "\n")
    text = INVISIBLE.sub("", text.replace("\t", " ").replace("\xa0", " "))
    text = re.sub("  +", " ", text)
    text = "\n".join(line.strip(" ") for line in text.split("\n"))
    return re.sub("\n\n\n+", "\n\n", text).strip() or None


def one_line(text):
    text = clean(text)
    return text and re.sub(r"\s+", " ", text)


def comparison_key(text):
    """What two texts must share to be the same; "" where there is no text."""
    return normalized(unicodedata.normalize("NFKC", clean(text) or ""))


def read_samsum(path, counts):
    """The Rows of a CSV file; lines that are no row of the header's columns are counted."""
    csv.field_size_limit(2**31 - 1)
    rows, in_step = [], True
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if missing := [column for column in SAMSUM_COLUMNS if column not in header]:
                fail(f"samsum: {path} has no column {', '.join(missing)}")
            for fields in csv_rows(reader):
                row = dict(zip(header, fields, strict=False))
                # After a stray quote the reader may be inside a dialogue: a row counts again from the next real id on.
                in_step = len(fields) == len(header) and (in_step or re.fullmatch(r"[\w-]*\d[\w-]*", row["id"]))
                if in_step:
                    place = (row["dialogue"], row["summary"])
                    rows.append(Row(one_line(row["id"]), comparison_key(row["dialogue"]), place))
                elif fields:  # not just an empty line
                    counts["broken CSV line"] += 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"samsum: cannot read {path} ({first_line(error)}): the file is cut off or no CSV in UTF-8")
    return rows


def csv_rows(reader):
    """Yield the fields of each row, one empty field in the place of a row with stray quotes."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise
            yield [""]


@contextmanager
def open_parquet(path):
    """A pyarrow ParquetFile; what is wrong with it ends the script, in whatever process it is read."""
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
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
    rows = {}
    for split, paths in files.items():
        rows[split] = [row for path in paths for row in read(path, counts[split])]
    if task == "trivia_qa":  # a tenth of train becomes validation, or as many rows as can be needed
        drawn = shuffled(rows["train"], args.seed)
        size = min(max(1, len(drawn) // 10), with_spares(args.validation_examples_per_task) or len(drawn))
        rows["validation"], rows["train"] = drawn[:size], drawn[size:]
    return {split: shuffled(rows[split], args.seed) for split in SPLITS}


def shuffled(rows, seed):
    return random.Random(seed).sample(rows, len(rows))


def with_spares(limit):
    return limit and 2 * limit + 50  # some rows are dropped later


def take(rows, limit, refuse, render, counts):
    """({key: rendered row}, hits) of the first `limit` rows that can be used and some spares; counts all others.

    refuse: the reason why a Row cannot be used, or None; render: [Row] to [(rendered row or reason, found)].
    hits: how often each way to choose a context found the answer.
    """
    kept, ids, hits = {}, set(), Counter()
    while drawn := list(islice(rows, with_spares(limit - len(kept)) if limit else None)):
        counts["looked at"] += len(drawn)
        for row, (rendered, found) in zip(drawn, render(drawn), strict=True):
            reason = refuse(row)
            # Twins are told apart only now: a row that cannot be used makes no duplicate of the next one.
            if not reason and (row.key in kept or row.id in ids):
                reason = "duplicate" if row.key in kept else "duplicate id"
            if not reason:
                hits.update({"rows": 1} | found if found else {})
                reason = rendered if isinstance(rendered, str) else None
            if reason:
                counts[reason] += 1
            else:
                kept[row.key] = rendered
                ids.add(row.id)
        if limit and len(kept) >= limit:
            break
    return kept, hits


def refuse(row, others, split, task, examples):
    """Why a row cannot be used beside the splits that go before its own, {split: NearTexts}; None where it can."""
    if not row.id:
        return "no id"
    if not row.key:
        return "empty dialogue" if task == "samsum" else "empty question"
    for other, texts in others.items():
        if row.key in texts.sizes:
            return f"also in {other}"
        if matches := texts.near(row.key):
            examples.append({"split": split, "text": row.key, "near": matches[0]})
            return f"nearly in {other}"
    return None


def passages(pages):
    """Split pages into passages of about PASSAGE_WORDS words that end at a sentence or line end."""
    result = []
    for page in pages:
        current, words = [], 0
        for part in SENTENCE_END.split(page.replace("\n", "\n ")):
            current.append(part)
            words += part.count(" ")
            if words >= PASSAGE_WORDS and part.endswith((" ", "\n")):
                result.append("".join(current))
                current, words = [], 0
        result.append("".join(current))
    texts = [text.replace("\n ", "\n").strip() for text in result]
    return [text for text in texts if text]


def nearest_first(question, texts):
    """The indices of texts by their BM25 with the question, best first; a tie goes to the earlier one.

    Within a question's own pages, after Clark & Gardner 2017, who rank by TF-IDF; BM25 needs only the question's words
    counted, which is faster.
    """
    query = set(re.findall(r"\w+", question.lower())) - set(STOP_WORDS.split())
    wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, query)) or '(?!)'})\b")
    counts = [Counter(wanted.findall(text.lower())) for text in texts]
    mean = sum(map(len, texts)) / max(len(texts), 1)
    in_passages = Counter(word for count in counts for word in count)
    idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in in_passages.items()}

    def score(i):
        norm = BM25_K1 * (1 - BM25_B + BM25_B * len(texts[i]) / mean)
        return sum(idf[word] * tf * (BM25_K1 + 1) / (tf + norm) for word, tf in sorted(counts[i].items()))

    return sorted(range(len(texts)), key=lambda i: (-score(i), i))


def choose_context(question, pages, max_words):
    """The passages nearest to the question, in document order, at most max_words words.

    Of the passage that no longer fits, the first whole sentences are taken.
    """
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


def holds(context, aliases):
    """Whether a context holds one of the normalised aliases as whole words."""
    text = f" {normalized(context)} "
    return any(f" {alias} " in text for alias in aliases)


def template(task, context):
    return PROMPTS["closed book" if task == "trivia_qa" and context == "none" else task]


def rendered_row(task, row_id, prompt, completion, references, answer_in_context):
    row = {"id": f"{task}:{one_line(row_id)}", "task": task, "prompt": prompt, "completion": f" {completion}"}
    return row | {"references": references, "answer_in_context": answer_in_context}


def render_samsum(rows):
    """[(rendered row or the reason why there is none, {})]"""
    results = []
    for row in rows:
        dialogue, summary = clean(row.place[0]), one_line(row.place[1])
        prompt = PROMPTS["samsum"].format(dialogue=dialogue)
        rendered = rendered_row("samsum", row.id, prompt, summary, [summary], True) if summary else "empty summary"
        results.append((rendered, {}))
    return results


def render_question(row, split, context, max_words):
    """The rendered row, or the reason (a string) why there is none, and where an alias was: {way: bool}."""
    question, answer = one_line(row["question"]), row["answer"] or {}
    value = one_line(answer.get("value"))
    aliases = [alias for alias in map(one_line, answer.get("aliases") or []) if alias and normalized(alias)]
    if not value or not aliases:
        return "no answer or no aliases", {}
    references = list(dict.fromkeys([value, *aliases]))
    texts = {}
    if context != "none":
        pages = [page for page in map(clean, (row["entity_pages"] or {}).get("wiki_context") or []) if page]
        if not pages:
            return "no pages", {}
        # By the question alone: a context that was found by its answer would be a leak in test.
        texts = {"question": choose_context(question or "", pages, max_words), "first": first_words(pages, max_words)}
    names = {name for name in map(normalized, references) if name}
    found = {way: holds(text, names) for way, text in texts.items()}
    if split != "test" and not found.get(context, True):
        return "answer not in context", found
    prompt = template("trivia_qa", context).format(context=texts.get(context), question=question)
    in_context = found.get(context, False)
    return rendered_row("trivia_qa", row["question_id"], prompt, value, references, in_context), found


def render_row_group(places, split, context, max_words):
    """{place: (rendered row or reason, found)} for places in one row group of one file; runs in another process.

    The row group is read in small batches, so that memory does not grow with it.
    """
    path, group, _ = places[0]
    last = max(places)
    columns = ["question", "question_id", "answer"] + ["entity_pages.wiki_context"] * (context != "none")
    wanted, results, start = set(places), {}, 0
    with open_parquet(path) as file:
        for table in file.iter_batches(batch_size=16, row_groups=[group], columns=columns):
            for i in range(len(table)):
                place = (path, group, start + i)
                if place in wanted:
                    row = table.slice(i, 1).to_pylist()[0]
                    results[place] = render_question(row, split, context, max_words)
            start += len(table)
            if start > last[2]:
                break
    return results


def render_trivia_qa(rows, split, args, each):
    """[(rendered row or reason, found)]; `each` is map, over processes or not."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.place[:2]].append(row.place)
    render = partial(render_row_group, split=split, context=args.context, max_words=args.max_context_words)
    results = {}
    with tqdm(total=len(rows), desc=f"trivia_qa {split}", disable=None, leave=False) as progress:
        for found in each(render, groups.values()):
            results |= found
            progress.update(len(found))
    return [results[row.place] for row in rows]


@contextmanager
def processes(number):
    """A `map` over so many processes that end with this one; for one process, map itself."""
    if number == 1:
        yield map
        return
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), end_with_parent)

    def each(*arguments):
        # Workers start here and inherit what is blocked: Ctrl-C is for this process alone, which gets it right after.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.map(*arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    try:
        yield each
    except BrokenProcessPool:
        fail("a process that chose contexts was killed, often for want of memory: try again with a lower --num-proc")
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent():
    """In a worker: end when the parent does; a killed build would leave its workers waiting for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def build_task(task, files, args, each):
    """({split: rendered rows}, the task's part of the report)."""
    counts, examples, result, rates = {split: Counter() for split in SPLITS}, [], {}, {}
    drawn, others = draw_rows(task, files, args, counts), {}
    for split in ("test", "train", "validation"):  # test goes before train, and train before validation
        rows, limit = iter(drawn[split]), getattr(args, f"{split}_examples_per_task")
        why_not = partial(refuse, others=others, split=split, task=task, examples=examples)
        render = render_samsum if task == "samsum" else partial(render_trivia_qa, split=split, args=args, each=each)
        usable, hits = take(rows, limit, why_not, render, counts[split])
        kept = dict(islice(usable.items(), limit or None))
        result[split] = list(kept.values())
        rates[split] = {way: hits[way] / max(1, hits["rows"]) for way in ("question", "first")}
        rates[split]["rows"] = hits["rows"]
        counts[split] = {"available": len(drawn[split])} | counts[split]
        counts[split] |= {"spare": len(usable) - len(kept), "kept": len(kept)}
        if not kept and split != "validation":  # another task's validation rows may do
            found = ", ".join(f"{reason}: {n}" for reason, n in counts[split].items())
            fail(f"{task}: no usable row for {split} ({found}): check the source and the example counts")
        # Spares and rows that were not looked at stay test's own, too: a later test may take more rows.
        others[split] = NearTexts([*usable, *(row.key for row in rows)] if split == "test" else kept)
    report = {"counts": counts, "near_duplicates": examples[:10]}
    return result, report | ({"answer_in_context": rates} if task == "trivia_qa" else {})


def describe(rows):
    """The report on a split: its number of rows, a hash of them, and how long their texts are."""
    digest, lengths = hashlib.sha256(), defaultdict(list)
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        for column in ("prompt", "completion"):
            name = f"{row['task']} {column}"
            lengths[f"{name} words"].append(len(row[column].split()))
            lengths[f"{name} characters"].append(len(row[column]))
    report = {"rows": len(rows), "sha256": digest.hexdigest()}
    for name, sizes in lengths.items():
        p50, p95 = numpy.percentile(sizes, [50, 95])
        report[name] = {"mean": sum(sizes) / len(sizes), "p50": float(p50), "p95": float(p95), "max": max(sizes)}
    return report


def save(tasks, seed, report, folder):
    """Combine and shuffle the tasks' rows, write them into `folder`, complete the report."""
    from datasets import Dataset, DatasetDict
    from datasets.table import InMemoryTable

    splits, report["splits"] = {}, {}
    for split in SPLITS:
        rows = [row for task in tasks for row in task.pop(split)]
        if not rows:
            fail(f"no usable row for {split}: check the sources and the example counts")
        random.Random(seed).shuffle(rows)
        report["splits"][split] = describe(rows)
        # The fingerprint by which train and test know these rows: of their content, on every machine the same.
        fingerprint = report["splits"][split]["sha256"][:32]
        table = InMemoryTable(pyarrow.Table.from_pylist(rows))  # Dataset.from_list takes six times the rows' memory
        splits[split] = Dataset(table, fingerprint=fingerprint)
    DatasetDict(splits).save_to_disk(folder)


def print_report(report):
    def line(name, cells):
        say(f"{name:<28}" + "".join(f"{cell:>17}" for cell in cells))

    for task, part in report["tasks"].items():
        say()
        line(task, SPLITS)
        reasons = dict.fromkeys(name for split in SPLITS for name in part["counts"][split])
        for name in sorted(reasons, key=lambda name: name in ("spare", "kept")):  # these two last
            line(f"  {name}", [f"{part['counts'][split].get(name, 0):,}" for split in SPLITS])
        for way in ("question", "first") if "answer_in_context" in part else ():
            line(f"  answer in, {way}", [f"{part['answer_in_context'][split][way]:.1%}" for split in SPLITS])


def print_examples(train):
    """One short training row of each task, as the model sees it."""
    for task in sorted(train.unique("task")):
        some = islice((i for i, other in enumerate(train["task"]) if other == task), 200)
        row = min(train.select(list(some)), key=lambda row: len(row["prompt"]))
        say(f"\n--- {task}: {row['id']} (prompt, then [completion]) ---\n{row['prompt']}[{row['completion']}]")


def build(args, output_dir):
    """Build the data set in `output_dir`, write and print its report."""
    import datasets

    datasets.disable_progress_bars()
    folder = output_dir / "dataset"
    common.put_back(folder)
    if folder.exists() and not (folder / "dataset_dict.json").exists() and any(folder.iterdir()):
        fail(f"{folder} is no data set: move it away, or choose another --output-dir")
    sources = {task: find_files(task, args) for task in args.tasks}
    report = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("num_proc", "output_dir")},
        "sources": {task: source for task, (_, source) in sources.items()},
        "prompts": {task: template(task, args.context) for task in args.tasks},
        "versions": common.versions("datasets"),
        "git_commit": common.git_commit(),
        "tasks": {},
    }
    rows = []
    with processes(args.num_proc or os.cpu_count()) as each:
        for task, (files, _) in sources.items():
            of_task, report["tasks"][task] = build_task(task, files, args, each)
            rows.append(of_task)
    with common.whole_folder(folder) as fresh:
        save(rows, args.seed, report, fresh)
    common.write_whole(output_dir / "dataset_report.json", json.dumps(report, indent=2) + "\n")
    print_examples(datasets.load_from_disk(str(folder / "train")))
    print_report(report)
    say(f"\nwrote {folder} and {output_dir / 'dataset_report.json'}")


@common.script
def main(argv=None):
    args = parse_args(argv)
    with common.only_run_in(args.output_dir):
        build(args, Path(args.output_dir))


if __name__ == "__main__":
    main()
