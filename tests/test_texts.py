"""Texts of any script: the official normalisation, and whether a text contains an answer."""

import unicodedata

import pytest

from pipeline.texts import WITHOUT_BLANKS, holds, normalize_answer, words_of

OFFICIAL = {  # worked out by hand from the official script's five steps
    "The  Spider-Man": "spider man",
    "a–b": "–b",
    "“The Office”": "“ office”",
    "it’s an_owl": "it s owl",
    "A.B.C.": "b c",
    "Åre, the `Alps´!": "åre alps",
}


@pytest.mark.parametrize("text", OFFICIAL)
def test_answers_are_normalised_by_the_official_rules(text):
    assert normalize_answer(text) == OFFICIAL[text]


HELD = {  # a text and an answer that stands in it
    "between dashes": ("Jochi (1185–1226), nine", "1185"),
    "before a dash": ("in 1986—when", "1986"),
    "in quotation marks": ("„Paris“, «Paris», “Paris”", "Paris"),
    "before an ellipsis": ("Paris…", "Paris"),
    "before a footnote": ("Paris[3]", "Paris"),
    "an arrow and a degree": ("→20°", "20"),
    "an answer in quotation marks": ("She said yes.", "“Yes”"),
    "an answer with a dash": ("AC/DC, the band", "AC–DC"),
    "marks of money": ("It costs $5 or 5€.", "£5"),
    "an apostrophe": ("O’Neill’s", "O'Neill"),
    "points": ("in the U.S.", "U. S."),
    "an underscore": ("New_York", "New York"),
    "an accent in two characters": ("a cafe\u0301", "café"),
    "an accent in one character": ("a café", "cafe\u0301"),
    "full-width digits": ("は１９８６年に", "1986"),
    "capitals of sharp s": ("STRASSE", "Straße"),
    "a soft hyphen": ("Pa\u00adris", "Paris"),
    "Hindi": ("यह पूर्व प्रधान मंत्री थे।", "पूर्व प्रधान"),
    "Hindi with a joiner": ("क्\u200dष", "क्ष"),
    "Arabic punctuation": ("باريس، لندن", "باريس"),
    "Chinese in a sentence": ("小明今天去了北京。", "北京"),
    "Japanese beside Latin": ("東京はNHKの", "NHK"),
    "Japanese of two characters": ("カ\u3099ラス", "ガラス"),
    "Thai in a sentence": ("ฉันไปกรุงเทพวันนี้", "กรุงเทพ"),
}
NOT_HELD = {  # a text and an answer that does not stand in it
    "inside a word": ("The party", "art"),
    "inside a number": ("119860", "1986"),
    "before a mark": ("कि", "क"),
    "another letter": ("cafe", "café"),
    "a power": ("10²", "102"),
    "a fraction": ("2½", "21"),
    "half of a Korean word": ("서울대학교", "서울"),
    "no word": ("— … !", "—"),
    "an article": ("the a", "the"),
    "nothing": ("", ""),
    "an emoji": ("a ☀️ day", "❤️"),
}


@pytest.mark.parametrize(("text", "answer"), HELD.values(), ids=HELD.keys())
def test_an_answer_in_any_script_is_found_between_whatever_is_no_letter_digit_or_mark(text, answer):
    assert holds(text, ["nothing of it", answer]) and holds(text, [words_of(answer)])


@pytest.mark.parametrize(("text", "answer"), NOT_HELD.values(), ids=NOT_HELD.keys())
def test_an_answer_inside_a_word_or_without_a_word_is_found_nowhere(text, answer):
    assert not holds(text, [answer])


def test_of_all_characters_those_that_end_a_word_are_no_letters_digits_or_marks():
    for char in map(chr, range(0x20, 0x3000)):
        kind, word = unicodedata.category(char), unicodedata.name(char, "").startswith(WITHOUT_BLANKS)
        invisible = kind in ("Cf", "Me") and char != "\u200b"  # soft hyphens and joiners, the frames of keycaps
        if not word and unicodedata.is_normalized("NFC", char):
            inside = kind[0] in "LNM" or invisible
            assert holds(f"is{char}1986{char}b", ["1986"]) != inside, hex(ord(char))
