"""`prefmoe reward score`: a file of completions to a file of scores, which a stopped run goes on with."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmoe.data.read import read_completions
from prefmoe.errors import ConfigError, OutputError
from prefmoe.evaluation.files import write_text
from prefmoe.nn import RoutingMode
from prefmoe.records import RewardReport
from prefmoe.reward.score import RewardModel
from prefmoe.runs.inputs import hash_of, hash_of_files
from prefmoe.runs.progress import Progress, silent

_ROWS_AT_ONCE = 128  # few enough that a stop costs little, enough to sort by length


@dataclass(frozen=True)
class ScoreSummary:
    """What `score_file` did; as text, one line for people."""

    out: Path
    num_scored: int
    num_found: int
    num_truncated: int

    def __str__(self) -> str:
        found = f", {self.num_found} of them before" if self.num_found else ""
        cut = f"; {self.num_truncated} lost tokens to fit" if self.num_truncated else ""
        return f"{self.out}: {self.num_scored} completions scored{found}{cut}"


def score_file(
    model: str | Path,
    source: str | Path,
    out: Path,
    *,
    routing: RoutingMode = "top1",
    progress: Progress = silent,
) -> ScoreSummary:
    """Scores completions in order, one JSON line each; every batch is on disk before the next one begins.

    Beside `out`, `<out>.origin.json` says what it was made from. A second call with the same origin goes on
    behind the last whole batch, so that the file becomes the same as that of an uninterrupted call.

    Args:
        model: Folder of a saved model, or a hub id.
        source: As for `read_completions`.
        out: JSON Lines: id, reward, task, task_probs, capabilities, and truncated_tokens if there are any.
        routing: As in `RewardModel.score`.
        progress: Shows how far it is.

    Raises:
        DataError: completions that cannot be used; the batches before them are kept.
        ConfigError: `out` holds something else.
        CheckpointError: the model cannot be used.
        OutputError: `out` cannot be written.
    """
    rows = read_completions(source, split="test")
    origin = {"model": _hash_of_model(model), "routing": routing, "completions": hash_of(map(repr, rows))}
    num_found = _keep_whole_batches(out, origin, len(rows))
    if num_found == len(rows):
        return ScoreSummary(out, len(rows), num_found, 0)
    reward_model = RewardModel.load(model)
    if not num_found:
        _begin(out, origin)
    num_truncated = 0
    with progress("scoring", len(rows)) as advance:
        advance(num_found)
        for first in range(num_found, len(rows), _ROWS_AT_ONCE):
            batch = rows[first : first + _ROWS_AT_ONCE]
            reports = reward_model.score(batch, routing=routing)
            _append(out, reports)
            num_truncated += sum(report.truncated_tokens > 0 for report in reports)
            advance(len(batch))
    return ScoreSummary(out, len(rows), num_found, num_truncated)


def as_json(report: RewardReport) -> dict[str, Any]:
    """A report as the object that is written; numbers have six decimals."""
    values: dict[str, Any] = {
        "id": report.id,
        "reward": round(report.reward, 6),
        "task": report.task,
        "task_probs": {name: round(value, 6) for name, value in report.task_probs.items()},
        "capabilities": {name: round(value, 6) for name, value in report.capabilities.items()},
    }
    return values | ({"truncated_tokens": report.truncated_tokens} if report.truncated_tokens else {})


def _keep_whole_batches(out: Path, origin: dict[str, str], num_rows: int) -> int:
    """Rows of `out` that stay; a batch that was cut short is removed, to be scored again as a whole."""
    if not out.exists():
        return 0
    try:
        if not _note(out).exists() or json.loads(_note(out).read_text(encoding="utf-8")) != origin:
            raise ConfigError(
                f"{out} holds something else than scores of these completions by this model and routing; "
                "choose another --out or delete it"
            )
        with out.open("rb+") as file:
            sizes = [len(line) for line in file if line.endswith(b"\n")]
            kept = num_rows if len(sizes) >= num_rows else len(sizes) // _ROWS_AT_ONCE * _ROWS_AT_ONCE
            file.truncate(sum(sizes[:kept]))
    except OSError as error:
        raise _not_writable(out, error) from error
    return kept


def _begin(out: Path, origin: dict[str, str]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(_note(out), json.dumps(origin, indent=1) + "\n")
        out.write_bytes(b"")
    except OSError as error:
        raise _not_writable(out, error) from error


def _append(out: Path, reports: Sequence[RewardReport]) -> None:
    text = "".join(json.dumps(as_json(report), ensure_ascii=False) + "\n" for report in reports)
    try:
        with out.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _not_writable(out, error) from error


def _not_writable(out: Path, error: OSError) -> OutputError:
    return OutputError(f"{out}: cannot be written; {error.strerror}; the same command goes on once it can")


def _note(out: Path) -> Path:
    return out.with_name(f"{out.name}.origin.json")


def _hash_of_model(model: str | Path) -> str:
    """Of the files that a model is made of; the name of one that is on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return hash_of([str(model)])
    return hash_of_files([folder / "config.json", *sorted(folder.glob("model*.safetensors"))])
