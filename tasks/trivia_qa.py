"""trivia_qa: answer a question from passages of its pages."""

LICENCE = "Apache 2.0; its pages: Wikipedia, CC BY-SA"
# A prompt ends without a blank and its completion begins with one, so that both tokenizer families split there.
PROMPT = "Answer the question from the context.\n\nContext:\n{context}\n\nQuestion: {question}\nAnswer:"
CLOSED_BOOK = "Answer the question.\n\nQuestion: {question}\nAnswer:"  # the prompt where there is no context
ONE_LINE = True  # whether an answer ends at its line's end
MAX_NEW_TOKENS = 24  # an answer is a few words
SCORES = ("exact_match", "f1", "contains", "bleu_effective_order", "rouge1", "rouge2", "rougeL", "rougeLsum")
SCORES += ("perplexity",)
MAIN_SCORES = ("f1", "exact_match", "perplexity")  # the page plots and sorts by the first
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
