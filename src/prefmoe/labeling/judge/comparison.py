"""How far two labelers agree: on each point, where one completion is longer, and on which pairs not at all."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from prefmoe.data.split import prompt_hash
from prefmoe.labeling.files import SourceRow
from prefmoe.labeling.interface import Labels
from prefmoe.labeling.judge.intervals import Interval, clustered_bootstrap, cohens_kappa
from prefmoe.labeling.judge.questions import hash_pair
from prefmoe.labeling.judge.verdicts import Verdicts
from prefmoe.labeling.words import text_of
from prefmoe.records import PreferencePair

LengthBand = Literal["chosen longer", "about equal", "rejected longer"]
_ABOUT_EQUAL = 0.1  # share by which lengths may differ

_SIDES = (1, 0, -1)
_CELLS = len(_SIDES) ** 2

Sources = Mapping[str, Mapping[str, Labels]]
"""Labeler -> hash of a pair -> its labels."""


class Agreement(NamedTuple):
    """How far two labelers agree on the pairs that both have labelled.

    Attributes:
        pairs: Labelled by both.
        agreement: Share of them with the same label.
        kappa: Cohen's, agreement beyond chance, with its 95 % interval over prompts.
    """

    pairs: int
    agreement: float
    kappa: Interval


@dataclass(frozen=True)
class Comparison:
    """Two labelers side by side.

    Attributes:
        points: (task, point) -> agreement. `lengths`: the same over all points, by which side is longer.
        disputed: Ids of the pairs with the most opposite labels, most first, with the points in dispute.
    """

    first: str
    second: str
    points: Mapping[tuple[str, str], Agreement]
    lengths: Mapping[LengthBand, Agreement]
    disputed: Sequence[tuple[str, Sequence[str]]] = field(default_factory=list)


def gather_labels(rows: Iterable[SourceRow], judges: Mapping[str, Verdicts]) -> Sources:
    """Labels by who gave them: the rows' own, those that a labeler added to them, those of judges.

    What verdicts say of a judge wins over what rows say of it: they have also what was asked for comparison only.
    """
    sources: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        pair = hash_pair(row.pair)
        for point, side in row.pair.capabilities.items():
            sources.setdefault(row.labeled_by[point], {}).setdefault(pair, {})[point] = side
    for judge, verdicts in judges.items():
        sources[judge] = {
            pair: {point: v.label for point, v in points.items() if v.label is not None}
            for pair, points in verdicts.items()
        }
    return sources


def compare_all(
    pairs: Sequence[PreferencePair], sources: Sources, *, num_disputed: int = 10, seed: int = 0
) -> list[Comparison]:
    """Every two labelers that share a labelled point."""
    found = [
        _compare(pairs, sources, (first, second), num_disputed=num_disputed, seed=seed)
        for first, second in combinations(sorted(sources), 2)
    ]
    return [comparison for comparison in found if comparison.points]


class _Both(NamedTuple):
    """Labels of both on one point of one pair."""

    pair: PreferencePair
    point: str
    first: int
    second: int


def _compare(
    pairs: Sequence[PreferencePair], sources: Sources, names: tuple[str, str], *, num_disputed: int, seed: int
) -> Comparison:
    both = list(_labelled_by_both(pairs, sources[names[0]], sources[names[1]]))
    points: dict[tuple[str, str], list[_Both]] = {}
    lengths: dict[LengthBand, list[_Both]] = {}
    for one in both:
        points.setdefault((str(one.pair.task), one.point), []).append(one)
        lengths.setdefault(length_band(one.pair), []).append(one)
    return Comparison(
        *names,
        points={key: _agreement(rows, seed) for key, rows in points.items()},
        lengths={band: _agreement(rows, seed) for band, rows in sorted(lengths.items())},
        disputed=_disputed(both)[:num_disputed],
    )


def _labelled_by_both(
    pairs: Sequence[PreferencePair], first: Mapping[str, Labels], second: Mapping[str, Labels]
) -> Iterable[_Both]:
    seen: set[str] = set()
    for pair in pairs:
        key = hash_pair(pair)
        if key in seen:
            continue
        seen.add(key)
        ours, theirs = first.get(key, {}), second.get(key, {})
        for point in ours:
            if point in theirs:
                yield _Both(pair, point, ours[point], theirs[point])


def _agreement(rows: Sequence[_Both], seed: int) -> Agreement:
    prompts: dict[int, int] = {}
    counts = np.zeros((len(rows), _CELLS))
    for one in rows:
        cluster = prompts.setdefault(prompt_hash(one.pair.prompt), len(prompts))
        counts[cluster, _SIDES.index(one.first) * len(_SIDES) + _SIDES.index(one.second)] += 1
    counts = counts[: len(prompts)]
    same = sum(one.first == one.second for one in rows)
    return Agreement(len(rows), same / len(rows), clustered_bootstrap(counts, cohens_kappa, seed=seed))


def length_band(pair: PreferencePair) -> LengthBand:
    """Which side has more characters; a tenth more or less is about equal."""
    chosen, rejected = len(text_of(pair.chosen)), len(text_of(pair.rejected))
    if abs(chosen - rejected) <= _ABOUT_EQUAL * max(chosen, rejected):
        return "about equal"
    return "chosen longer" if chosen > rejected else "rejected longer"


def _disputed(both: Sequence[_Both]) -> list[tuple[str, list[str]]]:
    """Pairs by how far apart their labels are, summed over points: opposite sides count 2, a tie and a side 1."""
    distances: dict[str, int] = {}
    points: dict[str, list[str]] = {}
    for one in both:
        if one.first != one.second:
            distances[one.pair.id] = distances.get(one.pair.id, 0) + abs(one.first - one.second)
            points.setdefault(one.pair.id, []).append(one.point)
    ordered = sorted(distances, key=lambda pair_id: (-distances[pair_id], pair_id))
    return [(pair_id, points[pair_id]) for pair_id in ordered]
