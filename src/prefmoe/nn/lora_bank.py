"""LoraBank: all LoRA experts of one linear layer, stored stacked."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from prefmoe.errors import CheckpointError, ConfigError, ShapeError
from prefmoe.shapes import ExpertIds

ExpertState = dict[str, Tensor]
MixtureWeights = Float[Tensor, "*tokens experts"]


class LoraBank(nn.Module):
    r"""What `num_experts` LoRA experts add to the output of one linear layer.

    Expert $e$ adds $\frac{\alpha}{r} B_e A_e x$. The bank knows neither the layer it belongs to nor who picks
    the experts: `select` takes one expert a row (DMoERM), `mix` a weighted sum of all a token (PMoL).

    Parameters it owns:
        A: (experts, rank, in), Kaiming-uniform as `nn.Linear` starts, each expert on its own.
        B: (experts, out, rank), zeros, so that a new expert adds exactly nothing.

    Args:
        in_features: Width of the layer's input.
        out_features: Width of the layer's output.
        num_experts: Number of experts, at least 1.
        rank: Rank of every expert, at least 1.
        alpha: Scale of every expert; what is added is multiplied by alpha / rank.
        dtype: Dtype of the parameters. `select` and `mix` compute in the dtype of their input.
        device: Where the parameters lie.

    Raises:
        ConfigError: `num_experts` or `rank` is below 1.

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1. Slow form: tests/reference/lora_bank.py.

    Example:
        >>> bank = LoraBank(4, 3, num_experts=2, rank=1, alpha=2.0)
        >>> bank.select(torch.ones(5, 7, 4), torch.tensor([0, 1, 1, 0, 1])).shape
        torch.Size([5, 7, 3])
        >>> bank.mix(torch.ones(5, 7, 4), torch.full((5, 7, 2), 0.5)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        rank: int,
        alpha: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("rank", rank)):
            if value < 1:
                raise ConfigError(f"LoraBank: {name} is too small; got {value}; expected 1 or more.")
        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.rank, self.alpha = num_experts, rank, alpha
        self.A = nn.Parameter(torch.empty(num_experts, rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(num_experts, out_features, rank, dtype=dtype, device=device))
        for expert in range(num_experts):
            self.reset_expert(expert)

    @property
    def scale(self) -> float:
        """Factor of what an expert adds: alpha / rank."""
        return self.alpha / self.rank

    def select(self, x: Float[Tensor, "rows seq in"], expert_ids: ExpertIds) -> Float[Tensor, "rows seq out"]:
        """What the expert of each row adds to the layer's output.

        Args:
            x: Inputs of the linear layer.
            expert_ids: Expert of each row.

        Returns:
            What to add to the linear layer's output, in the dtype of `x`.

        Raises:
            ShapeError: `x` and `expert_ids` do not fit the bank or each other, or an expert does not exist.

        Numerics:
            Parameters are gathered in their own dtype and then cast, so gradients of rows that share an
            expert are summed in the parameters' dtype (float32) even if `x` is bfloat16.
        """
        self._check_rows(x, expert_ids)
        if self.num_experts == 1:  # nothing to gather: one product over all tokens
            return F.linear(F.linear(x, self.A[0].to(x.dtype)) * self.scale, self.B[0].to(x.dtype))
        down = self.A[expert_ids].to(x.dtype).transpose(1, 2)
        up = self.B[expert_ids].to(x.dtype).transpose(1, 2)
        return torch.bmm(torch.bmm(x, down) * self.scale, up)

    def mix(self, x: Float[Tensor, "*tokens in"], weights: MixtureWeights) -> Float[Tensor, "*tokens out"]:
        r"""What a weighted sum of all experts adds: $\frac{\alpha}{r} \sum_e w_e B_e A_e x$ for every token.

        Two products whatever the number of experts: the stacked A, then the stacked B behind the weights.

        Args:
            x: Inputs of the linear layer.
            weights: Weight of every expert for every token. They need not sum to 1: what is missing adds nothing.

        Returns:
            What to add to the linear layer's output, in the dtype of `x`.

        Source:
            DMoERM and PMoL share the bank; stacking is ours. Slow form: tests/reference/lora_bank.py.
        """
        return self.expand(self.shrink(x), weights).to(x.dtype)

    def shrink(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens low"]:
        """All experts' A times x, stacked: the first half of `mix`; low is experts x rank.

        In the dtype of `x`; for a few tokens (`is_few`) in the parameters', for casting all experts costs more there.
        """
        stacked = self.A.flatten(0, 1)
        return F.linear(x.to(stacked.dtype), stacked) if self.is_few(x) else F.linear(x, stacked.to(x.dtype))

    def is_few(self, x: Float[Tensor, "*tokens width"]) -> bool:
        """Whether so few tokens come at once, as when text is generated, that copying the experts would cost most."""
        return x.numel() < 2 * self.rank * x.shape[-1]

    def shrink_beside(
        self, x: Float[Tensor, "*tokens in"], rows: Float[Tensor, "rows in"]
    ) -> tuple[Float[Tensor, "*tokens low"], Float[Tensor, "*tokens rows"]]:
        """`shrink`, and what some more rows (a router's) make of x, in one product."""
        both = F.linear(x, torch.cat([self.A.flatten(0, 1), rows]).to(x.dtype))
        return both[..., : -len(rows)], both[..., -len(rows) :]

    def expand(
        self, low: Float[Tensor, "*tokens low"], weights: MixtureWeights
    ) -> Float[Tensor, "*tokens out"]:
        """The second half of `mix`: what the experts, so weighted, make of their A x.

        Args:
            low: As `shrink` gives it.
            weights: Weight of every expert for every token.

        Returns:
            What to add to the linear layer's output, in the dtype of `low`.
        """
        by_expert = low.reshape(*low.shape[:-1], self.num_experts, self.rank)
        weighted = by_expert * (weights * self.scale).to(low.dtype)[..., None]
        up = self.B.to(low.dtype)
        if self.is_few(low):  # each expert by itself in one call: B need not be copied into one matrix
            added = torch.bmm(weighted.reshape(-1, *weighted.shape[-2:]).transpose(0, 1), up.transpose(1, 2))
            return added.sum(dim=0).view(*low.shape[:-1], self.out_features)
        return F.linear(weighted.flatten(-2), up.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def reset_expert(self, expert: int) -> None:
        """Give one expert new initial values: A random, B zero."""
        self._check_expert(expert)
        nn.init.kaiming_uniform_(self.A[expert], a=math.sqrt(5))
        self.B[expert].zero_()

    def expert_state(self, expert: int) -> ExpertState:
        """Copies of one expert's matrices: {"A": (rank, in), "B": (out, rank)}."""
        self._check_expert(expert)
        return {"A": self.A[expert].detach().clone(), "B": self.B[expert].detach().clone()}

    @torch.no_grad()
    def load_expert(self, expert: int, state: ExpertState) -> None:
        """Overwrite one expert with matrices as `expert_state` gives them, of this or of another bank.

        Raises:
            CheckpointError: `state` has other names than "A" and "B".
            ShapeError: A matrix has another shape, or the expert does not exist.
        """
        self._check_expert(expert)
        if set(state) != {"A", "B"}:
            raise CheckpointError(f"LoraBank: an expert consists of 'A' and 'B'; got {sorted(state)}.")
        targets = {"A": self.A[expert], "B": self.B[expert]}
        for name, target in targets.items():
            if state[name].shape != target.shape:
                raise ShapeError(
                    f"LoraBank: {name!r} of expert {expert} does not fit; got {tuple(state[name].shape)}; "
                    f"expected {tuple(target.shape)}; use the same rank and layer widths."
                )
        for name, target in targets.items():
            target.copy_(state[name])

    def delta_weight(self, expert: int) -> Float[Tensor, "out in"]:
        """What one expert adds to the layer's weight matrix, to merge or export it."""
        self._check_expert(expert)
        return self.scale * (self.B[expert] @ self.A[expert])

    def extra_repr(self) -> str:
        """Sizes, for printing a model."""
        return (
            f"{self.in_features}, {self.out_features}, num_experts={self.num_experts}, "
            f"rank={self.rank}, alpha={self.alpha}"
        )

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise ShapeError(f"LoraBank: there is no expert {expert}; expected 0 to {self.num_experts - 1}.")

    def _check_rows(self, x: Tensor, expert_ids: Tensor) -> None:
        if x.ndim != 3 or x.shape[2] != self.in_features or expert_ids.shape != x.shape[:1]:
            raise ShapeError(
                f"LoraBank.select: shapes do not fit; got x {tuple(x.shape)} and expert_ids "
                f"{tuple(expert_ids.shape)}; expected (rows, seq, {self.in_features}) and (rows,)."
            )
        # On a GPU this look would stop the queue at every layer; there the gather kernel itself objects.
        if expert_ids.device.type == "cpu" and len(expert_ids):
            self._check_expert(int(expert_ids.min()))
            self._check_expert(int(expert_ids.max()))
