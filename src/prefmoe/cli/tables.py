"""Metrics as people read them in a terminal."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from prefmoe.evaluation.metrics import Metrics

_MEAN = "mean of tasks"


def print_metrics(metrics: "Metrics", console: Console) -> None:
    """The table of accuracies, then the paired differences and how often the router was right."""
    from prefmoe.evaluation.wording import method_name

    console.print(accuracy_table(metrics))
    for names, change in metrics.paired.items():
        subject, _, other = names.partition("-")
        interval = f"{change.macro:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
        console.print(f"{method_name(subject)} minus {method_name(other)}: {interval}", highlight=False)
    if metrics.router is not None:
        console.print(f"Router accuracy: {metrics.router.accuracy:.3f}", highlight=False)


def accuracy_table(metrics: "Metrics") -> Table:
    """Accuracy of every method on every task, with its 95 % interval, and the mean over the tasks.

    What is more, tasks or methods, goes down: a terminal is narrow.
    """
    from prefmoe.evaluation.wording import method_name

    methods = {method_name(name): result for name, result in metrics.methods.items()}
    pairs = {task: first.pairs for task, first in next(iter(methods.values())).tasks.items()}

    def cell(method: str, task: str) -> str:
        found = methods[method].tasks[task]
        return f"{found.accuracy:.3f} ({found.low:.2f}-{found.high:.2f})"

    means = {name: f"{result.macro:.3f}" for name, result in methods.items()}
    if len(methods) > len(pairs):
        heads = ["method", *(f"{task} ({number} pairs)" for task, number in pairs.items()), _MEAN]
        rows = [[name, *(cell(name, task) for task in pairs), means[name]] for name in methods]
    else:
        heads = ["task", "pairs", *methods]
        rows = [
            [task, str(number), *(cell(name, task) for name in methods)] for task, number in pairs.items()
        ]
        rows.append([_MEAN, str(sum(pairs.values())), *means.values()])
    table = Table(title="Accuracy on test pairs (95 % interval)", title_justify="left", title_style="bold")
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if place else "left", overflow="fold")
    for row in rows:
        if row[0] == _MEAN:
            table.add_section()
        table.add_row(*map(Text, row), style="bold" if row[0] == _MEAN else "")
    return table
