"""prefmoe: align language models to competing preferences with mixtures of LoRA experts.

    from prefmoe import Completion, RewardModel, read_pairs

Importing prefmoe makes `transformers.AutoModelForSequenceClassification` load its reward models, and PEFT its
adapters. It imports neither torch nor transformers itself: names are loaded when they are first used.
"""

import importlib
import typing

from prefmoe import import_hook

if typing.TYPE_CHECKING:
    from prefmoe.data.read import read_completions, read_pairs
    from prefmoe.data.world import World
    from prefmoe.policy.config import PMoLConfig
    from prefmoe.policy.shared_prompts import share_prompts
    from prefmoe.policy.steering import set_preference_weights
    from prefmoe.policy.trainers import PMoLDPOTrainer, connect_preferences
    from prefmoe.policy.tuner import PMoLModel
    from prefmoe.records import Completion, Message, PreferencePair, RewardReport
    from prefmoe.reward.config import DMoERMConfig
    from prefmoe.reward.model import DMoERMForSequenceClassification
    from prefmoe.reward.score import RewardModel

_HOMES = {
    "Completion": "prefmoe.records",
    "DMoERMConfig": "prefmoe.reward.config",
    "DMoERMForSequenceClassification": "prefmoe.reward.model",
    "Message": "prefmoe.records",
    "PMoLConfig": "prefmoe.policy.config",
    "PMoLDPOTrainer": "prefmoe.policy.trainers",
    "PMoLModel": "prefmoe.policy.tuner",
    "PreferencePair": "prefmoe.records",
    "RewardModel": "prefmoe.reward.score",
    "RewardReport": "prefmoe.records",
    "World": "prefmoe.data.world",
    "connect_preferences": "prefmoe.policy.trainers",
    "read_completions": "prefmoe.data.read",
    "read_pairs": "prefmoe.data.read",
    "set_preference_weights": "prefmoe.policy.steering",
    "share_prompts": "prefmoe.policy.shared_prompts",
}

__all__ = [
    "Completion",
    "DMoERMConfig",
    "DMoERMForSequenceClassification",
    "Message",
    "PMoLConfig",
    "PMoLDPOTrainer",
    "PMoLModel",
    "PreferencePair",
    "RewardModel",
    "RewardReport",
    "World",
    "connect_preferences",
    "read_completions",
    "read_pairs",
    "set_preference_weights",
    "share_prompts",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'prefmoe' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


import_hook.import_after("transformers.models.auto.configuration_auto", "prefmoe.reward.config")
import_hook.import_after("peft", "prefmoe.policy.tuner")
