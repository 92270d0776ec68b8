"""Legend of the dimension names in every shape annotation, and the few tensor types used everywhere.

batch    texts                      pairs    preference pairs        rows     (text, expert) combinations
seq      tokens, padding included   hidden   width of the backbone   experts  LoRA experts of a bank
tasks    outer classes              rank     LoRA rank               in/out   width of a linear layer
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Rewards = Float[Tensor, " pairs"]
States = Float[Tensor, "batch seq hidden"]
Mask = Bool[Tensor, "batch seq"]
TokenIds = Int[Tensor, "batch seq"]
ExpertIds = Int[Tensor, " rows"]
