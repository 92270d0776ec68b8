"""Small files of pairs, a quick config, and the command in this process, for the tests of `prefmoe.cli`."""

from pathlib import Path

import yaml
from typer.testing import CliRunner, Result

from data_helpers import write_rows
from prefmoe.cli.app import app

MAX_LENGTH = 96


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def pair_rows(split: str, *, num: int = 4, tasks: tuple[str, ...] = ("advice", "facts")) -> list[dict]:
    """Short pairs; every prompt is of one split and has two pairs."""
    return [
        {
            "id": f"{split}/{task}/{i}",
            "prompt": f"{task}, {split} {i // 2}?",
            "chosen": f"Yes, {'well ' * (i % 3)}{i}.",
            "rejected": f"No {'so ' * (i % 2)}{i}",
            "task": task,
            "capabilities": {"warmth": 1 if i % 3 else -1},
        }
        for task in tasks
        for i in range(num)
    ]


def write_config(folder: Path, backbone: Path, **changes: object) -> Path:
    """A config of a quick training, and its three files of pairs where they are not there yet."""
    sizes = {"train": 8, "validation": 4, "test": 4}
    for split, num in sizes.items():
        if not (folder / f"{split}.jsonl").exists():
            write_rows(folder / f"{split}.jsonl", pair_rows(split, num=num))
    content: dict[str, object] = {
        "data": {split: str(folder / f"{split}.jsonl") for split in sizes},
        "backbone": {"name": str(backbone), "dtype": "float32", "max_length": MAX_LENGTH},
        "experts": {"split_layer": 2, "rank": 2},
        "phase1": {"batch_pairs": 8, "evaluations": 1},
        "phase2": {"batch_pairs": 8, "evaluations": 1},
        "phase3": {"kinds": ["linear_scores"]},
        "methods": ["dmoerm"],
        "out": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path
