"""What is asked: every pair in both orders on the points of its task, and the keys by which answers are found."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from prefmoe.errors import ConfigError, DataError, join_problems
from prefmoe.labeling.judge.wording import Wording
from prefmoe.labeling.tasks import Task, TaskFile
from prefmoe.records import PreferencePair
from prefmoe.suggest import nearest

Points = Mapping[str, tuple[str, ...]]
"""For every task the points to ask about."""

_CHARACTERS_PER_TOKEN = (
    4  # of Western text, by OpenAI's rule of thumb; other scripts count one token a character
)


class Asks(Protocol):
    """What an endpoint needs to know of a question."""

    @property
    def system(self) -> str:
        """The system message."""

    @property
    def user(self) -> str:
        """The user message."""

    @property
    def points(self) -> tuple[str, ...]:
        """What is asked about."""

    @property
    def allowed(self) -> tuple[str, ...]:
        """The answers that count."""


@dataclass(frozen=True)
class Question:
    """One call: two completions in one order, and the points asked about. Its texts are put together when needed.

    Attributes:
        key: Hash of judge, template, texts, points and order.
        group: The same without the order: a question and its mirror share it.
        pair: Hash of the pair's texts.
        source: The pair itself.
        swapped: Whether the rejected completion is shown first.
        kind: What kind of conversation it is. `ending`: the points, and how to reply.
    """

    key: str
    group: str
    judge: str
    pair: str
    source: PreferencePair
    task: str
    points: tuple[str, ...]
    swapped: bool
    wording: Wording
    kind: str
    ending: str

    @property
    def pair_id(self) -> str:
        """The pair's id, for people."""
        return self.source.id

    @property
    def system(self) -> str:
        """The system message."""
        return self.wording.system

    @property
    def allowed(self) -> tuple[str, ...]:
        """The answers that count."""
        return self.wording.allowed

    @cached_property
    def user(self) -> str:
        """The user message."""
        pair = self.source
        first, second = (pair.rejected, pair.chosen) if self.swapped else (pair.chosen, pair.rejected)
        return f"{self.kind}\n\n{self.wording.texts(pair.prompt, first, second)}\n\n{self.ending}"

    @cached_property
    def num_tokens(self) -> int:
        """Roughly how many tokens are sent; what an endpoint counts replaces it once it has answered."""
        return estimated_tokens(self.system) + estimated_tokens(self.user) + 8  # 8: the chat template's own


@dataclass(frozen=True)
class Interview:
    """Which questions a judge is asked about a pair; they depend on the pair, not on the other pairs.

    Attributes:
        judge: Name of the judge.
        tasks: What the tasks file says.
        points: For every task the points to ask about.
        points_per_call: How many of them one call asks at once.
        skip_labelled: Leave out points that the pair has a label for.
    """

    judge: str
    tasks: Mapping[str, Task]
    points: Points
    wording: Wording = field(default_factory=Wording)
    points_per_call: int = 1
    skip_labelled: bool = True
    _phrases: dict[tuple[str, tuple[str, ...]], tuple[str, str, str]] = field(
        default_factory=dict, init=False
    )

    def questions(self, pair: PreferencePair) -> Iterator[Question]:
        """All questions on a pair, both orders of the same points one after the other."""
        task = self.task_of(pair)
        known = pair.capabilities if self.skip_labelled else ()
        points = [point for point in self.points[task] if point not in known]
        pair_hash = hash_pair(pair) if points else ""
        for start in range(0, len(points), self.points_per_call):
            asked = tuple(points[start : start + self.points_per_call])
            kind, ending, phrases = self._phrases_of(task, asked)
            group = digest(self.judge, phrases, pair_hash)
            for swapped in (False, True):
                key = digest(group, "swapped" if swapped else "as given")
                yield Question(
                    key, group, self.judge, pair_hash, pair, task, asked, swapped, self.wording, kind, ending
                )

    def _phrases_of(self, task: str, points: tuple[str, ...]) -> tuple[str, str, str]:
        """What stands before and behind the texts, and a hash of all that is not the texts."""
        found = self._phrases.get((task, points))
        if found is None:
            kind, ending = self.wording.kind(self.tasks[task]), self.wording.ending(self.tasks[task], points)
            found = kind, ending, digest(self.wording.fingerprint, kind, ending, *points)
            self._phrases[task, points] = found
        return found

    def task_of(self, pair: PreferencePair) -> str:
        """The pair's task; where the tasks file has only one, pairs without a task belong to it."""
        if pair.task is None and len(self.tasks) == 1:
            return next(iter(self.tasks))
        return str(pair.task)

    def check(self, pairs: Sequence[PreferencePair]) -> None:
        """Refuses pairs whose task is not in the tasks file, before anything is asked.

        Raises:
            DataError: names every such task, how many pairs it has, and the nearest known one.
        """
        unknown: dict[str, list[str]] = {}
        for pair in pairs:
            if self.task_of(pair) not in self.tasks:
                unknown.setdefault(str(pair.task), []).append(pair.id)
        if unknown:
            raise DataError(join_problems([self._unknown_task(task, ids) for task, ids in unknown.items()]))

    def _unknown_task(self, task: str, ids: Sequence[str]) -> str:
        where = f"{len(ids)} pairs, the first is {ids[0]!r}"
        expected = ", ".join(map(repr, self.tasks))
        if task == "None":
            return f"{where}: no 'task'; name one of {expected}"
        near = nearest(task, self.tasks)
        hint = f"did you mean {near!r}?" if near else f"it has {expected}; add the task or drop the pairs"
        return f"{where}: task {task!r} is not in the tasks file; {hint}"


def choose_points(tasks: TaskFile, names: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """The points of every task; with `names` only those of that name.

    Raises:
        ConfigError: no task has a point of that name.
    """
    known = dict.fromkeys(point for task in tasks.tasks.values() for point in task.capabilities)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(map(repr, known))}"
            raise ConfigError(f"point {name!r} is not in the tasks file; {hint}")
    return {
        name: tuple(point for point in task.capabilities if not names or point in names)
        for name, task in tasks.tasks.items()
    }


def hash_pair(pair: PreferencePair) -> str:
    """32 hex digits that identify the pair's texts, whatever its id."""
    sides = [[[m.role, m.content] for m in side] for side in (pair.prompt, pair.chosen, pair.rejected)]
    return digest(json.dumps(sides, ensure_ascii=False))


def digest(*parts: str) -> str:
    """32 hex digits of the parts; where one ends and the next begins counts."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        hashed.update(len(encoded).to_bytes(8, "big") + encoded)
    return hashed.hexdigest()


def estimated_tokens(text: str) -> int:
    """A guess without a tokenizer: a quarter token a character, about one for a character of a wide script.

    Wide ones are counted by their bytes of UTF-8: three, where Latin letters have one.
    """
    wide = 0 if text.isascii() else (len(text.encode("utf-8", "surrogatepass")) - len(text)) // 2
    return wide + max(0, -(-(len(text) - wide) // _CHARACTERS_PER_TOKEN))
