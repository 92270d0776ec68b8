"""Where routers start: at the convex optimum of telling texts' preferences apart, on the states they are going to see.

A few hundred pairs do not teach a random router in one epoch. What it is to learn is a linear classifier, whose optimum
on the states of the untrained model takes one pass over the training texts and no learning rate.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from prefmoe.nn import TokenRouter, fit_softmax
from prefmoe.policy.layer import PMoLLinear
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.pairs import Text
from prefmoe.policy.routing import AdapterRouting
from prefmoe.runs.progress import Progress, silent

_L2 = 0.1  # as the task router's, chosen on validation prompts of the five real tasks


def fit_router_starts(
    model: PeftModel,
    texts: Sequence[Text],
    preferences: Sequence[str],
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    r"""Rows of a linear classifier of preferences for every linear router.

    The router of an adapter sees single tokens and has no bias; the classifier is fitted, without one, to the means of
    what the router sees over each completion, whose logits are the means of the tokens' logits.

    Args:
        model: With a PMoL adapter that has not been trained: its experts still add nothing.
        texts: Training texts.
        preferences: Of each text, names of the adapter's groups.
        batch_tokens: Tokens of one forward pass.
        progress: Shows how far it is.

    Returns:
        For every router by name (groups, in), float32: logits of the groups.
    """
    routing = _routing_of(model)
    seen: dict[str, dict[int, Tensor]] = {name: {} for name, _ in _routers(model)}
    with _watched(model, routing) as passes:

        def keep(batch: Sequence[int]) -> None:
            for name, means in passes.items():
                seen[name].update(zip(batch, means, strict=True))
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
    names = routing.groups.names
    labels = torch.tensor([names.index(preference) for preference in preferences])
    groups, smoothing = len(names), routing.config.group_smoothing
    starts = {}
    for name, by_text in seen.items():
        features = torch.stack([by_text[i] for i in range(len(texts))])
        scale = features.std(dim=0, correction=0).clamp_min(1e-6)
        rows, _ = fit_softmax(
            features / scale,
            labels,
            num_classes=groups,
            l2=_L2,
            # The group loss puts its smoothing on the other groups only.
            label_smoothing=min(0.99, smoothing * groups / max(1, groups - 1)),
            has_bias=False,
        )
        starts[name] = rows / scale
    return starts


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
def _watched(model: PeftModel, routing: AdapterRouting) -> Iterator[dict[str, Tensor]]:
    """Inside, every pass leaves the mean of what each router saw of each text, on the CPU."""
    passes: dict[str, Tensor] = {}

    def watch(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        passes[name] = routing.mean_by_text(args[0]).cpu()

    with ExitStack() as hooks:
        for name, layer, _ in _layers(model):
            hooks.callback(layer.register_forward_pre_hook(partial(watch, name)).remove)
        yield passes
