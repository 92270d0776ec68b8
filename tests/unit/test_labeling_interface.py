from dataclasses import dataclass

import pytest

from prefmoe.errors import DataError
from prefmoe.labeling import ColumnLabeler, LabelCounts, apply_labels, count_labels
from prefmoe.records import Message, PreferencePair


def pair(id_, capabilities=(), task="chat"):
    text = (Message("user", id_),)
    return PreferencePair(id_, text, text, text, task=task, capabilities=dict(capabilities))


@dataclass
class ScriptedJudge:
    """What an LLM judge will be: named, slow to ask, and without an answer where its two orders disagree."""

    answers: dict
    capabilities: tuple = ("warmth", "logic")
    name: str = "judge"

    def label(self, pairs):
        return [self.answers.get(item.id, {}) for item in pairs]


def labels(pairs):
    return [dict(item.capabilities) for item in pairs]


def test_the_first_labeler_wins_and_the_others_fill_its_gaps():
    first, second = ScriptedJudge({"a": {"warmth": 1}}), ScriptedJudge({"a": {"warmth": -1, "logic": 0}})
    assert labels(apply_labels([pair("a"), pair("b")], [first, second])) == [{"warmth": 1, "logic": 0}, {}]


def test_labels_of_the_row_win_unless_they_are_dropped():
    rows = [pair("a", {"warmth": -1, "wit": 1})]
    judge = ScriptedJudge({"a": {"warmth": 1, "logic": 1}})
    assert labels(apply_labels(rows, [judge])) == [{"warmth": -1, "wit": 1, "logic": 1}]
    assert labels(apply_labels(rows, [judge], keep_existing=False)) == [{"warmth": 1, "logic": 1}]


def test_a_column_labeler_ranks_chosen_columns_among_the_others():
    rows = [pair("a", {"warmth": -1, "wit": 1})]
    judge = ScriptedJudge({"a": {"warmth": 1}})
    ranked = apply_labels(rows, [ColumnLabeler(("warmth",)), judge], keep_existing=False)
    assert labels(ranked) == [{"warmth": -1}]


def test_pairs_given_are_left_alone():
    rows = [pair("a")]
    apply_labels(rows, [ScriptedJudge({"a": {"warmth": 1}})])
    assert labels(rows) == [{}]


def test_columns_are_found_in_order():
    rows = [pair("a", {"wit": 1}), pair("b", {"logic": 0, "wit": -1})]
    assert ColumnLabeler.from_pairs(rows).capabilities == ("wit", "logic")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"warmth": 2}, "labeler 'judge', pair 'a': 'warmth' is 2; expected 1"),
        ({"humor": 1}, "'humor' is not one of its capabilities; expected 'warmth' or 'logic'"),
    ],
)
def test_a_wrong_label_names_the_labeler_and_the_pair(answer, sentence):
    with pytest.raises(DataError, match=sentence):
        apply_labels([pair("a")], [ScriptedJudge({"a": answer})])


def test_a_labeler_that_loses_rows_is_refused():
    judge = ScriptedJudge({})
    judge.label = lambda pairs: []
    with pytest.raises(DataError, match="gave labels for 0 of 1 pairs"):
        apply_labels([pair("a")], [judge])


def test_counts_by_task_and_capability():
    rows = [pair("a", {"wit": 1}), pair("b", {"wit": 1}), pair("c", {"wit": -1}), pair("d", {"wit": 0})]
    rows += [pair("e"), pair("f", {"wit": 0}, task="facts")]
    chat, facts = count_labels(rows)
    assert chat == LabelCounts("chat", "wit", pairs=5, chosen=2, rejected=1, ties=1)
    assert chat.separation == pytest.approx(3 / 5)
    assert chat.agreement == pytest.approx(2 / 3)
    assert facts.agreement is None
