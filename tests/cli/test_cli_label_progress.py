"""What a person sees while a judge is asked."""

import io

import pytest
from rich.console import Console

from prefmoe.cli import label_progress
from prefmoe.cli.label_progress import CallProgress
from prefmoe.labeling.judge.labeler import Progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(label_progress, "time", clock)
    return clock


def shown(clock, reports, *, terminal=False):
    """What is on the screen after (seconds since the start, progress) of a sitting of 40 calls."""
    screen = io.StringIO()
    watcher = CallProgress("m", Console(file=screen, force_terminal=terminal, width=200))
    with watcher(40) as report:
        for seconds, progress in reports:
            clock.now = 100 + seconds
            report(progress)
    return screen.getvalue()


def test_a_log_file_gets_a_line_a_minute_with_rate_costs_and_time_left(clock):
    text = shown(
        clock, [(30, Progress(5, 40, 0.5, 0)), (60, Progress(10, 40, 1.0, 2)), (90, Progress(40, 40, 4.0, 2))]
    )
    assert text.splitlines() == [
        "m: 10 of 40 calls in 0:01:00, 10 calls/min, $1.0000 so far, 2 unusable, 0:03:00 left",
        "m: 40 of 40 calls in 0:01:30, 27 calls/min, $4.0000 so far, 2 unusable",
    ]


def test_without_prices_no_costs_are_shown(clock):
    assert "$" not in shown(clock, [(5, Progress(40, 40, None, 0))])


def test_nothing_done_is_nothing_said(clock):
    assert shown(clock, []) == ""


def test_a_terminal_has_a_bar_and_keeps_one_line(clock):
    text = shown(clock, [(60, Progress(10, 40, 1.0, 0))], terminal=True)
    assert "10/40" in text
    assert text.rstrip().endswith("m: 10 of 40 calls in 0:01:00, 10 calls/min, $1.0000 so far")
