"""`popdrop.deadlines`: many limits by one timer."""

from __future__ import annotations

from math import ceil

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from popdrop.deadlines import STEP, Deadlines, Place


class Guest:
    """Notes when its time came; `again`: for how many seconds it then asks anew, once each."""

    def __init__(self, deadlines: Deadlines, clock: Clock, *again: float) -> None:
        self.deadlines, self.clock = deadlines, clock
        self.again = list(again)
        self.ticks: list[float] = []
        self.place: Place | None = None

    def tick(self) -> None:
        self.ticks.append(self.clock.seconds())
        self.place = None
        if self.again:
            self.place = self.deadlines.put(self, self.again.pop(0))


class DeadlinesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.deadlines = Deadlines(self.clock)  # type: ignore[arg-type]

    def guest(self, seconds: float, *again: float) -> Guest:
        guest = Guest(self.deadlines, self.clock, *again)
        guest.place = self.deadlines.put(guest, seconds)
        return guest

    def leave(self, guest: Guest) -> None:
        assert guest.place is not None
        self.deadlines.drop(guest, guest.place)
        guest.place = None

    def test_at_its_time_and_not_before(self) -> None:
        guest = self.guest(60)
        self.clock.advance(59.9)
        self.assertEqual(guest.ticks, [])
        self.clock.advance(0.1)
        self.assertEqual(guest.ticks, [60.0])

    def test_an_earlier_one_comes_later(self) -> None:
        late, early = self.guest(600), self.guest(10)
        self.clock.advance(10)
        self.assertEqual((early.ticks, late.ticks), ([10.0], []))
        self.clock.advance(590)
        self.assertEqual(late.ticks, [600.0])

    def test_one_timer_for_all_and_none_for_nobody(self) -> None:
        guests = [self.guest(seconds) for seconds in (60, 60, 10, 600)]
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        for guest in guests:
            self.leave(guest)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.clock.advance(1000)
        self.assertEqual([guest.ticks for guest in guests], [[]] * 4)

    def test_one_that_leaves_while_another_ticks(self) -> None:
        first, second = self.guest(5), self.guest(5)
        # Whichever comes first has given up its place; the other leaves by itself.
        first.tick = lambda: self._only(first, second)  # type: ignore[method-assign]
        second.tick = lambda: self._only(second, first)  # type: ignore[method-assign]
        self.clock.advance(5)
        self.assertEqual(len(first.ticks) + len(second.ticks), 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def _only(self, ticking: Guest, other: Guest) -> None:
        ticking.place = None
        ticking.ticks.append(self.clock.seconds())
        if other.place is not None:
            self.leave(other)

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(
        st.lists(
            st.tuples(st.floats(0, 100), st.floats(0, 700), st.lists(st.floats(0, 50), max_size=2)),
            max_size=12,
        ),
        st.lists(st.floats(0.01, 40), min_size=1, max_size=60),
        st.sets(st.integers(0, 11)),
    )
    def test_never_early_and_a_second_late_at_most(
        self,
        guests: list[tuple[float, float, list[float]]],
        steps: list[float],
        leaving: set[int],
    ) -> None:
        """However they come and go; who leaves is left alone."""
        clock = Clock()
        deadlines = Deadlines(clock)  # type: ignore[arg-type]
        waiting = sorted(enumerate(guests), key=lambda each: each[1][0])
        here: list[tuple[Guest, float, float, list[float]]] = []
        gone: list[tuple[Guest, int]] = []
        for step in [*steps, 1000.0]:
            while waiting and waiting[0][1][0] <= clock.seconds():
                number, (_, seconds, again) = waiting.pop(0)
                guest = Guest(deadlines, clock, *again)
                guest.place = deadlines.put(guest, seconds)
                here.append((guest, clock.seconds(), seconds, again))
                if number in leaving:
                    deadlines.drop(guest, guest.place)
                    gone.append((guest, len(guest.ticks)))
            clock.advance(step)
            for guest, came, seconds, _ in here:
                if any(guest is each for each, _ in gone):
                    continue
                due = came + seconds
                if guest.ticks:
                    self.assertGreaterEqual(guest.ticks[0], due)
                else:
                    self.assertLess(clock.seconds(), ceil(due / STEP) * STEP)
        for guest, ticks in gone:
            self.assertEqual(len(guest.ticks), ticks)
