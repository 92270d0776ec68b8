"""What a training costs: how it is counted, kept and found again."""

import sys

import pytest
import torch
from torch import nn

from prefmoe.policy import costs
from prefmoe.policy.costs import CostCallback, TrainingCosts, peak_memory, read_costs, reset_peak_memory
from prefmoe.policy.settings import DataSettings, PolicySettings
from prefmoe.runs.run import Run

MIB = 2**20
on_linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="peak resident memory is Linux's, for CPUs"
)


@pytest.fixture
def run(tmp_path):
    return Run(PolicySettings(data=DataSettings(train="x"), out=str(tmp_path / "run")))


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(costs, "reset_peak_memory", lambda: True)
    monkeypatch.setattr(costs, "peak_memory", lambda: 77)
    return now


def train(run, name, durations, clock, *, pause=0.0):
    """Calls of a trainer whose model has one trained layer, 6 weights, and a frozen one."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2, bias=False))
    model[0].requires_grad_(False)
    callback = CostCallback(run, name)
    callback.on_train_begin(None, None, None, model=model)
    for duration in durations:
        callback.on_step_begin(None, None, None)
        clock[0] += duration
        callback.on_step_end(None, None, None)
        clock[0] += pause  # a validation
    callback.on_save(None, None, None)
    callback.on_train_end(None, None, None)


def test_seconds_are_the_median_step_without_what_lies_between_steps(run, clock):
    train(run, "a", [5.0, 1.0, 2.0], clock, pause=100.0)
    assert read_costs(run.folder) == {"a": TrainingCosts(trainable=6, seconds_per_step=2.0, peak_bytes=77)}


def test_each_training_has_its_own_and_one_without_a_step_left_keeps_what_it_had(run, clock):
    train(run, "a", [1.0], clock)
    train(run, "b", [4.0], clock)
    train(run, "a", [], clock)
    assert {name: found.seconds_per_step for name, found in read_costs(run.folder).items()} == {
        "a": 1,
        "b": 4,
    }


def test_where_the_system_cannot_tell_the_peak_there_is_none(run, clock, monkeypatch):
    monkeypatch.setattr(costs, "reset_peak_memory", lambda: False)
    train(run, "a", [1.0], clock)
    assert read_costs(run.folder)["a"].peak_bytes is None


def test_a_run_that_never_measured_has_no_costs(run):
    assert read_costs(run.folder) == {}


@on_linux_cpu
def test_peak_memory_counts_what_was_freed_since_but_not_before_the_reset():
    if not reset_peak_memory():
        pytest.skip("this system lets nobody reset the peak")
    before = peak_memory()
    torch.ones(100 * MIB)  # 400 MiB, freed at once
    assert 350 * MIB < peak_memory() - before < 600 * MIB
    reset_peak_memory()
    assert peak_memory() - before < 100 * MIB
