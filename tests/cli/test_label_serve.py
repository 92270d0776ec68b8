"""The judge against a real server of another make: `transformers serve`, with tiny models."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import LlamaForCausalLM

from cli_helpers import run_cli
from data_helpers import CHATML, byte_tokenizer
from judge_helpers import write_input
from tiny import tiny_backbone

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.slow]


def save_model(folder, says=None):
    """A model of random weights; or one that answers everything with one token: `says`, and then the end.

    Its layers add nothing, so the next token depends on the last one alone: any token's state points one way, that of
    `says` the other, and the head reads `says` off the first and the end off the second.
    """
    config = tiny_backbone().config
    config.max_position_embeddings = 2048
    model, tokenizer = LlamaForCausalLM(config), byte_tokenizer(CHATML)
    if says is not None:
        token = tokenizer.convert_tokens_to_ids(says)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            embedding, head = model.model.embed_tokens.weight.zero_(), model.lm_head.weight.zero_()
            embedding[:, 0], embedding[token, 0] = 1.0, -1.0
            head[token, 0], head[config.eos_token_id, 0] = 10.0, -10.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Address of a server in a process of its own; it loads the models that requests name."""
    log_file = tmp_path_factory.mktemp("server") / "serve.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = log_file.open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            assert process.poll() is None, log_file.read_text(encoding="utf-8")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture
def label(url, tmp_path, monkeypatch):
    """Labels three pairs by a model, twice; gives the labels and what the report says of both points."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    pairs, tasks = write_input(tmp_path, 3)
    out = tmp_path / "out.jsonl"

    def run(model):
        options = ("--tasks", tasks, "--judge", model, "--base-url", url)
        command = ("label", pairs, "-o", out, *options, "--concurrency", "2", "--max-answer-tokens", "4")
        done = run_cli(*command)
        assert done.exit_code == 0, done.output
        assert "12 of 12 calls" in done.stderr
        assert "calls in" not in run_cli(*command).stderr  # nothing is asked twice
        report = json.loads(run_cli("label", "report", out, "--json").stdout)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        return [row["capabilities"] for row in rows], report["judges"][model]

    return run


def test_noise_is_stored_as_unusable(label, tmp_path):
    labels, (wit, brevity) = label(save_model(tmp_path / "model"))
    assert labels == [{}] * 3
    for point in (wit, brevity):
        assert point["pairs"] == 3
        assert sum(point["unusable"].values()) == 6
        assert set(point["unusable"]) <= {"cut off", "empty", "not an allowed answer"}


def test_the_same_place_in_both_orders_is_no_label(label, tmp_path):
    labels, points = label(save_model(tmp_path / "model", says="1"))
    assert labels == [{}] * 3
    for point in points:
        assert point["unusable"] == {}
        assert (point["agreement"]["value"], point["first"]["value"], point["kept"]) == (0, 1, 0)


def test_a_tie_in_both_orders_is_a_label(label, tmp_path):
    labels, points = label(save_model(tmp_path / "model", says="0"))
    assert labels == [{"wit": 0, "brevity": 0}] * 3
    for point in points:
        assert point["unusable"] == {}
        assert (point["agreement"]["value"], point["ties"], point["kept"]) == (1, 1, 1)
