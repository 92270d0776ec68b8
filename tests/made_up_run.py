"""A run folder with made-up numbers, for trying the report: nothing in it was trained."""

import json
import math
from pathlib import Path

import numpy as np

from prefmoe.evaluation.best_of_n import curve
from prefmoe.evaluation.metrics import build_metrics, write_metrics
from prefmoe.evaluation.run_folder import write_run_file

TASKS = ("advice", "facts", "writing")
CAPABILITIES = {
    "advice": ("empathy", "proactivity", "logic"),
    "facts": ("correctness", "objectiveness", "question-specific"),
    "writing": ("expressiveness", "readability", "content richness"),
}
# How clearly each method tells the two sides of a pair apart: mean of its margins, whose deviation is 1.
SKILL = {
    "single": (0.9, 0.5, 0.8),
    "per_task": (1.0, 1.0, 1.05),
    "dmoerm": (1.3, 1.1, 1.2),
}
PROMPT = "My sister has not spoken to me since I missed her birthday. What should I do?"
CHOSEN = (
    "That sounds painful, and it is good that you want to mend it. Call her rather than write. Say plainly "
    "that you forgot, that you are sorry, and do not explain it away. Then ask what would help, and listen "
    "to the end before you answer. If she needs time, tell her that you will call again on Sunday, and do so."
)
REJECTED = (
    "Birthdays matter to many people. There are several ways to react to such a situation. One could write, "
    "one could call, one could wait. Communication is important in families, and most conflicts pass."
)


def write_made_up_run(folder: Path, *, num_pairs: int = 300, seed: int = 0) -> Path:
    """Fills the folder with every file the report reads, and gives it back."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    hardness = {task: rng.normal(size=num_pairs) for task in TASKS}
    margins = {
        method: {
            task: skill + 0.8 * hardness[task] + 0.6 * rng.normal(size=num_pairs)
            for task, skill in zip(TASKS, skills, strict=True)
        }
        for method, skills in SKILL.items()
    }
    steps = {
        "data": 3.1,
        "router": 12.4,
        "task adapters": 95.0,
        "capability experts": 160.2,
        "aggregator": 8.8,
    }
    write_metrics(build_metrics(margins, router_accuracy=0.984, seconds=steps), folder / "metrics.json")
    _write_curves(folder, rng)
    _write_log(folder, rng)
    counts = [[296, 1, 3], [2, 297, 1], [5, 2, 293]]
    _write_json(folder / "router_confusion.json", {"tasks": TASKS, "counts": counts})
    matrix = [[1.0, 0.62, -0.18], [0.62, 1.0, 0.07], [-0.18, 0.07, 1.0]]
    correlations = {task: {"experts": CAPABILITIES[task], "matrix": matrix} for task in TASKS}
    _write_json(folder / "expert_correlation.json", correlations)
    _write_json(folder / "examples.json", [made_up_pair(), made_up_pair(swap=True)])
    (folder / "config.yaml").write_text("backbone: tiny\nmethods: [single, per_task, dmoerm]\nseed: 0\n")
    _write_json(folder / "versions.json", {"prefmoe": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"})
    return folder


def made_up_pair(*, swap: bool = False) -> dict[str, object]:
    """An entry of `examples.json`; swapped, the model disagrees with the label."""
    good = {"empathy": 1.31, "proactivity": 0.9, "logic": -0.12}
    poor = {"empathy": -0.84, "proactivity": -0.2, "logic": 0.25}
    sides = [
        {"text": CHOSEN, "reward": 1.12, "task": "advice", "capabilities": good},
        {"text": REJECTED, "reward": -0.57, "task": "advice", "capabilities": poor},
    ]
    chosen, rejected = reversed(sides) if swap else sides
    return {"prompt": PROMPT, "task": "advice", "chosen": chosen, "rejected": rejected}


def _write_curves(folder: Path, rng: np.random.Generator) -> None:
    gold = rng.normal(size=(60, 64))
    trust = {"single": 0.35, "per_task": 0.6, "dmoerm": 0.85}
    curves = {
        method: curve(share * gold + rng.normal(size=gold.shape), gold, [1, 2, 4, 8, 16, 32, 64])
        for method, share in trust.items()
    }
    write_run_file(folder / "best_of_n.json", curves)


def _write_log(folder: Path, rng: np.random.Generator) -> None:
    lines: list[dict[str, object]] = [
        {"step": 0, "phase": "data", "split": split, "pairs": pairs, "truncated": truncated, "equal": equal}
        for split, pairs, truncated, equal in [
            ("train", 900, 4, 0),
            ("validation", 90, 0, 0),
            ("test", 120, 3, 1),
        ]
    ]
    for phase, (start, end, last) in {
        "shared": (0.72, 0.6, 60),
        "phase1": (0.72, 0.45, 200),
        "phase2": (0.7, 0.5, 300),
    }.items():
        for step in range(0, last + 1, 5):
            loss = end + (start - end) * math.exp(-4 * step / last) + 0.01 * rng.normal()
            lines.append({"step": step, "phase": phase, "loss": loss, "learning_rate": 1e-4})
            if step % 20 == 0:
                each = {f"eval_accuracy/{task}": 1.05 - 0.75 * loss + 0.02 * rng.normal() for task in TASKS}
                mean = sum(each.values()) / len(each)
                lines.append(
                    {"step": step, "phase": phase, "eval_loss": loss + 0.05, "eval_accuracy": mean, **each}
                )
        lines.append({"step": last, "phase": phase, "train_loss": 0.5, "train_runtime": 12.0})
    evidence = {"evidence/task_head": 0.61, "evidence/linear_scores": 0.625, "evidence/mlp": 0.55}
    lines += [
        {"step": 0, "phase": "phase3", "task": task, "kept": "linear_scores", **evidence} for task in TASKS
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
