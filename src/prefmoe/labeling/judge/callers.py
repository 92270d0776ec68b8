"""Calls made by processes of their own, for endpoints that answer faster than one core can ask.

A call costs about a millisecond or two of processor time, nearly all of it in the HTTP client, so one process ends
at some hundred calls a second. Here further processes make the calls and nothing else: what is asked, when, for how
much, and what is stored is decided in the one process that owns the store. So every promise of `Asking` holds for any
number of callers. They are told in JSON, by pipes, and end when theirs is closed, however that came about.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from itertools import count
from typing import Any, NamedTuple, cast

from prefmoe.errors import ConfigError, PrefmoeError
from prefmoe.labeling.judge.answers import Answer, Reason
from prefmoe.labeling.judge.asking import Asked
from prefmoe.labeling.judge.endpoint import Endpoint, Fault, Rejection, Reply, open_endpoint
from prefmoe.labeling.judge.questions import Asks
from prefmoe.labeling.judge.settings import JudgeSettings

_LENGTH = 4  # bytes that say how long a message is


class _Texts(NamedTuple):
    """What an endpoint needs to know of a question."""

    system: str
    user: str
    points: tuple[str, ...]
    allowed: tuple[str, ...]


@contextlib.asynccontextmanager
async def open_callers(settings: JudgeSettings) -> AsyncIterator[Asked]:
    """The endpoint of the settings, asked by this process, or by `processes` others.

    Raises:
        ConfigError: says what is missing.
    """
    endpoint = open_endpoint(settings)
    try:
        if settings.processes == 1:
            yield endpoint
        else:
            async with Callers(settings, endpoint).running() as callers:
                yield callers
    finally:
        await endpoint.close()


class Callers:
    """Several processes, each with its own connections to one endpoint.

    Args:
        settings: The judge, and how many `processes`.
        endpoint: The same endpoint, for what needs no call.
    """

    def __init__(self, settings: JudgeSettings, endpoint: Endpoint) -> None:
        self._settings, self._endpoint = settings, endpoint
        self._callers: list[_Caller] = []

    async def ask(self, question: Asks) -> Reply:
        """As `Endpoint.ask`, by the caller that has least to do."""
        return await min(self._callers, key=lambda caller: caller.num_waiting).ask(question)

    def output_limit(self, num_points: int) -> int:
        """Most tokens that an answer may have."""
        return self._endpoint.output_limit(num_points)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Callers"]:
        """Starts the processes, and ends them."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(min(self._settings.processes, self._settings.concurrency)):
                self._callers.append(await stack.enter_async_context(_caller(self._settings)))
            yield self


class _Caller:
    """The near end of one process."""

    def __init__(self, to_process: asyncio.StreamWriter, from_process: asyncio.StreamReader) -> None:
        self._outbox, self._replies = _Outbox(to_process), from_process
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._numbers = count()
        self._ended = False

    @property
    def num_waiting(self) -> int:
        """Calls under way."""
        return len(self._waiting)

    async def ask(self, question: Asks) -> Reply:
        if self._ended:
            raise _died()
        number = next(self._numbers)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        texts = _Texts(question.system, question.user, question.points, question.allowed)
        self._outbox.put((number, texts))
        try:
            return await reply
        finally:
            self._waiting.pop(number, None)

    def greet(self, settings: JudgeSettings) -> None:
        self._outbox.put(settings.model_dump())

    async def listen(self) -> None:
        """Hands replies to those who wait for them, until the process ends."""
        async for number, packed in _messages(self._replies):
            outcome, reply = _unpacked(packed), self._waiting.get(number)
            if reply is None or reply.done():
                continue
            if isinstance(outcome, Exception):
                reply.set_exception(outcome)
            else:
                reply.set_result(outcome)
        self._ended = True
        for reply in self._waiting.values():
            reply.set_exception(_died())


@contextlib.asynccontextmanager
async def _caller(settings: JudgeSettings) -> AsyncIterator[_Caller]:
    pipe = asyncio.subprocess.PIPE
    # A session of its own: Ctrl-C is for the one who decides. -P: a file of the user's shadows no module.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", __name__, stdin=pipe, stdout=pipe, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    caller = _Caller(process.stdin, process.stdout)
    caller.greet(settings)
    listening = asyncio.create_task(caller.listen())
    try:
        yield caller
    finally:
        process.stdin.close()
        await process.wait()
        await listening


def _died() -> PrefmoeError:
    return PrefmoeError(
        "a process that makes the calls has ended by itself; answers so far are stored, the same command goes on"
    )


class _Outbox:
    """Messages of one turn of the event loop travel together: a system call for each costs more than they do."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._messages: list[Any] = []

    def put(self, message: object) -> None:
        if not self._messages:
            asyncio.get_running_loop().call_soon(self._flush)
        self._messages.append(message)

    def _flush(self) -> None:
        packed = json.dumps(self._messages).encode()
        self._messages = []
        self._writer.write(len(packed).to_bytes(_LENGTH, "big") + packed)


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """Until the other side closes its end."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            length = int.from_bytes(await reader.readexactly(_LENGTH), "big")
            for message in json.loads(await reader.readexactly(length)):
                yield message


async def _serve() -> None:
    """The far end: the settings come first, then questions."""
    loop, questions = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    outbox = _Outbox(asyncio.StreamWriter(transport, protocol, None, loop))
    messages = _messages(questions)
    endpoint = open_endpoint(JudgeSettings.model_validate(await anext(messages)))
    try:
        async with asyncio.TaskGroup() as calls:
            async for number, question in messages:
                calls.create_task(_answer(endpoint, number, _Texts(*question), outbox))
            sys.exit()  # nobody waits for the calls under way any more
    finally:
        await endpoint.close()


async def _answer(endpoint: Endpoint, number: int, question: _Texts, outbox: _Outbox) -> None:
    outcome: Reply | Exception
    try:
        outcome = await endpoint.ask(question)
    except (Fault, PrefmoeError) as problem:
        outcome = problem
    outbox.put((number, _packed(outcome)))


def _packed(outcome: Reply | Exception) -> list[Any]:
    if isinstance(outcome, Reply):
        answers = {
            point: (a.choice, a.reason, a.text, a.probabilities) for point, a in outcome.answers.items()
        }
        return ["reply", answers, outcome.input_tokens, outcome.output_tokens]
    if isinstance(outcome, Fault):
        return ["fault", str(outcome), outcome.wait, outcome.may_stay]
    kinds = {"rejected": Rejection, "config": ConfigError}
    return [next((name for name, kind in kinds.items() if isinstance(outcome, kind)), "other"), str(outcome)]


def _unpacked(packed: list[Any]) -> Reply | Exception:
    kind, *parts = packed
    if kind == "reply":
        answers, *counts = parts
        return Reply({point: _answer_of(*values) for point, values in answers.items()}, *counts)
    if kind == "fault":
        reason, wait, may_stay = parts
        return Fault(reason, wait, may_stay=may_stay)
    errors: dict[str, type[Exception]] = {
        "rejected": Rejection,
        "config": ConfigError,
        "other": PrefmoeError,
    }
    return errors[kind](*parts)


def _answer_of(choice: str | None, reason: Reason | None, text: str, mass: list[float] | None) -> Answer:
    return Answer(
        choice, reason, text, None if mass is None else cast("tuple[float, float, float]", tuple(mass))
    )


if __name__ == "__main__":
    asyncio.run(_serve())
