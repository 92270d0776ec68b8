"""Checks whole files, one row at a time, and names everything that is wrong."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmoe.data.parse import parse_row
from prefmoe.data.rows import Problem, Row, iter_rows
from prefmoe.data.split import prompt_hash
from prefmoe.data.write import write_parts
from prefmoe.errors import DataError
from prefmoe.records import Messages


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was found in a set of files.

    Attributes:
        problems: Everything that is wrong, file after file, in line order.
        num_rows: Rows of each split, bad ones included.
        num_pairs: Usable pairs of each split.
    """

    problems: list[Problem]
    num_rows: dict[str, int]
    num_pairs: dict[str, int]


def check_files(files: Mapping[str, str | Path], *, part: str | None = None) -> CheckReport:
    """Finds every bad row of the files, and every prompt that stands in two of them.

    Args:
        files: Source of each split, as for `read_pairs`; each is read once, one row at a time.
        part: Which split of a folder or of a named dataset; None takes the key of `files`.

    Returns:
        The report. A source that cannot be read at all is one problem without a line.

    Numerics:
        Prompts are compared by 64-bit hashes of `prompt_key`; among 10^6 prompts the probability of one false
        alarm is 3e-8.
    """
    checker = _Checker(compare_splits=len(files) > 1)
    report = CheckReport(checker.problems, {}, {})
    for split, source in files.items():
        report.num_rows[split] = report.num_pairs[split] = 0
        try:
            for row in iter_rows(source, split=part or split):
                report.num_rows[split] += 1
                report.num_pairs[split] += checker.check(row, split)
        except DataError as error:
            checker.problems.append(Problem(str(error.path or source), error.line, error.message))
            continue
        if not report.num_rows[split]:
            checker.problems.append(
                Problem(str(source), None, "has no rows; expected one JSON object a line")
            )
    return report


def write_good_rows(
    out: Path, source: str | Path, problems: Collection[Problem], *, split: str = "train"
) -> int:
    """Writes the rows of a checked source that no problem names: the whole file or nothing.

    The source is read once more, one row at a time, so that rows need not fit into memory.

    Args:
        out: JSON Lines; every row with all its columns, in the order of the source.
        source: One file or `datasets` name, as `check_files` read it.
        problems: All that it found there.
        split: Which split of a `datasets` name.

    Returns:
        How many rows were written.

    Raises:
        DataError: the source can no longer be read.
        OutputError: `out` cannot be written.
    """
    bad = {problem.line for problem in problems}
    num_written = 0

    def lines() -> Iterator[str]:
        nonlocal num_written
        for row in iter_rows(source, split=split):
            if isinstance(row, Row) and row.line not in bad:
                num_written += 1
                yield _as_line(row.values)

    write_parts(out, lines())
    return num_written


def _as_line(values: Mapping[str, Any]) -> str:
    """The row as JSON, in readable characters. What only Parquet knows, such as a date, becomes text."""
    line = json.dumps(values, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a character, which only its escape can write
        line = json.dumps(values, default=str)
    return line + "\n"


class _Checker:
    """Collects problems over files and remembers where each prompt stood first."""

    def __init__(self, *, compare_splits: bool) -> None:
        self.problems: list[Problem] = []
        self._compare_splits = compare_splits
        self._first_seen: dict[int, tuple[str, str, int]] = {}  # prompt hash -> split, path, line

    def check(self, row: Row | Problem, split: str) -> int:
        """Number of usable pairs of the row; what is wrong with it is added to the problems."""
        if isinstance(row, Problem):
            self.problems.append(row)
            return 0
        messages: list[str] = []
        pairs = parse_row(row.values, row_id=str(row.line), problems=messages)
        if pairs and self._compare_splits:
            messages += self._prompt_in_other_split(pairs[0].prompt, row, split)
        self.problems += [Problem(row.path, row.line, message) for message in messages]
        return len(pairs)

    def _prompt_in_other_split(self, prompt: Messages, row: Row, split: str) -> list[str]:
        first_split, path, line = self._first_seen.setdefault(
            prompt_hash(prompt), (split, row.path, row.line)
        )
        if first_split == split:
            return []
        return [f"the prompt also stands in {path}:{line}; keep a prompt in one split"]
