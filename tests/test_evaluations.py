"""evaluations.py promises: official scores, one file that appears whole or not at all, one sentence for bad input."""

import hashlib
import json
import math
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest

import evaluations
from pipeline.scoring import metrics
from tasks import TASKS, trivia_qa

SCRIPT = Path(evaluations.__file__).resolve()


def prediction_file(path, task="trivia_qa", **changes):
    """A hand-made prediction file with nothing but what is needed, and `changes` to it."""
    data = {"task": task, "examples": [{"references": ["Paris", "City of Light"], "prediction": "Paris"}]} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def run(folder, *args, fresh=False):
    return conftest.run("evaluations.py", *args, cwd=folder, fresh=fresh)


def result(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "prediction, reference, right",
    [("A", "A", 100), ("a", "A", 100), ("A", "B", 0), ("<=", "<=", 100), ("<=", ">=", 0), ("The cat.", "cat", 100)],
)
def test_of_your_own_rows_an_answer_that_the_official_rules_would_empty_is_compared_as_it_is(
    prediction, reference, right
):
    table = metrics.table_of(TASKS["own"], [[reference]], [prediction])
    columns = metrics.means(TASKS["own"])
    assert [table[0, columns[name]] for name in ("exact_match", "f1")] == [right, right]


def test_a_hand_made_file_is_scored_and_nothing_else_is_left_in_the_cwd(tmp_path):
    prediction_file(tmp_path / "mine.json")
    done = run(tmp_path, "--predictions", "mine.json", "--output-dir", "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "mine.json",
        "out",
        "out/evaluation.html",
        "out/evaluation.json",
    ]
    scores = result(tmp_path / "out/evaluation.json")["trivia_qa"]
    assert scores["examples"] == 1 and "base" not in scores
    assert scores["tuned"]["exact_match"] == scores["tuned"]["f1"] == 100
    assert scores["tuned"]["bleu_effective_order"] == pytest.approx(100)
    assert "base" not in done.stdout and "difference" not in done.stdout


def test_both_tasks_base_and_perplexity_are_read_from_the_output_dir_into_file_and_table(tmp_path):
    perplexity = {"tuned": {"perplexity": 3.25, "tokens": 9}, "base": {"perplexity": 8.0}}
    examples = [{"references": ["Paris"], "prediction": "Paris", "base_prediction": "Rome"}]
    for task in ("samsum", "trivia_qa"):
        path = tmp_path / f"outputs/{task}_predictions.json"
        prediction_file(path, task, examples=examples, perplexity=perplexity)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    report = result(tmp_path / "outputs/evaluation.json")
    assert report["samsum"]["perplexity"] == perplexity
    names = {name for name in report["samsum"]["tuned"] if not name.endswith("signature")}
    assert names == {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "exact_match", "length_ratio"}
    assert {"exact_match", "f1", "bleu_effective_order", "rouge1"} < set(report["trivia_qa"]["base"])
    assert report["versions"]["sacrebleu"] and report["settings"]["output_dir"] == "outputs"
    rows = [line.split() for line in done.stdout.splitlines()]
    interval = ["[+100.00,", "+100.00]", "1.0000"]
    assert rows.count(["exact_match", "0.00", "100.00", "+100.00", *interval]) == 1
    assert rows.count(["exact_match", "0.00", "100.00", "+100.00", *interval[:2], "expl."]) == 1  # of summaries
    assert rows.count(["perplexity", "8.00", "3.25", "-4.75"]) == 2
    assert all(len(line) <= 84 for line in done.stdout.splitlines()[:-1])


def example(**changes):
    return {"references": ["Paris"], "prediction": "Paris"} | changes


MALFORMED = {
    "not json": ("{", "not valid JSON"),
    "empty file": ("", "not valid JSON"),
    "a list": ("[]", "Input should be"),
    "a number": ("3", "Input should be"),
    "another file of ours": ('{"settings":\n{}}', "it has neither task nor examples: it is no file of predictions"),
    "not utf-8": (b"\xff\xfe\x00", "not valid JSON"),
    "nan": ('{"task": "samsum", "examples": [{"references": ["a"], "prediction": "a", "x": NaN}]}', "not valid JSON"),
    "infinite perplexity": ({"perplexity": {"tuned": {"perplexity": float("inf")}}}, "not valid JSON"),
    "number too large": (
        '{"task": "samsum", "examples": [{"references": ["a"], "prediction": "a"}], "x": 1e999}',
        "not valid JSON",
    ),
    "a broken line": ('{"references": ["a"], "prediction": "a"}\n{"references": ["a"]\n', "not valid JSON"),
    "lines of no task": ('{"references": ["a"], "prediction": "a"}\n' * 2, "task: Input should be"),
    "lines of words": ('"a"\n"b"\n', "not valid JSON"),
    "a third task": (
        "".join(json.dumps({"task": task, "references": ["a"], "prediction": "a"}) + "\n" for task in ("samsum", "x")),
        "its rows of task x: task: Input should be 'samsum', 'trivia_qa' or 'own'",
    ),
    "rows of no task beside others": (
        '{"references": ["a"], "prediction": "a"}\n{"references": ["a"], "prediction": "a", "task": "samsum"}',
        "its rows of task none: task: Input should be 'samsum', 'trivia_qa' or 'own'",
    ),
    "a broken row of one task": (
        '{"references": ["a"], "prediction": "a", "task": "trivia_qa"}\n{"references": ["a"], "task": "samsum"}',
        "its rows of task samsum: examples.0.prediction: Field required",
    ),
    "a list of words": ('["a", "b"]', "not valid JSON"),
    "a last line that is cut off": ('{"references": ["a"], "prediction": "a"}\n{"refer', "(line 2: "),
    "a log-likelihood with its sign": (
        {"examples": [example(nll=-20.0, tokens=10)]},
        "examples.0.nll: Input should be",
    ),
    "no task": ({"task": None}, "task: Input should be 'samsum', 'trivia_qa' or 'own'"),
    "unknown task": ({"task": "squad"}, "task: Input should be 'samsum', 'trivia_qa' or 'own'"),
    "task is a list": ({"task": ["samsum"]}, "task: Input should be 'samsum', 'trivia_qa' or 'own'"),
    "no examples": ({"examples": []}, "examples: List should have at least 1 item"),
    "examples is no list": ({"examples": {}}, "examples: Input should be a valid list"),
    "first example is no object": ({"examples": [3]}, "examples.0: "),
    "example is no object": ({"examples": [example(), 3]}, "examples.1: "),
    "no prediction": ({"examples": [{"references": ["a"]}]}, "examples.0.prediction: Field required"),
    "no references": ({"examples": [example(), {"prediction": "a"}]}, "examples.1.references: Field required"),
    "prediction is null": ({"examples": [example(prediction=None)]}, "examples.0.prediction: "),
    "prediction is a number": ({"examples": [example(prediction=3)]}, "examples.0.prediction: "),
    "prediction is no text": ({"examples": [example(prediction="\ud800")]}, "not valid JSON"),
    "references empty": ({"examples": [example(references=[])]}, "examples.0.references: "),
    "reference a number": ({"examples": [example(references=["a", 1])]}, "examples.0.references.1: "),
    "base in some": ({"examples": [example(base_prediction="a"), example()]}, "examples.1 has no base_prediction"),
    "base in others": ({"examples": [example(), example(base_prediction="a")]}, "examples.0 has no base_prediction"),
    "base is a number": ({"examples": [example(base_prediction=1)]}, "examples.0.base_prediction: "),
    "id twice": (
        {"examples": [example(id="x"), example(id="y"), example(id="x")]},
        "id 'x' is there more than once",
    ),
    "number and text twice": ({"examples": [example(id=1), example(id="1")]}, "id '1' is there more than once"),
    "id in some": ({"examples": [example(id="x"), example()]}, "examples.1 has no id"),
    "id is a list": ({"examples": [example(id=[3])]}, "examples.0.id: "),
    "prompt is a list": ({"examples": [example(prompt=["a"])]}, "examples.0.prompt: "),
    "perplexity is a number": ({"perplexity": 3}, "perplexity: "),
    "perplexity is a word": ({"perplexity": {"tuned": {"perplexity": "low"}}}, "perplexity.tuned.perplexity."),
}


@pytest.mark.parametrize("content, sentence", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_ends_in_one_sentence_and_the_old_evaluation_is_unharmed(tmp_path, content, sentence):
    path = prediction_file(tmp_path / "bad.json")
    if isinstance(content, dict):
        prediction_file(path, **content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    good = prediction_file(tmp_path / "good.json", "samsum")
    (tmp_path / "evaluation.json").write_text("old")
    done = run(tmp_path, "--predictions", good, path, "--output-dir", tmp_path)
    assert_one_sentence(done, sentence)
    assert "bad.json: " in done.stderr and "test_llama" not in done.stderr  # no advice for a file from elsewhere
    assert (tmp_path / "evaluation.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "evaluation.json", "good.json"]


def forms():
    """{name: bytes} of one set of answers as other tools leave them."""
    rows = [
        {"id": "7", "references": ["Paris"], "prediction": "Paris"},
        {"id": "8", "references": ["Madrid\u2028"], "prediction": "Lisbon"},
    ]
    alone = [row | {"references": row["references"][0]} for row in rows]
    whole = {"task": "trivia_qa", "examples": rows}
    numbers = [row | {"id": int(row["id"])} for row in rows]
    named = "\n".join(json.dumps(row | {"task": "trivia_qa"}, ensure_ascii=False) for row in rows)
    asked = "\n".join(json.dumps(row | {"prompt": "Question: ?\nAnswer:"}) for row in rows)
    return {
        "one reference": json.dumps({"task": "trivia_qa", "examples": alone}).encode(),
        "lines": f"{named}\n\n".encode(),
        "a single line": named.partition("\n")[0].encode(),
        "lines with a BOM": named.encode("utf-8-sig"),
        "lines whose task the prompt shows": asked.encode(),
        "plain": json.dumps(whole).encode(),
        "BOM": json.dumps(whole).encode("utf-8-sig"),
        "UTF-16": json.dumps(whole).encode("utf-16"),
        "lines in UTF-16": named.encode("utf-16"),
        "ids as numbers": json.dumps(whole | {"examples": numbers}).encode(),
        "nulls": json.dumps(
            whole | {"examples": [row | {"base_prediction": None, "nll": None} for row in rows]}
        ).encode(),
        "their own settings": json.dumps(whole | {"settings": [3], "model": {"name": "x"}}).encode(),
    }


@pytest.mark.parametrize("form", forms())
def test_predictions_are_read_in_the_forms_that_other_tools_leave(tmp_path, form):
    path = tmp_path / "theirs.json"
    path.write_bytes(forms()[form])
    rows = evaluations.read_all(evaluations.parse_args(["--predictions", f"x={path}"]))["trivia_qa"]
    if form == "a single line":
        assert rows.column("id") == ["7"] and rows.systems["x"].predictions == ["Paris"]
        return
    assert rows.column("id") == ["7", "8"] and rows.column("references") == [["Paris"], ["Madrid\u2028"]]
    assert rows.systems["x"].predictions == ["Paris", "Lisbon"]


def test_rows_of_both_tasks_in_one_file_are_scored_each_as_its_own(tmp_path):
    question = {"prompt": "Question: ?\nAnswer:", "references": ["Paris", "City"], "prediction": "It is Paris"}
    dialogue = {"prompt": "Ann: Hi.\n\nSummary:", "references": ["Ann greets."], "prediction": "Ann greets."}
    named = [question | {"id": "1", "task": "Trivia_QA"}, dialogue | {"id": "2", "task": "samsum"}]
    named += [
        question | {"id": "3"},
        dialogue | {"id": "4", "task": None},
        question | {"id": "5", "task": "trivia_qa"},
    ]
    lines = "\r\n\r\n".join(json.dumps(row) for row in named)
    for content in (lines, "\ufeff" + lines, json.dumps(named)):
        (tmp_path / "rows").write_text(content, encoding="utf-8", newline="")
        tasks = evaluations.read_all(evaluations.parse_args(["--predictions", f"x={tmp_path / 'rows'}"]))
        assert {task: rows.column("id") for task, rows in tasks.items()} == {
            "samsum": ["2", "4"],
            "trivia_qa": ["1", "3", "5"],
        }
    done = run(tmp_path, "--predictions", tmp_path / "rows", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = result(tmp_path / "out" / "evaluation.json")
    assert report["trivia_qa"]["tuned"]["contains"] == 100 and report["trivia_qa"]["tuned"]["exact_match"] == 0
    assert report["samsum"]["tuned"]["exact_match"] == 100
    upper = prediction_file(tmp_path / "upper.json", "TRIVIA_QA")
    assert list(evaluations.read_all(evaluations.parse_args(["--predictions", str(upper)]))) == ["trivia_qa"]


def test_rows_without_a_task_are_recognised_by_the_end_of_the_prompts_that_the_data_set_was_built_with(tmp_path):
    row = {"prompt": "To sum up, Ann: Hi. In short: ", "references": ["Ann greets."], "prediction": "Ann greets."}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    files = ["--predictions", tmp_path / "rows.json", "--output-dir", tmp_path]
    assert_one_sentence(run(tmp_path, *files), "task: Input should be")
    (tmp_path / "dataset").mkdir()
    built = {"own": {"prompt": "To sum up, {text} In short:", "one_line": False}}
    (tmp_path / "dataset" / "tasks.json").write_text(json.dumps(built))
    assert run(tmp_path, *files).returncode == 0
    assert result(tmp_path / "evaluation.json")["own"]["tuned"]["exact_match"] == 100


def test_rows_of_the_users_own_are_scored_and_shown_as_any_others(tmp_path):
    rows = [
        {"id": "own:1", "references": ["the red dog"], "prediction": "a red dog", "base_prediction": "cats"},
        {"id": "own:2", "references": ["ann calls bob"], "prediction": "ann calls", "base_prediction": "bob"},
    ]
    figures = {"tuned": {"perplexity": 2.0}, "base": {"perplexity": 4.0}}
    path = tmp_path / "outputs/own_predictions.json"
    prediction_file(path, "own", examples=rows, perplexity=figures)
    done = run(tmp_path, "--resamples", "50")
    assert done.returncode == 0, done.stderr
    part = result(tmp_path / "outputs/evaluation.json")["own"]
    tuned, base = part["tuned"], part["base"]
    assert tuned["exact_match"] == 50 and base["exact_match"] == 0
    assert tuned["f1"] == pytest.approx(100 * (1 + 0.8) / 2)  # precision 1, recall 2/3
    assert base["f1"] == pytest.approx(100 * (0 + 0.5) / 2)  # precision 1, recall 1/3
    assert tuned["rougeL"] == pytest.approx(100 * (2 / 3 + 0.8) / 2)  # articles count
    assert tuned["length_ratio"] == pytest.approx(100 * (1 + 2 / 3) / 2) and "bleu" in tuned
    assert part["perplexity"] == figures and "own (2 examples)" in done.stdout
    html = (tmp_path / "outputs/evaluation.html").read_text()
    assert "own, ROUGE-L<" in html and "Difference in ROUGE-L to base" in html and "a red dog" in html


def test_a_file_of_our_own_is_told_to_be_made_again(tmp_path):
    prediction_file(tmp_path / "outputs/samsum_predictions.json", "samsum", examples=[3])
    assert_one_sentence(run(tmp_path), "examples.0: ")
    assert "run test_llama.py --overwrite" in run(tmp_path).stderr


def assert_one_sentence(done, sentence):
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_no_predictions_names_the_script_that_makes_them(tmp_path):
    done = run(tmp_path)
    assert_one_sentence(done, "no predictions at outputs: run test_llama.py first")
    assert not (tmp_path / "outputs").exists()


def test_a_file_that_is_not_there_and_two_files_of_one_task_are_named(tmp_path):
    assert_one_sentence(run(tmp_path, "--predictions", "gone.json"), "cannot read gone.json")
    path = prediction_file(tmp_path / "mine.json")
    assert_one_sentence(run(tmp_path, "--predictions", path, path), "second file for trivia_qa")


def test_an_output_dir_that_cannot_be_written_is_named(tmp_path):
    path = prediction_file(tmp_path / "mine.json")
    (tmp_path / "file").touch()
    assert_one_sentence(run(tmp_path, "--predictions", path, "--output-dir", "file/out"), "file/out: Not a directory")


def test_an_evaluation_that_cannot_be_replaced_is_named_and_left_alone(tmp_path):
    path = prediction_file(tmp_path / "mine.json")
    (tmp_path / "evaluation.json").mkdir()
    done = run(tmp_path, "--predictions", path, "--output-dir", tmp_path)
    assert_one_sentence(done, "evaluation.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "mine.json"]


def test_a_folder_named_like_a_metric_in_the_cwd_is_not_run(tmp_path):
    path = prediction_file(tmp_path / "mine.json")
    for name in ("rouge", "bleu", "trivia_qa", "sacrebleu", "rouge_score"):
        (tmp_path / name).mkdir()
        for file in (f"{name}.py", "__init__.py"):
            (tmp_path / name / file).write_text("open('pwned', 'w')\n")
    assert run(tmp_path, "--predictions", path, fresh=True).returncode == 0
    assert not (tmp_path / "pwned").exists()


def test_neither_torch_nor_the_network_nor_a_home_to_write_to_is_needed(tmp_path):
    path = prediction_file(tmp_path / "mine.json")
    code = (
        "import socket, sys\n"
        "def no(*a): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = no\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import evaluations\n"
        f"evaluations.main(['--predictions', {str(path)!r}, '--output-dir', {str(tmp_path)!r}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HOME": "/dev/null",
        "HF_HOME": "/dev/null",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_answers_in_under_a_second(tmp_path):
    def seconds():  # of processor time: other tests may run beside
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = seconds()
    assert run(tmp_path, "--help", fresh=True).returncode == 0
    assert 0.05 < seconds() - start < 1


OTHER_ROWS = {
    "other length": ([example(id="x")], "differ in 1 examples, such as y: "),
    "other ids": ([example(id="x"), example(id="z")], "differ in 2 examples, such as y: "),
    "no ids": ([example(), example()], "differ in 4 examples, such as 0: "),
    "other references": ([example(id="x"), example(id="y", references=["Rome"])], "y has other references"),
}


@pytest.mark.parametrize("examples, sentence", OTHER_ROWS.values(), ids=OTHER_ROWS.keys())
def test_systems_on_other_rows_are_not_compared(tmp_path, examples, sentence):
    first = prediction_file(tmp_path / "first.json", examples=[example(id="x"), example(id="y")])
    path = prediction_file(tmp_path / "second.json", examples=examples)
    done = run(tmp_path, "--predictions", f"a={first}", f"b={path}")
    assert_one_sentence(done, sentence)
    assert "second.json" in done.stderr and not (tmp_path / "outputs").exists()


def test_a_system_may_have_any_name_that_is_not_a_key_of_the_report(tmp_path):
    path = prediction_file(tmp_path / "mine.json")
    for name in evaluations.RESERVED:
        assert_one_sentence(run(tmp_path, "--predictions", f"{name}={path}"), name)
    names = ["id", "items", "scores", "tuned"]
    assert run(tmp_path, "--predictions", *(f"{name}={path}" for name in names)).returncode == 0
    report = result(tmp_path / "outputs/evaluation.json")["trivia_qa"]
    assert report["ids"] == ["0"] and report["per_example"].keys() == report["files"].keys() == set(names)
    assert report.keys() - set(names) == set(evaluations.RESERVED) - {"judge"}


def test_any_number_of_systems_is_compared_with_the_first_row_by_row_whatever_their_order(tmp_path):
    answers = {"a": "Rome Paris Oslo Bern", "b": "Paris Paris Oslo Rome", "c": "Paris Paris Rome Oslo"}
    gold, paths = ["Paris", "Paris", "Oslo", "Bern"], []
    for name, text in answers.items():
        rows = [example(id=str(i), references=[gold[i]], prediction=word) for i, word in enumerate(text.split())]
        rows = rows[::-1] if name == "c" else rows
        paths.append(f"{name}={prediction_file(tmp_path / f'{name}.json', examples=rows)}")
    done = run(tmp_path, "--predictions", *paths)
    assert done.returncode == 0, done.stderr
    report = result(tmp_path / "outputs/evaluation.json")["trivia_qa"]
    assert [report[name]["exact_match"] for name in answers] == [75, 75, 50]
    assert set(report["comparisons"]) == {"b", "c"}
    counts = {n: [t["exact_match"][k] for k in ("wins", "ties", "losses")] for n, t in report["comparisons"].items()}
    assert counts == {"b": [1, 2, 1], "c": [1, 1, 2]}
    assert report["per_example"]["c"]["exact_match"] == [100, 100, 0, 0]
    assert done.stdout.count("trivia_qa (4 examples)") == 1
    lines = [line.split()[:3] for line in done.stdout.splitlines()]
    at = lines.index(["exact_match", "75.00"])
    assert lines[at + 1 : at + 3] == [["b", "75.00", "+0.00"], ["c", "50.00", "-25.00"]]


def both_tasks(folder, examples=60):
    """Prediction files of both tasks with everything test_llama.py writes, and prompts; tuned is better than base."""
    rng = random.Random(3)
    for task in ("samsum", "trivia_qa"):
        rows = []
        for i in range(examples):
            gold = " ".join(rng.choices(["Ann", "Bob", "tea", "runs.", "home", "late"], k=rng.randint(2, 9)))
            rows.append(
                {
                    "id": f"{task}:{i}",
                    "prompt": f"Read.\n\n{'word ' * rng.randint(5, 50)}\n\nQuestion: who?\nAnswer:",
                    "references": [gold, gold.lower()],
                    "answer_in_context": rng.random() < 0.7,
                    "prediction": gold if rng.random() < 0.6 else "Bob",
                    "base_prediction": gold if rng.random() < 0.3 else "Ann runs late",
                    "nll": rng.uniform(1, 9),
                    "base_nll": rng.uniform(5, 19),
                    "tokens": rng.randint(3, 9),
                }
            )
        prediction_file(folder / f"{task}_predictions.json", task, examples=rows)
    return folder


def test_the_same_seed_gives_the_same_files_byte_for_byte_and_another_one_others(tmp_path):
    both_tasks(tmp_path)
    files = []
    for seed in (0, 0, 1):
        done = run(tmp_path, "--output-dir", ".", "--resamples", "500", "--seed", seed)
        assert done.returncode == 0, done.stderr
        files.append([(tmp_path / name).read_bytes() for name in ("evaluation.json", "evaluation.html")])
    assert files[0] == files[1]
    assert files[0][0] != files[2][0] and files[0][1] != files[2][1]


def test_every_score_has_its_interval_and_the_main_scores_of_a_task_alone_are_tested_as_one_family(tmp_path):
    both_tasks(tmp_path)
    done = run(tmp_path, "--output-dir", ".", "--resamples", "500")
    report, printed = result(tmp_path / "evaluation.json"), done.stdout.split("trivia_qa (60")
    for task, family in (("samsum", 4), ("trivia_qa", 3)):
        part = report[task]
        names = set(evaluations.TASKS[task].SCORES)
        for system in ("base", "tuned"):
            scores = part[system] | {"perplexity": part["perplexity"][system]["perplexity"]}
            assert set(part["intervals"][system]) == names
            for metric, (low, high) in part["intervals"][system].items():
                assert low <= scores[metric] <= high
        tests = part["comparisons"]["tuned"]
        assert set(tests) == names
        tested = {metric: test for metric, test in tests.items() if "p_value" in test}
        assert set(tested) == set(evaluations.TASKS[task].MAIN_SCORES) and len(tested) == family
        assert min(test["p_holm"] for test in tested.values()) == pytest.approx(
            family * min(test["p_value"] for test in tested.values())
        )
        assert all(test["significant"] == (test["p_holm"] < 0.05) for test in tested.values())
        for metric in names - set(tested):  # with an interval, and no claim
            assert (
                {"difference", "interval"}
                <= set(tests[metric])
                <= {"difference", "interval", "wins", "ties", "losses"}
            )
        lines = [line.split() for line in printed[task == "trivia_qa"].splitlines()]
        shown = [line[0] for line in lines if line and line[0] in names]
        assert set(shown[:family]) == set(tested)  # first
        assert {line[0] for line in lines if line and line[-1] == "expl."} == set(shown[family:])
    assert {"wins", "losses"}.isdisjoint(report["samsum"]["comparisons"]["tuned"]["length_ratio"])  # no end is better


def test_several_trainings_are_one_system_and_one_of_them_is_as_without_a_seed(tmp_path):
    both_tasks(tmp_path)
    source = result(tmp_path / "trivia_qa_predictions.json")
    files = []
    for seed in range(3):
        rows = [row | {"prediction": row["references"][0]} if i % 3 == seed else row
                for i, row in enumerate(source["examples"])]  # fmt: skip
        files.append(prediction_file(tmp_path / f"{seed}.json", examples=rows))

    def report(*names):
        systems = [f"{name}={file}" for name, file in zip(names, [files[0], *files], strict=False)]
        done = run(tmp_path, "--predictions", *systems, "--resamples", "500")
        assert done.returncode == 0, done.stderr
        assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
        return done.stdout, result(tmp_path / "outputs/evaluation.json")["trivia_qa"]

    printed, alone = report("base", "tuned")
    printed_too, one = report("base", "tuned@7")
    assert printed == printed_too and alone["seeds"] == one["seeds"] == {} and "trainings" not in printed
    for key in ("perplexity", "general_text", "intervals", "seeds", "equal_predictions"):
        assert one[key] == alone[key], key
    assert alone["base"]["exact_match"] < alone["tuned"]["exact_match"] == one["tuned"]["exact_match"]
    printed, several = report("base", "tuned@0", "tuned@1", "tuned@2")
    values = [seed["exact_match"] for seed in several["seeds"]["tuned"].values()]
    assert several["tuned"]["exact_match"] == pytest.approx(np.mean(values)) and min(values) < max(values)
    assert several["comparisons"].keys() == {"tuned"} and several["base"] == alone["base"]
    f1 = [seed["f1"] for seed in several["seeds"]["tuned"].values()]
    assert f"3 trainings of tuned: f1 {min(f1):.2f} to {max(f1):.2f}, perplexity" in printed
    page = (tmp_path / "outputs/evaluation.html").read_text()
    assert f"3 seeds: {min(values):.2f} to {max(values):.2f}" in page and "tuned@2" in page
    least = several["comparisons"]["tuned"]["f1"]["minimum_detectable"]
    assert f">{least:.2f}</td>" in page and f"visible from: {least:.2f} in f1" in printed
    systems = [f"{name}@{seed}={files[seed]}" for name in ("base", "tuned") for seed in range(3)]
    assert run(tmp_path, "--predictions", *systems, "--resamples", "500").returncode == 0
    paired = result(tmp_path / "outputs/evaluation.json")["trivia_qa"]
    for system in ("base", "tuned"):
        for metric in ("exact_match", "f1", "rouge1"):
            assert paired[system][metric] == pytest.approx(several[system][metric])
    done = run(tmp_path, "--predictions", f"tuned={files[0]}", f"tuned@1={files[1]}")
    assert_one_sentence(done, "tuned is there without a seed, too: name each of its files tuned@SEED=FILE")


def test_a_group_has_the_scores_of_its_rows_alone(tmp_path):
    both_tasks(tmp_path)
    data = result(tmp_path / "trivia_qa_predictions.json")
    inside = [row for row in data["examples"] if row["answer_in_context"]]
    path = prediction_file(tmp_path / "part" / "trivia_qa_predictions.json", examples=inside)
    assert run(tmp_path, "--output-dir", ".", "--resamples", "100").returncode == 0
    assert run(tmp_path, "--output-dir", "part", "--resamples", "100").returncode == 0
    groups = result(tmp_path / "evaluation.json")["trivia_qa"]["groups"]
    group = groups["answer_in_context"]["in the context"]
    alone = result(path.parent / "evaluation.json")["trivia_qa"]
    for system in ("base", "tuned"):
        expected = {name: alone[system][name] for name in trivia_qa.SCORES if name != "perplexity"}
        expected["perplexity"] = alone["perplexity"][system]["perplexity"]
        assert group["scores"][system] == pytest.approx(expected)
    assert group["examples"] == len(inside)
    assert groups["answer_in_context"]["not in the context"]["examples"] == 60 - len(inside)


def test_perplexities_over_other_tokens_are_not_compared(tmp_path):
    rows = [example(id=str(i), nll=2.0 + i, tokens=3) for i in range(5)]
    first = prediction_file(tmp_path / "a.json", examples=rows)
    other = prediction_file(tmp_path / "b.json", examples=[row | {"tokens": 4} for row in rows])
    lower = prediction_file(tmp_path / "d.json", examples=[row | {"nll": row["nll"] - 1} for row in rows])
    systems = [f"a={first}", f"b={other}", f"c={first}", f"d={lower}"]
    assert run(tmp_path, "--predictions", *systems).returncode == 0
    part = result(tmp_path / "outputs/evaluation.json")["trivia_qa"]
    assert part["perplexity"]["a"]["perplexity"] == pytest.approx(np.exp(20 / 15))
    assert "perplexity" not in part["comparisons"]["b"]
    assert part["comparisons"]["c"]["perplexity"]["p_value"] == 1
    test = part["comparisons"]["d"]["perplexity"]
    assert test["wins"] == 5 and test["difference"] < 0
    assert "lower is better" in (tmp_path / "outputs/evaluation.html").read_text()
    prediction_file(tmp_path / "a.json", examples=[row | {"base_prediction": "x"} for row in rows])  # no base_nll
    assert run(tmp_path, "--predictions", first).returncode == 0
    assert result(tmp_path / "outputs/evaluation.json")["trivia_qa"]["perplexity"].keys() == {"tuned"}


ADAPTER = hashlib.sha256(b"weights").hexdigest()
MADE_FROM = {
    "model": "/home/ann/llama",
    "adapter": ADAPTER[:16],
    "weights": ["b" * 16],
    "rows": "c" * 32,
    "4_bit": True,
    "device": "cpu",
}


def runs(folder, **others):
    """The prediction files of both tasks, and what the run that made them left; `others`: another trivia_qa's."""
    outputs = folder / "outputs"
    for task, changes in (("samsum", {}), ("trivia_qa", others)):
        examples = [{"references": ["a b"], "prediction": "a", "base_prediction": "b"}]
        settings = {name: value for name, value in (MADE_FROM | changes).items() if value is not None}
        prediction_file(outputs / f"{task}_predictions.json", task, examples=examples, settings=settings)
    (outputs / "adapter").mkdir(exist_ok=True)
    notes = {
        "adapter_sha256": ADAPTER,
        "steps": 5,
        "settings": {"learning_rate": 0.004},
        "run": {"train rows": "e" * 32},
    }
    (outputs / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    (outputs / "adapter/run.json").write_text(json.dumps(notes))
    (outputs / "adapter/log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 1, "eval_samsum_loss": 1.5}\n')
    built(outputs, "e" * 64)
    return outputs


def built(outputs, train_rows):
    """dataset_report.json of the predictions' test rows and these train rows."""
    splits = {"train": {"sha256": train_rows}, "test": {"sha256": "c" * 64}}
    tasks = {"samsum": {"counts": {"train": {"kept": 9, "duplicate": 4}}}}
    (outputs / "dataset_report.json").write_text(json.dumps({"tasks": tasks, "splits": splits}))


def test_the_report_says_what_the_predictions_were_made_from_and_how_that_was_trained(tmp_path):
    outputs = runs(tmp_path)
    done = run(tmp_path, "--resamples", "50")
    assert done.returncode == 0, done.stderr
    report = result(outputs / "evaluation.json")
    assert report["samsum"]["made_from"] == report["trivia_qa"]["made_from"] == {"base": MADE_FROM, "tuned": MADE_FROM}
    assert report["training"]["facts"] == {"adapter_sha256": ADAPTER, "steps": 5}
    assert report["training"]["settings"] == {"learning_rate": 0.004}
    assert report["training"]["loss"] == {"loss": [[1, 2.5]], "eval_samsum_loss": [[1, 1.5]]}
    assert report["data"] == {"samsum": {"train": {"kept": 9, "duplicate": 4}}}
    page = (outputs / "evaluation.html").read_text()
    assert "<h1>Evaluation of llama<" in page and "/home/ann" not in page
    other = prediction_file(tmp_path / "theirs.json", "samsum", examples=[{"references": ["a b"], "prediction": "a"}])
    files = ["--predictions", outputs / "samsum_predictions.json", f"theirs={other}", "--resamples", "50"]
    assert run(tmp_path, *files).returncode == 0
    report = result(outputs / "evaluation.json")  # of theirs nobody knows
    assert report["samsum"]["made_from"]["theirs"] is None and report["training"] is report["data"] is None


@pytest.mark.parametrize("name", ["adapter", "weights", "rows", "4_bit"])
def test_predictions_of_two_runs_are_refused_with_both_sides_and_the_command_that_mends_it(tmp_path, name):
    outputs = runs(tmp_path, **{name: "another"})
    done = run(tmp_path)
    sides = f"({name.replace('_', ' ')} another there, {MADE_FROM[name]} now)"
    files = "outputs/trivia_qa_predictions.json, beside outputs/samsum_predictions.json,"
    assert_one_sentence(done, f"{files} is of another run {sides}: run test_llama.py --overwrite")
    assert not (outputs / "evaluation.json").exists()
    given = [outputs / "samsum_predictions.json", outputs / "trivia_qa_predictions.json"]
    assert run(tmp_path, "--resamples", "50", "--predictions", *given).returncode == 0  # whoever names them knows


@pytest.mark.parametrize("adapter, rows", [("d" * 16, "d" * 32), ("a", "c"), ("", ""), ("none", None), (None, 3)])
def test_training_and_data_of_another_run_or_of_an_unknown_one_are_not_shown(tmp_path, adapter, rows):
    outputs = runs(tmp_path)
    for task in ("samsum", "trivia_qa"):
        path = outputs / f"{task}_predictions.json"
        data = result(path)
        data["settings"] |= {"adapter": adapter, "rows": rows}
        path.write_text(json.dumps(data))
    assert run(tmp_path, "--resamples", "50").returncode == 0
    report = result(outputs / "evaluation.json")
    assert report["training"] is None and report["data"] is None
    page = (outputs / "evaluation.html").read_text()
    assert "What was trained" not in page and "The data set" not in page


@pytest.mark.parametrize("notes", ["kept", "gone", "theirs"])
def test_weights_that_were_replaced_are_another_adapter_whatever_the_notes_beside_them_say(tmp_path, notes):
    outputs = runs(tmp_path)
    weights, told = outputs / "adapter/adapter_model.safetensors", outputs / "adapter/run.json"
    weights.write_bytes(b"others")
    if notes == "gone":
        told.unlink()
    if notes == "theirs":
        told.write_text(json.dumps(result(told) | {"adapter_sha256": hashlib.sha256(b"others").hexdigest()}))
    done = run(tmp_path, "--resamples", "50")
    report = result(outputs / "evaluation.json")
    assert f"warning: {evaluations.OTHER_ADAPTER}" in done.stdout
    assert report["other_adapter"] == evaluations.OTHER_ADAPTER and report["training"] is None


@pytest.mark.parametrize("rows", ["c" * 32, "d" * 32])
def test_predictions_of_rows_that_were_built_anew_are_scored_with_a_warning(tmp_path, rows):
    state = runs(tmp_path) / "dataset" / "test" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"_fingerprint": rows}))
    done = run(tmp_path, "--resamples", "50")
    report, page = result(tmp_path / "outputs/evaluation.json"), (tmp_path / "outputs/evaluation.html").read_text()
    expected = evaluations.OTHER_ROWS if rows != MADE_FROM["rows"] else None
    assert done.returncode == 0 and report["other_rows"] == expected and report["other_adapter"] is None
    assert (f"warning: {evaluations.OTHER_ROWS}" in done.stdout) == bool(expected)
    assert (f"Note: {evaluations.OTHER_ROWS}." in page) == bool(expected)
    named = run(tmp_path, "--resamples", "50", "--predictions", tmp_path / "outputs/samsum_predictions.json")
    assert "warning" not in named.stdout


@pytest.mark.parametrize("merged_from", [ADAPTER[:16], "d" * 16])
def test_a_merge_of_another_adapter_is_not_compared_with_this_one(tmp_path, merged_from):
    outputs = runs(tmp_path)
    row, settings = {"references": ["a b"], "prediction": "b"}, MADE_FROM | {"adapter": "none", "4_bit": False}
    (tmp_path / "link").symlink_to(outputs)  # the same folder by another name
    path, settings = (
        outputs / "samsum_predictions_merged.json",
        settings | {"model": str(tmp_path / "link" / "merged")},
    )
    prediction_file(path, "samsum", examples=[row], settings=settings, merged_from=merged_from)
    elsewhere = {"examples": [row], "settings": settings | {"model": "/other/merged"}, "merged_from": "e" * 16}
    prediction_file(outputs / "samsum_predictions_theirs.json", "samsum", **elsewhere)  # tested on purpose
    done = run(tmp_path, "--resamples", "50")
    assert "theirs" in result(outputs / "evaluation.json")["samsum"]["files"]
    same = merged_from == MADE_FROM["adapter"]
    assert ("merged" in result(outputs / "evaluation.json")["samsum"]["files"]) == same
    assert ("another adapter is merged into its model: run merge_llama.py" in done.stdout) == (not same)
    named = [f"{name}={outputs}/samsum_predictions{end}.json" for name, end in (("a", ""), ("b", "_merged"))]
    assert "left out" not in run(tmp_path, "--resamples", "50", "--predictions", *named).stdout


@pytest.mark.parametrize("notes", ["{}", json.dumps({"adapter_sha256": "d" * 64})])
def test_an_adapter_with_another_ones_notes_is_still_the_one_of_the_predictions(tmp_path, notes):
    outputs = runs(tmp_path)
    (outputs / "adapter/run.json").write_text(notes)
    done = run(tmp_path, "--resamples", "50")
    report = result(outputs / "evaluation.json")
    assert done.returncode == 0 and "warning" not in done.stdout and report["training"] is None


def test_a_data_set_with_the_same_test_rows_is_not_shown_beside_an_adapter_trained_on_other_rows(tmp_path):
    outputs = runs(tmp_path)
    built(outputs, "f" * 64)  # more train rows, say: the test rows stay
    assert run(tmp_path, "--resamples", "50").returncode == 0
    report = result(outputs / "evaluation.json")
    assert report["training"]["facts"]["steps"] == 5 and report["data"] is None


def test_predictions_of_before_there_was_an_identity_are_still_scored(tmp_path):
    runs(tmp_path, adapter=None, weights=None, rows=None, **{"4_bit": None})
    assert run(tmp_path, "--resamples", "50").returncode == 0
    assert result(tmp_path / "outputs/evaluation.json")["training"] is None


def test_the_table_fits_80_columns_with_large_perplexities_and_long_names(tmp_path):
    rows = [example(id=str(i), nll=40.0 + i, tokens=3) for i in range(9)]
    first = prediction_file(tmp_path / "a.json", examples=rows)
    other = prediction_file(tmp_path / "b.json", examples=[row | {"nll": 9 * row["nll"]} for row in rows])
    systems = [f"a_rather_long_name={first}", f"another_long_name={other}"]
    done = run(tmp_path, "--predictions", *systems, "--resamples", "200")
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80 and any("e+" in line for line in lines), done.stdout
    done = run(tmp_path, "--predictions", systems[0], "--resamples", "200")
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80 and "perplexity" in done.stdout


@pytest.mark.parametrize("nats", [200, 400, 699])
def test_a_model_that_is_beyond_measure_has_numbers_in_the_report_all_the_same(nats, tmp_path):
    rows = [example(id=str(i), nll=3.0 + i, tokens=3) for i in range(9)]
    base, paths = prediction_file(tmp_path / "base.json", examples=rows), []
    for seed in range(2):
        lost = [row | {"nll": 3.0 * nats - row["nll"] * (seed + 1) / 10} for row in rows]
        paths.append(f"tuned@{seed}={prediction_file(tmp_path / f'{seed}.json', examples=lost)}")
    for systems in (paths, [paths[0]]):
        done = run(tmp_path, "--predictions", f"base={base}", *systems, "--resamples", "200")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        test = result(tmp_path / "outputs/evaluation.json")["trivia_qa"]["comparisons"]["tuned"]["perplexity"]
        low, high = test["interval"]
        assert test["difference"] > 1e60 and low < test["difference"] < high and test["losses"] == 9
        assert test["p_value"] < 0.01 or len(systems) > 1


def test_rows_too_long_for_the_model_are_wrong_answers_and_stay_out_of_the_perplexity(tmp_path):
    rows = [example(id=str(i), prediction="Paris", references=["Paris"], nll=3.0, tokens=2) for i in range(4)]
    left_out = {"id": "long", "references": ["Paris"], "prediction": "", "too_long": True}
    file = prediction_file(tmp_path / "a.json", task="trivia_qa", examples=[*rows, left_out])
    done = run(tmp_path, "--predictions", f"mine={file}", "--resamples", "200")
    part = result(tmp_path / "outputs" / "evaluation.json")["trivia_qa"]
    assert part["mine"]["exact_match"] == 80 and part["too_long"] == {"mine": 1}
    assert part["perplexity"]["mine"]["perplexity"] == pytest.approx(math.exp(1.5))
    assert "1 of them were too long for the model of mine" in done.stdout
    assert "too long for the model of mine" in (tmp_path / "outputs" / "evaluation.html").read_text()


def test_the_perplexity_of_the_general_text_is_in_the_report_and_on_the_page(tmp_path):
    rows = [example(id=str(i), prediction="Paris", base_prediction="Rome", references=["Paris"]) for i in range(4)]
    told = {"base": {"perplexity": 18.25, "tokens": 9}, "tuned": {"perplexity": 18.75, "tokens": 9}}
    alone = {"tuned": {"perplexity": 23.5, "tokens": 9}}
    tested = prediction_file(tmp_path / "a.json", task="trivia_qa", examples=rows, general_text=told)
    merged = [{name: value for name, value in row.items() if name != "base_prediction"} for row in rows]
    other = prediction_file(tmp_path / "b.json", task="trivia_qa", examples=merged, general_text=alone)
    run(tmp_path, "--predictions", tested, f"merged={other}", "--resamples", "200")
    part = result(tmp_path / "outputs" / "evaluation.json")["trivia_qa"]
    assert part["general_text"] == told | {"merged": alone["tuned"]}
    page = (tmp_path / "outputs" / "evaluation.html").read_text()
    assert "none of the tasks: base 18.25, tuned 18.75, merged 23.5." in page


OTHER_LETTERS = {  # references of an example, whether ROUGE misses most of each
    "Chinese": (["小明今天去了北京。"], True),
    "Russian": (["Анна позвонит Тому."], True),
    "Hindi": (["पूर्व प्रधान"], True),
    "a number in Russian": (["Анна позвонит Тому в 10."], True),
    "no letters": (["…"], True),
    "German": (["Über Öl weiß Tom nichts, sagt er"], False),
    "Vietnamese": (["Tiếng Việt thật dễ đọc và viết"], True),
    "English": (["Ann calls Tom."], False),
    "an alias in English": (["北京", "Beijing"], False),
}


def test_page_and_terminal_say_where_rouge_misses_most_letters_and_the_scores_stay(tmp_path):
    for name, (references, missed) in OTHER_LETTERS.items():
        assert bool(metrics.rouge_note([references])) == missed, name
    texts = [references for references, _ in OTHER_LETTERS.values()]
    examples = [{"references": refs, "prediction": refs[0]} for refs in texts]
    done = run(tmp_path, "--predictions", prediction_file(tmp_path / "p.json", "samsum", examples=examples))
    note = "ROUGE reads only a to z and 0 to 9: it misses or splits most words of the reference in 6 of 9 examples"
    assert f"\n{note}\n" in done.stdout and done.stderr == ""
    report = result(tmp_path / "outputs" / "evaluation.json")["samsum"]
    assert report["rouge_note"] == note and report["tuned"]["exact_match"] == 100
    assert f"<p>{note}" in (tmp_path / "outputs" / "evaluation.html").read_text(encoding="utf-8")
    done = run(tmp_path, "--predictions", prediction_file(tmp_path / "english.json"))
    assert "misses" not in done.stdout
    assert "misses" not in (tmp_path / "outputs" / "evaluation.html").read_text(encoding="utf-8")


def test_every_named_file_of_the_same_rows_is_a_system_and_others_are_left_out_in_one_line_each(tmp_path):
    outputs = runs(tmp_path)
    main = result(outputs / "samsum_predictions.json")
    row = {"references": ["a b"], "prediction": "b", "hit_max_new_tokens": False}
    in_16_bit = main["settings"] | {"adapter": "none", "4_bit": False}
    named = {
        "base-16bit": {"examples": [row], "settings": in_16_bit},
        "theirs": {"examples": [row]},  # says nothing of itself
        "more": {"examples": [row, row]},
        "contexts": {"examples": [row], "settings": MADE_FROM | {"rows": "d" * 32}},
        "x_swapped": {"examples": [row]},
        "judge": {"examples": [row]},
        "a b": {"examples": [row]},
        "other": {"examples": [row | {"references": ["c"]}]},
    }
    for name, content in named.items():
        prediction_file(outputs / f"samsum_predictions_{name}.json", "samsum", **content)
    (outputs / "samsum_predictions_broken.json").write_text("{")
    done = run(tmp_path, "--resamples", "50")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    left_out = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert [line.split("samsum_predictions_")[1].split(".json: ")[0] for line in left_out] == [
        "a b", "broken", "contexts", "judge", "more", "other",
    ]  # fmt: skip
    report = result(outputs / "evaluation.json")
    assert list(report["samsum"]["files"]) == ["base", "tuned", "base-16bit", "theirs"]
    assert list(report["trivia_qa"]["files"]) == ["base", "tuned"]
    assert report["samsum"]["bits"] == {"base": 4, "tuned": 4, "base-16bit": 16, "theirs": None}
    assert ["base-16bit", "theirs", 1] in report["samsum"]["equal_predictions"]
    assert report["training"]["facts"]["steps"] == 5  # of the tuned system, whatever else lies there
    page_text = (outputs / "evaluation.html").read_text()
    assert 'base-16bit<small class="range">16 bit</small>' in page_text
    sentence = "base ran in 4 bits, base-16bit in 16: part of the difference is quantisation."
    assert sentence in page_text and sentence in done.stdout.replace("\n", " ")
    few = "examples no interval or test can be trusted."
    assert (few in page_text) == (few in done.stdout.replace("\n", " ")) == (report["samsum"]["examples"] < 10)
    assert "bits of the weights: base 4, tuned 4, base-16bit 16\n" in done.stdout
    assert page_text.count("part of the difference is quantisation") == 1
    done = run(tmp_path, "--resamples", "50", "--predictions", outputs / "samsum_predictions.json")
    assert "left out" not in done.stdout and list(result(outputs / "evaluation.json")["samsum"]["files"])[2:] == []


def test_answers_cut_off_or_empty_are_counted_for_each_system_and_many_of_them_named_with_the_setting(tmp_path):
    rows = [
        example(id=str(i), prediction="" if i < 2 else "Paris", hit_max_new_tokens=i == 5)
        | {"base_prediction": "a b", "base_hit_max_new_tokens": i < 11}
        for i in range(20)
    ]
    path = prediction_file(tmp_path / "outputs/trivia_qa_predictions.json", examples=rows)
    done = run(tmp_path, "--resamples", "50")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["cut", "off", "at", "the", "limit", "55", "%", "5", "%"] in lines
    assert ["empty", "0", "%", "10", "%"] in lines
    part = result(tmp_path / "outputs/evaluation.json")["trivia_qa"]
    assert part["cut_off"] == {"base": 55, "tuned": 5} and part["empty"] == {"base": 0, "tuned": 10}
    page_text = (tmp_path / "outputs/evaluation.html").read_text().replace("&#39;", "'")
    sentence = "Answers cut off at the limit, TRIVIA_QA_MAX_NEW_TOKENS of test_llama.py: 55 % of base's."
    assert sentence in page_text and sentence in done.stdout.replace("\n", " ")
    assert ">base 55 %, tuned 5 %</td>" in page_text
    for row in rows:
        for name in ("hit_max_new_tokens", "base_hit_max_new_tokens"):
            del row[name]
        row["prediction"] = "Paris"
    prediction_file(path, examples=rows)  # of another system, which does not say
    done = run(tmp_path, "--resamples", "50")
    assert "cut off" not in done.stdout and "empty" not in done.stdout
    assert "<th>cut off" not in (tmp_path / "outputs/evaluation.html").read_text()


ODD = {
    "a model that is a list": ({"settings": {"model": ["a"]}}, 0, ""),
    "a text without a perplexity": ({"general_text": {"tuned": {"loss": 2}}}, 0, ""),
    "a huge perplexity": ({"perplexity": {"tuned": {"perplexity": 10**400}}}, 2, "perplexity.tuned.perplexity"),
    "huge tokens": ({"examples": [example(nll=1.0, tokens=10**400)]}, 2, "examples.0.tokens"),
    "a loss that is none": (
        {"examples": [example(nll="x", tokens=1)]},
        2,
        "examples.0.nll: Input should be a valid number",
    ),
    "tokens unknown": ({"examples": [example(nll=1.0, tokens=-1)]}, 0, ""),
    "a huge loss": ({"examples": [example(nll=1e308, tokens=1)]}, 2, "examples.0.nll"),
}


@pytest.mark.parametrize("changes, code, words", ODD.values(), ids=ODD.keys())
def test_odd_values_in_a_file_are_left_out_or_named(changes, code, words, tmp_path):
    path = prediction_file(tmp_path / "odd.json", **changes)
    done = run(tmp_path, "--predictions", path, "--resamples", "50")
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_log_likelihoods_count_where_the_file_states_another_perplexity(tmp_path):
    rows = [example(id=str(i), nll=20.0, tokens=10) for i in range(4)]
    path = prediction_file(tmp_path / "a.json", examples=rows, perplexity={"tuned": {"perplexity": 2.0, "tokens": 1}})
    run(tmp_path, "--predictions", path, "--resamples", "20")
    found = result(tmp_path / "outputs" / "evaluation.json")["trivia_qa"]["perplexity"]["tuned"]
    assert found == {"perplexity": pytest.approx(math.exp(2)), "nll_sum": 80, "tokens": 40}


def test_rows_of_own_that_end_like_trivia_qa_are_scored_as_own(tmp_path):
    (tmp_path / "outputs" / "dataset").mkdir(parents=True)
    built = {"prompt": "Question: {question}\nAnswer:", "one_line": False}
    (tmp_path / "outputs" / "dataset" / "tasks.json").write_text(json.dumps({"own": built}))
    rows = [example(prompt="Question: Where?\nAnswer:"), example(prompt=TASKS["trivia_qa"].PROMPT)]
    for task, row in zip(("own", "trivia_qa"), rows, strict=True):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert f"\n{task} (1 examples)" in run(tmp_path, "--predictions", "a.jsonl", "--resamples", "20").stdout


def test_perplexities_over_other_tokens_have_no_difference_and_long_names_stay_apart(tmp_path):
    names = ["llama-3.1-8b-of-all", "llama-3.1-8b-of-one"]
    for name, tokens in zip(names, (10, 20), strict=True):
        prediction_file(tmp_path / name, examples=[example(nll=20.0, tokens=tokens)])
    done = run(tmp_path, "--resamples", "20", "--predictions", *(f"{name}={name}" for name in names))
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["perplexity", "7.39"] in rows and ["llama-3...b-of-one", "2.72"] in rows
    assert f"; first: {names[0]})" in done.stdout
    alike = [f"{'a' * 8}-{middle}-{'b' * 8}" for middle in ("one", "two")]
    assert list(evaluations.shown(alike).values()) == alike


def test_page_and_terminal_say_where_words_have_no_blanks_between_them(tmp_path):
    texts = ["小明今天去了北京。", "Ann calls Tom.", "เขาไปตลาด", "Анна позвонит Тому."]
    rows = [{"references": [text, text], "prediction": text} for text in texts]
    done = run(tmp_path, "--predictions", prediction_file(tmp_path / "p.json", "samsum", examples=rows))
    note = (
        "F1, BLEU and the length ratio take what is between two blanks for a word: they show little in 2 of 4 examples"
    )
    assert f"\n{note}\n" in done.stdout
    assert f"<p>{note}." in (tmp_path / "outputs" / "evaluation.html").read_text(encoding="utf-8")
    assert not metrics.blanks_note([["Ann calls Tom."], ["小明", "Xiao Ming"], ["2024-01-05"], ['{"a":"b","c":"3"}']])
