"""What is asked, in which words, and under which key."""

from dataclasses import replace

import pytest

from data_helpers import user
from judge_helpers import interview, pair, question, task_file
from prefmoe.errors import ConfigError, DataError
from prefmoe.labeling.judge.questions import choose_points, digest, estimated_tokens, hash_pair
from prefmoe.labeling.judge.wording import Wording


def questions(one, **changes):
    return list(interview(**changes).questions(one))


def test_every_point_is_asked_in_both_orders():
    asked = questions(pair())
    assert [(q.points, q.swapped) for q in asked] == [
        (("wit",), False),
        (("wit",), True),
        (("brevity",), False),
        (("brevity",), True),
    ]
    given, swapped = asked[:2]
    assert given.group == swapped.group
    assert given.key != swapped.key
    assert given.user.index("chosen p0") < given.user.index("rejected p0")
    assert swapped.user.index("rejected p0") < swapped.user.index("chosen p0")


def test_questions_on_the_same_texts_begin_alike():
    wit, _, brevity, _ = questions(pair())
    shared = wit.user.index('"It is funny."')
    assert wit.user[:shared] == brevity.user[:shared]


def test_no_form_of_a_single_answer_is_shown_which_a_small_model_would_repeat():
    for asked in (questions(pair())[0], questions(pair(), wording=Wording("zh"))[0]):
        ending = asked.user[asked.user.index(asked.ending) :]
        assert "{" not in ending
        assert all(f'"{answer}"' not in ending for answer in asked.allowed)


def test_one_call_may_ask_several_points():
    asked = questions(pair(), points_per_call=5)
    assert [(q.points, q.swapped) for q in asked] == [(("wit", "brevity"), False), (("wit", "brevity"), True)]
    assert '{"wit": "?", "brevity": "?"}' in asked[0].user


def test_points_that_the_row_labels_are_not_asked_unless_they_are_to_be_checked():
    labelled = pair(capabilities={"wit": 1})
    assert [q.points for q in questions(labelled)] == [("brevity",)] * 2
    assert len(questions(labelled, skip_labelled=False)) == 4
    assert questions(pair(capabilities={"wit": 1, "brevity": 0})) == []


CHANGES = {
    "judge": ({"judge": "other"}, {}),
    "language": ({"wording": Wording("zh")}, {}),
    "ties": ({"wording": Wording(ties=False)}, {}),
    "cut": ({"wording": Wording(max_characters=5)}, {}),
    "points asked together": ({"points_per_call": 2}, {}),
    "prompt": ({}, {"prompt": user("other")}),
    "chosen": ({}, {"chosen": user("chosen p0")}),  # another role: other texts
    "rejected": ({}, {"rejected": user("other")}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_depends_on_judge_wording_texts_and_points(name):
    options, fields = CHANGES[name]
    assert questions(replace(pair(), **fields), **options)[0].key != question().key


def test_a_key_depends_on_the_sentences_of_its_own_task_only():
    tasks = task_file()
    for edit, same in [("It is funny.", False), ("It is short.", True), ("Talk.", False), ("Facts.", True)]:
        text = tasks.model_dump_json().replace(edit, "Edited.")
        edited = type(tasks).model_validate_json(text)
        assert (questions(pair(), tasks=edited.tasks)[0].key == question().key) is same


def test_a_key_does_not_depend_on_id_labels_or_other_columns():
    other = pair("p0", capabilities={"brevity": 1}, weight=2.0, source="x")
    assert questions(replace(other, id="q"))[0].key == question().key


def test_parts_of_a_digest_keep_their_borders():
    assert digest("ab", "c") != digest("a", "bc")
    assert len(hash_pair(pair())) == 32


def test_long_texts_lose_the_beginning_of_the_conversation_and_the_end_of_answers():
    long = pair(chosen="x" * 9 + "END", rejected="y" * 9 + "END")
    asked = questions(replace(long, prompt=user("BEGIN" + "z" * 9)), wording=Wording(max_characters=9))[
        0
    ].user
    assert "[...]" + "z" * 9 in asked
    assert "x" * 9 + "[...]" in asked
    assert "END" not in asked.replace("[END", "")


def test_braces_in_texts_and_points_are_text():
    asked = questions(pair(chosen="{0} {x} {{}}"))[0]
    assert "{0} {x} {{}}" in asked.user


def test_chinese_questions_use_chinese_words_and_sentences():
    asked = question(wording=Wording("zh"))
    assert "“它很有趣。”" in asked.user
    assert "助手" not in asked.user
    assert "Point" not in asked.user


def test_missing_chinese_sentences_are_all_named():
    with pytest.raises(ConfigError) as raised:
        Wording("zh").check(task_file().tasks)
    assert "tasks.chat.description_zh" in str(raised.value)
    assert "tasks.chat.capabilities.brevity.sentence_zh" in str(raised.value)
    assert "capabilities.wit" not in str(raised.value)
    Wording("en").check(task_file().tasks)


def test_ties_are_offered_or_not():
    assert question().allowed == ("1", "2", "0")
    no_ties = question(wording=Wording(ties=False))
    assert no_ties.allowed == ("1", "2")
    assert "with 0" in question().user
    assert "with 0" not in no_ties.user
    assert "0" in question(wording=Wording("zh")).ending
    assert "0" not in question(wording=Wording("zh", ties=False)).ending


def test_the_only_task_takes_pairs_without_one():
    tasks = {"facts": task_file().tasks["facts"]}
    asked = questions(pair(task=None), tasks=tasks, points={"facts": ("truth",)})
    assert {q.task for q in asked} == {"facts"}


def test_all_tasks_that_the_file_does_not_have_are_named():
    with pytest.raises(DataError) as raised:
        interview().check([pair("a"), pair("b", task="fact"), pair("c", task="xyz"), pair("d", task=None)])
    message = str(raised.value)
    assert "1 pairs, the first is 'b': task 'fact' is not in the tasks file; did you mean 'facts'?" in message
    assert "task 'xyz' is not in the tasks file; it has 'chat', 'facts'" in message
    assert "the first is 'd': no 'task'; name one of 'chat', 'facts'" in message


def test_points_can_be_chosen_and_an_unknown_one_is_answered_with_the_nearest():
    assert choose_points(task_file(), ["wit"]) == {"chat": ("wit",), "facts": ()}
    with pytest.raises(ConfigError, match=r"point 'truht' is not in the tasks file; did you mean 'truth'\?"):
        choose_points(task_file(), ["truht"])
    with pytest.raises(ConfigError, match="it has 'wit', 'brevity', 'truth'"):
        choose_points(task_file(), ["zzz"])


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("abcd", 1), ("abcde", 2), ("你好", 2), ("你好abcd", 3)]
)
def test_tokens_are_estimated_by_script(text, tokens):
    assert estimated_tokens(text) == tokens
