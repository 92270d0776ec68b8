"""Frozen text records: what goes in (pairs, completions) and what comes out (reports). No tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt, the preferred completion and the other one.

    Texts are always messages: a plain string of a file becomes one user (prompt) or assistant (completion)
    message when it is read.

    Attributes:
        target_margin: How much the rewards should differ at least, reward units; column `margin`.
        weight: Share of this pair in the loss, relative to 1.
        capabilities: For each named capability which side is better: 1 chosen, -1 rejected, 0 a tie.
        capability_probabilities: Soft labels: for named capabilities the probability that `chosen` is better.
    """

    id: str
    prompt: Messages
    chosen: Messages
    rejected: Messages
    task: str | None = None
    preference: str | None = None
    target_margin: float = 0.0
    weight: float = 1.0
    capabilities: Mapping[str, int] = field(default_factory=dict)
    source: str | None = None
    capability_probabilities: Mapping[str, float] = field(default_factory=dict)

    def swap(self) -> Self:
        """The same pair with the other completion preferred."""
        flipped = {name: -side for name, side in self.capabilities.items()}
        soft = {name: 1 - share for name, share in self.capability_probabilities.items()}
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            capabilities=flipped,
            capability_probabilities=soft,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to a prompt, to be scored."""

    id: str
    prompt: Messages
    completion: Messages
    task: str | None = None


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What the reward model says about one completion, and why.

    Attributes:
        reward: Standardized reward (mean 0, standard deviation 1 over the task's validation completions).
        task: Task whose experts gave the reward.
        task_probs: What the router thinks of every task; sums to 1.
        capabilities: Standardized score of each capability of the task.
        truncated_tokens: Prompt tokens that were cut away to fit the length limit.
    """

    id: str
    reward: float
    task: str
    task_probs: Mapping[str, float]
    capabilities: Mapping[str, float]
    truncated_tokens: int = 0
