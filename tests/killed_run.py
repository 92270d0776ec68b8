"""A tiny run in a process of its own, which kills itself (SIGKILL, no cleaning up) at a chosen moment.

Processes are forked from one that has imported torch and us, which takes longer than a run.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NoReturn
from unittest import mock

import torch

from prefmoe.nn import TaskRouter
from prefmoe.reward import phases, train
from prefmoe.reward.evaluate import evaluate_models
from prefmoe.reward.settings import RewardSettings
from prefmoe.reward.train import train_models
from prefmoe.reward.trainer import ExpertTrainer
from tiny_run import tiny_bench, tiny_settings


def settings_of_all_phases(out: Path) -> RewardSettings:
    """Every phase takes part, and each training has checkpoints before its end."""
    training = {"epochs": 1.0, "evaluations": 3}
    return tiny_settings(
        out,
        backbone={"batch_tokens": 1024},
        phase1={"shared_start": 0.5, **training},
        phase2=training,
    )


def run(settings: RewardSettings, kill: "AtProgress | AtCall | None" = None) -> None:
    """The whole run, or the part of it until it is killed."""
    torch.set_num_threads(1)
    with contextlib.nullcontext() if kill is None else kill() as progress:
        bench = tiny_bench(settings, **({} if progress is None else {"progress": progress}))
        evaluate_models(bench, train_models(bench))


def die(*_: object, **__: object) -> NoReturn:
    """As by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class AtProgress:
    """Dies when a progress bar whose label starts with `label` was advanced `times` times."""

    def __init__(self, label: str, times: int) -> None:
        self.label, self.times = label, times

    @contextlib.contextmanager
    def __call__(self) -> Iterator[object]:
        yield self.progress

    @contextlib.contextmanager
    def progress(self, label: str, _: float) -> Iterator[Callable[[float], None]]:
        def advance(_: float) -> None:
            self.times -= label.startswith(self.label)
            if not self.times:
                die()

        yield advance


class AtCall:
    """Dies instead of the `times`-th call of an attribute."""

    def __init__(self, where: str, name: str, times: int = 1) -> None:
        self.where, self.name, self.times = where, name, times

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        owners = {"router": TaskRouter, "trainer": ExpertTrainer, "phases": phases, "train": train}
        owner = owners[self.where]
        original = getattr(owner, self.name)

        def counted(*args: object, **kwargs: object) -> object:
            self.times -= 1
            return original(*args, **kwargs) if self.times else die()

        with mock.patch.object(owner, self.name, counted):
            yield


def fork_server() -> ForkServerContext:
    """Starts processes that have imported torch and us already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prefmoe.reward.evaluate", "transformers.models.llama.modeling_llama"])
    return context
