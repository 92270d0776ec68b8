"""Accuracy of reward models on test pairs, and everything that the report shows of them."""

import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefmoe.errors import PrefmoeWarning
from prefmoe.evaluation.metrics import Metrics, build_metrics, write_metrics
from prefmoe.evaluation.run_folder import ExpertCorrelation, RouterConfusion, scored_pair, write_run_file
from prefmoe.nn import RoutingMode
from prefmoe.records import PreferencePair
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.score import RewardModel, Scores, given_tasks, report_of, score_texts
from prefmoe.reward.settings import Method
from prefmoe.reward.splits import ONE_TASK, with_task
from prefmoe.reward.texts import EncodedPairs, TextTable, encode_pairs
from prefmoe.reward.train import Models
from prefmoe.reward.trunk import Trunk
from prefmoe.reward.workbench import Workbench
from prefmoe.runs.progress import Progress, silent

_EXAMPLES_PER_TASK = 2
OTHER = "other"  # a second model of the same method


def score_pairs(
    model: DMoERMForSequenceClassification,
    trunk: Trunk,
    encoded: EncodedPairs,
    *,
    routing: RoutingMode = "top1",
    label: str = "scoring",
    progress: Progress = silent,
) -> tuple[Scores, Scores]:
    """Scores of the chosen and of the rejected sides; arguments as of `score_texts`, the given tasks are the pairs'."""
    texts = [row.chosen for row in encoded.rows] + [row.rejected for row in encoded.rows]
    task_ids = 2 * given_tasks(model, encoded.pairs) if routing == "given" else None
    both = score_texts(
        model, trunk, texts, routing=routing, task_ids=task_ids, label=label, progress=progress
    )
    return Scores(*(column[: len(encoded.rows)] for column in both)), Scores(
        *(column[len(encoded.rows) :] for column in both)
    )


def margins_by_task(encoded: EncodedPairs, chosen: Scores, rejected: Scores) -> dict[str, list[float]]:
    """Reward margins of the pairs of each true task."""
    margins: dict[str, list[float]] = {}
    for pair, margin in zip(encoded.pairs, (chosen.rewards - rejected.rewards).tolist(), strict=True):
        margins.setdefault(str(pair.task), []).append(margin)
    return dict(sorted(margins.items()))


def prompts_by_task(encoded: EncodedPairs) -> dict[str, list[str]]:
    """Prompt of every pair of each task, as an id; pairs of one prompt are resampled together."""
    prompts: dict[str, list[str]] = {}
    for pair, row in zip(encoded.pairs, encoded.rows, strict=True):
        prompts.setdefault(str(pair.task), []).append(str(row.prompt))
    return prompts


def evaluate_models(bench: Workbench, models: Models) -> Metrics:
    """Measures all models on the test pairs and writes metrics.json and the report's other files."""
    warn_of_unknown_tasks(bench.test.pairs, list(bench.tasks))
    scores = _all_test_scores(bench, models)
    files: dict[str, BaseModel | Mapping[str, BaseModel] | Sequence[BaseModel]] = {}
    routed = next((m for m in ("dmoerm", "per_task") if m in models), None)
    router_accuracy = None
    if routed is not None:
        confusion = router_confusion(models[routed], bench.test, scores[routed][0])
        router_accuracy = confusion_accuracy(confusion)
        files["router_confusion.json"] = confusion
    if "dmoerm" in models:
        chosen, rejected = scores["dmoerm"]
        files["expert_correlation.json"] = correlations(models["dmoerm"], chosen, rejected)
        files["examples.json"] = example_pairs(models["dmoerm"], bench.test, chosen, rejected)
    metrics = build_metrics(
        {method: margins_by_task(bench.test, *both) for method, both in scores.items()},
        router_accuracy=router_accuracy,
        seconds=bench.run.seconds(),
        prompt_ids=prompts_by_task(bench.test),
        seed=bench.settings.seed,
    )
    if bench.run.is_main:
        for name, content in files.items():
            write_run_file(bench.run.folder / name, content)
        write_metrics(metrics, bench.run.folder / "metrics.json")
    return metrics


def _all_test_scores(bench: Workbench, models: Models) -> dict[Method, tuple[Scores, Scores]]:
    """By method, in the order of `models`; task adapters that two methods share score the pairs once."""
    per_task = models.get("per_task")
    is_shared = per_task is not None and "dmoerm" in models and bench.settings.phase3.split == "crossfit"
    found = {
        method: _test_scores(bench, method, model)
        for method, model in models.items()
        if not (is_shared and method == "per_task")
    }
    if per_task is not None and is_shared:
        chosen, rejected = (_by_task_adapters(per_task, side) for side in found["dmoerm"])
        found["per_task"] = chosen, rejected
    return {method: found[method] for method in models}


def _by_task_adapters(per_task: DMoERMForSequenceClassification, found: Scores) -> Scores:
    """What `per_task` says of texts that DMoERM has scored with the same router, task adapters and units."""
    device = per_task.reward_mean.device
    rewards = per_task.in_units(found.heads.to(device), found.task_ids.to(device)).cpu()
    return found._replace(rewards=rewards, capabilities=found.capabilities[:, :0])


def _test_scores(
    bench: Workbench, method: Method, model: DMoERMForSequenceClassification
) -> tuple[Scores, Scores]:
    """Scores of both sides of the test pairs, as a step of the run: a killed one goes on behind it."""

    def compute() -> dict[str, Tensor]:
        both = score_pairs(
            model, bench.trunk, bench.test, label=f"test pairs, {method}", progress=bench.progress
        )
        return {
            f"{side}.{name}": column.contiguous()
            for side, scores in zip(("chosen", "rejected"), both, strict=True)
            for name, column in scores._asdict().items()
        }

    columns = bench.run.step(
        f"test_{method}.safetensors",
        compute,
        save=lambda file, found: save_file(found, file),
        load=load_file,
        alone=True,
    )
    chosen, rejected = (
        Scores(*(columns[f"{side}.{name}"] for name in Scores._fields)) for side in ("chosen", "rejected")
    )
    return chosen, rejected


def evaluate_saved(
    reward_model: RewardModel,
    pairs: list[PreferencePair],
    *,
    against: RewardModel | None = None,
    routing: RoutingMode = "top1",
    seed: int = 0,
    progress: Progress = silent,
) -> Metrics:
    """Measures a saved model on pairs.

    Args:
        reward_model: The model.
        pairs: At least one; a task that the model does not know is a row of its own.
        against: Another one, measured on the same pairs; then the difference has an interval, too. It is called "other"
            where both were trained by the same method. The router is that of the first.
        routing: How both choose experts: by the router ("top1", "soft"), or the pairs' own tasks ("given").
        seed: Of the bootstrap.
        progress: Shows how far it is.

    Raises:
        DataError: pairs that cannot be used.
    """
    start = time.perf_counter()
    name = method_of(reward_model.model)
    encoded, scores = _scored(reward_model, pairs, routing, progress)
    confusion = router_confusion(reward_model.model, encoded, scores[0])
    margins = {name: margins_by_task(encoded, *scores)}
    if against is not None:
        found = method_of(against.model)
        encoded_too, others = _scored(against, pairs, routing, progress)
        margins[OTHER if found == name else found] = margins_by_task(encoded_too, *others)
    return build_metrics(
        margins,
        router_accuracy=confusion_accuracy(confusion) if len(confusion.tasks) > 1 else None,
        seconds={"score": round(time.perf_counter() - start, 2)},
        prompt_ids=prompts_by_task(encoded),
        subject=name,
        seed=seed,
    )


def _scored(
    reward_model: RewardModel, pairs: list[PreferencePair], routing: RoutingMode, progress: Progress
) -> tuple[EncodedPairs, tuple[Scores, Scores]]:
    """All pairs as a saved model reads them, and its scores of both sides."""
    model, table = reward_model.model, TextTable()
    encoded = encode_pairs(with_task(pairs, "test"), reward_model.renderer, table, allow_equal=True)
    warn_of_unknown_tasks(encoded.pairs, model.config.task_names)
    warn_of_truncation(encoded, reward_model.renderer.max_length)
    trunk = Trunk(model.backbone, model.config.split_layer, table, batch_tokens=reward_model.batch_tokens)
    return encoded, score_pairs(model, trunk, encoded, routing=routing, progress=progress)


def method_of(model: DMoERMForSequenceClassification) -> str:
    """The method that a model was trained as; of one that does not say it, the method whose shape it has."""
    if model.config.method is not None:
        return model.config.method
    if model.config.task_names == [ONE_TASK] and not model.capability_names:
        return "single"
    return "dmoerm" if model.capability_names else "per_task"


def warn_of_unknown_tasks(pairs: Sequence[PreferencePair], known: Sequence[str]) -> None:
    """A warning that names the tasks that no expert was trained for; none if the training knew no tasks."""
    if list(known) == [ONE_TASK]:
        return
    unknown = Counter(str(pair.task) for pair in pairs if pair.task not in known)
    if unknown:
        found = ", ".join(f"{task!r} ({number} pairs)" for task, number in sorted(unknown.items()))
        warnings.warn(
            f"no training pair has the task {found}; scored by the experts that the router chose among "
            f"{', '.join(known)}",
            PrefmoeWarning,
            stacklevel=2,
        )


def warn_of_truncation(encoded: EncodedPairs, max_length: int) -> None:
    """A warning that counts the pairs that lost tokens, and those whose sides became equal by that."""
    if encoded.num_truncated:
        ties = (
            f"; the sides of {encoded.num_equal} became equal and count as ties" if encoded.num_equal else ""
        )
        warnings.warn(
            f"{encoded.num_truncated} of {len(encoded.pairs)} pairs lost tokens to fit the model's {max_length}{ties}",
            PrefmoeWarning,
            stacklevel=2,
        )


def router_confusion(
    model: DMoERMForSequenceClassification, encoded: EncodedPairs, chosen: Scores
) -> RouterConfusion:
    """What the router says of the prompts of test pairs, every pair once; tasks that it never saw are left out."""
    names = model.config.task_names
    counts = torch.zeros(len(names), len(names), dtype=torch.long)
    for pair, used in zip(encoded.pairs, chosen.task_probs.argmax(-1).tolist(), strict=True):
        if pair.task in names:
            counts[names.index(str(pair.task)), used] += 1
    return RouterConfusion(tasks=names, counts=counts.tolist())


def confusion_accuracy(confusion: RouterConfusion) -> float | None:
    """Share of pairs on the diagonal; None without pairs."""
    counts = torch.tensor(confusion.counts)
    return counts.diagonal().sum().item() / counts.sum().item() if counts.sum() else None


def correlations(
    model: DMoERMForSequenceClassification, chosen: Scores, rejected: Scores
) -> dict[str, ExpertCorrelation]:
    """Pearson correlation of the reward and the capability scores over the test texts of every task."""
    both = [torch.cat([a, b]) for a, b in zip(chosen, rejected, strict=True)]
    rewards, task_ids, _, capabilities, _ = both
    found: dict[str, ExpertCorrelation] = {}
    for task_id, task in enumerate(model.config.task_names):
        columns = [i for i, (owner, _) in enumerate(model.capability_names) if owner == task]
        mine = task_ids == task_id
        if not columns or mine.sum() < 3:
            continue
        table = torch.cat([rewards[mine, None], capabilities[mine][:, columns]], 1)
        names = ["reward", *(model.capability_names[i][1] for i in columns)]
        found[task] = ExpertCorrelation(experts=names, matrix=torch.corrcoef(table.T).tolist())
    return found


def example_pairs(
    model: DMoERMForSequenceClassification, encoded: EncodedPairs, chosen: Scores, rejected: Scores
) -> list:  # type: ignore[type-arg]
    """The first few test pairs of every task with the reasons of both rewards."""
    taken: dict[str, int] = {}
    examples = []
    for index, pair in enumerate(encoded.pairs):
        task = str(pair.task)
        if taken.get(task, 0) < _EXAMPLES_PER_TASK:
            taken[task] = taken.get(task, 0) + 1
            sides = (report_of(model, side, index, name=pair.id) for side in (chosen, rejected))
            examples.append(scored_pair(pair, *sides))
    return examples
