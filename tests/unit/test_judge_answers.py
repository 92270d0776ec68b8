"""What a judge wrote, read strictly."""

from math import log

import pytest

from prefmoe.labeling.judge.answers import TokenOptions, answer_schema, read_answers, unusable

ALLOWED = ("1", "2", "0")


def choice(text, points=("wit",), allowed=ALLOWED):
    return read_answers(text, points, allowed)[points[0]].choice


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", "1"),
        (" 2\n", "2"),
        ("0", "0"),
        ('{"answer": "1"}', "1"),
        ('{"answer": 2}', "2"),
        ('```json\n{"answer": "0"}\n```', "0"),
    ],
)
def test_an_allowed_answer_counts_bare_or_as_the_json_that_was_asked_for(text, expected):
    assert choice(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "10 of 10 points for the second",  # the release takes the first 1 or 2 anywhere: it reads "1" here,
        'Answer 1 says "2 + 2 is 5", so the other one.',  # here
        "I prefer 2",  # and, by luck rightly, here
        "12",
        "1.",
        "1 or 2",
        "Answer 1",
        "3",
        "-1",
        "1.0",
        "１",  # full width
        "①",
        "第一个",
        "第二个回答更好",
        "Die zweite Antwort",
        "true",
        '"1"',
        '{"answer": "10"}',
        '{"answer": true}',
        '{"answer": 1.0}',
        '{"answer": null}',
        '{"answer": "1", "why": "2 is worse"}',
        '{"answer": "1", "answer": "2"}',
        '{"wit": "1"}',
        '[{"answer": "1"}]',
        '{"answer": "1"',
        '{"answer": "1"} {"answer": "2"}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_unusable_and_never_guessed__defect_18(text):
    answer = read_answers(text, ["wit"], ALLOWED)["wit"]
    assert (answer.choice, answer.reason) == (None, "not an allowed answer")
    assert answer.text == text[:500]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_nothing_is_no_answer(text):
    assert read_answers(text, ["wit"], ALLOWED)["wit"].reason == "empty"


def test_a_tie_is_no_answer_where_ties_are_not_allowed():
    assert choice("0", allowed=("1", "2")) is None


def test_several_points_are_read_one_by_one():
    answers = read_answers('{"b": "1", "a": "maybe"}', ["a", "b"], ALLOWED)
    assert answers["b"].choice == "1"
    assert (answers["a"].choice, answers["a"].reason) == (None, "not an allowed answer")


@pytest.mark.parametrize("text", ["1", '{"a": "1"}', '{"a": "1", "b": "2", "c": "0"}'])
def test_several_points_need_exactly_their_keys(text):
    assert {answer.choice for answer in read_answers(text, ["a", "b"], ALLOWED).values()} == {None}


def test_the_schema_allows_exactly_what_the_parser_does():
    schema = answer_schema(["a", "b"], ALLOWED)
    assert schema["required"] == ["a", "b"]
    assert schema["properties"]["a"] == {"type": "string", "enum": ["1", "2", "0"]}
    assert schema["additionalProperties"] is False
    assert list(answer_schema(["a"], ALLOWED)["properties"]) == ["answer"]


def test_a_reason_is_kept_for_every_point():
    answers = unusable(["a", "b"], "refused", "no" * 1000)
    assert {(a.choice, a.reason, len(a.text)) for a in answers.values()} == {(None, "refused", 500)}


def options(**shares):
    return {token: log(share) for token, share in shares.items()}


def test_probabilities_are_those_of_the_allowed_answers_among_themselves():
    tokens = [TokenOptions("1", {"1": log(0.6), "2": log(0.2), "A": log(0.2)})]
    assert read_answers("1", ["wit"], ALLOWED, tokens=tokens)["wit"].probabilities == pytest.approx(
        (0.75, 0.25, 0)
    )


def test_probabilities_are_read_where_the_answer_stands_in_the_json():
    tokens = [
        TokenOptions('{"a', {'{"a': 0.0}),
        TokenOptions('": "', {'": "': 0.0}),
        TokenOptions("2", {"2": log(0.5), "0": log(0.3), "1": log(0.2)}),
        TokenOptions('", "b": ', {}),
        TokenOptions('"1"}', {'"1"}': log(0.9), '"2"}': log(0.1)}),
    ]
    answers = read_answers('{"a": "2", "b": "1"}', ["a", "b"], ALLOWED, tokens=tokens)
    assert answers["a"].probabilities == pytest.approx((0.2, 0.5, 0.3))
    assert answers["b"].probabilities == pytest.approx((0.9, 0.1, 0.0))


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [TokenOptions("2", {"2": 0.0})],  # of another text
        [TokenOptions("1", {"A": 0.0})],  # no allowed answer among the likeliest
    ],
)
def test_no_probabilities_where_the_tokens_do_not_tell(tokens):
    answer = read_answers("1", ["wit"], ALLOWED, tokens=tokens)["wit"]
    assert (answer.choice, answer.probabilities) == ("1", None)
