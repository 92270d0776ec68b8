"""Laws of the reward model: what a batch looks like changes no reward, and routing modes agree with each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prefmoe.backbone.packing import pack_texts
from prefmoe.nn import bradley_terry_loss
from tiny import in_place, tiny_reward_model

MODELS = {
    pooling: tiny_reward_model(
        pooling=pooling, aggregators=["mlp", "linear_states", "linear_scores"], response_marker=[5]
    )
    for pooling in ("last", "mean")
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

tokens = st.integers(5, 299)  # 5 is the response marker: some texts have one, some several, some none
text = st.lists(tokens, min_size=1, max_size=8)
texts = st.lists(text, min_size=1, max_size=4)
poolings = st.sampled_from(sorted(MODELS))


@st.composite
def padded_texts(draw):
    """Texts, and a batch of them in which padding stands anywhere and may be any token."""
    drawn = draw(texts)
    width = max(map(len, drawn)) + draw(st.integers(0, 3))
    ids, mask = [], []
    for text in drawn:
        row_mask = draw(st.permutations([1] * len(text) + [0] * (width - len(text))))
        rest = iter(text)
        ids.append([next(rest) if real else draw(st.integers(0, 299)) for real in row_mask])
        mask.append(row_mask)
    return drawn, torch.tensor(ids), torch.tensor(mask)


@given(poolings, padded_texts())
def test_padding_of_any_kind_changes_no_reward_and_a_batch_is_its_rows(pooling, batch):
    drawn, ids, mask = batch
    model = MODELS[pooling]
    with torch.no_grad():
        output = model(ids, mask)
        alone = [model(torch.tensor([text])) for text in drawn]
    for name in ("logits", "task_probs", "capability_scores"):
        rows = torch.cat([getattr(row, name) for row in alone])
        torch.testing.assert_close(getattr(output, name), rows, **CLOSE, equal_nan=True)
    assert torch.equal(output.task_ids, torch.cat([row.task_ids for row in alone]))


@given(poolings, padded_texts(), st.randoms())
def test_the_order_of_texts_is_the_order_of_rewards(pooling, batch, random):
    _, ids, mask = batch
    order = list(range(len(ids)))
    random.shuffle(order)
    with torch.no_grad():
        forwards, turned = MODELS[pooling](ids, mask).logits, MODELS[pooling](ids[order], mask[order]).logits
    torch.testing.assert_close(turned, forwards[order], **CLOSE)


@given(poolings, texts, st.data())
def test_mixed_tasks_in_one_batch_are_each_tasks_own_rewards(pooling, drawn, data):
    tasks = [data.draw(st.integers(0, 2)) for _ in drawn]
    model = MODELS[pooling]
    width = max(map(len, drawn))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in drawn])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in drawn])
    with torch.no_grad():
        mixed = model(ids, mask, task_ids=torch.tensor(tasks), routing="given")
    assert mixed.task_ids.tolist() == tasks
    with torch.no_grad():
        alone = [
            model(torch.tensor([row]), task_ids=torch.tensor([task]), routing="given").logits
            for row, task in zip(drawn, tasks, strict=True)
        ]
    torch.testing.assert_close(mixed.logits, torch.cat(alone), **CLOSE)


@given(poolings, text)
def test_top1_is_given_with_the_likeliest_task_and_soft_is_the_weighted_sum_of_given(pooling, drawn):
    model, ids = MODELS[pooling], torch.tensor([drawn])
    with torch.no_grad():
        top1, soft = model(ids), model(ids, routing="soft")
        by_task = torch.cat(
            [model(ids, task_ids=torch.tensor([task]), routing="given").logits for task in range(3)]
        )
    likeliest = top1.task_probs.argmax(1)
    assert torch.equal(top1.task_ids, likeliest)
    torch.testing.assert_close(top1.logits, by_task[likeliest], **CLOSE)
    torch.testing.assert_close(soft.logits, top1.task_probs @ by_task, **CLOSE)
    torch.testing.assert_close(top1.task_probs.sum(1), torch.ones(1))


@given(poolings, text)
def test_capability_scores_are_there_for_the_used_task_and_nan_for_the_others(pooling, drawn):
    model, ids = MODELS[pooling], torch.tensor([drawn])
    owners = torch.tensor([task == "advice" for task, _ in model.capability_names])
    with torch.no_grad():
        scores = model(ids, task_ids=torch.tensor([0]), routing="given").capability_scores[0]
        every = model(ids, routing="soft").capability_scores[0]
    assert torch.equal(scores.isfinite(), owners)
    assert every.isfinite().all()
    torch.testing.assert_close(scores[owners], every[owners], **CLOSE)


def test_swapping_the_order_of_pairs_swaps_the_rewards():
    chosen, rejected = torch.randint(5, 300, (2, 3, 6))
    model = MODELS["last"]
    with torch.no_grad():
        first = model(torch.cat([chosen, rejected])).logits
        second = model(torch.cat([rejected, chosen])).logits
    torch.testing.assert_close(first.roll(3, 0), second, **CLOSE)


def test_at_the_start_every_expert_is_the_backbone_bit_for_bit():
    """B = 0: the states of every expert are those of the backbone alone, whatever A is."""
    model = tiny_reward_model()
    for bank in model.experts.sites.values():
        nn.init.zeros_(bank.B)
    ids = torch.randint(5, 300, (3, 7)).tolist()
    packing = pack_texts([ids[0], ids[1][:5], ids[2][:2]], hidden=32, owners=[0, 3, 5])
    starts = torch.tensor([2, 2, 1])
    with torch.no_grad():
        trunk = model.trunk(packing)
        adapted = model.experts.states(model.backbone, trunk, in_place(packing), starts)
        model.experts.detach()
        alone = model.experts.states(model.backbone, trunk, in_place(packing), starts)
    assert torch.equal(adapted, alone)


@pytest.mark.parametrize("used", [0, 2])
def test_gradients_reach_the_experts_of_the_used_task_and_nothing_else(used):
    model = tiny_reward_model().train()
    ids = torch.randint(5, 300, (4, 6))
    rewards = model(ids, task_ids=torch.full((4,), used), routing="given").logits[:, 0]
    bradley_terry_loss(rewards[:2], rewards[2:]).backward()
    rows = model.config.experts_of(model.config.task_names[used])[
        :1
    ]  # "task_head" reads the task adapter only
    others = [row for row in range(len(model.config.experts)) if row not in rows]
    for bank in model.experts.sites.values():
        assert bank.B.grad[rows].any()
        assert not bank.B.grad[others].any()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
