"""own: your rows, from a file, a folder or the hub."""

LICENCE = "your own"
PROMPT = "{prompt}"  # OWN_PROMPT of build_dataset.py goes before it
ONE_LINE = False  # whether an answer ends at its line's end
MAX_NEW_TOKENS = 256  # enough for a paragraph
SCORES = ("rougeL", "f1", "exact_match", "bleu", "rouge1", "rouge2", "rougeLsum", "length_ratio", "perplexity")
MAIN_SCORES = ("rougeL", "f1", "perplexity")  # the page plots and sorts by the first
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
