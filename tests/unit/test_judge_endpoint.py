"""One question to a scripted server: replies, faults, dead ends; the key stays a secret."""

import asyncio
import builtins
import json
import logging
from math import log

import pytest

from judge_helpers import interview, pair, question
from judge_server import JudgeServer, Response, completion, problem
from prefmoe.errors import ConfigError
from prefmoe.labeling.judge.endpoint import Endpoint, Fault
from prefmoe.labeling.judge.questions import Question

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def ask(server, *questions: Question, **options):
    """The replies to questions, one after the other on one endpoint."""

    async def run():
        endpoint = Endpoint("m", base_url=server.url, **{"timeout": 5.0, **options})
        try:
            return [await endpoint.ask(one) for one in questions]
        finally:
            await endpoint.close()

    return asyncio.run(run())


def answer_to(response: Response, one: Question | None = None, **options):
    one = one or question()
    with JudgeServer(lambda _: response) as server:
        (reply,) = ask(server, one, **options)
    return reply.answers[one.points[0]]


def fault_of(response: Response, **options) -> Fault:
    with JudgeServer(lambda _: response) as server, pytest.raises(Fault) as raised:
        ask(server, question(), **options)
    return raised.value


def dead_end_of(response: Response) -> str:
    with JudgeServer(lambda _: response) as server, pytest.raises(ConfigError) as raised:
        ask(server, question())
    assert len(server.requests) == 1
    return str(raised.value)


def test_a_question_is_sent_with_schema_temperature_and_limit():
    both = next(iter(interview(points_per_call=2).questions(pair())))
    with JudgeServer(lambda _: completion('{"wit": "1", "brevity": "0"}', usage=(321, 7))) as server:
        (reply,) = ask(server, both)
    (request,) = server.requests
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert request["messages"][1]["content"] == both.user
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0, 32)
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["wit", "brevity"]
    assert {point: answer.choice for point, answer in reply.answers.items()} == {"wit": "1", "brevity": "0"}
    assert (reply.input_tokens, reply.output_tokens) == (321, 7)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["content-type"] == "application/json"
    assert not any("stainless" in name for name in server.headers[0])  # the SDK's word on our machine


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (completion("1", finish="length"), "cut off"),
        (completion('{"answer": "', finish="length"), "cut off"),
        (completion(None, refusal="I do not judge people."), "refused"),
        (completion("", finish="content_filter"), "refused"),
        (completion(None), "empty"),
        (completion("第二个回答更好。"), "not an allowed answer"),
        (completion('{"answer": "1"'), "not an allowed answer"),
        (problem(400, "This model's maximum context length is 10 tokens"), "too long"),
        (problem(400, "flagged by our content_filter"), "refused"),
    ],
)
def test_an_answer_that_cannot_be_used_has_its_reason(response, reason):
    answer = answer_to(response)
    assert (answer.choice, answer.reason) == (None, reason)


def test_a_server_without_usage_is_fine():
    with JudgeServer(lambda _: completion("2", usage=None)) as server:
        (reply,) = ask(server, question())
    assert (reply.answers["wit"].choice, reply.input_tokens, reply.output_tokens) == ("2", None, None)


@pytest.mark.parametrize("usage", [[1], "many", {"prompt_tokens": "3"}, {"prompt_tokens": -1}])
def test_a_count_of_tokens_that_is_none_is_no_count(usage):
    response = completion("2")
    content = json.loads(response.body) | {"usage": usage}
    with JudgeServer(lambda _: Response(json.dumps(content).encode())) as server:
        (reply,) = ask(server, question())
    assert (reply.answers["wit"].choice, reply.input_tokens, reply.output_tokens) == ("2", None, None)


@pytest.mark.parametrize(
    "url", ["http://me:hidden@localhost/v1", "http://localhost/v1?key=hidden", "http://localhost/v1#hidden"]
)
def test_an_address_that_carries_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match="the address of 'localhost' carries a name, a password") as raised:
        Endpoint("m", base_url=url)
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    ("response", "wait"),
    [
        (problem(429), None),
        (problem(429, Retry_After="3"), 3.0),
        (problem(500), None),
        (problem(503, Retry_After="1"), 1.0),
        (problem(408), None),
        (Response(b"<html>busy</html>"), None),
        (Response(b'{"choices": []}'), None),
        (Response(b'{"choices": [{"message": null}]}'), None),
        (Response(b"\xff\xfe"), None),
    ],
)
def test_what_may_be_over_soon_is_a_fault(response, wait):
    fault = fault_of(response)
    assert fault.wait == wait
    assert fault.may_stay == (response.status not in (408, 429))


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_connection_that_is_closed_in_mid_answer_is_a_fault(cut):
    right = completion("1")
    right.cut = cut
    fault = fault_of(right)
    assert "the connection broke" in str(fault)
    assert not fault.may_stay


def test_no_answer_in_time_is_a_fault():
    late = completion("1")
    late.delay = 2.0
    assert "no answer in time" in str(fault_of(late, timeout=0.2))


def test_nobody_at_home_is_a_fault():
    with JudgeServer() as server:
        pass
    with pytest.raises(Fault, match="Cannot connect to host 127.0.0.1"):
        ask(server, question())


@pytest.mark.parametrize(
    ("response", "sentence"),
    [
        (problem(401, "no"), "does not let us in .status 401.: .*no.*; check OPENAI_API_KEY"),
        (problem(403, "no"), "status 403"),
        (problem(404, "no such model"), "has no model 'm'"),
        (problem(400, "bad request"), "rejects the request for 'm'"),
        (problem(302, "moved", location="http://192.0.2.1/"), "rejects the request for 'm'"),
        (problem(429, "You exceeded your quota: insufficient_quota"), "the account has no credit left"),
    ],
)
def test_what_stays_wrong_stops_at_the_first_call(response, sentence):
    import re

    assert re.search(sentence, dead_end_of(response))


@pytest.mark.parametrize(
    ("complaint", "field", "instead"),
    [
        ("response_format is not supported", "response_format", None),
        ("Unsupported value: 'temperature'", "temperature", None),
        ("Use 'max_completion_tokens' instead of 'max_tokens'", "max_tokens", "max_completion_tokens"),
    ],
)
def test_a_field_that_is_rejected_by_name_is_left_out_once_and_for_all(complaint, field, instead):
    def reply(request):
        return problem(400, complaint) if field in request else completion("1")

    with JudgeServer(reply) as server:
        replies = ask(server, question("a"), question("b"), question("c"))
    assert [one.answers["wit"].choice for one in replies] == ["1"] * 3
    assert [field in request for request in server.requests] == [True, False, False, False]
    if instead:
        assert server.requests[-1][instead] == 16


def test_confidence_needs_an_endpoint_that_gives_it():
    shown = [
        {
            "token": "1",
            "top_logprobs": [{"token": "1", "logprob": log(0.8)}, {"token": "2", "logprob": log(0.2)}],
        }
    ]
    answer = answer_to(completion("1", logprobs=shown), confidence=True)
    assert answer.probabilities == pytest.approx((0.8, 0.2, 0.0))
    assert answer_to(completion("1"), confidence=True).probabilities is None
    assert answer_to(completion("1", logprobs=[{"token": "1"}]), confidence=True).probabilities is None
    with (
        JudgeServer(lambda _: problem(400, "logprobs is not supported")) as server,
        pytest.raises(ConfigError) as raised,
    ):
        ask(server, question(), confidence=True)
    assert "gives no log-probabilities; drop --confidence" in str(raised.value)


def test_the_key_is_in_no_error_no_answer_and_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    echo = f"your key is {KEY}"
    seen = [
        answer_to(completion(echo)).text,
        answer_to(completion(None, refusal=echo)).text,
        answer_to(problem(400, f"context_length exceeded, {echo}")).text,
        str(fault_of(Response(echo.encode()))),
        str(fault_of(problem(500, echo))),
        *(dead_end_of(problem(status, echo)) for status in (400, 401, 404)),
    ]
    assert sum("your key is ***" in text for text in seen) == 7
    assert KEY not in "".join(seen)
    assert KEY not in caplog.text
    assert KEY[:12] not in caplog.text


def test_openai_wants_a_key_and_a_local_server_does_not(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(
        ConfigError, match="OPENAI_API_KEY is not set, and https://api.openai.com/v1 wants a key"
    ):
        Endpoint("gpt-4o-mini")
    with JudgeServer(lambda _: completion("1")) as server:
        assert ask(server, question())[0].answers["wit"].choice == "1"


def test_the_address_may_come_from_the_environment(monkeypatch):
    with JudgeServer(lambda _: completion("1")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)

        async def run():
            endpoint = Endpoint("m")
            try:
                return await endpoint.ask(question())
            finally:
                await endpoint.close()

        assert asyncio.run(run()).answers["wit"].choice == "1"


def test_an_address_without_http_is_refused():
    with pytest.raises(
        ConfigError, match="base_url '127.0.0.1:8000' is no address; expected one like http://"
    ):
        Endpoint("m", base_url="127.0.0.1:8000")


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def no_openai(name, *arguments, **options):
        if name == "openai":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_openai)
    with pytest.raises(
        ConfigError, match=r"not installed; run pip install 'prefmoe\[judge\]', or take an offline"
    ):
        Endpoint("m", base_url="http://127.0.0.1:1")


def test_without_aiohttp_the_plain_client_is_taken(monkeypatch):
    import openai

    def missing(**_):
        raise RuntimeError("aiohttp")

    monkeypatch.setattr(openai, "DefaultAioHttpClient", missing)
    assert answer_to(completion("2")).choice == "2"


def test_free_text_for_suggestions():
    async def run(server):
        endpoint = Endpoint("m", base_url=server.url)
        try:
            return await endpoint.write([{"role": "user", "content": "Hi"}], limit=9)
        finally:
            await endpoint.close()

    with JudgeServer(lambda _: completion(f"words, {KEY}")) as server:
        assert asyncio.run(run(server)) == "words, ***"
    assert "response_format" not in server.requests[0]
    with (
        JudgeServer(lambda _: problem(400, "context_length")) as server,
        pytest.raises(ConfigError, match="too long"),
    ):
        asyncio.run(run(server))
    assert json.dumps(server.requests[0])
