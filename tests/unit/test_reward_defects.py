"""Defects of the authors' release (SPECS.md 2.4) that concern the model and its batches: none comes back unseen.

The others are tested where they belong: splits and labels with the data, selection and resuming with the training.
"""

import gc

import pytest
import torch
from torch.nn import functional as F

from prefmoe.data.render import Encoded
from prefmoe.evaluation.accuracy import pairwise_accuracy
from prefmoe.nn import TaskRouter, bradley_terry_loss
from prefmoe.reward.batches import PairCollator
from prefmoe.reward.features import pooled_states
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.texts import TextTable
from prefmoe.reward.trunk import Trunk
from tiny import TASKS, tiny_backbone, tiny_reward_model
from tiny_run import tiny_bench, tiny_settings

IDS = torch.randint(7, 300, (4, 8), generator=torch.Generator().manual_seed(1))


def test_defect_1_the_weights_of_the_backbone_are_really_loaded(tmp_path):
    """The release built `LlamaModel(config)`: a random model. Seeding torch otherwise must change nothing here."""
    tiny_backbone(seed=5).save_pretrained(tmp_path / "backbone")
    model = tiny_reward_model(tiny_backbone(seed=5))
    model.config.backbone = str(tmp_path / "backbone")
    for name in ("small", "whole"):
        model.save_pretrained(tmp_path / name, include_backbone=name == "whole")
        torch.manual_seed(99)
        loaded = DMoERMForSequenceClassification.from_pretrained(tmp_path / name)
        assert torch.equal(loaded.backbone.embed_tokens.weight, tiny_backbone(seed=5).embed_tokens.weight)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("is_flipped", [False, True])
def test_defect_3_the_preferred_completion_gets_the_larger_reward(is_flipped):
    """Trained on pairs that can be told apart: accuracy 1 on them, and 0 on the same pairs the other way round."""
    model = tiny_reward_model(tasks={"a": []}).train()
    good, bad = IDS[:2], IDS[2:]
    chosen, rejected = (bad, good) if is_flipped else (good, bad)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(25):
        loss = bradley_terry_loss(model(chosen).logits[:, 0], model(rejected).logits[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        margins = (model(good).logits - model(bad).logits)[:, 0]
    assert pairwise_accuracy(margins.numpy()) == (0.0 if is_flipped else 1.0)


def test_defect_6_heads_are_registered_so_that_they_are_trained_moved_and_saved(tmp_path):
    model = tiny_reward_model()
    names = dict(model.named_parameters())
    assert names["experts.head_weight"].requires_grad
    before = model.experts.head_weight.detach().clone()
    model(IDS).logits.sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(model.experts.head_weight, before)
    model.save_pretrained(tmp_path, include_backbone=True)
    again = DMoERMForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.experts.head_weight, model.experts.head_weight)
    assert torch.equal(again.experts.head_bias, model.experts.head_bias)
    assert model.double().experts.head_weight.dtype == torch.float64


def test_defect_8_rewards_from_features_computed_once_are_those_of_the_live_model(tmp_path):
    model = tiny_reward_model(aggregators=["mlp", "task_head", "linear_states"])
    table = TextTable()
    texts = [table.add(Encoded(tuple(row.tolist()), 3, 0)) for row in IDS]
    trunk = Trunk(model.backbone, model.config.split_layer, table, folder=tmp_path)
    trunk.prepare(texts)
    for task_id, task in enumerate(TASKS):
        experts = model.config.experts_of(task)
        rows = [(text, expert) for text in texts for expert in experts]
        features = pooled_states(model.backbone, model.experts, trunk, rows).unflatten(0, (len(texts), -1))
        with torch.no_grad():
            cached = model.task_rewards(task_id, features).rewards
            live = model(
                IDS, prompt_lengths=torch.full((4,), 3), task_ids=torch.full((4,), task_id), routing="given"
            ).logits[:, 0]
        torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)


def test_defect_9_the_router_has_no_softmax_before_cross_entropy():
    """With one, five classes could never get below 0.905 nats, however clear they are."""
    features = torch.eye(5).repeat(8, 1) * 3 + torch.randn(40, 5) * 0.05
    task_ids = torch.arange(5).repeat(8)
    router = TaskRouter(num_tasks=5, hidden=5)
    router.fit(features, task_ids, l2=1e-6, label_smoothing=0.0)
    logits = router(features)
    assert F.cross_entropy(logits, task_ids) < 0.1 < 0.905
    assert not torch.allclose(logits.sum(1), torch.ones(40))


def test_defect_12_every_part_is_registered_and_all_but_the_frozen_backbone_follow_train():
    """The release overrides `train` with the training itself, so that no mode can be set."""
    model = tiny_reward_model(aggregators=["mlp"] * 3, dense_tasks=True)
    frozen = list(model.backbone.modules())
    for mode in (False, True):
        assert model.train(mode) is model
        assert all(part.training is mode for part in model.modules() if part not in frozen)
        assert not any(part.training for part in frozen)
    owned = {id(parameter) for parameter in model.parameters()}
    parts = [*model.aggregators, *model.experts.sites.values(), *model.experts.dense.values(), model.router]
    assert all(id(parameter) in owned for part in parts for parameter in part.parameters())


@pytest.mark.parametrize("num_capabilities", [0, 1, 6])
def test_defect_16_more_experts_nest_nothing_and_store_no_backbone(tmp_path, num_capabilities):
    tasks = {"a": [f"c{i}" for i in range(num_capabilities)]}
    model = tiny_reward_model(tasks=tasks)
    assert model.state_dict().keys() == tiny_reward_model(tasks={"a": []}).state_dict().keys()
    assert dict(model.backbone.named_modules()).keys() == dict(tiny_backbone().named_modules()).keys()
    model.save_pretrained(tmp_path)
    per_expert = 4 * sum(
        tensor[0].numel() for tensor in model.experts.state_dict().values() if tensor.ndim > 1
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < (num_capabilities + 1) * per_expert * 1.1 + 10_000


def tensors_on(device):
    """Tensors that somebody still holds, by address."""
    gc.collect()
    found = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    return {id(tensor) for tensor in found if tensor.device.type == device}


def test_defect_17_only_the_batch_at_hand_lies_on_the_device_of_the_backbone(tmp_path):
    """The meta device plays the GPU: a million pairs must take no more of its memory than one batch does."""
    bench = tiny_bench(tiny_settings(tmp_path))
    bench.backbone.to("meta")
    before = tensors_on("meta")
    collator = PairCollator(bench.trunk)
    for first in range(0, len(bench.train.rows), 8):
        batch = collator([(0, row) for row in bench.train.rows[first : first + 8]])
        assert batch["trunk"].device.type == "meta"
        assert len(tensors_on("meta") - before) <= len(batch)
    del batch
    assert tensors_on("meta") == before
