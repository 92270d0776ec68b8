"""A scripted OpenAI-compatible server on the loopback: every request is kept, every reply can be a fault.

It runs in a thread, so that a test sees its counts; the client may be this process or another one.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

FIRST, SECOND, TIE = "1", "2", "0"


@dataclass
class Response:
    """What goes over the wire. `cut` closes the connection after so many bytes; `delay` is in seconds."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None

    @property
    def is_paid(self) -> bool:
        """A complete answer arrives: that is what a provider charges for."""
        return self.status == 200 and self.cut is None and self.body.endswith(b"}")

    def encode(self) -> bytes:
        headers = {"content-type": "application/json", "content-length": str(len(self.body)), **self.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {self.status} Scripted\r\n{lines}\r\n".encode() + self.body


def completion(
    content: str | None, *, finish: str = "stop", usage: object = (100, 1), **extra: object
) -> Response:
    """A chat completion with that content."""
    message = {"role": "assistant", "content": content, **{k: v for k, v in extra.items() if k == "refusal"}}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    if "logprobs" in extra:
        choice["logprobs"] = {"content": extra["logprobs"]}
    values: dict[str, object] = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }
    if usage is not None:
        values["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return Response(json.dumps(values).encode())


def problem(status: int, message: str = "scripted", **headers: str) -> Response:
    """An error as providers write it."""
    body = json.dumps({"error": {"message": message, "type": "scripted", "code": None}}).encode()
    return Response(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


def texts_of(user: str) -> tuple[str, str]:
    """The two completions of a question, as they were shown."""
    shown = [user.split(f"[Answer {n}]\n")[1].split(f"\n[End of answer {n}]")[0] for n in (1, 2)]
    return shown[0], shown[1]


def by_hash(user: str) -> str:
    """A judge with opinions but no position bias: the same completion wins in both orders, one pair in ten ties."""
    first, second = (hashlib.sha256(text.encode()).digest() for text in texts_of(user))
    if max(first, second)[-1] < 26:
        return TIE
    return FIRST if first > second else SECOND


class JudgeServer:
    """`with JudgeServer(reply) as server: ... server.url`."""

    def __init__(self, reply: Callable[[dict], Response] | None = None) -> None:
        self._reply = reply or (lambda request: completion(by_hash(request["messages"][-1]["content"])))
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []  # when each request came, seconds
        self.paid: Counter[str] = Counter()
        self.open = self.most_open = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)

    @property
    def users(self) -> list[str]:
        """What was asked, in order."""
        return [request["messages"][-1]["content"] for request in self.requests]

    async def _serve(self) -> None:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        self._connections: set[asyncio.Task] = set()
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._started.set()
        await self._done.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._connections.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the caller has gone, or the server is closing: what tests of faults do to it
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if ": " in line)}
        request = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests.append(request)
        self.times.append(time.monotonic())
        self.headers.append(headers)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            response = self._reply(request)
            await asyncio.sleep(response.delay)
            writer.write(response.encode() if response.cut is None else response.encode()[: -response.cut])
            await writer.drain()
        finally:
            self.open -= 1
        if response.is_paid:
            self.paid[request["messages"][-1]["content"]] += 1
        return response.cut is None
