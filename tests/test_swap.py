"""test_llama.py --swap-answers: contexts say what they are made to say, nothing else changes; reader and memory differ."""

import json

import conftest
import pytest
from datasets import Dataset

import swap
from common import normalize_answer

PROMPT = "Answer the question from the context.\n\nContext:\n{}\n\nQuestion: {}\nAnswer:"


def row(number, context, answer, *aliases, question="Which one is it?"):
    known = {"id": f"trivia_qa:{number}", "task": "trivia_qa", "answer_in_context": True}
    return known | {
        "prompt": PROMPT.format(context, question),
        "completion": f" {answer}",
        "references": [answer, *aliases],
    }


def other(*answers):
    """Rows that only lend their answers."""
    return [row(f"other {i}", "Nothing stands here.", answer) for i, answer in enumerate(answers)]


def swapped(*rows):
    """({id: row}, counts) of the rows once swapped."""
    result, counts = swap.swap_answers(Dataset.from_list(list(rows)))
    return {one["id"].removeprefix("trivia_qa:"): one for one in result}, counts


SWAPS = {  # context, answer and aliases, the answer that is lent, what the context must say
    "everywhere, whatever the case": ("Paris. PARIS! In paris?", ["Paris"], "Rome", "Rome. Rome! In Rome?"),
    "whole words": ("The artist loves art.", ["art"], "music", "The artist loves music."),
    "aliases, the longest first": (
        "New York City, or New York, or NYC.",
        ["NYC", "New York", "New York City"],
        "Rome",
        "Rome, or Rome, or Rome.",
    ),
    "the official rules' blanks": (
        "Spider-Man, Spider_Man and spider\nman, not Spiderman.",
        ["Spider Man"],
        "Iron Fist",
        "Iron Fist, Iron Fist and Iron Fist, not Spiderman.",
    ),
    "an article inside": ("Alexander the Great won.", ["Alexander Great"], "Ivan Petrov", "Ivan Petrov won."),
    "the article in front stays": ("The Beatles. the Beatles.", ["The Beatles"], "The Kinks", "The Kinks. the Kinks."),
    "possessives": ("O’Hara’s and O'Hara's", ["O'Hara"], "McKay", "McKay’s and McKay's"),
    "accents": ("Café, cafe, CAFÉ", ["café"], "école", "école, cafe, école"),
    "a decomposed accent is another word": ("Jose and Jose\u0301", ["Jose"], "Anna", "Anna and Jose\u0301"),
    "other scripts": ("東京 is 東京.", ["東京"], "京都", "京都 is 京都."),
    "a dash parts words": ("1914–1918, in 1918", ["1918"], "1850", "1914–1850, in 1850"),
    "what looks like a pattern": (r"C++ (C++)", ["C++"], r"\g", r"\g++ (\g++)"),
}


@pytest.mark.parametrize(("context", "answers", "lent", "expected"), SWAPS.values(), ids=SWAPS.keys())
def test_every_form_of_the_answer_is_swapped_as_whole_words_and_nothing_else(context, answers, lent, expected):
    rows, _ = swapped(row(1, context, *answers), *other(lent))
    bare = lent.removeprefix("The ")
    assert rows["1"]["prompt"] == PROMPT.format(expected, "Which one is it?")
    assert rows["1"]["swapped"] == bare and rows["1"]["completion"] == f" {bare}"
    assert rows["1"]["references"] == answers and list(rows) == ["1"]


REFUSED = {  # context, question, answers, the answers that are lent, why not
    "not there": ("An artist.", "Which?", ["art"], ["music"], "not there"),
    "in the question": ("Art it is.", "Is it art or music?", ["art"], ["dance"], "also in the question"),
    "an alias in the question": ("Art.", "Is it painting?", ["art", "painting"], ["dance"], "also in the question"),
    "no partner": ("Art.", "Which?", ["art"], [], "without another of their kind"),
    "no year for a word": ("Art.", "Which?", ["art"], ["1990"], "without another of their kind"),
    "no name for a year": ("In 1990.", "When?", ["1990"], ["Rome"], "without another of their kind"),
    "in the context": ("Art, music.", "Which?", ["art"], ["music"], "without another of their kind"),
    "in the question as well": ("Art.", "Not music?", ["art"], ["music"], "without another of their kind"),
    "an alias": ("Art.", "Which?", ["art", "music"], ["music"], "without another of their kind"),
    "part of an alias": ("New York.", "Which?", ["New York", "York"], ["York"], "without another of their kind"),
    "around an alias": ("York.", "Which?", ["York", "A Town"], ["Town"], "without another of their kind"),
}


@pytest.mark.parametrize(("context", "question", "answers", "lent", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_swapped_is_left_out_and_counted_by_its_reason(context, question, answers, lent, why):
    good = [row("good", "It is Oslo-on-the-Sea 1.", "1x"), row("good 2", "It is 1x.", "1x"), *other("2x")]
    rows, counts = swapped(row("bad", context, *answers, question=question), *other(*lent), *good)
    assert list(rows) == ["good 2"] and counts["swapped"] == 1
    bad, _ = swapped(*good)
    _, without = swapped(*other(*lent), *good) if lent else (None, swapped(*good)[1])
    assert {k: n for k, n in counts.items() if n != without.get(k, 0)} == {why: without.get(why, 0) + 1}
    assert list(bad) == ["good 2"]


@pytest.mark.parametrize(
    "kind", [["1990", "1066", "1940s"], ["three", "110 mph", "$2", "Seven"], ["art", "music"], ["Ann Lee", "Bob Day"]]
)
def test_a_year_stays_a_year_a_number_a_number_and_words_keep_their_number_and_capital(kind):
    rows = [row(i, f"It is {answer}.", answer) for i, answer in enumerate(kind)]
    all_kinds = other("1812", "40 years", "dance", "Rome", "Cat Fox", "a long story told", "War and Peace")
    for i, answer in enumerate(swapped(*rows, *all_kinds)[0].values()):
        assert answer["swapped"] in [*kind[:i], *kind[i + 1 :], "1812", "40 years", "dance", "Cat Fox"]
        assert swap.kind_of(answer["swapped"]) == swap.kind_of(kind[i])
