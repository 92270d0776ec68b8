"""The laws that PEFT holds its own methods to (tests/testing_common.py of peft 0.21) and `test_policy_tuner.py` lacks.

Left out, for they do not apply: merging (refused by design), mixing adapters in a batch and weighted combinations
(LoRA and a few others have them), prompt learning, devices other than the CPU.
"""

import pytest
import torch
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from safetensors.torch import load_file

from prefmoe.errors import ConfigError
from tiny_policy import CONFIGS, pmol_config, randomize, tiny_lm, tiny_policy, tokens

every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
IDS = tokens()
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


def own_parameters(model, adapter):
    return {n: p for n, p in model.named_parameters() if "pmol_" in n and f".{adapter}." in n}


@every_config
def test_all_adapters_are_saved_each_in_its_folder_and_load_without_a_missing_key(changes, tmp_path):
    model = tiny_policy(**changes)
    model.add_adapter("new", pmol_config(**changes))
    randomize(model, seed=1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_lm(), tmp_path)
    for name in ("new", "yet-another"):
        assert loaded.load_adapter(tmp_path / "new", name).missing_keys == []
    expected, found = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert all("yet-another" in key for key in found.keys() - expected.keys())


@pytest.mark.parametrize("other", ["default2", "other_default", "foodefault_bar", "efaul"])
def test_only_the_selected_adapter_is_saved_whatever_the_others_are_called(other, tmp_path):
    model = tiny_policy()
    number = len(get_peft_model_state_dict(model))
    model.add_adapter(other, pmol_config())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == number
    loaded = PeftModel.from_pretrained(tiny_lm(), tmp_path)
    assert list(loaded.peft_config) == ["default"]


def test_a_config_given_while_loading_is_used_and_turned_to_inference(tmp_path):
    model, config = tiny_policy(), pmol_config()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_lm(), tmp_path, is_trainable=False, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_a_device_map_is_taken(tmp_path):
    model = tiny_policy()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_lm(), tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits(loaded.eval()), logits(model))


@every_config
def test_adapters_added_later_keep_the_dtype_of_the_base_where_asked(changes, tmp_path):
    options = {"autocast_adapter_dtype": False}
    model = get_peft_model(tiny_lm(dtype=torch.bfloat16), pmol_config(**changes), **options)
    model.add_adapter("added", pmol_config(**changes), **options)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", **options)
    for name in ("default", "added", "loaded"):
        assert {p.dtype for p in own_parameters(model, name).values()} == {torch.bfloat16}, name


@every_config
def test_injecting_on_the_meta_device_makes_adapters_there(changes):
    model = inject_adapter_in_model(pmol_config(**changes), tiny_lm(), low_cpu_mem_usage=True)
    assert {p.device.type for p in own_parameters(model, "default").values()} == {"meta"}


@every_config
@pytest.mark.parametrize("deleted", ["active", "inactive"])
def test_a_deleted_adapter_leaves_no_trace_and_the_last_one_the_base(changes, deleted):
    model, base = tiny_policy(**changes), logits(tiny_lm())
    before = logits(model)
    model.add_adapter("other", pmol_config(**changes))
    if deleted == "active":
        model.set_adapter("other")
        with pytest.warns(UserWarning, match="Setting active adapter to default"):
            model.delete_adapter("other")
    else:
        model.delete_adapter("other")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert not own_parameters(model, "other")
    assert torch.equal(logits(model), before)
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert not [name for name in model.state_dict() if "pmol_" in name]
    assert torch.equal(logits(model.base_model), base)


def test_an_adapter_that_does_not_exist_cannot_be_deleted():
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        tiny_policy().delete_adapter("unknown")


def test_a_second_adapter_with_biases_is_refused_and_leaves_nothing_behind():
    model = get_peft_model(tiny_lm("gpt2"), pmol_config(bias="all"), "first")
    with pytest.raises(ValueError, match="bias"):
        model.add_adapter("second", pmol_config(bias="all"))
    assert list(model.peft_config) == list(model.base_model.routings) == ["first"]
    assert not own_parameters(model, "second")


def test_adapters_cannot_be_mixed_within_a_batch():
    """PEFT would drop the argument and use the active adapter for all rows."""
    model, names = tiny_policy(), ["default"] * len(IDS)
    for call in (model, model.generate):
        with pytest.raises(ConfigError, match=r"adapter_names .* cannot; call set_adapter"):
            call(IDS, adapter_names=names)


def test_a_second_adapter_that_matches_no_layer_leaves_nothing_behind():
    model = tiny_policy()
    with pytest.raises(ConfigError, match="matches no module"):
        model.add_adapter("second", pmol_config(target_modules=["nowhere"]))
    assert list(model.peft_config) == list(model.base_model.routings) == ["default"]


@every_config
def test_generation_with_the_adapter_disabled_is_the_bases(changes):
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "output_scores": True}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}

    @torch.inference_mode()
    def scores(model):
        return torch.stack(model.generate(IDS, **options).scores)

    model = tiny_policy(**changes)
    enabled = scores(model)
    with model.disable_adapter():
        # To PEFT's tolerance: where tensors lie in memory rounds the first product differently, for its LoRA too.
        torch.testing.assert_close(scores(model), scores(tiny_lm()), rtol=1e-6, atol=1e-6)
    assert torch.equal(scores(model), enabled)


@every_config
def test_a_bfloat16_model_generates(changes):
    model = tiny_policy(tiny_lm(dtype=torch.bfloat16), **changes)
    made = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, eos_token_id=None)
    assert made.shape == (4, 11)


@every_config
def test_the_bases_weights_can_be_taken_out_and_put_back(changes):
    model = tiny_policy(**changes)
    before = {name: tensor.clone() for name, tensor in tiny_lm().state_dict().items()}
    found = get_base_model_state_dict(model)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight.add_(1.0)
    result = set_base_model_state_dict(model, before, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(get_base_model_state_dict(model)[n], tensor) for n, tensor in before.items())


def test_a_base_prepared_for_quantized_training_passes_gradients_to_its_embeddings():
    base = prepare_model_for_kbit_training(tiny_lm(), use_gradient_checkpointing=False)
    model = get_peft_model(base, pmol_config())
    assert not model.get_input_embeddings()(IDS).requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(IDS).requires_grad


def test_peft_does_not_offer_to_turn_the_adapter_into_a_lora():
    """Its experts depend on the token; `prefmoe policy export` says what it approximates."""
    assert not tiny_policy().supports_lora_conversion()
