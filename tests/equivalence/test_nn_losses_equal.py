"""The Bradley-Terry loss is the one TRL trains with, and its gradients are right."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from prefmoe.nn import bradley_terry_loss


def trl_loss(chosen, rejected, **columns):
    """What TRL's RewardTrainer computes from these rewards: its own code, without a model around it."""
    from trl.trainer.reward_trainer import RewardTrainer

    rewards = torch.cat([chosen, rejected]).unsqueeze(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    model = lambda **_: SimpleNamespace(logits=rewards)  # noqa: E731
    return RewardTrainer.compute_loss(trainer, model, dict(columns))


@pytest.mark.parametrize("with_margin", [False, True])
def test_the_loss_is_the_one_of_trl(with_margin):
    torch.manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 50, dtype=torch.float64) * 5
    target_margin = margin.abs() if with_margin else None
    columns = {"margin": target_margin} if with_margin else {}
    ours = bradley_terry_loss(chosen, rejected, target_margin=target_margin)
    torch.testing.assert_close(ours, trl_loss(chosen, rejected, **columns))


def test_a_certain_label_is_binary_cross_entropy_on_the_margin():
    torch.manual_seed(0)
    chosen, rejected, label = torch.randn(3, 50, dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(chosen - rejected, label.sigmoid())
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, label=label.sigmoid()), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_pass_gradcheck(reduction):
    torch.manual_seed(0)
    inputs = [torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(5)]

    def loss(chosen, rejected, target_margin, weight, label):
        return bradley_terry_loss(
            chosen, rejected, target_margin=target_margin, weight=weight, label=label, reduction=reduction
        )

    assert torch.autograd.gradcheck(loss, inputs)


def test_bfloat16_rewards_are_computed_in_float32():
    rewards = torch.randn(2, 50).bfloat16()
    loss = bradley_terry_loss(*rewards)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, bradley_terry_loss(*rewards.float()), rtol=0, atol=0)
