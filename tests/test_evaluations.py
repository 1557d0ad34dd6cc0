"""evaluations.py promises: official scores, one file that appears whole or not at all, one sentence for bad input."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluations

SCRIPT = Path(evaluations.__file__).resolve()

# prediction, reference, exact match, F1: worked out by hand from the official rules of triviaqa_evaluation.py
OFFICIAL = [
    ("Paris", "Paris", True, 1.0),
    ("PARIS", "paris", True, 1.0),
    ("The Beatles", "Beatles", True, 1.0),
    ("an apple", "apple", True, 1.0),
    ("a the an", "", True, 0.0),  # nothing is left: equal, but no shared word
    ("Theatre", "atre", False, 0.0),  # an article is a whole word only
    ("Spider-Man", "Spider Man", True, 1.0),
    ("Spider-Man", "Spiderman", False, 0.0),  # SQuAD would delete the hyphen
    ("New_York_City", "new york city", True, 1.0),
    ("rock'n'roll", "rock n roll", True, 1.0),
    ("rock ‘n’ roll", "rock n roll", True, 1.0),  # curly single quotes
    ("O`Hara", "O´Hara", True, 1.0),
    ("“Emma”", "Emma", False, 0.0),  # curly double quotes are not in the official set
    ('"Emma"', "Emma", True, 1.0),
    ("1,000", "1 000", True, 1.0),
    ("1,000", "1000", False, 0.0),
    ("3.14", "3 14", True, 1.0),
    ("U.S.A.", "u s", True, 1.0),  # the lone a is an article
    ("Café", "cafe", False, 0.0),
    ("ÉCOLE", "école", True, 1.0),
    ("1914–1918", "1914 1918", False, 0.0),  # an en dash stays
    ("1914-1918", "1914 1918", True, 1.0),
    ("  Rome \n\t Italy ", "rome italy", True, 1.0),
    ("", "Paris", False, 0.0),
    ("!?", "Paris", False, 0.0),
    ("AC/DC", "ac dc", True, 1.0),
    ("Tom & Jerry", "Tom Jerry", True, 1.0),
    ("Tom and Jerry", "Tom Jerry", False, 0.8),  # precision 2/3, recall 1
    ("Rome Italy", "Rome", False, 2 / 3),  # precision 1/2, recall 1
    ("no no no", "no no", False, 0.8),  # multiplicity counts
    ("big red dog", "small red cat", False, 1 / 3),
    ("dog red", "red dog", False, 1.0),  # F1 has no order
    ("东京", "东京", True, 1.0),
    ("Queen's", "queens", False, 0.0),
    ("a-ha", "Ha", True, 1.0),  # the a before the hyphen is an article too
]
SUMMARIES = ["Ann eats an apple. Bob drinks tea.", "Bob will call Ann tomorrow at noon.", "They went running!"]
GOLD = [
    ["Bob drinks tea. Ann eats the apple."],
    ["Bob calls Ann tomorrow.", "Bob will call Ann at noon."],
    ["They run.", "They went to run."],
]


def prediction_file(path, task="trivia_qa", **changes):
    """A hand-made prediction file with nothing but what is needed, and `changes` to it."""
    data = {"task": task, "examples": [{"references": ["Paris", "City of Light"], "prediction": "Paris"}]} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def run(folder, *args):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def result(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("prediction", "reference", "exact", "f1"), OFFICIAL)
def test_exact_match_and_f1_follow_the_official_rules(prediction, reference, exact, f1):
    assert evaluations.exact_match_score(prediction, reference) is exact
    assert evaluations.f1_score(prediction, reference) == pytest.approx(f1)


def test_the_best_alias_counts_and_every_question_is_in_the_denominator():
    scores = evaluations.triviaqa(["Rome", "", "red dog", ""], [["x", "rome"], ["y"], ["cat", "dog"], ["The"]])
    assert scores == {"exact_match": 25.0, "f1": pytest.approx((1 + 2 / 3) / 4 * 100)}


def test_rouge_is_the_plain_mean_of_rouge_score_over_the_best_reference(tmp_path):
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = evaluations.rouge(SUMMARIES, GOLD)
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [max(scorer.score(g, p)[name].fmeasure for g in gold) for p, gold in zip(SUMMARIES, GOLD, strict=True)]
        assert scores[name] == pytest.approx(100 * sum(best) / 3)
    by_line = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    first = by_line.score("Bob drinks tea.\nAnn eats the apple.", "Ann eats an apple.\nBob drinks tea.")
    assert evaluations.rouge(SUMMARIES[:1], GOLD[:1])["rougeLsum"] == pytest.approx(100 * first["rougeLsum"].fmeasure)


def test_rouge_lsum_differs_from_rouge_l_where_sentences_are_swapped():
    swapped = evaluations.rouge(SUMMARIES[:1], GOLD[:1])
    assert swapped["rougeLsum"] > swapped["rougeL"] + 10
    joined = evaluations.rouge(SUMMARIES[:1], [["Bob drinks tea and Ann eats the apple."]])  # two lines against one
    assert joined["rougeLsum"] > joined["rougeL"] + 10
    single = evaluations.rouge(SUMMARIES[1:2], GOLD[1:2])
    assert single["rougeLsum"] == pytest.approx(single["rougeL"])


@pytest.mark.parametrize("effective_order", [False, True])
def test_bleu_equals_sacrebleu_with_any_number_of_references(effective_order):
    import sacrebleu

    streams = [[gold[0] for gold in GOLD], [None, GOLD[1][1], GOLD[2][1]]]
    expected = sacrebleu.metrics.BLEU(effective_order=effective_order).corpus_score(SUMMARIES, streams).score
    name = "bleu_effective_order" if effective_order else "bleu"
    scores = evaluations.bleu(SUMMARIES, GOLD, effective_order)
    assert scores[name] == pytest.approx(expected) and expected > 1
    assert f"eff:{'yes' if effective_order else 'no'}" in scores[f"{name}_signature"]


def test_bleu_of_a_right_one_word_answer_is_100_with_effective_order():
    assert evaluations.bleu(["Paris"], [["Paris"]], True)["bleu_effective_order"] == pytest.approx(100)


def test_bleu_refuses_predictions_and_references_of_other_lengths():
    with pytest.raises(ValueError, match="length"):
        evaluations.bleu(["a", "b"], [["a"]], False)


def test_a_hand_made_file_is_scored_and_nothing_else_is_left_in_the_cwd(tmp_path):
    prediction_file(tmp_path / "mine.json")
    done = run(tmp_path, "--predictions", "mine.json", "--output-dir", "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "mine.json",
        "out",
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
    assert names == {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "exact_match"}
    assert {"exact_match", "f1", "bleu_effective_order", "rouge1"} < set(report["trivia_qa"]["base"])
    assert report["versions"]["sacrebleu"] and report["settings"]["output_dir"] == "outputs"
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows.count(["exact_match", "0.00", "100.00", "+100.00"]) == 2
    assert rows.count(["perplexity", "8.00", "3.25", "-4.75"]) == 2
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[:-1])


def example(**changes):
    return {"references": ["Paris"], "prediction": "Paris"} | changes


MALFORMED = {
    "not json": ("{", "not valid JSON"),
    "empty file": ("", "not valid JSON"),
    "a list": ("[]", "JSON object"),
    "not utf-8": (b"\xff\xfe\x00", "not valid JSON"),
    "nan": ('{"task": "samsum", "examples": [{"references": ["a"], "prediction": "a", "x": NaN}]}', "example 0 holds"),
    "nan as prediction": (
        '{"task": "samsum", "examples": [{"references": ["a"], "prediction": NaN}]}',
        "example 0: p",
    ),
    "infinite perplexity": ({"perplexity": {"tuned": {"perplexity": float("inf")}}}, "not valid JSON"),
    "number too large": (
        '{"task": "samsum", "examples": [{"references": ["a"], "prediction": "a"}], "x": 1e999}',
        "not valid JSON",
    ),
    "no task": ({"task": None}, "task is None"),
    "unknown task": ({"task": "squad"}, "samsum, trivia_qa"),
    "task is a list": ({"task": ["samsum"]}, "samsum, trivia_qa"),
    "no examples": ({"examples": []}, "at least one example"),
    "examples is no list": ({"examples": {}}, "at least one example"),
    "first example is no object": ({"examples": [3]}, "example 0 must be"),
    "example is no object": ({"examples": [example(), 3]}, "example 1 must be"),
    "no prediction": ({"examples": [{"references": ["a"]}]}, "example 0 has no prediction"),
    "no references": ({"examples": [example(), {"prediction": "a"}]}, "example 1 has no references"),
    "prediction is null": ({"examples": [example(prediction=None)]}, "example 0: prediction"),
    "prediction is no text": ({"examples": [example(prediction="\ud800")]}, "example 0 holds"),
    "references empty": ({"examples": [example(references=[])]}, "example 0: references"),
    "references a string": ({"examples": [example(references="Paris")]}, "example 0: references"),
    "reference a number": ({"examples": [example(references=["a", 1])]}, "example 0: references"),
    "base in some": ({"examples": [example(base_prediction="a"), example()]}, "example 1: base_prediction"),
    "base in others": ({"examples": [example(), example(base_prediction="a")]}, "example 1: base_prediction"),
    "base is a number": ({"examples": [example(base_prediction=1)]}, "example 0: base_prediction"),
    "perplexity is a number": ({"perplexity": 3}, "perplexity"),
    "perplexity is a word": ({"perplexity": {"tuned": {"perplexity": "low"}}}, "perplexity of tuned"),
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
    assert "bad.json" in done.stderr
    assert (tmp_path / "evaluation.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "evaluation.json", "good.json"]


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
    assert_one_sentence(run(tmp_path, "--predictions", path, "--output-dir", "file/out"), "cannot write to file/out")


def test_an_evaluation_that_cannot_be_replaced_is_named_and_left_alone(tmp_path):
    path = prediction_file(tmp_path / "mine.json")
    (tmp_path / "evaluation.json").mkdir()
    done = run(tmp_path, "--predictions", path, "--output-dir", tmp_path)
    assert_one_sentence(done, "cannot write")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "mine.json"]


def test_a_folder_named_like_a_metric_in_the_cwd_is_not_run(tmp_path):
    path = prediction_file(tmp_path / "mine.json")
    for name in ("rouge", "bleu", "trivia_qa", "sacrebleu", "rouge_score"):
        (tmp_path / name).mkdir()
        for file in (f"{name}.py", "__init__.py"):
            (tmp_path / name / file).write_text("open('pwned', 'w')\n")
    assert run(tmp_path, "--predictions", path).returncode == 0
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


def test_every_setting_has_its_flag_and_an_unknown_or_shortened_flag_exits_with_2():
    args = evaluations.parse_args([])
    assert vars(args) == {"predictions": evaluations.PREDICTIONS, "output_dir": evaluations.OUTPUT_DIR}
    for flag in ("--nonsense", "--output"):
        with pytest.raises(SystemExit) as stop:
            evaluations.parse_args([flag, "x"])
        assert stop.value.code == 2


def test_help_answers_in_under_a_second(tmp_path):
    start = time.monotonic()
    assert run(tmp_path, "--help").returncode == 0
    assert time.monotonic() - start < 1
