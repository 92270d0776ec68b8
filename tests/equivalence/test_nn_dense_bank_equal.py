"""DenseBank is its slow twin, and a linear layer whose weights were changed."""

import pytest
import torch
from torch import nn

from prefmoe.errors import ShapeError
from prefmoe.nn import DenseBank
from reference.dense_bank import select as slow_select

NUM_DELTAS, IN, OUT = 3, 5, 4
DELTA_IDS = torch.tensor([2, 0, 2, 1])


@pytest.fixture
def bank():
    bank = DenseBank(IN, OUT, num_deltas=NUM_DELTAS)
    nn.init.normal_(bank.weight)
    return bank


def test_select_is_the_slow_form(bank):
    bank.double()
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    slow = slow_select(x.tolist(), bank.weight.tolist(), DELTA_IDS.tolist())
    torch.testing.assert_close(bank.select(x, DELTA_IDS), torch.tensor(slow, dtype=torch.float64))


def test_a_layer_plus_its_delta_is_the_layer_with_changed_weights(bank):
    linear, x = nn.Linear(IN, OUT), torch.randn(4, 3, IN)
    ours = linear(x) + bank.select(x, DELTA_IDS)
    for row, delta in enumerate(DELTA_IDS):
        changed = nn.functional.linear(x[row], linear.weight + bank.weight[delta], linear.bias)
        torch.testing.assert_close(ours[row], changed)


def test_a_new_bank_adds_exactly_nothing():
    assert not DenseBank(IN, OUT, num_deltas=2).select(torch.randn(2, 3, IN), torch.tensor([1, 0])).any()


def test_gradients_pass_gradcheck_and_reach_only_the_deltas_that_were_used(bank):
    bank.double()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    used = torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda x, *_: bank.select(x, used), (x, bank.weight))
    bank.select(x, used).sum().backward()
    assert bank.weight.grad[0].any()
    assert bank.weight.grad[2].any()
    assert not bank.weight.grad[1].any()


def test_bfloat16_rows_give_bfloat16_and_float32_gradients(bank):
    x = torch.randn(4, 3, IN)
    added = bank.select(x.bfloat16(), DELTA_IDS)
    assert added.dtype == torch.bfloat16
    torch.testing.assert_close(added.float(), bank.select(x, DELTA_IDS), rtol=0.03, atol=0.1)
    added.float().sum().backward()
    assert bank.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("delta", [-1, 3])
def test_a_delta_that_does_not_exist_is_named(bank, delta):
    with pytest.raises(ShapeError, match=f"no delta {delta}; expected 0 to 2"):
        bank.select(torch.randn(1, 3, IN), torch.tensor([delta]))
