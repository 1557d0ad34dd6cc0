"""How often evaluations.py calls a system better than another: planted ones, on simulated test sets.

Each set has 100 summaries and 100 answers of invented words. The first system is compared with one that is equal (the
same chances), one better in form alone (it adds fewer words around what it says) and one better in fact (it gets more
right, in the same form). Beside the correction over each task's main scores: the former one, over all scores of both.

    python benchmarks/significance.py
"""

import argparse
import random
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

from peers import ROOT, machine, save, table

sys.path.insert(0, str(ROOT))
from pipeline.scoring import metrics, significance  # noqa: E402
from tasks import samsum, trivia_qa  # noqa: E402

# words of an answer, at most so many added around it, how much more is right where a system is better in fact
TASKS = {"samsum": (samsum, (8, 20), 24, 0.05), "trivia_qa": (trivia_qa, (1, 3), 6, 0.18)}
SYSTEMS = {"equal": (0, 0.6), "form": (0, 0.35), "fact": (1, 0.6)}  # better in fact, chance of words around it
ROWS, WORDS = 100, [f"w{number}" for number in range(2000)]


def write(rng, gold, right, around, most):
    """An answer to `gold`, and its negative log likelihood, which a system with more right words finds less of."""
    whole = rng.random() < right  # a short answer is right or wrong as a whole
    is_right = [whole if len(gold.split()) < 4 else rng.random() < right for _ in gold.split()]
    words = [word if right_one else rng.choice(WORDS) for word, right_one in zip(gold.split(), is_right, strict=True)]
    extra = rng.choices(WORDS, k=rng.randint(1, most)) if rng.random() < around else []
    return " ".join(extra + words), rng.gammavariate(4, 3 - 2 * right)


def tests_of(rng, task, sizes, most, gain, settings):
    """{system: {score: its test against the base}} of a simulated test set."""
    gold = [" ".join(rng.choices(WORDS, k=rng.randint(*sizes))) for _ in range(ROWS)]
    tables = {}
    for name, (fact, around) in {"base": SYSTEMS["equal"], **SYSTEMS}.items():
        texts, nll = zip(*(write(rng, text, 0.5 + gain * fact, around, most) for text in gold), strict=True)
        tables[name] = metrics.table_of(task, [[text] for text in gold], texts, losses=[(value, 4) for value in nll])
    by_sums = partial(metrics.corpus_scores, task)
    differences = significance.measure(by_sums, tables, settings)["differences"]
    for of_system in differences.values():
        of_system.pop("length_ratio", None)  # no end of it is better
    return significance.compare(by_sums, tables, {}, differences, task.SCORES, settings)


def called(family):
    """{score: "better" or "worse"} of the tests {score: test} that are significant after Holm over all of them."""
    adjusted, ways = significance.holm([test["p_value"] for test in family.values()]), {}
    for (score, test), p in zip(family.items(), adjusted, strict=True):
        if p < significance.LEVEL:
            higher_is_better = score.split()[1] not in significance.LOWER_IS_BETTER
            ways[score] = "better" if (test["difference"] > 0) == higher_is_better else "worse"
    return ways


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sets", type=int, default=200)
    sets, settings, rng = parser.parse_args().sets, SimpleNamespace(resamples=1000, seed=0), random.Random(0)
    mains = {f"{name} {score}": name for name, (task, *_) in TASKS.items() for score in task.MAIN_SCORES}
    better, equal = Counter(), Counter()
    for _ in range(sets):
        tests = {name: tests_of(rng, *parts, settings) for name, parts in TASKS.items()}
        for system in SYSTEMS:
            every = {f"{name} {score}": test for name in TASKS for score, test in tests[name][system].items()}
            families = [{score: every[score] for score in mains if mains[score] == name} for name in TASKS]
            ways = [called(family) for family in families]
            for rule, of_rule in (("main", ways[0] | ways[1]), ("all", called(every))):
                better.update((score, system, rule) for score, way in of_rule.items() if way == "better")
            if system == "equal":
                equal.update(name for name, of_task in zip(TASKS, ways, strict=True) if of_task)
    columns = [(system, rule) for system in SYSTEMS for rule in ("main", "all")]
    rows = {score: {", ".join(of): 100 * better[score, *of] / sets for of in columns} for score in mains}
    false = {name: 100 * equal[name] / sets for name in TASKS}
    save("significance", {"machine": machine(), "sets": sets, "better": rows, "equal_called_different": false})
    lines = [[score, *map("{:.1f}".format, values.values())] for score, values in rows.items()]
    table(["% of the sets called better", *map(", ".join, columns)], lines)
    print("equal: % of the sets with any main score called better or worse:", false)


if __name__ == "__main__":
    main()
