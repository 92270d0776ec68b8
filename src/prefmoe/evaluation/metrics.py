"""`metrics.json`: the numbers of a run, in one shape for the demo, training and evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, TypeAdapter

from prefmoe.errors import ConfigError
from prefmoe.evaluation.accuracy import (
    Floats,
    Interval,
    bootstrap_interval,
    macro_accuracy,
    pair_hits,
    paired_bootstrap,
)
from prefmoe.evaluation.files import read_json, write_text


class _Numbers(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RouterMetrics(_Numbers):
    """Share of test pairs whose prompt the router sends to its task; a fraction."""

    accuracy: float


class TaskMetrics(_Numbers):
    """Accuracy of one method on one task, its 95 % interval, and on how many pairs."""

    accuracy: float
    low: float
    high: float
    pairs: int


class MethodMetrics(_Numbers):
    """Accuracy of one method: the mean over tasks, and each task."""

    macro: float
    tasks: dict[str, TaskMetrics]


class PairedMetrics(_Numbers):
    """Macro accuracy of one method minus another's on the same pairs, with its 95 % interval."""

    macro: float
    low: float
    high: float


class Metrics(_Numbers):
    """Everything in `metrics.json`.

    Attributes:
        router: None where no router was used.
        methods: Keyed by method: "single", "single_wide", "per_task", "dmoerm".
        paired: Keyed "a-b", for example "dmoerm-single".
        seconds: Wall-clock seconds of each step.
    """

    router: RouterMetrics | None = None
    methods: dict[str, MethodMetrics]
    paired: dict[str, PairedMetrics] = {}
    seconds: dict[str, float] = {}


def build_metrics(
    margins: Mapping[str, Mapping[str, ArrayLike]],
    *,
    router_accuracy: float | None = None,
    seconds: Mapping[str, float] | None = None,
    prompt_ids: Mapping[str, Sequence[str]] | None = None,
    subject: str = "dmoerm",
    seed: int = 0,
) -> Metrics:
    """Accuracies, intervals and paired differences from the margins of test pairs.

    Args:
        margins: For each method and task reward(chosen) - reward(rejected) of each pair, the pairs in the
            same order for every method.
        router_accuracy: Share of test prompts whose task the router found, if there is a router.
        seconds: Wall-clock seconds of each step.
        prompt_ids: For each task the prompt of each pair; pairs of one prompt are resampled together.
        subject: The method that is compared with every other one, if it is among them.
        seed: Seed of every bootstrap.

    Raises:
        ConfigError: no method, or a method name with a "-" in it (it separates the names in `paired`).
        DataError: a method or task without pairs, a margin that is not finite, or tasks that differ.
        ShapeError: methods with different numbers of pairs.
    """
    wrong = [method for method in margins if "-" in method]
    if wrong or not margins:
        raise ConfigError(
            f"methods {wrong or list(margins)} cannot be reported; give one or more names without '-'."
        )
    hits = {
        method: {task: pair_hits(row) for task, row in tasks.items()} for method, tasks in margins.items()
    }
    others = [method for method in hits if method != subject] if subject in hits else []
    differences = {
        f"{subject}-{other}": paired_bootstrap(hits[subject], hits[other], seed=seed, prompt_ids=prompt_ids)
        for other in others
    }
    return Metrics(
        router=None if router_accuracy is None else RouterMetrics(accuracy=router_accuracy),
        methods={method: _method_metrics(tasks, prompt_ids, seed) for method, tasks in hits.items()},
        paired={name: _paired(interval) for name, interval in differences.items()},
        seconds=dict(seconds or {}),
    )


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Writes `metrics.json`, whole or not at all.

    Raises:
        PrefmoeError: the file cannot be written.
    """
    write_text(path, metrics.model_dump_json(indent=2) + "\n")


def read_metrics(path: Path) -> Metrics:
    """Reads `metrics.json`.

    Raises:
        DataError: the file is missing or does not have this shape.
    """
    return read_json(path, TypeAdapter(Metrics))


def _method_metrics(
    tasks: Mapping[str, Floats], prompt_ids: Mapping[str, Sequence[str]] | None, seed: int
) -> MethodMetrics:
    intervals = {
        task: bootstrap_interval(
            row, seed=seed, prompt_ids=None if prompt_ids is None else prompt_ids.get(task, ())
        )
        for task, row in tasks.items()
    }
    return MethodMetrics(
        macro=macro_accuracy(tasks),
        tasks={
            task: TaskMetrics(accuracy=value, low=low, high=high, pairs=len(tasks[task]))
            for task, (value, low, high) in intervals.items()
        },
    )


def _paired(interval: Interval) -> PairedMetrics:
    return PairedMetrics(macro=interval.value, low=interval.low, high=interval.high)
