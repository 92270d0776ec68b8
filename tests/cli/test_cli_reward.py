"""`prefmoe reward`: train, score and eval on a tiny backbone, from files to files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_helpers import MAX_LENGTH, pair_rows, run_cli, write_config
from data_helpers import write_rows
from prefmoe.evaluation.metrics import read_metrics
from prefmoe.reward import score_file as module
from prefmoe.reward.score import RewardModel


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(backbone_folder, tmp_path_factory):
    """The folder of a training with two methods, and what the command said."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, backbone_folder, methods=["single", "dmoerm"])
    return folder, run_cli("reward", "train", config)


def test_train_prints_the_table_and_the_path_of_the_report(trained):
    folder, result = trained
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{folder / 'run' / 'report.html'}\n"
    assert "16 training, 8 validation, 8 test pairs of 2 tasks" in result.stderr
    for text in ("advice", "facts", "mean of tasks", "Single reward model", "DMoERM minus Single", "Router"):
        assert text in result.stderr


def test_train_writes_what_the_report_and_later_commands_read(trained):
    run = trained[0] / "run"
    metrics = read_metrics(run / "metrics.json")
    assert set(metrics.methods) == {"single", "dmoerm"}
    assert {name: cell.pairs for name, cell in metrics.methods["dmoerm"].tasks.items()} == {
        "advice": 4,
        "facts": 4,
    }
    assert "dmoerm-single" in metrics.paired
    assert metrics.seconds
    assert "data:image/png" in (run / "report.html").read_text(encoding="utf-8")
    for method in metrics.methods:
        assert (run / method / "model.safetensors").exists()


def test_the_same_command_again_has_nothing_left_to_train(trained, monkeypatch):
    folder, _ = trained
    before = read_metrics(folder / "run" / "metrics.json")

    def fail(*_, **__):
        pytest.fail("an expert was trained again")

    monkeypatch.setattr("prefmoe.reward.phases.train_experts", fail)
    result = run_cli("reward", "train", folder / "config.yaml")
    assert result.exit_code == 0, result.stderr
    after = read_metrics(folder / "run" / "metrics.json")
    assert after.methods == before.methods


def test_eval_of_a_saved_model_gives_the_numbers_of_the_training(trained, tmp_path):
    folder, _ = trained
    out = tmp_path / "eval.json"
    result = run_cli("reward", "eval", folder / "run" / "dmoerm", folder / "test.jsonl", "--json", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "mean of tasks" in result.stderr
    trained_metrics, metrics = read_metrics(folder / "run" / "metrics.json"), read_metrics(out)
    assert metrics.methods == {"dmoerm": trained_metrics.methods["dmoerm"]}
    assert metrics.router == trained_metrics.router


def test_eval_against_another_model_says_how_sure_the_difference_is(saved_model, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", pair_rows("test", num=4))
    result = run_cli("reward", "eval", saved_model, source, "--against", saved_model)
    assert result.exit_code == 0, result.stderr
    assert "DMoERM minus Other model: +0.000 (+0.000 to +0.000)" in result.stderr
    result = run_cli("reward", "eval", saved_model, source, "--against", tmp_path / "nowhere")
    assert result.exit_code != 0
    assert "nowhere" in result.stderr


def test_eval_by_the_pairs_own_tasks_is_not_misled_by_the_router(saved_model, tmp_path):
    """Rewards are those of `score --routing given`; the router's accuracy stays the router's."""
    rows = pair_rows("test", num=6)
    source = write_rows(tmp_path / "in.jsonl", rows)
    found, said = {}, {}
    for routing in ("top1", "given", "soft"):
        out, scores = tmp_path / f"{routing}.json", tmp_path / f"{routing}.jsonl"
        done = run_cli("reward", "eval", saved_model, source, "--routing", routing, "--json", out)
        assert done.exit_code == 0, done.stderr
        metrics = read_metrics(out)
        assert (
            run_cli("reward", "score", saved_model, source, "-o", scores, "--routing", routing).exit_code == 0
        )
        lines = read_lines(scores)
        rewards = said[routing] = [line["reward"] for line in lines]
        hits = {"advice": [], "facts": []}
        for row, chosen, rejected in zip(rows, rewards[::2], rewards[1::2], strict=True):
            hits[row["task"]].append(chosen > rejected)
        (method,) = metrics.methods.values()
        for task, values in hits.items():
            assert method.tasks[task].accuracy == pytest.approx(sum(values) / len(values))
        found[routing] = metrics.router
    assert found["top1"] == found["given"] == found["soft"]
    assert found["top1"].accuracy < 1  # so that being misled is possible
    assert len({tuple(rewards) for rewards in said.values()}) == 3
    unknown = write_rows(tmp_path / "unknown.jsonl", [row | {"task": "poetry"} for row in rows])
    done = run_cli("reward", "eval", saved_model, unknown, "--routing", "given")
    assert done.exit_code == 3
    assert "tasks ['poetry'] are not among those of the model" in done.stderr


def test_set_and_out_win_over_the_config(backbone_folder, tmp_path):
    config = write_config(tmp_path, backbone_folder)
    result = run_cli("reward", "train", config, "--set", "experts.split_layer=9", "--out", tmp_path / "other")
    assert result.exit_code == 4
    assert "experts.split_layer=9 leaves no layer for experts" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("routing", ["top1", "soft"])
def test_score_writes_one_line_a_completion_in_order(saved_model, tmp_path, routing):
    rows = [{"id": f"r{i}", "prompt": "Why?", "completion": "Because " * (i + 1)} for i in range(5)]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    result = run_cli("reward", "score", saved_model, source, "-o", out, "--routing", routing)
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    assert f"{out}: 5 completions scored" in result.stderr
    lines = read_lines(out)
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "r3", "r4"]
    for line in lines:
        assert list(line) == ["id", "reward", "task", "task_probs", "capabilities"]
        assert line["task"] == max(line["task_probs"], key=line["task_probs"].get)
        assert sum(line["task_probs"].values()) == pytest.approx(1, abs=1e-5)
    capabilities = {"advice": {"empathy", "warmth"}, "facts": set(), "writing": {"rhythm"}}
    assert all(set(line["capabilities"]) == capabilities[line["task"]] for line in lines)
    assert len({line["reward"] for line in lines}) == 5


def test_score_can_be_told_the_task(saved_model, tmp_path):
    rows = [{"prompt": "Why?", "completion": "So.", "task": task} for task in ("writing", "advice")]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert run_cli("reward", "score", saved_model, source, "-o", out, "--routing", "given").exit_code == 0
    assert [line["task"] for line in read_lines(out)] == ["writing", "advice"]
    source = write_rows(tmp_path / "in2.jsonl", [{**rows[0], "task": "poetry"}])
    result = run_cli(
        "reward", "score", saved_model, source, "-o", tmp_path / "new.jsonl", "--routing", "given"
    )
    assert result.exit_code == 3
    assert "tasks ['poetry'] are not among those of the model" in result.stderr


def test_eval_counts_what_was_cut_and_what_became_a_tie(saved_model, tmp_path):
    rows = pair_rows("test", num=4)
    rows[0] |= {"chosen": "y" * 200 + "a", "rejected": "y" * 200 + "b"}
    rows[1] |= {"prompt": "long " * 200}
    source = write_rows(tmp_path / "in.jsonl", rows)
    result = run_cli("reward", "eval", saved_model, source)
    assert result.exit_code == 0
    expected = (
        f"warning: 2 of 8 pairs lost tokens to fit the model's {MAX_LENGTH}; the sides of 1 became equal and"
    )
    assert expected in result.stderr
    result = run_cli("reward", "eval", saved_model, write_rows(tmp_path / "in.jsonl", rows[2:]))
    assert "lost tokens" not in result.stderr


def test_eval_measures_every_pair_of_every_file__defect_11(saved_model, tmp_path):
    """The release read the first 20 lines of one file."""
    files = [write_rows(tmp_path / f"{name}.jsonl", pair_rows(name, num=12)) for name in ("one", "two")]
    out = tmp_path / "eval.json"
    assert run_cli("reward", "eval", saved_model, *files, "--json", out).exit_code == 0
    (measured,) = read_metrics(out).methods.values()
    assert {task: cell.pairs for task, cell in measured.tasks.items()} == {"advice": 24, "facts": 24}


def test_score_of_pairs_gives_both_sides(saved_model, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", pair_rows("test", num=1, tasks=("facts",)))
    assert run_cli("reward", "score", saved_model, source, "-o", tmp_path / "out.jsonl").exit_code == 0
    assert [line["id"] for line in read_lines(tmp_path / "out.jsonl")] == [
        "test/facts/0/chosen",
        "test/facts/0/rejected",
    ]


@pytest.fixture
def scored(saved_model, tmp_path, monkeypatch):
    """Arguments of a scoring in batches of 2, and what it writes."""
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
    source, out = write_rows(tmp_path / "in.jsonl", pair_rows("test", num=2)), tmp_path / "out.jsonl"
    arguments = ("reward", "score", saved_model, source, "-o", out)
    assert run_cli(*arguments).exit_code == 0
    return arguments, out.read_bytes()


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.999])
def test_a_score_file_that_was_cut_anywhere_is_completed(scored, kept):
    arguments, whole = scored
    arguments[-1].write_bytes(whole[: int(len(whole) * kept)])
    assert run_cli(*arguments).exit_code == 0
    assert arguments[-1].read_bytes() == whole


def test_a_stopped_scoring_goes_on_with_the_same_command(scored, monkeypatch):
    arguments, whole = scored
    arguments[-1].unlink()
    score, seen = RewardModel.score, []

    def stopped(self, completions, **options):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(completions))
        return score(self, completions, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "score", stopped)
        result = run_cli(*arguments)
    assert (result.exit_code, "the same command goes on" in result.stderr) == (130, True)
    assert whole.startswith(arguments[-1].read_bytes())
    assert len(read_lines(arguments[-1])) == 6
    result = run_cli(*arguments)
    assert "8 completions scored, 6 of them before" in result.stderr
    assert arguments[-1].read_bytes() == whole


def test_a_finished_scoring_loads_no_model(scored, monkeypatch):
    arguments, whole = scored
    monkeypatch.setattr(RewardModel, "load", lambda *_: pytest.fail("the model was loaded"))
    assert run_cli(*arguments).exit_code == 0
    assert arguments[-1].read_bytes() == whole


def test_scores_of_something_else_are_not_mixed(scored, tmp_path):
    arguments, whole = scored
    other = write_rows(tmp_path / "other.jsonl", pair_rows("test", num=3))
    for changed in [(*arguments, "--routing", "soft"), (*arguments[:3], other, *arguments[4:])]:
        result = run_cli(*changed)
        assert result.exit_code == 4
        assert "holds something else than scores of these completions" in result.stderr
    (tmp_path / "out.jsonl.origin.json").unlink()
    assert run_cli(*arguments).exit_code == 4
    assert arguments[-1].read_bytes() == whole


def test_a_full_disk_keeps_what_was_scored(scored, monkeypatch):
    arguments, whole = scored
    arguments[-1].write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    before = arguments[-1].read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        result = run_cli(*arguments)
    assert result.exit_code == 5
    assert "No space left on device; the same command goes on once it can" in result.stderr
    assert arguments[-1].read_bytes().startswith(before)
    assert run_cli(*arguments).exit_code == 0
    assert arguments[-1].read_bytes() == whole


def test_real_process(saved_model, tmp_path):
    rows = [{"id": "a", "prompt": "Why?", "completion": "Because."}]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    arguments = [sys.executable, "-m", "prefmoe", "reward", "score", saved_model, source, "-o", out]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    said = [line for line in done.stderr.splitlines() if not line.startswith("scoring (")]  # a slow machine
    assert said == [f"{out}: 1 completions scored"]
    assert [line["id"] for line in read_lines(out)] == ["a"]
