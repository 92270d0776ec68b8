"""A linear layer with a bank of LoRA experts beside it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from prefmoe.errors import ConfigError
from prefmoe.nn import LoraBank, RecurrentRouter, TokenRouter
from prefmoe.policy.routing import AdapterRouting

_BLOCK = re.compile(r"^(.*?\.\d+)\.")

MERGE_REFUSED = (
    "PMoL cannot be merged: what its experts add depends on the token. `prefmoe policy export` writes a plain LoRA "
    "with fixed preference weights, an approximation that can be merged and served by vLLM"
)


def block_of(name: str) -> str:
    """Name of the block that a layer lies in ("model.layers.3" of "model.layers.3.mlp.up_proj"), "" outside any.

    Example:
        >>> block_of("model.layers.3.mlp.up_proj"), block_of("lm_head")
        ('model.layers.3', '')
    """
    found = _BLOCK.match(name)
    return found[1] if found else ""


@dataclass(frozen=True)
class Site:
    """Where a layer stands in the routing of one adapter."""

    name: str
    decision: (
        str  # under which key its routing is decided: its own name, its block's, or "" of the whole model
    )
    below: str  # key of the decision below, for recurrent routers
    routing: AdapterRouting


class PMoLLinear(nn.Module, BaseTunerLayer):
    r"""What PEFT puts in a linear layer's place: the layer, and for every adapter its experts and maybe its router.

    The layer's output is $W x + \frac{\alpha}{r} \sum_e w_e B_e A_e x$. The weights $w$ are decided by a router: this
    layer's own, or that of the first layer of its block or of the model (`PMoLConfig.router_scope`).

    Containers hold one module an adapter, whose parameters lie directly in it: PEFT and TRL find adapters in names
    of the form `container.adapter.parameter`, and silently lose those that are deeper. The class has "Linear" in its
    name, by which PEFT finds it again when a second adapter targets "all-linear".

    Args:
        base_layer: The linear layer, of any kind that has an input and an output width; it stays as it is.
        in_features: Its input width.
        out_features: Its output width.
    """

    # Of PEFT's base class, which has no types.
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    adapter_layer_names = ("pmol_bank", "pmol_router", "pmol_cell")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, *, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.pmol_bank = nn.ModuleDict()
        self.pmol_router = nn.ModuleDict()
        self.pmol_cell = (
            nn.ModuleDict()
        )  # of recurrent routers: in the first layer of the model, shared by all
        self.sites: dict[str, Site] = {}
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, site: Site, *, decides: bool) -> None:
        """Adds an adapter's experts.

        Args:
            adapter: Its name.
            site: Where this layer stands in its routing.
            decides: Whether this layer's router decides for all layers with the same `site.decision`.
        """
        config = site.routing.config
        self.sites[adapter] = site
        self.pmol_bank[adapter] = LoraBank(
            self.in_features,
            self.out_features,
            num_experts=site.routing.groups.num_experts,
            rank=config.rank,
            alpha=config.alpha,
        )
        if decides:
            self._add_router(adapter, site)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_router(self, adapter: str, site: Site) -> None:
        config, routing = site.routing.config, site.routing
        choices = routing.groups.num_choices
        if config.router == "linear":
            self.pmol_router[adapter] = TokenRouter(self.in_features, num_choices=choices)
            return
        self.pmol_router[adapter] = RecurrentRouter(
            self.in_features, num_choices=choices, size=config.router_size
        )
        if routing.cell is None:
            routing.cell = nn.GRUCell(config.router_size, config.router_size, bias=False)
            self.pmol_cell[adapter] = routing.cell

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The linear layer's output, and what the active adapters add."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter in self.pmol_bank:
                result = result + self._added(x, adapter).to(result.dtype)
        return result

    def _added(self, x: Tensor, adapter: str) -> Tensor:
        bank, site = self.pmol_bank[adapter], self.sites[adapter]
        assert isinstance(bank, LoraBank)
        if adapter in self.pmol_router:
            low, logits = self._shrink_and_route(x, adapter, bank)
            weights = site.routing.decide(
                logits, router=site.name, block=site.decision, training=self.training
            )
        else:
            low, weights = bank.shrink(x), site.routing.follow(site.decision, x)
        return bank.expand(low, weights[..., : bank.num_experts])

    def _shrink_and_route(self, x: Tensor, adapter: str, bank: LoraBank) -> tuple[Tensor, Tensor]:
        router, site = self.pmol_router[adapter], self.sites[adapter]
        if isinstance(router, RecurrentRouter):
            logits, state = router(x, site.routing.state_below(site.below), site.routing.cell)
            site.routing.keep_state(site.decision, state)
            return bank.shrink(x), logits
        # In full precision the router's rows ride in the experts' product; else it needs a float32 one of its own.
        assert isinstance(router, TokenRouter)
        is_exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        if is_exact and not bank.is_few(x):
            return bank.shrink_beside(x, router.weight)
        return bank.shrink(x), router(x)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Does nothing: it is never merged."""

    def __repr__(self) -> str:
        return "pmol." + super().__repr__()
