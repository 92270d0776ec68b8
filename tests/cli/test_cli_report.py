"""`prefmoe report`: the path on stdout, a sentence for a wrong folder."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

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


def test_asking_for_help_loads_no_plotting():
    code = "import sys, prefmoe.cli.report; print({*sys.modules} & {'matplotlib', 'torch', 'numpy'})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
