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
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import numpy
import pyarrow.parquet as pq
from tqdm import tqdm

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
SPLITS = ("train", "validation", "test")
CONTEXTS = ("question", "first", "none")
SAMSUM_COLUMNS = ("id", "dialogue", "summary")
TRIVIA_QA_TEXTS = ("question", "question_id", "answer.value", "answer.aliases.*", "entity_pages.wiki_context.*")
PASSAGE_WORDS = 100  # a passage ends at the first sentence or line end after so many words
NEAR = 0.8  # Jaccard similarity of word 5-grams from which two texts are near duplicates
BANDS, ROWS = 16, 4  # of the MinHash index: finds 99.98 % of the pairs at NEAR; the exact similarity then decides
BM25_K1, BM25_B = 1.2, 0.75  # Robertson & Zaragoza 2009
LINE_ENDS = ("\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029")
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
SENTENCE_END = re.compile(r"([.!?\n][ \n]+)")  # after a blank was put behind every \n: 4 times as fast as with a |
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
    parser.add_argument("--tasks", nargs="+", choices=list(LICENCES), default=TASKS, help="tasks to combine")
    parser.add_argument("--context", choices=CONTEXTS, default=CONTEXT, help="how a question gets its context")
    parser.add_argument("--max-context-words", type=int, default=MAX_CONTEXT_WORDS, help="words of context per prompt")
    for split in SPLITS:
        default = globals()[f"{split.upper()}_EXAMPLES_PER_TASK"]
        parser.add_argument(f"--{split}-examples-per-task", type=int, default=default, help="rows of each; 0 = all")
    parser.add_argument("--seed", type=int, default=SEED, help="of drawing and shuffling")
    parser.add_argument("--num-proc", type=int, default=NUM_PROC, help="processes; 0 = one for each CPU")
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="where dataset/ is written")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = 1 if name == "max_context_words" else 0
        if isinstance(value, int) and not least <= value < 2**31:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more and below 2**31")
    if not re.fullmatch(r"[\w.-]+", args.trivia_qa_config):
        parser.error("--trivia-qa-config must be the name of a folder")
    args.tasks = sorted(set(args.tasks))
    if not args.tasks or set(args.tasks) - set(LICENCES) or args.context not in CONTEXTS:
        parser.error(f"--tasks or --context has a value that is none of {', '.join((*LICENCES, *CONTEXTS))}")
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
            fail(f"{task}: cannot load {source} ({first_line(error)}): check the name and the network, or give a "
                 f"local folder with --{task.replace('_', '-')}")  # fmt: skip
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
    """Text with `\\n` as its only line end, without control and zero-width characters and stray blanks, or None.

    The joiners U+200C and U+200D stay: they make emoji and letters of one piece.
    """
    if not text:
        return None
    for end in LINE_ENDS:
        text = text.replace(end, "\n")
    text = INVISIBLE.sub("", text.replace("\t", " ").replace("\xa0", " "))
    text = "\n".join(line.strip(" ") for line in re.sub("  +", " ", text).split("\n"))
    return re.sub("\n\n\n+", "\n\n", text).strip() or None


def one_line(text):
    text = clean(text)
    return text and re.sub(r"\s+", " ", text)


def normalized(text):
    """TriviaQA's comparison form (official evaluation script): lower case, punctuation to space, no articles."""
    text = re.sub(r"[!-/:-@\[-`{-~\u2018\u2019\u00b4]", " ", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def read_samsum(path, broken):
    """[(id, dialogue, row)]; lines that are no CSV row of the header's columns go into the counter `broken`."""
    csv.field_size_limit(2**31 - 1)
    rows, in_step = [], True
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if missing := [column for column in SAMSUM_COLUMNS if column not in header]:
                fail(f"samsum: {path} has no column {', '.join(missing)}")
            while True:
                try:
                    fields = next(reader)
                except StopIteration:
                    return rows
                except csv.Error as error:
                    if "unexpected end" in str(error):
                        raise
                    fields = [""]
                row = dict(zip(header, fields, strict=False))
                # After a stray quote the reader may be inside a dialogue: a row counts again from the next real id on.
                in_step = len(fields) == len(header) and (in_step or re.fullmatch(r"[\w-]*\d[\w-]*", row["id"]))
                if in_step:
                    rows.append((row["id"], row["dialogue"], row))
                elif fields:  # not just an empty line
                    broken["broken CSV line"] += 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"samsum: cannot read {path} ({first_line(error)}): the file is cut off or no CSV in UTF-8")


def read_trivia_qa(path, _):
    """[(question id, question, (path, row group, row))], without touching the pages."""
    rows = []
    try:
        with pq.ParquetFile(path) as file:
            kinds = {re.sub(r"\.list\.\w+$", ".*", leaf.path): str(leaf.logical_type) for leaf in file.schema}
            for name in TRIVIA_QA_TEXTS:
                if kinds.get(name) != "String":
                    fail(f"trivia_qa: {path} has no column {name} of texts: give files as the hub has them")
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["question_id", "question"]).to_pydict()
                pairs = enumerate(zip(table["question_id"], table["question"], strict=True))
                rows += [(id_, question, (str(path), group, row)) for row, (id_, question) in pairs]
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        fail(f"trivia_qa: cannot read {path} ({first_line(error)}): the file is cut off or no parquet file")
    return rows


def carve_validation(rows, limit, seed):
    """(validation, train): a tenth of the rows, drawn with the seed, or as many as `limit` rows can need."""
    rows = random.Random(seed).sample(rows, len(rows))
    size = min(max(1, len(rows) // 10), with_spares(limit) or len(rows))
    return rows[:size], rows[size:]


def with_spares(limit):
    return limit and 2 * limit + 50  # some rows are dropped later


def comparison_key(text):
    """What two texts must share to be the same; "" where there is no text."""
    return normalized(unicodedata.normalize("NFKC", clean(text) or ""))


def word_5_grams(key):
    """The set of a text's word 5-grams and its MinHash."""
    from datasketch import MinHash

    words = key.split()
    grams = {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
    minhash = MinHash(num_perm=BANDS * ROWS)
    minhash.update_batch([gram.encode() for gram in grams])
    return grams, minhash


def index_texts(splits):
    """({text: why rows of other splits that hold it must go}, MinHash index) of all test and validation texts.

    Test goes before train and train before validation: what is in validation has no reason until train holds it.
    """
    from datasketch import MinHashLSH

    reasons, lsh = {}, MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    for split, reason in (("test", "also in test"), ("validation", None)):
        for key in (comparison_key(text) for _, text, _ in splits[split]):
            if key and key not in reasons:
                reasons[key] = reason
                lsh.insert(key, word_5_grams(key)[1])
    return reasons, lsh


def near_matches(lsh, key):
    """The other texts of the index with NEAR or more of their word 5-grams in common with this one, best first."""
    grams, minhash = word_5_grams(key)
    found = []
    for other in lsh.query(minhash):
        others = word_5_grams(other)[0]
        found.append((len(grams & others) / len(grams | others), other))
    return [other for similarity, other in sorted(found, reverse=True) if similarity >= NEAR and other != key]


def overlap(split, key, reasons, lsh, examples):
    """Why a text of train or validation cannot stay beside the other splits, or None."""
    reason = reasons.get(key)
    if reason and (split == "validation" or reason == "also in test"):
        return reason
    matches = near_matches(lsh, key)
    for other in matches:
        if reasons[other] == "also in test":
            examples.append({"split": split, "text": key, "near": other})
            return "nearly in test"
    if split == "train":
        reasons.update({other: reasons[other] or "nearly in train" for other in matches})
        if key in reasons:
            reasons[key] = "also in train"
    return None


def usable_rows(task, split, rows, texts, counts, examples):
    """Yield where to find the rows that may be used, in order; the others are counted by reason."""
    keys, ids = set(), set()
    for row_id, text, where in rows:
        row_id, key = one_line(row_id), comparison_key(text)
        if not row_id:
            reason = "no id"
        elif not key:
            reason = "empty dialogue" if task == "samsum" else "empty question"
        elif key in keys:
            reason = "duplicate"
        elif row_id in ids:
            reason = "duplicate id"
        else:
            reason = None if split == "test" else overlap(split, key, *texts, examples)
        counts["looked at"] += 1
        if reason:
            counts[reason] += 1
        else:
            keys.add(key)
            ids.add(row_id)
            yield where


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
    Of the passage that no longer fits, the first whole sentences are taken.
    """
    texts = passages(pages)
    query = set(re.findall(r"\w+", question.lower())) - set(STOP_WORDS.split())
    wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, query)) or '(?!)'})\b")
    counts = [Counter(wanted.findall(text.lower())) for text in texts]
    mean = sum(map(len, texts)) / max(len(texts), 1)
    in_passages = Counter(word for count in counts for word in count)
    idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in in_passages.items()}

    def score(i):
        norm = BM25_K1 * (1 - BM25_B + BM25_B * len(texts[i]) / mean)
        return sum(idf[word] * tf * (BM25_K1 + 1) / (tf + norm) for word, tf in sorted(counts[i].items()))

    chosen, left = {}, max_words
    for i in sorted(range(len(texts)), key=lambda i: (-score(i), i)):
        words = len(texts[i].split())
        if words > left:
            cut = first_words([texts[i]], left)
            whole = re.match(r"(?s).*([.!?]\s|\n)", cut + " ")
            chosen[i] = whole[0].strip() if whole else "" if chosen else cut
            break
        chosen[i] = texts[i]
        left -= words
    return "\n".join(chosen[i] for i in sorted(chosen) if chosen[i])


def first_words(pages, max_words):
    """The first words of the pages, line ends kept: what the official converter takes."""
    words = islice(re.finditer(r"\S+", text := "\n".join(pages)), max_words)
    return text[: max((word.end() for word in words), default=0)].strip()


def holds(context, aliases):
    """Whether a context holds one of the normalised aliases as whole words."""
    text = f" {normalized(context)} "
    return any(f" {alias} " in text for alias in aliases)


def render_samsum(batch, *_):
    """[(rank, rendered row or the reason why there is none, {})]"""
    results = []
    for rank, row in batch:
        dialogue, summary = clean(row["dialogue"]), one_line(row["summary"])
        prompt = PROMPTS["samsum"].format(dialogue=dialogue)
        item = make_row("samsum", row["id"], prompt, summary, [summary], True) if summary else "empty summary"
        results.append((rank, item, {}))
    return results


def render_trivia_qa(row, split, context, max_words):
    """The rendered row, or the reason (a string) why there is none, and where an alias was: {way: bool}."""
    question, answer = one_line(row["question"]), row["answer"] or {}
    value = one_line(answer.get("value"))
    aliases = [alias for alias in map(one_line, answer.get("aliases") or []) if alias and normalized(alias)]
    if not value or not aliases:
        return "no answer or no aliases", {}
    references = list(dict.fromkeys([value, *aliases]))
    names = {name for name in map(normalized, references) if name}
    if context == "none":
        prompt = PROMPTS["closed book"].format(question=question)
        return make_row("trivia_qa", row["question_id"], prompt, value, references, False), {}
    pages = [page for page in map(clean, (row["entity_pages"] or {}).get("wiki_context") or []) if page]
    if not pages:
        return "no pages", {}
    texts = {"question": choose_context(question, pages, max_words), "first": first_words(pages, max_words)}
    found = {way: holds(text, names) for way, text in texts.items()}
    if split != "test" and not found[context]:
        return "answer not in context", found
    prompt = PROMPTS["trivia_qa"].format(context=texts[context], question=question)
    return make_row("trivia_qa", row["question_id"], prompt, value, references, found[context]), found


def make_row(task, row_id, prompt, completion, references, answer_in_context):
    row = {"id": f"{task}:{one_line(row_id)}", "task": task, "prompt": prompt, "completion": f" {completion}"}
    return row | {"references": references, "answer_in_context": answer_in_context}


def render_trivia_qa_batch(batch, split, context, max_words):
    """Render questions of one row group: [(rank, row or reason, found)], or a sentence on a bad file.

    Runs in a process of its own. The row group is read in small batches, so that memory does not grow with it.
    """
    path, group, _ = batch[0][1]
    ranks = {row: rank for rank, (_, _, row) in batch}
    columns = ["question", "question_id", "answer"] + ["entity_pages.wiki_context"] * (context != "none")
    results, start = [], 0
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            for table in file.iter_batches(batch_size=16, row_groups=[group], columns=columns):
                for i in (i for i in range(len(table)) if start + i in ranks):
                    row = table.slice(i, 1).to_pylist()[0]
                    results.append((ranks[start + i], *render_trivia_qa(row, split, context, max_words)))
                start += len(table)
                if start > max(ranks):
                    break
    except (OSError, ValueError) as error:
        return f"trivia_qa: cannot read {path} ({first_line(error)}): the file is cut off or broken"
    return results


def start_worker():
    """Leave Ctrl-C to the parent, and end with it: a killed build would leave its workers waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def render_split(task, split, where, args, counts, pool, spool):
    """Render rows of a split to `spool` until there are enough: (offsets in the order of `where`, hit counts)."""
    limit = getattr(args, f"{split}_examples_per_task")
    render = render_samsum if task == "samsum" else render_trivia_qa_batch
    run = pool.map if pool and task == "trivia_qa" else map
    ranked, kept, hits = enumerate(where), [], Counter()
    while drawn := list(islice(ranked, with_spares(limit - len(kept)) if limit else None)):
        batches = {}  # of one row group each, and not too large for a progress bar
        for rank, place in drawn:
            batches.setdefault(rank // 1000 if task == "samsum" else place[:2], []).append((rank, place))
        rest = [[value] * len(batches) for value in (split, args.context, args.max_context_words)]
        with tqdm(total=len(drawn), desc=f"{task} {split}", disable=None, leave=False) as progress:
            for results in run(render, batches.values(), *rest):
                if isinstance(results, str):
                    fail(results)
                for rank, row, found in results:
                    hits.update({"rows": 1} | found if found else {})
                    if isinstance(row, str):
                        counts[row] += 1
                    else:
                        kept.append((rank, spool.tell()))
                        spool.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                progress.update(len(results))
        if limit and len(kept) >= limit:
            break
    offsets = [offset for _, offset in sorted(kept)][: limit or None]
    counts["spare"], counts["kept"] = len(kept) - len(offsets), len(offsets)
    return offsets, hits


def render_task(task, args, files, pool, spool):
    """{split: offsets of the rendered rows in `spool`}, and the task's part of the report."""
    counts = {split: Counter() for split in SPLITS}
    read = {"samsum": read_samsum, "trivia_qa": read_trivia_qa}[task]
    rows = {split: [row for path in paths for row in read(path, counts[split])] for split, paths in files.items()}
    if task == "trivia_qa":
        limit = args.validation_examples_per_task
        rows["validation"], rows["train"] = carve_validation(rows["train"], limit, args.seed)
    texts, examples, offsets, rates = index_texts(rows), [], {}, {}
    for split in ("test", "train", "validation"):  # validation last: it gives way to train
        order = random.Random(args.seed).sample(rows[split], len(rows[split]))
        where = usable_rows(task, split, order, texts, counts[split], examples)
        offsets[split], hits = render_split(task, split, where, args, counts[split], pool, spool)
        counts[split] = {"available": len(rows[split]), **counts[split]}
        if not offsets[split] and split != "validation":  # another task's validation rows may do
            found = ", ".join(f"{reason}: {n}" for reason, n in counts[split].items())
            fail(f"{task}: no usable row for {split} ({found}): check the source and the example counts")
        rates[split] = {way: hits[way] / max(1, hits["rows"]) for way in ("question", "first")} | {
            "rows": hits["rows"]
        }
    report = {"counts": counts, "near_duplicates": examples[:10]}
    return offsets, report | ({"answer_in_context": rates} if task == "trivia_qa" else {})


def read_rows(spool, offsets):
    for offset in offsets:
        spool.seek(offset)
        yield json.loads(spool.readline())


def describe(rows):
    """The report on a split: its number of rows, a hash of them, and how long their texts are."""
    digest, lengths, report = hashlib.sha256(), {}, {"rows": 0}
    for row in rows:
        report["rows"] += 1
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        for column in ("prompt", "completion"):
            for unit, size in (("words", len(row[column].split())), ("characters", len(row[column]))):
                lengths.setdefault(f"{row['task']} {column} {unit}", []).append(size)
    report["sha256"] = digest.hexdigest()
    for name, sizes in lengths.items():
        p50, p95 = numpy.percentile(sizes, [50, 95])
        report[name] = {"mean": sum(sizes) / len(sizes), "p50": float(p50), "p95": float(p95), "max": max(sizes)}
    return report


def save(offsets, report, spool, seed, fresh, target, old):
    """Write the data set from the spool into `fresh`, then put it in the place of the one at `target`."""
    from datasets import Dataset

    report["splits"] = {}
    for split in SPLITS:
        order = [offset for task in offsets for offset in task[split]]
        if not order:
            fail(f"no usable row for {split}: check the sources and the example counts")
        random.Random(seed).shuffle(order)
        report["splits"][split] = describe(read_rows(spool, order))
        rows = Dataset.from_generator(lambda order=order: read_rows(spool, order), cache_dir=str(fresh / split))
        # save_to_disk would copy the rows through memory: one row shows it where they go, then their file goes there
        folder, (written,) = fresh / "dataset" / split, [Path(file["filename"]) for file in rows.cache_files]
        rows.select(range(1)).save_to_disk(folder)
        state = json.loads((folder / "state.json").read_text())
        os.replace(written, folder / state["_data_files"][0]["filename"])
        fingerprint = {"_fingerprint": report["splits"][split]["sha256"][:32]}
        (folder / "state.json").write_text(json.dumps(state | fingerprint, indent=2) + "\n")
    (fresh / "dataset" / "dataset_dict.json").write_text(json.dumps({"splits": list(SPLITS)}) + "\n")
    (fresh / "dataset" / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if target.exists():
        target.rename(old)
    (fresh / "dataset").rename(target)
    shutil.rmtree(old, ignore_errors=True)


def stands_already(target, report):
    """The report of the data set at `target` where it came from the same script, settings and sources, or None."""
    from datasets import load_from_disk

    try:
        old = json.loads((target / "report.json").read_text())
        same = all(old[key] == json.loads(json.dumps(report[key])) for key in ("script", "settings", "sources"))
        data = load_from_disk(str(target))
        return old if same and all(len(data[split]) == old["splits"][split]["rows"] for split in SPLITS) else None
    except Exception:  # whatever is missing or broken there: build it anew
        return None


def print_report(report):
    def line(name, cells):
        print(f"{name:<28}" + "".join(f"{cell:>17}" for cell in cells))

    for task, part in report["tasks"].items():
        print()
        line(task, SPLITS)
        reasons = dict.fromkeys(name for split in SPLITS for name in part["counts"][split])
        for name in sorted(reasons, key=lambda name: name in ("spare", "kept")):  # these two last
            line(f"  {name}", [f"{part['counts'][split].get(name, 0):,}" for split in SPLITS])
        for way in ("question", "first") if "answer_in_context" in part else ():
            line(f"  answer in, {way}", [f"{part['answer_in_context'][split][way]:.1%}" for split in SPLITS])
    print()
    line("words, mean / p95 / max", SPLITS)
    for name in sorted({name for split in report["splits"].values() for name in split if name.endswith("words")}):
        cells = [report["splits"][split].get(name) for split in SPLITS]
        cells = [f"{cell['mean']:.0f} / {cell['p95']:.0f} / {cell['max']}" if cell else "" for cell in cells]
        line(f"  {name.removesuffix(' words')}", cells)


def print_examples(train):
    """One short training row of each task, as the model sees it."""
    for task in sorted(train.unique("task")):
        some = islice((i for i, other in enumerate(train["task"]) if other == task), 200)
        row = min(train.select(list(some)), key=lambda row: len(row["prompt"]))
        print(f"\n--- {task}: {row['id']} (prompt, then [completion]) ---\n{row['prompt']}[{row['completion']}]")


def build(args, output_dir, fresh, target, old):
    """Build the data set at `target` unless it stands there already; write and print its report."""
    import datasets

    datasets.disable_progress_bars()
    sources = {task: find_files(task, args) for task in args.tasks}
    report = {
        "script": sha256(Path(__file__)),
        "settings": {name: value for name, value in vars(args).items() if name not in ("num_proc", "output_dir")},
        "sources": {task: source for task, (_, source) in sources.items()},
        "versions": {"python": sys.version.split()[0], "datasets": datasets.__version__},
        "tasks": {},
    }
    if stands := stands_already(target, report):
        print(f"{target} stands already, built by the same settings from the same sources")
        report = stands
    else:
        build_anew(args, sources, report, fresh, target, old)
    shutil.copyfile(target / "report.json", fresh / "report.json")
    os.replace(fresh / "report.json", output_dir / "dataset_report.json")
    print_examples(datasets.load_from_disk(str(target / "train")))
    print_report(report)
    print(f"\n{'found' if stands else 'wrote'} {target} and {output_dir / 'dataset_report.json'}")


def build_anew(args, sources, report, fresh, target, old):
    workers = args.num_proc or os.cpu_count()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) if workers > 1 else None
    offsets = []
    try:
        with (fresh / "rows").open("w+b") as spool:
            for task, (files, _) in sources.items():
                found, report["tasks"][task] = render_task(task, args, files, pool, spool)
                offsets.append(found)
            save(offsets, report, spool, args.seed, fresh, target, old)
    except BrokenProcessPool:
        fail("a process that chose contexts was killed, often for want of memory: try again with a lower --num-proc")
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def main(argv=None):
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    fresh, target, old = (output_dir / name for name in (".dataset.new", "dataset", ".dataset.old"))
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if old.exists() and not target.exists():  # a build was killed between its last two steps
            old.rename(target)
        if target.exists() and not (target / "dataset_dict.json").exists():
            fail(f"{target} is no data set: move it away, or choose another --output-dir")
        for leftover in (old, fresh):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        build(args, output_dir, fresh, target, old)
    except OSError as error:
        fail(f"cannot write to {output_dir}: {error.strerror or first_line(error)}")
    except KeyboardInterrupt:
        print("interrupted; the data set that was there before stands", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


if __name__ == "__main__":
    main()
