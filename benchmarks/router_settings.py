"""Settings of the task router, tried on validation prompts: poolings of the trunk's states, strength of the penalty.

    python benchmarks/router_settings.py configs/real-cpu.yaml --out runs/router-settings
    python benchmarks/router_settings.py configs/real-cpu.yaml --out runs/router-settings --test

The first prints, for every setting, the accuracy on validation pairs and the cross-validated one on training prompts,
which are more. The second measures nothing but the settings that the config names, on test pairs. The trunk's states
stay in <out>, so a stopped benchmark goes on.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prefmoe.backbone.layers import load_backbone
from prefmoe.cli.progress import StepProgress
from prefmoe.data.render import Renderer
from prefmoe.data.split import prompt_hash
from prefmoe.evaluation.accuracy import bootstrap_interval
from prefmoe.nn import TaskRouter, router_features
from prefmoe.nn.pooling import mean_tokens
from prefmoe.records import PreferencePair
from prefmoe.reward.settings import RewardSettings, load_settings
from prefmoe.reward.splits import read_splits
from prefmoe.reward.texts import TextTable, prompt_of
from prefmoe.reward.trunk import Trunk
from prefmoe.reward.workbench import encode_prompts, tokenizer_of_backbone
from prefmoe.runs.precision import resolve_dtype

Pooling = Callable[[Tensor, Tensor], Tensor]
_FOLDS = 3


def _mean(states: Tensor, lengths: Tensor) -> Tensor:
    return mean_tokens(states, torch.zeros_like(lengths), lengths)


def _last(states: Tensor, lengths: Tensor) -> Tensor:
    return mean_tokens(states, lengths - 1, lengths)


POOLINGS: dict[str, Pooling] = {
    "mean, last 32 (built in)": router_features,
    "mean": _mean,
    "mean, last": lambda states, lengths: torch.cat([_mean(states, lengths), _last(states, lengths)], 1),
}


class Prompts:
    """Training and judged prompts: their trunk's states on disk, their tasks."""

    def __init__(self, settings: RewardSettings, split: str, out: Path) -> None:
        body, splits = settings.backbone, read_splits(settings.data, settings.seed)
        backbone = load_backbone(
            body.name,
            num_layers=body.num_layers,
            dtype=resolve_dtype(body.dtype, torch.device("cpu")),
            max_length=body.max_length,
        )
        renderer, table = Renderer(tokenizer_of_backbone(body.name), max_length=body.max_length), TextTable()
        judged = splits[split]
        self.train = encode_prompts(splits["train"], settings, renderer, table)
        self.judged = [(_add(pair, renderer, table), str(pair.task)) for pair in judged]
        self.ids = [str(prompt_hash(pair.prompt)) for pair in judged]
        self.tasks = sorted({task for _, task in self.train})
        self.trunk = Trunk(
            backbone, settings.experts.split_layer, table, folder=out, batch_tokens=body.batch_tokens
        )
        self.trunk.prepare(range(len(table.texts)), StepProgress())

    def features(self, rows: Sequence[tuple[int, str]], pooling: Pooling) -> Tensor:
        """Pooled states (rows, features)."""
        texts = [text for text, _ in rows]
        batches = [self.trunk.batch(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        return torch.cat([pooling(b.packing.unpack(b.trunk), b.starts) for b in batches])

    def labels(self, rows: Sequence[tuple[int, str]]) -> Tensor:
        """Tasks (rows,); -1 for one that was not trained."""
        return torch.tensor([self.tasks.index(task) if task in self.tasks else -1 for _, task in rows])


def _add(pair: PreferencePair, renderer: Renderer, table: TextTable) -> int:
    return table.add(prompt_of(renderer.encode(pair.prompt, pair.chosen)))


def fitted(
    settings: RewardSettings, features: Tensor, labels: Tensor, num_tasks: int, l2: float
) -> TaskRouter:
    """A router of the config's other settings."""
    router = TaskRouter(num_tasks=num_tasks, hidden=features.shape[1])
    options = {
        "label_smoothing": settings.router.label_smoothing,
        "class_balance": settings.router.class_balance,
    }
    router.fit(features, labels, l2=l2, **options)
    return router


def tried(
    settings: RewardSettings, prompts: Prompts, strengths: Sequence[float]
) -> Iterator[tuple[str, ...]]:
    """A row of the table for every pooling and strength."""
    labels, truth = prompts.labels(prompts.train), prompts.labels(prompts.judged)
    fold = torch.arange(len(labels)) % _FOLDS
    for name, pooling in POOLINGS.items():
        inside, outside = (prompts.features(rows, pooling) for rows in (prompts.train, prompts.judged))
        for l2 in strengths:
            hits = hits_of(fitted(settings, inside, labels, len(prompts.tasks), l2), outside, truth)
            crossed = [
                hits_of(
                    fitted(settings, inside[fold != f], labels[fold != f], len(prompts.tasks), l2),
                    inside[fold == f],
                    labels[fold == f],
                )
                for f in range(_FOLDS)
            ]
            yield name, f"{l2:g}", interval(hits, prompts.ids), f"{torch.cat(crossed).mean():.4f}"


def hits_of(router: TaskRouter, features: Tensor, labels: Tensor) -> Tensor:
    """1 where the likeliest task is the true one, shape (rows,)."""
    return (router(features).argmax(1) == labels).float()


def interval(hits: Tensor, prompt_ids: Sequence[str]) -> str:
    """Accuracy with its 95 % interval over prompts."""
    found = bootstrap_interval(hits.numpy(), seed=0, prompt_ids=prompt_ids)
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], help="a.b=value, as in `prefmoe reward train`")
    parser.add_argument("--l2", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument(
        "--test", action="store_true", help="the config's settings on test pairs, nothing else"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/router-settings"))
    arguments = parser.parse_args(argv)
    settings = load_settings(arguments.config, arguments.set, out=arguments.out)
    prompts = Prompts(settings, "test" if arguments.test else "validation", arguments.out)
    if arguments.test:
        inside, outside = (
            prompts.features(rows, router_features) for rows in (prompts.train, prompts.judged)
        )
        labels = prompts.labels(prompts.train)
        router = fitted(settings, inside, labels, len(prompts.tasks), settings.router.l2)
        hits = hits_of(router, outside, prompts.labels(prompts.judged))
        print(f"test: {interval(hits, prompts.ids)}, {int((1 - hits).sum())} of {len(hits)} wrong")
        return
    table = Table("features", "l2", "validation pairs (95 %)", f"training prompts, {_FOLDS} folds")
    for row in tried(settings, prompts, arguments.l2):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
