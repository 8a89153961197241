"""`--throttle`: how many connections may stay, and how late a failed login is answered.

Nothing here waits, refuses a login or slows down a success: `delay` tells the shell when it answers
a failure. All counts are in memory, of this process, and bounded.

*By address* (IPv4 address, IPv6 /64): the first failures are answered after 1, 2, 4, 8 and 15
seconds. One failure is forgotten in each fifth of `fade`, so five and more are all forgotten after
`fade` seconds. An attempt under way counts as a failure, so that parallel guesses are no cheaper
than guesses in a row. A wrong secret that this address has tried before tells a guesser nothing
new (and comes from a forgotten phone, for weeks): it counts once.

*By user*: one more second for every five failures, at most four; they fade as fast. An address that
logged in as this user within 30 days is spared, so nobody can make the owner wait. Names are taken
in lower case.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Generator
from functools import lru_cache
from ipaddress import IPv6Address
from math import ceil
from typing import Any, Final, Self

from twisted.internet.interfaces import IAddress, IReactorTime
from zope.interface import implementer

from popdrop.errors import ConfigError
from popdrop.interfaces import IThrottle, ITicket
from popdrop.spec import parse
from popdrop.values import normalised

STEPS: Final = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds after which an address's first, second, ... failure is answered."""

FLOOR: Final = 1.0
"""Seconds after which any failure is answered, so that the cost of its checks does not show."""

USER_FAILURES_PER_SECOND: Final = 5
USER_SECONDS: Final = 4
"""Most seconds that failures of a user add, wherever they came from."""

USER_FAILURES: Final = USER_FAILURES_PER_SECOND * USER_SECONDS

NAME_OCTETS: Final = 64
"""What of a name is looked at; no account's is longer."""

KNOWN_FOR: Final = 30 * 86400.0
"""Seconds for which an address that logged in as a user is spared that user's delay."""

PROOFS: Final = 16
"""Different wrong secrets remembered by address."""

OUTCOMES: Final = frozenset({"good", "bad", "void"})

DEFAULTS: Final = {"total": 1000, "per-address": 50, "per-user": 20, "fade": 600, "tracked": 16384}
"""`tracked`: so many addresses, users and pairs of both are remembered, the oldest go first.

An address costs 0.4 KB, with 16 wrong secrets 1.5 KB; a user 0.3 KB; a pair 0.3 KB (measured).
"""


def from_spec(text: str, clock: IReactorTime) -> Memory | Off:
    """What `--throttle text` describes: `off`, or `memory` with keywords. Raises `ConfigError`."""
    spec = parse("--throttle", text)
    if spec.kind == "off" and not spec.args and not spec.kwargs:
        return Off()
    example = "for example memory:total=2000:per-address=100"
    if spec.kind != "memory" or spec.args:
        raise ConfigError(
            f"--throttle {text}: off, memory or memory:KEY=NUMBER is needed; {example}"
        )
    numbers = dict(DEFAULTS)
    for key, word in spec.kwargs.items():
        if key not in DEFAULTS:
            allowed = ", ".join(f"{name}=" for name in DEFAULTS)
            raise ConfigError(
                f"--throttle {text}: {key}= is unknown, {allowed} are known; {example}"
            )
        if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word)):
            raise ConfigError(f"--throttle {text}: {key}={word} is no number above 0; {example}")
        numbers[key] = int(word)
    return Memory(
        clock,
        total=numbers["total"],
        per_address=numbers["per-address"],
        per_user=numbers["per-user"],
        fade=numbers["fade"],
        tracked=numbers["tracked"],
    )


@lru_cache(maxsize=4096)
def network(host: str) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 /64 (RFC 6177)."""
    address = normalised(host)
    if ":" not in address:
        return address
    try:
        packed = IPv6Address(address).packed
    except ValueError:
        return address
    return f"{IPv6Address(packed[:8] + bytes(8))}/64"


def _key(peer: IAddress) -> str | None:
    """`None` for a peer without an IP address: a local one, without limits by address."""
    host = getattr(peer, "host", None)
    return network(host) if isinstance(host, str) else None


class _Count:
    """Failures of one address or user, fading with time."""

    __slots__ = ("failures", "proofs", "since", "under_way")

    def __init__(self, now: float) -> None:
        self.failures = 0.0
        self.since = now
        self.under_way = 0
        self.proofs: list[bytes] | None = None

    def fade(self, now: float, rate: float) -> None:
        """`rate` is in failures per second. A clock that goes back forgets nothing."""
        if self.failures and now > self.since:
            self.failures = max(0.0, self.failures - (now - self.since) * rate)
        self.since = now

    def fail(self, now: float, rate: float, most: int) -> None:
        self.fade(now, rate)
        self.failures = min(self.failures + 1, most)

    def tried(self, proof: bytes | None) -> bool:
        """Whether this wrong secret was tried from here before."""
        return self.proofs is not None and proof in self.proofs

    def remember(self, proof: bytes | None) -> None:
        """Keep the proof of a wrong secret; the oldest goes when there are too many."""
        if proof is None:
            return
        if self.proofs is None:
            self.proofs = [proof]
        else:
            self.proofs.append(proof)
            del self.proofs[:-PROOFS]


class _Ready:
    """A ticket that is there at once: awaiting it takes no turn of the reactor."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, Self]:
        yield from ()
        return self


@implementer(ITicket)
class _FreeTicket(_Ready):
    """The ticket of a throttle that counts nothing."""

    __slots__ = ()

    def close(self, outcome: str) -> None:
        pass


@implementer(ITicket)
class _Ticket(_Ready):
    __slots__ = ("_owner", "address", "key", "proof", "user", "user_count", "weight")

    def __init__(
        self,
        owner: Memory,
        key: str | None,
        address: _Count | None,
        user: bytes,
        user_count: _Count,
        proof: bytes | None,
    ) -> None:
        self._owner: Memory | None = owner
        self.key = key
        self.address = address
        self.user = user
        self.user_count = user_count
        self.proof = proof
        self.weight = 0 if address is not None and address.tried(proof) else 1
        if address is not None:
            address.under_way += self.weight
        user_count.under_way += self.weight

    def close(self, outcome: str) -> None:
        if outcome not in OUTCOMES:
            raise ValueError(outcome)
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._closed(self, outcome)


@implementer(IThrottle)
class Memory:
    """Counts in the memory of this process. Every call costs the same, however many are tracked.

    `proof_key` is the random key under which proofs are made.
    """

    floor: float = FLOOR

    def __init__(
        self,
        clock: IReactorTime,
        total: int,
        per_address: int,
        fade: float,
        tracked: int,
        per_user: int = DEFAULTS["per-user"],
    ) -> None:
        self.proof_key = os.urandom(32)
        self._seconds = clock.seconds
        self._total = total
        self._per_address = per_address
        self._per_user = per_user
        self._rate = len(STEPS) / fade
        self._user_rate = USER_FAILURES / fade
        self._fade = fade
        self._tracked = tracked
        self._connected = 0
        self._connections: dict[str, int] = {}
        self._entered: dict[bytes, int] = {}
        self._addresses: OrderedDict[str, _Count] = OrderedDict()
        self._users: OrderedDict[bytes, _Count] = OrderedDict()
        self._known: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    def admit(self, peer: IAddress) -> bool:
        if self._connected >= self._total:
            return False
        key = _key(peer)
        if key is not None:
            here = self._connections.get(key, 0)
            if here >= self._per_address:
                return False
            self._connections[key] = here + 1
        self._connected += 1
        return True

    def leave(self, peer: IAddress) -> None:
        key = _key(peer)
        if key is not None:
            here = self._connections[key]
            if here > 1:
                self._connections[key] = here - 1
            else:
                del self._connections[key]
        self._connected -= 1

    def enter(self, user: bytes) -> bool:
        here = self._entered.get(user, 0)
        if here >= self._per_user:
            return False
        self._entered[user] = here + 1
        return True

    def quit(self, user: bytes) -> None:
        here = self._entered[user]
        if here > 1:
            self._entered[user] = here - 1
        else:
            del self._entered[user]

    def attempt(self, peer: IAddress, user: bytes, proof: bytes | None) -> _Ticket:
        now = self._seconds()
        user = user[:NAME_OCTETS].lower()
        key = _key(peer)
        address = None if key is None else self._count(self._addresses, key, now)
        return _Ticket(self, key, address, user, self._count(self._users, user, now), proof)

    def delay(self, peer: IAddress, user: bytes) -> float:
        now = self._seconds()
        user = user[:NAME_OCTETS].lower()
        key = _key(peer)
        seconds = FLOOR
        address = None if key is None else self._addresses.get(key)
        if address is not None:
            address.fade(now, self._rate)
            failures = ceil(address.failures) + address.under_way
            if failures:
                seconds = STEPS[min(failures, len(STEPS)) - 1]
        count = self._users.get(user)
        if count is not None and not self._knows(key, user, now):
            count.fade(now, self._user_rate)
            failures = ceil(count.failures) + count.under_way
            seconds += min(failures // USER_FAILURES_PER_SECOND, USER_SECONDS)
        return seconds

    def _knows(self, key: str | None, user: bytes, now: float) -> bool:
        since = None if key is None else self._known.get((key, user))
        return since is not None and now - since < KNOWN_FOR

    def _count(self, counts: OrderedDict[Any, _Count], key: object, now: float) -> _Count:
        count = counts.get(key)
        if count is not None:
            counts.move_to_end(key)
            return count
        # Two at most go for one that comes, so that a call stays cheap and the table shrinks.
        for _ in range(2):
            if not counts:
                break
            first = next(iter(counts))
            oldest = counts[first]
            faded = now - oldest.since > self._fade and not oldest.under_way
            if not faded and len(counts) < self._tracked:
                break
            del counts[first]
        count = counts[key] = _Count(now)
        return count

    def _closed(self, ticket: _Ticket, outcome: str) -> None:
        now = self._seconds()
        address, count = ticket.address, ticket.user_count
        count.under_way -= ticket.weight
        if address is not None:
            address.under_way -= ticket.weight
        if outcome == "good" and ticket.key is not None:
            self._note(ticket.key, ticket.user, now)
        # Asked again, since the same may have been tried in parallel.
        elif outcome == "bad" and not (address is not None and address.tried(ticket.proof)):
            count.fail(now, self._user_rate, USER_FAILURES)
            if address is not None:
                address.fail(now, self._rate, len(STEPS))
                address.remember(ticket.proof)
        if address is not None:
            _drop_if_clean(self._addresses, ticket.key, address)
        _drop_if_clean(self._users, ticket.user, count)

    def _note(self, key: str, user: bytes, now: float) -> None:
        """This address logged in as this user."""
        self._known[key, user] = now
        self._known.move_to_end((key, user))
        if len(self._known) > self._tracked:
            self._known.popitem(last=False)


@implementer(IThrottle)
class Off:
    """No limits, no delays, and no floor either (decision 24)."""

    floor: float = 0.0

    def __init__(self) -> None:
        self.proof_key = os.urandom(32)

    def admit(self, peer: IAddress) -> bool:
        return True

    def leave(self, peer: IAddress) -> None:
        pass

    def enter(self, user: bytes) -> bool:
        return True

    def quit(self, user: bytes) -> None:
        pass

    def attempt(self, peer: IAddress, user: bytes, proof: bytes | None) -> _FreeTicket:
        return _FreeTicket()

    def delay(self, peer: IAddress, user: bytes) -> float:
        return 0.0


def _drop_if_clean(counts: OrderedDict[Any, _Count], key: object, count: _Count) -> None:
    """A success leaves nothing behind, unless there were failures."""
    if not (count.failures or count.under_way or count.proofs) and counts.get(key) is count:
        del counts[key]
