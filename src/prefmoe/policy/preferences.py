"""From what a data set calls a text's preference to the targets of the group loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prefmoe.errors import DataError, ShapeError
from prefmoe.nn import ExpertGroups
from prefmoe.policy.config import LossSides
from prefmoe.suggest import nearest

Preference = str | Mapping[str, float] | Sequence[float] | None


def preference_row(preference: Preference, groups: ExpertGroups) -> list[float]:
    """A preference as shares of the groups: summing to 1, or all 0 for a text without one.

    Args:
        preference: A group's name; shares by name, or in the order of the groups (any numbers of 0 or more); or None.
        groups: The adapter's.

    Raises:
        DataError: Unknown group, negative share, or another number of them.

    Example:
        >>> preference_row({"a": 1, "b": 3}, ExpertGroups(("a", "b"), (1, 1)))
        [0.25, 0.75]
    """
    if preference is None:
        return [0.0] * len(groups.names)
    if isinstance(preference, str):
        preference = {preference: 1.0}
    if isinstance(preference, Mapping):
        # A `datasets` column of dictionaries has every key in every row, None where it was not given.
        given = {name: share for name, share in preference.items() if share is not None}
        for name in given:
            if name not in groups.names:
                meant = nearest(name, groups.names)
                hint = f"; did you mean {meant!r}?" if meant else ""
                raise DataError(
                    f"preference {name!r} has no group; groups are {', '.join(groups.names)}{hint}"
                )
        shares = [float(given.get(name, 0.0)) for name in groups.names]
    else:
        shares = [float(share) for share in preference]
    total = sum(shares)
    if len(shares) != len(groups.names) or min(shares) < 0 or total == 0:
        raise DataError(
            f"preference {preference!r}: expected a share of 0 or more for each of {', '.join(groups.names)}, not all 0"
        )
    return [share / total for share in shares]


def as_target(
    preferences: Tensor, groups: ExpertGroups, *, batch_size: int, side: LossSides = "both"
) -> Tensor:
    """Preferences as (batch, groups) shares.

    Args:
        preferences: (batch,) numbers of groups, -1 for none; or (batch, groups) shares. Half as many rows as texts
            count for pairs: all chosen, then all rejected.
        groups: The adapter's.
        batch_size: Number of texts.
        side: Which side of pairs has a preference; the other gets none.

    Raises:
        ShapeError: Another number of rows or groups, or a group that does not exist.
    """
    num_groups = len(groups.names)
    if preferences.ndim == 1:
        highest = int(preferences.max()) if len(preferences) else -1
        if highest >= num_groups:
            raise ShapeError(
                f"preferences: there is no group {highest}; expected 0 to {num_groups - 1} "
                f"({', '.join(groups.names)}), or -1 for none"
            )
        known = preferences >= 0
        target = torch.nn.functional.one_hot(preferences.clamp_min(0).long(), num_groups).float()
        target = target * known.unsqueeze(1)
    else:
        target = preferences.float()
    if 2 * len(target) == batch_size:
        none = torch.zeros_like(target)
        target = torch.cat([none if side == "rejected" else target, none if side == "chosen" else target])
    if target.shape != (batch_size, num_groups):
        raise ShapeError(
            f"preferences: got {tuple(preferences.shape)} for {batch_size} texts and {num_groups} groups; give one "
            "number, or one share a group, for each text"
        )
    return target


def mask_of_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens the routers' losses count: (batch, seq), 1.0 or 0.0; None if nothing tells.

    An explicit `routing_mask` comes first. Where labels are given it is their tokens (-100 marks the others: prompts
    and padding), among those that the attention mask keeps.
    """
    if kwargs.get("routing_mask") is not None:
        explicit: Tensor = kwargs["routing_mask"]
        return explicit.float()
    labels, attention = kwargs.get("labels"), kwargs.get("attention_mask")
    if isinstance(attention, Tensor) and attention.ndim != 2:
        attention = None
    if isinstance(labels, Tensor) and labels.ndim == 2:
        mask = labels != -100
        return (mask if attention is None else mask & attention.bool()).float()
    if isinstance(attention, Tensor):
        return attention.float()
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(input_ids, Tensor) and input_ids.ndim == 2:
        return torch.ones(input_ids.shape, device=input_ids.device)
    embeds = kwargs.get("inputs_embeds")
    return torch.ones(embeds.shape[:2], device=embeds.device) if isinstance(embeds, Tensor) else None
