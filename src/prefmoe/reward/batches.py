"""The batches of a training: in which order pairs come, and what one batch holds."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefmoe.reward.features import expert_batch
from prefmoe.reward.jobs import TrainingSettings
from prefmoe.reward.texts import PairRow
from prefmoe.reward.trunk import Trunk

Item = tuple[int, PairRow]  # expert, pair


@dataclass(frozen=True)
class PairCollator:
    """Items to the arguments of `PairModule.forward`."""

    trunk: Trunk

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """One batch."""
        pairs = [pair for _, pair in items]
        chosen, rejected = (
            [(getattr(pair, side), expert) for expert, pair in items] for side in ("chosen", "rejected")
        )
        inputs = expert_batch(self.trunk, chosen + rejected)
        columns = {
            name: torch.tensor([getattr(p, name) for p in pairs])
            for name in ("label", "weight", "target_margin")
        }
        expert_ids = torch.tensor([expert for expert, _ in items] * 2)
        return {**inputs._asdict(), "expert_ids": expert_ids, **columns}


def training_order(items: Sequence[Item], trunk: Trunk, settings: TrainingSettings, seed: int) -> list[Item]:
    """Every item of every epoch in the order of training: shuffled, similar lengths in one batch.

    Written out in advance so that a resumed run, or one with more processes, sees the same batches.
    """

    def length(item: Item) -> int:
        return max(trunk.table.length(text) for text in item[1][:2])

    rng = random.Random(seed)
    order: list[Item] = []
    rest: list[Item] = []
    size = settings.batch_pairs
    left = math.ceil(len(items) * settings.epochs)
    while left > 0:
        epoch = rest + rng.sample(items, k=min(len(items), left))
        left -= len(epoch) - len(rest)
        blocks = [epoch[i : i + 16 * size] for i in range(0, len(epoch), 16 * size)]
        batches = []
        for block in blocks:
            block.sort(key=length)
            batches += [block[i : i + size] for i in range(0, len(block), size)]
        # A short batch may only come last of all: the Trainer cuts the order into batches again.
        rest = batches.pop() if len(batches[-1]) < size else []
        rng.shuffle(batches)
        order += [item for batch in batches for item in batch]
    # A text of no weight fills the last batch: several processes would else fill it with pairs that count.
    filler = [(e, pair._replace(weight=0.0)) for e, pair in rest and [min(items, key=length)]]
    return order + rest + filler * (-len(rest) % size)
