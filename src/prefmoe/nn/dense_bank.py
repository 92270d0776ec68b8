"""DenseBank: full-size weight deltas of one linear layer, for tasks that were fine-tuned whole."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


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
        """
        added = x.new_zeros(*x.shape[:2], self.weight.shape[1])
        for delta in delta_ids.unique().tolist():
            rows = (delta_ids == delta).nonzero().squeeze(1)
            added = added.index_copy(0, rows, x[rows] @ self.weight[delta].to(x.dtype).T)
        return added
