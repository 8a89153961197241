"""Octets of files that are in memory already, read in the reactor: without a thread, and without
waiting. Where commands wait, what they ask for next is read along."""

from __future__ import annotations

import os
from typing import Final

AT_ONCE: Final = 131_072
"""Octets of one read: as much as is written at once (`protocol.WRITE_SIZE`), and some more."""


class Window:
    """What was read last, of one file, and for whom. One of these serves all maildrops."""

    def __init__(self, size: int = AT_ONCE) -> None:
        self._view = memoryview(bytearray(size))
        self._owner: object = None
        self._start = self._stop = 0

    def get(self, owner: object, offset: int, length: int) -> bytes | None:
        """Octets of the file of `owner`, if what was read for it last holds them all."""
        start = offset - self._start
        if self._owner is not owner or start < 0 or offset + length > self._stop:
            return None
        return self._view[start : start + length].tobytes()

    def read(self, owner: object, fd: int, offset: int, length: int, reach: int = 0) -> bytes:
        """What of `length` octets at `offset` is in memory. Raises `OSError`.

        If `reach` is more than `length`, up to so many are read and kept for `get`.
        """
        self._owner = None
        view = self._view[: max(length, reach)]
        count = os.preadv(fd, [view], offset, os.RWF_NOWAIT) if len(view) else 0
        if reach > length:
            self._owner, self._start, self._stop = owner, offset, offset + count
        return view[: min(count, length)].tobytes()

    def forget(self, owner: object) -> None:
        """The file of `owner` may have changed, or is another from now on."""
        if self._owner is owner:
            self._owner = None
