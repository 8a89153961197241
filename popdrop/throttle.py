"""`--throttle`: how many connections may stay, and how late a failed login is answered.

Nothing here waits, refuses a login or slows down a success: `delay` tells the shell when it answers
a failure. `Throttle` has the rules; the counts are bounded, and are kept in memory by `Memory` and
in a table of several processes by `Shared`. Over 400 lines for there being both.

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
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator
from functools import lru_cache
from ipaddress import IPv6Address
from math import ceil
from typing import Any, Final, Protocol, Self

from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from popdrop.errors import ConfigError
from popdrop.interfaces import IThrottle, ITicket
from popdrop.sharedcounts import (
    PROOFS,
    Numbers,
    Table,
    attach,
    make_anonymous,
    open_table,
    since_boot,
)
from popdrop.spec import Spec, parse
from popdrop.values import normalised

log = Logger()

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

OUTCOMES: Final = frozenset({"good", "bad", "void"})

DEFAULTS: Final = {"total": 1000, "per-address": 50, "per-user": 20, "fade": 600, "tracked": 16384}
"""`tracked`: so many addresses, users and pairs of both are remembered, the oldest go first.

An address costs 0.4 KB, with 16 wrong secrets 1.5 KB; a user 0.3 KB; a pair 0.3 KB (measured).
"""


def rates(fade: float) -> tuple[tuple[float, int], tuple[float, int]]:
    """Failures that fade in a second, and how many count at most: of an address, and of a user."""
    return (len(STEPS) / fade, len(STEPS)), (USER_FAILURES / fade, USER_FAILURES)


def from_spec(
    text: str, clock: IReactorTime, owners: tuple[int, ...] = (), table: int | None = None
) -> Throttle | Off:
    """What `--throttle text` describes: `off`, or `memory` or `shared:PATH` with keywords.

    `owners` are the uids that the file of `shared` may belong to; none: ours. `shared` has a clock
    of its own, which all processes share. `table` is a descriptor of `common_table`, of which the
    counts of `memory` are then. Raises `ConfigError`.
    """
    spec, limits = _parsed(text)
    if limits is None:
        return Off()
    if spec.kind == "shared":
        return Shared.open(os.path.abspath(spec.args[0]), limits, owners=owners)
    return Memory(clock, limits) if table is None else Shared.attach(table)


def common_table(text: str) -> int | None:
    """A table for processes that inherit its descriptor, where `--throttle text` is `memory`.

    Other kinds need none: `None`. Raises `ConfigError`.
    """
    spec, limits = _parsed(text)
    return None if limits is None or spec.kind != "memory" else make_anonymous(limits)


def _parsed(text: str) -> tuple[Spec, Numbers | None]:
    """The string and its limits; `None` for `off`."""
    spec = parse("--throttle", text)
    if spec.kind == "off" and not spec.args and not spec.kwargs:
        return spec, None
    example = "for example memory:total=2000:per-address=100"
    places = {"memory": 0, "shared": 1}.get(spec.kind)
    if places is None or len(spec.args) != places or not all(spec.args):
        raise ConfigError(
            f"--throttle {text}: off, memory[:KEY=NUMBER...] or shared:PATH[:KEY=NUMBER...] is"
            f" needed; {example}"
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
    return spec, Numbers(**{key.replace("-", "_"): number for key, number in numbers.items()})


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


class Count(Protocol):
    """Failures of one address or user, fading with time, and its attempts under way."""

    failures: float
    """Those that had not faded at the time `since`, in seconds."""
    since: float

    @property
    def under_way(self) -> int:
        """Attempts that are not closed yet."""
        ...

    @property
    def clean(self) -> bool:
        """Whether nothing would be lost with it."""
        ...

    def begin(self, weight: int) -> None:
        """So many more are under way."""
        ...

    def end(self, weight: int) -> None:
        """So many less."""
        ...

    def tried(self, proof: bytes | None) -> bool:
        """Whether this wrong secret was tried from here before."""
        ...

    def remember(self, proof: bytes | None) -> None:
        """Keep the proof of a wrong secret; the oldest goes when there are too many."""
        ...


class Counts(Protocol):
    """Counts by name, so many at most."""

    def get(self, name: Any) -> Any:
        """The count, `None` where there is none."""
        ...

    def make(self, name: Any, now: float) -> Any:
        """The count, made if there is none; another may go for it."""
        ...

    def renewed(self, count: Any, now: float) -> Any:
        """What to write to, of a count that may have been forgotten meanwhile."""
        ...

    def drop(self, name: Any, count: Any) -> None:
        """Forget it."""
        ...


class Present(Protocol):
    """Connections by name."""

    def here(self, name: Any) -> int:
        """How many it has."""
        ...

    def come(self, name: Any) -> None:
        """One more."""
        ...

    def go(self, name: Any) -> None:
        """One less."""
        ...


class Times(Protocol):
    """When each was there last, so many at most."""

    def get(self, name: Any) -> float | None:
        """Seconds; `None` where it never was."""
        ...

    def note(self, name: Any, now: float) -> None:
        """It is there now."""
        ...


def _fade(count: Count, now: float, rate: float) -> float:
    """The failures left. `rate` is in failures per second; a clock that goes back forgets none."""
    failures, since = count.failures, count.since
    count.since = now
    if failures and now > since:
        failures = count.failures = max(0.0, failures - (now - since) * rate)
    return failures


def _fail(count: Count, now: float, rate: float, most: int) -> None:
    count.failures = min(_fade(count, now, rate) + 1, most)


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
        owner: Throttle,
        key: str | None,
        address: Count | None,
        user: bytes,
        user_count: Count,
        proof: bytes | None,
    ) -> None:
        self._owner: Throttle | None = owner
        self.key = key
        self.address = address
        self.user = user
        self.user_count = user_count
        self.proof = proof
        self.weight = 0 if address is not None and address.tried(proof) else 1
        if address is not None:
            address.begin(self.weight)
        user_count.begin(self.weight)

    def close(self, outcome: str) -> None:
        if outcome not in OUTCOMES:
            raise ValueError(outcome)
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._closed(self, outcome)


@implementer(IThrottle)
class Throttle(ABC):
    """The rules, over counts that are kept somewhere else."""

    floor: float = FLOOR
    path = ""
    """Of the file that the counts are in."""

    def __init__(
        self,
        numbers: Numbers,
        seconds: Callable[[], float],
        proof_key: bytes,
        *,
        connections: Present,
        entered: Present,
        addresses: Counts,
        users: Counts,
        known: Times,
    ) -> None:
        self.proof_key = proof_key
        self._seconds = seconds
        self._total = numbers.total
        self._per_address = numbers.per_address
        self._per_user = numbers.per_user
        (self._rate, _), (self._user_rate, _) = rates(numbers.fade)
        self._connections = connections
        self._entered = entered
        self._addresses = addresses
        self._users = users
        self._known = known

    @abstractmethod
    def hand_over(self, uid: int, gid: int) -> None:
        """Give a file that root made to another user; -1 for `gid` leaves it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the counts. Idempotent."""

    @property
    @abstractmethod
    def _connected(self) -> int:
        """Connections in all."""

    @abstractmethod
    def _come(self) -> None:
        """One more."""

    @abstractmethod
    def _go(self) -> None:
        """One less."""

    def admit(self, peer: IAddress) -> bool:
        if self._connected >= self._total:
            return False
        key = _key(peer)
        if key is not None:
            if self._connections.here(key) >= self._per_address:
                return False
            self._connections.come(key)
        self._come()
        return True

    def leave(self, peer: IAddress) -> None:
        key = _key(peer)
        if key is not None:
            self._connections.go(key)
        self._go()

    def enter(self, user: bytes) -> bool:
        if self._entered.here(user) >= self._per_user:
            return False
        self._entered.come(user)
        return True

    def quit(self, user: bytes) -> None:
        self._entered.go(user)

    def attempt(self, peer: IAddress, user: bytes, proof: bytes | None) -> _Ticket:
        now = self._seconds()
        user = user[:NAME_OCTETS].lower()
        key = _key(peer)
        address = None if key is None else self._addresses.make(key, now)
        return _Ticket(self, key, address, user, self._users.make(user, now), proof)

    def delay(self, peer: IAddress, user: bytes) -> float:
        now = self._seconds()
        user = user[:NAME_OCTETS].lower()
        key = _key(peer)
        seconds = FLOOR
        address = None if key is None else self._addresses.get(key)
        if address is not None:
            failures = ceil(_fade(address, now, self._rate)) + address.under_way
            if failures:
                seconds = STEPS[min(failures, len(STEPS)) - 1]
        count = self._users.get(user)
        if count is not None and not self._knows(key, user, now):
            failures = ceil(_fade(count, now, self._user_rate)) + count.under_way
            seconds += min(failures // USER_FAILURES_PER_SECOND, USER_SECONDS)
        return seconds

    def _knows(self, key: str | None, user: bytes, now: float) -> bool:
        since = None if key is None else self._known.get((key, user))
        return since is not None and now - since < KNOWN_FOR

    def _closed(self, ticket: _Ticket, outcome: str) -> None:
        now = self._seconds()
        count = self._users.renewed(ticket.user_count, now)
        count.end(ticket.weight)
        address = ticket.address
        if address is not None:
            address = self._addresses.renewed(address, now)
            address.end(ticket.weight)
        if outcome == "good" and ticket.key is not None:
            self._known.note((ticket.key, ticket.user), now)
        # Asked again, since the same may have been tried in parallel.
        elif outcome == "bad" and not (address is not None and address.tried(ticket.proof)):
            _fail(count, now, self._user_rate, USER_FAILURES)
            if address is not None:
                _fail(address, now, self._rate, len(STEPS))
                address.remember(ticket.proof)
        # A success leaves nothing behind, unless there were failures.
        if address is not None and address.clean:
            self._addresses.drop(ticket.key, address)
        if count.clean:
            self._users.drop(ticket.user, count)


class _Count:
    __slots__ = ("failures", "proofs", "since", "under_way")

    def __init__(self, now: float) -> None:
        self.failures = 0.0
        self.since = now
        self.under_way = 0
        self.proofs: list[bytes] | None = None

    def begin(self, weight: int) -> None:
        self.under_way += weight

    def end(self, weight: int) -> None:
        self.under_way -= weight

    def tried(self, proof: bytes | None) -> bool:
        return self.proofs is not None and proof in self.proofs

    def remember(self, proof: bytes | None) -> None:
        if proof is None:
            return
        if self.proofs is None:
            self.proofs = [proof]
        else:
            self.proofs.append(proof)
            del self.proofs[:-PROOFS]

    @property
    def clean(self) -> bool:
        return not (self.failures or self.under_way or self.proofs)


class _Counts(OrderedDict[Any, _Count]):
    """The least recently used goes first."""

    def __init__(self, tracked: int, fade: float) -> None:
        super().__init__()
        self._tracked = tracked
        self._fade = fade

    def make(self, name: Any, now: float) -> _Count:
        count = self.get(name)
        if count is not None:
            self.move_to_end(name)
            return count
        # Two at most go for one that comes, so that a call stays cheap and the table shrinks.
        for _ in range(2):
            if not self:
                break
            first = next(iter(self))
            oldest = self[first]
            faded = now - oldest.since > self._fade and not oldest.under_way
            if not faded and len(self) < self._tracked:
                break
            del self[first]
        count = self[name] = _Count(now)
        return count

    def renewed(self, count: _Count, now: float) -> _Count:
        return count

    def drop(self, name: Any, count: _Count) -> None:
        if self.get(name) is count:
            del self[name]


class _Present(dict[Any, int]):
    def here(self, name: Any) -> int:
        return self.get(name, 0)

    def come(self, name: Any) -> None:
        self[name] = self.get(name, 0) + 1

    def go(self, name: Any) -> None:
        here = self[name]
        if here > 1:
            self[name] = here - 1
        else:
            del self[name]


class _Times(OrderedDict[Any, float]):
    def __init__(self, tracked: int) -> None:
        super().__init__()
        self._tracked = tracked

    def note(self, name: Any, now: float) -> None:
        self[name] = now
        self.move_to_end(name)
        if len(self) > self._tracked:
            self.popitem(last=False)


class Memory(Throttle):
    """Counts in the memory of this process. Every call costs the same, however many are tracked.

    `proof_key` is the random key under which proofs are made.
    """

    _connected = 0

    def __init__(self, clock: IReactorTime, numbers: Numbers) -> None:
        super().__init__(
            numbers,
            clock.seconds,
            os.urandom(32),
            connections=_Present(),
            entered=_Present(),
            addresses=_Counts(numbers.tracked, numbers.fade),
            users=_Counts(numbers.tracked, numbers.fade),
            known=_Times(numbers.tracked),
        )

    def hand_over(self, uid: int, gid: int) -> None:
        """There is no file to give away."""

    def close(self) -> None:
        """There is nothing to let go of."""

    def _come(self) -> None:
        self._connected += 1

    def _go(self) -> None:
        self._connected -= 1


class Shared(Throttle):
    """Counts in a table that several processes have mapped (`sharedcounts`).

    No call waits for another process longer than 5 ms, and that only if it was stopped in a call
    of its own. Processes that are gone count no more, after a second at most.
    """

    def __init__(self, table: Table) -> None:
        super().__init__(
            table.header.numbers,
            table.seconds,
            table.header.proof_key,
            connections=table.connections,
            entered=table.entered,
            addresses=table.addresses,
            users=table.users,
            known=table.known,
        )
        self._table = table
        self._told = 0

    @classmethod
    def open(
        cls,
        path: str,
        numbers: Numbers,
        seconds: Callable[[], float] = since_boot,
        owners: tuple[int, ...] = (),
    ) -> Self:
        """The table in a file, made if there is none. Raises `ConfigError`.

        `owners` are the uids that the file may belong to; none: ours. `seconds` is a clock that all
        processes share.
        """
        made = cls(open_table(path, numbers, rates, seconds, owners))
        made.path = path
        return made

    @classmethod
    def anonymous(
        cls, numbers: Numbers, seconds: Callable[[], float] = since_boot
    ) -> tuple[Self, int]:
        """A table in memory, and a descriptor for `attach` in children that inherit it.

        The descriptor is the caller's to close; it is closed on exec unless the caller hands it on.
        """
        descriptor = make_anonymous(numbers)
        return cls.attach(descriptor, seconds), descriptor

    @classmethod
    def attach(cls, descriptor: int, seconds: Callable[[], float] = since_boot) -> Self:
        """The table behind a descriptor of `anonymous`, in this process. Raises `ConfigError`.

        To be called in each process: a fork inherits its parent's place in the table.
        """
        return cls(attach(descriptor, rates, seconds))

    def hand_over(self, uid: int, gid: int) -> None:
        if os.fstat(self._table.descriptor).st_uid == 0:
            os.fchown(self._table.descriptor, uid, gid)

    def close(self) -> None:
        self._table.close()

    @property
    def _connected(self) -> int:
        return self._table.connected

    def _come(self) -> None:
        self._table.come()

    def _go(self) -> None:
        self._table.go()

    def admit(self, peer: IAddress) -> bool:
        with self._table:
            if super().admit(peer):
                return True
            # Before anybody is turned away, the dead are looked for.
            self._table.sweep()
            return super().admit(peer)

    def leave(self, peer: IAddress) -> None:
        with self._table:
            super().leave(peer)

    def enter(self, user: bytes) -> bool:
        with self._table:
            if super().enter(user):
                return True
            self._table.sweep()
            return super().enter(user)

    def quit(self, user: bytes) -> None:
        with self._table:
            super().quit(user)

    def attempt(self, peer: IAddress, user: bytes, proof: bytes | None) -> _Ticket:
        with self._table:
            return super().attempt(peer, user, proof)

    def delay(self, peer: IAddress, user: bytes) -> float:
        with self._table:
            return super().delay(peer, user)

    def _closed(self, ticket: _Ticket, outcome: str) -> None:
        with self._table:
            super()._closed(ticket, outcome)
        if self._table.missed > self._told:
            self._tell()

    def _tell(self) -> None:
        if not self._told:
            log.warn(
                "{where}: a process that has it does not move; counting goes on without its lock",
                where=self._table.where,
            )
        self._told = self._table.missed


@implementer(IThrottle)
class Off:
    """No limits, no delays, and no floor either (decision 24)."""

    floor: float = 0.0
    path = ""

    def __init__(self) -> None:
        self.proof_key = os.urandom(32)

    def hand_over(self, uid: int, gid: int) -> None:
        """There is no file."""

    def close(self) -> None:
        """There is nothing to let go of."""

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
