"""`--session-log`: one line at each login, each failure and the end of a session.

A kind makes the line, a sink takes it. Kinds: `plain`, `json`, and the lines that qpopper 4 and
s/qmail write, for the scripts that read them. Sinks: the Twisted log, a file, a descriptor.

An `end` is that of a session that logged in, unless its reason is `quit-before-login`.

Over 400 lines since emitters and sinks are small and read best together.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
from queue import SimpleQueue
from typing import Final

from twisted.logger import Logger, LogLevel
from zope.interface import implementer

from popdrop import __version__
from popdrop.asowner import as_owner
from popdrop.errors import ConfigError
from popdrop.interfaces import ISessionLog
from popdrop.spec import parse
from popdrop.values import SessionRecord

log = Logger()

USER_OCTETS: Final = 64
QUEUE_LINES: Final = 10_000
"""Lines that may wait for a slow disk, about 3 MB; more are dropped, and counted."""

COMPLAINT_SECONDS: Final = 60.0
FLUSH_SECONDS: Final = 5.0
"""How long `close` waits for a disk."""

NOT_GUESSES: Final = frozenset(
    {"in-use", "login-delay", "sys-temp", "sys-perm", "error", "abandoned", "tls-required"}
)
"""Reasons of a failure that say nothing against the client: no line of these may get it banned.

Most are response codes (`PopdropError.word`); a `/` in one counts as `-`.
"""

_SYSTEMS: Final = {
    level: f"{log.namespace}#{level.name}" for level in (LogLevel.info, LogLevel.warn)
}

_UNSAFE = re.compile(rb"[^!#-&(-\[\]-~]")

Emitter = Callable[[SessionRecord], str | None]


@lru_cache(maxsize=4096)
def escaped(octets: bytes | None) -> str:
    r"""What a client sent, fit for a log: at most 64 octets of it, anything unusual as `\xNN`.

    Unusual are controls, blanks, quotes, backslashes and non-ASCII, so that no name can look like
    another field, another line, or something else to a terminal (CWE-117).
    """
    if octets is None:
        return "-"
    cut = octets[:USER_OCTETS]
    return _UNSAFE.sub(lambda found: b"\\x%02x" % found[0][0], cut).decode("ascii")


def plain(record: SessionRecord) -> str:
    """`login user="bob" address=192.0.2.1 mechanism=APOP tls=TLSv1.3 ...`: words, then fields."""
    fields = [
        record.event,
        f'user="{escaped(record.user)}"',
        f"address={record.peer.address or '-'}",
        f"mechanism={_mechanism(record)}",
        f"tls={record.peer.tls_version or '-'}",
    ]
    if record.reason:
        fields.append(f"reason={record.reason}")
    if record.event == "end":
        tally = record.tally
        fields += [
            f"retr={tally.retr}/{tally.retr_octets}",
            f"top={tally.top}/{tally.top_octets}",
            f"deleted={tally.deleted}/{tally.deleted_octets}",
            f"left={tally.left}/{tally.left_octets}",
        ]
    fields.append(f"seconds={record.duration:.3f}")
    return " ".join(fields)


def as_json(record: SessionRecord) -> str:
    """One object, ASCII only. Octets are as sent; `seconds` are since the connection came."""
    peer = record.peer
    return json.dumps(
        {
            "time": _utc(time.time()),
            "event": record.event,
            "address": peer.address,
            "port": peer.port,
            "local_port": peer.local_port,
            "listener": record.listener,
            "tls": peer.tls_version,
            "cipher": peer.tls_cipher,
            "mechanism": None if record.mechanism is None else _mechanism(record),
            "user": None if record.user is None else escaped(record.user),
            "reason": record.reason,
            "seconds": round(record.duration, 3),
            **asdict(record.tally),
        },
        separators=(",", ":"),
    )


def qpopper(record: SessionRecord) -> str | None:
    """The words of qpopper 4 (pop_log in pop_pass.c, pop_updt.c), host names unresolved."""
    user, host = escaped(record.user), record.peer.address or "unknown"
    if record.event == "login":
        return f'(v{__version__}) POP login by user "{user}" at ({host}) {host}'
    if record.event == "failure":
        if _innocent(record):
            return f"Login of {user} from host ({host}) {host} not completed: {record.reason}"
        return f"[AUTH] Failed attempted login to {user} from host ({host}) {host}"
    if record.reason == "quit-before-login":
        if record.user is None:
            return None
        return f"Possible probe of account {user} from host {host} ({host})"
    tally = record.tally
    return (
        f"Stats: {user} {tally.deleted} {tally.deleted_octets}"
        f" {tally.left} {tally.left_octets} {host} {host}"
    )


def sqmail(record: SessionRecord) -> str | None:
    """The words of s/qmail's qmail-popup, which writes nothing at the end of a session."""
    required = record.reason == "tls-required"
    if record.event == "end" or (_innocent(record) and not required):
        return None
    peer = record.peer
    secure = peer.tls_version is not None or peer.local_port == 995
    method = {"USER": "User", "APOP": "Apop"}.get(record.mechanism or "USER", "Auth")
    verdict = "Accept" if record.event == "login" else "Reject"
    what = "STLS::Any" if required else f"AUTH::{method}"
    user = "unknown" if required or record.user is None else escaped(record.user)
    return (
        f"qmail-popup: pid {os.getpid()} {verdict}::{what} P:{'POP3S' if secure else 'POP3'}"
        f" S:{peer.address or 'unknown'}:unknown ?~ '{user}'"
    )


KINDS: Final[dict[str, Emitter]] = {
    "plain": plain,
    "json": as_json,
    "qpopper": qpopper,
    "sqmail": sqmail,
}


def from_spec(text: str, moved: Mapping[int, int] | None = None) -> SessionLog:
    """What `--session-log KIND[:SINK]` describes. Raises `ConfigError`.

    `SINK` is `log` (the Twisted log, the default), a path (mode 0600, appended to), or `fd=N`.
    Lines in a file begin with the time, JSON ones hold it; a descriptor gets the bare line, since
    who reads it (multilog, journald) adds the time. `moved` says which descriptor stands for N in
    this process, where it is not N.
    """
    spec = parse("--session-log", text)
    option, example = f"--session-log {text}", "for example json:/var/log/popdrop/sessions.json"
    if spec.kind not in KINDS:
        raise ConfigError(f"{option}: no kind {spec.kind}; known: {', '.join(KINDS)}; {example}")
    emitter = KINDS[spec.kind]
    if len(spec.args) + len(spec.kwargs) > 1 or spec.kwargs.keys() - {"fd"}:
        raise ConfigError(f"{option}: one sink is needed: log, a path or fd=NUMBER; {example}")
    if "fd" in spec.kwargs:
        return SessionLog(emitter, _Lines(_Descriptor(option, spec.kwargs["fd"], moved or {})))
    sink = spec.args[0] if spec.args else "log"
    if sink == "log":
        return SessionLog(emitter, _TwistedLog())
    if "/" not in sink:
        raise ConfigError(f"{option}: {sink} is no sink; a path has a slash, as ./{sink}")
    stamp = {"json": None, "plain": _utc}.get(spec.kind, _syslog_stamp)
    return SessionLog(emitter, _Lines(_File(option, sink), stamp))


@implementer(ISessionLog)
class SessionLog:
    """One kind into one sink."""

    def __init__(self, emitter: Emitter, sink: _TwistedLog | _Lines) -> None:
        self._emitter = emitter
        self._sink = sink
        self._complaints = _Complaints()

    def event(self, record: SessionRecord) -> None:
        try:
            line = self._emitter(record)
            if line is not None:
                self._sink.write(line, record)
        except Exception as error:
            self._complaints.add("A line of the session log could not be made", error)

    @property
    def descriptor(self) -> tuple[int, int] | None:
        """The N of a sink `fd=N`, and what we have it as; `None` for other sinks."""
        return self._sink.descriptor

    def reopen(self) -> None:
        """After log rotation: write to what is at the path now. Never raises."""
        self._sink.reopen()

    def hand_over(self, uid: int, gid: int) -> None:
        """Give a file of ours to the user that the server will run as; -1 keeps the group."""
        self._sink.hand_over(uid, gid)

    def close(self) -> None:
        """Write what waits, for five seconds at most, and let go."""
        self._sink.close()


@implementer(ISessionLog)
class Several:
    """Each event into several logs."""

    def __init__(self, logs: Iterable[SessionLog]) -> None:
        self._logs = tuple(logs)

    def event(self, record: SessionRecord) -> None:
        for each in self._logs:
            each.event(record)

    def reopen(self) -> None:
        """As `SessionLog.reopen`, for each."""
        for each in self._logs:
            each.reopen()

    def hand_over(self, uid: int, gid: int) -> None:
        """As `SessionLog.hand_over`, for each."""
        for each in self._logs:
            each.hand_over(uid, gid)

    def close(self) -> None:
        for each in self._logs:
            each.close()


class _TwistedLog:
    """A failure is a warning, everything else information."""

    descriptor = None

    def write(self, line: str, record: SessionRecord) -> None:
        level = LogLevel.warn if record.event == "failure" else LogLevel.info
        # The event that `Logger.emit` would make, with its text ready: a third less work, and
        # these two events are a fifth of what a short session costs.
        log.observer(
            {
                "log_format": line.replace("{", "{{").replace("}", "}}"),
                "log_flattened": {},
                "log_system": _SYSTEMS[level],
                "log_level": level,
                "log_namespace": log.namespace,
                "log_logger": log,
                "log_source": None,
                "log_time": time.time(),
                "line": line,
                "session_event": record.event,
                "user": escaped(record.user),
                "address": record.peer.address,
                "reason": record.reason,
                "duration": record.duration,
                "tally": record.tally,
                "listener": record.listener,
            }
        )

    def reopen(self) -> None:
        pass

    def hand_over(self, uid: int, gid: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Complaints:
    """About writing, once a minute at most: a full disk must not fill the log, too."""

    def __init__(self) -> None:
        self._next = 0.0
        self._lost = 0

    def add(self, what: str, error: Exception) -> None:
        """One more line was lost. May be called from any thread."""
        self._lost += 1
        now = time.monotonic()
        if now < self._next:
            return
        lost, self._lost, self._next = self._lost, 0, now + COMPLAINT_SECONDS
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        log.error("{what} ({why}); lines lost: {lost}", what=what, why=why, lost=lost)


class _Descriptor:
    """An inherited descriptor. A duplicate is kept, which outlives daemonizing."""

    def __init__(self, option: str, word: str, moved: Mapping[int, int]) -> None:
        try:
            self.number = int(word)
            self.fd = os.dup(moved.get(self.number, self.number))
        except (ValueError, OverflowError, OSError):
            raise ConfigError(
                f"{option}: {word} is no open descriptor; open it, as in 5>>FILE, or name a path"
            ) from None

    def reopen(self) -> None:
        pass


class _File:
    def __init__(self, option: str, path: str) -> None:
        self._path = path
        self._folder = os.path.dirname(os.path.abspath(path))
        try:
            self.fd = self._open()
        except OSError as error:
            raise ConfigError(
                f"{option}: {path} cannot be opened: {error.strerror};"
                " create its folder for the user that Popdrop runs as"
            ) from None

    def _open(self) -> int:
        # A named pipe without a reader is an error, and not a wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        # In a folder of the server's user the path may be a link of his to a file of root's.
        with as_owner(self._folder):
            fd = os.open(self._path, flags, 0o600)
        os.set_blocking(fd, True)
        return fd

    def hand_over(self, uid: int, gid: int) -> None:
        """In a folder of root's; in another one it is that owner's already, or none of ours."""
        if os.stat(self._folder).st_uid == 0 and os.fstat(self.fd).st_uid == 0:
            os.fchown(self.fd, uid, gid)

    def reopen(self) -> None:
        """Raises `OSError`, and then the old file stays."""
        new = self._open()
        os.close(self.fd)
        self.fd = new


class _Lines:
    """Hands lines to a thread of its own, since a disk may stall and the reactor must not."""

    def __init__(
        self, target: _File | _Descriptor, stamp: Callable[[float], str] | None = None
    ) -> None:
        self._target = target
        self._stamp = stamp
        self._queue: SimpleQueue[Callable[[], None] | bytes | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._complaints = _Complaints()
        self._overflows = _Complaints()
        self._closed = False
        self._torn = False

    @property
    def descriptor(self) -> tuple[int, int] | None:
        target = self._target
        return (target.number, target.fd) if isinstance(target, _Descriptor) else None

    def write(self, line: str, record: SessionRecord) -> None:
        if self._closed:
            return
        if self._stamp is not None:
            line = f"{self._stamp(time.time())} {line}"
        if self._queue.qsize() >= QUEUE_LINES:
            self._overflows.add("The session log cannot keep up", BlockingIOError(0, "queue full"))
            return
        self._put(line.encode("ascii", "backslashreplace") + b"\n")

    def reopen(self) -> None:
        if not self._closed:
            self._put(self._target.reopen)

    def hand_over(self, uid: int, gid: int) -> None:
        if isinstance(self._target, _File):
            self._target.hand_over(uid, gid)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._thread is None:
            os.close(self._target.fd)
            return
        self._queue.put(None)
        self._thread.join(FLUSH_SECONDS)

    def _put(self, item: Callable[[], None] | bytes) -> None:
        # Not before the first line: threads do not survive the fork of a daemon.
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="session-log", daemon=True)
            self._thread.start()
        self._queue.put(item)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, bytes):
                    self._write(item)
                else:
                    self._anew(item)
            except OSError as error:
                self._complaints.add("The session log cannot be written", error)
        os.close(self._target.fd)

    def _anew(self, reopen: Callable[[], None]) -> None:
        try:
            reopen()
        except OSError as error:
            log.error(
                "the session log cannot be opened anew, the old file is still written: {why}",
                why=error.strerror,
            )

    def _write(self, line: bytes) -> None:
        """One `write` to a descriptor with O_APPEND: lines of several processes do not mix."""
        if self._torn:
            line = b"\n" + line
        written = os.write(self._target.fd, line)
        if written == len(line):
            self._torn = False
        elif written:
            # No room for all of it: the next line must not go on where this one stops.
            self._torn = True
            raise OSError(errno.ENOSPC, "a line was written in part")


def _innocent(record: SessionRecord) -> bool:
    return record.reason.lower().replace("/", "-") in NOT_GUESSES


def _mechanism(record: SessionRecord) -> str:
    return escaped(None if record.mechanism is None else record.mechanism.encode())


def _utc(now: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"


def _syslog_stamp(now: float) -> str:
    """As syslog begins its lines (RFC 3164 section 4.1), in local time."""
    there = time.localtime(now)
    months = "JanFebMarAprMayJunJulAugSepOctNovDec"
    month = months[3 * there.tm_mon - 3 : 3 * there.tm_mon]
    day = f"{month} {there.tm_mday:2d} {time.strftime('%H:%M:%S', there)}"
    return f"{day} {socket.gethostname()} popdrop[{os.getpid()}]:"
