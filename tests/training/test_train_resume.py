"""Killed at any moment, the same command goes on and ends as if nothing had happened."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

import killed_run
from killed_run import AtCall, AtProgress
from prefmoe.evaluation.run_folder import read_run

# One run, killed once more whenever it has come a little further; in the order of a run.
KILLS = {
    "trunk": AtProgress("shared trunk", 2),
    "router": AtCall("router", "fit"),
    "single_wide, before its first checkpoint": AtProgress("single_wide", 2),
    "single_wide, after a checkpoint": AtProgress("single_wide", 5),
    "shared": AtProgress("shared:", 5),
    "phase1, while a checkpoint is written": AtCall("trainer", "_save_optimizer_and_scheduler", 4),
    "phase1, at its last step": AtProgress("phase1", 8),
    "phase2": AtProgress("phase2", 7),
    "phase2, while its result is written": AtCall("phases", "save_states"),
    "phase3": AtProgress("held-out pairs, half1", 1),
    "aggregators": AtProgress("aggregators", 1),
    "saving": AtCall("train", "save_model", 3),
    "measuring": AtProgress("test pairs, dmoerm", 1),
}


@dataclass
class Killed:
    exit_codes: dict[str, int | None]
    seen: dict[str, set[str]]  # what lay in the run folder after every kill
    folder: Path
    undisturbed: Path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder, undisturbed = (tmp_path_factory.mktemp("resume") / name for name in ("killed", "undisturbed"))
    context = killed_run.fork_server()
    settings = killed_run.settings_of_all_phases(folder)
    exit_codes: dict[str, int | None] = {}
    seen: dict[str, set[str]] = {}
    for name, kill in [*KILLS.items(), ("end", None)]:
        process = context.Process(target=killed_run.run, args=(settings, kill))
        process.start()
        process.join()
        exit_codes[name] = process.exitcode
        files = (file for file in folder.rglob("*") if file.is_file())
        seen[name] = {str(file.relative_to(folder)) for file in files}
    killed_run.run(killed_run.settings_of_all_phases(undisturbed))
    return Killed(exit_codes, seen, folder, undisturbed)


@pytest.mark.parametrize("phase", KILLS)
def test_the_process_is_killed_in_the_phase(killed: Killed, phase: str) -> None:
    assert killed.exit_codes[phase] == -signal.SIGKILL


def test_the_last_command_comes_to_the_end(killed: Killed) -> None:
    assert killed.exit_codes["end"] == 0
    assert not any("checkpoint" in name or ".part" in name for name in killed.seen["end"])


def test_kills_hit_where_they_should(killed: Killed) -> None:
    def has(phase: str, part: str) -> bool:
        return any(part in name for name in killed.seen[phase])

    assert not has("trunk", "steps/")
    assert not has("router", "steps/")
    assert has("single_wide, before its first checkpoint", "steps/router")
    assert not has("single_wide, before its first checkpoint", "checkpoint-")
    assert has("single_wide, after a checkpoint", "checkpoints/single_wide/checkpoint-")
    assert has("shared", "checkpoints/shared/checkpoint-")
    cut = "checkpoints/phase1/checkpoint-8/"
    assert has("phase1, while a checkpoint is written", cut + "experts.safetensors")
    assert not has("phase1, while a checkpoint is written", cut + "trainer_state.json")
    assert has("phase2", "checkpoints/phase2/checkpoint-")
    assert has("phase2, while its result is written", "trainer_state.json")
    assert not has("phase2, while its result is written", "steps/phase2")
    assert has("phase3", "steps/features_half0")
    assert not has("phase3", "steps/features_half1")
    assert "metrics.json" not in killed.seen["saving"]
    assert has("measuring", "dmoerm/model.safetensors")
    assert has("measuring", "steps/test_single_wide")


@pytest.mark.parametrize("step", ["router", "single_wide", "shared", "phase1", "phase2"])
def test_every_step_ends_bitwise_as_undisturbed(killed: Killed, step: str) -> None:
    files = [folder / "steps" / f"{step}.safetensors" for folder in (killed.folder, killed.undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("method", ["single", "single_wide", "per_task", "dmoerm"])
def test_every_model_is_bitwise_the_undisturbed_one(killed: Killed, method: str) -> None:
    files = [folder / method / "model.safetensors" for folder in (killed.folder, killed.undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_metrics_are_the_undisturbed_ones(killed: Killed) -> None:
    found, expected = (
        json.loads((folder / "metrics.json").read_text()) for folder in (killed.folder, killed.undisturbed)
    )
    assert found.pop("seconds").keys() == expected.pop("seconds").keys()
    assert found == expected


def test_every_other_result_is_the_undisturbed_one(killed: Killed) -> None:
    for name in ("router_confusion.json", "expert_correlation.json", "examples.json"):
        assert (killed.folder / name).read_bytes() == (killed.undisturbed / name).read_bytes()


def test_the_log_can_be_read_and_holds_every_step(killed: Killed) -> None:
    steps = [
        {(line.phase, line.step) for line in read_run(folder).log}
        for folder in (killed.folder, killed.undisturbed)
    ]
    assert steps[0] == steps[1]
