"""The model's shapes, its parts, what it refuses, and what copying, attaching and training mode do."""

import copy

import pytest
import torch
from transformers import AutoConfig

from prefmoe.backbone.packing import pack_texts
from prefmoe.errors import CheckpointError, ConfigError, ShapeError
from prefmoe.reward.config import DMoERMConfig
from prefmoe.reward.experts import Experts, find_sites
from prefmoe.reward.model import DMoERMForSequenceClassification, find_prompt_lengths
from tiny import TASKS, tiny_backbone, tiny_reward_model

IDS = torch.randint(7, 300, (4, 8), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def rewards(model, **options):
    return model(IDS, routing="soft", **options).logits


# --- config ------------------------------------------------------------------------------------------------


def config(**changes):
    return DMoERMConfig(tiny_backbone().config, **{"tasks": TASKS, "split_layer": 2} | changes)


def test_experts_are_numbered_task_by_task_with_the_task_adapter_first():
    numbered = config()
    assert numbered.experts == [
        ("advice", ""),
        ("advice", "empathy"),
        ("advice", "warmth"),
        ("facts", ""),
        ("writing", ""),
        ("writing", "rhythm"),
    ]
    assert [numbered.experts_of(task) for task in TASKS] == [[0, 1, 2], [3], [4, 5]]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"split_layer": 4},
            "split_layer=4 leaves no layer for experts; choose 0 to 3 for a backbone of 4 layers",
        ),
        ({"split_layer": -1}, "split_layer=-1 leaves no layer"),
        ({"tasks": {}}, "at least one task"),
        ({"pooling": "max"}, "pooling='max' is unknown; choose 'last' or 'mean'"),
        ({"aggregators": ["mlp"]}, "1 aggregators for 3 tasks; name one a task"),
        ({"rank": 0}, "rank is too small; got 0"),
        (
            {"target_modules": ["q_projj"]},
            "'q_projj'.* match no linear layer of LlamaModel; nearest: 'q_proj'",
        ),
        ({"target_modules": ["q_proj", "norm"]}, r"target_modules=\['norm'\] match no linear layer"),
    ],
)
def test_a_shape_that_cannot_be_built(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DMoERMForSequenceClassification(config(**changes), backbone=tiny_backbone())


def test_a_config_without_a_backbone():
    with pytest.raises(ConfigError, match="text_config and at least one task are needed"):
        DMoERMForSequenceClassification(DMoERMConfig(tasks=TASKS))


def test_a_config_survives_being_written_as_a_dict():
    first = config(response_marker=[1, 2], alpha=3.5, aggregators=["mlp", "task_head", "linear_scores"])
    again = DMoERMConfig.from_dict(first.to_dict())
    assert again.to_dict() == first.to_dict()
    assert type(again.text_config) is type(first.text_config)


def test_an_attention_window_shorter_than_the_texts_is_refused():
    windowed = AutoConfig.for_model("mistral", sliding_window=64, num_hidden_layers=2)
    with pytest.raises(
        ConfigError, match="attends to 64 tokens only, shorter than max_length=1024; lower max_length"
    ):
        DMoERMForSequenceClassification(DMoERMConfig(windowed, tasks=TASKS))


# --- forward -----------------------------------------------------------------------------------------------


def test_the_output_says_the_reward_first_and_why():
    model = tiny_reward_model()
    output = model(IDS)
    assert output.logits.shape == (4, 1)
    assert output.logits.dtype == output.capability_scores.dtype == torch.float32
    assert output.task_probs.shape == (4, 3)
    assert output.task_ids.shape == (4,)
    assert output.capability_scores.shape == (4, 3)
    assert model.capability_names == [("advice", "empathy"), ("advice", "warmth"), ("writing", "rhythm")]
    assert output[0] is output.logits


def test_only_our_parts_can_be_trained():
    model = tiny_reward_model()
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"experts", "router"}


def test_a_model_without_a_given_backbone_makes_its_own_of_that_shape():
    model = DMoERMForSequenceClassification(config(response_marker=[5]))
    assert model.backbone.state_dict().keys() == tiny_backbone().state_dict().keys()
    assert model(IDS).logits.shape == (4, 1)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"routing": "given"}, ConfigError, "pass given=task_ids"),
        ({"task_ids": torch.zeros(4, dtype=torch.long)}, ConfigError, "with mode='given' and only then"),
        (
            {"task_ids": torch.tensor([0, 1, 2, 3]), "routing": "given"},
            ShapeError,
            "no task 3; expected 0 to 2",
        ),
        (
            {"attention_mask": torch.tensor([[1] * 8] * 3 + [[0] * 8])},
            ShapeError,
            "drop rows without real tokens",
        ),
    ],
)
def test_what_cannot_be_scored(options, error, sentence):
    with pytest.raises(error, match=sentence):
        tiny_reward_model()(IDS, **options)


def test_other_arguments_that_a_tokenizer_gives_are_ignored():
    model = tiny_reward_model()
    assert torch.equal(rewards(model), rewards(model, token_type_ids=torch.ones_like(IDS)))


def test_training_mode_reaches_our_parts_and_leaves_the_frozen_backbone_in_evaluation_mode():
    model = tiny_reward_model().train()
    assert all(part.training for part in (model, model.experts, model.router, *model.aggregators))
    assert not any(part.training for part in model.backbone.modules())
    assert not any(part.training for part in model.eval().modules())


# --- where the prompt ends ---------------------------------------------------------------------------------


def prompt_lengths(rows, lengths, marker=(5, 6)):
    return find_prompt_lengths(torch.tensor(rows), torch.tensor(lengths), list(marker)).tolist()


def test_the_prompt_ends_behind_the_last_marker():
    rows = [[1, 5, 6, 9, 9], [5, 6, 9, 5, 6], [5, 6, 5, 6, 9], [9, 9, 5, 6, 9]]
    assert prompt_lengths(rows, [5, 5, 5, 5]) == [3, 5, 4, 4]


def test_without_a_marker_the_whole_text_is_the_prompt():
    assert prompt_lengths([[1, 2, 3], [5, 9, 6], [9, 9, 5]], [3, 2, 3]) == [3, 2, 3]
    assert prompt_lengths([[1, 2, 3]], [2], marker=()) == [2]
    assert prompt_lengths([[5]], [1]) == [1]  # a text shorter than the marker


def test_a_marker_in_the_padding_does_not_count():
    assert prompt_lengths([[5, 6, 9, 5, 6]], [3]) == [2]
    assert prompt_lengths([[9, 9, 5, 6, 0]], [3]) == [3]  # half of it is padding


def test_overlapping_markers():
    assert prompt_lengths([[5, 5, 5, 9]], [4], marker=(5, 5)) == [3]


def test_prompts_found_by_the_marker_are_the_same_as_given_ones():
    model = tiny_reward_model(pooling="mean")  # which reads where the completion begins
    ids = IDS.clone()
    ids[:, 2:4] = torch.tensor([5, 6])
    with torch.no_grad():
        found, told = model(ids), model(ids, prompt_lengths=torch.full((4,), 4))
        other = model(ids, prompt_lengths=torch.full((4,), 6))
    assert torch.equal(found.logits, told.logits)
    assert torch.equal(found.task_probs, told.task_probs)
    assert not torch.allclose(found.task_probs, other.task_probs)


@pytest.mark.parametrize(
    ("shape", "is_refused"),
    [
        ({"pooling": "last"}, True),
        ({"pooling": "mean", "tasks": {"all": []}}, True),
        ({"pooling": "last", "tasks": {"all": []}}, False),
    ],
)
def test_prompts_that_cannot_be_found_are_not_guessed(shape, is_refused):
    """Templates like those of Llama 2 and Mistral write nothing between the prompt and the answer."""
    model = tiny_reward_model(response_marker=[], **shape)
    told = model(IDS, prompt_lengths=torch.full((len(IDS),), 4))
    assert torch.isfinite(told.logits).all()
    if not is_refused:
        assert torch.equal(model(IDS).logits, told.logits)
        return
    with pytest.raises(
        ConfigError, match="writes nothing before an answer.*; pass prompt_lengths, or score texts"
    ):
        model(IDS)


# --- hooks -------------------------------------------------------------------------------------------------


def test_a_copy_has_experts_and_hooks_of_its_own():
    model = tiny_reward_model()
    before = rewards(model)
    other = copy.deepcopy(model)
    assert torch.equal(rewards(other), before)
    with torch.no_grad():
        for bank in other.experts.sites.values():
            bank.B.mul_(3)
    assert torch.equal(rewards(model), before)
    assert not torch.allclose(rewards(other), before)


def test_a_copy_can_be_detached_without_the_original():
    model = tiny_reward_model()
    before = rewards(model)
    other = copy.deepcopy(model)
    other.experts.detach()
    assert torch.equal(rewards(model), before)
    assert not torch.allclose(rewards(other), before)


def experts_on(backbone, **changes):
    sizes = {
        "num_experts": 3,
        "split_layer": 2,
        "rank": 2,
        "alpha": 4.0,
        "target_modules": ["v_proj", "down_proj"],
    }
    experts = Experts(backbone, **sizes | changes)
    for bank in experts.sites.values():
        torch.nn.init.normal_(bank.B)
    return experts.eval()


def states(experts, backbone, expert=1):
    trunk = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    packing = pack_texts([list(range(6)), list(range(6, 10))], hidden=32, owners=[expert] * 2)
    with torch.no_grad():
        return experts.states(backbone, trunk, packing, torch.tensor([2, 2]))


def test_attach_then_detach_leaves_the_backbone_as_it_was():
    backbone = tiny_backbone()
    modules, weights = dict(backbone.named_modules()), copy.deepcopy(backbone.state_dict())
    plain = backbone(IDS).last_hidden_state
    experts = experts_on(backbone)
    bare = states(experts, backbone)
    experts.attach(backbone)
    adapted = states(experts, backbone)
    assert torch.equal(backbone(IDS).last_hidden_state, plain)  # experts work only when they are selected
    experts.detach()
    assert not torch.allclose(adapted, bare)
    assert torch.equal(states(experts, backbone), bare)
    assert dict(backbone.named_modules()) == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.modules())
    experts.attach(backbone)
    assert torch.equal(states(experts, backbone), adapted)


def test_two_models_can_share_one_backbone():
    backbone = tiny_backbone()
    alone = [rewards(tiny_reward_model(seed=seed)) for seed in (1, 2)]
    first, second = (tiny_reward_model(backbone, seed=seed) for seed in (1, 2))
    assert torch.equal(rewards(first), alone[0])
    assert torch.equal(rewards(second), alone[1])


def test_an_error_in_a_layer_switches_the_experts_off_again():
    backbone = tiny_backbone()
    experts = experts_on(backbone)
    experts.attach(backbone)
    with pytest.raises(ShapeError, match="there is no expert 7"):
        states(experts, backbone, expert=7)
    assert experts.selection.spans is None


# --- single experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_dense", [0, 3])
def test_an_expert_can_be_carried_to_another_place(num_dense):
    backbone = tiny_backbone()
    source, target = (experts_on(backbone, num_dense=num_dense) for _ in range(2))
    source.dense_ids.copy_(torch.arange(3) if num_dense else torch.zeros(3))
    target.dense_ids.copy_(source.dense_ids)
    with torch.no_grad():
        source.head_weight.normal_()
        for dense in source.dense.values():
            dense.weight.normal_()
    kept = target.expert_state(0)
    target.load_expert(1, source.expert_state(2))
    assert target.expert_state(1).keys() == source.expert_state(2).keys()
    assert all(
        torch.equal(tensor, source.expert_state(2)[name]) for name, tensor in target.expert_state(1).items()
    )
    assert all(torch.equal(tensor, kept[name]) for name, tensor in target.expert_state(0).items())
    source.attach(backbone)
    expected = states(source, backbone, expert=2)
    source.detach()
    target.attach(backbone)
    assert torch.equal(states(target, backbone, expert=1), expected)


def test_an_expert_state_is_a_copy():
    experts = experts_on(tiny_backbone())
    state = experts.expert_state(0)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda state: state.pop("head.bias"),
            r"expert 1: missing tensors \['head.bias'\], unknown tensors \[\]",
        ),
        (lambda state: state.update(x=torch.ones(1)), r"unknown tensors \['x'\]"),
        (
            lambda state: state.update({"head.weight": torch.ones(5)}),
            r"head.weight has shape \(5,\), expected \(32,\)",
        ),
    ],
)
def test_a_state_that_is_no_expert_of_this_model_changes_nothing(edit, sentence):
    experts = experts_on(tiny_backbone())
    state = experts.expert_state(0)
    edit(state)
    before = copy.deepcopy(experts.state_dict())
    with pytest.raises(CheckpointError, match=sentence):
        experts.load_expert(1, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts.state_dict().items())


def test_sites_are_the_target_layers_above_the_trunk():
    paths = [path for path, _ in find_sites(tiny_backbone(), 2, ["q_proj", "down_proj"])]
    assert paths == [f"layers.{i}.{name}" for i in (2, 3) for name in ("self_attn.q_proj", "mlp.down_proj")]
