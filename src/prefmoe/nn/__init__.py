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
from prefmoe.nn.pooling import last_token, mean_tokens, pack_left
from prefmoe.nn.probe import fit_bradley_terry, fit_softmax
from prefmoe.nn.routing import Routing, RoutingMode, TaskRouter, route, router_features

__all__ = [
    "AggregatorKind",
    "DenseBank",
    "LoraBank",
    "Routing",
    "RoutingMode",
    "TaskRouter",
    "bradley_terry_loss",
    "build_aggregator",
    "fit_bradley_terry",
    "fit_softmax",
    "last_token",
    "mean_reward",
    "mean_tokens",
    "pack_left",
    "route",
    "router_features",
    "uncertainty_weighted",
    "worst_case",
]
