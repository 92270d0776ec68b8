"""Values by hand and every error of accuracy, best-of-n and contrast."""

import math

import numpy as np
import pytest

from prefmoe.errors import ConfigError, DataError, ShapeError
from prefmoe.evaluation.accuracy import (
    bootstrap_interval,
    macro_accuracy,
    pair_hits,
    paired_bootstrap,
    pairwise_accuracy,
    standard_error,
)
from prefmoe.evaluation.best_of_n import BestOfNCurve, best_of_n, curve, kl_best_of_n
from prefmoe.evaluation.contrast import contrast_consistency


def test_a_tie_counts_one_half():
    assert pair_hits([2.0, 0.0, -1.0]).tolist() == [1.0, 0.5, 0.0]
    assert pairwise_accuracy([2.0, 0.0, -1.0, 3.0]) == 0.625


def test_a_small_task_weighs_as_much_as_a_large_one():
    assert macro_accuracy({"large": [1.0] * 99 + [0.0], "small": [0.0]}) == pytest.approx(0.495)


def test_an_interval_of_equal_values_has_no_width():
    assert bootstrap_interval([1.0, 1.0, 1.0], seed=0) == (1.0, 1.0, 1.0)


def test_another_seed_gives_another_interval():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(values, seed=0) != bootstrap_interval(values, seed=1)


def test_pairing_narrows_the_interval_of_a_difference():
    hard = np.random.default_rng(0).random(200) < 0.5
    weak = {"t": hard.astype(float)}
    strong = {"t": np.where(np.arange(200) < 20, 1.0, weak["t"])}
    _, low, high = paired_bootstrap(strong, weak, seed=0)
    _, unpaired_low, unpaired_high = bootstrap_interval(weak["t"], seed=0)
    assert low > 0
    assert high - low < unpaired_high - unpaired_low


def test_a_prompt_with_many_pairs_widens_the_interval():
    hits = np.repeat([1.0, 0.0, 1.0, 1.0], 25)
    alone = bootstrap_interval(hits, seed=0)
    together = bootstrap_interval(hits, seed=0, prompt_ids=[str(i // 25) for i in range(100)])
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_the_standard_error_is_the_spread_of_the_bootstrap():
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_interval(values, seed=0)
    assert standard_error(values) == pytest.approx((interval.high - interval.low) / 3.92, rel=0.06)


def test_pairs_of_a_prompt_count_as_one_draw():
    values = np.random.default_rng(1).normal(size=40)
    prompts = [f"{i}" for i in range(40)] * 3
    assert standard_error(np.tile(values, 3), prompt_ids=prompts) == pytest.approx(standard_error(values))
    assert standard_error([1.0, 0.0, 1.0], prompt_ids=["a"] * 3) == math.inf


@pytest.mark.parametrize(
    ("margins", "error", "sentence"),
    [
        ([], DataError, "margins: there are none; at least one is needed"),
        ([0.1, math.nan, math.inf], DataError, "2 of 3 are not finite; got nan in row 1; check the rewards"),
        ([[1.0]], ShapeError, r"got shape \(1, 1\); expected \(rows,\)"),
    ],
)
def test_margins_that_cannot_be_counted(margins, error, sentence):
    with pytest.raises(error, match=sentence):
        pairwise_accuracy(margins)


def test_settings_of_the_bootstrap_that_cannot_work():
    with pytest.raises(ConfigError, match="level=95 is not a share; choose a number between 0 and 1"):
        bootstrap_interval([1.0], seed=0, level=95)
    with pytest.raises(ConfigError, match="num_resamples=0 gives no interval; choose 1 or more"):
        bootstrap_interval([1.0], seed=0, num_resamples=0)
    with pytest.raises(ShapeError, match="prompt_ids: got 2 rows; expected 1"):
        bootstrap_interval([1.0], seed=0, prompt_ids=["a", "b"])


def test_methods_that_cannot_be_compared():
    with pytest.raises(DataError, match=r"got \['a'\] and \['b'\]; measure both on the same pairs"):
        paired_bootstrap({"a": [1.0]}, {"b": [1.0]}, seed=0)
    with pytest.raises(ShapeError, match="second method, task 'a': got 1 rows; expected 2"):
        paired_bootstrap({"a": [1.0, 0.0]}, {"a": [1.0]}, seed=0)
    with pytest.raises(ShapeError, match="prompt_ids: got 0 rows; expected 1"):
        paired_bootstrap({"a": [1.0]}, {"a": [1.0]}, seed=0, prompt_ids={})
    with pytest.raises(DataError, match="there is no task"):
        macro_accuracy({})
    with pytest.raises(DataError, match="task 'rare': there are none"):
        macro_accuracy({"rare": []})


def test_best_of_two_of_three_by_hand():
    # Subsets by proxy rank: {1,2} -> 2nd, {1,3} -> 3rd, {2,3} -> 3rd.
    assert best_of_n([[0.1, 0.2, 0.3]], [[5.0, 10.0, 40.0]], 2).tolist() == pytest.approx([30.0])


def test_weights_stay_exact_for_the_largest_pools():
    ones = np.ones((1, 12_600))
    proxy = np.arange(12_600.0)[None]
    for n in (1, 64, 4096, 12_500):
        assert best_of_n(proxy, ones, n)[0] == pytest.approx(1.0, abs=1e-9)


def test_kl_of_the_largest_n_of_the_papers():
    assert kl_best_of_n(60_000) == pytest.approx(10.002, abs=5e-4)
    assert kl_best_of_n(12_500) == pytest.approx(8.434, abs=5e-4)


def test_a_misled_proxy_shows_over_optimization():
    gold = np.array([[0.0, 1.0, 2.0, -9.0]])
    found = curve([[0.0, 1.0, 2.0, 3.0]], gold, [4, 1, 2, 4], num_resamples=10)
    assert found.n == [1, 2, 4]
    assert found.gold[-1] == -9.0
    assert found.proxy == sorted(found.proxy)
    assert found.low == found.high == found.gold  # one prompt: nothing to draw


def test_best_of_n_that_cannot_be_drawn():
    table = [[1.0, 2.0]]
    with pytest.raises(
        ConfigError, match="n=3 cannot be drawn from 2 completions a prompt; choose n from 1 to 2"
    ):
        best_of_n(table, table, 3)
    with pytest.raises(ConfigError, match="choose 1 or more"):
        kl_best_of_n(0)
    with pytest.raises(ConfigError, match="ns is empty; give at least one n"):
        curve(table, table, [])
    with pytest.raises(ShapeError, match=r"proxy has shape \(1, 2\), target \(1, 1\)"):
        best_of_n(table, [[1.0]], 1)
    with pytest.raises(ShapeError, match=r"proxy has shape \(2,\); expected \(prompts, completions\)"):
        best_of_n([1.0, 2.0], table, 1)
    with pytest.raises(DataError, match="target of prompt 0, completion 1 is not finite; got nan"):
        best_of_n(table, [[1.0, math.nan]], 1)


@pytest.mark.parametrize(
    ("n", "gold", "sentence"),
    [
        ([1, 2], [0.0], "equally long and not empty; got lengths"),
        ([], [], "equally long and not empty"),
        ([2, 1], [0.0, 0.0], "n has to rise from 1 or more"),
        ([0], [0.0], "n has to rise from 1 or more"),
    ],
)
def test_a_curve_needs_lists_that_fit(n, gold, sentence):
    with pytest.raises(ValueError, match=sentence):
        BestOfNCurve(n=n, gold=gold, low=gold, high=gold, proxy=gold)


def test_contrast_by_hand():
    found = contrast_consistency([1.0, 1.0], [0.0, 1.0], [2.0, 2.0], seed=0)
    assert found.c_res.value == 0.75
    assert found.c_ins.value == 0.0


def test_contrast_that_cannot_be_counted():
    with pytest.raises(ShapeError, match=r"have \(2, 1, 2\) rows; expected one each a quadruple"):
        contrast_consistency([1.0, 1.0], [0.0], [2.0, 2.0], seed=0)
    with pytest.raises(DataError, match="rewards of the own completions: there are none"):
        contrast_consistency([], [], [], seed=0)
