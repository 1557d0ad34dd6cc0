"""Read or remembered? Questions whose context holds another answer than the true one, and what the answers follow."""

import re
from collections import Counter

import numpy as np

import significance
from common import fail, normalize_answer, say

NUMBERS = r"\S*\d.*|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|hundred|thousand|million"
GAP = r"[\W_]+(?:(?:a|an|the)[\W_]+)*"  # between two words of an answer, by the official rules
SHARES = ("follows_context", "from_memory", "neither_or_both")
normalized = normalize_answer.__wrapped__  # past its cache, which would keep every context in memory


def swap_answers(rows):
    """The trivia_qa rows that can be swapped, as a Dataset, and {"swapped" or why not: rows}; exits 2 without any.

    Prompt and completion have the answer `swapped`; `references` stay the true ones.
    """
    from datasets import Dataset

    asked = [row for row in rows if row["task"] == "trivia_qa"]
    answers = list(dict.fromkeys(map(answer_of, asked)))
    results = [swap_row(row, answers) for row in asked]
    swapped = [row for row in results if isinstance(row, dict)]
    counts = dict(Counter("swapped" if isinstance(row, dict) else row for row in results))
    say(f"trivia_qa, answers in the context: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    if not swapped:
        fail("no answer can be swapped: run build_dataset.py with trivia_qa, a context and more test rows")
    swapped = Dataset.from_list(swapped)
    swapped._fingerprint = rows._fingerprint  # the rows that they were made from
    return swapped, counts


def answer_of(row):
    """The gold answer without its article: the context has one in front."""
    return re.sub(r"^(a|an|the) +", "", row["completion"].strip(), flags=re.IGNORECASE)


def kind_of(answer):
    """What may take its place: a year, a number, or one, two or more words that begin with a small letter or not."""
    if re.fullmatch(r"\d{3,4}s?", answer):
        return "year"
    if re.fullmatch(NUMBERS, answer.lower(), re.DOTALL):
        return "number"
    return answer[:1].islower(), min(3, len(answer.split()))


def stands(words, text):
    return f" {words} " in f" {text} "  # both normalised


def swap_row(row, answers):
    """The row with the first answer after its own in `answers` that fits, or why there is none (a string)."""
    start, mark, rest = row["prompt"].partition("Context:\n")
    context, end, question = rest.rpartition("\n\nQuestion: ")
    names = sorted(filter(None, map(normalized, row["references"])), key=len, reverse=True)
    if not any(stands(name, normalized(context)) for name in names):
        return "not there"
    if any(stands(name, normalized(question)) for name in names):
        return "also in the question"
    text, own = normalized(rest), answer_of(row)

    def fits(other):
        words = normalized(other)
        alias = any(stands(words, name) or stands(name, words) for name in names)
        return kind_of(other) == kind_of(own) and words and not alias and not stands(words, text)

    place = answers.index(own)
    other = next(filter(fits, answers[place + 1 :] + answers[:place]), None)
    if not other:
        return "without another of their kind"
    forms = "|".join(GAP.join(map(re.escape, name.split())) for name in names)  # the longest first
    whole = rf"(?<![^\W_])(?:{forms})(?![^\W_]|[\u0300-\u036f])"  # no letter, digit or accent beside it
    context = re.sub(whole, lambda _: other, context, flags=re.IGNORECASE)
    if any(stands(name, normalized(context)) for name in names):
        return "in another form"
    return row | {"prompt": start + mark + context + end + question, "completion": f" {other}", "swapped": other}


def score(rows, args):
    """{system: {share: %}} of the answers by what they hold: the swapped one, a true one, neither or both; tested."""
    from metrics import best, contains_score

    def shares(sums, examples):
        return dict(zip(SHARES, np.moveaxis(sums, -1, 0) / examples, strict=True))

    tables = {}
    for name, system in rows.systems.items():
        new = np.array(best(contains_score, system.predictions, [[answer] for answer in rows.swapped]))
        true = np.array(best(contains_score, system.predictions, rows.references))
        tables[name] = np.column_stack([new * (true == 0), true * (new == 0), 100 * (new == true)])
    whole, columns = significance.measure(shares, tables, args), {share: i for i, share in enumerate(SHARES)}
    return whole["scores"] | {
        "examples": whole["examples"],
        "files": {name: system.file for name, system in rows.systems.items()},
        "made_from": {name: system.made_from for name, system in rows.systems.items()},
        "too_long": {},
        "perplexity": {},
        "intervals": whole["intervals"],
        "comparisons": significance.compare(shares, tables, columns, whole["differences"], args),
    }
