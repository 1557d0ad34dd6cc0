"""Texts of any script: cleaning, the official normalisation, words, near texts, whether a text has an answer."""

import functools
import re
import string
import unicodedata
from collections import Counter, defaultdict

WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # begin of characters' names
PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
# Control characters, zero-width ones (not the joiners of emoji), halves of characters
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
NEAR = 0.8  # share of the word 5-grams that two texts have in common from which they are near duplicates
LONG = 10  # 5-grams of a text (14 words) from which it is one that another may contain


class BadData(Exception):
    """A source that cannot be used; its text says what was found and what is needed."""


def clean(text):
    """Text without control characters, zero-width ones (not the joiners of emoji) and stray blanks; None if empty."""
    text = "\n".join((text or "").splitlines())
    text = INVISIBLE.sub("", text.replace("\t", " ").replace("\xa0", " "))
    text = re.sub(" *\n *", "\n", re.sub("  +", " ", text))
    return re.sub("\n\n\n+", "\n\n", text).strip() or None


def clean_lines(text):
    """Text without control and zero-width characters; blanks go at the ends of lines alone: it may be code."""
    lines = [INVISIBLE.sub("", line).rstrip() for line in text.splitlines()]
    return "\n".join(lines).strip("\n")


def one_line(text):
    return " ".join((clean(text) or "").split()) or None


def text_of(value, name):
    """The text of a text or a number, "" of None. Raises BadData for anything else; name: whose value it is."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise BadData(f"{name} is a {type(value).__name__}: a text or a number is needed")
    return "" if value is None or value != value else str(value)  # NaN: none, as pandas has it


def texts_of(row, names):
    """{name: text} of these columns (a set) of a row. Raises BadData where one is missing or no text."""
    if missing := names - row.keys():
        found = f"no column {', '.join(sorted(missing))} among {', '.join(map(str, row))}"
        raise BadData(f"{found}: rename yours, or give the file with --own and --own-prompt")
    return {name: text_of(row[name], name) for name in sorted(names)}


def normalize_or_keep(text):
    """`normalized`, or the lower-case text where that leaves nothing: "A" is an answer, and so is "+"."""
    return normalize_answer(text) or text.strip().lower()


def normalized(text):  # without a cache, which would keep every context in memory
    """The official TriviaQA normalisation: `_` and punctuation become blanks, lower case, no a/an/the, single blanks.

    Source: github.com/mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py. Punctuation is ASCII's and ‘ ’ ´ `:
    “ ” and dashes stay. SQuAD's rules differ: they delete punctuation ("Spider-Man" is "spider man" here).
    """
    text = text.replace("_", " ").lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


normalize_answer = functools.cache(normalized)  # every metric asks for the same texts


class WordTable(dict):
    """For str.translate: what is no letter, digit or mark ends a word; full-width forms become the plain ones."""

    def __missing__(self, code):
        char = unicodedata.normalize("NFKC", chr(code)) if 0xFF00 < code < 0xFFA0 else chr(code)
        kind, name = unicodedata.category(char), unicodedata.name(char, "")
        if kind == "Me" or (kind == "Cf" and name != "ZERO WIDTH SPACE") or name.startswith("VARIATION SELECTOR"):
            self[code] = ""  # invisible inside a word
        elif kind[0] not in "LNM":
            self[code] = " "
        else:  # where a script has no blanks between words, every character is a word
            self[code] = f" {char} " if kind[0] != "N" and name.startswith(WITHOUT_BLANKS) else char
        return self[code]


WORDS = WordTable()


def comparison_key(text):
    """What two texts must share to be the same; "" where there is no text."""
    return normalized(unicodedata.normalize("NFKC", clean(text) or ""))


def word_5_grams(key):
    words = key.translate(WORDS).split() or [key]  # also where a script has no blanks between them, or of emoji
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def form_of(keys):
    """The 5-grams that many of the texts have: a form, and not what they say.

    Many are more than 5 and than one in 20, or of many texts more than 10 and than one in 100: fewer may be variants.
    """
    keys = set(keys)
    many = max(5, min(len(keys) / 20, max(10, len(keys) / 100)))
    texts = Counter(gram for key in keys for gram in word_5_grams(key))
    return {gram for gram, count in texts.items() if count > many}


class NearTexts:
    """Texts by the word 5-grams they have: an inverted index, so that every similarity found is exact.

    form: 5-grams that count for nothing; with it, even empty, texts below LONG are near only where they are the same.
    """

    def __init__(self, keys, form=None):
        self.form, self.least = form or set(), 1 if form is None else LONG
        self.sizes = {}  # of a text: how many different 5-grams it has
        self.texts_with = defaultdict(list)
        for key in filter(None, dict.fromkeys(keys)):
            grams = word_5_grams(key) - self.form
            self.sizes[key] = len(grams)
            for gram in grams:
                self.texts_with[gram].append(key)

    def near(self, key):
        """The texts that share NEAR of the shorter one's 5-grams with this one, itself among them."""
        grams, near = word_5_grams(key) - self.form, []
        shared = Counter(other for gram in grams for other in self.texts_with.get(gram, ()))
        for other, count in shared.items():
            shorter, longer = sorted((len(grams), self.sizes[other]))
            # a text below LONG may be in others by chance: of both
            whole = shorter if shorter >= LONG else shorter + longer - count
            if shorter >= self.least and count / whole >= NEAR:
                near.append(other)
        return near


def words_of(text):
    """The words of a text in any script, a blank between them: no punctuation, no case, no a/an/the."""
    words = unicodedata.normalize("NFC", text).casefold().translate(WORDS).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def holds(text, answers):
    """Whether one of the answers is in a text as whole words in a row; one without a word is in none."""
    text = f" {words_of(text)} "
    return any(f" {words} " in text for words in map(words_of, answers) if words)


def template_parts(template):
    """[(text, the field behind it or None)] of a template such as "Q: {question}"; ValueError where it is none."""
    parts = []
    for text, field, form, conversion in string.Formatter().parse(template):
        ends = (conversion and f"!{conversion}", form and f":{form}")  # a column may be called so
        parts.append((text, field and field + "".join(filter(None, ends))))
    return parts


def fields_of(template, prompt):
    """{field: text} of a prompt that was made by a template; {} where it was not."""
    pattern, fields = "", []
    for text, field in template_parts(template):
        pattern += re.escape(text)
        if field in fields:
            pattern += f"(?:\\{fields.index(field) + 1})"
        elif field is not None:
            fields.append(field)
            pattern += "(.*)"
    found = re.search(pattern + r"\s*\Z", prompt, re.DOTALL)
    return dict(zip(fields, found.groups(), strict=True)) if found else {}
