"""The law of `prefmoe label`: whatever happens, every answer is stored once, and nothing is paid twice."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prefmoe
from judge_helpers import write_input
from judge_server import JudgeServer, by_hash, completion, problem

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

PAIRS = 500  # two points, two orders: 2,000 calls
CONCURRENCY = 16
SRC = Path(prefmoe.__file__).parents[1]


def start(folder: Path, out: str, url: str, *options: str) -> subprocess.Popen:
    pairs, tasks = folder / "pairs.jsonl", folder / "tasks.yaml"
    arguments = ["label", pairs, "-o", folder / out, "--tasks", tasks, "--judge", "m", "--base-url", url]
    command = [
        sys.executable,
        "-m",
        "prefmoe",
        *map(str, arguments),
        "--concurrency",
        str(CONCURRENCY),
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(SRC), "OPENAI_API_KEY": "sk-secret"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr


def faulty(rate: float, seed: int = 0):
    """Right answers, a share of which goes wrong on the way in every way there is."""
    draw = random.Random(seed)

    def reply(request: dict):
        right = completion(by_hash(request["messages"][-1]["content"]))
        right.delay = 0.002
        if draw.random() >= rate:
            return right
        fault = draw.choice(["429", "429 wait", "500", "503", "cut", "cut head", "not json", "no choices"])
        if fault == "429 wait":
            return problem(429, Retry_After="0.05")
        if fault.isdigit():
            return problem(int(fault))
        if fault.startswith("cut"):
            right.cut = 20 if fault == "cut" else len(right.encode()) - 5
            return right
        right.body = b"<html>" if fault == "not json" else b'{"object": "error"} '
        return right

    return reply


def stored(path: Path) -> list[tuple[str, str, int]]:
    database = sqlite3.connect(path)
    rows = database.execute("SELECT pair_id, point, swapped FROM calls JOIN answers USING (key)").fetchall()
    database.close()
    return rows


@pytest.mark.parametrize(("processes", "at_risk"), [(1, CONCURRENCY), (2, 2 * CONCURRENCY)])
def test_faults_and_a_kill_cost_nothing_twice_and_change_nothing(tmp_path, processes, at_risk):
    options = ("--processes", str(processes))
    write_input(tmp_path, PAIRS)
    with JudgeServer(faulty(0.0)) as server:
        undisturbed = start(tmp_path, "clean.jsonl", server.url)
        finish(undisturbed)
        assert len(server.requests) == 4 * PAIRS

    with JudgeServer(faulty(0.02)) as server:
        killed = start(tmp_path, "out.jsonl", server.url, *options)
        while len(server.requests) < 2 * PAIRS and killed.poll() is None:
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=30)
        assert not (tmp_path / "out.jsonl").exists()
        num_before = len(stored(tmp_path / "out.jsonl.answers.sqlite"))
        assert 0 < num_before < 4 * PAIRS

        goes_on = start(tmp_path, "out.jsonl", server.url, *options)
        finish(goes_on)
        paid_twice = sum(times - 1 for times in server.paid.values())
        faults = len(server.requests) - sum(server.paid.values())

    everything = {
        (f"p{i}", point, swapped) for i in range(PAIRS) for point in ("wit", "brevity") for swapped in (0, 1)
    }
    answers = stored(tmp_path / "out.jsonl.answers.sqlite")
    assert len(answers) == len(everything)
    assert set(answers) == everything
    assert paid_twice <= at_risk
    assert faults > 10, "there were no faults to survive"
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "clean.jsonl").read_bytes()


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_waits_for_the_calls_under_way_and_goes_on_later(tmp_path, processes):
    write_input(tmp_path, 100)

    def slow(request: dict):
        response = completion(by_hash(request["messages"][-1]["content"]))
        response.delay = 0.3
        return response

    with JudgeServer(slow) as server:
        stopped = start(tmp_path, "out.jsonl", server.url, "--processes", str(processes))
        while len(server.requests) < 40:
            time.sleep(0.01)
            assert stopped.poll() is None
        stopped.send_signal(signal.SIGINT)
        _, stderr = stopped.communicate(timeout=30)
        assert stopped.returncode == 130
        assert "stopped; the same command goes on" in stderr
        assert "Traceback" not in stderr
        # Every call that was under way came home and was kept.
        assert (
            len(stored(tmp_path / "out.jsonl.answers.sqlite"))
            == len(server.requests)
            == sum(server.paid.values())
        )

        goes_on = start(tmp_path, "out.jsonl", server.url, "--concurrency", "64")
        finish(goes_on)
        assert max(server.paid.values()) == 1


def test_two_runs_never_ask_into_one_store(tmp_path):
    write_input(tmp_path, 30)

    def slow(request: dict):
        response = completion("1")
        response.delay = 0.5
        return response

    with JudgeServer(slow) as server:
        first = start(tmp_path, "out.jsonl", server.url)
        while not server.requests:
            time.sleep(0.01)
        second = start(tmp_path, "out.jsonl", server.url)
        _, stderr = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "another process is asking into this store; wait for it" in stderr
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=30)
