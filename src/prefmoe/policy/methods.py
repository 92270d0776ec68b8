"""What `prefmoe policy train` compares: PMoL, its ablations and the plain LoRAs, as PEFT configs of one size."""

from collections.abc import Sequence
from typing import Any, get_args

from peft import LoraConfig, PeftConfig
from torch import nn

from prefmoe.policy.config import PMoLConfig
from prefmoe.policy.settings import AdapterSettings, Method, TrainingSettings

METHODS: tuple[Method, ...] = get_args(Method)

# What each ablation or baseline changes of the settings' PMoL.
_CHANGES: dict[str, dict[str, Any]] = {
    "pmol": {},
    "pmol_no_group_loss": {"group_loss": "none"},
    "pmol_no_empty": {"empty_expert": False},
    "pmol_lbc": {"group_loss": "lbc"},
    # Sparse mixtures as they are without preferences: no empty expert, balanced load, scaled by the gate.
    "top1": {"empty_expert": False, "group_loss": "none", "balance_loss": "switch", "top_k": 1},
    "top2": {"empty_expert": False, "group_loss": "none", "balance_loss": "switch", "top_k": 2},
}


def is_pmol(method: str) -> bool:
    """Whether a method's adapter has a router."""
    return method in _CHANGES


def pmol_config(method: str, settings: AdapterSettings, preferences: Sequence[str]) -> PMoLConfig:
    """The adapter of PMoL or one of its variants."""
    values: dict[str, Any] = settings.model_dump() | _CHANGES[method]
    per_group = values.pop("experts_per_group")
    return PMoLConfig(groups=dict.fromkeys(preferences, per_group), task_type="CAUSAL_LM", **values)


def lora_config(settings: AdapterSettings, training: TrainingSettings, *, rank: int) -> PeftConfig:
    """A plain LoRA on the same layers."""
    alpha = training.lora_alpha or 2 * rank
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )


def rank_of_lora(method: str, settings: AdapterSettings, preferences: Sequence[str]) -> int:
    """Rank at which a plain LoRA has as many trainable weights as PMoL's experts (routers are below 1 %).

    Of `lora_average` and `emr`, where each preference has its own LoRA, all together have that many.
    """
    if method in ("lora_average", "emr"):
        return settings.experts_per_group * settings.rank
    return len(preferences) * settings.experts_per_group * settings.rank


def num_trainable(model: nn.Module) -> int:
    """Weights that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
