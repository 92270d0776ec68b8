"""Which pairs and names a phase works with."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
from transformers import TrainingArguments

from data_helpers import assistant, user
from prefmoe.reward import phases
from prefmoe.reward.assemble import rows_by_task
from prefmoe.reward.jobs import TrainedExpert
from prefmoe.reward.phases import ALL, Fold, expert_name, make_folds, pairs_of, prompts_of, select_rows
from prefmoe.reward.training import work_on_one_device
from tiny_run import planted_pairs, planted_splits, tiny_bench, tiny_experts, tiny_settings


@pytest.mark.parametrize("split", ["paper", "crossfit"])
def test_ids_that_stand_twice_put_no_prompt_on_both_sides(tmp_path: Path, split: str) -> None:
    """Ids often start anew in every file that a training file was put together from."""
    splits = planted_splits()
    splits["train"] = [replace(pair, id=str(i % 3)) for i, pair in enumerate(splits["train"])]
    bench = tiny_bench(tiny_settings(tmp_path, phase3={"split": split}), splits)
    for fold in make_folds(bench):
        seen = {row.prompt for row in select_rows(bench.train, pairs_of(fold=fold))}
        kept = {row.prompt for rows in rows_by_task(bench, "train", fold).values() for row in rows}
        assert seen
        assert kept
        assert not seen & kept
        assert len(seen) + len(kept) == len({row.prompt for row in bench.train.rows})


def test_a_capability_expert_sees_soft_labels_where_there_are_any(tmp_path: Path) -> None:
    splits = planted_splits()
    first, second, third, *others = splits["train"]
    task = str(first.task)
    kinds = [
        ({"wit": 1}, {}),
        ({"wit": -1}, {"wit": 0.25}),
        ({}, {"wit": 0.5}),  # the two orders disagree: no label, but a probability
    ]
    labelled = [
        replace(pair, task=task, capabilities=hard, capability_probabilities=soft)
        for pair, (hard, soft) in zip((first, second, third), kinds, strict=True)
    ]
    splits["train"] = [*labelled, *others]
    for is_soft, expected in ((True, [1.0, 0.25, 0.5]), (False, [1.0, 0.0])):
        settings = tiny_settings(tmp_path / str(is_soft), data={"soft_labels": is_soft})
        bench = tiny_bench(settings, splits)
        rows = phases.capability_rows(bench.train, task, "wit", pairs_of(task))
        assert [row.label for row in rows] == expected


def test_capability_experts_see_further_pairs_and_never_those_kept_back(tmp_path: Path) -> None:
    """Further pairs on prompts of the training pairs and on prompts of their own, with the capability `loud`."""
    splits = planted_splits()
    hot = [pair for pair in splits["train"] if pair.task == "hot"]
    more = [
        replace(pair, chosen=assistant("ab"), rejected=assistant("ab !!"), capabilities={"loud": -1})
        for pair in hot
    ]
    more += [
        replace(
            pair, id=f"more{pair.id}", prompt=user(f"other {pair.id}"), capabilities={"loud": 1, "new": 1}
        )
        for pair in hot
    ]
    bench = tiny_bench(
        tiny_settings(tmp_path, phase2={"max_pairs_per_capability": 8}), splits | {"capability_train": more}
    )
    assert bench.capabilities == {"cold": ["soft"], "hot": ["loud", "new", "soft"]}
    folds = [*make_folds(bench), Fold(ALL, prompts_of(bench.train.pairs), frozenset())]
    parent = TrainedExpert(tiny_experts(bench, 1).expert_state(0), 0.5)
    adapters = {expert_name(task, fold=fold.name): parent for task in bench.tasks for fold in folds}
    with mock.patch.object(phases, "train_stage", lambda bench, name, jobs, settings: jobs):
        jobs = {job.name: job for job in phases.train_capability_experts(bench, folds, adapters)}
    further = set(bench.capability_train.rows)
    for fold in folds:
        loud = jobs[expert_name("hot", "loud", fold.name)]
        assert not {row.prompt for row in loud.head_pairs} & fold.held_out
        found = {row._replace(label=1.0) for row in loud.head_pairs} & further
        # All on other prompts, and those on prompts that the fold's experts see.
        assert len(found) == len(hot) + sum(
            row.prompt not in fold.held_out for row in bench.capability_train.rows[: len(hot)]
        )
        assert len(loud.train) == 8
        assert set(loud.train) <= set(loud.head_pairs)
        assert len(jobs[expert_name("hot", "new", fold.name)].head_pairs) == len(hot)
        assert not set(jobs[expert_name("cold", "soft", fold.name)].head_pairs) & further


def test_task_adapters_and_the_single_model_do_not_see_further_pairs(tmp_path: Path) -> None:
    more = [replace(pair, id=f"more{pair.id}").swap() for pair in planted_pairs(8, split="train", seed=5)]
    bench = tiny_bench(tiny_settings(tmp_path), planted_splits() | {"capability_train": more})
    assert len(bench.capability_train.rows) == len(more) - 1  # one is a training pair again
    with mock.patch.object(
        phases, "train_stage", lambda bench, name, jobs, settings, **_: dict(enumerate(jobs))
    ):
        folds = [Fold(ALL, prompts_of(bench.train.pairs), frozenset())]
        jobs = phases.train_task_adapters(bench, folds, {}, single=True).values()
    assert len(jobs) == 3
    assert {row for job in jobs for row in job.train} == set(bench.train.rows)


def test_no_two_experts_have_one_name() -> None:
    parts = ["", "a", "b", "a/b", "a@b", "a|b", "a%2Fb", "%"]
    names = [expert_name(*some) for some in product(parts[1:], parts, ["", "half0"])]
    assert len(set(names)) == len(names)
    assert not any("|" in name for name in names)  # save_states parts names from tensors by it
    assert expert_name("facts", "on topic", "half1") == "facts/on topic@half1"


def test_what_report_to_wrote_outlives_the_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "phase1"
    for name in ("checkpoint-8/model.pt", "checkpoint-16/model.pt", "runs/today/events.1"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")
    phases._remove_checkpoints(folder)
    assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == ["runs/today/events.1"]


@pytest.mark.parametrize("names", [[], ["checkpoint-8"]])
def test_without_it_nothing_is_left(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / "checkpoints" / "phase1" / name).mkdir(parents=True)
    phases._remove_checkpoints(tmp_path / "checkpoints" / "phase1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seen", "used"), [(0, 0), (1, 1), (8, 1)])
def test_one_process_works_on_one_gpu(tmp_path: Path, seen: int, used: int) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = seen
    work_on_one_device(arguments)
    assert arguments.n_gpu == used
