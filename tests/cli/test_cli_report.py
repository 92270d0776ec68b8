"""`prefmoe report`: the path on stdout, a sentence for a wrong folder."""

import errno
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from prefmoe.cli.app import app as everything
from prefmoe.cli.report import report
from prefmoe.errors import DataError

app = typer.Typer()
app.command()(report)


def test_it_prints_the_path_of_the_report(tmp_path):
    (tmp_path / "config.yaml").write_text("backbone: tiny\n")
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'report.html'}\n")
    assert "backbone: tiny" in (tmp_path / "report.html").read_text()


def test_a_wrong_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="give the folder that training wrote") as caught:
        CliRunner().invoke(app, [str(tmp_path / "none")], catch_exceptions=False)
    assert caught.value.exit_code == 3


def test_a_full_disk_is_one_sentence_and_exit_5(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("backbone: tiny\n")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = CliRunner().invoke(everything, ["report", str(tmp_path)])
    sentence = (
        "report.html: could not be written; No space left on device; free space or choose another folder.\n"
    )
    assert (result.exit_code, result.stdout) == (5, "")
    assert result.stderr == f"{tmp_path}/{sentence}"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_asking_for_help_loads_no_plotting():
    code = "import sys, prefmoe.cli.report; print({*sys.modules} & {'matplotlib', 'torch', 'numpy'})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
