"""`prefmoe reward train`: all methods of a config, from pairs to saved models and metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefmoe.reward.aggregators import ExpertFeatures
from prefmoe.reward.assemble import (
    aggregator_candidates,
    assemble_model,
    choose_aggregators,
    expert_features,
    expert_states,
    rows_by_task,
)
from prefmoe.reward.experts import ExpertState
from prefmoe.reward.jobs import TrainedExpert
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.phases import (
    ALL,
    Fold,
    expert_name,
    make_folds,
    prompts_of,
    train_capability_experts,
    train_shared,
    train_task_adapters,
    train_wide,
)
from prefmoe.reward.router import fit_router
from prefmoe.reward.settings import Method
from prefmoe.reward.splits import ONE_TASK
from prefmoe.reward.workbench import GENERAL, Workbench

Models = dict[Method, DMoERMForSequenceClassification]


def train_models(bench: Workbench) -> Models:
    """Trains every method of the settings; what two of them share is computed once.

    `per_task` is phase 1 on all training pairs. DMoERM with `phase3.split: crossfit` ends with those same adapters;
    with `paper` it has its own, trained on the paper's share of the prompts.

    Returns:
        One model a method, all on the bench's backbone, in evaluation mode. Each is saved in `<run>/<method>`.
    """
    methods = bench.settings.methods
    folds = make_folds(bench) if "dmoerm" in methods else []
    crossfit = bench.settings.phase3.split == "crossfit"
    router = fit_router(bench)
    wide = train_wide(bench) if "single_wide" in methods else None
    trained = train_phases(bench, folds, crossfit=crossfit)

    models: Models = {}
    if wide is not None:
        num_experts = sum(1 + len(points) for points in bench.tasks.values())
        rank = bench.settings.experts.rank * num_experts
        models["single_wide"] = _one_expert_model(bench, wide.state, name="single_wide", rank=rank)
    if "single" in methods:
        models["single"] = _one_expert_model(bench, trained["single@"].state, name="single")
    of_task_adapters = None
    if folds:
        states = expert_states(bench, trained, ALL if crossfit else folds[0].name)
        features = validation_features(bench, states, bench.tasks, name="dmoerm")
        if crossfit:
            of_task_adapters = {task: found.of_task_adapter() for task, found in features.items()}
        with bench.run.clock("phase3"):
            candidates = aggregator_candidates(bench, folds, trained, validation=features)
            kept = choose_aggregators(bench, candidates)
        models["dmoerm"] = assemble_model(
            bench, bench.tasks, states, features, method="dmoerm", router=router, aggregators=kept
        )
    if "per_task" in methods:
        tasks: dict[str, list[str]] = {task: [] for task in bench.tasks}
        states = {expert_name(task): trained[expert_name(task)].state for task in tasks}
        features = of_task_adapters or validation_features(bench, states, tasks, name="per_task")
        models["per_task"] = assemble_model(bench, tasks, states, features, method="per_task", router=router)
    if bench.run.is_main:
        for method, model in models.items():
            save_model(bench, model, bench.run.folder / method)
    bench.run.wait()
    return {method: models[method] for method in methods}


def train_phases(bench: Workbench, folds: list[Fold], *, crossfit: bool) -> dict[str, TrainedExpert]:
    """Task adapters, the single model, and capability experts, as far as the methods need them."""
    methods = bench.settings.methods
    everything = Fold(ALL, prompts_of(bench.train.pairs), frozenset())
    on_everything = (crossfit and folds) or "single" in methods or "per_task" in methods
    adapter_folds = [*folds, everything] if on_everything else folds
    trained: dict[str, TrainedExpert] = {}
    if adapter_folds:
        shared = train_shared(bench, adapter_folds)
        trained |= train_task_adapters(bench, adapter_folds, shared, single="single" in methods)
        trained |= {expert_name(task, GENERAL, f): shared[f] for f in shared for task in bench.tasks}
    if folds:
        expert_folds = [*folds, everything] if crossfit else folds
        trained |= train_capability_experts(bench, expert_folds, trained)
    return trained


def save_model(bench: Workbench, model: DMoERMForSequenceClassification, folder: Path) -> None:
    """The small artefact with its tokenizer."""
    model.save_pretrained(folder, tokenizer=bench.tokenizer)


def _one_expert_model(
    bench: Workbench, state: ExpertState, *, name: Method, rank: int | None = None
) -> DMoERMForSequenceClassification:
    states = {expert_name(ONE_TASK): state}
    tasks: dict[str, list[str]] = {ONE_TASK: []}
    rows = {ONE_TASK: list(bench.validation.rows)}
    features = expert_features(
        bench, states, tasks, rows, rank=rank, name=name, label=f"validation pairs, {name}"
    )
    return assemble_model(bench, tasks, states, features, method=name, rank=rank)


def validation_features(
    bench: Workbench,
    states: Mapping[str, ExpertState],
    tasks: Mapping[str, Sequence[str]],
    *,
    name: Method,
) -> dict[str, ExpertFeatures]:
    """What finished experts say of every task's validation pairs; a step of the run, named after the method."""
    rows = rows_by_task(bench, "validation")
    return expert_features(bench, states, tasks, rows, name=name, label=f"validation pairs, {name}")
