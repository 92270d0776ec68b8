"""How fast to ask, and how long to wait after a fault."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

_MINUTE = 60.0


class RateLimit:
    """Spaces calls evenly, so that a minute never holds more requests or tokens than allowed.

    Args:
        requests_per_minute: None is no limit.
        tokens_per_minute: Read and written; None is no limit.
        clock: Seconds that only go up. Tests give their own, and their own `sleep`.
        sleep: Waits that many seconds; true if there is no more reason to wait.
    """

    def __init__(
        self,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._per_request = _MINUTE / requests_per_minute if requests_per_minute else 0.0
        self._per_token = _MINUTE / tokens_per_minute if tokens_per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next_request = self._next_token = self._held_until = float("-inf")

    async def wait(self, tokens: int) -> None:
        """Until a call with that many tokens may begin."""
        start = max(self._clock(), self._next_request, self._next_token)
        self._next_request = start + self._per_request
        self._next_token = start + self._per_token * tokens
        while (left := max(start, self._held_until) - self._clock()) > 0:
            if await self._sleep(left):
                return

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long: the endpoint said that it has enough."""
        self._held_until = max(self._held_until, self._clock() + seconds)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often to try, and how long to wait in between: twice as long each time, and a random share of it.

    Attributes:
        attempts: Tries in all.
        first: Longest wait after the first fault, seconds.
        longest: Longest wait ever, seconds; what an endpoint asks for (`Retry-After`) is kept up to ten times it.
    """

    attempts: int = 8
    first: float = 1.0
    longest: float = 60.0

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds to wait after the fault of try number `attempt`, counted from 0.

        Source:
            "Full jitter" of Brooker 2015, "Exponential Backoff And Jitter", AWS Architecture Blog: callers that failed
            together do not come back together.
        """
        spread = random.uniform(0.0, min(self.longest, self.first * 2.0**attempt))
        if retry_after is None:
            return spread
        return min(retry_after, 10 * self.longest) + min(spread, self.first)


def retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Seconds that the headers of a reply ask to wait: milliseconds, seconds or a date; None if they say nothing.

    Source:
        RFC 9110, section 10.2.3; `retry-after-ms` is OpenAI's and Azure's.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < float("inf") else None
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, date.timestamp() - (time.time() if now is None else now))
