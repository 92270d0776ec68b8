"""Best-of-n: what the gold reward does when a proxy reward picks the best of n completions."""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, model_validator

from prefmoe.errors import ConfigError, DataError, ShapeError
from prefmoe.evaluation.accuracy import Floats, bootstrap_interval


class BestOfNCurve(BaseModel):
    """One curve of `best_of_n.json`: everything is a list with one entry for each n.

    Attributes:
        n: How many completions the proxy chooses from.
        gold: Mean gold reward of the chosen completion, gold units.
        low: Lower end of the interval of `gold` over prompts.
        high: Upper end.
        proxy: Mean proxy reward of the chosen completion, proxy units.
    """

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)

    n: list[int]
    gold: list[float]
    low: list[float]
    high: list[float]
    proxy: list[float]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        lengths = {name: len(values) for name, values in self}
        if len(set(lengths.values())) != 1 or not self.n:
            raise ValueError(f"the lists have to be equally long and not empty; got lengths {lengths}")
        if self.n != sorted(set(self.n)) or self.n[0] < 1:
            raise ValueError(f"n has to rise from 1 or more; got {self.n}")
        return self


def kl_best_of_n(n: int) -> float:
    """Distance between best-of-n sampling and plain sampling: KL = ln n - (n - 1)/n, nats.

    Raises:
        ConfigError: n is below 1.

    Source:
        Stiennon et al. 2020, arXiv:2009.01325, appendix G.3. An upper bound where completions repeat.

    Example:
        >>> f"{kl_best_of_n(60_000):.3f}"
        '10.002'
    """
    if n < 1:
        raise ConfigError(f"n={n} completions give no best one; choose 1 or more.")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: ArrayLike, target: ArrayLike, n: int) -> Floats:
    r"""Expected target reward of the completion that the proxy likes best among n, for each prompt.

    Averages over *all* ways to draw n of the N completions without drawing any: with the completions sorted
    by proxy, upwards, $E = \sum_{i=n}^{N} \binom{i-1}{n-1} / \binom{N}{n} \cdot t_{(i)}$. Unbiased.
    Completions of equal proxy reward are chosen from by chance, so their order does not matter.

    Args:
        proxy: Rewards that choose, shape (prompts, N).
        target: Rewards that are looked at, usually gold, shape (prompts, N).
        n: How many completions are drawn, 1 to N.

    Returns:
        One expected target reward a prompt, shape (prompts,).

    Raises:
        ConfigError: n is not between 1 and N.
        DataError: a reward is not finite, or there are none.
        ShapeError: the two do not have the same two dimensions.

    Numerics:
        Binomials by `lgamma`; the weights sum to 1 within 1e-9 for N up to 12,600.

    Source:
        Nakano et al. 2021, arXiv:2112.09332, appendix I; Coste et al. 2023, arXiv:2310.02743. Slow forms (all
        subsets, and Monte Carlo): tests/reference/best_of_n.py.
    """
    choosing, looked_at = _checked_table(proxy, "proxy"), _checked_table(target, "target")
    if choosing.shape != looked_at.shape:
        raise ShapeError(
            f"best of n: proxy has shape {choosing.shape}, target {looked_at.shape}; expected the same."
        )
    weights = _order_weights(choosing.shape[1], n)
    return np.array([_untied(p, t) @ weights for p, t in zip(choosing, looked_at, strict=True)])


def curve(
    proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int], *, seed: int = 0, num_resamples: int = 2000
) -> BestOfNCurve:
    """Gold and proxy reward of best-of-n for each n, with 95 % bootstrap intervals of gold over the prompts.

    A proxy that is worth following lets gold rise with n; gold that falls while the proxy rises is
    over-optimization.

    Args:
        proxy: Rewards that choose, shape (prompts, N).
        gold: True rewards, shape (prompts, N).
        ns: Values of n, each 1 to N; sorted and made unique.
        seed: Seed of the bootstrap; the same prompts are drawn for every n.
        num_resamples: How often the prompts are drawn anew.

    Raises:
        ConfigError: no n, or one that is not between 1 and N.
        DataError: a reward is not finite, or there are none.
        ShapeError: proxy and gold do not have the same two dimensions.
    """
    if not ns:
        raise ConfigError("best of n: ns is empty; give at least one n, for example 1, 2, 4, 8.")
    ordered = sorted(set(ns))
    chosen_gold = [best_of_n(proxy, gold, n) for n in ordered]
    intervals = [bootstrap_interval(row, seed=seed, num_resamples=num_resamples) for row in chosen_gold]
    return BestOfNCurve(
        n=ordered,
        gold=[interval.value for interval in intervals],
        low=[interval.low for interval in intervals],
        high=[interval.high for interval in intervals],
        proxy=[float(best_of_n(proxy, proxy, n).mean()) for n in ordered],
    )


def _order_weights(total: int, n: int) -> Floats:
    """Chance that the i-th smallest of `total` is the largest of n drawn ones; shape (total,)."""
    if not 1 <= n <= total:
        raise ConfigError(
            f"n={n} cannot be drawn from {total} completions a prompt; choose n from 1 to {total}."
        )
    weights = np.zeros(total)
    whole = _log_binomial(total, n)
    for i in range(n, total + 1):
        weights[i - 1] = math.exp(_log_binomial(i - 1, n - 1) - whole)
    return weights


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _untied(proxy: Floats, target: Floats) -> Floats:
    """Target sorted by proxy, upwards; among equal proxies everyone gets the mean of their targets."""
    _, group, size = np.unique(proxy, return_inverse=True, return_counts=True)
    means = np.bincount(group, weights=target) / size
    return np.repeat(means, size)


def _checked_table(values: ArrayLike, what: str) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ShapeError(
            f"best of n: {what} has shape {table.shape}; expected (prompts, completions), none of them 0."
        )
    if not np.isfinite(table).all():
        prompt, column = np.argwhere(~np.isfinite(table))[0]
        raise DataError(
            f"best of n: {what} of prompt {prompt}, completion {column} is not finite; "
            f"got {float(table[prompt, column])!r}; check the rewards."
        )
    return table
