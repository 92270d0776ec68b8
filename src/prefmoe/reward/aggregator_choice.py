"""Phase 3: which aggregator a task keeps."""

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
        validation: Accuracy on the validation pairs alone.
    """

    modules: dict[AggregatorKind, nn.Module]
    hits: dict[AggregatorKind, Tensor]
    prompts: list[int]
    validation: dict[AggregatorKind, float]


def fit_candidates(
    features: ExpertFeatures,
    validation: ExpertFeatures,
    *,
    settings: Phase3Settings,
    seed: int,
) -> Candidates:
    """Fits every kind of the settings for one task on `features`; other arguments as in `fit_aggregator`."""
    folds = prompt_folds(features.rows)
    modules, hits, accuracy = {}, {}, {}
    for kind in settings.kinds if folds else settings.kinds[:1]:
        modules[kind] = fit_aggregator(kind, features, settings=settings, seed=seed)
        accuracy[kind] = validation.accuracy(modules[kind])
        if folds:
            kept_back = cross_validated_hits(kind, features, settings=settings, seed=seed)
            hits[kind] = torch.cat([kept_back, validation.hits(modules[kind])])
    judged = [*(row for outside in folds for row in features.part(outside).rows), *validation.rows]
    return Candidates(modules, hits, [row.prompt for row in judged], accuracy)


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


def best_aggregator(candidates: Candidates, *, standard_errors: float) -> AggregatorKind:
    """The kind that a task keeps: its head, unless another gains more than some standard errors over it on this task.

    And loses nothing on the validation pairs: of all judges only they know the finished experts. Those of a fold have
    seen fewer pairs, so their heads leave more to be gained than there is.

    Pairs are few: the best of four on a few hundred of them would often be the luckiest (a rule of one standard error
    is Breiman et al. 1984, section 3.4.3; three kinds have three tries, so the settings ask for two). Differences are
    paired, as all kinds judged the same pairs, and pairs of one prompt count as one draw. Of several that gain enough,
    the one that gains most is kept. Where nothing was judged, the head stays.

    Args:
        candidates: Of the task.
        standard_errors: How many an aggregator has to gain.
    """
    head, *others = candidates.modules
    validation = candidates.validation
    ids = [str(prompt) for prompt in candidates.prompts]
    gains: dict[AggregatorKind, float] = {}
    for kind in others:
        difference = (candidates.hits[kind] - candidates.hits[head]).numpy()
        gain = float(difference.mean())
        needed = standard_errors * standard_error(difference, prompt_ids=ids)
        if gain > needed and validation[kind] >= validation[head]:
            gains[kind] = gain
    return max(gains, key=lambda kind: gains[kind], default=head)
