"""How often labels tell the two sides apart, and how often they agree with the people who chose."""

from collections.abc import Sequence
from typing import NamedTuple

from prefmoe.records import PreferencePair


class LabelCounts(NamedTuple):
    """What the labels of one capability look like within one task (`None`: pairs without a task).

    Attributes:
        pairs: Pairs of the task, labelled or not.
        chosen: Labels 1: the completion that people preferred is the better one here too.
        rejected: Labels -1.
        ties: Labels 0.
    """

    task: str | None
    capability: str
    pairs: int
    chosen: int
    rejected: int
    ties: int

    @property
    def separation(self) -> float:
        """Share of the task's pairs whose two sides the label tells apart, in [0, 1]."""
        return (self.chosen + self.rejected) / self.pairs

    @property
    def agreement(self) -> float | None:
        """Share of the pairs told apart where the label sides with the human choice; None if no pair is."""
        told_apart = self.chosen + self.rejected
        return self.chosen / told_apart if told_apart else None


def count_labels(pairs: Sequence[PreferencePair]) -> list[LabelCounts]:
    """Counts for each task and each capability labelled in it, in the order in which they first appear."""
    num_pairs: dict[str | None, int] = {}
    sides: dict[tuple[str | None, str], list[int]] = {}
    for pair in pairs:
        num_pairs[pair.task] = num_pairs.get(pair.task, 0) + 1
        for capability, side in pair.capabilities.items():
            sides.setdefault((pair.task, capability), []).append(side)
    return [
        LabelCounts(task, capability, num_pairs[task], found.count(1), found.count(-1), found.count(0))
        for (task, capability), found in sides.items()
    ]
