"""From answers in both orders to labels, and how far the judge can be trusted on each point.

A label is kept only if the two answers agree once the swap is undone. For a judge that is right with probability a on
average, with a position bias b (right with a + b where the better completion comes first, a - b where it comes second),
whose two answers are independent, the kept labels are right with

    (a^2 - b^2) / (a^2 - b^2 + (1 - a)^2 - b^2),

for a = 0.75 and b = 0.15 with 0.931 instead of 0.75, on 0.58 of the pairs.

Source:
    DMoERM (arXiv 2403.01197) and its release, prepare_data/main.py.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log
from statistics import median
from typing import NamedTuple

from prefmoe.labeling.judge.answers import Answer
from prefmoe.labeling.judge.intervals import Interval, clustered_share
from prefmoe.labeling.judge.store import Stored
from prefmoe.labeling.judge.wording import FIRST, SECOND, TIE

_SMALLEST = 1e-9  # an answer that is not among the likeliest ones


class Verdict(NamedTuple):
    """What a judge said on one point of a pair, in both orders.

    Attributes:
        given: With the chosen completion first. `swapped`: with the rejected one first.
    """

    task: str
    given: Answer
    swapped: Answer

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """The side that each order prefers: 1 chosen, -1 rejected, 0 neither, None unusable."""
        side = {FIRST: 1, SECOND: -1, TIE: 0, None: None}
        undone = side[self.swapped.choice]
        return side[self.given.choice], None if undone is None else -undone

    @property
    def label(self) -> int | None:
        """The side that both orders prefer; None if they differ or one is unusable."""
        given, swapped = self.sides
        return given if given == swapped else None

    @property
    def chosen_probability(self) -> float | None:
        """Soft label: the probability that the chosen completion is better, a tie counting one half.

        Mean over both orders, so that what a judge gives to the first place cancels; a fraction in [0, 1]. None
        without log-probabilities.
        """
        if self.given.probabilities is None or self.swapped.probabilities is None:
            return None
        first, _, tie = self.given.probabilities
        _, second, swapped_tie = self.swapped.probabilities
        return (first + tie / 2 + second + swapped_tie / 2) / 2


Verdicts = Mapping[str, Mapping[str, Verdict]]
"""Hash of a pair -> point -> verdict."""


def collect_verdicts(
    stored: Iterable[Stored], *, groups: Iterable[str] | None = None
) -> dict[str, dict[str, Verdict]]:
    """The verdicts of which both orders are there.

    Args:
        stored: Answers of one judge, oldest first; of a point that was asked in several wordings the newest counts.
        groups: Only answers to these questions; None takes all.
    """
    wanted = None if groups is None else set(groups)
    halves: dict[tuple[str, str], Stored] = {}
    verdicts: dict[str, dict[str, Verdict]] = {}
    for one in stored:
        if wanted is not None and one.group not in wanted:
            continue
        other = halves.pop((one.group, one.point), None)
        if other is None:
            halves[one.group, one.point] = one
            continue
        given, swapped = (other, one) if one.swapped else (one, other)
        verdicts.setdefault(one.pair, {})[one.point] = Verdict(one.task, given.answer, swapped.answer)
    return verdicts


def calibrate(verdicts: Verdicts) -> dict[str, dict[str, Verdict]]:
    r"""The same verdicts without the judge's own preference for a place.

    Of every point, $b$ is the median over all its answers, both orders, of $\log p_1 - \log p_2$: 0 for a judge
    without such a preference, since each completion stands first as often as second. "1" then counts where
    $\log p_1 - \log p_2 > b$, "2" where it is smaller. Ties and answers without probabilities stay as they are. A weak
    model that says "1" to everything is thereby asked which of the two makes it say so more.

    Source:
        Zhao et al. 2021, arXiv:2102.09690 (contextual calibration), with the median of the real questions in the
        place of a content-free one.
    """
    odds: dict[tuple[str, str], list[float]] = {}
    for points in verdicts.values():
        for point, verdict in points.items():
            found = odds.setdefault((verdict.task, point), [])
            found += [
                value for value in map(_log_odds, (verdict.given, verdict.swapped)) if value is not None
            ]
    bias = {key: median(values) for key, values in odds.items() if values}
    return {
        pair: {
            point: verdict._replace(
                given=_shifted(verdict.given, bias.get((verdict.task, point))),
                swapped=_shifted(verdict.swapped, bias.get((verdict.task, point))),
            )
            for point, verdict in points.items()
        }
        for pair, points in verdicts.items()
    }


def _log_odds(answer: Answer) -> float | None:
    """Of "1" against "2", nats; None for ties, unusable answers and those without probabilities."""
    if answer.choice not in (FIRST, SECOND) or answer.probabilities is None:
        return None
    first, second, _ = (max(share, _SMALLEST) for share in answer.probabilities)
    return log(first) - log(second)


def _shifted(answer: Answer, bias: float | None) -> Answer:
    odds = _log_odds(answer)
    if odds is None or bias is None or odds == bias:
        return answer
    return replace(answer, choice=FIRST if odds > bias else SECOND)


@dataclass(frozen=True)
class PointQuality:
    """How a judge does on one point of one task.

    Attributes:
        pairs: Pairs asked in both orders.
        agreement: Share of the pairs with two usable answers whose answers agree; None without such pairs.
        first: Share of "first" among the answers that are no tie, with its 95 % interval; 0.5 is no position bias.
        ties: Share of ties among the usable answers.
        soft_chosen: Share of soft labels above one half, so on the side that was chosen; one half itself counts half.
            With its 95 % interval; None without probabilities.
        labels: Kept labels by side.
        reasons: Unusable answers by reason.
    """

    task: str
    point: str
    pairs: int
    agreement: Interval | None
    first: Interval | None
    ties: float | None
    soft_chosen: Interval | None = None
    labels: Mapping[int, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Share of the pairs that get a label."""
        return sum(self.labels.values()) / self.pairs


def measure_points(verdicts: Verdicts, *, seed: int = 0) -> list[PointQuality]:
    """Quality of every point of every task, in the order in which they first appear."""
    found: dict[tuple[str, str], list[Verdict]] = {}
    for points in verdicts.values():
        for point, verdict in points.items():
            found.setdefault((verdict.task, point), []).append(verdict)
    return [_measure(task, point, rows, seed) for (task, point), rows in found.items()]


def _measure(task: str, point: str, verdicts: Sequence[Verdict], seed: int) -> PointQuality:
    answers = [answer for verdict in verdicts for answer in (verdict.given, verdict.swapped)]
    usable = Counter(answer.choice for answer in answers if answer.choice is not None)
    both = [verdict.sides for verdict in verdicts if None not in verdict.sides]
    first = [sum(one.choice == FIRST for one in (verdict.given, verdict.swapped)) for verdict in verdicts]
    decided = [
        sum(one.choice in (FIRST, SECOND) for one in (verdict.given, verdict.swapped)) for verdict in verdicts
    ]
    soft = [share for verdict in verdicts if (share := verdict.chosen_probability) is not None]
    return PointQuality(
        task,
        point,
        len(verdicts),
        agreement=clustered_share([given == swapped for given, swapped in both], [1] * len(both), seed=seed),
        first=clustered_share(first, decided, seed=seed),
        ties=usable[TIE] / usable.total() if usable else None,
        soft_chosen=clustered_share(
            [(share > 0.5) + (share == 0.5) / 2 for share in soft], [1] * len(soft), seed=seed
        ),
        labels=Counter(verdict.label for verdict in verdicts if verdict.label is not None),
        reasons=Counter(answer.reason for answer in answers if answer.reason is not None),
    )
