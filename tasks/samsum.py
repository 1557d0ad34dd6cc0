"""samsum: summarise a dialogue of a messenger."""

from pipeline.texts import clean, comparison_key, normalize_answer, one_line, texts_of

LICENCE = "CC BY-NC-ND 4.0"
FILES = {"train": ["train.csv"], "validation": ["validation.csv"], "test": ["test.csv"]}  # of a folder, and on the hub
NEEDED = ("train", "validation", "test")  # of FILES
READ_FIRST = ()  # columns of files too large to be read at once: the id, and what makes the key
ANY_FORM = False  # whether prompts may have words in common, or be short and differ in a sign
# A prompt ends without a blank and its completion begins with one, so that both tokenizer families split there.
PROMPT = "Summarize the dialogue.\n\nDialogue:\n{dialogue}\n\nSummary:"
ONE_LINE = False  # whether an answer ends at its line's end
ANSWER = "a summary"  # what it writes, in the model card
EXAMPLE = {"dialogue": "Nora: Are you coming on Friday?\nPaul: Yes, by the late train."}  # the card's
MAX_NEW_TOKENS = 96  # the longest gold summaries have some 80 tokens
NORMALISE = normalize_answer  # of exact match and F1
# as tables show them
SCORES = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "exact_match", "length_ratio", "perplexity")
MAIN_SCORES = ("rouge1", "rouge2", "rougeLsum", "perplexity")  # those tested; the page plots and sorts by the first
JUDGE_SEES = "dialogue"  # what of the prompt the judge gets
JUDGED_WITH = ("exact_match", "rougeLsum")  # scores shown with the judge's
RUBRIC = """You judge a summary of a dialogue. You are given a JSON object with the dialogue, reference summaries
written by people, and the candidate to be judged. Give it a score:
4: it says everything important that a reference says, and nothing that the dialogue does not support.
3: it gives the main point and most of what is important, and nothing false.
2: it gives the main point, but misses something important or gets one detail wrong.
1: it is about the dialogue, but misses the main point or gets several details wrong.
0: it is false, empty, or no summary of this dialogue.
"""


def template(settings):
    return PROMPT


def fits(text, page, template):
    """Whether the text of --ask is for this task: a dialogue has several lines."""
    return not page and "\n" in text


def asked(text, page, template):
    """The prompt around a text of --ask."""
    return template.format(dialogue=clean(text))


def prepare(rows, settings):
    """The rows of a file as dicts of texts: dialogue, summary, and id where there is one."""
    for row in rows:
        yield texts_of(row, {"dialogue", "summary"} | (row.keys() & {"id"}))


def key(row):
    return comparison_key(row["dialogue"])


def render(row, split, settings):
    """The rendered row, or the reason (a string) why there is none."""
    summary = one_line(row["summary"])
    if not summary:
        return "empty summary"
    prompt = PROMPT.format(dialogue=clean(row["dialogue"]))
    return {"prompt": prompt, "completion": f" {summary}", "references": [summary], "answer_in_context": True}
