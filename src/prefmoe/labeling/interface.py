"""What a labeler is, and how the labels of several labelers come together in the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from prefmoe.errors import DataError
from prefmoe.records import PreferencePair

Labels = Mapping[str, int]
"""Capability -> 1 (chosen is better), -1 (rejected is better) or 0 (a tie). Missing: nobody can tell."""


class Labeler(Protocol):
    """Something that says which side of a pair is better on named capabilities.

    Columns, rules and an LLM judge are the three kinds. A labeler gets all pairs in one call, so that a slow
    or paid one is free to batch, to run requests side by side, to store what it has and to go on after an
    interruption. A label depends on its own pair only.
    """

    @property
    def name(self) -> str:
        """Short name for messages and reports, such as "rules" or "gpt-4o-mini"."""

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Every capability this labeler may label, whatever the task."""

    def label(self, pairs: Sequence[PreferencePair]) -> list[Labels]:
        """One mapping for each pair, in order; a capability that cannot be judged there is left out."""


def apply_labels(
    pairs: Sequence[PreferencePair], labelers: Sequence[Labeler], *, keep_existing: bool = True
) -> list[PreferencePair]:
    """The same pairs with the labels of `labelers` in `capabilities`; the first who labels a point wins.

    Args:
        pairs: Pairs to label. They are not changed.
        labelers: In order of trust. Each one sees the pairs as given, not what the others said.
        keep_existing: True: labels that a row carries already win over every labeler. False: they are dropped
            first, and only what `labelers` say counts (put a ColumnLabeler among them to rank the columns).

    Returns:
        New pairs, in order.

    Raises:
        DataError: A labeler gave another number of rows than it got, a label other than 1, 0, -1, or a
            capability it did not announce.
    """
    merged: list[dict[str, int]] = [dict(pair.capabilities) if keep_existing else {} for pair in pairs]
    for labeler in labelers:
        for labels, found in zip(merged, _ask(labeler, pairs), strict=True):
            labels.update({name: side for name, side in found.items() if name not in labels})
    return [replace(pair, capabilities=labels) for pair, labels in zip(pairs, merged, strict=True)]


def _ask(labeler: Labeler, pairs: Sequence[PreferencePair]) -> list[Labels]:
    answers = labeler.label(pairs)
    if len(answers) != len(pairs):
        raise DataError(f"labeler {labeler.name!r}: gave labels for {len(answers)} of {len(pairs)} pairs")
    expected = labeler.capabilities
    for pair, found in zip(pairs, answers, strict=True):
        for name, side in found.items():
            where = f"labeler {labeler.name!r}, pair {pair.id!r}"
            if name not in expected:
                raise DataError(
                    f"{where}: {name!r} is not one of its capabilities; expected {_any_of(expected)}"
                )
            if side not in (1, 0, -1):
                raise DataError(
                    f"{where}: {name!r} is {side!r}; expected 1 (chosen), -1 (rejected) or 0 (tie)"
                )
    return answers


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))
