"""Phase 3: which aggregator a task keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefmoe.nn import AggregatorKind
from prefmoe.reward.aggregators import ExpertFeatures, fit_aggregator
from prefmoe.reward.convex import prompt_folds
from prefmoe.reward.settings import Phase3Settings

Hits = Mapping[AggregatorKind, Tensor]
"""`ExpertFeatures.hits` of every candidate on the same pairs, the simplest candidate first; each of shape (pairs,)."""


@dataclass(frozen=True)
class Candidates:
    """All aggregators fitted for one task, and what speaks for each.

    Attributes:
        modules: Fitted on all pairs that the experts did not see.
        hits: On those pairs, cross-validated. Empty where they are too few: then chance would choose.
        validation: Accuracy on the validation pairs, for the log. It has no vote: the MLP stops early by it.
    """

    modules: dict[AggregatorKind, nn.Module]
    hits: Hits
    validation: dict[AggregatorKind, float]


def fit_candidates(
    features: ExpertFeatures,
    validation: ExpertFeatures,
    head: Tensor,
    *,
    settings: Phase3Settings,
    seed: int,
) -> Candidates:
    """Fits every kind of the settings for one task; arguments as in `fit_aggregator`."""
    enough = bool(prompt_folds(features.rows))
    modules, hits, accuracy = {}, {}, {}
    for kind in settings.kinds if enough else settings.kinds[:1]:
        modules[kind] = fit_aggregator(kind, features, validation, head, settings=settings, seed=seed)
        accuracy[kind] = validation.accuracy(modules[kind])
        if enough:
            hits[kind] = cross_validated_hits(kind, features, validation, head, settings=settings, seed=seed)
    return Candidates(modules, hits, accuracy)


def cross_validated_hits(
    kind: AggregatorKind,
    features: ExpertFeatures,
    validation: ExpertFeatures,
    head: Tensor,
    *,
    settings: Phase3Settings,
    seed: int,
) -> Tensor:
    """Hits of a kind on `features` (pairs,), each pair judged by an aggregator that was fitted without its prompt.

    Arguments are those of `fit_aggregator`; there must be prompts enough for `prompt_folds`. The order of the pairs is
    that of the folds, the same for every kind.
    """
    found = []
    for outside in prompt_folds(features.rows):
        fitted = fit_aggregator(kind, features.part(~outside), validation, head, settings=settings, seed=seed)
        found.append(features.part(outside).hits(fitted))
    return torch.cat(found)


def best_aggregators(evidence: Mapping[str, Hits]) -> dict[str, AggregatorKind]:
    """The kind to keep for every task: the one that is best for all tasks together, unless a task knows better.

    Pairs are few: the best of four on a hundred of them would often be the luckiest. So a kind has to beat the
    simplest by more than a standard error, first on the mean of the tasks, where the error is small, and then on a
    task against the winner of that (the one-standard-error rule, Breiman et al. 1984, section 3.4.3). Differences
    are paired, as all kinds judged the same pairs.

    Args:
        evidence: Hits of every task, the same kinds in each.
    """
    if not evidence:
        return {}
    kinds = list(next(iter(evidence.values())))
    common = _beats_the_first(kinds, list(evidence.values()))
    return {
        task: _beats_the_first([common, *(kind for kind in kinds if kind != common)], [hits])
        for task, hits in evidence.items()
    }


def _beats_the_first(kinds: Sequence[AggregatorKind], tasks: Sequence[Hits]) -> AggregatorKind:
    """The kind with the largest mean gain over the first, of those that gain more than a standard error."""
    first, *others = kinds
    gains: dict[AggregatorKind, float] = {}
    for kind in others:
        differences = [hits[kind] - hits[first] for hits in tasks if len(hits[first]) > 1]
        if not differences:
            continue
        gain = torch.stack([d.mean() for d in differences]).mean()
        variance = torch.stack([d.var() / len(d) for d in differences]).sum() / len(differences) ** 2
        if gain > variance.sqrt():
            gains[kind] = gain.item()
    return max(gains, key=lambda kind: gains[kind], default=first)
