"""`prefmoe data`: look at files of preference pairs before training on them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from prefmoe.data.check import CheckReport, check_files, write_good_rows
from prefmoe.data.read import read_pairs
from prefmoe.data.rows import FILE_SUFFIXES
from prefmoe.data.stats import describe_pairs
from prefmoe.errors import DataError

app = typer.Typer(no_args_is_help=True, help="Check and describe files of preference pairs.")

Sources = Annotated[
    list[Path],
    typer.Argument(
        help="Files (.jsonl, .jsonl.gz, .parquet), one a split, folders of them, or `datasets` names.",
        show_default=False,
    ),
]
Split = Annotated[str, typer.Option(help="Which split of a `datasets` name.")]


@app.command()
def check(
    files: Sources,
    split: Split = "train",
    write_good: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Write the rows of the one file that are right, as they are and in their order, as JSON Lines.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Name every bad row, and every prompt that stands in two files.

    Each problem is one line on stdout: file:line: what is wrong. Exit code 3 if there is any, also with --write-good.
    """
    sources = _expand(files)
    if write_good is not None:
        _check_out(write_good, sources)
    people = Console(stderr=True)
    with people.status("checking ..."):
        report = check_files({str(file): file for file in sources}, part=split)
    for problem in report.problems:
        typer.echo(str(problem))
    found = f"{sum(report.num_rows.values())} rows, {sum(report.num_pairs.values())} usable pairs"
    typer.echo(f"{len(report.num_rows)} files, {found}, {len(report.problems)} problems", err=True)
    if write_good is not None:
        _write_good(write_good, sources[0], report, split)
    if report.problems:
        raise typer.Exit(DataError.exit_code)


def _check_out(out: Path, sources: list[Path]) -> None:
    if len(sources) > 1:
        raise typer.BadParameter(
            f"--write-good takes one file, not {len(sources)}; files are splits, so call it once a file"
        )
    if sources[0].exists() and out.exists() and out.samefile(sources[0]):
        raise typer.BadParameter(f"--write-good {out} is the input file; choose another name")
    if not out.name.endswith(".jsonl") or out.is_dir():
        raise typer.BadParameter(
            f"--write-good {out} is no file of JSON Lines; give a name that ends with .jsonl"
        )


def _write_good(out: Path, source: Path, report: CheckReport, split: str) -> None:
    if not any(report.num_pairs.values()):
        typer.echo(f"{out}: not written; no row is right", err=True)
        return
    num_written = write_good_rows(out, source, report.problems, split=split)
    typer.echo(f"{out}: {num_written} rows that are right", err=True)


@app.command()
def stats(
    files: Sources,
    split: Split = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Write the numbers as JSON to stdout.")] = False,
) -> None:
    """Count pairs, prompts, lengths and labels of each task."""
    people = Console(stderr=True)
    with people.status("reading ..."):
        described = {str(file): describe_pairs(read_pairs(file, split=split)) for file in _expand(files)}
    if as_json:
        typer.echo(json.dumps(described, indent=2, ensure_ascii=False))
        return
    for file, tasks in described.items():
        people.print(_as_table(file, tasks))


def _expand(sources: list[Path]) -> list[Path]:
    """The files, with each folder replaced by the data files in it."""
    files: list[Path] = []
    for source in sources:
        if not source.is_dir():
            files.append(source)
            continue
        found = sorted(path for path in source.iterdir() if path.name.endswith(FILE_SUFFIXES))
        if not found:
            raise DataError(
                f"holds no data file; expected names that end with {', '.join(FILE_SUFFIXES)}", source
            )
        files += found
    return files


def _as_table(title: str, tasks: dict[str, dict[str, Any]]) -> Table:
    columns = ("pairs", "prompts", "characters", "chosen longer", "margins")
    table = Table(
        "task",
        title=title,
        title_justify="left",
        caption="characters: medians of prompt/chosen/rejected; labels: chosen/rejected/tie",
    )
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("labels")
    for task, numbers in tasks.items():
        labels = [f"{name}: {_slashed(counts)}" for name, counts in numbers["capabilities"].items()]
        table.add_row(
            task,
            str(numbers["pairs"]),
            str(numbers["prompts"]),
            _slashed(numbers["characters"]),
            f"{numbers['chosen_longer']:.2f}",
            str(numbers["with_margin"]),
            "\n".join(labels) or "-",
        )
    return table


def _slashed(numbers: dict[str, float]) -> str:
    return "/".join(f"{number:.0f}" for number in numbers.values())
