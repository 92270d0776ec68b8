"""The YAML file of `prefmoe reward train`, checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from prefmoe.labeling.judge.settings import JudgeSettings
from prefmoe.nn import AggregatorKind
from prefmoe.reward.jobs import TrainingSettings
from prefmoe.runs.precision import DTYPE_HELP, DtypeName
from prefmoe.runs.settings import Section, read_settings, validated

# Names of the two kinds of `data.labels` in pydantic's places of errors; `read_settings` leaves them out.
_NAMED, _JUDGED = "<name>", "<judge>"

Method = Literal["single", "single_wide", "per_task", "dmoerm"]


class DataSettings(Section):
    """Where pairs come from and how many are used."""

    train: str = Field(description="file, folder with a file a split, or `datasets` name")
    validation: str | None = Field(
        None, description="as `train`; null sets aside `validation_fraction` of it, by prompt"
    )
    test: str | None = Field(None, description="as `train`; null measures nothing")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training prompts")
    max_pairs_per_task: int | None = Field(None, ge=1, description="of train; drawn by `seed`")
    max_validation_pairs_per_task: int | None = Field(
        None, ge=1, description="of validation; drawn by `seed`"
    )
    capability_train: str | None = Field(
        None,
        description="as `train`: more pairs for capability experts, whose preference is not used; may be `train` "
        "itself where `max_pairs_per_task` leaves pairs out",
    )
    max_capability_pairs_per_task: int | None = Field(
        None, ge=1, description="of capability_train; drawn by `seed`"
    )
    labels: Annotated[
        Annotated[Literal["columns", "rules"], Tag(_NAMED)] | Annotated[JudgeSettings, Tag(_JUDGED)],
        Discriminator(lambda value: _NAMED if isinstance(value, str) else _JUDGED),
    ] = Field(
        "columns",
        description="where capability labels come from: the rows, rules, or `{judge: MODEL, ...}`, which asks what is "
        "missing first; columns always win",
    )
    soft_labels: bool = Field(
        False,
        description="capability experts learn from probabilities where there are any, in the column "
        "`capability_probabilities` or from a judge, and from labels elsewhere",
    )
    tasks_file: str | None = Field(
        None, description="YAML with tasks, capabilities, their sentences and rules"
    )
    answers: str | None = Field(
        None,
        description="a judge's answers; null is `answers.sqlite` beside the run folder, for all runs there",
    )

    @model_validator(mode="after")
    def _judge_gives_probabilities(self) -> Self:
        judge = self.labels
        if self.soft_labels and isinstance(judge, JudgeSettings) and not (judge.is_local or judge.confidence):
            raise ValueError("soft_labels needs probabilities; add confidence: true to labels")
        return self


class BackboneSettings(Section):
    """The frozen transformer."""

    name: str = Field("smollm2-135m", description="folder, GGUF file, known name or hub id")
    num_layers: int | None = Field(None, ge=1, description="keep only the first ones")
    dtype: DtypeName = Field("auto", description=DTYPE_HELP)
    max_length: int = Field(1024, ge=8, description="tokens of a text; longer ones are cut")
    trunk_cache: bool = Field(True, description="keep the output of the lower layers on disk")
    trunk_cache_gib: float = Field(16.0, gt=0, description="a larger cache is not written")
    batch_tokens: int = Field(
        8192, ge=1, description="tokens of one forward pass without gradient; what texts share counts once"
    )


class ExpertSettings(Section):
    """Where experts sit and how large they are."""

    split_layer: int = Field(8, ge=0, description="first layer with experts")
    rank: int = Field(8, ge=1, description="of the LoRA of one expert")
    alpha: float = Field(16.0, gt=0, description="LoRA scale times rank")
    target_modules: list[str] = Field(
        ["q_proj", "v_proj", "up_proj", "down_proj"], description="linear layers that carry experts"
    )
    pooling: Literal["last", "mean"] = Field(
        "mean", description="state of the last token, or mean over the completion"
    )


class RouterSettings(Section):
    """The convex fit of the task router."""

    max_prompts_per_task: int | None = Field(
        2000,
        ge=1,
        description="prompts to learn from; needs no labels, so also pairs beyond data.max_pairs_per_task",
    )
    class_balance: float = Field(
        1.0, ge=0, le=1, description="1: every task counts the same; 0: every prompt; between: in between"
    )
    l2: float = Field(1e-2, gt=0, description="strength of the penalty")
    label_smoothing: float = Field(0.05, ge=0, lt=1, description="share of the target spread over all tasks")


class Phase1Settings(TrainingSettings):
    """Task adapters."""

    method: Literal["lora", "full"] = Field(
        "lora", description="full: a full-size change of the target layers for each task"
    )
    shared_start: float = Field(
        0.0, ge=0, description="epochs, of `epochs`, that one adapter trains on all tasks before they part"
    )

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Self:
        if self.shared_start > self.epochs:
            raise ValueError(f"shared_start={self.shared_start} is more than epochs={self.epochs}")
        return self


class Phase2Settings(TrainingSettings):
    """Capability experts."""

    max_pairs_per_capability: int | None = Field(
        None,
        ge=1,
        description="labelled pairs that LoRA learns from, drawn by `seed`; heads start from all that there are",
    )


class Phase3Settings(Section):
    """Aggregators."""

    split: Literal["paper", "crossfit"] = Field(
        "paper",
        description="paper: experts on `expert_fraction` of the prompts, aggregators on the others; crossfit: "
        "aggregators on out-of-fold features of two halves, experts then trained on everything",
    )
    expert_fraction: float = Field(0.6, gt=0, lt=1, description="for `split: paper`")
    general_expert: bool = Field(
        False,
        description="the shared adapter is one more input of every task's aggregator (needs phase1.shared_start)",
    )
    kinds: list[AggregatorKind] = Field(
        ["task_head", "linear_scores", "linear_states", "mlp"],
        description="candidates, judged on pairs they were not fitted on; task_head is always one",
    )
    standard_errors: float = Field(
        2.0,
        ge=0,
        description="how many of them a kind has to gain over the task heads, on all tasks together",
    )
    mlp_epochs: int = Field(30, ge=1, description="passes over the features; the best one is kept")
    mlp_learning_rate: float = Field(1e-4, gt=0, description="of AdamW")

    @field_validator("kinds")
    @classmethod
    def _keeps_the_task_head(cls, kinds: list[AggregatorKind]) -> list[AggregatorKind]:
        return ["task_head", *(kind for kind in dict.fromkeys(kinds) if kind != "task_head")]


class RewardSettings(Section):
    """Everything that `prefmoe reward train` can be told."""

    data: DataSettings
    backbone: BackboneSettings = BackboneSettings()
    experts: ExpertSettings = ExpertSettings()
    router: RouterSettings = RouterSettings()
    phase1: Phase1Settings = Phase1Settings()
    phase2: Phase2Settings = Phase2Settings()
    phase3: Phase3Settings = Phase3Settings()
    methods: list[Method] = Field(
        ["dmoerm"], min_length=1, description="what to train and compare, on the same pairs"
    )

    @model_validator(mode="after")
    def _has_a_general_expert(self) -> Self:
        if self.phase3.general_expert and not self.phase1.shared_start:
            raise ValueError("phase3.general_expert needs phase1.shared_start above 0")
        if self.phase3.general_expert and self.phase1.method == "full":
            raise ValueError("phase3.general_expert needs phase1.method: lora")
        return self

    seed: int = Field(0, description="of splits, draws, starts and orders")
    out: str = Field("runs/reward", description="run folder; `--out` wins")


def load_settings(
    path: str | Path, changes: Sequence[str] = (), *, out: str | Path | None = None
) -> RewardSettings:
    """Reads a config file and applies `a.b=value` changes; see `prefmoe.runs.settings.read_settings`."""
    return read_settings(RewardSettings, path, changes, out=out)


def check_settings(content: Mapping[str, Any], *, where: str) -> RewardSettings:
    """Settings from plain values; raises ConfigError that lists every problem."""
    return validated(RewardSettings, content, where=where)
