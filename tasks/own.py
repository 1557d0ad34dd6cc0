"""own: your rows, from a file, a folder or the hub."""

import unicodedata

from pipeline.texts import BadData, clean_lines, normalize_or_keep, template_parts, text_of, texts_of

LICENCE = "your own"
NAMES = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test", "eval"]}
FILES = {  # of a folder, and on the hub
    split: [f"{folder}{name}{end}" for name in names for folder in ("", "data/") for end in (".*", "-*-of-*")]
    for split, names in NAMES.items()
}
NEEDED = ("train",)  # of FILES; the others are taken out of it
READ_FIRST = ()  # columns of files too large to be read at once: the id, and what makes the key
ANY_FORM = True  # whether prompts may have words in common, or be short and differ in a sign
PROMPT = "{prompt}"  # OWN_PROMPT of build_dataset.py takes its place
ONE_LINE = False  # whether an answer ends at its line's end
ANSWER = "a completion"  # what it writes, in the model card
EXAMPLE = {}  # the card's: its fields are not known here
MAX_NEW_TOKENS = 256  # enough for a paragraph
NORMALISE = normalize_or_keep  # of exact match and F1: A, B, + and - are answers
SCORES = ("rougeL", "f1", "exact_match", "bleu", "rouge1", "rouge2", "rougeLsum", "length_ratio", "perplexity")
MAIN_SCORES = ("rougeL", "f1", "perplexity")  # those tested; the page plots and sorts by the first
JUDGE_SEES = ""  # the whole prompt
JUDGED_WITH = ("exact_match", "f1", "rougeL")  # scores shown with the judge's
RUBRIC = """You judge an answer to a prompt. You are given a JSON object with the prompt, references (good answers),
and the candidate to be judged. Give it a score:
4: it does what the prompt asks for as well as a reference does, and says nothing false.
3: it does most of it, and says nothing false.
2: it does the main part, but misses something important or gets one detail wrong.
1: it has to do with the prompt, but misses the main part or gets several details wrong.
0: it is false, empty, or no answer to this prompt.
"""


def template(settings):
    return settings.own_prompt


def fits(text, page, template):
    """Whether the text of --ask may be for this task."""
    return not page or "{context}" in template


def asked(text, page, template):
    """The prompt around a text of --ask and a page for its `context`; of several more columns it is the whole text."""
    parts, text = template_parts(template), clean_lines(text)
    fields = {field for _, field in parts} - {None}
    values = {"context": clean_lines(page)} if page else {}
    if len(fields - values.keys()) > 1:
        return text.rstrip()
    return "".join(before if field is None else before + values.get(field, text) for before, field in parts).rstrip()


def prepare(rows, settings):
    """The rows of a file as dicts of two texts, prompt (by the template) and completion."""
    try:
        parts = template_parts(settings.own_prompt)
    except ValueError as error:
        raise BadData(f"--own-prompt is no template ({error}): a brace that is text is written twice") from error
    fields = {field for _, field in parts if field is not None}
    if not fields or "" in fields:
        raise BadData("--own-prompt names no column: write one in braces, such as {question}")
    first = None
    for row in rows:
        layout, columns = complete(row, fields | {settings.own_completion})
        first = first or layout
        if layout != first:
            raise BadData(f"it has {layout}, the rows before it have {first}: give rows of one form")
        texts = texts_of(columns, fields | {settings.own_completion})
        texts = {name: clean_lines(text) for name, text in texts.items()}
        prompt = "".join(text + texts.get(field, "") for text, field in parts)
        empty = not any(texts[field].strip() for field in fields)
        yield {"prompt": "" if empty else prompt.rstrip(), "completion": texts[settings.own_completion].strip()}


def complete(row, needed):
    """(what the row has, the row with a prompt and a completion where that says what these are)."""
    turns = row.get("messages")
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        turns = row["prompt"] + row["completion"]
    elif {"instruction", "output"} <= row.keys():
        texts = texts_of({"input": ""} | row, {"instruction", "input"})
        prompt = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text.strip())
        return "instruction and output", {"prompt": prompt, "completion": row["output"], "input": ""} | row
    elif needed <= row.keys():
        return "columns", row
    elif "messages" not in row:
        found = f"no column {', '.join(sorted(needed - row.keys()))} among {', '.join(row)}"
        known = "correct --own-prompt or --own-completion"
        if needed == {"prompt", "completion"}:
            known = "prompt and completion, instruction and output, or messages are needed"
            known += ", or yours named by --own-prompt and --own-completion"
        raise BadData(f"{found}: {known}")
    prompt, completion = exchange(turns)
    return "messages", row | {"prompt": prompt, "completion": completion}


def exchange(messages):
    """(prompt, completion) of what a user and an assistant say; a system message in front begins the prompt."""
    messages = messages if isinstance(messages, list) else [messages]
    roles = [message.get("role") if isinstance(message, dict) else type(message).__name__ for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        found = ", ".join(map(str, roles[:6])) or "nobody"
        raise BadData(f"it has messages of {found}: one of user and one of assistant are needed, system may go before")
    *before, completion = [text_of(message.get("content"), "content") for message in messages]
    return "\n\n".join(text for text in before if text.strip()), completion


def key(row):
    """The prompt but for its case and blanks: signs count, 3 + 4 is not 3 - 4."""
    return " ".join(unicodedata.normalize("NFKC", row["prompt"]).casefold().split())


def render(row, split, settings):
    """The rendered row, or the reason (a string) why there is none."""
    prompt, completion = row["prompt"], row["completion"]
    if not completion:
        return "empty completion"
    return {"prompt": prompt, "completion": f" {completion}", "references": [completion], "answer_in_context": True}
