"""Progress of a judge on stderr: calls, rate, costs so far, time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefmoe.labeling.judge import labeler

_LINE_EVERY = 60.0  # seconds, where stderr is no terminal


class CallProgress:
    """A bar on a terminal; elsewhere, as in a log file, one line a minute.

    Args:
        name: What is shown in front: the judge.
        console: Where to; stderr by default.
        line_every: Seconds between lines where there is no terminal.
    """

    def __init__(self, name: str, console: Console | None = None, *, line_every: float = _LINE_EVERY) -> None:
        self._name = name
        self._console = console or Console(stderr=True)
        self._line_every = line_every

    @contextmanager
    def __call__(self, total: int) -> Iterator[labeler.Report]:
        """Shows one sitting of `total` calls, and one line when it is over."""
        start = time.monotonic()
        shown = start
        last: labeler.Progress | None = None
        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,  # stdout is data
            disable=not self._console.is_terminal,
        )
        task = bars.add_task(self._name, total=total, state="")

        def report(progress: labeler.Progress) -> None:
            nonlocal last, shown
            last = progress
            now = time.monotonic()
            bars.update(task, completed=progress.calls, state=_state(progress, now - start))
            if not self._console.is_terminal and now - shown >= self._line_every:
                shown = now
                self._print(f"{_line(progress, now - start)}, {_left(progress, now - start)} left")

        with bars:
            try:
                yield report
            finally:
                if last is not None:
                    bars.stop()
                    self._print(_line(last, time.monotonic() - start))

    def _print(self, text: str) -> None:
        self._console.print(f"{self._name}: {text}", markup=False, highlight=False, soft_wrap=True)


def _line(progress: labeler.Progress, seconds: float) -> str:
    took = timedelta(seconds=round(seconds))
    return f"{progress.calls} of {progress.to_ask} calls in {took}, {_state(progress, seconds)}"


def _state(progress: labeler.Progress, seconds: float) -> str:
    parts = [f"{60 * progress.calls / max(seconds, 1e-9):.0f} calls/min"]
    if progress.usd is not None:
        parts.append(f"${progress.usd:.4f} so far")
    if progress.unusable:
        parts.append(f"{progress.unusable} unusable")
    return ", ".join(parts)


def _left(progress: labeler.Progress, seconds: float) -> timedelta:
    rest = progress.to_ask - progress.calls
    return timedelta(seconds=round(seconds * rest / max(progress.calls, 1)))
