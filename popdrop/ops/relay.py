"""The relay window (POP-before-SMTP): for some minutes after a login its client may relay mail.

After a login by any mechanism, exactly the client's address is remembered (`grants`) before `+OK`
is sent, so that whoever sends mail in the next moment is let through. Postfix asks for it by
`socketmap:` or `tcp:`, Exim reads a file. Nothing else of the server changes (SIMS: "Client IP
addresses", S1 in the table of features).

One process answers and expires, the one that listens; with `--workers` that is their parent. Every
process that logs clients in remembers them. Trouble with the window refuses no login and holds none
up for long.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.interfaces import IDelayedCall, IListeningPort
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop import listeners
from popdrop.accepting import Complaint, outlive_shortage
from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.interfaces import IRelayWindow
from popdrop.ops import wholefile
from popdrop.ops.grants import WHOLE, Grant, Grants, Rules, exim_map
from popdrop.ops.maps import Asked, Socketmap, Tables, TcpTable
from popdrop.threads import Pool
from popdrop.values import Network, PeerFacts

log = Logger()

MINUTES: Final = 2.0
"""Of the window. SIMS advises 1 to 3: dial-up addresses get other users soon."""
EXPIRE_SECONDS: Final = 10.0
"""Between two looks for what holds no more. Look-ups and the times in Exim's file are exact."""
PATIENCE: Final = 2.0
"""Seconds that a login waits at most until it is remembered; usually it is a thousandth of that."""
AGAIN_SECONDS: Final = 0.5
"""Until what could not be remembered is tried again: another process may have held the lock."""
MOST_WAITING: Final = 10_000
"""Clients that wait to be remembered. More, and those that came first are forgotten."""
OTHER_FOLDER: Final = "name a file in a folder that the user may write to whom Popdrop runs as"
EXAMPLES: Final = {
    "socketmap": "socketmap:unix:/run/popdrop/relay",
    "tcp-table": "tcp-table:tcp:10110:interface=127.0.0.1",
    "file": "file:/run/popdrop/relay.exim",
}
_TABLES: Final[dict[str, type[Asked]]] = {
    "socketmap": Socketmap,
    "tcp-table": TcpTable,
}


class EximFile:
    """What `--relay file:PATH` keeps up to date."""

    def __init__(self, path: str, proxies: Sequence[Network] = ()) -> None:
        self.path = path
        self._proxies = proxies
        self.misplaced = ""
        """Why it cannot be written there at all; a disk that is full has room again one day."""
        self._failed = ""

    def __call__(self, grants: Sequence[Grant]) -> None:
        """Blocking. A failure is logged once, and tried again with the next change."""
        try:
            wholefile.put(self.path, exim_map(grants, self._proxies))
            self._failed = self.misplaced = ""
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "make room" if is_full else OTHER_FOLDER
            words = error.strerror or str(error)
            why = f"--relay file:{self.path}: cannot be written: {words}; {remedy}"
            if why != self._failed:
                log.error("{why}", why=why)
            self._failed = why
            self.misplaced = "" if is_full else why


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
        # No greeting: to an MTA that is turned away a POP3 server's words would be an answer.
        outlive_shortage(self.port, self._tables.clock, True)

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
    """By the rules of `grants`.

    `leads`: this process listens for the MTA and expires. Grants that come while others are being
    written are written together, by one thread of `pool`. `file` is what `grants` publish to.
    """

    def __init__(
        self,
        reactor: Any,
        pool: Pool,
        grants: Grants,
        leads: bool = True,
        file: EximFile | None = None,
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._grants = grants
        self._rules = grants.rules
        self._leads = leads
        self._file = file
        self.doors: list[Door] = []
        self._next: dict[str, Grant] = {}
        self._waiting: list[Deferred[None]] = []
        self._writing = False
        self._began = 0.0
        self._again: IDelayedCall | None = None
        self._stopped = False
        self._expiring: LoopingCall | None = None
        self._complaint = Complaint(reactor)

    def add_door(self, option: str, kind: str, listener: listeners.Listener) -> None:
        """A table of `kind` for the MTA."""
        tables = Tables(_TABLES[kind], self.look, self._reactor)
        self.doors.append(Door(option, listener, tables))

    # Logins

    def open_for(self, peer: PeerFacts, account: bytes) -> Deferred[None] | None:
        """See `IRelayWindow`."""
        client = self._rules.client(peer.address or "") if peer.address_trusted else None
        if client is None:
            return None
        self._next.pop(client, None)  # the last to log in are the last to be forgotten
        self._next[client] = Grant(client, self._grants.now() + self._rules.seconds, account)
        if len(self._next) > MOST_WAITING:
            del self._next[next(iter(self._next))]
        if self._writing and self._reactor.seconds() - self._began > PATIENCE:
            return None  # the disk does not answer: others have waited in vain
        waits: Deferred[None] = Deferred()
        self._waiting.append(waits)
        waits.addTimeout(PATIENCE, self._reactor, lambda *_: None)
        if not self._writing:
            self._write()
        return waits

    def _write(self) -> None:
        again, self._again = self._again, None
        if again is not None and again.active():
            again.cancel()
        self._writing = True
        self._began = self._reactor.seconds()
        grants = list(self._next.values())[-MOST_WAITING:]
        waiting, self._next, self._waiting = self._waiting, {}, []
        done = maybeDeferred(self._pool.run, self._grants.add, grants)
        done.addErrback(self._keep, grants)
        done.addCallback(self._written, waiting)

    def _written(self, _: object, waiting: list[Deferred[None]]) -> None:
        self._writing = False
        if self._next and self._again is None:
            self._write()
        for waits in waiting:
            if not waits.called:  # else the client has gone meanwhile
                waits.callback(None)

    def _keep(self, failure: Failure, grants: list[Grant]) -> None:
        """Try again what could not be written, and has not been granted anew."""
        self._trouble(failure)
        self._next = {grant.client: grant for grant in grants} | self._next
        if not self._stopped:
            self._again = self._reactor.callLater(AGAIN_SECONDS, self._write)

    def _trouble(self, failure: Failure) -> None:
        error = failure.value
        if not isinstance(error, TemporaryFailure):
            log.failure("the relay window failed", failure=failure)
            return
        self._complaint.say("{why}: {detail}", why=error.text, detail=error.detail)

    # The MTA

    async def look(self, key: bytes) -> bool:
        """Whether the client of this address may relay now. Raises `TemporaryFailure`."""
        client = self._rules.client(key.decode("ascii", "replace"))
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
        """Look at what there is, and expire from now on, where that is this process' part.

        Blocks, before anybody is served. Raises `ConfigError`.
        """
        if not self._leads:
            return
        try:
            self._grants.begin()
        except TemporaryFailure as error:
            if isinstance(error.__cause__, ConfigError):
                raise ConfigError(f"--relay: {error.detail}") from None
            # Such as a full disk: no reason to serve nobody.
            self._complaint.say("{why}: {detail}", why=error.text, detail=error.detail)
        if self._file is not None and self._file.misplaced:
            raise ConfigError(self._file.misplaced)
        for door in self.doors:
            log.info(
                "{option}: {where}: who may relay, {minutes:g} min from a login",
                option=door.option,
                where=door.where(),
                minutes=self._rules.seconds / 60,
            )
        if self._file is not None:
            log.info("--relay file:{path}: written at each login", path=self._file.path)
        self._expiring = LoopingCall(self._expire)
        self._expiring.clock = self._reactor
        self._expiring.start(EXPIRE_SECONDS, now=False)

    def _expire(self) -> None:
        self._pool.run(self._grants.expire).addErrback(self._trouble)

    def close_doors(self) -> Deferred[Any]:
        """The MTA is told nothing any more; who logs in still is remembered, if it goes well."""
        self._stopped = True
        if self._again is not None:
            self._again.cancel()
            self._again = None
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
    minutes = MINUTES if options["relay-minutes"] is None else options["relay-minutes"]
    rules = Rules(60.0 * minutes, options["relay-ipv6"] or WHOLE, tuple(proxies))
    file = None if path is None else EximFile(path, rules.proxies)
    window = RelayWindow(reactor, pool, Grants(state_dir, rules, file), leads, file)
    for door in doors:
        window.add_door(*door)
    return window
