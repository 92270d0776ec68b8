"""PMoLModel: what PEFT wraps a model in, and how it gets there."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import NoMatchingPeftModuleError, register_peft_method
from torch import Tensor, nn

from prefmoe.errors import CheckpointError, ConfigError, PrefmoeWarning
from prefmoe.policy.config import PMoLConfig
from prefmoe.policy.layer import MERGE_REFUSED, PMoLLinear, Site, block_of
from prefmoe.policy.preferences import as_target, mask_of_batch
from prefmoe.policy.routing import AdapterRouting, RoutedBatch, RouterRecord
from prefmoe.policy.steering import PreferenceWeights, routing_of, set_preference_weights
from prefmoe.suggest import nearest


class PMoLModel(BaseTuner):
    """A model whose linear layers carry banks of LoRA experts in groups, one group a preference.

    Made by `peft.get_peft_model(model, PMoLConfig(...))`; all of PEFT's verbs work on it but merging.

    Attributes:
        routings: What the layers of each adapter share, by adapter.
    """

    prefix: str = "pmol_"
    tuner_layer_cls = PMoLLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    routings: dict[str, AdapterRouting]
    active_adapters: list[str]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter's experts into the model's layers, as PEFT asks for it.

        Raises:
            ConfigError: `target_modules` matches no layer; names the nearest ones.
        """
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(
            config
        )  # PEFT's own, which a refused adapter must not outlive here either
        self.__dict__.setdefault("routings", {})[adapter_name] = AdapterRouting(config)
        wanted = config.target_modules
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            del self.routings[adapter_name]
            raise ConfigError(_no_match(model, wanted)) from error

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Where PEFT takes `adapter_names`, and would ignore it without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "PMoL: adapter_names picks an adapter for every row of a batch, which PMoL cannot; call set_adapter, "
                "or steer every row on its own with set_preference_weights"
            )
        yield

    def _create_and_replace(  # noqa: PLR0917  PEFT's signature
        self,
        peft_config: PMoLConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, PMoLLinear) else _new_layer(target, current_key)
        routing = self.routings[adapter_name]
        site, decides = self._site(current_key, adapter_name, routing)
        layer.update_layer(adapter_name, site, decides=decides)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _site(self, name: str, adapter: str, routing: AdapterRouting) -> tuple[Site, bool]:
        """Where a layer stands, and whether its router is the one that decides there: the first to come."""
        scope = routing.config.router_scope
        decision = {"linear": name, "block": block_of(name) or name, "model": ""}[scope]
        decided = routing.order_of_decisions
        below = decided[-1] if decided else ""
        decides = decision not in decided
        if decides:
            decided.append(decision)
        return Site(name, decision, below, routing), decides

    def _post_injection_hook(self, model: nn.Module, config: PMoLConfig, adapter_name: str) -> None:
        # Hooks and not a `forward` of our own: PEFT's and TRL's wrappers call the inner model in many ways.
        self._ends: list[list[Callable[[], None]]] = []
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Takes our own arguments out of the model's and tells the routers of the batch.

        `preferences` is the preference of every text, for the group loss: (batch,) numbers of groups, -1 for none; or
        (batch, groups) shares. `routing_mask` (batch, seq) says which tokens count, where neither `labels` nor the
        attention mask does. Neither is ever needed to generate or score.
        """
        preferences = kwargs.pop("preferences", None)
        routings = [] if self._is_disabled() else [self.routings[name] for name in self._adapters_in_use()]
        ends: list[Callable[[], None]] = []
        self._ends.append(ends)  # first of all: `_after_forward` comes even if one of these raises
        for routing in routings:
            ends.append(self._begin(routing, args, kwargs, preferences=preferences))
        kwargs.pop("routing_mask", None)
        return args, kwargs

    def _after_forward(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for end in self._ends.pop():
            end()

    def _adapters_in_use(self) -> list[str]:
        layer = next(module for module in self.model.modules() if isinstance(module, PMoLLinear))
        return [name for name in layer.active_adapters if name in self.routings]

    def _begin(
        self,
        routing: AdapterRouting,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        preferences: Tensor | None,
    ) -> Callable[[], None]:
        waiting, routing.waiting_mask = routing.waiting_mask, None  # it was for this batch
        mask = mask_of_batch(args, {"routing_mask": waiting, **kwargs})
        if mask is None:
            return lambda: None
        wanted = routing.waiting_target if preferences is None else preferences
        target = None
        if wanted is not None:
            side = routing.config.group_loss_on
            target = as_target(wanted, routing.groups, batch_size=len(mask), side=side).to(mask.device)
        # The model's mode, not ours: transformers injects adapters and lets the tuner go.
        is_training = self.model.training
        if is_training and torch.is_grad_enabled():
            _refuse_reentrant_checkpointing(self.model, routing.config)
            _warn_without_preferences(routing, target)
        return routing.begin(RoutedBatch(mask, target, is_training))

    def _is_disabled(self) -> bool:
        layer = next((module for module in self.model.modules() if isinstance(module, PMoLLinear)), None)
        return layer is None or layer.disable_adapters

    def set_preference_weights(self, weights: PreferenceWeights, adapter_name: str | None = None) -> None:
        """`prefmoe.set_preference_weights` of this model."""
        set_preference_weights(self.model, weights, adapter_name)

    @contextmanager
    def steered(self, weights: PreferenceWeights, adapter_name: str | None = None) -> Iterator[None]:
        """`set_preference_weights` for the length of a block."""
        routing = routing_of(self.model, adapter_name)
        before = routing.log_factors
        self.set_preference_weights(weights, adapter_name)
        try:
            yield
        finally:
            routing.log_factors = before

    @contextmanager
    def recorded_routing(self, adapter_name: str | None = None) -> Iterator[list[RouterRecord]]:
        """Collects what every router does in the forward passes of a block."""
        routing = routing_of(self.model, adapter_name)
        kept: list[RouterRecord] = []

        def keep(records: Sequence[RouterRecord], batch: RoutedBatch) -> None:
            kept.extend(records)

        routing.listeners.append(keep)
        try:
            yield kept
        finally:
            routing.listeners.remove(keep)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PMoLConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own, and a look at the shapes while the saved file is still at hand.

        Raises:
            CheckpointError: The adapter was trained on a model of another size.
        """
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        own = model.state_dict()
        wrong = [name for name, saved in found.items() if name in own and own[name].shape != saved.shape]
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"PMoL adapter: {len(wrong)} of {len(found)} tensors do not fit this model; {name} is saved as "
                f"{tuple(found[name].shape)}, expected {tuple(own[name].shape)}; load it on the model it was trained on"
            )
        return found

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT does it, and forgets the adapter's routing."""
        super().delete_adapter(adapter_name)
        self.routings.pop(adapter_name, None)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model

    def _check_merge_allowed(self) -> None:
        raise ConfigError(MERGE_REFUSED)


def _new_layer(target: nn.Module, name: str) -> PMoLLinear:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, nn.Embedding | nn.modules.conv._ConvNd) or not _has_widths(base):
        raise ConfigError(
            f"target module {name!r} is a {type(base).__name__}; PMoL's experts sit in linear layers; exclude it"
        )
    in_features, out_features = _get_in_out_features(base)
    return PMoLLinear(target, in_features=in_features, out_features=out_features)


def _has_widths(layer: nn.Module) -> bool:
    pairs = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size"))
    is_conv1d = type(layer).__name__ == "Conv1D"  # GPT-2's linear layer
    return is_conv1d or any(hasattr(layer, a) and hasattr(layer, b) for a, b in pairs)


def _no_match(model: nn.Module, wanted: object) -> str:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    counts: dict[str, int] = {}
    for name in linear:
        counts[name.rpartition(".")[2]] = counts.get(name.rpartition(".")[2], 0) + 1
    names = [wanted] if isinstance(wanted, str) else sorted(wanted) if isinstance(wanted, set) else []
    found = list(dict.fromkeys(near for name in names if (near := nearest(name, counts))))
    shown = ", ".join(f"{name!r} ({counts[name]} modules)" for name in (found or sorted(counts))[:8])
    return (
        f"target_modules={names or wanted!r} matches no module of {type(model).__name__}; "
        f"{'nearest' if found else 'linear layers'}: {shown or 'none'}"
    )


def _warn_without_preferences(routing: AdapterRouting, target: Tensor | None) -> None:
    if target is None and routing.config.group_loss != "none" and not routing.has_warned:
        routing.has_warned = True
        warnings.warn(
            "PMoL trains without preferences, so the group loss does nothing; call "
            "prefmoe.connect_preferences(trainer), or pass preferences= to the model",
            PrefmoeWarning,
            stacklevel=2,
        )


def _refuse_reentrant_checkpointing(model: nn.Module, config: PMoLConfig) -> None:
    """Where decisions cross blocks, reentrant checkpointing would cut their gradient without a word."""
    if config.router_scope != "model" and config.router != "recurrent":
        return
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not getattr(module, "gradient_checkpointing", False) or not isinstance(function, partial):
            continue
        if function.keywords.get("use_reentrant", True):
            raise ConfigError(
                f"router_scope={config.router_scope!r} with router={config.router!r} hands routing from block to block,"
                " which reentrant gradient checkpointing cuts off; set gradient_checkpointing_kwargs="
                "{'use_reentrant': False}, or use router_scope='block' with router='linear'"
            )


register_peft_method(name="pmol", config_cls=PMoLConfig, model_cls=PMoLModel)
