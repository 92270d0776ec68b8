"""What is trained and how: settings, jobs, results."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator
from transformers.integrations import get_available_reporting_integrations

from prefmoe.reward.experts import ExpertState
from prefmoe.reward.texts import PairRow


class TrainingSettings(BaseModel):
    """How experts are trained. Steps are optimizer steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(1.0, ge=0, description="passes over every expert's own pairs; 0 keeps the start")
    batch_pairs: int = Field(16, ge=1, description="pairs of one optimizer step, over all processes")
    accumulation: int = Field(1, ge=1, description="forward passes that share one optimizer step")
    learning_rate: float = Field(2e-4, gt=0, description="of LoRA; falls linearly to 0")
    head_learning_rate: float = Field(1e-4, gt=0, description="of the linear heads")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are cut to this")
    evaluations: int = Field(3, ge=1, description="validations of one training, evenly spread")
    validation_pairs: int | None = Field(
        100, ge=1, description="pairs of one expert that a validation looks at; None takes all"
    )
    patience: int = Field(
        0, ge=0, description="validations without gain of any expert before stopping; 0 never"
    )
    head_start: bool = Field(True, description="start heads at the convex optimum on the starting states")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    report_to: str = Field("none", description="`tensorboard`, `wandb`, ...: as in transformers")

    @field_validator("report_to")
    @classmethod
    def _is_installed(cls, name: str) -> str:
        known = ["none", *get_available_reporting_integrations()]
        if name not in known:
            raise ValueError(f"report_to={name!r} is not installed; install it or choose {', '.join(known)}")
        return name


@dataclass(frozen=True)
class ExpertJob:
    """One expert to train: its name, its pairs, where it starts.

    Attributes:
        head_pairs: What the convex start of its head is fitted to, where that is not `train`.
    """

    name: str
    train: Sequence[PairRow]
    validation: Sequence[PairRow]
    start: ExpertState | None = None
    head_pairs: Sequence[PairRow] = ()


@dataclass(frozen=True)
class TrainedExpert:
    """The best state of an expert and its accuracy on the validation pairs (ties count one half)."""

    state: ExpertState
    accuracy: float
