"""Labels that the rows already carry: their `capabilities`, or numeric columns turned into it on reading."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from prefmoe.labeling.interface import Labels
from prefmoe.records import PreferencePair


@dataclass(frozen=True, slots=True)
class ColumnLabeler:
    """Repeats the labels of the rows themselves, for the capabilities it names and no others.

    Attributes:
        capabilities: Which of the rows' capabilities to use.
    """

    capabilities: tuple[str, ...]
    name: str = "columns"

    @classmethod
    def from_pairs(cls, pairs: Sequence[PreferencePair]) -> Self:
        """A labeler for every capability that stands in `pairs`, in the order in which they first appear."""
        return cls(tuple(dict.fromkeys(name for pair in pairs for name in pair.capabilities)))

    def label(self, pairs: Sequence[PreferencePair]) -> list[Labels]:
        """The labels that each pair carries, cut down to the named capabilities."""
        return [
            {name: pair.capabilities[name] for name in self.capabilities if name in pair.capabilities}
            for pair in pairs
        ]
