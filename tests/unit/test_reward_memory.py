"""Scoring with 5 x 5 experts needs hardly more memory than one plain reward model."""

import pytest
import torch
from harness.loads import made_up_texts
from harness.memory import LiveBytes, peak_bytes, stored_bytes
from harness.models import expert_rewards, random_reward_model
from harness.peers import as_sequence_classifier, rewards_by_classifier

from tiny import tiny_backbone

BUDGET = 800  # tokens of a forward pass
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def test_live_bytes_counts_what_lives_at_one_time_and_no_views():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        first = before + 1  # 4,000 bytes
        del first
        second = torch.zeros(500)
        third = second[:10].exp()  # a view, and 40 bytes of its own
        assert live.now == 2040
        before.view(10, 100).t()
    assert live.peak == 4000
    assert live.now == 2040
    del second, third
    assert live.now == 0


@pytest.mark.parametrize("split_layer", [0, 2])
@pytest.mark.parametrize("target_modules", [ATTENTION, MLP], ids=["attention", "MLP"])
def test_scoring_with_five_tasks_of_five_experts_takes_the_peak_of_one_plain_model(
    target_modules, split_layer
):
    backbone = tiny_backbone(hidden=64)
    ours = random_reward_model(
        backbone, experts=5, tasks=5, split_layer=split_layer, target_modules=target_modules
    )
    plain = as_sequence_classifier(ours, backbone)
    texts = made_up_texts(10, 2, prompt_tokens=50, completion_tokens=30, vocabulary=300)
    mine = peak_bytes(lambda: expert_rewards(ours, texts, BUDGET))
    theirs = peak_bytes(lambda: rewards_by_classifier(plain, texts, BUDGET))
    assert 0 < mine <= 1.1 * theirs


def test_a_second_task_adds_experts_and_heads_and_no_backbone():
    backbone = tiny_backbone()
    one, two = (random_reward_model(backbone, experts=5, tasks=tasks, split_layer=2) for tasks in (1, 2))
    added = stored_bytes([two]) - stored_bytes([one])
    expected = stored_bytes([one]) - stored_bytes([one.backbone])
    assert added == pytest.approx(expected, abs=1000)  # the router's scales are there once
