"""One row into pairs or completions: every layout, and a sentence for every thing that can be wrong."""

import pytest

from data_helpers import assistant, row, user
from prefmoe.data.parse import parse_completions, parse_row
from prefmoe.records import Message

ANSWER = [{"role": "assistant", "content": "A."}]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def problems_of(values, parse=parse_row):
    problems = []
    records = parse(values, row_id="f:1", problems=problems)
    assert bool(records) != bool(problems), "a row gives records or problems, never both, never neither"
    return problems


def pairs_of(values):
    problems = []
    pairs = parse_row(values, row_id="f:1", problems=problems)
    assert problems == []
    return pairs


BAD_ROWS = {
    "missing side": (row(rejected=None), "'rejected' is missing; keys found: 'prompt', 'chosen'"),
    "slip of the pen": (
        {"prompt": "p", "chosen": "a", "reject": "b"},
        "'rejected' is missing; keys found: 'prompt', 'chosen', 'reject'. "
        "Did you mean 'reject' -> 'rejected'?",
    ),
    "null side": (
        {"prompt": "p", "chosen": None, "rejected": "b"},
        "'chosen' is null; expected text or messages",
    ),
    "no prompt": (row(prompt=None), "'prompt' is missing"),
    "no columns": ({}, "'prompt' is missing; keys found: none"),
    "empty side": (row(chosen=""), "'chosen' is empty; drop the row"),
    "blank side": (row(rejected=" \n\t"), "'rejected' is empty; drop the row"),
    "empty list": (row(rejected=[]), "'rejected' is empty"),
    "empty prompt": (row(prompt="  "), "'prompt' is empty; expected text"),
    "equal sides": (row(chosen="x", rejected="x"), "'chosen' and 'rejected' are equal; drop the row"),
    "equal text and message": (row(chosen="A.", rejected=ANSWER), "'chosen' and 'rejected' are equal"),
    "number for text": (
        row(chosen=5),
        "'chosen' has the wrong type; got 5; expected text or a list of messages",
    ),
    "text for message": (row(chosen=["hi"]), "'chosen[0]' is not a message; got 'hi'; expected {'role'"),
    "message without text": (row(chosen=[{"role": "assistant"}]), "'chosen[0]' is not a message"),
    "unknown role": (
        row(prompt=[{"role": "human", "content": "x"}]),
        "'prompt[0]' has an unknown role; got 'human'; expected one of system, user, assistant, tool",
    ),
    "completion by a user": (
        row(chosen=[{"role": "user", "content": "x"}]),
        "'chosen' must begin and end with an assistant message; got roles ['user']",
    ),
    "half an emoji": (
        row(chosen="ok \ud83d"),
        r"'chosen' holds half a surrogate pair; got '\ud83d' at character 4",
    ),
    "half an emoji in a task": (row(task="\ud83d"), "'task' holds half a surrogate pair"),
    "NaN margin": (row(margin=float("nan")), "'margin' is nan; expected a finite number, 0 or more"),
    "infinite weight": (row(weight=float("inf")), "'weight' is inf; expected a finite number"),
    "number past every float": (row(weight=10**400), "'weight' is 1000"),
    "negative margin": (row(margin=-1), "'margin' is -1; expected a finite number, 0 or more"),
    "boolean margin": (row(margin=True), "'margin' is True; expected a finite number"),
    "text margin": (row(margin="1"), "'margin' is '1'; expected a finite number"),
    "number as task": (row(task=3), "'task' is no name; got 3; expected text, or leave it out"),
    "blank preference": (row(preference=" "), "'preference' is no name"),
    "capability out of range": (
        row(capabilities={"brief": 2}),
        "capability 'brief' is 2; expected 1 (chosen is better), -1 (rejected is better) or 0 (tie)",
    ),
    "capability NaN": (row(capabilities={"brief": float("nan")}), "capability 'brief' is nan"),
    "capability true": (row(capabilities={"brief": True}), "capability 'brief' is True"),
    "capability text": (row(capabilities={"brief": "chosen"}), "capability 'brief' is 'chosen'"),
    "soft label 1.2": (
        row(capability_probabilities={"brief": 1.2}),
        "capability_probabilities: 'brief' is 1.2; expected a probability, from 0 (rejected is better) to 1",
    ),
    "soft label text": (row(capability_probabilities={"brief": "0.9"}), "'brief' is '0.9'"),
    "soft label list": (
        row(capability_probabilities=[0.9]),
        "'capability_probabilities' has the wrong type; got [0.9]; expected {'name': 0.9}",
    ),
    "capability list": (row(capabilities=["brief"]), "'capabilities' has the wrong type; got ['brief']"),
    "column NaN": (
        row(cap_brief_chosen=float("nan"), cap_brief_rejected=1),
        "are not comparable; got nan, 1",
    ),
    "column without its other": (
        row(cap_brief_rejected=1),
        "'cap_brief_rejected') are not comparable; got None, 1",
    ),
    "ranks missing": (
        {"prompt": "p", "completions": ["a", "b"]},
        "'ranks' do not fit; got None; expected one number",
    ),
    "ranks too short": (
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1]},
        "for each of the 2 completions",
    ),
    "ranks NaN": (
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, float("nan")]},
        "'ranks' do not fit",
    ),
    "ranks all equal": ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}, "'ranks' give no pair"),
    "ranked twice": (
        {"prompt": "p", "completions": ["a", "a"], "ranks": [1, 2]},
        "equal completions have different ranks",
    ),
    "completions no list": (
        {"prompt": "p", "completions": "a", "ranks": [1]},
        "'completions' is 'a'; expected a list of",
    ),
    "ranked blank": ({"prompt": "p", "completions": ["a", ""], "ranks": [1, 2]}, "'completions[1]' is empty"),
    "one side is the prompt": (
        {"chosen": TALK, "rejected": TALK[:1]},
        "'prompt' is missing",
    ),
}


@pytest.mark.parametrize(("values", "sentence"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named(values, sentence):
    assert any(sentence in problem for problem in problems_of(values))


def test_every_problem_of_a_row_is_collected():
    problems = problems_of(row(chosen="", rejected=7, margin="x", task=1, capabilities={"a": 9, "b": "?"}))
    assert [problem.split("'")[1] for problem in problems] == [
        "task",
        "chosen",
        "rejected",
        "margin",
        "a",
        "b",
    ]


def test_no_problem_breaks_its_line():
    for values, _ in BAD_ROWS.values():
        assert all("\n" not in problem for problem in problems_of(values))
    assert "\n" not in problems_of(row(capabilities={"a\nb": 5}))[0]


def test_texts_become_messages():
    (pair,) = pairs_of(row(prompt="p", chosen="c", rejected="r"))
    assert (pair.prompt, pair.chosen, pair.rejected) == (user("p"), assistant("c"), assistant("r"))
    assert (pair.id, pair.task, pair.preference, pair.source) == ("f:1", None, None, None)
    assert (pair.target_margin, pair.weight, pair.capabilities) == (0.0, 1.0, {})


def test_every_column_arrives():
    (pair,) = pairs_of(
        row(
            id=7,
            task="advice",
            preference="kind",
            margin=2,
            weight=0,
            source="s",
            capabilities={"a": 1.0, "b": None},
            capability_probabilities={"a": 1, "b": None, "c": 0.25},
        )
    )
    assert (pair.id, pair.task, pair.preference, pair.source) == ("7", "advice", "kind", "s")
    assert (pair.target_margin, pair.weight, pair.capabilities) == (2.0, 0.0, {"a": 1})
    assert pair.capability_probabilities == {"a": 1.0, "c": 0.25}
    assert pair.swap().capability_probabilities == {"a": 0.0, "c": 0.75}
    assert pair.swap().swap() == pair


def test_null_columns_count_as_absent_and_unknown_ones_are_ignored():
    nulls = dict.fromkeys(
        ("id", "task", "margin", "weight", "capabilities", "cap_a_chosen", "cap_a_rejected", "ranks")
    )
    (pair,) = pairs_of({**row(), **nulls, "completions": None, "annotator": 3})
    assert (pair.id, pair.task, pair.capabilities) == ("f:1", None, {})


def test_implicit_prompt_is_what_both_sides_begin_with():
    sides = {"chosen": [*TALK, TALK[0], *ANSWER], "rejected": [*TALK, TALK[0], TALK[1]]}
    (pair,) = pairs_of(sides)
    assert [message.content for message in pair.prompt] == ["Hi", "Hello", "Hi"]
    assert (pair.chosen, pair.rejected) == (assistant("A."), assistant("Hello"))


def test_a_transcript_of_hh_rlhf_brings_its_prompt():
    asked = "\n\nHuman: Hi:\n\nAssistant: Hello\n\nHuman: And\n\nnow?"
    (pair,) = pairs_of({"chosen": f"{asked}\n\nAssistant: So.\n", "rejected": f"{asked}\n\nAssistant: No."})
    assert [(m.role, m.content) for m in pair.prompt] == [
        ("user", "Hi:"),
        ("assistant", "Hello"),
        ("user", "And\n\nnow?"),
    ]
    assert (pair.chosen, pair.rejected) == ((Message("assistant", "So."),), (Message("assistant", "No."),))


@pytest.mark.parametrize(
    ("chosen", "rejected", "sentence"),
    [
        ("The sky is blue.", "The sky is red.", "'prompt' is missing"),  # where a prompt ends is not guessed
        ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: No.", "'chosen' is empty"),
        ("\n\nHuman: Hi\n\nAssistant: So.", "\n\nHuman: Ho\n\nAssistant: No.", "'prompt' is missing"),
        ("\n\nHuman: Hi\n\nAssistant: So.", 5, "'rejected' has the wrong type"),
    ],
)
def test_a_prompt_that_the_sides_do_not_share_is_missing(chosen, rejected, sentence):
    assert any(sentence in problem for problem in problems_of({"chosen": chosen, "rejected": rejected}))


def test_prompt_repeated_in_the_sides_is_taken_off():
    (pair,) = pairs_of({"prompt": "Hi", "chosen": TALK, "rejected": [TALK[0], *ANSWER]})
    assert (pair.prompt, pair.chosen, pair.rejected) == (user("Hi"), assistant("Hello"), assistant("A."))


def test_completion_may_hold_several_messages():
    (pair,) = pairs_of(row(chosen=[*ANSWER, *TALK]))
    assert pair.chosen == (Message("assistant", "A."), Message("user", "Hi"), Message("assistant", "Hello"))


def test_numeric_columns_become_capabilities():
    columns = {"cap_a_chosen": 2.5, "cap_a_rejected": 1, "cap_b_chosen": 0, "cap_b_rejected": 4}
    columns |= {"cap_too_long_chosen": 3, "cap_too_long_rejected": 3, "cap_other": "x"}
    (pair,) = pairs_of(row(**columns, capabilities={"b": 1}))
    assert pair.capabilities == {"a": 1, "b": 1, "too_long": 0}, "the label in the row wins over the columns"


def test_ranks_expand_to_every_two_of_different_rank():
    pairs = pairs_of(
        {"id": "q", "prompt": "p", "completions": ["c", "a", "b"], "ranks": [2, 1, 2], "task": "t"}
    )
    assert [pair.id for pair in pairs] == ["q/1-0", "q/1-2"]
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (assistant("a"), assistant("c")),
        (assistant("a"), assistant("b")),
    ]
    assert {pair.task for pair in pairs} == {"t"}


@pytest.mark.parametrize("column", ["completion", "response"])
def test_completion_to_score(column):
    (record,) = parse_completions({"prompt": "p", column: "a", "task": "t"}, row_id="f:1", problems=[])
    assert (record.id, record.prompt, record.completion, record.task) == (
        "f:1",
        user("p"),
        assistant("a"),
        "t",
    )


def test_pairs_and_lists_give_each_completion():
    both = parse_completions(row(id="x", chosen="c", rejected="r"), row_id="f:1", problems=[])
    assert [(record.id, record.completion) for record in both] == [
        ("x/chosen", assistant("c")),
        ("x/rejected", assistant("r")),
    ]
    listed = parse_completions({"prompt": "p", "completions": ["a", "b"]}, row_id="f:1", problems=[])
    assert [(record.id, record.completion) for record in listed] == [
        ("f:1/0", assistant("a")),
        ("f:1/1", assistant("b")),
    ]


def test_equal_sides_may_be_scored():
    assert len(parse_completions(row(chosen="x", rejected="x"), row_id="f:1", problems=[])) == 2


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompt": "p"}, "'completion' is missing; keys found: 'prompt'"),
        ({"prompt": "p", "completon": "a"}, "Did you mean 'completon' -> 'completion'?"),
        ({"completion": "a"}, "'prompt' is missing"),
        ({"prompt": "p", "completion": " "}, "'completion' is empty"),
        ({"prompt": "p", "response": 3}, "'response' has the wrong type"),
        ({"prompt": "p", "completions": []}, "'completions' is []; expected a list"),
    ],
)
def test_bad_completion_is_named(values, sentence):
    assert any(sentence in problem for problem in problems_of(values, parse_completions))
