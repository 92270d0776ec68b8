"""Rate limits, waiting after faults, budgets: by a clock that the test turns."""

import asyncio
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmoe.labeling.judge.budget import Budget, Prices
from prefmoe.labeling.judge.pace import Backoff, RateLimit, retry_after
from prefmoe.labeling.judge.store import Spent


class Clock:
    """Time passes only by sleeping."""

    now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds


def starts(calls, **limits):
    """When calls with so many tokens each begin, one after the other."""
    clock = Clock()
    limit = RateLimit(clock=clock, sleep=clock.sleep, **limits)

    async def run():
        found = []
        for tokens in calls:
            await limit.wait(tokens)
            found.append(clock.now)
        return found

    return asyncio.run(run())


def test_requests_are_spaced_evenly():
    assert starts([1, 1, 1], requests_per_minute=30) == [0, 2, 4]


def test_tokens_are_spaced_by_their_number():
    assert starts([100, 50, 1], tokens_per_minute=600) == [0, 10, 15]


def test_the_stricter_limit_counts():
    assert starts([1, 1], requests_per_minute=60, tokens_per_minute=30) == [0, 2]


def test_without_limits_nobody_waits():
    assert starts([10**9] * 3) == [0, 0, 0]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 600), st.integers(500, 5000))
def test_no_minute_ever_holds_more_than_allowed(calls, requests, tokens):
    times = starts(calls, requests_per_minute=requests, tokens_per_minute=tokens)
    for start in times:
        minute = [i for i, at in enumerate(times) if start <= at < start + 60 - 1e-6]
        assert len(minute) <= requests
        # The last call of a minute may begin within it and reach over its end.
        assert sum(calls[i] for i in minute[:-1]) <= tokens


def test_everybody_waits_when_the_endpoint_asks_for_it():
    clock = Clock()
    limit = RateLimit(clock=clock, sleep=clock.sleep)
    limit.hold(7)
    limit.hold(3)
    asyncio.run(limit.wait(1))
    assert clock.now == 7


def test_nobody_waits_for_an_asking_that_is_over():
    naps = []

    async def over(seconds):
        naps.append(seconds)
        return True

    limit = RateLimit(clock=Clock(), sleep=over)
    limit.hold(7)
    asyncio.run(limit.wait(1))
    assert naps == [7]  # and not again, though the clock stands still


@pytest.mark.parametrize("attempt", range(12))
def test_waits_double_are_random_and_end_somewhere(attempt):
    waits = {Backoff(first=1, longest=60).delay(attempt) for _ in range(50)}
    assert max(waits) <= min(2**attempt, 60)
    assert len(waits) == 50


def test_what_the_endpoint_asks_for_is_the_least_wait():
    waits = [Backoff(longest=60).delay(0, 5.0) for _ in range(50)]
    assert min(waits) >= 5
    assert max(waits) <= 6
    assert Backoff(longest=60).delay(0, 1e9) <= 601


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": formatdate(1_000_060, usegmt=True)}, 60),
        ({"retry-after": formatdate(999_000, usegmt=True)}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_how_long_a_reply_asks_to_wait(headers, seconds):
    assert retry_after(headers, now=1_000_000) == seconds


def test_prices_are_for_a_million_tokens():
    assert Prices(input=2, output=10).cost(500_000, 100_000) == 2.0


def test_a_budget_counts_earlier_sittings_and_the_worst_case_of_open_calls():
    async def run():
        budget = Budget(Spent(3, 0, 0, 0.5), max_usd=1.0)
        assert await budget.reserve(0.3)
        waiting = asyncio.create_task(budget.reserve(0.3))
        await asyncio.sleep(0)
        assert not waiting.done()  # 0.5 + 0.3 + 0.3 is too much, but the open call may turn out cheaper
        budget.settle(0.3, 0.1)
        assert await waiting
        budget.settle(0.3, None)  # was not answered: costs nothing
        assert budget.usd == pytest.approx(0.6)
        assert not await budget.reserve(0.5)

    asyncio.run(run())


def test_a_budget_of_calls_is_never_exceeded():
    async def run():
        budget = Budget(Spent(2, 0, 0, 0.0), max_calls=10)
        done = 0

        async def work():
            nonlocal done
            while await budget.reserve(0.0):
                await asyncio.sleep(0)
                budget.settle(0.0, 0.0)
                done += 1

        await asyncio.gather(*(work() for _ in range(5)))
        return done, budget.calls

    assert asyncio.run(run()) == (8, 10)
