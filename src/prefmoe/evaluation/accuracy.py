"""Share of pairs that are ranked right, and how sure we can be of it (bootstrap over prompts)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefmoe.errors import ConfigError, DataError, ShapeError

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and the ends of its bootstrap interval, all in the unit of the estimate."""

    value: float
    low: float
    high: float


def pair_hits(margins: ArrayLike) -> Floats:
    """What each pair counts: 1 for a margin above 0, 0 below, one half for a tie.

    Args:
        margins: reward(chosen) - reward(rejected), reward units, shape (pairs,).

    Raises:
        DataError: there are no margins, or one is not a finite number.
        ShapeError: not one number a pair.
    """
    return (np.sign(checked_row(margins, "margins")) + 1) / 2


def pairwise_accuracy(margins: ArrayLike) -> float:
    """Share of pairs whose chosen completion has the higher reward; a fraction, ties count one half.

    Args:
        margins: reward(chosen) - reward(rejected), reward units, shape (pairs,).

    Raises:
        DataError: there are no margins, or one is not a finite number.

    Example:
        >>> pairwise_accuracy([0.3, -0.1, 0.0, 2.0])
        0.625
    """
    return float(pair_hits(margins).mean())


def macro_accuracy(hits: Mapping[str, ArrayLike]) -> float:
    """Mean over the tasks of each task's accuracy, so that a large task weighs as much as a small one.

    Args:
        hits: For each task what `pair_hits` gave.

    Raises:
        DataError: no task, or a task without pairs.
    """
    rows = _checked_tasks(hits)
    return float(np.mean([row.mean() for row in rows.values()]))


def bootstrap_interval(
    values: ArrayLike,
    *,
    seed: int,
    num_resamples: int = 2000,
    level: float = 0.95,
    prompt_ids: Sequence[str] | None = None,
) -> Interval:
    """Mean of the values with its percentile bootstrap interval.

    Whole prompts are drawn with replacement, never single pairs of one prompt: pairs that share a prompt
    are not independent, and an interval that ignores this is too narrow. The interval of very few prompts
    is too narrow all the same (all hits give a width of 0).

    Args:
        values: Hits of pairs, or any number a row, shape (rows,).
        seed: Same seed, same interval.
        num_resamples: How often the rows are drawn anew.
        level: Share of the resampled means inside the interval, in (0, 1).
        prompt_ids: The prompt of each row. None means every row has its own.

    Raises:
        ConfigError: `level` or `num_resamples` cannot work.
        DataError: no values, or one is not finite.
        ShapeError: not one prompt id a value.

    Source:
        Efron and Tibshirani 1993, chapter 13. Slow form: tests/reference/accuracy.py.
    """
    row = checked_row(values, "values")
    ids = None if prompt_ids is None else {"": prompt_ids}
    each = _resampled_tasks({"": row}, prompt_ids=ids, seed=seed, num_resamples=num_resamples)
    return _percentiles(float(row.mean()), each[:, 0], level)


def macro_interval(
    hits: Mapping[str, ArrayLike],
    *,
    seed: int,
    worst: bool = False,
    num_resamples: int = 2000,
    level: float = 0.95,
    prompt_ids: Mapping[str, Sequence[str]] | None = None,
) -> Interval:
    """Mean over the tasks of each task's accuracy, or the accuracy of the worst one, with its bootstrap interval.

    The worst of several estimates is on average below the worst of what they estimate, and so is its interval.

    Args:
        hits: For each task what `pair_hits` gave.
        seed: Same seed, same interval.
        worst: The smallest accuracy in place of the mean.
        num_resamples: How often the prompts of each task are drawn anew.
        level: Share of the resampled numbers inside the interval, in (0, 1).
        prompt_ids: For each task the prompt of each pair. None means every pair has its own.

    Raises:
        ConfigError: `level` or `num_resamples` cannot work.
        DataError: no task, or a task without pairs.
        ShapeError: not one prompt id a pair.

    Source:
        As `bootstrap_interval`.
    """
    rows = _checked_tasks(hits)
    each = _resampled_tasks(rows, prompt_ids=prompt_ids, seed=seed, num_resamples=num_resamples)
    summarize = np.min if worst else np.mean
    value = float(summarize([row.mean() for row in rows.values()]))
    return _percentiles(value, np.asarray(summarize(each, axis=1)), level)


def standard_error(values: ArrayLike, *, prompt_ids: Sequence[str] | None = None) -> float:
    """Standard error of the mean of the values, in their unit; infinite where there is only one prompt.

    Pairs of one prompt count as one draw, as in `bootstrap_interval`.

    Args:
        values: Hits of pairs, differences of hits, or any number a row, shape (rows,).
        prompt_ids: The prompt of each row. None means every row has its own.

    Raises:
        DataError: no values, or one is not finite.
        ShapeError: not one prompt id a value.

    Source:
        The usual one of a mean over clusters (Liang and Zeger 1986). Slow form: tests/reference/accuracy.py.

    Example:
        >>> standard_error([0.0, 1.0]), standard_error([0.0, 1.0], prompt_ids=["a", "a"])
        (0.5, inf)
    """
    row = checked_row(values, "values")
    sums, _ = _prompt_totals(row - row.mean(), prompt_ids)
    if len(sums) < 2:
        return float("inf")
    return float(np.sqrt(np.square(sums).sum() * len(sums) / (len(sums) - 1)) / len(row))


def paired_bootstrap(
    hits_a: Mapping[str, ArrayLike],
    hits_b: Mapping[str, ArrayLike],
    *,
    seed: int,
    num_resamples: int = 2000,
    level: float = 0.95,
    prompt_ids: Mapping[str, Sequence[str]] | None = None,
) -> Interval:
    """Macro accuracy of `a` minus that of `b`, with a bootstrap interval of the difference.

    Both methods saw the same pairs, so both are resampled together, within each task:
    what is hard for both cancels.

    Args:
        hits_a: For each task what `pair_hits` gave for method a.
        hits_b: The same tasks and pairs, in the same order, for method b.
        seed: Same seed, same interval, whatever the order of the tasks.
        num_resamples: How often the prompts are drawn anew.
        level: Share of the resampled differences inside the interval, in (0, 1).
        prompt_ids: For each task the prompt of each pair. None means every pair has its own.

    Raises:
        DataError: the tasks differ, or one has no pairs.
        ShapeError: a task has not the same number of pairs in `a`, `b` and `prompt_ids`.

    Source:
        Koehn 2004, "Statistical significance tests for machine translation evaluation", with the clusters
        of `bootstrap_interval`. Slow form: tests/reference/accuracy.py.
    """
    rows_a, rows_b = _checked_tasks(hits_a), _checked_tasks(hits_b)
    if rows_a.keys() != rows_b.keys():
        raise DataError(
            f"paired bootstrap: the two methods were measured on other tasks; got {sorted(rows_a)} and "
            f"{sorted(rows_b)}; measure both on the same pairs."
        )
    for task, row in rows_a.items():
        _check_same_length(
            rows_b[task], len(row), f"paired bootstrap: hits of the second method, task {task!r}"
        )
    # With the same draws, the difference of two means is the mean of the differences.
    differences = {task: row - rows_b[task] for task, row in rows_a.items()}
    return macro_interval(
        differences, prompt_ids=prompt_ids, seed=seed, num_resamples=num_resamples, level=level
    )


def checked_row(values: ArrayLike, what: str) -> Floats:
    """The values as float64, shape (rows,): at least one, all finite; `what` names them in the error.

    Raises:
        DataError: there are none, or one is not a finite number.
        ShapeError: not a plain row of numbers.
    """
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1:
        raise ShapeError(f"{what}: not a row of numbers; got shape {row.shape}; expected (rows,).")
    if row.size == 0:
        raise DataError(f"{what}: there are none; at least one is needed.")
    bad = np.flatnonzero(~np.isfinite(row))
    if bad.size:
        raise DataError(
            f"{what}: {bad.size} of {row.size} are not finite; got {float(row[bad[0]])!r} in row {bad[0]}; "
            "check the rewards they were made from."
        )
    return row


def _checked_tasks(hits: Mapping[str, ArrayLike]) -> dict[str, Floats]:
    if not hits:
        raise DataError("accuracy: there is no task; at least one is needed.")
    return {task: checked_row(row, f"task {task!r}") for task, row in hits.items()}


def _check_same_length(rows: Sequence[object] | Floats, expected: int, what: str) -> None:
    if len(rows) != expected:
        raise ShapeError(f"{what}: got {len(rows)} rows; expected {expected}, one a pair.")


def _resampled_tasks(
    tasks: Mapping[str, Floats],
    *,
    prompt_ids: Mapping[str, Sequence[str]] | None,
    seed: int,
    num_resamples: int,
) -> Floats:
    """Mean of every task in every resample, shape (num_resamples, tasks)."""
    if num_resamples < 1:
        raise ConfigError(f"num_resamples={num_resamples} gives no interval; choose 1 or more, usually 2000.")
    rng = np.random.default_rng(seed)
    means = np.zeros((num_resamples, len(tasks)))
    for column, task in enumerate(sorted(tasks)):
        sums, sizes = _prompt_totals(tasks[task], None if prompt_ids is None else prompt_ids.get(task, ()))
        for resample in range(num_resamples):  # a loop, so that memory stays small for 10^6 pairs
            drawn = rng.integers(len(sums), size=len(sums))
            means[resample, column] = sums[drawn].sum() / sizes[drawn].sum()
    return means


def _prompt_totals(values: Floats, prompt_ids: Sequence[str] | None) -> tuple[Floats, Floats]:
    """Sum of the values of each prompt, and how many there are; each of shape (prompts,)."""
    if prompt_ids is None:
        return values, np.ones(len(values))
    _check_same_length(prompt_ids, len(values), "prompt_ids")
    _, prompts = np.unique(np.asarray(prompt_ids, dtype=np.str_), return_inverse=True)
    sums: Floats = np.bincount(prompts, weights=values).astype(np.float64)
    return sums, np.bincount(prompts).astype(np.float64)


def _percentiles(value: float, resampled: Floats, level: float) -> Interval:
    if not 0 < level < 1:
        raise ConfigError(f"level={level} is not a share; choose a number between 0 and 1, usually 0.95.")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
