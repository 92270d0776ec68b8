"""What calls cost, and when to stop: no call begins that could take the costs over the limit."""

import asyncio
from dataclasses import dataclass

from prefmoe.labeling.judge.store import Spent


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars for a million tokens read, and for a million written."""

    input: float = 0.0
    output: float = 0.0

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """US dollars."""
        return (self.input * input_tokens + self.output * output_tokens) / 1_000_000


class Budget:
    """Counts calls and dollars, those of earlier sittings included, and those of calls that are under way.

    A call under way counts with the most it can cost, until what it did cost is known.

    Args:
        spent: What the store says of earlier sittings.
        max_calls: Answered calls; None is no limit.
        max_usd: US dollars; None is no limit.
    """

    def __init__(self, spent: Spent, *, max_calls: int | None = None, max_usd: float | None = None) -> None:
        self.calls, self.usd = spent.calls, spent.usd
        self._max_calls, self._max_usd = max_calls, max_usd
        self._open_calls, self._open_usd = 0, 0.0
        self._settled = asyncio.Event()

    async def reserve(self, usd: float) -> bool:
        """Whether another call that costs at most `usd` may begin; waits for calls under way if they decide."""
        while not self._fits(usd):
            if not self._open_calls:
                return False
            self._settled.clear()
            await self._settled.wait()
        self._open_calls += 1
        self._open_usd += usd
        return True

    def settle(self, reserved: float, usd: float | None) -> None:
        """A call is over that had `reserved`; it cost `usd`, or was not answered (None)."""
        self._open_calls -= 1
        self._open_usd = self._open_usd - reserved if self._open_calls else 0.0
        if usd is not None:
            self.calls += 1
            self.usd += usd
        self._settled.set()

    def _fits(self, usd: float) -> bool:
        if self._max_calls is not None and self.calls + self._open_calls >= self._max_calls:
            return False
        return self._max_usd is None or self.usd + self._open_usd + usd <= self._max_usd
