"""build_dataset.py: clean rows, honest contexts, the same rows for the same seed, one sentence for bad input."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter

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
        (" \r\n", None),
        (None, None),
        (3, None),
    ],
)
def test_clean(dirty, expected):
    assert build_dataset.clean(dirty) == expected


def test_the_context_is_the_passage_that_shares_words_with_the_question():
    filler = "Nothing of note happened in the valley that year. " * 12
    page = filler + "\nThe old bridge at Torvale was built by Ann Marsh.\n" + filler
    context = build_dataset.choose_context("Who built the bridge at Torvale?", [filler, page], 130)
    assert "Ann Marsh" in context and len(context.split()) <= 130


def break_missing_file(folder):
    (folder / "samsum" / "test.csv").unlink()


def break_header(folder):
    path = folder / "samsum" / "test.csv"
    path.write_bytes(path.read_bytes().replace(b"summary", b"abstract", 1))


def break_parquet(folder):
    path = next(folder.rglob("validation-*.parquet"))
    path.write_bytes(path.read_bytes()[:5000])


def break_column(folder):
    path = next(folder.rglob("validation-*.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["entity_pages"]), path)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (break_missing_file, ["samsum: no test.csv"]),
        (break_header, ["test.csv", "no column summary"]),
        (break_parquet, ["trivia_qa: cannot read", "validation-"]),
        (break_column, ["no column entity_pages"]),
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
    known, lsh, _ = build_dataset.guard({"test": [("1", key, None)], "validation": []})
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


@pytest.mark.parametrize("name, value", [("answer", "Paris"), ("entity_pages", {"wiki_context": "a page"})])
def test_a_column_of_another_type_is_named(name, value, tmp_path):
    shutil.copytree(FIXTURES / "trivia_qa", tmp_path / "trivia_qa")
    path = next((tmp_path / "trivia_qa").rglob("train-*.parquet"))
    rows = [row | {name: value} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert_refused(build(tmp_path / "out", "--trivia-qa", tmp_path / "trivia_qa"), f"trivia_qa: {name}.", str(path))
