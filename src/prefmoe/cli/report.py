"""`prefmoe report`: the HTML report of a run folder."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[
        Path, typer.Argument(help="Folder that training or evaluation wrote.", show_default=False)
    ],
) -> None:
    """Write report.html into a run folder, and print its path."""
    from prefmoe.evaluation.report import build_report

    typer.echo(build_report(run_dir))
