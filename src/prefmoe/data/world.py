"""The simulated preference world: texts whose every quality is known, because it was planted.

Completions show the same qualities in every task: three of content (heart, width, order) and four of style
(brevity, hedging, warmth, ornament). What people like of them depends on the task: heart is empathy in advice,
its lack is objectiveness in facts. Only the prompt tells which task it is, so one reward model for all of them
suffers and experts do not. For `prefmoe demo` and the training tests.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from statistics import pstdev
from typing import ClassVar, Literal, get_args

from prefmoe.data.world_text import MAX_LEVEL, STYLES, WorldPrompt, all_prompts, compose
from prefmoe.errors import ConfigError
from prefmoe.records import Completion, Message, Messages, PreferencePair

Split = Literal["train", "validation", "test"]

# What the qualities of content are in each task: its capabilities; -1 where little of the quality is good.
# They weigh 1 each, so order is liked everywhere, heart and width are not.
_CAPABILITIES: dict[str, dict[str, tuple[str, int]]] = {
    "advice": {"empathy": ("heart", 1), "question_specific": ("width", -1), "logic": ("order", 1)},
    "facts": {
        "objectiveness": ("heart", -1),
        "breadth_of_knowledge": ("width", 1),
        "reasoning": ("order", 1),
    },
    "writing": {
        "expressiveness": ("heart", 1),
        "content_richness": ("width", 1),
        "readability": ("order", 1),
    },
}

# The weights of a style sum to 0 over the tasks: what is gained in one is lost in another.
_STYLE_WEIGHTS = {
    "advice": {"brevity": -0.4, "hedging": 1.2, "warmth": 0.6, "ornament": -0.6},
    "facts": {"brevity": 0.8, "hedging": -0.6, "warmth": -1.2, "ornament": -0.6},
    "writing": {"brevity": -0.4, "hedging": -0.6, "warmth": 0.6, "ornament": 1.2},
}

# Levels are drawn evenly from these: most completions take a side.
_LEVELS = (0, 0, 1, 2, 2)
_LEVEL_STD = pstdev(_LEVELS)

# Two completions closer than this are a tie to people (standard deviations of the gold reward): drawn again.
_TIE = 0.5
# Steepness of the Bradley-Terry labels, per unit of gold reward and per level of a capability;
# set so that 70 % of the noisy labels agree with the truth (the papers' people: 60 to 75 %).
_GOLD_STEEPNESS = 0.62
_LEVEL_STEEPNESS = 0.58

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

    No prompt is in two splits, whatever the seed; the seed decides what is drawn. A smaller sample is the
    beginning of a larger one.

    Args:
        seed: Seed of all that is drawn.

    Example:
        >>> pair = World(seed=0).sample_pairs(1, split="train", label_noise=False)[0]
        >>> pair.task, sorted(pair.capabilities)
        ('advice', ['empathy', 'logic', 'question_specific'])
    """

    tasks: ClassVar[tuple[str, ...]] = tuple(_CAPABILITIES)
    capabilities: ClassVar[Mapping[str, tuple[str, ...]]] = {
        task: tuple(names) for task, names in _CAPABILITIES.items()
    }
    styles: ClassVar[tuple[str, ...]] = STYLES

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
            completion=_assistant(_write(prompt, levels, rng)),
            task=prompt.task,
            gold=self.gold_reward(prompt.task, levels),
            levels=levels,
        )

    def _pair(self, prompt: WorldPrompt, pair_id: str, *, label_noise: bool) -> PreferencePair:
        rng = Random(f"{self.seed}/pair/{pair_id}")
        difference = 0.0
        while abs(difference) < _TIE:
            first, second = self._levels(prompt.task, rng), self._levels(prompt.task, rng)
            difference = self.gold_reward(prompt.task, first) - self.gold_reward(prompt.task, second)
        pair = PreferencePair(
            id=f"world/{pair_id}",
            prompt=_user(prompt.text),
            chosen=_assistant(_write(prompt, first, rng)),
            rejected=_assistant(_write(prompt, second, rng)),
            task=prompt.task,
            capabilities={
                name: _label(_LEVEL_STEEPNESS * (first[name] - second[name]), rng, noise=label_noise)
                for name in self.capabilities[prompt.task]
            },
            source="world",
        )
        is_first = _label(_GOLD_STEEPNESS * difference, rng, noise=label_noise) > 0
        return pair if is_first else pair.swap()


@cache
def _gold_weights(task: str) -> dict[str, float]:
    """Reward of one level more of each quality, scaled: even levels give rewards of standard deviation 1."""
    raw = dict.fromkeys(_CAPABILITIES[task], 1.0) | _STYLE_WEIGHTS[task]
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


def _write(prompt: WorldPrompt, levels: Mapping[str, int], rng: Random) -> str:
    qualities = dict(levels)
    for name, (quality, sign) in _CAPABILITIES[prompt.task].items():
        level = qualities.pop(name)
        qualities[quality] = level if sign > 0 else MAX_LEVEL - level
    return compose(prompt, qualities, rng)


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
