"""Data that are too few, missing or odd somewhere: training still ends, and says what it says."""

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefmoe.records import PreferencePair
from prefmoe.reward.assemble import rows_by_task
from prefmoe.reward.evaluate import evaluate_models, method_of, score_pairs
from prefmoe.reward.phases import make_folds
from prefmoe.reward.train import Models, train_models
from prefmoe.reward.workbench import Workbench
from tiny_run import planted_pairs, planted_splits, tiny_bench, tiny_settings

QUICK = {"epochs": 1.0, "evaluations": 1}


def trained(
    out: Path, splits: dict[str, list[PreferencePair]], **changes: object
) -> tuple[Workbench, Models]:
    settings = {"methods": ["dmoerm"], "phase1": QUICK, "phase2": QUICK} | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small tasks are named; see the tests of the workbench
        bench = tiny_bench(tiny_settings(out, **settings), splits)
    return bench, train_models(bench)


def of_task(pairs: list[PreferencePair], task: str, limit: int) -> list[PreferencePair]:
    """All pairs of the other tasks, and the first few of this one."""
    left = Counter({task: limit})
    kept = []
    for pair in pairs:
        left[pair.task] -= pair.task == task
        if pair.task != task or left[task] >= 0:
            kept.append(pair)
    return kept


def rewards_are_finite(bench: Workbench, models: Models) -> bool:
    sides = [side for model in models.values() for side in score_pairs(model, bench.trunk, bench.test)]
    return all(bool(side.rewards.isfinite().all()) for side in sides)


@pytest.mark.parametrize("split", ["paper", "crossfit"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_task_of_very_few_pairs(tmp_path: Path, split: str, number: int) -> None:
    splits = planted_splits()
    splits["train"] = of_task(splits["train"], "hot", number)
    bench, models = trained(tmp_path / "run", splits, phase3={"split": split})
    assert rewards_are_finite(bench, models)
    assert evaluate_models(bench, models).methods["dmoerm"].tasks["cold"].accuracy > 0.9


def test_a_fold_without_a_pair_of_a_task_leaves_the_task_head(tmp_path: Path) -> None:
    """Nothing was held out, so nothing can be fitted: an aggregator as it was born must not win by luck."""
    splits = planted_splits()
    splits["train"] = of_task(splits["train"], "hot", 1)
    bench, models = trained(tmp_path / "run", splits, phase3={"split": "paper", "kinds": ["mlp"]})
    (fold,) = make_folds(bench)
    assert rows_by_task(bench, "train", fold)["hot"] == []
    config = models["dmoerm"].config
    assert config.aggregators[config.task_names.index("hot")] == "task_head"


def test_validation_without_a_task(tmp_path: Path) -> None:
    splits = planted_splits()
    splits["validation"] = of_task(splits["validation"], "hot", 0)
    bench, models = trained(tmp_path / "run", splits, methods=["per_task", "dmoerm"])
    model = models["dmoerm"]
    hot = model.config.task_names.index("hot")
    assert model.config.aggregators[hot] == "task_head"  # no pair says that another is better
    assert (model.reward_mean[hot], model.reward_std[hot]) == (0.0, 1.0)  # nothing to measure units with
    assert rewards_are_finite(bench, models)
    assert evaluate_models(bench, models).methods["per_task"].tasks["hot"].accuracy > 0.9


def test_no_validation_at_all(tmp_path: Path) -> None:
    bench, models = trained(
        tmp_path / "run", planted_splits() | {"validation": []}, methods=["single", "dmoerm"]
    )
    assert models["dmoerm"].config.aggregators == ["task_head"] * 2
    assert rewards_are_finite(bench, models)


def test_one_task_only(tmp_path: Path) -> None:
    splits = {name: [p for p in pairs if p.task == "hot"] for name, pairs in planted_splits().items()}
    bench, models = trained(tmp_path / "run", splits)
    assert models["dmoerm"].config.task_names == ["hot"]
    assert evaluate_models(bench, models).methods["dmoerm"].macro > 0.95


def test_pairs_without_tasks_and_capabilities(tmp_path: Path) -> None:
    splits = {
        name: [replace(p, task=None, capabilities={}) for p in pairs if p.task == "hot"]
        for name, pairs in planted_splits().items()
    }
    bench, models = trained(tmp_path / "run", splits, methods=["single", "per_task", "dmoerm"])
    assert evaluate_models(bench, models).methods["dmoerm"].macro > 0.95
    assert models["dmoerm"].config.aggregators == ["task_head"]
    assert [method_of(model) for model in models.values()] == list(models)  # their shapes are the same
    same = [models[method].experts.expert_state(0) for method in ("per_task", "dmoerm")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_a_test_task_that_training_never_saw(tmp_path: Path) -> None:
    splits = planted_splits()
    new = [replace(p, task="new") for p in planted_pairs(5, split="other", tasks=["hot"])]
    bench, models = trained(tmp_path / "run", splits | {"test": splits["test"] + new})
    with pytest.warns(UserWarning, match=r"'new' \(5 pairs\)"):
        metrics = evaluate_models(bench, models)
    assert metrics.methods["dmoerm"].tasks["new"].pairs == 5
    assert metrics.router is not None
    assert metrics.router.accuracy == 1.0  # of the tasks that the router knows


def test_a_class_without_test_pairs_divides_nothing_by_zero__defect_11(tmp_path: Path) -> None:
    splits = planted_splits()
    splits["test"] = of_task(splits["test"], "hot", 0)
    bench, models = trained(tmp_path / "run", splits)
    metrics = evaluate_models(bench, models)
    assert list(metrics.methods["dmoerm"].tasks) == ["cold"]
    assert metrics.methods["dmoerm"].macro == metrics.methods["dmoerm"].tasks["cold"].accuracy


@pytest.mark.parametrize("split", ["paper", "crossfit"])
def test_fully_tuned_tasks_carry_their_capability_experts(tmp_path: Path, split: str) -> None:
    """phase1.method full: full-size deltas are trained, capability experts are LoRA on top, all is saved."""
    settings = {
        "phase1": {"method": "full", "learning_rate": 1e-3, "shared_start": 0.5},
        "phase3": {"split": split},
    }
    bench, models = trained(
        tmp_path / "run", planted_splits(), methods=["single", "per_task", "dmoerm"], **settings
    )
    model = models["dmoerm"]
    assert model.config.dense_tasks
    for task_id, task in enumerate(model.config.task_names):
        ids = model.config.experts_of(task)
        assert model.experts.dense_ids[ids].tolist() == [task_id] * len(ids)
        adapter = model.experts.expert_state(ids[0])
        assert not any(tensor.any() for name, tensor in adapter.items() if name.endswith(".B"))
        assert all(tensor.any() for name, tensor in adapter.items() if name.endswith(".delta"))
        for expert in ids[1:]:
            state = model.experts.expert_state(expert)
            assert all(torch.equal(state[k], adapter[k]) for k in state if k.endswith(".delta"))
            assert any(tensor.any() for name, tensor in state.items() if name.endswith(".B"))
    metrics = evaluate_models(bench, models)
    assert metrics.methods["dmoerm"].macro > 0.95
    assert metrics.methods["per_task"].macro > 0.95

    loaded = type(model).from_pretrained(bench.run.folder / "dmoerm", backbone=bench.backbone)
    again, _ = score_pairs(loaded, bench.trunk, bench.test)
    chosen, _ = score_pairs(model, bench.trunk, bench.test)
    assert torch.equal(again.rewards, chosen.rewards)


def test_the_general_expert_is_one_more_input_of_every_aggregator(tmp_path: Path) -> None:
    settings = {"phase1": QUICK | {"shared_start": 0.5}, "phase3": {"general_expert": True}}
    bench, models = trained(tmp_path / "run", planted_splits(), **settings)
    model = models["dmoerm"]
    ids = {task: model.config.experts_of(task) for task in model.config.task_names}
    general = [model.config.experts.index((task, "general")) for task in ids]
    assert [g in ids[task] for g, task in zip(general, ids, strict=True)] == [True, True]
    one, two = (model.experts.expert_state(g) for g in general)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert evaluate_models(bench, models).methods["dmoerm"].macro > 0.95
