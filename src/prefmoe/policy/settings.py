"""The YAML file of `prefmoe policy train`, checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from prefmoe.policy.config import BalanceLoss, GroupLoss, RouterKind, RouterScope
from prefmoe.runs.precision import DTYPE_HELP, DtypeName
from prefmoe.runs.settings import Section, read_settings

Method = Literal[
    "pmol",
    "pmol_no_group_loss",
    "pmol_no_empty",
    "pmol_lbc",
    "top1",
    "top2",
    "lora",
    "lora_average",
    "emr",
    "sequential",
]


RouterStart = Literal["probe", "random"]


class DataSettings(Section):
    """Pairs of several preferences; a row's preference is its column `preference`, or else `task`."""

    train: str = Field(description="file, folder with a file a split, or `datasets` name")
    validation: str | None = Field(None, description="as `train`; null measures nothing while training")
    test: str | None = Field(None, description="as `train`; null measures nothing afterwards")
    preferences: list[str] | None = Field(
        None, description="which ones are used; null takes all that train has"
    )
    max_pairs_per_preference: int | None = Field(None, ge=1, description="of train; drawn by `seed`")
    max_validation_pairs_per_preference: int | None = Field(None, ge=1, description="drawn by `seed`")
    max_test_pairs_per_preference: int | None = Field(None, ge=1, description="drawn by `seed`")


class ModelSettings(Section):
    """The language model to align; it is the reference, too."""

    name: str = Field("smollm2-135m", description="folder, GGUF file, known name or hub id")
    dtype: DtypeName = Field("auto", description=DTYPE_HELP)
    max_length: int = Field(
        1024, ge=8, description="tokens of a text; longer ones lose the prompt's beginning"
    )
    batch_tokens: int = Field(4096, ge=1, description="tokens of one forward pass without gradient")


class AdapterSettings(Section):
    """The PMoL adapter; `PMoLConfig` explains the fields."""

    experts_per_group: int = Field(2, ge=1, description="LoRA experts of each preference")
    rank: int = Field(8, ge=1, description="of every expert")
    alpha: float = Field(32.0, gt=0, description="LoRA scale times rank")
    target_modules: list[str] | str = Field("all-linear", description="linear layers that carry experts")
    router_scope: RouterScope = Field("block", description="a router for each of these")
    router: RouterKind = Field("linear", description="recurrent hands a state from block to block")
    temperature: float = Field(1.0, gt=0, description="divides the router's logits")
    group_loss: GroupLoss = Field("soft", description="what ties groups to preferences")
    group_loss_weight: float = Field(0.1, ge=0, description="beside the preference loss")
    group_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target on the other groups")
    balance_loss: BalanceLoss = Field("within_group", description="keeps experts of a group alike in use")
    balance_loss_weight: float = Field(0.01, ge=0, description="beside the preference loss")


class TrainingSettings(Section):
    """DPO by TRL's trainer."""

    epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    batch_pairs: int = Field(16, ge=1, description="pairs of one optimizer step")
    accumulation: int = Field(1, ge=1, description="forward passes that share one optimizer step")
    learning_rate: float = Field(2e-4, gt=0, description="falls linearly to 0")
    lora_learning_rate: float | None = Field(
        None, gt=0, description="of the plain LoRAs, whose scale is another; null takes learning_rate"
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="of the plain LoRAs; null takes twice their rank"
    )
    beta: float = Field(0.1, gt=0, description="of DPO")
    router_start: RouterStart = Field(
        "probe",
        description="probe: linear routers of methods with a group loss begin as classifiers of the pairs",
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are cut to this")
    evaluations: int = Field(1, ge=0, description="validations of one training, evenly spread")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    report_to: str = Field("none", description="`tensorboard`, `wandb`, ...: as in transformers")


class SteeringSettings(Section):
    """The curve of what turning a preference up or down does, measured on test pairs."""

    weights: list[float] = Field([0.25, 0.5, 1.0, 2.0, 4.0], description="of the group that is turned")
    pairs_per_preference: int = Field(100, ge=0, description="test pairs; 0 draws no curve")

    @field_validator("weights")
    @classmethod
    def _are_weights(cls, weights: list[float]) -> list[float]:
        if not weights or min(weights) <= 0:
            raise ValueError("expected weights above 0")
        return sorted(weights)


class PolicySettings(Section):
    """Everything that `prefmoe policy train` can be told."""

    data: DataSettings
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    training: TrainingSettings = TrainingSettings()
    steering: SteeringSettings = SteeringSettings()
    methods: list[Method] = Field(
        ["pmol"], min_length=1, description="what to train and compare, on the same pairs"
    )
    seed: int = Field(0, description="of draws, starts and orders")
    out: str = Field("runs/policy", description="run folder; `--out` wins")

    @field_validator("methods")
    @classmethod
    def _are_different(cls, methods: list[Method]) -> list[Method]:
        return list(dict.fromkeys(methods))


def load_policy_settings(
    path: str | Path, changes: Sequence[str] = (), *, out: str | Path | None = None
) -> PolicySettings:
    """Reads a config file and applies `a.b=value` changes; see `prefmoe.runs.settings.read_settings`."""
    return read_settings(PolicySettings, path, changes, out=out)
