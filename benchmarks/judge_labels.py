r"""Phase 2 trained on rules, on a judge's labels, and on both: the same pairs, only the labels differ.

    prefmoe label ../shared/data/preferences/train.jsonl.gz -o runs/labels/train.jsonl --tasks configs/tasks-real.yaml \
        --judge local:smollm2-135m --limit 300 --no-ties --max-characters 240 --calibrate
    python benchmarks/judge_labels.py runs/labels/train.jsonl [--config configs/real-cpu.yaml] [--out runs/judge-labels]
    python benchmarks/judge_labels.py runs/labels/train.jsonl --soft-labels --out runs/judge-soft

For each kind one config is written (`<out>/<kind>.yaml`) and `prefmoe reward train` run on it, one after the other; a
killed benchmark goes on with the same command. Where a judge left a task without labels, that task has no capability
experts, which training says; where it left some pairs of a point without, that expert has fewer pairs and steps. The
validation pairs have the labels of rules or none: then an expert keeps its last state in place of its best. At the end
the accuracies of the models stand side by side. With `--soft-labels` a judge's probabilities are learned from in place
of its labels, also where its two orders disagree; `prefmoe label` writes them with `--confidence`. `--dry-run` writes
the configs and files only.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

KINDS = ("rules", "judge", "both")
JUDGED = ("capabilities", "capability_probabilities", "labeled_by")


def rows_of(kind, rows):
    """The training rows with the labels of that kind; rules are added by training itself."""
    if kind != "rules":
        return rows
    return [{k: v for k, v in row.items() if k not in JUDGED} for row in rows]


def config_of(kind, base, folder, *, train, soft):
    data = base["data"] | {
        "train": str(train),
        "labels": "columns" if kind == "judge" else "rules",
        "soft_labels": soft and kind != "rules",
        "max_pairs_per_task": None,
    }
    return base | {"data": data, "methods": ["per_task", "dmoerm"], "out": str(folder / kind)}


def prepare(labelled, config, folder, *, soft=False):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in labelled.read_text(encoding="utf-8").splitlines()]
    base = yaml.safe_load(config.read_text(encoding="utf-8"))
    for kind in KINDS:
        train = folder / f"{kind}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(kind, rows))
        train.write_text(text, encoding="utf-8")
        content = config_of(kind, base, folder, train=train, soft=soft)
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("labelled", type=Path, help="what `prefmoe label` wrote")
    parser.add_argument("--config", type=Path, default=Path("configs/real-cpu.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/judge-labels"))
    parser.add_argument("--soft-labels", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    prepare(options.labelled, options.config, options.out, soft=options.soft_labels)
    if options.dry_run:
        return
    for kind in KINDS:
        subprocess.run(
            [sys.executable, "-m", "prefmoe", "reward", "train", str(options.out / f"{kind}.yaml")],
            check=True,
        )
    for kind in KINDS:
        methods = json.loads((options.out / kind / "metrics.json").read_text(encoding="utf-8"))["methods"]
        print(kind, {name: round(values["macro"], 4) for name, values in methods.items()})


if __name__ == "__main__":
    main()
