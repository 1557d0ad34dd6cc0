"""evaluations.py promises: official scores, one file that appears whole or not at all, one sentence for bad input."""

import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import conftest
import numpy as np
import pytest

import evaluations
from pipeline.scoring import metrics, page, significance
from pipeline.texts import holds, normalize_answer
from tasks import TASKS, samsum, trivia_qa

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
    # articles
    ("the-the band", "band", True, 1.0),
    ("a_the_an", "", True, 0.0),
    ("vitamin A", "vitamin", True, 1.0),  # the letter is an article to these rules
    ("vitamin A", "vitamin B", False, 2 / 3),  # precision 1, recall 1/2
    ("A.B.C.", "b c", True, 1.0),
    ("T.H.E.", "t h e", True, 1.0),  # three letters, no article
    ("thé", "the", False, 0.0),
    ("a–z", "–z", True, 1.0),  # the dash stays and ends the word a
    ("the", "a", True, 0.0),  # both empty
    # punctuation inside words
    ("can't", "cant", False, 0.0),
    ("can't", "can t", True, 1.0),
    ("e-mail", "email", False, 0.0),
    ("C++", "C", True, 1.0),
    (".NET", "net", True, 1.0),
    ("10:30", "10 30", True, 1.0),
    ("Dr. No", "dr no", True, 1.0),
    ("$5.99", "5 99", True, 1.0),
    ("50%", "50", True, 1.0),
    # underscores
    ("__init__", "init", True, 1.0),
    ("Rock_'n'_Roll", "rock n roll", True, 1.0),
    # curly quotes and their neighbours
    ("O’Neill", "O'Neill", True, 1.0),
    ("O’Neill", "ONeill", False, 0.0),
    ("‘‘quoted’’", "quoted", True, 1.0),
    ("«Émile»", "Émile", False, 0.0),
    ("12″", "12", False, 0.0),  # a double prime stays
    # unicode
    ("Café", "Cafe\u0301", False, 0.0),  # composed and decomposed differ
    ("STRASSE", "straße", False, 0.0),  # lower case, no case folding
    ("ΣΊΣΥΦΟΣ", "σίσυφος", True, 1.0),  # the final sigma
    ("１９６９", "1969", False, 0.0),  # full-width digits
    ("\u00a0Rome\u2003Italy", "rome italy", True, 1.0),  # blanks of other widths
    ("Rome\u200b", "rome", False, 0.0),  # a zero-width space is no blank
    ("東京 タワー", "東京", False, 2 / 3),
    ("東京タワー", "東京", False, 0.0),
    ("½", "1 2", False, 0.0),
    ("Les Misérables", "les miserables", False, 0.5),
    # digits
    ("1,234,567", "1 234 567", True, 1.0),
    ("1,234,567", "1234567", False, 0.0),
    ("007", "7", False, 0.0),
    ("7th", "7", False, 0.0),
    # empty after normalisation
    ("???", "", True, 0.0),
    ("…", "...", False, 0.0),  # the one-character ellipsis stays
    ("—", "", False, 0.0),
    ("and", "&", False, 0.0),
    # multiplicity and order
    ("New York, New York", "new york", False, 2 / 3),
    ("x", "x x x x", False, 0.4),  # precision 1, recall 1/4
    ("Alpha Beta Gamma Delta", "Delta Gamma", False, 2 / 3),
]
# prediction, reference, whether the reference's normalised words stand in the prediction, whole and in a row
CONTAINS = [
    ("It is Paris, of course.", "Paris", True),
    ("Parisian", "Paris", False),
    ("party", "art", False),
    ("the big apple", "the", False),  # nothing to look for
    ("New York City", "york city", True),
    ("New big York", "New York", False),
    ("Spider-Man!", "spider man", True),
    ("spiderman", "spider man", False),
    ("Paris", "Paris, France", False),
    ("the the who", "The Who", True),
    ("", "Paris", False),
    ("It was Paris—the capital", "Paris", True),
    ("«Paris»", "“Paris”", True),
    ("in １９８６", "1986", True),
    ("—", "–", False),
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


def run(folder, *args, fresh=False):
    return conftest.run("evaluations.py", *args, cwd=folder, fresh=fresh)


def result(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("prediction", "reference", "exact", "f1"), OFFICIAL)
def test_exact_match_and_f1_follow_the_official_rules(prediction, reference, exact, f1):
    assert metrics.exact_match_score(normalize_answer, prediction, reference) is exact
    assert metrics.f1_score(normalize_answer, prediction, reference) == pytest.approx(f1)


@pytest.mark.parametrize(("prediction", "reference", "contained"), CONTAINS)
def test_contains_looks_for_whole_words_in_a_row(prediction, reference, contained):
    assert holds(prediction, [reference]) is contained


def test_the_best_alias_counts_and_every_question_is_in_the_denominator():
    answers = (["Rome", "", "red dog", " "], [["x", "rome"], ["y"], ["cat", "dog"], ["The"]])
    assert metrics.best(functools.partial(metrics.exact_match_score, normalize_answer), *answers) == [
        100,
        0,
        0,
        0,
    ]  # a blank answer is wrong
    assert metrics.best(functools.partial(metrics.f1_score, normalize_answer), *answers) == pytest.approx(
        [100, 0, 200 / 3, 0]
    )
    contained = metrics.table_of(trivia_qa, answers[1], answers[0])[:, metrics.means(trivia_qa)["contains"]]
    assert contained.tolist() == [100, 0, 100, 0]


def test_length_ratio_is_of_words_and_to_the_nearest_reference():
    predictions, references = ["a b c", "", "one two"], [["a b c d"], ["x y"], ["1", "1 2 3 4 5"]]
    assert metrics.length_ratio(predictions, references) == [75, 0, 200]
    assert metrics.length_ratio(["a b c d"], [["1", "1 2 3 4 5"]]) == [80]


def aliases(seed, examples):
    """Predictions and lists of references with shared words, other endings, repeats, lines, blanks and no words."""
    rng = random.Random(seed)
    words = ["run", "runs", "running", "The", "Who", "a", "an", "éclair", "1,000", "U.S.", "Done!", "art", "party"]

    def text():
        return rng.choice([" ", " ", "  ", ". ", "! ", "\n"]).join(rng.choices(words, k=rng.randint(0, 12)))

    predictions = [text() for _ in range(examples)]
    return predictions, [[text() for _ in range(rng.randint(1, 9))] for _ in range(examples)]


def test_rouge_is_rouge_score_itself_for_every_example_whatever_is_shared_or_left_out():
    from rouge_score import rouge_scorer

    def by_line(text):
        return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    predictions, references = aliases(1, 300)
    predictions, references = predictions + SUMMARIES, references + GOLD
    scores = metrics.rouge(predictions, references)
    for i, (prediction, refs) in enumerate(zip(predictions, references, strict=True)):
        expected = scorer.score_multi([by_line(ref) for ref in refs], by_line(prediction))
        assert {name: scores[name][i] for name in scores} == {n: 100 * s.fmeasure for n, s in expected.items()}
    assert 0 < sum(scores["rouge2"]) < sum(scores["rouge1"])


def test_rouge_lsum_differs_from_rouge_l_where_sentences_are_swapped():
    def score(prediction, reference):
        return {name: values[0] for name, values in metrics.rouge([prediction], [reference]).items()}

    swapped = score(SUMMARIES[0], GOLD[0])
    assert swapped["rougeLsum"] > swapped["rougeL"] + 10
    joined = score(SUMMARIES[0], ["Bob drinks tea and Ann eats the apple."])  # two lines against one
    assert joined["rougeLsum"] > joined["rougeL"] + 10
    single = score(SUMMARIES[1], GOLD[1])
    assert single["rougeLsum"] == pytest.approx(single["rougeL"])


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


@pytest.mark.parametrize("effective_order", [False, True])
def test_bleu_equals_sacrebleu_with_any_number_of_references(effective_order):
    import sacrebleu

    streams = [[gold[0] for gold in GOLD], [None, GOLD[1][1], GOLD[2][1]]]
    expected = sacrebleu.metrics.BLEU(effective_order=effective_order).corpus_score(SUMMARIES, streams).score
    counts = metrics.bleu_counts(SUMMARIES, GOLD)
    assert metrics.bleu_of(counts.sum(0), effective_order) == pytest.approx(expected, rel=1e-12) and expected > 1
    [signature] = metrics.signatures(trivia_qa if effective_order else samsum, GOLD).values()
    assert f"eff:{'yes' if effective_order else 'no'}" in signature and "nrefs:var" in signature


@pytest.mark.parametrize("effective_order", [False, True])
def test_bleu_of_any_resample_equals_sacrebleu_on_those_rows(effective_order):
    import sacrebleu

    predictions, references = aliases(2, 60)
    counts = metrics.bleu_counts(predictions, references)
    rng, seen = np.random.default_rng(0), set()
    for size in (1, 1, 1, 2, 3, 5, 60) * 12:  # small ones meet every edge: no match, no 4-gram, shorter, longer
        drawn = rng.integers(60, size=size)
        width = max(len(references[i]) for i in drawn)
        streams = [[references[i][k] if k < len(references[i]) else None for i in drawn] for k in range(width)]
        sacre = sacrebleu.metrics.BLEU(effective_order=effective_order)
        expected = sacre.corpus_score([predictions[i] for i in drawn], streams).score
        seen.add(expected == 0)
        assert metrics.bleu_of(counts[drawn].sum(0), effective_order) == pytest.approx(expected, rel=1e-12)
    assert seen == {True, False}


def test_bleu_of_a_right_one_word_answer_is_100_with_effective_order_and_0_without():
    for effective_order, expected in ((True, 100), (False, 0)):
        counts = metrics.bleu_counts(["Paris"], [["Paris"]])
        assert metrics.bleu_of(counts[0], effective_order) == pytest.approx(expected)


def test_bleu_refuses_predictions_and_references_of_other_lengths():
    for predictions, references in ((["a", "b"], [["a"]]), (["a"], [["a"], ["b"]])):
        with pytest.raises(ValueError, match="length"):
            metrics.bleu_counts(predictions, references)


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
        "id 'x' stands there more than once",
    ),
    "number and text twice": ({"examples": [example(id=1), example(id="1")]}, "id '1' stands there more than once"),
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
    assert "own, ROUGE-L: base → tuned" in html and "Difference in ROUGE-L to base" in html and "a red dog" in html


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


# --- intervals and tests

ARGS = evaluations.parse_args(["--resamples", "1000"])
SCORES = functools.partial(metrics.corpus_scores, trivia_qa)
COLUMNS = len(metrics.means(trivia_qa)) + 12


def synthetic(rng, examples, effect):
    """Tables of two systems: exact match differs by `effect` on average, perplexity is e**2 and tokens vary."""
    first = np.zeros((examples, COLUMNS))
    first[:, 0] = rng.gamma(2.0, 20.0, examples)
    first[:, -1] = rng.integers(2, 30, examples)
    first[:, -2] = first[:, -1] * rng.gamma(4.0, 0.5, examples)
    second = first.copy()
    second[:, 0] += effect + rng.gamma(1.0, 15.0, examples) - 15
    return {"first": first, "second": second}


def test_intervals_hold_the_truth_in_about_95_of_100_experiments():
    rng, held = np.random.default_rng(1), np.zeros(3)
    for _ in range(200):
        measured = significance.measure(SCORES, synthetic(rng, 200, 3.0), ARGS)
        pairs = [
            (measured["intervals"]["first"]["exact_match"], 40.0),  # the mean of the gamma
            (measured["differences"]["second"]["exact_match"]["interval"], 3.0),
            (measured["intervals"]["first"]["perplexity"], np.exp(2.0)),
        ]
        held += [low <= truth <= high for (low, high), truth in pairs]
    assert (held >= 0.90 * 200).all() and (held <= 0.99 * 200).all(), held


def mean(sums, examples):
    return {"mean": sums[..., 0] / examples}


def p_of(first, other, resamples=1000):
    """The p of a score that is a plain mean."""
    tables = (np.reshape(values, (-1, 1)).astype(float) for values in (first, other))
    return significance.randomisation(mean, *tables, resamples, 0)["mean"]


def test_equal_systems_are_significant_in_about_5_of_100_experiments_and_different_ones_nearly_always():
    rng, found, power = np.random.default_rng(2), 0, 0
    for _ in range(200):
        noise = rng.gamma(1.0, 15.0, 100) * rng.choice([-1, 1], 100)
        found += p_of(np.zeros(100), noise) < 0.05
        power += p_of(np.zeros(100), noise + 10) < 0.05
    assert 0.02 * 200 <= found <= 0.085 * 200 and power > 0.98 * 200


def chance_of(tables):
    """The comparison of "b" with the first of these {name: values}, a score that is a plain mean."""
    args = evaluations.parse_args(["--resamples", "400"])
    tables = {name: np.reshape(values, (-1, 1)).astype(float) for name, values in tables.items()}
    differences = significance.measure(mean, tables, args)["differences"]
    return significance.compare(mean, tables, {"mean": 0}, differences, ("mean",), args)["b"]["mean"]


def test_a_difference_as_small_as_said_is_found_in_about_80_of_100_test_sets_and_half_of_it_is_not():
    rng, found, half, of_100 = np.random.default_rng(3), np.zeros(2), np.zeros(2), 100
    for _ in range(200):
        noise = rng.normal(0, 20, (2, of_100))
        said = chance_of({"a": np.zeros(of_100), "b": noise[0]})["minimum_detectable"]
        turned = np.where(rng.random((2, of_100)) < 0.3, rng.choice([-100, 100], (2, of_100)), 0)  # yes or no
        right = {"a": turned[0] < 0, "b": turned[0] > 0}
        turns = chance_of({name: 100.0 * yes for name, yes in right.items()})["minimum_detectable"] / 100
        for planted, share in ((found, 1), (half, 0.5)):
            others = rng.choice([100, -100, 0], of_100, p=[0.15 + share * turns / 2, 0.15 - share * turns / 2, 0.7])
            planted += [
                p_of(np.zeros(of_100), noise[1] + share * said, 400) < 0.05,
                p_of(0 * others, others, 400) < 0.05,
            ]
    assert (found >= 0.70 * 200).all() and (found <= 0.90 * 200).all(), found
    assert (half < 0.45 * 200).all(), half


def test_what_no_test_can_show_is_not_said_to_be_visible():
    assert chance_of({"a": [1.5] * 50, "b": [1.5] * 50})["minimum_detectable"] is None  # no chance to be seen
    wrong = chance_of({"a": [0] * 200, "b": [0] * 200})["minimum_detectable"]
    assert wrong == pytest.approx(3.92)  # about 8 of 200 rows, which give 6 in 80 % of cases: p_of 6 and 0 is 2 / 64
    assert chance_of({"a": [0] * 7, "b": [0] * 7})["minimum_detectable"] is None


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_over_rows_and_seeds_hold_the_truth_in_about_95_of_100_experiments(seeds):
    rng, held, args = np.random.default_rng(4), np.zeros(4), evaluations.parse_args(["--resamples", "500"])

    def trained(name, rows):
        """Trainings whose mean is 30: variance of seeds 1, of rows alone as given, of rows in a seed 5 x 5."""
        own = rng.normal(30, 1, (seeds, 1)) + rng.normal(0, 5, (seeds, len(rows)))
        return {f"{name}@{seed}": (rows + own[seed]).reshape(-1, 1) for seed in range(seeds)}

    for _ in range(200):
        rows = rng.normal(0, 10, 50)
        first, other = trained("a", rows), trained("b", rows)
        untrained = {"a": (30 + rows + rng.normal(0, 5, 50)).reshape(-1, 1)}
        renamed = {name.replace("@", "@other"): table for name, table in first.items()}
        whole = significance.measure(mean, first, args)
        pairs = [(whole["intervals"]["a"]["mean"], 30.0)]
        for tables in (first | other, renamed | other, untrained | other):
            pairs.append((significance.measure(mean, tables, args)["differences"]["b"]["mean"]["interval"], 0.0))
        held += [low <= truth <= high for (low, high), truth in pairs]
    assert (held >= 0.91 * 200).all() and (held[:2] <= 0.99 * 200).all(), held


def test_the_spread_of_seeds_is_what_a_p_value_over_seeds_knows_of():
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 1, 200)
    apart = {f"b@{seed}": rows + 3 * seed - 2 + rng.normal(0, 1, 200) for seed in range(3)}
    near = {f"b@{seed}": rows + 1 + rng.normal(0, 1, 200) for seed in range(3)}
    alike, far = chance_of({"a": rows} | near), chance_of({"a": rows} | apart)
    assert far["difference"] == pytest.approx(1, abs=0.3) and far["p_value"] > 0.3
    assert alike["p_value"] < 0.02 and alike["interval"][0] > 0.5
    assert alike["minimum_detectable"] < 1 < far["minimum_detectable"]
    assert alike["wins"] + alike["losses"] == 200


def test_resampling_draws_every_sample_of_the_rows_equally_often():
    sums = significance.resampled_sums(np.array([[1.0], [10.0], [100.0]]), 27_000, 0)[:, 0]
    every = [a + b + c for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100)]
    for value in set(every):
        assert (sums == value).sum() == pytest.approx(1000 * every.count(value), rel=0.1)
    assert significance.interval(np.arange(1001.0)) == [25, 975]


def test_resampling_all_of_trivia_qa_stays_far_below_500_megabytes():
    tracemalloc.start()
    significance.resampled_sums(np.ones((7993, 40)), 4000, 0)
    significance.randomisation(mean, np.ones((7993, 8)), np.zeros((7993, 8)), 4000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # all at once: 512e6


def test_swaps_part_the_scores_as_far_as_seen_as_often_as_counting_says():
    assert p_of([0, 0, 0], [1, 2, 3], 20_000) == pytest.approx(2 / 8, abs=0.02)  # only +++ and --- reach 6
    assert p_of([0, 0, 0], [0.1, 0.2, -0.3]) == 1  # 0 but for its last bits
    assert p_of([5, 5], [5, 5]) == 1 and p_of([0], [1], 100) == 1
    assert p_of(np.zeros(40), np.ones(40)) == 1 / 1001  # never 0
    # 3 - 3 + 1 + 2 tenths: 12 of the 16 signs reach 3, counted in integers; as floats half of them differ in a bit
    tenths = np.array([3, -3, 1, 2])
    signs = np.array(list(itertools.product([-1, 1], repeat=4)))
    expected = (np.abs(signs @ tenths) >= 3).mean()
    assert p_of(np.zeros(4), tenths / 10, 20_000) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("wins, losses", [(8, 2), (5, 0), (12, 6), (3, 3)])
def test_of_yes_or_no_scores_the_test_is_mcnemars_exact_one(wins, losses):
    n = wins + losses
    binomial = [math.comb(n, k) / 2**n for k in range(n + 1)]
    exact = min(1, 2 * sum(binomial[: min(wins, losses) + 1]))
    first = [0] * wins + [100] * losses + [100] * 20  # 20 more that both have right
    other = [100] * wins + [0] * losses + [100] * 20
    assert p_of(first, other, 20_000) == pytest.approx(exact, abs=0.012)
    assert p_of(other, first, 20_000) == pytest.approx(exact, abs=0.012)


def test_holm_adjusts_by_rank_and_never_below_a_smaller_one():
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.5, 0.9]) == pytest.approx([1, 1]) and significance.holm([]) == []


def test_bleu_is_tested_as_sacrebleus_paired_test_does():
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    gold = [[f"w{i} the cat sat on mat number {i} and it looked at dog {i}"] for i in range(60)]
    right = [refs[0] for refs in gold]
    first = [text.replace("cat", "cow") if i % 3 == 0 else text for i, text in enumerate(right)]
    other = [text.replace("dog", "duck") if i % 4 == 0 else text for i, text in enumerate(right)]
    streams = [[refs[0] for refs in gold]]
    paired = PairedTest([("a", first), ("b", other)], {"BLEU": BLEU(references=streams)}, None, n_samples=10_000)
    theirs = paired()[1]["BLEU"][1].p_value
    tables = [metrics.table_of(samsum, gold, texts) for texts in (first, other)]
    by_sums = functools.partial(metrics.corpus_scores, samsum)
    ours = significance.randomisation(by_sums, *tables, 10_000, 0)
    assert 0.02 < theirs < 0.98 and ours["bleu"] == pytest.approx(theirs, abs=0.02)
    assert set(ours) == set(samsum.SCORES) - {"perplexity"}
    one = metrics.table_of(samsum, gold, [first[0], *right[1:]])
    same = metrics.table_of(samsum, gold, right)
    assert significance.randomisation(by_sums, one, same, 1000, 0)["bleu"] == 1  # PairedTest alone says 0.001


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


def test_no_p_is_shown_as_zero_or_smaller_than_the_resamples_can_show(tmp_path):
    rows = [example(id=str(i), base_prediction="Rome", nll=1.0, base_nll=9.0, tokens=2) for i in range(60)]
    prediction_file(tmp_path / "outputs/trivia_qa_predictions.json", examples=rows)
    for resamples, shown in ((50, f"{3 / 51:.4f}"), (500, f"{3 / 501:.4f}"), (40_000, "< 0.0001")):
        done = run(tmp_path, "--resamples", resamples)
        page_text = (tmp_path / "outputs/evaluation.html").read_text()
        assert shown in done.stdout and f"p {shown.replace('<', '&lt;')}<" in page_text
        assert "0.0000" not in done.stdout and "p 0.0000" not in page_text


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
    assert f"<td>{least:.2f}</td>" in page and f"visible from: {least:.2f} in f1" in printed
    systems = [f"{name}@{seed}={files[seed]}" for name in ("base", "tuned") for seed in range(3)]
    assert run(tmp_path, "--predictions", *systems, "--resamples", "500").returncode == 0
    paired = result(tmp_path / "outputs/evaluation.json")["trivia_qa"]
    for system in ("base", "tuned"):
        for metric in ("exact_match", "f1", "rouge1"):
            assert paired[system][metric] == pytest.approx(several[system][metric])
    done = run(tmp_path, "--predictions", f"tuned={files[0]}", f"tuned@1={files[1]}")
    assert_one_sentence(done, "tuned stands there without a seed, too: name each of its files tuned@SEED=FILE")


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


# --- whose predictions these are

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
    assert "; model llama<" in page and "/home/ann" not in page
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


@pytest.mark.parametrize("p, shown", [(0.00005, "< 0.0001"), (0.0001, "0.0001"), (0.04567, "0.0457"), (1, "1.0000")])
def test_a_small_p_is_shown_as_smaller_than_what_can_be_printed(p, shown):
    assert page.p_value(p) == shown


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
    "German": (["Über Öl"], False),
    "English": (["Ann calls Tom."], False),
    "an alias in English": (["北京", "Beijing"], False),
}


def test_page_and_terminal_say_where_rouge_misses_most_letters_and_the_scores_stay(tmp_path):
    for name, (references, missed) in OTHER_LETTERS.items():
        assert bool(metrics.rouge_note([references])) == missed, name
    texts = [references for references, _ in OTHER_LETTERS.values()]
    examples = [{"references": refs, "prediction": refs[0]} for refs in texts]
    done = run(tmp_path, "--predictions", prediction_file(tmp_path / "p.json", "samsum", examples=examples))
    note = "ROUGE reads only a to z and 0 to 9: it misses most of the reference in 5 of 8 examples"
    assert f"\n{note}\n" in done.stdout and done.stderr == ""
    report = result(tmp_path / "outputs" / "evaluation.json")["samsum"]
    assert report["rouge_note"] == note and report["tuned"]["exact_match"] == 100
    assert f"<p>{note}" in (tmp_path / "outputs" / "evaluation.html").read_text(encoding="utf-8")
    done = run(tmp_path, "--predictions", prediction_file(tmp_path / "english.json"))
    assert "misses" not in done.stdout
    assert "misses" not in (tmp_path / "outputs" / "evaluation.html").read_text(encoding="utf-8")


# --- systems found in the output folder, their bits, what was cut off


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
    sentence = "Compared are base with weights of 4 bits, base-16bit of 16: part of this difference is quantisation."
    assert sentence in page_text and sentence in done.stdout.replace("\n", " ")
    assert "bits of the weights: base 4, tuned 4, base-16bit 16\n" in done.stdout
    assert page_text.count("part of this difference is quantisation") == 1
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
    assert "<th>cut off at the limit</th><td>55 %</td><td>5 %</td>" in page_text
    for row in rows:
        for name in ("hit_max_new_tokens", "base_hit_max_new_tokens"):
            del row[name]
        row["prediction"] = "Paris"
    prediction_file(path, examples=rows)  # of another system, which does not say
    done = run(tmp_path, "--resamples", "50")
    assert "cut off" not in done.stdout and "empty" not in done.stdout
    assert "<th>cut off" not in (tmp_path / "outputs/evaluation.html").read_text()
