"""What capabilities could add to a task's own head, and what those that can be learned do add.

    python benchmarks/capability_gain.py configs/real-cpu.yaml --out benchmarks/results/capability_gain.json

Experts are heads alone: convex fits on the states of the untrained backbone's last layer, so the trunk and the upper
layers run once a text. Of every task a pool of training pairs is read; each draw takes some of them, cross-fits the
scores of their two halves as `phase3.split: crossfit` does, and combines them with `linear_scores`. All of it is judged
on the validation pairs; no test pair is read. In the last line the capability's label of a pair, that of the rule,
stands where the score of its expert would: what experts could add that know their capability as the rule does.
"""

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from harness.timing import machine, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor
from training_speed import smoke_bench

from prefmoe.cli.progress import StepProgress
from prefmoe.evaluation.accuracy import macro_interval, paired_bootstrap
from prefmoe.reward.aggregators import ExpertFeatures, Units, fit_aggregator
from prefmoe.reward.features import fit_head, pooled_states
from prefmoe.reward.settings import Phase3Settings, load_settings
from prefmoe.reward.texts import EncodedPairs, PairRow
from prefmoe.reward.workbench import Workbench, build_workbench

FEW = 100  # labelled pairs of one capability, as configs/real-cpu.yaml trains on
VARIANTS = {
    "head": "the task's head alone",
    "few": f"and capability heads of at most {FEW} labelled pairs",
    "drawn": "and capability heads of all labelled pairs drawn",
    "others": "and capability heads of the pool's other pairs",
    "labels": "and the capabilities' own labels",
}


LEARNED = ("few", "drawn", "others")


class Pairs:
    """Pairs of one task: states of both sides (pairs, 2, hidden), rows, labels by capability (1, 0, -1)."""

    def __init__(self, states: Tensor, rows: Sequence[PairRow], labels: Mapping[str, Tensor]) -> None:
        self.states, self.rows, self.labels = states, rows, labels

    def part(self, wanted: Sequence[int]) -> "Pairs":
        """Some of them, by number."""
        labels = {name: values[wanted] for name, values in self.labels.items()}
        return Pairs(self.states[wanted], [self.rows[i] for i in wanted], labels)

    def labelled(self, name: str, limit: int | None = None) -> "Pairs":
        """Those with a label for a capability that is no tie, as pairs with that label; the first `limit`."""
        wanted = self.labels[name].nonzero()[:, 0].tolist()[:limit]
        part = self.part(wanted)
        part.rows = [
            row._replace(label=float(side > 0))
            for row, side in zip(part.rows, part.labels[name].tolist(), strict=True)
        ]
        return part

    def head(self) -> Tensor:
        """Weights (hidden,) of the convex fit; zeros without pairs."""
        if not self.rows:
            return torch.zeros(self.states.shape[-1])
        return fit_head(self.states[:, 0], self.states[:, 1], self.rows)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    arguments = parse(argv)
    bench = bench_of(arguments)
    pool, validation = pairs_by_task(bench, bench.train), pairs_by_task(bench, bench.validation)
    hits: dict[str, dict[str, list[Tensor]]] = {name: {task: [] for task in pool} for name in VARIANTS}
    known: dict[str, list[Tensor]] = {name: [] for name in LEARNED}  # hits of heads on their own labels
    for draw in range(arguments.draws):
        for task in pool:
            found, own = judge(pool[task], validation[task], size=arguments.pairs_per_task, seed=draw)
            for name, rows in own.items():
                known[name] += rows
            for name, values in found.items():
                hits[name][task].append(values)
    result = report(arguments, hits, validation, known)
    show(result)
    write_result(result, arguments.out)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/real-cpu.yaml")
    parser.add_argument("--folder", type=Path, default=Path("runs/capability-gain"), help="of the trunk")
    parser.add_argument("--pool", type=int, default=800, help="training pairs of a task that are read")
    parser.add_argument("--pairs-per-task", type=int, default=300, help="of the pool, in one draw")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: does it run at all")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def bench_of(arguments: argparse.Namespace) -> Workbench:
    if arguments.smoke:
        return smoke_bench(arguments.folder)
    changes = [
        "data.test=null",
        "data.capability_train=null",
        f"data.max_pairs_per_task={arguments.pool}",
        "data.max_validation_pairs_per_task=null",
        "router.max_prompts_per_task=1",  # it is not trained here
    ]
    settings = load_settings(arguments.config, changes, out=arguments.folder)
    return build_workbench(settings, progress=StepProgress())


def pairs_by_task(bench: Workbench, encoded: EncodedPairs) -> dict[str, Pairs]:
    experts = bench.new_experts(1).to(bench.backbone.device)  # adds nothing yet: the backbone as it is
    experts.attach(bench.backbone)
    try:
        texts = [(text, 0) for row in encoded.rows for text in (row.chosen, row.rejected)]
        states = pooled_states(bench.backbone, experts, bench.trunk, texts, progress=bench.progress)
    finally:
        experts.detach()
    states = states.view(len(encoded.rows), 2, -1)
    found = {}
    for task, names in bench.capabilities.items():
        mine = [i for i, pair in enumerate(encoded.pairs) if pair.task == task]
        labels = {
            name: torch.tensor([encoded.pairs[i].capabilities.get(name, 0) for i in mine]).float()
            for name in names
        }
        found[task] = Pairs(states[mine], [encoded.rows[i] for i in mine], labels)
    return found


def judge(
    pool: Pairs, validation: Pairs, *, size: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Hits (pairs,) on the validation pairs of every variant; and of each capability's head on its own labels."""
    drawn = random.Random(seed).sample(range(len(pool.rows)), min(size, len(pool.rows)))
    pairs, others = pool.part(drawn), pool.part(sorted(set(range(len(pool.rows))) - set(drawn)))
    prompts = list(dict.fromkeys(row.prompt for row in pairs.rows))
    random.Random(seed).shuffle(prompts)
    first = set(prompts[: len(prompts) // 2])
    halves = [
        pairs.part([i for i, row in enumerate(pairs.rows) if (row.prompt in first) == side])
        for side in (True, False)
    ]
    kept_back = [row for half in halves for row in half.rows]
    hits, own = {}, {}
    for variant in VARIANTS:
        out_of_fold = [scores(variant, half, halves[1 - i], others) for i, half in enumerate(halves)]
        kind = "task_head" if variant == "head" else "linear_scores"
        known = features(torch.cat(out_of_fold), kept_back)
        aggregator = fit_aggregator(kind, known, settings=Phase3Settings(), seed=seed)
        final = scores(variant, validation, pairs, others)
        hits[variant] = features(final, validation.rows).hits(aggregator)
        if variant in LEARNED:
            margins = (final[:, 0] - final[:, 1])[:, 1:].T
            own[variant] = [
                (margin * sides > 0)[sides != 0].float()
                for margin, sides in zip(margins, validation.labels.values(), strict=True)
            ]
    return hits, own


def scores(variant: str, judged: Pairs, trained: Pairs, others: Pairs) -> Tensor:
    """What the task's head and the capabilities say of both sides, (pairs, 2, experts), in standard deviations."""
    columns = [judged.states @ trained.head()]
    if variant == "labels":
        columns += [torch.stack([sides, -sides], dim=1) / 2 for sides in judged.labels.values()]
    elif variant != "head":
        source, limit = others if variant == "others" else trained, FEW if variant == "few" else None
        columns += [judged.states @ source.labelled(name, limit).head() for name in judged.labels]
    found = torch.stack(columns, dim=-1)
    return found / found.flatten(0, 1).std(0).clamp_min(1e-4)


def features(found: Tensor, rows: Sequence[PairRow]) -> ExpertFeatures:
    """Scores as aggregators take them; `linear_scores` does not look at states."""
    experts = found.shape[-1]
    none = torch.zeros(*found.shape, 1)
    return ExpertFeatures(
        none,
        found,
        rows,
        Units(torch.zeros(experts, 1), torch.ones(experts, 1), torch.zeros(experts), torch.ones(experts)),
    )


def report(
    arguments: argparse.Namespace,
    hits: Mapping[str, Mapping[str, Sequence[Tensor]]],
    validation: Mapping[str, Pairs],
    own: Mapping[str, Sequence[Tensor]],
) -> dict[str, object]:
    """Accuracies with 95 % intervals over validation prompts, hits being means over the draws."""
    prompts = {task: [str(row.prompt) for row in pairs.rows] for task, pairs in validation.items()}
    means = {
        name: {task: torch.stack(list(rows)).mean(0).tolist() for task, rows in by_task.items()}
        for name, by_task in hits.items()
    }

    def against_head(name: str) -> dict[str, float]:
        found = paired_bootstrap(means[name], means["head"], seed=0, prompt_ids=prompts)
        return {key: round(value, 4) for key, value in found._asdict().items()}

    return {
        "what": "accuracy on validation pairs, mean of tasks and draws; intervals over prompts",
        "machine": machine(),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "variants": {
            name: {
                "what": VARIANTS[name],
                "accuracy": round(macro_interval(means[name], seed=0, prompt_ids=prompts).value, 4),
                "by_draw": [
                    round(sum(rows[draw].mean().item() for rows in by_task.values()) / len(by_task), 4)
                    for draw in range(arguments.draws)
                ],
                "minus_head": against_head(name),
            }
            for name, by_task in hits.items()
        },
        "heads_right_on_their_own_labels": {
            name: round(statistics.mean(values.mean().item() for values in rows if len(values)), 4)
            for name, rows in own.items()
        },
        "validation_pairs": sum(len(pairs.rows) for pairs in validation.values()),
    }


def show(result: dict) -> None:
    table = Table("aggregated from", "accuracy", "minus the head")
    for found in result["variants"].values():
        gain = found["minus_head"]
        table.add_row(
            found["what"],
            f"{found['accuracy']:.3f}",
            f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})",
        )
    Console().print(table)
    for name, share in result["heads_right_on_their_own_labels"].items():
        Console().print(f"{VARIANTS[name]}: right on {share:.3f} of their own labels")


if __name__ == "__main__":
    main()
