"""Checks whole files, one row at a time, and names everything that is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prefmoe.data.parse import parse_row
from prefmoe.data.rows import Problem, Row, iter_rows
from prefmoe.data.split import prompt_hash
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
