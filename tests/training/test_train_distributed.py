"""Two processes, started by `accelerate launch`, train the model that one process trains.

`--multi_gpu` is accelerate's name for "several processes on this machine"; without it, it starts one on CPUs.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import launched_run
from cli_helpers import run_cli, write_config
from data_helpers import CHATML, byte_tokenizer
from prefmoe.evaluation.metrics import read_metrics
from prefmoe.evaluation.run_folder import read_run
from prefmoe.reward.artefact import read_tensors
from prefmoe.reward.checkpoints import load_states
from tiny import tiny_backbone

_TESTS = Path(launched_run.__file__).parent
_ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
_ANY_PORT = ["--main_process_port", "0"]  # another test may have the usual one
_LAUNCH = [
    *(*_ACCELERATE, *_ANY_PORT, "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the run of one process and of that of two."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [*_LAUNCH, str(_TESTS / "launched_run.py"), str(folder / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_TESTS)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launched:
        launched_run.main(folder / "one")  # while the others import torch
        printed, _ = launched.communicate(timeout=240)
    assert launched.returncode == 0
    assert {line for line in printed.splitlines() if line.startswith("process")} == {
        "process 0 of 2",
        "process 1 of 2",
    }
    return folder / "one", folder / "two"


def differences(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> Iterator[float]:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        yield (tensor.double() - two[name].double()).abs().max().item() if tensor.numel() else 0.0


@pytest.mark.parametrize("step", ["router", "phase1", "phase2"])
def test_experts_of_two_processes_are_those_of_one(runs: tuple[Path, Path], step: str) -> None:
    (one, info), (two, other) = (load_states(run / "steps" / f"{step}.safetensors") for run in runs)
    assert one.keys() == two.keys()
    assert info == other  # validation accuracies
    for name, state in one.items():
        assert max(differences(state, two[name])) < 1e-4


@pytest.mark.parametrize("method", ["single", "dmoerm"])
def test_the_model_of_two_processes_is_that_of_one(runs: tuple[Path, Path], method: str) -> None:
    one, two = (read_tensors(run / method) for run in runs)
    assert max(differences(one, two)) < 1e-3


def test_the_metrics_of_two_processes_are_those_of_one(runs: tuple[Path, Path]) -> None:
    one, two = (json.loads((run / "metrics.json").read_text()) for run in runs)
    del one["seconds"], two["seconds"]
    assert one == two


def test_only_one_process_writes_the_log(runs: tuple[Path, Path]) -> None:
    one, two = ([(line.phase, line.step) for line in read_run(run).log] for run in runs)
    assert one == two


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs, the command is for as many of them")
def test_the_command_in_the_docs_trains_in_two_processes_on_cpus(tmp_path: Path) -> None:
    page = (_TESTS.parent / "docs" / "reward.md").read_text(encoding="utf-8")
    (documented,) = re.findall(r"`accelerate launch (.* reward train CONFIG\.yaml)`", page)
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "backbone")
    config = write_config(tmp_path, tmp_path / "backbone")
    arguments = shlex.split(documented.replace("CONFIG.yaml", shlex.quote(str(config))))
    done = subprocess.run(
        [*_ACCELERATE, *_ANY_PORT, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run' / 'report.html'}\n"
    assert done.stderr.count("pairs of 2 tasks, in 2 processes") == 1  # one of them speaks
    one = run_cli("reward", "train", config, "--out", tmp_path / "one")
    assert "pairs of 2 tasks\n" in one.stderr
    found, expected = (read_metrics(tmp_path / run / "metrics.json") for run in ("run", "one"))
    assert found.methods == expected.methods
