"""The command `prefmoe`: its sub-commands, and what a mistake looks like to the person who made it.

Nothing here imports torch: `--help` and `data` answer at once, other commands import it when they run.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prefmoe.cli import data, label, policy, reward
from prefmoe.cli.report import report
from prefmoe.errors import PrefmoeError, PrefmoeWarning

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# Libraries read these when they are imported. What they say is for programmers.
_QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",  # our own bars say what they are of
    "TRANSFORMERS_VERBOSITY": "error",
}


class _Commands(TyperGroup):
    """Our errors become a sentence on stderr and an exit code; others keep their traceback and exit 1."""

    def invoke(self, ctx: Any) -> Any:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            with _warnings_as_lines():
                return super().invoke(ctx)
        except PrefmoeError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as stop:
            typer.echo("stopped; the same command goes on", err=True)
            raise typer.Exit(_INTERRUPTED) from stop


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reward models and policies for several, competing human preferences.",
)
app.add_typer(data.app, name="data")
app.add_typer(label.app, name="label")
app.add_typer(reward.app, name="reward")
app.add_typer(policy.app, name="policy")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    short: Annotated[
        bool, typer.Option("--short", help="Fewer pairs: shows that it works, proves nothing.")
    ] = False,
) -> None:
    """Train and compare reward models on a simulated world, offline; print a table, write a report.

    A run that was stopped at any moment goes on with the same command.
    """
    from prefmoe.cli.demo import demo as run_demo

    run_demo(out=out, short=short)


app.command()(report)


def main() -> None:
    """Entry point."""
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"prefmoe {version('prefmoe')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Nothing to do: the option acts on its own."""


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Our warnings are one line on stderr each; those of libraries need Python's option -W to be seen."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("default", PrefmoeWarning)
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, PrefmoeWarning):
                typer.echo(f"warning: {message}", err=True)
            else:
                show(message, category, *where)

        warnings.showwarning = show_line  # type: ignore[assignment]
        yield
