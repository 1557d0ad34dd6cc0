"""How sure scores are: bootstrap intervals, one paired test for every score, and Holm's adjustment.

Every score is a function of sums over examples, so that any resample of the examples is one row of a matrix product:
`table` is (examples, columns), `scores_of_sums` turns (sums, examples) into {metric: score}, for one row of sums or
for many.
"""

import numpy as np

LOWER_IS_BETTER = ("perplexity", "from_memory")
NO_TEST = ("length_ratio", "neither_or_both")  # neither high nor low is good
ENDS = (2.5, 97.5)  # percentiles, of every 95 % interval
LEVEL = 0.05  # a test is significant below it, after Holm
CELLS = 500_000  # numbers of a chunk of resamples: 4 MB stay in a core's cache


def chunks(resamples, examples):
    """Sizes of chunks of resamples of CELLS numbers at most."""
    size = max(1, CELLS // examples)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def resampled_sums(table, resamples, seed):
    """(resamples, columns): sums of the rows of `table`, drawn with replacement as often as there are rows."""
    rng, sums = np.random.default_rng(seed), []
    for size in chunks(resamples, len(table)):
        drawn = rng.integers(len(table), size=(size, len(table)))
        times = np.array([np.bincount(row, minlength=len(table)) for row in drawn], dtype=np.float64)
        sums.append(times @ table)
    return np.concatenate(sums)


def interval(samples):
    """The 95 % percentile interval of resampled values."""
    return [round(float(value), 6) for value in np.percentile(samples, ENDS)]


def measure(scores_of_sums, tables, args):
    """Every score of every system on these rows, with intervals, and the differences to the first system.

    scores_of_sums: (sums, examples) to {metric: score}; tables: {system: (examples, columns)}. All systems are
    resampled together, row by row. Perplexities over other tokens (last column) have no difference.
    """
    first = next(iter(tables))
    examples = len(tables[first])
    sums = resampled_sums(np.hstack(list(tables.values())), args.resamples, args.seed)
    parts = dict(zip(tables, np.split(sums, len(tables), axis=1), strict=True))
    samples = {name: scores_of_sums(part, examples) for name, part in parts.items()}
    result = {"examples": examples, "scores": {}, "intervals": {}, "differences": {}}
    for name, table in tables.items():
        scores = scores_of_sums(table.sum(0), examples)
        result["scores"][name] = {metric: float(value) for metric, value in scores.items()}
        result["intervals"][name] = {metric: interval(values) for metric, values in samples[name].items()}
        same_tokens = np.array_equal(table[:, -1], tables[first][:, -1])
        result["differences"][name] = {
            metric: {
                "difference": float(value) - result["scores"][first][metric],
                "interval": interval(samples[name][metric] - samples[first][metric]),
            }
            for metric, value in scores.items()
            if name != first and (metric != "perplexity" or same_tokens)
        }
    return result


def randomisation(scores_of_sums, first, other, resamples, seed):
    """{metric: two-sided p}: how often a random swap of the two systems' rows parts their scores as far as seen.

    What was seen counts as one more resample, so that p is never 0 (Phipson & Smyth 2010). Source: Noreen 1989.
    """
    rng, examples = np.random.default_rng(seed), len(first)
    swapped, total = other - first, first.sum(0) + other.sum(0)
    a, b = scores_of_sums(first.sum(0), examples), scores_of_sums(other.sum(0), examples)
    metrics = [metric for metric in a if metric in b]
    # equal scores differ in their last bits
    seen = {metric: abs(b[metric] - a[metric]) - 1e-9 * (abs(a[metric]) + abs(b[metric])) for metric in metrics}
    reached = dict.fromkeys(metrics, 1)
    for size in chunks(resamples, examples):
        swap = rng.integers(2, size=(size, examples), dtype=np.int8).astype(np.float64)
        sums = first.sum(0) + swap @ swapped
        a, b = scores_of_sums(sums, examples), scores_of_sums(total - sums, examples)
        for metric in metrics:
            reached[metric] += int((np.abs(b[metric] - a[metric]) >= seen[metric]).sum())
    return {metric: count / (resamples + 1) for metric, count in reached.items()}


def compare(scores_of_sums, tables, columns, differences, args):
    """{system: {metric: ...}}: the `differences` that `measure` found, each with its test, wins, ties and losses.

    columns: {metric: its column}, for the metrics that have a score per example.
    """
    (_, first), *others = tables.items()
    result = {}
    for name, other in others:
        p_values = randomisation(scores_of_sums, first, other, args.resamples, args.seed)
        tests = result[name] = {metric: dict(part) for metric, part in differences[name].items()}
        for metric, test in tests.items():
            if metric not in NO_TEST:
                test |= {"test": "paired randomisation", "p_value": p_values[metric]}
            if metric in columns:
                gain = (other - first)[:, columns[metric]] * (-1 if metric in LOWER_IS_BETTER else 1)
                wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
                test |= {"wins": wins, "ties": len(gain) - wins - losses, "losses": losses}
    return result


def holm(p_values):
    """p values adjusted for there being many (Holm 1979), in the order given."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
