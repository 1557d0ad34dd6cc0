"""Build one data set for two tasks: samsum (dialogue summarisation) and trivia_qa (answering from a context).

Cleans the rows, renders each with its task's prompt template, drops what cannot be learned from, combines and shuffles
the tasks, and prints what came in, what was dropped and why, and what is in each split. The context of a question is
chosen by the question alone: nothing about the answer touches a test prompt.

Reads:  samsum and trivia_qa, each a hub id or a local folder laid out like the hub repository.
Writes: OUTPUT_DIR/dataset/ (a DatasetDict: train, validation, test) and OUTPUT_DIR/dataset_report.json.

    python build_dataset.py
    python build_dataset.py --samsum tests/fixtures/samsum --trivia-qa tests/fixtures/trivia_qa
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter
from pathlib import Path

# Settings: edit here, or override for one run on the command line.
SAMSUM = "knkarthick/samsum"  # hub id or local folder with train.csv, validation.csv, test.csv
TRIVIA_QA = "mandarjoshi/trivia_qa"  # hub id or local folder with TRIVIA_QA_CONFIG/*.parquet
TRIVIA_QA_CONFIG = "rc.wikipedia"  # a folder of the trivia_qa repository
TASKS = ["samsum", "trivia_qa"]  # one alone trains a single-task model
MAX_CONTEXT_WORDS = 300  # words of the pages that go into a trivia_qa prompt
TRAIN_EXAMPLES_PER_TASK = 5000  # 0 = all; sampled before the work, so that a small run is quick
VALIDATION_EXAMPLES_PER_TASK = 200  # 0 = all (trivia_qa carves validation out of train: there, a tenth of it)
TEST_EXAMPLES_PER_TASK = 500  # 0 = all
SEED = 0
OUTPUT_DIR = "outputs"

# Fixed
ALL_TASKS = ("samsum", "trivia_qa")
PROMPTS = {  # the prompt ends without a blank and the completion begins with one, so both tokenizers split there
    "samsum": "Summarize the dialogue.\n\nDialogue:\n{dialogue}\n\nSummary:",
    "trivia_qa": "Answer the question from the context.\n\nContext:\n{context}\n\nQuestion: {question}\nAnswer:",
}
PASSAGE_WORDS = 100  # a passage of the pages ends at the first sentence or line end after so many words
SAMSUM_COLUMNS = ("id", "dialogue", "summary")
TRIVIA_QA_COLUMNS = ("question", "question_id", "entity_pages", "answer")
SPLITS = ("train", "validation", "test")
INVISIBLE = re.compile("[\u200b-\u200f\u2028-\u202e\u2060\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
ARTICLES = {"a", "an", "the"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--samsum", default=SAMSUM, help="hub id or local folder")
    parser.add_argument("--trivia-qa", default=TRIVIA_QA, help="hub id or local folder")
    parser.add_argument("--trivia-qa-config", default=TRIVIA_QA_CONFIG, help="folder of the trivia_qa repository")
    parser.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=TASKS, help="tasks to combine")
    parser.add_argument("--max-context-words", type=int, default=MAX_CONTEXT_WORDS, help="words of context per prompt")
    for split in SPLITS:
        name = f"{split}_examples_per_task"
        flag = f"--{split}-examples-per-task"
        parser.add_argument(flag, type=int, default=globals()[name.upper()], help="0 = all")
    parser.add_argument("--seed", type=int, default=SEED, help="of sampling and shuffling")
    parser.add_argument("--output-dir", default=OUTPUT_DIR, help="where dataset/ is written")
    args = parser.parse_args(argv)
    if args.max_context_words < 1:
        parser.error("--max-context-words must be at least 1")
    for split in SPLITS:
        if getattr(args, f"{split}_examples_per_task") < 0:
            parser.error(f"--{split}-examples-per-task must be 0 (all) or more")
    if args.seed < 0:
        parser.error("--seed must be 0 or more")
    args.tasks = sorted(set(args.tasks))
    return args


def fail(message):
    """Print one sentence on stderr and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_source(source, task, data_files, columns, **kwargs):
    """Load {split: Dataset} with exactly `columns`; `source` is a hub id or a local folder of the same layout."""
    from datasets import load_dataset

    folder = Path(source)
    if folder.is_dir():
        for pattern in data_files.values():
            if not list(folder.glob(pattern)):
                fail(f"{task}: no {pattern} in {source}: the folder must be laid out like the hub repository")
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        fail(f"{task}: no folder {source}, and it is no hub id (owner/name) either")
    loaded = {}
    for split, pattern in data_files.items():
        try:
            loaded[split] = load_dataset(source, data_files={split: pattern}, split=split, **kwargs)
        except Exception as error:  # the libraries raise a dozen kinds; each means that this file could not be read
            cause = error.__cause__ or error
            if folder.is_dir():
                fail(f"{task}: cannot read {folder / pattern}: {type(cause).__name__}: {first_line(cause)}")
            fail(
                f"{task}: cannot load {source} ({first_line(cause)}): check the name and the network, or give a local "
                f"folder with --{task.replace('_', '-')}"
            )
        missing = [column for column in columns if column not in loaded[split].column_names]
        if missing:
            fail(f"{task}: {pattern} of {source} has no column {', '.join(missing)}")
        loaded[split] = loaded[split].select_columns(list(columns))
    return loaded


def first_line(error):
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def clean(text):
    """Text without `\\r`, control and zero-width characters, stray blanks; None where it is no text or empty."""
    if not isinstance(text, str):
        return None
    text = INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ").replace("\xa0", " "))
    lines = [re.sub(r" {2,}", " ", line).strip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() or None


def one_line(text):
    text = clean(text)
    return text and re.sub(r"\s+", " ", text)


def normalized(text):
    """TriviaQA's comparison form (official evaluation script): lower case, punctuation to space, no articles."""
    text = text.replace("_", " ").lower()
    text = re.sub(r"[!-/:-@\[-`{-~\u2018\u2019\u00b4]", " ", text)
    return " ".join(word for word in text.split() if word not in ARTICLES)


def passages(pages):
    """Split pages into passages of about PASSAGE_WORDS words that end at a sentence or line end."""
    result = []
    for page in pages:
        words = 0
        current = []
        for sentence in re.findall(r"[^\n]+?(?:[.!?][\"')\]]*(?=\s)|$)\s*", page, flags=re.MULTILINE):
            current.append(sentence)
            words += len(sentence.split())
            if words >= PASSAGE_WORDS:
                result.append("".join(current).strip())
                current, words = [], 0
        if words:
            result.append("".join(current).strip())
    return result


def choose_context(question, pages, max_words):
    """The passages nearest to the question by TF-IDF within its own pages, in document order, at most max_words words.

    After Clark & Gardner 2017 (document-qa): cosine of TF-IDF vectors. Only the question and the pages are looked at.
    """
    candidates = passages(pages)
    counts = [Counter(normalized(passage).split()) for passage in candidates]
    document_frequency = Counter(word for count in counts for word in count)
    idf = {word: math.log(1 + len(counts) / frequency) for word, frequency in document_frequency.items()}
    query = set(normalized(question).split())
    scores = []
    for count in counts:
        norm = math.sqrt(sum((tf * idf[word]) ** 2 for word, tf in count.items())) or 1.0
        scores.append(sum(count[word] * idf[word] ** 2 for word in query if word in count) / norm)
    chosen, left = {}, max_words
    for index in sorted(range(len(candidates)), key=lambda i: (-scores[i], i)):
        words = candidates[index].split()
        if len(words) <= left or not chosen:
            chosen[index] = candidates[index] if len(words) <= left else " ".join(words[:left])
            left -= min(len(words), left)
        if left < PASSAGE_WORDS // 4:
            break
    return "\n".join(chosen[index] for index in sorted(chosen))


def samsum_row(row, args, split):
    """One rendered row, or the reason (a string) why there is none."""
    dialogue, summary = clean(row["dialogue"]), one_line(row["summary"])
    if not row["id"]:
        return "no id"
    if not dialogue:
        return "empty dialogue"
    if not summary:
        return "empty summary"
    prompt = PROMPTS["samsum"].format(dialogue=dialogue)
    return make_row(f"samsum:{row['id']}", "samsum", prompt, summary, [summary], True, dialogue)


def trivia_qa_row(row, args, split):
    """One rendered row, or the reason (a string) why there is none. Test rows are kept whatever the context holds."""
    question, answer = one_line(row["question"]), row["answer"] or {}
    pages = [page for page in map(clean, (row["entity_pages"] or {}).get("wiki_context") or []) if page]
    value = one_line(answer.get("value"))
    aliases = [one_line(alias) for alias in [answer.get("value"), *(answer.get("aliases") or [])]]
    aliases = list(dict.fromkeys(alias for alias in aliases if alias and normalized(alias)))
    if not row["question_id"]:
        return "no id"
    if not question:
        return "empty question"
    if not pages:
        return "no pages"
    if not value or not aliases or not answer.get("aliases"):
        return "no answer"
    context = choose_context(question, pages, args.max_context_words)
    text = f" {normalized(context)} "
    found = any(f" {normalized(alias)} " in text for alias in aliases)
    if split != "test" and not found:
        return "answer not in context"
    prompt = PROMPTS["trivia_qa"].format(context=context, question=question)
    return make_row(f"trivia_qa:{row['question_id']}", "trivia_qa", prompt, value, aliases, found, question)


def make_row(row_id, task, prompt, completion, references, answer_in_context, key):
    row = {"id": row_id, "task": task, "prompt": prompt, "completion": f" {completion}", "references": references}
    row["answer_in_context"] = answer_in_context
    return row | {"key": " ".join(normalized(unicodedata.normalize("NFKC", key)).split())}


def with_spares(limit):
    """How many raw rows to draw for `limit` rendered ones: some are dropped later."""
    return limit and 2 * limit + 50


def sample(dataset, limit, seed):
    """The first `limit` rows (all for 0) in an order drawn with the seed, and spare ones."""
    return dataset.shuffle(seed=seed).select(range(min(len(dataset), with_spares(limit) or len(dataset))))


def load_task(task, args):
    """{split: Dataset} of raw rows of one task, sampled."""
    limits = {split: getattr(args, f"{split}_examples_per_task") for split in SPLITS}
    if task == "samsum":
        files = {split: f"{split}.csv" for split in SPLITS}
        raw = load_source(
            args.samsum,
            task,
            files,
            SAMSUM_COLUMNS,
            keep_default_na=False,
            converters=dict.fromkeys(SAMSUM_COLUMNS, str),
        )
    else:
        # The hub's test split has no answers: its validation split is our test, our validation is carved out of train.
        files = {"train": "train-*.parquet", "test": "validation-*.parquet"}
        files = {split: f"{args.trivia_qa_config}/{pattern}" for split, pattern in files.items()}
        raw = load_source(args.trivia_qa, task, files, TRIVIA_QA_COLUMNS)
        rows = raw["train"].shuffle(seed=args.seed)
        tenth = max(1, min(len(rows) // 10, with_spares(limits["validation"]) or len(rows)))
        raw["validation"], raw["train"] = rows.select(range(tenth)), rows.select(range(tenth, len(rows)))
    return {split: (len(raw[split]), sample(raw[split], limits[split], args.seed)) for split in SPLITS}, limits


def render_task(task, args):
    """Rows per split and {split: Counter of reasons}; test first, so that train and validation hold none of it."""
    from tqdm import tqdm

    raw, limits = load_task(task, args)
    render = {"samsum": samsum_row, "trivia_qa": trivia_qa_row}[task]
    rows, report, seen, taken = {}, {}, {}, set()
    for split in ("test", "validation", "train"):
        available, dataset = raw[split]
        kept, reasons = [], Counter()
        progress = tqdm(dataset, desc=f"{task} {split}", disable=None, leave=False)
        for row in progress:
            if limits[split] and len(kept) == limits[split]:
                break
            reasons["read"] += 1
            item = render(row, args, split)
            if not isinstance(item, str):
                key = item.pop("key")
                if key in seen:
                    item = "duplicate" if seen[key] == split else f"also in {seen[key]}"
                elif item["id"] in taken:
                    item = "duplicate id"
            if isinstance(item, str):
                reasons[item] += 1
                continue
            seen[key] = split
            taken.add(item["id"])
            kept.append(item)
        if not kept:
            fail(f"{task}: no usable row for {split} ({dict(reasons)}): check the source and the example counts")
        rows[split], report[split] = kept, {"available": available, "kept": len(kept), **reasons}
    return rows, report


def save(splits, report, output_dir):
    """Write the data set beside and rename it, so that a whole one stands there at any moment."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    text = Value("string")
    features = Features(
        id=text,
        task=text,
        prompt=text,
        completion=text,
        references=List(text),
        answer_in_context=Value("bool"),
    )
    target, fresh, old = (output_dir / name for name in ("dataset", ".dataset.new", ".dataset.old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    data = DatasetDict({name: Dataset.from_list(splits[name], features=features) for name in SPLITS})
    data.save_to_disk(fresh)
    (fresh / "report.json").write_text(json.dumps(report, indent=2))
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    os.replace(target / "report.json", output_dir / "dataset_report.json")
    shutil.rmtree(old, ignore_errors=True)


def combine(tasks, seed):
    """The tasks' rows of each split in one list, shuffled with the seed."""
    import random

    splits = {}
    for split in SPLITS:
        splits[split] = [row for rows in tasks.values() for row in rows[split]]
        random.Random(seed).shuffle(splits[split])
    return splits


def print_report(report):
    for task, splits in report["tasks"].items():
        print(f"\n{task:<24}" + "".join(f"{split:>12}" for split in SPLITS))
        reasons = dict.fromkeys(name for split in SPLITS for name in splits[split])
        for name in [*(n for n in reasons if n != "kept"), "kept"]:
            print(f"  {name:<22}" + "".join(f"{splits[split].get(name, 0):>12,}" for split in SPLITS))


def main(argv=None):
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink()
    except OSError as error:
        fail(f"cannot write to {output_dir}: {error.strerror}")
    import datasets

    datasets.disable_progress_bars()
    rendered = {task: render_task(task, args) for task in args.tasks}
    splits = combine({task: rows for task, (rows, _) in rendered.items()}, args.seed)
    report = {
        "settings": vars(args),
        "versions": {"python": sys.version.split()[0], "datasets": datasets.__version__},
        "tasks": {task: counts for task, (_, counts) in rendered.items()},
        "rows": {split: len(rows) for split, rows in splits.items()},
        "answer_in_context": {
            split: sum(row["answer_in_context"] for row in rows if row["task"] == "trivia_qa")
            for split, rows in splits.items()
        },
    }
    save(splits, report, output_dir)
    print_report(report)
    print(f"\nwrote {output_dir / 'dataset'} and {output_dir / 'dataset_report.json'}")


if __name__ == "__main__":
    main()
