"""PMoL as a PEFT method: everything that PEFT's own methods do, in a table of configurations."""

import copy
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from prefmoe.errors import ConfigError
from tiny_policy import CONFIGS, pmol_config, randomize, tiny_lm, tiny_policy, tokens

every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
IDS = tokens()
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21 asks transformers 5 for it
    "ignore:Could not find a config file in:UserWarning",  # base models here have no name on a hub
    "ignore:Already found a `peft_config` attribute:UserWarning",  # transformers adds adapters so
)


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


BASE = logits(tiny_lm())


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    ]


@pytest.fixture
def saved(tmp_path):
    def save(model):
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


@every_config
def test_a_new_adapter_gives_bitwise_the_output_of_the_base(changes):
    assert torch.equal(logits(get_peft_model(tiny_lm(), pmol_config(**changes))), BASE)


@every_config
def test_a_trained_adapter_gives_another_output_and_disabled_bitwise_that_of_the_base(changes):
    model = tiny_policy(**changes)
    trained = logits(model)
    assert (trained - BASE).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), BASE)
    assert torch.equal(logits(model), trained)


@every_config
def test_nothing_is_trained_but_banks_and_routers_and_all_of_them_get_a_gradient(changes):
    model = tiny_policy(**changes).train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(
        ".pmol_bank.default." in n or ".pmol_router.default." in n or ".pmol_cell.default." in n
        for n in trained
    )
    assert not [name for name in frozen if "pmol_" in name]
    preferences = torch.tensor([0, 1, 0, 1])
    model(input_ids=IDS, labels=IDS, preferences=preferences).loss.backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    torch.optim.SGD(trained.values(), lr=1.0).step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])


@every_config
def test_save_and_load_under_another_name_is_exact_and_keeps_no_weight_of_the_base(changes, saved):
    model = tiny_policy(**changes)
    folder = saved(model)
    state = load_file(folder / "adapter_model.safetensors")
    assert all("pmol_" in name and "default" not in name for name in state)
    assert sum(t.numel() for t in state.values()) == model.get_nb_trainable_parameters()[0]
    for options in ({"adapter_name": "other"}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tiny_lm(), folder, **options).eval()
        assert torch.equal(logits(loaded), logits(model)), options
        trainable = [n for n, p in loaded.named_parameters() if p.requires_grad]
        assert bool(trainable) == ("is_trainable" in options)


@pytest.mark.parametrize("groups", [{"a": 2, "b": 1}, {"b": 2, "a": 1}], ids=str)
def test_groups_keep_their_order_and_so_their_experts(groups, tmp_path):
    """PEFT sorts the keys of what it writes: helpful and harmless came back as harmless and helpful."""
    policy = tiny_policy(groups=groups)
    policy.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_lm(), tmp_path).eval()
    assert list(again.peft_config["default"].groups.items()) == list(groups.items())
    ids = tokens()
    with torch.no_grad():
        plain = policy(input_ids=ids).logits
        for model in (policy, again):
            model.base_model.set_preference_weights({"b": 9.0})
        expected = policy(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
        assert not torch.equal(expected, plain)


@every_config
def test_a_second_adapter_can_be_added_set_loaded_and_deleted(changes, saved):
    model = tiny_policy(**changes)
    first = logits(model)
    folder = saved(model)
    model.add_adapter("second", pmol_config(**changes, alpha=8.0))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), BASE)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".second." in name), name
    model.load_adapter(folder, "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), first)
    model.set_adapter("default")
    model.delete_adapter("third")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert not [name for name, _ in model.named_parameters() if ".second." in name or ".third." in name]
    assert list(model.base_model.routings) == ["default"]


def test_a_second_adapter_leaves_the_group_loss_of_the_first_alone():
    """Each injection hooks the model: preferences must not be taken by one hook and be missed by the other."""

    def router_gradient(model):
        model.train()
        preferences = torch.tensor([0, 1, 0, 1])
        model(input_ids=IDS, labels=IDS, preferences=preferences).loss.backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "pmol_router.default" in n]

    expected = router_gradient(tiny_policy(group_loss_weight=10.0))
    model = tiny_policy(group_loss_weight=10.0)
    model.add_adapter("second", pmol_config())
    for ours, theirs in zip(router_gradient(model), expected, strict=True):
        assert torch.equal(ours, theirs)


@every_config
@pytest.mark.parametrize("adapters", [1, 2])
def test_unload_gives_back_the_same_modules_and_leaves_no_hook(changes, adapters):
    base = tiny_lm()
    before = dict(base.named_modules())
    model = tiny_policy(base, **changes)
    if adapters == 2:
        model.add_adapter("second", pmol_config())
    unloaded = model.unload()
    after = dict(unloaded.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())
    assert torch.equal(logits(unloaded), BASE)
    assert not hooks_of(unloaded)


@every_config
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_gives_the_same_output_and_shares_nothing(changes, copied):
    model = tiny_policy(**changes)
    before = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), before)
    randomize(twin, seed=1)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    twin.base_model.set_preference_weights({"a": 0.0})
    assert model.base_model.routings["default"].log_factors is None


@every_config
def test_auto_classes_of_peft_and_transformers_load_the_adapter(changes, saved, tmp_path):
    tiny_lm().save_pretrained(tmp_path / "base")
    model = tiny_policy(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **changes)
    folder = saved(model)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained(folder).eval()), logits(model)), auto


@pytest.mark.parametrize("name", ["default", "recurrent", "model scope"])
def test_transformers_own_adapter_verbs(name, saved):
    changes = CONFIGS[name]
    model = tiny_policy(**changes)
    folder = saved(model)
    plain = tiny_lm()
    plain.load_adapter(folder, "one")
    assert torch.equal(logits(plain), logits(model))
    plain.add_adapter(pmol_config(**changes), "two")
    plain.set_adapter("two")
    assert torch.equal(logits(plain), BASE)
    plain.disable_adapters()
    assert torch.equal(logits(plain), BASE)
    plain.enable_adapters()
    plain.set_adapter("one")
    plain.delete_adapter("two")
    assert torch.equal(logits(plain), logits(model))


def test_an_adapter_that_transformers_injects_knows_preferences_and_evaluation_mode():
    plain = tiny_lm()
    plain.add_adapter(pmol_config(group_loss_weight=10.0), "one")
    randomize(plain)
    policy = tiny_policy(group_loss_weight=10.0)
    grads = []
    for model in (plain, policy):
        model.eval()
        model(input_ids=IDS, labels=IDS).loss.backward()  # no preferences, and no warning: it does not train
        model.zero_grad()
        model.train()
        model(input_ids=IDS, labels=IDS, preferences=torch.tensor([0, 1, 0, 1])).loss.backward()
        grads.append([p.grad for name, p in model.named_parameters() if "pmol_router" in name])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def test_modules_to_save_are_trained_saved_and_loaded(saved):
    model = tiny_policy(modules_to_save=["lm_head"])
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name in trained if "pmol_" not in name] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]
    folder = saved(model)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_lm(), folder, adapter_name="x")), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), BASE)


@pytest.mark.parametrize(("bias", "trained"), [("none", 0), ("all", 15), ("pmol_only", 12)])
def test_biases_are_trained_as_asked(bias, trained):
    model = get_peft_model(tiny_lm("gpt2"), pmol_config(bias=bias))
    biases = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert bool(biases) == bool(trained)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@every_config
def test_a_bfloat16_base_has_a_float32_or_a_bfloat16_adapter(changes, autocast_adapter_dtype, saved):
    changes = {**changes, "alpha": 4.0}
    base, exact = tiny_lm(dtype=torch.bfloat16), tiny_lm(dtype=torch.bfloat16).float()
    expected = logits(base)
    model = get_peft_model(base, pmol_config(**changes), autocast_adapter_dtype=autocast_adapter_dtype)
    model = model.eval()
    dtypes = {p.dtype for name, p in model.named_parameters() if "pmol_" in name}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    assert torch.equal(logits(model), expected)
    randomize(model)
    got = logits(model)
    assert got.dtype == torch.bfloat16
    exact = logits(tiny_policy(exact, **changes))
    if changes.get("top_k") is None:  # which expert comes first may turn on a rounding
        assert (got.float() - exact).norm() < 0.1 * exact.norm()
    folder = saved(model)
    loaded = PeftModel.from_pretrained(
        tiny_lm(dtype=torch.bfloat16), folder, autocast_adapter_dtype=autocast_adapter_dtype
    )
    assert torch.equal(logits(loaded.eval()), got)


@pytest.mark.parametrize("verb", ["merge_and_unload", "merge_adapter"])
def test_merging_refuses_and_names_the_export(verb):
    model = tiny_policy()
    before = logits(model)
    with pytest.raises(ConfigError, match=r"cannot be merged.*depends on the token.*prefmoe policy export"):
        getattr(model, verb)()
    assert torch.equal(logits(model), before)


@every_config
def test_generation_with_cache_equals_without(changes):
    model = tiny_policy(**changes)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}
    cached = model.generate(IDS, use_cache=True, **options)
    plain = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-3, atol=1e-4)


@every_config
def test_padding_left_or_right_and_batching_change_no_output(changes):
    model = tiny_policy(**changes)
    alone = torch.cat([logits(model, row[None]) for row in IDS])
    torch.testing.assert_close(logits(model), alone, rtol=1e-3, atol=1e-4)
    padding, real = torch.zeros(4, 3, dtype=torch.long), torch.ones_like(IDS)
    right = logits(model, torch.cat([IDS, padding], 1), attention_mask=torch.cat([real, padding], 1))
    left = logits(model, torch.cat([padding, IDS], 1), attention_mask=torch.cat([padding, real], 1))
    torch.testing.assert_close(right[:, :9], alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(left[:, 3:], alone, rtol=1e-3, atol=1e-4)


@every_config
def test_trls_copy_of_an_adapter_for_the_reference_is_exact(changes):
    """As TRL does it: parameters whose name has ".default." are copied to ".ref."."""
    model = tiny_policy(**changes)
    model.add_adapter("ref", pmol_config(**changes))
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    policy = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), policy)


@pytest.mark.parametrize("name", ["default", "linear scope", "model scope", "recurrent", "top 1"])
def test_gpt2_with_its_transposed_linear_layers(name, saved):
    base = logits(tiny_lm("gpt2"))
    assert torch.equal(logits(get_peft_model(tiny_lm("gpt2"), pmol_config(**CONFIGS[name]))), base)
    model = tiny_policy(tiny_lm("gpt2"), **CONFIGS[name])
    assert not torch.allclose(logits(model), base)
    folder = saved(model)
    assert torch.equal(
        logits(PeftModel.from_pretrained(tiny_lm("gpt2"), folder, adapter_name="x")), logits(model)
    )


class TwoPaths(nn.Module):
    """No transformers, no config, and tokens that one of two layers sees, as in a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(6, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        hidden = self.down(x)
        first = hidden[:, 0] > 0
        return torch.cat([self.experts[0](hidden[first]), self.experts[1](hidden[~first])])


def test_a_plain_module_whose_layers_see_different_tokens():
    x = torch.randn(8, 6)
    plain = TwoPaths()
    expected = plain(x)
    config = pmol_config(
        task_type=None, target_modules=["down", "0", "1"], router_scope="linear", group_loss="none"
    )
    model = get_peft_model(plain, config)
    assert torch.equal(model(x), expected)
    randomize(model)
    out = model(x)
    assert not torch.equal(out, expected)
    out.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pmol_" in name)


def test_model_and_layer_status_know_the_method():
    model = tiny_policy()
    status = model.get_model_status()
    assert (status.peft_types, status.active_adapters) == ({"default": "PMOL"}, ["default"])
    assert status.enabled is True
    assert {layer.active_adapters[0] for layer in model.get_layer_status()} == {"default"}


@every_config
def test_printing_a_model_names_the_method(changes):
    assert "pmol.PMoLLinear" in repr(tiny_policy(**changes))


@every_config
def test_how_many_routers_there_are(changes):
    model = tiny_policy(**changes)
    routers = [name for name, _ in model.named_modules() if name.endswith("pmol_router.default")]
    layers = 21 if "target_modules" not in changes else 4
    expected = {"linear": layers, "model": 1}.get(changes.get("router_scope"), 3 if layers == 21 else 2)
    assert len(routers) == expected == len(model.base_model.routings["default"].order_of_decisions)


def test_parameters_are_where_trl_and_peft_find_them():
    """`container.adapter.parameter` and no deeper, or they are silently lost under another name."""
    for changes in CONFIGS.values():
        for name, _ in tiny_policy(**changes).named_parameters():
            if "pmol_" in name:
                assert name.split(".")[-3].startswith("pmol_")
                assert name.split(".")[-2] == "default"


def test_the_empty_experts_share_starts_at_empty_mass():
    model = get_peft_model(tiny_lm(), pmol_config(empty_mass=0.5)).eval()
    with model.base_model.recorded_routing() as records:
        logits(model)
    shares = torch.stack([record.weights for record in records])[..., -1]
    torch.testing.assert_close(shares, torch.full_like(shares, 0.5), rtol=0.05, atol=0)


@pytest.mark.parametrize("factor", [1, 2])
def test_inputs_embeds_instead_of_ids(factor):
    model = tiny_policy()
    embeds = model.get_input_embeddings()(IDS) * factor
    with torch.no_grad():
        out = model(inputs_embeds=embeds).logits
    assert torch.equal(out, logits(model)) == (factor == 1)
