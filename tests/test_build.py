"""build_dataset.py: clean rows, honest contexts, the same rows for the same seed, one sentence for bad input."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES, SMALL, SOURCES, assert_refused, run, snapshot
from datasets import load_from_disk

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


def test_test_prompts_do_not_depend_on_the_answers(dataset, tmp_path):
    shutil.copytree(FIXTURES / "trivia_qa", tmp_path / "trivia_qa")
    path = next((tmp_path / "trivia_qa").rglob("validation-*.parquet"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        if row["answer"]["aliases"]:
            row["answer"] |= {"value": "Quetzalcoatl", "aliases": ["Quetzalcoatl"]}
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)
    assert build(tmp_path / "out", "--trivia-qa", tmp_path / "trivia_qa").returncode == 0
    prompts = [{row["prompt"] for row in rows_of(folder)["test"]} for folder in (dataset, tmp_path / "out")]
    assert prompts[0] == prompts[1]


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


def test_the_report_counts_what_was_dropped_and_why(tmp_path):
    assert run("build_dataset.py", *SOURCES, "--output-dir", tmp_path).returncode == 0
    report = json.loads((tmp_path / "dataset_report.json").read_text())
    for task in report["tasks"].values():
        for counts in task.values():
            dropped = sum(n for reason, n in counts.items() if reason not in ("available", "read", "kept"))
            assert counts["read"] == counts["kept"] + dropped
    assert report["tasks"]["samsum"]["train"]["empty dialogue"] == 1
