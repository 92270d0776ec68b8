"""`prefmoe label` as a person meets it: files, exit codes, sentences."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

import prefmoe
from cli_helpers import run_cli, write_config
from data_helpers import CHATML, byte_tokenizer, write_rows
from judge_helpers import pairs as make_pairs
from judge_helpers import side_by_hash, write_input
from judge_server import JudgeServer, by_hash, completion, problem
from tiny import tiny_backbone

SRC = Path(prefmoe.__file__).parents[1]
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def flat(text):
    """Without the frame and the line ends that mistakes in usage are shown with."""
    return "".join(text.replace("│", " ").split())


class Desk:
    """A folder with pairs and tasks, and the command with the usual arguments."""

    def __init__(self, folder, num=6):
        self.folder = folder
        self.pairs, self.tasks = write_input(folder, num)
        self.out = folder / "out.jsonl"

    def label(self, *options, judge=("--judge", "m"), tasks=True):
        chosen = ("--tasks", self.tasks) if tasks else ()
        return run_cli("label", self.pairs, "-o", self.out, *chosen, *judge, *options)

    def rows(self):
        return [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def labels_by_hash(num):
    return [{"wit": side_by_hash(one), "brevity": side_by_hash(one)} for one in make_pairs(num)]


def test_rows_get_labels_and_keep_everything_else(desk):
    with JudgeServer() as server:
        done = desk.label("--base-url", server.url, "--input-price", "1", "--output-price", "1")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "24 of 24 calls" in done.stderr
    assert "calls/min, $0.0024 so far" in done.stderr
    assert "out.jsonl: 6 pairs, 12 labels by m" in done.stderr
    rows = desk.rows()
    assert [row["capabilities"] for row in rows] == labels_by_hash(6)
    assert [row["labeled_by"] for row in rows] == [{"wit": "m", "brevity": "m"}] * 6
    assert [(row["note"], row["prompt"]) for row in rows] == [(i, f"question p{i}?") for i in range(6)]


def test_the_same_command_again_asks_nothing(desk):
    with JudgeServer() as server:
        desk.label("--base-url", server.url)
        before = desk.out.read_bytes()
        assert desk.label("--base-url", server.url).exit_code == 0
        assert len(server.requests) == 24
        assert desk.out.read_bytes() == before


def test_a_larger_limit_asks_only_what_is_new(desk):
    with JudgeServer() as server:
        desk.label("--base-url", server.url, "--limit", "2")
        assert len(desk.rows()) == 2
        desk.label("--base-url", server.url, "--limit", "5")
        assert (len(server.requests), len(desk.rows())) == (20, 5)
        assert set(server.paid.values()) == {1}


def test_a_limit_is_spread_over_the_tasks(desk):
    tasks = ["facts"] * 6 + ["chat"] * 3
    write_rows(
        desk.pairs,
        [
            {"id": str(i), "task": t, "prompt": "?", "chosen": f"{i}", "rejected": "x"}
            for i, t in enumerate(tasks)
        ],
    )
    with JudgeServer() as server:
        desk.label("--base-url", server.url, "--limit", "5")
    assert [row["id"] for row in desk.rows()] == ["0", "1", "2", "6", "7"]


def test_a_limit_counts_pairs_of_tasks_that_have_a_point_that_is_asked(desk, tmp_path):
    tasks = {"facts": "truth", "chat": "wit"}
    content = {
        task: {"description": f"{task}.", "capabilities": {point: "It has it."}}
        for task, point in tasks.items()
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"tasks": content}), encoding="utf-8")
    write_rows(
        desk.pairs,
        [
            {"id": str(i), "task": list(tasks)[i % 2], "prompt": "?", "chosen": f"{i}", "rejected": "x"}
            for i in range(6)
        ],
    )
    with JudgeServer() as server:
        options = (
            "--tasks",
            tmp_path / "two.yaml",
            "--base-url",
            server.url,
            "--limit",
            "2",
            "--point",
            "wit",
        )
        done = run_cli("label", desk.pairs, "-o", desk.out, "--judge", "m", *options)
    assert done.exit_code == 0, done.output
    assert [row["id"] for row in desk.rows()] == ["1", "3"]
    assert len(server.requests) == 4


def test_a_pair_that_stands_there_twice_is_paid_once(desk):
    row = {"task": "facts", "prompt": "?", "chosen": "a", "rejected": "b"}
    write_rows(desk.pairs, [row, row])
    with JudgeServer() as server:
        desk.label("--base-url", server.url)
    assert len(server.requests) == 2
    first, second = desk.rows()
    assert first["capabilities"] == second["capabilities"] != {}


def test_labels_of_the_rows_stay_and_are_asked_about_only_to_be_checked(desk):
    write_rows(
        desk.pairs,
        [
            {
                "id": "p",
                "task": "facts",
                "prompt": "?",
                "chosen": "a",
                "rejected": "b",
                "capabilities": {"truth": 0},
            }
        ],
    )
    with JudgeServer(lambda _: completion("1")) as server:
        desk.label("--base-url", server.url)
        assert server.requests == []
        desk.label("--base-url", server.url, "--check-labels")
        assert len(server.requests) == 2
    assert desk.rows()[0]["capabilities"] == {"truth": 0}
    assert desk.rows()[0]["labeled_by"] == {}


def test_ranked_completions_become_single_pairs(desk):
    write_rows(
        desk.pairs,
        [
            {
                "id": "r",
                "task": "facts",
                "prompt": "?",
                "completions": ["a", "b", "c"],
                "ranks": [1, 2, 3],
                "x": 1,
            }
        ],
    )
    with JudgeServer() as server:
        desk.label("--base-url", server.url)
    rows = desk.rows()
    assert [row["id"] for row in rows] == ["r/0-1", "r/0-2", "r/1-2"]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "a"}]
    assert rows[0]["x"] == 1
    assert "completions" not in rows[0]


def test_what_was_labelled_is_read_back_as_it_is(desk):
    from prefmoe.data.read import read_pairs

    with JudgeServer() as server:
        desk.label("--base-url", server.url)
    assert [dict(one.capabilities) for one in read_pairs(desk.out)] == labels_by_hash(6)


def test_all_points_in_one_call(desk):
    def reply(request):
        choice = by_hash(request["messages"][-1]["content"])
        return completion(json.dumps({"wit": choice, "brevity": choice}))

    with JudgeServer(reply) as server:
        assert desk.label("--base-url", server.url, "--points-per-call", "9").exit_code == 0
        assert len(server.requests) == 12
    assert [row["capabilities"] for row in desk.rows()] == labels_by_hash(6)


def test_a_judge_that_always_says_first_gives_no_labels_and_a_warning(desk):
    with JudgeServer(lambda _: completion("1")) as server:
        done = desk.label("--base-url", server.url)
    assert done.exit_code == 0
    assert [row["capabilities"] for row in desk.rows()] == [{}] * 6
    assert (
        "warning: chat/wit: the two orders agree on 0% of the pairs, under 60%; reword its sentence"
        in done.stderr
    )


def test_unusable_answers_are_counted_kept_and_asked_again_only_on_demand(desk):
    with JudgeServer(lambda _: completion("Both are nice.")) as server:
        done = desk.label("--base-url", server.url)
        assert "Unusable answers: 24 not an allowed answer" in done.stderr
        desk.label("--base-url", server.url)
        assert len(server.requests) == 24
    with JudgeServer() as server:
        desk.label("--base-url", server.url, "--retry-unusable")
        assert len(server.requests) == 24
    assert [row["capabilities"] for row in desk.rows()] == labels_by_hash(6)


def test_confidence_gives_soft_labels(desk):
    def reply(_):
        top = [{"token": "1", "logprob": -0.5}, {"token": "2", "logprob": -1.5}]
        return completion("1", logprobs=[{"token": "1", "top_logprobs": top}])

    with JudgeServer(reply) as server:
        desk.label("--base-url", server.url, "--confidence")
        assert server.requests[0]["logprobs"] is True
    assert desk.rows()[0]["capability_probabilities"] == {"wit": 0.5, "brevity": 0.5}


def test_answers_from_before_probabilities_were_asked_for_are_named(desk):
    with JudgeServer() as server:
        desk.label("--base-url", server.url)
        done = desk.label("--base-url", server.url, "--confidence")
    assert len(server.requests) == 24
    assert "12 of 12 verdicts of 'm' were stored without probabilities" in flat_lines(done.stderr)


def flat_lines(text):
    return " ".join(text.split())


def test_a_dry_run_prints_and_writes_nothing(desk):
    before = set(desk.folder.iterdir())
    done = desk.label("--dry-run", "--input-price", "1", "--output-price", "2")
    assert done.exit_code == 0
    assert done.stdout.startswith("calls: 24 (0 more are answered already)\ntokens: about ")
    assert "costs: at most $0.00" in done.stdout
    assert set(desk.folder.iterdir()) == before
    assert "costs: unknown: give --input-price and --output-price" in desk.label("--dry-run").stdout
    with JudgeServer() as server:
        desk.label("--base-url", server.url, "--limit", "2")
    assert desk.label("--dry-run").stdout.startswith("calls: 16 (8 more are answered already)")


def test_a_budget_of_calls_stops_cleanly_and_a_larger_one_goes_on(desk):
    with JudgeServer() as server:
        done = desk.label("--base-url", server.url, "--max-calls", "10", "--concurrency", "7")
        assert done.exit_code == 0
        assert "the budget is used up; what was answered is labelled" in done.stderr
        assert len(server.requests) == 10
        assert desk.label("--base-url", server.url, "--max-calls", "10").exit_code == 0
        assert len(server.requests) == 10  # what the store holds counts
        assert "used up" not in desk.label("--base-url", server.url, "--max-calls", "24").stderr
        assert len(server.requests) == 24
    assert [row["capabilities"] for row in desk.rows()] == labels_by_hash(6)


def test_a_budget_of_dollars_is_never_exceeded(desk):
    with JudgeServer(lambda _: completion("1", usage=(1000, 0))) as server:
        prices = ("--input-price", "1000", "--output-price", "0")  # a dollar a call
        done = desk.label("--base-url", server.url, "--max-usd", "5.5", "--concurrency", "1", *prices)
        assert "$5.0000 so far" in done.stderr
        assert len(server.requests) == 5


def test_the_schema_falls_back_once(desk):
    def reply(request):
        if "response_format" in request:
            return problem(400, "response_format is not supported by this model")
        return completion(by_hash(request["messages"][-1]["content"]))

    with JudgeServer(reply) as server:
        assert desk.label("--base-url", server.url).exit_code == 0
        assert sum("response_format" in request for request in server.requests) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_what_is_wrong_for_good_costs_one_call(desk, status):
    with JudgeServer(lambda _: problem(status, "no")) as server:
        done = desk.label("--base-url", server.url, "--concurrency", "64")
        assert (done.exit_code, len(server.requests)) == (4, 1)
    assert not desk.out.exists()


def about(name):
    """Whether a request is about that pair."""
    return lambda request: f"chosen {name}\n" in request["messages"][-1]["content"]


@pytest.mark.parametrize("name", ["p0", "p3"], ids=["first pair", "later pair"])
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize(("status", "reason"), [(400, "rejected"), (422, "rejected"), (500, "failed")])
def test_one_pair_that_an_endpoint_cannot_take_stops_nobody(
    desk, name, processes, status, reason, monkeypatch
):
    # The bad pair waits a second before its last try, and others are answered meanwhile.
    monkeypatch.setattr("prefmoe.labeling.judge.pace.random.uniform", lambda least, most: most)
    is_bad, delay = about(name), 0.3 if status == 500 else 0.0

    def reply(request):
        if is_bad(request):
            return problem(status, "bad request")
        response = completion(by_hash(request["messages"][-1]["content"]))
        response.delay = delay
        return response

    with JudgeServer(reply) as server:
        options = (
            "--base-url",
            server.url,
            "--attempts",
            "2",
            "--processes",
            processes,
            "--concurrency",
            "4",
        )
        done = desk.label(*options)
        assert done.exit_code == 0, done.output
        assert f"Unusable answers: 4 {reason}" in done.stderr
        asked = len(server.requests)
        assert desk.label(*options).exit_code == 0
        assert len(server.requests) == asked
    expected = labels_by_hash(6)
    expected[int(name[1:])] = {}
    assert [row.get("capabilities", {}) for row in desk.rows()] == expected


def test_rejections_that_overtake_answers_stop_nobody(desk):
    """Four pairs of six are rejected at once, while answers about the others take half a second."""

    def reply(request):
        if any(about(f"p{i}")(request) for i in range(1, 5)):
            return problem(400, "bad request")
        response = completion(by_hash(request["messages"][-1]["content"]))
        response.delay = 0.5
        return response

    with JudgeServer(reply) as server:
        done = desk.label("--base-url", server.url, "--concurrency", "16", "--max-calls", "24")
    assert done.exit_code == 0, done.output
    assert "Unusable answers: 16 rejected" in done.stderr
    assert "the budget is used up" not in done.stderr


@pytest.mark.parametrize(("pairs", "calls"), [(1, 1), (6, 3)])
def test_an_endpoint_that_rejects_everything_is_asked_about_three_pairs(desk, pairs, calls):
    with JudgeServer(lambda _: problem(400, "bad request")) as server:
        done = desk.label("--base-url", server.url, "--limit", str(pairs))
    assert done.exit_code == 4
    assert "rejects the request for 'm': Error code: 400 - bad request" in done.stderr
    assert len(server.requests) == calls
    assert not desk.out.exists()


def test_everybody_waits_as_long_as_the_endpoint_asks(desk):
    def reply(request):
        if len(server.requests) == 5:
            return problem(429, Retry_After="1")
        return completion(by_hash(request["messages"][-1]["content"]))

    with JudgeServer(reply) as server:
        done = desk.label("--base-url", server.url, "--concurrency", "2")
    assert done.exit_code == 0, done.output
    assert len(server.requests) == 25
    # One more may have been under way.
    assert max(after - before for before, after in pairwise(server.times[4:7])) > 0.9


def test_a_limit_of_requests_spaces_them(desk):
    with JudgeServer() as server:
        desk.label("--base-url", server.url, "--requests-per-minute", "600", "--concurrency", "8")
    assert len(server.times) == 24
    assert server.times[-1] - server.times[0] > 23 * 0.1 - 0.2


def test_a_limit_of_tokens_spaces_calls(desk):
    calls = desk.label("--dry-run").stdout.split("about ")[1].split()[0]
    limit = 60 * int(calls)  # what is read takes one second then, what is written some more
    with JudgeServer() as server:
        desk.label("--base-url", server.url, "--tokens-per-minute", str(limit), "--concurrency", "8")
    assert server.times[-1] - server.times[0] > 0.8


def test_half_a_character_is_an_answer_like_any_other(desk):
    """JSON can carry it, UTF-8 and so the store cannot."""
    with JudgeServer(lambda _: completion("\ud83d")) as server:
        done = desk.label("--base-url", server.url)
    assert done.exit_code == 0, done.output
    assert "Unusable answers: 24 not an allowed answer" in done.stderr


def test_what_was_paid_before_a_retry_stays_counted(desk):
    prices = ("--input-price", "1000", "--output-price", "1000")  # $0.101 a call
    with JudgeServer(lambda _: completion("Both are nice.")) as server:
        desk.label("--base-url", server.url, "--limit", "2", *prices)
        asked = len(server.requests)
    with JudgeServer() as server:
        options = ("--base-url", server.url, "--retry-unusable", *prices)
        stopped = desk.label(*options, "--limit", "1", "--max-calls", str(asked))
        assert "the budget is used up" in stopped.stderr
        assert server.requests == []
        desk.label(*options, "--limit", "1")
        assert len(server.requests) == 4  # of the pair in question, and no other
    database = sqlite3.connect(f"{desk.out}.answers.sqlite")
    assert database.execute("SELECT count(*), round(total(usd), 3) FROM calls").fetchone() == (
        asked + 4,
        round(0.101 * (asked + 4), 3),
    )
    database.close()


def test_an_endpoint_that_stays_down_stops_the_run_and_keeps_what_there_is(desk):
    with JudgeServer(lambda _: completion("1") if len(server.requests) <= 5 else problem(500)) as server:
        done = desk.label("--base-url", server.url, "--attempts", "2")
    assert done.exit_code == 1
    assert "judge 'm' failed 2 times in a row on pair" in done.stderr
    assert "status 500; answers so far are stored, the same command goes on" in done.stderr
    database = sqlite3.connect(f"{desk.out}.answers.sqlite")
    assert database.execute("SELECT count(*) FROM calls").fetchone() == (5,)
    database.close()


def test_rules_need_no_judge(desk):
    done = desk.label(judge=("--rules",))
    assert done.exit_code == 0
    assert "6 pairs, 6 labels by rules" in done.stderr
    assert {row["labeled_by"]["brevity"] for row in desk.rows()} == {"rules"}


def save_local_judge(folder, seed=0):
    config = tiny_backbone().config
    config.max_position_embeddings = 2048
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(CHATML).save_pretrained(folder)
    return "--judge", f"local:{folder}"


def test_a_local_judge_uses_the_same_store_and_report(desk, tmp_path):
    local = save_local_judge(tmp_path / "model")
    assert desk.label("--max-calls", "7", judge=local).exit_code == 0
    done = desk.label("--calibrate", "--confidence", judge=local)
    assert "17 of 17 calls" in done.stderr
    assert all(0 <= p <= 1 for row in desk.rows() for p in row["capability_probabilities"].values())
    report = json.loads(run_cli("label", "report", desk.out, "--json").stdout)
    ((judge, points),) = report["judges"].items()
    assert re.fullmatch(re.escape(local[1]) + "@[0-9a-f]{8}", judge)
    assert [point["pairs"] for point in points] == [6, 6]
    soft = [row["capability_probabilities"] for row in desk.rows()]
    for name, point in zip(("wit", "brevity"), points, strict=True):
        sided = sum((p[name] > 0.5) + (p[name] == 0.5) / 2 for p in soft)
        assert point["soft_chosen"]["value"] == pytest.approx(sided / 6)
        assert point["is_weak"] == (point["agreement"]["value"] < 0.6)
    assert re.search(r"labels\W+soft\b", run_cli("label", "report", desk.out).stderr)


def test_another_model_in_the_folder_of_a_local_judge_or_another_dtype_is_asked_anew(desk, tmp_path):
    local = save_local_judge(tmp_path / "model")
    assert "24 of 24 calls" in desk.label(judge=local).stderr
    (tmp_path / "model" / "notes.txt").write_text("no part of the model")
    save_local_judge(tmp_path / "model")
    assert "calls in" not in desk.label(judge=local).stderr
    save_local_judge(tmp_path / "model", seed=1)
    assert desk.label("--dry-run", judge=local).stdout.startswith("calls: 24 (0 more")
    assert "24 of 24 calls" in desk.label(judge=local).stderr
    assert "24 of 24 calls" in desk.label("--dtype", "bfloat16", judge=local).stderr
    report = json.loads(run_cli("label", "report", desk.out, "--json").stdout)
    assert len(report["judges"]) == 3  # both models and the second one rounded, told apart


def test_a_report_compares_judges_and_rows(desk):
    row = {"prompt": "?", "task": "facts", "capabilities": {"truth": 1}}
    write_rows(
        desk.pairs, [{**row, "id": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(12)]
    )
    with JudgeServer() as server:
        desk.label("--base-url", server.url, "--check-labels")
        other = ("--store", desk.folder / "other.sqlite")
        desk.label("--base-url", server.url, "--check-labels", *other, judge=("--judge", "other"))
    report = json.loads(run_cli("label", "report", desk.out, *other, "--json").stdout)
    assert set(report["judges"]) == {"m", "other"}
    compared = {(c["first"], c["second"]): c for c in report["comparisons"]}
    assert set(compared) == {("m", "other"), ("m", "rows"), ("other", "rows")}
    assert compared["m", "other"]["points"][0]["kappa"]["value"] == 1
    assert compared["m", "other"]["disputed"] == []
    assert compared["m", "rows"]["disputed"]
    shown = run_cli("label", "report", desk.out, *other, "--disputed", "1")
    assert shown.stdout == ""
    assert "m and other" in shown.stderr
    assert "Cohen's kappa" in shown.stderr
    assert shown.stderr.count("in dispute:") == 2


def test_a_report_of_nothing_is_refused(desk):
    done = run_cli("label", "report", desk.pairs)
    assert (done.exit_code, "no pair is labelled and no store lies beside it" in done.stderr) == (3, True)
    missing = run_cli("label", "report", desk.pairs, "--store", desk.folder / "none.sqlite")
    assert (missing.exit_code, "no such store; check the path" in missing.stderr) == (3, True)


def test_points_are_suggested_for_a_person_to_edit(desk):
    proposal = {"description": "Small talk.", "points": {"wit": "It is funny.", "kindness": "It is kind."}}
    replies = iter([completion("Sure! I would say: wit."), completion("Sure:\n" + json.dumps(proposal))])
    with JudgeServer(lambda _: next(replies)) as server:
        done = desk.label("--suggest", "--base-url", server.url, tasks=False)
    assert done.exit_code == 0, done.output
    assert "rejected p5" in server.users[0]
    text = desk.out.read_text(encoding="utf-8")
    assert text.startswith("# Proposed by m from up to 20 pairs a task: edit it")
    desk.tasks = desk.out
    desk.out = desk.folder / "labelled.jsonl"
    with JudgeServer() as server:
        assert desk.label("--base-url", server.url).exit_code == 0
    assert list(desk.rows()[0]["labeled_by"]) == ["wit", "kindness"]


def test_a_suggestion_overwrites_nothing_and_can_be_planned(desk):
    with JudgeServer() as server:
        done = desk.label("--suggest", "--base-url", server.url, "--dry-run", tasks=False)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("calls: 1, up to three times as many")
        assert not desk.out.exists()
        prices = ("--input-price", "1", "--output-price", "1")
        for budget in (("--max-calls", "2"), ("--max-usd", "0.001", *prices)):
            few = desk.label("--suggest", "--base-url", server.url, *budget, tasks=False)
            assert (few.exit_code, "--suggest may take" in few.stderr) == (4, True)
        desk.out.write_text("edited by hand")
        again = desk.label("--suggest", "--base-url", server.url, tasks=False)
        assert again.exit_code == 2
        assert flat("is there already") in flat(again.stderr)
        assert desk.out.read_text() == "edited by hand"
    assert server.requests == []


def test_a_judge_that_suggests_nothing_usable_is_named(desk):
    with JudgeServer(lambda _: completion('{"description": "x", "points": {"Bad Name": "x"}}')) as server:
        done = desk.label("--suggest", "--base-url", server.url, tasks=False)
    assert done.exit_code == 1
    assert "proposed nothing usable for task 'chat' in 3 tries" in done.stderr
    assert "Bad Name" in done.stderr
    local = desk.label("--suggest", judge=("--judge", "local:x"), tasks=False)
    assert (local.exit_code, "--suggest needs an endpoint" in local.stderr) == (4, True)


BAD_INPUT = [
    ((), ("--judge", "gpt-4o-mini"), 4, "OPENAI_API_KEY is not set"),
    ((), (), 2, "give either --judge MODEL or --rules"),
    (("--rules",), ("--judge", "m"), 2, "give either --judge MODEL or --rules"),
    (("--suggest",), ("--rules",), 2, "--suggest needs --judge MODEL"),
    (("--max-calls", "0"), ("--judge", "m"), 2, "--max-calls: Input should be greater than 0; got 0"),
    (
        ("--max-usd", "0", "--input-price", "1", "--output-price", "1"),
        ("--judge", "m"),
        2,
        "--max-usd: Input should be",
    ),
    (("--max-usd", "1"), ("--judge", "m"), 2, "max_usd needs input_price and output_price; look them up"),
    (("--points-per-call", "2"), ("--judge", "local:x"), 2, "points_per_call above 1 needs an endpoint"),
    (("--base-url", "http://x"), ("--judge", "local:x"), 2, "base_url does not go with 'local:x'"),
    (("--dtype", "bfloat16"), ("--judge", "m"), 2, "dtype goes with a local judge only; 'm' runs at its"),
    (("--dtype", "int4"), ("--judge", "local:x"), 2, "--dtype"),
    (("--calibrate",), ("--judge", "m"), 2, "calibrate needs probabilities; add confidence"),
    (("--limit", "0"), ("--judge", "m"), 2, "--limit"),
    (("--point", "wti"), ("--judge", "m"), 4, "point 'wti' is not in the tasks file; did you mean 'wit'?"),
    (("--language", "zh"), ("--judge", "m"), 4, "language 'zh' needs Chinese sentences; missing: tasks.chat"),
    (("--base-url", "nowhere"), ("--judge", "m"), 4, "base_url 'nowhere' is no address"),
    ((), ("--judge", "local:./nowhere"), 4, "local judge './nowhere' cannot be loaded"),
    (("--tasks", "none.yaml"), ("--judge", "m"), 4, "none.yaml: the tasks file cannot be read"),
]


@pytest.mark.parametrize(("options", "judge", "exit_code", "sentence"), BAD_INPUT)
def test_a_mistake_has_a_sentence_and_an_exit_code(desk, options, judge, exit_code, sentence):
    done = desk.label(*options, judge=judge)
    assert done.exit_code == exit_code
    assert flat(sentence) in flat(done.stderr)
    assert not desk.out.exists()


def test_mistakes_with_files(desk, tmp_path):
    no_tasks = desk.label(tasks=False)
    assert (no_tasks.exit_code, "--tasks TASKS.yaml is missing" in no_tasks.stderr) == (2, True)

    write_rows(desk.pairs, [{"prompt": "?", "chosen": "a", "rejected": "b", "task": "chats"}])
    unknown = desk.label()
    assert (unknown.exit_code, "is not in the tasks file; did you mean 'chat'?" in unknown.stderr) == (
        3,
        True,
    )
    assert desk.label("--dry-run").exit_code == 3

    write_rows(desk.pairs, [{"prompt": "?", "chosen": "a"}])
    broken = desk.label()
    assert (broken.exit_code, "'rejected' is missing" in broken.stderr) == (3, True)

    desk.out = desk.pairs
    same = desk.label()
    assert (same.exit_code, flat("is the input file; choose another name") in flat(same.stderr)) == (
        2,
        True,
    )
    desk.out = tmp_path
    assert desk.label().exit_code == 2


def test_a_store_of_something_else(desk):
    store = desk.folder / "s.sqlite"
    store.write_bytes(b"cats" * 1000)
    done = desk.label("--store", store)
    assert (done.exit_code, "is not a store of answers, or is damaged" in done.stderr) == (3, True)


def test_a_tasks_file_without_rules(desk):
    desk.tasks.write_text("tasks: {chat: {description: x, capabilities: {wit: x}}}", encoding="utf-8")
    done = desk.label(judge=("--rules",))
    assert (done.exit_code, "the tasks file names no rule" in done.stderr) == (4, True)


def test_the_long_form_and_the_help():
    assert "Usage: root label pairs" in run_cli("label", "pairs", "--help").output
    assert "is short for" in " ".join(run_cli("label", "--help").output.split())
    assert run_cli("label").exit_code == 2


def test_labelling_through_an_endpoint_imports_no_torch(desk):
    program = (
        "import sys; from prefmoe.cli.app import app\n"
        f"app(['label', {str(desk.pairs)!r}, '-o', 'x', '--tasks', {str(desk.tasks)!r}, '--judge', 'm', '--dry-run'],"
        " standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SRC)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_training_labels_what_is_missing_first_and_pays_once(backbone_folder, tmp_path):
    config = write_config(tmp_path, backbone_folder)
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    point = {"capabilities": {"warmth": "It is warm.", "clarity": "It is clear."}}
    tasks = {"tasks": {name: {"description": "Talk.", **point} for name in ("advice", "facts")}}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks), encoding="utf-8")
    content["data"]["tasks_file"] = str(tmp_path / "tasks.yaml")
    with JudgeServer() as server:
        prices = {"input_price": 1, "output_price": 10}
        content["data"]["labels"] = {"judge": "m", "base_url": server.url, **prices}
        config.write_text(yaml.safe_dump(content), encoding="utf-8")
        done = run_cli("reward", "train", config)
        assert done.exit_code == 0, done.output
        # 16 training and 8 validation pairs, both orders; warmth is labelled in the rows.
        assert len(server.requests) == 2 * (16 + 8)
        assert "labels by m: 48 of 48 calls in" in done.stderr
        assert "$0.0053 so far" in done.stderr  # 100 tokens read and one written, each time
        assert run_cli("reward", "train", config).exit_code == 0
        assert len(server.requests) == 2 * (16 + 8)
    saved = json.loads((tmp_path / "run" / "dmoerm" / "config.json").read_text(encoding="utf-8"))
    assert saved["tasks"] == {"advice": ["clarity", "warmth"], "facts": ["clarity", "warmth"]}
