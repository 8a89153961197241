"""The privileged helper: checks logins for a server that has no rights to do so itself.

It has the rights that the server was started with, PAM, `/etc/shadow` and checkpassword programs.
It believes nothing of what it is sent: the process that sends it talks to strangers, and may have
been taken over by one. So names are checked here, failures are counted here by name, and what is
not a message of `helperwire` ends the connection for good. Never is a peer's address asked for,
since the sender could make up any.

For `popdrop popauth` it takes connections of local users, knows them by SO_PEERCRED (unix(7)), and
leaves the rest to a process with the rights of the database's owner (`selfservice.py`).
"""

from __future__ import annotations

import heapq
import os
import selectors
import socket
import sys
import threading
import time
from importlib import import_module
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, cast

from popdrop.accounts import supervisor
from popdrop.accounts.doorman import Doorman
from popdrop.accounts.helperspools import Met, Spools
from popdrop.accounts.helperwire import (
    LONGEST,
    Answer,
    Hello,
    Kind,
    Malformed,
    Request,
    decode_request,
    encode_answer,
    encode_hello,
    wipe,
)
from popdrop.accounts.pace import Pace
from popdrop.credentials import ApopCredentials, Cleartext, acceptable_name, prepared
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    PermanentFailure,
    PopdropError,
)
from popdrop.interfaces import IBackend
from popdrop.values import Account

REGISTRY: Final = "popdrop.accounts.backends:make"
"""What makes an `IBackend` of the string behind `helper:`. Looked up late, in the helper alone: the
network process never holds PAM or a password file."""

THREADS: Final = 16
"""Checks at once. A wrong password holds a thread for the 2 s of pam_unix; more wait their turn."""
WAITING: Final = 1024
"""Requests that have been read and not answered; more are answered TEMPORARY."""
STUCK: Final = 60.0
"""Seconds after which a check is hopeless: checkpassword programs are given 30, the client of this
waits for 35. When all threads are in that state the helper ends, and a new one is started."""


class Checks:
    """Threads that ask the backends and send the answers."""

    def __init__(self, backends: list[IBackend], pace: Pace, met: Met) -> None:
        self._backends = backends
        self._pace = pace
        self._met = met
        self._queue: SimpleQueue[tuple[Request, socket.socket]] = SimpleQueue()
        self._guard = threading.Lock()
        self._threads = 0
        self._open = 0  # requests put and not answered
        self._since: dict[int, float] = {}

    def put(self, request: Request, slot: socket.socket) -> bool:
        """Have it checked and answered. `False`: too many wait."""
        with self._guard:
            if self._open >= WAITING:
                return False
            self._open += 1
            more = self._threads < min(THREADS, self._open)
            if more:
                self._threads += 1
        self._queue.put((request, slot))
        if more:
            threading.Thread(target=self._work, daemon=True).start()
        return True

    def stuck(self) -> bool:
        """Whether every thread has been at one check for so long that none will come back."""
        with self._guard:
            since = list(self._since.values())
        return len(since) == THREADS and time.monotonic() - max(since) > STUCK

    def _work(self) -> None:
        me = threading.get_ident()
        while True:
            request, slot = self._queue.get()
            with self._guard:
                self._since[me] = time.monotonic()
            answer = checked(self._backends[request.source], request)
            self._pace.end(counted(request.name), answer.kind)
            if answer.account is not None:
                self._met.note(slot, answer.account)
            send(slot, encode_answer(answer))
            with self._guard:
                del self._since[me]
                self._open -= 1
            del request, slot, answer  # an idle thread keeps no password


def counted(name: bytes) -> bytes:
    """What failures of `name` are counted by: the same for all ways to write one account.

    Without it each way, as `bob`, `BOB` and `b`, soft hyphen, `ob`, would have tries of its own.
    """
    try:
        return prepared(name).decode("utf-8").lower().encode("utf-8")
    except BadCredentials:
        return name  # nobody's, but where a checker takes names as they come


def checked(backend: IBackend, request: Request) -> Answer:
    """The answer to `request`. Never raises; an error of the backend's is told without its text."""
    number = request.number
    if not acceptable_name(request.name):
        return Answer(Kind.NO_SUCH_USER, number)
    credentials: Cleartext | ApopCredentials
    if request.kind is Kind.APOP:
        wanted = "apop"
        credentials = ApopCredentials(request.name, request.challenge, request.proof.reveal())
    else:
        wanted = "password"
        credentials = Cleartext(request.name, request.proof.reveal())
    if wanted not in backend.kinds:
        return Answer(Kind.NO_VERIFIER, number)
    try:
        return _good(backend.check(cast("Any", credentials)), number)
    except NoSuchUser as error:
        return Answer(Kind.NO_SUCH_USER, number, detail=error.detail)
    except NoVerifierOfThisKind as error:
        return Answer(Kind.NO_VERIFIER, number, detail=error.detail)
    except BadCredentials as error:
        return Answer(Kind.BAD, number, detail=error.detail)
    except PermanentFailure as error:
        return Answer(Kind.PERMANENT, number, detail=error.detail)
    except PopdropError as error:
        return Answer(Kind.TEMPORARY, number, detail=error.detail)
    except BaseException as error:
        supervisor.report(error)
        return Answer(Kind.TEMPORARY, number, detail=f"{type(error).__name__} in a checker")


def _good(account: Account, number: int) -> Answer:
    if not acceptable_name(account.name):
        return Answer(Kind.PERMANENT, number, detail="a checker gave a name that cannot be used")
    answer = Answer(Kind.GOOD, number, account)
    try:
        encode_answer(answer)
    except ValueError as error:
        return Answer(Kind.PERMANENT, number, detail=str(error))
    return answer


def send(slot: socket.socket, record: bytearray) -> None:
    """Send `record`; in a thread, since it waits for a reader. One that is gone is no error."""
    try:
        slot.sendmsg([record], [], socket.MSG_NOSIGNAL)
    except OSError:
        pass
    wipe(record)


class Helper:
    """The loop of the process: takes requests, and connections to the self-service."""

    def __init__(self, config: dict[str, Any], backends: list[IBackend]) -> None:
        self._config = config
        self._sources = len(backends)
        self._pace = Pace()
        self._met = Met()
        self._checks = Checks(backends, self._pace, self._met)
        self._selector = selectors.DefaultSelector()
        self._late: list[tuple[float, int, Request, socket.socket]] = []
        self._order = 0
        self._open = 0
        # The most that a record may have and one octet, by which a longer one is known.
        self._buffer = bytearray(LONGEST + 1)
        slots = [socket.socket(fileno=number) for number in config["slots"]]
        Spools(config, slots, self._met).start()
        for slot in slots:
            self._selector.register(slot, selectors.EVENT_READ, self._request)
            self._open += 1
            send(slot, encode_hello(Hello(os.getpid(), os.geteuid())))
        self._self_service = Doorman(config, self._selector)
        for number in config["listeners"]:
            listener = socket.socket(fileno=number)
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, self._self_service.accept)

    def run(self) -> None:
        """Returns when nobody is left who could ask."""
        while self._open:
            for key, _ in self._selector.select(self._patience()):
                key.data(key.fileobj)
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, request, slot = heapq.heappop(self._late)
                self._put(request, slot)
                del request
            if self._checks.stuck():
                supervisor.tell(f"all {THREADS} checks hang; ending, to begin anew")
                os._exit(70)

    def _patience(self) -> float:
        if not self._late:
            return STUCK / 4
        return min(STUCK / 4, max(0.0, self._late[0][0] - time.monotonic()))

    def _request(self, slot: socket.socket) -> None:
        try:
            # No room is given for descriptors: the kernel closes those that come.
            size, _, flags, _ = slot.recvmsg_into([self._buffer])
            if not size:
                self._drop(slot)
                return
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise Malformed("cut")
            with memoryview(self._buffer) as view:
                record = bytearray(view[:size])
                view[:size] = bytes(size)
            try:
                request = decode_request(record)
            finally:
                wipe(record)
            if request.source >= self._sources:
                raise Malformed("no such checker")
        except OSError:
            self._drop(slot)
            return
        except Malformed as error:
            # Shut for the supervisor and every helper to come, too: nobody talks to this one again.
            supervisor.tell(f"a message that is none ({error}): this connection is shut for good")
            slot.shutdown(socket.SHUT_RDWR)
            self._drop(slot)
            return
        self._schedule(request, slot)

    def _drop(self, slot: socket.socket) -> None:
        self._selector.unregister(slot)
        slot.close()
        self._open -= 1

    def _schedule(self, request: Request, slot: socket.socket) -> None:
        wait = self._pace.begin(counted(request.name))
        if wait is None:
            self._refuse(request, slot, "too many tries of this name wait")
        elif wait == 0:
            self._put(request, slot)
        elif len(self._late) >= WAITING:
            self._pace.end(counted(request.name), Kind.TEMPORARY)
            self._refuse(request, slot, "too many tries wait")
        else:
            self._order += 1
            heapq.heappush(self._late, (time.monotonic() + wait, self._order, request, slot))

    def _put(self, request: Request, slot: socket.socket) -> None:
        if not self._checks.put(request, slot):
            self._pace.end(counted(request.name), Kind.TEMPORARY)
            self._refuse(request, slot, "too many tries wait")

    def _refuse(self, request: Request, slot: socket.socket, why: str) -> None:
        record = encode_answer(Answer(Kind.TEMPORARY, request.number, detail=why))
        try:
            slot.sendmsg([record], [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it reads no answers either; its own clock ends the wait


def backends_of(config: dict[str, Any]) -> list[IBackend]:
    """All backends. Raises `ConfigError` that names the string."""
    if not config["backends"]:
        return []
    module, _, name = config["registry"].partition(":")
    try:
        make = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise ConfigError("--auth helper: there are no checkers that it could use") from None
    made: list[IBackend] = []
    for text in config["backends"]:
        where = f"--auth helper:{text}"
        try:
            made.append(make("--auth", text))
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"--auth {text}", where, 1)) from None
        if made[-1] is None:
            raise ConfigError(
                f"{where}: no such checker; use pam:SERVICE, passwd:FILE or checkpassword:PROGRAM"
            )
    return made


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """What the backends can verify, or why there are none: for the process that only wants to know.

    Nothing of a backend stays in it, since this is asked of a process that ends at once.
    """
    try:
        return {"kinds": [sorted(each.kinds) for each in backends_of(config)]}
    except ConfigError as error:
        return {"error": str(error)}


def _silent(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    supervisor.report(error)


def main(config: dict[str, Any]) -> None:
    """The helper process, from `supervisor.BOOT`."""
    sys.excepthook = _silent
    threading.excepthook = lambda failed: supervisor.report(failed.exc_value or RuntimeError())
    if config.get("describe"):
        sys.stdout.write(supervisor.as_json(describe(config)).decode("ascii"))
        return
    supervisor.settle(config["parent"])
    supervisor.quiet_input()
    try:
        backends = backends_of(config)
    except ConfigError as error:
        supervisor.tell(str(error))
        os._exit(78)
    Helper(config, backends).run()
    # Checks in progress are of no use to anybody any more, and a thread cannot be ended.
    os._exit(0)
