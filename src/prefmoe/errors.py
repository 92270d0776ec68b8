"""The one exception tree of prefmoe.

    PrefmoeError
    ├── ConfigError(ValueError)        a setting that cannot work        exit code 4
    ├── DataError(ValueError)          rows or texts that cannot be used exit code 3
    ├── CheckpointError(RuntimeError)  a saved model that cannot be used exit code 5
    ├── OutputError(RuntimeError)      a file that cannot be written     exit code 5
    └── ShapeError(ValueError)         tensors that do not fit           exit code 1

A message is one sentence, or two: where, what is wrong, what was got, what was expected, what to do.
"""

from pathlib import Path

_SHOWN_PROBLEMS = 20


class PrefmoeError(Exception):
    """Base of every error that prefmoe raises on purpose."""

    exit_code = 1


class PrefmoeWarning(UserWarning):
    """Something that works, but not as a user may think; the command line shows it as one line."""


class ConfigError(PrefmoeError, ValueError):
    """A setting that cannot work."""

    exit_code = 4


class DataError(PrefmoeError, ValueError):
    """Rows or texts that cannot be used; carries the first place where it was seen."""

    exit_code = 3

    def __init__(self, message: str, path: str | Path | None = None, line: int | None = None) -> None:
        where = ":".join(str(part) for part in (path, line) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)
        self.message, self.path, self.line = message, path, line

    def __reduce__(self) -> tuple[type["DataError"], tuple[str, str | Path | None, int | None]]:
        return type(self), (self.message, self.path, self.line)


class CheckpointError(PrefmoeError, RuntimeError):
    """A saved model that is damaged, incomplete or does not belong to what it is loaded with."""

    exit_code = 5


class OutputError(PrefmoeError, RuntimeError):
    """A file that cannot be written, as on a full disk; what was there before is still there."""

    exit_code = 5


class ShapeError(PrefmoeError, ValueError):
    """Tensors whose shapes do not fit together."""


def join_problems(problems: list[str]) -> str:
    """All problems as one text: the first 20, one a line, then how many more there are."""
    shown = problems[:_SHOWN_PROBLEMS]
    rest = len(problems) - len(shown)
    return "\n".join([*shown, *([f"... and {rest} more"] if rest else [])])
