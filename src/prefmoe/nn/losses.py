r"""Preference losses: functions of rewards, in nats.

Preference data say which of two completions is better, not how good either is. A reward model learns from
them through the Bradley--Terry model: completion $c$ beats $r$ with probability $\sigma(r_c - r_r)$. Only
differences of rewards matter, so rewards have no zero of their own; a constant added to all changes nothing.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from prefmoe.errors import ConfigError
from prefmoe.nn.precision import at_least_float32
from prefmoe.shapes import Rewards

Reduction = Literal["mean", "sum", "none"]


def bradley_terry_loss(
    chosen: Rewards,
    rejected: Rewards,
    *,
    target_margin: Rewards | None = None,
    weight: Rewards | None = None,
    label: Rewards | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, " *out"]:
    r"""Negative log-likelihood that `chosen` beats `rejected` (Bradley--Terry), in nats.

    With target margin $m$ the loss of a pair whose first side is better is
    $\ell(c, r) = -\log\sigma(r_c - r_r - m)$; 0.6931 ($\ln 2$) means the model cannot tell the two apart.
    A label $q$ that is not certain gives the expected loss $q\,\ell(c, r) + (1 - q)\,\ell(r, c)$: whichever
    side is better has to lead by $m$. So swapping the two sides and replacing $q$ by $1 - q$ changes nothing.

    Args:
        chosen: Rewards of the preferred completions.
        rejected: Rewards of the other completions, row for row with `chosen`.
        target_margin: How much the better side should lead, reward units, at least 0. None means 0.
        weight: Share of each pair in the loss, at least 0. None means 1. A pair of weight 0 is as if it
            were not there, even if its rewards are not finite.
        label: Probability in [0, 1] that `chosen` is the better side. None means 1.
        reduction: "mean" is sum(weight * loss) / sum(weight), and 0 if no pair has weight; "sum" is
            sum(weight * loss); "none" is weight * loss for each pair.

    Returns:
        A scalar, or a tensor of shape (pairs,) with `reduction="none"`.

    Raises:
        ConfigError: `reduction` is not one of the three names.

    Numerics:
        Uses softplus, finite where `log(sigmoid(x))` is -inf (below about -89 in float32); the gradient of
        a pair stays in [-1, 1]. Computed in float32 or wider.

    Source:
        Ouyang et al. 2022, arXiv:2203.02155, Eq. 1. Target margin: Touvron et al. 2023, arXiv:2307.09288,
        Eq. 2. Uncertain labels: the expectation of that loss, ours. Slow form: tests/reference/losses.py.

    Example:
        >>> margin_of_one = bradley_terry_loss(torch.tensor([1.0]), torch.tensor([0.0]))
        >>> f"{margin_of_one:.4f}"
        '0.3133'
    """
    if reduction not in get_args(Reduction):
        message = f"bradley_terry_loss: unknown reduction; got {reduction!r}; choose 'mean', 'sum' or 'none'."
        raise ConfigError(message)
    margin = at_least_float32(chosen) - at_least_float32(rejected)
    if weight is None:
        weight = torch.ones_like(margin)
    needed = torch.zeros_like(margin) if target_margin is None else target_margin
    # Zeroed before softplus and not after: 0 * nan is nan, in the backward pass too.
    margin, needed = margin.where(weight > 0, 0.0), needed.where(weight > 0, 0.0)
    losses = F.softplus(needed - margin)
    if label is not None:
        losses = label * losses + (1 - label) * F.softplus(needed + margin)
    if reduction == "mean":
        return weighted_mean(losses, weight)
    return (weight * losses).sum() if reduction == "sum" else weight * losses


def weighted_mean(values: Float[Tensor, " rows"], weight: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Sum of weight times value over the sum of the weights; exactly 0, gradient too, if no row has weight.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])).item()
        2.0
    """
    total = weight.sum()
    return (weight * values).sum() / total.where(total > 0, 1.0)
