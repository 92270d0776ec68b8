"""What `prefmoe label report` prints."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from prefmoe.cli.label_tables import is_weak, print_comparison, print_quality
from prefmoe.errors import DataError
from prefmoe.labeling.files import SourceRow, read_rows
from prefmoe.labeling.judge.comparison import Agreement, Comparison, compare_all, gather_labels
from prefmoe.labeling.judge.questions import hash_pair
from prefmoe.labeling.judge.store import AnswerStore, default_store
from prefmoe.labeling.judge.verdicts import (
    PointQuality,
    Verdicts,
    calibrate,
    collect_verdicts,
    measure_points,
)


def print_report(
    files: Sequence[str], more_stores: Sequence[Path], *, num_disputed: int, as_json: bool, calibrated: bool
) -> None:
    """Quality of every judge in the stores, then every two labelers compared.

    Raises:
        DataError: nothing is labelled, or a file or store cannot be used.
    """
    rows = [row for file in files for row in read_rows(file)]
    beside = [default_store(file) for file in files if default_store(file).exists()]
    for path in more_stores:
        if not path.exists():
            raise DataError("no such store; check the path", path)
    with ExitStack() as opened:
        stores = [opened.enter_context(AnswerStore(path)) for path in dict.fromkeys([*beside, *more_stores])]
        verdicts = _verdicts(rows, stores, calibrated=calibrated)
    sources = gather_labels(rows, verdicts)
    quality = {judge: measure_points(found) for judge, found in verdicts.items()}
    if not sources:
        raise DataError("no pair is labelled and no store lies beside it; give --store", files[0])
    comparisons = compare_all([row.pair for row in rows], sources, num_disputed=num_disputed)
    if as_json:
        typer.echo(json.dumps(_as_json(quality, comparisons), indent=2, ensure_ascii=False))
        return
    people = Console(stderr=True)
    for judge, points in quality.items():
        print_quality(judge, points, people)
    for comparison in comparisons:
        print_comparison(comparison, people)


def _verdicts(
    rows: Sequence[SourceRow], stores: Sequence[AnswerStore], *, calibrated: bool
) -> dict[str, Verdicts]:
    """For every judge its verdicts on the pairs of the files."""
    pairs = {hash_pair(row.pair) for row in rows}
    found: dict[str, Verdicts] = {}
    for store in stores:
        for judge in store.judges():
            all_of_them = collect_verdicts(store.answers(judge))
            ours = {pair: points for pair, points in all_of_them.items() if pair in pairs}
            found[judge] = calibrate(ours) if calibrated else ours
    return found


def _as_json(quality: dict[str, list[PointQuality]], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "judges": {judge: [_point(point) for point in points] for judge, points in quality.items()},
        "comparisons": [
            {
                "first": one.first,
                "second": one.second,
                "points": [
                    {"task": task, "point": point, **_agreement(found)}
                    for (task, point), found in one.points.items()
                ],
                "lengths": {band: _agreement(found) for band, found in one.lengths.items()},
                "disputed": [{"id": pair_id, "points": list(points)} for pair_id, points in one.disputed],
            }
            for one in comparisons
        ],
    }


def _point(point: PointQuality) -> dict[str, Any]:
    return {
        "task": point.task,
        "point": point.point,
        "pairs": point.pairs,
        "agreement": point.agreement and point.agreement._asdict(),
        "first": point.first and point.first._asdict(),
        "ties": point.ties,
        "kept": point.kept,
        "labels": {str(side): point.labels.get(side, 0) for side in (1, 0, -1)},
        "soft_chosen": point.soft_chosen and point.soft_chosen._asdict(),
        "is_weak": is_weak(point),
        "unusable": dict(point.reasons),
    }


def _agreement(found: Agreement) -> dict[str, Any]:
    return {"pairs": found.pairs, "agreement": found.agreement, "kappa": found.kappa._asdict()}
