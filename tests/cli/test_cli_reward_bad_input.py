"""What a user's mistakes look like: a sentence and an exit code, never a traceback (issue 2, 'Bad input').

Every row of that table is here, as a user meets it; the tests of the artefact and of runs look closer at full disks,
damaged files and other backbones.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from transformers import PreTrainedTokenizerBase, Trainer

from cli_helpers import MAX_LENGTH, pair_rows, run_cli, write_config
from data_helpers import row, write_rows
from prefmoe.evaluation.metrics import read_metrics
from prefmoe.reward import artefact
from tiny import tiny_backbone


class Mistake(NamedTuple):
    """What is wrong, and what is said of it (`{folder}` is the test's folder)."""

    situation: str
    make: Callable[[Path], list[object]]  # spoils the folder of a good config; gives further arguments
    sentence: str
    code: int


def setting(*changes: str) -> Callable[[Path], list[object]]:
    return lambda folder: [part for change in changes for part in ("--set", change)]


def content(name: str, text: str | bytes) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return []

    return make


def rows(name: str, values: list[dict]) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        write_rows(folder / name, values)
        return []

    return make


def without(name: str) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        (folder / name).unlink()
        return []

    return make


def changed(number: int, **changes: object) -> list[dict]:
    """Good training rows, of which one (counted from 1) is changed; a value of None takes the column away."""
    values = pair_rows("train", num=50)
    spoilt = values[number - 1] | changes
    values[number - 1] = {name: value for name, value in spoilt.items() if value is not None}
    return values


MISTAKES = [
    Mistake(
        "wrong key",
        content("config.yaml", "data: {train: a.jsonl}\nphase1: {epoch: 2}\nmethodes: [single]\n"),
        "{folder}/config.yaml: phase1.epoch: unknown key; did you mean 'epochs'?\n"
        "{folder}/config.yaml: methodes: unknown key; did you mean 'methods'?\n",
        4,
    ),
    Mistake(
        "wrong key by --set",
        setting("experts.ranks=4"),
        "experts.ranks: unknown key; did you mean 'rank'?",
        4,
    ),
    Mistake("wrong value", setting("phase1.epochs=-1"), "phase1.epochs: Input should be greater than", 4),
    Mistake(
        "unknown method", setting("methods=[dmoe]"), "'single', 'single_wide', 'per_task' or 'dmoerm'", 4
    ),
    Mistake("no data", content("config.yaml", "methods: [single]"), "config.yaml: data: missing; add it", 4),
    Mistake("no value", setting("seed"), "--set 'seed': expected key=value", 4),
    Mistake("not a section", setting("out.x=1"), "--set 'out.x=1': 'out' is a value, not a section", 4),
    Mistake(
        "half a value",
        setting("methods=[single"),
        "--set 'methods=[single': '[single' is not a YAML value",
        4,
    ),
    Mistake("empty config", content("config.yaml", ""), "config.yaml: expected keys such as 'data'", 4),
    Mistake("no YAML", content("config.yaml", "data: [\n"), "config.yaml: not YAML", 4),
    Mistake("binary config", content("config.yaml", b"\xff\xfe\x00"), "config.yaml: not YAML", 4),
    Mistake("no config", without("config.yaml"), "config.yaml: the config cannot be read: No such file", 4),
    Mistake("no such backbone", setting("backbone.name=/nowhere"), "backbone '/nowhere' cannot be loaded", 4),
    Mistake(
        "texts longer than the model",
        setting("backbone.max_length=513"),
        "backbone.max_length=513 is more than the 512 tokens that the backbone was made for; choose 512",
        4,
    ),
    Mistake("no layer left", setting("experts.split_layer=4"), "experts.split_layer=4 leaves no layer", 4),
    Mistake("no tasks file", setting("data.tasks_file=no.yaml"), "no.yaml: the tasks file cannot be read", 4),
    Mistake("rules without a file", setting("data.labels=rules"), "data.tasks_file is not given", 4),
    Mistake("folder is a file", setting("out={folder}/train.jsonl/run"), "no run can be kept there", 4),
    Mistake(
        "missing file", without("train.jsonl"), "{folder}/train.jsonl: no such file; check the path\n", 3
    ),
    Mistake(
        "missing test file", without("test.jsonl"), "{folder}/test.jsonl: no such file; check the path\n", 3
    ),
    Mistake("empty file", content("train.jsonl", ""), "{folder}/train.jsonl: has no rows", 3),
    Mistake("blank lines only", content("test.jsonl", "\n\n"), "{folder}/test.jsonl: has no rows", 3),
    Mistake(
        "one bad row among many",
        rows("train.jsonl", changed(70, rejected=None, reject="No.")),
        "{folder}/train.jsonl:70: 'rejected' is missing; keys found: 'id', 'prompt', 'chosen', 'task', "
        "'capabilities', 'reject'. Did you mean 'reject' -> 'rejected'?\n"
        "`prefmoe data check FILE --write-good NEW.jsonl` writes the rows that are right\n",
        3,
    ),
    Mistake(
        "an empty completion",
        rows("train.jsonl", changed(3, chosen=" \n")),
        "{folder}/train.jsonl:3: 'chosen' is empty; drop the row\n",
        3,
    ),
    Mistake(
        "equal sides",
        rows("train.jsonl", changed(5, chosen="Yes.", rejected="Yes.")),
        "{folder}/train.jsonl:5: 'chosen' and 'rejected' are equal; drop the row\n",
        3,
    ),
    Mistake(
        "sides that differ only behind the cut",
        rows("train.jsonl", changed(2, chosen="y" * 200 + "a", rejected="y" * 200 + "b")),
        f"pair 'train/advice/1': both sides are equal after truncation to max_length={MAX_LENGTH}; "
        "raise max_length or drop the pair\n",
        3,
    ),
    Mistake(
        "broken UTF-8", content("train.jsonl", b'{"prompt": "\xff"}\n'), "train.jsonl:1: broken UTF-8", 3
    ),
    Mistake(
        "one prompt in two files",
        rows("test.jsonl", pair_rows("train", num=2)),
        "its prompt stands in train and in test; `prefmoe data check` lists all",
        3,
    ),
    Mistake(
        "nothing left to train on",
        setting("data.validation=null", "data.validation_fraction=0.999"),
        "no pair is left to train on; give more of them, or a smaller data.validation_fraction\n",
        3,
    ),
    Mistake(
        "some rows without a task",
        rows("train.jsonl", changed(8, task=None)),
        "train: 1 of 100 pairs have no 'task', the first is 'train/advice/7'; name the task of all",
        3,
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.situation for mistake in MISTAKES])
def test_train_names_the_mistake(backbone_folder, tmp_path, mistake):
    config = write_config(tmp_path, backbone_folder)
    arguments = [str(part).format(folder=tmp_path) for part in mistake.make(tmp_path)]
    result = run_cli("reward", "train", config, *arguments)
    assert (result.exit_code, result.stdout) == (mistake.code, "")
    assert mistake.sentence.format(folder=tmp_path) in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("run/*/model.safetensors"))


def test_an_other_config_in_the_same_folder_is_refused(backbone_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 7\n")
    result = run_cli("reward", "train", write_config(tmp_path, backbone_folder))
    assert result.exit_code == 4
    assert "run holds a run with another config; choose another --out or delete it" in result.stderr


def test_one_bad_row_in_a_million_does_not_hide_the_others(tmp_path):
    with (tmp_path / "many.jsonl").open("w") as file:
        for i in range(1_000_000):
            chosen = "" if i == 777_776 else "a"
            file.write(f'{{"prompt": "Why {i}?", "chosen": "{chosen}", "rejected": "b"}}\n')
    result = run_cli("data", "check", tmp_path / "many.jsonl")
    assert result.exit_code == 3
    assert result.stdout == f"{tmp_path}/many.jsonl:777777: 'chosen' is empty; drop the row\n"
    assert "1000000 rows, 999999 usable pairs, 1 problems" in result.stderr


ODD_TEXTS = {
    "emoji": "👩🏽‍🚀🏳️‍🌈 done 🎉",
    "right to left": "שלום עולם، مرحبا \u202eabc\u202c",
    "nul": "a\x00b \x07\x1b[31m",
    "half of a template": "<|im_end|>\n<|im_start|>assistant",
}


@pytest.fixture(scope="module")
def odd(backbone_folder, tmp_path_factory):
    """A training on everything that is unusual and allowed, and what the command said."""
    folder = tmp_path_factory.mktemp("odd")
    train = pair_rows("train", num=8) + pair_rows("train", num=3, tasks=("tiny",))
    train += [
        row(prompt=text, chosen=f"{text}!", rejected=text[:2], task="advice", id=name)
        for name, text in ODD_TEXTS.items()
    ]
    train.append(row(prompt="long " * 200, task="facts", id="long"))
    write_rows(folder / "train.jsonl", train)
    test = pair_rows("test", num=4) + pair_rows("test", num=2, tasks=("poetry",))
    write_rows(folder / "test.jsonl", test)
    capabilities = {"warmth": "It is warm.", "rhythm": "It has a rhythm."}
    tasks = {"tasks": {"facts": {"description": "Facts.", "capabilities": capabilities}}}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    config = write_config(folder, backbone_folder)
    return folder, run_cli("reward", "train", config, "--set", f"data.tasks_file={folder / 'tasks.yaml'}")


@pytest.mark.parametrize(
    ("situation", "sentence"),
    [
        (
            "a task in test that training never saw",
            "warning: no training pair has the task 'poetry' (2 pairs); ",
        ),
        ("a task with 3 pairs", "warning: few pairs of 'tiny' (3 training, 0 validation); add pairs"),
        (
            "a capability with no labels",
            "warning: no pair says which side is better on facts/rhythm; left out",
        ),
        ("a prompt longer than the model", f"pairs lost tokens to fit backbone.max_length={MAX_LENGTH}\n"),
        ("emoji, right-to-left text, a NUL byte", "24 training, 8 validation, 10 test pairs of 3 tasks\n"),
    ],
)
def test_what_is_unusual_is_trained_on_and_said(odd, situation, sentence):
    folder, result = odd
    assert (result.exit_code, result.stdout) == (0, f"{folder}/run/report.html\n"), result.stderr
    assert result.stderr.count(sentence) == 1


def test_an_unseen_task_and_a_small_one_are_in_the_report(odd):
    folder, _ = odd
    metrics = read_metrics(folder / "run" / "metrics.json")
    assert {task: cell.pairs for task, cell in metrics.methods["dmoerm"].tasks.items()} == {
        "advice": 4,
        "facts": 4,
        "poetry": 2,
    }
    assert "poetry" in (folder / "run" / "report.html").read_text(encoding="utf-8")


def test_eval_shows_an_unseen_task_as_its_own_row(saved_model, tmp_path):
    source = write_rows(tmp_path / "test.jsonl", pair_rows("test", num=2, tasks=("facts", "poetry")))
    result = run_cli("reward", "eval", saved_model, source, "--json", tmp_path / "metrics.json")
    assert result.exit_code == 0, result.stderr
    assert "warning: no training pair has the task 'poetry' (2 pairs); scored by" in result.stderr
    assert "the router chose among advice, facts, writing\n" in result.stderr
    tasks = read_metrics(tmp_path / "metrics.json").methods["dmoerm"].tasks
    assert {task: cell.pairs for task, cell in tasks.items()} == {"facts": 2, "poetry": 2}


@pytest.mark.parametrize("named", [True, False])
def test_one_task_only(backbone_folder, tmp_path, named):
    for split in ("train", "validation", "test"):
        values = pair_rows(split, num=4, tasks=("advice",))
        write_rows(tmp_path / f"{split}.jsonl", [v if named else {**v, "task": None} for v in values])
    config = write_config(tmp_path, backbone_folder, methods=["single", "per_task", "dmoerm"])
    result = run_cli("reward", "train", config, "--set", "phase1.epochs=0", "--set", "phase2.epochs=0")
    assert result.exit_code == 0, result.stderr
    assert "pairs of 1 task\n" in result.stderr
    methods = read_metrics(tmp_path / "run" / "metrics.json").methods
    assert {tuple(result.tasks) for result in methods.values()} == {("advice" if named else "all",)}


def test_eval_of_files_without_tasks(saved_model, tmp_path):
    values = [{**v, "task": None} for v in pair_rows("test", num=2)]
    files = [write_rows(tmp_path / name, values) for name in ("a.jsonl", "b.jsonl")]
    result = run_cli("reward", "eval", saved_model, *files, "--json", tmp_path / "metrics.json")
    assert result.exit_code == 0, result.stderr
    metrics = read_metrics(tmp_path / "metrics.json")
    assert metrics.methods["dmoerm"].tasks["all"].pairs == 8
    assert metrics.router is None


GOOD = {"prompt": "Why?", "completion": "So.", "chosen": "So.", "rejected": "No."}


@pytest.mark.parametrize(("command", "column"), [("score", "completion"), ("eval", "chosen")])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda column: None, "in.jsonl: no such file; check the path"),
        (lambda column: [], "in.jsonl: has no rows"),
        (
            lambda column: [GOOD] * 9 + [{**GOOD, column: " "}],
            "in.jsonl:10: '{column}' is empty; drop the row",
        ),
        (lambda column: [{"prompt": "Why?", f"{column}s_": "So."}], "in.jsonl:1: '{column}' is missing"),
    ],
    ids=["missing file", "empty file", "empty completion", "wrong key"],
)
def test_score_and_eval_name_bad_rows(saved_model, tmp_path, command, column, make, sentence):
    values = make(column)
    if values is not None:
        write_rows(tmp_path / "in.jsonl", values)
    out = ["-o", tmp_path / "out.jsonl"] if command == "score" else []
    result = run_cli("reward", command, saved_model, tmp_path / "in.jsonl", *out)
    assert result.exit_code == 3
    assert sentence.format(column=column) in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_odd_texts_are_scored_like_others(saved_model, tmp_path):
    values = [{"id": name, "prompt": text, "completion": text} for name, text in ODD_TEXTS.items()]
    values.append({"id": "long", "prompt": "long " * 200, "completion": "Short."})
    source, out = write_rows(tmp_path / "in.jsonl", values), tmp_path / "out.jsonl"
    result = run_cli("reward", "score", saved_model, source, "-o", out)
    assert result.exit_code == 0, result.stderr
    lines = [yaml.safe_load(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [*ODD_TEXTS, "long"]
    assert lines[-1]["truncated_tokens"] > 900
    assert "lost tokens to fit" in result.stderr


def test_a_folder_without_a_model_is_a_checkpoint_error(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", pair_rows("test", num=1))
    for folder in (tmp_path / "none", tmp_path):
        for command in (["score", folder, source, "-o", tmp_path / "out.jsonl"], ["eval", folder, source]):
            result = run_cli("reward", *command)
            assert result.exit_code == 5
            assert len(result.stderr.splitlines()) == 1
            assert str(folder) in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture
def model_copy(saved_model, backbone_folder, tmp_path):
    """A model and its backbone that a test may spoil, and the commands that load it."""
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    shutil.copytree(saved_model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace(str(backbone_folder), str(tmp_path / "backbone")))
    source = write_rows(tmp_path / "in.jsonl", pair_rows("test", num=1))
    score = ["reward", "score", tmp_path / "model", source, "-o", tmp_path / "out.jsonl"]
    return tmp_path, [score, ["reward", "eval", tmp_path / "model", source]]


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda folder: cut_in_half(folder / "model" / "model.safetensors"),
            "{folder}/model/model.safetensors: damaged or cut short",
        ),
        (
            lambda folder: cut_in_half(folder / "model" / "config.json"),
            "{folder}/model/config.json: no readable config of a reward model",
        ),
        (
            lambda folder: cut_in_half(folder / "model" / "tokenizer.json"),
            "{folder}/model: holds no tokenizer",
        ),
        (
            lambda folder: tiny_backbone(seed=1).save_pretrained(folder / "backbone"),
            "but the one found has weights",
        ),
    ],
    ids=["weights cut in half", "config cut in half", "tokenizer cut in half", "another backbone"],
)
def test_a_model_that_cannot_be_used_is_a_checkpoint_error(model_copy, spoil, sentence):
    folder, commands = model_copy
    for command in commands:
        assert run_cli(*command).exit_code == 0
    (folder / "out.jsonl").unlink()
    spoil(folder)
    for command in commands:
        result = run_cli(*command)
        assert (result.exit_code, result.stdout) == (5, "")
        assert sentence.format(folder=folder) in result.stderr.splitlines()[-1]
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_full_disk_during_the_save_keeps_the_old_model_whole(backbone_folder, tmp_path, monkeypatch, what):
    config = write_config(tmp_path, backbone_folder)
    quick = ["--set", "phase1.epochs=0", "--set", "phase2.epochs=0"]
    assert run_cli("reward", "train", config, *quick).exit_code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run" / "dmoerm").iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_rust(_, folder, **__):
        (folder / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")  # as the tokenizers package does

    if what == "weights":
        monkeypatch.setattr(artefact, "save_torch_state_dict", full)
    else:
        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full_for_rust)
    result = run_cli("reward", "train", config, *quick)
    assert (result.exit_code, result.stdout) == (5, "")
    expected = f"{tmp_path}/run/dmoerm: could not be saved, what was there is unchanged: .*No space left on device.*\n"
    assert re.search(expected, result.stderr)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run" / "dmoerm").iterdir()} == before


@pytest.mark.parametrize(
    "problem",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed\nsomewhere")],
)
def test_a_full_disk_during_a_checkpoint_has_a_sentence_and_the_run_goes_on(
    backbone_folder, tmp_path, monkeypatch, problem
):
    config = write_config(tmp_path, backbone_folder)

    def full(*_, **__):
        raise problem

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        result = run_cli("reward", "train", config)
    assert (result.exit_code, result.stdout) == (5, "")
    last = result.stderr.splitlines()[-1]
    assert re.search(
        "run/checkpoints/.*: a checkpoint could not be written (.*); free space and give the same", last
    )
    assert run_cli("reward", "train", config).exit_code == 0


def test_a_finished_step_cut_in_half_is_named(backbone_folder, tmp_path):
    config = write_config(tmp_path, backbone_folder)
    quick = ["--set", "phase1.epochs=0", "--set", "phase2.epochs=0"]
    assert run_cli("reward", "train", config, *quick).exit_code == 0
    for step in ("phase1", "features_dmoerm", "test_dmoerm"):
        file = tmp_path / "run" / "steps" / f"{step}.safetensors"
        whole = file.read_bytes()
        cut_in_half(file)
        result = run_cli("reward", "train", config, *quick)
        assert (result.exit_code, result.stdout) == (5, "")
        assert f"{file}: " in result.stderr
        assert "delete it to compute it again" in result.stderr
        file.write_bytes(whole)


def test_pairs_that_changed_under_a_run_are_refused(backbone_folder, tmp_path):
    config = write_config(tmp_path, backbone_folder)
    quick = ["--set", "phase1.epochs=0", "--set", "phase2.epochs=0"]
    assert run_cli("reward", "train", config, *quick).exit_code == 0
    write_rows(tmp_path / "test.jsonl", [{**pair, "rejected": "Never."} for pair in pair_rows("test")])
    result = run_cli("reward", "train", config, *quick)
    assert (result.exit_code, result.stdout) == (3, "")
    assert (
        f"{tmp_path}/run: the test pairs changed since this run began; choose another --out" in result.stderr
    )


def test_real_process_has_no_traceback(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [row(), row(rejected="")])
    arguments = [sys.executable, "-m", "prefmoe", "data", "stats", str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    problem, advice = done.stderr.splitlines()[-2:]
    assert problem == f"{path}:2: 'rejected' is empty; drop the row"
    assert "--write-good" in advice
    assert "Traceback" not in done.stderr
