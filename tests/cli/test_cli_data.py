"""`prefmoe data`: a table of arguments, exit codes and output."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from data_helpers import row, write_rows
from prefmoe.cli.data import app
from prefmoe.errors import DataError


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_good_files_exit_0_and_say_nothing_on_stdout(tmp_path):
    result = run("check", write_rows(tmp_path / "train.jsonl", [row(), row()]))
    assert (result.exit_code, result.stdout) == (0, "")
    assert "1 files, 2 rows, 2 usable pairs, 0 problems" in result.stderr


def test_bad_rows_exit_3_with_one_line_each(tmp_path):
    path = write_rows(tmp_path / "train.jsonl.gz", [row(), row(chosen=""), row(rejected=5)])
    result = run("check", path)
    assert result.exit_code == 3
    assert result.stdout.splitlines() == [
        f"{path}:2: 'chosen' is empty; drop the row",
        f"{path}:3: 'rejected' has the wrong type; got 5; expected text or a list of messages",
    ]
    assert "1 files, 3 rows, 1 usable pairs, 2 problems" in result.stderr


def test_prompt_in_two_files_of_a_folder(tmp_path):
    write_rows(tmp_path / "test.jsonl", [row()])
    write_rows(tmp_path / "train.jsonl", [row(prompt="Other?"), row()])
    (tmp_path / "README.md").touch()
    result = run("check", tmp_path)
    assert result.exit_code == 3
    assert result.stdout == (
        f"{tmp_path}/train.jsonl:2: the prompt also stands in {tmp_path}/test.jsonl:1; "
        "keep a prompt in one split\n"
    )


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_good_rows_are_written_in_order_with_all_their_columns(tmp_path, ending):
    rows = [row(prompt=f"Warum {i}? 为什么", note={"half": [i, None, 0.1]}) for i in range(5)]
    path = tmp_path / f"train{ending}"
    bad = [rows[0], row(chosen="", note=None), *rows[1:], row(prompt=" ", note=None)]
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bad), path)
    else:
        write_rows(path, bad)
    out = tmp_path / "good.jsonl"
    result = run("check", path, "--write-good", out)
    assert (result.exit_code, len(result.stdout.splitlines())) == (3, 2)
    assert f"{out}: 5 rows that are right" in result.stderr
    lines = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert "为什么" in lines[0]
    assert run("check", out).exit_code == 0


def test_rows_that_are_no_json_are_left_out_and_half_a_character_survives(tmp_path):
    path, out = tmp_path / "train.jsonl", tmp_path / "good.jsonl"
    odd = row(note="\ud83d and é")  # in a column that nobody reads
    path.write_bytes(b"\n".join([b"{", b"\xff", json.dumps(odd).encode(), b"", json.dumps(row()).encode()]))
    assert run("check", path, "--write-good", out).exit_code == 3
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [odd, row()]


def test_a_file_without_bad_rows_is_copied_and_one_without_good_rows_is_not(tmp_path):
    out = tmp_path / "good.jsonl"
    assert run("check", write_rows(tmp_path / "a.jsonl", [row()]), "--write-good", out).exit_code == 0
    assert json.loads(out.read_text()) == row()
    before = out.read_bytes()
    for source in (write_rows(tmp_path / "b.jsonl", [row(chosen="")]), tmp_path / "gone.jsonl"):
        result = run("check", source, "--write-good", out)
        assert (result.exit_code, out.read_bytes()) == (3, before)
        assert f"{out}: not written; no row is right" in result.stderr


@pytest.mark.parametrize(
    ("sources", "out", "sentence"),
    [
        (["a.jsonl"], "a.jsonl", "is the input file"),
        (["a.jsonl"], "link.jsonl", "is the input file"),
        (["a.jsonl", "b.jsonl"], "good.jsonl", "takes one file, not 2"),
        (["."], "good.jsonl", "takes one file, not 3"),
        (["a.jsonl"], "good.parquet", "name that ends with .jsonl"),
    ],
)
def test_what_good_rows_may_not_be_written_to(tmp_path, monkeypatch, sources, out, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, [row(), row(chosen="")])
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    result = run("check", *sources, "--write-good", out)
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.replace("│", " ").split())
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert not (tmp_path / "good.jsonl").exists()


def test_good_rows_of_a_dataset_name_are_those_of_its_split(tmp_path, monkeypatch):
    splits = {"train": [row()], "test": [row(chosen=""), row(prompt="Other?")]}
    fake = SimpleNamespace(load_dataset=lambda name, *, split: splits[split])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    out = tmp_path / "good.jsonl"
    assert run("check", "someone/pairs", "--split", "test", "--write-good", out).exit_code == 3
    assert json.loads(out.read_text()) == row(prompt="Other?")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("gone.jsonl", "no such file"), ("empty.jsonl", "has no rows"), ("pairs.csv", "unknown kind of file")],
)
def test_unusable_file_exits_3(tmp_path, name, sentence):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "pairs.csv").touch()
    result = run("check", tmp_path / name)
    assert result.exit_code == 3
    assert result.stdout.startswith(f"{tmp_path / name}: {sentence}")


@pytest.mark.parametrize("command", ["check", "stats"])
def test_a_dataset_name_is_read_by_its_split(command, monkeypatch):
    calls = []

    def load_dataset(name, *, split):
        calls.append((name, split))
        return [row()]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for options in ([], ["--split", "test"]):
        result = run(command, "someone/pairs", *options)
        assert result.exit_code == 0, result.stdout
    assert calls == [("someone/pairs", "train"), ("someone/pairs", "test")]


@pytest.mark.parametrize("command", ["check", "stats"])
def test_folder_without_data_is_a_data_error(tmp_path, command):
    result = run(command, tmp_path)
    assert isinstance(result.exception, DataError)
    assert "holds no data file" in str(result.exception)


def test_stats_of_a_bad_file_is_a_data_error(tmp_path):
    result = run("stats", write_rows(tmp_path / "a.jsonl", [row(chosen="")]))
    assert isinstance(result.exception, DataError)


def test_stats_table_is_for_people(tmp_path):
    rows = [row(task="advice", capabilities={"brief": 1}), row(task="facts", margin=1)]
    result = run("stats", write_rows(tmp_path / "a.jsonl", rows))
    assert (result.exit_code, result.stdout) == (0, "")
    for text in ("advice", "facts", "brief:"):
        assert text in result.stderr


def test_stats_json_is_data(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(task="größe")])
    result = run("stats", "--json", path)
    assert result.exit_code == 0
    assert json.loads(result.stdout)[str(path)]["größe"]["pairs"] == 1


def test_no_file_is_a_usage_error():
    assert run("check").exit_code == 2


def test_real_process_without_torch(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(), row(chosen="👩🏽‍🚀\x00", rejected="👩🏽‍🚀\x00")])
    script = "import sys; from prefmoe.cli.data import app; app(standalone_mode=False)"
    script += "; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    arguments = [sys.executable, "-c", script, "stats", str(tmp_path / "a.jsonl")]
    write_rows(tmp_path / "b.jsonl", [row()])
    arguments[-1] = str(tmp_path / "b.jsonl")
    assert subprocess.run(arguments, capture_output=True, check=False).returncode == 0
    checked = subprocess.run(
        [sys.executable, "-c", "from prefmoe.cli.data import app; app()", "check", str(path)],
        capture_output=True,
        check=False,
        text=True,
        encoding="utf-8",
    )
    assert (checked.returncode, checked.stdout) == (
        3,
        f"{path}:2: 'chosen' and 'rejected' are equal; drop the row\n",
    )
