"""A portal, a store and a transport in memory, for tests of the shell."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.cred.portal import Portal
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from zope.interface import implementer

from popdrop.errors import BadCredentials, InUse, NoSuchUser, PopdropError
from popdrop.factory import POP3Factory
from popdrop.interfaces import IBlocks, IMaildrop, ISessionLog, IStore
from popdrop.listing import Listing
from popdrop.ops.gate import Gate
from popdrop.policy import Policy, Timing
from popdrop.protocol import POP3Protocol
from popdrop.realm import Realm
from popdrop.throttle import from_spec
from popdrop.values import Account, Owner, SessionRecord, Verified
from popdrop.wire import Outgoing


def octets_as_sent(stored: bytes) -> int:
    """What LIST must say of `stored`."""
    text = stored.replace(b"\r\n", b"\n")
    if text and not text.endswith(b"\n"):
        text += b"\n"
    return len(text) + text.count(b"\n")


@implementer(IBlocks)
class Blocks:
    def __init__(self, drop: Drop, stored: bytes, lines: int | None) -> None:
        self._drop = drop
        outgoing = Outgoing(lines=lines)
        step = drop.block
        self._blocks = [
            out
            for i in range(0, len(stored), step)
            if (out := outgoing.feed(stored[i : i + step])) or True
        ]
        self._blocks.append(outgoing.end())
        self.closed = False

    async def read(self) -> bytes:
        while self._blocks:
            if self._drop.hold_reads is not None:
                await self._drop.hold_reads()
            if self._drop.fail_reads_after is not None:
                if self._drop.fail_reads_after == 0:
                    raise self._drop.failure
                self._drop.fail_reads_after -= 1
            block = self._blocks.pop(0)
            if block:
                return block
        return b""

    def close(self) -> None:
        self.closed = True


@implementer(IMaildrop)
class Drop:
    """An `IMaildrop` whose every step a test can delay or break."""

    def __init__(self, store: Store, messages: list[bytes]) -> None:
        self.store = store
        self.messages = messages
        self.whole = Listing(octets_as_sent(m) for m in messages)
        self.listing = self.whole
        if store.promises:
            self.listing = Listing.promised(len(self.whole), self.whole.octets)
        self.measure_answers: list[Deferred[None]] = []
        self.block = store.block
        self.hot = store.hot
        self.released = 0
        self.hold_reads: Callable[[], Deferred[None]] | None = None
        self.fail_reads_after: int | None = None
        self.failure: Exception = OSError(5, "not for the wire")
        self.commit_answer: Deferred[None] | None = None
        self.wants_seen = False
        self.seen: set[int] | None = None

    async def measure(self) -> None:
        assert not self.listing.measured, "the sizes are there"
        if self.measure_answers:
            await self.measure_answers.pop(0)
        self.listing = self.whole

    async def identify(self) -> None:
        self.listing = self.whole
        self.listing = self.listing.with_ids(b"id%d" % i for i in range(len(self.messages)))

    def ready(self, index: int, lines: int | None, ahead: int = 0) -> bytes | None:
        assert self.listing.measured, "where the messages lie is not known yet"
        if not self.hot:
            return None
        return Outgoing(lines=lines).whole(self.messages[index])

    async def fetch(self, index: int, lines: int | None) -> IBlocks:
        assert self.listing.measured, "where the messages lie is not known yet"
        return Blocks(self, self.messages[index], lines)

    async def commit(self, deleted: Collection[int], seen: Collection[int] = ()) -> None:
        self.seen = set(seen)
        if self.commit_answer is not None:
            await self.commit_answer
        self.store.messages = [m for i, m in enumerate(self.messages) if i not in deleted]

    def release(self) -> Deferred[None]:
        self.released += 1
        self.store.held = False
        return succeed(None)


@implementer(IStore)
class Store:
    """One maildrop, for whoever logs in."""

    def __init__(self, messages: list[bytes]) -> None:
        self.messages = messages
        self.block = 100
        self.hot = True
        self.promises = False
        self.held = False
        self.opened: list[Drop] = []
        self.open_answer: Deferred[None] | None = None
        self.owners: list[Owner] = []

    async def open(self, owner: Owner) -> IMaildrop:
        self.owners.append(owner)
        if self.held:
            raise InUse("maildrop is locked")
        if self.open_answer is not None:
            await self.open_answer
        self.held = True
        drop = Drop(self, list(self.messages))
        self.opened.append(drop)
        return drop


@implementer(ICredentialsChecker)
class Checker:
    """`bob` with the password `secret`, which is his APOP secret too if `apop`."""

    credentialInterfaces = (IUsernamePassword, IUsernameHashedPassword)

    def __init__(self) -> None:
        self.answer: Deferred[None] | None = None
        self.accounts = {b"bob": Account(b"bob")}
        self.asked = 0

    def requestAvatarId(self, credentials: Any) -> Deferred[bytes | tuple[()]]:
        return Deferred.fromCoroutine(self._verify(credentials))

    async def _verify(self, credentials: Any) -> bytes:
        self.asked += 1
        if self.answer is not None:
            await self.answer
        if credentials.username not in self.accounts:
            raise NoSuchUser("Authentication failed.")
        if not credentials.checkPassword(b"secret"):
            raise BadCredentials("Authentication failed.")
        return Verified(self.accounts[credentials.username])


@implementer(ISessionLog)
class Records:
    def __init__(self) -> None:
        self.records: list[SessionRecord] = []

    def event(self, record: SessionRecord) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


class Transport(StringTransport):
    """Counts writes, and closes as a real one does: once what it holds has left."""

    def __init__(self, peer: str = "127.0.0.1") -> None:
        super().__init__(
            hostAddress=IPv4Address("TCP", "127.0.0.1", 110),
            peerAddress=IPv4Address("TCP", peer, 40000),
        )
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        if type(data) is not bytes:
            raise TypeError("Data must be bytes")  # as real transports do
        if data:
            self.writes.append(bytes(data))
        super().write(data)

    def setTcpNoDelay(self, enabled: bool) -> None:
        pass

    def setTcpKeepAlive(self, enabled: bool) -> None:
        pass


class Server:
    """A factory over doubles, and a clock."""

    def __init__(
        self,
        messages: list[bytes] | None = None,
        policy: Policy | None = None,
        throttle: str = "off",
        timing: Timing | None = None,
        gate: Gate | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.store = Store(
            messages if messages is not None else [b"A: 1\n\nbody\n", b"B: 2\n\n.\n"]
        )
        self.checker = Checker()
        self.records = Records()
        policy = policy or Policy(hostname="mail.example.org")
        portal = Portal(Realm(self.store, NoPool(), policy=policy))  # type: ignore[arg-type]
        portal.registerChecker(self.checker)
        self.factory = POP3Factory(
            portal,
            policy,
            from_spec(throttle, self.clock),  # type: ignore[arg-type]
            self.records,
            self.clock,  # type: ignore[arg-type]
            timing=timing,
            gate=gate,
        )

    def connect(self, peer: str = "127.0.0.1") -> tuple[POP3Protocol, Transport]:
        protocol = self.factory.buildProtocol(IPv4Address("TCP", peer, 40000))
        assert isinstance(protocol, POP3Protocol)
        transport = Transport(peer)
        protocol.makeConnection(transport)
        return protocol, transport

    def logged_in(self) -> tuple[POP3Protocol, Transport]:
        protocol, transport = self.connect()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
        assert b"+OK bob has" in transport.value(), transport.value()
        transport.clear()
        transport.writes.clear()
        return protocol, transport


class NoPool:
    """For a realm that never has to look an account up."""

    def run(self, work: Any, *args: Any) -> Any:
        raise AssertionError("no look-up was expected")


__all__ = ["PopdropError", "Server", "Transport", "octets_as_sent"]
