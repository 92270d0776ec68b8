r"""How much every expert counts for a token: PMoL's router.

The experts of a bank lie in groups, one group a preference; behind them may come one *empty* expert that adds
nothing, so weight on it is weight taken off the adapter. Everywhere in this file the last dimension of logits and
weights holds the experts in the order of the bank, then the empty one if there is one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from prefmoe.errors import ConfigError
from prefmoe.nn.precision import at_least_float32

RouterLogits = Float[Tensor, "*tokens choices"]
GroupLogMasses = Float[Tensor, "*tokens groups"]


@dataclass(frozen=True)
class ExpertGroups:
    """Which experts of a bank belong to which preference.

    Attributes:
        names: One a preference.
        sizes: Experts of each group, at least 1; the experts of a group stand side by side.
        has_empty: Whether an empty expert stands behind them.

    Raises:
        ConfigError: No group, a group without experts, or names and sizes of different number.

    Example:
        >>> groups = ExpertGroups(("helpful", "harmless"), (2, 1))
        >>> groups.num_experts, groups.num_choices, groups.owners
        (3, 4, (0, 0, 1))
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    has_empty: bool = True

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.sizes):
            raise ConfigError(
                f"groups: expected a number of experts for each name; got {self.names}, {self.sizes}."
            )
        for name, size in zip(self.names, self.sizes, strict=True):
            if size < 1:
                raise ConfigError(f"groups: {name!r} has {size} experts; every group needs 1 or more.")

    @classmethod
    def of(cls, sizes: dict[str, int], *, has_empty: bool = True) -> "ExpertGroups":
        """From a dictionary of sizes by name."""
        return cls(tuple(sizes), tuple(sizes.values()), has_empty)

    @property
    def num_experts(self) -> int:
        """Experts of the bank; the empty one is not among them."""
        return sum(self.sizes)

    @property
    def num_choices(self) -> int:
        """What a router chooses among: the experts and, if there is one, the empty expert."""
        return self.num_experts + int(self.has_empty)

    @property
    def owners(self) -> tuple[int, ...]:
        """Group of every expert, by number."""
        return tuple(group for group, size in enumerate(self.sizes) for _ in range(size))


class TokenRouter(nn.Module):
    r"""Logits $z = W x$ of every expert for every token, computed in float32 or wider.

    Parameters it owns:
        weight: (choices, in), normal with standard deviation 0.02.

    Args:
        in_features: Width of what it sees of a token.
        num_choices: Experts, the empty one included.
        dtype: Dtype of the weight.
        device: Where it lies.

    Example:
        >>> TokenRouter(8, num_choices=3)(torch.ones(2, 5, 8, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_choices: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_choices, in_features, dtype=dtype, device=device))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> RouterLogits:
        """Logits of every choice, in float32 or wider, whatever the dtype of `x`, of the weight or of autocast."""
        return float32_linear(x, self.weight)


def float32_linear(
    x: Float[Tensor, "*tokens in"], weight: Float[Tensor, "out in"]
) -> Float[Tensor, "*tokens out"]:
    """`F.linear` in float32 or wider, also under autocast, keeping `x` for the backward pass as it came.

    Plain `F.linear(x.float(), weight)` would keep a float32 copy of `x`, twice a bfloat16 activation, at every
    layer that has a router.

    Example:
        >>> float32_linear(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(1, 3)).dtype
        torch.float32
    """
    if not torch.is_grad_enabled():  # text being generated: the function's own costs would show
        return _float32_product(x, weight)
    out: Tensor = _Float32Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(at_least_float32(x), at_least_float32(weight))


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _float32_product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_x, needs_weight = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_x:
                grad_x = (grad @ at_least_float32(weight)).to(x.dtype)
            if needs_weight:
                flat = at_least_float32(x).reshape(-1, x.shape[-1])
                grad_weight = (grad.reshape(len(flat), -1).T @ flat).to(weight.dtype)
        return grad_x, grad_weight


class RecurrentRouter(nn.Module):
    r"""A router that remembers what the layers below decided: one GRU state a token, handed up the layers.

    $x' = P x$, $h = \mathrm{GRU}(x', h_{below})$, $z = W h$. The GRU cell is shared by all layers and comes with the
    call; this holds what is a layer's own.

    Parameters it owns:
        projection: (size, in), normal with standard deviation 0.02.
        weight: (choices, size), normal with standard deviation 0.02.

    Args:
        in_features: Width of what it sees of a token.
        num_choices: Experts, the empty one included.
        size: Width of the GRU's state.

    Source:
        Qiu et al. 2024 (RMoE), arXiv:2408.06793. Slow form: tests/reference/token_routing.py.
    """

    def __init__(self, in_features: int, *, num_choices: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(size, in_features))
        self.weight = nn.Parameter(torch.empty(num_choices, size))
        for parameter in (self.projection, self.weight):
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self, x: Float[Tensor, "*tokens in"], below: Float[Tensor, "*tokens size"] | None, cell: nn.GRUCell
    ) -> tuple[RouterLogits, Float[Tensor, "*tokens size"]]:
        """Logits, and the state for the next layer.

        Args:
            x: States of tokens.
            below: State that the layer below handed up; None below the first, where it is 0.
            cell: The GRU cell that all layers share, without biases.
        """
        seen = float32_linear(x, self.projection)
        flat = seen.flatten(0, -2)
        hidden = torch.zeros_like(flat) if below is None else below.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            state = torch.gru_cell(flat, hidden, cell.weight_ih.to(flat.dtype), cell.weight_hh.to(flat.dtype))
        state = state.view(seen.shape)
        return float32_linear(state, self.weight), state


def route_tokens(
    logits: RouterLogits,
    groups: ExpertGroups,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    log_factors: Float[Tensor, "*#tokens choices"] | None = None,
) -> RouterLogits:
    r"""Weight of every choice for every token: $w = \mathrm{softmax}(z / T + \log f)$; each row sums to 1.

    With `top_k` only the k likeliest experts keep their weight; what the others had goes to the empty expert (it is
    never chosen away), or is dropped where there is none, so that even the top-1 expert is scaled by its probability
    and the router learns from the loss.

    Args:
        logits: Of the router, any dtype; computed in float32 or wider.
        groups: Layout of the last dimension.
        temperature: T, above 0.
        top_k: Experts a token uses, from 1 to the number of experts; None uses all.
        log_factors: $\log f$ of every choice, to steer with (`steering_factors`); -inf turns a choice off.

    Returns:
        Weights, at least 0. They sum to 1, except with `top_k` and no empty expert (then to at most 1).

    Source:
        Empty expert: PMoL, arXiv:2411.01245, formula ours. Scaling by the gate: Fedus et al. 2021,
        arXiv:2101.03961. Slow form: tests/reference/token_routing.py.

    Example:
        >>> groups = ExpertGroups(("a", "b"), (1, 1))
        >>> route_tokens(torch.zeros(3), groups, top_k=1).sum().item()
        1.0
    """
    scores = at_least_float32(logits) / temperature
    if log_factors is not None:
        scores = scores + log_factors
    weights = scores.softmax(dim=-1)
    if top_k is None or top_k >= groups.num_experts:
        return weights
    experts = weights[..., : groups.num_experts]
    kept = torch.zeros_like(experts).scatter(-1, experts.topk(top_k, dim=-1).indices, 1.0)
    if not groups.has_empty:
        return experts * kept
    # Not 1 - the sum of what is kept, which rounding takes below 0.
    dropped = (experts * (1 - kept)).sum(dim=-1, keepdim=True)
    return torch.cat([experts * kept, weights[..., -1:] + dropped], dim=-1)


def group_log_masses(
    logits: RouterLogits, groups: ExpertGroups, *, temperature: float = 1.0
) -> GroupLogMasses:
    r"""Log of the share of every group in what is not on the empty expert.

    $\log c_g = \log \mathrm{softmax}_g(\mathrm{logsumexp}_{i \in g} z_i / T)$: it never divides by the mass that the
    empty expert leaves, however small.

    Args:
        logits: Of the router.
        groups: Layout of the last dimension.
        temperature: T, above 0.

    Returns:
        Their exponentials sum to 1 for every token.

    Example:
        >>> groups = ExpertGroups(("a", "b"), (3, 1))
        >>> [f"{mass:.2f}" for mass in group_log_masses(torch.zeros(5), groups).exp().tolist()]
        ['0.75', '0.25']
    """
    experts = at_least_float32(logits)[..., : groups.num_experts] / temperature
    parts = [part.logsumexp(dim=-1) for part in torch.split(experts, list(groups.sizes), dim=-1)]
    return torch.stack(parts, dim=-1).log_softmax(dim=-1)


def steering_factors(
    factors: dict[str, float], groups: ExpertGroups, *, empty: str = "empty"
) -> Float[Tensor, " choices"]:
    r"""$\log f$ of every choice, for `route_tokens`: how many times more a group counts than it was trained to.

    Args:
        factors: By group, or "empty" for the empty expert; groups that are not named keep 1. 0 turns one off.
        groups: Layout.
        empty: Name of the empty expert.

    Raises:
        ConfigError: Unknown group, negative or non-finite factor, or everything turned off.

    Example:
        >>> steering_factors({"b": 1.0}, ExpertGroups(("a", "b"), (1, 1))).tolist()
        [0.0, 0.0, 0.0]
    """
    known = [*groups.names, *([empty] if groups.has_empty else [])]
    for name, factor in factors.items():
        if name not in known:
            raise ConfigError(
                f"preference weights: there is no group {name!r}; choose from {', '.join(known)}."
            )
        if not 0 <= factor < float("inf"):
            raise ConfigError(f"preference weights: {name!r} got {factor}; expected a number of 0 or more.")
    by_choice = [factors.get(groups.names[owner], 1.0) for owner in groups.owners]
    if groups.has_empty:
        by_choice.append(factors.get(empty, 1.0))
    if not any(by_choice):
        raise ConfigError("preference weights: every group is turned off; leave one above 0.")
    return torch.tensor(by_choice).log()
