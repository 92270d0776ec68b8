"""Writing whole files or nothing."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from prefmoe.errors import PrefmoeError


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """Writes the parts one after the other; after a crash or a full disk the old file is still there.

    Raises:
        PrefmoeError: the folder is missing or cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise PrefmoeError(
            f"{path}: could not be written; {error.strerror}; free space or choose another folder."
        ) from error
