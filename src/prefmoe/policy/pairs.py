"""Preference pairs as a policy is trained on them: one prompt, two completions, token ids."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prefmoe.data.read import read_pairs
from prefmoe.data.render import Renderer
from prefmoe.errors import DataError
from prefmoe.policy.settings import DataSettings
from prefmoe.records import PreferencePair
from prefmoe.suggest import nearest


class TokenPair(NamedTuple):
    """A pair, rendered."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    preference: str
    prompt: str  # what tells prompts apart, for intervals


class Text(NamedTuple):
    """A prompt and one completion."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenPairs:
    """The pairs of a split.

    Attributes:
        num_truncated: How many lost tokens to fit.
    """

    rows: list[TokenPair]
    num_truncated: int = 0

    def texts(self) -> list[Text]:
        """All chosen, then all rejected."""
        chosen = [Text(row.prompt_ids, row.chosen_ids) for row in self.rows]
        return chosen + [Text(row.prompt_ids, row.rejected_ids) for row in self.rows]

    def one_side(self) -> list[Text]:
        """One text of each pair, chosen and rejected in turn."""
        return [
            Text(row.prompt_ids, row.rejected_ids if i % 2 else row.chosen_ids)
            for i, row in enumerate(self.rows)
        ]


def preference_of(pair: PreferencePair) -> str | None:
    """What a pair is a pair of."""
    return pair.preference or pair.task


def read_splits(settings: DataSettings, *, seed: int) -> tuple[list[str], dict[str, list[PreferencePair]]]:
    """The preferences, and the pairs of every split, as many as the settings allow.

    Raises:
        DataError: A split cannot be read; no row names a preference; or a wanted one has no training pair.
    """
    limits = {
        "train": (settings.train, settings.max_pairs_per_preference),
        "validation": (settings.validation, settings.max_validation_pairs_per_preference),
        "test": (settings.test, settings.max_test_pairs_per_preference),
    }
    read = {name: read_pairs(source, split=name) if source else [] for name, (source, _) in limits.items()}
    found = sorted({name for pair in read["train"] if (name := preference_of(pair))})
    if not found:
        raise DataError("no row has a 'preference' (or 'task'), so there is nothing to mix", settings.train)
    for name in settings.preferences or ():
        if name not in found:
            meant = nearest(name, found)
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise DataError(
                f"no pair of preference {name!r}; there are {', '.join(found)}{hint}", settings.train
            )
    preferences = settings.preferences or found
    splits = {}
    for name, (_, limit) in limits.items():
        by_preference = {p: [pair for pair in read[name] if preference_of(pair) == p] for p in preferences}
        splits[name] = [pair for rows in by_preference.values() for pair in draw(rows, limit, seed)]
    return preferences, splits


def draw(rows: Sequence[PreferencePair], limit: int | None, seed: int) -> list[PreferencePair]:
    """At most `limit` rows, drawn by seed."""
    return (
        list(rows) if limit is None or len(rows) <= limit else random.Random(seed).sample(list(rows), limit)
    )


def encode(pairs: Sequence[PreferencePair], renderer: Renderer, *, allow_equal: bool) -> TokenPairs:
    """Renders pairs so that both completions follow the same prompt: the shorter of what truncation left of it.

    Args:
        pairs: To render.
        renderer: Knows template and length limit.
        allow_equal: Whether sides may have become equal by truncation (then they count as ties).

    Raises:
        DataError: A completion is empty, or sides became equal; the pairs are named.
    """
    rows, truncated, equal = [], 0, []
    for pair in pairs:
        chosen, rejected = (renderer.encode(pair.prompt, side) for side in (pair.chosen, pair.rejected))
        shorter = min(chosen, rejected, key=lambda text: text.prompt_length)
        row = TokenPair(
            shorter.input_ids[: shorter.prompt_length],
            chosen.input_ids[chosen.prompt_length :],
            rejected.input_ids[rejected.prompt_length :],
            preference_of(pair) or "",
            "\n".join(message.content for message in pair.prompt),
        )
        truncated += bool(chosen.truncated_tokens or rejected.truncated_tokens)
        if row.chosen_ids == row.rejected_ids:
            equal.append(pair.id)
        rows.append(row)
    if equal and not allow_equal:
        raise DataError(
            f"{len(equal)} training pairs have equal sides once they are cut to {renderer.max_length} tokens: "
            f"{', '.join(equal[:5])}; raise max_length or drop them"
        )
    return TokenPairs(rows, truncated)
