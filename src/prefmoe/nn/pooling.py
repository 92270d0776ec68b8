"""From states of tokens to one state a text: everything that depends on where the padding is.

Padding is what the mask says, never "tokens that equal the pad id": where pad and end of text share an id,
the latter rule drops the last real token and scores chosen and rejected alike.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from prefmoe.errors import ShapeError
from prefmoe.shapes import States

AnyMask = Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"]
Positions = Int[Tensor, " batch"]


def pack_left(
    tokens: Shaped[Tensor, "batch seq *rest"], mask: AnyMask
) -> tuple[Shaped[Tensor, "batch seq *rest"], Positions]:
    """Move the real tokens of each row to its front, in order, whatever the mask looks like.

    Left padding, right padding and holes all become right padding, so that positions count from 0 and causal
    attention needs no mask to keep padding away from real tokens.

    Args:
        tokens: Token ids (batch, seq), or states (batch, seq, hidden).
        mask: True or 1 where a token is real.

    Returns:
        The same tokens reordered (after the real ones come the others, in their old order), and the number
        of real tokens of each row.

    Example:
        >>> ids, lengths = pack_left(torch.tensor([[0, 7, 0, 8]]), torch.tensor([[0, 1, 0, 1]]))
        >>> ids.tolist(), lengths.tolist()
        ([[7, 8, 0, 0]], [2])
    """
    real = mask.bool()
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    return tokens[rows, order], real.sum(dim=1)


def pad_left(rows: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Rows of token ids as one batch with padding (id 0) in front, and its attention mask.

    Args:
        rows: Token ids, one tensor a row.

    Example:
        >>> ids, mask = pad_left([torch.tensor([7]), torch.tensor([8, 9])])
        >>> ids.tolist(), mask.tolist()
        ([[0, 7], [8, 9]], [[0, 1], [1, 1]])
    """
    seq = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), seq, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, seq - len(row) :] = row
        mask[index, seq - len(row) :] = 1
    return ids, mask


def mean_tokens(states: States, starts: Positions, ends: Positions) -> Float[Tensor, "batch hidden"]:
    """Mean state of the tokens at positions start <= i < end of each row, in float32 or wider.

    An empty span (start >= end) gives the state of the last token before `end`: a completion that was cut
    away still has the state from which it would have begun.

    Args:
        states: States of the tokens. Those outside a span are never read; they may even be nan.
        starts: First position of each span, at least 0.
        ends: Position after the last one of each span, from 1 to seq.

    Returns:
        One state a row.

    Raises:
        ShapeError: A span leaves the row.

    Example:
        >>> states = torch.tensor([[[1.0], [2.0], [4.0], [9.0]]])
        >>> mean_tokens(states, torch.tensor([1]), torch.tensor([3])).tolist()
        [[3.0]]
    """
    seq = states.shape[1]
    _check_range("ends", ends, low=1, high=seq)
    starts = torch.minimum(starts, ends - 1)
    _check_range("starts", starts, low=0, high=seq)
    positions = torch.arange(seq, device=states.device)
    inside = (positions >= starts.unsqueeze(1)) & (positions < ends.unsqueeze(1))
    dtype = torch.promote_types(states.dtype, torch.float32)
    total = states.where(inside.unsqueeze(2), 0.0).sum(dim=1, dtype=dtype)
    return total / (ends - starts).unsqueeze(1)


def _check_range(name: str, positions: Tensor, *, low: int, high: int) -> None:
    wrong = positions[(positions < low) | (positions > high)]
    if len(wrong):
        raise ShapeError(
            f"pooling: {name} lie outside the {high} tokens of a row; got {wrong[0].item()}; "
            f"expected {low} to {high}; drop rows without real tokens."
        )
