"""Finding, cutting and refusing backbones."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, LlamaForCausalLM

from data_helpers import byte_tokenizer
from prefmoe import hub
from prefmoe.backbone.layers import (
    check_family,
    cut_layers,
    load_backbone,
    new_backbone,
)
from prefmoe.errors import ConfigError
from prefmoe.hub import SMOLLM2, resolve_backbone
from prefmoe.runs.inputs import weights_hash
from tiny import tiny_backbone, tiny_reward_model


@pytest.fixture
def folder(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_a_loaded_backbone_has_the_saved_weights_is_frozen_and_in_evaluation_mode(folder):
    backbone = load_backbone(str(folder))
    expected = tiny_backbone().state_dict()
    assert backbone.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.training


def test_a_model_for_generation_gives_its_body(tmp_path):
    whole = LlamaForCausalLM(tiny_backbone().config)
    whole.save_pretrained(tmp_path)
    assert weights_hash(load_backbone(str(tmp_path))) == weights_hash(whole.model)


@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_layers_are_cut_while_loading(folder, num_layers):
    backbone = load_backbone(str(folder), num_layers=num_layers)
    assert len(backbone.layers) == backbone.config.num_hidden_layers == num_layers


@pytest.mark.parametrize("num_layers", [0, 5])
def test_more_layers_than_there_are(folder, num_layers):
    with pytest.raises(ConfigError, match=f"num_layers={num_layers}, but the backbone has 4 layers"):
        load_backbone(str(folder), num_layers=num_layers)


def test_layer_types_are_cut_with_the_layers():
    backbone = tiny_backbone("qwen2")
    cut_layers(backbone, 2)
    assert len(backbone.config.layer_types) == 2


def test_a_name_that_leads_nowhere():
    with pytest.raises(ConfigError, match="backbone './no-such-folder' cannot be loaded: "):
        load_backbone("./no-such-folder")


def test_a_missing_tensor_is_named_not_made_up(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors: \['layers.1.mlp.up_proj.weight'\]; download"):
        load_backbone(str(folder))


def test_a_file_cut_in_half(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match="cannot be loaded: "):
        load_backbone(str(folder))


@pytest.fixture
def gpt2():
    config = AutoConfig.for_model("gpt2", n_layer=4, n_head=2, n_embd=8, vocab_size=300, n_positions=32)
    return AutoModel.from_config(config)


def test_a_family_that_is_not_supported(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="type 'gpt2' is not supported; supported and tested: llama, mistral,"
    ):
        load_backbone(str(tmp_path))


def test_a_family_that_is_not_supported_given_as_an_object(gpt2):
    with pytest.raises(ConfigError, match="type 'gpt2' is not supported"):
        tiny_reward_model(gpt2)


@pytest.mark.parametrize(
    ("family", "settings", "is_refused"),
    [
        ("mistral", {"sliding_window": 100}, True),
        ("mistral", {"sliding_window": 512}, False),
        ("mistral", {"sliding_window": None}, False),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True}, True),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, False),
        ("llama", {}, False),
    ],
)
def test_attention_windows_shorter_than_the_texts_are_refused(family, settings, is_refused):
    config = AutoConfig.for_model(family, **settings)
    if is_refused:
        with pytest.raises(ConfigError, match="attends to 100 tokens only, shorter than max_length=512"):
            check_family(config, max_length=512)
    else:
        check_family(config, max_length=512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_hash_of_bfloat16_weights_is_the_same_in_any_wider_dtype(dtype):
    assert weights_hash(tiny_backbone(dtype=torch.bfloat16).to(dtype)) == weights_hash(
        tiny_backbone(dtype=torch.bfloat16)
    )


def test_other_weights_have_another_hash():
    changed = tiny_backbone()
    with torch.no_grad():
        changed.layers[3].mlp.up_proj.weight[0, 0] += 1
    hashes = [
        weights_hash(model)
        for model in (tiny_backbone(), changed, tiny_backbone(seed=1), tiny_backbone(layers=3))
    ]
    assert len(set(hashes)) == 4


@given(st.data())
@settings(max_examples=30)
def test_any_value_that_changes_changes_the_hash(data):
    """Also one that no sample of evenly spaced values would meet."""
    model = tiny_backbone()
    before = weights_hash(model)
    name = data.draw(st.sampled_from(sorted(model.state_dict())))
    values = model.state_dict()[name].view(-1)
    values[data.draw(st.integers(0, values.numel() - 1))] += 1
    assert weights_hash(model) != before


def test_a_new_backbone_does_not_share_the_config_it_was_made_from():
    config = tiny_backbone().config
    backbone = new_backbone(config)
    backbone.config.num_hidden_layers = 99
    assert config.num_hidden_layers == 4


# --- smollm2-135m, from wherever it is ---------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without the model anywhere; `install()` puts the PyPI package with its GGUF file there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    found = SimpleNamespace(spec=None, conversions=0)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: found.spec)

    def install(file="model.gguf"):
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / file).touch()
        found.spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "package")])

    def convert(**options):
        found.conversions += 1
        assert options["gguf_file"] == "model.gguf"
        return tiny_backbone()

    monkeypatch.setattr(hub.AutoModelForCausalLM, "from_pretrained", convert)
    monkeypatch.setattr(hub.AutoTokenizer, "from_pretrained", lambda **_: byte_tokenizer())
    found.install = install
    return found


def test_any_other_name_is_taken_as_it_is(machine):
    assert resolve_backbone("some/model") == "some/model"


def test_a_folder_of_that_name_goes_first(machine):
    Path(SMOLLM2).mkdir()
    assert resolve_backbone(SMOLLM2) == SMOLLM2


def test_the_hub_is_asked_if_nothing_is_here_or_the_model_is_in_its_cache(machine, monkeypatch):
    assert resolve_backbone(SMOLLM2) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    machine.install()
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "/cache/model.safetensors")
    assert resolve_backbone(SMOLLM2) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_package_without_a_gguf_file_does_not_help(machine):
    machine.install("readme.txt")
    assert resolve_backbone(SMOLLM2) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_gguf_file_is_converted_once_and_again_only_if_that_was_interrupted(machine, tmp_path):
    machine.install()
    folder = resolve_backbone(SMOLLM2)
    assert resolve_backbone(SMOLLM2) == folder
    assert Path(folder).parent == tmp_path / "cache" / "prefmoe"
    assert Path(folder).name.startswith("model-")
    assert machine.conversions == 1
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in Path(folder).iterdir()
    }
    (Path(folder) / "done").unlink()
    resolve_backbone(SMOLLM2)
    assert machine.conversions == 2


def test_a_gguf_file_is_a_name_too_and_another_file_in_its_place_is_another_model(machine, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    folder = resolve_backbone(str(file))
    assert resolve_backbone(str(file)) == folder
    assert machine.conversions == 1
    file.write_bytes(b"another")
    assert resolve_backbone(str(file)) != folder
    assert machine.conversions == 2


def test_a_quantized_backbone_is_refused():
    config = SimpleNamespace(model_type="llama", quantization_config={"quant_method": "fp8"})
    with pytest.raises(
        ConfigError, match="the backbone is quantized, which changes .*; give the weights it was made"
    ):
        check_family(config, max_length=8)
