"""Phase 0: which task a prompt belongs to, read from the trunk's states of the prompt."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prefmoe.nn import TaskRouter, router_features
from prefmoe.reward.checkpoints import load_states, save_states
from prefmoe.reward.workbench import Workbench


def fit_router(bench: Workbench) -> TaskRouter:
    """The convex fit of the router on the training prompts, as a step of the run."""

    def compute() -> TaskRouter:
        router = TaskRouter(num_tasks=len(bench.tasks), hidden=2 * bench.trunk.hidden)
        settings = bench.settings.router
        router.fit(
            prompt_features(bench, [text for text, _ in bench.prompts]),
            torch.tensor([list(bench.tasks).index(task) for _, task in bench.prompts]),
            l2=settings.l2,
            label_smoothing=settings.label_smoothing,
            class_balance=settings.class_balance,
        )
        return router

    def load(file: Path) -> TaskRouter:
        states, _ = load_states(file)
        router = TaskRouter(num_tasks=len(bench.tasks), hidden=2 * bench.trunk.hidden)
        router.load_state_dict(states["router"])
        return router

    def save(file: Path, router: TaskRouter) -> None:
        save_states(file, {"router": router.state_dict()}, {})

    return bench.run.step("router.safetensors", compute, save, load)


def prompt_features(bench: Workbench, texts: Sequence[int], batch_size: int = 64) -> Tensor:
    """`router_features` of texts of the bench's table, on the CPU."""
    parts = []
    for i in range(0, len(texts), batch_size):
        trunk, packing, starts = bench.trunk.batch(texts[i : i + batch_size])
        parts.append(router_features(packing.unpack(trunk), starts).cpu())
    return torch.cat(parts)
