"""Tokenized texts of a run."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from prefmoe.data.render import Encoded, Renderer
from prefmoe.data.split import prompt_hash
from prefmoe.errors import DataError, join_problems
from prefmoe.records import PreferencePair


class PairRow(NamedTuple):
    """A preference pair as numbers: two texts of a `TextTable` and what is known of them."""

    chosen: int
    rejected: int
    prompt: int = 0  # hash; pairs of one prompt stay together when pairs are split
    label: float = 1.0  # probability that `chosen` is better
    weight: float = 1.0
    target_margin: float = 0.0


@dataclass
class TextTable:
    """Every distinct tokenized text once, numbered."""

    texts: list[Encoded] = field(default_factory=list)
    _ids: dict[tuple[tuple[int, ...], int], int] = field(default_factory=dict)

    def add(self, text: Encoded) -> int:
        """Number of the text, a new one if it was not there."""
        key = (text.input_ids, text.prompt_length)
        if key not in self._ids:
            self._ids[key] = len(self.texts)
            self.texts.append(text)
        return self._ids[key]

    def length(self, text: int) -> int:
        """Tokens of a text."""
        return len(self.texts[text].input_ids)

    def key(self, text: int) -> str:
        """Hash of a text's token ids, the same in every run."""
        ids = self.texts[text].input_ids
        return hashlib.blake2b(b",".join(b"%d" % i for i in ids), digest_size=12).hexdigest()


def prompt_of(text: Encoded) -> Encoded:
    """The prompt of a text, cut as it is there."""
    return text._replace(input_ids=text.input_ids[: text.prompt_length])


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs with their rows in a table.

    Attributes:
        pairs: The pairs that could be used.
        rows: One row a pair.
        num_truncated: Pairs that lost tokens of their prompt or completion.
        num_equal: Pairs whose sides became equal; they count as ties (only where `allow_equal`).
    """

    pairs: list[PreferencePair]
    rows: list[PairRow]
    num_truncated: int = 0
    num_equal: int = 0


def encode_pairs(
    pairs: Iterable[PreferencePair], renderer: Renderer, table: TextTable, *, allow_equal: bool = False
) -> EncodedPairs:
    """Tokenizes pairs into a table.

    Args:
        pairs: What to tokenize.
        renderer: The rendering of the model.
        table: Where the texts go.
        allow_equal: Keep (True, for evaluation: such a pair is a tie) or refuse pairs whose sides became equal.

    Raises:
        DataError: pairs that cannot be used, all of them named.
    """
    kept: list[PreferencePair] = []
    rows: list[PairRow] = []
    problems: list[str] = []
    num_truncated = num_equal = 0
    for pair in pairs:
        try:
            sides = [renderer.encode(pair.prompt, side) for side in (pair.chosen, pair.rejected)]
        except DataError as problem:
            problems.append(f"pair {pair.id!r}: {problem}")
            continue
        num_truncated += any(side.truncated_tokens for side in sides)
        chosen, rejected = (table.add(side) for side in sides)
        num_equal += chosen == rejected
        if chosen == rejected and not allow_equal:
            problems.append(
                f"pair {pair.id!r}: both sides are equal after truncation to max_length={renderer.max_length}; "
                "raise max_length or drop the pair"
            )
            continue
        kept.append(pair)
        prompt = prompt_hash(pair.prompt)
        rows.append(PairRow(chosen, rejected, prompt, weight=pair.weight, target_margin=pair.target_margin))
    if problems:
        raise DataError(join_problems(problems))
    return EncodedPairs(kept, rows, num_truncated, num_equal)
