"""Bradley-Terry fits on the features of pairs, with the strength of the penalty chosen by cross-validation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prefmoe.nn import bradley_terry_loss, fit_bradley_terry
from prefmoe.reward.texts import PairRow

_GRID = (1.0, 0.1, 0.03, 0.01, 0.003, 0.001)
_NUM_FOLDS = 3


def fit_by_cross_validation(
    differences: Tensor, rows: Sequence[PairRow], offset: Tensor | None = None, grid: Sequence[float] = _GRID
) -> Tensor:
    """Bradley-Terry weights with the L2 strength that predicts held-out prompts best.

    Args:
        differences: Standardized features of chosen minus rejected, shape (pairs, features).
        rows: The pairs; those of one prompt stay in one fold.
        offset: Margin of each pair that is given already, nats; None means 0.
        grid: Strengths to try, strongest first; the first of equals wins.
    """
    weight, label = columns(rows)
    # Rows of about unit length: one strength then means the same for 4 features and for 4,000.
    root = differences.shape[1] ** 0.5
    differences = differences / root
    given = torch.zeros(len(rows)) if offset is None else offset
    folds = prompt_folds(rows)
    losses = []
    for l2 in grid if folds else grid[:1]:
        total = 0.0
        for outside in folds:
            inside = ~outside
            fitted = fit_bradley_terry(
                differences[inside], l2=l2, weight=weight[inside], label=label[inside], offset=given[inside]
            )
            margins = differences[outside] @ fitted + given[outside]
            total += bradley_terry_loss(
                margins,
                torch.zeros_like(margins),
                weight=weight[outside],
                label=label[outside],
                reduction="sum",
            ).item()
        losses.append(total)
    best = grid[losses.index(min(losses))]
    return fit_bradley_terry(differences, l2=best, weight=weight, label=label, offset=given) / root


def prompt_folds(rows: Sequence[PairRow]) -> list[Tensor]:
    """Masks (pairs,) of three parts that share no prompt; none where there are fewer prompts than parts."""
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    if len(prompts) < _NUM_FOLDS:
        return []
    fold = torch.tensor([prompts[row.prompt] % _NUM_FOLDS for row in rows])
    return [fold == held for held in range(_NUM_FOLDS)]


def columns(rows: Sequence[PairRow]) -> tuple[Tensor, Tensor]:
    """Weights and labels of pairs."""
    return torch.tensor([row.weight for row in rows]), torch.tensor([row.label for row in rows])
