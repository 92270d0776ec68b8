"""Files into records: every problem of a source is collected and reported with its line."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefmoe.data.parse import parse_completions, parse_row
from prefmoe.data.rows import Problem, iter_rows
from prefmoe.errors import DataError, join_problems
from prefmoe.records import Completion, PreferencePair

_KEEP_THE_OTHERS = "`prefmoe data check FILE --write-good NEW.jsonl` writes the rows that are right"

_Record = TypeVar("_Record", PreferencePair, Completion)


def read_pairs(source: str | Path, *, split: str = "train") -> list[PreferencePair]:
    """Preference pairs of a file, of a folder with a file a split, or of a `datasets` name.

    Args:
        source: A .jsonl, .jsonl.gz or .parquet file, a folder, or a dataset name (see `iter_rows`). Columns:
            DESIGN.md 2.10.
        split: Which split of a folder or of a named dataset.

    Returns:
        The pairs in file order. A row without `id` is named `<source>:<line>`.

    Raises:
        DataError: Anything is wrong with the source or with any of its rows; the message names them all (the
            first 20, then a count), each with file and line, and the command that leaves the bad rows out.

    Example:
        >>> import json, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "pairs.jsonl"
        >>> _ = file.write_text(json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}))
        >>> read_pairs(file)[0].chosen
        (Message(role='assistant', content='4'),)
    """
    return _read(source, parse_row, split=split, advice=_KEEP_THE_OTHERS)


def read_completions(source: str | Path, *, split: str = "train") -> list[Completion]:
    """Completions to score: rows with `prompt` and `completion` (or `response`, or a list `completions`).

    Rows of pairs give both sides, with ids `<id>/chosen` and `<id>/rejected`.

    Raises:
        DataError: As for `read_pairs`.
    """
    return _read(source, parse_completions, split=split)


def _read(
    source: str | Path, parse: Callable[..., list[_Record]], *, split: str, advice: str = ""
) -> list[_Record]:
    records: list[_Record] = []
    problems: list[Problem] = []
    num_rows = 0
    name = Path(source).name
    for row in iter_rows(source, split=split):
        num_rows += 1
        if isinstance(row, Problem):
            problems.append(row)
            continue
        messages: list[str] = []
        records += parse(row.values, row_id=f"{name}:{row.line}", problems=messages)
        problems += [Problem(row.path, row.line, message) for message in messages]
    if num_rows == 0:
        raise DataError("has no rows; expected one JSON object a line", source)
    if problems:
        raise _as_error(problems, advice if records else "")
    return records


def _as_error(problems: list[Problem], advice: str) -> DataError:
    """One error that lists all problems, ends with the advice, and carries the place of the first."""
    first = problems[0]
    text = "\n".join(filter(None, [join_problems([str(problem) for problem in problems]), advice]))
    return DataError(text.removeprefix(f"{first.where}: "), first.path, first.line)
