"""The judge against a real server of another make: `transformers serve`, with a tiny random model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from transformers import LlamaForCausalLM

from cli_helpers import run_cli
from data_helpers import CHATML, byte_tokenizer
from judge_helpers import write_input
from tiny import tiny_backbone

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.slow]


@pytest.fixture
def server(tmp_path):
    """Address and model of a server in a process of its own, with an environment that knows no key."""
    config = tiny_backbone().config
    config.max_position_embeddings = 2048
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "model")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (tmp_path / "serve.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "serve.log").read_text(encoding="utf-8")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", str(tmp_path / "model")
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def test_labels_through_transformers_serve(server, tmp_path, monkeypatch):
    """A random model writes noise, so nearly all answers are unusable; that is exactly what must be stored."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url, model = server
    pairs, tasks = write_input(tmp_path, 3)
    arguments = (
        "label",
        pairs,
        "-o",
        tmp_path / "out.jsonl",
        "--tasks",
        tasks,
        "--judge",
        model,
        "--base-url",
        url,
    )
    done = run_cli(*arguments, "--concurrency", "2", "--max-answer-tokens", "4")
    assert done.exit_code == 0, done.output
    assert "12 of 12 calls" in done.stderr
    report = json.loads(run_cli("label", "report", tmp_path / "out.jsonl", "--json").stdout)
    wit, brevity = report["judges"][model]
    for point in (wit, brevity):
        assert point["pairs"] == 3
        known = {"cut off", "empty", "not an allowed answer"}
        assert set(point["unusable"]) <= known
    again = run_cli(*arguments, "--concurrency", "2", "--max-answer-tokens", "4")
    assert "calls in" not in again.stderr
