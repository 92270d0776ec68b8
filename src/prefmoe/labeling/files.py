"""Files of pairs with labels added: what `prefmoe label` writes, and `prefmoe reward train` reads as it is."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefmoe.data.parse import parse_row
from prefmoe.data.read import read_pairs
from prefmoe.data.rows import Row, iter_rows
from prefmoe.data.write import write_parts
from prefmoe.labeling.interface import Labels
from prefmoe.records import Messages, PreferencePair

LABELED_BY = "labeled_by"
PROBABILITIES = "capability_probabilities"
OWN = "rows"
"""Who labelled what a row does not say: the rows themselves."""


class SourceRow(NamedTuple):
    """A pair with the row that it came from, and who gave its labels (point -> labeler; `rows` if it is not said)."""

    pair: PreferencePair
    values: Mapping[str, Any]
    labeled_by: Mapping[str, str]


def read_rows(
    source: str | Path, *, limit: int | None = None, tasks: Collection[str] | None = None
) -> list[SourceRow]:
    """Pairs of a file with all their columns.

    Args:
        source: As for `read_pairs`; of a folder or data set the training split.
        limit: Only so many, spread evenly over the tasks, each task's first ones. A larger limit adds pairs and
            drops none.
        tasks: With a limit, pairs of other tasks are left out; those without a task stay. None leaves out none.

    Raises:
        DataError: as for `read_pairs`.
    """
    pairs = read_pairs(source)  # names everything that is wrong; below, nothing is
    values = [row.values for row in iter_rows(source) if isinstance(row, Row) for _ in _pairs_of(row)]
    rows = [
        SourceRow(pair, row, {point: _name_of(row, point) for point in pair.capabilities})
        for pair, row in zip(pairs, values, strict=True)
    ]
    if limit is None:
        return rows
    return _spread([row for row in rows if tasks is None or row.pair.task in (None, *tasks)], limit)


def write_labels(
    out: Path,
    rows: Sequence[SourceRow],
    labels: Sequence[Labels],
    *,
    name: str,
    probabilities: Sequence[Mapping[str, float]] | None = None,
) -> Counter[str]:
    """Writes the rows with labels added: the whole file or nothing.

    Labels that a row has stay as they are. Columns: those of the row, `capabilities`, `labeled_by` (point -> who said
    so) and, with `probabilities`, `capability_probabilities` (point -> probability that the chosen side is better).

    Args:
        out: JSON Lines.
        rows: What `read_rows` gave.
        labels: One mapping a row.
        name: Of the labeler.
        probabilities: Soft labels, one mapping a row.

    Returns:
        How many labels were added on each point.

    Raises:
        PrefmoeError: the file cannot be written.
    """
    added: Counter[str] = Counter()

    def lines() -> Iterator[str]:
        for index, (row, found) in enumerate(zip(rows, labels, strict=True)):
            new = {point: side for point, side in found.items() if point not in row.pair.capabilities}
            added.update(new.keys())
            values = _as_values(row, new, name)
            soft = probabilities[index] if probabilities is not None else {}
            if soft:
                values[PROBABILITIES] = {point: round(value, 6) for point, value in soft.items()}
            yield json.dumps(values, ensure_ascii=False, default=str) + "\n"

    write_parts(out, lines())
    return added


def _as_values(row: SourceRow, new: Labels, name: str) -> dict[str, Any]:
    pair = row.pair
    values = {"id": pair.id, **row.values}
    if (
        row.values.get("completions") is not None and row.values.get("chosen") is None
    ):  # ranks, now single pairs
        del values["completions"]
        values.pop("ranks", None)
        texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        values |= {"id": pair.id} | {column: _as_messages(text) for column, text in texts.items()}
    values["capabilities"] = {**pair.capabilities, **new}
    known = {point: who for point, who in row.labeled_by.items() if who != OWN}
    values[LABELED_BY] = {**known, **dict.fromkeys(new, name)}
    return values


def _as_messages(messages: Messages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _pairs_of(row: Row) -> list[PreferencePair]:
    return parse_row(row.values, row_id="", problems=[])


def _name_of(values: Mapping[str, Any], point: str) -> str:
    names = values.get(LABELED_BY)
    name = names.get(point) if isinstance(names, dict) else None
    return name if isinstance(name, str) else OWN


def _spread(rows: Iterable[SourceRow], limit: int) -> list[SourceRow]:
    """The first rows of every task, in turns, in the order of the file."""
    seen: Counter[str | None] = Counter()
    ranked = []
    for index, row in enumerate(rows):
        ranked.append((seen[row.pair.task], index, row))
        seen[row.pair.task] += 1
    chosen = sorted(ranked, key=lambda item: item[:2])[:limit]
    return [row for _, _, row in sorted(chosen, key=lambda item: item[1])]
