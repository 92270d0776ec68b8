r"""Calls a second of `prefmoe label` against a server with a known latency, as a share of concurrency / latency.

    python benchmarks/label_throughput.py [--calls 8000] [--processes 1] [--concurrency 64] [--latency 0.05] \
        [--out FILE.json]

The server is a process of its own on the loopback that answers every request after exactly that time, so the ideal is
`concurrency / latency` calls a second. Timed is what a user waits for between the first and the last answer: keys,
requests, reading, and an SQLite commit of every answer before it counts. Reading files and starting Python is not.

Processor time a call is that of the judge's processes, user and system, without their start; the server's is measured
apart.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.timing import against, machine, write_result

from prefmoe.labeling import TaskFile
from prefmoe.labeling.judge.labeler import JudgeLabeler
from prefmoe.labeling.judge.settings import JudgeSettings
from prefmoe.labeling.judge.store import AnswerStore
from prefmoe.records import Message, PreferencePair

_BODY = json.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "1"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 1},
    }
).encode()
_REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(_BODY),
    _BODY,
)


class _Slow(asyncio.Protocol):
    """Answers each request of a connection after a while."""

    def __init__(self, latency):
        self.latency, self.seen, self.missing = latency, b"", None

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.seen += data
        if self.missing is None and b"\r\n\r\n" in self.seen:
            head, self.seen = self.seen.split(b"\r\n\r\n", 1)
            self.missing = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if self.missing is not None and len(self.seen) >= self.missing:
            self.seen, self.missing = b"", None
            asyncio.get_running_loop().call_later(self.latency, self.transport.write, _REPLY)


def serve(latency, port):
    async def run():
        server = await asyncio.get_running_loop().create_server(lambda: _Slow(latency), "127.0.0.1", 0)
        # With what it took to start, which is not what a call takes.
        port.send((server.sockets[0].getsockname()[1], processor_seconds(resource.RUSAGE_SELF)))
        await server.serve_forever()

    asyncio.run(run())


def pairs(num):
    words = (
        "a fairly usual answer of some length that explains what was asked and then comes to its end. " * 4
    )
    return [
        PreferencePair(
            str(i),
            (Message("user", f"Question {i}?"),),
            (Message("assistant", f"{i} {words}"),),
            (Message("assistant", words),),
        )
        for i in range(num)
    ]


def processor_seconds(whose):
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


def ask(labeler, rows):
    """Times of all answers, and the processor time of this process and of those that it started for this."""
    times = []

    @contextmanager
    def watch(_):
        yield lambda progress: times.append(time.perf_counter())

    labeler.watcher = watch
    before = processor_seconds(resource.RUSAGE_SELF), processor_seconds(resource.RUSAGE_CHILDREN)
    labeler.ask(rows)
    after = processor_seconds(resource.RUSAGE_SELF), processor_seconds(resource.RUSAGE_CHILDREN)
    return times, after[0] - before[0], after[1] - before[1]


def measure(url, num_calls, folder, *, concurrency, processes):
    """Calls, seconds between the first answer and the last, and processor seconds."""
    tasks = TaskFile.model_validate(
        {"tasks": {"all": {"description": "Talk.", "capabilities": {"wit": "It is funny."}}}}
    )
    settings = JudgeSettings(judge="m", base_url=url, concurrency=concurrency, processes=processes)
    rows = pairs(num_calls // 2)
    with AnswerStore(folder / "answers.sqlite") as store:
        labeler = JudgeLabeler(settings, tasks, store)
        _, _, to_start = ask(labeler, rows[:1])  # loads the client's code, here and in the others
        times, here, others = ask(labeler, rows[1:])
    return len(times) - 1, times[-1] - times[0], here + others - to_start


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=8000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--processes", type=int, default=1, help="that make the calls")
    parser.add_argument("--smoke", action="store_true", help="40 calls, 8 at a time: does it run at all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if options.smoke:
        options.calls, options.concurrency = 40, 8
    receive, send = multiprocessing.Pipe(duplex=False)
    # Not forked: a process that has threads, as torch starts them, may hang in a fork.
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(options.latency, send), daemon=True
    )
    server.start()
    port, to_start = receive.recv()
    with tempfile.TemporaryDirectory() as folder:
        calls, seconds, cpu = measure(
            f"http://127.0.0.1:{port}/v1",
            options.calls,
            Path(folder),
            concurrency=options.concurrency,
            processes=options.processes,
        )
    others = processor_seconds(resource.RUSAGE_CHILDREN)
    server.terminate()
    server.join()
    server_cpu = processor_seconds(resource.RUSAGE_CHILDREN) - others - to_start
    ideal = options.concurrency / options.latency
    result: dict[str, object] = {
        "calls": calls,
        "seconds": round(seconds, 3),
        "calls_per_second": round(calls / seconds, 1),
        "ideal": ideal,
        "share_of_ideal": against(calls / seconds / ideal, 0.8),
        "cpu_ms_per_call": round(1000 * cpu / calls, 3),
        "server_cpu_ms_per_call": round(1000 * server_cpu / calls, 3),
        "concurrency": options.concurrency,
        "processes": options.processes,
        "latency_s": options.latency,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "machine": machine(),
    }
    for name, value in result.items():
        print(f"{name:22} {value}")
    write_result(result, options.out)
    return result


if __name__ == "__main__":
    main()
