import errno
import json
import os
from pathlib import Path

import pytest
import torch

from prefmoe.errors import CheckpointError, ConfigError, DataError, OutputError
from prefmoe.evaluation.run_folder import read_run
from prefmoe.runs.run import Run
from tiny_run import tiny_bench, tiny_settings


def write(file: Path, value: int) -> None:
    file.write_text(str(value))


def read(file: Path) -> int:
    return int(file.read_text()) * 10


def test_a_step_is_computed_once_and_always_read_back(tmp_path: Path) -> None:
    calls = []

    def compute() -> int:
        calls.append(1)
        return 7

    for _ in range(2):
        assert Run(tiny_settings(tmp_path)).step("seven.txt", compute, write, read) == 70
    assert len(calls) == 1


def test_a_step_that_fails_or_is_cut_leaves_no_result(tmp_path: Path) -> None:
    run = Run(tiny_settings(tmp_path))

    def cut(file: Path, value: int) -> None:
        file.write_text(str(value)[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step("x.txt", lambda: 77, cut, read)
    assert run.step("x.txt", lambda: 8, write, read) == 80


def test_a_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    Run(tiny_settings(tmp_path, seed=1))
    with pytest.raises(ConfigError, match="holds a run with another config; choose another --out"):
        Run(tiny_settings(tmp_path, seed=2))


def test_what_no_step_depends_on_may_differ(tmp_path: Path) -> None:
    Run(tiny_settings(tmp_path, seed=1))
    Run(tiny_settings(tmp_path, seed=2), independent=["seed"])
    with pytest.raises(ConfigError, match="holds a run with another config"):
        Run(tiny_settings(tmp_path, seed=2).model_copy(update={"methods": ["single"]}), independent=["seed"])


def test_a_run_may_be_moved(tmp_path: Path) -> None:
    Run(tiny_settings(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert Run(tiny_settings(tmp_path / "new")).folder == tmp_path / "new"


def test_a_place_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"):
        Run(tiny_settings(tmp_path / "file" / "run"))


def test_config_and_versions_are_kept(tmp_path: Path) -> None:
    Run(tiny_settings(tmp_path))
    assert "split_layer: 1" in (tmp_path / "config.yaml").read_text()
    assert {"prefmoe", "torch", "python"} <= json.loads((tmp_path / "versions.json").read_text()).keys()


def test_log_lines_are_those_that_the_report_reads(tmp_path: Path) -> None:
    run = Run(tiny_settings(tmp_path))
    run.log("data", {"split": "train", "pairs": 3})
    run.log("phase1", {"step": 4, "loss": 0.5})
    assert [(line.phase, line.step) for line in read_run(tmp_path).log] == [("data", 0), ("phase1", 4)]


def test_a_line_cut_by_a_kill_does_not_spoil_the_next(tmp_path: Path) -> None:
    Run(tiny_settings(tmp_path)).log("phase1", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "pha')
    Run(tiny_settings(tmp_path)).log("phase1", {"step": 3})
    assert [line.step for line in read_run(tmp_path).log] == [1, 3]


def test_a_full_disk_while_a_line_is_logged_is_named(tmp_path: Path) -> None:
    run = Run(tiny_settings(tmp_path))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"metrics\.jsonl: could not be written; No space left on device"):
        run.log("phase1", {"step": 1})


def test_seconds_add_up_over_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.5, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("prefmoe.runs.run.time.perf_counter", lambda: next(now))
    for name in ("a", "a", "b"):
        with Run(tiny_settings(tmp_path)).clock(name):
            pass
    assert Run(tiny_settings(tmp_path)).seconds() == {"a": 3.5, "b": 1.0}


def test_seconds_of_a_step_that_fails_count(tmp_path: Path) -> None:
    run = Run(tiny_settings(tmp_path))
    with pytest.raises(KeyboardInterrupt), run.clock("a"):
        raise KeyboardInterrupt
    assert "a" in run.seconds()


def test_no_seconds_at_first(tmp_path: Path) -> None:
    assert Run(tiny_settings(tmp_path)).seconds() == {}


def test_a_full_disk_leaves_no_half_step_and_the_next_run_goes_on(tmp_path: Path) -> None:
    run = Run(tiny_settings(tmp_path))

    def full(file: Path, value: int) -> None:
        file.write_text(str(value)[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        CheckpointError, match=r"x\.txt: could not be written .*No space left on device.*same command"
    ):
        run.step("x.txt", lambda: 77, full, read)
    assert list((tmp_path / "steps").iterdir()) == []
    assert run.step("x.txt", lambda: 8, write, read) == 80


def test_a_step_cut_in_half_is_named(tmp_path: Path) -> None:
    run = Run(tiny_settings(tmp_path))
    run.step("x.txt", lambda: 7, write, read)
    (tmp_path / "steps" / "x.txt").write_text("")
    with pytest.raises(
        CheckpointError, match=r"x\.txt: damaged or cut short .*; delete it to compute it again"
    ):
        run.step("x.txt", lambda: 7, write, read)


def test_inputs_that_changed_since_the_run_began_are_refused(tmp_path: Path) -> None:
    inputs = {"the train pairs": "1", "the test pairs": "2", "the backbone": "3"}
    Run(tiny_settings(tmp_path)).check_inputs(inputs)
    Run(tiny_settings(tmp_path)).check_inputs(inputs)
    with pytest.raises(
        DataError, match="the train pairs and the test pairs changed since this run began; choose"
    ):
        Run(tiny_settings(tmp_path)).check_inputs(inputs | {"the train pairs": "9", "the test pairs": "9"})


def test_a_folder_whose_config_is_no_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="holds a run with another config"):
        Run(tiny_settings(tmp_path))


def test_a_run_does_not_go_on_in_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` may mean another one on the next machine; mixing states of both would be wrong without a word."""
    settings = tiny_settings(tmp_path / "run", backbone={"dtype": "auto"})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert tiny_bench(settings).backbone.dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.raises(DataError, match="the backbone's dtype changed since this run began"):
        tiny_bench(settings)
