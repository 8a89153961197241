"""`POP3Factory`: all connections of one listener."""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

from twisted.cred.portal import Portal
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.internet.protocol import ServerFactory
from twisted.internet.task import deferLater

from popdrop.accepting import Complaint
from popdrop.deadlines import Deadlines
from popdrop.interfaces import IAnswers, IRelayWindow, ISessionLog, IThrottle
from popdrop.listeners import peer_facts
from popdrop.ops.gate import Gate
from popdrop.policy import Policy, Timing
from popdrop.protocol import POP3Protocol

CHALLENGE_OCTETS: Final = 16
"""Random octets of a challenge: 128 bits. Fetched for many at a time, used once each."""
LOGINS_A_TURN: Final = 16
"""Logins that begin in one turn of the reactor: some 70 us each, before a thread has them."""
TURN_SECONDS: Final = 0.002
"""What counts as one turn, so that no timer is needed where few log in."""
TURNED_AWAY_QUIET: Final = 1.0
"""Seconds between two lines in the log about too many connections."""
STOP_STEP: Final = 0.05
"""Seconds between two looks at the connections that are left when the server stops."""


class POP3Factory(ServerFactory):
    """All connections of one listener.

    `tls` is the context factory of STLS, `None` without it. `proof_key` is a random key of this
    process, for the throttle. `takeover` is in seconds, 0 for never: a session idle for so long
    yields to a new one of its account. `holders` are the logged-in sessions by account, over all
    listeners of a service; `ask_others` asks other processes, which know of more, to let a session
    of this account yield so. `answers` are the accounts, for mechanisms that ask before the login;
    `None` where no such mechanism is offered. `gate` are the access rules, `relay` is told of
    logins. `proxied`: our own address is another for each connection, as its PROXY header says.
    `emptied` is called when the last connection is gone and done with.
    """

    protocol: Callable[[], POP3Protocol] = POP3Protocol  # type: ignore[assignment]
    noisy = False

    def __init__(
        self,
        portal: Portal,
        policy: Policy,
        throttle: IThrottle,
        session_log: ISessionLog,
        clock: IReactorTime,
        *,
        timing: Timing | None = None,
        tls: object | None = None,
        implicit_tls: bool = False,
        trusted_address: bool = True,
        proxied: bool = False,
        emptied: Callable[[], None] | None = None,
        listener: str = "",
        proof_key: bytes = b"",
        takeover: float = 0.0,
        holders: dict[bytes, POP3Protocol] | None = None,
        ask_others: Callable[[bytes], None] | None = None,
        answers: IAnswers | None = None,
        gate: Gate | None = None,
        relay: IRelayWindow | None = None,
    ) -> None:
        self.portal = portal
        self.answers = answers
        self.relay = relay
        self.policy = policy
        self.throttle = throttle
        self.session_log = session_log
        self.clock = clock
        self.deadlines = Deadlines(clock)
        self.crowd = Complaint(clock, TURNED_AWAY_QUIET)
        self.timing = timing or Timing()
        self.tls = tls
        self.implicit_tls = implicit_tls
        self.trusted_address = trusted_address
        self._proxied = proxied
        self._emptied = emptied
        self.listener = listener
        self.proof_key = proof_key or secrets.token_bytes(32)
        self.takeover = takeover
        self.holders: dict[bytes, POP3Protocol] = {} if holders is None else holders
        self.ask_others = ask_others
        self.protocols: set[POP3Protocol] = set()
        self._leaving: dict[IDelayedCall, IAddress] = {}
        self.stopping = False
        self._stop_at = math.inf
        self._waiting: deque[Deferred[None]] = deque()
        self._turn_began = 0.0
        self._begun = 0
        self.inherits_options = False
        """Whether the listening socket hands TCP_NODELAY and keepalive on to its connections."""
        self._local: IAddress | None = None
        self._random = b""
        self._gate = gate
        self.nonce: Callable[[], bytes] = self._nonce
        """128 random bits as hexadecimal digits, for SCRAM and CRAM-MD5.

        One bound method for all sessions: each keeps it.
        """

    def buildProtocol(  # type: ignore[override]
        self, addr: IAddress | None
    ) -> POP3Protocol | None:
        """`None` for a client that the access rules refuse: Twisted closes its connection.

        Where a proxy knows the address, the protocol asks when its header has come.
        """
        entry: bool | Deferred[bool] = True
        if self._gate is not None and self.trusted_address:
            entry = self.admits(peer_facts(cast("IAddress", addr)).address)
        if entry is False:
            return None
        protocol = cast("POP3Protocol", super().buildProtocol(cast("IAddress", addr)))
        if isinstance(entry, Deferred):
            protocol.entry = entry
        return protocol

    def admits(self, address: str | None) -> bool | Deferred[bool]:
        """Whether the access rules let this client in; a refusal is logged."""
        return True if self._gate is None else self._gate.admits(address)

    def local(self, transport: Any) -> IAddress:
        """Our own address, of which the port counts: the same for all connections."""
        if self._proxied or not self.trusted_address:
            return cast("IAddress", transport.getHost())
        if self._local is None:
            self._local = transport.getHost()
        return self._local

    def challenge(self) -> bytes:
        """A msg-id of 128 random bits (RFC 1939 section 7), `b""` where no checker does APOP."""
        if not self.policy.apop:
            return b""
        stamp = f"<{self._fresh()}.{int(self.clock.seconds())}@{self.policy.hostname}>"
        return stamp.encode("ascii", "replace")

    def _nonce(self) -> bytes:
        return self._fresh().encode("ascii")

    def _fresh(self) -> str:
        if len(self._random) < CHALLENGE_OCTETS:
            self._random = secrets.token_bytes(256 * CHALLENGE_OCTETS)
        octets, self._random = self._random[:CHALLENGE_OCTETS], self._random[CHALLENGE_OCTETS:]
        return octets.hex()

    def forget(self, protocol: POP3Protocol) -> None:
        """A connection is gone."""
        self.protocols.discard(protocol)
        if self._emptied is not None and not self.protocols and not self.stopping:
            self._emptied()

    def turn(self, now: float) -> Deferred[None] | None:
        """When a login may begin; `None`: at once. `now` is the clock's.

        Whoever is logged in already must not wait until hundreds have begun that came at once.
        """
        if now - self._turn_began > TURN_SECONDS:
            self._turn_began, self._begun = now, 0
        if self._begun < LOGINS_A_TURN and not self._waiting:
            self._begun += 1
            return None
        waits: Deferred[None] = Deferred()
        self._waiting.append(waits)
        if len(self._waiting) == 1:
            self.clock.callLater(0, self._next_turn)
        return waits

    def _next_turn(self) -> None:
        for _ in range(min(LOGINS_A_TURN, len(self._waiting))):
            waits = self._waiting.popleft()
            if not waits.called:  # else the client has gone meanwhile
                waits.callback(None)
        if self._waiting:
            self.clock.callLater(0, self._next_turn)

    def leave_later(self, peer: IAddress, seconds: float) -> None:
        """Tell the throttle that a connection is gone, after so many seconds."""
        if seconds <= 0 or self.stopping:
            self.throttle.leave(peer)
            return

        def leave() -> None:
            del self._leaving[call]
            self.throttle.leave(peer)

        call = self.clock.callLater(seconds, leave)
        self._leaving[call] = peer

    async def stop(self, grace: float) -> None:
        """Let effects in progress end for `grace` seconds; a commit always ends."""
        self.stopping = True
        for call, peer in self._leaving.items():
            call.cancel()
            self.throttle.leave(peer)
        self._leaving.clear()
        self._stop_at = min(self._stop_at, self.clock.seconds() + grace)
        while self.protocols:
            late = self.clock.seconds() >= self._stop_at
            for protocol in set(self.protocols):
                protocol.shut_down(late)
            await deferLater(self.clock, STOP_STEP)

    def hurry(self) -> None:
        """The grace of a stop is over, or there will be none."""
        self._stop_at = self.clock.seconds()
