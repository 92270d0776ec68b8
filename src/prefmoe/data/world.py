"""The simulated preference world: prompts and completions whose every quality is known, because it was planted.

Three tasks with three capabilities each. What people like depends on the task: its own capabilities are good, while
four qualities of style (brevity, hedging, warmth, ornament) are liked in one task and disliked in another. One
reward model for all tasks suffers from that; experts do not. Used by `prefmoe demo` and the training tests.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from statistics import pstdev
from typing import Literal, get_args

from prefmoe.data.world_phrases import POINTS
from prefmoe.data.world_text import MAX_LEVEL, STYLES, WorldPrompt, all_prompts, compose
from prefmoe.errors import ConfigError
from prefmoe.records import Completion, Message, Messages, PreferencePair

Split = Literal["train", "validation", "test"]

# Gold reward = sum of weight x (level - 1), then scaled to standard deviation 1. The weights of a style
# sum to 0 over the tasks: what is gained in one is lost in another.
_POINT_WEIGHTS = (1.0, 0.9, 0.8)
_STYLE_WEIGHTS = {
    "advice": {"brevity": -0.5, "hedging": 1.0, "warmth": 0.5, "ornament": -0.5},
    "facts": {"brevity": 1.0, "hedging": -0.5, "warmth": -1.0, "ornament": -0.5},
    "writing": {"brevity": -0.5, "hedging": -0.5, "warmth": 0.5, "ornament": 1.0},
}

# Levels are drawn evenly from these: most completions take a side.
_LEVELS = (0, 0, 1, 2, 2)
_LEVEL_STD = pstdev(_LEVELS)

# Two completions closer than this are a tie to people (standard deviations of the gold reward): drawn again.
_TIE = 0.35
# Steepness of the Bradley-Terry labels, per unit of gold reward and per level of a capability;
# set so that 70 % of the noisy labels agree with the truth (the papers' people: 60 to 75 %).
_GOLD_STEEPNESS = 0.7
_LEVEL_STEEPNESS = 0.65

# Which part of a task's shuffled prompts is whose.
_SPLIT_EDGES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.7),
    "validation": (0.7, 0.8),
    "test": (0.8, 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldCompletion(Completion):
    """A completion whose true quality is known.

    Attributes:
        gold: Gold reward, in standard deviations of the task's completions (mean 0).
        levels: Level 0, 1 or 2 of every capability of the task and every style.
    """

    gold: float
    levels: Mapping[str, int]


class World:
    """A seeded generator of preference data with known truth.

    No prompt is in two splits, whatever the seed; the seed decides what is drawn. Item `i` of a sample does not
    depend on how many are asked for.

    Args:
        seed: Seed of all that is drawn.

    Example:
        >>> pair = World(seed=0).sample_pairs(1, split="train", label_noise=False)[0]
        >>> pair.task, sorted(pair.capabilities)
        ('advice', ['empathy', 'proactivity', 'question_specific'])
    """

    tasks: tuple[str, ...] = tuple(POINTS)
    capabilities: Mapping[str, tuple[str, ...]] = {task: tuple(points) for task, points in POINTS.items()}
    styles: tuple[str, ...] = STYLES

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def gold_reward(self, task: str, levels: Mapping[str, int]) -> float:
        """True reward of a completion with these levels, in standard deviations of the task's completions.

        Raises:
            ConfigError: The task is unknown, or the levels are not those of the task.
        """
        _check("task", task, self.tasks)
        weights = _gold_weights(task)
        if set(levels) != set(weights):
            raise ConfigError(
                f"world.gold_reward: the levels do not fit task {task!r}; got {sorted(levels)}; "
                f"expected {sorted(weights)}; give one level for each."
            )
        return sum(weight * (levels[name] - MAX_LEVEL / 2) for name, weight in weights.items())

    def prompts(self, task: str, split: Split) -> tuple[str, ...]:
        """All prompts of a task in a split, in the order in which samples use them.

        Raises:
            ConfigError: The task or the split is unknown.
        """
        return tuple(prompt.text for prompt in self._prompts(task, split))

    def sample_pairs(self, num_per_task: int, *, split: Split, label_noise: bool) -> list[PreferencePair]:
        """Preference pairs of every task, the tasks in turn.

        Args:
            num_per_task: Pairs of each task; prompts repeat when there are more pairs than prompts.
            split: Which prompts to use.
            label_noise: Draw `chosen` and the capability labels from Bradley-Terry, so that about 70 % agree
                with the truth; otherwise every label is true. The texts are the same either way.

        Returns:
            Pairs with their task, and for each of its capabilities the side that has more of it (0: neither).

        Raises:
            ConfigError: The split is unknown.
        """
        return [
            self._pair(self._prompt(task, split, i), f"{split}/{task}/{i}", label_noise=label_noise)
            for i in range(num_per_task)
            for task in self.tasks
        ]

    def sample_completions(
        self, num_prompts_per_task: int, num_completions: int, *, split: Split
    ) -> list[WorldCompletion]:
        """Completions of each prompt with levels drawn evenly: a fixed policy, for best-of-N curves.

        Returns:
            Task by task and prompt by prompt, the `num_completions` completions of a prompt in a row.

        Raises:
            ConfigError: The split is unknown.
        """
        return [
            self._completion(self._prompt(task, split, i), f"{split}/{task}/{i}/{k}")
            for task in self.tasks
            for i in range(num_prompts_per_task)
            for k in range(num_completions)
        ]

    def corpus(self, num_texts: int) -> Iterator[str]:
        """Texts to pre-train a language model on: a training prompt, an empty line and a completion each."""
        for i in range(num_texts):
            turn, task = divmod(i, len(self.tasks))
            row = self._completion(self._prompt(self.tasks[task], "train", turn), f"corpus/{i}")
            yield f"{row.prompt[0].content}\n\n{row.completion[0].content}"

    def _prompts(self, task: str, split: Split) -> tuple[WorldPrompt, ...]:
        _check("task", task, self.tasks)
        _check("split", split, get_args(Split))
        return _shuffled_prompts(task, split, self.seed)

    def _prompt(self, task: str, split: Split, i: int) -> WorldPrompt:
        prompts = self._prompts(task, split)
        return prompts[i % len(prompts)]

    def _levels(self, task: str, rng: Random) -> dict[str, int]:
        return {name: rng.choice(_LEVELS) for name in _gold_weights(task)}

    def _completion(self, prompt: WorldPrompt, name: str) -> WorldCompletion:
        rng = Random(f"{self.seed}/completion/{name}")
        levels = self._levels(prompt.task, rng)
        return WorldCompletion(
            id=f"world/{name}",
            prompt=_user(prompt.text),
            completion=_assistant(compose(prompt, levels, rng)),
            task=prompt.task,
            gold=self.gold_reward(prompt.task, levels),
            levels=levels,
        )

    def _pair(self, prompt: WorldPrompt, name: str, *, label_noise: bool) -> PreferencePair:
        rng = Random(f"{self.seed}/pair/{name}")
        difference = 0.0
        while abs(difference) < _TIE:
            first, second = self._levels(prompt.task, rng), self._levels(prompt.task, rng)
            difference = self.gold_reward(prompt.task, first) - self.gold_reward(prompt.task, second)
        pair = PreferencePair(
            id=f"world/{name}",
            prompt=_user(prompt.text),
            chosen=_assistant(compose(prompt, first, rng)),
            rejected=_assistant(compose(prompt, second, rng)),
            task=prompt.task,
            capabilities={
                point: _label(_LEVEL_STEEPNESS * (first[point] - second[point]), rng, noise=label_noise)
                for point in self.capabilities[prompt.task]
            },
            source="world",
        )
        is_first = _label(_GOLD_STEEPNESS * difference, rng, noise=label_noise) > 0
        return pair if is_first else pair.swap()


@cache
def _gold_weights(task: str) -> dict[str, float]:
    """Reward of one level more of each quality, scaled: even levels give rewards of standard deviation 1."""
    raw = dict(zip(POINTS[task], _POINT_WEIGHTS, strict=True)) | _STYLE_WEIGHTS[task]
    scale = _LEVEL_STD * math.hypot(*raw.values())
    return {name: weight / scale for name, weight in raw.items()}


@cache
def _shuffled_prompts(task: str, split: Split, seed: int) -> tuple[WorldPrompt, ...]:
    """The prompts of a split; which they are does not depend on the seed, only their order does."""
    prompts = all_prompts(task)
    Random(task).shuffle(prompts)
    first, last = (round(edge * len(prompts)) for edge in _SPLIT_EDGES[split])
    mine = prompts[first:last]
    Random(f"{seed}/{task}/{split}").shuffle(mine)
    return tuple(mine)


def _label(logit: float, rng: Random, *, noise: bool) -> int:
    """1 if the first side is better, -1 if the second is, 0 if neither; Bradley-Terry with noise."""
    if logit == 0:
        return 0
    probability = 1 / (1 + math.exp(-logit)) if noise else float(logit > 0)
    return 1 if rng.random() < probability else -1


def _user(text: str) -> Messages:
    return (Message("user", text),)


def _assistant(text: str) -> Messages:
    return (Message("assistant", text),)


def _check(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ConfigError(f"world: unknown {what} {got!r}; expected one of {', '.join(known)}.")
