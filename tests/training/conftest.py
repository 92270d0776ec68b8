"""Whole runs that several tests look at: trained once a session."""

from collections.abc import Iterator

import pytest
import torch

from recorded_run import FinishedRun, finished_run
from tiny_run import tiny_settings


@pytest.fixture(scope="session")
def crossfit_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """All methods, cross-fitted aggregators, a shared start."""
    out = tmp_path_factory.mktemp("crossfit") / "run"
    return finished_run(tiny_settings(out, phase1={"shared_start": 0.5}))


@pytest.fixture(scope="session")
def paper_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """All methods with the paper's 60/40 split, every kind of aggregator, convex starts of the heads."""
    out = tmp_path_factory.mktemp("paper") / "run"
    kinds = ["linear_scores", "linear_states", "mlp"]
    training = {"epochs": 1.0, "head_start": True}
    return finished_run(tiny_settings(out, phase1=training, phase3={"split": "paper", "kinds": kinds}))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
