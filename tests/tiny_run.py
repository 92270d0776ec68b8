"""Whole training runs of seconds: short texts with a planted rule, a random backbone, a byte tokenizer."""

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import TrainerCallback

from data_helpers import CHATML, assistant, byte_tokenizer, user
from prefmoe.records import PreferencePair
from prefmoe.reward.assemble import rows_by_task
from prefmoe.reward.experts import Experts
from prefmoe.reward.jobs import ExpertJob, TrainedExpert, TrainingSettings
from prefmoe.reward.settings import RewardSettings, check_settings
from prefmoe.reward.training import train_experts
from prefmoe.reward.workbench import Workbench, build_workbench
from prefmoe.runs.precision import resolve_dtype
from tiny import tiny_backbone

# What people like: the same word is good in one task and bad in the other, so one head for both must fail.
LIKED = {"cold": "zq", "hot": "ok"}
DISLIKED = {"cold": "ok", "hot": "zq"}
# Words that a capability counts; they say nothing about which side people like.
CAPABILITIES = {"cold": {"soft": "mm"}, "hot": {"loud": "!!", "soft": "mm"}}
_FILLER = ("ab", "cd", "ef", "gh")
ALL_METHODS = ["single", "single_wide", "per_task", "dmoerm"]


def planted_pairs(
    num_per_task: int, *, split: str, tasks: Iterable[str] = LIKED, seed: int = 0
) -> list[PreferencePair]:
    """Pairs whose better side holds the word that its task likes; true capability labels; no prompt twice."""
    return [_planted_pair(f"{split}/{task}/{i}", task, seed) for i in range(num_per_task) for task in tasks]


def _planted_pair(name: str, task: str, seed: int) -> PreferencePair:
    rng = random.Random(f"{seed}/{name}")
    present = {
        side: {word: rng.random() < 0.5 for word in CAPABILITIES[task].values()} for side in ("good", "bad")
    }
    texts = []
    for side, word in (("good", LIKED[task]), ("bad", DISLIKED[task])):
        words = [word, *(mark for mark, there in present[side].items() if there), rng.choice(_FILLER)]
        rng.shuffle(words)
        texts.append(" ".join(words))
    return PreferencePair(
        id=name,
        prompt=user(f"{task} {name.removeprefix('split/')}"),
        chosen=assistant(texts[0]),
        rejected=assistant(texts[1]),
        task=task,
        capabilities={
            capability: present["good"][word] - present["bad"][word]
            for capability, word in CAPABILITIES[task].items()
        },
    )


def planted_splits(
    num_train: int = 32, *, num_validation: int = 10, num_test: int = 16, seed: int = 0
) -> dict[str, list[PreferencePair]]:
    """Train, validation and test pairs, each so many a task."""
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    return {split: planted_pairs(size, split=split, seed=seed) for split, size in sizes.items()}


def with_random_labels(pairs: list[PreferencePair], seed: int = 0) -> list[PreferencePair]:
    """Every second pair, drawn by seed, with its sides exchanged."""
    rng = random.Random(seed)
    return [pair.swap() if rng.random() < 0.5 else pair for pair in pairs]


def flipped(pairs: list[PreferencePair]) -> list[PreferencePair]:
    """Every pair with its sides exchanged."""
    return [pair.swap() for pair in pairs]


def tiny_settings(out: Path, **changes: object) -> RewardSettings:
    """Settings of a run of seconds; a dict in `changes` is merged into its section."""
    training = {
        "epochs": 2.0,
        "batch_pairs": 8,
        "learning_rate": 1e-2,
        "head_learning_rate": 1e-2,
        "evaluations": 2,
        "head_start": False,  # dozens of convex fits take longer than all the rest
    }
    content: dict[str, object] = {
        "data": {"train": "given by the test"},
        "backbone": {"name": "tiny", "dtype": "float32", "max_length": 64, "batch_tokens": 4096},
        "experts": {"split_layer": 1, "rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "up_proj"]},
        "phase1": training,
        "phase2": training,
        "phase3": {
            "split": "crossfit",
            "kinds": ["linear_scores", "mlp"],
            "mlp_epochs": 2,
            "mlp_learning_rate": 1e-3,
        },
        "methods": ALL_METHODS,
        "out": str(out),
    }
    for key, value in changes.items():
        old = content.get(key)
        content[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return check_settings(content, where="tiny_run")


def tiny_bench(
    settings: RewardSettings, pairs: dict[str, list[PreferencePair]] | None = None, **options: object
) -> Workbench:
    """A workbench on a random backbone of three layers."""
    dtype = resolve_dtype(settings.backbone.dtype, torch.device("cpu"))
    return build_workbench(
        settings,
        pairs=pairs or planted_splits(),
        backbone=tiny_backbone(layers=3, dtype=dtype),
        tokenizer=byte_tokenizer(CHATML),
        **options,
    )


def task_jobs(bench: Workbench) -> list[ExpertJob]:
    """One job a task, on all of its pairs."""
    train, validation = rows_by_task(bench, "train"), rows_by_task(bench, "validation")
    return [ExpertJob(task, train[task], validation[task]) for task in bench.tasks]


def tiny_experts(bench: Workbench, num_experts: int, **changes: object) -> Experts:
    """Untrained experts as the bench's settings say, the same every time."""
    torch.manual_seed(0)
    sizes = bench.settings.experts
    return Experts(
        bench.backbone,
        num_experts=num_experts,
        **{
            "split_layer": sizes.split_layer,
            "rank": sizes.rank,
            "alpha": sizes.alpha,
            "target_modules": sizes.target_modules,
            "pooling": sizes.pooling,
            **changes,
        },
    )


def train_tiny(
    bench: Workbench,
    folder: Path,
    jobs: list[ExpertJob] | None = None,
    *,
    experts: Experts | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    seed: int = 0,
    **changes: object,
) -> dict[str, TrainedExpert]:
    """Trains jobs (None: one a task) for a few steps, from heads at zero, nothing around it."""
    settings: dict[str, object] = {
        "batch_pairs": 8,
        "learning_rate": 1e-2,
        "head_learning_rate": 1e-2,
        "evaluations": 2,
        "head_start": False,
    }
    jobs = task_jobs(bench) if jobs is None else jobs
    return train_experts(
        bench.backbone,
        experts or tiny_experts(bench, len(jobs)),
        bench.trunk,
        jobs,
        settings=TrainingSettings(**(settings | changes)),
        folder=folder,
        seed=seed,
        callbacks=list(callbacks),
    )
