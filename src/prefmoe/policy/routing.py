"""What the layers of one PMoL adapter share: its rules, what is known of the batch, what its routers decided.

A forward pass goes

    begin(batch) -> every router: decide(logits) -> ... -> end()

and `decide` may be called again for the same batch when gradient checkpointing computes a block a second time, in the
backward pass, long after `end`. So the batch is kept until the next pass replaces it; only records are closed.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from prefmoe.errors import ShapeError
from prefmoe.nn import (
    ExpertGroups,
    Packing,
    empty_mass_penalty,
    group_hinge_loss,
    group_log_masses,
    group_soft_loss,
    localized_balance_loss,
    mean_by_text,
    route_tokens,
    routing_entropy,
    switch_balance_loss,
    within_group_balance,
)
from prefmoe.policy.config import PMoLConfig


class RoutedBatch(NamedTuple):
    """What the routers' losses need to know of a batch."""

    mask: Tensor  # (batch, seq), 1.0 where a token counts: real, and of the completion where that is known
    target: Tensor | None  # (batch, groups) preference of every text, rows of zeros without one
    is_training: bool = False


class RouterRecord(NamedTuple):
    """What one router did on one batch, mean over the tokens that count."""

    router: str
    weights: Tensor  # (batch, choices)
    shares: Tensor  # (batch, groups), of what is not on the empty expert
    entropy: Tensor  # (batch,) nats
    group_loss: Tensor | None


Listener = Callable[[Sequence[RouterRecord], RoutedBatch], None]


@dataclass
class _Pass:
    """One forward pass; with a packing its tokens are the nodes of a prefix tree."""

    batch: RoutedBatch | None = None
    packing: Packing | None = None
    is_open: bool = False
    records: list[RouterRecord] = field(default_factory=list)


class AdapterRouting:
    """The rules of an adapter and the state of its current forward pass.

    It is no module and owns no parameter, so it is in no checkpoint; a copy of a model gets a fresh one.

    Args:
        config: Of the adapter.

    Attributes:
        log_factors: What to steer with: (choices,), or (batch, 1, choices) for every text on its own; None leaves
            the trained mixture.
        loss_scale: What the losses are multiplied by before they join the gradient, as the Trainer scales its own:
            1 / accumulation steps, times what a GradScaler multiplies by.
        listeners: Called at the end of every pass with what each router did.
    """

    def __init__(self, config: PMoLConfig) -> None:
        self.config = config
        self.groups: ExpertGroups = config.layout
        self.order_of_decisions: list[str] = []  # keys, as layers came; as many as there are routers
        self.cell: nn.GRUCell | None = None  # of recurrent routers; the first layer with experts owns it
        self.log_factors: Tensor | None = None
        self.loss_scale: Callable[[], float] = _one
        self.listeners: list[Listener] = []
        # Of the next batch, where a trainer cannot pass them along: preferences, and which tokens count.
        self.waiting_target: Tensor | None = None
        self.waiting_mask: Tensor | None = None
        self.has_warned = False
        self._pass = _Pass()
        self._decisions: dict[str, Tensor] = {}
        self._states: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        fresh = type(self)(copy.deepcopy(self.config, memo))
        memo[id(self)] = fresh
        fresh.order_of_decisions = list(self.order_of_decisions)
        fresh.log_factors = copy.deepcopy(self.log_factors, memo)
        fresh.cell = copy.deepcopy(self.cell, memo)
        return fresh

    def __getstate__(self) -> dict[str, Any]:
        kept = {
            name: vars(self)[name]
            for name in ("config", "groups", "order_of_decisions", "cell", "log_factors")
        }
        return vars(type(self)(self.config)) | kept

    def begin(self, batch: RoutedBatch) -> Callable[[], None]:
        """Starts a forward pass; returns what ends it.

        A pass without gradient (a reference, an evaluation) leaves the one before as it was, for that one's backward
        pass may still be to come.
        """
        before = (self._pass, self._decisions, self._states)
        self._pass, self._decisions, self._states = _Pass(batch, is_open=True), {}, {}
        current = self._pass

        def end() -> None:
            current.is_open = False
            for listener in self.listeners:
                if current.records:
                    listener(current.records, batch)
            if not torch.is_grad_enabled():
                self._pass, self._decisions, self._states = before

        return end

    def share(self, packing: Packing) -> None:
        """Says that the texts of the current pass share prompts (`prefmoe.policy.shared_prompts`).

        Routers then see one row of nodes; losses and records see the texts again.
        """
        if self._pass.is_open:  # else it is the pass of a reference, and the one before keeps its own
            self._pass.packing = packing

    def follow(self, block: str, x: Tensor) -> Tensor:
        """Weights that the router of a block decided for these tokens."""
        weights = self._decisions.get(block)
        if weights is None or weights.shape[:-1] != x.shape[:-1]:
            got = None if weights is None else tuple(weights.shape[:-1])
            raise ShapeError(
                f"PMoL: a layer of {block or 'the model'} sees tokens of shape {tuple(x.shape[:-1])}, its router saw "
                f"{got}; use router_scope='linear', or exclude the layer"
            )
        return weights

    def state_below(self, block: str) -> Tensor | None:
        """State of the recurrent router of the block below, None below the first."""
        return self._states.get(block)

    def keep_state(self, block: str, state: Tensor) -> None:
        """Hands a state up to the block above."""
        self._states[block] = state

    def decide(self, logits: Tensor, *, router: str, block: str, training: bool) -> Tensor:
        """Weights of every choice for every token, with this router's losses riding on their gradient.

        Args:
            logits: Of the router, (..., choices).
            router: Its name, for records.
            block: Whose layers follow this decision; "" for all.
            training: Whether the layer is in training mode.
        """
        config = self.config
        if config.empty_mass is not None:
            logits = logits + self._empty_bias(logits)
        weights = route_tokens(
            logits,
            self.groups,
            temperature=config.temperature,
            top_k=config.top_k,
            log_factors=self._factors_for(logits),
        )
        batch = self._pass.batch
        by_text, weights_by_text = self._by_text(logits), self._by_text(weights)
        # Elsewhere (text being generated, a pass that did not come through PMoLModel) nothing is known of the tokens.
        if batch is not None and batch.mask.shape == by_text.shape[:-1]:
            is_heard = bool(self.listeners) and self._pass.is_open
            group_loss = None
            if training and torch.is_grad_enabled():
                loss, group_loss = self._losses(by_text, weights_by_text, batch)
                if loss is not None:
                    weights = ride(weights, loss)
            elif is_heard:
                group_loss = self._group_loss(by_text, weights_by_text, batch)
            if is_heard:
                self._record(router, by_text, weights_by_text, group_loss)
        if config.router_scope != "linear":
            self._decisions[block] = weights
        return weights

    def _empty_bias(self, logits: Tensor) -> Tensor:
        """What the empty expert's logit needs so that it starts with the wanted mass, other logits being 0."""
        mass = self.config.empty_mass
        assert mass is not None
        bias = logits.new_zeros(self.groups.num_choices)
        bias[-1] = self.config.temperature * math.log(mass / (1 - mass) * self.groups.num_experts)
        return bias

    def _factors_for(self, logits: Tensor) -> Tensor | None:
        if self.log_factors is None:
            return None
        # Kept: a copy to a GPU by every router of every pass would stop its queue each time.
        factors = self.log_factors = self.log_factors.to(logits.device)
        if factors.ndim == 3 and len(factors) not in (1, len(logits)):
            # Several samples or beams of a prompt lie side by side.
            copies, rest = divmod(len(logits), len(factors))
            if rest:
                raise ShapeError(
                    f"PMoL: preference weights for {len(factors)} texts, but the batch has {len(logits)}; give one "
                    "set for all, or one for each text"
                )
            factors = factors.repeat_interleave(copies, dim=0)
        return factors

    def tokens_by_text(self, tokens: Tensor) -> list[Tensor]:
        """Of values of the current pass's tokens (..., values) those that count, text by text, (tokens, values)."""
        batch = self._pass.batch
        assert batch is not None
        rows = zip(self._by_text(tokens), batch.mask, strict=True)
        return [row[mask > 0] for row, mask in rows]

    def _by_text(self, tokens: Tensor) -> Tensor:
        """(batch, seq, choices), wherever the tokens stand."""
        packing = self._pass.packing
        return tokens if packing is None else packing.unpack(tokens[0])

    def _losses(
        self, logits: Tensor, weights: Tensor, batch: RoutedBatch
    ) -> tuple[Tensor | None, Tensor | None]:
        """This router's share of what joins the gradient, and its group loss alone."""
        config = self.config
        group_loss = self._group_loss(logits, weights, batch)
        losses = []
        if group_loss is not None:
            losses.append(config.group_loss_weight * group_loss)
        if config.balance_loss != "none" and config.balance_loss_weight:
            losses.append(config.balance_loss_weight * self._balance_loss(logits, batch.mask))
        if config.empty_loss_weight:
            penalty = empty_mass_penalty(weights, batch.mask, target=config.empty_target)
            losses.append(config.empty_loss_weight * penalty)
        if not losses:
            return None, group_loss
        return torch.stack(losses).sum() * (self.loss_scale() / len(self.order_of_decisions)), group_loss

    def _group_loss(self, logits: Tensor, weights: Tensor, batch: RoutedBatch) -> Tensor | None:
        config = self.config
        if batch.target is None or config.group_loss == "none":
            return None
        if config.group_loss == "lbc":
            return localized_balance_loss(
                weights, batch.target, batch.mask, self.groups, delta=config.lbc_delta
            )
        masses = group_log_masses(logits, self.groups, temperature=config.temperature)
        if config.group_loss == "hinge":
            return group_hinge_loss(masses, batch.target, batch.mask, threshold=config.hinge_threshold)
        return group_soft_loss(masses, batch.target, batch.mask, smoothing=config.group_smoothing)

    def _balance_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        config = self.config
        if config.balance_loss == "within_group":
            return within_group_balance(logits, mask, self.groups, temperature=config.temperature)
        weights = route_tokens(logits, self.groups, temperature=config.temperature)
        return switch_balance_loss(weights, mask, self.groups, top_k=config.top_k or self.groups.num_experts)

    @torch.no_grad()
    def _record(self, router: str, logits: Tensor, weights: Tensor, group_loss: Tensor | None) -> None:
        batch = self._pass.batch
        assert batch is not None
        shares = group_log_masses(logits, self.groups, temperature=self.config.temperature).exp()
        self._pass.records.append(
            RouterRecord(
                router,
                mean_by_text(weights, batch.mask),
                mean_by_text(shares, batch.mask),
                mean_by_text(routing_entropy(weights)[..., None], batch.mask)[:, 0],
                None if group_loss is None else group_loss.detach(),
            )
        )


def _one() -> float:
    return 1.0


class _Ride(torch.autograd.Function):
    """Passes a tensor on unchanged; in the backward pass the loss gets a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=grad.dtype, device=grad.device)


def ride(carrier: Tensor, loss: Tensor) -> Tensor:
    """Makes a loss part of whatever `carrier` is trained with, without being in that loss's value.

    A loss that is kept aside and added later gets no gradient under reentrant gradient checkpointing, and every
    trainer would have to know of it. One that rides on the forward pass is trained by any trainer, either way.

    Source:
        The "auxiliary loss scaler" of Megatron-LM.
    """
    out: Tensor = _Ride.apply(carrier, loss.to(carrier.dtype))
    return out


def summarize(
    records: Sequence[RouterRecord], groups: ExpertGroups, target: Tensor | None = None
) -> dict[str, Tensor]:
    """Means over routers and texts, by the names under which trainers log them; all scalars.

    `router/load_<group>` and `router/empty_frac` are mean weights, `router/entropy` is in nats,
    `router/group_accuracy` is the share of texts whose own group has the largest share of what is not on the empty
    expert, averaged over their tokens and routers; `router/group_loss` is what the group loss had, unweighted.
    """
    if not records:
        return {}
    weights = torch.stack([record.weights for record in records]).mean(dim=(0, 1))
    values = {"router/entropy": torch.stack([record.entropy for record in records]).mean()}
    for name, load in zip(groups.names, weights[: groups.num_experts].split(groups.sizes), strict=True):
        values[f"router/load_{name}"] = load.sum()
    if groups.has_empty:
        values["router/empty_frac"] = weights[-1]
    losses = [record.group_loss for record in records if record.group_loss is not None]
    if losses:
        values["router/group_loss"] = torch.stack(losses).mean()
    if target is not None and len(groups.names) > 1 and target.sum() > 0:
        known = target.sum(dim=1) > 0
        shares = torch.stack([record.shares for record in records]).mean(dim=0)
        hits = shares.argmax(dim=1) == target.argmax(dim=1)
        values["router/group_accuracy"] = hits[known].float().mean()
    return values


def mean_values(rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of every name over the rows that have it."""
    collected: dict[str, list[Tensor]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            collected[name].append(value)
    return {name: torch.stack(values).mean().item() for name, values in collected.items()}
