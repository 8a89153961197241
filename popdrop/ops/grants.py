"""Who may relay until when: what the relay window (POP-before-SMTP) remembers.

In an SQLite file of the state folder, so that all workers and a restart agree, whichever checker
verified the login, and although the process that serves may not write to the accounts. A grant that
a power cut takes away costs its client one more login; nothing is waited for on disk.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final, NamedTuple

from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.sqlitefile import META, Schema, SqliteFile, transaction
from popdrop.values import Network, PeerFacts, normalised

NAME: Final = "relay.db"
"""Of the file, in the state folder."""
LOOK_EVERY: Final = 1.0
"""Seconds until the file's mode is looked at again: 17 us a look."""
WHOLE: Final = 128
"""Bits of an IPv6 address."""
LONGEST: Final = 86_400.0
"""Seconds that a window may be open. After a day an address is anybody's."""

RELAY: Final = Schema(
    application_id=0x506F7052,  # "PopR"
    title="relay database",
    remedy="the server makes one at its start with --relay",
    steps=(
        (
            META,
            "CREATE TABLE relay_grant ("
            " client TEXT PRIMARY KEY NOT NULL,"
            " until REAL NOT NULL,"
            " account BLOB NOT NULL"
            ") WITHOUT ROWID",
            "CREATE INDEX relay_grant_until ON relay_grant (until)",
        ),
    ),
    durable=False,
)


class Grant(NamedTuple):
    """`client`, as `client_of` names it, may relay until then, in seconds since the epoch.

    `account` is the canonical name of whoever logged in last from there.
    """

    client: str
    until: float
    account: bytes


Publish = Callable[[Sequence[Grant]], None]


@dataclass(frozen=True, slots=True)
class Rules:
    """Windows are `seconds` long, for `bits` of an IPv6 address, and never for `proxies`.

    They hold for grants and for questions alike: what an earlier start with other rules, or a clock
    that was ahead, has left in the file opens nothing.
    """

    seconds: float = LONGEST
    bits: int = WHOLE
    proxies: tuple[Network, ...] = ()

    def client(self, host: str) -> str | None:
        """Whose window it is that this address would need; `None`: it never has one."""
        if not may_be_granted(PeerFacts(normalised(host)), self.proxies):
            return None
        return client_of(host, self.bits)

    def fit(self, client: str) -> bool:
        """Whether a client in the file is one of these rules."""
        if "/" not in client:
            return self.client(client) == client
        return client.endswith(f"/{self.bits}")


ANY: Final = Rules()


def client_of(host: str, bits: int = WHOLE) -> str | None:
    """What counts as one client: an IPv4 address, or `bits` of an IPv6 address.

    `None` for what is no address: the names and partial addresses that an MTA asks for, too.
    """
    known = _address(host)
    if known is None or known.version == 4 or bits == WHOLE:
        return None if known is None else str(known)
    return str(IPv6Network((known, bits), strict=False))


def may_be_granted(peer: PeerFacts, proxies: Sequence[Network]) -> bool:
    """Whether a login from there opens the window at all (decision 28).

    Others share loopback and a proxy's address; a link-local one is another machine's on each
    link. Where the address is not the client's own there is nobody to grant anything to.
    """
    if peer.address is None or not peer.address_trusted:
        return False
    known = _address(peer.address)
    if known is None or known.is_loopback or known.is_link_local:
        return False
    if known.is_multicast or known.is_unspecified:
        return False
    return not any(known in network for network in proxies)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(normalised(host))
    except ValueError:
        return None


class Grants:
    """The file. All methods block, may be called from any thread and raise `TemporaryFailure`.

    Of what is in it only that counts which ends within the `seconds` of `rules` from now. `publish`
    is told of all grants whenever they change, under the lock of the change: what it was told last
    is what holds. It raises nothing. `clock` is in seconds since the epoch.
    """

    def __init__(
        self,
        folder: str,
        rules: Rules = ANY,
        publish: Publish | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = SqliteFile(os.path.join(folder, NAME), RELAY, LOOK_EVERY)
        self.rules = rules
        self._publish = publish
        self._clock = clock

    @property
    def path(self) -> str:
        """Where the file is, symbolic links resolved."""
        return self._file.path

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._clock()

    def add(self, grants: Sequence[Grant]) -> None:
        """Open the window for all of these, from now on as long as they say."""
        with self._use(make=True) as connection, transaction(connection):
            self._forget(connection)
            for grant in grants:
                connection.execute(
                    "INSERT INTO relay_grant (client, until, account) VALUES (?, ?, ?)"
                    " ON CONFLICT (client) DO UPDATE"
                    " SET until = excluded.until, account = excluded.account",
                    grant,
                )
            self._tell(connection)

    def holds(self, client: str) -> bool:
        """Whether this client may relay now."""
        with self._use() as connection:
            found = connection.execute(
                "SELECT 1 FROM relay_grant WHERE client = ? AND until > ? AND until <= ?",
                (client, *self._bounds()),
            ).fetchone()
        return found is not None

    def all(self) -> list[Grant]:
        """Those that hold now, by client."""
        with self._use() as connection:
            return self._holding(connection)

    def end(self, client: str) -> bool:
        """Close the window for this client. `False`: it was not open.

        A server with a file to publish takes it out when it next calls `expire`.
        """
        with self._use() as connection:
            done = connection.execute(
                "UPDATE relay_grant SET until = 0 WHERE client = ? AND until > ? AND until <= ?",
                (client, *self._bounds()),
            )
            return done.rowcount > 0

    def expire(self) -> None:
        """Forget what holds no more."""
        with self._use(make=True) as connection:
            over = connection.execute(
                "SELECT 1 FROM relay_grant WHERE until <= ? OR until > ? LIMIT 1", self._bounds()
            ).fetchone()
            if over:
                with transaction(connection):
                    self._forget(connection)
                    self._tell(connection)

    def begin(self) -> None:
        """At a start: forget what these rules would not have granted, and publish what is left."""
        with self._use(make=True) as connection, transaction(connection):
            self._forget(connection)
            known = [row[0] for row in connection.execute("SELECT client FROM relay_grant")]
            for client in known:
                if not self.rules.fit(client):
                    connection.execute("DELETE FROM relay_grant WHERE client = ?", (client,))
            self._tell(connection)

    def close(self) -> None:
        """Close what is open. A later call opens it again."""
        self._file.close()

    @contextmanager
    def _use(self, make: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            if make and not os.path.lexists(self.path):
                self._file.create()
                self._file.forget_look()
            with self._file.use() as opened:
                yield opened.connection
        except (ConfigError, OSError, sqlite3.Error) as error:
            why = str(error)
            where = "" if self.path in why else f"{self.path}: "
            raise TemporaryFailure("the relay window is out of order", where + why) from error

    def _bounds(self) -> tuple[float, float]:
        """Later than the first, and not later than the second: what holds ends in between."""
        now = self._clock()
        return now, now + self.rules.seconds

    def _forget(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM relay_grant WHERE until <= ? OR until > ?", self._bounds())

    def _tell(self, connection: sqlite3.Connection) -> None:
        if self._publish is not None:
            self._publish(self._holding(connection))

    def _holding(self, connection: sqlite3.Connection) -> list[Grant]:
        found = connection.execute(
            "SELECT client, until, account FROM relay_grant WHERE until > ? AND until <= ?"
            " ORDER BY client",
            self._bounds(),
        )
        return [Grant(*row) for row in found]


def exim_map(grants: Sequence[Grant], proxies: Sequence[Network] = ()) -> str:
    """A file for Exim's `iplsearch`: a client a line, and the last second in which it may relay.

    With the time in it a file that is left behind opens nothing. The first line that fits counts:
    `proxies`, which may lie in somebody's /64, come first and never may.
    """
    rows = ["# Written by Popdrop (--relay file:...): client address, and until when it may relay."]
    rows += [f"{_key(str(proxy))}: 0" for proxy in proxies]
    rows += [f"{_key(grant.client)}: {int(grant.until)}" for grant in grants]
    return "".join(f"{row}\n" for row in rows)


def _key(text: str) -> str:
    return f'"{text}"' if ":" in text else text
