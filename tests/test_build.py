"""build_dataset.py: clean rows, honest contexts, the same rows for the same seed, one sentence for bad input."""

import hashlib
import json
import os
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
from make_fixtures import PLANTED, SAMSUM_ROWS, TRIVIA_QA_ROWS

import build_dataset


def build(output, *arguments):
    return run("build_dataset.py", *SOURCES, *SMALL, "--output-dir", output, *arguments)


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


def test_no_row_of_train_or_validation_stands_in_test(tmp_path):
    assert run("build_dataset.py", *SOURCES, "--test-examples-per-task", 0, "--output-dir", tmp_path).returncode == 0
    splits = rows_of(tmp_path)
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
    shutil.copytree(FIXTURES / "trivia_qa", folder)
    path = next(folder.rglob(pattern))
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        if row["answer"]["aliases"]:
            row["answer"] |= {"value": "With", "aliases": ["with", "Quetzalcoatl"]}
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)
    return folder


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
    assert build_dataset.clean(dirty) == expected


def test_the_context_is_the_passage_that_shares_words_with_the_question():
    filler = "Nothing of note happened in the valley that year. " * 12
    page = filler + "\nThe old bridge at Torvale was built by Ann Marsh.\n" + filler
    context = build_dataset.choose_context("Who built the bridge at Torvale?", [filler, page], 130)
    assert "Ann Marsh" in context and len(context.split()) <= 130


def test_a_passage_that_no_longer_fits_gives_its_first_whole_sentences():
    near = "Torvale has an old painted bridge. " * 17  # 102 words
    next_best = "The bridge was painted by Ann Marsh. " * 15
    filler = "Nothing of note happened in the valley that year. " * 13
    context = build_dataset.choose_context("Who painted the bridge at Torvale?", [near, filler, next_best], 142)
    assert context.count("Torvale") == 17 and context.count("Ann Marsh.") == 5  # 35 of the 40 words left
    assert context.endswith("Ann Marsh.") and "Nothing" not in context
    assert build_dataset.choose_context("Who?", ["one two three four"], 3) == "one two three"


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


def test_no_folder_no_network_and_no_place_to_write(tmp_path):
    assert_refused(build(tmp_path, "--samsum", "./nowhere"), "no folder ./nowhere")
    assert_refused(build(tmp_path, "--samsum", "nobody/nothing"), "cannot load nobody/nothing", "--samsum")
    (tmp_path / "file").write_text("")
    assert_refused(build(tmp_path / "file"), "cannot write to")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("flag", ["--max-context-words=0", "--train-examples-per-task=-1", "--tasks=squad"])
def test_a_flag_out_of_range(flag, tmp_path):
    assert_refused(build(tmp_path, flag), flag.split("=")[0])


def test_each_planted_flaw_is_counted_under_its_reason_and_nothing_else_is_dropped(tmp_path):
    everything = [f"--{split}-examples-per-task=0" for split in ("train", "validation", "test")]
    assert run("build_dataset.py", *SOURCES, *everything, "--output-dir", tmp_path).returncode == 0
    report = json.loads((tmp_path / "dataset_report.json").read_text())
    for part in report["tasks"].values():
        for counts in part["counts"].values():
            dropped = sum(n for reason, n in counts.items() if reason not in ("available", "looked at", "kept"))
            assert counts["available"] == counts["looked at"] == counts["kept"] + dropped
    counts = report["tasks"]["samsum"]["counts"]
    assert counts["train"] == {
        "available": SAMSUM_ROWS["train"],
        "looked at": SAMSUM_ROWS["train"],
        "empty dialogue": PLANTED["samsum_empty_dialogue_train"],
        "duplicate": PLANTED["samsum_duplicate_in_train"],
        "also in test": PLANTED["samsum_train_dialogue_in_test"],
        "nearly in test": PLANTED["samsum_near_duplicate_train_test"],
        "spare": 0,
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
    assert both["empty question"] == PLANTED["trivia_qa_empty_question_train"]
    assert both["no pages"] == PLANTED["trivia_qa_empty_pages_train"]
    assert both["no answer or no aliases"] == PLANTED["trivia_qa_no_aliases_train"]
    assert both["duplicate id"] == PLANTED["trivia_qa_same_question_id_train"]
    near = report["tasks"]["samsum"]["near_duplicates"]
    assert len(near) == PLANTED["samsum_near_duplicate_train_test"]
    assert all(example["text"] != example["near"] for example in near)


def test_the_report_names_sources_and_prints_hashes_of_what_was_read_and_written(dataset):
    report = json.loads((dataset / "dataset_report.json").read_text())
    sources = report["sources"]
    for task in ("samsum", "trivia_qa"):
        for name, digest in sources[task]["sha256"].items():
            assert digest == hashlib.sha256((FIXTURES / task / name).read_bytes()).hexdigest()
        assert sources[task]["licence"]
    assert set(sources["samsum"]["sha256"]) == {"train.csv", "validation.csv", "test.csv"}
    rows = rows_of(dataset)
    for split in rows:
        assert report["splits"][split]["rows"] == len(rows[split])
        words = [len(row["completion"].split()) for row in rows[split] if row["task"] == "samsum"]
        assert report["splits"][split]["samsum completion words"]["max"] == max(words)
        assert report["splits"][split]["samsum completion words"]["mean"] == pytest.approx(sum(words) / len(words))


def test_the_question_finds_the_answer_more_often_than_the_first_words_do(tmp_path):
    arguments = ["--tasks", "trivia_qa", "--test-examples-per-task", 0, "--max-context-words", 120]
    assert run("build_dataset.py", *SOURCES, *arguments, "--output-dir", tmp_path / "question").returncode == 0
    rates = json.loads((tmp_path / "question" / "dataset_report.json").read_text())
    rates = rates["tasks"]["trivia_qa"]["answer_in_context"]["test"]
    assert rates["question"] > rates["first"] + 0.2 and rates["rows"] == TRIVIA_QA_ROWS["validation"]
    arguments += ["--context", "first"]
    assert run("build_dataset.py", *SOURCES, *arguments, "--output-dir", tmp_path / "first").returncode == 0
    found = [row["answer_in_context"] for row in rows_of(tmp_path / "first")["test"]]
    assert sum(found) / len(found) == pytest.approx(rates["first"])


def test_closed_book_shows_no_page_and_keeps_the_rows(tmp_path):
    assert build(tmp_path, "--tasks", "trivia_qa", "--context", "none").returncode == 0
    for rows in rows_of(tmp_path).values():
        assert all("Context" not in row["prompt"] and row["prompt"].count("\n") == 3 for row in rows)
        assert not any(row["answer_in_context"] for row in rows)


def test_a_rerun_is_answered_from_what_stands_there(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    result = build(tmp_path / "out", "--num-proc", 1)
    assert result.returncode == 0 and "stands already" in result.stdout
    assert snapshot(tmp_path / "out") == before
    result = build(tmp_path / "out", "--max-context-words", 61)
    assert result.returncode == 0 and "stands already" not in result.stdout
    assert snapshot(tmp_path / "out") != before


def test_one_process_and_two_write_the_same_rows(dataset, tmp_path):
    for processes in (1, 2):
        assert build(tmp_path / str(processes), "--num-proc", processes).returncode == 0
        assert rows_of(tmp_path / str(processes)) == rows_of(dataset)


@pytest.mark.parametrize("moment", ["start", "rows", "dataset"])
def test_a_killed_build_leaves_the_old_dataset_and_the_next_one_succeeds(moment, dataset, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(dataset, output)
    before = snapshot(output / "dataset")
    command = [sys.executable, ROOT / "build_dataset.py", *SOURCES, "--seed", "9", "--output-dir", output]
    new = output / ".dataset.new"
    reached = {
        "start": new.is_dir,
        "rows": lambda: (new / "rows").is_file() and (new / "rows").stat().st_size > 0,
        "dataset": (new / "dataset").is_dir,
    }[moment]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, start_new_session=True)
    while not reached():
        assert process.poll() is None, "the build ended before it could be killed"
    process.kill()
    process.wait()
    assert snapshot(output / "dataset") == before
    rows_of(output)
    result = build(output, "--seed", 9)
    assert result.returncode == 0 and not new.exists()
    assert snapshot(output / "dataset") != before
    deadline = time.time() + 20  # no worker outlives its parent
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
        assert time.time() < deadline


def test_a_row_with_stray_quotes_is_dropped_and_the_others_stay(tmp_path):
    shutil.copytree(FIXTURES / "samsum", tmp_path / "samsum")
    path = tmp_path / "samsum" / "train.csv"
    path.write_bytes(b'id,dialogue,summary\r\n1,"A: he said "no" twice",B\r\n2,only two\r\n' + path.read_bytes()[21:])
    assert build(tmp_path / "out", "--samsum", tmp_path / "samsum", "--tasks", "samsum").returncode == 0
    report = json.loads((tmp_path / "out" / "dataset_report.json").read_text())
    assert report["tasks"]["samsum"]["counts"]["train"]["broken CSV line"] == 2
    assert report["tasks"]["samsum"]["counts"]["train"]["available"] == SAMSUM_ROWS["train"]


def test_a_near_duplicate_has_four_fifths_of_the_word_5_grams():
    words = [f"w{i}" for i in range(40)]  # 36 5-grams
    key = " ".join(words)
    _, lsh = build_dataset.index_texts({"test": [("1", key, None)], "validation": []})
    assert build_dataset.near_matches(lsh, " ".join([*words, *"abcdefghi"])) == [key]  # 36 of 45: exactly 0.8
    assert build_dataset.near_matches(lsh, " ".join([*words, *"abcdefghij"])) == []  # 36 of 46


def test_text_that_looks_like_the_template_stays_data(tmp_path):
    everything = [f"--{split}-examples-per-task=0" for split in ("train", "validation", "test")]
    assert run("build_dataset.py", *SOURCES, *everything, "--output-dir", tmp_path).returncode == 0
    rows = [row for split in rows_of(tmp_path).values() for row in split]
    marked = [row for row in rows if row["prompt"].count("Summary:") > 1]
    assert marked and all(row["prompt"].endswith("\n\nSummary:") for row in marked)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_dataset_is_built_anew(split, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "out")
    arrow = next((tmp_path / "out" / "dataset" / split).glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    result = build(tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert rows_of(tmp_path / "out") == rows_of(dataset)


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
    assert_refused(
        build(tmp_path / "out", "--trivia-qa", source), f"no column {column}", "train-00000-of-00001.parquet"
    )


def edit_trivia_qa(folder, edit, schema="as it was"):
    """The trivia_qa fixture in `folder`, `edit` applied to each train row."""
    shutil.copytree(FIXTURES / "trivia_qa", folder)
    path = next(folder.rglob("train-*.parquet"))
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
        "empty question": [{"question": None}, {"question": "\u200b"}],
        "no answer or no aliases": [{"answer": None}, answer(None, ["x"]), answer("x", None), answer("x", [None])],
        "no pages": [{"entity_pages": None}, pages(None), pages([]), pages([None, " "])],
    }
    queue = [edit for reason in edits.values() for edit in reason]
    source = edit_trivia_qa(tmp_path / "in", lambda row: row | (queue.pop() if queue else {}))
    arguments = ["--tasks", "trivia_qa", "--trivia-qa", source]
    arguments += ["--train-examples-per-task", 0, "--validation-examples-per-task", 0]
    assert build(tmp_path / "out", *arguments).returncode == 0
    counts = json.loads((tmp_path / "out" / "dataset_report.json").read_text())["tasks"]["trivia_qa"]["counts"]
    both = Counter(counts["train"]) + Counter(counts["validation"])
    planted = {"empty question": "empty_question", "no pages": "empty_pages", "no answer or no aliases": "no_aliases"}
    for reason, rows in edits.items():
        before = PLANTED[f"trivia_qa_{planted[reason]}_train"] if reason in planted else 0
        assert len(rows) <= both[reason] <= len(rows) + before, reason  # an edit may hit a planted row


def test_after_a_stray_quote_no_line_of_a_dialogue_passes_for_a_row(tmp_path):
    shutil.copytree(FIXTURES / "samsum", tmp_path / "samsum")
    path = tmp_path / "samsum" / "train.csv"
    header, rest = path.read_bytes().split(b"\n", 1)
    bad = b'\r\n1,"Ann: he said "no" to me\r\nWell, yes, ok\r\nAnn: fine, then, bye",They talk.\r\n'
    huge = b'987654,"Ann: hello\r\n' + b"Bo: well, yes, ok\r\n" * 10000 + b'Ann: bye",They talk.\r\n'
    path.write_bytes(header + bad + b" 42 ,Ann: so we meet at noon,They meet.\r\n" + huge + rest)
    arguments = ["--samsum", tmp_path / "samsum", "--tasks", "samsum", "--train-examples-per-task", 0]
    assert build(tmp_path / "out", *arguments).returncode == 0
    counts = json.loads((tmp_path / "out" / "dataset_report.json").read_text())["tasks"]["samsum"]["counts"]["train"]
    assert counts["available"] == SAMSUM_ROWS["train"] + 1  # the row whose id has blanks cannot be told from a line
    ids = {row["id"] for row in rows_of(tmp_path / "out")["train"]}
    assert "samsum:987654" in ids and not any("Well" in row_id for row_id in ids)


def test_blanks_around_an_id_go(tmp_path):
    shutil.copytree(FIXTURES / "samsum", tmp_path / "samsum")
    with (tmp_path / "samsum" / "test.csv").open("a", newline="") as file:
        file.write(" 42\u200b ,Ann: so we meet at noon,They meet.\r\n")
    arguments = ["--samsum", tmp_path / "samsum", "--tasks", "samsum", "--test-examples-per-task", 0]
    assert build(tmp_path / "out", *arguments).returncode == 0
    assert "samsum:42" in {row["id"] for row in rows_of(tmp_path / "out")["test"]}


def test_what_is_no_data_set_is_not_replaced(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.txt").write_text("years of work")
    assert_refused(build(tmp_path), "dataset is no data set", "--output-dir")
    assert snapshot(tmp_path) == {"dataset/mine.txt": b"years of work"}


def test_a_dataset_that_was_moved_aside_when_a_build_was_killed_comes_back(dataset, tmp_path):
    shutil.copytree(dataset / "dataset", tmp_path / ".dataset.old")
    assert build(tmp_path, "--samsum", "./nowhere").returncode == 2
    assert rows_of(tmp_path) == rows_of(dataset)


def start(output, *arguments):
    """A build with another seed that has begun to choose contexts in two processes, in a group of its own."""
    command = [
        sys.executable,
        ROOT / "build_dataset.py",
        *SOURCES,
        "--seed",
        9,
        "--num-proc",
        2,
        "--output-dir",
        output,
    ]
    command = [*map(str, command), *arguments]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores Ctrl-C
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=heard)  # fmt: skip
    while not (workers := workers_of(process.pid)):
        assert process.poll() is None, "the build ended too soon"
    return process, workers


def workers_of(pid):
    children = subprocess.run(["pgrep", "-P", str(pid), "-f", "spawn_main"], capture_output=True, text=True).stdout
    return [int(child) for child in children.split()]


def test_ctrl_c_ends_in_one_line_and_leaves_the_old_dataset(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    process, _ = start(tmp_path / "out")
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1].count("\n") == 1 and process.returncode == 130
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
    questions = iter(range(1000))
    source = edit_trivia_qa(tmp_path / "in", lambda row: row | ({"question": None} if next(questions) > 3 else {}))
    arguments = ["--tasks", "trivia_qa", "samsum", "trivia_qa", "--trivia-qa", source]
    result = build(tmp_path, *arguments, "--train-examples-per-task", 0, "--seed", 3)
    rows = rows_of(tmp_path)["train"]
    assert {row["task"] for row in rows[:200]} == {"samsum"}  # the few questions come later
    for task in ("samsum", "trivia_qa"):
        shown = [f"{row['prompt']}[{row['completion']}]" for row in rows if row["task"] == task]
        assert sum(text in result.stdout for text in shown) == 1
    table = result.stdout[result.stdout.rindex("\nsamsum  ") :].split("\nwrote")[0]
    assert "kept" in table and max(map(len, table.split("\n"))) <= 80


@pytest.mark.parametrize("setting, value", [("TASKS", []), ("TASKS", "samsum"), ("CONTEXT", "frist")])
def test_a_setting_edited_into_nonsense_is_refused(setting, value, monkeypatch, capsys):
    monkeypatch.setattr(build_dataset, setting, value)
    with pytest.raises(SystemExit, match="2"):
        build_dataset.parse_args([])
    assert "--tasks or --context" in capsys.readouterr().err


def test_a_build_never_imports_torch(tmp_path):
    arguments = [*SOURCES, *SMALL, "--num-proc", "1", "--output-dir", str(tmp_path)]
    code = f"import sys, build_dataset; build_dataset.main({arguments!r}); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
