"""The scores of predictions: ROUGE, BLEU, exact match, F1, whether an alias is contained, length ratio.

All run from 0 to 100. evaluations.py imports this when it has something to score: evaluate takes its second.
"""

import re
import sys
import tempfile
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np
from datasets import Features, Sequence, Value
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize
from sacrebleu.metrics import BLEU

from pipeline.texts import normalize_answer, words_of

# evaluate's evaluators would import transformers, and torch with it; it allows for their absence.
hidden = sys.modules.setdefault("transformers", None)
import evaluate  # noqa: E402

if hidden is None:
    del sys.modules["transformers"]

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SCORES = {  # what each task reports, in the order of the table
    "samsum": (*ROUGES, "bleu", "exact_match", "length_ratio"),
    "trivia_qa": ("exact_match", "f1", "contains", "bleu_effective_order", *ROUGES),
}
BLEU_NAME = {"samsum": "bleu", "trivia_qa": "bleu_effective_order"}  # the one score that is no mean over examples
MEANS = {task: [name for name in names if name != BLEU_NAME[task]] for task, names in SCORES.items()}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")  # nltk's punkt would be a download
words_of = cache(words_of)  # a prediction is compared with every alias


class Scores(evaluate.Metric):
    """Every score of every example as a list, and BLEU of all: `bleu`, its `bleu_signature`, its `bleu_counts`.

    config_name: the task; trivia_qa's BLEU is of effective order, since most answers have fewer than four words.
    """

    def _info(self):
        features = Features({"predictions": Value("string"), "references": Sequence(Value("string"))})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references):
        score, counts, signature = bleu(predictions, references, effective_order=self.config_name == "trivia_qa")
        return {
            **rouge(predictions, references),
            "exact_match": best(exact_match_score, predictions, references),
            "f1": best(f1_score, predictions, references),
            "contains": best(contains_score, predictions, references),
            "length_ratio": length_ratio(predictions, references),
            "bleu": score,
            "bleu_counts": counts,
            "bleu_signature": signature,
        }


def score(task, references, predictions):
    """{metric: a list, a score per example}, with BLEU, its counts and its signature, by `Scores`."""
    # evaluate makes a cache folder even when nothing goes into it: not in the user's home, not in the cwd
    with tempfile.TemporaryDirectory() as cache_dir:
        metric = Scores(config_name=task, keep_in_memory=True, seed=0, cache_dir=cache_dir)
        return metric.compute(predictions=predictions, references=references)


def table_of(task, scores, losses):
    """(examples, columns): a score per metric of MEANS, BLEU's 10 counts, nll, tokens: sums make a corpus."""
    losses = losses or np.zeros((len(scores["bleu_counts"]), 2))
    return np.column_stack([*(scores[name] for name in MEANS[task]), scores["bleu_counts"], losses])


def corpus_scores(task, sums, examples):
    """{metric: (...)} of the sums (..., columns) of a table's rows; perplexity: exp(summed nll / summed tokens)."""
    names = MEANS[task]
    found = {name: sums[..., i] / examples for i, name in enumerate(names)}
    counts, nll, tokens = sums[..., len(names) : -2], sums[..., -2], sums[..., -1]
    found[BLEU_NAME[task]] = bleu_of(counts, effective_order=task == "trivia_qa")
    scores = {name: found[name] for name in SCORES[task]}
    if np.all(tokens > 0):
        scores["perplexity"] = np.exp(np.minimum(nll / tokens, 700))  # 700: the largest that a float holds
    return scores


def exact_match_score(prediction, reference):
    """Whether both are equal once normalised (bool). Source: triviaqa_evaluation.py, see normalize_answer."""
    return normalize_answer(prediction) == normalize_answer(reference)


def f1_score(prediction, reference):
    """F1 (0 to 1) over the normalised words both share, with multiplicity. Source: as of exact_match_score."""
    predicted = normalize_answer(prediction).split()
    expected = normalize_answer(reference).split()
    if set(predicted).isdisjoint(expected):
        return 0.0
    same = sum((Counter(predicted) & Counter(expected)).values())
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def contains_score(prediction, reference):
    """Whether the words of the reference stand in the prediction, whole and in a row (bool), as in holds."""
    words = words_of(reference)
    return bool(words) and f" {words} " in f" {words_of(prediction)} "


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
    """A sentence where rouge_score reads less than half of the letters and digits of references, else ""."""

    def unread(reference):
        return 2 * len(re.findall("[a-z0-9]", reference.lower())) < max(1, len(re.findall(r"[^\W_]", reference)))

    count = f"{sum(all(map(unread, refs)) for refs in references):,} of {len(references):,} examples"
    note = f"ROUGE reads only a to z and 0 to 9: it misses most of the reference in {count}"
    return "" if count.startswith("0 ") else note


def bleu(predictions, references, effective_order):
    """Corpus BLEU (0 to 100), its counts (examples, 10), and sacrebleu's signature.

    effective_order: ignore n-gram orders longer than the answers; without it one right word scores 0.
    counts: words of the prediction and of the nearest reference, matched and all 1- to 4-grams.
    """
    width = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(width)]
    metric = BLEU(effective_order=effective_order, references=streams)
    # Private, but what sacrebleu's own paired test resamples; its public functions give sums over examples only.
    counts = metric._extract_corpus_statistics(predictions, None)
    if not len(counts) == len(predictions) == len(references):  # sacrebleu would cut silently
        raise ValueError("predictions and references differ in length")
    score = metric.corpus_score(predictions, None).score
    return score, np.array(counts, dtype=np.float64), str(metric.get_signature())


def bleu_of(counts, effective_order):
    """sacrebleu's compute_bleu, smoothed by `exp`, of counts summed over examples: (..., 10) to (...), 0 to 100."""
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
