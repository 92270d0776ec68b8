"""What all phases of a training work on: labelled pairs, their texts, the frozen backbone, the run folder."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prefmoe.backbone.layers import load_backbone
from prefmoe.data.render import Renderer
from prefmoe.data.split import prompt_hash
from prefmoe.errors import ConfigError, DataError
from prefmoe.hub import resolve_backbone
from prefmoe.labeling.judge.labeler import Watcher, unseen
from prefmoe.records import PreferencePair
from prefmoe.reward.experts import Experts
from prefmoe.reward.settings import BackboneSettings, RewardSettings
from prefmoe.reward.splits import (
    check_weights,
    draw_per_task,
    find_capabilities,
    further_pairs,
    label_splits,
    read_splits,
    warn_of_small_tasks,
    with_task,
)
from prefmoe.reward.texts import EncodedPairs, TextTable, encode_pairs, prompt_of
from prefmoe.reward.trunk import Trunk
from prefmoe.runs.inputs import hash_of, weights_hash
from prefmoe.runs.precision import resolve_dtype
from prefmoe.runs.progress import Progress, silent
from prefmoe.runs.run import Run, process_state

GENERAL = "general"  # the shared adapter, as an expert of every task


@dataclass
class Workbench:
    """Everything that the phases share.

    Attributes:
        capabilities: For every task those that have labels, in a fixed order.
        prompts: Texts and tasks for the router, of the training file only.
        train, validation, test: Tokenized pairs; `test` may be empty.
        capability_train: More pairs, which only capability experts learn from; mostly empty.
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
    capability_train: EncodedPairs = field(default_factory=lambda: EncodedPairs([], []))
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

    def new_experts(self, num_experts: int, *, rank: int | None = None, num_dense: int = 0) -> Experts:
        """Untrained experts of the settings' kind, not attached; alpha grows with `rank`, so the scale stays."""
        sizes = self.settings.experts
        rank = rank or sizes.rank
        return Experts(
            self.backbone,
            num_experts=num_experts,
            num_dense=num_dense,
            split_layer=sizes.split_layer,
            rank=rank,
            alpha=sizes.alpha * rank / sizes.rank,
            target_modules=sizes.target_modules,
            pooling=sizes.pooling,
        )


def build_workbench(
    settings: RewardSettings,
    *,
    progress: Progress = silent,
    pairs: dict[str, list[PreferencePair]] | None = None,
    backbone: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    watcher: Watcher = unseen,
) -> Workbench:
    """Reads, checks, labels, splits and tokenizes the data, loads the backbone and runs the trunk once.

    Args:
        settings: Of the training.
        progress: Shows how far it is.
        pairs: Use these splits instead of the files of `settings.data`.
        backbone: Use this instead of loading `settings.backbone.name`; already cut.
        tokenizer: The backbone's.
        watcher: Shows how far a judge is with its labels, where the settings name one.

    Raises:
        ConfigError, DataError: something of it cannot be used.
    """
    splits, undrawn, capabilities = _labelled_splits(settings, pairs, watcher)
    body = settings.backbone
    if backbone is None:
        backbone = _load_backbone(body)
    check_split_layer(settings.experts.split_layer, len(backbone.layers))
    if tokenizer is None:
        tokenizer = tokenizer_of_backbone(body.name)
    run = Run(settings)
    renderer = Renderer(tokenizer, max_length=body.max_length)
    table = TextTable()
    encoded = {
        name: encode_pairs(rows, renderer, table, allow_equal=name in ("test", "capability_train"))
        for name, rows in splits.items()
    }
    prompts = encode_prompts(undrawn, settings, renderer, table)
    run.check_inputs(_hashes_of(encoded, prompts, backbone, table))
    trunk = _prepared_trunk(backbone, table, run, settings, progress=progress)
    for name, rows in encoded.items():
        counts = {"pairs": len(rows.rows), "truncated": rows.num_truncated, "equal": rows.num_equal}
        run.log("data", {"split": name, **counts})
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
        capability_train=encoded.get("capability_train", EncodedPairs([], [])),
        progress=progress,
    )


def _labelled_splits(
    settings: RewardSettings, pairs: dict[str, list[PreferencePair]] | None, watcher: Watcher
) -> tuple[dict[str, list[PreferencePair]], list[PreferencePair], dict[str, list[str]]]:
    """Splits as they are trained on, the training pairs before any were left out, capabilities of every task."""
    data, seed = settings.data, settings.seed
    splits = pairs if pairs is not None else read_splits(data, seed)
    splits = {name: with_task(rows, name) for name, rows in splits.items()}
    undrawn = splits["train"]
    if not undrawn:
        raise DataError(
            "no pair is left to train on; give more of them, or a smaller data.validation_fraction"
        )
    splits["train"] = draw_per_task(undrawn, data.max_pairs_per_task, seed)
    check_weights(splits["train"])
    splits["validation"] = draw_per_task(splits["validation"], data.max_validation_pairs_per_task, seed)
    if "capability_train" in splits:
        more = further_pairs(splits["capability_train"], splits["train"])
        splits["capability_train"] = draw_per_task(more, data.max_capability_pairs_per_task, seed)
    splits = label_splits(splits, settings, watcher=watcher)
    capabilities = find_capabilities([*splits["train"], *splits.get("capability_train", [])], data)
    warn_of_small_tasks(splits)
    if settings.phase3.general_expert and any(GENERAL in names for names in capabilities.values()):
        raise ConfigError(
            f"a capability is called {GENERAL!r}, as the general expert is; rename it or drop phase3.general_expert"
        )
    return splits, undrawn, capabilities


def _load_backbone(body: BackboneSettings) -> PreTrainedModel:
    device = process_state().device
    backbone = load_backbone(
        body.name,
        num_layers=body.num_layers,
        dtype=resolve_dtype(body.dtype, device),
        max_length=body.max_length,
    )
    _check_positions(backbone, body.max_length)
    return backbone.to(device)


def _prepared_trunk(
    backbone: PreTrainedModel, table: TextTable, run: Run, settings: RewardSettings, *, progress: Progress
) -> Trunk:
    body = settings.backbone
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
    return trunk


def _hashes_of(
    encoded: dict[str, EncodedPairs],
    prompts: list[tuple[int, str]],
    backbone: PreTrainedModel,
    table: TextTable,
) -> dict[str, str]:
    """Of all that the results of a run depend on besides its settings."""
    return (
        {f"the {name} pairs": _hash_of_pairs(rows, table) for name, rows in encoded.items()}
        | {"the prompts of the router": hash_of([f"{table.key(text)} {task}" for text, task in prompts])}
        | {"the backbone": weights_hash(backbone), "the backbone's dtype": str(backbone.dtype)}
    )


def _hash_of_pairs(encoded: EncodedPairs, table: TextTable) -> str:
    """Of everything that a training or a test sees of pairs, in their order."""
    labels = ([*pair.capabilities.items(), *pair.capability_probabilities.items()] for pair in encoded.pairs)
    return hash_of(
        f"{pair.task} {sorted(known)} {table.key(row.chosen)} {table.key(row.rejected)} "
        f"{table.texts[row.chosen].prompt_length} {table.texts[row.rejected].prompt_length} {row[2:]}"
        for pair, known, row in zip(encoded.pairs, labels, encoded.rows, strict=True)
    )


def tokenizer_of_backbone(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a backbone; raises ConfigError where there is none."""
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
    """Distinct prompts with their tasks, tokenized into a table: cut as they stand before their chosen completions.

    A model never sees a prompt without a completion, which leaves a long prompt less room.
    """
    distinct = list({prompt_hash(pair.prompt): pair for pair in pairs}.values())
    drawn = draw_per_task(distinct, settings.router.max_prompts_per_task, settings.seed)
    known = {pair.task for pair in pairs}
    texts = [prompt_of(renderer.encode(pair.prompt, pair.chosen)) for pair in drawn]
    prompts = [(table.add(text), str(pair.task)) for text, pair in zip(texts, drawn, strict=True)]
    return prompts if len(known) > 1 else prompts[:1]  # one task: nothing to tell apart


def check_split_layer(split_layer: int, num_layers: int) -> None:
    """Raises ConfigError if no layer is left for experts."""
    if split_layer >= num_layers:
        raise ConfigError(
            f"experts.split_layer={split_layer} leaves no layer for experts; the backbone has {num_layers} layers, "
            f"choose 0 to {num_layers - 1}"
        )


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model."""
    return AutoTokenizer.from_pretrained(folder)
