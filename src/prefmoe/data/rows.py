"""Raw rows out of files, one at a time: JSON Lines (plain or gzip), Parquet, a folder, a `datasets` name.

A row that cannot even be parsed becomes a `Problem` with its line; reading goes on behind it.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prefmoe.data.text import short
from prefmoe.errors import DataError

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one row (or, without a line, with the whole file)."""

    path: str
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"

    @property
    def where(self) -> str:
        """Path and line, as editors understand them."""
        return self.path if self.line is None else f"{self.path}:{self.line}"


class Row(NamedTuple):
    """One JSON object or table row. Lines count from 1."""

    path: str
    line: int
    values: dict[str, Any]


def iter_rows(source: str | Path, *, split: str = "train") -> Iterator[Row | Problem]:
    """Rows of `source` in order, with a `Problem` in the place of each row that cannot be parsed.

    Args:
        source: A .jsonl, .jsonl.gz or .parquet file, a folder that holds `<split>.jsonl` (or one of the other
            endings), or the name of a dataset for the `datasets` library.
        split: Which split of a folder or of a named dataset. Ignored for a file.

    Raises:
        DataError: `source` does not exist, has an unknown ending, or needs a package that is not installed.
    """
    path = Path(source)
    if path.is_dir():
        path = _file_of_split(path, split)
    elif not path.exists() and not _looks_like_file(str(source)):
        return _dataset_rows(str(source), split)
    if not path.exists():
        raise DataError("no such file; check the path", path)
    if path.name.endswith(".parquet"):
        return _parquet_rows(path)
    if path.name.endswith(FILE_SUFFIXES):
        return _json_rows(path)
    raise DataError(f"unknown kind of file; expected a name that ends with {', '.join(FILE_SUFFIXES)}", path)


def _looks_like_file(source: str) -> bool:
    """Whether a missing `source` must be a slip in a path; asking the hub for it would take half a minute."""
    if source.endswith((*FILE_SUFFIXES, ".json", ".csv", ".gz")) or source.startswith(("/", ".", "~")):
        return True
    return source.count("/") > 1 or ("/" in source and Path(source).parent.exists())


def _file_of_split(folder: Path, split: str) -> Path:
    for suffix in FILE_SUFFIXES:
        if (path := folder / f"{split}{suffix}").exists():
            return path
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(FILE_SUFFIXES))
    raise DataError(f"has no {split}{'|'.join(FILE_SUFFIXES)}; data files found: {found}", folder)


def _json_rows(path: Path) -> Iterator[Row | Problem]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    line = 0
    try:
        with opener(path, "rb") as file:  # bytes, so that one line of broken UTF-8 spoils no other line
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _parse_json(str(path), line, raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Problem(str(path), line + 1, f"the gzip stream is damaged ({error}); copy the file again")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", path) from error


def _parse_json(path: str, line: int, raw: bytes) -> Row | Problem:
    try:
        values = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        bad = raw[error.start : error.start + 1].hex()
        return Problem(
            path, line, f"broken UTF-8; got byte 0x{bad} at column {error.start + 1}; save as UTF-8"
        )
    except RecursionError:
        return Problem(path, line, "the JSON is nested too deeply; expected one flat object a line")
    except ValueError as error:
        start = raw.decode("utf-8").strip()
        return Problem(path, line, f"not JSON ({error}); got {short(start)}; expected one JSON object a line")
    if not isinstance(values, dict):
        return Problem(path, line, f"not a JSON object; got {short(values)}; expected {{'prompt': ..., ...}}")
    return Row(path, line, values)


def _parquet_rows(path: Path) -> Iterator[Row | Problem]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet needs pyarrow; run pip install 'prefmoe[datasets]'", path) from error
    line = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                line += 1
                yield Row(str(path), line, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n", 1)[0]
        yield Problem(str(path), line + 1, f"the Parquet file cannot be read ({reason}); write it again")


def _dataset_rows(name: str, split: str) -> Iterator[Row | Problem]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name!r} is no file, and reading it as a dataset name needs `datasets`; "
            "run pip install 'prefmoe[datasets]' or correct the path"
        ) from error
    try:
        table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(
            f"{name!r} is no file, and `datasets` cannot load its split {split!r} ({reason}); "
            "correct the path or the name"
        ) from error
    return (Row(name, line, dict(values)) for line, values in enumerate(table, start=1))
