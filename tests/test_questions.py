"""benchmarks/make_questions.py: XQuAD's articles become pages, in the splits behind README's table."""

import csv
import importlib
import json

import pyarrow.parquet
import pytest
from conftest import ROOT, run
from datasets import Dataset


def xquad():
    """48 articles of five paragraphs with a question each, in SQuAD's form."""
    articles = []
    for number in range(48):
        paragraphs = []
        for letter in "edcba":
            name = f"{letter}{number}"
            answers = [{"text": f"An {name}", "answer_start": 0}, {"text": "other", "answer_start": 3}]
            asked = {"id": f"5{name}", "question": f"What is {name}?", "answers": answers}
            paragraphs.append({"context": f"An {name} is old.", "qas": [asked]})
        articles.append({"title": f"Article_{number}", "paragraphs": paragraphs})
    return {"data": articles, "version": "1.1"}


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_the_first_30_articles_are_train_and_12_more_validation_each_one_page_of_five_paragraphs(
    form, tmp_path, monkeypatch
):
    path, output = tmp_path / f"xquad.{form}", tmp_path / "questions"
    if form == "json":
        path.write_text(json.dumps(xquad()))
    else:
        rows = []
        for article in xquad()["data"]:
            for paragraph in article["paragraphs"]:
                (asked,) = paragraph["qas"]
                answers = {key: [answer[key] for answer in asked["answers"]] for key in ("text", "answer_start")}
                rows.append(asked | {"context": paragraph["context"], "answers": answers})
        Dataset.from_list(rows).to_parquet(path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("make_questions").main(["--xquad", str(path), "--output", str(output)])
    for split, articles in (("train", range(30)), ("validation", range(30, 42))):
        file = output / "rc.wikipedia" / f"{split}-00000-of-00001.parquet"
        rows = pyarrow.parquet.read_table(file).to_pylist()
        names = [f"{letter}{number}" for number in articles for letter in "edcba"]
        assert [row["question_id"] for row in rows] == [f"xq_5{name}" for name in names]
        assert [row["question"] for row in rows] == [f"What is {name}?" for name in names]
        assert [row["answer"] for row in rows] == [
            {"value": f"An {name}", "aliases": [f"An {name}"]} for name in names
        ]
        pages = ["\n\n".join(f"An {letter}{number} is old." for letter in "edcba") for number in articles]
        assert [row["entity_pages"]["wiki_context"] for row in rows] == [[page] for page in pages for _ in range(5)]
    result = run("build_dataset.py", "--tasks", "trivia_qa", "--trivia-qa", output, "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr


def test_the_dialogues_of_the_table_are_samsums_validation_rows_in_their_order(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows = [[str(i), f'Ann: {i}?\r\nBob: "{i}", yes.', f"It is {i}."] for i in range(818)]
    with open(tmp_path / "validation.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "dialogue", "summary"], *rows])
    importlib.import_module("make_questions").write_dialogues(tmp_path / "validation.csv", tmp_path / "out")
    found = []
    for split, count in (("train", 600), ("validation", 100), ("test", 118)):
        with open(tmp_path / "out" / f"{split}.csv", encoding="utf-8", newline="") as file:
            part = list(csv.DictReader(file))
        assert len(part) == count
        found += [[row["id"], row["dialogue"], row["summary"]] for row in part]
    assert found == rows
