"""Writing whole files or nothing, with errors that name the file."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prefmoe.errors import OutputError


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """Writes the parts one after the other; after a crash or a full disk the old file is still there.

    Raises:
        OutputError: the folder is missing or cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                for part in parts:
                    file.write(part.encode("utf-8", errors="replace"))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # also what `parts` raises, and Ctrl-C
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file: an error of the disk becomes an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: could not be written; {error.strerror}; free space or choose another folder."
        ) from error
