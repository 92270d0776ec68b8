"""The whole training of all methods, on pairs whose better side is known by rule."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_helpers import CHATML, byte_tokenizer
from prefmoe.data.render import Renderer
from prefmoe.evaluation.metrics import read_metrics
from prefmoe.evaluation.run_folder import read_run
from prefmoe.evaluation.training_log import aggregator_choices, split_counts
from prefmoe.evaluation.wording import PHASES, step_name
from prefmoe.records import Completion
from prefmoe.reward import evaluate
from prefmoe.reward.assemble import rows_by_task
from prefmoe.reward.evaluate import evaluate_saved, method_of, score_pairs
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.phases import make_folds
from prefmoe.reward.score import RewardModel, Scores, score_texts
from prefmoe.reward.texts import EncodedPairs
from prefmoe.reward.train import train_models
from recorded_run import FinishedRun
from tiny import tiny_backbone
from tiny_run import ALL_METHODS, CAPABILITIES, tiny_bench, tiny_settings

TASKS = list(CAPABILITIES)


@pytest.fixture(params=["crossfit_run", "paper_run"])
def run(request: pytest.FixtureRequest) -> FinishedRun:
    return request.getfixturevalue(request.param)


def reloaded(run: FinishedRun, method: str) -> RewardModel:
    """A model as a user gets it: from its folder, on a backbone of its own."""
    model = DMoERMForSequenceClassification.from_pretrained(
        run.folder / method, backbone=tiny_backbone(layers=3)
    )
    tokenizer = byte_tokenizer(CHATML)
    return RewardModel(model, Renderer(tokenizer, max_length=run.settings.backbone.max_length))


def test_every_method_is_trained_measured_and_saved(run: FinishedRun) -> None:
    assert list(run.models) == ALL_METHODS
    assert set(run.metrics.methods) == set(ALL_METHODS)
    assert all((run.folder / method / "model.safetensors").is_file() for method in ALL_METHODS)
    assert read_metrics(run.folder / "metrics.json") == run.metrics


def test_the_rule_is_learned(run: FinishedRun) -> None:
    for method in ("per_task", "dmoerm"):
        assert run.metrics.methods[method].macro > 0.95
    assert run.metrics.router is not None
    assert run.metrics.router.accuracy == 1.0


def test_the_mixture_beats_one_model_where_tasks_conflict(run: FinishedRun) -> None:
    assert run.metrics.paired["dmoerm-single"].macro > 0.1
    assert run.metrics.paired["dmoerm-single"].low > 0


def test_the_accuracy_on_flipped_labels_is_zero__defect_3(run: FinishedRun) -> None:
    """Winner and loser are never confused: what scores 1.0 scores 0.0 with the sides exchanged."""
    test = run.bench.test
    rows = [row._replace(chosen=row.rejected, rejected=row.chosen) for row in test.rows]
    for method, accuracy in (("dmoerm", 1.0), ("per_task", 1.0)):
        chosen, rejected = score_pairs(run.models[method], run.bench.trunk, EncodedPairs(test.pairs, rows))
        assert run.metrics.methods[method].macro == accuracy
        assert (chosen.rewards > rejected.rewards).float().mean() == 0.0


def test_the_backbone_stays_frozen(run: FinishedRun) -> None:
    after = run.bench.backbone.state_dict()
    assert after.keys() == run.backbone_before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in run.backbone_before.items())
    assert not any(parameter.requires_grad for parameter in run.bench.backbone.parameters())


def test_the_loss_falls(run: FinishedRun) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if line["phase"] == "phase1" and "eval_loss" in line]
    assert losses[-1] < losses[0]


def test_the_run_folder_can_be_read_for_the_report(run: FinishedRun) -> None:
    found = read_run(run.folder)
    assert found.missing == ("best_of_n.json",)
    phases = {line.phase for line in found.log}
    assert {"data", "single_wide", "phase1", "phase2", "phase3"} <= phases
    assert phases <= {*PHASES, "data", "phase3"}  # the report has a name for each
    assert set(aggregator_choices(found.log)) == set(TASKS)
    assert {name: counts.pairs for name, counts in split_counts(found.log).items()} == {
        name: len(getattr(run.bench, name).rows) for name in ("train", "validation", "test")
    }
    unnamed = [step for step in run.metrics.seconds if step_name(step) == step]
    assert unnamed == []
    assert set(found.correlations) == set(TASKS)
    assert len(found.examples) == 2 * len(TASKS)


def test_checkpoints_are_gone_when_the_run_is_done(run: FinishedRun) -> None:
    assert not list(run.folder.glob("checkpoints/*"))
    assert not list(run.folder.rglob("*.part"))


def test_accuracies_equal_a_hand_computation(run: FinishedRun) -> None:
    """Defect 11 too: all test rows count, side by side with their own partner."""
    for method, model in run.models.items():
        scores = score_texts(model, run.bench.trunk, range(len(run.bench.table.texts))).rewards.tolist()
        hits: dict[str, list[float]] = {task: [] for task in TASKS}
        for pair, row in zip(run.bench.test.pairs, run.bench.test.rows, strict=True):
            margin = scores[row.chosen] - scores[row.rejected]
            hits[str(pair.task)].append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
        found = run.metrics.methods[method]
        for task in TASKS:
            assert found.tasks[task].pairs == len(hits[task]) == 16
            assert found.tasks[task].accuracy == pytest.approx(sum(hits[task]) / 16)
        assert found.macro == pytest.approx(sum(sum(hits[t]) / 16 for t in TASKS) / len(TASKS))


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_saved_model_scores_texts_as_the_pipeline_does(run: FinishedRun, method: str) -> None:
    model = reloaded(run, method)
    pairs = run.bench.test.pairs[:6]
    completions = [Completion(p.id, p.prompt, side) for p in pairs for side in (p.chosen, p.rejected)]
    chosen, rejected = score_pairs(run.models[method], run.bench.trunk, run.bench.test)  # type: ignore[index]
    expected = torch.stack([chosen.rewards, rejected.rewards], 1)[:6].flatten()
    rewards = torch.tensor([report.reward for report in model.score(completions)])
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-4)

    encoded = [model.renderer.encode(c.prompt, c.completion).input_ids for c in completions]
    longest = max(map(len, encoded))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in encoded])  # padded on the left
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded])
    with torch.inference_mode():
        forward = model.model(ids, mask).logits[:, 0]
    torch.testing.assert_close(forward, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_saved_model_is_measured_as_in_its_run(paper_run: FinishedRun, method: str) -> None:
    model, pairs = reloaded(paper_run, method), paper_run.bench.test.pairs
    metrics = evaluate_saved(model, pairs, seed=paper_run.settings.seed)
    assert metrics.methods == {method: paper_run.metrics.methods[method]}
    assert metrics.router == (None if method.startswith("single") else paper_run.metrics.router)


def test_two_saved_models_differ_as_in_their_run(paper_run: FinishedRun) -> None:
    pairs, seed = paper_run.bench.test.pairs, paper_run.settings.seed
    dmoerm, single = (reloaded(paper_run, method) for method in ("dmoerm", "single"))
    metrics = evaluate_saved(dmoerm, pairs, against=single, seed=seed)
    assert metrics.methods == {name: paper_run.metrics.methods[name] for name in ("dmoerm", "single")}
    assert metrics.paired == {"dmoerm-single": paper_run.metrics.paired["dmoerm-single"]}
    turned = evaluate_saved(single, pairs, against=dmoerm, seed=seed).paired["single-dmoerm"]
    assert turned.macro == pytest.approx(-metrics.paired["dmoerm-single"].macro)


def test_two_models_of_one_method_keep_their_names_apart(paper_run: FinishedRun) -> None:
    model = reloaded(paper_run, "single")
    metrics = evaluate_saved(model, paper_run.bench.test.pairs, against=reloaded(paper_run, "single"))
    assert metrics.methods["other"] == metrics.methods["single"]
    assert metrics.paired["single-other"].model_dump() == {"macro": 0, "low": 0, "high": 0}


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_model_saved_before_methods_were_written_is_named_by_its_shape(
    paper_run: FinishedRun, method: str
) -> None:
    model = reloaded(paper_run, method).model
    model.config.method = None
    assert method_of(model) == ("single" if method == "single_wide" else method)


def test_rewards_have_unit_variance_on_validation(run: FinishedRun) -> None:
    for task, rows in rows_by_task(run.bench, "validation").items():
        texts = [text for row in rows for text in (row.chosen, row.rejected)]
        for method in ("per_task", "dmoerm"):
            rewards = score_texts(run.models[method], run.bench.trunk, texts).rewards
            assert rewards.mean().item() == pytest.approx(0.0, abs=1e-3), task
            assert rewards.std().item() == pytest.approx(1.0, abs=1e-3), task


def test_correlations_equal_numpys(crossfit_run: FinishedRun) -> None:
    found = json.loads((crossfit_run.folder / "expert_correlation.json").read_text())
    bench, model = crossfit_run.bench, crossfit_run.models["dmoerm"]
    pairs = zip(bench.test.pairs, bench.test.rows, strict=True)
    texts = [text for pair, row in pairs if pair.task == "hot" for text in (row.chosen, row.rejected)]
    scores = score_texts(model, bench.trunk, texts)
    columns = [i for i, (task, _) in enumerate(model.capability_names) if task == "hot"]
    table = np.column_stack([scores.rewards.numpy(), scores.capabilities.numpy()[:, columns]])
    assert found["hot"]["experts"] == ["reward", "loud", "soft"]
    np.testing.assert_allclose(found["hot"]["matrix"], np.corrcoef(table.T), atol=1e-4)


def test_single_wide_has_the_rank_of_all_experts_together(run: FinishedRun) -> None:
    num_experts = len(run.models["dmoerm"].config.experts)
    assert num_experts == len(TASKS) + sum(map(len, CAPABILITIES.values()))
    wide, dmoerm = run.models["single_wide"], run.models["dmoerm"]
    assert wide.config.rank == num_experts * dmoerm.config.rank
    sizes = [sum(t.numel() for t in m.experts.sites.parameters()) for m in (wide, dmoerm)]
    assert sizes[0] == sizes[1]
    scale = {m.config.alpha / m.config.rank for m in run.models.values()}
    assert len(scale) == 1


def test_methods_see_the_same_pairs_as_often(run: FinishedRun) -> None:
    """One adapter on all tasks, a wide one, and the task adapters together; a shared start is part of the latter two."""
    of_tasks = [row for task in TASKS for row in run.job(task).train]
    for name in ("single@", "single_wide"):
        assert sorted(run.job(name).train) == sorted(of_tasks) == sorted(run.bench.train.rows)
    if run.settings.phase1.shared_start:
        assert sorted(run.job("shared").train) == sorted(of_tasks)
        assert run.job("single@").start is run.job(next(iter(TASKS))).start is not None


def test_what_methods_share_is_computed_once(run: FinishedRun) -> None:
    names = [job.name for job in run.record.jobs]
    assert len(names) == len(set(names))
    assert len(run.record.router_fits) == 1
    assert run.record.trunk_texts == len(run.bench.table.texts)


def test_task_adapters_that_two_methods_share_score_the_test_pairs_once(crossfit_run: FinishedRun) -> None:
    labels = crossfit_run.record.labels
    assert "test pairs, dmoerm" in labels
    assert "test pairs, per_task" not in labels
    steps = crossfit_run.folder / "steps"
    assert (steps / "features_dmoerm.safetensors").exists()
    assert not (steps / "features_per_task.safetensors").exists()
    bench, model = crossfit_run.bench, crossfit_run.models["per_task"]
    found = evaluate._all_test_scores(bench, crossfit_run.models)["per_task"]
    for side, alone in zip(found, score_pairs(model, bench.trunk, bench.test), strict=True):
        for name in Scores._fields:
            torch.testing.assert_close(getattr(side, name), getattr(alone, name), rtol=0, atol=1e-4)


def test_the_papers_split_has_task_adapters_of_its_own(paper_run: FinishedRun) -> None:
    assert "test pairs, per_task" in paper_run.record.labels


def test_crossfit_ends_with_the_adapters_of_per_task(crossfit_run: FinishedRun) -> None:
    models = crossfit_run.models
    mine = models["dmoerm"].experts.expert_state(models["dmoerm"].config.experts_of("hot")[0])
    theirs = models["per_task"].experts.expert_state(models["per_task"].config.experts_of("hot")[0])
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_experts_are_evaluated_once_for_phase_3__defect_8(run: FinishedRun) -> None:
    """The release runs all experts again in every step of phase 3; here they speak once a fold."""
    held_out = {label: n for label, n in run.record.labels.items() if label.startswith("held-out")}
    assert held_out == {f"held-out pairs, {fold.name}": 1 for fold in make_folds(run.bench)}


def test_phases_1_and_2_never_see_the_prompts_of_phase_3__defect_13(run: FinishedRun) -> None:
    validation = {row.prompt for row in run.bench.validation.rows}
    for fold in make_folds(run.bench):
        jobs = [job for job in run.record.jobs if job.name.endswith(f"@{fold.name}")]
        assert len([job for job in jobs if not job.name.startswith("shared")]) == 5
        for job in jobs:
            seen = {row.prompt for row in job.train}
            assert seen
            assert seen <= fold.trained
            assert not seen & fold.held_out
            assert not seen & validation


def test_aggregators_are_fitted_on_what_the_experts_did_not_see(run: FinishedRun) -> None:
    fitted = {row.prompt for rows in run.record.aggregator_rows for row in rows}
    assert fitted == {prompt for fold in make_folds(run.bench) for prompt in fold.held_out}


def test_the_larger_part_trains_the_experts__defect_4(paper_run: FinishedRun) -> None:
    (fold,) = make_folds(paper_run.bench)
    assert len(fold.trained) / len(paper_run.bench.train.pairs) == pytest.approx(0.6, abs=0.03)


def test_folds_follow_the_seed_and_not_the_order_of_rows__defect_14(tmp_path: Path) -> None:
    folds = {}
    for name, changes in {
        "a": {"seed": 0},
        "again": {"seed": 0},
        "other": {"seed": 1},
    }.items():
        bench = tiny_bench(tiny_settings(tmp_path / name, phase3={"split": "paper"}, **changes))
        if name == "again":
            bench.train.pairs.reverse()
        (folds[name],) = make_folds(bench)
    assert folds["a"] == folds["again"]
    assert folds["a"] != folds["other"]


def test_a_finished_run_is_read_and_not_trained_again(paper_run: FinishedRun) -> None:
    steps = {file: file.stat().st_mtime_ns for file in (paper_run.folder / "steps").iterdir()}
    models = train_models(tiny_bench(paper_run.settings))
    assert {file: file.stat().st_mtime_ns for file in (paper_run.folder / "steps").iterdir()} == steps
    for method, model in models.items():
        old = paper_run.models[method].state_dict()
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
