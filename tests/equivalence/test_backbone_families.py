"""Every supported family, run layer by layer as we run it, is its own transformers forward."""

import pytest
import torch
from transformers import AutoModel

from prefmoe.backbone.layers import TESTED_FAMILIES, cut_layers, embed, run_layers
from prefmoe.backbone.packing import pack_texts
from prefmoe.reward.config import DMoERMConfig
from prefmoe.reward.model import DMoERMForSequenceClassification
from tiny import tiny_backbone, tiny_reward_model

TOKEN_IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))


def run(backbone, token_ids=TOKEN_IDS, split_layer=0):
    """States of whole texts, by two calls with a split."""
    packing = pack_texts(token_ids.tolist(), hidden=backbone.config.hidden_size)
    with torch.no_grad():
        states = embed(backbone, packing.tokens)
        for layers in (backbone.layers[:split_layer], backbone.layers[split_layer:]):
            states = run_layers(backbone, states, layers, packing)
        return packing.unpack(backbone.norm(states))


def forward(backbone, token_ids=TOKEN_IDS):
    with torch.no_grad():
        return backbone(token_ids).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_layer_by_layer_is_the_familys_own_forward(family, dtype):
    backbone = tiny_backbone(family, dtype=dtype)
    with torch.no_grad():  # biases and some norms start at zero, where a lost one would not be seen
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert torch.equal(run(backbone), forward(backbone))


@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_two_ranges_of_layers_are_one(family):
    """The trunk and what stands on it, one after the other, as the model runs them."""
    backbone = tiny_backbone(family)
    assert torch.equal(run(backbone, split_layer=3), run(backbone))


@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_a_later_token_changes_no_earlier_state(family):
    """Also with a reward model built on the same backbone, which once wrote its attention into that config."""
    backbone = tiny_backbone(family)
    before = run(backbone)
    tiny_reward_model(backbone)
    changed = TOKEN_IDS.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 300
    after = run(backbone, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_padding_behind_a_text_is_a_masked_forward_of_transformers(family):
    backbone = tiny_backbone(family)
    lengths = torch.tensor([12, 5, 1])
    mask = torch.arange(12) < lengths[:, None]
    with torch.no_grad():
        theirs = backbone(TOKEN_IDS, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(run(backbone)[mask], theirs[mask])


def test_what_attention_the_config_names_changes_nothing():
    backbone = tiny_backbone()
    expected = run(backbone)
    backbone.set_attn_implementation("eager")
    assert torch.equal(run(backbone), expected)
    assert backbone.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family):
    gradients = []
    for is_on in (False, True):
        model = tiny_reward_model(tiny_backbone(family)).train()
        if is_on:
            model.gradient_checkpointing_enable()
        assert model.experts.gradient_checkpointing is is_on
        model(TOKEN_IDS).logits.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any(name.startswith("experts.sites.") for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_backbone_cut_to_its_first_layers_is_those_layers():
    whole, cut = tiny_backbone(), tiny_backbone()
    cut_layers(cut, 3)
    with torch.no_grad():
        third = whole(TOKEN_IDS, output_hidden_states=True).hidden_states[3]
        assert torch.equal(run(cut), cut.norm(third))
    assert AutoModel.from_config(cut.config).state_dict().keys() == cut.state_dict().keys()


def test_a_model_leaves_the_config_of_its_backbone_alone():
    backbone = tiny_backbone()
    before = backbone.config.to_dict() | {"attention": backbone.config._attn_implementation}
    config = DMoERMConfig(backbone.config, tasks={"a": []})
    DMoERMForSequenceClassification(config, backbone=backbone)
    assert backbone.config.to_dict() | {"attention": backbone.config._attn_implementation} == before
