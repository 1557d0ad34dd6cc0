"""Read or remembered? Questions whose context holds another answer than the true one, and what the answers follow."""

import re
from collections import Counter

import numpy as np

from pipeline.scoring import significance
from pipeline.script import fail, say
from pipeline.texts import WORDS, holds, words_of

NUMBER = r"\S*\d.*|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|hundred|thousand|million"
SHARES = ("follows_context", "from_memory", "neither_or_both")


def swap_answers(rows):
    """The trivia_qa rows (a Dataset) that hold another answer, `swapped`, and {"swapped" or why not: rows}.

    `references` stay the true ones, `completion` does not. Exits 2 where there is no such row.
    """
    from datasets import Dataset

    asked = [row for row in rows if row["task"] == "trivia_qa"]
    answers = [re.sub(r"^(a|an|the) +", "", row["completion"].strip(), flags=re.IGNORECASE) for row in asked]
    results = [swap_row(row, answers[i], answers[i + 1 :] + answers[:i]) for i, row in enumerate(asked)]
    counts = dict(Counter("swapped" if isinstance(row, dict) else row for row in results))
    say(f"trivia_qa, answers in the context: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    if "swapped" not in counts:
        fail("no answer can be swapped: run build_dataset.py with trivia_qa, a context and more test rows")
    swapped = Dataset.from_list([row for row in results if isinstance(row, dict)])
    swapped._fingerprint = rows._fingerprint  # the rows that they were made from
    return swapped, counts


def kind_of(answer):
    """Whether it is a year, is a number, begins with a small letter, and how many words it has, 3 for more."""
    year, number = (bool(re.fullmatch(form, answer.lower())) for form in (r"\d{3,4}s?", NUMBER))
    return year, number, answer[:1].islower(), min(3, len(answer.split()))


def swap_row(row, own, others):
    """The row with the first of `others` that fits in the place of `own`, or why there is none (a string)."""
    start, mark, rest = row["prompt"].partition("Context:\n")
    context, end, question = rest.rpartition("\n\nQuestion: ")
    names = sorted(filter(None, map(words_of, row["references"])), key=len, reverse=True)  # the longest first
    if not holds(context, names):
        return "not there"
    if holds(question, names):
        return "also in the question"
    kind = kind_of(own)
    for other in (one for one in others if kind_of(one) == kind):
        words = words_of(other)
        if words and not holds(other, names) and not any(holds(text, [words]) for text in (rest, *names)):
            text = replace(context, names, other)
            known = {"prompt": start + mark + text + end + question, "completion": f" {other}", "swapped": other}
            return "in another form" if holds(text, names) else row | known
    return "without another of their kind"


def replace(text, names, other):
    """The text with `other` in every place of one of the names, the longest first: where `holds` finds them."""
    letters = "".join(char for char in set(text) if not char.translate(WORDS).startswith(" "))
    pieces = re.finditer(f"[a{letters}]+|.", text, re.DOTALL)  # of a script without blanks, each character
    places = [(word, piece) for piece in pieces for word in words_of(piece[0]).split()]
    line = " ".join(word for word, _ in places)
    for found in reversed([*re.finditer(rf"(?<!\S)({'|'.join(names)})(?!\S)", line)]):
        first, last = (places[line.count(" ", 0, end)][1] for end in found.span())
        text = text[: first.start()] + other + text[last.end() :]
    return text


def score(rows, args):
    """{system: {share: % of its answers}}, with tests: they hold the swapped answer, a true one, neither or both."""
    from pipeline.scoring.metrics import best, contains_score

    def shares(sums, examples):
        return dict(zip(SHARES, np.moveaxis(sums, -1, 0) / examples, strict=True))

    tables = {}
    for name, system in rows.systems.items():
        new = np.array(best(contains_score, system.predictions, [[answer] for answer in rows.swapped]))
        true = np.array(best(contains_score, system.predictions, rows.references))
        tables[name] = np.column_stack([new * (true == 0), true * (new == 0), 100 * (new == true)])
    result, columns = significance.measure(shares, tables, args), {"follows_context": 0, "from_memory": 1}
    tests = significance.compare(shares, tables, columns, result.pop("differences"), args)
    files = {name: system.file for name, system in rows.systems.items()}
    too_long = {name: system.too_long for name, system in rows.systems.items() if system.too_long}
    result |= {"files": files, "comparisons": tests, "too_long": too_long, "perplexity": {}}
    return result.pop("scores") | result
