"""Training any number of experts at once: one pass, every batch row under its own expert."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations

from prefmoe.errors import ConfigError
from prefmoe.nn import bradley_terry_loss
from prefmoe.reward.checkpoints import ExpertCheckpoint, newest_complete
from prefmoe.reward.experts import Experts, ExpertState
from prefmoe.reward.features import fit_head, pooled_states
from prefmoe.reward.progress import Progress, silent
from prefmoe.reward.texts import PairRow
from prefmoe.reward.trunk import Trunk


class TrainingSettings(BaseModel):
    """How experts are trained. Steps are optimizer steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(1.0, ge=0, description="passes over every expert's own pairs; 0 keeps the start")
    batch_pairs: int = Field(16, ge=1, description="pairs of one optimizer step, over all processes")
    accumulation: int = Field(1, ge=1, description="forward passes that share one optimizer step")
    learning_rate: float = Field(2e-4, gt=0, description="of LoRA; falls linearly to 0")
    head_learning_rate: float = Field(1e-4, gt=0, description="of the linear heads")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are cut to this")
    evaluations: int = Field(3, ge=1, description="validations of one training, evenly spread")
    validation_pairs: int | None = Field(
        100, ge=1, description="pairs of one expert that a validation looks at; None takes all"
    )
    patience: int = Field(
        0, ge=0, description="validations without gain of any expert before stopping; 0 never"
    )
    head_start: bool = Field(True, description="start heads at the convex optimum on the starting states")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    report_to: str = Field("none", description="`tensorboard`, `wandb`, ...: as in transformers")

    @field_validator("report_to")
    @classmethod
    def _is_installed(cls, name: str) -> str:
        known = ["none", *get_available_reporting_integrations()]
        if name not in known:
            raise ValueError(f"report_to={name!r} is not installed; install it or choose {', '.join(known)}")
        return name


@dataclass(frozen=True)
class ExpertJob:
    """One expert to train: its name, its pairs, where it starts."""

    name: str
    train: Sequence[PairRow]
    validation: Sequence[PairRow]
    start: ExpertState | None = None


@dataclass(frozen=True)
class TrainedExpert:
    """The best state of an expert and its accuracy on the validation pairs (ties count one half)."""

    state: ExpertState
    accuracy: float


class PairModule(nn.Module):
    """What the Trainer sees: pairs in, loss and margins out."""

    def __init__(self, backbone: PreTrainedModel, experts: Experts) -> None:
        super().__init__()
        self.backbone, self.experts = backbone, experts

    def forward(
        self,
        *,
        trunk: Tensor,
        lengths: Tensor,
        starts: Tensor,
        expert_ids: Tensor,
        label: Tensor,
        weight: Tensor,
        target_margin: Tensor,
    ) -> dict[str, Tensor]:
        """Summed Bradley-Terry loss of pairs: the first half of the rows are chosen texts, the others rejected."""
        states = self.experts.states(self.backbone, trunk, lengths, starts, expert_ids=expert_ids)
        chosen, rejected = self.experts.scores(states, expert_ids).chunk(2)
        # A sum: the Trainer divides by the weight of the whole optimizer step, of which this may be a part.
        loss = bradley_terry_loss(
            chosen, rejected, target_margin=target_margin, weight=weight, label=label, reduction="sum"
        )
        return {"loss": loss, "margins": (chosen - rejected).detach()}


Item = tuple[int, PairRow]  # expert, pair


@dataclass(frozen=True)
class PairCollator:
    """Items to the arguments of `PairModule.forward`."""

    trunk: Trunk

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """One batch."""
        pairs = [pair for _, pair in items]
        trunk, lengths, starts = self.trunk.batch([p.chosen for p in pairs] + [p.rejected for p in pairs])
        columns = {
            name: torch.tensor([getattr(p, name) for p in pairs])
            for name in ("label", "weight", "target_margin")
        }
        expert_ids = torch.tensor([expert for expert, _ in items] * 2)
        return {"trunk": trunk, "lengths": lengths, "starts": starts, "expert_ids": expert_ids, **columns}


def training_order(items: Sequence[Item], trunk: Trunk, settings: TrainingSettings, seed: int) -> list[Item]:
    """Every item of every epoch in the order of training: shuffled, similar lengths in one batch.

    Written out in advance so that a resumed run, or one with more processes, sees the same batches.
    """

    def length(item: Item) -> int:
        return max(trunk.table.length(text) for text in item[1][:2])

    rng = random.Random(seed)
    order: list[Item] = []
    rest: list[Item] = []
    size = settings.batch_pairs
    left = math.ceil(len(items) * settings.epochs)
    while left > 0:
        epoch = rest + rng.sample(items, k=min(len(items), left))
        left -= len(epoch) - len(rest)
        blocks = [epoch[i : i + 16 * size] for i in range(0, len(epoch), 16 * size)]
        batches = []
        for block in blocks:
            block.sort(key=length)
            batches += [block[i : i + size] for i in range(0, len(block), size)]
        # A short batch may only come last of all: the Trainer cuts the order into batches again.
        rest = batches.pop() if len(batches[-1]) < size else []
        rng.shuffle(batches)
        order += [item for batch in batches for item in batch]
    # A text of no weight fills the last batch: several processes would else fill it with pairs that count.
    filler = [(e, pair._replace(weight=0.0)) for e, pair in rest and [min(items, key=length)]]
    return order + rest + filler * (-len(rest) % size)


class ExpertTrainer(Trainer):
    """A Trainer that validates every expert on its own pairs and remembers the best state of each.

    The loss of an optimizer step is the weighted mean over all of its pairs, in however many forward passes
    and processes they come.
    """

    control: TrainerControl
    loss_is_scaled_for_ga = True

    def __init__(
        self, *, jobs: Sequence[ExpertJob], trunk: Trunk, patience: int, progress: Progress, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.jobs, self.trunk, self.patience, self.progress = jobs, trunk, patience, progress
        self.best: list[ExpertCheckpoint | None] = [None] * len(jobs)
        self.without_gain = 0
        self.remove_callback(PrinterCallback)  # stdout is for results

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many validations brought no gain that training stops."""
        return bool(self.patience) and self.without_gain >= self.patience

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of one optimizer step, and the summed weight of its pairs in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weight = torch.stack([batch["weight"].sum() for batch in batches]).sum().to(device)
        return batches, self.accelerator.gather(weight).sum()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **kwargs: Any) -> Tensor:
        """Share of a batch in the mean loss of its optimizer step."""
        loss: Tensor = model(**inputs)["loss"]
        # Processes average their gradients, which here are shares of one sum.
        return loss * self.accelerator.num_processes / kwargs["num_items_in_batch"].clamp_min(1e-9)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validates all experts; returns accuracies by name and their mean."""
        module: PairModule = self.accelerator.unwrap_model(self.model)
        results = validate(module.backbone, module.experts, self.trunk, self.jobs)
        gained = not any(job.validation for job in self.jobs)
        for expert, (accuracy, loss) in enumerate(results):
            best = self.best[expert]
            unknown = not self.jobs[expert].validation  # then the last state is as good a choice as any
            if best is None or unknown or (accuracy, -loss) > (best.accuracy, -best.loss):
                self.best[expert] = ExpertCheckpoint(module.experts.expert_state(expert), accuracy, loss)
                gained = gained or not unknown
        self.without_gain = 0 if gained else self.without_gain + 1
        if self.is_out_of_patience:
            self.control.should_training_stop = True
        metrics = {
            f"eval_accuracy/{job.name}": result[0] for job, result in zip(self.jobs, results, strict=True)
        }
        metrics["eval_accuracy"] = sum(metrics.values()) / len(metrics)
        metrics["eval_loss"] = sum(loss for _, loss in results) / len(results)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.args.should_save:  # the Trainer asks every process
            return
        module: PairModule = self.accelerator.unwrap_model(self.model)
        current = [module.experts.expert_state(expert) for expert in range(len(self.jobs))]
        ExpertCheckpoint.save_all(folder, current=current, best=self.best, without_gain=self.without_gain)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        module: PairModule = self.accelerator.unwrap_model(model or self.model)
        current, self.best, self.without_gain = ExpertCheckpoint.load_all(Path(resume_from_checkpoint))
        for expert, state in enumerate(current):
            module.experts.load_expert(expert, state)


def validate(
    backbone: PreTrainedModel, experts: Experts, trunk: Trunk, jobs: Sequence[ExpertJob]
) -> list[tuple[float, float]]:
    """Accuracy (ties one half) and loss (nats) of every expert on its validation pairs; (0.5, ln 2) without any."""
    rows = [
        (text, e)
        for e, job in enumerate(jobs)
        for pair in job.validation
        for text in (pair.chosen, pair.rejected)
    ]
    states = pooled_states(backbone, experts, trunk, rows, label="validation") if rows else torch.empty(0)
    results, first = [], 0
    for expert, job in enumerate(jobs):
        mine = states[first : first + 2 * len(job.validation)]
        first += len(mine)
        if not len(mine):
            results.append((0.5, math.log(2)))
            continue
        with torch.no_grad():
            weight, bias = experts.head_weight[expert].cpu(), experts.head_bias[expert].cpu()
            scores = mine @ weight + bias
        chosen, rejected = scores[0::2], scores[1::2]
        label = torch.tensor([pair.label for pair in job.validation])
        right = torch.where(label >= 0.5, chosen - rejected, rejected - chosen)
        accuracy = (right > 0).float().mean() + (right == 0).float().mean() / 2
        results.append((accuracy.item(), bradley_terry_loss(chosen, rejected, label=label).item()))
    return results


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
        for pair in job.train
        for text in (pair.chosen, pair.rejected)
    ]
    states = pooled_states(backbone, experts, trunk, rows, label="starting heads", progress=progress)
    first = 0
    for expert, job in enumerate(jobs):
        mine = states[first : first + 2 * len(job.train)]
        first += len(mine)
        if not len(mine):
            continue
        weight = fit_head(mine[0::2], mine[1::2], job.train)
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
    steps = max(1, len(order) // settings.batch_pairs)
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
        use_cpu=backbone.device.type == "cpu",
    )
    parts = arguments.world_size * settings.accumulation
    if settings.batch_pairs % parts:
        raise ConfigError(
            f"batch_pairs={settings.batch_pairs} cannot be split evenly over {arguments.world_size} processes "
            f"x accumulation={settings.accumulation}; choose a multiple of {parts}"
        )
    arguments.per_device_train_batch_size = settings.batch_pairs // parts
    head = experts.head_weight
    groups: list[dict[str, Any]] = [
        {"params": [p for p in experts.parameters() if p.requires_grad and p is not head]},
        {"params": [head], "lr": settings.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
    return ExpertTrainer(
        model=PairModule(backbone, experts),
        args=arguments,
        train_dataset=order,
        eval_dataset=order[:1],  # the Trainer wants one; `evaluate` reads the jobs' own validation pairs
        data_collator=PairCollator(trunk),
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
        jobs=jobs,
        trunk=trunk,
        patience=settings.patience,
        progress=progress,
    )
