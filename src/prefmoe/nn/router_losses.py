r"""What PMoL's routers are trained with beside the preference loss.

All are means over the tokens that a mask keeps, so padding counts for nothing. `target` is a text's preference as a
distribution over the groups; a row of zeros is a text without one, and is left out where a preference is needed.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prefmoe.nn.precision import at_least_float32
from prefmoe.nn.token_routing import ExpertGroups

TokenLogits = Float[Tensor, "batch seq choices"]
TokenWeights = Float[Tensor, "batch seq choices"]
TokenMask = Float[Tensor, "batch seq"]
Targets = Float[Tensor, "batch groups"]
Scalar = Float[Tensor, ""]


def group_soft_loss(
    log_masses: Float[Tensor, "batch seq groups"], target: Targets, mask: TokenMask, *, smoothing: float = 0.1
) -> Scalar:
    r"""How far the groups' shares are from the text's softened preference: $\mathrm{KL}(q \,\|\, c)$, nats.

    $q$ spreads `smoothing` of the target evenly over the other groups: $q_k = 1 - \epsilon$ for a text of
    preference k, $\epsilon / (G - 1)$ elsewhere. Shares are conditional on "not empty" (`group_log_masses`), so the
    loss leaves the empty expert alone; with the plain masses it would drive it out.

    Args:
        log_masses: As `group_log_masses` gives them, of 2 groups or more.
        target: Preference of every text; soft ones are allowed.
        mask: 1 for tokens that count.
        smoothing: $\epsilon$, from 0 to below 1.

    Returns:
        At least 0; 0 where every share equals its target, or where no text has a preference.

    Source:
        PMoL's "expert group soft loss", arXiv:2411.01245. Its formula is in no source at hand; this is our
        reading of it. Slow form: tests/reference/router_losses.py.

    Example:
        >>> even = torch.full((1, 1, 2), 0.5).log()
        >>> loss = group_soft_loss(even, torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), smoothing=0.0)
        >>> f"{loss.item():.4f}"
        '0.6931'
    """
    num_groups = target.shape[1]
    spread = smoothing / (num_groups - 1)
    soft = (target * (1 - smoothing - spread) + spread)[:, None, :]
    # xlogy is 0 at q = 0, where log q is not.
    divergence = (torch.xlogy(soft, soft) - soft * log_masses).sum(dim=-1)
    return _token_mean(divergence, mask * target.sum(dim=1, keepdim=True))


def group_hinge_loss(
    log_masses: Float[Tensor, "batch seq groups"], target: Targets, mask: TokenMask, *, threshold: float = 0.6
) -> Scalar:
    r"""Squared shortfall of the own group's share below a threshold: $\max(0, \tau - c_k)^2$.

    Args:
        log_masses: As `group_log_masses` gives them.
        target: Preference of every text; soft ones weigh the groups' shortfalls.
        mask: 1 for tokens that count.
        threshold: $\tau$, a fraction in (0, 1].

    Returns:
        From 0 to $\tau^2$.
    """
    shortfall = (threshold - log_masses.exp()).clamp_min(0).square()
    return _token_mean((shortfall * target[:, None, :]).sum(dim=-1), mask * target.sum(dim=1, keepdim=True))


def localized_balance_loss(
    weights: TokenWeights, target: Targets, mask: TokenMask, groups: ExpertGroups, *, delta: float = 0.1
) -> Scalar:
    r"""LoRAMoE's localized balancing constraint: $\mathrm{var}(Z) / \mathrm{mean}(Z)^2$, $Z = I \circ Q$.

    $Q$ is the mean weight of each expert over a text's tokens, $I$ is $1 - \delta$ for experts of the text's own
    group and $1 + \delta$ for the others. At its minimum all Z are equal, so the own group has *more* weight.

    Args:
        weights: Of the router.
        target: Preference of every text; soft ones interpolate $I$.
        mask: 1 for tokens that count.
        groups: Layout of the last dimension of `weights`.
        delta: $\delta$, from 0 to below 1.

    Returns:
        At least 0, without unit.

    Source:
        Dou et al. 2023 (LoRAMoE), arXiv:2312.09979. Deviation: the paper's $I$ has the signs the other way
        round, which sends a text away from its own group; sums over tokens are means, so long texts count as
        short ones do; var / mean^2 as in its code.
    """
    experts = weights[..., : groups.num_experts]
    tokens = mask.sum(dim=1, keepdim=True)
    mass = (experts * mask[..., None]).sum(dim=1) / tokens.clamp_min(1)
    own = target[:, groups.owners]  # (batch, experts)
    scaled = mass * (1 + delta - 2 * delta * own)
    counts = ((target.sum(dim=1, keepdim=True) > 0) & (tokens > 0)).expand_as(scaled).to(scaled.dtype)
    number = counts.sum()
    mean = (scaled * counts).sum() / number.clamp_min(1)
    variance = ((scaled - mean).square() * counts).sum() / (number - 1).clamp_min(1)
    return variance / mean.square().clamp_min(1e-12)


def within_group_balance(
    logits: TokenLogits, mask: TokenMask, groups: ExpertGroups, *, temperature: float = 1.0
) -> Scalar:
    r"""How unevenly the experts of a group share its weight: mean over groups of $K \sum_i \bar u_i^2 - 1$.

    $\bar u_i$ is expert i's mean share of its group. This is the squared coefficient of variation: 0 where all
    experts of a group are used alike, $K - 1$ where one does everything. Neither the balance between groups nor the
    empty expert is touched.

    Args:
        logits: Of the router.
        mask: 1 for tokens that count.
        groups: Layout of the last dimension.
        temperature: Of the router.

    Returns:
        At least 0; 0 if every group has one expert, or no token counts.
    """
    experts = at_least_float32(logits)[..., : groups.num_experts] / temperature
    losses = []
    for part in torch.split(experts, list(groups.sizes), dim=-1):
        share = _mean_over_tokens(part.softmax(dim=-1), mask)
        losses.append(part.shape[-1] * share.square().sum() - 1)
    return torch.stack(losses).mean().where(mask.sum() > 0, 0.0)


def switch_balance_loss(
    weights: TokenWeights, mask: TokenMask, groups: ExpertGroups, *, top_k: int
) -> Scalar:
    r"""The Switch Transformer's load balance: $N \sum_i f_i P_i$, 1 where all experts carry the same.

    $f_i$ is the share of tokens whose `top_k` experts hold i, over `top_k`; $P_i$ the mean weight of i among the
    real experts.

    Args:
        weights: Softmax weights of all choices, before `top_k`.
        mask: 1 for tokens that count.
        groups: Layout of the last dimension.
        top_k: Experts that a token uses.

    Source:
        Fedus et al. 2021, arXiv:2101.03961, eq. 4; top_k above 1 as in Mixtral.
    """
    experts = weights[..., : groups.num_experts]
    experts = experts / experts.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    chosen = torch.zeros_like(experts).scatter(-1, experts.topk(top_k, dim=-1).indices, 1.0 / top_k)
    load, probability = _mean_over_tokens(chosen, mask), _mean_over_tokens(experts, mask)
    return groups.num_experts * (load * probability).sum()


def empty_mass_penalty(weights: TokenWeights, mask: TokenMask, *, target: float) -> Scalar:
    """Squared difference of the empty expert's mean weight and a target, both fractions."""
    empty = _token_mean(weights[..., -1], mask)
    return (empty - target).square().where(mask.sum() > 0, 0.0)


def routing_entropy(weights: TokenWeights) -> TokenMask:
    """Entropy of every token's weights, nats: 0 where one choice has all, log(choices) where all are alike."""
    entropy: Tensor = torch.special.entr(weights).sum(dim=-1)
    return entropy


def mean_by_text(values: Float[Tensor, "batch seq values"], mask: TokenMask) -> Float[Tensor, "batch values"]:
    """Mean of every text over its tokens that count; 0 where none does."""
    weight = mask[..., None]
    return (values * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


def _token_mean(values: Float[Tensor, "batch seq"], weight: TokenMask) -> Scalar:
    return (values * weight).sum() / weight.sum().clamp_min(1e-9)


def _mean_over_tokens(values: Float[Tensor, "batch seq rest"], mask: TokenMask) -> Float[Tensor, " rest"]:
    return (values * mask[..., None]).sum(dim=(0, 1)) / mask.sum().clamp_min(1)
