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
from prefmoe.errors import ConfigError, DataError, PrefmoeWarning
from prefmoe.labeling import RuleLabeler, apply_labels, load_tasks
from prefmoe.records import PreferencePair
from prefmoe.reward.backbone import load_backbone, resolve_backbone
from prefmoe.reward.progress import Progress, silent
from prefmoe.reward.run import Run, process_state
from prefmoe.reward.settings import BackboneSettings, DataSettings, RewardSettings
from prefmoe.reward.texts import EncodedPairs, TextTable, encode_pairs
from prefmoe.reward.trunk import Trunk

ONE_TASK = "all"
_FEW_PAIRS = 5
GENERAL = "general"  # the shared adapter, as an expert of every task


class RewardTrainingWarning(PrefmoeWarning):
    """Data that can be used, but not as a user may think."""


@dataclass
class Workbench:
    """Everything that the phases share.

    Attributes:
        capabilities: For every task those that have labels, in a fixed order.
        prompts: Texts and tasks for the router, of the training file only.
        train, validation, test: Tokenized pairs; `test` may be empty.
    """

    settings: RewardSettings
    run: Run
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    backbone: PreTrainedModel
    trunk: Trunk
    capabilities: dict[str, list[str]]
    prompts: list[tuple[int, str]]
    train: EncodedPairs
    validation: EncodedPairs
    test: EncodedPairs
    progress: Progress = silent

    @property
    def tasks(self) -> dict[str, list[str]]:
        """For every task the names of its experts behind the task adapter: capabilities, and the general one."""
        general = [GENERAL] if self.settings.phase3.general_expert else []
        return {task: [*names, *general] for task, names in self.capabilities.items()}

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
    data, seed = settings.data, settings.seed
    splits = pairs if pairs is not None else read_splits(data, seed)
    splits = {name: with_task(rows, name) for name, rows in splits.items()}
    with_prompts = splits["train"]
    splits["train"] = draw_per_task(splits["train"], data.max_pairs_per_task, seed)
    splits["validation"] = draw_per_task(splits["validation"], data.max_validation_pairs_per_task, seed)
    splits = {name: label_capabilities(rows, data) for name, rows in splits.items()}
    capabilities = find_capabilities(splits["train"], settings.data)
    warn_of_small_tasks(splits)
    body = settings.backbone
    if backbone is None:
        backbone = _load_backbone(body)
    check_split_layer(settings.experts.split_layer, len(backbone.layers))
    if tokenizer is None:
        tokenizer = _tokenizer_of_backbone(body.name)
    run = Run(settings)
    renderer = Renderer(tokenizer, max_length=body.max_length)
    table = TextTable()
    encoded = {
        name: encode_pairs(rows, renderer, table, allow_equal=name == "test") for name, rows in splits.items()
    }
    prompts = encode_prompts(with_prompts, settings, renderer, table)
    trunk = _prepared_trunk(backbone, table, run, progress)
    for name, rows in encoded.items():
        run.log("data", {"split": name, "pairs": len(rows.rows), "truncated": rows.num_truncated})
    return Workbench(
        settings=settings,
        run=run,
        tokenizer=tokenizer,
        renderer=renderer,
        backbone=backbone,
        trunk=trunk,
        capabilities=capabilities,
        prompts=prompts,
        train=encoded["train"],
        validation=encoded["validation"],
        test=encoded["test"],
        progress=progress,
    )


def _load_backbone(body: BackboneSettings) -> PreTrainedModel:
    backbone = load_backbone(
        body.name, num_layers=body.num_layers, dtype=getattr(torch, body.dtype), max_length=body.max_length
    )
    _check_positions(backbone, body.max_length)
    return backbone.to(process_state().device)


def _prepared_trunk(backbone: PreTrainedModel, table: TextTable, run: Run, progress: Progress) -> Trunk:
    body = run.settings.backbone
    trunk = Trunk(
        backbone,
        run.settings.experts.split_layer,
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
    return trunk


def _tokenizer_of_backbone(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(resolve_backbone(name))
    except (OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise ConfigError(f"backbone {name!r} comes without a tokenizer: {reason}") from problem


def _check_positions(backbone: PreTrainedModel, max_length: int) -> None:
    limit = getattr(backbone.config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"backbone.max_length={max_length} is more than the {limit} tokens that the backbone was made for; "
            f"choose {limit} or less"
        )


def encode_prompts(
    pairs: list[PreferencePair], settings: RewardSettings, renderer: Renderer, table: TextTable
) -> list[tuple[int, str]]:
    """Distinct prompts with their tasks, tokenized into a table."""
    distinct = list({prompt_hash(pair.prompt): pair for pair in pairs}.values())
    drawn = draw_per_task(distinct, settings.router.max_prompts_per_task, settings.seed)
    known = {pair.task for pair in pairs}
    prompts = [(table.add(renderer.encode_prompt(pair.prompt)), str(pair.task)) for pair in drawn]
    return prompts if len(known) > 1 else prompts[:1]  # one task: nothing to tell apart


def check_split_layer(split_layer: int, num_layers: int) -> None:
    """Raises ConfigError if no layer is left for experts."""
    if split_layer >= num_layers:
        raise ConfigError(
            f"experts.split_layer={split_layer} leaves no layer for experts; the backbone has {num_layers} layers, "
            f"choose 0 to {num_layers - 1}"
        )


def read_splits(data: DataSettings, seed: int = 0) -> dict[str, list[PreferencePair]]:
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
    splits = {"train": train, "validation": validation, "test": test}
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


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model."""
    return AutoTokenizer.from_pretrained(folder)
