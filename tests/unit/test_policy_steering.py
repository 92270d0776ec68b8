"""Steering after training: exact where a factor is 0 or 1, text by text in a batch, with several samples a prompt."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from prefmoe import set_preference_weights
from prefmoe.errors import ConfigError, ShapeError
from tiny_policy import CONFIGS, pmol_config, randomize, tiny_lm, tiny_policy, tokens

every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
IDS = tokens(3, 6)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@every_config
def test_none_nothing_and_ones_are_the_trained_mixture(changes):
    model = tiny_policy(**changes)
    trained = logits(model)
    model.base_model.set_preference_weights({"a": 2.0})
    assert not torch.equal(logits(model), trained)
    for weights in ({}, {"a": 1.0, "b": 1.0}, [{}] * 3, None):
        model.base_model.set_preference_weights(weights)
        assert torch.equal(logits(model), trained)


@every_config
def test_a_factor_of_0_takes_a_groups_contribution_away_exactly(changes):
    model = tiny_policy(**changes)
    with torch.no_grad(), model.base_model.steered({"a": 0.0}):
        steered = logits(model)
        for name, parameter in model.named_parameters():
            if name.endswith("pmol_bank.default.B"):
                parameter[:2] += 100.0  # the experts of group a
        assert torch.equal(logits(model), steered)
    assert not torch.allclose(logits(model), steered)


def test_only_the_empty_expert_is_bitwise_the_base():
    model = tiny_policy()
    with model.disable_adapter():
        base = logits(model)
    model.base_model.set_preference_weights({"a": 0.0, "b": 0.0})
    assert torch.equal(logits(model), base)


@every_config
def test_weights_a_text_in_one_batch_equal_each_text_on_its_own(changes):
    model = tiny_policy(**changes)
    rows = [{"a": 3.0}, {"b": 0.0}, {}]
    with model.base_model.steered(rows):
        together = logits(model)
    for row, ids, out in zip(rows, IDS, together, strict=True):
        with model.base_model.steered(row):
            torch.testing.assert_close(logits(model, ids[None])[0], out, rtol=1e-3, atol=1e-4)


def test_samples_and_beams_of_a_prompt_share_its_weights():
    model = tiny_policy()
    rows = [{"a": 5.0}, {"a": 0.0}, {"b": 5.0}]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with model.base_model.steered(rows):
        beams = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), num_beams=2, num_return_sequences=2, **options
        )
    for number, (row, ids) in enumerate(zip(rows, IDS, strict=True)):
        with model.base_model.steered(row):
            alone = model.generate(
                ids[None],
                attention_mask=torch.ones(1, 6).long(),
                num_beams=2,
                num_return_sequences=2,
                **options,
            )
        assert torch.equal(beams[2 * number : 2 * number + 2], alone)


def test_turning_a_group_up_raises_its_weight_step_by_step():
    model = tiny_policy()
    loads = []
    for factor in (0.0, 0.5, 1.0, 2.0, 4.0):
        with model.base_model.steered({"b": factor}), model.base_model.recorded_routing() as records:
            logits(model)
        loads.append(torch.stack([record.weights[:, 2] for record in records]).mean().item())
    assert loads[0] == 0.0
    assert loads == sorted(loads)
    assert len(set(loads)) == 5


def test_steered_puts_back_what_was_there_also_after_an_error():
    model = tiny_policy().base_model
    model.set_preference_weights({"a": 2.0})
    before = model.routings["default"].log_factors
    with pytest.raises(KeyError), model.steered({"b": 3.0}):
        raise KeyError
    assert model.routings["default"].log_factors is before


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"c": 1.0}, r"there is no group 'c'; choose from a, b, empty"),
        ({"a": -1.0}, r"'a' got -1.0; expected a number of 0 or more"),
        ({"a": float("nan")}, r"'a' got nan; expected a number of 0 or more"),
        ({"a": 0.0, "b": 0.0, "empty": 0.0}, r"every group is turned off; leave one above 0"),
        ([{"a": 1.0}, {"x": 1.0}], r"there is no group 'x'"),
    ],
)
def test_weights_that_cannot_be(weights, sentence):
    with pytest.raises(ConfigError, match=sentence):
        tiny_policy().base_model.set_preference_weights(weights)


def test_weights_of_another_number_of_texts():
    model = tiny_policy()
    model.base_model.set_preference_weights([{"a": 2.0}] * 2)
    with pytest.raises(
        ShapeError, match=r"weights for 2 texts, but the batch has 3; give one set for all, or"
    ):
        logits(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model and an adapter of it, saved."""
    root = tmp_path_factory.mktemp("saved")
    tiny_lm().save_pretrained(root / "base")
    tiny_policy(AutoModelForCausalLM.from_pretrained(root / "base")).save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


def by_load_adapter(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(adapter)
    return model


LOADERS = {
    "PeftModel": (lambda base, adapter: PeftModel.from_pretrained(tiny_lm(), adapter), True),
    "AutoPeftModel": (lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter), True),
    "AutoModel of the adapter": (lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter), False),
    "load_adapter": (by_load_adapter, False),
}


@pytest.mark.parametrize(("load", "has_method"), LOADERS.values(), ids=LOADERS)
def test_steering_works_however_the_adapter_was_loaded(folders, load, has_method):
    model, policy = load(*folders).eval(), tiny_policy()
    trained = logits(model)
    assert torch.equal(trained, logits(policy))
    with policy.base_model.steered({"a": 5.0}):
        expected = logits(policy)
    assert not torch.equal(expected, trained)
    set_preference_weights(model, {"a": 5.0})
    assert torch.equal(logits(model), expected)
    set_preference_weights(model, None)
    assert torch.equal(logits(model), trained)
    assert hasattr(model, "set_preference_weights") == has_method  # docs/policy.md says which have it
    if has_method:
        model.set_preference_weights({"a": 5.0})
        assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute:UserWarning"
)  # transformers adds so
def test_of_two_adapters_in_a_transformers_model_the_active_or_the_named_one_is_steered(folders):
    model = by_load_adapter(*folders)
    model.add_adapter(pmol_config(), "second")
    randomize(model, seed=1)
    model.set_adapter("second")
    second = logits(model)
    set_preference_weights(model, {"a": 0.0})
    assert not torch.equal(logits(model), second)
    set_preference_weights(model, None)
    set_preference_weights(model, {"a": 0.0}, "default")
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    model.delete_adapter("second")
    with pytest.raises(ConfigError, match=r"no PMoL adapter 'second' in this model; it has default$"):
        set_preference_weights(model, {"a": 0.0}, "second")


def test_a_model_without_an_adapter_or_without_this_one():
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM carries no PMoL adapter.*load one first"):
        set_preference_weights(tiny_lm(), {"a": 2.0})
    with pytest.raises(ConfigError, match=r"no PMoL adapter 'other' in this model; it has default"):
        tiny_policy().set_preference_weights({"a": 2.0}, "other")
