"""What the routers of a policy do on texts of each preference (the paper's figure 5), as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from prefmoe.nn import ExpertGroups
from prefmoe.policy.config import EMPTY
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.pairs import Text
from prefmoe.policy.routing import RouterRecord
from prefmoe.runs.progress import Progress, silent


class RoutingTable(BaseModel):
    """Mean weight of every group, and of the empty expert, at every router, over the texts of each preference.

    Attributes:
        groups: Names; "empty" last, where there is an empty expert.
        routers: Names, from the bottom of the model to its top.
        weights: For each preference a row a router, a number a group; each row sums to 1 with dense routing.
        own_group_first: For each preference the share of texts whose own group has the largest share of what is not
            on the empty expert, averaged over routers and the completion's tokens.
    """

    groups: list[str]
    routers: list[str]
    weights: dict[str, list[list[float]]]
    own_group_first: dict[str, float]


class Inspection(NamedTuple):
    """Log-probabilities of texts, and what the routers did meanwhile."""

    logps: Tensor  # (texts,) nats
    table: RoutingTable
    hits: Tensor  # (texts,) 1.0 where the text's own group comes first


@dataclass
class _Collected:
    weights: dict[int, Tensor] = field(default_factory=dict)  # text -> (routers, groups)
    shares: dict[int, Tensor] = field(default_factory=dict)  # text -> (groups,)
    routers: list[str] = field(default_factory=list)

    def take(self, records: list[RouterRecord], texts: Sequence[int], groups: ExpertGroups) -> None:
        self.routers = [record.router for record in records]
        weights = torch.stack(
            [record.weights for record in records], dim=1
        ).cpu()  # (texts, routers, choices)
        sizes = [*groups.sizes, *([1] if groups.has_empty else [])]
        by_group = torch.stack([part.sum(dim=-1) for part in weights.split(sizes, dim=-1)], dim=-1)
        shares = torch.stack([record.shares for record in records]).mean(dim=0).cpu()
        for row, text in enumerate(texts):
            self.weights[text], self.shares[text] = by_group[row], shares[row]
        records.clear()


def inspect_routing(
    model: nn.Module,
    texts: Sequence[Text],
    preferences: Sequence[str],
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
    label: str = "routing",
) -> Inspection:
    """Log-probabilities of completions under a PMoL policy, and its routing on their tokens.

    Args:
        model: A PeftModel with a PMoL adapter.
        texts: Prompts with completions.
        preferences: Of each text.
        batch_tokens: Tokens of one forward pass.
        progress: Shows how far it is.
        label: What it is called there.
    """
    tuner: Any = model.base_model
    groups: ExpertGroups = tuner.routings[tuner.active_adapters[0]].groups
    collected = _Collected()
    with tuner.recorded_routing() as records:
        logps = completion_logps(
            model,
            texts,
            batch_tokens=batch_tokens,
            routing_mask=True,
            watch=lambda batch: collected.take(records, batch, groups),
            progress=progress,
            label=label,
        )
    hits = torch.tensor(
        [
            float(p in groups.names and collected.shares[i].argmax().item() == groups.names.index(p))
            for i, p in enumerate(preferences)
        ]
    )
    return Inspection(logps, _table(collected, groups, preferences, hits), hits)


def _table(
    collected: _Collected, groups: ExpertGroups, preferences: Sequence[str], hits: Tensor
) -> RoutingTable:
    weights, first = {}, {}
    for name in dict.fromkeys(preferences):
        members = [i for i, preference in enumerate(preferences) if preference == name]
        weights[name] = torch.stack([collected.weights[i] for i in members]).mean(dim=0).tolist()
        first[name] = hits[members].mean().item()
    names = [*groups.names, *([EMPTY] if groups.has_empty else [])]
    return RoutingTable(groups=names, routers=collected.routers, weights=weights, own_group_first=first)
