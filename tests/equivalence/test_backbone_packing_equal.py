"""Texts that share their beginnings get the states, rewards and gradients that they get alone."""

import copy

import pytest
import torch
from torch.nn import functional as F

from prefmoe.backbone.layers import TESTED_FAMILIES, embed, run_layers
from prefmoe.backbone.packing import pack_texts
from prefmoe.data.render import Encoded
from prefmoe.reward.batches import PairCollator
from prefmoe.reward.score import score_texts
from prefmoe.reward.texts import PairRow, TextTable
from prefmoe.reward.trainer import PairModule
from prefmoe.reward.trunk import Trunk
from reference import reward_model as slow
from tiny import tiny_backbone, tiny_reward_model

HIDDEN = 32
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_ids(count, seed):
    return torch.randint(7, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [random_ids(30, 1), random_ids(11, 2)]
# Three answers to one prompt, two that go on alike to another, a prompt alone, a text that shares nothing, one twice.
TEXTS = [
    PROMPTS[0] + random_ids(9, 3),
    PROMPTS[0] + random_ids(2, 4),
    PROMPTS[1] + random_ids(20, 5),
    PROMPTS[0] + random_ids(15, 6),
    PROMPTS[1] + random_ids(20, 5)[:8] + random_ids(3, 7),
    PROMPTS[1],
    random_ids(13, 8),
    PROMPTS[0] + random_ids(2, 4),
]


def table_of(texts=TEXTS):
    table = TextTable()
    prompts = [30, 30, 11, 30, 11, 11, 4, 30]
    numbers = [table.add(Encoded(tuple(ids), n, 0)) for ids, n in zip(texts, prompts, strict=True)]
    return table, numbers


@torch.no_grad()
def packed_states(backbone, texts):
    packing = pack_texts(texts, hidden=HIDDEN)
    states = run_layers(backbone, embed(backbone, packing.tokens), backbone.layers, packing)
    rows = packing.unpack(backbone.norm(states))
    return [row[: len(text)] for row, text in zip(rows, texts, strict=True)]


@torch.no_grad()
def alone(backbone, texts):
    return [backbone(torch.tensor([text])).last_hidden_state[0] for text in texts]


@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_shared_beginnings_change_no_state_of_any_family(family):
    backbone = tiny_backbone(family)
    with torch.no_grad():  # biases and some norms start at zero, where a lost one would not be seen
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    packing = pack_texts(TEXTS, hidden=HIDDEN)
    assert len(packing.tokens) < 0.6 * sum(map(len, TEXTS))  # or it proves little
    torch.testing.assert_close(packed_states(backbone, TEXTS), alone(backbone, TEXTS), **CLOSE)


@pytest.mark.parametrize("seed", range(8))
def test_states_are_those_of_texts_alone_for_any_number_and_length_of_texts(seed):
    torch.manual_seed(seed)
    prompt = random_ids(int(torch.randint(0, 40, ())), seed)
    texts = [
        prompt[: int(torch.randint(0, 41, ()))] + random_ids(int(torch.randint(1, 30, ())), 100 * seed + n)
        for n in range(seed + 1)
    ]
    backbone = tiny_backbone(seed=seed)
    torch.testing.assert_close(packed_states(backbone, texts), alone(backbone, texts), **CLOSE)


def test_a_window_longer_than_the_texts_changes_nothing():
    """A Mistral with such a window is allowed; shorter ones are refused by `check_family`."""
    backbone = tiny_backbone("mistral")
    backbone.config.sliding_window = 64
    torch.testing.assert_close(packed_states(backbone, TEXTS), alone(backbone, TEXTS), **CLOSE)


def test_attention_is_set_back_even_if_a_layer_fails():
    backbone = tiny_backbone()
    backbone.set_attn_implementation("eager")
    torch.testing.assert_close(packed_states(backbone, TEXTS), alone(backbone, TEXTS), **CLOSE)
    assert backbone.config._attn_implementation == "eager"
    backbone.layers[1].forward = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        packed_states(backbone, TEXTS)
    assert backbone.config._attn_implementation == "eager"


def rewards(model, texts, **options):
    table, numbers = table_of(texts)
    trunk = Trunk(model.backbone, model.config.split_layer, table, **options)
    return score_texts(model, trunk, numbers).rewards


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("batch_tokens", [8192, 60])
def test_rewards_are_those_of_the_slow_twin(pooling, batch_tokens):
    model = tiny_reward_model(pooling=pooling, aggregators=["mlp", "linear_states", "linear_scores"])
    table, numbers = table_of()
    expected = [
        slow.reward(model, tiny_backbone(), ids, table.texts[n].prompt_length)
        for ids, n in zip(TEXTS, numbers, strict=True)
    ]
    torch.testing.assert_close(
        rewards(model, TEXTS, batch_tokens=batch_tokens), torch.tensor(expected), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("changed", range(len(TEXTS)))
def test_the_end_of_one_text_reaches_no_other(pooling, changed):
    """Other last tokens of one answer: its own reward changes, the others only by rounding."""
    model = tiny_reward_model(pooling=pooling)
    texts = copy.deepcopy(TEXTS)
    texts[changed][-2:] = [299, 298]
    before, after = rewards(model, TEXTS), rewards(model, texts)
    others = [i for i, text in enumerate(TEXTS) if i != changed]
    torch.testing.assert_close(after[others], before[others], rtol=1e-5, atol=1e-6)
    assert (after[changed] - before[changed]).abs() > 1e-4


def test_the_order_of_texts_changes_no_reward():
    model = tiny_reward_model()
    order = [4, 0, 7, 6, 1, 3, 5, 2]
    table, numbers = table_of()
    trunk = Trunk(model.backbone, 2, table)
    forwards = score_texts(model, trunk, numbers).rewards
    assert torch.equal(score_texts(model, trunk, [numbers[i] for i in order]).rewards, forwards[order])


# --- training ----------------------------------------------------------------------------------------------

PAIRS = [(0, PairRow(0, 1)), (2, PairRow(2, 4, weight=2.0)), (0, PairRow(3, 6, target_margin=0.3))]


def gradients(model, items, split=False):
    """Of the pairs' summed loss; `split`: every pair in a batch of its own and every text a tree of its own."""
    table, _ = table_of()
    trunk = Trunk(model.backbone, model.config.split_layer, table)
    module, collate = PairModule(model.backbone, model.experts), PairCollator(trunk)
    model.zero_grad()
    for batch in [[item] for item in items] if split else [items]:
        module(**collate(batch))["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_gradients_of_shared_beginnings_are_those_of_plain_texts(
    pooling, gradient_checkpointing, monkeypatch
):
    # Float64, but for the norms: how far sums in another order are off in float32 depends on the machine.
    model = tiny_reward_model(tiny_backbone(), pooling=pooling).double().train()
    model.experts.gradient_checkpointing = gradient_checkpointing
    packed = gradients(model, PAIRS)
    monkeypatch.setattr("prefmoe.backbone.packing.saved_layer_tokens", lambda *_: -1.0)
    plain = gradients(model, PAIRS, split=True)
    assert packed.keys() == plain.keys()
    assert any(name.endswith(".B") for name in packed)
    for name, gradient in plain.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_pair_goes_through_the_layers_with_its_prompt_once():
    model, (table, _) = tiny_reward_model(), table_of()
    seen = []
    model.backbone.layers[3].register_forward_hook(lambda *args: seen.append(args[2].shape))
    collate = PairCollator(Trunk(model.backbone, 2, table))
    PairModule(model.backbone, model.experts)(**collate(PAIRS[:1]))
    assert seen == [(1, 30 + 9 + 2, HIDDEN)]


def test_the_loss_of_a_pair_is_that_of_the_two_texts():
    model, (table, _) = tiny_reward_model(), table_of()
    collate = PairCollator(Trunk(model.backbone, 2, table))
    output = PairModule(model.backbone, model.experts)(**collate(PAIRS[:1]))
    scores = [
        slow.task_reward(model, tiny_backbone(), TEXTS[text], 30, 0)[1][0] for text in (PAIRS[0][1][:2])
    ]
    margin = torch.tensor(scores[0] - scores[1])
    torch.testing.assert_close(output["margins"][0], margin, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output["loss"], -F.logsigmoid(margin), rtol=1e-4, atol=1e-4)
