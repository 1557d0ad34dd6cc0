"""How sure scores are: bootstrap intervals, one paired test for every main score, and Holm's adjustment.

Every score is a function of sums over examples, so that any resample of the examples is one row of a matrix product:
`table` is (examples, columns), `scores_of_sums` turns (sums, examples) into {metric: score}, for one row of sums or
for many.
"""

import numpy as np

LOWER_IS_BETTER = ("perplexity", "from_memory")
NO_BETTER_END = ("length_ratio", "neither_or_both")  # neither high nor low is good: nobody wins
YES_OR_NO = ("exact_match", "contains")  # 0 or 100: what a judge can agree with
ENDS = (2.5, 97.5)  # percentiles, of every 95 % interval
ERRORS = 1.96 + 0.84  # standard errors: beyond the first a test at 5 % finds a difference; 80 % lie above -0.84
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


def by_system(named):
    """{system: {seed: ...}} of {name: ...}: `tuned@0` and `tuned@1` are two trainings of the system `tuned`."""
    systems = {}
    for name, value in named.items():
        system, _, seed = name.partition("@")
        systems.setdefault(system, {})[seed] = value
    return systems


def by_chance(parts, seed):
    """The sum of the parts' means over seeds: as seen, then as it could have been with other rows and other seeds.

    parts: arrays (seeds, 1 + resamples), a score as seen and in a bootstrap of the rows. A bootstrap of a few seeds
    is far too narrow: their mean is t-distributed. That covers what rows change in one seed alone, so the bootstrap
    keeps what they change in all seeds together (random effects of rows and of seeds):
    mean + deviations * sqrt(1 - variance within one seed / variance of deviations) + t * sqrt(variance between seeds).
    """
    mean_over_seeds = sum(part.mean(0) for part in parts)
    with_seeds = [part for part in parts if len(part) > 1]
    if not with_seeds:
        return mean_over_seeds
    mean, deviations = mean_over_seeds[0], mean_over_seeds[1:] - mean_over_seeds[0]
    within_one_seed = sum((part - part[:, :1]).var(0, ddof=1).mean() / len(part) for part in with_seeds)
    deviations *= np.sqrt(max(0.0, 1 - within_one_seed / (deviations.var() or 1)))
    between_seeds = np.array([part[:, 0].var(ddof=1) / len(part) for part in with_seeds])
    if between_seeds.any():
        freedom = np.array([len(part) - 1 for part in with_seeds])
        welch = between_seeds.sum() ** 2 / (between_seeds**2 / freedom).sum()  # degrees of freedom
        t = np.random.default_rng(seed).standard_t(welch, len(deviations))
        deviations += t * np.sqrt(between_seeds.sum())
    return np.append(mean, mean + deviations)


def difference(first, other, rows, seed):
    """How far `other` is from `first`, both {seed: a score as in `by_chance`}; the same seeds make pairs.

    minimum_detectable: the true difference that a test at 5 % finds with 80 % power; None where no chance is seen.
    With several seeds also the p value: swapping rows knows nothing of seeds.
    """
    if first.keys() == other.keys():
        parts = [np.array([other[name] - first[name] for name in first])]
    else:
        parts = [np.array([*other.values()]), -np.array([*first.values()])]
    seen, samples = np.split(by_chance(parts, seed), [1])
    found = {"difference": float(seen[0]), "interval": interval(samples)}
    least = ERRORS * samples.std()
    if max(map(len, parts)) > 1:
        low, below, above, high = np.percentile(samples, (2.5, 20, 80, 97.5))
        least = (high - low + above - below) / 2  # a t distribution has wider tails
        beyond = 1 + int(min((samples <= 0).sum(), (samples >= 0).sum()))
        found |= {"test": "bootstrap of rows, t of seeds", "p_value": min(1.0, 2 * beyond / (len(samples) + 1))}
    few = 1 + 1.7 / rows  # t's quantiles for the normal ones, and the variance that a bootstrap of few rows lacks
    return found | {"minimum_detectable": round(float(least) * few, 6) or None}


def measure(scores_of_sums, tables, args):
    """Every score of every system on these rows, with intervals, and the differences to the first system.

    scores_of_sums: (sums, examples) to {metric: score}; tables: {name: (examples, columns)}, names as in `by_system`.
    All are resampled together, row by row. Perplexities over other tokens (last column) have no difference.
    """
    whole = np.hstack(list(tables.values()))
    sums = np.vstack([whole.sum(0), resampled_sums(whole, args.resamples, args.seed)])
    parts = dict(zip(tables, np.split(sums, len(tables), axis=1), strict=True))
    systems = by_system({name: scores_of_sums(part, len(whole)) for name, part in parts.items()})
    tokens = by_system({name: table[:, -1].tobytes() for name, table in tables.items()})
    result = {"examples": len(whole), "scores": {}, "intervals": {}, "seeds": {}, "differences": {}}
    first, values = next(iter(systems)), {}
    for system, seeds in systems.items():
        names = [metric for metric in [*seeds.values()][0] if all(metric in scores for scores in seeds.values())]
        values[system] = {metric: {seed: scores[metric] for seed, scores in seeds.items()} for metric in names}
        drawn = {m: by_chance([np.array([*score.values()])], args.seed) for m, score in values[system].items()}
        result["scores"][system] = {metric: float(score[0]) for metric, score in drawn.items()}
        result["intervals"][system] = {metric: interval(score[1:]) for metric, score in drawn.items()}
        if len(seeds) > 1:
            result["seeds"][system] = {seed: {m: float(scores[m][0]) for m in names} for seed, scores in seeds.items()}
        same_tokens = len({*tokens[first].values(), *tokens[system].values()}) == 1
        result["differences"][system] = {
            metric: difference(values[first][metric], score, len(whole), args.seed)
            for metric, score in values[system].items()
            if system != first and (metric != "perplexity" or same_tokens)
        }
    return result


def randomisation(scores_of_sums, first, other, resamples, seed):
    """{metric: two-sided p}: how often a random swap of the two systems' rows parts their scores as far as seen.

    What was seen counts as one more resample, so that p is never 0 (Phipson & Smyth 2010). Source: Noreen 1989.
    """
    rng, examples = np.random.default_rng(seed), len(first)
    swapped, total = other - first, first.sum(0) + other.sum(0)
    a, b = scores_of_sums(first.sum(0), examples), scores_of_sums(other.sum(0), examples)
    # equal scores differ in their last bits
    seen = {name: abs(b[name] - a[name]) - 1e-9 * (abs(a[name]) + abs(b[name])) for name in a if name in b}
    reached = dict.fromkeys(seen, 1)
    for size in chunks(resamples, examples):
        swap = rng.integers(2, size=(size, examples), dtype=np.int8).astype(np.float64)
        sums = first.sum(0) + swap @ swapped
        left, right = scores_of_sums(sums, examples), scores_of_sums(total - sums, examples)
        for metric, distance in seen.items():
            reached[metric] += int((np.abs(right[metric] - left[metric]) >= distance).sum())
    return {metric: count / (resamples + 1) for metric, count in reached.items()}


def compare(scores_of_sums, tables, columns, differences, tested, args):
    """{system: {metric: ...}}: the `differences` that `measure` found, with wins, ties and losses, and tests.

    columns: {metric: its column}, for the metrics that have a score per example. tested: the metrics, declared before
    anything was seen, that are tested; the others get neither a p nor what a test would see.
    """
    (_, first), *others = by_system(tables).items()
    result = {}
    for name, other in others:
        pair = [*first.values(), *other.values()]
        of_rows = randomisation(scores_of_sums, *pair, args.resamples, args.seed) if len(pair) == 2 else {}
        before, after = (np.mean([*seeds.values()], axis=0) for seeds in (first, other))
        tests = result[name] = {metric: dict(part) for metric, part in differences[name].items()}
        for metric, test in tests.items():
            if metric not in tested:
                tests[metric] = test = {key: test[key] for key in ("difference", "interval")}
            elif metric in of_rows:
                test |= {"test": "paired randomisation", "p_value": of_rows[metric]}
            if metric in columns and metric not in NO_BETTER_END:
                both = np.array([before, after])[..., columns[metric]]
                if metric in tested and np.isin(both, (0, 100)).all():  # fewer rows apart show nothing
                    least = max(round(100 * ERRORS**2 / len(both[0]), 6), test["minimum_detectable"] or 0.0)
                    test["minimum_detectable"] = least if least <= 100 else None
                gain = np.round(both[1] - both[0], 9) * (-1 if metric in LOWER_IS_BETTER else 1)
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
