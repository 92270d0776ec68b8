"""Metrics as a table: every number with its interval, whatever the tasks are called."""

import io

from rich.console import Console

from prefmoe.cli.tables import print_metrics
from prefmoe.evaluation.metrics import build_metrics


def printed(margins, *, width=120, **options):
    file = io.StringIO()
    print_metrics(build_metrics(margins, **options), Console(file=file, width=width, color_system=None))
    return file.getvalue()


def test_rows_are_tasks_and_columns_are_methods():
    right, wrong = [1.0] * 4, [-1.0] * 4
    margins = {
        "dmoerm": {"advice": right, "facts": right},
        "single": {"advice": right, "facts": wrong},
    }
    lines = printed(margins, router_accuracy=0.96).splitlines()
    cells = {line.split()[1]: line.replace("│", " ").split() for line in lines if line.startswith("│")}
    assert cells["advice"] == ["advice", "4", "1.000", "(1.00-1.00)", "1.000", "(1.00-1.00)"]
    assert cells["facts"] == ["facts", "4", "1.000", "(1.00-1.00)", "0.000", "(0.00-0.00)"]
    assert cells["mean"] == ["mean", "of", "tasks", "8", "1.000", "0.500"]
    assert lines[-2:] == [
        "DMoERM minus Single reward model: +0.500 (+0.500 to +0.500)",
        "Router accuracy: 0.960",
    ]


def test_of_more_methods_than_tasks_methods_go_down():
    names = ["base", *(f"[method] {number}" for number in range(9))]
    margins = {name: {"advice": [1.0, -1.0, 1.0, 1.0], "facts": [1.0]} for name in names}
    lines = printed(margins, width=80).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == names
    assert {row[1][:6] for row in rows} == {"0.750 "}
    assert {tuple(row[2:]) for row in rows} == {("1.000 (1.00-1.00)", "0.875")}
    assert "advice (4 pairs)" in lines[2]


def test_without_router_or_second_method_nothing_is_said_of_them():
    text = printed({"single": {"all": [0.2, -0.1]}})
    assert "minus" not in text
    assert "Router" not in text


def test_task_names_are_shown_as_they_are():
    text = printed({"single": {"[red]a[/] :smile:": [0.2]}})
    assert "[red]a[/] :smile:" in text


def test_a_narrow_terminal_loses_no_number():
    margins = {name: {"advice": [0.5, -0.5, 1.0]} for name in ("single", "single_wide", "per_task", "dmoerm")}
    text = printed(margins, width=60)
    assert text.count("0.667") == 8
    assert all(len(line) <= 60 for line in text.splitlines())
