"""What the report makes of the lines of metrics.jsonl."""

import pytest

from prefmoe.evaluation.run_folder import LogLine
from prefmoe.evaluation.training_log import (
    AggregatorChoice,
    SplitCounts,
    aggregator_choices,
    split_counts,
    training_series,
)
from prefmoe.evaluation.wording import step_name


def line(step=0, phase="p", **numbers):
    return LogLine.model_validate({"step": step, "phase": phase, **numbers})


def test_a_step_that_was_logged_again_after_a_resume_counts_once():
    log = [line(0, loss=1.0), line(10, loss=0.9), line(20, loss=0.8), line(0, loss=0.5)]
    assert training_series(log).losses == {"training": [(0, 0.5), (10, 0.9), (20, 0.8)]}


def test_every_expert_has_its_curve_and_other_numbers_none():
    log = [
        line(
            step,
            **{"eval_accuracy": 0.5, "eval_accuracy/a@half0": 0.4, "eval_loss": 0.7, "learning_rate": 1e-4},
        )
        for step in (0, 5)
    ] + [line(5, train_loss=0.6)]
    series = training_series(log)
    assert series.mean == [(0, 0.5), (5, 0.5)]
    assert series.experts == {"a@half0": [(0, 0.4), (5, 0.4)]}
    assert series.losses == {"validation": [(0, 0.7), (5, 0.7)]}


@pytest.mark.parametrize(
    "log", [[], [line(lr=0.1)], [line(loss=None)], [line(loss=0.5)], [line(train_loss=1.0)]]
)
def test_a_phase_without_two_steps_has_no_curve(log):
    assert training_series(log) is None


def test_the_last_sitting_says_how_many_pairs_there_are():
    log = [
        line(phase="data", split="train", pairs=9, truncated=1),
        line(phase="data", split="test", pairs=0, truncated=0),
        line(phase="phase1", loss=1.0),
        line(phase="data", split="train", pairs=8, truncated=2, equal=1),
    ]
    assert split_counts(log) == {"train": SplitCounts(pairs=8, truncated=2, equal=1)}


def test_phase_3_tells_what_was_kept_and_why():
    log = [line(phase="phase3", task="a", kept="mlp", **{"accuracy/mlp": 0.9, "evidence/mlp": 0.75})]
    assert aggregator_choices(log) == {"a": AggregatorChoice("mlp", {"mlp": 0.75})}
    assert aggregator_choices([line(phase="phase3", loss=1.0)]) == {}


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("trunk", "Shared lower layers, all texts"),
        ("phase1", "Phase 1: task adapters"),
        ("features_per_task", "Experts' states, Per-task adapters"),
        ("features_half0", "Experts' states, held-out pairs (half0)"),
        ("test_single_wide", "Test pairs, Single, wide"),
        ("my step", "my step"),
    ],
)
def test_steps_have_names_for_people(step, name):
    assert step_name(step) == name
