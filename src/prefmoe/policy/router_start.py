"""Where routers start: at the convex optimum of telling texts' preferences apart, on the states they are going to see.

A few hundred pairs do not teach a random router in one epoch. What it is to learn is a linear classifier, whose optimum
on the states of the untrained model takes one pass over the training texts and no learning rate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from prefmoe.nn import TokenRouter, fit_softmax
from prefmoe.policy.layer import PMoLLinear
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.pairs import Text
from prefmoe.policy.routing import AdapterRouting
from prefmoe.runs.progress import Progress, silent

_PENALTIES = (0.01, 0.1, 1.0)
# Of all; of one text; of all texts, for one router: the fewer the texts, the more of each.
_MAX_TEXTS, _MAX_TOKENS, _MAX_ROWS = 2000, 8, 8000
_FOLDS = 5
# The penalty is chosen on every fifth router: a block has up to four kinds that see different states, and every fourth
# would always be the same.
_EVERY = 5


def fit_router_starts(
    model: PeftModel,
    texts: Sequence[Text],
    preferences: Sequence[str],
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    r"""Rows of a linear classifier of preferences for every linear router.

    It is fitted to single tokens of the completions, a few of each text, as the router is going to see them, and has no
    bias, as the router has none. One penalty serves all routers: the one with the least loss of every fifth router on
    the tokens of every fifth prompt, when the others are fitted.

    Args:
        model: With a PMoL adapter whose routers are linear and that has not been trained: its experts add nothing yet.
        texts: Training texts; of many, evenly spaced ones are taken.
        preferences: Of each text, names of the adapter's groups.
        batch_tokens: Tokens of one forward pass.
        progress: Shows how far it is.

    Returns:
        For every router by name (groups, in), float32: logits of the groups.
    """
    groups, smoothing = _routing_of(model).groups, _routing_of(model).config.group_smoothing
    taken = range(0, len(texts), -(-len(texts) // _MAX_TEXTS))
    texts, preferences = [texts[i] for i in taken], [preferences[i] for i in taken]
    tokens = min(_MAX_TOKENS, _MAX_ROWS // len(texts))
    seen = _what_routers_see(model, texts, tokens=tokens, batch_tokens=batch_tokens, progress=progress)

    counts = torch.tensor([len(states) for states in next(iter(seen.values()))])
    labels = torch.tensor([groups.names.index(preference) for preference in preferences])
    folds = {prompt: i % _FOLDS for i, prompt in enumerate(dict.fromkeys(text.prompt_ids for text in texts))}
    held = torch.tensor([folds[text.prompt_ids] == 0 for text in texts])
    labels, held = labels.repeat_interleave(counts), held.repeat_interleave(counts)
    features = _distinct({name: torch.cat(by_text) for name, by_text in seen.items()})
    fit = partial(_fit, num_groups=len(groups.names), smoothing=smoothing)
    penalty = _PENALTIES[1]
    if not held.all():
        some = features[::_EVERY]
        penalty = min(_PENALTIES, key=lambda l2: _held_out_loss(some, labels, held, partial(fit, l2=l2)))
    starts = [(names, fit(rows, labels, l2=penalty)) for names, rows in features]
    return {name: start.clone() for names, start in starts for name in names}


def _distinct(features: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Names of neighbors that see the same (q, k and v; gate and up) with what they see, to be fitted once."""
    found: list[tuple[list[str], Tensor]] = []
    for name, rows in features.items():
        if found and rows.shape == found[-1][1].shape and torch.equal(rows, found[-1][1]):
            found[-1][0].append(name)
        else:
            found.append(([name], rows))
    return found


def _what_routers_see(
    model: PeftModel, texts: Sequence[Text], *, tokens: int, batch_tokens: int, progress: Progress
) -> dict[str, list[Tensor]]:
    """For every router at most `tokens` of each text, (tokens, in), in the order of the texts."""
    seen: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(texts) for name, _ in _routers(model)}
    with _watched(model, _routing_of(model), tokens) as passes:

        def keep(batch: Sequence[int]) -> None:
            for name, by_text in passes.items():
                for text, states in zip(batch, by_text, strict=True):
                    seen[name][text] = states
            passes.clear()

        completion_logps(
            model,
            texts,
            batch_tokens=batch_tokens,
            routing_mask=True,
            watch=keep,
            progress=progress,
            label="what routers see",
        )
    return seen


def _held_out_loss(
    features: Sequence[tuple[Sequence[str], Tensor]],
    labels: Tensor,
    held: Tensor,
    fit: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Mean cross-entropy over routers, of the rows that were not fitted."""
    losses = [
        (len(names), F.cross_entropy(rows[held] @ fit(rows[~held], labels[~held]).T, labels[held]).item())
        for names, rows in features
    ]
    return sum(count * loss for count, loss in losses) / sum(count for count, _ in losses)


def _fit(features: Tensor, labels: Tensor, *, num_groups: int, smoothing: float, l2: float) -> Tensor:
    """Weights for features as they are; the penalty is on those for features of unit variance."""
    scale = features.std(dim=0, correction=0).clamp_min(1e-6)
    weights, _ = fit_softmax(
        features / scale,
        labels,
        num_classes=num_groups,
        l2=l2,
        # The group loss puts its smoothing on the other groups only.
        label_smoothing=min(0.99, smoothing * num_groups / max(1, num_groups - 1)),
        has_bias=False,
    )
    return weights / scale


@torch.no_grad()
def start_routers(model: PeftModel, starts: Mapping[str, Tensor]) -> None:
    """Sets the routers: every expert of a group begins with the group's row, the empty expert with zeros.

    Args:
        model: With the adapter.
        starts: From `fit_router_starts`, of an adapter with the same groups and routers.
    """
    routing = _routing_of(model)
    for name, router in _routers(model):
        rows = starts[name].to(router.weight)[list(routing.groups.owners)]
        router.weight.zero_()
        router.weight[: len(rows)] = routing.config.temperature * rows


def _routing_of(model: PeftModel) -> AdapterRouting:
    tuner: Any = model.base_model
    routing: AdapterRouting = tuner.routings[tuner.active_adapters[0]]
    return routing


def _layers(model: PeftModel) -> Iterator[tuple[str, PMoLLinear, TokenRouter]]:
    adapter = model.base_model.active_adapters[0]
    for layer in model.modules():
        router = (
            layer.pmol_router[adapter]
            if isinstance(layer, PMoLLinear) and adapter in layer.pmol_router
            else None
        )
        if isinstance(router, TokenRouter):
            assert isinstance(layer, PMoLLinear)
            yield layer.sites[adapter].name, layer, router


def _routers(model: PeftModel) -> list[tuple[str, TokenRouter]]:
    return [(name, router) for name, _, router in _layers(model)]


@contextmanager
def _watched(model: PeftModel, routing: AdapterRouting, tokens: int) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, every pass leaves some tokens of each text as each router saw them, on the CPU."""
    passes: dict[str, list[Tensor]] = {}

    def watch(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        passes[name] = [_evenly(rows, tokens).float().cpu() for rows in routing.tokens_by_text(args[0])]

    with ExitStack() as hooks:
        for name, layer, _ in _layers(model):
            hooks.callback(layer.register_forward_pre_hook(partial(watch, name)).remove)
        yield passes


def _evenly(rows: Tensor, number: int) -> Tensor:
    """At most so many of the rows, the first and the last among them."""
    number = min(len(rows), number)
    return rows[torch.linspace(0, len(rows) - 1, number).round().long()]
