"""Steering a PMoL adapter after training, however its model was loaded."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from prefmoe.errors import ConfigError
from prefmoe.nn import steering_factors
from prefmoe.policy.layer import PMoLLinear
from prefmoe.policy.routing import AdapterRouting

PreferenceWeights = Mapping[str, float] | Sequence[Mapping[str, float]] | None


def set_preference_weights(
    model: nn.Module, weights: PreferenceWeights, adapter_name: str | None = None
) -> None:
    """Steers the mixture: how many times more each group counts than it was trained to.

    Models that PEFT loaded have it as a method. Those that transformers loaded (`AutoModelForCausalLM.from_pretrained`
    of an adapter's folder, `model.load_adapter`) have the experts but not the method; this steers both.

    Args:
        model: That carries a PMoL adapter.
        weights: Factors by group, or "empty"; groups not named keep 1, and 0 turns one off. A list steers every
            text of a batch on its own. None or {} gives back the trained mixture.
        adapter_name: Which adapter; None means the active one.

    Raises:
        ConfigError: Unknown group, negative factor, everything turned off, or no such adapter.
    """
    routing = routing_of(model, adapter_name)
    if not weights:
        routing.log_factors = None
    elif isinstance(weights, Mapping):
        routing.log_factors = steering_factors(dict(weights), routing.groups)
    else:
        rows = [steering_factors(dict(row), routing.groups) for row in weights]
        routing.log_factors = torch.stack(rows).unsqueeze(1)


def routing_of(model: nn.Module, adapter_name: str | None = None) -> AdapterRouting:
    """What the layers of an adapter share; without a name, of the active one.

    It is asked of the layers, for transformers injects adapters and lets the tuner go.

    Raises:
        ConfigError: The model has no such adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, PMoLLinear)]
    found = {name: layer.sites[name].routing for layer in layers for name in layer.pmol_bank}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} carries no PMoL adapter, it cannot be steered; load one first, such as by "
            "PeftModel.from_pretrained(model, 'runs/policy/pmol')"
        )
    wanted = [adapter_name] if adapter_name else layers[0].active_adapters
    for name in wanted:
        if name in found:
            return found[name]
    raise ConfigError(
        f"there is no PMoL adapter {', '.join(map(repr, wanted))} in this model; it has {', '.join(found)}"
    )
