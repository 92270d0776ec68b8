"""`prefmoe demo` from end to end, with as little of everything as it takes."""

import json
import re

import pytest

from cli_helpers import run_cli
from prefmoe.reward import demo as module
from prefmoe.reward.demo import DemoSize
from prefmoe.reward.settings import check_settings

TASKS = {"advice", "facts", "writing"}
METHODS = ["single", "per_task", "dmoerm"]
TINY = DemoSize(
    pretraining_steps=2, train_pairs=8, validation_pairs=4, test_pairs=6, best_of_n_prompts=2, best_of_n=4
)


def quick_settings(out, *, seed, original=module.demo_settings):
    """Those of the demo, without what takes longest: dozens of convex fits, and passes over the features."""
    content = original(out, seed=seed).model_dump()
    for phase in ("phase1", "phase2"):
        content[phase] |= {"head_start": False, "epochs": 1}
    content["phase3"]["mlp_epochs"] = 1
    return check_settings(content, where="demo")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run folder of a demo, and what the command said."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHORT", TINY)
        patch.setattr(module, "demo_settings", quick_settings)
        return out, run_cli("demo", "--short", "--out", out)


def test_it_ends_with_the_table_the_picture_and_the_path_of_the_report(demo):
    out, result = demo
    assert (result.exit_code, result.stdout) == (0, f"{out}/report.html\n"), result.stderr
    for text in (*TASKS, "mean of tasks", "Single reward", "Per-task", "DMoERM", "Router accuracy: "):
        assert text in result.stderr
    assert re.search(
        r"DMoERM minus Single reward model: [+-]0\.\d{3} \([+-]0\.\d{3} to [+-]0\.\d{3}\)", result.stderr
    )
    assert f"Best of n, gold reward: {out}/best_of_n.png\n" in result.stderr
    assert (out / "best_of_n.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_json_has_the_shape_that_was_promised(demo):
    """Not read by our own reader: other programs rely on these very names."""
    metrics = json.loads((demo[0] / "metrics.json").read_text())
    assert set(metrics) == {"router", "methods", "paired", "seconds"}
    assert 0 <= metrics["router"]["accuracy"] <= 1
    assert list(metrics["methods"]) == METHODS
    for method in metrics["methods"].values():
        assert set(method) == {"macro", "tasks"}
        assert set(method["tasks"]) == TASKS
        for cell in method["tasks"].values():
            assert set(cell) == {"accuracy", "low", "high", "pairs"}
            assert 0 <= cell["low"] <= cell["accuracy"] <= cell["high"] <= 1
            assert cell["pairs"] == TINY.test_pairs
        accuracies = [cell["accuracy"] for cell in method["tasks"].values()]
        assert method["macro"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert set(metrics["paired"]) == {"dmoerm-single", "dmoerm-per_task"}
    assert all(set(change) == {"macro", "low", "high"} for change in metrics["paired"].values())
    gain = metrics["methods"]["dmoerm"]["macro"] - metrics["methods"]["single"]["macro"]
    assert metrics["paired"]["dmoerm-single"]["macro"] == pytest.approx(gain)
    assert {"backbone", "trunk", "router", "phase1", "phase2", "phase3"} <= set(metrics["seconds"])


def test_the_report_shows_everything(demo):
    html = (demo[0] / "report.html").read_text(encoding="utf-8")
    for section in ("accuracy", "best-of-n", "router", "experts", "examples", "training", "details"):
        assert f'<section id="{section}">' in html
    assert "Not in this report" not in html


def test_the_best_of_n_curves_start_at_the_same_plain_sampling(demo):
    curves = json.loads((demo[0] / "best_of_n.json").read_text())
    assert list(curves) == METHODS
    assert {tuple(curve["n"]) for curve in curves.values()} == {(1, 2, 4)}
    assert len({round(curve["gold"][0], 9) for curve in curves.values()}) == 1


def test_the_same_command_again_reads_what_is_there(demo, monkeypatch):
    out, _ = demo
    before = json.loads((out / "metrics.json").read_text())
    monkeypatch.setattr(module, "SHORT", TINY)
    monkeypatch.setattr(module, "demo_settings", quick_settings)
    monkeypatch.setattr(module, "pretrain_backbone", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("prefmoe.reward.phases.train_experts", lambda *_, **__: pytest.fail("trained again"))
    assert run_cli("demo", "--short", "--out", out).exit_code == 0
    after = json.loads((out / "metrics.json").read_text())
    assert {**after, "seconds": {}} == {**before, "seconds": {}}


def test_a_place_where_no_run_can_be_kept_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "pretrain_backbone", lambda *_, **__: pytest.fail("trained for nothing"))
    result = run_cli("demo", "--out", tmp_path / "file")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.endswith("/file: no run can be kept there; File exists; choose another --out\n")


def test_a_backbone_that_was_killed_while_it_was_written_is_made_again(tmp_path, monkeypatch):
    world = module.World(0)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.PreTrainedTokenizerFast, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            module.pretrain_backbone(tmp_path / "backbone", world, steps=1, seed=0)
    assert not (tmp_path / "backbone").exists()
    module.pretrain_backbone(tmp_path / "backbone", world, steps=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["backbone"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "backbone").iterdir()
    }
