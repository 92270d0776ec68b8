"""DenseBank: full-size weight deltas of one linear layer, for tasks that were fine-tuned whole."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefmoe.errors import ShapeError


class DenseBank(nn.Module):
    """What `num_deltas` fully fine-tuned copies of one linear layer add to its output.

    Parameters it owns:
        weight: (deltas, out, in), zeros, so that a new delta adds exactly nothing.

    Args:
        in_features: Width of the layer's input.
        out_features: Width of the layer's output.
        num_deltas: Number of deltas.

    Example:
        >>> DenseBank(4, 3, num_deltas=2).select(torch.ones(5, 7, 4), torch.tensor([0, 1, 1, 0, 1])).shape
        torch.Size([5, 7, 3])
    """

    def __init__(self, in_features: int, out_features: int, *, num_deltas: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_deltas, out_features, in_features))

    def select(
        self, x: Float[Tensor, "rows seq in"], delta_ids: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows seq out"]:
        """What the delta of each row adds, in the dtype of `x`.

        One product per distinct delta: gathering a full matrix for every row would cost more than it saves.

        Args:
            x: Inputs of the linear layer.
            delta_ids: Delta of each row.

        Raises:
            ShapeError: `x` and `delta_ids` do not fit the bank or each other, or a delta does not exist.

        Source:
            Quan 2024, arXiv:2403.01197: phase 1 trains the whole model. Slow form: tests/reference/dense_bank.py.
        """
        num_deltas, out_features, in_features = self.weight.shape
        if x.ndim != 3 or x.shape[2] != in_features or delta_ids.shape != x.shape[:1]:
            raise ShapeError(
                f"DenseBank.select: shapes do not fit; got x {tuple(x.shape)} and delta_ids "
                f"{tuple(delta_ids.shape)}; expected (rows, seq, {in_features}) and (rows,)."
            )
        added = x.new_zeros(*x.shape[:2], out_features)
        for delta in sorted(set(delta_ids.tolist())):
            if not 0 <= delta < num_deltas:
                raise ShapeError(f"DenseBank: there is no delta {delta}; expected 0 to {num_deltas - 1}.")
            rows = (delta_ids == delta).nonzero().squeeze(1)
            added = added.index_copy(0, rows, x[rows] @ self.weight[delta].to(x.dtype).T)
        return added
