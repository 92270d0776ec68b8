"""Saving and loading: bit for bit, whole or not at all, and every damage is named."""

import errno
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefmoe.errors import CheckpointError, ConfigError
from prefmoe.reward import artefact
from prefmoe.reward.config import DMoERMConfig
from prefmoe.reward.model import DMoERMForSequenceClassification
from tiny import tiny_backbone, tiny_reward_model

TOKEN_IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(1))
WEIGHTS = "model.safetensors"


@pytest.fixture
def backbone_folder(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture
def model(backbone_folder):
    model = tiny_reward_model(aggregators=["mlp", "task_head", "linear_states"])
    model.config.backbone = str(backbone_folder)
    return model


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    return DMoERMForSequenceClassification.from_pretrained(folder, **options)


@torch.no_grad()
def rewards(model):
    return model(TOKEN_IDS, routing="soft").logits


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- save then load is the identity -----------------------------------------------------------------------


def assert_same(left, right):
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(rewards(left), rewards(right))


@pytest.mark.parametrize("include_backbone", [False, True])
def test_save_then_load_is_the_identity(model, tmp_path, include_backbone):
    model.save_pretrained(tmp_path / "m", include_backbone=include_backbone)
    again = load(tmp_path / "m")
    assert_same(again, model)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.backbone.parameters())
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    again.save_pretrained(tmp_path / "n", include_backbone=include_backbone)
    assert contents(tmp_path / "n") == contents(tmp_path / "m")


def test_a_config_that_cannot_be_read_back_is_not_saved(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    before = contents(tmp_path / "m")
    model.config.max_tokens = float("nan")  # JSON has no such number, and it equals nothing
    with pytest.raises(CheckpointError, match="max_tokens of the config was read back differently"):
        model.save_pretrained(tmp_path / "m")
    assert contents(tmp_path / "m") == before


@pytest.mark.parametrize("changes", [{"pooling": "mean"}, {"dense_tasks": True}, {"standardize": False}])
def test_save_then_load_is_the_identity_in_other_shapes(tmp_path, changes):
    model = tiny_reward_model(**changes)
    model.save_pretrained(tmp_path / "m", include_backbone=True)
    assert_same(load(tmp_path / "m"), model)


def test_a_bfloat16_backbone_stays_bfloat16_and_the_small_parts_float32(tmp_path):
    model = tiny_reward_model(tiny_backbone(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "m", include_backbone=True)
    again = load(tmp_path / "m")
    assert again.backbone.dtype == torch.bfloat16
    assert again.experts.head_weight.dtype == torch.float32
    assert_same(again, model)


def test_the_small_artefact_holds_no_backbone_and_the_other_needs_nothing_else(
    model, tmp_path, backbone_folder
):
    model.save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert not any(name.startswith("backbone.") for name in load_file(tmp_path / "small" / WEIGHTS))
    backbone_folder.rename(tmp_path / "moved away")
    assert_same(load(tmp_path / "whole"), model)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path / "small")
    given = load(tmp_path / "small", backbone=tiny_backbone())
    assert torch.equal(rewards(given), rewards(model))


def test_saving_in_the_other_form_replaces_the_first(model, saved):
    model.save_pretrained(saved, include_backbone=True)
    assert_same(load(saved), model)
    model.save_pretrained(saved)
    assert not any(name.startswith("backbone.") for name in load_file(saved / WEIGHTS))
    assert_same(load(saved), model)


def test_large_models_are_saved_in_shards_and_go_back_to_one_file(model, saved):
    model.save_pretrained(saved, include_backbone=True, max_shard_size=40_000)
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 1
    assert not (saved / WEIGHTS).exists()
    assert_same(load(saved), model)
    model.save_pretrained(saved, include_backbone=True)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", WEIGHTS]
    assert_same(load(saved), model)


def test_auto_classes_load_it(saved, model):
    assert isinstance(AutoConfig.from_pretrained(saved), DMoERMConfig)
    again = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1, trust_remote_code=False)
    assert type(again) is DMoERMForSequenceClassification
    assert_same(again, model)
    assert again.config.name_or_path == str(saved)


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", torch.float64])
@pytest.mark.parametrize("include_backbone", [False, True])
def test_the_backbone_can_be_loaded_in_another_dtype(model, tmp_path, dtype, include_backbone):
    model.save_pretrained(tmp_path / "m", include_backbone=include_backbone)
    again = load(tmp_path / "m", dtype=dtype)
    assert again.backbone.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    assert again.experts.head_weight.dtype == torch.float32
    given = {"task_ids": torch.tensor([0, 1, 2]), "routing": "given"}  # the router would magnify the rounding
    with torch.no_grad():
        theirs, ours = again(TOKEN_IDS, **given).logits, model(TOKEN_IDS, **given).logits
    torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.05, check_dtype=False)


@pytest.mark.parametrize("include_backbone", [False, True])
def test_the_attention_of_the_backbone_can_be_chosen(model, tmp_path, include_backbone):
    model.save_pretrained(tmp_path / "m", include_backbone=include_backbone)
    again = load(tmp_path / "m", attn_implementation="eager", device_map="cpu")
    assert again.backbone.config._attn_implementation == "eager"
    torch.testing.assert_close(rewards(again), rewards(model))


def test_quantized_weights_are_refused(saved):
    with pytest.raises(ConfigError, match="a quantized backbone gives other rewards .*; leave it out"):
        load(saved, quantization_config={"load_in_4bit": True})


def test_a_folder_with_other_files_keeps_them(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


# --- a save that fails -------------------------------------------------------------------------------------


def full_disk(tensors, folder, **_):
    """Writes some of the file, then there is no room left."""
    (folder / WEIGHTS).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("interruption", ["full disk", "damaged on the way", "stopped by the user"])
def test_a_save_that_fails_leaves_the_old_artefact_whole(saved, model, monkeypatch, interruption):
    before, old_rewards = contents(saved), rewards(model)
    with torch.no_grad():
        model.experts.head_weight.add_(1)
    if interruption == "full disk":
        monkeypatch.setattr(artefact, "save_torch_state_dict", full_disk)
        expected = pytest.raises(
            CheckpointError, match="what was there is unchanged: .*No space left on device"
        )
    elif interruption == "damaged on the way":
        monkeypatch.setattr(
            artefact, "read_tensors", lambda folder: load_file(folder / WEIGHTS) | {"x": torch.ones(1)}
        )
        expected = pytest.raises(CheckpointError, match="x was read back differently")
    else:
        monkeypatch.setattr(DMoERMConfig, "save_pretrained", lambda *_: pytest.exit("Ctrl-C"))
        expected = pytest.raises(pytest.exit.Exception)
    with expected:
        model.save_pretrained(saved)
    monkeypatch.undo()
    assert contents(saved) == before
    assert torch.equal(rewards(load(saved)), old_rewards)


def test_a_folder_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be saved"):
        model.save_pretrained(tmp_path / "file")


# --- loading what is damaged -------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.pop("router.weight"))
    with pytest.raises(CheckpointError, match=r"missing tensors \['router.weight'\], unknown tensors \[\]"):
        load(saved)


def test_an_extra_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.update(surprise=torch.ones(2)))
    with pytest.raises(CheckpointError, match=r"missing tensors \[\], unknown tensors \['surprise'\]"):
        load(saved)


def test_a_tensor_of_another_shape_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"score_std": torch.ones(7)}))
    with pytest.raises(CheckpointError, match=r"score_std has shape \(7,\), expected \(6,\)"):
        load(saved)


def test_a_config_that_asks_for_other_experts_names_what_does_not_fit(saved):
    edit_config(saved, rank=3)
    with pytest.raises(
        CheckpointError, match=r"experts.sites.*\.A has shape \(6, 2, 32\), expected \(6, 3, 32\)"
    ):
        load(saved)


def test_a_missing_shard_is_noticed(saved, model):
    model.save_pretrained(saved, max_shard_size=10_000)
    next(saved.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"missing tensors \['"):
        load(saved)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_weight_file_cut_short(saved, share):
    file = saved / WEIGHTS
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: damaged or cut short .*save or copy it again"):
        load(saved)


def test_no_weight_file(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises(
        CheckpointError, match=f"holds no {WEIGHTS}; expected a folder written by save_pretrained"
    ):
        load(saved)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"model_type": "llama"}', "{}"])
def test_a_config_that_is_not_ours(saved, text):
    config = saved / "config.json"
    config.unlink() if text is None else config.write_text(text)
    with pytest.raises(CheckpointError, match="config.json: (no readable config|model_type is)"):
        load(saved)


@pytest.mark.parametrize(
    "changes",
    [{"text_config": {"model_type": "nonsense"}}, {"text_config": 3}, {"tasks": ["a"]}, {"tasks": 3}],
    ids=["unknown backbone", "no backbone", "tasks as a list", "tasks as a number"],
)
def test_a_config_with_nonsense_in_it(saved, changes):
    edit_config(saved, **changes)
    with pytest.raises(CheckpointError, match="config.json: no readable config of a reward model"):
        load(saved)


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b", "/a/b"])
def test_no_such_folder(name):
    with pytest.raises(CheckpointError, match="no such folder; give the folder that `reward train` wrote"):
        load(name)


def test_a_hub_id_that_cannot_be_reached():
    with pytest.raises(CheckpointError, match="nobody/nothing: neither a folder nor found on the hub"):
        load("nobody/nothing")


# --- another backbone --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"hidden": 64}, {"layers": 5}, {"family": "qwen2"}, {"vocab": 301}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_backbone_is_refused_with_both_hashes(saved, model, other):
    given = tiny_backbone(**other)
    hashes = rf"{model.config.backbone_hash}, but the one found has weights {artefact.weights_hash(given)}"
    with pytest.raises(
        CheckpointError, match=rf"trained on backbone .* with weights {hashes}; give the original"
    ):
        load(saved, backbone=given)


def test_a_backbone_that_changed_where_it_lies_is_refused(saved, backbone_folder):
    tiny_backbone(seed=1).save_pretrained(backbone_folder)
    with pytest.raises(CheckpointError, match="give the original backbone or retrain"):
        load(saved)


def test_a_deeper_backbone_is_cut_to_the_layers_that_were_trained_on(saved, model, backbone_folder):
    tiny_backbone(layers=6).save_pretrained(backbone_folder)
    deeper = artefact.weights_hash(artefact.load_backbone(str(backbone_folder), num_layers=4))
    edit_config(saved, backbone_hash=deeper)
    assert len(load(saved).backbone.layers) == 4


def test_weights_that_changed_inside_a_self_contained_artefact_are_noticed(model, tmp_path):
    model.save_pretrained(tmp_path / "m", include_backbone=True)
    edit_tensors(tmp_path / "m", lambda tensors: tensors["backbone.norm.weight"].add_(1))
    with pytest.raises(CheckpointError, match="give the original backbone or retrain"):
        load(tmp_path / "m")


def test_an_artefact_that_names_no_backbone(tmp_path):
    tiny_reward_model().save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="holds no backbone and names none; pass backbone="):
        load(tmp_path / "m")


def test_errors_can_be_sent_between_processes(saved):
    with pytest.raises(CheckpointError) as caught:
        load(saved, backbone=tiny_backbone(seed=1))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
