"""Which task a prompt belongs to: logits of a linear head, and the decision made from them."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from prefmoe.errors import ConfigError, ShapeError
from prefmoe.nn.pooling import mean_tokens
from prefmoe.nn.precision import at_least_float32
from prefmoe.nn.probe import fit_softmax
from prefmoe.shapes import States

RECENT_TOKENS = 32
RoutingMode = Literal["top1", "given", "soft"]
Logits = Float[Tensor, "batch tasks"]
TaskIds = Int[Tensor, " batch"]


class TaskRouter(nn.Module):
    """Logits of every task for the pooled state of a prompt.

    A linear head on features that are standardized first. It gives logits, not probabilities: a softmax
    before cross-entropy would keep the loss above 0.905 nats for 5 classes (the release's defect 9).

    Parameters it owns:
        weight: (tasks, hidden), zeros: a new router finds all tasks equally likely.
        bias: (tasks,), zeros.
    Buffers it owns:
        mean: (hidden,), zeros; subtracted from the features.
        std: (hidden,), ones; then divides them.

    Args:
        num_tasks: Number of tasks.
        hidden: Width of the features.

    Example:
        >>> TaskRouter(num_tasks=3, hidden=8)(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, num_tasks: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tasks, hidden))
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("std", torch.ones(hidden))

    def forward(self, features: Float[Tensor, "batch hidden"]) -> Logits:
        """Logits of the tasks.

        Args:
            features: Pooled state of each prompt, any float dtype.

        Returns:
            Logits in float32 (or wider, if the features are); their softmax is the probability of each task.
        """
        x = (at_least_float32(features) - self.mean) / self.std
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    @torch.no_grad()
    def fit(
        self,
        features: Float[Tensor, "rows hidden"],
        task_ids: Int[Tensor, " rows"],
        *,
        l2: float = 1e-3,
        label_smoothing: float = 0.05,
        class_balance: float = 1.0,
    ) -> None:
        """Learn mean, std, weight and bias from prompts whose task is known: one convex fit, no steps.

        A feature that never changes is left unscaled.

        Args:
            features: Pooled states of training prompts.
            task_ids: Their tasks.
            l2: Strength of the L2 penalty of `fit_softmax`.
            label_smoothing: As in `fit_softmax`.
            class_balance: As in `fit_softmax`.
        """
        x = features.double()
        self.mean.copy_(x.mean(dim=0))
        std = x.std(dim=0, correction=0)
        self.std.copy_(std.where(std > 1e-6, 1.0))
        weight, bias = fit_softmax(
            (x - self.mean) / self.std,
            task_ids,
            num_classes=len(self.bias),
            l2=l2,
            label_smoothing=label_smoothing,
            class_balance=class_balance,
        )
        self.weight.copy_(weight)
        self.bias.copy_(bias)


def router_features(states: States, prompt_lengths: Int[Tensor, " batch"]) -> Float[Tensor, "batch features"]:
    """What a router sees of every text: the mean state of its prompt, and of the prompt's last 32 tokens.

    The second half is there for conversations: what is asked last tells the task better than what went before.

    Args:
        states: States of packed rows, the prompt first.
        prompt_lengths: Leading tokens that belong to the prompt.

    Returns:
        float32 or wider, twice as wide as the states.
    """
    whole = mean_tokens(states, torch.zeros_like(prompt_lengths), prompt_lengths)
    recent = mean_tokens(states, (prompt_lengths - RECENT_TOKENS).clamp_min(0), prompt_lengths)
    return torch.cat([whole, recent], dim=1)


class Routing(NamedTuple):
    """What the router decided for each prompt.

    Attributes:
        task_ids: The one task of each prompt, to run and to report.
        probs: What the router thinks of every task; each row sums to 1.
        weights: Share of every task in the reward; each row sums to 1 (one-hot unless the mode is "soft").
    """

    task_ids: TaskIds
    probs: Logits
    weights: Logits


def route(logits: Logits, *, mode: RoutingMode = "top1", given: TaskIds | None = None) -> Routing:
    """Decide the task of each prompt.

    Args:
        logits: Logits of the router.
        mode: "top1" takes the likeliest task (of equals the lowest index); "given" takes `given`; "soft"
            weights every task with its probability and reports the likeliest.
        given: Task of each prompt, for mode "given" only.

    Returns:
        The decision; `probs` is the router's own view in every mode.

    Raises:
        ConfigError: Unknown mode, or `given` without mode "given" or the other way round.
        ShapeError: A given task does not exist, or there is not one for each text.

    Source:
        Quan 2024, arXiv:2403.01197 (top-1 outer layer). "soft" is ours. Slow form:
        tests/reference/routing.py.

    Example:
        >>> routing = route(torch.tensor([[0.0, 2.0, 2.0]]))
        >>> routing.task_ids.tolist(), routing.weights.tolist()
        ([1], [[0.0, 1.0, 0.0]])
    """
    _check_choice(logits, mode, given)
    probs = at_least_float32(logits).softmax(dim=1)
    task_ids = logits.argmax(dim=1) if given is None else given
    one_hot = F.one_hot(task_ids.long(), logits.shape[1]).to(probs.dtype)
    return Routing(task_ids, probs, probs if mode == "soft" else one_hot)


def _check_choice(logits: Tensor, mode: str, given: Tensor | None) -> None:
    if mode not in get_args(RoutingMode):
        raise ConfigError(f"route: unknown mode; got {mode!r}; choose 'top1', 'given' or 'soft'.")
    if (mode == "given") != (given is not None):
        raise ConfigError(f"route: pass given=task_ids with mode='given' and only then; got mode={mode!r}.")
    if given is None:
        return
    num_texts, num_tasks = logits.shape
    if given.shape != (num_texts,):
        raise ShapeError(f"route: {given.numel()} given tasks for {num_texts} texts; pass one for each.")
    wrong = given[(given < 0) | (given >= num_tasks)]
    if len(wrong):
        raise ShapeError(f"route: there is no task {wrong[0].item()}; expected 0 to {num_tasks - 1}.")
