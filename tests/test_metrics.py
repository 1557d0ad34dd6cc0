"""Every score is the one that its official implementation gives."""

import functools
import random
import re

import numpy as np
import pytest

from pipeline.scoring import metrics
from pipeline.texts import holds, normalize_answer
from tasks import samsum, trivia_qa

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
