"""The report of a run: one HTML file that a person can read without the code, and without a network."""

import base64
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from prefmoe.evaluation import pictures
from prefmoe.evaluation.files import write_text
from prefmoe.evaluation.metrics import Metrics, PairedMetrics, TaskMetrics
from prefmoe.evaluation.pictures import Picture
from prefmoe.evaluation.run_folder import FILES, LogLine, RunFolder, ScoredPair, read_run
from prefmoe.evaluation.training_log import aggregator_choices, split_counts, training_series
from prefmoe.evaluation.wording import (
    AGGREGATORS,
    METHODS,
    Wording,
    method_name,
    phase_wording,
    step_name,
)

FEW_PAIRS = 30  # below this many pairs a bootstrap interval is too narrow to be trusted


class CapabilityRow(NamedTuple):
    """A capability of an example: both scores, and their difference as a share of the largest one."""

    name: str
    chosen: float
    rejected: float
    share: float


class Difference(NamedTuple):
    """A paired difference, and what it means in words."""

    subject: str
    other: str
    interval: PairedMetrics
    verdict: str


class TrainingCurve(NamedTuple):
    """The picture of one phase of one method, with its wording."""

    method: str
    wording: Wording
    picture: Picture


def build_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run folder, from the files that are there, and gives its path.

    The file is self-contained: pictures are inside it, it has no script and loads nothing. The same run
    folder gives the same file.

    Args:
        run_dir: A folder written by training or evaluation; see `run_folder.FILES` for what is read.

    Raises:
        DataError: the folder is missing, holds none of the files, or one of them is damaged.
        PrefmoeError: the report cannot be written.
    """
    run = read_run(run_dir)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"image": _image, "signed": _signed}
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    path = run_dir / "report.html"
    write_text(path, environment.from_string(template).render(_content(run)))
    return path


def _content(run: RunFolder) -> dict[str, object]:
    """Everything the template names."""
    tasks = _tasks(run.metrics)
    return {
        "run": run,
        "name": run.path.resolve().name,
        "tasks": tasks,
        "methods": {name: METHODS.get(name, Wording(name, "")) for name in _methods(run)},
        "method_name": method_name,
        "differences": _differences(run.metrics),
        "bars": pictures.accuracy_bars(run.metrics) if run.metrics and tasks else None,
        "curves": pictures.best_of_n_curves(run.curves) if run.curves else None,
        "confusion": pictures.router_confusion(run.confusion) if run.confusion else None,
        "correlations": {
            task: pictures.expert_correlation(task, correlation)
            for task, correlation in run.correlations.items()
            if len(correlation.experts) > 1
        },
        "training": _training(run.log),
        "splits": split_counts(run.log),
        "choices": aggregator_choices(run.log),
        "aggregator_names": AGGREGATORS,
        "step_name": step_name,
        "capability_rows": _capability_rows,
        "few_pairs": FEW_PAIRS,
        "missing": {name: FILES[name] for name in run.missing},
        "version": metadata.version("prefmoe"),
    }


def _tasks(metrics: Metrics | None) -> dict[str, dict[str, TaskMetrics]]:
    """The table of accuracies the other way round: for each task its methods."""
    table: dict[str, dict[str, TaskMetrics]] = {}
    for method, result in (metrics.methods if metrics else {}).items():
        for task, cell in result.tasks.items():
            table.setdefault(task, {})[method] = cell
    return table


def _methods(run: RunFolder) -> list[str]:
    measured = run.metrics.methods if run.metrics else {}
    return list(dict.fromkeys([*measured, *run.curves]))


def _differences(metrics: Metrics | None) -> list[Difference]:
    found = []
    for key, interval in (metrics.paired if metrics else {}).items():
        subject, _, other = key.partition("-")
        found.append(Difference(subject, other, interval, _verdict(interval)))
    return found


def _verdict(interval: PairedMetrics) -> str:
    if interval.low > 0:
        return "better: the whole interval is above 0"
    if interval.high < 0:
        return "worse: the whole interval is below 0"
    return "no clear difference: the interval contains 0"


def _training(log: list[LogLine]) -> list[TrainingCurve]:
    """One picture for each method and phase that has curves, in the order in which they were first logged."""
    groups: dict[tuple[str, str], list[LogLine]] = {}
    for line in log:
        groups.setdefault((line.method, line.phase), []).append(line)
    curves = []
    for (method, phase), lines in groups.items():
        series = training_series(lines)
        if series is not None:
            wording = phase_wording(phase)
            curves.append(TrainingCurve(method, wording, pictures.training_curve(wording.name, series)))
    return curves


def _capability_rows(pair: ScoredPair) -> list[CapabilityRow]:
    """The capabilities that both sides were scored on, the one that tells them apart most first."""
    chosen, rejected = pair.chosen.capabilities, pair.rejected.capabilities
    differences: Mapping[str, float] = {
        name: chosen[name] - rejected[name] for name in chosen if name in rejected
    }
    largest = max((abs(value) for value in differences.values()), default=0.0) or 1.0
    rows = [
        CapabilityRow(name, chosen[name], rejected[name], value / largest)
        for name, value in differences.items()
    ]
    return sorted(rows, key=lambda row: -abs(row.share))


def _image(picture: Picture) -> Markup:
    data = base64.b64encode(picture.png).decode("ascii")
    tag = Markup('<img src="data:image/png;base64,{}" width="{}" alt="{}">')
    return tag.format(data, picture.width, picture.alt)


def _signed(value: float) -> str:
    """Three digits with a sign, a true minus, and no sign on what is rounded to 0."""
    return f"{round(value, 3):+.3f}".replace("-", "−") if round(value, 3) else "0.000"
