"""A PMoL adapter as a plain LoRA: its mixture frozen at fixed weights, an approximation that can be merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from prefmoe.errors import ConfigError
from prefmoe.nn import LoraBank
from prefmoe.policy.inspect import inspect_routing
from prefmoe.policy.layer import PMoLLinear
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.pairs import Text
from prefmoe.policy.tuner import PMoLModel


class ExportReport(NamedTuple):
    """How far the exported LoRA is from the routed adapter on some texts, nats a completion token."""

    mean_difference: float  # of log-probabilities, absolute
    largest_difference: float
    num_texts: int


def export_lora(
    model: PeftModel, folder: str | Path, *, weights: Mapping[str, float], texts: Sequence[Text] = ()
) -> ExportReport | None:
    r"""Writes $\sum_e \bar w_e B_e A_e$ as one LoRA of rank experts x rank, for merging and for vLLM.

    Every expert of a group gets an equal part of the group's weight, and no token's router is asked any more: this is
    another model. The difference is measured on `texts`.

    Args:
        model: With a PMoL adapter; the active one is exported.
        folder: Where to.
        weights: Weight of each group, 0 or more; they need not sum to 1 (what is missing is the empty expert's).
        texts: To measure the difference on.

    Returns:
        The difference, None without texts.

    Raises:
        ConfigError: No PMoL adapter, or a weight for a group that does not exist.
    """
    tuner = model.base_model
    if not isinstance(tuner, PMoLModel):
        raise ConfigError(f"export: {type(tuner).__name__} is no PMoL adapter; nothing to export")
    adapter = tuner.active_adapters[0]
    groups = tuner.routings[adapter].groups
    if whole := model.peft_config[adapter].modules_to_save:
        raise ConfigError(
            f"export: the adapter also trained {', '.join(whole)} as a whole (modules_to_save), which a plain LoRA "
            "does not hold; save that model with its adapter instead"
        )
    unknown = sorted(set(weights) - set(groups.names))
    if unknown:
        raise ConfigError(f"export: there is no group {unknown[0]!r}; groups are {', '.join(groups.names)}")
    by_expert = torch.tensor(
        [weights.get(groups.names[owner], 0.0) / groups.sizes[owner] for owner in groups.owners]
    )
    layers = {name: layer for name, layer in tuner.model.named_modules() if isinstance(layer, PMoLLinear)}
    found = {name: layer.pmol_bank[adapter] for name, layer in layers.items() if adapter in layer.pmol_bank}
    banks = {name: bank for name, bank in found.items() if isinstance(bank, LoraBank)}
    routed = completion_logps(model, texts) if texts else None
    states = {name: _lora_of(bank, by_expert) for name, bank in banks.items()}
    base = model.unload()
    exported = _plain_lora(base, states)
    exported.save_pretrained(folder)
    if routed is None:
        return None
    lengths = torch.tensor([len(text.completion_ids) for text in texts])
    difference = (completion_logps(exported, texts) - routed).abs() / lengths
    return ExportReport(difference.mean().item(), difference.max().item(), len(texts))


def mean_weights(model: nn.Module, texts: Sequence[Text], preferences: Sequence[str]) -> dict[str, float]:
    """Mean weight of each group over all routers and texts: the fixed weights nearest to what the routers do."""
    table = inspect_routing(model, texts, preferences).table
    rows = torch.tensor(list(table.weights.values())).mean(dim=(0, 1))
    return {name: rows[index].item() for index, name in enumerate(table.groups) if name != "empty"}


def _lora_of(bank: LoraBank, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A (experts x rank, in) and B (out, experts x rank), with scale and weights inside B."""
    scaled = bank.B.detach() * (weights.to(bank.B.device) * bank.scale)[:, None, None]
    return bank.A.detach().flatten(0, 1), scaled.transpose(0, 1).flatten(1)


def _plain_lora(base: nn.Module, states: Mapping[str, tuple[Tensor, Tensor]]) -> PeftModel:
    rank = len(next(iter(states.values()))[0])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(states), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, (down, up) in states.items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up)
    return model.eval()
