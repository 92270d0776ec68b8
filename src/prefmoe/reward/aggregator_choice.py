"""Phase 3: which aggregator a task keeps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefmoe.evaluation.accuracy import standard_error
from prefmoe.nn import AggregatorKind
from prefmoe.reward.aggregators import ExpertFeatures, fit_aggregator
from prefmoe.reward.convex import prompt_folds
from prefmoe.reward.settings import Phase3Settings


@dataclass(frozen=True)
class Candidates:
    """All aggregators fitted for one task, and what speaks for each.

    Attributes:
        modules: Fitted on all pairs that the experts did not see; the task head first, and alone where pairs are too
            few: then chance would choose.
        hits: `ExpertFeatures.hits` (pairs,) on those pairs, cross-validated, and then on the validation pairs: the
            first are more, the second are judged as the finished model will judge. Empty where pairs are too few.
        prompts: Prompt of every pair in `hits`.
        validation: Hits on the validation pairs alone.
    """

    modules: dict[AggregatorKind, nn.Module]
    hits: dict[AggregatorKind, Tensor]
    prompts: list[int]
    validation: dict[AggregatorKind, Tensor]


def fit_candidates(
    features: ExpertFeatures,
    validation: ExpertFeatures,
    *,
    settings: Phase3Settings,
    seed: int,
) -> Candidates:
    """Fits every kind of the settings for one task on `features`; other arguments as in `fit_aggregator`."""
    folds = prompt_folds(features.rows)
    modules, hits, on_validation = {}, {}, {}
    for kind in settings.kinds if folds else settings.kinds[:1]:
        modules[kind] = fit_aggregator(kind, features, settings=settings, seed=seed)
        on_validation[kind] = validation.hits(modules[kind])
        if folds:
            kept_back = cross_validated_hits(kind, features, settings=settings, seed=seed)
            hits[kind] = torch.cat([kept_back, on_validation[kind]])
    judged = [*(row for outside in folds for row in features.part(outside).rows), *validation.rows]
    return Candidates(modules, hits, [row.prompt for row in judged], on_validation)


def cross_validated_hits(
    kind: AggregatorKind, features: ExpertFeatures, *, settings: Phase3Settings, seed: int
) -> Tensor:
    """Hits of a kind on `features` (pairs,), each pair judged by an aggregator that was fitted without its prompt.

    Arguments are those of `fit_aggregator`; there must be prompts enough for `prompt_folds`. The order of the pairs is
    that of the folds, the same for every kind.
    """
    found = []
    for outside in prompt_folds(features.rows):
        fitted = fit_aggregator(kind, features.part(~outside), settings=settings, seed=seed)
        found.append(features.part(outside).hits(fitted))
    return torch.cat(found)


def best_aggregators(
    candidates: Mapping[str, Candidates], *, standard_errors: float
) -> dict[str, AggregatorKind]:
    """The kind that every task keeps.

    A kind is let in if over all tasks together it gains more than some standard errors over the tasks' heads, and loses
    nothing on the validation pairs: of all judges only they know the finished experts; those of a fold have seen fewer
    pairs, so their heads leave more to be gained than there is. Of its head and the kinds let in, a task keeps the one
    with most hits of its own; the first of equals.

    One task's pairs are too few for a gain of two points, and the best of four on a few hundred pairs would often be
    the luckiest (a rule of one standard error is Breiman et al. 1984, section 3.4.3; three kinds have three tries, so
    the settings ask for two). Differences are paired, as all kinds judged the same pairs, and pairs of one prompt count
    as one draw. A task where nothing was judged keeps its head.

    Args:
        candidates: Of every task.
        standard_errors: How many a kind has to gain.
    """
    judged = {task: found for task, found in candidates.items() if found.hits}
    kinds = list(dict.fromkeys(kind for found in judged.values() for kind in found.modules))
    let_in = [kind for kind in kinds if kind == "task_head" or _gains(kind, judged, standard_errors)]
    best: dict[str, AggregatorKind] = dict.fromkeys(candidates, "task_head")
    for task, found in judged.items():
        best[task] = max(let_in, key=lambda kind: found.hits[kind].sum().item())
    return best


def _gains(kind: AggregatorKind, judged: Mapping[str, Candidates], standard_errors: float) -> bool:
    gains = torch.cat([found.hits[kind] - found.hits["task_head"] for found in judged.values()])
    validation = torch.cat(
        [found.validation[kind] - found.validation["task_head"] for found in judged.values()]
    )
    prompts = [f"{prompt} {task}" for task, found in judged.items() for prompt in found.prompts]
    needed = standard_errors * standard_error(gains.numpy(), prompt_ids=prompts)
    return gains.mean().item() > needed and validation.sum().item() >= 0
