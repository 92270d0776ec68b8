"""What is in a set of pairs, as plain numbers."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from prefmoe.data.split import prompt_key
from prefmoe.records import Messages, PreferencePair

NO_TASK = "(no task)"


def describe_pairs(pairs: Iterable[PreferencePair]) -> dict[str, dict[str, Any]]:
    """Numbers of each task, by task name.

    Returns:
        For each task: `pairs`, `prompts` (distinct), `characters` (median of prompt, chosen, rejected),
        `chosen_longer` (share of pairs in [0, 1], equal lengths count one half), `with_margin` (pairs with a
        target margin above 0), `capabilities` (for each name how often chosen, rejected, neither is better).
    """
    by_task: defaultdict[str, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        by_task[pair.task or NO_TASK].append(pair)
    return {task: _describe_task(by_task[task]) for task in sorted(by_task)}


def _describe_task(pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    lengths = [tuple(map(_num_characters, (pair.prompt, pair.chosen, pair.rejected))) for pair in pairs]
    parts = zip(("prompt", "chosen", "rejected"), zip(*lengths, strict=True), strict=True)
    return {
        "pairs": len(pairs),
        "prompts": len({prompt_key(pair.prompt) for pair in pairs}),
        "characters": {part: median(values) for part, values in parts},
        "chosen_longer": fmean(
            (chosen > rejected) + 0.5 * (chosen == rejected) for _, chosen, rejected in lengths
        ),
        "with_margin": sum(pair.target_margin > 0 for pair in pairs),
        "capabilities": _count_labels(pairs),
    }


def _count_labels(pairs: Sequence[PreferencePair]) -> dict[str, dict[str, int]]:
    counts: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for pair in pairs:
        for name, side in pair.capabilities.items():
            counts[name][side] += 1
    return {
        name: {"chosen": count[1], "rejected": count[-1], "tie": count[0]}
        for name, count in sorted(counts.items())
    }


def _num_characters(messages: Messages) -> int:
    return sum(len(message.content) for message in messages)
