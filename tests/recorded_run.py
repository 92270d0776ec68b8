"""A tiny run, together with what was computed on the way and from what."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from torch import Tensor

from prefmoe.evaluation.metrics import Metrics
from prefmoe.nn import Packing, TaskRouter
from prefmoe.reward import aggregator_choice, phases
from prefmoe.reward.aggregators import ExpertFeatures
from prefmoe.reward.evaluate import evaluate_models
from prefmoe.reward.jobs import ExpertJob
from prefmoe.reward.settings import RewardSettings
from prefmoe.reward.texts import PairRow
from prefmoe.reward.train import Models, train_models
from prefmoe.reward.trunk import Trunk
from prefmoe.reward.workbench import Workbench
from tiny_run import tiny_bench


@dataclass
class Record:
    """What happened while a run was trained."""

    jobs: list[ExpertJob] = field(default_factory=list)
    trunk_texts: int = 0
    router_fits: list[Tensor] = field(default_factory=list)
    aggregator_rows: list[Sequence[PairRow]] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def progress(self, label: str, _: float) -> Iterator[object]:
        self.labels[label] += 1
        yield lambda amount: None


@dataclass
class FinishedRun:
    settings: RewardSettings
    bench: Workbench
    models: Models
    metrics: Metrics
    record: Record
    backbone_before: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        return self.bench.run.folder

    def job(self, name: str) -> ExpertJob:
        (found,) = (job for job in self.record.jobs if job.name == name)
        return found


def finished_run(settings: RewardSettings) -> FinishedRun:
    """Trains and measures, and records on the way what was computed and from what."""
    record = Record()
    train_experts, fit_aggregator, fit_router = (
        phases.train_experts,
        aggregator_choice.fit_aggregator,
        TaskRouter.fit,
    )
    compute = Trunk._compute

    def recorded_experts(backbone: object, experts: object, trunk: object, jobs: list, *args, **kwargs):  # type: ignore[type-arg, no-untyped-def]
        record.jobs += jobs
        return train_experts(backbone, experts, trunk, jobs, *args, **kwargs)

    def recorded_aggregator(kind: str, features: ExpertFeatures, *args, **kwargs):  # type: ignore[no-untyped-def]
        record.aggregator_rows.append(features.rows)
        return fit_aggregator(kind, features, *args, **kwargs)

    def recorded_router(router: TaskRouter, features: Tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
        record.router_fits.append(features)
        return fit_router(router, features, *args, **kwargs)

    def recorded_compute(trunk: Trunk, packing: Packing) -> Tensor:
        record.trunk_texts += len(packing.rows)
        return compute(trunk, packing)

    with (
        mock.patch.object(phases, "train_experts", recorded_experts),
        mock.patch.object(aggregator_choice, "fit_aggregator", recorded_aggregator),
        mock.patch.object(TaskRouter, "fit", recorded_router),
        mock.patch.object(Trunk, "_compute", recorded_compute),
    ):
        bench = tiny_bench(settings, progress=record.progress)
        before = {name: tensor.clone() for name, tensor in bench.backbone.state_dict().items()}
        models = train_models(bench)
        metrics = evaluate_models(bench, models)
    return FinishedRun(settings, bench, models, metrics, record, before)
