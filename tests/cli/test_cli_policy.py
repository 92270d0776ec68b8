"""`prefmoe policy`: train, eval, weights, generate and export on a tiny language model, from files to files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli_helpers import run_cli
from data_helpers import CHATML, byte_tokenizer, write_rows
from prefmoe.data.render import Renderer
from prefmoe.evaluation.metrics import read_metrics
from prefmoe.policy.bench import build_bench
from prefmoe.policy.evaluate import read_report
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.sampling import sample_answers
from prefmoe.policy.settings import load_policy_settings
from prefmoe.records import Message
from reference import merging as slow
from tiny import tiny_language_model
from tiny_policy import pmol_config, randomize

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),  # of TRL and transformers
    pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:Could not find a config file"),
]
TRAININGS = {"pmol", "lora", "lora_harmless", "lora_helpful", "sequential_harmless", "sequential_helpful"}
JUDGED = {"helpful": "advice", "harmless": "facts"}  # what the reward model calls them
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
        "methods": ["pmol", "lora", "lora_average", "emr", "sequential"],
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
    for text in (
        "harmless",
        "helpful",
        "worst preference",
        "own group first",
        "Turning 'helpful'",
        "seconds a step",
    ):
        assert text in result.stderr


def test_train_writes_numbers_pictures_and_adapters(trained):
    run = trained[0] / "run"
    metrics, report = read_metrics(run / "metrics.json"), read_report(run)
    assert list(metrics.methods) == ["base", "pmol", "lora", "lora_average", "emr", "sequential"]
    assert set(metrics.methods["pmol"].tasks) == {"harmless", "helpful"}
    assert set(report.minimum) == set(report.mean) == set(metrics.methods)
    for method, found in metrics.methods.items():
        mean, worst = report.mean[method], report.minimum[method]
        assert mean.value == pytest.approx(found.macro)
        assert worst.value == pytest.approx(min(task.accuracy for task in found.tasks.values()))
        assert worst.low <= worst.value <= mean.value <= mean.high
    assert 0 <= report.group_accuracy["pmol"].accuracy <= 1
    assert [point.weight for point in report.steering["helpful"]] == [0.5, 1, 2]
    # Turned by 1, whichever group, it is the same model, which the test pairs have been through.
    assert report.steering["helpful"][1] == report.steering["harmless"][1]
    assert {file.name for file in (run / "steps").glob("steering_*")} == {
        f"steering_{group}_{weight}.safetensors" for group in (0, 1) for weight in (0.5, 2)
    }
    for group, points in report.steering.items():
        for name, gain in report.steering_gain[group].items():
            assert gain.value == pytest.approx(points[-1].margin[name] - points[0].margin[name], abs=1e-6)
            assert gain.low <= gain.value <= gain.high
            assert gain.low < gain.high
    assert set(report.costs) == TRAININGS
    assert report.costs["lora_helpful"].trainable * 2 == report.costs["lora"].trainable
    for costs in report.costs.values():
        assert costs.seconds_per_step > 0
        assert costs.peak_bytes is None or costs.peak_bytes > 4 * costs.trainable
    for name in ("routing_pmol.png", "steering.png", "pmol/adapter_config.json", "lora_average/average"):
        assert (run / name).exists()


def test_the_same_command_again_reads_what_is_there(trained):
    folder, config, _ = trained
    before = {file: file.stat().st_mtime_ns for file in (folder / "run" / "steps").iterdir()}
    assert run_cli("policy", "train", config).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in (folder / "run" / "steps").iterdir()} == before


def test_a_comparison_may_be_widened(trained, tmp_path):
    folder, config, _ = trained
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    before = {file.name: file.read_bytes() for file in (run / "steps").iterdir()}
    result = run_cli("policy", "train", config, "--set", "methods=[pmol, top1]", "--out", run)
    assert result.exit_code == 0, result.stderr
    assert set(read_metrics(run / "metrics.json").methods) == {"base", "pmol", "top1"}
    after = {file.name: file.read_bytes() for file in (run / "steps").iterdir()}
    assert {name: after[name] for name in before} == before
    assert {name.split(".")[0] for name in set(after) - set(before)} == {"top1", "test_top1"}


def test_emr_judges_a_pair_by_the_model_of_its_own_preference(trained):
    """As merging by hand: LoRAs from the run folder, products, the slow twin, one text at a time."""
    run = trained[0] / "run"
    logps = load_file(run / "steps" / "test_emr.safetensors")["logps"]
    names = ["harmless", "helpful"]
    bench = build_bench(load_policy_settings(trained[1]))
    loras = [load_file(run / "emr" / name / "adapter_model.safetensors") for name in names]
    layers = [name.removesuffix(".lora_A.weight") for name in loras[0] if "lora_A" in name]
    products = [[lora[f"{n}.lora_B.weight"] @ lora[f"{n}.lora_A.weight"] for n in layers] for lora in loras]
    alpha = json.loads((run / "emr" / "helpful" / "adapter_config.json").read_text())
    scale = alpha["lora_alpha"] / alpha["r"]
    rows = [torch.cat([product.flatten() * scale for product in task]).tolist() for task in products]
    merged = torch.tensor(slow.elect_mask_rescale(rows))
    for index, preference in enumerate(names):
        model = bench.new_model().eval()
        parts = merged[index].split([product.numel() for product in products[0]])
        for layer, part in zip(layers, parts, strict=True):
            weight = model.get_submodule(layer.removeprefix("base_model.model.")).weight
            weight.data += part.view_as(weight)
        test = bench.splits["test"]
        places = [i for i, row in enumerate(test.rows) if row.preference == preference]
        expected = completion_logps(model, [test.texts()[i] for i in places])
        torch.testing.assert_close(logps[places], expected, rtol=1e-4, atol=1e-4)


def copy_of(trained, folder: Path) -> Path:
    """The config of the trained run, for a copy of its folder."""
    shutil.copytree(trained[0] / "run", folder / "run")
    content = yaml.safe_load(trained[1].read_text(encoding="utf-8"))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content | {"out": str(folder / "run")}), encoding="utf-8")
    return path


def test_in_sequence_each_preference_begins_where_the_one_before_ended(trained, tmp_path, monkeypatch):
    from prefmoe.policy.costs import CostCallback

    config, run = copy_of(trained, tmp_path), tmp_path / "run"
    last = run / "steps" / "sequential_helpful.safetensors"
    before = load_file(last)
    last.unlink()
    shutil.rmtree(run / "checkpoints" / "sequential_helpful")
    started, on_train_begin = {}, CostCallback.on_train_begin

    def keep(self, args, state, control, model=None, **kwargs):
        on_train_begin(self, args, state, control, model=model, **kwargs)
        started[self.name] = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}

    monkeypatch.setattr(CostCallback, "on_train_begin", keep)
    assert run_cli("policy", "train", config).exit_code == 0
    assert list(started) == ["sequential_helpful"]
    first = load_file(run / "steps" / "sequential_harmless.safetensors")
    assert first.keys() == started["sequential_helpful"].keys() == before.keys()
    for name, tensor in first.items():
        assert torch.equal(started["sequential_helpful"][name], tensor)
        assert torch.equal(load_file(last)[name], before[name])
    assert any(not torch.equal(first[name], before[name]) for name in first)


def test_a_run_folder_without_a_record_of_its_inputs_is_taken_up_and_gets_one(trained, tmp_path):
    config, record = copy_of(trained, tmp_path), tmp_path / "run" / "inputs.json"
    before = json.loads(record.read_text())
    record.unlink()
    assert run_cli("policy", "train", config).exit_code == 0
    assert json.loads(record.read_text()) == before
    assert set(before) == {
        "the train pairs",
        "the validation pairs",
        "the test pairs",
        "the model",
        "the model's dtype",
    }


def test_a_run_does_not_go_on_with_other_pairs(trained, tmp_path):
    config, file = copy_of(trained, tmp_path), trained[0] / "test.jsonl"
    rows = file.read_text(encoding="utf-8")
    try:
        file.write_text(rows.replace("Sure", "Fine"), encoding="utf-8")
        result = run_cli("policy", "train", config)
    finally:
        file.write_text(rows, encoding="utf-8")
    assert result.exit_code == 3, result.stderr
    assert "the test pairs changed since this run began; choose another --out" in result.stderr


@pytest.mark.parametrize("name", ["the model", "the model's dtype"])
def test_a_run_does_not_go_on_with_another_model(trained, tmp_path, name):
    """As if the folder of the model had got other weights, or `auto` meant another dtype on this machine."""
    config, record = copy_of(trained, tmp_path), tmp_path / "run" / "inputs.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {name: "other"}))
    result = run_cli("policy", "train", config)
    assert result.exit_code == 3, result.stderr
    assert f"{name} changed since this run began" in result.stderr


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
    of_run = run_cli("policy", "generate", trained[0] / "run", "Hi there", "--max-new-tokens", 5)
    assert of_run.stdout == one.stdout
    from typer.testing import CliRunner

    from prefmoe.cli.app import app

    two = CliRunner().invoke(
        app, ["policy", "generate", str(model), "--max-new-tokens", "5"], input="Hi there\nHo\n"
    )
    assert two.stdout.splitlines()[0] == one.stdout.strip()
    assert len(two.stdout.splitlines()) == 2


@pytest.fixture(scope="module")
def twins(language_model_folder, tmp_path_factory) -> tuple[Path, Path]:
    """Two adapters with random experts, which differ in the experts of `helpful` alone."""
    root = tmp_path_factory.mktemp("twins")
    config = pmol_config(groups={"helpful": 2, "harmless": 1})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(language_model_folder), config)
    randomize(model)
    model.save_pretrained(root / "one" / "pmol")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pmol_bank.default.B"):
                parameter[:2] += torch.randn(parameter[:2].shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(root / "other" / "pmol")
    return root / "one" / "pmol", root / "other" / "pmol"


def test_generate_prefer_of_0_answers_as_if_the_group_were_not_there(twins, language_model_folder):
    def answers(model, *prefer):
        options = [part for entry in prefer for part in ("--prefer", entry)]
        result = run_cli("policy", "generate", model, "Hi there", "Ho", "--max-new-tokens", 12, *options)
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    one, other = twins
    assert answers(one) != answers(other)
    assert answers(one, "helpful=0") == answers(other, "helpful=0") != answers(one)
    assert answers(one, "harmless=0") != answers(other, "harmless=0")
    # With the empty expert alone it is the model itself.
    tokenizer = byte_tokenizer(CHATML)
    base = AutoModelForCausalLM.from_pretrained(language_model_folder)
    prompts = [
        Renderer(tokenizer, max_length=96).encode_prompt((Message("user", text),)).input_ids
        for text in ("Hi there", "Ho")
    ]
    options = {"max_new_tokens": 12, "temperature": 0.0, "seed": 0, "batch_rows": 1}
    expected = sample_answers(base, tokenizer, prompts, **options)
    assert answers(one, "helpful=0", "harmless=0") == expected != answers(one)


def test_eval_prefer_of_0_measures_as_if_the_group_were_not_there(twins, trained):
    pairs = trained[0] / "train.jsonl"

    def table(model, *prefer):
        options = [part for entry in prefer for part in ("--prefer", entry)]
        result = run_cli("policy", "eval", model, pairs, "--max-length", 96, *options)
        assert result.exit_code == 0, result.stderr
        return result.stderr.partition("Accuracy on test pairs")[2]  # progress comes before, with times

    one, other = twins
    assert table(one) != table(other)
    assert table(one, "helpful=0") == table(other, "helpful=0") != table(one)
    # With the empty expert alone every log-probability is the reference's: margins of 0 are ties.
    ties = table(one, "helpful=0", "harmless=0")
    assert ties.count("0.500 (0.50-0.50)") == 2
    assert "0.500 (0.50-0.50)" not in table(one)


def test_judge_compares_sampled_answers_by_a_reward_model(trained, saved_model, tmp_path):
    run, pairs, out = trained[0] / "run", tmp_path / "pairs.jsonl", tmp_path / "judged"
    rows = pair_rows("test", 3)
    write_rows(pairs, [{**row, "preference": JUDGED[row["preference"]]} for row in rows])
    command = ["policy", "judge", run / "pmol", run / "lora", "--prompts-of", pairs, "-o", out]
    result = run_cli(*command, "--reward-model", saved_model, "--max-new-tokens", 4, "--limit", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out / 'judged.json'}\n"
    found = json.loads((out / "judged.json").read_text())
    assert set(found["policies"]) == {"base", "pmol", "lora"}
    assert len(found["answers"]) == 4
    assert found["policies"]["pmol"][JUDGED["helpful"]]["prompts"] == 2
    assert "wins over the base" in result.stderr
    refused = run_cli(*command, "--reward-model", tmp_path, "--max-new-tokens", 4)
    assert refused.exit_code == 5
    assert str(tmp_path) in refused.stderr
    assert "Traceback" not in refused.stderr


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
        (
            ["generate", "nowhere", "x"],
            5,
            "nowhere: holds no adapter; expected a folder such as runs/policy/pmol",
        ),
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


def test_a_run_without_pmol_names_its_adapters(trained, tmp_path):
    shutil.copytree(trained[0] / "run" / "lora", tmp_path / "run" / "lora")
    result = run_cli("policy", "generate", tmp_path / "run", "x")
    assert result.exit_code == 5
    assert f"holds no adapter; give one of {tmp_path}/run/lora" in result.stderr


def test_every_other_variant_trains(language_model_folder, tmp_path):
    methods = ["pmol_no_group_loss", "pmol_no_empty", "pmol_lbc", "top1", "top2"]
    config = write_config(tmp_path, language_model_folder, methods=methods)
    result = run_cli("policy", "train", config, "--set", "steering.pairs_per_preference=0")
    assert result.exit_code == 0, result.stderr
    report = read_report(tmp_path / "run")
    assert set(report.costs) == set(report.group_accuracy) == set(methods)
    assert all(0 <= found.accuracy <= 1 for found in report.group_accuracy.values())
    states = [load_file(tmp_path / "run" / "steps" / f"{name}.safetensors") for name in methods]
    moved = [max(t.abs().max().item() for key, t in state.items() if key.endswith("B")) for state in states]
    assert min(moved) > 0  # B starts at 0


def test_one_preference_has_no_group_loss_and_says_so(language_model_folder, tmp_path):
    config = write_config(tmp_path, language_model_folder, methods=["pmol"])
    result = run_cli("policy", "train", config, "--set", "data.preferences=[helpful]")
    assert result.exit_code == 0, result.stderr
    assert "PMoL has one group, 'helpful', so the group loss has nothing to tell apart" in result.stderr


def test_an_adapter_on_a_base_of_another_size_is_refused(trained, tmp_path):
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
