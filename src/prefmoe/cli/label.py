"""`prefmoe label`: capability labels from a language model or from rules, and how good they are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from prefmoe.cli.default_command import DefaultsToPairs
from prefmoe.cli.judge_options import judge_settings, with_judge_options
from prefmoe.errors import ConfigError

if TYPE_CHECKING:
    from prefmoe.labeling.files import SourceRow
    from prefmoe.labeling.judge.labeler import JudgeLabeler, Plan

app = typer.Typer(
    cls=DefaultsToPairs,
    no_args_is_help=True,
    help="Label pairs on single points, by a language model or by rules; compare labelers.\n\n"
    "`prefmoe label IN -o OUT ...` is short for `prefmoe label pairs IN -o OUT ...`.",
)

Source = Annotated[str, typer.Argument(metavar="IN", help="Pairs of answers.", show_default=False)]


Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="OUT", help="JSON Lines: the rows with labels added.", show_default=False
    ),
]
Tasks = Annotated[
    Path | None, typer.Option(metavar="TASKS.yaml", help="Tasks and their points, a sentence on each.")
]
Judge = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Model of an OpenAI-compatible endpoint, or local:NAME.")
]
Rules = Annotated[bool, typer.Option("--rules", help="Label by the rules of the tasks file instead.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many pairs, spread evenly over the tasks.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print calls, tokens and costs; ask nothing, write nothing.")
]
Suggest = Annotated[
    bool,
    typer.Option("--suggest", help="Let the judge propose points from 20 pairs a task; OUT is a tasks file."),
]
Store = Annotated[Path | None, typer.Option(help="Where answers are kept; without it OUT.answers.sqlite.")]
CheckLabels = Annotated[
    bool,
    typer.Option("--check-labels", help="Also ask about points that rows label already, for `label report`."),
]
RetryUnusable = Annotated[
    bool, typer.Option("--retry-unusable", help="Ask again where an answer could not be used.")
]


@app.command("pairs")
@with_judge_options
def label_pairs(  # noqa: PLR0913 - typer reads the options off the signature
    *,
    source: Source,
    out: Out,
    tasks: Tasks = None,
    judge: Judge = None,
    rules: Rules = False,
    limit: Limit = None,
    dry_run: DryRun = False,
    suggest: Suggest = False,
    store: Store = None,
    check_labels: CheckLabels = False,
    retry_unusable: RetryUnusable = False,
    **judge_options: Any,
) -> None:
    """Label which side of each pair is better on each point of its task.

    A judge is asked in both orders; where its two answers differ there is no label. Every answer is stored before it
    counts: a run that was stopped at any moment goes on with the same command and pays nothing twice.
    """
    _check_arguments(source, out, judge=judge, rules=rules, suggest=suggest)
    settings = None if judge is None else judge_settings(judge, judge_options)

    from prefmoe.labeling.files import read_rows
    from prefmoe.labeling.tasks import load_tasks

    if settings is not None and suggest:
        rows = read_rows(source, limit=limit)
        if dry_run:
            _print_suggestion_plan(rows)
        else:
            _write_suggestion(rows, settings, out)
        return
    if tasks is None:
        raise typer.BadParameter("--tasks TASKS.yaml is missing; --suggest proposes one")
    task_file = load_tasks(tasks)
    if settings is None:
        _label_by_rules(read_rows(source, limit=limit), task_file, out)
        return

    from prefmoe.labeling.judge.labeler import JudgeLabeler
    from prefmoe.labeling.judge.questions import choose_points
    from prefmoe.labeling.judge.store import IN_MEMORY, AnswerStore, default_store

    asked = [task for task, points in choose_points(task_file, settings.points).items() if points]
    rows = read_rows(source, limit=limit, tasks=asked if settings.points else None)
    path = store or default_store(out)
    if dry_run and not path.exists():
        path = Path(IN_MEMORY)  # it writes nothing
    with AnswerStore(path) as answers:
        labeler = JudgeLabeler(settings, task_file, answers, skip_labelled=not check_labels)
        if dry_run:
            _print_plan(labeler.plan([row.pair for row in rows]))
            return
        if retry_unusable:
            labeler.forget_unusable([row.pair for row in rows])
        _label_by_judge(rows, labeler, out)


def _check_arguments(source: str, out: Path, *, judge: str | None, rules: bool, suggest: bool) -> None:
    if (judge is None) == (not rules):
        raise typer.BadParameter("give either --judge MODEL or --rules")
    if rules and suggest:
        raise typer.BadParameter("--suggest needs --judge MODEL, not --rules")
    if Path(source).exists() and out.resolve() == Path(source).resolve():
        raise typer.BadParameter(f"--out {out} is the input file; choose another name")
    if suggest and out.exists():
        raise typer.BadParameter(
            f"--out {out} is there already, and may have been edited; choose another name"
        )
    if out.is_dir():
        raise typer.BadParameter(f"--out {out} is a folder; give a file")


def _label_by_rules(rows: "list[SourceRow]", task_file: Any, out: Path) -> None:
    from prefmoe.labeling.files import write_labels
    from prefmoe.labeling.rules import RuleLabeler

    labeler = RuleLabeler.from_tasks(task_file)
    if not labeler.capabilities:
        raise ConfigError("the tasks file names no rule; add `rule: NAME` to a point, or give --judge MODEL")
    added = write_labels(out, rows, labeler.label([row.pair for row in rows]), name=labeler.name)
    typer.echo(f"{out}: {len(rows)} pairs, {added.total()} labels by rules", err=True)


def _label_by_judge(rows: "list[SourceRow]", labeler: "JudgeLabeler", out: Path) -> None:
    from prefmoe.cli.label_progress import CallProgress
    from prefmoe.cli.label_tables import print_quality
    from prefmoe.labeling.files import write_labels
    from prefmoe.labeling.judge.verdicts import measure_points

    pairs = [row.pair for row in rows]
    labeler.watcher = CallProgress(labeler.name)
    labeler.ask(pairs)
    verdicts = labeler.verdicts(pairs)
    labels = labeler.labels_of(pairs, verdicts)
    soft = labeler.soft_labels(pairs, verdicts) if labeler.settings.confidence else None
    added = write_labels(out, rows, labels, name=labeler.name, probabilities=soft)
    people = Console(stderr=True)
    print_quality(labeler.name, measure_points(verdicts), people)
    typer.echo(f"{out}: {len(rows)} pairs, {added.total()} labels by {labeler.name}", err=True)
    if labeler.out_of_budget:
        typer.echo(
            "the budget is used up; what was answered is labelled, and the same command with a larger one goes on",
            err=True,
        )


def _write_suggestion(rows: "list[SourceRow]", settings: Any, out: Path) -> None:
    from prefmoe.data.write import write_parts
    from prefmoe.labeling.judge.suggest import suggest_tasks

    write_parts(out, [suggest_tasks([row.pair for row in rows], settings)])
    typer.echo(f"{out}: proposed points; edit them, then label with --tasks {out}", err=True)


def _print_suggestion_plan(rows: "list[SourceRow]") -> None:
    from prefmoe.labeling.judge.suggest import plan_suggestion

    calls, to_read, to_write = plan_suggestion([row.pair for row in rows])
    typer.echo(f"calls: {calls}, up to three times as many where a proposal cannot be used")
    typer.echo(f"tokens: at most about {to_read} to read and {to_write} to write, once")


def _print_plan(plan: "Plan") -> None:
    costs = (
        "unknown: give --input-price and --output-price" if plan.usd is None else f"at most ${plan.usd:.4f}"
    )
    typer.echo(f"calls: {plan.calls} ({plan.stored} more are answered already)")
    typer.echo(f"tokens: about {plan.input_tokens} to read, at most {plan.output_tokens} to write")
    typer.echo(f"costs: {costs}")


@app.command()
def report(
    *,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Labelled pairs; their stores are found.", show_default=False),
    ],
    stores: Annotated[
        list[Path] | None, typer.Option("--store", help="More stores, such as other judges'.")
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrate", help="Take each judge's own preference for a place out first.")
    ] = False,
    disputed: Annotated[int, typer.Option(min=0, help="How many pairs in dispute to list.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Write the numbers as JSON to stdout.")] = False,
) -> None:
    """Measure judges: agreement of the two orders, position bias, ties; compare labelers with one another.

    Compared are all judges in the stores, the labels that rows brought along (`rows`), and those added by rules.
    """
    from prefmoe.cli.label_report import print_report

    print_report(files, stores or [], num_disputed=disputed, as_json=as_json, calibrated=calibrated)
