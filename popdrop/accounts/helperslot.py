"""One connection of the network process to the privileged helper."""

from __future__ import annotations

import secrets
import socket
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IDelayedCall, IReadDescriptor, IWriteDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop.accounts.helperwire import (
    LONGEST,
    Answer,
    Down,
    Hello,
    Malformed,
    Request,
    decode_reply,
    encode_request,
    wipe,
)
from popdrop.accounts.spoolslot import SpoolSlot
from popdrop.errors import TemporaryFailure

log = Logger()

ANSWER_SECONDS: Final = 35.0
"""Seconds that a login waits for the helper, whose programs have 30."""
UNSENT: Final = 512
"""Requests that may wait for room in the socket; more fail at once."""
GONE: Final = "the helper has ended for good, or has shut this connection"
NOT_NOW: Final = "Authentication is not possible now, try again later."


@implementer(IReadDescriptor, IWriteDescriptor)
class Slot:
    """One connection to the helper, whichever helper serves it at the time.

    Calls are told apart by numbers; an answer that nobody waits for any more is dropped. `hello` is
    what the helper that serves now has said of itself. `spools` are the connections over which it
    passes spools to this process; they end with this one.
    """

    patience = ANSWER_SECONDS

    def __init__(
        self, connection: socket.socket, hello: Hello, spools: SpoolSlot | None = None
    ) -> None:
        self._socket = connection
        self.spools = spools
        self.hello = hello
        self._reactor: Any = None
        self._next = secrets.randbits(63)
        self._waiting: dict[int, tuple[Deferred[Answer], IDelayedCall]] = {}
        self._unsent: deque[tuple[int, bytearray]] = deque()
        self._closed = False

    def attach(self, reactor: Any) -> None:
        """Begin to serve in `reactor` (`IReactorFDSet`, `IReactorTime`)."""
        self._reactor = reactor
        reactor.addReader(self)

    def ask(self, request: Request) -> Deferred[Answer]:
        """Fires with the helper's answer to `request`, whose `number` is not looked at.

        Fails with `TemporaryFailure`. Cancelling takes back what is not yet sent.
        """
        if self._closed or self._reactor is None:
            return fail(TemporaryFailure(NOT_NOW, "the helper is gone; start Popdrop anew"))
        if len(self._unsent) >= UNSENT:
            return fail(TemporaryFailure(NOT_NOW, "the helper does not keep up"))
        self._next = number = (self._next + 1) % 2**64
        record = encode_request(
            Request(
                request.kind,
                request.source,
                number,
                request.name,
                request.proof,
                request.challenge,
            )
        )
        answered: Deferred[Answer] = Deferred(lambda deferred: self._cancelled(number))
        late = self._reactor.callLater(self.patience, self._too_late, number)
        self._waiting[number] = (answered, late)
        self._unsent.append((number, record))
        self.doWrite()
        return answered

    def _cancelled(self, number: int) -> None:
        self._forget(number)

    def _forget(self, number: int) -> Deferred[Answer] | None:
        waiting = self._waiting.pop(number, None)
        for place, (each, record) in enumerate(self._unsent):
            if each == number:
                wipe(record)
                del self._unsent[place]
                break
        if waiting is None:
            return None
        answered, late = waiting
        if late.active():
            late.cancel()
        return answered

    def _too_late(self, number: int) -> None:
        self._fail([number], f"the helper gave no answer within {self.patience:g} s")

    def _fail(self, numbers: Iterable[int], why: str) -> None:
        for number in list(numbers):
            answered = self._forget(number)
            if answered is not None:
                answered.errback(TemporaryFailure(NOT_NOW, why))

    def fileno(self) -> int:
        """Of the socket."""
        return self._socket.fileno()

    def logPrefix(self) -> str:
        """Twisted's name for what happens here."""
        return "helper"

    def doWrite(self) -> Failure | None:
        """Send what there is room for."""
        while self._unsent:
            _, record = self._unsent[0]
            try:
                self._socket.sendmsg([record], [], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                self._reactor.addWriter(self)
                return None
            except OSError as error:
                self._lost(f"{GONE}: {error.strerror}")
                return None
            self._unsent.popleft()
            wipe(record)
        self._reactor.removeWriter(self)
        return None

    def doRead(self) -> Failure | None:
        """Take one record."""
        try:
            record = self._socket.recv(LONGEST + 1)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            self._lost(f"{GONE}: {error.strerror}")
            return None
        if not record:
            self._lost(GONE)
            return None
        try:
            self._take(decode_reply(record))
        except Malformed as error:
            self._lost(f"the helper sent a message that is none ({error})")
        return None

    def _take(self, reply: Answer | Hello | Down) -> None:
        if isinstance(reply, Hello):
            self.hello = reply
            log.info("helper pid {pid} serves with uid {uid}", pid=reply.pid, uid=reply.uid)
        elif isinstance(reply, Down):
            log.error("the helper ended: {reason}; a new one is started", reason=reply.reason)
            sent = self._waiting.keys() - {number for number, _ in self._unsent}
            self._fail(sent, f"the helper ended: {reply.reason}")
        else:
            answered = self._forget(reply.number)
            if answered is not None:
                answered.callback(reply)

    def _lost(self, why: str) -> None:
        if not self._closed:
            log.critical("{why}; logins by it fail until Popdrop is started anew", why=why)
            self.close(why)

    def connectionLost(self, reason: Failure) -> None:
        """Called by the reactor where the socket is unusable, as after its other end has closed."""
        self._lost(GONE)

    def close(self, why: str = "the server stops") -> None:
        """No more calls; those that wait fail. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._reactor is not None:
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
        self._socket.close()
        if self.spools is not None:
            self.spools.close()
        self._fail(list(self._waiting), why)
