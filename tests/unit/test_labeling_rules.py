from math import log

import pytest

from prefmoe.errors import ConfigError
from prefmoe.labeling import RULES, RuleLabeler, TaskFile
from prefmoe.records import Message, PreferencePair

ARTICLE = "Anna Berg won 3 medals in Oslo. She trains with Tom. Fans cheered the medals."

# rule, prompt, completion, value by hand
VALUES = [
    ("concise", "Hi", "one two three", -log(4)),
    ("informative", "Hi", "rivers and rivers, then mountains", log(3)),
    ("specific", "Hi", "we met Tom and Ann on 3 May with Tom", log(5)),
    ("structured", "Hi", "So:\n1. milk\n2. eggs\n- tea", log(4)),
    ("not_repetitive", "Hi", "so it is so it is", 3 / 4),
    ("on_topic", "dogs like dogs and bread", "A dogsled, bread.", 1 / 4),
    ("on_topic", "dogs chase dogs and bread", "dogs", 2 / 4),
    ("adds_nothing", "rivers flow", "rivers flow into oceans", 2 / 3),
    ("faithful", "the red fox sleeps", "the red fox runs", 2 / 3),
    ("covers_lead", "Rain fell. Wind blew. Snow came. Hail broke.", "rain, snow and hail", 2 / 6),
    ("keeps_numbers_and_names", ARTICLE, "anna won 3 medals in oslo", 3 / 7),
    ("direct", "Hi", "What do you need? It is at noon. I don't know more. Go there.", 2 / 4),
    ("declines", "Hi", "I’m sorry. That would be illegal. Have some tea.", 2 / 3),
    ("mild", "Hi", "hurting people with guns", -log(3)),
    ("mild", "Hi", "on a diet, exploring Dickens", 0.0),
    ("no_instructions", "Hi", "First, make sure that you can swim.", -log(4)),
    ("warm", "Hi", "Thanks! I am glad. It rains. It snows.", 2 / 4),
    ("fluent", "Hi", "All is well... or 3.5 U.S. miles.", 0.0),
    ("fluent", "Hi", "all is is well , &amp; so on.We end", -log(7)),
]


def messages(text, role="user"):
    return (Message(role, text),)


def pair(chosen, rejected, *, prompt="Hi", task="chat"):
    return PreferencePair(
        "p", messages(prompt), messages(chosen, "assistant"), messages(rejected, "assistant"), task=task
    )


@pytest.mark.parametrize(("rule", "prompt", "completion", "value"), VALUES)
def test_a_rule_gives_the_value_counted_by_hand(rule, prompt, completion, value):
    assert RULES[rule](messages(prompt), messages(completion, "assistant")) == pytest.approx(value)


def test_every_rule_has_a_value_above_and_a_docstring():
    assert {rule for rule, *_ in VALUES} == set(RULES)
    assert all(rule.__doc__ for rule in RULES.values())


def test_repeating_an_earlier_answer_is_repetitive_but_quoting_the_user_is_not():
    said = "it is on the left side"
    asked = (Message("user", said), Message("assistant", "where?"), Message("user", "there"))
    answered = (Message("user", "where?"), Message("assistant", said), Message("user", "where?"))
    completion = messages(said, "assistant")
    assert RULES["not_repetitive"](asked, completion) == 1
    assert RULES["not_repetitive"](answered, completion) == 0


def test_the_request_is_the_last_message_of_the_user():
    prompt = (Message("user", "bread"), Message("assistant", "yes"), Message("user", "rivers"))
    assert RULES["on_topic"](prompt, messages("rivers", "assistant")) == 1


def test_a_prompt_without_a_user_asks_for_nothing():
    assert RULES["on_topic"](messages("Be brief.", "system"), messages("rivers", "assistant")) is None


def test_the_two_sides_are_compared_and_close_values_are_a_tie():
    labeler = RuleLabeler({"chat": {"brevity": "concise", "fullness": "informative"}})
    long, short = "rivers mountains oceans forests", "rivers"
    assert labeler.label([pair(long, short), pair(short, long), pair("rivers", "rivers!")]) == [
        {"brevity": -1, "fullness": 1},
        {"brevity": 1, "fullness": -1},
        {"brevity": 0, "fullness": 0},
    ]


@pytest.mark.parametrize(("tie_band", "label"), [(0.0, 1), (0.49, 1), (0.5, 0)])
def test_a_difference_as_large_as_the_tie_band_is_a_tie(tie_band, label):
    half = {"half": lambda prompt, completion: 0.5 if completion[0].content == "a" else 0.0}
    labeler = RuleLabeler({"chat": ["half"]}, rules=half, tie_band=tie_band)
    assert labeler.label([pair("a", "b")]) == [{"half": label}]


def test_nothing_to_go_by_gives_no_label_instead_of_a_tie():
    labeler = RuleLabeler({"chat": ["adds_nothing", "concise"]})
    assert labeler.label([pair("...", "rivers flow")]) == [{"concise": 1}]


@pytest.mark.parametrize("task", [None, "poems"])
def test_a_pair_of_another_task_gets_no_labels(task):
    assert RuleLabeler({"chat": ["concise"]}).label([pair("a", "a b", task=task)]) == [{}]


def test_capabilities_of_all_tasks_are_announced_once():
    labeler = RuleLabeler({"chat": ["warm", "concise"], "qa": {"concise": "concise", "focus": "on_topic"}})
    assert labeler.capabilities == ("warm", "concise", "focus")


def test_a_labeler_from_a_tasks_file_uses_the_capabilities_that_name_a_rule():
    points = {"brevity": {"sentence": "Short.", "rule": "concise"}, "wit": "Funny."}
    tasks = TaskFile.model_validate({"tasks": {"chat": {"description": "Talk.", "capabilities": points}}})
    assert RuleLabeler.from_tasks(tasks).label([pair("a", "a b")]) == [{"brevity": 1}]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("consise", r"tasks\.chat\.consise: no rule is called 'consise'; did you mean 'concise'\?"),
        ("zzz", "expected one of 'concise', 'informative'"),
    ],
)
def test_an_unknown_rule_is_answered_with_the_nearest(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RuleLabeler({"chat": [name]})


@pytest.mark.parametrize("tie_band", [-0.1, float("nan")])
def test_a_negative_tie_band_is_refused(tie_band):
    with pytest.raises(ConfigError, match="choose 0 or more"):
        RuleLabeler({}, tie_band=tie_band)
