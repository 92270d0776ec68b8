"""Progress on stderr: a bar for a step that takes a while, and one line when it is done."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_PATIENCE = 2.0


class _LateBars(Progress):
    """Bars that appear only when their step has run for `patience` seconds."""

    patience = _PATIENCE

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table([task for task in self.tasks if (task.elapsed or 0) >= self.patience])


class StepProgress:
    """Implements `prefmoe.runs.progress.Progress` for people.

    On a terminal every running step has a bar. Where a step is done, terminal or not, one line with its
    duration stays. Steps shorter than `patience` leave no trace; of a distributed run only the first process
    says anything.

    Args:
        console: Where to; stderr by default.
        patience: Seconds before anything is shown.
    """

    def __init__(self, console: Console | None = None, *, patience: float = _PATIENCE) -> None:
        self._console = console or Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
        self._patience = patience
        self._bars = _LateBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,  # stdout is data
            disable=not self._console.is_terminal,
        )
        self._bars.patience = patience

    @contextmanager
    def __call__(self, label: str, total: float) -> Iterator[Callable[[float], None]]:
        """Shows one step, which may run inside another one."""
        start = time.monotonic()
        task = self._bars.add_task(label, total=total)
        self._bars.start()
        try:
            yield lambda amount: self._bars.advance(task, amount)
        finally:
            self._bars.remove_task(task)
            if not self._bars.tasks:
                self._bars.stop()
        seconds = time.monotonic() - start
        if seconds >= self._patience:
            took = timedelta(seconds=round(seconds))
            self._console.print(f"{label} ({took})", markup=False, highlight=False, soft_wrap=True)
