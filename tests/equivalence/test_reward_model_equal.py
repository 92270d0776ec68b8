"""The fused model, one pass for all texts and experts, is its slow twin; its experts are peft's LoRA."""

import peft
import pytest
import torch

from prefmoe.backbone.layers import TESTED_FAMILIES
from prefmoe.backbone.packing import pack_texts
from reference import reward_model as slow
from tiny import in_place, tiny_backbone, tiny_reward_model

LENGTHS = [44, 4, 7, 6]
# The first is longer than the tokens that the router counts twice; the third has no completion: pooling falls back to
# its last token.
PROMPT_LENGTHS = [40, 2, 7, 1]
TASKS = [2, 0, 1, 0]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def some_texts(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(7, 300, (n,), generator=generator).tolist() for n in LENGTHS]


def batch_of(texts):
    """Padded on the left, on the right and on both sides in turn."""
    width = max(map(len, texts)) + 2
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width)
    for row, text in enumerate(texts):
        first = (0, width - len(text), 1)[row % 3]
        ids[row, first : first + len(text)] = torch.tensor(text)
        mask[row, first : first + len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask, "prompt_lengths": torch.tensor(PROMPT_LENGTHS)}


@torch.no_grad()
def fast(model, **options):
    return model(**batch_of(some_texts()), **options).logits[:, 0]


def expected(model, backbone, **options):
    task_ids = options.pop("task_ids", [None] * len(TASKS))
    rows = zip(some_texts(), PROMPT_LENGTHS, task_ids, strict=True)
    return torch.tensor([slow.reward(model, backbone, *row[:2], task_id=row[2], **options) for row in rows])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "aggregators",
    [["task_head"] * 3, ["mlp", "linear_states", "linear_scores"], ["linear_scores", "mlp", "linear_states"]],
    ids=["heads", "mixed", "turned"],
)
def test_the_model_is_its_slow_twin_in_every_routing_mode(pooling, aggregators):
    model = tiny_reward_model(pooling=pooling, aggregators=aggregators)
    plain = tiny_backbone()
    assert len(set(model(**batch_of(some_texts())).task_ids.tolist())) > 1  # or top1 proves little
    torch.testing.assert_close(fast(model), expected(model, plain), **CLOSE)
    torch.testing.assert_close(fast(model, routing="soft"), expected(model, plain, routing="soft"), **CLOSE)
    given = fast(model, routing="given", task_ids=torch.tensor(TASKS))
    torch.testing.assert_close(given, expected(model, plain, routing="given", task_ids=TASKS), **CLOSE)


@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_the_model_is_its_slow_twin_on_every_family(family):
    model = tiny_reward_model(tiny_backbone(family))
    torch.testing.assert_close(fast(model), expected(model, tiny_backbone(family)), **CLOSE)


@pytest.mark.parametrize(
    "changes", [{"split_layer": 0}, {"split_layer": 3}, {"standardize": False}, {"dense_tasks": True}]
)
def test_the_model_is_its_slow_twin_in_other_shapes(changes):
    model = tiny_reward_model(**changes)
    torch.testing.assert_close(fast(model), expected(model, tiny_backbone()), **CLOSE)


def test_task_probabilities_and_capability_scores_are_those_of_the_slow_twin():
    model, plain = tiny_reward_model(), tiny_backbone()
    with torch.no_grad():
        output = model(**batch_of(some_texts()), task_ids=torch.tensor(TASKS), routing="given")
    for row, (text, prompt_length, task_id) in enumerate(
        zip(some_texts(), PROMPT_LENGTHS, TASKS, strict=True)
    ):
        probs = slow.task_probs(model, plain, text, prompt_length)
        torch.testing.assert_close(output.task_probs[row], torch.tensor(probs), **CLOSE)
        _, scores = slow.task_reward(model, plain, text, prompt_length, task_id)
        owners = [task for task, _ in model.capability_names]
        mine = torch.tensor([owner == model.config.task_names[task_id] for owner in owners])
        torch.testing.assert_close(output.capability_scores[row, mine], torch.tensor(scores[1:]), **CLOSE)
        assert output.capability_scores[row, ~mine].isnan().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_expert_is_a_peft_adapter_with_the_same_weights():
    """peft's LoRA, put on the plain backbone with the weights of one expert, gives the expert's states."""
    model, expert = tiny_reward_model(), 2
    ids, mask = torch.tensor([some_texts()[2]]), torch.ones(1, 7, dtype=torch.long)
    adapter = peft.get_peft_model(
        tiny_backbone(),
        peft.LoraConfig(
            r=model.config.rank,
            lora_alpha=model.config.alpha,
            target_modules=[site.replace("/", ".") for site in model.experts.sites],
        ),
    )
    state = model.experts.expert_state(expert)
    with torch.no_grad():
        for site in model.experts.sites:
            layer = adapter.base_model.model.get_submodule(site.replace("/", "."))
            layer.lora_A["default"].weight.copy_(state[f"{site}.A"])
            layer.lora_B["default"].weight.copy_(state[f"{site}.B"])
        theirs = adapter(ids, attention_mask=mask).last_hidden_state[:, -1]
        packing = pack_texts(ids.tolist(), hidden=32, owners=[expert])
        trunk = model.trunk(packing)
        ours = model.experts.states(model.backbone, trunk, in_place(packing), torch.tensor([5]))
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, slow.states_of(tiny_backbone(), ids[0].tolist())[-1:])


def test_bfloat16_backbones_give_nearly_the_same_rewards():
    exact, rough = tiny_reward_model(), tiny_reward_model(tiny_backbone(dtype=torch.bfloat16))
    options = {"task_ids": torch.tensor(TASKS), "routing": "given"}
    rewards = fast(rough, **options)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, fast(exact, **options), rtol=0.05, atol=0.1)


def test_trunk_once_and_each_upper_layer_once_a_task_for_all_its_experts():
    """Two texts that share nothing: the trunk sees them once, the upper layers once under each expert, in one pass."""
    model = tiny_reward_model()
    calls = {index: [] for index in range(4)}
    for index, seen in calls.items():
        model.backbone.layers[index].register_forward_hook(
            lambda *args, seen=seen: seen.append(args[2].shape[1])
        )
    num_experts = len(model.config.experts_of(next(iter(model.config.tasks))))
    assert num_experts > 1
    split, tokens = model.config.split_layer, sum(LENGTHS[:2])
    batch = {name: values[:2] for name, values in batch_of(some_texts()).items()}
    model(**batch, routing="given", task_ids=torch.tensor([0, 0]))
    assert all(calls[index] == [tokens] for index in range(split))
    assert all(calls[index] == [num_experts * tokens] for index in range(split, 4))
