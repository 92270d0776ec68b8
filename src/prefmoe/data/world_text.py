"""From a prompt and levels to a readable completion of the simulated world.

Every quality has two places in a completion: `level` of them show it, the others show its reverse. A point of the
task is a sentence of two clauses; hedges open two of the three sentences, ornaments close two, warmth is the first
and the last sentence, and brevity is the lack of two fillers in between.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

from prefmoe.data.world_phrases import FILLERS, HEDGES, ORNAMENTS, POINTS, WARM_CLOSING, WARM_OPENING, Cue
from prefmoe.data.world_topics import DETAILS, FRAMES, TOPICS, Topic

STYLES = ("brevity", "hedging", "warmth", "ornament")
MAX_LEVEL = 2

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


class WorldPrompt(NamedTuple):
    """A prompt and what it is about."""

    task: str
    topic: Topic
    detail: str
    text: str


def all_prompts(task: str) -> list[WorldPrompt]:
    """Every prompt of the task: each topic in each frame with each detail."""
    return [
        WorldPrompt(task, topic, detail, _ask(frame, topic, detail))
        for topic in TOPICS
        for frame in FRAMES[task]
        for detail in DETAILS[task]
    ]


def _ask(frame: str, topic: Topic, detail: str) -> str:
    text = frame.format(
        noun=topic.noun,
        doing=topic.doing,
        things=topic.things[0],
        detail=detail,
        Detail=_capital(detail),
    )
    return _capital(text)


def compose(prompt: WorldPrompt, levels: Mapping[str, int], rng: Random) -> str:
    """A completion of the prompt that shows exactly these levels.

    Args:
        prompt: What is answered.
        levels: Level 0, 1 or 2 of each point of the task and of each of STYLES.
        rng: Source of the wording; the same state gives the same text.

    Returns:
        30 to 80 words of English.
    """
    points = [_point(cues, levels[name], rng) for name, cues in POINTS[prompt.task].items()]
    rng.shuffle(points)
    hedges = [*_phrases(HEDGES, levels["hedging"], rng), ""]
    ornaments = [*_phrases(ORNAMENTS, levels["ornament"], rng), ""]
    rng.shuffle(hedges)
    rng.shuffle(ornaments)
    sentences = [_sentence(*parts) for parts in zip(hedges, points, ornaments, strict=True)]
    for filler in rng.sample(FILLERS, MAX_LEVEL - levels["brevity"]):
        sentences.insert(rng.randint(1, len(sentences)), filler)
    first, last = _places(levels["warmth"], rng)
    opening, closing = _side(rng.choice(WARM_OPENING), first), _side(rng.choice(WARM_CLOSING), last)
    return _fill(" ".join([opening, *sentences, closing]), prompt, rng)


def _places(level: int, rng: Random) -> list[bool]:
    """Which of the two places of a quality show it."""
    return rng.sample([True] * level + [False] * (MAX_LEVEL - level), MAX_LEVEL)


def _side(cue: Cue, shows: bool) -> str:  # noqa: FBT001
    return cue.high if shows else cue.low


def _phrases(cues: Sequence[Cue], level: int, rng: Random) -> list[str]:
    return [
        _side(cue, shows) for cue, shows in zip(rng.sample(cues, MAX_LEVEL), _places(level, rng), strict=True)
    ]


def _point(cues: Sequence[Cue], level: int, rng: Random) -> str:
    is_mixed = 0 < level < MAX_LEVEL
    return (", but " if is_mixed else ", and ").join(_phrases(cues, level, rng))


def _sentence(hedge: str, clause: str, ornament: str) -> str:
    return " ".join(filter(None, (hedge, clause))) + (f", {ornament}." if ornament else ".")


def _fill(text: str, prompt: WorldPrompt, rng: Random) -> str:
    chosen = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), text)
    thing, thing2, thing3 = rng.sample(prompt.topic.things, 3)
    other, other2 = rng.sample(rng.choice([topic for topic in TOPICS if topic != prompt.topic]).things, 2)
    filled = chosen.format(
        noun=prompt.topic.noun,
        doing=prompt.topic.doing,
        detail=prompt.detail,
        element=prompt.detail,
        other_element=rng.choice([detail for detail in DETAILS[prompt.task] if detail != prompt.detail]),
        thing=thing,
        thing2=thing2,
        thing3=thing3,
        other=other,
        other2=other2,
    )
    return re.sub(r"(^|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), filled)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
