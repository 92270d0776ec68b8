"""How precise the maths is: never below float32."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is wider (float64 in gradient checks).

    Rewards of one prompt often differ by less than bfloat16 can hold (8 bits: steps of 0.004 near 1), so
    heads, pooling and losses are computed in this dtype whatever the backbone uses.

    Example:
        >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
