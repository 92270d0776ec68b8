"""From a prompt and levels to a readable completion of the simulated world.

Every quality has two places in a completion: as many as its level show it, the others show its reverse. Each
quality of content is a sentence of two clauses; hedges open two of these sentences, ornaments close two, the
first and the last sentence are warm or not, and brevity is the lack of fillers in between.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

from prefmoe.data.world_phrases import CONTENT, FILLERS, HEDGES, ORNAMENTS, WARM_CLOSING, WARM_OPENING, Cue
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
        for detail in DETAILS
    ]


def _ask(frame: str, topic: Topic, detail: str) -> str:
    text = frame.format(noun=topic.noun, doing=topic.doing, things=topic.things[0], detail=detail)
    return _capital(text)


def compose(prompt: WorldPrompt, levels: Mapping[str, int], rng: Random) -> str:
    """A completion of the prompt that shows exactly these levels.

    Args:
        prompt: What is answered.
        levels: Level 0, 1 or 2 of each quality of CONTENT and STYLES.
        rng: Source of the wording; the same state gives the same text.

    Returns:
        50 to 80 words of English.
    """
    clauses = [_clauses(cues, levels[name], rng) for name, cues in CONTENT.items()]
    rng.shuffle(clauses)
    hedges = [*_phrases(HEDGES, levels["hedging"], rng), ""]
    ornaments = [*_phrases(ORNAMENTS, levels["ornament"], rng), ""]
    rng.shuffle(hedges)
    rng.shuffle(ornaments)
    sentences = [_sentence(*parts) for parts in zip(hedges, clauses, ornaments, strict=True)]
    for filler in rng.sample(FILLERS, MAX_LEVEL - levels["brevity"]):
        sentences.insert(rng.randint(1, len(sentences)), filler)
    first, last = _places(levels["warmth"], rng)
    opening, closing = _side(rng.choice(WARM_OPENING), first), _side(rng.choice(WARM_CLOSING), last)
    return _fill(" ".join([opening, *sentences, closing]), prompt, rng)


def _places(level: int, rng: Random) -> list[bool]:
    """Which of the two places of a quality show it."""
    return rng.sample([True] * level + [False] * (MAX_LEVEL - level), MAX_LEVEL)


def _side(cue: Cue, is_shown: bool) -> str:
    return cue.high if is_shown else cue.low


def _phrases(cues: Sequence[Cue], level: int, rng: Random) -> list[str]:
    return [
        _side(cue, shows) for cue, shows in zip(rng.sample(cues, MAX_LEVEL), _places(level, rng), strict=True)
    ]


def _clauses(cues: Sequence[Cue], level: int, rng: Random) -> str:
    is_mixed = 0 < level < MAX_LEVEL
    return (", but " if is_mixed else ", and ").join(_phrases(cues, level, rng))


def _sentence(hedge: str, clauses: str, ornament: str) -> str:
    return " ".join(filter(None, (hedge, clauses))) + (f", {ornament}." if ornament else ".")


def _fill(text: str, prompt: WorldPrompt, rng: Random) -> str:
    chosen = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), text)
    thing, thing2, thing3 = rng.sample(prompt.topic.things, 3)
    filled = chosen.format(detail=prompt.detail, thing=thing, thing2=thing2, thing3=thing3)
    return re.sub(r"(^|[.?] )([a-z])", lambda found: found[1] + found[2].upper(), filled)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
