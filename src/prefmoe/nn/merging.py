"""Merging what several fine-tunings added to the same weights."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Deltas = Float[Tensor, "tasks ..."]  # of one weight tensor, whatever its shape


def elect_mask_rescale(deltas: Sequence[Deltas]) -> list[Deltas]:
    r"""EMR-merging: one delta for all tasks, and of each task a mask and a factor that fit it to the task.

    Of every weight the sign of $\sum_i \tau_i$ is elected, and with it the largest $|\tau_i|$ that has this sign:
    $\tau_{uni}$. Task $i$ takes it where its own delta has the same sign, $M_i = [\tau_i \tau_{uni} > 0]$, times one
    number for the whole model that gives back its mean size,
    $\lambda_i = \sum |\tau_i| / \sum |M_i \tau_{uni}|$.

    Args:
        deltas: What each task's training added to each weight tensor of a model.

    Returns:
        $\lambda_i M_i \tau_{uni}$, tensor for tensor: what task i adds to the model. 0 for a task that added nothing.

    Source:
        Huang et al. 2024, arXiv:2405.17461, section 3. Slow form: tests/reference/merging.py.

    Example:
        >>> elect_mask_rescale([torch.tensor([[1.0, -1.0], [3.0, 0.5]])])
        [tensor([[ 1.5000, -0.5000],
                [ 3.5000,  0.0000]])]
    """
    masked = [_elect_and_mask(delta) for delta in deltas]
    had, has = (
        torch.stack([_sizes(tensor) for tensor in tensors]).sum(dim=0) for tensors in (deltas, masked)
    )
    factors = torch.where(has > 0, had / has, 0.0)
    return [tensor * factors.to(tensor).view(-1, *[1] * (tensor.ndim - 1)) for tensor in masked]


def _elect_and_mask(delta: Deltas) -> Deltas:
    sign = delta.sum(dim=0).sign()
    agreeing = (delta * sign).clamp_min(0)  # |delta| where it has the elected sign
    return torch.where(agreeing > 0, sign * agreeing.amax(dim=0), 0.0)


def _sizes(delta: Deltas) -> Float[Tensor, " tasks"]:
    """Sum of absolute values, task by task, in float64: a model has many weights."""
    return delta.abs().flatten(1).sum(dim=1, dtype=torch.float64)
