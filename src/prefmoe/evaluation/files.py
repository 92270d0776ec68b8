"""Reading and writing the small JSON files of a run folder, with errors that name the file."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from prefmoe.data.write import write_parts
from prefmoe.errors import DataError, join_problems

T = TypeVar("T")


def parse_json(text: bytes, shape: TypeAdapter[T], *, path: Path, line: int | None = None) -> T:
    """The text checked against `shape`.

    Raises:
        DataError: it is not JSON, or not of that shape; all problems are named.
    """
    try:
        return shape.validate_json(text)
    except ValidationError as error:
        problems = [_sentence(problem) for problem in error.errors(include_url=False)]
        raise DataError(join_problems(problems), path, line) from error


def read_json(path: Path, shape: TypeAdapter[T]) -> T:
    """The content of a JSON file, checked against `shape`.

    Raises:
        DataError: the file cannot be read, is not JSON, or not of that shape.
    """
    return parse_json(read_bytes(path), shape, path=path)


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read; {error.strerror}.", path) from error


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing: after a crash or a full disk the old file is still there.

    Raises:
        OutputError: the folder is missing or cannot be written to, or the disk is full.
    """
    write_parts(path, [text])


def _sentence(problem: ErrorDetails) -> str:
    where = "".join(f"{part}." for part in problem["loc"])[:-1]
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    got = f"; got {value!r}" if isinstance(value, str | int | float) and problem["loc"] else ""
    return f"{where}: {message}{got}" if where else message
