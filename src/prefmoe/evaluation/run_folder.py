"""What a run folder can hold for the report: the shape of each file, and reading them all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

from prefmoe.errors import DataError
from prefmoe.evaluation.best_of_n import BestOfNCurve
from prefmoe.evaluation.files import parse_json, read_bytes, read_json, write_text
from prefmoe.evaluation.metrics import Metrics
from prefmoe.records import Messages, PreferencePair, RewardReport

T = TypeVar("T")


class LogLine(BaseModel):
    """One line of `metrics.jsonl`; see `training_log` for what the report makes of its further numbers.

    Attributes:
        step: Optimizer step, counted from the start of the phase.
        phase: Training phase, for example "phase1"; "data" and "phase3" are not trained in steps.
        method: Method it belongs to; empty where the run trains one.
    """

    model_config = ConfigDict(extra="allow")

    step: int
    phase: str
    method: str = ""


class RouterConfusion(BaseModel):
    """`router_confusion.json`: how many test pairs of task (row) had their prompt sent to task (column)."""

    tasks: list[str]
    counts: list[list[int]]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_square(self.counts, len(self.tasks), "counts", "tasks")
        if any(count < 0 for row in self.counts for count in row):
            raise ValueError("counts have to be 0 or more")
        return self


class ExpertCorrelation(BaseModel):
    """One task of `expert_correlation.json`: Pearson correlation of its experts' scores, in [-1, 1].

    NaN or null where an expert's scores are all the same.
    """

    experts: list[str]
    matrix: list[list[float | None]]

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_square(self.matrix, len(self.experts), "matrix", "experts")
        return self


class ScoredCompletion(BaseModel):
    """A completion of `examples.json`: its text and what the reward model said (`records.RewardReport`)."""

    text: str
    reward: float
    task: str
    task_probs: dict[str, float] = {}
    capabilities: dict[str, float] = {}


class ScoredPair(BaseModel):
    """One entry of `examples.json`: a test pair with the rewards of both sides; `task` is the true one."""

    prompt: str
    task: str | None = None
    chosen: ScoredCompletion
    rejected: ScoredCompletion


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Everything the report needs; what the folder does not hold is empty or None, and named in `missing`."""

    path: Path
    missing: tuple[str, ...]
    metrics: Metrics | None
    log: list[LogLine]
    confusion: RouterConfusion | None
    correlations: dict[str, ExpertCorrelation]
    curves: dict[str, BestOfNCurve]
    examples: list[ScoredPair]
    config: str
    versions: dict[str, str]


FILES = {
    "metrics.json": "accuracies, intervals and times",
    "metrics.jsonl": "training curves",
    "router_confusion.json": "confusion of the router",
    "expert_correlation.json": "correlation of the experts",
    "best_of_n.json": "best-of-n curves",
    "examples.json": "example pairs",
    "config.yaml": "the configuration",
    "versions.json": "package versions",
}


def read_run(folder: Path) -> RunFolder:
    """Reads every file of the report that the run folder holds; each one is optional.

    Raises:
        DataError: no such folder, none of the files in it, or a file that cannot be used.
    """
    missing = tuple(name for name in FILES if not (folder / name).is_file())
    if len(missing) == len(FILES):
        kind = "holds no file of a run" if folder.is_dir() else "is not a folder"
        raise DataError(
            f"{kind}; expected at least one of {', '.join(FILES)}; give the folder that training wrote.",
            folder,
        )
    return RunFolder(
        path=folder,
        missing=missing,
        metrics=_read(folder / "metrics.json", TypeAdapter(Metrics | None), None),
        log=_read_log(folder / "metrics.jsonl"),
        confusion=_read(folder / "router_confusion.json", TypeAdapter(RouterConfusion | None), None),
        correlations=_read(folder / "expert_correlation.json", TypeAdapter(dict[str, ExpertCorrelation]), {}),
        curves=_read(folder / "best_of_n.json", TypeAdapter(dict[str, BestOfNCurve]), {}),
        examples=_read(folder / "examples.json", TypeAdapter(list[ScoredPair]), []),
        config=_read_text(folder / "config.yaml"),
        versions=_read(folder / "versions.json", TypeAdapter(dict[str, str]), {}),
    )


def scored_pair(pair: PreferencePair, chosen: RewardReport, rejected: RewardReport) -> ScoredPair:
    """A test pair together with what the reward model said about its two sides."""
    return ScoredPair(
        prompt=_as_text(pair.prompt),
        task=pair.task,
        chosen=_scored_completion(pair.chosen, chosen),
        rejected=_scored_completion(pair.rejected, rejected),
    )


def write_run_file(path: Path, content: BaseModel | Mapping[str, BaseModel] | Sequence[BaseModel]) -> None:
    """Writes one of the JSON files above, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, TypeAdapter(Any).dump_json(content, indent=1).decode() + "\n")


def _read(path: Path, shape: TypeAdapter[T], default: T) -> T:
    return read_json(path, shape) if path.is_file() else default


def _read_text(path: Path) -> str:
    return read_bytes(path).decode("utf-8", errors="replace") if path.is_file() else ""


def _read_log(path: Path) -> list[LogLine]:
    """The lines of the training log; a last line that was cut by a kill is left out."""
    if not path.is_file():
        return []
    *whole, _cut = read_bytes(path).split(b"\n")  # what follows the last newline is empty or cut
    shape = TypeAdapter(LogLine)
    return [
        parse_json(text, shape, path=path, line=number)
        for number, text in enumerate(whole, 1)
        if text.strip()
    ]


def _scored_completion(messages: Messages, report: RewardReport) -> ScoredCompletion:
    return ScoredCompletion(
        text=_as_text(messages),
        reward=report.reward,
        task=report.task,
        task_probs=dict(report.task_probs),
        capabilities=dict(report.capabilities),
    )


def _as_text(messages: Messages) -> str:
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


def _check_square(matrix: Sequence[Sequence[float | None]], size: int, name: str, names: str) -> None:
    if size == 0 or [len(row) for row in matrix] != [size] * size:
        raise ValueError(f"{name} has to be square, one row and one column for each of the {size} {names}")
