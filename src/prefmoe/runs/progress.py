"""Progress for people: how a long step says how far it is, without knowing where it is shown."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[float], None]
Progress = Callable[[str, float], AbstractContextManager[Advance]]
"""`with progress("what", total) as advance: ... advance(amount)`"""


@contextmanager
def silent(_: str, __: float) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda amount: None
