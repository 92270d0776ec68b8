"""Quality of labels as people read it in a terminal."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefmoe.labeling.judge.comparison import Comparison
from prefmoe.labeling.judge.intervals import Interval
from prefmoe.labeling.judge.verdicts import PointQuality

WEAK_AGREEMENT = 0.6
_ADVICE = (
    "reword its sentence so that one reading of the two answers decides it, ask one point a call, drop the point, or "
    "take a stronger judge"
)


def print_quality(judge: str, points: Sequence[PointQuality], console: Console) -> None:
    """What each point's answers are worth, why some could not be used, and a warning for each weak point."""
    table = Table("task", "point", title=f"Answers of {judge} in both orders", title_justify="left")
    has_soft = any(point.soft_chosen is not None for point in points)
    columns = ["pairs", "agree", "first", "ties", "kept", "labels"]
    for column in [*columns, "soft"] if has_soft else columns:
        table.add_column(column, justify="right")
    for point in points:
        sides = " : ".join(str(point.labels.get(side, 0)) for side in (1, 0, -1))
        cells = (
            _share(point.agreement),
            _interval(point.first),
            _number(point.ties),
            f"{point.kept:.2f}",
            sides,
        )
        soft = (_share(point.soft_chosen),) if has_soft else ()
        table.add_row(Text(point.task), Text(point.point), str(point.pairs), *cells, *soft)
    console.print(table)
    reasons: Counter[str] = Counter()
    for point in points:
        reasons.update(point.reasons)
    if reasons:
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        console.print(f"Unusable answers: {listed}", highlight=False)
    for point in points:
        if is_weak(point):
            console.print(_warning(point), highlight=False, markup=False, soft_wrap=True)


def is_weak(point: PointQuality) -> bool:
    """Whether the two orders agree on too few pairs."""
    return point.agreement is not None and point.agreement.value < WEAK_AGREEMENT


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Agreement point by point and by length, and the pairs in dispute."""
    title = f"{comparison.first} and {comparison.second}"
    table = Table("task", "point", title=title, title_justify="left")
    for column in ("pairs", "agreement", "Cohen's kappa (95 %)"):
        table.add_column(column, justify="right")
    for (task, point), found in comparison.points.items():
        table.add_row(
            Text(task), Text(point), str(found.pairs), f"{found.agreement:.2f}", _interval(found.kappa)
        )
    table.add_section()
    for band, found in comparison.lengths.items():
        table.add_row(
            "all", band, str(found.pairs), f"{found.agreement:.2f}", _interval(found.kappa), style="dim"
        )
    console.print(table)
    for pair_id, points in comparison.disputed:
        console.print(
            f"in dispute: {pair_id}: {', '.join(points)}", highlight=False, markup=False, soft_wrap=True
        )


def _warning(point: PointQuality) -> str:
    share = 0.0 if point.agreement is None else point.agreement.value
    return (
        f"warning: {point.task}/{point.point}: the two orders agree on {share:.0%} of the pairs, under "
        f"{WEAK_AGREEMENT:.0%}; {_ADVICE}"
    )


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.2f} ({interval.low:.2f}-{interval.high:.2f})"


def _share(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
