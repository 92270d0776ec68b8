"""`prefmoe policy`: train, eval, weights, generate and export on a tiny language model, from files to files."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from cli_helpers import run_cli
from data_helpers import CHATML, byte_tokenizer, write_rows
from prefmoe.evaluation.metrics import read_metrics
from prefmoe.policy.evaluate import read_report
from tiny import tiny_language_model

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),  # of TRL and transformers
    pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:Could not find a config file"),
]
SIZES = {"train": 12, "validation": 4, "test": 6}


@pytest.fixture(scope="module")
def language_model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("language_model")
    tiny_language_model().save_pretrained(folder)
    byte_tokenizer(CHATML).save_pretrained(folder)
    return folder


def pair_rows(split: str, num: int) -> list[dict]:
    return [
        {
            "prompt": f"{name} {split} {i}?",
            "chosen": f"{'Sure' if name == 'helpful' else 'Sorry, no'} {i}.",
            "rejected": f"{'Sorry, no' if name == 'helpful' else 'Sure'} {i}.",
            "preference": name,
        }
        for i in range(num)
        for name in ("helpful", "harmless")
    ]


def write_config(folder: Path, model: Path, **changes: object) -> Path:
    for split, num in SIZES.items():
        write_rows(folder / f"{split}.jsonl", pair_rows(split, num))
    content: dict[str, object] = {
        "data": {split: str(folder / f"{split}.jsonl") for split in SIZES},
        "model": {"name": str(model), "dtype": "float32", "max_length": 96},
        "adapter": {"rank": 2},
        "training": {"batch_pairs": 8, "learning_rate": 0.01},
        "steering": {"weights": [0.5, 1, 2], "pairs_per_preference": 2},
        "methods": ["pmol", "lora", "lora_average"],
        "out": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(language_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    config = write_config(folder, language_model_folder)
    return folder, config, run_cli("policy", "train", config)


def test_train_prints_the_table_and_the_run_folder(trained):
    folder, _, result = trained
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{folder / 'run'}\n"
    assert "24 train, 8 validation, 12 test pairs of harmless, helpful" in result.stderr
    for text in ("harmless", "helpful", "worst preference", "own group first", "Turning 'helpful'"):
        assert text in result.stderr


def test_train_writes_numbers_pictures_and_adapters(trained):
    run = trained[0] / "run"
    metrics, report = read_metrics(run / "metrics.json"), read_report(run)
    assert list(metrics.methods) == ["base", "pmol", "lora", "lora_average"]
    assert set(metrics.methods["pmol"].tasks) == {"harmless", "helpful"}
    assert set(report.minimum) == set(metrics.methods)
    assert 0 <= report.group_accuracy["pmol"].accuracy <= 1
    assert [point.weight for point in report.steering["helpful"]] == [0.5, 1, 2]
    # Turned by 1, whichever group, it is the same model.
    assert report.steering["helpful"][1] == report.steering["harmless"][1]
    for name in ("routing_pmol.png", "steering.png", "pmol/adapter_config.json", "lora_average/average"):
        assert (run / name).exists()


def test_the_same_command_again_reads_what_is_there(trained):
    folder, config, _ = trained
    before = {file: file.stat().st_mtime_ns for file in (folder / "run" / "steps").iterdir()}
    assert run_cli("policy", "train", config).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in (folder / "run" / "steps").iterdir()} == before


def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    trained, language_model_folder, tmp_path, monkeypatch
):
    from prefmoe.runs.run import LogCallback

    config = write_config(tmp_path, language_model_folder, methods=["pmol"])
    on_step_end = LogCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LogCallback, "on_step_end", stop)
        assert run_cli("policy", "train", config).exit_code == 130
    assert list((tmp_path / "run" / "checkpoints" / "pmol").glob("checkpoint-*"))
    assert run_cli("policy", "train", config).exit_code == 0
    stopped, whole = (
        load_file(folder / "run" / "steps" / "pmol.safetensors") for folder in (tmp_path, trained[0])
    )
    assert stopped.keys() == whole.keys()
    assert all((stopped[name] == whole[name]).all() for name in whole)


def test_pairs_of_like_length_share_a_training_batch(language_model_folder, tmp_path, monkeypatch):
    from prefmoe.policy.train import _TokenizedDPOTrainer

    lines = [{**row, "prompt": "?" * (1 + 6 * (i % 5))} for i, row in enumerate(pair_rows("train", 20))]
    config = write_config(
        tmp_path,
        language_model_folder,
        methods=["lora"],
        training={"batch_pairs": 2, "evaluations": 0},
        steering={"pairs_per_preference": 0},
    )
    write_rows(tmp_path / "train.jsonl", lines)
    masks = []
    compute_loss = _TokenizedDPOTrainer.compute_loss

    def watch(self, model, inputs, *args, **kwargs):
        masks.append(inputs["attention_mask"])
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(_TokenizedDPOTrainer, "compute_loss", watch)
    assert run_cli("policy", "train", config).exit_code == 0
    # Prompts of 5 lengths, twice 40 texts: two drawn at random would differ in length four times out of five.
    padding = sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding < 0.1


def test_eval_gives_the_accuracies_of_the_run(trained):
    folder = trained[0]
    metrics = read_metrics(folder / "run" / "metrics.json")
    result = run_cli("policy", "eval", folder / "run" / "pmol", folder / "test.jsonl", "--max-length", 96)
    assert result.exit_code == 0, result.stderr
    assert f"{metrics.methods['pmol'].macro:.3f}" in result.stderr
    assert "own group first" in result.stderr


def test_weights_writes_the_picture_and_its_numbers(trained, tmp_path):
    folder = trained[0]
    out = tmp_path / "weights.png"
    result = run_cli("policy", "weights", folder / "run" / "pmol", folder / "test.jsonl", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out.with_suffix('.json')}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert set(json.loads(out.with_suffix(".json").read_text())["weights"]) == {"helpful", "harmless"}


def test_generate_answers_arguments_and_lines_of_stdin(trained, monkeypatch):
    model = trained[0] / "run" / "pmol"
    one = run_cli("policy", "generate", model, "Hi there", "--max-new-tokens", 5)
    assert one.exit_code == 0, one.stderr
    assert isinstance(json.loads(one.stdout), str)
    turned = run_cli("policy", "generate", model, "Hi there", "--max-new-tokens", 5, "--prefer", "helpful=0")
    assert turned.exit_code == 0, turned.stderr
    from typer.testing import CliRunner

    from prefmoe.cli.app import app

    two = CliRunner().invoke(
        app, ["policy", "generate", str(model), "--max-new-tokens", "5"], input="Hi there\nHo\n"
    )
    assert two.stdout.splitlines()[0] == one.stdout.strip()
    assert len(two.stdout.splitlines()) == 2


def test_export_writes_a_lora_and_says_how_far_off_it_is(trained, tmp_path):
    folder = trained[0]
    result = run_cli(
        "policy",
        "export",
        folder / "run" / "pmol",
        "-o",
        tmp_path / "x",
        "--measure-on",
        folder / "test.jsonl",
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "nats a token on average" in result.stderr


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        (["--set", "adapter.rnk=2"], 4, "adapter.rnk: unknown key; did you mean 'rank'?"),
        (["--set", "methods=[pmoll]"], 4, "methods.0: Input should be 'pmol'"),
        (["--set", "data.train=nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["--set", "data.preferences=[helpfull]"], 3, "did you mean 'helpful'?"),
        (["--set", "adapter.target_modules=[q_projj]"], 4, "nearest: 'q_proj' (2 modules)"),
        (["--set", "adapter.experts_per_group=0"], 4, "adapter.experts_per_group"),
        (["--set", "adapter.router=recurrent", "--set", "adapter.router_scope=model"], 4, "choose 'block'"),
        (["--set", "model.name=/nowhere/at/all"], 4, "model '/nowhere/at/all'"),
    ],
)
def test_mistakes_in_a_config_are_sentences(language_model_folder, tmp_path, change, code, sentence):
    config = write_config(tmp_path, language_model_folder, methods=["pmol"])
    result = run_cli("policy", "train", config, *change)
    assert result.exit_code == code, result.stderr
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["generate", "MODEL", "x", "--prefer", "helpful"], 4, "expected GROUP=WEIGHT, such as harmless=2"),
        (["generate", "MODEL", "x", "--prefer", "warm=2"], 4, "there is no group 'warm'"),
        (["generate", "MODEL", "x", "--prefer", "helpful=-1"], 4, "expected a number of 0 or more"),
        (["generate", "LORA", "x", "--prefer", "helpful=2"], 4, "is no PMoL adapter, it cannot be steered"),
        (["generate", "nowhere", "x"], 5, "nowhere: holds no adapter"),
        (["weights", "LORA", "TEST", "-o", "w.png"], 4, "is no PMoL adapter"),
        (["export", "MODEL", "-o", "x"], 4, "give weights (--prefer GROUP=WEIGHT)"),
        (["eval", "MODEL", "nowhere.jsonl"], 3, "nowhere.jsonl"),
    ],
)
def test_mistakes_of_a_command_are_sentences(trained, arguments, code, sentence, tmp_path, monkeypatch):
    folder = trained[0]
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": folder / "run" / "pmol", "LORA": folder / "run" / "lora", "TEST": folder / "test.jsonl"}
    result = run_cli("policy", *[names.get(argument, argument) for argument in arguments])
    assert result.exit_code == code, result.stderr
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_an_adapter_on_a_base_of_another_size_is_refused(trained, tmp_path):
    import shutil

    other = tmp_path / "other"
    tiny_language_model(hidden=16).save_pretrained(other)
    byte_tokenizer(CHATML).save_pretrained(other)
    adapter = tmp_path / "pmol"
    shutil.copytree(trained[0] / "run" / "pmol", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    result = run_cli("policy", "generate", adapter, "x")
    assert result.exit_code == 5, result.stderr
    assert "does not fit" in result.stderr
