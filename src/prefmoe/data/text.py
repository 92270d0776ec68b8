"""Two helpers of the readers: how values are quoted in messages, how far two sequences agree."""

from collections.abc import Sequence
from itertools import takewhile

_SHOWN_CHARACTERS = 40


def short(value: object) -> str:
    """`repr(value)`, cut to what fits into a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Number of leading items that are equal in both sequences."""
    same = takewhile(lambda items: items[0] == items[1], zip(first, second, strict=False))
    return sum(1 for _ in same)
