"""Many questions at once: bounded, paced, within a budget, every answer committed before it counts.

A worker takes a question, asks it, has the answer committed, and only then takes the next; so what can be lost, or paid
for again, is never more than there are workers. What stops the asking (the budget, Ctrl-C, an endpoint that stays
down) lets the calls that workers have begun come home first.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from prefmoe.errors import PrefmoeError
from prefmoe.labeling.judge.answers import Reason, unusable
from prefmoe.labeling.judge.budget import Budget, Prices
from prefmoe.labeling.judge.endpoint import Fault, Rejection, Reply
from prefmoe.labeling.judge.pace import Backoff, RateLimit
from prefmoe.labeling.judge.questions import Question
from prefmoe.labeling.judge.store import AnswerStore, Call

_MOST_SET_ASIDE = 3  # pairs in a row that are rejected or fail: it is not the pairs

Watch = Callable[[Call], None]
"""Told of every call once it is committed."""


class Asked(Protocol):
    """What answers single questions: an endpoint, or a test's stand-in."""

    async def ask(self, question: Question) -> Reply:
        """The answers; raises Fault for what may be over soon, Rejection for what it does not take."""

    def output_limit(self, num_points: int) -> int:
        """Most tokens of an answer."""


@dataclass(frozen=True, slots=True)
class Manners:
    """How an endpoint is asked.

    Attributes:
        concurrency: Calls under way at the same time.
        requests_per_minute, tokens_per_minute: None is no limit.
        backoff: What happens after a fault.
        prices: Of tokens.
        ahead: Further workers, whose calls wait, made ready, where `asked` itself bounds those under way.
    """

    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    backoff: Backoff = field(default_factory=Backoff)
    prices: Prices = field(default_factory=Prices)
    ahead: int = 0


class Asking:
    """One sitting: questions in, calls in the store.

    Args:
        asked: Who answers.
        store: Where answers are committed.
        budget: When to stop.
        manners: How fast to ask.
        watch: Told of every committed call.
    """

    def __init__(
        self, asked: Asked, store: AnswerStore, *, budget: Budget, manners: Manners, watch: Watch
    ) -> None:
        self._asked, self._budget, self._manners, self._watch = asked, budget, manners, watch
        self._commits = _GroupCommit(store)
        self._pace = RateLimit(
            requests_per_minute=manners.requests_per_minute,
            tokens_per_minute=manners.tokens_per_minute,
            sleep=self._nap,
        )
        self._pending: Iterator[Question] = iter(())
        self._stop = asyncio.Event()
        self._problem: PrefmoeError | None = None
        self._interrupted = False
        self._num_workers = manners.concurrency + manners.ahead
        self._num_answered = 0
        self._set_aside: list[tuple[Question, Reason, PrefmoeError]] = []
        self._worst_ratio = 1.0
        self.out_of_budget = False

    async def run(self, questions: Iterable[Question]) -> None:
        """Asks them all, or as many as the budget allows (`out_of_budget` then says so).

        Raises:
            PrefmoeError: the endpoint stays down or refuses us, or the store cannot be written to.
            KeyboardInterrupt: Ctrl-C, after the calls under way were committed; a second one does not wait.
        """
        self._pending = iter(questions)
        with self._interruptible():
            async with self._commits.running():
                await self._first_answer()
                await asyncio.gather(*(self._work() for _ in range(self._num_workers)))
                if self._num_answered and self._problem is None:
                    await self._store_set_aside()
        if self._set_aside:
            self._problem = self._problem or self._set_aside[0][2]
        if self._problem is not None:
            raise self._problem
        if self._interrupted:
            raise KeyboardInterrupt

    async def _first_answer(self) -> None:
        """One call at a time until one is answered: a wrong key costs one, a wrong option three, and not 64."""
        while not self._num_answered and not self._stop.is_set():
            if not await self._work(only_one=True):
                break

    async def _work(self, *, only_one: bool = False) -> bool:
        """Asks until nothing is left to ask, or one question; whether there was one."""
        while not self._stop.is_set():
            question = self._next()
            if question is None:
                return False
            most = self._most(question)
            if not await self._budget.reserve(most):
                self.out_of_budget = True
                self._stop.set()
                return False
            call = None
            try:
                call = await self._answered(question)
                if call is not None:
                    await self._store_set_aside()
            except PrefmoeError as problem:
                self._problem = self._problem or problem
                self._stop.set()
            finally:
                self._budget.settle(most, None if call is None else call.usd)
            if call is not None:
                self._num_answered += 1
                self._learn_from(call)
                self._watch(call)
            if only_one:
                return True
        return False

    def _next(self) -> Question | None:
        """What to ask next: before anything is answered, nothing about a pair that the endpoint takes issue with."""
        aside = set() if self._num_answered else {question.pair for question, _, _ in self._set_aside}
        skipped: list[Question] = []
        found = None
        for question in self._pending:
            if question.pair not in aside:
                found = question
                break
            skipped.append(question)
        if skipped:
            self._pending = chain(skipped, self._pending)
        return found

    def _put_aside(self, question: Question, reason: Reason, problem: PrefmoeError) -> None:
        """Keeps a question that the endpoint rejects or fails on until another answer shows that it is the question.

        One pair in 100,000 that it takes issue with is to stop nobody; several in a row are the endpoint. A rejection
        comes at once, many of them perhaps before the first of the calls beside them is answered.
        """
        self._set_aside.append((question, reason, problem))
        most = _MOST_SET_ASIDE
        if reason == "rejected" and self._num_answered:
            most = max(most, self._num_workers)
        if len({aside.pair for aside, why, _ in self._set_aside if why == reason}) >= most:
            raise self._set_aside[0][2]

    async def _store_set_aside(self) -> None:
        """As unusable; they cost nothing."""
        aside, self._set_aside = self._set_aside, []
        for question, reason, problem in aside:
            call = Call(question, unusable(question.points, reason, str(problem)), 0, 0, 0.0)
            await self._commits.commit(call)
            self._budget.calls += 1  # as the store counts it from now on
            self._watch(call)

    def _learn_from(self, call: Call) -> None:
        """Keeps how far estimates can be off; the first call is alone, so the second one knows."""
        if estimate := self._estimated(call.question):
            self._worst_ratio = max(self._worst_ratio, call.usd / estimate)

    async def _answered(self, question: Question) -> Call | None:
        """The committed call; None if it is set aside, or something stopped the asking before there was an answer."""
        backoff = self._manners.backoff
        for attempt in range(backoff.attempts):
            await self._pace.wait(question.num_tokens + self._asked.output_limit(len(question.points)))
            if self._stop.is_set():
                return None
            try:
                reply = await self._asked.ask(question)
            except Rejection as rejection:
                self._put_aside(question, "rejected", rejection)
                return None
            except Fault as fault:
                if attempt + 1 == backoff.attempts:
                    problem = PrefmoeError(
                        f"judge {question.judge!r} failed {backoff.attempts} times in a row on pair "
                        f"{question.pair_id!r}: {fault}; answers so far are stored, the same command goes on"
                    )
                    if not fault.may_stay:
                        raise problem from None
                    self._put_aside(question, "failed", problem)
                    return None
                await self._wait_out(fault, attempt)
            else:
                call = self._as_call(question, reply)
                await self._commits.commit(call)
                return call
        return None

    async def _wait_out(self, fault: Fault, attempt: int) -> None:
        delay = self._manners.backoff.delay(attempt, fault.wait)
        if fault.wait is not None:
            self._pace.hold(fault.wait)  # it is meant for all of us
        await self._nap(delay)

    async def _nap(self, seconds: float) -> bool:
        """Waits, but not longer than the asking goes on; whether it is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        return self._stop.is_set()

    def _as_call(self, question: Question, reply: Reply) -> Call:
        input_tokens = question.num_tokens if reply.input_tokens is None else reply.input_tokens
        output_tokens = reply.output_tokens
        if output_tokens is None:
            output_tokens = self._asked.output_limit(len(question.points))
        usd = self._manners.prices.cost(input_tokens, output_tokens)
        return Call(question, reply.answers, input_tokens, output_tokens, usd)

    def _most(self, question: Question) -> float:
        """Most dollars a question can cost: by the estimate of its tokens, times the worst that one was ever off."""
        return self._estimated(question) * self._worst_ratio

    def _estimated(self, question: Question) -> float:
        return self._manners.prices.cost(question.num_tokens, self._asked.output_limit(len(question.points)))

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C stops the asking, the second one the program."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def interrupt() -> None:
            if self._interrupted and task is not None:
                task.cancel()
            self._interrupted = True
            self._stop.set()

        try:
            loop.add_signal_handler(signal.SIGINT, interrupt)
        except (NotImplementedError, ValueError, RuntimeError):  # Windows, or not the main thread
            yield
            return
        try:
            yield
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            loop.remove_signal_handler(signal.SIGINT)


class _GroupCommit:
    """Commits in a thread; calls that come home during one commit share the next.

    So each waits for the disk once or twice, however many there are.
    """

    def __init__(self, store: AnswerStore) -> None:
        self._store = store
        self._waiting: list[tuple[Call, asyncio.Future[None]]] = []
        self._some = asyncio.Event()

    async def commit(self, call: Call) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, done))
        self._some.set()
        await done

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        writer = asyncio.create_task(self._write())
        try:
            yield
        finally:
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer

    async def _write(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            batch, self._waiting = self._waiting, []
            problem = await asyncio.to_thread(self._record, [call for call, _ in batch])
            for _, done in batch:
                if done.cancelled():
                    continue
                if problem is None:
                    done.set_result(None)
                else:
                    done.set_exception(problem)

    def _record(self, calls: Sequence[Call]) -> Exception | None:
        """What went wrong, of whatever kind: those who wait have to hear of it."""
        try:
            self._store.record(calls)
        except Exception as problem:
            return problem
        return None
