"""A judge as a labeler: asks what is not in the store yet, and labels what both orders agree on."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from prefmoe.errors import PrefmoeError, PrefmoeWarning
from prefmoe.labeling.interface import Labels
from prefmoe.labeling.judge.asking import Asking, Manners
from prefmoe.labeling.judge.budget import Budget, Prices
from prefmoe.labeling.judge.callers import open_callers
from prefmoe.labeling.judge.event_loop import run_alone
from prefmoe.labeling.judge.pace import Backoff
from prefmoe.labeling.judge.questions import Interview, Question, choose_points, hash_pair
from prefmoe.labeling.judge.settings import LOCAL, JudgeSettings
from prefmoe.labeling.judge.store import AnswerStore, Call
from prefmoe.labeling.judge.verdicts import Verdict, Verdicts, calibrate, collect_verdicts
from prefmoe.labeling.tasks import TaskFile
from prefmoe.records import PreferencePair


class Plan(NamedTuple):
    """What labeling would take; tokens are estimates.

    Attributes:
        calls: Questions that have to be asked. `stored`: that have an answer already.
        output_tokens: At most.
        usd: At most; None if no price is given.
    """

    calls: int
    stored: int
    input_tokens: int
    output_tokens: int
    usd: float | None


class Progress(NamedTuple):
    """How far it is.

    Attributes:
        calls: Answered in this sitting, of `to_ask`.
        usd: Spent by this judge, earlier sittings included; None if no price is given.
        unusable: Calls of this sitting of which an answer cannot be used.
    """

    calls: int
    to_ask: int
    usd: float | None
    unusable: int


Report = Callable[[Progress], None]


Watcher = Callable[[int], AbstractContextManager[Report]]
"""Shows one sitting of so many calls: `with watcher(total) as report: ... report(progress)`."""


@contextmanager
def unseen(_: int) -> Iterator[Report]:
    """Shows nothing."""
    yield lambda progress: None


@dataclass
class JudgeLabeler:
    """Labels of one judge, kept in a store.

    Attributes:
        name: The judge's name; of a local one with a hash of its files, since a folder may hold another model tomorrow.
        out_of_budget: Whether the last `label` stopped at a limit; its labels are then incomplete.
    """

    settings: JudgeSettings
    tasks: TaskFile
    store: AnswerStore
    watcher: Watcher = unseen
    skip_labelled: bool = True
    out_of_budget: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        points = choose_points(self.tasks, self.settings.points)
        self.settings.wording.check(self.tasks.tasks)
        self.name = _name_of(self.settings)
        self.interview = Interview(
            self.name,
            self.tasks.tasks,
            points,
            self.settings.wording,
            self.settings.points_per_call,
            self.skip_labelled,
        )

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The points of all tasks, in the order of the tasks file."""
        return tuple(dict.fromkeys(point for points in self.interview.points.values() for point in points))

    def label(self, pairs: Sequence[PreferencePair]) -> list[Labels]:
        """Asks what is missing, then gives the labels on which both orders agree.

        Raises:
            DataError: a pair's task is not in the tasks file.
            ConfigError, PrefmoeError: the judge cannot be asked; what was answered is stored.
        """
        self.ask(pairs)
        verdicts = self.verdicts(pairs)
        return self.labels_of(pairs, verdicts)

    def labels_of(self, pairs: Sequence[PreferencePair], verdicts: Verdicts) -> list[Labels]:
        """The labels on which both orders agree, one mapping a pair."""
        return [
            {point: v.label for point, v in verdicts.get(hash_pair(pair), {}).items() if v.label is not None}
            for pair in pairs
        ]

    def soft_labels(
        self, pairs: Sequence[PreferencePair], verdicts: Verdicts | None = None
    ) -> list[dict[str, float]]:
        """Probabilities that the chosen side is better, for each point on which both orders gave some.

        Also where the two orders disagree: their mean is then near one half. `verdicts` are those of the same pairs.
        """
        known = self.verdicts(pairs) if verdicts is None else verdicts
        found = (known.get(hash_pair(pair), {}) for pair in pairs)
        return [
            {point: share for point, v in of_pair.items() if (share := v.chosen_probability) is not None}
            for of_pair in found
        ]

    def plan(self, pairs: Sequence[PreferencePair]) -> Plan:
        """What `ask` would do, without doing it; raises what it would raise before the first call."""
        self.interview.check(pairs)
        known = self.store.keys(self.name)
        calls = stored = input_tokens = output_tokens = 0
        for question in self._questions(pairs):
            if question.key in known:
                stored += 1
                continue
            calls += 1
            input_tokens += question.num_tokens
            if not self.settings.is_local:
                output_tokens += self.settings.max_answer_tokens * len(question.points)
        usd = self._prices.cost(input_tokens, output_tokens) if self._has_prices else None
        return Plan(calls, stored, input_tokens, output_tokens, usd)

    def forget_unusable(self, pairs: Sequence[PreferencePair]) -> int:
        """Makes `ask` put those questions again whose answers cannot be used; gives their number."""
        self.interview.check(pairs)
        self.store.claim()
        return self.store.forget_unusable(self.name, {question.key for question in self._questions(pairs)})

    def ask(self, pairs: Sequence[PreferencePair]) -> None:
        """Puts every question that has no answer yet, as far as the budget allows."""
        self.interview.check(pairs)
        self.out_of_budget = False
        if not self._num_missing(pairs):
            return  # without a claim: several processes of one training may look at the same time
        self.store.claim()
        to_ask = self._num_missing(pairs)  # once more: another process may have asked until now
        if not to_ask:
            return
        known = self.store.keys(self.name)
        missing = (question for question in self._questions(pairs) if question.key not in known)
        with self.watcher(to_ask) as report:
            count = _Counter(report, to_ask, self.store.spent(self.name).usd if self._has_prices else None)
            if self.settings.is_local:
                self._ask_locally(missing, count)
            else:
                run_alone(self._ask_endpoint(missing, count))

    def verdicts(self, pairs: Sequence[PreferencePair]) -> dict[str, dict[str, Verdict]]:
        """What the store knows about these pairs in these words: hash of the pair -> point -> verdict."""
        groups = {question.group for question in self._questions(pairs)}
        found = collect_verdicts(self.store.answers(self.name), groups=groups)
        self._warn_of_bare(found)
        # In the order of the pairs and of the tasks file, not in that in which answers came.
        keys = dict.fromkeys(map(hash_pair, pairs))
        ordered = {
            key: {point: found[key][point] for point in self.capabilities if point in found[key]}
            for key in keys
            if key in found
        }
        return calibrate(ordered) if self.settings.calibrate else ordered

    def _warn_of_bare(self, verdicts: Verdicts) -> None:
        """Of answers from before `confidence` was asked for: they say which side, and not how surely."""
        if not (self.settings.confidence or self.settings.calibrate):
            return
        found = [verdict for points in verdicts.values() for verdict in points.values()]
        bare = sum(v.label is not None and v.chosen_probability is None for v in found)
        if bare:
            warnings.warn(
                f"{bare} of {len(found)} verdicts of {self.name!r} were stored without probabilities, so they give no "
                "soft labels and are not calibrated; to ask again with them, choose another --store",
                PrefmoeWarning,
                stacklevel=3,
            )

    def _num_missing(self, pairs: Sequence[PreferencePair]) -> int:
        known = self.store.keys(self.name)
        return sum(question.key not in known for question in self._questions(pairs))

    def _questions(self, pairs: Sequence[PreferencePair]) -> Iterator[Question]:
        """All questions on these pairs, each once, even if a pair stands there twice."""
        seen: set[str] = set()
        for pair in pairs:
            for question in self.interview.questions(pair):
                if question.key not in seen:
                    seen.add(question.key)
                    yield question

    async def _ask_endpoint(self, questions: Iterable[Question], count: "_Counter") -> None:
        chosen = self.settings
        is_paced = chosen.requests_per_minute is not None or chosen.tokens_per_minute is not None
        manners = Manners(
            chosen.concurrency,
            chosen.requests_per_minute,
            chosen.tokens_per_minute,
            Backoff(chosen.attempts),
            self._prices,
            # Several processes are there for speed: they never stand idle until an answer is read and stored. At a
            # given pace they would only send later, and then all at once.
            ahead=chosen.concurrency if chosen.processes > 1 and not is_paced else 0,
        )
        budget = Budget(self.store.spent(self.name), max_calls=chosen.max_calls, max_usd=chosen.max_usd)
        async with open_callers(chosen) as asked:
            asking = Asking(asked, self.store, budget=budget, manners=manners, watch=count)
            await asking.run(questions)
        self.out_of_budget = asking.out_of_budget

    def _ask_locally(self, questions: Iterable[Question], count: "_Counter") -> None:
        import torch  # takes seconds, and an endpoint needs none of it

        from prefmoe.labeling.judge.local import LocalJudge

        left = self.settings.max_calls
        if left is not None:
            left -= self.store.spent(self.name).calls
            if left <= 0:
                self.out_of_budget = True
                return

        def record(calls: Sequence[Call]) -> None:
            self.store.record(calls)
            for call in calls:
                count(call)

        judge = LocalJudge.load(
            self.settings.judge.removeprefix(LOCAL), dtype=getattr(torch, self.settings.dtype)
        )
        limited = questions if left is None else _first(questions, left)
        judge.ask(limited, record)
        self.out_of_budget = left is not None and count.to_ask > left

    @property
    def _prices(self) -> Prices:
        return Prices(self.settings.input_price or 0.0, self.settings.output_price or 0.0)

    @property
    def _has_prices(self) -> bool:
        return self.settings.input_price is not None or self.settings.output_price is not None


def require_everything(labeler: JudgeLabeler) -> None:
    """Refuses labels that are incomplete because a budget ended.

    Raises:
        PrefmoeError: says so.
    """
    if labeler.out_of_budget:
        raise PrefmoeError(
            f"judge {labeler.name!r}: the budget is used up before every pair has its labels; raise max_calls or "
            "max_usd, the same command goes on"
        )


def _name_of(settings: JudgeSettings) -> str:
    if not settings.is_local:
        return settings.judge
    from prefmoe.labeling.judge.local import version_of

    # Another dtype may answer otherwise, so it is another judge.
    suffix = "" if settings.dtype == "float32" else f"-{settings.dtype}"
    return f"{settings.judge}@{version_of(settings.judge.removeprefix(LOCAL))}{suffix}"


class _Counter:
    """Told of every committed call; tells how far it is."""

    def __init__(self, report: Report, to_ask: int, usd: float | None) -> None:
        self.to_ask = to_ask
        self._report, self._usd = report, usd
        self._calls = self._unusable = 0

    def __call__(self, call: Call) -> None:
        self._calls += 1
        self._unusable += any(answer.choice is None for answer in call.answers.values())
        if self._usd is not None:
            self._usd += call.usd
        self._report(Progress(self._calls, self.to_ask, self._usd, self._unusable))


def _first(questions: Iterable[Question], limit: int) -> Iterator[Question]:
    for number, question in enumerate(questions):
        if number == limit:
            return
        yield question
