"""What DenseBank says about inputs that do not fit."""

import pytest
import torch

from prefmoe.errors import ShapeError
from prefmoe.nn import DenseBank


@pytest.mark.parametrize(
    ("x", "delta_ids"),
    [((2, 3, 6), (2,)), ((2, 5), (2,)), ((2, 3, 5), (3,))],
    ids=["wrong width", "no rows", "wrong number of ids"],
)
def test_inputs_that_do_not_fit_a_bank(x, delta_ids):
    bank = DenseBank(5, 4, num_deltas=2)
    with pytest.raises(ShapeError, match=r"expected \(rows, seq, 5\) and \(rows,\)"):
        bank.select(torch.zeros(x), torch.zeros(delta_ids, dtype=torch.long))
