"""Every error of nn says what was got and what to do. Run without a type hook: beartype would come first."""

import pytest
import torch

from prefmoe.errors import CheckpointError, ConfigError, DataError, ShapeError
from prefmoe.nn import (
    LoraBank,
    bradley_terry_loss,
    build_aggregator,
    fit_bradley_terry,
    fit_softmax,
    mean_tokens,
    route,
)


def ids(*values):
    return torch.tensor(values, dtype=torch.long)


@pytest.fixture
def bank():
    return LoraBank(3, 2, num_experts=2, rank=1, alpha=1.0)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: bradley_terry_loss(torch.zeros(1), torch.zeros(1), reduction="avg"),
            ConfigError,
            "got 'avg'; choose 'mean', 'sum' or 'none'",
        ),
        (
            lambda: mean_tokens(torch.zeros(2, 3, 1), ids(0, 0), ids(1, 0)),
            ShapeError,
            "got 0; expected 1 to 3",
        ),
        (
            lambda: mean_tokens(torch.zeros(1, 3, 1), ids(0), ids(4)),
            ShapeError,
            "ends lie outside the 3 tokens of a row; got 4",
        ),
        (
            lambda: mean_tokens(torch.zeros(1, 3, 1), ids(-1), ids(2)),
            ShapeError,
            "starts lie outside the 3 tokens of a row; got -1",
        ),
        (
            lambda: build_aggregator("mpl", num_experts=1, hidden=1),
            ConfigError,
            "got 'mpl'; choose 'task_head', 'linear_scores', 'linear_states' or 'mlp'",
        ),
        (
            lambda: LoraBank(1, 1, num_experts=0, rank=1, alpha=1.0),
            ConfigError,
            "num_experts is too small; got 0",
        ),
        (
            lambda: LoraBank(1, 1, num_experts=1, rank=0, alpha=1.0),
            ConfigError,
            "rank is too small; got 0; expected 1 or more",
        ),
        (
            lambda: route(torch.zeros(1, 2), mode="top2"),
            ConfigError,
            "got 'top2'; choose 'top1', 'given' or 'soft'",
        ),
        (lambda: route(torch.zeros(1, 2), mode="given"), ConfigError, "pass given=task_ids with mode="),
        (lambda: route(torch.zeros(1, 2), given=ids(0)), ConfigError, "got mode='top1'"),
        (
            lambda: route(torch.zeros(1, 2), mode="given", given=ids(2)),
            ShapeError,
            "there is no task 2; expected 0 to 1",
        ),
        (
            lambda: route(torch.zeros(2, 2), mode="given", given=ids(1)),
            ShapeError,
            "1 given tasks for 2 texts",
        ),
        (lambda: fit_bradley_terry(torch.zeros(1, 1), l2=0.0), ConfigError, "above 0 .* got 0.0; try 0.001"),
        (
            lambda: fit_softmax(torch.zeros(1, 1), ids(0), num_classes=1, l2=float("nan")),
            ConfigError,
            "above 0 .* got nan",
        ),
        (lambda: fit_bradley_terry(torch.tensor([[torch.nan]]), l2=1.0), DataError, "hold nan or inf"),
        (
            lambda: fit_softmax(torch.tensor([[torch.inf]]), ids(0), num_classes=1, l2=1.0),
            DataError,
            "hold nan or inf; drop those rows",
        ),
        (
            lambda: fit_softmax(torch.zeros(1, 1), ids(3), num_classes=3, l2=1.0),
            ShapeError,
            "unknown label; got 3; expected 0 to 2",
        ),
    ],
)
def test_the_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize(
    ("x", "expert_ids"),
    [
        (torch.zeros(2, 3), ids(0, 0)),
        (torch.zeros(2, 4, 5), ids(0, 0)),
        (torch.zeros(2, 4, 3), ids(0)),
        (torch.zeros(2, 4, 3), ids(0, 0).unsqueeze(1)),
    ],
)
def test_inputs_that_do_not_fit_a_bank(bank, x, expert_ids):
    with pytest.raises(ShapeError, match=r"expected \(rows, seq, 3\) and \(rows,\)"):
        bank.select(x, expert_ids)


@pytest.mark.parametrize("expert", [-1, 2])
def test_an_expert_that_does_not_exist(bank, expert):
    calls = [
        lambda: bank.select(torch.zeros(2, 4, 3), ids(0, expert)),
        lambda: bank.reset_expert(expert),
        lambda: bank.expert_state(expert),
        lambda: bank.load_expert(expert, {}),
        lambda: bank.delta_weight(expert),
    ]
    for call in calls:
        with pytest.raises(ShapeError, match=f"no expert {expert}; expected 0 to 1"):
            call()


def test_a_state_that_is_no_expert_of_this_bank_changes_nothing(bank):
    before = bank.expert_state(0)
    with pytest.raises(CheckpointError, match=r"'A' and 'B'; got \['A'\]"):
        bank.load_expert(0, {"A": before["A"]})
    with pytest.raises(ShapeError, match=r"'B' of expert 0 does not fit; got \(2, 4\); expected \(2, 1\)"):
        bank.load_expert(0, {"A": torch.ones(1, 3), "B": torch.ones(2, 4)})
    assert torch.equal(bank.A[0], before["A"])
