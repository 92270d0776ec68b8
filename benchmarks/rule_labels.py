"""How often each rule of a tasks file tells the sides of a pair apart, and agrees with people where it does.

python benchmarks/rule_labels.py ../shared/data/preferences/train.jsonl.gz --tasks configs/tasks-real.yaml
python benchmarks/rule_labels.py ../shared/data/preferences/train.jsonl.gz --every-rule
"""

import argparse

from rich.console import Console
from rich.table import Table

from prefmoe.data.read import read_pairs
from prefmoe.labeling import RULES, LabelCounts, RuleLabeler, apply_labels, count_labels, load_tasks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs")
    parser.add_argument("--tasks", default="configs/tasks-real.yaml")
    parser.add_argument("--every-rule", action="store_true", help="every rule on every task of the pairs")
    args = parser.parse_args()

    pairs = read_pairs(args.pairs)
    every_rule = {pair.task: list(RULES) for pair in pairs if pair.task}
    labeler = RuleLabeler(every_rule) if args.every_rule else RuleLabeler.from_tasks(load_tasks(args.tasks))
    table = Table("task", "capability", "pairs", "separation", "agreement")
    for counts in sorted(count_labels(apply_labels(pairs, [labeler], keep_existing=False)), key=_order):
        agreement = "-" if counts.agreement is None else f"{counts.agreement:.3f}"
        table.add_row(
            counts.task, counts.capability, str(counts.pairs), f"{counts.separation:.3f}", agreement
        )
    Console().print(table)


def _order(counts: LabelCounts) -> tuple[str, float]:
    return counts.task or "", -counts.separation * abs((counts.agreement or 0.5) - 0.5)


if __name__ == "__main__":
    main()
