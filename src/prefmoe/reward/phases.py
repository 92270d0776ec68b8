"""The phases of DMoERM and of its baselines, as lists of experts to train.

One engine (`train_experts`) trains any number of experts at once; a phase says which, on what, from where:

    shared        one adapter on all tasks, the common start               (option)
    phase 1       one task adapter per task;  `single`: the same on all tasks
    phase 2       one expert per capability, from its task's adapter
    phase 3       see aggregators.py

A fold is a part of the pairs that is kept from phases 1 and 2, for the aggregators.
"""

import contextlib
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prefmoe.data.split import folds_by_prompt, prompt_hash, split_by_prompt
from prefmoe.records import PreferencePair
from prefmoe.reward.checkpoints import load_states, save_states
from prefmoe.reward.experts import Experts
from prefmoe.reward.jobs import ExpertJob, TrainedExpert, TrainingSettings
from prefmoe.reward.settings import Phase1Settings
from prefmoe.reward.texts import EncodedPairs, PairRow
from prefmoe.reward.training import train_experts
from prefmoe.reward.workbench import Workbench
from prefmoe.runs.run import LogCallback

Chooser = Callable[[PreferencePair, PairRow], bool]
ALL = ""  # the fold that keeps nothing back


@dataclass(frozen=True)
class Fold:
    """Which prompts phases 1 and 2 see, and which are kept for phase 3.

    By the hash of the prompt and not by the id of the pair: nobody promises that ids are unique, and one that stands
    twice would be on both sides.
    """

    name: str
    trained: frozenset[int]
    held_out: frozenset[int]


def make_folds(bench: Workbench) -> list[Fold]:
    """One fold for the paper's 60/40 split, two for cross-fitting."""
    settings, pairs = bench.settings.phase3, bench.train.pairs
    if settings.split == "paper":
        fractions = {"experts": settings.expert_fraction, "aggregator": 1 - settings.expert_fraction}
        parts = split_by_prompt(pairs, fractions, seed=bench.settings.seed)
        return [Fold("paper", prompts_of(parts["experts"]), prompts_of(parts["aggregator"]))]
    fold_of = folds_by_prompt(pairs, 2, seed=bench.settings.seed)
    halves = [prompts_of([p for p, f in zip(pairs, fold_of, strict=True) if f == fold]) for fold in (0, 1)]
    return [Fold(f"half{f}", halves[1 - f], halves[f]) for f in (0, 1)]


def prompts_of(pairs: Sequence[PreferencePair]) -> frozenset[int]:
    """Hashes of the prompts of pairs, as `PairRow.prompt` has them."""
    return frozenset(prompt_hash(pair.prompt) for pair in pairs)


def pairs_of(task: str | None = None, fold: Fold | None = None) -> Chooser:
    """Chooses the pairs of a task (None: of all); of a fold, those that its experts train on."""
    return lambda pair, row: (
        (task is None or pair.task == task) and (fold is None or row.prompt in fold.trained)
    )


def not_kept_back(fold: Fold) -> Chooser:
    """Chooses pairs, of any file, that the experts of a fold may see; those with equal sides say nothing."""
    return lambda pair, row: row.prompt not in fold.held_out and row.chosen != row.rejected


def select_rows(encoded: EncodedPairs, wanted: Chooser) -> list[PairRow]:
    """Rows of the pairs that are wanted."""
    return [row for pair, row in zip(encoded.pairs, encoded.rows, strict=True) if wanted(pair, row)]


def capability_rows(encoded: EncodedPairs, task: str, name: str, wanted: Chooser) -> list[PairRow]:
    """Rows of a task's pairs as one capability sees them.

    The label is the pair's soft label, else 1 or 0 by the better side; ties and pairs without either are left out.
    """
    labels = (
        (pair, row, _capability_label(pair, name))
        for pair, row in zip(encoded.pairs, encoded.rows, strict=True)
    )
    return [
        row._replace(label=label, target_margin=0.0)
        for pair, row, label in labels
        if pair.task == task and label is not None and wanted(pair, row)
    ]


def _capability_label(pair: PreferencePair, name: str) -> float | None:
    side = pair.capabilities.get(name, 0)
    hard = None if side == 0 else float(side > 0)
    return pair.capability_probabilities.get(name, hard)


def draw(rows: Sequence[PairRow], limit: int | None, seed: int) -> list[PairRow]:
    """At most `limit` rows, drawn by seed."""
    return (
        list(rows) if limit is None or len(rows) <= limit else random.Random(seed).sample(list(rows), limit)
    )


def expert_name(task: str, capability: str = "", fold: str = ALL) -> str:
    """Name of an expert in step files and logs.

    The signs that part the name are escaped in what users named, so that two experts never have one name.
    """
    task, capability = (_escaped(name) for name in (task, capability))
    return task + (f"/{capability}" if capability else "") + (f"@{fold}" if fold else "")


def _escaped(name: str) -> str:
    return "".join(f"%{ord(sign):02X}" if sign in "%/@|" else sign for sign in name)


def train_stage(
    bench: Workbench,
    name: str,
    jobs: Sequence[ExpertJob],
    settings: TrainingSettings,
    *,
    rank: int | None = None,
    full: bool = False,
) -> dict[str, TrainedExpert]:
    """Trains experts as one step of the run.

    Args:
        bench: What is worked on.
        name: Of the step.
        jobs: The experts.
        settings: How.
        rank: Another LoRA rank than the settings', with alpha scaled along.
        full: Train full-size deltas instead of LoRA.
    """
    limit, seed = settings.validation_pairs, bench.settings.seed
    jobs = [replace(job, validation=draw(job.validation, limit, seed)) for job in jobs]

    def compute() -> dict[str, TrainedExpert]:
        torch.manual_seed(bench.settings.seed)
        experts = _new_experts(bench, jobs, rank=rank, full=full)
        pairs = sum(len(job.train) for job in jobs)
        steps = -(-int(pairs * settings.epochs) // settings.batch_pairs)
        with bench.progress(f"{name}: {len(jobs)} experts", steps) as advance:
            return train_experts(
                bench.backbone,
                experts,
                bench.trunk,
                jobs,
                settings=settings,
                folder=folder,
                seed=bench.settings.seed,
                callbacks=[LogCallback(bench.run, name, advance)],
                progress=bench.progress,
            )

    def save(file: Path, trained: dict[str, TrainedExpert]) -> None:
        info = {key: expert.accuracy for key, expert in trained.items()}
        save_states(file, {key: expert.state for key, expert in trained.items()}, info)

    def load(file: Path) -> dict[str, TrainedExpert]:
        states, info = load_states(file)
        return {key: TrainedExpert(states[key], accuracy) for key, accuracy in info.items()}

    folder = bench.run.folder / "checkpoints" / name
    trained = bench.run.step(f"{name}.safetensors", compute, save, load, together=True)
    if bench.run.is_main:
        _remove_checkpoints(folder)
    return trained


def _remove_checkpoints(folder: Path) -> None:
    """All that is there but what `report_to` wrote."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for empty in (folder, folder.parent):
        with contextlib.suppress(OSError):  # not there, or not empty
            empty.rmdir()


def _new_experts(bench: Workbench, jobs: Sequence[ExpertJob], *, rank: int | None, full: bool) -> Experts:
    """As many experts as jobs, on full-size deltas where they train them or start from them."""
    parents = list(dict.fromkeys(id(job.start) for job in jobs if job.start and "head.weight" in job.start))
    on_deltas = any(key.endswith(".delta") for job in jobs for key in job.start or ())
    num_dense = len(jobs) if full else len(parents) if on_deltas else 0
    experts = bench.new_experts(len(jobs), rank=rank, num_dense=num_dense)
    if full:
        experts.dense_ids.copy_(torch.arange(len(jobs)))
        experts.sites.requires_grad_(False)
    elif on_deltas:
        experts.dense_ids.copy_(torch.tensor([parents.index(id(job.start)) for job in jobs]))
        experts.dense.requires_grad_(False)
    return experts


def train_shared(bench: Workbench, folds: Sequence[Fold]) -> Mapping[str, TrainedExpert]:
    """One short adapter on all tasks for every fold, keyed by fold; none where tasks start on their own."""
    phase1 = bench.settings.phase1
    if phase1.shared_start == 0:
        return {}
    validation = list(bench.validation.rows)
    jobs = [
        ExpertJob(
            expert_name("shared", fold=f.name),
            select_rows(bench.train, pairs_of(fold=f)),
            validation,
        )
        for f in folds
    ]
    settings = phase1.model_copy(update={"epochs": phase1.shared_start})
    trained = train_stage(bench, "shared", jobs, settings, full=phase1.method == "full")
    return {fold.name: trained[job.name] for fold, job in zip(folds, jobs, strict=True)}


def train_task_adapters(
    bench: Workbench, folds: Sequence[Fold], shared: Mapping[str, TrainedExpert], *, single: bool
) -> dict[str, TrainedExpert]:
    """Phase 1: all task adapters of all folds, and the single model, in one pass."""
    starts = {fold: expert.state for fold, expert in shared.items()}
    jobs = [
        ExpertJob(
            expert_name(task, fold=fold.name),
            select_rows(bench.train, pairs_of(task, fold)),
            select_rows(bench.validation, pairs_of(task)),
            starts.get(fold.name),
        )
        for fold in folds
        for task in bench.tasks
    ]
    if single:
        jobs.append(ExpertJob("single@", bench.train.rows, bench.validation.rows, starts.get(ALL)))
    phase1 = bench.settings.phase1
    settings = phase1.model_copy(update={"epochs": phase1.epochs - phase1.shared_start})
    return train_stage(bench, "phase1", jobs, settings, full=phase1.method == "full")


def train_wide(bench: Workbench) -> TrainedExpert:
    """`single_wide`: one adapter on all tasks, as large as all experts of DMoERM together."""
    num_experts = sum(1 + len(names) for names in bench.tasks.values())
    job = ExpertJob("single_wide", bench.train.rows, bench.validation.rows)
    phase1: Phase1Settings = bench.settings.phase1
    rank = bench.settings.experts.rank * num_experts
    return train_stage(bench, "single_wide", [job], phase1, rank=rank)["single_wide"]


def train_capability_experts(
    bench: Workbench, folds: Sequence[Fold], task_adapters: Mapping[str, TrainedExpert]
) -> dict[str, TrainedExpert]:
    """Phase 2: every capability expert of every fold in one pass, each from its task's adapter.

    Its head starts from all labelled pairs, those of `data.capability_train` too (of a fold, those of prompts that are
    not kept back); LoRA learns from as many of them as the settings allow.
    """
    limit = bench.settings.phase2.max_pairs_per_capability
    jobs = []
    for fold in folds:
        for task, names in bench.capabilities.items():
            start = task_adapters[expert_name(task, fold=fold.name)].state
            for name in names:
                known = capability_rows(bench.train, task, name, pairs_of(task, fold))
                known += capability_rows(bench.capability_train, task, name, not_kept_back(fold))
                held = capability_rows(bench.validation, task, name, pairs_of(task))
                rows = draw(known, limit, bench.settings.seed)
                jobs.append(ExpertJob(expert_name(task, name, fold.name), rows, held, start, known))
    return train_stage(bench, "phase2", jobs, bench.settings.phase2) if jobs else {}
