"""Calls made by several processes: the same answers, faults and dead ends as in one; and asking beside a loop."""

import asyncio
import os
import signal
import sys
import threading
import time

import psutil
import pytest

from judge_helpers import pairs, question, settings, task_file
from judge_server import JudgeServer, by_hash, completion, problem
from prefmoe.errors import ConfigError, PrefmoeError
from prefmoe.labeling.judge.callers import open_callers
from prefmoe.labeling.judge.endpoint import Fault
from prefmoe.labeling.judge.event_loop import run_alone
from prefmoe.labeling.judge.labeler import JudgeLabeler
from prefmoe.labeling.judge.store import AnswerStore

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def label(folder, server, num_pairs=20, **changes):
    chosen = settings(base_url=server.url, **changes)
    with AnswerStore(folder / "answers.sqlite") as store:
        labeler = JudgeLabeler(chosen, task_file(), store)
        return labeler.label(pairs(num_pairs)), store.spent("m").calls


def outcomes(server, *questions, **changes):
    """What comes of questions that are asked side by side: replies or exceptions."""

    async def run():
        async with open_callers(settings(base_url=server.url, **changes)) as asked:
            return await asyncio.gather(*map(asked.ask, questions), return_exceptions=True)

    return asyncio.run(run())


def test_more_processes_give_the_same_labels_with_the_same_calls(tmp_path):
    found = {}
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        with JudgeServer() as server:
            found[processes] = label(folder, server, processes=processes, concurrency=8)
            assert max(server.paid.values()) == 1
    assert found[3] == found[1]
    assert found[1][1] == 80


@pytest.mark.parametrize(
    "reply", [completion("1", usage=(7, 1)), completion("第二"), completion(None, usage=None)]
)
def test_a_reply_of_another_process_is_that_of_this_one(reply):
    likely = [
        {"token": "1", "top_logprobs": [{"token": "1", "logprob": -0.5}, {"token": "2", "logprob": -1.0}]}
    ]
    with JudgeServer(lambda _: reply) as server:
        assert outcomes(server, question(), processes=2) == outcomes(server, question())
    with JudgeServer(lambda _: completion("1", logprobs=likely)) as server:
        found = outcomes(server, question(), processes=2, confidence=True)
        assert found == outcomes(server, question(), confidence=True)
    assert found[0].answers["wit"].probabilities is not None


def test_concurrency_is_that_of_all_processes_together(tmp_path):
    def slow(request):
        response = completion(by_hash(request["messages"][-1]["content"]))
        response.delay = 0.02
        return response

    with JudgeServer(slow) as server:
        label(tmp_path, server, processes=2, concurrency=6)
    assert 3 < server.most_open <= 6  # more than the share of one process


def test_calls_made_ahead_wait_for_a_connection_as_long_as_it_takes():
    def slow(_):
        response = completion("1")
        response.delay = 0.3
        return response

    with JudgeServer(slow) as server:
        found = outcomes(server, *[question() for _ in range(5)], concurrency=1, timeout=0.6)
        assert server.most_open == 1
    assert [reply.answers["wit"].choice for reply in found] == ["1"] * 5


@pytest.mark.parametrize(
    ("reply", "kind", "wait", "words"),
    [
        (problem(429, Retry_After="3"), Fault, 3.0, "status 429"),
        (problem(401, "no"), ConfigError, None, "check OPENAI_API_KEY"),
    ],
)
def test_faults_and_dead_ends_come_back_as_what_they_are(reply, kind, wait, words):
    with JudgeServer(lambda _: reply) as server:
        (outcome,) = outcomes(server, question(), processes=2)
    assert type(outcome) is kind
    assert words in str(outcome)
    assert getattr(outcome, "wait", None) == wait


def test_a_caller_that_dies_is_a_sentence_for_its_calls_and_for_later_ones():
    slow = completion("1")
    slow.delay = 30.0

    async def run(server):
        async with open_callers(settings(base_url=server.url, processes=2)) as asked:
            calls = [asyncio.create_task(asked.ask(question(name))) for name in "ab"]
            while len(server.requests) < 2:
                await asyncio.sleep(0.01)
            for child in psutil.Process().children():
                if "prefmoe.labeling.judge.callers" in child.cmdline():
                    child.kill()
            first = await asyncio.gather(*calls, return_exceptions=True)
            return [*first, *await asyncio.gather(asked.ask(question("c")), return_exceptions=True)]

    with JudgeServer(lambda _: slow) as server:
        found = asyncio.run(run(server))
    assert [type(one) for one in found] == [PrefmoeError] * 3
    assert all("a process that makes the calls has ended by itself" in str(one) for one in found)


def test_callers_end_when_the_one_that_asks_is_killed(tmp_path):
    """Their pipe is closed then, whatever was under way."""
    slow = completion("1")
    slow.delay = 30.0
    with JudgeServer(lambda _: slow) as server:
        asks = f"""
import asyncio
from judge_helpers import question, settings
from prefmoe.labeling.judge.callers import open_callers

async def run():
    async with open_callers(settings(base_url={server.url!r}, processes=2)) as asked:
        await asyncio.gather(*(asked.ask(question(name)) for name in "ab"))

asyncio.run(run())
"""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        asking = psutil.Popen([sys.executable, "-c", asks], env=environment)
        while len(server.requests) < 2:
            assert asking.poll() is None
            time.sleep(0.01)
        callers = asking.children()
        asking.kill()
        asking.wait()
        _, alive = psutil.wait_procs(callers, timeout=20)
    assert len(callers) == 2
    assert alive == []


def test_a_missing_key_is_found_before_any_process_starts(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")

    async def run():
        async with open_callers(settings(processes=2)):
            raise AssertionError

    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        asyncio.run(run())


def test_labels_can_be_asked_for_from_inside_a_running_loop(tmp_path):
    async def notebook():
        return label(tmp_path, server, num_pairs=3)

    with JudgeServer() as server:
        found, calls = asyncio.run(notebook())
    assert calls == 12
    assert all(found)


def test_ctrl_c_inside_a_running_loop_stops_the_other_one():
    ended = []

    async def forever():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def notebook():
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        run_alone(forever())

    before = time.monotonic()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        loop = (
            asyncio.new_event_loop()
        )  # asyncio.run would handle the signal itself; a notebook's loop does not
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(notebook())
        loop.close()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended == [True]
    assert time.monotonic() - before < 30
