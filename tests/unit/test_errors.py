"""The exception tree, walked and not listed by hand: a new error must fit the same laws."""

import inspect
import pickle

import pytest

from prefmoe import errors
from prefmoe.errors import DataError, PrefmoeError, join_problems

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, PrefmoeError)]
BUILT_IN = (ValueError, RuntimeError)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_pickling_and_says_what_it_was_told(cls):
    error = cls("rank=0 is too small")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error) == "rank=0 is too small"


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not PrefmoeError])
def test_an_error_is_one_of_pythons_own_kinds_too(cls):
    assert issubclass(cls, BUILT_IN)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_drawing_of_the_tree_has_every_class_with_its_exit_code(cls):
    lines = [line for line in (errors.__doc__ or "").splitlines() if cls.__name__ in line]
    assert len(lines) == 1
    if cls is not PrefmoeError:
        assert lines[0].endswith(f"exit code {cls.exit_code}")


@pytest.mark.parametrize(
    ("path", "line", "shown"),
    [("a.jsonl", 3, "a.jsonl:3: x"), ("a.jsonl", None, "a.jsonl: x"), (None, None, "x")],
)
def test_a_data_error_names_its_place_and_keeps_it_through_pickling(path, line, shown):
    error = DataError("x", path, line)
    again = pickle.loads(pickle.dumps(error))
    assert str(error) == str(again) == shown
    assert (again.message, again.path, again.line) == ("x", path, line)


def test_twenty_problems_are_shown_and_the_rest_counted():
    problems = [f"problem {i}" for i in range(23)]
    assert join_problems(problems[:20]).splitlines() == problems[:20]
    assert join_problems(problems).splitlines() == [*problems[:20], "... and 3 more"]
