"""All LoRA experts of a model: one stacked bank per target layer, one linear head per expert."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefmoe.backbone.layers import run_layers
from prefmoe.errors import CheckpointError, ConfigError
from prefmoe.nn import DenseBank, LoraBank, Packing, mean_tokens
from prefmoe.suggest import nearest

# "<site>.A", "<site>.B", "head.weight", "head.bias" of one expert; "<site>.delta" too where its task was fully tuned
ExpertState = dict[str, Tensor]


Spans = Sequence[tuple[int, int]]  # an expert and on how many tokens it works, in the order of the tokens


class Selection:
    """Which expert works on which tokens right now; None switches all experts off.

    A layer of transformers has no argument for it, so it is set around every layer call (also when gradient
    checkpointing calls the layer again) by `Experts.run`, and read by the hooks.
    """

    spans: Spans | None = None

    @contextmanager
    def use(self, spans: Spans) -> Iterator[None]:
        """Selects experts for the tokens of the calls inside the `with` block."""
        before, self.spans = self.spans, spans
        try:
            yield
        finally:
            self.spans = before


class ExpertHook:
    """Adds the selected experts' output to that of a frozen linear layer.

    A class and not a closure, so that `copy.deepcopy` of a model gives hooks on the copied banks.
    """

    def __init__(self, experts: "Experts", site: str) -> None:
        self.experts, self.site = experts, site

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of `module`."""
        spans = self.experts.selection.spans
        if spans is None:
            return output
        added = []
        # Experts with equally many tokens are rows of one product: all of them, where a model scores.
        for expert_ids, rows in _rows_of_experts(inputs[0][0], spans):
            what = self.experts.sites[self.site].select(rows, expert_ids)
            if self.site in self.experts.dense:
                dense_ids = self.experts.dense_ids[expert_ids]
                what = what + self.experts.dense[self.site].select(rows, dense_ids)
            added.append(what.flatten(0, 1))
        return output.add_(
            added[0] if len(added) == 1 else torch.cat(added)
        )  # in place: a copy would be the peak


def _rows_of_experts(tokens: Tensor, spans: Spans) -> Iterator[tuple[Tensor, Tensor]]:
    """Experts and their tokens, shape (experts, seq, width), for neighbors with the same number of tokens."""
    first = 0
    for number, alike in groupby(spans, key=lambda span: span[1]):
        expert_ids = torch.tensor([expert for expert, _ in alike], device=tokens.device)
        end = first + number * len(expert_ids)
        yield expert_ids, tokens[first:end].unflatten(0, (len(expert_ids), number))
        first = end


class Experts(nn.Module):
    """LoRA experts on the upper layers of a backbone, with their heads.

    Owns `sites` (one LoraBank per target linear layer), `head_weight` (experts, hidden) and `head_bias` (experts,),
    zero at the start and float32. Does not own the backbone: `attach` hooks the banks into one, `detach`
    takes them out again and leaves the backbone as it was.

    With `num_dense`, every site also has that many full-size deltas (fully fine-tuned tasks); `dense_ids` (experts,)
    says which one an expert stands on.
    """

    dense_ids: Tensor
    sites: Any  # nn.ModuleDict of LoraBank, and of DenseBank: torch has no type that says of what
    dense: Any

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        num_experts: int,
        num_dense: int = 0,
        split_layer: int,
        rank: int,
        alpha: float,
        target_modules: Sequence[str],
        pooling: str = "last",
    ) -> None:
        super().__init__()
        self.split_layer, self.pooling, self.num_experts = split_layer, pooling, num_experts
        self.sites, self.dense = nn.ModuleDict(), nn.ModuleDict()
        for path, linear in find_sites(backbone, split_layer, target_modules):
            widths = (linear.in_features, linear.out_features)
            site = path.replace(".", "/")  # ModuleDict keys may not hold dots
            self.sites[site] = LoraBank(*widths, num_experts=num_experts, rank=rank, alpha=alpha)
            if num_dense:
                self.dense[site] = DenseBank(*widths, num_deltas=num_dense)
        self.register_buffer("dense_ids", torch.zeros(num_experts, dtype=torch.long))
        hidden = backbone.config.hidden_size
        self.head_weight = nn.Parameter(torch.zeros(num_experts, hidden))
        # Cancels in the margin of a pair, so its gradient is rounding noise, which Adam would make steps of.
        self.head_bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)
        self.selection = Selection()
        self.gradient_checkpointing = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def store_in(self, dtype: torch.dtype) -> None:
        """Stores the banks in the dtype of the backbone, in which they compute anyway: half the memory, equal scores.

        For models that score; what is trained needs its float32. Heads stay float32.
        """
        self.sites.to(dtype)
        self.dense.to(dtype)

    def attach(self, backbone: PreTrainedModel) -> None:
        """Hooks the banks into the backbone's target layers."""
        for site in self.sites:
            linear = backbone.get_submodule(site.replace("/", "."))
            self._handles.append(linear.register_forward_hook(ExpertHook(self, site)))

    def detach(self) -> None:
        """Takes the banks out; the backbone is then as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def states(
        self,
        backbone: PreTrainedModel,
        trunk: Tensor,
        packing: Packing,
        starts: Tensor,
    ) -> Tensor:
        """Pooled state of every text under its expert.

        Args:
            backbone: The one that the banks are attached to.
            trunk: States below the experts, shape (any number, hidden).
            packing: Of the texts; its tokens are places in `trunk`, its owners experts.
            starts: First token of the completion of every text, shape (texts,).

        Returns:
            float32, shape (texts, hidden).
        """

        def call(layer: nn.Module, rows: Tensor, **kwargs: object) -> Tensor:
            with self.selection.use(packing.spans):
                return layer(rows, **kwargs)

        states = run_layers(
            backbone,
            trunk[packing.tokens.to(trunk.device)],  # bound to no name here: gone when the second layer runs
            backbone.layers[self.split_layer :],
            packing,
            call=call,
            gradient_checkpointing=self.gradient_checkpointing and self.training,
        )
        lengths = packing.lengths.to(starts.device)
        # Where a completion was cut away, the last token stands for it.
        starts = lengths - 1 if self.pooling == "last" else starts.minimum(lengths - 1)
        completions = packing.unpack(backbone.norm(states), starts)
        return mean_tokens(completions, torch.zeros_like(starts), lengths - starts).float()

    def scores(self, states: Tensor, expert_ids: Tensor) -> Tensor:
        """Score of every row by the head of its expert, float32, shape (rows,)."""
        return (states * self.head_weight[expert_ids]).sum(-1) + self.head_bias[expert_ids]

    def expert_state(self, expert: int) -> ExpertState:
        """A copy of everything that one expert is made of."""
        state = {
            f"{site}.{name}": tensor.detach().clone()
            for site, bank in self.sites.items()
            for name, tensor in bank.expert_state(expert).items()
        }
        for site, dense in self.dense.items():
            state[f"{site}.delta"] = dense.weight[self.dense_ids[expert]].detach().clone()
        state["head.weight"] = self.head_weight[expert].detach().clone()
        state["head.bias"] = self.head_bias[expert].detach().clone()
        return state

    @torch.no_grad()
    def load_expert(self, expert: int, state: Mapping[str, Tensor]) -> None:
        """Overwrites one expert.

        Raises:
            CheckpointError: a tensor is missing, is not known, or has another shape; it is named.
        """
        expected = self.expert_state(expert)
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        if missing or extra:
            raise CheckpointError(
                f"expert {expert}: missing tensors {missing[:3]}, unknown tensors {extra[:3]}"
            )
        for name, tensor in expected.items():
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"expert {expert}: {name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
        for site, bank in self.sites.items():
            bank.load_expert(expert, {name: state[f"{site}.{name}"] for name in ("A", "B")})
        for site, dense in self.dense.items():
            dense.weight[self.dense_ids[expert]] = state[f"{site}.delta"]
        self.head_weight[expert] = state["head.weight"]
        self.head_bias[expert] = state["head.bias"]


def find_sites(
    backbone: PreTrainedModel, split_layer: int, target_modules: Sequence[str]
) -> list[tuple[str, nn.Linear]]:
    """Path and module of every linear layer from `split_layer` on whose last name is a target.

    Raises:
        ConfigError: a target matches nothing; the nearest name is given.
    """
    linears = [
        (f"layers.{index}.{path}", module)
        for index in range(split_layer, len(backbone.layers))
        for path, module in backbone.layers[index].named_modules()
        if isinstance(module, nn.Linear)
    ]
    names = {path.rsplit(".", 1)[-1] for path, _ in linears}
    unknown = [target for target in target_modules if target not in names]
    if unknown:
        raise ConfigError(
            f"target_modules={unknown!r} match no linear layer of {type(backbone).__name__}; "
            f"nearest: {nearest(unknown[0], names)!r}; there are {sorted(names)}"
        )
    return [(path, module) for path, module in linears if path.rsplit(".", 1)[-1] in target_modules]
