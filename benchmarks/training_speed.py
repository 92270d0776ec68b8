"""Seconds to train router, task adapters, capability experts and aggregators: ours beside the release's way and TRL's.

    python benchmarks/training_speed.py configs/real-cpu.yaml --folder runs/training-speed \
        --out benchmarks/results/training_speed.json

Ours is trained in full, in a run folder, and its seconds are taken: the trunk and everything that `train_models` does.
The same command again reads the seconds of a finished folder. The peers would take many hours on a CPU, so they run on
a slice: pairs drawn from those that our jobs train on. Their seconds a pair, the median of alternating repeats, times
the pairs of our jobs are their time. What that leaves out is all in their favour: see NOTES. Both train LoRA of our
size on our layers, but run the whole (cut) backbone.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from harness.peers import classifier_lora, new_classifier, trl_trainer
from harness.timing import Times, against, machine, seconds_of, write_result
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from prefmoe.cli.progress import StepProgress
from prefmoe.data.world import World
from prefmoe.errors import ConfigError
from prefmoe.reward.assemble import rows_by_task
from prefmoe.reward.demo import demo_settings, pretrain_backbone
from prefmoe.reward.phases import (
    ALL,
    Fold,
    capability_rows,
    draw,
    make_folds,
    pairs_of,
    prompts_of,
    select_rows,
)
from prefmoe.reward.settings import RewardSettings, check_settings, load_settings
from prefmoe.reward.texts import PairRow
from prefmoe.reward.train import train_models
from prefmoe.reward.workbench import Workbench, build_workbench

TARGETS = {"release": 10.0, "trl": 3.0}
NOTES = [
    "peers: seconds a pair on a slice, times the pairs of all our jobs; not run in full",
    "release: one text a forward pass, one optimizer step a pair, each expert in its own run; its phase 3 runs every "
    "expert of the task again on each text kept back, one pass over them",
    "trl: RewardTrainer once per expert, in batches of our size; no router and no aggregators",
    "not counted for the peers: the router, validation, loading the backbone for every run, fitting the aggregator",
    "not counted for anybody: reading, labelling and tokenizing the pairs",
    "accuracy: `prefmoe reward eval FOLDER/dmoerm FILE`; TRL's: benchmarks/trl_accuracy.py",
]
TIMED = "training"  # our entry in the seconds of the run folder


class Work(NamedTuple):
    """What our jobs train on, to be done by the peers too."""

    rows: list[PairRow]  # of all jobs, once an epoch-pass of each
    runs: int  # trainings of one expert
    passes: float  # pairs trained on, over all jobs and epochs
    phase3_texts: int  # texts kept back times the experts of their task


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    arguments = parse(argv)
    bench = bench_of(arguments)
    seconds = train_ours(bench)
    work = work_of(bench)
    rows = random.Random(0).sample(work.rows, min(arguments.slice, len(work.rows)))
    times = time_peers(bench, rows, arguments.repeats)
    result = report(bench, work, seconds=seconds, times=times, slice_pairs=len(rows))
    result["settings"] = {name: str(value) for name, value in vars(arguments).items()}
    show(result)
    write_result(result, arguments.out)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/real-cpu.yaml")
    parser.add_argument("--folder", type=Path, default=Path("runs/training-speed"), help="of our run")
    parser.add_argument("--pairs-per-task", type=int, default=500)
    parser.add_argument("--set", nargs="*", default=[], help="a.b=value; wins over what the benchmark sets")
    parser.add_argument("--slice", type=int, default=32, help="pairs that the peers run on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: does it run at all")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def bench_of(arguments: argparse.Namespace) -> Workbench:
    """Pairs and backbone; the paper's split, so that everybody trains on the same 60 %."""
    if arguments.smoke:
        return smoke_bench(arguments.folder)
    changes = [
        "methods=[dmoerm]",
        "phase3.split=paper",
        f"data.max_pairs_per_task={arguments.pairs_per_task}",
        "data.test=null",
        "data.capability_train=null",  # the peers have no use for pairs without a preference
        *arguments.set,
    ]
    settings = load_settings(arguments.config, changes, out=arguments.folder)
    return build_workbench(settings, progress=StepProgress())


def smoke_bench(folder: Path) -> Workbench:
    world = World(0)
    if not (folder / "backbone").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pretrain_backbone(folder / "backbone", world, steps=2, seed=0)
    short = {"epochs": 1, "evaluations": 1, "head_start": False}
    content = demo_settings(folder, seed=0).model_dump() | {
        "phase1": short,
        "phase2": short,
        "phase3": {"split": "paper", "kinds": ["linear_scores"]},
        "methods": ["dmoerm"],
    }
    pairs = {
        split: world.sample_pairs(6, split=split, label_noise=False) for split in ("train", "validation")
    }
    settings: RewardSettings = check_settings(content, where="smoke")
    return build_workbench(settings, pairs=pairs | {"test": []})


def train_ours(bench: Workbench) -> float:
    """Seconds of trunk and training, measured now or read from the folder of a finished run."""
    if TIMED not in bench.run.seconds():
        if (bench.run.folder / "steps").exists():
            raise ConfigError(
                f"{bench.run.folder}: the run was stopped before it was done, so its seconds are not known; delete it"
            )
        with bench.run.clock(TIMED):
            train_models(bench)
    seconds = bench.run.seconds()
    return seconds["trunk"] + seconds[TIMED]


def work_of(bench: Workbench) -> Work:
    settings, folds = bench.settings, make_folds(bench)
    trained = list(folds)
    if settings.phase3.split == "crossfit":
        trained.append(Fold(ALL, prompts_of(bench.train.pairs), frozenset()))
    adapters = [row for fold in trained for row in select_rows(bench.train, pairs_of(fold=fold))]
    limit, seed = settings.phase2.max_pairs_per_capability, settings.seed
    experts = [
        draw(capability_rows(bench.train, task, name, pairs_of(task, fold)), limit, seed)
        for fold in trained
        for task, names in bench.capabilities.items()
        for name in names
    ]
    capability = [row for rows in experts for row in rows]
    num_shared = 1 if settings.phase1.shared_start else 0
    return Work(
        rows=adapters + capability,
        runs=len(trained) * (num_shared + len(bench.capabilities)) + len(experts),
        passes=len(adapters) * settings.phase1.epochs + len(capability) * settings.phase2.epochs,
        phase3_texts=sum(
            2 * len(rows) * (1 + len(bench.tasks[task]))
            for fold in folds
            for task, rows in rows_by_task(bench, "train", fold).items()
        ),
    )


def time_peers(bench: Workbench, rows: Sequence[PairRow], repeats: int) -> Times:
    """Seconds of the slice, peer by peer and repeat by repeat."""
    lora = classifier_lora(bench.settings.experts, len(bench.backbone.layers))
    model = get_peft_model(new_classifier(bench.backbone), lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
    ids = {
        text: torch.tensor([bench.table.texts[text].input_ids], device=bench.backbone.device)
        for row in rows
        for text in row[:2]
    }
    times: Times = {"release": [], "release_phase3": [], "trl": []}
    release_steps(model, optimizer, rows[:1], ids)  # warm-up
    for _ in range(repeats):
        times["release"].append(seconds_of(partial(release_steps, model, optimizer, rows, ids)))
        times["release_phase3"].append(seconds_of(partial(release_features, model, rows, ids)))
        with TemporaryDirectory() as folder:
            trainer = trl_trainer(
                bench.backbone,
                bench.tokenizer,
                bench.settings.experts,
                [(bench.table.texts[row.chosen], bench.table.texts[row.rejected]) for row in rows],
                folder,
                batch_pairs=bench.settings.phase1.batch_pairs,
            )
            times["trl"].append(seconds_of(trainer.train))
    return times


def release_steps(model, optimizer, rows: Sequence[PairRow], ids: dict[int, torch.Tensor]) -> None:
    model.train()
    for row in rows:
        chosen, rejected = (model(input_ids=ids[text], use_cache=False).logits[0, 0] for text in row[:2])
        (-F.logsigmoid(chosen - rejected)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def release_features(model, rows: Sequence[PairRow], ids: dict[int, torch.Tensor]) -> None:
    model.eval()
    for row in rows:
        for text in row[:2]:
            model(input_ids=ids[text], use_cache=False)


def report(
    bench: Workbench, work: Work, *, seconds: float, times: Times, slice_pairs: int
) -> dict[str, object]:
    a_pair = {name: statistics.median(values) / slice_pairs for name, values in times.items()}
    estimated = {
        "release": a_pair["release"] * work.passes + a_pair["release_phase3"] / 2 * work.phase3_texts,
        "trl": a_pair["trl"] * work.passes,
    }
    over = {peer: value / seconds for peer, value in estimated.items()}
    return {
        "what": "time of the peers as a multiple of ours; ours measured in full, the peers scaled from a slice",
        "notes": NOTES,
        "machine": machine(),
        "dtype": str(bench.backbone.dtype),
        "targets": {f"{peer}_over_ours": against(over[peer], target) for peer, target in TARGETS.items()},
        "ours_seconds": round(seconds, 1),
        "ours_seconds_by_step": bench.run.seconds(),
        "part_by_part": part_by_part(bench, work, a_pair, seconds),
        "estimated_seconds": {peer: round(value, 1) for peer, value in estimated.items()},
        "seconds_a_pair_of_the_slice": {name: round(value, 4) for name, value in a_pair.items()},
        "slice_pairs": slice_pairs,
        "slice_seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "training_pairs": len(bench.train.rows),
        "runs": work.runs,
        "pairs_trained_on": round(work.passes),
        "phase3_texts": work.phase3_texts,
    }


def part_by_part(
    bench: Workbench, work: Work, a_pair: dict[str, float], seconds: float
) -> dict[str, dict[str, float]]:
    """Like beside like: optimizer steps, and phase 3's states; what is left of our time the peers do not do at all.

    Our steps hold the validation after the last one.
    """
    log = (bench.run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = sum(json.loads(line).get("train_runtime", 0.0) for line in log)
    kept_back = sum(bench.run.seconds()[f"features_{fold.name}"] for fold in make_folds(bench))
    return {
        "optimizer steps": {
            "ours_seconds": round(steps, 1),
            "release_over_ours": round(a_pair["release"] * work.passes / steps, 2),
            "trl_over_ours": round(a_pair["trl"] * work.passes / steps, 2),
        },
        "states for the aggregators": {
            "ours_seconds": round(kept_back, 1),
            "release_over_ours": round(a_pair["release_phase3"] / 2 * work.phase3_texts / kept_back, 2),
        },
        "trunk, router, starting heads, validation, aggregators": {
            "ours_seconds": round(seconds - steps - kept_back, 1)
        },
    }


def show(result: dict) -> None:
    table = Table("who", "seconds", "over ours", "target")
    table.add_row("ours, measured", f"{result['ours_seconds']:.0f}", "1", "")
    for peer, seconds in result["estimated_seconds"].items():
        target = result["targets"][f"{peer}_over_ours"]
        said = "reached" if target["reached"] else "missed"
        table.add_row(
            f"{peer}, estimated", f"{seconds:.0f}", f"{target['value']:.2f}", f"{target['target']}: {said}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
