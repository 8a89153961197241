"""`POP3Protocol`: the shell that moves octets and performs the session's effects.

The session says what is to be done; here is when, and with whom. One coroutine per effect, not per
command: commands that need no store never meet a Deferred. Replies to all that one read held leave
in one write. A client that does not read its answers is not read from.

Over 400 lines since input, output, effects and time of one connection share one state.
"""

from __future__ import annotations

import secrets
import typing
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, cast

from OpenSSL.SSL import Error as TLSError
from twisted.cred.error import LoginFailed
from twisted.cred.portal import Portal
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IHalfCloseableProtocol,
    IPushProducer,
    IReactorTime,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.mail.interfaces import IMailboxPOP3
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop import legacy
from popdrop.accepting import FAREWELL, Complaint
from popdrop.certs import tls_facts
from popdrop.credentials import FAILED, Cleartext, Credentials
from popdrop.deadlines import Deadlines, Place
from popdrop.errors import BadCredentials, PopdropError, TemporaryFailure
from popdrop.interfaces import IAnswers, IMaildrop, IRelayWindow, ISessionLog, IThrottle
from popdrop.listeners import peer_facts
from popdrop.policy import Mind, Policy, Timing
from popdrop.sasl import CHANNEL_BINDING, Query
from popdrop.session import (
    Ask,
    Commit,
    Fetch,
    Hangup,
    Identify,
    Login,
    Measure,
    Refusal,
    Result,
    Session,
    StartTLS,
)
from popdrop.values import Account, PeerFacts, SessionRecord, normalised
from popdrop.wire import Lines

log = Logger()

UNREAD_LIMIT: Final = 4096
"""Octets of unanswered input after which the client is not read from: Dovecot's number too."""
WRITE_SIZE: Final = 114_688
"""Octets of replies gathered before they are written in the middle of a read.

With a message of usual size behind them, and with TLS, these are just below the 128 KiB that
Twisted gives to one send(2). 64 KiB at a time took 5 % more of a processor, 32 RETR in flight.
"""
TURN: Final = 20_000
"""What one connection may do in one turn of the reactor, in the cost of a NOOP: about 10 ms."""
SHORTEST_FETCH: Final = len(b"RETR 1\r\n")
"""Octets of a command that a message is sent for: so many of them wait at most."""
ROWS_COST: Final = 500
"""Of a block of rows of LIST or UIDL."""
FETCH_COST: Final = 100
"""Of a message from memory, beside one for each 256 octets."""
CLOSE_GRACE: Final = 10.0
"""Seconds for a farewell and TLS's own to get through before the connection is aborted.

Some clients never answer the closing of TLS, and Twisted would wait for them.
"""
STOP_CLOSE_GRACE: Final = 1.0
"""The same when the server stops."""
STOP_HANDSHAKE_GRACE: Final = 3.0
"""Seconds for a handshake to be finished when the server stops, so that its client is greeted."""
ASKED_SECONDS: Final = 0.005
"""Seconds after which a question to the accounts is answered at the earliest. The look-ups take
45 us for names that have an account and 37 us for others, and no throttle sees them."""
NOBODY: Final = UNIXAddress(None)
"""A peer without an address, as long as only a proxy knows it."""
UNKNOWN: Final = PeerFacts()
"""Of a peer that has not said anything yet."""
RECORDED: Final = frozenset(
    {"tls-required", "cleartext", "malformed-response", "apop-account", CHANNEL_BINDING}
)
"""Refusals that are failed logins, and so belong into the session log."""
SHUTTING_DOWN: Final = b"-ERR [SYS/TEMP] server is shutting down\r\n"
TLS_RECORD: Final = b"\x16\x03"
"""How a TLS handshake begins: on a plain port it is a client with a wrong setting."""


def internal_error(what: str) -> TemporaryFailure:
    """Log the exception being handled; the client gets a number to quote and nothing else."""
    number = secrets.token_hex(4)
    log.failure("internal error {number}: {what}", number=number, what=what)
    return TemporaryFailure(f"internal error, see log {number}")


class Home(typing.Protocol):
    """What a connection needs of its factory (`factory.POP3Factory` says what each is)."""

    portal: Portal
    answers: IAnswers | None
    relay: IRelayWindow | None
    policy: Policy
    throttle: IThrottle
    session_log: ISessionLog
    clock: IReactorTime
    deadlines: Deadlines
    crowd: Complaint
    timing: Timing
    tls: object | None
    implicit_tls: bool
    trusted_address: bool
    listener: str
    proof_key: bytes
    takeover: float
    holders: dict[bytes, POP3Protocol]
    ask_others: Callable[[bytes], None] | None
    protocols: set[POP3Protocol]
    stopping: bool
    inherits_options: bool
    nonce: Callable[[], bytes]

    def local(self, transport: Any) -> IAddress:
        """Our own address."""

    def challenge(self) -> bytes:
        """A fresh APOP challenge, `b""` where APOP is off."""

    def forget(self, protocol: POP3Protocol) -> None:
        """A connection is gone."""

    def leave_later(self, peer: IAddress, seconds: float) -> None:
        """Tell the throttle that a connection is gone, after so many seconds."""

    def turn(self, now: float) -> Deferred[None] | None:
        """When a login may begin; `None`: at once."""

    def admits(self, address: str | None) -> bool | Deferred[bool]:
        """Whether the access rules let this client in; a refusal is logged."""


@implementer(IHalfCloseableProtocol, IPushProducer)
class POP3Protocol(Protocol):
    """One connection."""

    # A third of what they would take in a dictionary of more than 30 names, which is not shared.
    __slots__ = (
        "_account",
        "_address",
        "_admitted",
        "_again",
        "_answer_due",
        "_born",
        "_choked",
        "_closing",
        "_committing",
        "_drained",
        "_drop",
        "_effect",
        "_entered",
        "_facts",
        "_first",
        "_gone",
        "_half_closed",
        "_learned",
        "_leaving",
        "_lines",
        "_mechanism",
        "_met",
        "_place",
        "_progress",
        "_read_only",
        "_reason",
        "_registered",
        "_rows",
        "_session",
        "_spent",
        "_unread",
        "_verified",
        "_working",
        "connected",
        "entry",
        "factory",
        "transport",
    )

    factory: Home
    transport: Any  # TCP, TLS over it, a Unix socket, standard input

    def __init__(self) -> None:
        self.connected = 0
        self.entry: Deferred[bool] | None = None
        """Whether the client may connect, where a name must be asked for first."""
        self._place: Place | None = None
        self._lines = Lines()
        self._effect: Deferred[None] | None = None
        self._committing = False
        self._rows: Iterator[bytes] | None = None
        self._learned: Result | None = None
        self._drop: IMaildrop | None = None
        self._leaving: Any = None
        self._drained: Deferred[None] | None = None
        self._again: IDelayedCall | None = None
        self._spent = 0
        self._choked = False
        self._unread = False
        self._working = False
        self._closing = False
        self._gone = False
        self._half_closed = False
        self._admitted = False
        self._registered = False
        self._met = False
        self._first = True
        self._verified = False
        self._read_only = False
        self._answer_due = 0.0
        self._reason = "disconnected"
        self._account = b""
        self._entered: bytes | None = None
        self._mechanism: str | None = None
        self._facts = UNKNOWN

    # Connection

    def connectionMade(self) -> None:
        factory = self.factory
        self._born = self._progress = factory.clock.seconds()
        # Behind a proxy the address is the proxy's until its header has come.
        self._address = self.transport.getPeer() if factory.trusted_address else NOBODY
        self._session = Session(
            factory.challenge(), factory.policy, factory.implicit_tls, factory.nonce
        )
        self._wait(factory.timing.login)
        factory.protocols.add(self)
        if factory.stopping or not self._admit():
            self._turn_away()
            return
        if not factory.inherits_options:
            try:
                self.transport.setTcpNoDelay(True)
                self.transport.setTcpKeepAlive(True)
            except AttributeError:
                pass  # a Unix socket or standard input
        self._registered = True
        self.transport.registerProducer(self, True)
        if self.entry is None:
            self.transport.write(self._session.greeting())
            return
        if factory.implicit_tls:
            self.transport.pauseProducing()  # no handshake either until it may enter
        self._begin([], self._enter(self.entry, greet=True))

    async def _enter(self, entry: Deferred[bool], greet: bool) -> None:
        if not await entry:
            self._refuse()
        elif greet and not self._closing:
            if self.factory.implicit_tls:
                self.transport.resumeProducing()
            self.transport.write(self._session.greeting())

    def _refuse(self) -> None:
        """Close without a word: the access rules do not want this client."""
        if self.factory.implicit_tls:
            self._reason, self._closing = "refused", True
            self._abort()
        else:
            self._hang_up(b"", "refused")

    def _turn_away(self) -> None:
        stopping = self.factory.stopping
        if stopping:
            log.info("server is shutting down: {peer} turned away", peer=self._host())
        else:
            self.factory.crowd.say("too many connections: {peer} turned away", peer=self._host())
        if self.factory.implicit_tls:
            # Nothing can be said before the handshake, and it may never come.
            self._reason, self._closing = "limit", True
            self._abort()
        else:
            self._hang_up(SHUTTING_DOWN if stopping else FAREWELL, "limit")

    def _admit(self) -> bool:
        self._admitted = self.factory.throttle.admit(self._address)
        return self._admitted

    def _host(self) -> str:
        return self._facts.address or normalised(getattr(self._address, "host", "") or "local")

    def _meet(self) -> bool:
        """Learn of the peer; at the first octets, since a PROXY header comes before them.

        False: it turned out to be unwanted, or to have too many connections.
        """
        self._met = True
        transport = self.transport
        peer = transport.getPeer()
        facts = peer_facts(peer, self.factory.local(transport), self.factory.trusted_address)
        if self._session.secured:
            facts = tls_facts(transport, facts)
        self._facts = facts
        self._session.met(self._facts)
        entry = True if self.factory.trusted_address else self.factory.admits(facts.address)
        if entry is False:
            self._refuse()
            return False
        if self._address is NOBODY and facts.address is not None:
            self.factory.throttle.leave(self._address)
            self._address = peer
            if not self._admit():
                self._turn_away()
                return False
        if isinstance(entry, Deferred):
            self._begin([], self._enter(entry, greet=False))
        return True

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._gone = self._closing = True
        self._leave_place()
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if isinstance(reason.value, TLSError):
            self._reason = "tls-error"
            log.info("TLS with {peer} failed", peer=self._host())
        if not self._committing:
            if self._effect is not None:
                self._effect.cancel()
            self._release()
        self._rows = None
        if self._admitted:
            # Who hangs up before a failure is answered gains no time: the connection counts until
            # then, or guesses could come as fast as they are verified.
            left = self._answer_due - self.factory.clock.seconds()
            self.factory.leave_later(self._address, left)
        if not self._committing:
            self._finish()

    def _finish(self) -> None:
        """Once the connection is gone and no commit is in progress any more."""
        self._quit_user()
        probed = self._reason == "quit-before-login" and self._session.user is not None
        if self._session.logged_in or self._reason in ("quit", "commit-failed") or probed:
            self._record("end", self._reason)
        self.factory.forget(self)

    def _quit_user(self) -> None:
        user, self._entered = self._entered, None
        if user is not None:
            self.factory.throttle.quit(user)

    def readConnectionLost(self) -> None:
        """The client sends no more; what it has asked for is still answered."""
        self._half_closed = True
        if self._effect is None and self._rows is None and not self._closing:
            self._run()

    def writeConnectionLost(self) -> None:
        """The client reads no more: nothing that is left to do can reach it."""
        self._abort()

    def _hang_up(self, farewell: bytes, reason: str) -> None:
        self._reason = reason
        self._closing = True
        self._progress = self.factory.clock.seconds()
        self._lines.clear()
        if farewell:
            # With TLS that is one packet, and not two.
            getattr(self.transport, "write_last", self.transport.write)(farewell)
        if self._registered:
            # A transport with a paused producer would wait for it and never close.
            self._registered = False
            self.transport.unregisterProducer()
        self.transport.loseConnection()
        if self._choked or self._session.secured:
            # TLS waits for the peer's own closing, and a full transport for its reading.
            self._rearm()

    def shut_down(self, late: bool) -> None:
        """The server stops: say so and close, unless an effect or a listing is in progress.

        `late`: what is in progress is cut off too, but for a commit.
        """
        if self._closing:
            waited = self.factory.clock.seconds() - self._progress
            if self._choked and not self._met:
                over = waited >= STOP_HANDSHAKE_GRACE
            else:
                over = self._effect is None and not self._choked
            if waited >= STOP_CLOSE_GRACE and (over or late) and not self._committing:
                self._abort()
        elif self._effect is None and self._rows is None:
            self._hang_up(SHUTTING_DOWN, "shutdown")
        elif late and not self._committing:
            self._reason = "shutdown"
            self._abort()

    def _abort(self) -> None:
        # Standard input cannot be aborted.
        getattr(self.transport, "abortConnection", self.transport.loseConnection)()

    # Time

    def tick(self) -> None:
        """Due at the earliest moment a limit could be reached."""
        self._place = None
        now = self.factory.clock.seconds()
        timing = self.factory.timing
        if self._closing:
            limit, since = (timing.write if self._choked else CLOSE_GRACE), self._progress
        elif not (self._session.logged_in or self._verified):
            limit, since = timing.login, self._born
        elif self._choked:
            limit, since = timing.write, self._progress
        elif self._effect is not None:
            limit, since = timing.idle, now
        else:
            limit, since = timing.idle, self._progress
        left = since + limit - now
        if left > 0:
            self._wait(left)
            return
        if self._closing or self._choked:
            self._reason = self._reason if self._closing else "write-timeout"
            self._abort()
            return
        # No farewell: RFC 1939 section 3 wants the connection closed without a response.
        self._hang_up(b"", "idle-timeout" if self._session.logged_in else "login-timeout")

    def _wait(self, seconds: float) -> None:
        """Be called then, or earlier: in time for a client that stops reading from now on."""
        timing = self.factory.timing
        self._place = self.factory.deadlines.put(self, min(seconds, timing.write))

    def _rearm(self) -> None:
        """Be called in time for a limit that is nearer than the one that is waited for."""
        self._leave_place()
        if not self._gone:
            self._place = self.factory.deadlines.put(self, CLOSE_GRACE)

    def _leave_place(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            self.factory.deadlines.drop(self, place)

    # Input

    def dataReceived(self, data: bytes) -> None:
        if self._closing:
            return
        self._progress = self.factory.clock.seconds()
        if not self._met and not self._meet():
            return
        if self._first:
            self._first = False
            if data.startswith(TLS_RECORD):
                log.info("{peer} speaks TLS on a plain port", peer=self._host())
                self._hang_up(b"", "tls-on-plain-port")
                return
        self._lines.feed(data)
        waits = self._effect is not None or self._rows is not None or self._choked
        if not waits and self._again is None:
            self._run()
        elif len(self._lines) > UNREAD_LIMIT and not self._unread:
            self._unread = True
            self.transport.pauseProducing()

    def _run(self) -> None:
        """Answer what waits, until an effect, a full transport or the end of the input.

        Or until others must have their turn.
        """
        if self._working or self._again is not None:
            return
        self._working = True
        self._spent = 0
        out: list[bytes] = []
        size = 0
        lines, session = self._lines, self._session
        try:
            while not self._closing and not self._choked:
                if self._spent >= TURN:
                    self._again = self.factory.clock.callLater(0, self._go_on)
                    break
                self._spent += 1
                if self._learned is not None:
                    result: Result = self._learned
                    self._learned = None
                elif self._rows is not None:
                    self._spent += ROWS_COST
                    block = next(self._rows, None)
                    if block is None:
                        self._rows = None
                        continue
                    result = block
                else:
                    lines.limit = session.line_limit
                    line = lines.next()
                    if line is None:
                        break
                    result = session.line(line) if type(line) is bytes else self._overlong(line)
                if type(result) is not bytes:
                    answer = self._act(result, out)
                    if answer is None:
                        size = size if out else 0
                        if self._effect is not None:
                            break
                        continue
                    result = answer
                out.append(result)
                size += len(result)
                if size >= WRITE_SIZE:
                    self._flush(out)
                    size = 0
            if self._gone:
                return
            self._flush(out)
            self._settle()
        except Exception:
            self._hang_up(internal_error("session").line() + b"\r\n", "internal-error")
        finally:
            self._working = False

    def _go_on(self) -> None:
        self._again = None
        if self._effect is None and not self._closing:
            self._run()

    def _overlong(self, kind: Any) -> Result:
        return self._session.overlong(kind)

    def _flush(self, out: list[bytes]) -> None:
        if out:
            self.transport.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def _settle(self) -> None:
        """After the input was worked through: read on, or close behind a half-closed client."""
        if self._closing or self._effect is not None or self._choked or self._again is not None:
            return
        if self._unread:
            # All whole lines are answered; what is left of one is within its own limit.
            self._unread = False
            self.transport.resumeProducing()
        if self._half_closed:
            self._hang_up(b"", self._reason)

    # Output

    def pauseProducing(self) -> None:
        """The transport holds as much as it likes to."""
        self._choked = True

    def resumeProducing(self) -> None:
        """The transport has room again: the client reads."""
        self._choked = False
        self._progress = self.factory.clock.seconds()
        drained, self._drained = self._drained, None
        if drained is not None:
            drained.callback(None)
        elif self._effect is None and not self._closing:
            self._run()

    def stopProducing(self) -> None:
        """The connection is gone; `connectionLost` does the rest."""
        self._choked = True

    async def _room(self) -> None:
        while self._choked:
            self._drained = Deferred()
            await self._drained

    # Effects

    def _act(self, result: Result, out: list[bytes]) -> bytes | None:
        """Do what the session asks for. Returns octets that only need to be sent, else `None`."""
        match result:
            case Fetch():
                body = self._ready(result)
                if body is not None:
                    self._spent += FETCH_COST + len(body) // 256
                    self._count_top(result, len(body))
                    out.append(self._session.fetching(result))
                    return body
                self._begin(out, self._fetch(result))
            case Refusal():
                self._refusal(result)
                return result.reply
            case Login():
                self._begin(out, self._login(result.credentials))
            case Measure() | Identify():
                self._begin(out, self._learn(result))
            case Ask():
                self._begin(out, self._ask(result.query))
            case Commit():
                seen = result.seen and cast("IMaildrop", self._drop).wants_seen
                if result.deleted or seen or not self._leave(out):
                    self._committing = True
                    self._begin(out, self._commit(result))
            case StartTLS():
                self._start_tls(result, out)
            case Hangup():
                self._flush_and_hang_up(result, out)
            case _:
                self._rows = cast("Iterator[bytes]", result)
        return None

    def _count_top(self, fetch: Fetch, octets: int) -> None:
        # RETR's octets are known before; of a TOP only what has been sent tells.
        if fetch.lines is not None:
            self._session.tally.top_octets += octets

    def _flush_and_hang_up(self, hangup: Hangup, out: list[bytes]) -> None:
        if hangup.reason not in ("quit", "quit-before-login"):
            log.info("{peer}: closed: {why}", peer=self._host(), why=hangup.reason)
        out.append(hangup.farewell)
        farewell = b"".join(out)
        out.clear()
        self._hang_up(farewell, hangup.reason)

    def _begin(self, out: list[bytes], coroutine: Coroutine[Any, Any, None]) -> None:
        self._flush(out)
        effect = Deferred.fromCoroutine(coroutine)
        self._effect = effect
        effect.addCallbacks(self._performed, self._crashed)

    def _performed(self, _: object) -> None:
        self._effect = None
        if not self._closing:
            self._run()

    def _crashed(self, failure: Failure) -> None:
        if isinstance(failure.value, CancelledError) and self._gone:
            return
        log.failure("an effect failed for {peer}", failure=failure, peer=self._host())
        self._abort()

    def _ready(self, fetch: Fetch) -> bytes | None:
        if self._drop is None:
            raise RuntimeError("no maildrop is open")
        return self._drop.ready(fetch.index, fetch.lines, len(self._lines) // SHORTEST_FETCH)

    def _refusal(self, refusal: Refusal) -> None:
        if refusal.reason in RECORDED:
            self._record("failure", refusal.reason)
        else:
            log.info("{peer}: bad command: {why}", peer=self._host(), why=refusal.reason)

    def _start_tls(self, effect: StartTLS, out: list[bytes]) -> None:
        out.append(effect.reply)
        self._flush(out)
        # Octets that came behind STLS were not protected: they are no commands (CVE-2011-0411).
        self._lines.clear()
        self._session.secure()
        self._met = False
        self.transport.startTLS(self.factory.tls)
        # The TLS layer has buffers of its own, and will say when they are full.
        self._choked = False

    async def _fetch(self, fetch: Fetch) -> None:
        drop = cast("IMaildrop", self._drop)
        try:
            blocks = await drop.fetch(fetch.index, fetch.lines)
        except PopdropError as error:
            self._failed(error)
            return
        try:
            try:
                block = await blocks.read()
            except PopdropError as error:
                self._failed(error)
                return
            except OSError:
                self._failed(internal_error("reading a message"))
                return
            self._count_top(fetch, len(block))
            self.transport.write(self._session.fetching(fetch) + block)
            while True:
                await self._room()
                if self._spent >= TURN:
                    # A transport that has lost its peer never says that it is full.
                    await deferLater(self.factory.clock, 0)
                    self._spent = 0
                block = await blocks.read()
                if not block:
                    return
                self._spent += FETCH_COST + len(block) // 256
                self._count_top(fetch, len(block))
                self.transport.write(block)
        except (PopdropError, OSError) as error:
            # Half a message is out: an end of it would be a lie.
            log.error("{peer}: a message broke off: {why}", peer=self._host(), why=str(error))
            self._reason = "read-error"
            self._abort()
        finally:
            blocks.close()

    def _failed(self, error: PopdropError) -> None:
        log.error(
            "{peer}: {text} {detail}", peer=self._host(), text=error.text, detail=error.detail
        )
        answer = self._session.failed(error)
        if isinstance(answer, Hangup):
            self._hang_up(answer.farewell, answer.reason)
        else:
            self.transport.write(answer)

    async def _learn(self, effect: Measure | Identify) -> None:
        drop = cast("IMaildrop", self._drop)
        try:
            await (drop.identify() if isinstance(effect, Identify) else drop.measure())
        except PopdropError as error:
            self._failed(error)
            return
        except CancelledError:
            raise
        except Exception:
            self._failed(internal_error("measuring or identifying messages"))
            return
        self._learned = self._session.learned(drop.listing)

    async def _commit(self, commit: Commit) -> None:
        try:
            if commit.deleted or self._drop is not None:
                await cast("IMaildrop", self._drop).commit(commit.deleted, commit.seen)
            answer = self._session.committed()
        except PopdropError as error:
            log.error(
                "{peer}: QUIT: {text} {detail}",
                peer=self._host(),
                text=error.text,
                detail=error.detail,
            )
            answer = cast("Hangup", self._session.failed(error))
        except Exception:
            answer = cast("Hangup", self._session.failed(internal_error("QUIT")))
        released = self._leaving or self._release()
        if released is not None:
            await released
        self._committing = False
        self._reason = answer.reason
        if self._gone:
            self._finish()
        else:
            self._hang_up(answer.farewell, answer.reason)

    def _leave(self, out: list[bytes]) -> bool:
        """QUIT where nothing is deleted; `False` if the maildrop is not free at once."""
        released = self._release()
        if isinstance(released, Deferred) and released.called:
            self._flush_and_hang_up(self._session.committed(), out)
            return True
        self._leaving = released
        return False

    def _release(self) -> Any:
        drop, self._drop = self._drop, None
        if self.factory.holders.get(self._account) is self:
            del self.factory.holders[self._account]
        return drop.release() if drop is not None else None

    def give_way(self, takeover: float) -> None:
        """Yield to a new session of this account if this one has been idle for `takeover` s."""
        idle = self.factory.clock.seconds() - self._progress
        if takeover and idle >= takeover and self._effect is None and not self._closing:
            log.info("{peer}: yields to a new session of its user", peer=self._host())
            self._release()
            self._hang_up(b"-ERR [SYS/TEMP] another session of yours took over\r\n", "takeover")

    # Login

    async def _ask(self, query: Query) -> None:
        clock = self.factory.clock
        received = clock.seconds()
        try:
            if self.factory.answers is None:
                raise RuntimeError("a mechanism is offered that asks the accounts; there are none")
            answer = await self.factory.answers.answer(query)
            wait = received + ASKED_SECONDS - clock.seconds()
            if wait > 0 and self.factory.throttle.floor:
                await deferLater(clock, wait)
        except PopdropError as refusal:
            error = refusal
        except CancelledError:
            raise
        except Exception:
            error = internal_error("asking the accounts")
        else:
            self._learned = self._session.told(answer)
            return
        log.error(
            "{peer}: accounts: {text} {detail}",
            peer=self._host(),
            text=error.text,
            detail=error.detail,
        )
        self._record("failure", error.word)
        self._learned = self._session.refused(error)

    async def _login(self, credentials: Credentials) -> None:
        clock, throttle = self.factory.clock, self.factory.throttle
        received = clock.seconds()
        # Where no failure is ever delayed, none need be recognised.
        proof = credentials.proof(self.factory.proof_key) if throttle.floor else None
        ticket = await throttle.attempt(self._address, credentials.username, proof)
        outcome = "bad"
        try:
            turn = self.factory.turn(received)
            if turn is not None:
                await turn
            drop = await self._opened(credentials)
            outcome = "good"
        except PopdropError as refusal:
            error = refusal
            outcome = "bad" if isinstance(refusal, BadCredentials) else "void"
        except LoginFailed:
            error = BadCredentials(FAILED)
        except CancelledError:
            if not self._verified:
                self._answer_due = received + throttle.delay(self._address, credentials.username)
            self._quit_user()
            self._record("failure", "abandoned", credentials.mechanism)
            raise
        except Exception:
            error, outcome = internal_error("login"), "void"
        finally:
            ticket.close(outcome)
        mechanism = credentials.mechanism
        if outcome == "good":
            await self._logged_in(drop, mechanism)
            return
        self._verified = False
        self._quit_user()
        bad = isinstance(error, BadCredentials)
        why = (error.detail or "bad-credentials") if bad else error.word
        self._record("failure", why, mechanism)
        if not bad:
            log.error(
                "{peer}: login: {text} {detail}",
                peer=self._host(),
                text=error.text,
                detail=error.detail,
            )
        else:
            self._answer_due = received + throttle.delay(self._address, credentials.username)
            wait = self._answer_due - clock.seconds()
            if wait > 0:
                await deferLater(clock, wait)
        answer = self._session.refused(error)
        if isinstance(answer, Hangup):
            self._hang_up(answer.farewell, answer.reason)
        else:
            self.transport.write(answer)

    async def _logged_in(self, drop: IMaildrop, mechanism: str) -> None:
        self._drop = drop
        self.factory.holders[self._account] = self
        self._mechanism = mechanism
        self._verified = True
        reply = self._session.opened(drop.listing, self._read_only)
        self._record("login", "ok", mechanism)
        relay = self.factory.relay
        # A read-only login is for a program that sends nothing (decision 28).
        if relay is not None and not self._read_only:
            # The MTA knows before the client is told that it is in: it may send mail at once.
            known = relay.open_for(self._facts, self._account)
            if known is not None:
                await known
        self.transport.write(reply)

    async def _opened(self, credentials: Credentials) -> IMaildrop:
        mind = Mind(
            self.factory.policy,
            isinstance(credentials, Cleartext),
            self._facts,
            self._now_verified,
        )
        interface, avatar, logout = await self.factory.portal.login(
            credentials, mind, IMaildrop, IMailboxPOP3
        )
        if interface is IMaildrop:
            return cast("IMaildrop", avatar)
        return await legacy.adapted(avatar, logout)

    def _now_verified(self, account: Account) -> None:
        # Opening may take as long as the locks do; the deadline is for strangers (decision 27).
        self._verified = True
        self._read_only = account.read_only
        name = account.name
        if not self.factory.throttle.enter(name):
            raise TemporaryFailure("too many connections of this user, try again later", "limit")
        self._entered = name
        holder = self.factory.holders.get(name)
        if holder is not None and holder is not self:
            holder.give_way(self.factory.takeover)
        elif self.factory.takeover and self.factory.ask_others is not None:
            # A maildrop that is in use is tried for two seconds: long enough for the answer.
            self.factory.ask_others(name)
        self._account = name

    def _record(self, event: str, reason: str, mechanism: str | None = None) -> None:
        self.factory.session_log.event(
            SessionRecord(
                event=event,
                peer=self._facts,
                user=self._session.user,
                mechanism=mechanism or self._mechanism,
                reason=reason,
                duration=self.factory.clock.seconds() - self._born,
                tally=self._session.tally,
                listener=self.factory.listener,
            )
        )
