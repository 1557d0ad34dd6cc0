"""trivia_qa: answer a question from passages of its pages."""

import math
import re
from collections import Counter
from itertools import islice
from types import SimpleNamespace

from pipeline.texts import (
    BadData,
    clean,
    comparison_key,
    holds,
    normalize_answer,
    normalized,
    one_line,
    text_of,
    texts_of,
)

LICENCE = "Apache 2.0; its pages: Wikipedia, CC BY-SA"
FILES = {  # the hub's test has no answers: its validation is our test, ours is taken out of train
    "train": ["{trivia_qa_config}/train-*.parquet"],
    "test": ["{trivia_qa_config}/validation-*.parquet"],
}
NEEDED = ("train", "test")  # of FILES
READ_FIRST = ("question_id", "question")  # columns of files too large to be read at once: the id, what makes the key
COLUMNS = ("question", "question_id", "answer.value", "answer.aliases.*", "entity_pages.wiki_context.*")  # of texts
ANY_FORM = False  # whether prompts may have words in common, or be short and differ in a sign
# A prompt ends without a blank and its completion begins with one, so that both tokenizer families split there.
PROMPT = "Answer the question from the context.\n\nContext:\n{context}\n\nQuestion: {question}\nAnswer:"
CLOSED_BOOK = "Answer the question.\n\nQuestion: {question}\nAnswer:"  # the prompt where there is no context
ONE_LINE = True  # whether an answer ends at its line's end
ANSWER = "an answer"  # what it writes, in the model card
EXAMPLE = {  # the card's
    "question": "What was the main cargo on the Quaren?",
    "context": "The Quaren is a river. For many years its main cargo was cheese.",
}
MAX_NEW_TOKENS = 24  # an answer is a few words
NORMALISE = normalize_answer  # of exact match and F1
SCORES = ("exact_match", "f1", "contains", "bleu_effective_order", "rouge1", "rouge2", "rougeL", "rougeLsum")
SCORES += ("perplexity",)
MAIN_SCORES = ("f1", "exact_match", "perplexity")  # those tested; the page plots and sorts by the first
JUDGE_SEES = "question"  # what of the prompt the judge gets
JUDGED_WITH = ("exact_match", "f1", "contains")  # scores shown with the judge's
RUBRIC = """You judge an answer to a question. You are given a JSON object with the question, references (the
accepted answers), and the candidate to be judged. Give it a score:
4: it names the same thing as a reference, in whatever words or spelling, and nothing else.
3: it names the same thing as a reference, with further words that do not contradict it.
2: it is less exact than the references, or names the right thing among wrong ones.
1: it is wrong, but of the right kind: another person, place, date or number.
0: it is wrong in kind, empty, or no answer.
"""

ASKED_WORDS = 300  # of a page given with --ask, those nearest to the question
PASSAGE_WORDS = 100  # a passage ends at the first sentence or line end after so many words
BM25_K1, BM25_B = 1.2, 0.75  # Robertson & Zaragoza 2009; among a question's own pages, after Clark & Gardner 2017
SENTENCE_END = re.compile(r"([.!?\n][ \n]+)")  # after a blank was put behind every \n: 4 times as fast as with a |
STOP_WORDS = (  # left out of the query: rare in a page or not, they say nothing about where the answer is
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in is it its "
    "may might must my no not of on or our s she should so t than that the their then there these they this those to "
    "was we were what when where which who whom whose why will with would you your"
)


def template(settings):
    return CLOSED_BOOK if settings.context == "none" else PROMPT


def fits(text, page, template):
    """Whether the text of --ask is for this task: a question is one line."""
    return "\n" not in text


def asked(text, page, template):
    """The prompt around a text of --ask; by another template where a page is given and the run had none, or not."""
    question = one_line(text)
    if bool(page) != ("{context}" in template):
        template = PROMPT if page else CLOSED_BOOK
    settings = SimpleNamespace(context="question", max_context_words=ASKED_WORDS)
    context = context_of({"context": page}, question, settings) if page else ""
    return template.format(question=question, context=context)


def columns(settings):
    """What is read of a large file to render a row."""
    names = [name.removesuffix(".*") for name in COLUMNS]
    return [name for name in names if settings.context != "none" or not name.startswith("entity_pages")]


def prepare(rows, settings):
    """The rows of a single file in the form of the hub's, but with one `context` in the place of pages."""
    for row in rows:
        needed = {"question"} if settings.context == "none" else {"question", "context"}
        texts = texts_of(row, needed | (row.keys() & {"id"}))
        if "answer" not in row and "answers" not in row:
            raise BadData(f"no column answer or answers among {', '.join(map(str, row))}")
        given = row["answers"] if "answers" in row else row["answer"]
        given = given["text"] if isinstance(given, dict) and "text" in given else given  # SQuAD's form
        answers = [text_of(answer, "an answer") for answer in (given if isinstance(given, list) else [given])]
        value = next(filter(one_line, answers), "")
        yield texts | {"answer": value and {"value": value, "aliases": answers}}


def key(row):
    return comparison_key(row["question"])


def render(row, split, settings):
    """The rendered row, or the reason (a string) why there is none."""
    question, answer = one_line(row["question"]), row["answer"] or {}
    value = one_line(answer.get("value"))
    aliases = [alias for alias in map(one_line, answer.get("aliases") or []) if alias and normalized(alias)]
    if not value or not aliases:
        return "no answer or no aliases"
    references, context = list(dict.fromkeys([value, *aliases])), ""
    if settings.context != "none":
        context = context_of(row, question or "", settings)
        if context is None:
            return "no pages"
    found = holds(context, references)
    if not found and settings.context != "none" and split != "test":
        return "answer not in context"
    prompt = template(settings).format(context=context, question=question)
    return {"prompt": prompt, "completion": f" {value}", "references": references, "answer_in_context": found}


def context_of(row, question, settings):
    """At most MAX_CONTEXT_WORDS words of the row's pages, or None where it has none.

    They are chosen by the question alone: a context that was found by its answer would be a leak in test.
    """
    given = [row["context"]] if "context" in row else (row["entity_pages"] or {}).get("wiki_context") or []
    pages = [page for page in map(clean, given) if page]
    if not pages:
        return None
    if "context" in row and len(pages[0].split()) <= settings.max_context_words:
        return pages[0]
    if settings.context == "first":
        return first_words(pages, settings.max_context_words)
    return choose_context(question, pages, settings.max_context_words)


def passages(pages):
    """Split pages into passages of about PASSAGE_WORDS words that end at a sentence or line end."""
    result = []
    for page in pages:
        result.append("")
        for part in SENTENCE_END.split(page.replace("\n", "\n ")):
            result[-1] += part
            if part.endswith((" ", "\n")) and result[-1].count(" ") >= PASSAGE_WORDS:
                result.append("")
    return [text for passage in result if (text := passage.replace("\n ", "\n").strip())]


def nearest_first(question, texts):
    """The indices of texts by their BM25 with the question, best first; a tie goes to the earlier one."""
    query = set(re.findall(r"\w+", question.lower())) - set(STOP_WORDS.split())
    wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, query)) or '(?!)'})\b")
    counts = [Counter(wanted.findall(text.lower())) for text in texts]
    mean = sum(map(len, texts)) / max(len(texts), 1)
    in_passages = Counter(word for count in counts for word in count)
    idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in in_passages.items()}
    scores = []
    for text, count in zip(texts, counts, strict=True):
        norm = BM25_K1 * (1 - BM25_B + BM25_B * len(text) / mean)
        scores.append(sum(idf[word] * tf * (BM25_K1 + 1) / (tf + norm) for word, tf in sorted(count.items())))
    return sorted(range(len(texts)), key=scores.__getitem__, reverse=True)


def choose_context(question, pages, max_words):
    """The passages nearest to the question, in document order, at most max_words words, whole sentences."""
    texts = passages(pages)
    chosen, left = {}, max_words
    for i in nearest_first(question, texts):
        words = len(texts[i].split())
        if words > left:
            cut = first_words([texts[i]], left)
            if whole := re.match(r"(?s).*([.!?]\s|\n)", cut + " "):
                chosen[i] = whole[0].strip()
            elif not chosen:  # better half a sentence than nothing
                chosen[i] = cut
            break
        chosen[i] = texts[i]
        left -= words
    return "\n".join(chosen[i] for i in sorted(chosen))


def first_words(pages, max_words):
    """The first words of the pages, line ends kept: what the official converter takes."""
    text = "\n".join(pages)
    ends = [word.end() for word in islice(re.finditer(r"\S+", text), max_words)]
    return text[: ends[-1]].strip() if ends else ""
