"""Texts of any script: the official normalisation, words, whether a text contains an answer."""

import functools
import re
import string
import unicodedata

WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # begin of characters' names
PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


@functools.cache  # every metric asks for the same texts
def normalize_answer(text):
    """The official TriviaQA normalisation: `_` and punctuation become blanks, lower case, no a/an/the, single blanks.

    Source: github.com/mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py. Punctuation is ASCII's and ‘ ’ ´ `:
    “ ” and dashes stay. SQuAD's rules differ: they delete punctuation ("Spider-Man" is "spider man" here).
    """
    text = text.replace("_", " ").lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


normalized = normalize_answer.__wrapped__  # past its cache, which would keep every context in memory


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


def words_of(text):
    """The words of a text in any script, a blank between them: no punctuation, no case, no a/an/the."""
    words = unicodedata.normalize("NFC", text).casefold().translate(WORDS).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def holds(text, answers):
    """Whether one of the answers stands in a text as whole words in a row; one without a word stands nowhere."""
    text = f" {words_of(text)} "
    return any(f" {words} " in text for words in map(words_of, answers) if words)


def fields_of(template, prompt):
    """{field: text} of a prompt that was made by template.format(...); {} where it was not."""
    parts = [
        re.escape(text) + (f"(?P<{field}>.*)" if field else "")
        for text, field, _, _ in string.Formatter().parse(template)
    ]
    found = re.search("".join(parts) + r"\s*\Z", prompt, re.DOTALL)
    return found.groupdict() if found else {}
