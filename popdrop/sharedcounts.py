"""Counts in a file that several processes have mapped: who is here, and who failed how often.

One of them may be killed at any moment, also while it writes:

- Whoever looks or writes holds one lock on the whole table, of its open file description (fcntl(2),
  F_OFD_SETLK), which the kernel takes back from the dead. It is held for microseconds. Where it is
  not to be had for `PATIENCE`, its holder has been stopped: then the call does without, and what
  two write at once may be lost, never more than that.
- A number is one aligned word, and a row counts from when its key is written, the last word. A
  place that is given to another key loses the old one first.
- What ends with its process (connections, attempts under way) each process counts in a column of
  its own. It holds a lock on one octet for the column, all its life; a column whose octet nobody
  holds belongs to a dead process and is cleared.

Keys are keyed hashes of 64 bits (BLAKE2b), so that the file names neither addresses nor users, and
nobody outside can choose where something is put. Places are looked for among `WAYS` neighbours
only, so that no call takes long; a place among them that counts least is given up for a new key.

Over 400 lines with the file's own safety, which is the larger half.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import stat
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from math import ceil
from typing import Any, Final, NamedTuple, Self

from popdrop.errors import ConfigError

PATIENCE: Final = 0.005
"""Seconds to wait for the lock. Its holder needs some 10 us, or a turn of the scheduler."""
START_PATIENCE: Final = 10.0
"""Seconds that a start waits for the lock: another one may be making the file."""
SWEEP_EVERY: Final = 1.0
"""Seconds between two looks for columns of the dead: 1 us for each."""
COLUMNS: Final = 64
"""Processes that may share a table."""
WAYS: Final = 16
PRESENT_WAYS: Final = 64
"""Neighbours among which a connection is counted. Half of all places stay free whatever comes, so
that all 64 are taken once in some 100,000 times that every place is (Poisson)."""
PROOFS: Final = 16
"""Different wrong secrets remembered by address."""
MOST_OCTETS: Final = 1 << 30
"""Of a table. 64 processes and the default numbers need 8 MB."""

MAGIC: Final = b"PopdropThrottle\0"
VERSION: Final = 1
_PAGE: Final = 4096
_HEADER: Final = struct.Struct("=16sII5Q16s32s32s")
_SUM_OCTETS: Final = 16
_FLOCK: Final = struct.Struct("hhqqi4x")
_LOCK: Final = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
_UNLOCK: Final = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0)
_UNLOCK_ALL: Final = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_TURN: Final = COLUMNS + 1
_MANY: Final = 0xFFFF
"""Where a column's numbers end."""


class Numbers(NamedTuple):
    """The limits of all who share a table. `fade` is in seconds."""

    total: int
    per_address: int
    per_user: int
    fade: int
    tracked: int


class Header(NamedTuple):
    """What stands at the beginning of a table."""

    numbers: Numbers
    boot: bytes
    hash_key: bytes
    proof_key: bytes

    def pack(self) -> bytes:
        """With magic, version and a check sum."""
        body = _HEADER.pack(
            MAGIC, VERSION, COLUMNS, *self.numbers, self.boot, self.hash_key, self.proof_key
        )
        return body + blake2b(body, digest_size=_SUM_OCTETS).digest()

    @classmethod
    def unpack(cls, octets: bytes) -> Self:
        """Raises `ValueError`, with `foreign`, `version` or `damaged`."""
        body, found = octets[: _HEADER.size], octets[_HEADER.size :][:_SUM_OCTETS]
        if body[: len(MAGIC)] != MAGIC:
            raise ValueError("foreign")
        if len(body) < _HEADER.size or blake2b(body, digest_size=_SUM_OCTETS).digest() != found:
            raise ValueError("damaged")
        _, version, columns, *rest = _HEADER.unpack(body)
        if (version, columns) != (VERSION, COLUMNS):
            raise ValueError("version")
        return cls(Numbers(*rest[:5]), *rest[5:])


def boot_id() -> bytes:
    """16 octets, others after each boot (random(4))."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def since_boot() -> float:
    """Seconds, the same in all processes of a boot; they never go back (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# Places


class _Plan:
    """Gives out ranges of the mapped octets."""

    def __init__(self) -> None:
        self.size = _PAGE

    def take(self, octets: int) -> int:
        """Where they begin; aligned to 8."""
        start = self.size
        self.size += -(-octets // 8) * 8
        return start


class _Keys:
    """Keys in rows of `ways` neighbours, of which a key has one row."""

    def __init__(self, plan: _Plan, places: int, ways: int) -> None:
        self.ways = min(places, ways)
        self._rows = -(-places // self.ways)
        self.places = self._rows * self.ways
        self._keys_at = plan.take(8 * self.places)

    def bind(self, mapped: mmap.mmap, view: memoryview) -> None:
        self._mapped = mapped
        self.keys = self._cast(view, self._keys_at, self.places, "Q")

    @staticmethod
    def _cast(view: memoryview, start: int, count: int, form: str) -> memoryview[Any]:
        return view[start : start + count * struct.calcsize(form)].cast(form)  # type: ignore[call-overload, no-any-return]

    def first(self, key: bytes) -> int:
        """The first place of the key's row."""
        return int.from_bytes(key, sys.byteorder) % self._rows * self.ways

    def find(self, key: bytes) -> int:
        """The place of `key`, -1 where it has none."""
        start = self._keys_at + 8 * self.first(key)
        end = start + 8 * self.ways
        at = self._mapped.find(key, start, end)
        while at >= 0 and at & 7:
            at = self._mapped.find(key, at + 1, end)
        return at if at < 0 else (at - self._keys_at) >> 3


class _Columned(_Keys):
    """Keys with a number for each process."""

    def __init__(self, plan: _Plan, places: int, ways: int) -> None:
        super().__init__(plan, places, ways)
        self._columns_at = plan.take(2 * self.places * COLUMNS)
        self._none = memoryview(bytes(2 * self.places)).cast("H")

    def bind(self, mapped: mmap.mmap, view: memoryview) -> None:
        super().bind(mapped, view)
        self._columns = self._cast(view, self._columns_at, self.places * COLUMNS, "H")
        self.shown = 0
        self._own = 0
        self._mine: dict[bytes, int] = {}
        self._touched: set[int] = set()

    def show(self, processes: int) -> None:
        """So many columns are in use, from the first one on."""
        self.shown = processes * self.places

    def own(self, column: int) -> None:
        """This column is ours."""
        self._own = column * self.places

    def clear_column(self, column: int) -> None:
        self._columns[column * self.places : (column + 1) * self.places] = self._none

    def clear_place(self, place: int) -> None:
        for at in range(place, self.shown, self.places):
            self._columns[at] = 0

    def live(self, place: int) -> int:
        """What all processes count there together."""
        return sum(self._columns[place : self.shown : self.places])

    def change(self, key: bytes, place: int, by: int) -> None:
        """What we count of `key`, of which `place` shows it, -1: none does.

        The count itself is kept here, so that no mishap in the table stays in it.
        """
        number = self._mine.get(key, 0) + by
        if number:
            self._mine[key] = number
        else:
            self._mine.pop(key, None)
        if place >= 0:
            self._columns[self._own + place] = min(number, _MANY)
            self._touched.add(place)

    def tidy(self) -> None:
        """Show anew what we count: a key may have lost its place, or got a second one.

        Only two processes that write at once, without the lock, give a key two places.
        """
        touched, self._touched = self._touched, set()
        for place in touched:
            key = self.keys[place].to_bytes(8, sys.byteorder)
            number = self._mine.get(key, 0) if self.find(key) == place else 0
            self._columns[self._own + place] = min(number, _MANY)
            if number:
                self._touched.add(place)


class Present(_Columned):
    """How many connections each key has."""

    def __init__(self, plan: _Plan, total: int, hashed: Callable[[Any], bytes]) -> None:
        super().__init__(plan, 2 * total, PRESENT_WAYS)
        self._hashed = hashed

    def here(self, name: object) -> int:
        """How many it has, of all processes."""
        place = self.find(self._hashed(name))
        return 0 if place < 0 else self.live(place)

    def come(self, name: object) -> None:
        """One more. Others do not see it where all neighbours are in use."""
        key = self._hashed(name)
        place = self.find(key)
        if place < 0:
            first = self.first(key)
            for place in range(first, first + self.ways):
                if not self.live(place):
                    self.keys[place] = int.from_bytes(key, sys.byteorder)
                    break
            else:
                place = -1
        self.change(key, place, 1)

    def go(self, name: object) -> None:
        """One less."""
        key = self._hashed(name)
        self.change(key, self.find(key), -1)


class Row:
    """Failures of one address or user, in the table. As `throttle`'s counts in memory."""

    __slots__ = ("_rows", "key", "place")

    def __init__(self, rows: Rows, place: int, key: bytes) -> None:
        self._rows = rows
        self.place = place
        self.key = key

    @property
    def failures(self) -> float:
        """At the time `since`. What no rule has written counts as none."""
        found: float = self._rows.failures[self.place]
        return found if 0 <= found <= self._rows.most else 0.0

    @failures.setter
    def failures(self, number: float) -> None:
        self._rows.failures[self.place] = number

    @property
    def since(self) -> float:
        """Seconds, of the clock that all share."""
        found: float = self._rows.since[self.place]
        return found

    @since.setter
    def since(self, seconds: float) -> None:
        self._rows.since[self.place] = seconds

    @property
    def under_way(self) -> int:
        """Attempts of all processes."""
        return self._rows.live(self.place)

    def begin(self, weight: int) -> None:
        """Our attempts under way, more by `weight`."""
        self._rows.change(self.key, self.place, weight)

    def end(self, weight: int) -> None:
        """And less."""
        self._rows.change(self.key, self.place, -weight)

    def tried(self, proof: bytes | None) -> bool:
        """Whether this wrong secret was tried from here before."""
        return proof is not None and self._rows.tried(self.place, proof)

    def remember(self, proof: bytes | None) -> None:
        """Keep 64 bits of the proof, in the place of the oldest."""
        if proof is not None:
            self._rows.remember(self.place, proof)

    @property
    def clean(self) -> bool:
        """Whether nothing would be lost with it."""
        return not (self.failures or self.under_way or self._rows.remembers(self.place))


class Rows(_Columned):
    """Failures by key. `rate` is in failures per second; `most` are counted."""

    def __init__(
        self,
        plan: _Plan,
        places: int,
        hashed: Callable[[Any], bytes],
        rate: float,
        most: int,
        hashed_proof: Callable[[bytes], bytes] | None = None,
    ) -> None:
        super().__init__(plan, places, WAYS)
        self._hashed = hashed
        self._hashed_proof = hashed_proof
        self._rate = rate
        self.most = most
        self._failures_at = plan.take(8 * self.places)
        self._since_at = plan.take(8 * self.places)
        self._ring = 0 if hashed_proof is None else PROOFS
        # A word of its own says how many proofs have been written.
        self._proofs_at = plan.take(8 * self.places * (self._ring + 1))

    def bind(self, mapped: mmap.mmap, view: memoryview) -> None:
        super().bind(mapped, view)
        self.failures = self._cast(view, self._failures_at, self.places, "d")
        self.since = self._cast(view, self._since_at, self.places, "d")
        self._proofs = self._cast(view, self._proofs_at, self.places * (self._ring + 1), "Q")

    def get(self, name: object) -> Row | None:
        """The row of this name, `None` where there is none."""
        key = self._hashed(name)
        place = self.find(key)
        return None if place < 0 else Row(self, place, key)

    def make(self, name: object, now: float) -> Row:
        """The row of this name, maybe in the place of one that counts less."""
        return self._make(self._hashed(name), now)

    def _make(self, key: bytes, now: float) -> Row:
        place = self.find(key)
        if place < 0:
            place = self._least(self.first(key), now)
            self._empty(place)
            self.since[place] = now
            self.keys[place] = int.from_bytes(key, sys.byteorder)
        return Row(self, place, key)

    def renewed(self, row: Row, now: float) -> Row:
        """The same, or where its place was given away meanwhile, one without counts."""
        return self._make(row.key, now)

    def drop(self, name: object, row: Row) -> None:
        """Forget it."""
        self._empty(row.place)

    def _empty(self, place: int) -> None:
        self.keys[place] = 0
        self.failures[place] = 0.0
        self.clear_place(place)
        at = place * (self._ring + 1)
        if self._proofs[at]:
            for each in range(at, at + self._ring + 1):
                self._proofs[each] = 0

    def _least(self, first: int, now: float) -> int:
        """The place that counts least: free, without attempts under way, with the fewest failures
        left, and the oldest of these.

        So addresses that fail once each, however many, push out each other and none that failed
        twice.
        """
        end = first + self.ways
        keys = self.keys[first:end].tolist()
        if 0 in keys:
            return first + keys.index(0)
        worth = []
        for place in range(first, end):
            since = self.since[place]
            left = self.failures[place] - max(0.0, now - since) * self._rate
            left = ceil(left) if 0 < left <= self.most else 0
            worth.append((self.live(place) > 0, left, since, place))
        return min(worth)[3]

    def _word(self, proof: bytes) -> int:
        return (
            0
            if self._hashed_proof is None
            else int.from_bytes(self._hashed_proof(proof), sys.byteorder)
        )

    def remembers(self, place: int) -> bool:
        """Whether wrong secrets were tried from there."""
        return bool(self._proofs[place * (self._ring + 1)])

    def tried(self, place: int, proof: bytes) -> bool:
        """As `Row.tried`."""
        at = place * (self._ring + 1) + 1
        return self._word(proof) in self._proofs[at : at + self._ring].tolist()

    def remember(self, place: int, proof: bytes) -> None:
        """As `Row.remember`."""
        at = place * (self._ring + 1)
        written = self._proofs[at] & 0xFFFFFFFF
        self._proofs[at + 1 + written % self._ring] = self._word(proof)
        self._proofs[at] = written + 1


class Times(_Keys):
    """When each key was last there."""

    def __init__(self, plan: _Plan, places: int, hashed: Callable[[Any], bytes]) -> None:
        super().__init__(plan, places, WAYS)
        self._hashed = hashed
        self._since_at = plan.take(8 * self.places)

    def bind(self, mapped: mmap.mmap, view: memoryview) -> None:
        super().bind(mapped, view)
        self._since = self._cast(view, self._since_at, self.places, "d")

    def get(self, name: object) -> float | None:
        """Seconds."""
        place = self.find(self._hashed(name))
        return None if place < 0 else self._since[place]

    def note(self, name: object, now: float) -> None:
        """It is there now. The oldest neighbour goes where there is no room."""
        key = self._hashed(name)
        place = self.find(key)
        if place < 0:
            first = self.first(key)
            end = first + self.ways
            keys = self.keys[first:end].tolist()
            if 0 in keys:
                place = first + keys.index(0)
            else:
                place = min(range(first, end), key=self._since.__getitem__)
            self.keys[place] = 0
            self._since[place] = now
            self.keys[place] = int.from_bytes(key, sys.byteorder)
        else:
            self._since[place] = now


# The table


class Table:
    """All of it, mapped, with a column of our own. Use it as a context manager: that is the lock.

    `rates` and `mosts` are those of addresses and of users, as `Rows` takes them. Not for several
    threads.
    """

    def __init__(
        self,
        descriptor: int,
        where: str,
        header: Header,
        rules: Rules,
        seconds: Callable[[], float],
    ) -> None:
        self.descriptor = descriptor
        self.where = where
        self.header = header
        self.seconds = seconds
        self.missed = 0
        """Calls that had to do without the lock."""
        self._held = False
        self._stuck_at = -1
        self._swept = 0.0
        self._closed = False
        hashed = self._hashes(header.hash_key)
        plan = self._plan(header.numbers, rules, hashed)
        if os.fstat(descriptor).st_size != plan.size:
            raise _refused(where, "damaged")
        self._mapped = mmap.mmap(descriptor, plan.size)
        view = memoryview(self._mapped)
        for part in (*self._columned, self.known):
            part.bind(self._mapped, view)
        # How many columns are in use, the connections of each process, and the last turn's number.
        self._state = view[self._state_at : self._state_at + 8 * (COLUMNS + 2)].cast("Q")
        self._own = self._claim()

    def _plan(
        self, numbers: Numbers, rules: Rules, hashed: Callable[[bytes], Callable[[Any], bytes]]
    ) -> _Plan:
        plan = _Plan()
        tracked, by_address, by_user = numbers.tracked, hashed(b"address"), hashed(b"user")
        of_addresses, of_users = rules(numbers.fade)
        self._state_at = plan.take(8 * (COLUMNS + 2))
        self.connections = Present(plan, numbers.total, by_address)
        self.entered = Present(plan, numbers.total, by_user)
        self.addresses = Rows(plan, tracked, by_address, *of_addresses, hashed(b"proof"))
        self.users = Rows(plan, tracked, by_user, *of_users)
        self.known = Times(plan, tracked, hashed(b"pair"))
        self._columned = (self.connections, self.entered, self.addresses, self.users)
        return plan

    @staticmethod
    def _hashes(key: bytes) -> Callable[[bytes], Callable[[Any], bytes]]:
        def of(kind: bytes) -> Callable[[Any], bytes]:
            @lru_cache(maxsize=1024)  # a session asks for the same ones six times
            def hashed(name: Any) -> bytes:
                if isinstance(name, tuple):
                    name = name[0].encode() + b"\0" + name[1]
                elif isinstance(name, str):
                    name = name.encode()
                # The key of an empty place is 0.
                return (
                    blake2b(name, digest_size=8, key=key, person=kind)
                    .digest()
                    .replace(b"\0" * 8, b"\1" * 8)
                )

            return hashed

        return of

    def _claim(self) -> int:
        """A column of our own, cleared. The lock is held."""
        for column in range(COLUMNS):
            if _set_lock(self.descriptor, fcntl.F_WRLCK, 1 + column):
                break
        else:
            raise ConfigError(
                f"--throttle {self.where}: {COLUMNS} processes use it already; name another file"
            )
        for part in self._columned:
            part.own(column)
        self._clear(column)
        self._state[0] = max(self._shown(), column + 1)
        self._show()
        return column

    def _shown(self) -> int:
        return min(int(self._state[0]), COLUMNS)

    def _show(self) -> None:
        for part in self._columned:
            part.show(self._shown())

    def _clear(self, column: int) -> None:
        self._state[1 + column] = 0
        for part in self._columned:
            part.clear_column(column)

    # Exclusion

    def __enter__(self) -> None:
        now = self.seconds()
        self._held = self._lock()
        # Another process may have come, with a column that we have not looked at yet.
        if self._state[0] * self.users.places != self.users.shown:
            self._show()
        if not 0 <= now - self._swept < SWEEP_EVERY:
            self.sweep()

    def _lock(self) -> bool:
        descriptor, state = self.descriptor, self._state
        until = 0.0
        while True:
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _LOCK)
            except OSError:
                turn = state[_TURN]
                if turn == self._stuck_at:
                    break  # we waited for this one before, in vain
                moment = time.monotonic()
                if not until:
                    until, first = moment + PATIENCE, turn
                elif moment >= until:
                    self._stuck_at = turn if turn == first else -1
                    break
                os.sched_yield()
            else:
                state[_TURN] = (state[_TURN] + 1) & 0xFFFFFFFF
                self._stuck_at = -1
                return True
        self.missed += 1
        return False

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._held = False
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _UNLOCK)

    def sweep(self) -> None:
        """Clear the columns of processes that are gone."""
        if not self._held:
            return
        self._swept = self.seconds()
        for part in self._columned:
            part.tidy()
        last = self._own
        for column in range(self._shown()):
            if column == self._own:
                continue
            if _is_locked(self.descriptor, 1 + column):
                last = max(last, column)
            else:
                self._clear(column)
        if last + 1 != self._shown():
            self._state[0] = last + 1
            self._show()

    # All connections

    @property
    def connected(self) -> int:
        """Of all processes."""
        return sum(self._state[1 : 1 + self._shown()])

    def come(self) -> None:
        """One more of ours."""
        self._state[1 + self._own] += 1

    def go(self) -> None:
        """One less."""
        at = 1 + self._own
        self._state[at] = max(0, self._state[at] - 1)

    # The end

    def close(self) -> None:
        """Take our counts out and let go. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with self:
            self._clear(self._own)
            # The mapping has a descriptor of its own, so closing ours would not unlock.
            _set_lock(self.descriptor, fcntl.F_UNLCK, 1 + self._own)
        os.close(self.descriptor)


Rules = Callable[[int], tuple[tuple[float, int], tuple[float, int]]]
"""From `fade` to rate and most failures, of addresses and of users."""


def _set_lock(descriptor: int, kind: int, octet: int) -> bool:
    flock = _FLOCK.pack(kind, os.SEEK_SET, octet, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, flock)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_locked(descriptor: int, octet: int) -> bool:
    """By another open file description than ours."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, octet, 1, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
    return bool(answer[0] != fcntl.F_UNLCK)


# Making and opening

_REASONS: Final = {
    "foreign": "not a table of Popdrop's throttle; name a file of its own",
    "damaged": "damaged; stop the servers that use it and remove it",
    "version": "made by another version of Popdrop; stop the servers that use it and remove it",
}


def _refused(where: str, reason: str) -> ConfigError:
    return ConfigError(f"--throttle {where}: {_REASONS[reason]}")


def size_of(numbers: Numbers) -> int:
    """Octets of a table."""
    plan = _Plan()
    plan.take(8 * (COLUMNS + 2))
    for _ in range(2):
        _Columned(plan, 2 * numbers.total, PRESENT_WAYS)
    for hashed_proof in (bytes, None):
        Rows(plan, numbers.tracked, bytes, 1.0, 1, hashed_proof)
    Times(plan, numbers.tracked, bytes)
    return plan.size


def _fill(descriptor: int, where: str, numbers: Numbers) -> None:
    """Make an empty table of an empty file."""
    header = Header(numbers, boot_id(), secrets.token_bytes(32), secrets.token_bytes(32))
    size = size_of(numbers)
    try:
        # Room that is not there would end us by SIGBUS later.
        os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, header.pack(), 0)
    except OSError as error:
        raise ConfigError(
            f"--throttle {where}: {error.strerror}; it needs {size >> 10} KiB"
        ) from None


def _wait_for_lock(descriptor: int, where: str) -> None:
    end = time.monotonic() + START_PATIENCE
    try:
        while not _set_lock(descriptor, fcntl.F_WRLCK, 0):
            if time.monotonic() >= end:
                raise ConfigError(
                    f"--throttle {where}: a process that does not move holds it (lslocks tells"
                    " which); end that, or name another file"
                )
            time.sleep(0.001)
    except OSError as error:
        raise ConfigError(
            f"--throttle {where}: no locks there: {error.strerror}; name a file on a local file"
            " system, best in /run"
        ) from None


def _make(path: str, where: str, numbers: Numbers) -> None:
    """A new table, whole or not at all; another process's own stays."""
    draft = f"{path}.{secrets.token_hex(8)}.new"
    try:
        descriptor = os.open(draft, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _fill(descriptor, where, numbers)
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            os.close(descriptor)
            os.unlink(draft)
    except OSError as error:
        raise ConfigError(
            f"--throttle {where}: {error.strerror}; name a file in a folder of Popdrop's own"
        ) from None


def _open(path: str, where: str, owners: tuple[int, ...]) -> int:
    """A descriptor of the file, which is nobody else's. Raises `FileNotFoundError`."""
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"--throttle {where}: a symbolic link; name the file") from None
        raise ConfigError(
            f"--throttle {where}: {error.strerror}; name a file in a folder of Popdrop's own"
        ) from None
    found = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(found.st_mode):
        problem = "not a regular file; name another"
    elif found.st_uid not in owners:
        problem = f"belongs to uid {found.st_uid}; chown {owners[-1]} {path}"
    elif found.st_mode & 0o077:
        problem = f"group or others have rights; chmod 600 {path}"
    if problem is not None:
        os.close(descriptor)
        raise ConfigError(f"--throttle {where}: {problem}")
    return descriptor


def _let_go(descriptor: int) -> None:
    # The mapping may live on for a moment, with the locks.
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _UNLOCK_ALL)
    os.close(descriptor)


def _is_there(path: str, descriptor: int) -> bool:
    """Whether `path` still leads to it: it may have been removed while we waited."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _header(descriptor: int, where: str) -> Header:
    try:
        return Header.unpack(os.pread(descriptor, _PAGE, 0))
    except ValueError as error:
        raise _refused(where, str(error)) from None
    except OSError:
        raise _refused(where, "foreign") from None


def _is_outdated(descriptor: int, where: str, header: Header, numbers: Numbers) -> bool:
    """Whether nobody uses it and it is of an earlier boot or of other numbers. The lock is held.

    Raises `ConfigError` where somebody does use it, with other numbers.
    """
    if header.boot == boot_id() and header.numbers == numbers:
        return False
    if not any(_is_locked(descriptor, 1 + column) for column in range(COLUMNS)):
        return True
    given = ":".join(f"{k.replace('_', '-')}={v}" for k, v in header.numbers._asdict().items())
    raise ConfigError(f"--throttle {where}: in use with {given}; give the same to all servers")


def open_table(
    path: str,
    numbers: Numbers,
    rules: Rules,
    seconds: Callable[[], float] = since_boot,
    owners: tuple[int, ...] = (),
) -> Table:
    """The table in `path`, made if there is none. Raises `ConfigError`.

    `owners` are the uids that it may belong to; none: ours.
    """
    where = f"shared:{path}"
    if size_of(numbers) > MOST_OCTETS:
        raise ConfigError(f"--throttle {where}: over 1 GiB; give less for total= or tracked=")
    while True:
        try:
            descriptor = _open(path, where, owners or (os.geteuid(),))
        except FileNotFoundError:
            _make(path, where, numbers)
            continue
        try:
            _wait_for_lock(descriptor, where)
            if _is_there(path, descriptor):
                header = _header(descriptor, where)
                if not _is_outdated(descriptor, where, header, numbers):
                    return _attached(descriptor, where, header, rules, seconds)
                os.unlink(path)
        except BaseException:
            _let_go(descriptor)
            raise
        _let_go(descriptor)


def _attached(
    descriptor: int, where: str, header: Header, rules: Rules, seconds: Callable[[], float]
) -> Table:
    table = Table(descriptor, where, header, rules, seconds)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _UNLOCK)
    return table


def make_anonymous(numbers: Numbers) -> int:
    """A descriptor of a table in memory, for processes that inherit it. Raises `ConfigError`."""
    descriptor = os.memfd_create("popdrop-throttle", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _fill(descriptor, "shared", numbers)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def attach(descriptor: int, rules: Rules, seconds: Callable[[], float] = since_boot) -> Table:
    """The table behind an inherited descriptor, which stays the caller's. Raises `ConfigError`."""
    where = f"shared, descriptor {descriptor}"
    try:
        # Opened anew, since locks belong to what open() makes: the inherited one is everybody's.
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"--throttle {where}: {error.strerror}; is /proc mounted?") from None
    try:
        _wait_for_lock(own, where)
        return _attached(own, where, _header(own, where), rules, seconds)
    except BaseException:
        _let_go(own)
        raise
