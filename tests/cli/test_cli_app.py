"""`prefmoe` itself: exit codes, what errors and warnings look like, and that starting it is cheap."""

import subprocess
import sys
import warnings

import pytest
import typer
from typer.testing import CliRunner

from cli_helpers import run_cli
from prefmoe.cli import app as module
from prefmoe.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    OutputError,
    PrefmoeError,
    PrefmoeWarning,
    ShapeError,
    join_problems,
)


def run_command(command):
    """What people see of a function as the only sub-command."""
    app = typer.Typer(cls=module._Commands)
    app.command("go")(command)
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, ["go"])


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PrefmoeError("the judge failed"), 1),
        (ShapeError("2 rows"), 1),
        (DataError("empty", "a.jsonl", 3), 3),
        (ConfigError("phase1.epoch: unknown key"), 4),
        (CheckpointError("cut short"), 5),
        (OutputError("disk full"), 5),
    ],
)
def test_our_errors_are_one_line_and_an_exit_code(error, code):
    result = run_command(raising(error))
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"{error}\n")


def test_collected_problems_are_a_line_each():
    problems = [f"a.jsonl:{line}: empty" for line in range(1, 24)]
    result = run_command(raising(DataError(join_problems(problems))))
    assert result.stderr.splitlines() == [*problems[:20], "... and 3 more"]


def test_a_bug_keeps_its_traceback_and_exits_1():
    code = "from prefmoe.cli import app as m\n@m.app.command()\ndef boom(): {}['key']\nm.app(['boom'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'key'" in done.stderr


def test_ctrl_c_says_how_to_go_on():
    result = run_command(raising(KeyboardInterrupt()))
    assert (result.exit_code, result.stderr) == (130, "stopped; the same command goes on\n")


def test_only_our_warnings_are_shown():
    def command():
        warnings.warn("few pairs", PrefmoeWarning, stacklevel=1)
        warnings.warn("a library says", UserWarning, stacklevel=1)
        warnings.warn("soon gone", DeprecationWarning, stacklevel=1)

    result = run_command(command)
    assert (result.exit_code, result.stderr) == (0, "warning: few pairs\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rewrd"], "Did you mean 'reward'?"),
        (["reward", "trian"], "Did you mean 'train'?"),
        (["reward", "train"], "Missing argument 'CONFIG.yaml'"),
        (["reward", "score", "model", "in.jsonl"], "Missing option '--out'"),
        (["reward", "score", "model", "in.jsonl", "-o", "x", "--routing", "best"], "'top1', 'soft', 'given'"),
        (["reward", "eval", "model"], "Missing argument 'FILE...'"),
        (["reward", "train", "a.yaml", "--sett", "a=1"], "No such option"),
    ],
)
def test_usage_errors_exit_2(arguments, sentence):
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["reward", "train", "--help"], ["report", "--help"]]
)
def test_starting_imports_no_heavy_library(arguments):
    code = (
        "import sys\nfrom prefmoe.cli.app import app\n"
        f"try: app({arguments})\nexcept SystemExit as end: assert not end.code\n"
        "sys.exit(str({'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
    assert done.stdout


def test_every_command_has_help():
    result = run_cli("--help")
    for name in ("data", "demo", "report", "reward"):
        assert name in result.stdout
