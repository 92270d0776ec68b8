"""The maths, in pure torch: losses, pooling, LoRA experts, routing, aggregation, convex fits.

Nothing here knows of tokenizers, files, configs or transformers.
"""

from prefmoe.nn.aggregation import (
    AggregatorKind,
    build_aggregator,
    mean_reward,
    uncertainty_weighted,
    worst_case,
)
from prefmoe.nn.dense_bank import DenseBank
from prefmoe.nn.lora_bank import LoraBank
from prefmoe.nn.losses import bradley_terry_loss
from prefmoe.nn.merging import elect_mask_rescale
from prefmoe.nn.packing import (
    AttentionPlan,
    Packing,
    attention_plan,
    packed_attention,
    saved_layer_tokens,
)
from prefmoe.nn.pooling import mean_tokens, pack_left, pad_left
from prefmoe.nn.probe import fit_bradley_terry, fit_softmax
from prefmoe.nn.router_losses import (
    empty_mass_penalty,
    group_hinge_loss,
    group_soft_loss,
    localized_balance_loss,
    mean_by_text,
    routing_entropy,
    switch_balance_loss,
    within_group_balance,
)
from prefmoe.nn.routing import Routing, RoutingMode, TaskRouter, route, router_features
from prefmoe.nn.token_logprobs import TokenLogprobs, scored_logprobs, token_logprobs
from prefmoe.nn.token_routing import (
    ExpertGroups,
    RecurrentRouter,
    TokenRouter,
    float32_linear,
    group_log_masses,
    route_tokens,
    steering_factors,
)

__all__ = [
    "AggregatorKind",
    "AttentionPlan",
    "DenseBank",
    "ExpertGroups",
    "LoraBank",
    "Packing",
    "RecurrentRouter",
    "Routing",
    "RoutingMode",
    "TaskRouter",
    "TokenLogprobs",
    "TokenRouter",
    "attention_plan",
    "bradley_terry_loss",
    "build_aggregator",
    "elect_mask_rescale",
    "empty_mass_penalty",
    "fit_bradley_terry",
    "fit_softmax",
    "float32_linear",
    "group_hinge_loss",
    "group_log_masses",
    "group_soft_loss",
    "localized_balance_loss",
    "mean_by_text",
    "mean_reward",
    "mean_tokens",
    "pack_left",
    "packed_attention",
    "pad_left",
    "route",
    "route_tokens",
    "router_features",
    "routing_entropy",
    "saved_layer_tokens",
    "scored_logprobs",
    "steering_factors",
    "switch_balance_loss",
    "token_logprobs",
    "uncertainty_weighted",
    "within_group_balance",
    "worst_case",
]
