"""Progress: nothing for short steps, bars on a terminal, one line a step elsewhere."""

import io
import time

import pytest
from rich.console import Console

from prefmoe.cli.progress import StepProgress


def recorded(*, terminal, patience):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None)
    return StepProgress(console, patience=patience), file


@pytest.mark.parametrize("terminal", [True, False])
def test_short_steps_leave_no_trace(terminal):
    progress, file = recorded(terminal=terminal, patience=60)
    with progress("step", 2) as advance:
        advance(2)
        time.sleep(0.15)  # longer than one refresh of the bars
    assert "step" not in file.getvalue()


def test_without_a_terminal_every_step_is_one_line():
    progress, file = recorded(terminal=False, patience=0)
    with progress("outer [x]", 3) as advance:
        advance(1)
        with progress("inner", 1) as inner:
            inner(1)
        advance(2)
    assert file.getvalue() == "inner (0:00:00)\nouter [x] (0:00:00)\n"


def test_on_a_terminal_a_bar_moves():
    progress, file = recorded(terminal=True, patience=0)
    with progress("outer", 4) as advance:
        advance(1)
        with progress("inner", 1):
            time.sleep(0.15)
    shown = file.getvalue()
    assert "25%" in shown
    assert "inner" in shown
    assert shown.rstrip().endswith("outer (0:00:00)")


def test_a_step_of_unknown_length_and_an_empty_one_work():
    progress, file = recorded(terminal=True, patience=0)
    with progress("nothing to do", 0):
        pass
    assert "nothing to do (0:00:00)" in file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failed_step_is_not_called_done(terminal):
    progress, file = recorded(terminal=terminal, patience=0)
    with pytest.raises(KeyboardInterrupt), progress("step", 1):
        raise KeyboardInterrupt
    assert "step (" not in file.getvalue()
    with progress("next", 1):  # the bars can be used again
        pass
    assert "next (0:00:00)" in file.getvalue()


def test_other_processes_say_nothing(monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with StepProgress(patience=0)("step", 1):
            pass
        assert len(capsys.readouterr().err.splitlines()) == lines
