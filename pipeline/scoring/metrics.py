"""The scores of predictions: ROUGE, BLEU, exact match, F1, whether an alias is contained, length ratio.

All run from 0 to 100. evaluations.py imports this when it has something to score: evaluate takes its second.
"""

import re
import sys
import tempfile
import unicodedata
from collections import Counter
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
from datasets import Features, Sequence, Value
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize
from sacrebleu.metrics import BLEU

from pipeline.texts import holds, normalize_answer, words_of

# evaluate's evaluators would import transformers, and torch with it; it allows for their absence.
hidden = sys.modules.setdefault("transformers", None)
import evaluate  # noqa: E402

if hidden is None:
    del sys.modules["transformers"]

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
EFFECTIVE_ORDER = {"bleu": False, "bleu_effective_order": True}  # orders longer than the answers are ignored
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")  # nltk's punkt would be a download


class Scores(evaluate.Metric):
    """Every score of every example as a list, and its counts for BLEU."""

    def _info(self):
        features = Features({"predictions": Value("string"), "references": Sequence(Value("string"))})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references):
        return {
            **rouge(predictions, references),
            "exact_match": best(partial(exact_match_score, self.normalise), predictions, references),
            "f1": best(partial(f1_score, self.normalise), predictions, references),
            "contains": [100.0 * holds(*example) for example in zip(predictions, references, strict=True)],
            "length_ratio": length_ratio(predictions, references),
            "bleu_counts": bleu_counts(predictions, references),
        }


def means(task):
    """{score: its column in the task's table} of the scores that are means over examples."""
    names = [name for name in task.SCORES if name not in (*EFFECTIVE_ORDER, "perplexity")]
    return {name: column for column, name in enumerate(names)}


def table_of(task, references, predictions, swapped=None, losses=None):
    """(examples, columns): each score of `means`, BLEU's 10 counts, nll, tokens: sums make a corpus."""
    rows = len(predictions)
    if hasattr(task, "score"):
        examples = [task.score(*example) for example in zip(predictions, references, swapped, strict=True)]
        scores = {name: [example[name] for example in examples] for name in task.SCORES}
    else:
        # evaluate makes a cache folder even when nothing goes into it: not in the user's home, not in the cwd
        with tempfile.TemporaryDirectory() as cache_dir:
            metric = Scores(keep_in_memory=True, seed=0, cache_dir=cache_dir)
            metric.normalise = task.NORMALISE
            scores = metric.compute(predictions=predictions, references=references)
    columns = [scores[name] for name in means(task)]
    columns.append(scores.get("bleu_counts", np.zeros((rows, 10))))
    columns.append(losses or np.zeros((rows, 2)))
    return np.column_stack(columns)


def corpus_scores(task, sums, examples):
    """{score: (...)} of the sums (..., columns) of a table's rows; perplexity: exp(summed nll / summed tokens)."""
    columns, scores = means(task), {}
    counts, nll, tokens = sums[..., -12:-2], sums[..., -2], sums[..., -1]
    for name in task.SCORES:
        if name in columns:
            scores[name] = sums[..., columns[name]] / examples
        elif name in EFFECTIVE_ORDER:
            scores[name] = bleu_of(counts, EFFECTIVE_ORDER[name])
        elif np.all(tokens > 0):
            # 700: the largest that a float holds; variances of it, and their squares, fit a long double
            scores[name] = np.exp(np.minimum(nll / tokens, 700), dtype=np.longdouble)
    return scores


def exact_match_score(normalise, prediction, reference):
    """Whether both are equal once normalised (bool). Source: triviaqa_evaluation.py, see texts.normalized."""
    return normalise(prediction) == normalise(reference)


def f1_score(normalise, prediction, reference):
    """F1 (0 to 1) over the normalised words both share, with multiplicity. Source: as of exact_match_score."""
    predicted = normalise(prediction).split()
    expected = normalise(reference).split()
    if set(predicted).isdisjoint(expected):
        return 0.0
    same = sum((Counter(predicted) & Counter(expected)).values())
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def best(score, predictions, references):
    """100 x the score (0 to 1) of the best reference, a list; a blank prediction scores 0."""
    return [
        100.0 * max(score(prediction, ref) for ref in refs) if prediction.strip() else 0.0
        for prediction, refs in zip(predictions, references, strict=True)
    ]


def length_ratio(predictions, references):
    """100 x words of the prediction / words of the reference nearest to it in length, a list."""
    ratios = []
    for prediction, refs in zip(predictions, references, strict=True):
        words = len(prediction.split())
        nearest = min((len(ref.split()) for ref in refs), key=lambda length: (abs(length - words), length))
        ratios.append(100 * words / max(1, nearest))
    return ratios


def rouge(predictions, references):
    """rouge_score's F-measures, 0 to 100, of the best reference: {rouge: list}; stemmed, a sentence per line."""
    stemmer = SimpleNamespace(stem=cache(PorterStemmer().stem))
    tokens = cache(lambda text: tokenize.tokenize(text, stemmer))
    by_line = cache(lambda text: SENTENCE_END.sub("\n", text.strip()))  # rougeLsum takes a line for a sentence
    # quick: a word is stemmed once, and references without a shared word, which score 0, are left out
    scorer = rouge_scorer.RougeScorer(ROUGES, tokenizer=SimpleNamespace(tokenize=tokens))
    scores = {name: [] for name in ROUGES}
    for prediction, refs in zip(map(by_line, predictions), references, strict=True):
        words = set(tokens(prediction))
        near = [ref for ref in map(by_line, refs) if not words.isdisjoint(tokens(ref))]
        found = scorer.score_multi(near, prediction) if near else {}
        for name in ROUGES:
            scores[name].append(100 * found[name].fmeasure if found else 0.0)
    return scores


def rouge_note(references):
    """A sentence where rouge_score reads less than half of the words of references as they are, else ""."""

    def unread(reference):
        words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", reference).lower())
        return 2 * sum(map(str.isascii, words)) < max(1, len(words))

    missed = sum(all(map(unread, refs)) for refs in references)
    note = "ROUGE reads only a to z and 0 to 9: it misses or splits most words of the reference in"
    return f"{note} {missed:,} of {len(references):,} examples" if missed else ""


def blanks_note(references):
    """A sentence where most words of references have neither blanks nor punctuation between them, else ""."""

    def unsplit(reference):
        return len(words_of(reference).split()) > 2 * len(normalize_answer(reference).split())

    missed = sum(all(map(unsplit, refs)) for refs in references)
    note = "F1, BLEU and the length ratio take what is between two blanks for a word: they show little in"
    return f"{note} {missed:,} of {len(references):,} examples" if missed else ""


def bleu(references, **options):
    """sacrebleu's BLEU with these references, lists of any length."""
    width = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(width)]
    return BLEU(references=streams, **options)


def signatures(task, references):
    """{"bleu_signature": sacrebleu's signature} of the BLEU among a task's scores."""
    blanks = [[""] * length for length in {len(refs) for refs in references}]  # it tells how many, not which
    return {
        f"{name}_signature": str(bleu(blanks, effective_order=order).get_signature())
        for name, order in EFFECTIVE_ORDER.items()
        if name in task.SCORES
    }


def bleu_counts(predictions, references):
    """(examples, 10): words of the prediction and of the nearest reference, matched and all 1- to 4-grams."""
    # Private, but what sacrebleu's own paired test resamples; its public functions give sums over examples only.
    counts = bleu(references)._extract_corpus_statistics(predictions, None)
    if not len(counts) == len(predictions) == len(references):  # sacrebleu would cut silently
        raise ValueError("predictions and references differ in length")
    return np.array(counts, dtype=np.float64)


def bleu_of(counts, effective_order):
    """sacrebleu's compute_bleu, smoothed by `exp`, of counts summed over examples: (..., 10) to (...), 0 to 100.

    effective_order: ignore n-gram orders longer than the answers; without it one right word scores 0.
    """
    length, expected = counts[..., 0], counts[..., 1]
    matched, total = counts[..., 2:6], counts[..., 6:]
    exists = np.logical_and.accumulate(total > 0, axis=-1)
    halvings = np.cumsum((matched == 0) & exists, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(matched > 0, matched / total, 1 / (2.0**halvings * total))
        logs = np.where(exists, np.log(100 * precision), 0.0).sum(-1)
        order = exists.sum(-1) if effective_order else np.where(exists.all(-1), 4, 0)  # a missing order makes it 0
        penalty = np.where(length < expected, np.exp(1 - expected / length), 1.0)
        return np.where((matched.sum(-1) > 0) & (order > 0), penalty * np.exp(logs / order), 0.0)
