"""Pairs of a training: read, split, drawn, with their tasks and capability labels."""

import random
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from prefmoe.data.read import read_pairs
from prefmoe.data.split import prompt_hash, split_by_prompt
from prefmoe.errors import ConfigError, DataError, PrefmoeWarning
from prefmoe.labeling import RuleLabeler, apply_labels, load_tasks
from prefmoe.labeling.judge.labeler import JudgeLabeler, Watcher, require_everything, unseen
from prefmoe.labeling.judge.settings import JudgeSettings
from prefmoe.labeling.judge.store import AnswerStore
from prefmoe.records import PreferencePair
from prefmoe.reward.settings import DataSettings, RewardSettings
from prefmoe.runs.run import process_state

ONE_TASK = "all"
_ASKED_SPLITS = ("train", "validation", "capability_train")

Splits = dict[str, list[PreferencePair]]
_FEW_PAIRS = 5


class RewardTrainingWarning(PrefmoeWarning):
    """Data that can be used, but not as a user may think."""


def read_splits(data: DataSettings, seed: int = 0) -> dict[str, list[PreferencePair]]:
    """Train, validation and test pairs as the settings say, and `capability_train` if they name it.

    Of the last, pairs whose prompt stands in validation or test are left out.

    Raises:
        DataError: a prompt stands in two splits, or there is nothing to train on.
    """
    train = read_pairs(data.train, split="train")
    if not train:
        raise DataError("holds no pairs; expected at least one", data.train)
    validation = None if data.validation is None else read_pairs(data.validation, split="validation")
    if validation is None:
        fractions = {"train": 1 - data.validation_fraction, "validation": data.validation_fraction}
        parts = split_by_prompt(train, fractions, seed=seed)
        train, validation = parts["train"], parts["validation"]
    test = [] if data.test is None else read_pairs(data.test, split="test")
    splits = {"train": train, "validation": validation, "test": test}
    _check_disjoint(splits)
    if data.capability_train is not None:
        more = read_pairs(data.capability_train, split="train")
        held_out = {prompt_hash(pair.prompt) for pair in (*validation, *test)}
        splits["capability_train"] = [pair for pair in more if prompt_hash(pair.prompt) not in held_out]
    return splits


def further_pairs(pairs: list[PreferencePair], train: list[PreferencePair]) -> list[PreferencePair]:
    """Pairs of the tasks that are trained, without the training pairs themselves, whichever side is preferred.

    Warns of tasks that nobody trains, and where no pair is left.
    """
    tasks = {pair.task for pair in train}
    if unknown := sorted({str(pair.task) for pair in pairs} - set(map(str, tasks))):
        warnings.warn(
            f"capability_train: no training pair has the task {', '.join(map(repr, unknown))}; its pairs are left out",
            RewardTrainingWarning,
            stacklevel=2,
        )
    seen = {_without_order(pair) for pair in train}
    further = [pair for pair in pairs if pair.task in tasks and _without_order(pair) not in seen]
    if not further:
        warnings.warn(
            "capability_train adds no pair: all are training pairs, or on prompts of validation or test; give another "
            "file, or train on fewer with data.max_pairs_per_task",
            RewardTrainingWarning,
            stacklevel=2,
        )
    return further


def _without_order(pair: PreferencePair) -> tuple[object, ...]:
    return pair.prompt, frozenset([pair.chosen, pair.rejected])


def draw_per_task(pairs: list[PreferencePair], limit: int | None, seed: int) -> list[PreferencePair]:
    """At most `limit` pairs of every task, drawn by seed, in their old order."""
    if limit is None:
        return pairs
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    taken: Counter[str | None] = Counter()
    kept = set()
    for index in order:
        task = pairs[index].task
        if taken[task] < limit:
            taken[task] += 1
            kept.add(index)
    return [pair for index, pair in enumerate(pairs) if index in kept]


def _check_disjoint(splits: dict[str, list[PreferencePair]]) -> None:
    seen: dict[int, str] = {}
    for name, pairs in splits.items():
        for pair in pairs:
            other = seen.setdefault(prompt_hash(pair.prompt), name)
            if other != name:
                raise DataError(
                    f"pair {pair.id!r}: its prompt stands in {other} and in {name}; `prefmoe data check` lists all"
                )


def with_task(pairs: list[PreferencePair], split: str) -> list[PreferencePair]:
    """Pairs that all have a task: their own, or where none has one, the only task there is.

    Raises:
        DataError: some pairs have a task and some have none.
    """
    named = [pair for pair in pairs if pair.task is not None]
    if not named:
        return [replace(pair, task=ONE_TASK) for pair in pairs]
    if len(named) < len(pairs):
        first = next(pair for pair in pairs if pair.task is None)
        missing = len(pairs) - len(named)
        raise DataError(
            f"{split}: {missing} of {len(pairs)} pairs have no 'task', the first is {first.id!r}; "
            "name the task of all or of none"
        )
    return pairs


def label_splits(splits: Splits, settings: RewardSettings, *, watcher: Watcher = unseen) -> Splits:
    """Adds what rules or a judge say to the labels that the rows carry; a judge is not asked about test pairs.

    Soft labels stay only where the settings ask for them, so whoever comes later need not ask again.

    A judge's answers outlive the run folder, so that a run with other settings pays for none again. Of several
    processes the main one asks, the others then find every answer in the store.

    Raises:
        ConfigError: there is no tasks file, or the judge cannot be asked.
        PrefmoeError: the judge's budget ended before everything was labelled.
        DataError: soft labels are asked for, and no training pair has any.
    """
    if not settings.data.soft_labels:
        splits = {name: [_without_soft_labels(pair) for pair in pairs] for name, pairs in splits.items()}
    if isinstance(settings.data.labels, JudgeSettings):
        splits = _label_by_judge(splits, settings, settings.data.labels, watcher)
    else:
        splits = {name: label_capabilities(pairs, settings.data) for name, pairs in splits.items()}
    if settings.data.soft_labels and not any(pair.capability_probabilities for pair in splits["train"]):
        raise DataError(
            "data.soft_labels is true, but no training pair has 'capability_probabilities'; label with "
            "`prefmoe label --confidence`, or drop soft_labels"
        )
    return splits


def _without_soft_labels(pair: PreferencePair) -> PreferencePair:
    return replace(pair, capability_probabilities={}) if pair.capability_probabilities else pair


def _label_by_judge(
    splits: Splits, settings: RewardSettings, judge: JudgeSettings, watcher: Watcher
) -> Splits:
    if settings.data.tasks_file is None:
        raise ConfigError(
            "data.labels is a judge, but data.tasks_file is not given; name a tasks file with sentences"
        )
    path = Path(settings.data.answers or Path(settings.out).parent / "answers.sqlite")
    asked_splits = [name for name in _ASKED_SPLITS if name in splits]
    asked = [pair for name in asked_splits for pair in splits[name]]
    with process_state().main_process_first(), AnswerStore(path) as answers:
        labeler = JudgeLabeler(judge, load_tasks(settings.data.tasks_file), answers, watcher=watcher)
        labelled = iter(apply_labels(asked, [labeler]))
        require_everything(labeler)
        if settings.data.soft_labels:
            labelled = map(_with_soft_labels, labelled, labeler.soft_labels(asked))
    return splits | {name: list(islice(labelled, len(splits[name]))) for name in asked_splits}


def _with_soft_labels(pair: PreferencePair, found: Mapping[str, float]) -> PreferencePair:
    return replace(pair, capability_probabilities={**found, **pair.capability_probabilities})


def label_capabilities(pairs: list[PreferencePair], data: DataSettings) -> list[PreferencePair]:
    """Adds what the rules of the tasks file say to the labels that the rows carry."""
    if data.labels == "columns":
        return pairs
    if data.tasks_file is None:
        raise ConfigError(
            "data.labels is 'rules', but data.tasks_file is not given; name a tasks file with rules"
        )
    return apply_labels(pairs, [RuleLabeler.from_tasks(load_tasks(data.tasks_file))])


def find_capabilities(pairs: list[PreferencePair], data: DataSettings) -> dict[str, list[str]]:
    """Capabilities of every task that has pairs.

    Those without any label of 1 or -1, and without any soft one, are left out, with a warning.
    """
    labels: dict[str, Counter[str]] = {}
    for pair in pairs:
        found = labels.setdefault(str(pair.task), Counter())
        found.update({name: abs(side) for name, side in pair.capabilities.items()})
        found.update(pair.capability_probabilities.keys())
    if data.tasks_file is not None:
        for task, spec in load_tasks(data.tasks_file).tasks.items():
            if task in labels:
                labels[task].update(dict.fromkeys(spec.capabilities, 0))
    empty = [
        f"{task}/{name}" for task, found in labels.items() for name, count in found.items() if count == 0
    ]
    if empty:
        warnings.warn(
            f"no pair says which side is better on {', '.join(empty)}; left out, label them to get an expert each",
            RewardTrainingWarning,
            stacklevel=2,
        )
    return {task: sorted(name for name, count in labels[task].items() if count) for task in sorted(labels)}


def check_weights(pairs: list[PreferencePair]) -> None:
    """Raises DataError that names the tasks whose training pairs all have weight 0: they would teach nothing."""
    tasks = {str(pair.task) for pair in pairs}
    idle = sorted(tasks - {str(pair.task) for pair in pairs if pair.weight > 0})
    if idle:
        raise DataError(
            f"all training pairs of {', '.join(map(repr, idle))} have weight 0, so nothing can be learned from them; "
            "give some a 'weight' above 0 or drop the pairs"
        )


def warn_of_small_tasks(splits: dict[str, list[PreferencePair]]) -> None:
    """A warning that names the tasks with hardly any training pairs, and those without validation pairs."""
    validation = Counter(str(pair.task) for pair in splits["validation"])
    small = [
        f"{task!r} ({number} training, {validation[task]} validation)"
        for task, number in sorted(Counter(str(pair.task) for pair in splits["train"]).items())
        if number < _FEW_PAIRS or not validation[task]
    ]
    if small:
        warnings.warn(
            f"few pairs of {', '.join(small)}; add pairs, or expect little of the experts of these tasks",
            RewardTrainingWarning,
            stacklevel=2,
        )
