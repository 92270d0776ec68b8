"""Expert states on disk: results of a phase, and checkpoints inside one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefmoe.errors import CheckpointError
from prefmoe.reward.experts import ExpertState

_FILE = "experts.safetensors"


@dataclass(frozen=True)
class ExpertCheckpoint:
    """An expert as it was when it was best: accuracy in [0, 1], loss in nats, both on validation pairs."""

    state: ExpertState
    accuracy: float
    loss: float

    @classmethod
    def save_all(
        cls,
        folder: Path,
        *,
        current: Sequence[ExpertState],
        best: Sequence[Self | None],
        without_gain: int,
    ) -> None:
        """Writes the current and the best state of every expert into a checkpoint folder."""
        states = {f"current/{i}": state for i, state in enumerate(current)}
        states |= {f"best/{i}": found.state for i, found in enumerate(best) if found is not None}
        info = {
            "experts": len(current),
            "without_gain": without_gain,
            "best": [None if b is None else [b.accuracy, b.loss] for b in best],
        }
        save_states(folder / _FILE, states, info)

    @classmethod
    def load_all(cls, folder: Path) -> tuple[list[ExpertState], list[Self | None], int]:
        """Current states, best states and validations without gain, as `save_all` wrote them."""
        states, info = load_states(folder / _FILE)
        best = [
            None if scores is None else cls(states[f"best/{i}"], *scores)
            for i, scores in enumerate(info["best"])
        ]
        return [states[f"current/{i}"] for i in range(info["experts"])], best, info["without_gain"]


def save_states(file: Path, states: Mapping[str, ExpertState], info: object) -> None:
    """Writes named expert states and some JSON into one safetensors file; the file appears whole or not at all.

    Raises:
        CheckpointError: it cannot be written, as on a full disk.
    """
    flat: dict[str, Tensor] = {
        f"{name}|{key}": tensor.contiguous().cpu()
        for name, state in states.items()
        for key, tensor in state.items()
    }
    staging = file.with_name(f".{file.name}.part")
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        save_file(flat, staging, metadata={"info": json.dumps(info)})
        staging.replace(file)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(
            f"{file}: could not be written ({problem}); free some disk and give the same command again"
        ) from problem


def load_states(file: Path) -> tuple[dict[str, ExpertState], dict]:  # type: ignore[type-arg]
    """What `save_states` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    states: dict[str, ExpertState] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            info = json.loads(opened.metadata()["info"])
            for flat in opened.keys():
                name, key = flat.split("|", 1)
                states.setdefault(name, {})[key] = opened.get_tensor(flat)
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        raise CheckpointError(
            f"{file}: cannot be read ({problem}); delete it to compute it again"
        ) from problem
    return states, info


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint folder that the Trainer finished writing, None if there is none.

    The Trainer writes trainer_state.json last, so a folder where it can be read is whole.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.rsplit("-", 1)[-1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return checkpoint
    return None
