"""The evaluation's estimates equal their slow twins in tests/reference."""

import numpy as np
import pytest

from prefmoe.evaluation.accuracy import (
    bootstrap_interval,
    macro_interval,
    pair_hits,
    paired_bootstrap,
    standard_error,
)
from prefmoe.evaluation.best_of_n import best_of_n
from prefmoe.evaluation.contrast import contrast_consistency
from reference import accuracy as slow_accuracy
from reference import best_of_n as slow_best_of_n
from reference.contrast import consistency


def draws_like(tasks, *, seed, num_resamples):
    """The prompts that the fast code draws: one generator, task after task in the order of their names."""
    rng = np.random.default_rng(seed)
    sizes = {task: len({prompt for prompt, _ in tasks[task]}) for task in sorted(tasks)}
    return {
        task: [rng.integers(size, size=size).tolist() for _ in range(num_resamples)]
        for task, size in sizes.items()
    }


def test_pair_hits_equal_the_slow_ones():
    margins = [1e-30, -2.0, 0.0, 5.0, -0.0]
    assert pair_hits(margins).tolist() == [slow_accuracy.hit(margin) for margin in margins]


def test_the_interval_equals_the_slow_one():
    values = np.random.default_rng(3).normal(size=17)
    rows = {"": [(i, value) for i, value in enumerate(values.tolist())]}
    draws = draws_like(rows, seed=5, num_resamples=60)
    fast = bootstrap_interval(values, seed=5, num_resamples=60, level=0.8)
    assert (fast.low, fast.high) == pytest.approx(slow_accuracy.bootstrap(rows, draws, 0.8), abs=1e-12)
    assert fast.value == pytest.approx(slow_accuracy.mean(values.tolist()), abs=1e-12)


def test_the_paired_interval_over_prompts_equals_the_slow_one():
    rng = np.random.default_rng(4)
    prompts = {"b": ["x", "y", "x", "z", "z", "z"], "a": ["u", "v", "u", "w"]}
    hits_a = {task: rng.integers(3, size=len(ids)) / 2 for task, ids in prompts.items()}
    hits_b = {task: rng.integers(3, size=len(ids)) / 2 for task, ids in prompts.items()}
    rows = {
        task: [(p, a - b) for p, a, b in zip(ids, hits_a[task], hits_b[task], strict=True)]
        for task, ids in prompts.items()
    }
    draws = draws_like(rows, seed=9, num_resamples=80)
    fast = paired_bootstrap(hits_a, hits_b, seed=9, num_resamples=80, prompt_ids=prompts)
    assert (fast.low, fast.high) == pytest.approx(slow_accuracy.bootstrap(rows, draws, 0.95), abs=1e-12)


@pytest.mark.parametrize(("worst", "slow"), [(False, slow_accuracy.mean), (True, min)])
def test_the_interval_of_all_tasks_equals_the_slow_one(worst, slow):
    rng = np.random.default_rng(7)
    prompts = {"b": ["x", "y", "x", "z", "z", "z"], "a": ["u", "v", "u", "w"], "c": ["s", "t", "r"]}
    hits = {task: rng.integers(3, size=len(ids)) / 2 for task, ids in prompts.items()}
    rows = {task: list(zip(ids, hits[task].tolist(), strict=True)) for task, ids in prompts.items()}
    draws = draws_like(rows, seed=2, num_resamples=70)
    fast = macro_interval(hits, seed=2, worst=worst, num_resamples=70, prompt_ids=prompts)
    assert (fast.low, fast.high) == pytest.approx(slow_accuracy.bootstrap(rows, draws, 0.95, slow), abs=1e-12)
    assert fast.value == pytest.approx(slow([slow_accuracy.mean(row.tolist()) for row in hits.values()]))


@pytest.mark.parametrize("prompts", [list("xyxzzzw"), list("abcdefg"), list("aaaaaaa")])
def test_the_standard_error_equals_the_slow_one(prompts):
    values = np.random.default_rng(6).normal(size=7)
    slow = slow_accuracy.standard_error(list(zip(prompts, values.tolist(), strict=True)))
    assert standard_error(values, prompt_ids=prompts) == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_equals_trying_every_subset(n):
    rng = np.random.default_rng(n)
    proxy = rng.integers(4, size=(3, 7)).astype(float)  # few values, so that ties occur
    gold = rng.normal(size=(3, 7))
    slow = [
        slow_best_of_n.by_every_subset(p, g, n) for p, g in zip(proxy.tolist(), gold.tolist(), strict=True)
    ]
    # Among equal proxies of a subset the mean wins; over all subsets that is the mean of all equal ones.
    assert best_of_n(proxy, gold, n) == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("n", [2, 10, 40])
def test_best_of_n_lies_within_the_error_of_a_monte_carlo(n):
    rng = np.random.default_rng(n)
    gold = rng.normal(size=50)
    proxy = gold + rng.normal(size=50)
    mean, error = slow_best_of_n.by_monte_carlo(proxy.tolist(), gold.tolist(), n, num_draws=4000, seed=n)
    assert abs(best_of_n([proxy], [gold], n)[0] - mean) < 4 * error


def test_contrast_equals_counting():
    own, completion, prompt = np.random.default_rng(0).integers(3, size=(3, 40)).astype(float)
    fast = contrast_consistency(own, completion, prompt, seed=0)
    assert fast.c_res.value == pytest.approx(consistency(own, completion), abs=1e-12)
    assert fast.c_ins.value == pytest.approx(consistency(own, prompt), abs=1e-12)
