"""Asking from where an event loop runs already, such as a notebook."""

import asyncio
import contextlib
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_alone(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`; where a loop runs already, a thread has a second one, and the first stands still meanwhile.

    Raises:
        KeyboardInterrupt: Ctrl-C; from a thread it does not wait for what is under way.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    tasks: list[asyncio.Task[Any] | None] = []

    async def known() -> T:
        tasks.append(asyncio.current_task())
        return await main

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(asyncio.run, known())
        try:
            return result.result()
        except KeyboardInterrupt:
            for task in filter(None, tasks):
                with contextlib.suppress(RuntimeError):  # it has just ended by itself
                    task.get_loop().call_soon_threadsafe(task.cancel)
            raise
