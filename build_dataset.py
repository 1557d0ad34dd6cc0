"""Build one data set for two tasks: samsum (dialogue summarisation) and trivia_qa (answering from a context).

Cleans the rows, renders each with its task's prompt template, drops what cannot be learned from and what train and
validation share with test, combines and shuffles the tasks, and reports all of it. The context of a question is chosen
by the question alone: nothing about the answer touches a test prompt.

Reads:  samsum and trivia_qa, each a hub id or a local folder laid out like the hub repository.
Writes: OUTPUT_DIR/dataset/ (a DatasetDict: train, validation, test) and OUTPUT_DIR/dataset_report.json.

    python build_dataset.py
    python build_dataset.py --samsum tests/fixtures/samsum --trivia-qa tests/fixtures/trivia_qa
"""

import argparse
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import unicodedata
from collections import Counter
from itertools import islice
from pathlib import Path

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
SEED = 0
NUM_PROC = 0  # processes that choose contexts; 0 = one per CPU
OUTPUT_DIR = "outputs"

# Fixed
PROMPTS = {  # the prompt ends without a blank and the completion begins with one, so both tokenizers split there
    "samsum": "Summarize the dialogue.\n\nDialogue:\n{dialogue}\n\nSummary:",
    "trivia_qa": "Answer the question from the context.\n\nContext:\n{context}\n\nQuestion: {question}\nAnswer:",
    "closed book": "Answer the question.\n\nQuestion: {question}\nAnswer:",
}
LICENCES = {"samsum": "CC BY-NC-ND 4.0", "trivia_qa": "Apache 2.0; its pages: Wikipedia, CC BY-SA"}
COLUMNS = {"samsum": ("id", "dialogue", "summary"), "trivia_qa": ("question", "question_id", "entity_pages", "answer")}
SPLITS = ("train", "validation", "test")
PASSAGE_WORDS = 100  # a passage ends at the first sentence or line end after so many words
NEAR = 0.8  # Jaccard similarity of word 5-grams from which two texts are near duplicates
BANDS, ROWS = 16, 4  # of the MinHash index: finds 99.98 % of the pairs at NEAR; the exact similarity then decides
BM25_K1, BM25_B = 1.2, 0.75  # Robertson & Zaragoza 2009
INVISIBLE = re.compile("[\u200b-\u200f\u2028-\u202e\u2060\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SENTENCE_END = re.compile(r"([.!?\n][ \n]+)")  # after a blank was put behind every \n: 4 times as fast as with a |
WORD = re.compile(r"\w+")
ARTICLES = {"a", "an", "the"}
STOP_WORDS = (  # left out of the query: rare in a page or not, they say nothing about where the answer stands
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in is it its "
    "may might must my no not of on or our s she should so t than that the their then there these they this those to "
    "was we were what when where which who whom whose why will with would you your"
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--samsum", default=SAMSUM, help="hub id or local folder")
    parser.add_argument("--trivia-qa", default=TRIVIA_QA, help="hub id or local folder")
    parser.add_argument("--trivia-qa-config", default=TRIVIA_QA_CONFIG, help="folder of the trivia_qa repository")
    parser.add_argument("--tasks", nargs="+", choices=list(COLUMNS), default=TASKS, help="tasks to combine")
    parser.add_argument("--context", choices=["question", "first", "none"], default=CONTEXT, help="how it is chosen")
    parser.add_argument("--max-context-words", type=int, default=MAX_CONTEXT_WORDS, help="words of context per prompt")
    for split in SPLITS:
        name = f"{split}_examples_per_task"
        flag = f"--{split}-examples-per-task"
        parser.add_argument(flag, type=int, default=globals()[name.upper()], help="0 = all")
    parser.add_argument("--seed", type=int, default=SEED, help="of sampling and shuffling")
    parser.add_argument("--num-proc", type=int, default=NUM_PROC, help="processes; 0 = one per CPU")
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="where dataset/ is written")
    args = parser.parse_args(argv)
    if not 1 <= args.max_context_words < 2**31:
        parser.error("--max-context-words must be at least 1 and below 2**31")
    if not re.fullmatch(r"[\w.-]+", args.trivia_qa_config):
        parser.error("--trivia-qa-config must be the name of a folder")
    for name in (*(f"{split}_examples_per_task" for split in SPLITS), "seed", "num_proc"):
        if not 0 <= getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} must be 0 or more and below 2**31")
    args.tasks = sorted(set(args.tasks))
    return args


def fail(message):
    """Print one sentence on stderr and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def find_files(task, args):
    """{split: sorted paths} of a task's source, and what the report says of it; hub files land in the hub's cache."""
    source = getattr(args, task)
    patterns = {split: f"{split}.csv" for split in SPLITS}
    if task == "trivia_qa":  # the hub's test has no answers: its validation is our test, ours is carved out of train
        patterns = {"train": "train-*.parquet", "test": "validation-*.parquet"}
        patterns = {split: f"{args.trivia_qa_config}/{pattern}" for split, pattern in patterns.items()}
    folder, revision = Path(source), None
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            fail(f"{task}: no folder {source}, and it is no hub id (owner/name) either")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns=list(patterns.values())))
        except Exception as error:  # a dozen kinds, from no network to no such repository
            flag = f"--{task.replace('_', '-')}"
            fail(f"{task}: cannot load {source} ({first_line(error)}): check the name and the network, or give a "
                 f"local folder with {flag}")  # fmt: skip
        revision = folder.name
    files = {split: sorted(folder.glob(pattern)) for split, pattern in patterns.items()}
    for split, pattern in patterns.items():
        if not files[split]:
            fail(f"{task}: no {pattern} in {source}: the folder must be laid out like the hub repository")
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for paths in files.values() for path in paths}
    return files, {"source": source, "revision": revision, "licence": LICENCES[task], "sha256": hashes}


def sha256(path):
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    return digest.hexdigest()


def clean(text):
    """Text without `\\r`, control and zero-width characters, stray blanks; None where it is no text or empty."""
    if not isinstance(text, str):
        return None
    text = INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ").replace("\xa0", " "))
    text = "\n".join(line.strip(" ") for line in re.sub("  +", " ", text).split("\n"))
    return re.sub("\n\n\n+", "\n\n", text).strip() or None


def one_line(text):
    text = clean(text)
    return text and re.sub(r"\s+", " ", text)


def normalized(text):
    """TriviaQA's comparison form (official evaluation script): lower case, punctuation to space, no articles."""
    text = re.sub(r"[!-/:-@\[-`{-~\u2018\u2019\u00b4]", " ", text.lower())
    return " ".join(word for word in text.split() if word not in ARTICLES)


def index_samsum(files, counts):
    """{split: [(id, dialogue, row)]}; lines that are no CSV row of the header's columns are counted and left out."""
    index = {}
    for split, (path,) in files.items():
        rows = []
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                header = next(reader, [])
                check_columns("samsum", path, header)
                while True:
                    try:
                        fields = next(reader)
                    except StopIteration:
                        break
                    except csv.Error as error:
                        if "unexpected end" in str(error):
                            raise
                        fields = [None]
                    if len(fields) == len(header):
                        row = dict(zip(header, fields, strict=True))
                        rows.append((row["id"], row["dialogue"], row))
                    elif fields:  # not just an empty line
                        counts[split]["broken CSV line"] += 1
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            fail(f"samsum: cannot read {path} ({first_line(error)}): the file is cut off or no CSV in UTF-8")
        index[split] = rows
    return index


def index_trivia_qa(files, counts):
    """{split: [(question id, question, (path, row group, row))]}, without touching the pages."""
    import pyarrow.parquet as pq

    index = {}
    for split, paths in files.items():
        index[split] = []
        for path in paths:
            try:
                with pq.ParquetFile(path) as file:
                    check_columns("trivia_qa", path, file.schema_arrow.names)
                    check_types(path, file.schema_arrow)
                    for group in range(file.num_row_groups):
                        table = file.read_row_group(group, columns=["question_id", "question"]).to_pydict()
                        pairs = zip(table["question_id"], table["question"], strict=True)
                        index[split] += [(id_, text, (str(path), group, row)) for row, (id_, text) in enumerate(pairs)]
            except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
                fail(f"trivia_qa: cannot read {path} ({first_line(error)}): the file is cut off or no parquet file")
    return index


def check_columns(task, path, names):
    missing = [column for column in COLUMNS[task] if column not in names]
    if missing:
        fail(f"{task}: {path} has no column {', '.join(missing)}")


def check_types(path, schema):
    """Exit 2 where a column of a trivia_qa file is not of the type the hub's files have."""
    text, texts = (
        ("string", "large_string"),
        ("list<element: string>", "list<item: string>", "large_list<item: string>"),
    )
    columns = {"question": text, "question_id": text, "answer.value": text, "answer.aliases": texts}
    for name, kinds in (columns | {"entity_pages.wiki_context": texts}).items():
        column, _, field = name.partition(".")
        kind = schema.field(column).type
        if field:
            index = kind.get_field_index(field) if hasattr(kind, "get_field_index") else -1
            kind = kind.field(index).type if index >= 0 else "missing"
        if str(kind) not in kinds:
            fail(f"trivia_qa: {name} of {path} is {kind}, not {kinds[0]}: give files as the hub has them")


def carve_validation(rows, limit, seed):
    """(validation, train): a tenth of the rows, drawn with the seed, or as many as `limit` rows can need."""
    rows = random.Random(seed).sample(rows, len(rows))
    tenth = min(max(1, len(rows) // 10), with_spares(limit) or len(rows))
    return rows[:tenth], rows[tenth:]


def with_spares(limit):
    """How many rows to take up for `limit` usable ones: some are dropped later."""
    return limit and 2 * limit + 50


def comparison_key(text):
    """What two texts must share to be the same; "" where there is no text."""
    text = clean(text)
    return normalized(unicodedata.normalize("NFKC", text)) if text else ""


def shingles(key):
    words = key.split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def minhash(parts):
    from datasketch import MinHash

    value = MinHash(num_perm=BANDS * ROWS)
    value.update_batch([part.encode() for part in parts])
    return value


def near_matches(lsh, key):
    """The texts of the index with NEAR or more of their word 5-grams in common with this one, best first."""
    parts = shingles(key)
    found = []
    for other in lsh.query(minhash(parts)):
        others = shingles(other)
        found.append((len(parts & others) / len(parts | others), other))
    return [other for similarity, other in sorted(found, reverse=True) if similarity >= NEAR]


def guard(index):
    """What train must not repeat: {key: split} of every test and validation text, and a MinHash index of them."""
    from datasketch import MinHashLSH

    known, lsh = {}, MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    for split in ("test", "validation"):
        for _, text, _ in index[split]:
            key = comparison_key(text)
            if key and key not in known:
                known[key] = split
                lsh.insert(key, minhash(shingles(key)))
    return known, lsh, {}


def overlap(split, key, known, lsh, in_train, examples):
    """Why a text of train or validation cannot stay beside the other splits, or None.

    Test goes before train and train before validation: a train text that validation holds goes into `in_train`.
    """
    if known.get(key) == "test":
        return "also in test"
    if split == "validation" and key in in_train:
        return in_train[key]
    matches = [other for other in near_matches(lsh, key) if other != key]
    for other in matches:
        if known[other] == "test":
            examples.append({"split": split, "text": key, "near": other})
            return "nearly in test"
    if split == "train":
        in_train |= {other: "nearly in train" for other in matches}
        in_train |= {key: "also in train"} if key in known else {}
    return None


def candidates(task, split, rows, guards, counts, examples):
    """Yield (id, where) of the rows that may be used, in order; the others are counted by reason."""
    keys, ids = set(), set()
    for row_id, text, where in rows:
        key = comparison_key(text)
        if not isinstance(row_id, str) or not row_id:
            reason = "no id"
        elif not key:
            reason = "empty dialogue" if task == "samsum" else "empty question"
        elif key in keys:
            reason = "duplicate"
        elif row_id in ids:
            reason = "duplicate id"
        else:
            reason = None if split == "test" else overlap(split, key, *guards, examples)
        counts["looked at"] += 1
        if reason:
            counts[reason] += 1
        else:
            keys.add(key)
            ids.add(row_id)
            yield row_id, where


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
    return [passage for text in result if (passage := text.replace("\n ", "\n").strip())]


def choose_context(question, pages, max_words):
    """The passages nearest to the question by BM25 within its own pages, in document order, at most max_words words.

    After Clark & Gardner 2017, who rank by TF-IDF; BM25 needs only the question's words counted, which is faster.
    """
    texts = passages(pages)
    query = set(WORD.findall(question.lower())) - set(STOP_WORDS.split())
    wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, query)) or '(?!)'})\b")
    counts = [Counter(wanted.findall(text.lower())) for text in texts]
    lengths = [len(text) for text in texts]
    mean = sum(lengths) / max(len(lengths), 1)
    in_passages = Counter(word for count in counts for word in count)
    idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in in_passages.items()}

    def score(i):
        norm = BM25_K1 * (1 - BM25_B + BM25_B * lengths[i] / mean)
        return sum(idf[word] * tf * (BM25_K1 + 1) / (tf + norm) for word, tf in sorted(counts[i].items()))

    chosen, left = {}, max_words
    for i in sorted(range(len(texts)), key=lambda i: (-score(i), i)):
        size = len(texts[i].split())
        if size <= left or not chosen:
            chosen[i] = texts[i] if size <= left else first_words([texts[i]], left)
            left -= min(size, left)
        if left < PASSAGE_WORDS // 4:
            break
    return "\n".join(chosen[i] for i in sorted(chosen))


def first_words(pages, max_words):
    """The first words of the pages, line ends kept: what the official converter takes."""
    words = islice(re.finditer(r"\S+", text := "\n".join(pages)), max_words)
    return text[: max((word.end() for word in words), default=0)].strip()


def holds(context, aliases):
    """Whether a context holds one of the normalised aliases as whole words."""
    text = f" {normalized(context)} "
    return any(f" {alias} " in text for alias in aliases)


def render_samsum(row):
    """The rendered row, or the reason (a string) why there is none."""
    dialogue, summary = clean(row["dialogue"]), one_line(row["summary"])
    if not summary:
        return "empty summary"
    return make_row("samsum", row["id"], PROMPTS["samsum"].format(dialogue=dialogue), summary, [summary], True)


def render_trivia_qa(row, split, context, max_words):
    """The rendered row, or the reason (a string) why there is none, and where an alias was: {way: bool}."""
    question, answer = one_line(row["question"]), row["answer"] or {}
    pages = [page for page in map(clean, (row["entity_pages"] or {}).get("wiki_context") or []) if page]
    value = one_line(answer.get("value"))
    aliases = [one_line(alias) for alias in [answer.get("value"), *(answer.get("aliases") or [])]]
    aliases = {alias: normalized(alias) for alias in aliases if alias and normalized(alias)}
    if not value or not aliases or not answer.get("aliases"):
        return "no answer or no aliases", {}
    if context == "none":
        prompt = PROMPTS["closed book"].format(question=question)
        return make_row("trivia_qa", row["question_id"], prompt, value, list(aliases), False), {}
    if not pages:
        return "no pages", {}
    texts = {"question": choose_context(question, pages, max_words), "first": first_words(pages, max_words)}
    found = {way: holds(text, aliases.values()) for way, text in texts.items()}
    if split != "test" and not found[context]:
        return "answer not in context", found
    prompt = PROMPTS["trivia_qa"].format(context=texts[context], question=question)
    return make_row("trivia_qa", row["question_id"], prompt, value, list(aliases), found[context]), found


def make_row(task, row_id, prompt, completion, references, answer_in_context):
    return {
        "id": f"{task}:{row_id}",
        "task": task,
        "prompt": prompt,
        "completion": f" {completion}",
        "references": references,
        "answer_in_context": answer_in_context,
    }


def render_samsum_batch(batch, *_):
    return [(rank, *split_reason(render_samsum(row)), {}) for rank, row in batch]


def render_trivia_qa_batch(batch, split, context, max_words):
    """Render questions of one row group: [(rank, row or None, reason or None, found)], or a sentence on a bad file.

    Runs in a process of its own. The row group is read in small batches, so that memory does not grow with it.
    """
    import pyarrow.parquet as pq

    path, group = batch[0][1][:2]
    ranks = {row: rank for rank, (_, _, row) in batch}
    columns = [column for column in COLUMNS["trivia_qa"] if column != "entity_pages"]
    columns += ["entity_pages.wiki_context"] if context != "none" else []
    results, start = [], 0
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            for table in file.iter_batches(batch_size=16, row_groups=[group], columns=columns):
                for i in (i for i in range(len(table)) if start + i in ranks):
                    row = table.slice(i, 1).to_pylist()[0]
                    item, found = render_trivia_qa({"entity_pages": None} | row, split, context, max_words)
                    results.append((ranks[start + i], *split_reason(item), found))
                start += len(table)
                if start > max(ranks):
                    break
    except (OSError, ValueError) as error:
        return f"cannot read {path} ({first_line(error)}): the file is cut off or broken"
    return results


def split_reason(item):
    return (None, item) if isinstance(item, str) else (item, None)


def end_with_parent():
    """Worker set-up: without it a killed build would leave its workers waiting for ever."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def render_split(task, split, rows, args, guards, counts, examples, pool, spool):
    """Render rows of a split to `spool` until there are enough: offsets in the order of `rows`, and hit counts."""
    from tqdm import tqdm

    limit = getattr(args, f"{split}_examples_per_task")
    stream = enumerate(candidates(task, split, rows, guards, counts, examples))
    kept, hits = [], Counter()
    while not limit or len(kept) < limit:
        drawn = list(islice(stream, with_spares(limit - len(kept)) if limit else None))
        if not drawn:
            break
        batches = {}  # of one row group each, and not too large for a progress bar
        for rank, (_, where) in drawn:
            batches.setdefault(where[:2] if task == "trivia_qa" else rank // 1000, []).append((rank, where))
        render = {"samsum": render_samsum_batch, "trivia_qa": render_trivia_qa_batch}[task]
        rest = [[value] * len(batches) for value in (split, args.context, args.max_context_words)]
        mapped = (pool.map if pool and task == "trivia_qa" else map)(render, batches.values(), *rest)
        with tqdm(total=len(drawn), desc=f"{task} {split}", disable=None, leave=False) as progress:
            for results in mapped:
                if isinstance(results, str):
                    fail(f"{task}: {results}")
                for rank, row, reason, found in results:
                    hits.update(way for way in found if found[way])
                    hits["with a context"] += bool(found)
                    if row is None:
                        counts[reason] += 1
                        continue
                    kept.append((rank, spool.tell()))
                    spool.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                progress.update(len(results))
    offsets = [offset for _, offset in sorted(kept)]
    counts["spare"] = max(0, len(offsets) - limit) if limit else 0
    counts["kept"] = len(offsets) - counts["spare"]
    return offsets[: limit or None], hits


def render_task(task, args, files, pool, spool):
    """Offsets of the rendered rows per split in `spool`, and the task's part of the report."""
    counts = {split: Counter() for split in SPLITS}
    index = {"samsum": index_samsum, "trivia_qa": index_trivia_qa}[task](files, counts)
    available = {split: len(rows) for split, rows in index.items()}
    if task == "trivia_qa":
        index["validation"], index["train"] = carve_validation(
            index["train"], args.validation_examples_per_task, args.seed
        )
        available |= {split: len(index[split]) for split in ("validation", "train")}
    guards, examples, offsets, hits = guard(index), [], {}, {}
    for split in ("test", "train", "validation"):  # validation last: it gives way to train
        rows = random.Random(args.seed).sample(index[split], len(index[split]))
        offsets[split], hits[split] = render_split(
            task, split, rows, args, guards, counts[split], examples, pool, spool
        )
        if not offsets[split] and split != "validation":  # another task's validation rows may do
            fail(f"{task}: no usable row for {split} ({dict(counts[split])}): check the source and the example counts")
        counts[split] = {"available": available[split], **counts[split]}
    report = {"counts": counts, "near_duplicates": examples[:10]}
    if task == "trivia_qa":
        report["answer_in_context"] = {
            split: {"rows": hits[split]["with a context"]}
            | {way: hits[split][way] / max(1, hits[split]["with a context"]) for way in ("question", "first")}
            for split in SPLITS
        }
    return offsets, report


def read_rows(spool, offsets, digest=None, lengths=None):
    """The rows at these offsets of the spool; hashes them and notes their lengths on the way."""
    for offset in offsets:
        spool.seek(offset)
        line = spool.readline()
        row = json.loads(line)
        if digest:
            digest.update(line)
            for column in ("prompt", "completion"):
                lengths.setdefault((row["task"], column, "words"), []).append(len(row[column].split()))
                lengths.setdefault((row["task"], column, "characters"), []).append(len(row[column]))
        yield row


def summarize(values):
    import numpy

    p50, p95 = numpy.percentile(values, [50, 95])
    return {"mean": sum(values) / len(values), "p50": float(p50), "p95": float(p95), "max": max(values)}


def save(tasks, report, spool, args, output_dir, fresh):
    """Write the data set from the spool into `fresh` and put that in the place of the old one."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    text = Value("string")
    features = {"id": text, "task": text, "prompt": text, "completion": text, "references": List(text)}
    features = Features(features | {"answer_in_context": Value("bool")})
    data, report["splits"] = {}, {}
    for split in SPLITS:
        offsets = [offset for task in tasks.values() for offset in task[split]]
        if not offsets:
            fail(f"no usable row for {split}: check the sources and the example counts")
        random.Random(args.seed).shuffle(offsets)
        digest, lengths = hashlib.sha256(), {}
        for _ in read_rows(spool, offsets, digest, lengths):
            pass
        data[split] = Dataset.from_generator(
            lambda offsets=offsets: read_rows(spool, offsets),
            features=features,
            cache_dir=str(fresh / "cache"),
            fingerprint=digest.hexdigest()[:32],
        )
        report["splits"][split] = {"rows": len(offsets), "sha256": digest.hexdigest()} | {
            f"{task} {column} {unit}": summarize(values) for (task, column, unit), values in lengths.items()
        }
    target, old = output_dir / "dataset", output_dir / ".dataset.old"
    DatasetDict(data).save_to_disk(fresh / "dataset")
    (fresh / "dataset" / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    (fresh / "dataset").rename(target)
    for leftover in (old, fresh):
        shutil.rmtree(leftover, ignore_errors=True)


def stands_already(output_dir, report):
    """The report of the data set in output_dir where it came from the same script, settings and sources, or None."""
    from datasets import load_from_disk

    try:
        old = json.loads((output_dir / "dataset" / "report.json").read_text())
        same = all(old[key] == json.loads(json.dumps(report[key])) for key in ("script", "settings", "sources"))
        data = load_from_disk(str(output_dir / "dataset"))
        whole = all(len(data[split]) == old["splits"][split]["rows"] for split in SPLITS)
        return old if same and whole else None
    except Exception:  # whatever is missing or broken there: build it anew
        return None


def print_report(report):
    for task, part in report["tasks"].items():
        counts = part["counts"]
        print(f"\n{task:<28}" + "".join(f"{split:>12}" for split in SPLITS))
        reasons = dict.fromkeys(name for split in SPLITS for name in counts[split])
        for name in [*(name for name in reasons if name not in ("spare", "kept")), "spare", "kept"]:
            print(f"  {name:<26}" + "".join(f"{counts[split].get(name, 0):>12,}" for split in SPLITS))
        for way in ("question", "first") if "answer_in_context" in part else ():
            rates = [part["answer_in_context"][split][way] for split in SPLITS]
            print(f"  {'answer in, ' + way:<26}" + "".join(f"{rate:>12.1%}" for rate in rates))
    print(f"\n{'words, mean / p95 / max':<28}" + "".join(f"{split:>16}" for split in SPLITS))
    for name in report["splits"]["train"]:
        if name.endswith("words"):
            cells = [report["splits"][split].get(name) for split in SPLITS]
            cells = [f"{c['mean']:.0f} / {c['p95']:.0f} / {c['max']}" if c else "" for c in cells]
            print(f"  {name.removesuffix(' words'):<26}" + "".join(f"{cell:>16}" for cell in cells))


def print_examples(output_dir):
    """One short training row of each task, as the model sees it."""
    from datasets import load_from_disk

    rows = load_from_disk(str(output_dir / "dataset" / "train")).to_iterable_dataset().take(200)
    shortest = {}
    for row in rows:
        if len(row["prompt"]) < len(shortest.get(row["task"], row)["prompt"]) or row["task"] not in shortest:
            shortest[row["task"]] = row
    for task, row in sorted(shortest.items()):
        print(f"\n--- {task}: {row['id']} (prompt, then [completion]) ---\n{row['prompt']}[{row['completion']}]")


def main(argv=None):
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    fresh = output_dir / ".dataset.new"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
    except OSError as error:
        fail(f"cannot write to {output_dir}: {error.strerror}")
    try:
        build(args, output_dir, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def build(args, output_dir, fresh):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import datasets

    datasets.disable_progress_bars()
    sources = {task: find_files(task, args) for task in args.tasks}
    report = {
        "script": sha256(Path(__file__)),
        "settings": {name: value for name, value in vars(args).items() if name not in ("num_proc", "output_dir")},
        "sources": {task: source for task, (_, source) in sources.items()},
        "versions": {"python": sys.version.split()[0], "datasets": datasets.__version__},
    }
    old = stands_already(output_dir, report)
    if old:
        print(f"{output_dir / 'dataset'} stands already, built by the same settings from the same sources")
        report = old
    else:
        workers = args.num_proc or os.cpu_count()
        pool = workers > 1 and ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent)
        try:
            with (fresh / "rows").open("w+b") as spool:
                tasks = {task: render_task(task, args, files, pool, spool) for task, (files, _) in sources.items()}
                report["tasks"] = {task: part for task, (_, part) in tasks.items()}
                offsets = {task: part for task, (part, _) in tasks.items()}
                save(offsets, report, spool, args, output_dir, fresh)
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
    beside = output_dir / ".dataset_report.new"
    shutil.copyfile(output_dir / "dataset" / "report.json", beside)
    os.replace(beside, output_dir / "dataset_report.json")
    print_examples(output_dir)
    print_report(report)
    print(f"\n{'found' if old else 'wrote'} {output_dir / 'dataset'} and {output_dir / 'dataset_report.json'}")


if __name__ == "__main__":
    main()
