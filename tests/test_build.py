"""build_dataset.py: clean rows, honest contexts, the same rows for the same seed, one sentence for bad input."""

import csv
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES, ROOT, SMALL, SOURCES, assert_refused, run, snapshot
from datasets import load_from_disk
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from planted import PLANTED, SAMSUM_ROWS, TRIVIA_QA_ROWS

import build_dataset
from pipeline.files import built_tasks, only_run_in
from pipeline.texts import NearTexts, clean, comparison_key, holds
from tasks import TASKS, trivia_qa


def build(output, *arguments):
    """A build in one process: to start two takes longer than such a build."""
    return run("build_dataset.py", *SOURCES, *SMALL, "--num-proc", 1, "--output-dir", output, *arguments)


def counts_of(output, task):
    return json.loads((output / "dataset_report.json").read_text())["tasks"][task]["counts"]


def rows_of(output):
    return {split: rows.to_list() for split, rows in load_from_disk(str(output / "dataset")).items()}


def test_columns_and_splits_are_those_of_the_contract(dataset):
    data = load_from_disk(str(dataset / "dataset"))
    assert set(data) == {"train", "validation", "test"}
    columns = ["id", "task", "prompt", "completion", "references", "answer_in_context"]
    assert all(rows.column_names == columns for rows in data.values())
    assert {len(rows) for rows in (data["train"], data["validation"], data["test"])} == {24, 8, 12}


def test_prompts_end_without_a_blank_and_completions_begin_with_one(dataset):
    for rows in rows_of(dataset).values():
        for row in rows:
            assert row["prompt"].endswith(":") and row["completion"][0] == " " and row["completion"][1] != " "
            assert row["completion"] == row["completion"].rstrip()
            assert "\r" not in row["prompt"] and "\u200b" not in row["prompt"]


def test_the_same_seed_gives_the_same_rows_and_another_does_not(dataset, tmp_path):
    assert build(tmp_path / "again").returncode == 0
    assert rows_of(tmp_path / "again") == rows_of(dataset)
    assert build(tmp_path / "other", "--seed", "1").returncode == 0
    assert rows_of(tmp_path / "other") != rows_of(dataset)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """An output dir with every row of the fixtures."""
    output = tmp_path_factory.mktemp("everything")
    sizes = [f"--{split}-examples-per-task=0" for split in ("train", "validation", "test")]
    assert run("build_dataset.py", *SOURCES, *sizes, "--output-dir", output).returncode == 0
    return output


def test_no_row_of_train_or_validation_stands_in_test(everything):
    splits = rows_of(everything)
    prompts = {split: {row["prompt"] for row in rows} for split, rows in splits.items()}
    assert not prompts["test"] & (prompts["train"] | prompts["validation"])
    assert not prompts["validation"] & prompts["train"]
    for task in ("samsum", "trivia_qa"):
        assert sum(row["task"] == task for row in splits["train"]) >= 400
        assert sum(row["task"] == task for row in splits["test"]) >= 100


def test_one_task_alone(tmp_path):
    assert build(tmp_path, "--tasks", "samsum").returncode == 0
    assert {row["task"] for rows in rows_of(tmp_path).values() for row in rows} == {"samsum"}


def with_other_answers(pattern, folder):
    """The trivia_qa fixture in `folder`, every answer and alias of its `pattern` file replaced."""
    other = {"value": "With", "aliases": ["with", "Quetzalcoatl"]}
    return edit_trivia_qa(folder, lambda row: row | {"answer": row["answer"] | other}, pattern=pattern)


def test_test_prompts_do_not_depend_on_the_answers(dataset, tmp_path):
    other = with_other_answers("validation-*.parquet", tmp_path / "trivia_qa")
    assert build(tmp_path / "out", "--trivia-qa", other).returncode == 0
    prompts = [[row["prompt"] for row in rows_of(folder)["test"]] for folder in (dataset, tmp_path / "out")]
    assert prompts[0] == prompts[1]


def test_of_the_train_answers_only_dropping_depends(tmp_path):
    arguments = ["--tasks", "trivia_qa", "--train-examples-per-task", 0]
    assert build(tmp_path / "one", *arguments).returncode == 0
    other = with_other_answers("train-*.parquet", tmp_path / "trivia_qa")
    assert build(tmp_path / "two", *arguments, "--trivia-qa", other).returncode == 0
    one, two = ({r["id"]: r["prompt"] for r in rows_of(tmp_path / name)["train"]} for name in ("one", "two"))
    both = set(one) & set(two)
    assert both and set(one) != set(two)
    assert all(one[row_id] == two[row_id] for row_id in both)


@pytest.mark.parametrize(
    "dirty, expected",
    [
        ("A: hi\r\nB: ho \r\n", "A: hi\nB: ho"),
        ("  A:  <file_photo>\t", "A: <file_photo>"),
        ("a\u200bb\x07c", "abc"),
        ("caf\u00e9 \U0001f600", "caf\u00e9 \U0001f600"),
        ("\U0001f937\u200d\u2642\ufe0f", "\U0001f937\u200d\u2642\ufe0f"),  # one emoji, not two
        ("one\x0ctwo\u2028three\x85four", "one\ntwo\nthree\nfour"),
        (" \r\n", None),
        (None, None),
    ],
)
def test_clean(dirty, expected):
    assert clean(dirty) == expected


def test_the_context_is_the_passage_that_shares_words_with_the_question():
    filler = "Nothing of note happened in the valley that year. " * 12
    page = filler + "\nThe old bridge at Torvale was built by Ann Marsh.\n" + filler
    context = trivia_qa.choose_context("Who built the bridge at Torvale?", [filler, page], 130)
    assert "Ann Marsh" in context and len(context.split()) <= 130


def test_a_passage_that_no_longer_fits_gives_its_first_whole_sentences():
    near = "Torvale has an old painted bridge. " * 17  # 102 words
    next_best = "The bridge was painted by Ann Marsh. " * 15
    filler = "Nothing of note happened in the valley that year. " * 13
    question = "Who painted the bridge at Torvale?"
    context = trivia_qa.choose_context(question, [near, filler, next_best], 142)
    assert context.count("Torvale") == 17 and context.count("Ann Marsh.") == 5  # 35 of the 40 words left
    assert context.endswith("Ann Marsh.") and "Nothing" not in context
    turned = trivia_qa.choose_context(question, [next_best, filler, near], 142)
    assert turned.split("\n") == context.split("\n")[::-1]  # in the order of the document, not of nearness
    assert trivia_qa.choose_context("Who?", ["one two three four"], 3) == "one two three"


def test_of_passages_that_share_as_many_words_the_shorter_is_nearer_and_then_the_earlier():
    texts = ["A bridge, and many other things besides.", "A bridge.", "The bridge", "Nothing."]
    assert trivia_qa.nearest_first("Which bridge?", [*texts, texts[1]]) == [1, 4, 2, 0, 3]


def break_missing_file(folder):
    (folder / "samsum" / "test.csv").unlink()


def break_header(folder):
    path = folder / "samsum" / "test.csv"
    path.write_bytes(path.read_bytes().replace(b"summary", b"abstract", 1))


def break_parquet(folder):
    path = next(folder.rglob("validation-*.parquet"))
    path.write_bytes(path.read_bytes()[:5000])


def break_inside_parquet(folder):
    path = next(folder.rglob("train-*.parquet"))
    data = bytearray(path.read_bytes())
    data[3000:23000] = bytes(20000)  # the pages: only a worker reads them
    path.write_bytes(data)


def break_column(folder):
    path = next(folder.rglob("validation-*.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["entity_pages"]), path)


def break_rows(folder):
    path = folder / "samsum" / "train.csv"
    path.write_text("id,dialogue,summary\n")


@pytest.mark.parametrize(
    "break_it, words",
    [
        (break_missing_file, ["samsum: no test.csv"]),
        (break_header, ["test.csv", "no column summary"]),
        (break_parquet, ["trivia_qa: cannot read", "validation-"]),
        (break_inside_parquet, ["trivia_qa: cannot read", "train-"]),
        (break_column, ["no column entity_pages"]),
        (break_rows, ["samsum: no usable row for train (available: 0"]),
    ],
)
def test_a_broken_source_is_named_and_the_old_dataset_stays(break_it, words, dataset, tmp_path):
    shutil.copytree(FIXTURES, tmp_path / "in", ignore=shutil.ignore_patterns("tiny_*"))
    break_it(tmp_path / "in")
    shutil.copytree(dataset, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    sources = ["--samsum", tmp_path / "in" / "samsum", "--trivia-qa", tmp_path / "in" / "trivia_qa"]
    assert_refused(run("build_dataset.py", *sources, "--output-dir", tmp_path / "out"), *words)
    assert snapshot(tmp_path / "out") == before


def test_contexts_are_chosen_on_the_cpus_that_this_process_may_use(tmp_path, monkeypatch):
    chosen, choose = [], build_dataset.processes
    monkeypatch.setattr(build_dataset, "processes", lambda number: chosen.append(number) or choose(1))
    monkeypatch.setattr(build_dataset.os, "sched_getaffinity", lambda process: {3, 5, 7})
    monkeypatch.setattr(build_dataset.os, "cpu_count", lambda: 64)
    build_dataset.main([*SOURCES, *SMALL, "--tasks", "trivia_qa", "--output-dir", str(tmp_path)])
    assert chosen == [3]


def test_no_folder_no_network_and_no_place_to_write(tmp_path):
    assert_refused(build(tmp_path, "--samsum", "./nowhere"), "cannot load ./nowhere", "a local folder with --samsum")
    assert_refused(build(tmp_path, "--samsum", "nobody/nothing"), "cannot load nobody/nothing", "--samsum")
    (tmp_path / "file").write_text("")
    assert_refused(build(tmp_path / "file"), str(tmp_path / "file"), "--output-dir")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("flag", ["--max-context-words=0", "--train-examples-per-task=-1", "--tasks=squad"])
def test_a_flag_out_of_range(flag, tmp_path):
    assert_refused(build(tmp_path, flag), flag.split("=")[0])


def test_each_planted_flaw_is_counted_under_its_reason_and_nothing_else_is_dropped(everything):
    report = json.loads((everything / "dataset_report.json").read_text())
    for part in report["tasks"].values():
        for counts in part["counts"].values():
            dropped = sum(n for reason, n in counts.items() if reason not in ("available", "drawn at random", "kept"))
            assert counts["available"] == counts["drawn at random"] == counts["kept"] + dropped
    counts = report["tasks"]["samsum"]["counts"]
    assert counts["train"] == {
        "available": SAMSUM_ROWS["train"],
        "drawn at random": SAMSUM_ROWS["train"],
        "no text": PLANTED["samsum_empty_dialogue_train"],
        "duplicate": PLANTED["samsum_duplicate_in_train"],
        "also in test": PLANTED["samsum_train_dialogue_in_test"],
        "nearly in test": PLANTED["samsum_near_duplicate_train_test"],
        "usable but not needed": 0,
        "kept": 491,
    }
    assert counts["validation"]["also in test"] == PLANTED["samsum_validation_dialogue_in_test"]
    assert counts["test"]["kept"] == SAMSUM_ROWS["test"]
    counts = report["tasks"]["trivia_qa"]["counts"]
    assert counts["test"]["kept"] == TRIVIA_QA_ROWS["validation"]
    both = Counter(counts["train"]) + Counter(counts["validation"])  # both are carved out of the hub's train
    assert both["available"] == TRIVIA_QA_ROWS["train"]
    assert both["also in test"] == PLANTED["trivia_qa_train_question_in_validation"]
    assert both["nearly in test"] == PLANTED["trivia_qa_near_duplicate_train_validation"]
    assert both["no text"] == PLANTED["trivia_qa_empty_question_train"]
    assert both["no pages"] == PLANTED["trivia_qa_empty_pages_train"]
    assert both["no answer or no aliases"] == PLANTED["trivia_qa_no_aliases_train"]
    assert both["duplicate id"] == 0  # of the two questions with one id, only one has its answer in the context


def test_the_report_names_sources_and_prints_hashes_of_what_was_read_and_written(dataset):
    report = json.loads((dataset / "dataset_report.json").read_text())
    sources = report["sources"]
    for task in ("samsum", "trivia_qa"):
        for name, digest in sources[task]["sha256"].items():
            assert digest == hashlib.sha256((FIXTURES / task / name).read_bytes()).hexdigest()
        assert sources[task]["licence"] == TASKS[task].LICENCE
    assert set(sources["samsum"]["sha256"]) == {"train.csv", "validation.csv", "test.csv"}
    rows = rows_of(dataset)
    for split in rows:
        assert report["splits"][split]["rows"] == len(rows[split])
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        assert report["splits"][split]["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
        state = json.loads((dataset / "dataset" / split / "state.json").read_text())
        assert state["_fingerprint"] == report["splits"][split]["sha256"][:32]


def test_the_question_finds_the_answer_more_often_than_the_first_words_do(tmp_path):
    rates = {}
    for way in ("question", "first"):
        arguments = ["--tasks", "trivia_qa", "--test-examples-per-task", 0, "--max-context-words", 120]
        assert build(tmp_path / way, *arguments, "--train-examples-per-task", 0, "--context", way).returncode == 0
        found = [row["answer_in_context"] for row in rows_of(tmp_path / way)["test"]]
        assert len(found) == TRIVIA_QA_ROWS["validation"]
        part = json.loads((tmp_path / way / "dataset_report.json").read_text())["tasks"]["trivia_qa"]
        rates[way] = part["answer_in_context"]["test"][way]
        assert sum(found) / len(found) == pytest.approx(rates[way])
        train = part["counts"]["train"]
        usable = train["kept"] + train["usable but not needed"]
        share = usable / (usable + train["answer not in context"])  # all that were kept hold their answer
        assert part["answer_in_context"]["train"][way] == pytest.approx(share)
    assert rates["question"] > rates["first"] + 0.2


def test_closed_book_shows_no_page_and_keeps_the_rows(tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(f'{{"context": "{i}", "completion": "{i}"}}\n' for i in range(20)))
    done = build(tmp_path / "own", "--tasks", "own", "--own", tmp_path / "own.jsonl", "--own-prompt", "Of {context}:")
    assert done.returncode == 0 and "answer in context" not in done.stdout, done.stderr
    done = build(tmp_path, "--tasks", "trivia_qa", "--context", "none")
    assert done.returncode == 0 and "answer in context" not in done.stdout
    for rows in rows_of(tmp_path).values():
        assert all("Context" not in row["prompt"] and row["prompt"].count("\n") == 3 for row in rows)
        assert not any(row["answer_in_context"] for row in rows)
    prompts = json.loads((tmp_path / "dataset_report.json").read_text())["prompts"]
    assert prompts == {"trivia_qa": trivia_qa.CLOSED_BOOK}
    assert built_tasks(tmp_path, TASKS)["trivia_qa"] == {"prompt": trivia_qa.CLOSED_BOOK, "one_line": True}


def test_the_report_names_the_template_of_each_task(dataset):
    prompts = json.loads((dataset / "dataset_report.json").read_text())["prompts"]
    assert set(prompts) == {"samsum", "trivia_qa"}
    for rows in rows_of(dataset).values():
        for row in rows:
            texts = re.split(r"{\w+}", prompts[row["task"]])
            assert re.fullmatch(".+".join(map(re.escape, texts)), row["prompt"], re.DOTALL)


def test_one_process_and_two_write_the_same_bytes(dataset, tmp_path):
    for processes in (1, 2):  # the fixture was built by as many as there are CPUs
        assert build(tmp_path / str(processes), "--num-proc", processes).returncode == 0
        assert snapshot(tmp_path / str(processes)) == snapshot(dataset)


@pytest.mark.parametrize("moment", ["while contexts are chosen", "while the rows are written"])
def test_a_killed_build_leaves_the_old_dataset_and_the_next_one_succeeds(moment, dataset, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(dataset, output)
    before = snapshot(output / "dataset")
    process, _ = start(output)
    new = output / ".dataset.new"
    while moment == "while the rows are written" and not new.is_dir():
        assert process.poll() is None, "the build ended before it could be killed"
    process.kill()
    process.wait()  # not communicate: a worker that lived on would hold the pipe
    assert snapshot(output / "dataset") == before
    rows_of(output)
    result = build(output, "--seed", 9)
    assert result.returncode == 0 and not new.exists()
    assert snapshot(output / "dataset") != before
    deadline = time.time() + 20  # no worker outlives its parent
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
        assert time.time() < deadline


def samsum_with(line, tmp_path):
    """The arguments for a samsum source whose train.csv has another line behind the header."""
    shutil.copytree(FIXTURES / "samsum", tmp_path / "samsum")
    path = tmp_path / "samsum" / "train.csv"
    header, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(header + b"\n" + line + rest)
    return ["--samsum", tmp_path / "samsum", "--tasks", "samsum", "--train-examples-per-task", 0]


def test_a_line_without_the_columns_of_the_header_is_counted_and_the_others_stay(tmp_path):
    huge = b'987654,"Ann: hello\r\n' + b"Bo: well, yes, ok\r\n" * 10000 + b'Ann: bye",They talk.\r\n'
    arguments = samsum_with(b"2,only two\r\n3,a,b,one too many\r\n\r\n" + huge, tmp_path)
    assert build(tmp_path / "out", *arguments).returncode == 0
    counts = counts_of(tmp_path / "out", "samsum")["train"]
    assert counts["broken CSV line"] == 2 and counts["available"] == SAMSUM_ROWS["train"] + 1
    assert "samsum:987654" in {row["id"] for row in rows_of(tmp_path / "out")["train"]}


@pytest.mark.parametrize("line", [b'1,"A: he said "no" twice",B\r\n', b'1,"Ann: no end\r\nWell, yes, ok\r\n'])
def test_after_a_stray_quote_no_line_of_a_dialogue_passes_for_a_row(line, tmp_path):
    assert_refused(build(tmp_path / "out", *samsum_with(line, tmp_path)), "train.csv", "stray quotes")
    assert not (tmp_path / "out" / "dataset").exists()


def test_a_near_duplicate_has_four_fifths_of_the_word_5_grams():
    words = [f"w{i}" for i in range(40)]  # 36 5-grams
    key = " ".join(words)
    texts = NearTexts([key])
    nine = [f"v{i}" for i in range(9)]
    assert texts.near(" ".join([*words[:32], *nine, *nine])) == []  # 28 of the shorter one's 36
    assert texts.near(" ".join([*words[:33], *nine, *nine])) == [key]  # 29 of 36, above 0.8
    assert texts.near(" ".join(words[4:18])) == [key] and texts.near(" ".join([*words[4:17], "v"])) == [key]
    short = " ".join(words[4:17])  # 9 5-grams: too few to mean something inside another text
    assert texts.near(short) == [] and NearTexts([short]).near(" ".join(words[4:18])) == [short]


def test_texts_without_a_word_are_near_each_other_only_where_they_are_the_same():
    texts = NearTexts(["😀😀 😂", "🎂"])
    assert texts.near("🎂") == ["🎂"] and texts.near("🚗") == []


GREETING = "Ann: Hi, how are you doing? Bob: Fine, thanks, and you?"


def test_a_text_that_another_one_contains_is_leaked_and_a_greeting_is_not(tmp_path):
    test = "Amy: " + " ".join(f"told{i}" for i in range(20))
    chinese = "小明：我昨天和妈妈一起去了北京的长城。小红：真好，你们玩得开心吗？"
    source = write_samsum(
        tmp_path / "samsum",
        test=[("t1", test, "It is."), ("t2", GREETING, "They meet."), ("t3", chinese, "It is.")],
        train=[
            ("inside", f"{LONG}\n{test}\n{LONG.upper()}", "It is."),
            ("part", " ".join(test.split()[3:18]), "It is."),
            ("chinese", f"小明：你好！\n{chinese}\n小红：再见，小明，明天见。", "It is."),
            ("greeting", f"{GREETING}\n{LONG.replace('word', 'term')}", "They meet."),
        ],
    )
    done = build(tmp_path / "out", "--samsum", source, "--tasks", "samsum")
    assert done.returncode == 0, done.stderr
    train = load_from_disk(tmp_path / "out" / "dataset")["train"]["id"]
    assert {one for one in train if "train" not in one} == {"samsum:greeting"}
    counts = json.loads((tmp_path / "out" / "dataset_report.json").read_text())["tasks"]["samsum"]["counts"]
    assert counts["train"]["nearly in test"] == 3


def test_an_id_stands_in_a_split_once():
    rows, counts = [build_dataset.Row("1", key, ()) for key in ("a b", "c d")], Counter()
    kept = build_dataset.take(iter(rows), 0, {}, lambda drawn: [{}] * len(drawn), counts)
    assert list(kept) == ["a b"] and counts["duplicate id"] == 1


def test_near_duplicates_are_those_that_comparing_every_pair_finds():
    def grams(text):
        return set(zip(*(text.split()[i:] for i in range(5)), strict=False))

    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randint(30, 60))) for _ in range(60)]
    changed = [text.split() for text in texts]
    for words in changed:
        for _ in range(draw.randint(0, 2)):
            words[draw.randrange(len(words))] = "other"
    index, found = NearTexts(texts), 0
    for query in map(" ".join, changed):
        alike = {
            text
            for text in texts
            if len(grams(text) & grams(query)) >= 0.8 * len(min(grams(text), grams(query), key=len))
        }
        assert set(index.near(query)) == alike
        found += bool(alike)
    assert 10 < found < 60


def test_text_that_looks_like_the_template_stays_data(everything):
    rows = [row for split in rows_of(everything).values() for row in split]
    marked = [row for row in rows if row["prompt"].count("Summary:") > 1]
    assert marked and all(row["prompt"].endswith("\n\nSummary:") for row in marked)


def test_a_dataset_that_is_broken_or_of_another_build_is_built_anew(dataset, tmp_path):
    assert build(tmp_path, "--seed", 9).returncode == 0
    arrow = next((tmp_path / "dataset" / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert build(tmp_path).returncode == 0
    assert rows_of(tmp_path) == rows_of(dataset)


@pytest.mark.parametrize(
    "name, value, column",
    [
        ("answer", "Paris", "answer.value"),
        ("answer", {"value": "Paris", "aliases": [1]}, "answer.aliases"),
        ("entity_pages", {"wiki_context": "a page"}, "entity_pages.wiki_context"),
        ("question", 3, "question"),
    ],
)
def test_a_column_of_another_type_is_named(name, value, column, tmp_path):
    source = edit_trivia_qa(tmp_path / "trivia_qa", lambda row: row | {name: value}, schema=None)
    assert_refused(build(tmp_path, "--trivia-qa", source), f"no column {column}", "train-00000-of-00001.parquet")


def test_a_shard_that_is_missing_or_of_another_copy_is_said(tmp_path):
    shutil.copytree(FIXTURES / "trivia_qa", tmp_path / "trivia_qa")
    path = next((tmp_path / "trivia_qa").rglob("train-*.parquet"))
    shutil.copy(path, path.with_name("train-00000-of-00002.parquet"))
    error = "2 files rc.wikipedia/train-*.parquet where there should be {}"
    assert_refused(build(tmp_path, "--trivia-qa", tmp_path / "trivia_qa"), error.format(2), "get it again")
    path.unlink()
    assert_refused(build(tmp_path, "--trivia-qa", tmp_path / "trivia_qa"), error.replace("2", "1", 1).format(2))


HUB = {  # what the cache has of the hub's files, what the sentence says of it
    "one file": ("samsum", ["train.csv"], "no validation.csv and no test.csv"),
    "another shard": (
        "trivia_qa",
        ["rc.wikipedia/train-00000-of-00007.parquet", "rc.wikipedia/validation-00000-of-00001.parquet"],
        "1 files rc.wikipedia/train-*.parquet where there should be 7",
    ),
}


@pytest.mark.parametrize("listed", [False, True])  # whether the cache has the list of the repository's files
@pytest.mark.parametrize(("task", "names", "lacks"), HUB.values(), ids=HUB.keys())
def test_without_a_network_a_part_of_the_files_in_the_hubs_cache_is_said_to_be_one(
    task, names, lacks, listed, tmp_path
):
    repository = getattr(build_dataset, task.upper())
    folder, commit = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}", "0123456789" * 4
    for name in ["refs/main", *(f"snapshots/{commit}/{name}" for name in names)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(commit)
    if listed:
        entries = dict.fromkeys([*names, "validation.csv", "rc.wikipedia/train-00001-of-00007.parquet"], (1, "0" * 40))
        write_tree_cache(str(folder), commit, {name: TreeCacheEntry(*entry) for name, entry in entries.items()})
    done = run(
        "build_dataset.py", "--tasks", task, "--output-dir", tmp_path / "out", HF_HUB_CACHE=str(tmp_path / "hub")
    )
    assert_refused(
        done, f"{lacks} in the cache of {repository}, and the hub could not be reached", f"--{task.replace('_', '-')}"
    )


def edit_trivia_qa(folder, edit, schema="as it was", pattern="train-*.parquet"):
    """The trivia_qa fixture in `folder`, `edit` applied to each row of a file."""
    shutil.copytree(FIXTURES / "trivia_qa", folder)
    path = next(folder.rglob(pattern))
    table = pq.read_table(path)
    rows = [edit(row) for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema and table.schema), path)
    return folder


def test_rows_with_empty_fields_are_dropped_under_their_reason(tmp_path):
    def pages(value):
        return {"entity_pages": {"wiki_context": value}}

    def answer(value, aliases):
        return {"answer": {"value": value, "aliases": aliases}}

    edits = {
        "no id": [{"question_id": None}, {"question_id": " \r\n"}],
        "no text": [{"question": None}, {"question": "\u200b"}],
        "no answer or no aliases": [{"answer": None}, answer(None, ["x"]), answer("x", None), answer("x", [None])],
        "no pages": [{"entity_pages": None}, pages(None), pages([]), pages([None, " "])],
    }
    queue = [edit for reason in edits.values() for edit in reason]
    source = edit_trivia_qa(tmp_path / "in", lambda row: row | (queue.pop() if queue else {}))
    arguments = ["--tasks", "trivia_qa", "--trivia-qa", source]
    arguments += ["--train-examples-per-task", 0, "--validation-examples-per-task", 0]
    assert build(tmp_path / "out", *arguments).returncode == 0
    counts = counts_of(tmp_path / "out", "trivia_qa")
    both = Counter(counts["train"]) + Counter(counts["validation"])
    planted = {"no text": "empty_question", "no pages": "empty_pages", "no answer or no aliases": "no_aliases"}
    for reason, rows in edits.items():
        before = PLANTED[f"trivia_qa_{planted[reason]}_train"] if reason in planted else 0
        assert len(rows) <= both[reason] <= len(rows) + before, reason  # an edit may hit a planted row


def test_blanks_around_an_id_go(tmp_path):
    arguments = samsum_with(" 42\u200b ,Ann: so we meet at noon,They meet.\r\n".encode(), tmp_path)
    assert build(tmp_path / "out", *arguments).returncode == 0
    assert "samsum:42" in {row["id"] for row in rows_of(tmp_path / "out")["train"]}


def test_what_is_no_data_set_is_not_replaced(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.txt").write_text("years of work")
    assert_refused(build(tmp_path), "dataset is no data set", "--output-dir")
    assert snapshot(tmp_path) == {"dataset/mine.txt": b"years of work"}


def test_a_data_set_that_is_a_mount_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    with pytest.raises(SystemExit, match="2"):
        build_dataset.main(["--samsum", str(tmp_path / "nowhere"), "--output-dir", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert f"error: {tmp_path / 'disk'} is a mount, which cannot be replaced: " in message


def test_a_dataset_that_was_moved_aside_when_a_build_was_killed_comes_back(dataset, tmp_path):
    shutil.copytree(dataset / "dataset", tmp_path / ".dataset.old")
    assert build(tmp_path, "--samsum", "./nowhere").returncode == 2
    assert rows_of(tmp_path) == rows_of(dataset)


def start(output, *arguments):
    """A build with another seed that has begun to choose contexts in two processes, in a group of its own."""
    command = [sys.executable, ROOT / "build_dataset.py", *SOURCES, "--seed", 9, "--num-proc", 2]
    command = [*map(str, command), "--output-dir", str(output), *arguments]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores Ctrl-C
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=heard)
    while len(workers := workers_of(process.pid)) < 2:
        assert process.poll() is None, "the build ended too soon"
    return process, workers


def workers_of(pid):
    children = subprocess.run(["pgrep", "-P", str(pid), "-f", "spawn_main"], capture_output=True, text=True).stdout
    return [int(child) for child in children.split()]


def test_ctrl_c_ends_in_one_line_and_leaves_the_old_dataset(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    process, _ = start(tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    errors = process.communicate(timeout=60)[1].strip()
    assert errors.startswith("interrupted") and "\n" not in errors and process.returncode == 130
    assert snapshot(tmp_path / "out") == before


def test_a_killed_worker_ends_in_one_sentence(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    process, workers = start(tmp_path / "out")
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1 and "--num-proc" in errors
    assert snapshot(tmp_path / "out") == before


def test_an_example_of_each_task_is_printed_and_everything_else_fits_80_columns(tmp_path):
    result = build(tmp_path, "--tasks", "trivia_qa", "samsum", "trivia_qa")
    rows = rows_of(tmp_path)["train"]
    for task in ("samsum", "trivia_qa"):
        shown = [f"{row['prompt']}[{row['completion']}]" for row in rows if row["task"] == task]
        assert sum(text in result.stdout for text in shown) == 1
    for task in ("samsum", "trivia_qa"):
        table = result.stdout[result.stdout.index(f"\n{task}  ") :].split("\n---")[0].split("\nwrote")[0]
        assert "kept" in table and max(map(len, table.split("\n"))) <= 80


@pytest.mark.parametrize("setting, value", [("TASKS", []), ("TASKS", "samsum"), ("CONTEXT", "frist")])
def test_a_setting_edited_into_nonsense_is_refused(setting, value, monkeypatch, capsys):
    monkeypatch.setattr(build_dataset, setting, value)
    with pytest.raises(SystemExit, match="2"):
        build_dataset.parse_args([])
    assert f"--{setting.lower()} must be" in capsys.readouterr().err


def test_a_build_never_imports_torch(tmp_path):
    arguments = [*SOURCES, *SMALL, "--num-proc", "1", "--output-dir", str(tmp_path)]
    code = f"import sys, build_dataset; build_dataset.main({arguments!r}); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "text, key",
    [
        ("Who built the A\u2013b?", "who built \u2013b"),  # an article before a dash is a word of its own
        ("\u201cThe\u201d end, an_d so", "\u201c \u201d end d so"),  # curly double quotes are no punctuation
        ("Caf\u00e9 de l\u2019Op\u00e9ra\u2019s", "caf\u00e9 de l op\u00e9ra s"),
        ("\uff26\uff55\uff4c\uff4c width", "full width"),
        (" a the ", ""),
    ],
)
def test_texts_are_compared_as_the_official_evaluation_does(text, key):
    assert comparison_key(text) == key


def test_an_answer_is_found_in_its_context_by_the_official_form():
    assert holds("They saw the\u2013b there.", {"\u2013b"})  # as the alias "a\u2013b" is compared
    assert holds("The Spider-Man film", {"spider man"})
    assert not holds("The party", {"art"})


def write_samsum(folder, **splits):
    """A samsum source from {split: [(id, dialogue, summary)]}, between rows that all differ."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [(f"{split}{i}", f"Amy: {split} {i} it is", "It is.") for i in range(3)] + splits.get(split, [])
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "dialogue", "summary"), *rows])
    return folder


LONG = "Bob: " + " ".join(f"word{i}" for i in range(40))


@pytest.mark.parametrize("seed", range(4))  # whichever copy is met first
def test_only_a_row_that_was_kept_makes_the_next_one_a_duplicate(seed, tmp_path):
    twins = [(f"t{i}", "Ann: hello\nBo: bye", summary) for i, summary in enumerate(["", "", "They talk."])]
    same_id = [("x1", "Cy: one", ""), ("x1", "Cy: two", "Cy counts.")]
    three = [(f"y{i}", "Di: again", "Di repeats.") for i in range(3)]
    in_test = [("e1", "Eve: only in test without a summary", ""), ("e2", LONG, ""), ("e3", "Ed: in both", "Ed is.")]
    in_train = [
        ("f1", in_test[0][1], "Eve talks."),
        ("f2", LONG + " more", "Bob counts."),
        ("f3", "Ed: in both", "S."),
    ]
    no_id = [("", "Flo: nameless", "Flo is.")]
    train = twins + same_id + three + in_train + [("f4", "Flo: nameless", "Flo is."), ("g1", "Gus: hi", "")]
    validation = [("g2", "Gus: hi", "Gus greets."), ("g3", "Di: again", "Di.")]
    source = write_samsum(tmp_path / "in", train=train, validation=validation, test=in_test + no_id)
    arguments = ["--tasks", "samsum", "--samsum", source, "--seed", seed, "--test-examples-per-task", 0]
    assert build(tmp_path / "out", *arguments, "--train-examples-per-task", 0).returncode == 0
    kept = {split: {row["id"].split(":")[1] for row in rows} for split, rows in rows_of(tmp_path / "out").items()}
    assert kept["train"] - {"y0", "y1", "y2"} == {"train0", "train1", "train2", "t2", "x1", "f1", "f2", "f4"}
    assert len(kept["train"]) == 9  # one of the three that are equal
    assert kept["validation"] == {"validation0", "validation1", "validation2", "g2"}
    assert kept["test"] == {"test0", "test1", "test2", "e3"}
    counts = counts_of(tmp_path / "out", "samsum")
    assert counts["train"]["available"] == len(train) + 3 == sum(counts["train"].values()) - 2 * (len(train) + 3)
    assert counts["train"]["also in test"] == 1 and counts["validation"]["also in train"] == 1


def test_what_a_small_test_leaves_over_stays_out_of_training(tmp_path):
    extra = [(f"e{i}", f"Ed: row {i} of test", "Ed is.") for i in range(200)]
    train = [(f"f{i}", dialogue, "Ed is.") for i, (_, dialogue, _) in enumerate(extra)]
    source = write_samsum(tmp_path / "in", train=train, test=extra)
    assert build(tmp_path / "out", "--tasks", "samsum", "--samsum", source).returncode == 0
    report = counts_of(tmp_path / "out", "samsum")
    assert report["test"]["kept"] == 6 and report["test"]["drawn at random"] < 200
    assert {row["id"][:12] for row in rows_of(tmp_path / "out")["train"]} == {"samsum:train"}


def with_size_limit(size, output, *arguments):
    """A build that cannot write a file larger than so many bytes, as on a full disk."""
    command = [sys.executable, ROOT / "build_dataset.py", *SOURCES, "--output-dir", output, *arguments]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    return subprocess.run([*map(str, command)], capture_output=True, text=True, preexec_fn=limit)


@pytest.mark.parametrize("size", [0, 5000, 200_000])
def test_a_disk_that_is_full_ends_in_one_sentence(size, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    result = with_size_limit(size, tmp_path / "out", "--seed", 9)
    assert_refused(result, "make room")
    assert result.stderr.strip().count("\n") == 0
    assert snapshot(tmp_path / "out") == before


def test_a_terminal_that_is_not_utf8_and_no_place_for_temporary_files(tmp_path):
    rows = [(f"z{i}", f"Zo\u00eb: \U0001f600 {i}", "Zo\u00eb \u2014 smiles.") for i in range(9)]
    source = write_samsum(tmp_path / "in", train=rows)
    arguments = ["--tasks", "samsum", "--samsum", source, "--output-dir", tmp_path / "out"]
    odd = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "TMPDIR": str(tmp_path / "nowhere")}
    result = run("build_dataset.py", *arguments, **odd)
    assert result.returncode == 0 and "wrote" in result.stdout, result.stderr
    assert "samsum:z0" in {row["id"] for row in rows_of(tmp_path / "out")["train"]}


def test_csv_files_may_begin_with_a_byte_order_mark(dataset, tmp_path):
    shutil.copytree(FIXTURES / "samsum", tmp_path / "in")
    for path in (tmp_path / "in").glob("*.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert build(tmp_path / "out", "--samsum", tmp_path / "in").returncode == 0
    assert rows_of(tmp_path / "out") == rows_of(dataset)


@pytest.mark.parametrize("link", ["out", "out/dataset", "parent"])
@pytest.mark.parametrize("there", ["a data set", "an empty folder", "nothing"])
def test_links_to_other_disks_are_followed(link, there, dataset, tmp_path):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "target"
    if there == "an empty folder":
        target.mkdir()
    elif there == "a data set":
        shutil.copytree(dataset / "dataset" if link == "out/dataset" else dataset, target)
    elif link == "parent":
        pytest.skip("what its folder is in is not made: the disk may not be there")
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(target)
    output = tmp_path / "parent" / "out" if link == "parent" else tmp_path / "out"
    assert build(output, "--seed", 9).returncode == 0
    assert (tmp_path / link).is_symlink()
    assert json.loads((output / "dataset_report.json").read_text())["settings"]["seed"] == 9
    data = target if link == "out/dataset" else output / "dataset"
    assert set(load_from_disk(str(data))) == {"train", "validation", "test"}
    assert not [path for path in tmp_path.rglob(".dataset*")] + [*tmp_path.rglob(".target*")]


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with only_run_in(tmp_path):
        assert_refused(build(tmp_path), "in use", "--output-dir")
    assert build(tmp_path).returncode == 0
