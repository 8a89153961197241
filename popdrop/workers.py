"""`--workers N`: the parent's side. It has bound and dropped its rights; others serve.

Each worker is an interpreter of its own (`popdrop.worker`), started by fork and exec, that inherits
the listening sockets, the throttle's table and a slot of the helper's. A connection waits in the
one socket of all until some worker takes it, so none is lost with a worker. One that ends is
started anew, later and later where it ends again and again.

Between both is a socket: the worker sends records, one JSON array a line, of what it logs; the
parent sends words. The end of it is the end of the worker, which so never outlives its parent.
What a worker, or a program that it runs, writes to standard error comes by a pipe. Over 400 lines,
since a process and its end are told in one place.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IDelayedCall, IReadDescriptor
from twisted.logger import Logger, LogLevel, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop.accounts import supervisor
from popdrop.accounts.helperclient import module_path
from popdrop.errors import ConfigError
from popdrop.record import escaped

log = Logger()

START_SECONDS: Final = 120.0
"""Seconds that the first workers have for their start; each needs half a second of a processor."""
STOP_SECONDS: Final = 60.0
"""Seconds beyond `--grace` for a deletion in progress, before a worker is killed at a stop."""
LINE_OCTETS: Final = 1 << 20
"""Of a record or of a line on standard error, at most."""
GATHER_SECONDS: Final = 0.01
"""Seconds between two reads of what a worker logs: to wake up for each line costs more than the
line. Meanwhile it waits in the socket, which takes some hundreds."""
READ_OCTETS: Final = 1 << 16
NOT_OURS: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC")
"""Variables of systemd's that are about the parent."""

_PR_GET_DUMPABLE: Final = 3


class Handed(NamedTuple):
    """What a worker has from its parent. All numbers are of inherited descriptors.

    `arguments` are the words of the command line, `folder` is where they were given. `listeners`
    are string, socket and `trusted_address`. `logs` are the descriptors of `--session-log`: what
    stands for N. `helper` is that of `HelperProcess.hand_on`. `alive` are the seconds between two
    signs of life; `None`: nobody waits for them. `processor` is for it alone, of `processors`;
    `None`: it runs on any.
    """

    arguments: Sequence[str]
    folder: str
    state_dir: str
    listeners: Sequence[tuple[str, int, bool]]
    table: int | None
    logs: dict[int, int]
    helper: dict[str, Any] | None = None
    alive: float | None = None
    processor: int | None = None
    processors: Sequence[int] = ()

    def settle(self) -> None:
        """Stay on the processor of its own, with all threads to come.

        Those of one interpreter wait for each other; where the kernel wakes one on another
        processor than the one that its data are in the cache of, a session took 0.50 ms and not
        0.45 (two processors, 32 sessions at once).
        """
        if self.processor is not None:
            with suppress(OSError):  # taken away since the parent's start (cpuset(7))
                os.sched_setaffinity(0, {self.processor})

    def descriptors(self) -> list[int]:
        """All of them."""
        found = [number for _, number, _ in self.listeners] + list(self.logs.values())
        if self.table is not None:
            found.append(self.table)
        if self.helper is not None:
            found += [self.helper["slot"], *self.helper["channels"]]
        return found


@implementer(IReadDescriptor)
class _Readable:
    """Calls `work` when the descriptor can be read."""

    def __init__(self, descriptor: int, work: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._work = work

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "worker"

    def doRead(self) -> None:
        self._work()

    def connectionLost(self, reason: Failure) -> None:
        """Its end is seen elsewhere."""


class _Lines:
    """Lines of one descriptor, which does not block."""

    def __init__(self, descriptor: int, take: Callable[[bytes], None]) -> None:
        self.descriptor = descriptor
        self._take = take
        self._rest = b""
        self.ended = False

    def read(self) -> bool:
        """Take what there is, once; whether there was anything."""
        try:
            octets = os.read(self.descriptor, READ_OCTETS)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            octets = b""
        if not octets:
            self.ended = True
            return False
        *lines, self._rest = (self._rest + octets).split(b"\n")
        if len(self._rest) > LINE_OCTETS:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._take(line)
        return True


class _Worker:
    """One process, from its start to its end."""

    def __init__(
        self,
        reactor: Any,
        number: int,
        handed: Handed,
        asks: Callable[[_Worker, str], None],
    ) -> None:
        """`asks` is called for a takeover, with the account in hexadecimal."""
        self._asks = asks
        self.number = number
        self.ready = False
        self.failure: str | None = None
        self.began = self._heard = time.monotonic()
        here, there = socket.socketpair()
        errors, stderr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(stderr, True)
        config = {
            "path": module_path(),
            "modules": {"worker": "popdrop.worker"},
            "parent": os.getpid(),
            "dumpable": ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0),
            "reactor": type(reactor).__module__,
            "channel": there.fileno(),
            **handed._asdict(),
            "logs": list(handed.logs.items()),
        }
        text = supervisor.config_file(supervisor.as_json(config))
        try:
            self._child = subprocess.Popen(  # noqa: S603 - our own words
                supervisor.command("worker"),
                stdin=text,
                stdout=stderr,
                stderr=stderr,
                env={name: word for name, word in os.environ.items() if name not in NOT_OURS},
                pass_fds=[there.fileno(), *handed.descriptors()],
                # A ^C at the terminal is for the parent, which passes it on.
                start_new_session=True,
            )
            self._watch = os.pidfd_open(self._child.pid)
        except BaseException:
            here.close()
            os.close(errors)
            raise
        finally:
            there.close()
            os.close(stderr)
            os.close(text)
        here.setblocking(False)
        self._channel = here
        self._records = _Lines(here.fileno(), self._take)
        self._errors = _Lines(errors, self._complaint)
        self._reading: list[_Readable] = []
        self._later: dict[_Readable, IDelayedCall] = {}
        self._reloads: deque[Deferred[None]] = deque()
        self._reactor = reactor

    @property
    def pid(self) -> int:
        return self._child.pid

    def descriptors(self) -> list[int]:
        """To be waited for."""
        found = [each.descriptor for each in (self._records, self._errors) if not each.ended]
        return [*found, self._watch]

    def look(self) -> bool:
        """Take what it has sent; whether it has ended."""
        self._records.read()
        self._errors.read()
        return self._child.poll() is not None

    def attach(self, ended: Callable[[_Worker], None]) -> None:
        """From now on the reactor reads; `ended` is called once."""
        for lines in (self._records, self._errors):
            if not lines.ended:
                self._read_by(lines)
        self._reading.append(_Readable(self._watch, lambda: ended(self)))
        self._reactor.addReader(self._reading[-1])

    def _read_by(self, lines: _Lines) -> None:
        def read() -> None:
            self._reactor.removeReader(each)
            if lines.read() or not lines.ended:
                self._later[each] = self._reactor.callLater(GATHER_SECONDS, again)

        def again() -> None:
            del self._later[each]
            self._reactor.addReader(each)

        each = _Readable(lines.descriptor, read)
        self._reading.append(each)
        self._reactor.addReader(each)

    def end(self) -> str:
        """It has ended: take the rest of what it said, let go, and give the reason."""
        for timer in self._later.values():
            timer.cancel()
        for each in self._reading:
            self._reactor.removeReader(each)
        for lines in (self._records, self._errors):
            while lines.read():
                pass
        while self._reloads:
            self._reloads.popleft().callback(None)
        code = self._child.wait()
        self._channel.close()
        os.close(self._errors.descriptor)
        os.close(self._watch)
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def silent(self) -> float:
        """Seconds since it has given a sign of life."""
        while self._records.read():
            pass  # what has come while we did not run
        return time.monotonic() - self._heard

    def send(self, *words: str) -> bool:
        """A record to the worker. One that does not read for long loses it: `False`."""
        try:
            self._channel.send(json.dumps(words).encode("ascii") + b"\n", socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def reload(self) -> Deferred[None]:
        """Let it reload; fires when it has, or has ended."""
        done: Deferred[None] = Deferred()
        if self.send("reload"):
            self._reloads.append(done)
        else:
            done.callback(None)
        return done

    def signal(self, number: int) -> None:
        """Until `end` the number is no other process's."""
        self._child.send_signal(number)

    def _take(self, line: bytes) -> None:
        try:
            kind, *words = json.loads(line)
            if kind == "log":
                self._publish(*words)
            elif kind == "alive":
                self._heard = time.monotonic()
            elif kind == "ready":
                self.ready = True
                self._heard = time.monotonic()
                log.info("worker {number} pid {pid} serves", number=self.number, pid=self.pid)
            elif kind == "reloaded":
                self._reloads.popleft().callback(None)
            elif kind == "yield":
                self._asks(self, str(words[0]))
            elif kind == "failed":
                self.failure = str(words[0])
        except (ValueError, TypeError, LookupError):
            log.error("worker pid {pid} sent a record that is none", pid=self.pid)

    def _publish(self, level: str, when: float, namespace: str, system: str, text: str) -> None:
        globalLogPublisher(
            {
                "log_format": text.replace("{", "{{").replace("}", "}}"),
                "log_flattened": {},  # ready for observers that keep events: there are no fields
                "log_level": LogLevel.levelWithName(level),
                "log_namespace": namespace,
                "log_system": system,
                "log_time": float(when),
                "worker_pid": self.pid,
            }
        )

    def _complaint(self, line: bytes) -> None:
        log.warn("worker pid {pid}: {line}", pid=self.pid, line=escaped(line))


class Workers:
    """All of them. `handed` has an entry for each."""

    def __init__(self, reactor: Any, handed: Sequence[Handed]) -> None:
        self._reactor = reactor
        self._handed = handed
        self._running: dict[int, _Worker] = {}
        self._pauses = [supervisor.FIRST_PAUSE] * len(handed)
        self._timers: dict[int, IDelayedCall] = {}
        self._stopping: Deferred[None] | None = None

    @property
    def pids(self) -> list[int]:
        """Of those that run."""
        return [worker.pid for worker in self._running.values()]

    def start(self) -> None:
        """Start all and wait until all serve. Blocks; raises `ConfigError`."""
        try:
            for number in range(len(self._handed)):
                self._running[number] = self._make(number)
            self._wait()
        except BaseException as error:
            self._end_now()
            if isinstance(error, OSError | subprocess.SubprocessError):
                raise ConfigError(
                    f"--workers: a worker cannot be started: {error}; the user of --uid must be"
                    " able to run this Python and to read its modules"
                ) from None
            raise
        for worker in self._running.values():
            worker.attach(self._ended)

    def _make(self, number: int) -> _Worker:
        return _Worker(self._reactor, number, self._handed[number], self._asks)

    def _asks(self, asker: _Worker, name: str) -> None:
        for worker in self._running.values():
            if worker is not asker:
                worker.send("yield", name)

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while not all(each.ready for each in self._running.values()):
            waiting = select.poll()
            for worker in self._running.values():
                for descriptor in worker.descriptors():
                    waiting.register(descriptor, select.POLLIN)
            if not waiting.poll(max(0.0, until - time.monotonic()) * 1000):
                raise ConfigError(f"--workers: they did not start within {START_SECONDS:g} s")
            for worker in list(self._running.values()):
                if worker.look():
                    del self._running[worker.number]
                    reason = worker.end()
                    raise ConfigError(
                        worker.failure
                        or f"--workers: one ended at its start ({reason}); the log may say why"
                    )

    def _end_now(self) -> None:
        for worker in self._running.values():
            worker.signal(signal.SIGKILL)
            worker.end()
        self._running.clear()

    def reload(self) -> Deferred[Any]:
        """Pass SIGHUP on; fires when all have reloaded. One that starts reads all anew anyway."""
        running = [worker for worker in self._running.values() if worker.ready]
        return gatherResults([worker.reload() for worker in running])

    def hurry(self) -> None:
        """End the grace of a stop."""
        for worker in self._running.values():
            worker.send("hurry")

    def live(self, limit: float) -> bool:
        """Whether any serves. Kills what has given no sign of life for `limit` seconds."""
        found = False
        for worker in self._running.values():
            if not worker.ready:
                continue
            if worker.silent() <= limit:
                found = True
            elif self._stopping is None:
                log.error(
                    "worker {number} pid {pid} gives no sign of life, and is killed",
                    number=worker.number,
                    pid=worker.pid,
                )
                worker.signal(signal.SIGKILL)
        return found

    def _ended(self, worker: _Worker) -> None:
        number = worker.number
        del self._running[number]
        reason = worker.end()
        if self._stopping is not None:
            if not self._running:
                self._stopping.callback(None)
            return
        if worker.failure is not None:
            log.error("{why}", why=worker.failure)
        if time.monotonic() - worker.began > supervisor.LONG_LIFE:
            self._pauses[number] = supervisor.FIRST_PAUSE
        pause = self._pauses[number]
        self._pauses[number] = min(2 * pause, supervisor.LONGEST_PAUSE)
        log.error(
            "worker {number} pid {pid} ended ({reason}); a new one is started in {pause:g} s",
            pause=pause,
            number=number,
            pid=worker.pid,
            reason=reason,
        )
        self._timers[number] = self._reactor.callLater(pause, self._again, number)

    def _again(self, number: int) -> None:
        del self._timers[number]
        try:
            worker = self._make(number)
        except (OSError, subprocess.SubprocessError) as error:
            log.error("a worker cannot be started: {why}", why=str(error))
            pause = supervisor.LONGEST_PAUSE
            self._timers[number] = self._reactor.callLater(pause, self._again, number)
            return
        self._running[number] = worker
        worker.attach(self._ended)

    async def stop(self, grace: float) -> None:
        """End all: sessions have `grace` seconds, a deletion in progress a minute more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if not self._running:
            return
        self._stopping = Deferred()
        for worker in self._running.values():
            worker.signal(signal.SIGTERM)
        late = self._reactor.callLater(grace + STOP_SECONDS, self._kill)
        await self._stopping
        if late.active():
            late.cancel()

    def _kill(self) -> None:
        for worker in self._running.values():
            log.error("worker pid {pid} does not end, and is killed", pid=worker.pid)
            worker.signal(signal.SIGKILL)
