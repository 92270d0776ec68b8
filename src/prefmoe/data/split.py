"""Splits by prompt: seeded, the same for any order of the rows, no prompt in two parts."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import isclose

from prefmoe.errors import ConfigError
from prefmoe.records import Messages, PreferencePair


def prompt_key(prompt: Messages) -> str:
    """Text by which two prompts count as the same: roles and contents, letter case and white space aside."""
    return "\n".join(f"{message.role}: {' '.join(message.content.casefold().split())}" for message in prompt)


def prompt_hash(prompt: Messages, *, seed: int = 0) -> int:
    """64-bit hash of `prompt_key`, the same in every process."""
    text = f"{seed}\n{prompt_key(prompt)}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def split_by_prompt(
    pairs: Sequence[PreferencePair], fractions: dict[str, float], *, seed: int
) -> dict[str, list[PreferencePair]]:
    """Splits pairs so that no prompt stands in two parts.

    Every task is split in the given proportions on its own, as closely as whole prompts allow.

    Args:
        pairs: What to split. Their order does not change which part a pair gets.
        fractions: Share of each part, for example `{"train": 0.9, "validation": 0.1}`; they sum to 1.
        seed: Another seed gives another split.

    Returns:
        The pairs of each part, in the order of `pairs`. Every pair is in exactly one part.

    Raises:
        ConfigError: The fractions are not positive or do not sum to 1.
    """
    if (
        not fractions
        or min(fractions.values()) <= 0
        or not isclose(sum(fractions.values()), 1.0, abs_tol=1e-9)
    ):
        raise ConfigError(f"split fractions {fractions} do not work; expected positive numbers that sum to 1")
    parts: dict[str, list[PreferencePair]] = {name: [] for name in fractions}
    names = list(fractions)
    for pair, part in zip(pairs, _assign(pairs, list(fractions.values()), seed=seed), strict=True):
        parts[names[part]].append(pair)
    return parts


def folds_by_prompt(pairs: Sequence[PreferencePair], num_folds: int, *, seed: int) -> list[int]:
    """Fold of each pair, 0 to num_folds - 1; a prompt is in one fold; each task is spread evenly.

    Raises:
        ConfigError: Fewer than two folds.
    """
    if num_folds < 2:
        raise ConfigError(f"num_folds={num_folds} cannot be cross-fitted; choose 2 or more")
    return _assign(pairs, [1.0 / num_folds] * num_folds, seed=seed)


def _assign(pairs: Sequence[PreferencePair], shares: list[float], *, seed: int) -> list[int]:
    """Index of the part of each pair: prompts in hash order, each to the part that lacks most pairs."""
    hashes = [prompt_hash(pair.prompt, seed=seed) for pair in pairs]
    sizes = Counter(hashes)
    task_of: dict[int, str] = {}
    for pair, key in zip(
        pairs, hashes, strict=True
    ):  # a prompt of several tasks counts for the first by name
        task_of[key] = min(task_of.get(key, pair.task or ""), pair.task or "")
    part_of: dict[int, int] = {}
    filled: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(shares))
    for key in sorted(sizes):
        counts = filled[task_of[key]]
        goal = sum(counts) + sizes[key]
        part = max(range(len(shares)), key=lambda index: shares[index] * goal - counts[index])
        counts[part] += sizes[key]
        part_of[key] = part
    return [part_of[key] for key in hashes]
