"""Phase 3: from the experts' states to one reward, fitted on pairs that the experts never saw."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefmoe.nn import (
    AggregatorKind,
    bradley_terry_loss,
    build_aggregator,
    fit_bradley_terry,
)
from prefmoe.reward.convex import columns, fit_by_cross_validation, prompt_folds
from prefmoe.reward.settings import Phase3Settings
from prefmoe.reward.texts import PairRow


class Units(NamedTuple):
    """What standardizes the states and scores of some experts."""

    state_mean: Tensor  # (experts, hidden)
    state_std: Tensor
    score_mean: Tensor  # (experts,)
    score_std: Tensor


@dataclass(frozen=True)
class ExpertFeatures:
    """What the experts of one task say of both sides of some pairs, standardized.

    Attributes:
        states: (pairs, 2, experts, hidden), chosen first.
        scores: (pairs, 2, experts).
        rows: The pairs.
        units: What they were standardized with.
    """

    states: Tensor
    scores: Tensor
    rows: Sequence[PairRow]
    units: Units

    def margins(self, aggregator: nn.Module) -> Tensor:
        """Reward of the chosen minus that of the rejected side, shape (pairs,)."""
        chosen, rejected = (aggregator(self.states[:, side], self.scores[:, side]) for side in (0, 1))
        return chosen - rejected

    def hits(self, aggregator: nn.Module) -> Tensor:
        """1 for every pair with a positive margin, 0.5 for a tie, else 0; shape (pairs,)."""
        with torch.no_grad():
            margins = self.margins(aggregator)
        return (margins > 0).float() + (margins == 0).float() / 2

    def part(self, mask: Tensor) -> "ExpertFeatures":
        """Those pairs for which `mask` (pairs,) is true."""
        rows = [row for row, wanted in zip(self.rows, mask.tolist(), strict=True) if wanted]
        return ExpertFeatures(self.states[mask], self.scores[mask], rows, self.units)

    def of_task_adapter(self) -> "ExpertFeatures":
        """What the first expert alone says: the task adapter."""
        units = Units(*(values[:1] for values in self.units))
        return ExpertFeatures(self.states[:, :, :1], self.scores[:, :, :1], self.rows, units)

    def accuracy(self, aggregator: nn.Module) -> float:
        """Mean of `hits`; 0.5 without pairs."""
        return self.hits(aggregator).mean().item() if len(self.rows) else 0.5


def standardized(
    states: Tensor, head_weight: Tensor, head_bias: Tensor, rows: Sequence[PairRow]
) -> ExpertFeatures:
    """Features from raw states (pairs, 2, experts, hidden), in the units of these very texts.

    Args:
        states: Pooled states.
        head_weight: (experts, hidden).
        head_bias: (experts,).
        rows: The pairs.
    """
    scores = (states * head_weight).sum(-1) + head_bias
    flat_states, flat_scores = states.flatten(0, 1), scores.flatten(0, 1)
    few = len(flat_states) < 2  # no spread can be measured
    units = Units(
        flat_states.mean(0) if not few else torch.zeros_like(head_weight),
        flat_states.std(0).clamp_min(1e-4) if not few else torch.ones_like(head_weight),
        flat_scores.mean(0) if not few else torch.zeros_like(head_bias),
        flat_scores.std(0).clamp_min(1e-4) if not few else torch.ones_like(head_bias),
    )
    return ExpertFeatures(
        (states - units.state_mean) / units.state_std,
        (scores - units.score_mean) / units.score_std,
        rows,
        units,
    )


def join_features(parts: Sequence[ExpertFeatures]) -> ExpertFeatures:
    """Features of several folds as one set; units are those of the first."""
    return ExpertFeatures(
        torch.cat([part.states for part in parts]),
        torch.cat([part.scores for part in parts]),
        [row for part in parts for row in part.rows],
        parts[0].units,
    )


def fit_aggregator(
    kind: AggregatorKind,
    features: ExpertFeatures,
    *,
    settings: Phase3Settings,
    seed: int,
) -> nn.Module:
    """One fitted aggregator.

    The linear ones are convex fits of what the task adapter's own score leaves unexplained (so few pairs leave it as
    it is), with the strength of the penalty chosen by cross-validation inside `features`. That score is each fold's
    own: the head of the finished adapter has seen these very pairs. The MLP is the paper's.

    Args:
        kind: Which.
        features: Pairs that the experts did not train on.
        settings: Of phase 3.
        seed: Of the MLP.
    """
    _, _, num_experts, hidden = features.states.shape
    torch.manual_seed(seed)
    aggregator = build_aggregator(kind, num_experts=num_experts, hidden=hidden)
    if kind == "task_head" or not len(features.rows):
        return aggregator
    if kind == "mlp":
        return _fit_mlp(aggregator, features, settings, seed=seed)
    weight, label = columns(features.rows)
    scores = features.scores[:, 0] - features.scores[:, 1]
    # How many nats one unit of the task head's score is worth: the margins that are known already.
    calibration = fit_bradley_terry(scores[:, :1], l2=1e-3, weight=weight, label=label)
    states = (features.states[:, 0] - features.states[:, 1]).flatten(1)
    differences = scores if kind == "linear_scores" else states
    solution = fit_by_cross_validation(differences, features.rows, scores[:, 0] * calibration)
    with torch.no_grad():
        weights = aggregator.get_parameter("weight")
        weights.copy_(solution.view_as(weights))
        if kind == "linear_scores":
            weights[0] += calibration[0]
        else:
            aggregator.get_parameter("head").copy_(calibration[0])
    return aggregator


def _fit_mlp(start: nn.Module, features: ExpertFeatures, settings: Phase3Settings, *, seed: int) -> nn.Module:
    """The paper's MLP, trained for as many epochs as were best on a third of the prompts kept from a first try.

    Not on validation pairs: those have to judge it beside the other kinds.
    """
    num_epochs = settings.mlp_epochs
    if folds := prompt_folds(features.rows):
        held_out = features.part(folds[0])
        tries = _mlp_epochs(start, features.part(~folds[0]), settings, seed=seed)
        accuracies = [held_out.accuracy(aggregator) for aggregator in tries]
        num_epochs = 1 + accuracies.index(max(accuracies))
    return next(islice(_mlp_epochs(start, features, settings, seed=seed), num_epochs - 1, None))


def _mlp_epochs(
    start: nn.Module, features: ExpertFeatures, settings: Phase3Settings, *, seed: int
) -> Iterator[nn.Module]:
    """A copy of `start` after each epoch of AdamW on cached features; the same module every time."""
    aggregator = copy.deepcopy(start)
    weight, label = columns(features.rows)
    optimizer = torch.optim.AdamW(aggregator.parameters(), lr=settings.mlp_learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.mlp_epochs):
        for part in torch.randperm(len(features.rows), generator=generator).split(64):
            batch = ExpertFeatures(features.states[part], features.scores[part], (), features.units)
            margins = batch.margins(aggregator)
            loss = bradley_terry_loss(
                margins, torch.zeros_like(margins), weight=weight[part], label=label[part]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield aggregator
