"""A process of `--workers N`: serves from the sockets that its parent has bound.

Started by `workers`, with `accounts.supervisor.BOOT` and a configuration as standard input.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any, Final

from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import LoopingCall
from twisted.logger import ILogObserver, LogEvent, LogLevel, eventAsText, globalLogBeginner
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop.errors import ConfigError
from popdrop.workers import STOP_SECONDS, Handed

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


def _log_record(event: LogEvent) -> bytes:
    """What `workers` publishes: level, time, where it comes from, and the text."""
    level = event.get("log_level") or LogLevel.info
    namespace = event.get("log_namespace") or "-"
    system = event.get("log_system") or f"{namespace}#{level.name}"
    text = eventAsText(event, includeTimestamp=False, includeSystem=False)
    when = event.get("log_time", 0.0)
    record = ["log", level.name, when, str(namespace), str(system), text]
    return json.dumps(record).encode("ascii")


@implementer(IReadDescriptor, ILogObserver)
class Channel:
    """The socket to the parent. Its end is the parent's."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)
        self._guard = threading.Lock()
        self._rest = b""
        self.service: Any = None
        self.reactor: Any = None
        self.ready = False

    def send(self, octets: bytes) -> None:
        """One record, from any thread. Waits for the parent; nothing is done once it is gone."""
        with suppress(OSError), self._guard:
            self._socket.sendall(octets + b"\n", socket.MSG_NOSIGNAL)

    def ask_others(self, name: bytes) -> None:
        """Let the parent tell all other workers to yield."""
        self.send(json.dumps(["yield", name.hex()]).encode("ascii"))

    def __call__(self, event: LogEvent) -> None:
        """A log observer. Warnings about the options the parent has given, at its start."""
        level = event.get("log_level") or LogLevel.info
        if not self.ready and level < LogLevel.error:
            return
        self.send(_log_record(event))

    def fileno(self) -> int:
        """Of the socket."""
        return self._socket.fileno()

    def logPrefix(self) -> str:
        """Twisted's name for what happens here."""
        return "parent"

    def doRead(self) -> None:
        """Do what the parent says."""
        try:
            octets = self._socket.recv(4096, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            octets = b""
        if not octets:
            self._orphaned()
            return
        *lines, self._rest = (self._rest + octets).split(b"\n")
        for line in lines:
            word, *more = json.loads(line)
            if word == "reload":
                self.service.reload().addCallback(lambda _: self.send(b'["reloaded"]'))
            elif word == "hurry":
                self.service.hurry()
            elif word == "yield":
                self.service.yield_to(bytes.fromhex(more[0]))

    def _orphaned(self) -> None:
        self.reactor.removeReader(self)
        # The kernel ends this process if it does not come to it by itself.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(self.service.grace + STOP_SECONDS) + 1)
        self.stop()

    def stop(self) -> None:
        """Stop in good order. Idempotent: a service manager and the parent may both say it."""
        with suppress(ReactorNotRunning):
            self.reactor.stop()

    def asked(self, number: int, frame: object) -> None:
        """The handler of SIGTERM and SIGINT."""
        self.reactor.callFromThread(self.stop)

    def connectionLost(self, reason: Failure) -> None:
        """As at the end of the socket, where the reactor sees it first."""
        self._orphaned()


def _settle(parent: int) -> None:
    """End in good order when the parent does; the socket's end says the same, a little later."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        sys.exit(0)  # it ended before it could be heard of


def _handed(config: dict[str, Any]) -> Handed:
    fields = {name: config[name] for name in Handed._fields}
    fields["listeners"] = [(text, number, trusted) for text, number, trusted in fields["listeners"]]
    handed = Handed(**{**fields, "logs": {int(n): int(moved) for n, moved in config["logs"]}})
    for number in (config["channel"], *handed.descriptors()):
        os.set_inheritable(number, False)  # programs that are run here have no use for it
    return handed


def _make(handed: Handed, reactor: Any, channel: Channel) -> Any:
    """The service, put together where the command line was given. Raises `ConfigError`."""
    from popdrop.options import Options
    from popdrop.tap import Popdrop

    here = os.getcwd()
    # A folder of root's is nothing to us; then names from it are not found, and that is said.
    with suppress(OSError):
        os.chdir(handed.folder)
    options = Options()
    options.parseOptions(list(handed.arguments))
    options["state-dir"] = handed.state_dir
    service = Popdrop(options, reactor, handed, channel.ask_others)
    os.chdir(here)
    return service


def main(config: dict[str, Any]) -> None:
    """The worker process, from `BOOT`."""
    _settle(config["parent"])
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    handed = _handed(config)
    handed.settle()
    importlib.import_module(config["reactor"]).install()
    from twisted.internet import reactor as installed

    reactor: Any = installed
    channel = Channel(config["channel"])
    globalLogBeginner.beginLoggingTo([channel])
    try:
        service = _make(handed, reactor, channel)
        service.privilegedStartService()
        service.startService()
    except (ConfigError, SystemExit) as error:
        channel.send(json.dumps(["failed", str(error).removeprefix("popdrop: ")]).encode("ascii"))
        sys.exit(1)
    if not config["dumpable"]:
        # As with a process that has given its rights away: nobody of its uid may look into it.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    channel.service, channel.reactor = service, reactor
    reactor.addReader(channel)
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)

    def serves() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, channel.asked)
        channel.ready = True
        channel.send(b'["ready"]')
        if handed.alive is not None:
            # By the reactor's timer: what stops the reactor stops the signs of life.
            living = LoopingCall(channel.send, b'["alive"]')
            living.clock = reactor
            living.start(handed.alive)

    reactor.callWhenRunning(serves)
    reactor.run()
