"""From trained experts to reward models: phase 3, units, and one model per method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefmoe.nn import AggregatorKind, TaskRouter
from prefmoe.reward.aggregator_choice import Candidates, best_aggregators, fit_candidates
from prefmoe.reward.aggregators import ExpertFeatures, join_features, standardized
from prefmoe.reward.config import DMoERMConfig
from prefmoe.reward.experts import Experts, ExpertState
from prefmoe.reward.features import pooled_states
from prefmoe.reward.jobs import TrainedExpert
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.phases import Fold, expert_name
from prefmoe.reward.settings import Method
from prefmoe.reward.texts import PairRow
from prefmoe.reward.workbench import Workbench
from prefmoe.runs.inputs import weights_hash

TaskRows = Mapping[str, Sequence[PairRow]]


@dataclass(frozen=True)
class TaskAggregator:
    """The aggregator kept for a task."""

    kind: AggregatorKind
    module: nn.Module


def rows_by_task(bench: Workbench, split: str, fold: Fold | None = None) -> dict[str, list[PairRow]]:
    """Rows of a split by task; of a fold, only those kept from its experts."""
    encoded = getattr(bench, split)
    found: dict[str, list[PairRow]] = {task: [] for task in bench.tasks}
    for pair, row in zip(encoded.pairs, encoded.rows, strict=True):
        if pair.task in found and (fold is None or row.prompt in fold.held_out):
            found[pair.task].append(row)
    return found


def expert_features(
    bench: Workbench,
    states: Mapping[str, ExpertState],
    tasks: Mapping[str, Sequence[str]],
    rows: TaskRows,
    *,
    rank: int | None = None,
    name: str,
    label: str,
) -> dict[str, ExpertFeatures]:
    """What the experts of each task say of that task's pairs; computed once, as a step of the run.

    Args:
        bench: What is worked on.
        states: Expert states by `expert_name`.
        tasks: Capabilities of every task.
        rows: Pairs of every task.
        rank: LoRA rank of the states.
        name: Of the step.
        label: For the progress bar.
    """
    names = [expert_name(task, point) for task, points in tasks.items() for point in ("", *points)]
    experts = build_experts(bench, [states[key] for key in names], rank=rank)
    wanted = [
        (text, names.index(expert_name(task, point)))
        for task, points in tasks.items()
        for pair in rows[task]
        for text in (pair.chosen, pair.rejected)
        for point in ("", *points)
    ]

    def compute() -> Tensor:
        experts.attach(bench.backbone)
        try:
            return pooled_states(
                bench.backbone, experts, bench.trunk, wanted, label=label, progress=bench.progress
            )
        finally:
            experts.detach()

    pooled = bench.run.step(
        f"features_{name}.safetensors",
        compute,
        save=lambda file, states: save_file({"states": states}, file),
        load=lambda file: load_file(file)["states"],
    )
    features: dict[str, ExpertFeatures] = {}
    first = 0
    for task, points in tasks.items():
        ids = [names.index(expert_name(task, point)) for point in ("", *points)]
        count = 2 * len(rows[task]) * len(ids)
        mine = pooled[first : first + count].view(len(rows[task]), 2, len(ids), bench.trunk.hidden)
        first += count
        weight, bias = experts.head_weight[ids].detach().cpu(), experts.head_bias[ids].detach().cpu()
        features[task] = standardized(mine, weight, bias, rows[task])
    return features


def expert_states(
    bench: Workbench, trained: Mapping[str, TrainedExpert], fold: str
) -> dict[str, ExpertState]:
    """States of the experts of a fold, every task's adapter before its capabilities, by `expert_name` without fold."""
    return {
        expert_name(task, name): trained[expert_name(task, name, fold)].state
        for task, points in bench.tasks.items()
        for name in ("", *points)
    }


def build_experts(bench: Workbench, states: Sequence[ExpertState], *, rank: int | None = None) -> Experts:
    """Experts with these states, on the backbone's device; not attached."""
    on_deltas = any(key.endswith(".delta") for key in states[0])
    experts = bench.new_experts(len(states), rank=rank, num_dense=len(states) if on_deltas else 0)
    if on_deltas:
        experts.dense_ids.copy_(torch.arange(len(states)))
    for expert, state in enumerate(states):
        experts.load_expert(expert, state)
    return experts.to(bench.backbone.device).eval()


def aggregator_candidates(
    bench: Workbench,
    folds: Sequence[Fold],
    trained: Mapping[str, TrainedExpert],
    *,
    validation: Mapping[str, ExpertFeatures],
) -> dict[str, Candidates]:
    """Every kind of aggregator for every task, fitted on what the folds kept back.

    Args:
        bench: What is worked on.
        folds: The folds whose experts are in `trained`.
        trained: All experts of all folds.
        validation: Features of the experts that the model will hold, on the validation pairs.
    """
    held_out: dict[str, list[ExpertFeatures]] = {task: [] for task in bench.tasks}
    for fold in folds:
        states = expert_states(bench, trained, fold.name)
        rows = rows_by_task(bench, "train", fold)
        found = expert_features(
            bench, states, bench.tasks, rows, name=fold.name, label=f"held-out pairs, {fold.name}"
        )
        for task, features in found.items():
            held_out[task].append(features)
    candidates: dict[str, Candidates] = {}
    with bench.progress("aggregators", len(held_out)) as advance:
        for task, parts in held_out.items():
            candidates[task] = fit_candidates(
                join_features(parts),
                validation[task],
                settings=bench.settings.phase3,
                seed=bench.settings.seed,
            )
            advance(1)
    return candidates


def choose_aggregators(bench: Workbench, candidates: Mapping[str, Candidates]) -> dict[str, TaskAggregator]:
    """Phase 3: the aggregator that every task keeps, and a line in the log on what spoke for each kind.

    What speaks for a kind are its cross-validated hits on the pairs kept back and its hits on the validation pairs.
    """
    chosen: dict[str, TaskAggregator] = {}
    best = best_aggregators(candidates, standard_errors=bench.settings.phase3.standard_errors)
    for task, fitted in candidates.items():
        kind = best[task]
        chosen[task] = TaskAggregator(kind, fitted.modules[kind])
        accuracy = {f"accuracy/{name}": _share(hits) for name, hits in fitted.validation.items()}
        evidence = {f"evidence/{name}": _share(hits) for name, hits in fitted.hits.items()}
        bench.run.log("phase3", {"task": task, "kept": kind, **accuracy, **evidence})
    return chosen


def _share(hits: Tensor) -> float:
    """Mean of hits; 0.5 without any."""
    return hits.mean().item() if len(hits) else 0.5


def assemble_model(
    bench: Workbench,
    tasks: Mapping[str, Sequence[str]],
    states: Mapping[str, ExpertState],
    validation: Mapping[str, ExpertFeatures],
    *,
    method: Method,
    router: TaskRouter | None = None,
    aggregators: Mapping[str, TaskAggregator] | None = None,
    rank: int | None = None,
) -> DMoERMForSequenceClassification:
    """A model of these experts, in evaluation mode, on the bench's backbone.

    Args:
        bench: What is worked on.
        tasks: Capabilities of every task; one task for a single reward model.
        states: Expert states by `expert_name`.
        validation: Features of the same experts on validation pairs: they set the units.
        method: Its name.
        router: None for one task.
        aggregators: None takes every task's own head.
        rank: LoRA rank of the states.
    """
    sizes = bench.settings.experts
    rank = rank or sizes.rank
    kinds = [aggregators[task].kind if aggregators else "task_head" for task in tasks]
    config = DMoERMConfig(
        bench.backbone.config,
        method=method,
        backbone=bench.settings.backbone.name,
        backbone_hash=weights_hash(bench.backbone),
        tasks={task: list(points) for task, points in tasks.items()},
        split_layer=sizes.split_layer,
        rank=rank,
        alpha=sizes.alpha * rank / sizes.rank,
        target_modules=sizes.target_modules,
        dense_tasks=any(key.endswith(".delta") for key in next(iter(states.values()))),
        pooling=sizes.pooling,
        aggregators=kinds,
        max_tokens=bench.renderer.max_length,
        chat_template=bench.renderer.chat_template,
        template_hash=bench.renderer.template_hash,
        response_marker=list(bench.renderer.response_marker),
        pad_token_id=bench.tokenizer.pad_token_id,
    )
    model = DMoERMForSequenceClassification(config, backbone=bench.backbone)
    for expert, (task, name) in enumerate(config.experts):
        model.experts.load_expert(expert, states[expert_name(task, name)])
    if router is not None:
        model.router.load_state_dict(router.state_dict())
    for task_id, task in enumerate(tasks):
        if aggregators:
            model.aggregators[task_id].load_state_dict(aggregators[task].module.state_dict())
        _set_units(model, task_id, config.experts_of(task), validation[task])
    model.experts.to(bench.backbone.device)
    for part in (model.router, model.aggregators):
        part.to(bench.backbone.device)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _set_units(
    model: DMoERMForSequenceClassification, task_id: int, ids: list[int], features: ExpertFeatures
) -> None:
    for name, values in features.units._asdict().items():
        getattr(model, name)[ids] = values
    if len(features.rows) < 1:
        return
    aggregator = model.aggregators[task_id]
    rewards: Tensor = aggregator(features.states.flatten(0, 1), features.scores.flatten(0, 1))
    model.reward_mean[task_id] = rewards.mean()
    model.reward_std[task_id] = rewards.std().clamp_min(1e-4)
