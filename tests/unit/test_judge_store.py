"""The store: what is committed is there, what is no store is refused."""

import sqlite3
import threading

import pytest

from judge_helpers import interview, pair, question, settings, task_file
from prefmoe.errors import DataError, OutputError, PrefmoeError
from prefmoe.labeling.judge.answers import Answer
from prefmoe.labeling.judge.labeler import JudgeLabeler
from prefmoe.labeling.judge.store import AnswerStore, Call, default_store


def call(one=None, answer=None, **changes):
    one = one or question()
    values = {"input_tokens": 10, "output_tokens": 2, "usd": 0.5} | changes
    return Call(one, dict.fromkeys(one.points, answer or Answer("1", None, "1", (0.7, 0.2, 0.1))), **values)


def test_what_was_recorded_is_there_when_the_file_is_opened_again(tmp_path):
    refused = Answer(None, "refused", "I cannot judge that.")
    with AnswerStore(tmp_path / "sub" / "s.sqlite") as store:
        store.record([call(), call(question("p1"), refused)])
        store.record([call(question("p2", judge="other"))])
    with AnswerStore(tmp_path / "sub" / "s.sqlite") as store:
        assert store.keys("m") == {question().key, question("p1").key}
        assert store.judges() == ["m", "other"]
        assert store.spent("m") == (2, 20, 4, 1.0)
        assert store.spent("nobody") == (0, 0, 0, 0.0)
        first, second = store.answers("m")
        assert (first.pair_id, first.point, first.swapped) == ("p0", "wit", False)
        assert first.answer == Answer("1", None, "1", (0.7, 0.2, 0.1))
        assert second.answer == refused


def test_a_call_is_recorded_as_a_whole_or_not_at_all(tmp_path):
    with AnswerStore(tmp_path / "s.sqlite") as store:
        store.record([call()])
        with pytest.raises(DataError):
            store.record([call(question("p1")), call()])  # the second is there already
        assert store.keys("m") == {question().key}


def test_answers_can_be_read_while_others_come_in(tmp_path):
    with AnswerStore(tmp_path / "s.sqlite") as writer, AnswerStore(tmp_path / "s.sqlite") as reader:
        writer.record([call()])
        reading = reader.answers("m")
        next(reading)
        writer.record([call(question("p1"))])
        reading.close()
        assert len(list(reader.answers("m"))) == 2
        assert sqlite3.connect(tmp_path / "s.sqlite").execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_another_thread_may_record(tmp_path):
    with AnswerStore(tmp_path / "s.sqlite") as store:
        thread = threading.Thread(target=store.record, args=([call()],))
        thread.start()
        thread.join()
        assert len(store.keys("m")) == 1


def test_unusable_answers_can_be_forgotten(tmp_path):
    garbage = Answer(None, "not an allowed answer", "maybe")
    both = next(iter(interview(points_per_call=2).questions(pair("p2"))))
    half = Call(both, {"wit": Answer("1"), "brevity": garbage}, 1, 1, 0.0)
    with AnswerStore(tmp_path / "s.sqlite") as store:
        store.record([call(), call(question("p1"), garbage), half])
        before = store.spent("m")
        assert store.forget_unusable("m", {question().key}) == 0
        assert store.forget_unusable("m", {question().key, question("p1").key}) == 1
        assert store.forget_unusable("m", {both.key, question("p1").key}) == 1
        assert store.keys("m") & {question("p1").key, both.key, question().key} == {question().key}
        assert len(list(store.answers("m"))) == 1
        assert store.spent("m") == before  # what was paid was paid
        store.record([call(question("p1"))])
        assert len(list(store.answers("m"))) == 2


def test_half_a_character_can_be_stored(tmp_path):
    with AnswerStore(tmp_path / "s.sqlite") as store:
        store.record([call(answer=Answer(None, "refused", "no \ud83d"))])
        (stored,) = store.answers("m")
        assert stored.answer.text == "no ?"


def test_who_has_nothing_to_ask_needs_no_claim(tmp_path):
    """Several processes of one training look up the same labels at the same time."""
    path = tmp_path / "s.sqlite"
    with AnswerStore(path) as first, AnswerStore(path) as second:
        first.claim()
        known = [pair("p0")]
        labelers = [JudgeLabeler(settings(), task_file(), store) for store in (first, second)]
        first.record([call(one) for one in labelers[0].interview.questions(known[0])])
        labelers[1].ask(known)
        assert labelers[1].verdicts(known).keys() == labelers[0].verdicts(known).keys() != set()
        with pytest.raises(PrefmoeError, match="another process is asking"):
            labelers[1].ask([*known, pair("p1")])


def test_only_one_claims_a_store(tmp_path):
    with AnswerStore(tmp_path / "s.sqlite") as first, AnswerStore(tmp_path / "s.sqlite") as second:
        first.claim()
        first.claim()
        with pytest.raises(PrefmoeError, match="another process is asking into this store; wait for it"):
            second.claim()
    with AnswerStore(tmp_path / "s.sqlite") as third:
        third.claim()


def test_a_store_lies_beside_the_output(tmp_path):
    assert default_store("a/out.jsonl").as_posix() == "a/out.jsonl.answers.sqlite"


def test_what_is_no_database_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 100, encoding="utf-8")
    with pytest.raises(DataError, match="is not a store of answers, or is damaged .*; restore it, or choose"):
        AnswerStore(path)


def test_a_damaged_store_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    with AnswerStore(path) as store:
        store.record([call(question(f"p{i}")) for i in range(200)])
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with AnswerStore(path) as store, pytest.raises(DataError, match="damaged"):
        list(store.answers("m"))


def test_a_database_of_something_else_is_refused(tmp_path):
    other = sqlite3.connect(tmp_path / "s.sqlite")
    other.execute("CREATE TABLE cats (name)")
    other.close()
    with pytest.raises(DataError, match="is a database of something else; choose another --store"):
        AnswerStore(tmp_path / "s.sqlite")


def test_a_store_of_another_format_is_refused(tmp_path):
    AnswerStore(tmp_path / "s.sqlite").close()
    newer = sqlite3.connect(tmp_path / "s.sqlite")
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    with pytest.raises(DataError, match="is a store of format 7; this prefmoe reads format 1"):
        AnswerStore(tmp_path / "s.sqlite")


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the store cannot be made; .*; choose another --store"):
        AnswerStore(tmp_path / "file" / "s.sqlite")
    with pytest.raises(OutputError, match="the store cannot be used"):
        AnswerStore(tmp_path)
