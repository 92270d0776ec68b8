"""`prefmoe reward`: train reward models, score completions, measure accuracy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from prefmoe.cli.progress import StepProgress
from prefmoe.cli.tables import print_metrics

if TYPE_CHECKING:
    from prefmoe.reward.workbench import Workbench

app = typer.Typer(no_args_is_help=True, help="Train reward models, score with them, measure them.")

Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="Folder of a model: runs/reward/dmoerm.", show_default=False),
]

Routing = Annotated[
    Literal["top1", "soft", "given"],
    typer.Option(
        help="top1: experts of the likeliest task; soft: all tasks, weighted by the router; given: those of the "
        "row's own task."
    ),
]


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, how.", show_default=False)
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change an entry, such as phase1.epochs=2."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; wins over `out` of the config.")] = None,
) -> None:
    """Train every method of a config, measure them on its test pairs, write a report and print its path.

    A run that was stopped at any moment goes on with the same command.
    """
    from prefmoe.reward.settings import load_settings

    settings = load_settings(config, changes or (), out=out)

    from prefmoe.cli.label_progress import CallProgress
    from prefmoe.evaluation.report import build_report
    from prefmoe.labeling.judge.labeler import unseen
    from prefmoe.labeling.judge.settings import JudgeSettings
    from prefmoe.reward.evaluate import evaluate_models
    from prefmoe.reward.train import train_models
    from prefmoe.reward.workbench import build_workbench

    labels = settings.data.labels
    watcher = CallProgress(f"labels by {labels.judge}") if isinstance(labels, JudgeSettings) else unseen
    bench = build_workbench(settings, progress=StepProgress(), watcher=watcher)
    people = Console(stderr=True, quiet=not bench.run.is_main)
    _describe(bench, people)
    models = train_models(bench)
    if not bench.run.is_main:
        return
    if bench.test.rows:
        print_metrics(evaluate_models(bench, models), people)
    else:
        people.print("No test pairs; `prefmoe reward eval` measures the models on a file.", highlight=False)
    typer.echo(build_report(bench.run.folder))


@app.command()
def score(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="Rows with prompt and completion, or pairs: both sides.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="JSON Lines, one a completion.")],
    routing: Routing = "top1",
) -> None:
    """Write reward, task and capability scores of every completion.

    A run that was stopped at any moment goes on with the same command.
    """
    from prefmoe.reward.score_file import score_file

    summary = score_file(model, source, out, routing=routing, progress=StepProgress())
    typer.echo(str(summary), err=True)


@app.command("eval")
def evaluate(
    *,
    model: Model,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Test pairs.", show_default=False)],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the numbers, as metrics.json.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL", help="Compare with this one, on the same pairs: the difference gets an interval."
        ),
    ] = None,
    routing: Routing = "top1",
) -> None:
    """Measure accuracy on pairs, task by task, with 95 % intervals."""
    from prefmoe.data.read import read_pairs

    pairs = [pair for file in files for pair in read_pairs(file, split="test")]

    from prefmoe.evaluation.metrics import write_metrics
    from prefmoe.reward.evaluate import evaluate_saved
    from prefmoe.reward.score import RewardModel

    reward_model = RewardModel.load(model)
    other = None if against is None else RewardModel.load(against)
    metrics = evaluate_saved(reward_model, pairs, against=other, routing=routing, progress=StepProgress())
    print_metrics(metrics, Console(stderr=True))
    if json_file is not None:
        write_metrics(metrics, json_file)


def _describe(bench: "Workbench", people: Console) -> None:
    """How many pairs there are, and how many do not fit."""
    splits = {"training": bench.train, "validation": bench.validation, "test": bench.test}
    counts = ", ".join(f"{len(split.rows)} {name}" for name, split in splits.items())
    tasks = f"{len(bench.tasks)} task{'s' * (len(bench.tasks) > 1)}"
    processes = bench.run.state.num_processes
    shared = f", in {processes} processes" if processes > 1 else ""
    people.print(f"{counts} pairs of {tasks}{shared}", highlight=False)
    truncated = sum(split.num_truncated for split in splits.values())
    if truncated:
        limit = bench.renderer.max_length
        people.print(f"{truncated} pairs lost tokens to fit backbone.max_length={limit}", highlight=False)
    if bench.test.num_equal:
        people.print(
            f"{bench.test.num_equal} test pairs have equal sides now and count as ties", highlight=False
        )
