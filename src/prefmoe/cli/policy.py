"""`prefmoe policy`: train policies that mix preferences, measure them, look inside, generate, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from prefmoe.cli.progress import StepProgress
from prefmoe.cli.tables import print_metrics
from prefmoe.errors import ConfigError

if TYPE_CHECKING:
    from prefmoe.policy.evaluate import PolicyReport
    from prefmoe.policy.judged import JudgedAnswers, Judgement

app = typer.Typer(
    no_args_is_help=True, help="Train one policy on several preferences, steer it, look inside."
)

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of an adapter: runs/policy/pmol.", show_default=False)
]
Prefer = Annotated[
    list[str] | None,
    typer.Option("--prefer", metavar="GROUP=WEIGHT", help="Turn a preference up (above 1) or down."),
]


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, how.", show_default=False)
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change an entry, such as training.epochs=2."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; wins over `out` of the config.")] = None,
) -> None:
    """Train every method of a config by DPO, measure them on its test pairs, print the run folder.

    A run that was stopped at any moment goes on with the same command.
    """
    from prefmoe.policy.settings import load_policy_settings

    settings = load_policy_settings(config, changes or (), out=out)

    from prefmoe.policy.bench import build_bench
    from prefmoe.policy.evaluate import evaluate_policies
    from prefmoe.policy.train import train_policies

    bench = build_bench(settings, progress=StepProgress())
    people = Console(stderr=True, quiet=not bench.run.is_main)
    counts = ", ".join(f"{len(pairs.rows)} {name}" for name, pairs in bench.splits.items())
    people.print(f"{counts} pairs of {', '.join(bench.preferences)}", highlight=False)
    folders = train_policies(bench)
    if not bench.run.is_main:
        return
    if bench.splits["test"].rows:
        metrics, report = evaluate_policies(bench, folders)
        print_metrics(metrics, people)
        _print_report(report, people)
    typer.echo(str(bench.run.folder))


@app.command("eval")
def evaluate(
    model: Model,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Test pairs.", show_default=False)],
    *,
    prefer: Prefer = None,
    beta: Annotated[float, typer.Option(help="Of DPO; scales margins, not accuracies.")] = 0.1,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.")] = 1024,
) -> None:
    """Measure implicit-reward accuracy on pairs, preference by preference, and what the routers do."""
    weights = _weights(prefer)

    from prefmoe.policy.saved import evaluate_saved

    metrics, table = evaluate_saved(
        model, files, weights=weights, beta=beta, max_length=max_length, progress=StepProgress()
    )
    people = Console(stderr=True)
    print_metrics(metrics, people)
    for name, share in table.own_group_first.items() if table is not None else ():
        people.print(f"{name}: own group first in {share:.1%} of texts", highlight=False)


@app.command("weights")
def weights_command(
    model: Model,
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="Pairs of each preference.", show_default=False)
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PNG", help="Picture; numbers lie beside it.")],
    limit: Annotated[int, typer.Option(min=1, help="Pairs of each preference.")] = 50,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.")] = 1024,
) -> None:
    """Draw where the routers put their weight, layer by layer, on texts of each preference."""
    from prefmoe.policy.saved import write_weights

    numbers = write_weights(model, source, out, limit=limit, max_length=max_length, progress=StepProgress())
    typer.echo(str(numbers))


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", show_default=False)] = None,
    *,
    prefer: Prefer = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Answer prompts, given as arguments or one a line on stdin; one answer a line as JSON text."""
    import json
    import sys

    weights = _weights(prefer)
    lines = list(prompts) if prompts else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise ConfigError("no prompt; give one as an argument, or lines on stdin")

    from prefmoe.policy.saved import answer

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for text in answer(model, lines, weights=weights, **options):
        typer.echo(json.dumps(text, ensure_ascii=False))


@app.command()
def judge(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...", help="Folders of adapters on one model: runs/policy/pmol.", show_default=False
        ),
    ],
    *,
    reward_model: Annotated[
        Path,
        typer.Option("--reward-model", metavar="FOLDER", help="Saved by `reward train`, on other pairs."),
    ],
    files: Annotated[
        list[str], typer.Option("--prompts-of", metavar="FILE", help="Pairs whose prompts are answered.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Run folder; judged.json holds all answers.")
    ],
    prefer: Prefer = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each preference.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of draws and sampling.")] = 0,
) -> None:
    """Let policies answer prompts, and a reward model compare the answers with those of the model without adapter.

    A run that was stopped goes on with the same command, from the policy whose answers are missing.
    """
    weights = _weights(prefer)

    from prefmoe.policy.judged import RESULT, JudgeSettings, judge_policies
    from prefmoe.reward.score import RewardModel

    settings = JudgeSettings(
        policies=[str(folder) for folder in models],
        reward_model=str(reward_model),
        prompts_of=files,
        prefer=weights,
        prompts_per_preference=limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        out=str(out),
    )
    scorer, progress = RewardModel.load(reward_model), StepProgress()
    judgement = judge_policies(
        settings,
        lambda rows: [report.reward for report in scorer.score(rows, routing="given", progress=progress)],
        tasks=scorer.model.config.task_names,
        progress=progress,
    )
    Console(stderr=True).print(_judgement_table(judgement))
    typer.echo(str(out / RESULT))


@app.command()
def export(
    model: Model,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the LoRA.")],
    prefer: Annotated[
        list[str] | None,
        typer.Option(
            "--prefer", metavar="GROUP=WEIGHT", help="Fixed weight of a group; the mean weight by default."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--measure-on", metavar="FILE", help="Pairs to measure the difference on.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.")] = 1024,
) -> None:
    """Write a plain LoRA with fixed preference weights: an approximation, for merging and for vLLM."""
    weights = _weights(prefer)

    from prefmoe.policy.saved import export_saved

    report = export_saved(model, out, weights=weights, source=source, max_length=max_length)
    if report is not None:
        people = Console(stderr=True)
        people.print(
            f"log-probabilities differ by {report.mean_difference:.4f} nats a token on average, "
            f"{report.largest_difference:.4f} at most, on {report.num_texts} texts",
            highlight=False,
        )
    typer.echo(str(out))


def _judgement_table(judgement: "Judgement") -> Table:
    table = Table("policy", title="Reward of sampled answers (wins over the base)", title_justify="left")
    names = list(next(iter(judgement.policies.values())))
    for name in names:
        table.add_column(name, justify="right")
    for policy, found in judgement.policies.items():
        table.add_row(policy, *(_judged_cell(found[name]) for name in names))
    return table


def _judged_cell(found: "JudgedAnswers") -> str:
    reward, wins = found.reward, found.wins
    cell = "no text" if reward is None else f"{reward.value:+.3f} ({reward.low:+.2f} to {reward.high:+.2f})"
    if wins is not None:
        cell += f"\nwins {wins.value:.2f} ({wins.low:.2f} to {wins.high:.2f})"
    return cell + (f"\n{found.empty} of {found.prompts} without text" if found.empty and reward else "")


def _weights(given: list[str] | None) -> dict[str, float]:
    weights = {}
    for entry in given or ():
        name, separator, value = entry.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise ConfigError(f"--prefer {entry!r}: expected GROUP=WEIGHT, such as harmless=2")
    return weights


def _print_report(report: "PolicyReport", console: Console) -> None:
    for method, worst in report.minimum.items():
        mean = report.mean[method]
        found = report.group_accuracy.get(method)
        routing = (
            f"; own group first in {found.accuracy:.3f} ({found.low:.2f}-{found.high:.2f})" if found else ""
        )
        console.print(
            f"{method}: mean {mean.value:.3f} ({mean.low:.2f}-{mean.high:.2f}), "
            f"worst preference {worst.value:.3f} ({worst.low:.2f}-{worst.high:.2f}){routing}",
            highlight=False,
        )
    _print_costs(report, console)
    for group, points in report.steering.items():
        table = Table("weight", title=f"Turning {group!r}: mean margin (accuracy)", title_justify="left")
        for name in points[0].margin:
            table.add_column(name, justify="right")
        for point in points:
            cells = [f"{point.margin[n]:+.4f} ({point.accuracy[n]:.3f})" for n in point.margin]
            table.add_row(f"{point.weight:g}", *cells)
        gains = report.steering_gain.get(group, {})  # runs of older versions have none
        cells = [f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})" for gain in gains.values()]
        if len(points) > 1 and cells:
            table.add_row(f"{points[0].weight:g} to {points[-1].weight:g}", *cells)
        console.print(table)


def _print_costs(report: "PolicyReport", console: Console) -> None:
    table = Table("training", title="What it cost", title_justify="left")
    for name in ("trainable weights", "seconds a step", "peak memory, GiB"):
        table.add_column(name, justify="right")
    for name, costs in report.costs.items():
        memory = "" if costs.peak_bytes is None else f"{costs.peak_bytes / 2**30:.2f}"
        table.add_row(name, f"{costs.trainable:,}", f"{costs.seconds_per_step:.3g}", memory)
    if report.costs:
        console.print(table)
