"""Read or remembered? Questions whose context has another answer than the true one, and what the answers follow."""

import re
from collections import Counter

from pipeline.texts import WORDS, fields_of, holds, words_of

OF = "trivia_qa"  # the task whose rows these are
TITLE = "Read or remembered?"
ABOUT = """The answer in the context of these questions was replaced by another one: of 100
answers, so many give the one that is now there (read), the true one all the
same (remembered), neither or both."""
ONE_LINE = True  # whether an answer ends at its line's end
SCORES = ("follows_context", "from_memory", "neither_or_both")  # as tables show them
MAIN_SCORES = ("follows_context", "from_memory")  # those tested; the page plots and sorts by the first
RUBRIC = ""  # no judge is asked
NUMBER = r"\S*\d.*|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|hundred|thousand|million"


def swap_answers(rows, template):
    """The rows of OF with another answer in their context, `swapped`, and {"swapped" or why not: how many rows}.

    `references` stay the true ones, `completion` does not. template: what the prompts were made by.
    """
    asked = [row for row in rows if row["task"] == OF]
    answers = [re.sub(r"^(a|an|the) +", "", row["completion"].strip(), flags=re.IGNORECASE) for row in asked]
    results = []
    for i, row in enumerate(asked):
        results.append(swap_row(row, template, answers[i], answers[i + 1 :] + answers[:i]))
    swapped = [result for result in results if isinstance(result, dict)]
    return swapped, dict(Counter("swapped" if isinstance(result, dict) else result for result in results))


def kind_of(answer):
    """Whether it is a year, is a number, begins with a small letter, and how many words it has, 3 for more."""
    year, number = (bool(re.fullmatch(form, answer.lower())) for form in (r"\d{3,4}s?", NUMBER))
    return year, number, answer[:1].islower(), min(3, len(answer.split()))


def swap_row(row, template, answer, others):
    """The row with the first of `others` that fits in the place of `answer`, or why there is none (a string)."""
    fields = fields_of(template, row["prompt"])
    context, question = fields.get("context", ""), fields.get("question", "")
    names = sorted(filter(None, map(words_of, row["references"])), key=len, reverse=True)  # the longest first
    if not holds(context, names):
        return "not there"
    if holds(question, names):
        return "also in the question"
    for other in others:
        words = words_of(other)
        if kind_of(other) != kind_of(answer) or not words or holds(other, names):
            continue
        if not any(holds(text, [words]) for text in (context, question, *names)):
            new_context = replace(context, names, other)
            prompt = template.format(context=new_context, question=question)
            changes = {"prompt": prompt, "completion": f" {other}", "swapped": other}
            found = holds(new_context, [words]) and not holds(new_context, names)  # beside letters it may not be
            return row | changes if found else "in another form"
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


def score(prediction, references, swapped):
    """{score: 0 or 100} of one answer: it has the swapped answer, a true one, neither or both."""
    read, remembered = holds(prediction, [swapped]), holds(prediction, references)
    return {
        "follows_context": 100.0 * (read and not remembered),
        "from_memory": 100.0 * (remembered and not read),
        "neither_or_both": 100.0 * (read == remembered),
    }
