"""Shares and Cohen's kappa with bootstrap intervals that draw whole clusters (a pair, or a prompt with its pairs)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_RESAMPLES = 2000
_LEVEL = 0.95
_Z = 1.96  # its normal quantile
_DRAWS_AT_ONCE = 200_000


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def clustered_share(hits: Sequence[float], totals: Sequence[float], *, seed: int) -> Interval | None:
    """Sum of hits over sum of totals, each cluster giving one of both; None if nothing was counted.

    The interval is a bootstrap over clusters; where all hit or none does, every resample is the same, and it is
    Wilson's (1927) for as many draws as there are clusters.
    """
    counts = np.array([hits, totals], dtype=np.float64).T.reshape(-1, 2)
    if not counts[:, 1].sum():
        return None
    found = clustered_bootstrap(
        counts, lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1e-300), seed=seed
    )
    doubt = _Z**2 / (np.count_nonzero(counts[:, 1]) + _Z**2)
    if found.value == 0.0:
        return found._replace(high=doubt)
    return found._replace(low=1.0 - doubt) if found.value == 1.0 else found


def clustered_bootstrap(counts: Floats, statistic: Callable[[Floats], Floats], *, seed: int) -> Interval:
    """A statistic of summed counts, with its percentile interval over clusters drawn with replacement.

    Args:
        counts: What each cluster counts, shape (clusters, cells).
        statistic: From sums, shape (..., cells), to one number each, shape (...).
        seed: Same seed, same interval.

    Source:
        Efron and Tibshirani 1993, chapter 13.
    """
    rng = np.random.default_rng(seed)
    size = len(counts)
    at_once = max(1, _DRAWS_AT_ONCE // size)  # memory stays small for 10^6 clusters
    drawn = np.concatenate(
        [
            counts[rng.integers(size, size=(min(at_once, _RESAMPLES - start), size))].sum(axis=1)
            for start in range(0, _RESAMPLES, at_once)
        ]
    )
    low, high = np.quantile(statistic(drawn), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(statistic(counts.sum(axis=0))), float(low), float(high))


def cohens_kappa(table: Floats) -> Floats:
    r"""Agreement beyond chance, $\kappa = (p_o - p_e) / (1 - p_e)$; 1 is perfect, 0 is chance.

    Args:
        table: How often the first labeler said i and the second j, shape (..., n * n), row after row.

    Returns:
        Shape (...); 0 where chance alone agrees always (both always say the same thing), 1 / 0 being undefined.

    Source:
        Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    side = round(table.shape[-1] ** 0.5)
    shares = table.reshape(*table.shape[:-1], side, side)
    shares = shares / np.maximum(shares.sum(axis=(-1, -2), keepdims=True), 1e-300)
    observed = np.trace(shares, axis1=-2, axis2=-1)
    expected = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    beyond = 1.0 - expected
    kappa: Floats = np.where(beyond > 1e-12, (observed - expected) / np.maximum(beyond, 1e-12), 0.0)
    return kappa
