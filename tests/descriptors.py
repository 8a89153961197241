"""How many descriptors a process has open, for tests that none is left behind."""

from __future__ import annotations

import gc
import os

from twisted.internet import reactor
from twisted.internet.task import deferLater


def descriptors(pid: int | str = "self") -> int:
    """How many are open now.

    Of ours without those that only the garbage of earlier tests holds: the collector may come for
    them at any time.
    """
    if pid == "self":
        gc.collect()
    return len(os.listdir(f"/proc/{pid}/fd"))


async def until_at_most(number: int, pid: int | str = "self") -> None:
    """Wait for a count as low as `number`.

    Another process, and a thread, closes its own after it has answered. What stays open is found
    by the test's time limit.
    """
    while descriptors(pid) > number:
        await deferLater(reactor, 0.01)
