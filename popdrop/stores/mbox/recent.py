"""`Recent`: photographs of spools that have not changed since, for clients that come again.

Most logins find nothing new. A spool whose facts (device, inode, size, mtime, ctime) are those of a
photograph taken under both locks, when the last write was some seconds old, holds what it held:
nobody has written to it, and nobody is in the middle of it. It is neither locked nor read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final, NamedTuple

from popdrop.listing import Listing
from popdrop.stores.mbox.spans import Spans
from popdrop.stores.mbox.spool import Key

MESSAGES: Final = 200_000
"""Messages remembered in all: 31 octets each, and 38 more once their ids are known; 14 MB."""
SPOOLS: Final = 20_000
"""Spools remembered, each about 1 KB with an empty photograph; 20 MB."""


class Photograph(NamedTuple):
    """What a spool held when its facts were `key`."""

    key: Key
    spans: Spans
    listing: Listing
    proven: int = 0
    """As in `index.Known`: messages before this one were scanned in an earlier state."""


class Recent:
    """The last photographs of many spools, by path. May be used from any thread."""

    def __init__(self, messages: int = MESSAGES, spools: int = SPOOLS) -> None:
        self._messages = messages
        self._spools = spools
        self._count = 0
        self._known: OrderedDict[str, Photograph] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, path: str, key: Key) -> Photograph | None:
        """The photograph of this file in this state, `None` if it has changed or is not known."""
        with self._guard:
            known = self._known.get(path)
            if known is None:
                return None
            if known.key != key:
                self._drop(path)
                return None
            self._known.move_to_end(path)
            return known

    def put(self, path: str, photograph: Photograph) -> None:
        """Remember it; those that were not asked for longest are forgotten for it."""
        count = len(photograph.spans)
        with self._guard:
            self._drop(path)
            if count > self._messages:
                return
            self._known[path] = photograph
            self._count += count
            while self._count > self._messages or len(self._known) > self._spools:
                self._drop(next(iter(self._known)))

    def forget(self, path: str) -> None:
        """What is known of it is not to be believed any more."""
        with self._guard:
            self._drop(path)

    def _drop(self, path: str) -> None:
        known = self._known.pop(path, None)
        if known is not None:
            self._count -= len(known.spans)
