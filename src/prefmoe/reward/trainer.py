"""The Trainer of experts, and the validation of every expert on its own pairs."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerControl

from prefmoe.nn import Packing, bradley_terry_loss
from prefmoe.reward.checkpoints import ExpertCheckpoint
from prefmoe.reward.experts import Experts
from prefmoe.reward.features import pooled_states
from prefmoe.reward.jobs import ExpertJob
from prefmoe.reward.trunk import Trunk
from prefmoe.runs.progress import Progress
from prefmoe.runs.run import writing_checkpoint


class PairModule(nn.Module):
    """What the Trainer sees: pairs in, loss and margins out."""

    def __init__(self, backbone: PreTrainedModel, experts: Experts) -> None:
        super().__init__()
        self.backbone, self.experts = backbone, experts

    def forward(
        self,
        *,
        trunk: Tensor,
        packing: Packing,
        starts: Tensor,
        expert_ids: Tensor,
        label: Tensor,
        weight: Tensor,
        target_margin: Tensor,
    ) -> dict[str, Tensor]:
        """Summed Bradley-Terry loss of pairs: the first half of the texts are the chosen ones, the others rejected."""
        states = self.experts.states(self.backbone, trunk, packing, starts)
        chosen, rejected = self.experts.scores(states, expert_ids).chunk(2)
        # A sum: the Trainer divides by the weight of the whole optimizer step, of which this may be a part.
        loss = bradley_terry_loss(
            chosen, rejected, target_margin=target_margin, weight=weight, label=label, reduction="sum"
        )
        return {"loss": loss, "margins": (chosen - rejected).detach()}


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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing_checkpoint(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

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
