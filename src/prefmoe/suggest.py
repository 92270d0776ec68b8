"""'Did you mean': the nearest known name to an unknown one."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of the known names, None if none comes near."""
    matches = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
