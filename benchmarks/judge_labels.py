r"""Phase 2 trained on rules, on a judge's labels, and on both: the same pairs, only the training labels differ.

    prefmoe label ../shared/data/preferences/train.jsonl.gz -o runs/labels/train.jsonl --tasks configs/tasks-real.yaml \
        --judge MODEL --limit 300 --no-ties --max-characters 600 --confidence
    python benchmarks/judge_labels.py runs/labels/train.jsonl [--config configs/real-cpu.yaml] [--out FILE.json]
    python benchmarks/judge_labels.py runs/labels/train.jsonl --soft-labels --folder runs/judge-soft
    python benchmarks/judge_labels.py --simulate 0.8 --folder runs/judge-simulated

For each kind `<folder>/<kind>.yaml` is written and trained as `prefmoe reward train` does it, one after the other; a
killed benchmark goes on with the same command. Where a judge left a task without labels, that task has no capability
experts, which training says; where it left some pairs of a point without, that expert has fewer pairs and steps.
Validation pairs have no capability labels in any kind, so that none is chosen by better ones than another: every
capability expert keeps its last state in place of its best. At the end the accuracies of the models stand side by side,
and how often their capability experts side with the rules on test pairs.
With `--soft-labels` a judge's probabilities are learned from in place of its labels, also where its two orders
disagree; `prefmoe label` writes them with `--confidence`. `--dry-run` writes the configs and files only.

`--simulate ACCURACY` asks no judge. It takes the training pairs of the config and makes labels as a judge would who
agrees with *the rules*: in each order with that accuracy, 0.15 more where the better side comes first and 0.15 less
where it comes second, by two independent draws. As of a real judge, an answer counts only where both orders agree. What
the rules call a tie, or cannot tell, is not asked. So it shows what a judge's mistakes and dropped labels cost beside
flawless labels of the same meaning; it says nothing about whether a language model's labels mean more than the rules'.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from harness.timing import machine, write_result
from safetensors.torch import load_file

from prefmoe.cli.progress import StepProgress
from prefmoe.labeling import RuleLabeler, load_tasks
from prefmoe.labeling.files import SourceRow, read_rows, write_labels
from prefmoe.labeling.judge.answers import Answer
from prefmoe.labeling.judge.verdicts import Verdict
from prefmoe.labeling.judge.wording import FIRST, SECOND
from prefmoe.reward.evaluate import evaluate_models
from prefmoe.reward.settings import RewardSettings, load_settings
from prefmoe.reward.splits import draw_per_task
from prefmoe.reward.train import train_models
from prefmoe.reward.workbench import Workbench, build_workbench

KINDS = ("rules", "judge", "both")
JUDGED = ("capabilities", "capability_probabilities", "labeled_by")
BIAS = 0.15
SIMULATED = "a simulated judge: the rules with random mistakes; no language model was asked"


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    options = read_options(argv)
    settings = load_settings(options.config, options.set)
    if settings.data.validation is None or settings.data.test is None or settings.data.tasks_file is None:
        raise SystemExit(f"{options.config}: data needs validation, test and tasks_file")
    if options.simulate is None:
        rows = read_rows(options.labelled)
    else:
        rows = simulate(pairs_of_config(settings), rules_of(settings), options.simulate, settings.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    labels = prepare(rows, settings, options)
    judges = sorted({who for row in rows for who in row.labeled_by.values()})
    result: dict[str, object] = {
        "what": "accuracy on test pairs, mean of tasks; labels: pairs and points whose sides are told apart",
        "judge": SIMULATED if options.simulate is not None else judges,
        "simulated": options.simulate is not None,
        "soft_labels": options.soft_labels,
        "config": str(options.config),
        "set": options.set,
        "pairs": len(rows),
        "labels": labels,
        "machine": machine(),
    }
    if options.simulate is not None:
        result |= {"simulated_accuracy": options.simulate, "simulated_position_bias": BIAS}
        result |= quality(rows, rules_of(settings))
    if not options.dry_run:
        trained = {kind: train(options.folder / f"{kind}.yaml", rules_of(settings)) for kind in KINDS}
        result["accuracy"] = {kind: accuracy for kind, (accuracy, _) in trained.items()}
        result["experts_side_with_rules"] = {kind: sides for kind, (_, sides) in trained.items()}
    for name, value in result.items():
        print(f"{name}: {value}")
    write_result(result, options.out)
    return result


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("labelled", nargs="?", type=Path, help="what `prefmoe label` wrote")
    parser.add_argument("--simulate", type=float, metavar="ACCURACY", help="a made-up judge instead")
    parser.add_argument("--config", type=Path, default=Path("configs/real-cpu.yaml"))
    parser.add_argument("--set", action="append", default=[], help="a.b=value, as in `prefmoe reward train`")
    parser.add_argument("--folder", type=Path, default=Path("runs/judge-labels"))
    parser.add_argument("--soft-labels", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if (options.labelled is None) == (options.simulate is None):
        parser.error("give either a labelled file or --simulate ACCURACY")
    if options.simulate is not None and not BIAS <= options.simulate <= 1 - BIAS:
        parser.error(
            f"--simulate {options.simulate}: choose from {BIAS} to {1 - BIAS}, so that the bias fits in"
        )
    if options.simulate is not None and options.soft_labels:
        parser.error("a simulated judge gives no probabilities; drop --soft-labels")
    return options


def rules_of(settings: RewardSettings) -> RuleLabeler:
    return RuleLabeler.from_tasks(load_tasks(str(settings.data.tasks_file)))


def pairs_of_config(settings: RewardSettings) -> list[SourceRow]:
    """The training pairs that the config itself would draw, without labels."""
    rows = [bare(row) for row in read_rows(settings.data.train)]
    drawn = draw_per_task([row.pair for row in rows], settings.data.max_pairs_per_task, settings.seed)
    kept = set(map(id, drawn))
    return [row for row in rows if id(row.pair) in kept]


def bare(row: SourceRow) -> SourceRow:
    """The row without any capability label."""
    values = {name: value for name, value in row.values.items() if name not in JUDGED}
    return SourceRow(replace(row.pair, capabilities={}, capability_probabilities={}), values, {})


def simulate(rows: Sequence[SourceRow], rules: RuleLabeler, accuracy: float, seed: int) -> list[SourceRow]:
    """The rows with the labels that a judge's two answers agree on."""
    rng = random.Random(seed)
    labelled = []
    for row, truth in zip(rows, rules.label([row.pair for row in rows]), strict=True):
        asked = {point: verdict(side, accuracy, rng) for point, side in truth.items() if side}
        kept = {point: found.label for point, found in asked.items() if found.label is not None}
        who = dict.fromkeys(kept, f"simulated:{accuracy}")
        labelled.append(
            SourceRow(
                replace(row.pair, capabilities=kept),
                {**row.values, "capabilities": kept, "labeled_by": who},
                who,
            )
        )
    return labelled


def verdict(side: int, accuracy: float, rng: random.Random) -> Verdict:
    """What a judge says in both orders where `side` (1 chosen, -1 rejected) is better."""
    answers = []
    for better_is_first in (side == 1, side == -1):
        is_right = rng.random() < accuracy + (BIAS if better_is_first else -BIAS)
        answers.append(Answer(FIRST if is_right == better_is_first else SECOND))
    return Verdict("", *answers)


def quality(rows: Sequence[SourceRow], rules: RuleLabeler) -> dict[str, object]:
    """How much a simulated judge kept, and how much of it is right, as the rules see it."""
    truth = rules.label([row.pair for row in rows])
    asked = sum(side != 0 for labels in truth for side in labels.values())
    right = [
        row.pair.capabilities[point] == labels[point]
        for row, labels in zip(rows, truth, strict=True)
        for point in row.pair.capabilities
    ]
    return {
        "kept": round(len(right) / max(asked, 1), 3),
        "kept_right": round(sum(right) / max(len(right), 1), 3),
    }


def prepare(
    rows: Sequence[SourceRow], settings: RewardSettings, options: argparse.Namespace
) -> dict[str, int]:
    """Writes files and config of every kind; gives the number of labels that tell sides apart."""
    rules, validation = rules_of(settings), options.folder / "validation.jsonl"
    without = [bare(row) for row in read_rows(str(settings.data.validation))]
    write_labels(validation, without, [{}] * len(without), name="")
    numbers = {}
    for kind in KINDS:
        mine = [bare(row) for row in rows] if kind == "rules" else rows
        by_rules = rules.label([row.pair for row in mine]) if kind != "judge" else [{}] * len(mine)
        write_labels(options.folder / f"{kind}.jsonl", mine, by_rules, name="rules")
        merged = [{**new, **row.pair.capabilities} for new, row in zip(by_rules, mine, strict=True)]
        numbers[kind] = sum(side != 0 for labels in merged for side in labels.values())
        content = config_of(kind, settings, options, validation)
        (options.folder / f"{kind}.yaml").write_text(
            yaml.safe_dump(content, sort_keys=False), encoding="utf-8"
        )
    return numbers


def config_of(
    kind: str, settings: RewardSettings, options: argparse.Namespace, validation: Path
) -> Mapping[str, object]:
    content = settings.model_dump()
    data = content["data"] | {
        "train": str(options.folder / f"{kind}.jsonl"),
        "validation": str(validation),
        "labels": "columns",  # what rules say is in the files, and so not in the validation pairs
        "soft_labels": options.soft_labels and kind != "rules",
        "max_pairs_per_task": None,
        "capability_train": None,  # further pairs would have the labels of rules, whatever the kind
    }
    return content | {"data": data, "methods": ["per_task", "dmoerm"], "out": str(options.folder / kind)}


def train(config: Path, rules: RuleLabeler) -> tuple[dict[str, float], dict[str, float]]:
    """Macro accuracy of every method; and how often capability experts side with the rules on test pairs."""
    bench = build_workbench(load_settings(config), progress=StepProgress())
    models = train_models(bench)
    methods = evaluate_models(bench, models).methods
    return {name: round(found.macro, 4) for name, found in methods.items()}, side_with_rules(
        bench, models["dmoerm"].capability_names, rules
    )


def side_with_rules(
    bench: Workbench, columns: Sequence[tuple[str, str]], rules: RuleLabeler
) -> dict[str, float]:
    """Share of the test pairs that a rule tells apart on which the expert sides with it, mean of the experts."""
    scores = load_file(bench.run.folder / "steps" / "test_dmoerm.safetensors")
    margins = scores["chosen.capabilities"] - scores["rejected.capabilities"]
    truth = rules.label(bench.test.pairs)
    shares = []
    for column, (task, point) in enumerate(columns):
        found = [
            float(margin * labels[point] > 0)
            for pair, labels, margin in zip(bench.test.pairs, truth, margins[:, column].tolist(), strict=True)
            # NaN where the router chose another task
            if pair.task == task and labels.get(point, 0) and margin == margin
        ]
        if found:
            shares.append(sum(found) / len(found))
    return {"share": round(sum(shares) / max(len(shares), 1), 4), "experts": len(shares)}


if __name__ == "__main__":
    main()
