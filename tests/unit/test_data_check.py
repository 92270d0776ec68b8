"""`check_files` names each planted error with its file and line; `describe_pairs` counts by hand."""

import pytest

from data_helpers import assistant, make_pair, row, write_rows
from prefmoe.data import check
from prefmoe.data.check import check_files, write_good_rows
from prefmoe.data.rows import Row
from prefmoe.data.stats import describe_pairs
from prefmoe.errors import DataError


def test_every_planted_error_is_reported_with_its_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    planted = {
        3: row(chosen=""),
        8: row(margin=float("nan")),
        9: row(capabilities={"a": 3}),
        20: row(prompt=7),
    }
    write_rows(path, [planted.get(line, row()) for line in range(1, 21)])
    with path.open("ab") as file:
        file.write(b"\xff\n{\n")
    report = check_files({"train": path})
    assert [problem.line for problem in report.problems] == [3, 8, 9, 20, 21, 22]
    assert {problem.path for problem in report.problems} == {str(path)}
    assert str(report.problems[0]) == f"{path}:3: 'chosen' is empty; drop the row"
    assert (report.num_rows, report.num_pairs) == ({"train": 22}, {"train": 16})


def test_ranked_rows_count_their_pairs(tmp_path):
    ranked = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}
    report = check_files({"train": write_rows(tmp_path / "a.jsonl", [ranked, row()])})
    assert (report.num_rows, report.num_pairs) == ({"train": 2}, {"train": 4})


def test_prompt_in_two_splits_is_a_problem_in_one_split_it_is_none(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [row(prompt="A b"), row(prompt="A b"), row(prompt="c")])
    test = write_rows(tmp_path / "test.jsonl", [row(prompt="d"), row(prompt=" a\nB ")])
    report = check_files({"train": train, "test": test})
    assert [str(problem) for problem in report.problems] == [
        f"{test}:2: the prompt also stands in {train}:1; keep a prompt in one split"
    ]
    assert check_files({"train": train}).problems == []


def test_a_file_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [row()])
    (tmp_path / "empty.jsonl").touch()
    report = check_files({"a": tmp_path / "gone.jsonl", "b": tmp_path / "empty.jsonl", "c": good})
    assert [str(problem) for problem in report.problems] == [
        f"{tmp_path / 'gone.jsonl'}: no such file; check the path",
        f"{tmp_path / 'empty.jsonl'}: has no rows; expected one JSON object a line",
    ]
    assert report.num_pairs == {"a": 0, "b": 0, "c": 1}


def test_one_bad_row_among_many(tmp_path):
    rows = [row(prompt=f"Question {index}?") for index in range(20_000)]
    rows[17_000] = row(weight=float("inf"))
    report = check_files({"train": write_rows(tmp_path / "pairs.jsonl", rows)})
    assert [problem.line for problem in report.problems] == [17_001]
    assert report.num_pairs == {"train": 19_999}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, DataError("gone")])
def test_a_writing_that_stops_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stop):
    def rows(*_, **__):
        yield Row("a.jsonl", 1, row())
        raise stop

    out = write_rows(tmp_path / "good.jsonl", [row(prompt="Old?")])
    before = out.read_bytes()
    monkeypatch.setattr(check, "iter_rows", rows)
    with pytest.raises((KeyboardInterrupt, DataError)):
        write_good_rows(out, "a.jsonl", [])
    assert (list(tmp_path.iterdir()), out.read_bytes()) == ([out], before)


def test_numbers_of_each_task():
    pairs = [
        make_pair(
            "1",
            "ab",
            task="t",
            chosen=assistant("xx"),
            rejected=assistant("x"),
            capabilities={"a": 1, "b": 0},
        ),
        make_pair(
            "2",
            "AB ",
            task="t",
            chosen=assistant("xxxx"),
            rejected=assistant("xxxx!"),
            capabilities={"a": -1},
        ),
        make_pair("3", "abcd", task="t", chosen=assistant("x"), rejected=assistant("y"), target_margin=0.5),
        make_pair("4"),
    ]
    described = describe_pairs(pairs)
    assert list(described) == ["(no task)", "t"]
    assert described["t"] == {
        "pairs": 3,
        "prompts": 2,
        "characters": {"prompt": 3, "chosen": 2, "rejected": 1},
        "chosen_longer": 0.5,
        "with_margin": 1,
        "capabilities": {
            "a": {"chosen": 1, "rejected": 1, "tie": 0},
            "b": {"chosen": 0, "rejected": 0, "tie": 1},
        },
    }
