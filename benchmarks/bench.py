"""What all scenarios share: rows of the table, how much is done, the spools of every peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks import tools
from benchmarks.corpus import Corpus
from benchmarks.generator import Generator, Run
from benchmarks.peers import Peer
from benchmarks.process import NotApplicable

SESSION_USERS = 32
SMALL = 10
"""Messages in the maildrop of a session."""


@dataclass(frozen=True)
class Figure:
    """One row of the table. `value` makes the figure from a run."""

    title: str
    value: Callable[[Run], float]
    less_is_better: bool
    release: float | None = None
    goal: float | None = None
    digits: int = 1
    may_bind: bool = True
    """Whether a generator near a whole core casts doubt on the row. It says nothing of a time that
    is only part of what the generator did."""
    limit: float | None = None
    """What Popdrop's own figure must not exceed, whatever the peers need."""
    base: Callable[[Run], float] | None = None
    """What of Dovecot's run the ratio is to, where that is not the figure itself."""


@dataclass(frozen=True)
class Sizes:
    """How much is done: the short form, or the long one."""

    runs: int
    messages: int
    """In the spool of RETR, TOP and DELE."""
    large: int
    """Octets of the spool that is opened; with `large_messages`, so many messages instead."""
    sessions: int
    seconds: float
    """Begin nothing new after so long: slow peers do less, not longer."""
    large_messages: int | None = None


SHORT = Sizes(runs=3, messages=10_000, large=500_000_000, sessions=3000, seconds=1.5)
LONG = Sizes(runs=7, messages=20_000, large=1_090_000_000, sessions=15_000, seconds=8.0)


class Bench:
    """All peers, one generator, the spools."""

    def __init__(self, generator: Generator, sizes: Sizes) -> None:
        self.generator = generator
        self.sizes = sizes
        self.small, _ = tools.spool(messages=SMALL)
        self.drop, _ = tools.spool(messages=sizes.messages)
        self.empty = tools.empty_spool()
        self.large: Path | None = None
        self.large_messages = 0
        self.opened: dict[str, str] = {}
        """By a peer's key: the user whose large maildrop it has seen last."""
        self._new = iter(Corpus(seed=2))
        self._arrived: list[bytes] = []

    def users(self) -> list[str]:
        """Every user that the scenarios need."""
        large = [f"big{i}" for i in range(self.sizes.runs)]
        others = ["probe", "drop", "gone", "empty", "cold"]
        return [f"s{i}" for i in range(SESSION_USERS)] + others + large

    def furnish(self, peer: Peer) -> None:
        """The maildrops that stay."""
        for i in range(SESSION_USERS):
            peer.place(self.small, f"s{i}")
        peer.place(self.small, "probe")
        peer.place(self.drop, "drop")
        peer.place(self.empty, "empty")

    def place_large(self, peer: Peer, user: str) -> None:
        """A fresh large maildrop at a path that this server has never seen: no index."""
        if self.large is None:
            wanted = self.sizes.large_messages
            octets = self.sizes.large if wanted is None else None
            self.large, self.large_messages = tools.spool(wanted, octets)
        peer.place(self.large, user)

    def arriving(self, start: int, stop: int) -> list[bytes]:
        """Messages of an endless row (0-based) that is in no spool, the same for every peer."""
        self._arrived += islice(self._new, max(stop - len(self._arrived), 0))
        return self._arrived[start:stop]

    def large_of(self, peer: Peer) -> str:
        """The user of the large maildrop that `open` has left. Raises `NotApplicable`."""
        user = self.opened.get(peer.key)
        if user is None:
            raise NotApplicable
        return user
