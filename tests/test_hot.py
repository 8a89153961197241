"""`popdrop.hot`: no octet of another file, place or time."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.hot import Window

SIZE = 64
"""Of the window, and so that a few octets are not all of it."""
LONGEST = 40
"""As messages: what is asked for fits into the window."""

places = st.tuples(st.integers(0, 3), st.integers(0, 230), st.integers(0, LONGEST))
steps = st.one_of(
    st.tuples(st.just("read"), places, st.integers(0, 3 * SIZE)),
    st.tuples(st.just("get"), places, st.just(0)),
    st.tuples(st.just("forget"), places, st.just(0)),
)


class WindowTests(SynchronousTestCase):
    def setUp(self) -> None:
        read = os.preadv
        # Not every file system knows RWF_NOWAIT: that of memfd_create(2) does not.
        self.patch(os, "preadv", lambda fd, views, offset, flags: read(fd, views, offset))
        self.files: list[Any] = []
        self.octets: list[bytes] = []
        for number in range(4):
            octets = bytes((number << 6 | place % 61) for place in range(200 + number))
            fd = os.memfd_create("spool")
            self.addCleanup(os.close, fd)
            os.write(fd, octets)
            self.files.append(fd)
            self.octets.append(octets)

    def test_what_was_read_along(self) -> None:
        window, owner = Window(SIZE), object()
        fd, octets = self.files[1], self.octets[1]
        self.assertEqual(window.read(owner, fd, 10, 5, 30), octets[10:15])
        self.assertEqual(window.get(owner, 10, 5), octets[10:15])
        self.assertEqual(window.get(owner, 15, 25), octets[15:40])
        for offset, length in ((9, 5), (40, 1), (30, 11), (0, 1)):
            self.assertIsNone(window.get(owner, offset, length))
        self.assertIsNone(window.get(object(), 15, 25))

    def test_the_end_of_the_file(self) -> None:
        window, owner = Window(SIZE), object()
        fd, octets = self.files[0], self.octets[0]
        self.assertEqual(window.read(owner, fd, 190, 5, 60), octets[190:195])
        self.assertEqual(window.get(owner, 195, 5), octets[195:])
        self.assertIsNone(window.get(owner, 195, 6))
        self.assertEqual(window.read(owner, fd, 195, 20, 60), octets[195:])

    def test_nothing_is_kept_that_was_not_asked_for(self) -> None:
        window, owner = Window(SIZE), object()
        window.read(owner, self.files[0], 0, 20)
        self.assertIsNone(window.get(owner, 0, 20))

    def test_a_read_that_fails(self) -> None:
        """What was there may be overwritten already."""
        window, owner = Window(SIZE), object()
        window.read(owner, self.files[0], 0, 5, 50)
        with self.assertRaises(OSError):
            window.read(owner, -1, 0, 5, 50)
        self.assertIsNone(window.get(owner, 0, 5))

    @given(st.lists(steps, max_size=30))
    def test_any_order(self, done: list[tuple[str, tuple[int, int, int], int]]) -> None:
        window = Window(SIZE)
        owners = [object() for _ in self.files]
        kept: tuple[int, int, int] | None = None
        for what, (number, offset, length), reach in done:
            owner, octets = owners[number], self.octets[number]
            wanted = octets[offset : offset + length]
            if what == "read":
                found = window.read(owner, self.files[number], offset, length, reach)
                self.assertEqual(found, wanted)
                stop = min(offset + min(reach, SIZE), max(len(octets), offset))
                kept = (number, offset, stop) if reach > length else None
            elif what == "get":
                known = kept is not None and kept[0] == number
                known = known and kept[1] <= offset and offset + length <= kept[2]  # type: ignore[index]
                self.assertEqual(window.get(owner, offset, length), wanted if known else None)
            else:
                window.forget(owner)
                kept = None if kept is not None and kept[0] == number else kept
