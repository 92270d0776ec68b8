"""Metrics as people read them in a terminal."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from prefmoe.evaluation.metrics import Metrics


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
    """Accuracy of every method on every task, with its 95 % interval, and the mean over the tasks."""
    from prefmoe.evaluation.wording import method_name

    table = Table(
        "task", title="Accuracy on test pairs (95 % interval)", title_justify="left", title_style="bold"
    )
    table.add_column("pairs", justify="right")
    for method in metrics.methods:
        table.add_column(method_name(method), justify="right")
    methods = list(metrics.methods.values())
    for task, first in methods[0].tasks.items():
        cells = [result.tasks[task] for result in methods]
        shown = [f"{cell.accuracy:.3f} ({cell.low:.2f}-{cell.high:.2f})" for cell in cells]
        table.add_row(Text(task), str(first.pairs), *shown)
    num_pairs = sum(cell.pairs for cell in methods[0].tasks.values())
    table.add_section()
    table.add_row(
        "mean of tasks", str(num_pairs), *(f"{result.macro:.3f}" for result in methods), style="bold"
    )
    return table
