"""Measuring policies on held-out pairs: implicit-reward accuracy, routing, and what steering does."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefmoe.evaluation.accuracy import bootstrap_interval, macro_interval, pair_hits, pairwise_accuracy
from prefmoe.evaluation.files import write_text
from prefmoe.evaluation.metrics import Metrics, TaskMetrics, build_metrics, write_metrics
from prefmoe.policy.bench import PolicyBench
from prefmoe.policy.costs import TrainingCosts, read_costs
from prefmoe.policy.emr import emr_logps
from prefmoe.policy.inspect import Inspection, inspect_routing
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.methods import is_pmol
from prefmoe.policy.pairs import TokenPairs
from prefmoe.policy.pictures import draw_routing, draw_steering
from prefmoe.policy.train import load_policy

BASE = "base"


class SteeringPoint(BaseModel):
    """What one weight of one group gives: accuracy and mean implicit-reward margin (reward units) by preference."""

    weight: float
    accuracy: dict[str, float]
    margin: dict[str, float]


class Estimate(BaseModel):
    """An accuracy, or a difference of margins, with its 95 % interval."""

    value: float
    low: float
    high: float


# Of each group that is turned: of every preference.
Gains = dict[str, dict[str, Estimate]]


class PolicyReport(BaseModel):
    """`policy.json`: what `metrics.json` has no place for.

    Attributes:
        mean: Accuracy of every method, mean of the preferences.
        minimum: Accuracy of every method on its worst preference.
        group_accuracy: For methods with a router, the share of test texts whose own group comes first, with its
            95 % interval.
        costs: What each training took; of methods that merge, one a preference.
        steering: For each group that was turned, a point a weight, of the method "pmol".
        steering_gain: Its mean margins at the largest weight less those at the smallest, reward units.
    """

    mean: dict[str, Estimate]
    minimum: dict[str, Estimate]
    group_accuracy: dict[str, TaskMetrics] = {}
    costs: dict[str, TrainingCosts] = {}
    steering: dict[str, list[SteeringPoint]] = {}
    steering_gain: Gains = {}


def implicit_margins(logps: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    r"""Implicit reward of chosen minus rejected, $\hat r = \beta(\log\pi - \log\pi_{ref})$.

    Args:
        logps: Of the policy: all chosen, then all rejected.
        reference: Of the reference, in the same order.
        beta: Of DPO.

    Returns:
        (pairs,) reward units.
    """
    chosen, rejected = (beta * (logps - reference)).chunk(2)
    return chosen - rejected


def evaluate_policies(bench: PolicyBench, folders: Mapping[str, Path]) -> tuple[Metrics, PolicyReport]:
    """Measures every method on the test pairs; writes `metrics.json`, `policy.json` and the pictures."""
    test, reference, beta = bench.splits["test"], bench.reference["test"], bench.settings.training.beta
    margins = {BASE: _by_preference(bench, test, torch.sub(*reference.chunk(2)))}
    accuracy: dict[str, TaskMetrics] = {}
    for method, folder in folders.items():
        scores = _test_scores(bench, method, folder)
        margins[method] = _by_preference(bench, test, implicit_margins(scores["logps"], reference, beta=beta))
        if "hits" in scores:
            accuracy[method] = _interval(bench, scores["hits"])
    prompts = {p: [row.prompt for row in test.rows if row.preference == p] for p in bench.preferences}
    subject = "pmol" if "pmol" in margins else next(iter(folders))
    metrics = build_metrics(
        margins, seconds=bench.run.seconds(), prompt_ids=prompts, subject=subject, seed=bench.settings.seed
    )
    hits = {
        method: {p: pair_hits(row) for p, row in of_method.items()} for method, of_method in margins.items()
    }
    mean, minimum = (
        {
            method: Estimate(
                **macro_interval(rows, worst=worst, seed=bench.settings.seed, prompt_ids=prompts)._asdict()
            )
            for method, rows in hits.items()
        }
        for worst in (False, True)
    )
    report = PolicyReport(
        mean=mean, minimum=minimum, group_accuracy=accuracy, costs=read_costs(bench.run.folder)
    )
    _write(bench, metrics, report)  # before the steering, which takes long
    if "pmol" in folders:
        curves, gains = _steering(bench, folders["pmol"])
        report = report.model_copy(update={"steering": curves, "steering_gain": gains})
        metrics = metrics.model_copy(update={"seconds": bench.run.seconds()})
        _write(bench, metrics, report)
    return metrics, report


def _write(bench: PolicyBench, metrics: Metrics, report: PolicyReport) -> None:
    write_metrics(metrics, bench.run.folder / "metrics.json")
    write_text(bench.run.folder / "policy.json", report.model_dump_json(indent=1))


def _by_preference(bench: PolicyBench, pairs: TokenPairs, margins: Tensor) -> dict[str, list[float]]:
    return {
        p: [m for m, row in zip(margins.tolist(), pairs.rows, strict=True) if row.preference == p]
        for p in bench.preferences
    }


def _test_scores(bench: PolicyBench, method: str, folder: Path) -> dict[str, Tensor]:
    """Log-probabilities of the test texts, and for PMoL whether their own group came first; a step of the run."""

    def compute() -> dict[str, Tensor]:
        pairs = bench.splits["test"]
        if method == "emr":
            return {"logps": emr_logps(bench, folder, pairs)}
        model = load_policy(bench, folder)
        if not is_pmol(method):
            return {"logps": _logps(bench, model, pairs, label=f"testing {method}")}
        found = _inspect(bench, model, pairs, label=f"testing {method}")
        write_text(bench.run.folder / f"routing_{method}.json", found.table.model_dump_json(indent=1))
        draw_routing(found.table, bench.run.folder / f"routing_{method}.png")
        return {"logps": found.logps, "hits": found.hits}

    def save(file: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, file)

    return bench.run.step(f"test_{method}.safetensors", compute, save, load_file, alone=True)


def _logps(bench: PolicyBench, model: nn.Module, pairs: TokenPairs, *, label: str) -> Tensor:
    tokens = bench.settings.model.batch_tokens
    return completion_logps(model, pairs.texts(), batch_tokens=tokens, progress=bench.progress, label=label)


def _inspect(bench: PolicyBench, model: nn.Module, pairs: TokenPairs, *, label: str) -> Inspection:
    return inspect_routing(
        model,
        pairs.texts(),
        [row.preference for row in pairs.rows] * 2,
        batch_tokens=bench.settings.model.batch_tokens,
        progress=bench.progress,
        label=label,
    )


def _interval(bench: PolicyBench, hits: Tensor) -> TaskMetrics:
    prompts = [row.prompt for row in bench.splits["test"].rows] * 2
    found = bootstrap_interval(hits.tolist(), seed=bench.settings.seed, prompt_ids=prompts)
    return TaskMetrics(accuracy=found.value, low=found.low, high=found.high, pairs=len(hits))


def _steering(bench: PolicyBench, folder: Path) -> tuple[dict[str, list[SteeringPoint]], Gains]:
    """The curve of each group over the settings' weights, on some test pairs of every preference, and what it gains."""
    settings = bench.settings.steering
    rows = [
        row
        for p in bench.preferences
        for row in [r for r in bench.splits["test"].rows if r.preference == p][
            : settings.pairs_per_preference
        ]
    ]
    if not rows:
        return {}, {}
    pairs = TokenPairs(rows)
    places = [bench.splits["test"].rows.index(row) for row in rows]
    half = len(bench.splits["test"].rows)
    texts = [*places, *(half + place for place in places)]
    reference = bench.reference["test"][texts]
    as_trained = _test_scores(bench, "pmol", folder)["logps"][texts]

    def measure(group: str, weight: float) -> Tensor:
        name = f"{bench.preferences.index(group)}_{weight:g}"

        def compute() -> dict[str, Tensor]:
            model = load_policy(bench, folder)
            with model.base_model.steered({group: weight}):
                return {"logps": _logps(bench, model, pairs, label=f"steering {group} to {weight:g}")}

        def save(file: Path, tensors: dict[str, Tensor]) -> None:
            save_file(tensors, file)

        return bench.run.step(f"steering_{name}.safetensors", compute, save, load_file, alone=True)["logps"]

    curves: dict[str, list[SteeringPoint]] = {}
    gains: Gains = {}
    for group in bench.preferences:
        curves[group], of_pairs = [], []
        for weight in settings.weights:
            logps = as_trained if weight == 1 else measure(group, weight)
            margins = implicit_margins(logps, reference, beta=bench.settings.training.beta)
            curves[group].append(_point(bench, pairs, weight, margins))
            of_pairs.append(margins)
        gains[group] = _gain(bench, pairs, of_pairs[-1] - of_pairs[0])
    draw_steering(curves, bench.run.folder / "steering.png")
    return curves, gains


def _gain(bench: PolicyBench, pairs: TokenPairs, differences: Tensor) -> dict[str, Estimate]:
    """Mean difference of every preference's pairs, with its interval over prompts."""
    prompts: dict[str, list[str]] = {p: [] for p in bench.preferences}
    for row in pairs.rows:
        prompts[row.preference].append(row.prompt)
    return {
        p: Estimate(**bootstrap_interval(values, seed=bench.settings.seed, prompt_ids=prompts[p])._asdict())
        for p, values in _by_preference(bench, pairs, differences).items()
    }


def _point(bench: PolicyBench, pairs: TokenPairs, weight: float, margins: Tensor) -> SteeringPoint:
    by_preference: Mapping[str, Sequence[float]] = _by_preference(bench, pairs, margins)
    return SteeringPoint(
        weight=weight,
        accuracy={p: pairwise_accuracy(row) for p, row in by_preference.items()},
        margin={p: sum(row) / len(row) for p, row in by_preference.items()},
    )


def read_report(folder: Path) -> PolicyReport:
    """`policy.json` of a run folder."""
    return PolicyReport.model_validate(json.loads((folder / "policy.json").read_text(encoding="utf-8")))
