"""Which rule of keeping aggregators would have served finished runs best.

    python benchmarks/aggregator_rules.py runs/world-seeds/seed21 runs/world-seeds/seed22 --out rules.json

Reads run folders of `prefmoe reward train` or `prefmoe demo` with `steps/` in them. For every task all kinds of
aggregators are fitted as phase 3 does, each rule keeps one by what speaks for it on the pairs kept back and the
validation pairs, and the kept one is judged on `--split` with the run's own experts (the task being given): `test` for
simulated worlds, whose seeds are there to be spent; `validation` for real runs, where the judges are also what the
rules chose by. Prints a table of accuracies, means of tasks and runs, and what they gain over the task head.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harness.timing import machine, write_result
from rich.console import Console
from rich.table import Table

from prefmoe.cli.progress import StepProgress
from prefmoe.data.world import World
from prefmoe.evaluation.accuracy import macro_interval, paired_bootstrap
from prefmoe.nn import AggregatorKind
from prefmoe.reward.aggregator_choice import Candidates, best_aggregators
from prefmoe.reward.aggregators import ExpertFeatures, Units
from prefmoe.reward.assemble import aggregator_candidates, expert_features, expert_states, rows_by_task
from prefmoe.reward.demo import FULL, SHORT, WORLD, world_pairs
from prefmoe.reward.experts import ExpertState
from prefmoe.reward.phases import ALL, make_folds
from prefmoe.reward.settings import load_settings
from prefmoe.reward.train import train_phases, validation_features
from prefmoe.reward.workbench import Workbench, build_workbench

Kinds = dict[str, AggregatorKind]
Rule = Callable[[Mapping[str, Candidates]], Kinds]
Hits = dict[str, dict[str, list[float]]]  # by rule and by task of a run


def gaining(standard_errors: float, *, alone: bool = False, without: Sequence[AggregatorKind] = ()) -> Rule:
    """The rule of phase 3, on some kinds only; or on each task `alone`, as if there were no other."""

    def rule(candidates: Mapping[str, Candidates]) -> Kinds:
        part = {
            task: replace(found, modules={k: m for k, m in found.modules.items() if k not in without})
            for task, found in candidates.items()
        }
        groups = [{task: found} for task, found in part.items()] if alone else [part]
        best: Kinds = {}
        for group in groups:
            best |= best_aggregators(group, standard_errors=standard_errors)
        return best

    return rule


def always(kind: AggregatorKind) -> Rule:
    return lambda candidates: {
        task: kind if kind in found.modules else "task_head" for task, found in candidates.items()
    }


RULES: dict[str, Rule] = {
    "the task head": always("task_head"),
    "1 standard error on all tasks": gaining(1),
    "2 standard errors on all tasks": gaining(2),
    "2 standard errors on all tasks, no mlp": gaining(2, without=["mlp"]),
    "1 standard error on the task alone": gaining(1, alone=True),
    "2 standard errors on the task alone": gaining(2, alone=True),
    "1 standard error on the task alone, no mlp": gaining(1, alone=True, without=["mlp"]),
    "any gain on the task alone": gaining(0, alone=True),
    "always linear_scores": always("linear_scores"),
    "always linear_states": always("linear_states"),
    "always mlp": always("mlp"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--short", action="store_true", help="the runs are of `prefmoe demo --short`")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    hits: Hits = {name: {} for name in RULES}
    prompts: dict[str, list[str]] = {}
    kept: dict[str, dict[str, AggregatorKind]] = {name: {} for name in RULES}
    for folder in arguments.runs:
        candidates, judged = judge(bench_of(folder, short=arguments.short), split=arguments.split)
        for name, rule in RULES.items():
            for task, kind in rule(candidates).items():
                key = f"{folder.name}/{task}"
                prompts[key] = [str(row.prompt) for row in judged[task].rows]
                kept[name][key] = kind
                hits[name][key] = judged[task].hits(candidates[task].modules[kind]).tolist()
    result = report(arguments, hits, prompts, kept)
    show(result)
    write_result(result, arguments.out)
    return result


def bench_of(folder: Path, *, short: bool) -> Workbench:
    settings = load_settings(folder / "config.yaml", out=folder)
    is_world = settings.data.train == WORLD
    pairs = world_pairs(World(settings.seed), SHORT if short else FULL) if is_world else None
    return build_workbench(settings, pairs=pairs, progress=StepProgress())


def judge(bench: Workbench, *, split: str) -> tuple[dict[str, Candidates], dict[str, ExpertFeatures]]:
    """Candidates of every task of a run, and what its finished experts say of the pairs that judge them."""
    folds = make_folds(bench)
    crossfit = bench.settings.phase3.split == "crossfit"
    trained = train_phases(bench, folds, crossfit=crossfit)
    states = expert_states(bench, trained, ALL if crossfit else folds[0].name)
    validation = validation_features(bench, states, bench.tasks, name="dmoerm")
    candidates = aggregator_candidates(bench, folds, trained, validation=validation)
    if split == "validation":
        return candidates, validation
    units = {task: found.units for task, found in validation.items()}
    return candidates, test_features(bench, states, units)


def test_features(
    bench: Workbench, states: Mapping[str, ExpertState], units: Mapping[str, Units]
) -> dict[str, ExpertFeatures]:
    """Of the test pairs, in the units that the model has, those of the validation pairs."""
    rows = rows_by_task(bench, "test")
    found = expert_features(bench, states, bench.tasks, rows, name="test", label="test pairs")
    return {task: in_units(features, units[task]) for task, features in found.items()}


def in_units(features: ExpertFeatures, units: Units) -> ExpertFeatures:
    own = features.units
    states = features.states * own.state_std + own.state_mean
    scores = features.scores * own.score_std + own.score_mean
    return ExpertFeatures(
        (states - units.state_mean) / units.state_std,
        (scores - units.score_mean) / units.score_std,
        features.rows,
        units,
    )


def report(
    arguments: argparse.Namespace,
    hits: Hits,
    prompts: Mapping[str, Sequence[str]],
    kept: Mapping[str, Mapping[str, AggregatorKind]],
) -> dict[str, object]:
    head = hits["the task head"]
    rules = {}
    for name, by_task in hits.items():
        gain = paired_bootstrap(by_task, head, seed=0, prompt_ids=prompts)
        means = {key: math.fsum(values) / len(values) for key, values in by_task.items()}
        rules[name] = {
            "accuracy": round(macro_interval(by_task, seed=0, prompt_ids=prompts).value, 4),
            "minus_head": {key: round(value, 4) for key, value in gain._asdict().items()},
            "kept": dict(kept[name]),
            "by_task": {key: round(value, 4) for key, value in means.items()},
        }
    return {
        "what": f"accuracy on {arguments.split} pairs, mean of tasks and runs; intervals over prompts",
        "machine": machine(),
        "runs": [str(folder) for folder in arguments.runs],
        "rules": rules,
    }


def show(result: dict) -> None:
    table = Table("what a task keeps", "accuracy", "minus the head", "tasks that leave it")
    for name, found in result["rules"].items():
        gain = found["minus_head"]
        left = sum(kind != "task_head" for kind in found["kept"].values())
        table.add_row(
            name,
            f"{found['accuracy']:.4f}",
            f"{gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})",
            f"{left} of {len(found['kept'])}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
