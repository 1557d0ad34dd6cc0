"""build_dataset.py --own: everybody's rows, in the layouts people have; single files for samsum and trivia_qa."""

import json
import os
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES, run
from datasets import load_from_disk

import build_dataset
from pipeline.files import built_tasks
from pipeline.texts import fields_of
from tasks import TASKS, samsum

NAMES = ["amber", "birch", "cedar", "dahlia", "elder", "fir", "ginkgo", "hazel", "iris", "juniper"]


def exchanges(count):
    """[(question, answer)] that all differ."""
    questions = [f"What is the {i}th tree of {NAMES[i % 10]} street like?" for i in range(count)]
    return [(question, f"It is tree {i}.") for i, question in enumerate(questions)]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows, encoding="utf-8"):
    lines = ["prompt,completion", *(f'"{question}","{answer}"' for question, answer in rows)]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def build(folder, own, *arguments):
    """A build in this process; {split: rows}."""
    build_dataset.main(["--own", str(own), "--output-dir", str(folder / "out"), *map(str, arguments)])
    return rows_of(folder)


def rows_of(folder):
    return {split: rows.to_list() for split, rows in load_from_disk(str(folder / "out" / "dataset")).items()}


def report_of(folder):
    return json.loads((folder / "out" / "dataset_report.json").read_text())


def asked_and_answered(splits):
    return {(row["prompt"], row["completion"]) for rows in splits.values() for row in rows}


def turns(question, answer, *before):
    return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


SYSTEM = {"role": "system", "content": "Be brief."}
LAYOUTS = {  # a row of a question and an answer, flags, the prompt that it becomes
    "prompt and completion": (lambda q, a: {"prompt": q, "completion": a}, [], "{}"),
    "a conversation": (lambda q, a: {"prompt": turns(q, a)[:1], "completion": turns(q, a)[1:]}, [], "{}"),
    "Alpaca": (lambda q, a: {"instruction": "Answer.", "input": q, "output": a}, [], "Answer.\n\n{}"),
    "Alpaca, empty input": (lambda q, a: {"instruction": q, "input": "", "output": a}, [], "{}"),
    "Alpaca, no input": (lambda q, a: {"instruction": q, "output": a}, [], "{}"),
    "Alpaca by a template": (
        lambda q, a: {"instruction": q, "output": a},
        ["--own-prompt", "### Instruction:\n{instruction}\n{input}### Response:"],
        "### Instruction:\n{}\n### Response:",
    ),
    "messages": (lambda q, a: {"messages": turns(q, a)}, [], "{}"),
    "messages, system": (lambda q, a: {"messages": turns(q, a, SYSTEM)}, [], "Be brief.\n\n{}"),
    "messages by a template": (
        lambda q, a: {"messages": turns(q, a)},
        ["--own-prompt", "Q: {prompt}\nA: "],
        "Q: {}\nA:",
    ),
    "columns of other names": (
        lambda q, a: {"my question": q, "a.b": a, "nested": {"x": [1]}},
        ["--own-prompt", r"{{Q}}: {my question}\nA:", "--own-completion", "a.b"],
        "{{Q}}: {}\nA:",
    ),
}


@pytest.mark.parametrize(("make", "flags", "prompt"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_the_layouts_people_have_work_as_they_are(make, flags, prompt, suffix, tmp_path):
    path, rows = tmp_path / f"rows.{suffix}", [make(*exchange) for exchange in exchanges(12)]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_lines(path, rows)
    splits = build(tmp_path, path, *flags)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 10, "validation": 1, "test": 1}
    assert asked_and_answered(splits) == {(prompt.format(q), f" {a}") for q, a in exchanges(12)}
    written = built_tasks(tmp_path / "out", TASKS)["own"]
    assert written == {"prompt": flags[1].replace(r"\n", "\n").rstrip() if flags else "{prompt}", "one_line": False}
    row = splits["test"][0]
    assert row["references"] == [row["completion"][1:]] and row["task"] == "own" and row["answer_in_context"]
    assert row["id"].startswith("own:rows-") and fields_of(written["prompt"], row["prompt"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_keeps_its_texts_a_number_with_its_zeros_and_a_broken_line_is_counted(encoding, tmp_path):
    path = write_csv(tmp_path / "rows.csv", [*exchanges(10), ("Who am I?", "007")], encoding)
    with path.open("a", encoding="utf-8") as file:
        file.write("only one column\n")
    splits = build(tmp_path, path)
    assert asked_and_answered(splits) == {(q, f" {a}") for q, a in [*exchanges(10), ("Who am I?", "007")]}
    assert report_of(tmp_path)["tasks"]["own"]["counts"]["train"]["broken CSV line"] == 1


def test_numbers_become_their_texts_as_they_are_written(tmp_path):
    rows = [{"prompt": i, "completion": 0.5} for i in range(8)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + '{"prompt": 8.50, "completion": 1e3}\n')
    assert asked_and_answered(build(tmp_path, path)) == {*((str(i), " 0.5") for i in range(8)), ("8.50", " 1e3")}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert asked_and_answered(build(tmp_path, tmp_path / "rows.parquet")) == {(str(i), " 0.5") for i in range(8)}


def test_code_keeps_its_lines_and_indentation(tmp_path):
    code = "def f(x):\r\n    if x:\t \n\n\n\n\t\treturn  x\u200b\n"
    rows = [{"prompt": f"Task {i}\n{code}", "completion": f"\n  return {i}\n    # done \n"} for i in range(5)]
    splits = build(tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
    kept = "def f(x):\n    if x:\n\n\n\n\t\treturn  x"
    assert asked_and_answered(splits) == {(f"Task {i}\n{kept}", f" return {i}\n    # done") for i in range(5)}


def test_one_file_is_split_by_the_seed_and_the_shares_are_printed(tmp_path, capsys):
    path = write_csv(tmp_path / "rows.csv", exchanges(30))
    first = build(tmp_path, path)
    printed = capsys.readouterr().out
    assert "own: 3 rows for test are drawn out of train, 10.0%" in printed
    assert "own: 3 rows for validation are drawn out of train, 10.0%" in printed
    assert "building only own" in printed and "own: the scores of 3 test rows will show nothing" in printed
    assert {split: len(rows) for split, rows in first.items()} == {"train": 24, "validation": 3, "test": 3}
    assert build(tmp_path, path) == first
    other = build(tmp_path, path, "--seed", 1)
    assert {row["id"] for row in other["test"]} != {row["id"] for row in first["test"]}
    assert asked_and_answered(other) == asked_and_answered(first)


def test_a_folder_may_lack_validation_and_test(tmp_path):
    questions = exchanges(40)
    as_rows = [{"prompt": question, "completion": answer} for question, answer in questions]
    folder = tmp_path / "rows"
    write_lines(folder / "train.jsonl", as_rows[:20])
    assert {split: len(rows) for split, rows in build(tmp_path, folder).items()} == {
        "train": 16,
        "validation": 2,
        "test": 2,
    }
    write_csv(folder / "test.csv", questions[20:30])
    splits = build(tmp_path, folder)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 18, "validation": 2, "test": 10}
    assert {row["prompt"] for row in splits["test"]} == {question for question, _ in questions[20:30]}
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(as_rows[30:]), folder / "data" / "validation-00000-of-00001.parquet")
    assert {split: len(rows) for split, rows in build(tmp_path, folder).items()} == {
        "train": 20,
        "validation": 10,
        "test": 10,
    }
    assert set(report_of(tmp_path)["sources"]["own"]["sha256"]) == {
        "train.jsonl",
        "test.csv",
        "data/validation-00000-of-00001.parquet",
    }


def test_own_rows_together_with_another_task(tmp_path):
    path = write_csv(tmp_path / "rows.csv", exchanges(30))
    sources = ["--tasks", "samsum", "own", "--samsum", FIXTURES / "samsum", "--train-examples-per-task", 12]
    splits = build(tmp_path, path, *sources)
    assert {row["task"] for row in splits["train"]} == {"samsum", "own"} and len(splits["train"]) == 24
    assert set(report_of(tmp_path)["prompts"]) == {"samsum", "own"}


def test_duplicates_and_leaks_are_dropped_and_counted_and_signs_and_a_common_form_are_no_leak(tmp_path):
    sums = [(f"What is {i} {sign} {j}?", str(i)) for sign in "+-*" for i in range(6) for j in range(6)]
    form = "You are a careful assistant who reads the review below and says in one word whether its writer was glad: "
    long = " ".join(f"word{i}" for i in range(30))
    reviews = [(f"{form}{NAMES[i % 10]} {NAMES[i // 10]}", "glad") for i in range(100)]
    (tmp_path / "rows").mkdir()
    train = [*sums[:54], *reviews[:50], (f"before {long} after", "leak"), (sums[60][0].upper(), "leak"), sums[0]]
    write_csv(tmp_path / "rows" / "train.csv", [*train, ("", "no prompt"), ("no completion", " ")])
    write_csv(tmp_path / "rows" / "validation.csv", [("Is it so?", "yes")])
    write_csv(tmp_path / "rows" / "test.csv", [*sums[54:], *reviews[50:], (long, "x")])
    splits = build(tmp_path, tmp_path / "rows")
    counts = report_of(tmp_path)["tasks"]["own"]["counts"]
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 104, "validation": 1, "test": 105}
    reasons = ("no text", "empty completion", "duplicate", "also in test", "nearly in test")
    assert [counts["train"][reason] for reason in reasons] == [1, 1, 1, 1, 1]


PAIR = '{"prompt": 1, "completion": 2}\n'
NEEDED = "prompt and completion, instruction and output, or messages are needed"
WRONG = {  # name of the file, its content, flags, what the sentence says
    "a field that is no column": (
        "a.jsonl",
        '{"q": 1, "a": 2}',
        ["--own-prompt", "{question}"],
        "no column completion, question among q, a",
    ),
    "no completion": (
        "a.jsonl",
        '{"prompt": 1, "answer": 2}',
        [],
        f"row 1 of {{}}: no column completion among prompt, answer: {NEEDED}",
    ),
    "a csv of other names": ("a.csv", "frage,antwort\nx,y\n", [], "no column completion, prompt among frage, antwort"),
    "no template": ("a.jsonl", PAIR, ["--own-prompt", "{prompt"], "--own-prompt is no template"),
    "a field without a name": ("a.jsonl", PAIR, ["--own-prompt", "{} {prompt}"], "--own-prompt names no column"),
    "a template without a field": ("a.jsonl", PAIR, ["--own-prompt", "Hi"], "--own-prompt names no column"),
    "an empty file": ("a.jsonl", "", [], "0 different rows in train"),
    "an empty list": ("a.json", "[]", [], "0 different rows in train"),
    "a header alone": ("a.csv", "prompt,completion\n", [], "0 different rows in train"),
    "two rows": (
        "a.csv",
        "prompt,completion\na,b\nc,d\n",
        [],
        "2 different rows in train, out of which test and validation are taken, too",
    ),
    "mixed forms": (
        "a.jsonl",
        PAIR + '{"instruction": 1, "output": 2}',
        [],
        "row 2 of {}: it has instruction and output, the rows before it have columns",
    ),
    "a list": (
        "a.jsonl",
        '{"prompt": "x", "completion": ["y"]}',
        [],
        "row 1 of {}: completion is a list: a text or a number is needed",
    ),
    "an object": ("a.jsonl", '{"prompt": {"x": 1}, "completion": "y"}', [], "prompt is a dict"),
    "true": ("a.jsonl", '{"prompt": "x", "completion": true}', [], "completion is a bool"),
    "a line that is no JSON": ("a.jsonl", PAIR + '{"prompt": ', [], "{} (line 2 is no JSON: Expecting value"),
    "a JSON list that is cut off": ("a.json", '[{"prompt": "x"}, ', [], "{} (Expecting value: line 1 column"),
    "a JSON list of texts": ("a.json", '["x"]', [], "cannot read {} (not every row is an object"),
    "a wrong suffix": (
        "a.txt",
        "prompt",
        [],
        "{} ends in .txt: give a file that ends in .csv, .json, .jsonl, .parquet",
    ),
    "no suffix": ("a", "prompt", [], "{} ends in no suffix"),
    "no parquet": ("a.parquet", "prompt", [], "cannot read {}"),
    "no line of a csv that can be read": (
        "a.csv",
        "prompt,completion\n" + "Who, then?,I\n" * 9,
        [],
        "0 different rows in train (broken CSV line: 9), out of which test and validation",
    ),
    "semicolons": ("a.csv", "prompt;completion\nx;y\n", [], "a.csv are separated by semicolons: save it with commas"),
    "two columns of one name": (
        "a.csv",
        "prompt,completion,prompt\na,b,c\n",
        [],
        "no column prompt among prompt (1), completion, prompt (2)",
    ),
    "a blank line first": (
        "a.csv",
        "\nprompt,completion\na,b\n",
        [],
        "{} names no columns: it is empty, or its first",
    ),
    "an object of rows": ("a.json", '{\n"data": []}', [], "line 1 is no JSON: Expecting property name"),
    "a form of a field": ("a.jsonl", PAIR, ["--own-prompt", "{prompt!r:>9}"], "no column prompt!r:>9 among prompt"),
    "stray quotes": ("a.csv", 'prompt,completion\n"a "b" c",d\n', [], "stray quotes"),
    "two exchanges": (
        "a.jsonl",
        json.dumps({"messages": turns("a", "b") + turns("c", "d")}),
        [],
        "it has messages of user, assistant, user, assistant: one of user",
    ),
    "messages without a role": ("a.jsonl", json.dumps({"messages": [{"from": "x"}]}), [], "messages of None"),
    "messages that are no list": ("a.jsonl", json.dumps({"messages": "x"}), [], "messages of str"),
    "content in parts": ("a.jsonl", json.dumps({"messages": turns([{"text": "a"}], "b")}), [], "content is a list"),
}


@pytest.mark.parametrize(("name", "content", "flags", "words"), WRONG.values(), ids=WRONG.keys())
def test_each_wrong_form_is_one_sentence(name, content, flags, words, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(content)
    refused(capsys, words.replace("{}", str(path)), "--own", path, *flags, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out" / "dataset").exists()


def refused(capsys, words, *arguments):
    """Assert that a build ends in one sentence with these words."""
    with pytest.raises(SystemExit, match="2"):
        build_dataset.main([*map(str, arguments)])
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert words in message


def test_a_folder_with_two_files_for_a_split_is_refused(tmp_path, capsys):
    for other in ("train.csv", "train.old.jsonl", "data/train.jsonl"):
        folder = tmp_path / other.replace("/", "-")
        for name in ("train.jsonl", other):
            write_lines(folder / name, [{"prompt": 1, "completion": 2}])
        words = f"own: 2 files train.* where there should be 1 in {folder}"
        refused(capsys, words, "--own", folder, "--output-dir", tmp_path / "out")


def test_rows_of_one_prompt_stay_in_one_split(tmp_path, capsys):
    rows = [{"prompt": name, "completion": f"{name} {i}"} for name in NAMES for i in range(40)]
    splits = build(tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
    assert {split: len(of_split) for split, of_split in splits.items()} == {"train": 8, "validation": 1, "test": 1}
    assert {row["prompt"] for of_split in splits.values() for row in of_split} == set(NAMES)
    counts = report_of(tmp_path)["tasks"]["own"]["counts"]["train"]
    assert counts["duplicate"] == 8 * 39 and "also in test" not in counts
    assert "own: 40 rows for test are drawn out of train, 10.0%" in capsys.readouterr().out


def test_a_number_that_is_none_is_an_empty_text(tmp_path):
    rows = [{"prompt": question, "completion": answer} for question, answer in exchanges(30)]
    path = write_lines(tmp_path / "rows" / "train.jsonl", [*rows, {"prompt": "a", "completion": float("nan")}])
    for split in ("validation", "test"):
        write_lines(path.with_stem(split), [{"prompt": split, "completion": 1}])
    build(tmp_path, path.parent)
    assert report_of(tmp_path)["tasks"]["own"]["counts"]["train"]["empty completion"] == 1
    path.unlink()
    rows = {"prompt": [f"Number {i}" for i in range(3)], "completion": [0.5, float("nan"), 1.5]}
    pq.write_table(pa.table(rows), path.with_suffix(".parquet"))
    assert {row["completion"] for row in build(tmp_path, path.parent)["train"]} == {" 0.5", " 1.5"}


def test_columns_may_have_any_name(tmp_path):
    names = ("more", "id", "task", "0", "Time: now", "Why! s")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([",".join(names), *(f"a{i},b,c,d,e,f" for i in range(9))]))
    prompt = "".join(f"{{{name}}}" for name in names[:5])
    rows = build(tmp_path, path, "--own-prompt", prompt, "--own-completion", names[5])
    assert asked_and_answered(rows) == {(f"a{i}bcde", " f") for i in range(9)}


def test_bytes_that_are_no_utf8_are_one_sentence(tmp_path, capsys):
    for suffix in ("csv", "jsonl"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(b'{"prompt,completion": "\xe9"}')
        refused(capsys, f"cannot read {path}", "--own", path, "--output-dir", tmp_path)


@pytest.mark.parametrize("source", ["./rows", "~/no/rows", "/no/rows", "rows.csv", "a/rows.jsonl", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_such_file(source, tmp_path, capsys):
    named = os.path.expanduser(source)
    refused(capsys, f"own: cannot load {named} (no such file): give", "--own", source, "--output-dir", tmp_path)


def test_a_hub_id_a_folder_without_train_and_own_without_a_source_are_one_sentence(tmp_path, capsys):
    refused(capsys, "own: cannot load nobody/nothing (", "--own", "nobody/nothing", "--output-dir", tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train_old.csv").touch()
    refused(capsys, "own: no train.* in", "--own", tmp_path / "rows", "--output-dir", tmp_path)
    refused(capsys, "--tasks names own, but --own is empty", "--tasks", "own", "--output-dir", tmp_path)


def test_samsum_takes_a_single_file(tmp_path):
    rows = [{"dialogue": f"Al: {q}\nBo:  {a}", "summary": a} for q, a in exchanges(30)]
    path = write_lines(tmp_path / "talk.jsonl", rows)
    build_dataset.main(["--tasks", "samsum", "--samsum", str(path), "--output-dir", str(tmp_path / "out")])
    splits = rows_of(tmp_path)
    prompts = {(samsum.PROMPT.format(dialogue=f"Al: {q}\nBo: {a}"), f" {a}") for q, a in exchanges(30)}
    assert asked_and_answered(splits) <= prompts and splits["train"][0]["id"].startswith("samsum:talk-")
    write_lines(path, [row | {"id": i} for i, row in enumerate(rows)])
    build_dataset.main(["--tasks", "samsum", "--samsum", str(path), "--output-dir", str(tmp_path / "out")])
    assert {row["id"] for row in rows_of(tmp_path)["train"]} <= {f"samsum:{i}" for i in range(30)}


@pytest.mark.parametrize("form", ["answer", "answers", "csv"])
def test_trivia_qa_takes_a_single_file_and_leaves_a_short_context_as_it_is(form, tmp_path):
    context = "Line one.\nIt is tree {}. " + "More of it. " * 70
    path = tmp_path / "questions.csv"
    if form == "csv":
        lines = [f'"{q}","{context.format(i)}",tree {i}' for i, (q, _) in enumerate(exchanges(30))]
        path.write_text("\n".join(["question,context,answer", *lines]))
    else:
        path = path.with_suffix(".jsonl")
        answers = {"answer": lambda i: f"tree {i}", "answers": lambda i: [f"tree {i}", f"trees {i}"]}[form]
        questions = [question for question, _ in exchanges(30)]
        rows = [{"question": q, "context": context.format(i), form: answers(i)} for i, q in enumerate(questions)]
        write_lines(path, rows)
    arguments = ["--tasks", "trivia_qa", "--trivia-qa", str(path), "--output-dir", str(tmp_path / "out")]
    build_dataset.main(arguments)
    rows = [row for of_split in rows_of(tmp_path).values() for row in of_split]
    assert len(rows) >= 20
    for row in rows:
        number = row["references"][0].removeprefix("tree ")
        fields = fields_of(TASKS["trivia_qa"].PROMPT, row["prompt"])
        assert fields["context"] == context.format(number).strip()
        assert len(row["references"]) == (2 if form == "answers" else 1)
    for choice in ("question", "first"):
        build_dataset.main([*arguments, "--context", choice, "--max-context-words", "10"])
        for row in rows_of(tmp_path)["test"]:
            assert 4 <= len(fields_of(TASKS["trivia_qa"].PROMPT, row["prompt"])["context"].split()) <= 10


@pytest.mark.parametrize("contexts", [10, 2])
def test_questions_about_one_context_stay_in_one_split_or_that_is_said(contexts, tmp_path, capsys):
    questions = [question for question, _ in exchanges(40)]
    rows = [
        {"question": q, "context": f"In wood {i % contexts} every tree is an oak.", "answer": "oak"}
        for i, q in enumerate(questions)
    ]
    path = write_lines(tmp_path / "questions.jsonl", rows)
    build_dataset.main(["--trivia-qa", str(path), "--output-dir", str(tmp_path / "out")])
    found = {
        split: {fields_of(TASKS["trivia_qa"].PROMPT, row["prompt"])["context"] for row in of_split}
        for split, of_split in rows_of(tmp_path).items()
    }
    apart = all(a == b or found[a].isdisjoint(found[b]) for a in found for b in found)
    said = "rows about one text are in several splits" in capsys.readouterr().out
    assert (apart, said) == ((True, False) if contexts == 10 else (False, True))


def test_a_single_file_that_lacks_a_column_is_one_sentence(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "x", "context": "y"}] * 9)
    start = f"row 1 of {path}: no column"
    arguments = ["--output-dir", tmp_path / "out"]
    refused(capsys, f"samsum: {start} dialogue, summary among", "--tasks", "samsum", "--samsum", path, *arguments)
    refused(capsys, f"trivia_qa: {start} answer or", "--tasks", "trivia_qa", "--trivia-qa", path, *arguments)
    write_lines(path, [{"question": "x", "context": "y", "answers": {"value": "z"}}] * 9)
    refused(capsys, "an answer is a dict", "--tasks", "trivia_qa", "--trivia-qa", path, *arguments)


def test_of_thirty_thousand_rows_as_many_are_taken_as_the_settings_say(tmp_path):
    form = "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
    rows = [{"prompt": f"{form}{q}", "completion": a} for q, a in exchanges(30_000)]
    splits = build(tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 5000, "validation": 200, "test": 500}


def test_a_prompt_that_is_in_another_tasks_test_is_dropped_and_counted(tmp_path, capsys):
    dialogues = [{"dialogue": f"Ann: {q}", "summary": a} for q, a in exchanges(40)]
    source = write_lines(tmp_path / "dialogues.jsonl", dialogues)
    copies = [{"prompt": samsum.PROMPT.format(**row), "completion": row["summary"]} for row in dialogues]
    path = write_lines(tmp_path / "own.jsonl", copies[::-1])
    splits = build(tmp_path, path, "--tasks", "samsum", "own", "--samsum", source)
    in_test = {row["prompt"] for row in splits["test"]}
    assert not in_test & {row["prompt"] for row in splits["train"] + splits["validation"]}
    assert re.search(r"train: \d+ rows dropped, whose prompts are in another task's test", capsys.readouterr().out)


def test_a_prompt_edited_after_the_build_does_not_change_what_later_scripts_read(dataset, monkeypatch):
    before = built_tasks(dataset, TASKS)
    monkeypatch.setattr(samsum, "PROMPT", "Sum up: {dialogue}")
    monkeypatch.setattr(samsum, "ONE_LINE", True)
    assert built_tasks(dataset, TASKS) == before
    prompt, one_line = before["samsum"].values()
    row = next(row for row in load_from_disk(str(dataset / "dataset"))["test"] if row["task"] == "samsum")
    assert row["prompt"] == prompt.format(**fields_of(prompt, row["prompt"])) and not one_line


def test_the_fields_of_a_prompt_are_read_back_whatever_their_names_are():
    template = "{{x}} {my field}?\n{a.b} {my field}"
    assert fields_of(template, "{x} (1+\n1)?\n? ? (1+\n1)") == {"my field": "(1+\n1)", "a.b": "? ?"}
    assert fields_of(template, "{x} 1?\n? 2") == {}


def test_own_rows_pass_through_all_five_scripts(tmp_path):
    path = write_csv(tmp_path / "rows.csv", exchanges(30))
    output = ["--output-dir", tmp_path / "out"]
    train = ["--model", FIXTURES / "tiny_llama3", "--max-length", 512, "--learning-rate", "1e-2", "--warmup-steps", 0]
    commands = [["build_dataset.py", "--own", path], ["train_llama.py", *train, "--num-train-epochs", 2]]
    commands += [["test_llama.py"], ["evaluations.py", "--resamples", 100], ["merge_llama.py"]]
    results = {}
    for script, *arguments in commands:
        results[script] = run(script, *arguments, *output)
        assert results[script].returncode == 0, results[script].stderr
    assert "few for a model to learn from" in results["train_llama.py"].stdout
    predictions = json.loads((tmp_path / "out" / "own_predictions.json").read_text())
    assert predictions["task"] == "own" and len(predictions["examples"]) == 3
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())["own"]["base"]
    assert {"rougeL", "f1", "exact_match"} <= scores.keys()
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()


def test_a_hub_id_is_read_from_the_hubs_cache(tmp_path):
    folder, commit = tmp_path / "hub" / "datasets--somebody--rows", "0123456789" * 4
    data = folder / "snapshots" / commit / "data"
    data.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    rows = [{"prompt": question, "completion": answer} for question, answer in exchanges(20)]
    pq.write_table(pa.Table.from_pylist(rows), data / "train-00000-of-00001.parquet")
    arguments = ["--own", "somebody/rows", "--output-dir", tmp_path / "out"]
    result = run("build_dataset.py", *arguments, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert result.returncode == 0, result.stderr
    assert asked_and_answered(rows_of(tmp_path)) == {(question, f" {answer}") for question, answer in exchanges(20)}
    assert report_of(tmp_path)["sources"]["own"]["revision"] == commit


QUESTIONS = [
    {"id": i, "question": f"Who keeps light {i}?", "context": f"Light {i} is kept by Ann{i}.", "answer": f"Ann{i}"}
    for i in range(30)
]


def tasks_built(tmp_path, capsys, *arguments):
    """(exit code, the tasks of the report, stdout, stderr)"""
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    try:
        build_dataset.main([*map(str, arguments), "--output-dir", str(out)])
        code = 0
    except SystemExit as error:
        code = error.code
    report = out / "dataset_report.json"
    return code, sorted(json.loads(report.read_text())["tasks"]) if report.exists() else [], *capsys.readouterr()


def test_the_tasks_whose_source_is_named_are_built_and_no_other(tmp_path, capsys):
    (tmp_path / "q.json").write_text(json.dumps(QUESTIONS))
    rows = write_csv(tmp_path / "rows.csv", exchanges(30))
    code, built, printed, _ = tasks_built(tmp_path, capsys, "--trivia-qa", tmp_path / "q.json")
    assert code == 0 and built == ["trivia_qa"] and "building only trivia_qa" in printed
    code, built, printed, _ = tasks_built(tmp_path, capsys, "--trivia-qa", tmp_path / "q.json", "--own", rows)
    assert code == 0 and built == ["own", "trivia_qa"]
    named = ["--trivia-qa", tmp_path / "q.json", "--own", rows, "--tasks", "trivia_qa"]
    code, built, _, error = tasks_built(tmp_path, capsys, *named)
    assert code == 2 and not built and "own is not among --tasks" in error
    code, built, _, error = tasks_built(tmp_path, capsys, *named[:2], "--tasks", "trivia_qa", "samsum")
    assert code == 2 and not built and "samsum" in error  # asked for by name, and not to be had here
    code, built, _, error = tasks_built(tmp_path, capsys, "--own-prompt", "{question}")
    assert code == 2 and not built and "for rows of --own: give that, too" in error


def test_questions_in_files_named_by_split_and_in_squad_s_form_are_read(tmp_path, capsys):
    squad = [row | {"answers": {"text": [row["answer"]], "answer_start": [9]}} for row in QUESTIONS]
    (tmp_path / "folder").mkdir()
    for split, part in (("train", squad[:14]), ("validation", squad[14:17]), ("test", squad[17:])):
        (tmp_path / "folder" / f"{split}.json").write_text(json.dumps(part))
    code, built, printed, error = tasks_built(tmp_path, capsys, "--trivia-qa", tmp_path / "folder")
    assert code == 0 and built == ["trivia_qa"], error
    assert re.search(r"kept +14 +3 +13\n", printed) and "will show nothing" not in printed
    (tmp_path / "empty").mkdir()
    code, _, _, error = tasks_built(tmp_path, capsys, "--trivia-qa", tmp_path / "empty")
    assert code == 2 and "give a file, a folder with train.csv or .json and so on" in error


def test_a_csv_of_semicolons_and_a_wrong_column_are_said_as_what_they_are(tmp_path, capsys):
    (tmp_path / "semi.csv").write_text("prompt;completion\na;b\n")
    code, _, _, error = tasks_built(tmp_path, capsys, "--own", tmp_path / "semi.csv")
    assert code == 2 and "semi.csv are separated by semicolons: save it with commas" in error
    rows = write_csv(tmp_path / "rows.csv", exchanges(30))
    code, _, _, error = tasks_built(tmp_path, capsys, "--own", rows, "--own-prompt", "{promt}")
    assert code == 2 and error.strip().endswith("correct --own-prompt or --own-completion")


def test_two_columns_of_one_name_are_refused_only_where_they_are_needed(tmp_path):
    columns = [pa.array([str(i) for i in range(12)])] * 4
    for names, wrong in (("prompt completion completion x", "completion (2)"), ("prompt completion x x", "")):
        pq.write_table(pa.table(columns, names=names.split()), tmp_path / "rows.parquet")
        result = run("build_dataset.py", "--own", tmp_path / "rows.parquet", "--output-dir", tmp_path / "out")
        assert result.returncode == (2 if wrong else 0) and wrong in result.stderr, result.stderr
    rows = "".join(f"{i},answer {i},,\n" for i in range(12))
    (tmp_path / "rows.csv").write_text(f"prompt,completion,,\n{rows}")  # as spreadsheets leave it
    assert run("build_dataset.py", "--own", tmp_path / "rows.csv", "--output-dir", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("seed", range(6))
def test_rows_without_an_answer_are_not_drawn_for_a_split_of_their_own(seed, tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": "" if i < 7 else f"It is {i}."} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["--own", tmp_path / "rows.jsonl", "--seed", seed, "--output-dir", tmp_path / "out"]
    result = run("build_dataset.py", *command)
    assert result.returncode == 0, result.stderr
    counts = json.loads((tmp_path / "out/dataset_report.json").read_text())["tasks"]["own"]["counts"]
    assert counts["train"]["empty completion"] == 7 and counts["test"]["kept"] == counts["validation"]["kept"] == 2


@pytest.mark.parametrize("missing", [False, True])
def test_shards_named_by_their_hash_are_a_whole_set_or_none(missing, tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40)]
    (tmp_path / "rows" / "data").mkdir(parents=True)
    for shard in range(1 if missing else 2):
        path = tmp_path / "rows" / "data" / f"train-0000{shard}-of-00002-4c9f1b8b2d5ea.parquet"
        pq.write_table(pa.Table.from_pylist(rows[shard::2]), path)
    result = run("build_dataset.py", "--own", tmp_path / "rows", "--output-dir", tmp_path / "out")
    if missing:
        assert result.returncode == 2 and "1 files train.* where there should be 2" in result.stderr
    else:
        assert result.returncode == 0 and "32" in result.stdout, result.stderr
        path.with_name("train-best-of-100-rows.parquet").write_bytes(path.read_bytes())
        for shard in path.parent.glob("*-of-00002-*"):
            shard.unlink()
        result = run("build_dataset.py", "--own", tmp_path / "rows", "--output-dir", tmp_path / "out")
        assert result.returncode == 0, result.stderr


def test_numbers_of_32_bits_have_the_digits_that_they_have_as_text(tmp_path):
    values = [37.4, 0.1, float("nan"), *range(3, 20)]
    columns = {"prompt": [f"How much is {i}?" for i in range(20)], "completion": pa.array(values, pa.float32())}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = build(tmp_path, tmp_path / "rows.parquet")
    found = {row["prompt"]: row["completion"] for split in rows.values() for row in split}
    assert (found["How much is 0?"], found["How much is 1?"], found["How much is 3?"]) == (" 37.4", " 0.1", " 3.0")
    assert "How much is 2?" not in found and len(found) == 19


def test_rows_under_one_of_many_long_instructions_are_not_the_same(tmp_path, capsys):
    draw = random.Random(0)
    instructions = [" ".join(draw.choices(NAMES, k=60)) for _ in range(60)]
    rows = [{"prompt": f"{instructions[i % 60]}\n\nWhere is {i}?", "completion": f"At {i}."} for i in range(900)]
    splits = build(tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
    assert sum(map(len, splits.values())) == 900 and "warning" not in capsys.readouterr().out


def test_ten_variants_of_a_text_are_near_one_another_and_no_form(tmp_path):
    draw = random.Random(0)
    texts = [[f"{draw.choice(NAMES)}{draw.randrange(99)}" for _ in range(50)] for _ in range(40)]
    variants = [[*text[:25], f"changed{i}", *text[25:]] for text in texts for i in range(10)]
    rows = [{"prompt": " ".join(text), "completion": 1} for text in variants]
    write_lines(tmp_path / "rows" / "validation.jsonl", [{"prompt": "b", "completion": 1}])
    build(tmp_path, write_lines(tmp_path / "rows" / "train.jsonl", rows).parent)
    assert report_of(tmp_path)["tasks"]["own"]["counts"]["train"]["nearly in test"] > 100


def test_where_most_rows_are_dropped_as_near_those_of_another_split_a_sentence_says_so(tmp_path, capsys):
    text = "The first words of a long text that has one number which tells it from its likes, and no more than that: "
    write_lines(tmp_path / "rows" / "test.jsonl", [{"prompt": f"{text}0", "completion": 1}])
    write_lines(tmp_path / "rows" / "validation.jsonl", [{"prompt": "b", "completion": 1}])
    train = [{"prompt": f"{text}{i}", "completion": 1} for i in range(1, 5)] + [{"prompt": "c", "completion": 1}]
    build(tmp_path, write_lines(tmp_path / "rows" / "train.jsonl", train).parent)
    said = capsys.readouterr().out
    assert "own: warning: 4 rows of train are dropped, much like rows of other splits: split the file yourself" in said


def test_a_split_may_be_called_as_datasets_knows_it_and_other_files_are_named(tmp_path, capsys):
    for name, validation in (("valid", "a"), ("val", "b"), ("dev", "c")):
        folder = tmp_path / name
        for split, text in (("train", "d"), (name, validation), ("eval", "e"), ("Test", "f")):
            write_lines(folder / f"{split}.jsonl", [{"prompt": text, "completion": 1}])
        splits = build(folder, folder)
        found = {split: [row["prompt"] for row in rows] for split, rows in splits.items()}
        assert found == {"train": ["d"], "validation": [validation], "test": ["e"]}
        assert "own: not read: Test.jsonl\n" in capsys.readouterr().out
        write_lines(folder / "data" / "test-00000-of-00001.jsonl", [{"prompt": "g", "completion": 1}])
        assert [row["prompt"] for row in build(folder, folder)["test"]] == ["g"]  # its own name goes before eval
        assert "own: not read: Test.jsonl, eval.jsonl\n" in capsys.readouterr().out


def test_rows_without_an_answer_are_not_all_that_a_split_gets(tmp_path):
    answers = [{"text": [f"thing{i}"] if i % 3 == 0 else []} for i in range(30)]  # two thirds have none
    rows = [{"question": f"What is {i}?", "context": f"{i} is thing{i}.", "answers": a} for i, a in enumerate(answers)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for seed in range(6):
        build_dataset.main(["--trivia-qa", str(path), "--seed", str(seed), "--output-dir", str(tmp_path / "out")])
        assert sum(map(len, rows_of(tmp_path).values())) == 10
