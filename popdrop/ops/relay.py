"""The relay window (POP-before-SMTP): for some minutes after a login its client may relay mail.

After a login by any mechanism, exactly the client's address is remembered (`grants`) before `+OK`
is sent, so that whoever sends mail in the next moment is let through. Postfix asks for it by
`socketmap:` or `tcp:`, Exim reads a file. Nothing else of the server changes (SIMS: "Client IP
addresses", S1 in the table of features).

One process asks and expires, the one that listens; with `--workers` that is their parent. Every
process that logs clients in remembers them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop import listeners
from popdrop.accepting import Complaint
from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.interfaces import IRelayWindow
from popdrop.ops import wholefile
from popdrop.ops.grants import WHOLE, Grant, Grants, client_of, exim_map, may_be_granted
from popdrop.ops.maps import Socketmap, Tables, TcpTable
from popdrop.threads import Pool
from popdrop.values import Network, PeerFacts

log = Logger()

MINUTES: Final = 2.0
"""Of the window. SIMS advises 1 to 3: dial-up addresses get other users soon."""
EXPIRE_SECONDS: Final = 10.0
"""Between two looks for what holds no more. Look-ups and the times in Exim's file are exact."""
EXAMPLES: Final = {
    "socketmap": "socketmap:unix:/run/popdrop/relay",
    "tcp-table": "tcp-table:tcp:10110:interface=127.0.0.1",
    "file": "file:/run/popdrop/relay.exim",
}
_TABLES: Final[dict[str, type[Socketmap] | type[TcpTable]]] = {
    "socketmap": Socketmap,
    "tcp-table": TcpTable,
}


class EximFile:
    """What `--relay file:PATH` keeps up to date."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._failed = ""

    def __call__(self, grants: Sequence[Grant]) -> None:
        """Blocking. A failure is logged once, and tried again with the next change."""
        try:
            wholefile.put(self.path, exim_map(grants))
            self._failed = ""
        except OSError as error:
            why = error.strerror or str(error)
            if why != self._failed:
                log.error(
                    "--relay file:{path}: cannot be written: {why}; name a file in a folder that"
                    " the user may write to whom Popdrop runs as",
                    path=self.path,
                    why=why,
                )
            self._failed = why


class Door:
    """One table, and where the MTA asks for it."""

    def __init__(self, option: str, listener: listeners.Listener, tables: Tables) -> None:
        self.option = option
        self._listener = listener
        self._tables = tables
        self.port: IListeningPort | None = None

    def listen(self) -> None:
        """At once. Raises `ConfigError`."""
        if self.port is not None:
            return
        outcome: list[Any] = []
        listeners.listen(self._listener, self._tables, self.option).addBoth(outcome.append)
        if isinstance(outcome[0], Failure):
            outcome[0].raiseException()
        self.port = outcome[0]

    def where(self) -> str:
        """Its port, or that it is a Unix socket."""
        host = None if self.port is None else self.port.getHost()
        port = getattr(host, "port", None)
        return "a Unix socket" if port is None else f"port {port}"

    def close(self) -> Deferred[Any]:
        """Listen no more, and break off who is there."""
        port, self.port = self.port, None
        self._tables.close()
        return maybeDeferred(lambda: None if port is None else port.stopListening())


@implementer(IRelayWindow)
class RelayWindow:
    """`seconds` long for a client of `bits` of an IPv6 address; never for `proxies`.

    `leads`: this process listens for the MTA and expires. Grants that come while others are being
    written are written together, by one thread of `pool`.
    """

    def __init__(
        self,
        reactor: Any,
        pool: Pool,
        grants: Grants,
        seconds: float,
        bits: int = WHOLE,
        proxies: Sequence[Network] = (),
        leads: bool = True,
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._grants = grants
        self._seconds = seconds
        self._bits = bits
        self._proxies = tuple(proxies)
        self._leads = leads
        self.doors: list[Door] = []
        self._next: dict[str, bytes] = {}
        self._waiting: list[Deferred[None]] = []
        self._writing = False
        self._expiring: LoopingCall | None = None
        self._complaint = Complaint(reactor)

    def add_door(self, option: str, kind: str, listener: listeners.Listener) -> None:
        """A table of `kind` for the MTA."""
        self.doors.append(Door(option, listener, Tables(_TABLES[kind], self.look)))

    # Logins

    def open_for(self, peer: PeerFacts, account: bytes) -> Deferred[None] | None:
        """See `IRelayWindow`."""
        if not may_be_granted(peer, self._proxies):
            return None
        client = client_of(peer.address or "", self._bits)
        assert client is not None  # it may be granted
        self._next[client] = account
        waits: Deferred[None] = Deferred()
        self._waiting.append(waits)
        if not self._writing:
            self._write()
        return waits

    def _write(self) -> None:
        self._writing = True
        until = self._grants.now() + self._seconds
        grants = [Grant(client, until, account) for client, account in self._next.items()]
        waiting, self._next, self._waiting = self._waiting, {}, []
        done = self._pool.run(self._grants.add, grants)
        done.addErrback(self._trouble)
        done.addCallback(self._written, waiting)

    def _written(self, _: object, waiting: list[Deferred[None]]) -> None:
        self._writing = False
        if self._next:
            self._write()
        for waits in waiting:
            if not waits.called:  # else the client has gone meanwhile
                waits.callback(None)

    def _trouble(self, failure: Failure) -> None:
        error = failure.value
        if not isinstance(error, TemporaryFailure):
            log.failure("the relay window failed", failure=failure)
            return
        self._complaint.say("{why}: {detail}", why=error.text, detail=error.detail)

    # The MTA

    async def look(self, key: bytes) -> bool:
        """Whether the client of this address may relay now. Raises `TemporaryFailure`."""
        client = client_of(key.decode("ascii", "replace"), self._bits)
        if client is None:
            return False
        try:
            return await self._pool.run(self._grants.holds, client)
        except TemporaryFailure as error:
            self._complaint.say("{why}: {detail}", why=error.text, detail=error.detail)
            raise

    def listen(self) -> None:
        """While the rights of the start are there. Raises `ConfigError`."""
        for door in self.doors:
            door.listen()

    def start(self) -> None:
        """Expire from now on, where that is this process' part."""
        if not self._leads:
            return
        for door in self.doors:
            log.info(
                "{option}: {where}: who may relay, {minutes:g} min from a login",
                option=door.option,
                where=door.where(),
                minutes=self._seconds / 60,
            )
        self._expiring = LoopingCall(self._expire)
        self._expiring.clock = self._reactor
        # First of all the file is written anew: it may be older than the grants.
        self._run(self._grants.expire, True)
        self._expiring.start(EXPIRE_SECONDS, now=False)

    def _expire(self) -> None:
        self._run(self._grants.expire)

    def _run(self, work: Any, *words: Any) -> None:
        self._pool.run(work, *words).addErrback(self._trouble)

    def close_doors(self) -> Deferred[Any]:
        """The MTA is told nothing any more."""
        if self._expiring is not None and self._expiring.running:
            self._expiring.stop()
        return gatherResults([door.close() for door in self.doors])

    def close(self) -> None:
        """Let go of the file. The grants stay in it."""
        self._grants.close()


def from_options(
    options: Any,
    reactor: Any,
    pool: Pool,
    state_dir: str,
    proxies: Sequence[Network],
    leads: bool,
) -> RelayWindow | None:
    """What `--relay` and its like describe; `None` without. Raises `ConfigError`."""
    path: str | None = None
    doors: list[tuple[str, str, listeners.Listener]] = []
    for text in options["relay"]:
        option = f"--relay {text}"
        kind, _, rest = text.partition(":")
        if kind not in EXAMPLES or not rest:
            raise ConfigError(f"{option}: write {', '.join(EXAMPLES.values())}")
        if kind == "file":
            if path is not None:
                raise ConfigError(f"{option}: there is a file already; leave one out")
            path = os.path.abspath(rest)
        elif leads:
            doors.append((option, kind, listeners.for_this_machine(reactor, option, rest)))
    if not options["relay"]:
        return None
    if doors and any(text.lower().startswith("stdio:") for text in options["listen"]):
        raise ConfigError(
            f"{doors[0][0]}: with stdio: a process serves one session and no table; use"
            f" --relay {EXAMPLES['file']}"
        )
    window = RelayWindow(
        reactor,
        pool,
        Grants(state_dir, None if path is None else EximFile(path)),
        60.0 * (MINUTES if options["relay-minutes"] is None else options["relay-minutes"]),
        options["relay-ipv6"] or WHOLE,
        proxies,
        leads,
    )
    for door in doors:
        window.add_door(*door)
    return window
