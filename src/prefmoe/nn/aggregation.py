"""From the experts of one text to one reward: aggregators of a task, and ensembles of whole models."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefmoe.errors import ConfigError
from prefmoe.nn.precision import at_least_float32

AggregatorKind = Literal["task_head", "linear_scores", "linear_states", "mlp"]
ExpertStates = Float[Tensor, "batch experts hidden"]
ExpertScores = Float[Tensor, "batch experts"]
TextRewards = Float[Tensor, " batch"]
MemberRewards = Float[Tensor, "members batch"]


class TaskHead(nn.Module):
    """The score of expert 0, the task adapter itself: phase 1 without capabilities. Owns nothing."""

    def forward(self, states: ExpertStates, scores: ExpertScores) -> TextRewards:
        """Rewards; see `build_aggregator`."""
        return at_least_float32(scores[:, 0])


class LinearScores(nn.Module):
    """A weighted sum of the experts' scores: readable, as many weights as experts.

    Parameters it owns:
        weight: (experts,), 1 for expert 0 and 0 for the rest, so that it starts as the task head.
    """

    def __init__(self, *, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(num_experts)[0].clone())

    def forward(self, states: ExpertStates, scores: ExpertScores) -> TextRewards:
        """Rewards; see `build_aggregator`."""
        return torch.einsum("be,e->b", *_same_dtype(scores, self.weight))


class LinearStates(nn.Module):
    """The task adapter's score and one linear head on the states of all experts: what the score has missed.

    No bias: rewards are compared with each other only.

    Parameters it owns:
        weight: (experts, hidden), zeros.
        head: (), 1, what the score counts; so that it starts as the task head.
    """

    def __init__(self, *, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden))
        self.head = nn.Parameter(torch.ones(()))

    def forward(self, states: ExpertStates, scores: ExpertScores) -> TextRewards:
        """Rewards; see `build_aggregator`."""
        corrections = torch.einsum("beh,eh->b", *_same_dtype(states, self.weight))
        return corrections + self.head * at_least_float32(scores[:, 0])


class MLP(nn.Module):
    r"""The paper's aggregator, $w_2 \cdot \mathrm{PReLU}(W_1 [z_0; \dots; z_{k-1}] + b_1) + b_2$.

    Parameters it owns:
        layers.0: weight (hidden, experts * hidden) and bias (hidden,), as `nn.Linear` starts.
        layers.1: the slope of PReLU, 0.25.
        layers.2: weight (1, hidden) and bias (1,), as `nn.Linear` starts.
    """

    def __init__(self, *, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_experts * hidden, hidden), nn.PReLU(), nn.Linear(hidden, 1))

    def forward(self, states: ExpertStates, scores: ExpertScores) -> TextRewards:
        """Rewards; see `build_aggregator`."""
        rewards: Tensor = self.layers(at_least_float32(states).flatten(1)).squeeze(1)
        return rewards


def build_aggregator(kind: AggregatorKind, *, num_experts: int, hidden: int) -> nn.Module:
    """The module that turns the experts of one task into rewards.

    All are called the same way, `aggregator(states, scores)` with states (batch, experts, hidden) and scores
    (batch, experts), both standardized by the caller, and give rewards (batch,) in float32. Expert 0 is the
    task adapter, the others are the capability experts.

    Args:
        kind: "task_head" is `TaskHead`, "linear_scores" `LinearScores`, "linear_states" `LinearStates`,
            "mlp" the paper's `MLP`.
        num_experts: Experts of the task, the task adapter included.
        hidden: Width of an expert's state.

    Returns:
        A new module.

    Raises:
        ConfigError: Unknown kind.

    Source:
        Quan 2024, arXiv:2403.01197, phase 3 ("mlp"). Deviation: the task adapter is one more expert, and the
        other kinds are ours. Slow form: tests/reference/aggregation.py.

    Example:
        >>> aggregator = build_aggregator("linear_scores", num_experts=2, hidden=4)
        >>> aggregator(torch.zeros(3, 2, 4), torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]])).tolist()
        [1.0, 2.0, 3.0]
    """
    if kind == "task_head":
        return TaskHead()
    if kind == "linear_scores":
        return LinearScores(num_experts=num_experts)
    if kind == "linear_states":
        return LinearStates(num_experts=num_experts, hidden=hidden)
    if kind == "mlp":
        return MLP(num_experts=num_experts, hidden=hidden)
    raise ConfigError(
        f"build_aggregator: unknown kind; got {kind!r}; "
        "choose 'task_head', 'linear_scores', 'linear_states' or 'mlp'."
    )


def mean_reward(rewards: MemberRewards) -> TextRewards:
    """Mean over the members of an ensemble.

    Source:
        Coste et al. 2023, arXiv:2310.02743, mean optimization.

    Example:
        >>> mean_reward(torch.tensor([[1.0], [3.0]])).tolist()
        [2.0]
    """
    return at_least_float32(rewards).mean(dim=0)


def worst_case(rewards: MemberRewards) -> TextRewards:
    """The smallest reward that a member of the ensemble gives (WCO).

    Source:
        Coste et al. 2023, arXiv:2310.02743, worst-case optimization.

    Example:
        >>> worst_case(torch.tensor([[1.0], [3.0]])).tolist()
        [1.0]
    """
    return at_least_float32(rewards).amin(dim=0)


def uncertainty_weighted(rewards: MemberRewards, *, penalty: float = 0.5) -> TextRewards:
    r"""Mean over the members minus $\lambda$ times their variance (UWO).

    Args:
        rewards: Rewards of each member.
        penalty: $\lambda$, at least 0; 0 gives the mean (the release of the paper reads 0 as 1).

    Returns:
        One reward a text.

    Numerics:
        Population variance (divided by the number of members), so one member has variance 0.

    Source:
        Coste et al. 2023, arXiv:2310.02743, uncertainty-weighted optimization; 0.5 is their best-of-n
        default.

    Example:
        >>> uncertainty_weighted(torch.tensor([[1.0], [3.0]]), penalty=0.5).tolist()
        [1.5]
    """
    members = at_least_float32(rewards)
    return members.mean(dim=0) - penalty * members.var(dim=0, correction=0)


def _same_dtype(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    left, right = at_least_float32(left), at_least_float32(right)
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)
