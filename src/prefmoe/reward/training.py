"""Training any number of experts at once: one pass, every batch row under its own expert."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from prefmoe.errors import ConfigError
from prefmoe.reward.batches import PairCollator, training_order
from prefmoe.reward.checkpoints import newest_complete
from prefmoe.reward.experts import Experts
from prefmoe.reward.features import fit_head, pooled_states
from prefmoe.reward.jobs import ExpertJob, TrainedExpert, TrainingSettings
from prefmoe.reward.trainer import ExpertTrainer, PairModule
from prefmoe.reward.trunk import Trunk
from prefmoe.runs.progress import Progress, silent


def start_experts(
    backbone: PreTrainedModel,
    experts: Experts,
    trunk: Trunk,
    jobs: Sequence[ExpertJob],
    *,
    settings: TrainingSettings,
    progress: Progress,
) -> None:
    """Loads every job's starting state and puts its head at the convex optimum on the states seen from there."""
    for expert, job in enumerate(jobs):
        if job.start is not None:
            experts.load_expert(expert, job.start)
    if not settings.head_start:
        return
    # Jobs with one start see equal states: one expert speaks for all of them.
    speaker: dict[int, int] = {}
    speakers = [speaker.setdefault(id(job.start), expert) for expert, job in enumerate(jobs)]
    rows = [
        (text, e)
        for e, job in zip(speakers, jobs, strict=True)
        for pair in job.head_pairs or job.train
        for text in (pair.chosen, pair.rejected)
    ]
    states = pooled_states(backbone, experts, trunk, rows, label="starting heads", progress=progress)
    first = 0
    for expert, job in enumerate(jobs):
        pairs = job.head_pairs or job.train
        mine = states[first : first + 2 * len(pairs)]
        first += len(mine)
        if not len(mine):
            continue
        weight = fit_head(mine[0::2], mine[1::2], pairs)
        with torch.no_grad():
            experts.head_weight[expert] = weight.to(experts.head_weight.device)


def train_experts(
    backbone: PreTrainedModel,
    experts: Experts,
    trunk: Trunk,
    jobs: Sequence[ExpertJob],
    *,
    settings: TrainingSettings,
    folder: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress = silent,
) -> dict[str, TrainedExpert]:
    """Trains all jobs in one pass and returns the best state of each.

    Args:
        backbone: Frozen; `experts` get attached to it for the time of the training.
        experts: As many as there are jobs, in their order.
        trunk: Gives the states below the experts.
        jobs: The experts to train.
        settings: How.
        folder: For checkpoints; an interrupted call goes on from the newest complete one. The caller removes it
            once the result is safe.
        seed: Of the order of the pairs.
        callbacks: Of the Trainer, for logs.
        progress: Shows how far it is.
    """
    torch.manual_seed(seed)
    experts.to(backbone.device)
    experts.gradient_checkpointing = settings.gradient_checkpointing
    experts.attach(backbone)
    try:
        trainer = _build_trainer(
            backbone,
            experts,
            trunk,
            jobs,
            settings=settings,
            folder=folder,
            seed=seed,
            callbacks=callbacks,
            progress=progress,
        )
        checkpoint = newest_complete(folder)
        if checkpoint is None:
            start_experts(backbone, experts, trunk, jobs, settings=settings, progress=progress)
            trainer.evaluate()
        else:
            trainer._load_from_checkpoint(str(checkpoint))
        # The Trainer also validates after its last step. It may have been killed after it had stopped early.
        if len(trainer.train_dataset) and not trainer.is_out_of_patience:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        best = [found for found in trainer.best if found is not None]
    finally:
        experts.detach()
    return {job.name: TrainedExpert(b.state, b.accuracy) for job, b in zip(jobs, best, strict=True)}


def work_on_one_device(arguments: TrainingArguments) -> None:
    """Keeps the Trainer from spreading one process over all GPUs that it sees (`nn.DataParallel`).

    Its threads would share the one note of which expert works on which row. Several GPUs take several processes:
    `accelerate launch`.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def _build_trainer(
    backbone: PreTrainedModel,
    experts: Experts,
    trunk: Trunk,
    jobs: Sequence[ExpertJob],
    *,
    settings: TrainingSettings,
    folder: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback],
    progress: Progress,
) -> ExpertTrainer:
    items = [(expert, pair) for expert, job in enumerate(jobs) for pair in job.train]
    order = training_order(items, trunk, settings, seed)
    use_cpu = backbone.device.type == "cpu"
    return ExpertTrainer(
        model=PairModule(backbone, experts),
        args=_training_arguments(settings, folder, num_pairs=len(order), seed=seed, use_cpu=use_cpu),
        train_dataset=order,
        eval_dataset=order[:1],  # the Trainer wants one; `evaluate` reads the jobs' own validation pairs
        data_collator=PairCollator(trunk),
        optimizers=(_optimizer(experts, settings), None),
        callbacks=list(callbacks),
        jobs=jobs,
        trunk=trunk,
        patience=settings.patience,
        progress=progress,
    )


def _training_arguments(
    settings: TrainingSettings, folder: Path, *, num_pairs: int, seed: int, use_cpu: bool
) -> TrainingArguments:
    """What the Trainer does with so many pairs: its steps, and who of several processes takes what of a batch."""
    steps = max(1, num_pairs // settings.batch_pairs)
    every = max(1, math.ceil(steps / settings.evaluations))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_pairs,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        warmup_steps=math.ceil(settings.warmup * steps),
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, steps // 50),
        report_to=settings.report_to,
        seed=seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,  # every bank takes part in every batch
        label_names=["label"],
        use_cpu=use_cpu,
    )
    work_on_one_device(arguments)
    parts = arguments.world_size * settings.accumulation
    if settings.batch_pairs % parts:
        raise ConfigError(
            f"batch_pairs={settings.batch_pairs} cannot be split evenly over {arguments.world_size} processes "
            f"x accumulation={settings.accumulation}; choose a multiple of {parts}"
        )
    arguments.per_device_train_batch_size = settings.batch_pairs // parts
    return arguments


def _optimizer(experts: Experts, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW without decay; heads have a learning rate of their own."""
    head = experts.head_weight
    groups: list[dict[str, Any]] = [
        {"params": [p for p in experts.parameters() if p.requires_grad and p is not head]},
        {"params": [head], "lr": settings.head_learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
