"""What the lines of `metrics.jsonl` say, as the tables and curves of the report."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefmoe.evaluation.run_folder import LogLine

Series = Sequence[tuple[int, float]]
"""(step, value) with rising steps."""


class SplitCounts(NamedTuple):
    """How many pairs a split has, how many of them lost tokens, and how many became ties by that."""

    pairs: int
    truncated: int
    equal: int


class AggregatorChoice(NamedTuple):
    """Phase 3 of one task: the kind that was kept, and the accuracy of each kind on pairs it was not fitted on."""

    kept: str
    evidence: dict[str, float]


class TrainingSeries(NamedTuple):
    """What is drawn of one phase.

    Attributes:
        losses: "training" and "validation", in nats.
        mean: Validation accuracy, mean of all experts.
        experts: Validation accuracy of each expert.
    """

    losses: Mapping[str, Series]
    mean: Series
    experts: Mapping[str, Series]


def split_counts(log: Sequence[LogLine]) -> dict[str, SplitCounts]:
    """Counts of every split, as the last sitting of the run found them."""
    found = [_extra(line) for line in log if line.phase == "data"]
    return {
        str(line["split"]): SplitCounts(*(int(line.get(name, 0)) for name in SplitCounts._fields))
        for line in found
        if line.get("pairs")
    }


def aggregator_choices(log: Sequence[LogLine]) -> dict[str, AggregatorChoice]:
    """What phase 3 kept for every task."""
    choices = {}
    for line in (_extra(line) for line in log if line.phase == "phase3"):
        evidence = {
            k.removeprefix("evidence/"): float(v) for k, v in line.items() if k.startswith("evidence/")
        }
        if "task" in line:
            choices[str(line["task"])] = AggregatorChoice(str(line.get("kept", "")), evidence)
    return choices


def training_series(lines: Sequence[LogLine]) -> TrainingSeries | None:
    """The curves of one phase; None if nothing was logged at two steps or more."""
    series = _series(lines)
    losses = {"training": series.get("loss", []), "validation": series.get("eval_loss", [])}
    prefix = "eval_accuracy/"
    experts = {name.removeprefix(prefix): s for name, s in series.items() if name.startswith(prefix)}
    found = TrainingSeries({k: s for k, s in losses.items() if s}, series.get("eval_accuracy", []), experts)
    return found if any(len(s) > 1 for s in [*found.losses.values(), found.mean]) else None


def _series(lines: Sequence[LogLine]) -> dict[str, list[tuple[int, float]]]:
    """All numbers by name, with rising steps; a step logged twice, as after a resume, counts once."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in _extra(line).items():
            if isinstance(value, int | float):
                found.setdefault(name, {})[line.step] = float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def _extra(line: LogLine) -> Mapping[str, Any]:
    return line.model_extra or {}
