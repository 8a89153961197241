"""How often something may be tried: counts that run down with time, by key.

The helper's own (decision 19): a process that talks to strangers is not asked to count for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from heapq import nlargest
from typing import Final

from popdrop.accounts.helperwire import Kind

BURST: Final = 30.0
"""Failures of one name, or of an unknown one, that cost no delay..."""
FORGIVEN: Final = 10.0
"""...of which one is forgotten in so many seconds. The server's own throttle is stricter; this one
is for a server that has been taken over."""
SPACING: Final = 4.0
"""Seconds between two tries of a name that has failed more often: decision 24's "at most 4 s"."""
PATIENCE: Final = 20.0
"""Seconds that a try may have to wait behind others of its name; else it is not made at all."""
NAMES: Final = 10_000
"""Names whose failures are remembered; of more, the half with fewer failures is forgotten.

So a flood of names that fail once each does not wash away one that fails often, as the oldest would
be. It takes 10 ms, for each 5000 new names.
"""


class Budget:
    """Counts that run down with time, by key. May be used from any thread."""

    def __init__(self, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._clock = clock
        self._levels: dict[Hashable, tuple[float, float]] = {}
        self._guard = threading.Lock()

    def spend(self, key: Hashable, amount: float = 1.0) -> bool:
        """Add `amount` to the count of `key`. Whether it is still within the burst."""
        with self._guard:
            now = self._clock()
            level, then = self._levels.pop(key, (0.0, now))
            level = max(0.0, level - (now - then) / FORGIVEN) + amount
            self._levels[key] = (max(0.0, level), now)
            if len(self._levels) > NAMES:
                self._forget(now)
            return level <= self._burst

    def _forget(self, now: float) -> None:
        left = {key: level - (now - then) / FORGIVEN for key, (level, then) in self._levels.items()}
        kept = nlargest(NAMES // 2, left, key=left.__getitem__)
        self._levels = {key: self._levels[key] for key in kept if left[key] > 0}

    def refund(self, key: Hashable) -> None:
        """Take back one `spend`."""
        self.spend(key, -1.0)


class Pace:
    """When the next try of a name may be made.

    Each counts as a failure until it is known not to be one, so that many at once gain nothing.
    No right password is ever refused for the failures of others, only late (decision 24).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._budget = Budget(BURST, clock)
        self._next: dict[bytes, float] = {}

    def begin(self, name: bytes) -> float | None:
        """Seconds to wait before the try; `None`: too many of this name wait already."""
        if self._budget.spend(name):
            self._next.pop(name, None)
            return 0.0
        now = self._clock()
        if len(self._next) >= NAMES:
            self._next = {each: at for each, at in self._next.items() if at > now}
        begins = max(now, self._next.get(name, now))
        if begins - now > PATIENCE:
            self._budget.refund(name)
            return None
        self._next[name] = begins + SPACING
        return begins - now

    def end(self, name: bytes, kind: Kind) -> None:
        """The try that `begin` allowed has come to this."""
        if kind not in (Kind.BAD, Kind.NO_SUCH_USER):
            self._budget.refund(name)
