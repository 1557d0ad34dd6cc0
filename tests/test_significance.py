"""Intervals hold the truth as often as they say, and tests find what is there and nothing else."""

import functools
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from test_evaluations import example, prediction_file, run

import evaluations
from pipeline.scoring import metrics, page, significance
from tasks import samsum, trivia_qa

ARGS = evaluations.parse_args(["--resamples", "1000"])
SCORES = functools.partial(metrics.corpus_scores, trivia_qa)
COLUMNS = len(metrics.means(trivia_qa)) + 12


def synthetic(rng, examples, effect):
    """Tables of two systems: exact match differs by `effect` on average, perplexity is e**2 and tokens vary."""
    first = np.zeros((examples, COLUMNS))
    first[:, 0] = rng.gamma(2.0, 20.0, examples)
    first[:, -1] = rng.integers(2, 30, examples)
    first[:, -2] = first[:, -1] * rng.gamma(4.0, 0.5, examples)
    second = first.copy()
    second[:, 0] += effect + rng.gamma(1.0, 15.0, examples) - 15
    return {"first": first, "second": second}


def test_intervals_hold_the_truth_in_about_95_of_100_experiments():
    rng, held = np.random.default_rng(1), np.zeros(3)
    for _ in range(200):
        measured = significance.measure(SCORES, synthetic(rng, 200, 3.0), ARGS)
        pairs = [
            (measured["intervals"]["first"]["exact_match"], 40.0),  # the mean of the gamma
            (measured["differences"]["second"]["exact_match"]["interval"], 3.0),
            (measured["intervals"]["first"]["perplexity"], np.exp(2.0)),
        ]
        held += [low <= truth <= high for (low, high), truth in pairs]
    assert (held >= 0.90 * 200).all() and (held <= 0.99 * 200).all(), held


def mean(sums, examples):
    return {"mean": sums[..., 0] / examples}


def p_of(first, other, resamples=1000):
    """The p of a score that is a plain mean."""
    tables = (np.reshape(values, (-1, 1)).astype(float) for values in (first, other))
    return significance.randomisation(mean, *tables, resamples, 0)["mean"]


def test_equal_systems_are_significant_in_about_5_of_100_experiments_and_different_ones_nearly_always():
    rng, found, power = np.random.default_rng(2), 0, 0
    for _ in range(200):
        noise = rng.gamma(1.0, 15.0, 100) * rng.choice([-1, 1], 100)
        found += p_of(np.zeros(100), noise) < 0.05
        power += p_of(np.zeros(100), noise + 10) < 0.05
    assert 0.02 * 200 <= found <= 0.085 * 200 and power > 0.98 * 200


def chance_of(tables):
    """The comparison of "b" with the first of these {name: values}, a score that is a plain mean."""
    args = evaluations.parse_args(["--resamples", "400"])
    tables = {name: np.reshape(values, (-1, 1)).astype(float) for name, values in tables.items()}
    differences = significance.measure(mean, tables, args)["differences"]
    return significance.compare(mean, tables, {"mean": 0}, differences, ("mean",), args)["b"]["mean"]


def test_a_difference_as_small_as_said_is_found_in_about_80_of_100_test_sets_and_half_of_it_is_not():
    rng, found, half, of_100 = np.random.default_rng(3), np.zeros(2), np.zeros(2), 100
    for _ in range(200):
        noise = rng.normal(0, 20, (2, of_100))
        said = chance_of({"a": np.zeros(of_100), "b": noise[0]})["minimum_detectable"]
        turned = np.where(rng.random((2, of_100)) < 0.3, rng.choice([-100, 100], (2, of_100)), 0)  # yes or no
        right = {"a": turned[0] < 0, "b": turned[0] > 0}
        turns = chance_of({name: 100.0 * yes for name, yes in right.items()})["minimum_detectable"] / 100
        for planted, share in ((found, 1), (half, 0.5)):
            others = rng.choice([100, -100, 0], of_100, p=[0.15 + share * turns / 2, 0.15 - share * turns / 2, 0.7])
            planted += [
                p_of(np.zeros(of_100), noise[1] + share * said, 400) < 0.05,
                p_of(0 * others, others, 400) < 0.05,
            ]
    assert (found >= 0.70 * 200).all() and (found <= 0.90 * 200).all(), found
    assert (half < 0.45 * 200).all(), half


def test_what_no_test_can_show_is_not_said_to_be_visible():
    assert chance_of({"a": [1.5] * 50, "b": [1.5] * 50})["minimum_detectable"] is None  # no chance to be seen
    wrong = chance_of({"a": [0] * 200, "b": [0] * 200})["minimum_detectable"]
    assert wrong == pytest.approx(3.92)  # about 8 of 200 rows, which give 6 in 80 % of cases: p_of 6 and 0 is 2 / 64
    assert chance_of({"a": [0] * 7, "b": [0] * 7})["minimum_detectable"] is None


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_over_rows_and_seeds_hold_the_truth_in_about_95_of_100_experiments(seeds):
    rng, held, args = np.random.default_rng(4), np.zeros(4), evaluations.parse_args(["--resamples", "500"])

    def trained(name, rows):
        """Trainings whose mean is 30: variance of seeds 1, of rows alone as given, of rows in a seed 5 x 5."""
        own = rng.normal(30, 1, (seeds, 1)) + rng.normal(0, 5, (seeds, len(rows)))
        return {f"{name}@{seed}": (rows + own[seed]).reshape(-1, 1) for seed in range(seeds)}

    for _ in range(200):
        rows = rng.normal(0, 10, 50)
        first, other = trained("a", rows), trained("b", rows)
        untrained = {"a": (30 + rows + rng.normal(0, 5, 50)).reshape(-1, 1)}
        renamed = {name.replace("@", "@other"): table for name, table in first.items()}
        whole = significance.measure(mean, first, args)
        pairs = [(whole["intervals"]["a"]["mean"], 30.0)]
        for tables in (first | other, renamed | other, untrained | other):
            pairs.append((significance.measure(mean, tables, args)["differences"]["b"]["mean"]["interval"], 0.0))
        held += [low <= truth <= high for (low, high), truth in pairs]
    assert (held >= 0.91 * 200).all() and (held[:2] <= 0.99 * 200).all(), held


def test_the_spread_of_seeds_is_what_a_p_value_over_seeds_knows_of():
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 1, 200)
    apart = {f"b@{seed}": rows + 3 * seed - 2 + rng.normal(0, 1, 200) for seed in range(3)}
    near = {f"b@{seed}": rows + 1 + rng.normal(0, 1, 200) for seed in range(3)}
    alike, far = chance_of({"a": rows} | near), chance_of({"a": rows} | apart)
    assert far["difference"] == pytest.approx(1, abs=0.3) and far["p_value"] > 0.3
    assert alike["p_value"] < 0.02 and alike["interval"][0] > 0.5
    assert alike["minimum_detectable"] < 1 < far["minimum_detectable"]
    assert alike["wins"] + alike["losses"] == 200


def test_resampling_draws_every_sample_of_the_rows_equally_often():
    sums = significance.resampled_sums(np.array([[1.0], [10.0], [100.0]]), 27_000, 0)[:, 0]
    every = [a + b + c for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100)]
    for value in set(every):
        assert (sums == value).sum() == pytest.approx(1000 * every.count(value), rel=0.1)
    assert significance.interval(np.arange(1001.0)) == [25, 975]


def test_resampling_all_of_trivia_qa_stays_far_below_500_megabytes():
    tracemalloc.start()
    significance.resampled_sums(np.ones((7993, 40)), 4000, 0)
    significance.randomisation(mean, np.ones((7993, 8)), np.zeros((7993, 8)), 4000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # all at once: 512e6


def test_swaps_part_the_scores_as_far_as_seen_as_often_as_counting_says():
    assert p_of([0, 0, 0], [1, 2, 3], 20_000) == pytest.approx(2 / 8, abs=0.02)  # only +++ and --- reach 6
    assert p_of([0, 0, 0], [0.1, 0.2, -0.3]) == 1  # 0 but for its last bits
    assert p_of([5, 5], [5, 5]) == 1 and p_of([0], [1], 100) == 1
    assert p_of(np.zeros(40), np.ones(40)) == 1 / 1001  # never 0
    # 3 - 3 + 1 + 2 tenths: 12 of the 16 signs reach 3, counted in integers; as floats half of them differ in a bit
    tenths = np.array([3, -3, 1, 2])
    signs = np.array(list(itertools.product([-1, 1], repeat=4)))
    expected = (np.abs(signs @ tenths) >= 3).mean()
    assert p_of(np.zeros(4), tenths / 10, 20_000) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("wins, losses", [(8, 2), (5, 0), (12, 6), (3, 3)])
def test_of_yes_or_no_scores_the_test_is_mcnemars_exact_one(wins, losses):
    n = wins + losses
    binomial = [math.comb(n, k) / 2**n for k in range(n + 1)]
    exact = min(1, 2 * sum(binomial[: min(wins, losses) + 1]))
    first = [0] * wins + [100] * losses + [100] * 20  # 20 more that both have right
    other = [100] * wins + [0] * losses + [100] * 20
    assert p_of(first, other, 20_000) == pytest.approx(exact, abs=0.012)
    assert p_of(other, first, 20_000) == pytest.approx(exact, abs=0.012)


def test_holm_adjusts_by_rank_and_never_below_a_smaller_one():
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.5, 0.9]) == pytest.approx([1, 1]) and significance.holm([]) == []


def test_bleu_is_tested_as_sacrebleus_paired_test_does():
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    gold = [[f"w{i} the cat sat on mat number {i} and it looked at dog {i}"] for i in range(60)]
    right = [refs[0] for refs in gold]
    first = [text.replace("cat", "cow") if i % 3 == 0 else text for i, text in enumerate(right)]
    other = [text.replace("dog", "duck") if i % 4 == 0 else text for i, text in enumerate(right)]
    streams = [[refs[0] for refs in gold]]
    paired = PairedTest([("a", first), ("b", other)], {"BLEU": BLEU(references=streams)}, None, n_samples=10_000)
    theirs = paired()[1]["BLEU"][1].p_value
    tables = [metrics.table_of(samsum, gold, texts) for texts in (first, other)]
    by_sums = functools.partial(metrics.corpus_scores, samsum)
    ours = significance.randomisation(by_sums, *tables, 10_000, 0)
    assert 0.02 < theirs < 0.98 and ours["bleu"] == pytest.approx(theirs, abs=0.02)
    assert set(ours) == set(samsum.SCORES) - {"perplexity"}
    one = metrics.table_of(samsum, gold, [first[0], *right[1:]])
    same = metrics.table_of(samsum, gold, right)
    assert significance.randomisation(by_sums, one, same, 1000, 0)["bleu"] == 1  # PairedTest alone says 0.001


def test_no_p_is_shown_as_zero_or_smaller_than_the_resamples_can_show(tmp_path):
    rows = [example(id=str(i), base_prediction="Rome", nll=1.0, base_nll=9.0, tokens=2) for i in range(60)]
    prediction_file(tmp_path / "outputs/trivia_qa_predictions.json", examples=rows)
    for resamples, shown in ((50, f"{3 / 51:.4f}"), (500, f"{3 / 501:.4f}"), (40_000, "< 0.0001")):
        done = run(tmp_path, "--resamples", resamples)
        page_text = (tmp_path / "outputs/evaluation.html").read_text()
        assert shown in done.stdout and f"p {shown.replace('<', '&lt;')}<" in page_text
        assert "0.0000" not in done.stdout and "p 0.0000" not in page_text


@pytest.mark.parametrize("p, shown", [(0.00005, "< 0.0001"), (0.0001, "0.0001"), (0.04567, "0.0457"), (1, "1.0000")])
def test_a_small_p_is_shown_as_smaller_than_what_can_be_printed(p, shown):
    assert page.p_value(p) == shown
