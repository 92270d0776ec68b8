"""What a training costs: trainable weights, seconds a step and peak memory, measured while it runs."""

import ctypes
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import TrainerCallback

from prefmoe.evaluation.files import write_text
from prefmoe.policy.methods import num_trainable
from prefmoe.runs.run import Run

_FILE = "costs.json"
_PROCESS = Path("/proc/self")


class TrainingCosts(BaseModel):
    """Of one training.

    Attributes:
        trainable: Weights that it changes.
        seconds_per_step: Median over its optimizer steps (forward, backward, update; no validation), seconds.
        peak_bytes: On a GPU, what tensors took at most (`torch.cuda.max_memory_allocated`). On a CPU, the peak resident
            memory of the whole process, which the frozen model and the libraries are part of; None where the system
            does not tell it (Linux with glibc does).
    """

    trainable: int
    seconds_per_step: float
    peak_bytes: int | None


class CostCallback(TrainerCallback):
    """Measures a training and keeps the result in the run folder, with every checkpoint and at the end.

    A training that was killed and goes on is measured by the steps of its last sitting; one that was killed after its
    last step keeps what was written with the checkpoint.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.durations: list[float] = []
        self.start = 0.0
        self.trainable = 0
        self.has_peak = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Memory of what came before is given back and not counted."""
        self.trainable = num_trainable(model)
        self.has_peak = reset_peak_memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step: of the optimizer, accumulation included."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once the device has done it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - self.start)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint."""
        self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end."""
        self._write()

    def _write(self) -> None:
        if not self.durations or not self.run.is_main:
            return
        costs = TrainingCosts(
            trainable=self.trainable,
            seconds_per_step=statistics.median(self.durations),
            peak_bytes=peak_memory() if self.has_peak else None,
        )
        known = {name: found.model_dump() for name, found in read_costs(self.run.folder).items()}
        text = json.dumps(known | {self.name: costs.model_dump()}, indent=1)
        write_text(self.run.folder / _FILE, text)


def read_costs(folder: Path) -> dict[str, TrainingCosts]:
    """Costs of a run's trainings by name: the method's, or `lora_<preference>` and `sequential_<preference>`."""
    file = folder / _FILE
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: TrainingCosts.model_validate(costs) for name, costs in found.items()}


def reset_peak_memory() -> bool:
    """Lets `peak_memory` begin anew; False where the system cannot tell peaks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else what an earlier training has freed would still count
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Bytes at the peak since `reset_peak_memory`; see `TrainingCosts.peak_bytes`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
