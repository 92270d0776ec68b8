"""A run folder: steps whose results are files, so that the same command goes on where it stopped."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import yaml
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback

from prefmoe.data.write import writing
from prefmoe.errors import CheckpointError, ConfigError, DataError, OutputError, PrefmoeError
from prefmoe.evaluation.files import write_text

T = TypeVar("T")


class RunSettings(Protocol):
    """What a run needs of its settings; pydantic models with an `out` have it."""

    @property
    def out(self) -> str:
        """The run folder."""

    def model_dump(self) -> dict[str, Any]:
        """All settings as plain values."""


_VERSIONED = ("prefmoe", "torch", "transformers", "accelerate", "safetensors", "numpy")


class Run:
    """One training run on disk: resolved config, versions, metrics.jsonl, one result file a step, seconds a step.

    Under `accelerate launch` every process makes its own; the main one writes.

    Args:
        settings: What is run. A folder that holds another config is refused, for its results would be mixed.
        independent: Settings that may differ from the folder's, because no step's result depends on them.
    """

    def __init__(self, settings: RunSettings, *, independent: Collection[str] = ()) -> None:
        self.settings = settings
        self.folder = Path(settings.out)
        self.state = process_state()
        config = yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True)
        file = self.folder / "config.yaml"
        if self.is_main:
            make_folder(self.folder)
            old = file.read_text(encoding="utf-8") if file.exists() else None
            if old is not None and not _same_work(old, config, {"out", *independent}):
                raise ConfigError(
                    f"{self.folder} holds a run with another config; choose another --out or delete it"
                )
            write_text(file, config)
            versions = {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()}
            write_text(self.folder / "versions.json", json.dumps(versions, indent=1))
            _cut_after_last_line(self.folder / "metrics.jsonl")
        self.wait()

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.state.is_main_process)

    def wait(self) -> None:
        """Until all processes are here."""
        self.state.wait_for_everyone()

    def step(
        self,
        name: str,
        compute: Callable[[], T],
        save: Callable[[Path, T], None],
        load: Callable[[Path], T],
        *,
        together: bool = False,
        alone: bool = False,
    ) -> T:
        """The result of a step: read if it is there, else computed and written.

        Args:
            name: File in `steps/`, with its ending.
            compute: Makes the result.
            save: Writes it to a path; the file gets its name only when it is whole.
            load: Reads it back. What is returned was always read back, so a resumed run sees the same.
            together: All processes compute (a distributed training); otherwise only the main one does.
            alone: Only the main process comes here at all, so nobody waits for the others.

        Raises:
            CheckpointError: the result cannot be written, as on a full disk, or not be read back.
        """
        file = self.folder / "steps" / name
        if not file.exists() and (together or self.is_main):
            with self.clock(name.split(".")[0]):
                result = compute()
            if self.is_main:
                _write_whole(file, result, save)
        if not alone:
            self.wait()
        try:
            return load(file)
        except (OSError, SafetensorError, KeyError, ValueError) as problem:
            raise CheckpointError(
                f"{file}: damaged or cut short ({problem}); delete it to compute it again"
            ) from problem

    def check_inputs(self, inputs: dict[str, str]) -> None:
        """Refuses to go on with other inputs than those that the results in the folder were made from.

        Args:
            inputs: A hash of each.

        Raises:
            DataError: an input has changed since the run began; all that have are named.
        """
        file = self.folder / "inputs.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else inputs
        changed = [name for name, found in inputs.items() if before.get(name) != found]
        if changed:
            raise DataError(
                f"{' and '.join(changed)} changed since this run began; choose another --out or delete the folder",
                self.folder,
            )
        if self.is_main:
            write_text(file, json.dumps(inputs, indent=1))

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the seconds of a block to seconds.json; a sitting that was killed inside it is not counted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - start)

    def add_seconds(self, name: str, duration: float) -> None:
        """Adds what a step took, seconds, to seconds.json."""
        if self.is_main:
            seconds = self.seconds()
            seconds[name] = round(seconds.get(name, 0.0) + duration, 2)
            write_text(self.folder / "seconds.json", json.dumps(seconds, indent=1))

    def seconds(self) -> dict[str, float]:
        """Seconds of every step so far."""
        file = self.folder / "seconds.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def log(self, phase: str, values: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        if self.is_main:
            path = self.folder / "metrics.jsonl"
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": 0, "phase": phase, **values}) + "\n")


@contextlib.contextmanager
def writing_checkpoint(folder: Path) -> Iterator[None]:
    """Around what writes a trainer's checkpoint, in whose many files a full disk has many names.

    Raises:
        OutputError: it could not be written.
    """
    try:
        yield
    except PrefmoeError:
        raise
    except (OSError, RuntimeError) as problem:  # torch.save raises the second
        raise OutputError(
            f"{folder}: a checkpoint could not be written ({str(problem).splitlines()[0]}); free space and give the "
            "same command again, it goes on from the last whole one"
        ) from problem


def process_state() -> PartialState:
    """Which of how many processes this is, and its device."""
    # Without being told so, it does not see that several processes run on CPUs.
    return PartialState(cpu=not torch.cuda.is_available())


class LogCallback(TrainerCallback):
    """Sends what the Trainer logs to a run, and its steps to a progress bar."""

    def __init__(self, run: Run, phase: str, advance: Callable[[float], None]) -> None:
        self.run, self.phase, self.advance = run, phase, advance

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line."""
        numbers = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        self.run.log(self.phase, {"step": state.global_step, **numbers})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step."""
        self.advance(1)


def _write_whole(file: Path, result: T, save: Callable[[Path, T], None]) -> None:
    staging = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(exist_ok=True)
        save(staging, result)
        staging.replace(file)
    except (OSError, SafetensorError) as problem:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file}: could not be written ({problem}); free some disk and give the same command again"
        ) from problem


def _cut_after_last_line(file: Path) -> None:
    """Drops what a killed run left of a line, so that the next one does not continue it."""
    if file.exists():
        content = file.read_bytes()
        os.truncate(file, content.rfind(b"\n") + 1)


def make_folder(folder: Path) -> None:
    """Makes a run folder if it is not there; raises ConfigError where none can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: no run can be kept there; {error.strerror}; choose another --out"
        ) from error


def _same_work(old: str, new: str, independent: Collection[str]) -> bool:
    before, after = yaml.safe_load(old), yaml.safe_load(new)
    if not isinstance(before, dict):
        return False
    return before | dict.fromkeys(independent) == after | dict.fromkeys(independent)
