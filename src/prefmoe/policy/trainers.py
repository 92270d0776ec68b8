"""Preference ids reach the routers under any TRL trainer, and the routers' statistics its log."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer
from trl import DPOTrainer

from prefmoe.errors import ConfigError, DataError
from prefmoe.policy.card import say_how_to_load
from prefmoe.policy.preferences import preference_row
from prefmoe.policy.routing import AdapterRouting, RoutedBatch, RouterRecord, mean_values, summarize
from prefmoe.policy.shared_prompts import share_prompts
from prefmoe.policy.tuner import PMoLModel

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
Collator = Callable[[list[dict[str, Any]]], Any]

_KEY = "preferences"


def connect_preferences(trainer: AnyTrainer, column: str = "preference") -> AnyTrainer:
    """Lets a column of the data reach the routers of the PMoL adapter that a trainer trains.

    Call it after the trainer is made and before `train()`. It wraps the collator (which adds the preferences to the
    batch), `compute_loss` (which hands them to the adapter), for GRPO and RLOO the generation step, and `log` (which
    adds `router/...`). A row may have a group's name, shares of the groups, or None in the column.

    Args:
        trainer: Any of TRL's, whose model carries a PMoL adapter.
        column: Of the data, with each row's preference.

    Returns:
        The trainer.

    Raises:
        ConfigError: Its model has no PMoL adapter.
        DataError: The training data have no such column.

    Example:
        trainer = connect_preferences(DPOTrainer(model, args=args, train_dataset=pairs, peft_config=PMoLConfig(...)))
    """
    tuner = _tuner_of(trainer)
    routing = tuner.routings[tuner.active_adapters[0]]
    _check_column(trainer, column)
    trainer.data_collator = _PreferenceCollator(trainer.data_collator, routing, column)
    _keep_column(trainer, column)
    _hand_over(trainer, routing)
    _log(trainer, routing)
    _keep_card(trainer)
    if hasattr(trainer, "_generate_and_score_completions"):
        _keep_through_generation(trainer, routing, column)
    routing.loss_scale = partial(_loss_scale, trainer)
    return trainer


class PMoLDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer, connected: `share_prompts(connect_preferences(DPOTrainer(...)))` under one name.

    Args:
        *args: As DPOTrainer takes them.
        preference_column: Of the data, with each row's preference.
        **kwargs: As DPOTrainer takes them; `peft_config` is a `PMoLConfig`.
    """

    def __init__(self, *args: Any, preference_column: str = "preference", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        connect_preferences(self, preference_column)
        share_prompts(self)


def _tuner_of(trainer: Trainer) -> PMoLModel:
    model = trainer.accelerator.unwrap_model(trainer.model)
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, PMoLModel):
        raise ConfigError(
            f"connect_preferences: the trainer's model is a {type(model).__name__} without a PMoL adapter; give the "
            "trainer peft_config=PMoLConfig(...)"
        )
    return tuner


def _check_column(trainer: Trainer, column: str) -> None:
    evaluation = trainer.eval_dataset
    parts = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    named = {"training": trainer.train_dataset} | {
        f"evaluation {name}".strip(): data for name, data in parts.items()
    }
    for what, dataset in named.items():
        names = getattr(dataset, "column_names", None)
        if names and "seq_lengths" in names:
            raise DataError(
                f"the {what} data are packed, and packed rows lose their preference: set packing=False"
            )
        if names and column not in names:
            raise DataError(
                f"the {what} data have no column {column!r}; they have {', '.join(names)}; add one with each row's "
                "preference, or name another"
            )


def _keep_column(trainer: Trainer, column: str) -> None:
    """The Trainer drops columns that it does not know."""
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns
    if columns is not None and column not in columns:
        trainer._signature_columns = [*columns, column]


class _PreferenceCollator:
    """A collator that adds (rows, groups) shares under "preferences"."""

    def __init__(self, inner: Collator, routing: AdapterRouting, column: str) -> None:
        self.inner, self.routing, self.column = inner, routing, column

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        target = torch.tensor([self._shares(row) for row in rows])
        batch = self.inner([{key: value for key, value in row.items() if key != self.column} for row in rows])
        if isinstance(batch, Mapping):  # GRPO and RLOO get their rows as they are
            return {**batch, _KEY: target}
        return rows

    def _shares(self, row: Mapping[str, Any]) -> list[float]:
        if self.column not in row:
            raise DataError(
                f"a row of the data has no {self.column!r}; packed rows lose it: set packing=False"
            )
        side = self.routing.config.group_loss_on
        if side != "both" and isinstance(row.get("label"), bool) and row["label"] != (side == "chosen"):
            return preference_row(None, self.routing.groups)  # KTO: one completion a row
        return preference_row(row[self.column], self.routing.groups)


def _hand_over(trainer: Trainer, routing: AdapterRouting) -> None:
    compute_loss = trainer.compute_loss

    def compute_loss_with_preferences(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rest = {key: value for key, value in inputs.items() if key != _KEY}
        routing.waiting_target = inputs.get(_KEY)
        try:
            return compute_loss(model, rest, *args, **kwargs)
        finally:
            routing.waiting_target = None

    trainer.compute_loss = compute_loss_with_preferences
    if hasattr(trainer, "concatenated_inputs"):
        _count_completions_only(trainer, routing)


def _count_completions_only(trainer: Any, routing: AdapterRouting) -> None:
    """ORPO and CPO give the model no labels, but make them right before: they tell prompts from completions."""
    concatenate = trainer.concatenated_inputs

    def concatenate_and_tell(*args: Any, **kwargs: Any) -> Any:
        batch = concatenate(*args, **kwargs)
        routing.waiting_mask = (batch["concatenated_labels"] != -100).float()
        return batch

    trainer.concatenated_inputs = concatenate_and_tell


def _keep_through_generation(trainer: Any, routing: AdapterRouting, column: str) -> None:
    """GRPO and RLOO make new batches of completions, shuffled: preferences go along as one more tensor."""
    generate = trainer._generate_and_score_completions

    def generate_with_preferences(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = generate(rows)
        shares = [preference_row(row.get(column), routing.groups) for row in rows]
        return {**batch, _KEY: torch.tensor(shares, device=trainer.accelerator.device)}

    trainer._generate_and_score_completions = generate_with_preferences


def _log(trainer: Trainer, routing: AdapterRouting) -> None:
    """Statistics of the passes since the last log go into it; of several processes, their mean."""
    passes: dict[str, list[dict[str, Tensor]]] = {"train": [], "eval": []}

    def keep(records: Sequence[RouterRecord], batch: RoutedBatch) -> None:
        if batch.is_training and not torch.is_grad_enabled():
            return  # on the way to a training step: answers being generated, KTO's mismatched pairs
        mode = "train" if batch.is_training else "eval"
        passes[mode].append(summarize(records, routing.groups, batch.target))

    routing.listeners.append(keep)
    log = trainer.log

    def log_with_routing(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        values = mean_values(passes[mode])
        passes[mode].clear()
        if trainer.accelerator.num_processes > 1 and values:
            names = sorted(values)
            mine = torch.tensor([values[name] for name in names], device=trainer.accelerator.device)
            values = dict(zip(names, trainer.accelerator.reduce(mine, "mean").tolist(), strict=True))
        prefix = "eval_" if mode == "eval" else ""
        log({**logs, **{prefix + name: value for name, value in values.items()}}, *args, **kwargs)

    trainer.log = log_with_routing


def _keep_card(trainer: Any) -> None:
    """TRL writes its own model card over the adapter's, at every checkpoint and before it is pushed."""
    create_model_card = trainer.create_model_card

    def create_card_that_says_how_to_load(*args: Any, **kwargs: Any) -> None:
        create_model_card(*args, **kwargs)
        if trainer.is_world_process_zero():
            say_how_to_load(Path(trainer.args.output_dir))

    trainer.create_model_card = create_card_that_says_how_to_load


def _loss_scale(trainer: Trainer) -> float:
    """The Trainer divides its loss by the accumulated batches, and a GradScaler multiplies it."""
    steps = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    scaler = trainer.accelerator.scaler
    return (scaler.get_scale() if scaler is not None else 1.0) / steps
