"""Differences, tokens needed and repeated looks, against scipy, against closed forms, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from graftlm.comparing.statistics import Difference, difference, repeated_interval, tokens_needed

MULTIPLES = np.array([0.5, 0.75, 1.0, 1.5, 2.0])


def law(multiple, start=3.0, scale=0.2, power=0.5):
    """A loss that falls with tokens as a power."""
    return start + scale * np.asarray(multiple, dtype=float) ** -power


# --- differences


def test_difference_is_scipys_paired_t():
    rng = np.random.default_rng(1)
    a, b = rng.normal(3, 0.1, 6), rng.normal(3, 0.1, 6)
    found = difference(list(a - b))
    oracle = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.t_interval == pytest.approx((oracle.low, oracle.high))
    assert found.mean == pytest.approx(np.mean(a - b))
    assert found.n == 6


def test_bootstrap_interval_is_that_of_all_resamples():
    values = np.array([0.1, -0.2, 0.4])
    # Every one of the 27 samples of three with replacement, equally likely: what resampling at random tends to.
    means = np.array([values[[i, j, k]].mean() for i in range(3) for j in range(3) for k in range(3)])
    low, high = difference(list(values)).bootstrap_interval
    assert low == pytest.approx(np.quantile(means, 0.025, method="inverted_cdf"), abs=0.02)
    assert high == pytest.approx(np.quantile(means, 0.975, method="inverted_cdf"), abs=0.02)
    assert difference(list(values)).bootstrap_interval == (low, high)  # drawn the same each time


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_pairs_have_no_interval(count):
    found = difference([0.5] * count)
    assert found == Difference(count, 0.5, None, None)
    assert found.shown == "too few seeds"


def test_what_an_interval_shows():
    assert difference([-0.1, -0.11, -0.09]).shown == "lower"
    assert difference([0.1, 0.11, 0.09]).shown == "higher"
    assert difference([0.1, -0.11, 0.02]).shown == "no difference shown"


def test_bootstrap_over_three_is_too_narrow_and_t_is_not():
    rng = np.random.default_rng(0)
    held = {"t": 0, "bootstrap": 0}
    trials = 300
    for _ in range(trials):
        found = difference(list(rng.normal(0.3, 1, 3)))
        held["t"] += found.t_interval[0] <= 0.3 <= found.t_interval[1]
        held["bootstrap"] += found.bootstrap_interval[0] <= 0.3 <= found.bootstrap_interval[1]
    assert 0.91 <= held["t"] / trials <= 0.99
    assert held["bootstrap"] / trials < 0.85


# --- tokens needed


def curves(seeds, noise=0.0, rng=None, law=law):
    rng = rng or np.random.default_rng(0)
    return np.tile(law(MULTIPLES), (seeds, 1)) + noise * rng.normal(size=(seeds, len(MULTIPLES)))


def test_an_arm_that_is_a_run_of_plain_training_needs_its_multiple():
    for multiple in (0.75, 1.0, 1.5):
        plain = curves(3) + np.array([[0.0], [0.01], [-0.02]])  # seeds differ by a constant, which pairing takes out
        arm = law(multiple) + np.array([0.0, 0.01, -0.02])
        found = tokens_needed(arm, np.tile(MULTIPLES, (3, 1)), plain)
        assert found.multiple == pytest.approx(multiple, rel=1e-3)
        assert found.interval[0] == pytest.approx(multiple, rel=2e-3)
        assert found.interval[1] == pytest.approx(multiple, rel=2e-3)


@given(st.floats(0.52, 1.95), st.floats(0.2, 1.0))
@settings(max_examples=25, deadline=None)
def test_interpolation_is_near_the_true_curve(multiple, power):
    def curve(m):
        return law(m, power=power)

    found = tokens_needed([float(curve(multiple))], MULTIPLES[None], curves(1, law=curve))
    assert found.multiple == pytest.approx(multiple, rel=0.03)
    assert found.interval is None and found.outside == ""
    assert found.text == f"{found.multiple:.2f}"


@pytest.mark.parametrize(("loss", "outside", "text"), [(2.9, "above", "> 2"), (3.5, "below", "< 0.5")])
def test_nothing_is_extrapolated(loss, outside, text):
    one = tokens_needed([loss], MULTIPLES[None], curves(1))
    assert (one.outside, one.text) == (outside, text)
    plain = curves(3, 1e-3)
    three = tokens_needed([loss, loss + 1e-3, loss - 1e-3], np.tile(MULTIPLES, (3, 1)), plain)
    assert three.outside == outside
    assert three.text.startswith(text)
    assert three.interval[1 if outside == "above" else 0] is None


def test_an_open_interval_says_so():
    plain = curves(3)
    arm = law(1.8) + np.array([0.006, -0.006, 0.0])
    found = tokens_needed(arm, np.tile(MULTIPLES, (3, 1)), plain)
    assert found.interval[1] is None
    assert found.interval[0] > 0.5
    assert found.text.endswith("to > 2)")


def test_noise_that_makes_a_curve_rise_is_pooled():
    plain = np.array([[3.30, 3.20, 3.25, 3.10, 3.05]])  # 1 x is worse than 0.75 x by chance: both stand for 3.225
    found = tokens_needed([3.225], MULTIPLES[None], plain)
    assert found.multiple == pytest.approx(0.75, rel=1e-3)  # the fewest tokens that reach it


def test_interval_of_tokens_needed_covers():
    """Three seeds, a curve with noise of its own at every length: the true multiple lies inside 19 times in 20."""
    rng, truth, trials, held = np.random.default_rng(3), 1.3, 300, 0
    for _ in range(trials):
        shared = rng.normal(0, 0.02, (3, 1))  # of a seed's data, in arm and plain training alike
        plain = law(MULTIPLES) + shared + rng.normal(0, 0.002, (3, 5))
        arm = law(truth) + shared[:, 0] + rng.normal(0, 0.002, 3)
        low, high = tokens_needed(arm, np.tile(MULTIPLES, (3, 1)), plain).interval
        held += (low is None or low <= truth) and (high is None or high >= truth)
    assert held / trials >= 0.92


# --- repeated looks


def test_repeated_interval_is_students_at_a_part_of_the_error():
    values = [0.1, 0.3, 0.2, 0.25]
    oracle = stats.t.interval(1 - 0.05 / 3, 3, np.mean(values), stats.sem(values))
    assert repeated_interval(values, 3) == pytest.approx(oracle)
    assert repeated_interval(values[:2], 3) is None


@pytest.mark.parametrize("most", [3, 5, 8])
def test_repeated_intervals_hold_together(most):
    """Simulated pilots that may stop whenever they like: all intervals of one hold the truth 19 times in 20."""
    rng, trials, held = np.random.default_rng(most), 2_000, 0
    looks = most - 2
    for _ in range(trials):
        values = rng.normal(0.1, 1, most)
        ends = [repeated_interval(values[:n], looks) for n in range(3, most + 1)]
        held += all(low <= 0.1 <= high for low, high in ends)
    assert held / trials >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / trials)


def test_looking_again_at_a_plain_interval_would_not_hold():
    """What the repeated interval is for: Student's own, looked at after every pair, misses far more often."""
    rng, trials, held = np.random.default_rng(5), 1_000, 0
    for _ in range(trials):
        values = rng.normal(0.1, 1, 8)
        ends = [repeated_interval(values[:n], 1) for n in range(3, 9)]
        held += all(low <= 0.1 <= high for low, high in ends)
    assert held / trials < 0.92


def test_differences_that_are_all_the_same_have_no_interval():
    """Three times one question of 200: an interval without width would claim a difference."""
    found = difference([0.61 - 0.605, 0.62 - 0.615, 0.60 - 0.595])
    assert found.mean == pytest.approx(0.005)
    assert (found.t_interval, found.bootstrap_interval, found.shown) == (None, None, "no interval")
    assert difference([0.005, 0.005, 0.010]).t_interval is not None


def test_the_interval_of_needed_tokens_is_the_inverted_t_test():
    multiples, apart = np.array([0.5, 0.75, 1.0, 1.5, 2.0]), np.array([0.0, 0.01, -0.02])
    arm = law(1.2) + apart + np.array([1e-3, -1e-3, 5e-4])
    found = tokens_needed(arm, np.tile(multiples, (3, 1)), law(multiples)[None] + apart[:, None])
    for end in found.interval:
        assert stats.ttest_rel(arm, law(end) + apart).pvalue == pytest.approx(0.05, abs=0.006)


def test_multiples_differ_by_seed_and_nothing_is_extrapolated():
    multiples = np.array([0.5, 0.75, 1.0, 1.5, 2.0]) * np.array([[1.0], [1.1], [0.9]])
    found = tokens_needed([3.2, 3.2001, 3.1999], multiples, law(multiples))
    assert (found.smallest, found.largest) == (pytest.approx(0.55), pytest.approx(1.8))


@pytest.mark.parametrize(("loss", "low", "high"), [(2.9, 2.0, None), (3.5, None, 0.5)])
def test_far_outside_an_end_is_what_was_run(loss, low, high):
    plain = np.tile(law(MULTIPLES), (3, 1))
    found = tokens_needed([loss, loss + 1e-3, loss - 1e-3], np.tile(MULTIPLES, (3, 1)), plain)
    for end, wanted in zip(found.interval, (low, high), strict=True):
        assert end == (wanted if wanted is None else pytest.approx(wanted))


def test_differences_that_are_all_the_same_give_no_interval_at_any_look():
    assert repeated_interval([0.1, 0.1, 0.1], looks=3) is None
