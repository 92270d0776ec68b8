"""Laws of accuracy, intervals and best-of-n that hold for any input."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmoe.evaluation.accuracy import (
    bootstrap_interval,
    macro_accuracy,
    pair_hits,
    paired_bootstrap,
    pairwise_accuracy,
)
from prefmoe.evaluation.best_of_n import best_of_n, curve, kl_best_of_n

numbers = st.floats(-1000, 1000, allow_subnormal=False)
rows = st.lists(numbers, min_size=1, max_size=12)
law = settings(deadline=None, max_examples=40)


@st.composite
def tables(draw):
    """Proxy and gold rewards, each of shape (prompts, completions); whole numbers, so that ties occur."""
    prompts, completions = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    row = st.lists(st.integers(-5, 5), min_size=completions, max_size=completions)
    table = st.lists(row, min_size=prompts, max_size=prompts)
    return np.array(draw(table), dtype=float), np.array(draw(table), dtype=float)


@law
@given(rows)
def test_swapping_chosen_and_rejected_turns_accuracy_round(margins):
    # Defect 3 of the release: an accuracy that counts the losers as winners.
    assert pairwise_accuracy([-margin for margin in margins]) == pytest.approx(1 - pairwise_accuracy(margins))


@law
@given(rows, st.randoms(use_true_random=False), st.floats(0.5, 100))
def test_accuracy_ignores_order_and_scale(margins, random, scale):
    shuffled = random.sample(margins, len(margins))
    assert pairwise_accuracy([scale * margin for margin in shuffled]) == pairwise_accuracy(margins)


@law
@given(rows, st.integers(0, 9))
def test_an_interval_lies_within_the_values_and_repeats_with_its_seed(values, seed):
    interval = bootstrap_interval(values, seed=seed, num_resamples=50)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert interval == bootstrap_interval(values, seed=seed, num_resamples=50)


@law
@given(rows, st.integers(1, 4))
def test_copies_of_a_prompts_pairs_make_the_interval_no_narrower(values, copies):
    once = bootstrap_interval(values, seed=1, num_resamples=50)
    ids = [f"{i:03d}" for i in range(len(values))] * copies
    again = bootstrap_interval(values * copies, seed=1, num_resamples=50, prompt_ids=ids)
    assert again == pytest.approx(once, abs=1e-9)


@law
@given(st.dictionaries(st.sampled_from("abc"), rows, min_size=1), st.integers(0, 9))
def test_a_method_does_not_differ_from_itself_and_differences_turn_round(margins, seed):
    hits = {task: pair_hits(row) for task, row in margins.items()}
    other = {task: pair_hits([-margin for margin in row]) for task, row in margins.items()}
    assert paired_bootstrap(hits, hits, seed=seed, num_resamples=50) == (0, 0, 0)
    there = paired_bootstrap(hits, other, seed=seed, num_resamples=50)
    back = paired_bootstrap(other, hits, seed=seed, num_resamples=50)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low), abs=1e-12
    )
    assert there.value == pytest.approx(macro_accuracy(hits) - macro_accuracy(other), abs=1e-12)


@law
@given(st.dictionaries(st.sampled_from("abc"), rows, min_size=2))
def test_the_order_of_the_tasks_changes_nothing(margins):
    hits = {task: pair_hits(row) for task, row in margins.items()}
    none = {task: np.zeros(len(row)) for task, row in margins.items()}
    backwards = dict(reversed(hits.items()))
    assert paired_bootstrap(hits, none, seed=0, num_resamples=50) == pytest.approx(
        paired_bootstrap(backwards, none, seed=0, num_resamples=50), abs=1e-12
    )


def test_95_percent_intervals_hold_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    samples = (rng.random((200, 250)) < 0.7).astype(float)
    intervals = [bootstrap_interval(sample, seed=i, num_resamples=300) for i, sample in enumerate(samples)]
    assert 0.90 <= np.mean([low <= 0.7 <= high for _, low, high in intervals]) <= 0.99


@law
@given(tables(), st.data())
def test_best_of_one_is_the_mean_and_best_of_all_the_favourite(table, data):
    proxy, gold = table
    assert best_of_n(proxy, gold, 1) == pytest.approx(gold.mean(axis=1))
    favourites = [g[p == p.max()].mean() for p, g in zip(proxy, gold, strict=True)]
    assert best_of_n(proxy, gold, proxy.shape[1]) == pytest.approx(favourites)
    n = data.draw(st.integers(1, proxy.shape[1]))
    picks = best_of_n(proxy, gold, n)
    assert (gold.min(axis=1) - 1e-9 <= picks).all()
    assert (picks <= gold.max(axis=1) + 1e-9).all()


@law
@given(tables(), st.integers(0, 99))
def test_best_of_n_ignores_order_and_any_rising_change_of_the_proxy(table, seed):
    proxy, gold = table
    order = np.random.default_rng(seed).permutation(proxy.shape[1])
    n = 1 + seed % proxy.shape[1]
    changed = np.exp(proxy[:, order] / 3) + 7
    assert best_of_n(changed, gold[:, order], n) == pytest.approx(best_of_n(proxy, gold, n), abs=1e-9)


@law
@given(tables())
def test_choosing_from_more_never_lowers_the_proxy(table):
    proxy, gold = table
    ns = range(1, proxy.shape[1] + 1)
    rising = curve(proxy, gold, list(ns), num_resamples=5).proxy
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(rising))


@law
@given(st.integers(1, 10**6))
def test_kl_rises_from_zero_and_stays_below_ln_n(n):
    assert kl_best_of_n(1) == 0
    assert kl_best_of_n(n) < kl_best_of_n(n + 1) < math.log(n + 1)
