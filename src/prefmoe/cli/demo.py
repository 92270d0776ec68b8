"""`prefmoe demo`: see it work before bringing data."""

from pathlib import Path

import typer
from rich.console import Console

from prefmoe.cli.progress import StepProgress
from prefmoe.cli.tables import print_metrics


def demo(*, out: Path, short: bool) -> None:
    """Runs the demo, prints its table and the path of its picture to stderr and the report's path to stdout."""
    from prefmoe.reward.demo import FULL, SHORT, run_demo

    result = run_demo(out, size=SHORT if short else FULL, progress=StepProgress())
    people = Console(stderr=True)
    print_metrics(result.metrics, people)
    people.print(f"Best of n, gold reward: {result.picture}", highlight=False, soft_wrap=True)
    typer.echo(result.report)
