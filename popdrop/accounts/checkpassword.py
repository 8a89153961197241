"""`checkpassword:PROG`: verifies by the interface of https://cr.yp.to/checkpwd/interface.html.

PROG reads name, password and timestamp on descriptor 3 and runs the rest of its command line with
the rights of the user. That rest is `cat /proc/self/status /proc/self/environ`: it tells who it
became. It starts in 0.9 ms (an interpreter in 11), needs no shell, and is there for each user,
while a virtual environment may be out of his reach.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from twisted.cred.credentials import IUsernamePassword
from zope.interface import implementer

from popdrop.credentials import FAILED, acceptable_name, prepared
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    PermanentFailure,
    PopdropError,
    TemporaryFailure,
)
from popdrop.interfaces import IBackend
from popdrop.values import Account

MOST_OCTETS: Final = 512
"""Of name, password and timestamp with their NULs: what the interface allows."""
TIME_LIMIT: Final = 30.0
"""Seconds for PROG; after them it is killed, with all of its process group."""
ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PROTO": "TCP", "LC_ALL": "C"}
"""All of it. Nothing of ours and nothing of the client's (CVE-2014-6271)."""
REPORTED: Final = ("/proc/self/status", "/proc/self/cmdline", "/proc/self/environ")
"""Who it is, a text of which each octet is known beforehand, to part the others, and its USER."""
APOP: Final = ("no", "yes", "only")
USER: Final = ("same", "login", "reported")

_FAILED: Final = "authorization failed"
_CRASHED: Final = "aack, child crashed"
_MOST_REPORT: Final = 256 * 1024
_MOST_READS: Final = 64  # of 64 KiB, before the clock is looked at again
_BEYOND: Final = 10  # descriptors below are for the child's own
_MARGIN: Final = 64  # descriptors that other threads may open until the child is there


@dataclass(frozen=True, slots=True)
class _Ended:
    """How PROG ended: as `os.waitstatus_to_exitcode`, `None` if its time was over."""

    code: int | None
    report: bytes


@implementer(IBackend)
class Checkpassword:
    """Runs a checkpassword program for each login. Blocking.

    `words` are the program and its arguments; a single one is split as a shell does. `apop`:
    whether it can verify APOP too (`yes`), or nothing else (`only`). `user`: what to do if `USER`
    is another name than that of the login: `same` refuses, `login` keeps the name of the login,
    `reported` takes `USER`. `limit` in seconds. Raises `ConfigError`, which names `option`.
    """

    takes_cram = False  # the interface has room for APOP's digest, not for CRAM-MD5's

    def __init__(
        self,
        option: str,
        words: tuple[str, ...],
        apop: str = "no",
        user: str = "same",
        limit: float = TIME_LIMIT,
    ) -> None:
        hint = ""
        if len(words) == 1:
            if " " in words[0]:
                hint = "; a name with a blank needs quotes, as 'my programs/check'"
            try:
                words = tuple(shlex.split(words[0]))
            except ValueError:
                raise ConfigError(f"{option}: a quote or a backslash has no end") from None
        if not words or not os.path.isabs(words[0]):
            raise ConfigError(f"{option}: name the program with its whole path")
        if not os.path.isfile(words[0]) or not os.access(words[0], os.X_OK):
            raise ConfigError(f"{option}: {words[0]}: no program that this user may run{hint}")
        if apop not in APOP:
            raise ConfigError(f"{option}: apop= takes one of {', '.join(APOP)}")
        if user not in USER:
            raise ConfigError(f"{option}: user= takes one of {', '.join(USER)}")
        cat = shutil.which("cat", path=ENVIRONMENT["PATH"])
        if cat is None or not all(map(os.path.exists, REPORTED)):
            raise ConfigError(f"{option}: needs the program cat, and /proc")
        self._command = (*words, cat, *REPORTED)
        self._middle = b"".join(os.fsencode(word) + b"\0" for word in (cat, *REPORTED))
        self._user = user
        self._limit = limit
        kinds = {"no": {"password"}, "yes": {"password", "apop"}, "only": {"apop"}}
        self.kinds = frozenset(kinds[apop])

    def check(self, credentials: Any) -> Account:
        """As `IBackend.check`. Whom PROG does not know it does not say: the chain ends here."""
        if IUsernamePassword.providedBy(credentials) and "password" in self.kinds:
            # A program that takes both tries APOP with it: no client may know it beforehand.
            timestamp = b"<%s@localhost>" % secrets.token_hex(16).encode("ascii")
            secret = credentials.password
        elif hasattr(credentials, "digest") and "apop" in self.kinds:
            timestamp, secret = credentials.challenge, credentials.digest
        else:
            raise NoVerifierOfThisKind(FAILED)
        name = prepared(credentials.username)
        # Not even the program sees these (decision 26).
        if not acceptable_name(name):
            raise NoSuchUser(FAILED)
        parts = (name, secret, timestamp)
        if not secret or any(b"\0" in part for part in parts):
            raise BadCredentials(FAILED)
        if sum(map(len, parts)) + len(parts) > MOST_OCTETS:
            raise BadCredentials(FAILED, "too long for checkpassword")
        message = bytearray()
        try:
            for part in parts:
                message += part
                message += b"\0"
            ended = run(self._command, message, self._limit)
        except OSError as error:
            raise TemporaryFailure(_CRASHED, f"{self._command[0]}: {error.strerror}") from None
        finally:
            message[:] = bytes(len(message))
        return self._account(name, ended)

    def _account(self, name: bytes, ended: _Ended) -> Account:
        refusal = self._refusal(ended)
        if refusal is not None:
            raise refusal
        program = self._command[0]
        try:
            uid, gid, environ = read_report(ended.report, self._middle)
        except ValueError as error:
            raise TemporaryFailure(
                _CRASHED,
                f"{program}: exit status 0, but {error}; give it no program to run of your own",
            ) from None
        user = environ.get(b"USER", name)
        if user != name and self._user == "same":
            raise PermanentFailure(
                _FAILED,
                f"{program}: USER is not the name of the login; say user=reported or user=login",
            )
        if self._user == "reported":
            if not acceptable_name(user):
                raise PermanentFailure(_FAILED, f"{program}: USER is no name that can be used")
            name = user
        # Without root's rights no program can become somebody else: then our own uid says nothing.
        known = os.geteuid() == 0 or uid != os.geteuid()
        home, shell = environ.get(b"HOME"), environ.get(b"SHELL")
        return Account(
            name,
            uid=uid if known else None,
            gid=gid if known else None,
            home=os.fsdecode(home) if home else None,
            shell=os.fsdecode(shell) if shell else None,
        )

    def _refusal(self, ended: _Ended) -> PopdropError | None:
        program, code = self._command[0], ended.code
        if code == 0:
            return None
        if code == 1 and ended.report.startswith(b"Name:\t"):
            # Not the program said so, but ours: the kernel keeps /proc/self from those whose real
            # and effective ids differ.
            why = "the login is good, but /proc/self cannot be read; does it set all its ids?"
            return TemporaryFailure(_CRASHED, f"{program}: {why}")
        if code == 1:
            return BadCredentials(FAILED)
        if code == 2:
            return PermanentFailure(_FAILED, f"{program}: exit status 2: misused")
        if code == 111:
            return TemporaryFailure(
                f"{_FAILED}, try again later", f"{program}: exit status 111: temporary problem"
            )
        if code is None:
            why = f"took longer than {self._limit:g} s and was killed"
        elif code < 0:
            why = f"killed by signal {-code}"
        else:
            why = f"exit status {code}"
        return TemporaryFailure(_CRASHED, f"{program}: {why}")


def read_report(report: bytes, middle: bytes) -> tuple[int, int, dict[bytes, bytes]]:
    """uid, gid and environment out of the files `REPORTED`, one behind the other.

    `middle` is the second of them. Raises `ValueError`, whose text says what is wrong: anything
    before or missing, or real, effective and saved ids that differ (a program that could take its
    rights back).
    """
    if not report:
        raise ValueError("it did not run the rest of its command line")
    status, found, rest = report.partition(b"\n" + middle)
    if not report.startswith(b"Name:\t"):
        raise ValueError("something was written to standard output")
    if not found or len(report) >= _MOST_REPORT:
        raise ValueError("its report is not whole")
    facts = dict(line.partition(b":\t")[::2] for line in status.split(b"\n"))
    ids = []
    for field in (b"Uid", b"Gid"):
        numbers = facts.get(field, b"").split()
        if len(numbers) != 4 or not all(number.isdigit() for number in numbers):
            raise ValueError("its report is not whole")
        if len(set(numbers)) != 1:
            raise ValueError(f"{field.decode('ascii')} is not the same for all purposes")
        ids.append(int(numbers[0]))
    # Of two variables of one name the first counts, as for getenv(3).
    variables = reversed(rest.split(b"\0"))
    return ids[0], ids[1], dict(each.partition(b"=")[::2] for each in variables if each)


def run(command: tuple[str, ...], message: bytearray, limit: float) -> _Ended:
    """Run `command` with `message` to be read on descriptor 3, and wait for its end.

    It has `/dev/null` as 0, the pipe of the report as 1, our standard error as 2, and no other
    descriptor; a session and process group of its own; the signals as a fresh process has them.
    `limit` in seconds. Raises `OSError` when it could not be run.
    """
    with contextlib.ExitStack() as stack:
        given_out, given_in = _pipe(stack)
        report_out, report_in = _pipe(stack)
        with open(given_in.take(), "wb", buffering=0) as file:
            file.write(message)  # a pipe holds 4096 octets at least: never waits
        pid = os.posix_spawn(
            command[0],
            command,
            ENVIRONMENT,
            file_actions=_descriptors(given_out.number, report_in.number),
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGHUP),
        )
        try:
            report_in.close()
            given_out.close()
            report = _watch(pid, report_out.number, time.monotonic() + limit)
        except BaseException:
            _end(pid)
            raise
        if report is None:
            _end(pid)
            return _Ended(None, b"")
        _, status = os.waitpid(pid, 0)
        return _Ended(os.waitstatus_to_exitcode(status), report)


def _watch(pid: int, pipe: int, deadline: float) -> bytes | None:
    """What the child writes until it ends; `None` when the time is over."""
    os.set_blocking(pipe, False)
    report = bytearray()
    with _process(pid) as ending:
        poll = select.poll()
        poll.register(ending, select.POLLIN)
        poll.register(pipe, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            ready = dict(poll.poll(max(0.0, left) * 1000))
            if pipe in ready and not _drain(pipe, report):
                poll.unregister(pipe)
            if ending in ready:
                # Others may hold the pipe open; what this one wrote is in it by now.
                _drain(pipe, report)
                return bytes(report)
            if left <= 0:
                return None


def _drain(pipe: int, report: bytearray) -> bool:
    """Read what is there; whether more may come. What is too much is read and forgotten.

    Not for ever: one who writes without end must not outlive his time by it.
    """
    for _ in range(_MOST_READS):
        try:
            octets = os.read(pipe, 65536)
        except BlockingIOError:
            return True
        if not octets:
            return False
        report += octets[: max(0, _MOST_REPORT - len(report))]
    return True


@contextlib.contextmanager
def _process(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _end(pid: int) -> None:
    """Kill the process group of `pid`, and take note of its end."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        # It has taken root's rights: it will end when it likes, and no login waits for it.
        name = f"popdrop-wait-{pid}"
        threading.Thread(target=os.waitpid, args=(pid, 0), name=name, daemon=True).start()
        return
    os.waitpid(pid, 0)


class _End:
    """One end of a pipe, closed once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._open = True

    def take(self) -> int:
        """The number, which somebody else will close."""
        self._open = False
        return self.number

    def close(self) -> None:
        """Idempotent."""
        if self._open:
            os.close(self.take())


def _pipe(stack: contextlib.ExitStack) -> tuple[_End, _End]:
    ends = []
    for number in os.pipe():
        # Out of the way of the child's own, and closed in every other child.
        end = _End(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _BEYOND))
        os.close(number)
        stack.callback(end.close)
        ends.append(end)
    return ends[0], ends[1]


def _descriptors(given: int, report: int) -> list[tuple[Any, ...]]:
    """What `posix_spawn` does with descriptors; those we have inherited ourselves are closed too.

    By number and not by name: another thread may open one meanwhile.
    """
    child: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, report, 1),
        (os.POSIX_SPAWN_DUP2, given, 3),
    ]
    closing: Any = getattr(os, "POSIX_SPAWN_CLOSEFROM", None)  # Python 3.14
    if closing is not None:
        return [*child, (closing, 4)]
    highest = max(map(int, os.listdir("/proc/self/fd"))) + _MARGIN
    return child + [(os.POSIX_SPAWN_CLOSE, number) for number in range(4, highest)]
