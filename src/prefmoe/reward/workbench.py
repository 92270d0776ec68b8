"""What all phases of a training work on: labelled pairs, their texts, the frozen backbone, the run folder."""

import random
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prefmoe.data.read import read_pairs
from prefmoe.data.render import Renderer
from prefmoe.data.split import prompt_hash, split_by_prompt
from prefmoe.errors import ConfigError, DataError
from prefmoe.labeling import RuleLabeler, apply_labels, load_tasks
from prefmoe.records import PreferencePair
from prefmoe.reward.backbone import load_backbone, resolve_backbone
from prefmoe.reward.progress import Progress, silent
from prefmoe.reward.run import Run
from prefmoe.reward.settings import DataSettings, RewardSettings
from prefmoe.reward.texts import EncodedPairs, TextTable, encode_pairs
from prefmoe.reward.trunk import Trunk

ONE_TASK = "all"


class RewardTrainingWarning(UserWarning):
    """Something that works, but not as a user may think."""


@dataclass
class Workbench:
    """Everything that the phases share.

    Attributes:
        tasks: For every task the capabilities that have labels, in a fixed order.
        train, validation, test: Tokenized pairs; `test` may be empty.
    """

    settings: RewardSettings
    run: Run
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    backbone: PreTrainedModel
    trunk: Trunk
    tasks: dict[str, list[str]]
    train: EncodedPairs
    validation: EncodedPairs
    test: EncodedPairs
    progress: Progress = silent

    @property
    def table(self) -> TextTable:
        """All texts."""
        return self.trunk.table


def build_workbench(
    settings: RewardSettings,
    *,
    progress: Progress = silent,
    pairs: dict[str, list[PreferencePair]] | None = None,
    backbone: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Workbench:
    """Reads, checks, labels, splits and tokenizes the data, loads the backbone and runs the trunk once.

    Args:
        settings: Of the training.
        progress: Shows how far it is.
        pairs: Use these splits instead of the files of `settings.data`.
        backbone: Use this instead of loading `settings.backbone.name`; already cut.
        tokenizer: The backbone's.

    Raises:
        ConfigError, DataError: something of it cannot be used.
    """
    splits = pairs if pairs is not None else read_splits(settings.data, settings.seed)
    splits = {name: _with_task(rows, name) for name, rows in splits.items()}
    splits = {name: label_capabilities(rows, settings.data) for name, rows in splits.items()}
    tasks = find_capabilities(splits["train"], settings.data)
    body = settings.backbone
    if backbone is None:
        backbone = load_backbone(
            body.name,
            num_layers=body.num_layers,
            dtype=getattr(torch, body.dtype),
            max_length=body.max_length,
        )
        if torch.cuda.is_available():
            backbone = backbone.cuda()
    check_split_layer(settings.experts.split_layer, len(backbone.layers))
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(body.name))
    run = Run(settings)
    renderer = Renderer(tokenizer, max_length=body.max_length)
    table = TextTable()
    encoded = {
        name: encode_pairs(rows, renderer, table, allow_equal=name == "test") for name, rows in splits.items()
    }
    trunk = Trunk(
        backbone,
        settings.experts.split_layer,
        table,
        folder=run.folder / "trunk" if body.trunk_cache else None,
        max_gib=body.trunk_cache_gib,
        batch_tokens=body.batch_tokens,
    )
    if run.is_main:
        with run.clock("trunk"):
            trunk.prepare(range(len(table.texts)), progress)
    run.wait()
    trunk.reload()
    for name, rows in encoded.items():
        run.log("data", {"split": name, "pairs": len(rows.rows), "truncated": rows.num_truncated})
    return Workbench(
        settings=settings,
        run=run,
        tokenizer=tokenizer,
        renderer=renderer,
        backbone=backbone,
        trunk=trunk,
        tasks=tasks,
        train=encoded["train"],
        validation=encoded["validation"],
        test=encoded["test"],
        progress=progress,
    )


def check_split_layer(split_layer: int, num_layers: int) -> None:
    """Raises ConfigError if no layer is left for experts."""
    if split_layer >= num_layers:
        raise ConfigError(
            f"experts.split_layer={split_layer} leaves no layer for experts; the backbone has {num_layers} layers, "
            f"choose 0 to {num_layers - 1}"
        )


def read_splits(data: DataSettings, seed: int) -> dict[str, list[PreferencePair]]:
    """Train, validation and test pairs as the settings say.

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
    splits = {
        "train": draw_per_task(train, data.max_pairs_per_task, seed),
        "validation": draw_per_task(validation, data.max_validation_pairs_per_task, seed),
        "test": test,
    }
    _check_disjoint(splits)
    return splits


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


def _with_task(pairs: list[PreferencePair], split: str) -> list[PreferencePair]:
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
    """Capabilities of every task that has pairs; those without any label of 1 or -1 are left out, with a warning."""
    labels: dict[str, Counter[str]] = {}
    for pair in pairs:
        found = labels.setdefault(str(pair.task), Counter())
        found.update({name: abs(side) for name, side in pair.capabilities.items()})
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


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model."""
    return AutoTokenizer.from_pretrained(folder)
