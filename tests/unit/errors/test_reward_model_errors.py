"""What the model says about a routing mode, tasks or an aggregator that do not exist."""

import pytest
import torch

from data_helpers import CHATML, assistant, byte_tokenizer, user
from prefmoe.data.render import Renderer
from prefmoe.errors import ConfigError, ShapeError
from prefmoe.records import Completion
from prefmoe.reward.score import RewardModel
from tiny import tiny_reward_model

IDS = torch.randint(7, 300, (4, 8), generator=torch.Generator().manual_seed(1))


def test_an_unknown_routing_mode():
    sentence = "unknown mode; got 'best'; choose 'top1', 'given' or 'soft'"
    with pytest.raises(ConfigError, match=sentence):
        tiny_reward_model()(IDS, routing="best")
    reward_model = RewardModel(tiny_reward_model(), Renderer(byte_tokenizer(CHATML), max_length=60))
    with pytest.raises(ConfigError, match=sentence):
        reward_model.score([Completion("1", user("?"), assistant("!"))], routing="best")


def test_another_number_of_given_tasks_than_texts():
    with pytest.raises(ShapeError, match="1 given tasks for 4 texts"):
        tiny_reward_model()(IDS, task_ids=torch.tensor([0]), routing="given")


def test_an_unknown_aggregator():
    with pytest.raises(ConfigError, match="unknown kind; got 'sum'"):
        tiny_reward_model(aggregators=["mlp", "mlp", "sum"])
