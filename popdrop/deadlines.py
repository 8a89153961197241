"""`Deadlines`: the time limits of many connections, kept by one timer.

A delayed call of Twisted's own costs half a kilobyte and is the greater part of what can be spared
of an idle connection; a place here costs some 60 octets.
"""

from __future__ import annotations

from math import ceil
from typing import Final, Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime

STEP: Final = 1.0
"""Seconds to whose next multiple a limit is rounded up: so late may it be, and never early."""


class Limited(Protocol):
    """Whoever has a time limit."""

    def tick(self) -> None:
        """The time has come; the place here is given up already."""


Place = set[Limited]
"""All whose time comes at the same moment; what `put` gives and `drop` takes."""


class Deadlines:
    """`clock` is the reactor, or a clock for tests."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._places: dict[int, Place] = {}
        self._count = 0
        self._call: IDelayedCall | None = None
        self._at = 0

    def put(self, who: Limited, seconds: float) -> Place:
        """Call `who.tick()` in so many seconds. It must have no other place here."""
        at = ceil((self._clock.seconds() + seconds) / STEP)
        place = self._places.setdefault(at, set())
        place.add(who)
        self._count += 1
        if self._call is None or at < self._at:
            self._wake(at)
        return place

    def drop(self, who: Limited, place: Place) -> None:
        """Do not call it."""
        place.remove(who)
        self._count -= 1
        if not self._count:
            self._places.clear()
            self._wake(None)

    def _wake(self, at: int | None) -> None:
        call, self._call = self._call, None
        if call is not None and call.active():
            call.cancel()
        if at is not None:
            self._at = at
            wait = max(0.0, at * STEP - self._clock.seconds())
            self._call = self._clock.callLater(wait, self._look)

    def _look(self) -> None:
        self._call = None
        now = self._clock.seconds()
        for at in sorted(at for at in self._places if at * STEP <= now):
            place = self._places.pop(at)
            while place:
                self._count -= 1
                place.pop().tick()
        # Whoever ticks may have found a new place, and with it a timer for a later moment.
        earliest = min(self._places, default=None)
        if earliest is not None:
            self._wake(earliest)
