from pathlib import Path

import pytest
import yaml

from prefmoe.errors import ConfigError
from prefmoe.reward.settings import RewardSettings, check_settings, load_settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text("data: {train: pairs.jsonl}\nphase1: {epochs: 2}\nmethods: [single, dmoerm]\n")
    return file


def test_what_the_file_says_is_set_and_the_rest_is_default(config: Path) -> None:
    settings = load_settings(config)
    assert (settings.data.train, settings.phase1.epochs, settings.methods) == (
        "pairs.jsonl",
        2.0,
        ["single", "dmoerm"],
    )
    assert settings.phase2 == RewardSettings(data=settings.data).phase2


def test_changes_are_yaml_and_win_over_the_file(config: Path) -> None:
    changes = ["phase1.epochs=0.5", "methods=[per_task]", "router.l2=1e-4", "backbone.num_layers=null"]
    settings = load_settings(config, changes, out="runs/x")
    assert settings.phase1.epochs == 0.5
    assert settings.methods == ["per_task"]
    assert settings.backbone.num_layers is None
    assert settings.out == "runs/x"


def test_settings_survive_their_own_dump(config: Path) -> None:
    settings = load_settings(config)
    assert check_settings(yaml.safe_load(yaml.safe_dump(settings.model_dump())), where="again") == settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["phase1.epoch=1"], "phase1.epoch: unknown key; did you mean 'epochs'?"),
        (["exprets.rank=1"], "exprets: unknown key; did you mean 'experts'?"),
        (["experts.zzz=1"], "experts.zzz: unknown key; known: split_layer, rank"),
        (["phase1.epochs=-1"], "phase1.epochs: .*greater than or equal to 0; got -1"),
        (["methods=[dmorm]"], "methods.0: .*'dmoerm'; got 'dmorm'"),
        (["methods=[]"], "methods: .*at least 1 item"),
        (["data.validation_fraction=1"], "data.validation_fraction: .*less than 1; got 1"),
        (["phase1.shared_start=3"], "shared_start=3.0 is more than epochs=2.0"),
        (["phase3.general_expert=true"], "general_expert needs phase1.shared_start"),
        (
            ["phase3.general_expert=true", "phase1.shared_start=1", "phase1.method=full"],
            "general_expert needs phase1.method: lora",
        ),
        (
            ["phase1.report_to=wendb"],
            "phase1.report_to: .*'wendb' is not installed; install it or choose none",
        ),
        (["phase1.epochs"], "expected key=value"),
        (["data.train.x=1"], "'train' is a value, not a section"),
        (["seed=[1"], "not a YAML value"),
    ],
)
def test_a_wrong_entry_is_named_with_what_to_do(config: Path, changes: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_settings(config, changes)


def test_all_problems_are_named_at_once(config: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(config, ["phase1.epoch=1", "seed=x", "experts.rank=0"])
    assert all(name in str(caught.value) for name in ("phase1.epoch", "seed", "experts.rank", str(config)))


def test_the_training_pairs_have_to_be_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {}\n")
    with pytest.raises(ConfigError, match=r"data\.train: missing; add it"):
        load_settings(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: [1", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"- a\n- b\n", "expected keys such as 'data'.*got list"),
        (b"", "expected keys such as 'data'.*got NoneType"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        load_settings(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: the config cannot be read: No such file"):
        load_settings(tmp_path / "none.yaml")


def test_the_task_head_is_always_a_candidate_and_the_first_one(config: Path) -> None:
    settings = load_settings(config, ["phase3.kinds=[mlp, linear_scores, mlp]"])
    assert settings.phase3.kinds == ["task_head", "mlp", "linear_scores"]
