"""Policies that are moved: to another dtype, and to the meta device, which shows what stays behind on a machine without GPU."""

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prefmoe.policy.layer import PMoLLinear
from prefmoe.policy.routing import RoutedBatch
from tiny_policy import CONFIGS, pmol_config, tiny_lm, tiny_policy, tokens

every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
IDS = tokens()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def tensors_of(thing: object, where: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that can be reached from an object, kept as parameter, buffer or plain attribute."""
    if isinstance(thing, Tensor):
        yield where, thing
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        parts = thing.items()
    elif isinstance(thing, list | tuple):
        parts = enumerate(thing)
    elif isinstance(thing, nn.Module) or type(thing).__module__.startswith("prefmoe."):
        parts = vars(thing).items()
    else:
        return
    for name, part in parts:
        yield from tensors_of(part, f"{where}.{name}", seen)


@every_config
def test_nothing_stays_behind(changes):
    model = tiny_policy(**changes)
    with model.base_model.steered({"a": 2.0}):
        logits(model)
    found = dict(tensors_of(model, "", set()))
    assert any("pmol_bank" in name for name in found)
    model.to("meta")
    left = [name for name, tensor in tensors_of(model, "", set()) if tensor.device.type != "meta"]
    assert left == []


@every_config
@pytest.mark.parametrize(
    "weights", [None, {"a": 2.0}, [{"a": 2.0}, {"b": 0.5}]], ids=["trained", "all", "each"]
)
def test_routers_decide_and_learn_where_their_logits_are(changes, weights):
    """Meta tensors refuse to be mixed with others, as those of a GPU do."""
    model = tiny_policy(**changes)
    model.base_model.set_preference_weights(weights)
    model.to("meta")
    routing = model.base_model.routings["default"]
    made = torch.zeros(2, 5, routing.groups.num_choices, device="meta", requires_grad=True)
    routing.begin(RoutedBatch(torch.ones(2, 5, device="meta"), torch.ones(2, 2, device="meta"), True))
    decided = routing.decide(made, router="", block="", training=True)
    assert decided.device.type == "meta"
    decided.sum().backward()
    if weights is not None:  # copied once, not by every router of every pass
        assert routing.log_factors.device.type == "meta"


@every_config
def test_a_policy_in_float64_and_back(changes):
    model = tiny_policy(**changes)
    before = logits(model)
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    wide = logits(model)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), before, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model.to(torch.float32).to("cpu")), before)


@every_config
def test_a_policy_in_float16_is_steered(changes):
    exact = tiny_policy(**{**changes, "alpha": 4.0})
    model = tiny_policy(**{**changes, "alpha": 4.0}).half()
    for weights in ({}, {"a": 4.0, "b": 0.0}):
        exact.set_preference_weights(weights)
        model.set_preference_weights(weights)
        expected, got = logits(exact), logits(model)
        assert got.dtype == torch.float16
        assert got.isfinite().all()
        if changes.get("top_k") is None:  # which expert comes first may turn on a rounding
            assert (got.float() - expected).norm() < 0.02 * expected.norm()


def test_an_adapter_in_float32_on_a_base_in_float64(tmp_path):
    model = tiny_policy()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_lm(dtype=torch.float64), tmp_path).eval()
    assert logits(loaded).dtype == torch.float64


def test_the_device_is_named_while_loading(tmp_path):
    tiny_lm().save_pretrained(tmp_path / "base")
    model = tiny_policy(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    loaded = {
        "torch_device": PeftModel.from_pretrained(tiny_lm(), tmp_path / "adapter", torch_device="cpu"),
        "device_map": AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", device_map="cpu"),
    }
    for name, policy in loaded.items():
        policy.to("cpu")
        assert torch.equal(logits(policy.eval()), expected), name


def test_an_adapter_that_is_added_to_a_moved_model_lies_where_its_layer_does():
    model = tiny_policy().to("meta")
    model.add_adapter("second", pmol_config(), low_cpu_mem_usage=True)
    added = [
        layer.pmol_bank["second"].A.device.type for layer in model.modules() if isinstance(layer, PMoLLinear)
    ]
    assert set(added) == {"meta"}
