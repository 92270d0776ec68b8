"""Files, folders and dataset names into records; every bad row named with its line."""

import json
import pickle
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from data_helpers import assistant, row, user, write_rows
from prefmoe.data.read import read_completions, read_pairs
from prefmoe.data.rows import Problem, iter_rows
from prefmoe.errors import DataError

ROUND_TRIPS = {
    "emoji": "👩🏽‍🚀 \U0001f9e0",
    "right to left": "שלום, مرحبا \u202eabc\u202c",
    "NUL byte": "a\x00b",
    "line ends": "a\r\nb\u2028c\u2029d\x85e\x0bf",
    "quotes": "\"'\\",
    "noncharacter": "\ufdd0\uffff",
    "combining": "e\u0301 \u1112\u1161",
}


@pytest.mark.parametrize("text", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("as_ascii", [True, False], ids=["escaped", "raw"])
def test_any_text_survives(tmp_path, text, ending, as_ascii):
    path = tmp_path / f"pairs{ending}"
    values = row(prompt=text, chosen=text + "!", rejected=text + "?")
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([values]), path)
    elif as_ascii:
        write_rows(path, [values])
    else:
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(json.dumps(values, ensure_ascii=False).encode())
    (pair,) = read_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        user(text),
        assistant(text + "!"),
        assistant(text + "?"),
    )


def test_byte_order_mark_windows_lines_and_blank_lines_are_no_problem(tmp_path):
    path = tmp_path / "pairs.jsonl"
    line = json.dumps(row()).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [pair.id for pair in read_pairs(path)] == ["pairs.jsonl:1", "pairs.jsonl:4"]


def test_parquet_with_messages_and_partial_capabilities(tmp_path):
    chosen = [{"role": "assistant", "content": "A."}]
    rows = [row(chosen=chosen, capabilities={"a": 1}), row(chosen=chosen, capabilities={"b": -1})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    first, second = read_pairs(tmp_path / "pairs.parquet")
    assert (first.chosen, first.capabilities, second.capabilities) == (assistant("A."), {"a": 1}, {"b": -1})
    assert second.id == "pairs.parquet:2"


BAD_LINES = {
    "broken UTF-8": (b'{"prompt": "\xff"}', "broken UTF-8; got byte 0xff at column 13; save as UTF-8"),
    "not JSON": (b"{'prompt'}", "not JSON (Expecting property name"),
    "cut line": (b'{"prompt": "x', 'got \'{"prompt": "x\'; expected one JSON object a line'),
    "no object": (b'["a"]', "not a JSON object; got ['a']; expected {'prompt': ..., ...}"),
    "nested too deeply": (b"[" * 100_000, "nested too deeply"),
    "endless number": (b'{"margin": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit"),
}


@pytest.mark.parametrize(("line", "sentence"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named_and_the_next_one_still_read(tmp_path, line, sentence):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(row()).encode()
    path.write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert sentence in str(caught.value)
    assert (caught.value.path, caught.value.line) == (str(path), 2)
    kinds = [isinstance(item, Problem) for item in iter_rows(path)]
    assert kinds == [False, True, False]


def test_all_bad_rows_are_in_one_error_that_survives_pickling(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [row(chosen=""), row(), *[row(margin=-1)] * 30])
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}:1: 'chosen' is empty; drop the row"
    assert lines[1].startswith(f"{path}:3: 'margin' is -1")
    assert lines[-2] == "... and 11 more"
    assert "`prefmoe data check FILE --write-good NEW.jsonl`" in lines[-1]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.line) == (str(caught.value), 1)


def test_bad_rows_can_be_left_out_only_where_others_are_right(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [row(chosen="")])
    with pytest.raises(DataError, match=r"drop the row$"):
        read_pairs(path)
    path = write_rows(tmp_path / "answers.jsonl", [{"prompt": "p", "completion": "a"}, {"prompt": "p"}])
    with pytest.raises(DataError) as caught:
        read_completions(path)
    assert "data check" not in str(caught.value)  # it checks pairs


def test_one_bad_row_among_many_is_found(tmp_path):
    rows = [row(prompt=f"Question {index}?") for index in range(20_000)]
    rows[13_131] = row(rejected=None)
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DataError, match=r"pairs\.jsonl:13132: 'rejected' is missing"):
        read_pairs(path)


@pytest.mark.parametrize("content", [b"", b"\n\n"], ids=["empty", "blank lines"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"pairs\.jsonl: has no rows; expected one JSON object a line"):
        read_pairs(path)


def test_damaged_archives(tmp_path):
    whole = write_rows(
        tmp_path / "pairs.jsonl.gz", [row(prompt=str(i) * 50) for i in range(500)]
    ).read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "plain": b'{"prompt": 1}',
        "flipped": whole[:-6] + b"x" * 6,
    }.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"the gzip stream is damaged .*; copy the file again"):
            read_pairs(path)
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"pairs\.parquet:1: the Parquet file cannot be read"):
        read_pairs(path)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "gone.json", "./gone", "a/b/c", "/gone"])
def test_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"gone|a/b/c") as caught:
        read_pairs(name)
    assert "no such file; check the path" in str(caught.value)


def test_unknown_ending(tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected")
    with pytest.raises(
        DataError, match=r"pairs\.csv: unknown kind of file; expected a name that ends with \.jsonl"
    ):
        read_pairs(tmp_path / "pairs.csv")


def test_file_that_may_not_be_opened(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "pairs.jsonl", [row()])

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"pairs\.jsonl: cannot be read \(Permission denied\)"):
        read_pairs(path)


def test_folder_gives_the_file_of_the_split(tmp_path):
    write_rows(tmp_path / "train.jsonl", [row()])
    write_rows(tmp_path / "test.jsonl.gz", [row(), row()])
    assert (len(read_pairs(tmp_path)), len(read_pairs(tmp_path, split="test"))) == (1, 2)
    with pytest.raises(
        DataError, match=r"has no validation\..*data files found: \['test.jsonl.gz', 'train.jsonl'\]"
    ):
        read_pairs(tmp_path, split="validation")


def test_dataset_name_goes_to_datasets(monkeypatch):
    calls = []

    def load_dataset(name, *, split):
        calls.append((name, split))
        return [row(), row(id="x")]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    pairs = read_pairs("someone/pairs", split="test")
    assert calls == [("someone/pairs", "test")]
    assert [pair.id for pair in pairs] == ["pairs:1", "x"]


def test_dataset_that_cannot_be_loaded(monkeypatch):
    class DatasetsError(Exception): ...

    def load_dataset(name, *, split):
        raise ConnectionError("Couldn't reach the Hub\nRetry later")

    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    expected = (
        r"'someone/pairs' is no file, and .* split 'train' \(Couldn't reach the Hub\); correct the path"
    )
    with pytest.raises(DataError, match=expected):
        read_pairs("someone/pairs")


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"run pip install 'prefmoe\[datasets\]' or correct the path"):
        read_pairs("someone/pairs")
    (tmp_path / "pairs.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"Parquet needs pyarrow; run pip install 'prefmoe\[datasets\]'"):
        read_pairs(tmp_path / "pairs.parquet")


def test_completions_of_a_file(tmp_path):
    path = write_rows(tmp_path / "answers.jsonl", [{"prompt": "p", "completion": "a"}, row(id="x")])
    assert [record.id for record in read_completions(path)] == ["answers.jsonl:1", "x/chosen", "x/rejected"]
    path = write_rows(tmp_path / "bad.jsonl", [{"prompt": "p"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1: 'completion' is missing"):
        read_completions(path)
