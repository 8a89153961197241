"""The supervisor: with the rights of the start, it does nothing but to keep a helper running.

A server that has given its rights away cannot start a helper anew when one ends; the supervisor
can. It reads no octet of anybody: it waits for the end of the helper, and for the end of the
network process, which is the end of its lifeline. Both mean little code, and none that parses
(decision 19).

It is started by fork and exec, not by fork alone. An interpreter of its own holds no key,
certificate or account of the server's, has other addresses than the process that talks to
strangers, inherits just the descriptors that are named here, and may be started at any time,
whatever threads there are. The price is an interpreter's memory; so this module imports nothing
but a few modules of the standard library.

`boot` is what all processes of the helper begin with.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any, Final

BOOT: Final = (
    "import json, sys; config = json.load(sys.stdin); sys.path[:] = config['path'];"
    " from importlib import import_module;"
    " import_module(config['modules'][sys.argv[1]]).main(config)"
)
"""The first code of each process. Isolated (`python -I`), it takes nothing from the environment or
the current folder; where modules are it is told by the process that started as root."""

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 30.0
"""Seconds between the end of a helper and the next one. Each end doubles them..."""
LONG_LIFE: Final = 60.0
"""...unless it has run so long, in seconds."""
PATIENCE: Final = 5.0
"""Seconds that a helper has to end when the network process has ended."""
FILES: Final = 256
"""Descriptors of a process: some for each thread, and the sockets."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


def command(role: str) -> list[str]:
    """How the process for `role` is started; its configuration is given as standard input."""
    return [sys.executable, "-I", "-c", BOOT, role]


def environment() -> dict[str, str]:
    """All that any process of the helper has as environment."""
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def settle(parent: int) -> None:
    """Give up what this process does not need, and end with `parent`, its parent's pid.

    No core file, and no other process of the same uid may look into this one (prctl(2)). The kernel
    sends the death signal with the rights of the one that dies, so it reaches a process of root's
    from one of root's only; the ends of the sockets are what is relied on.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    os.umask(0o077)
    os.chdir("/")
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_PDEATHSIG, signal.SIGKILL)):
        if prctl(option, int(value), 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        sys.exit(0)  # it ended before it could be heard of
    # Not SIG_IGN, which programs that are started would inherit. The end of the sockets ends us,
    # so that a service manager that signals all of us at once does not cut off logins.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _ignore)


def _ignore(number: int, frame: object) -> None:
    return


def config_file(text: bytes) -> int:
    """A descriptor to read a configuration from: a file without a name.

    Nobody has to write while the other reads, as with a pipe, and no command line shows it.
    """
    number = os.memfd_create("config", os.MFD_CLOEXEC)
    os.write(number, text)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def as_json(config: dict[str, Any]) -> bytes:
    """A configuration for `config_file`."""
    return json.dumps(config).encode("ascii")


def report(error: BaseException) -> None:
    """Where an error came from, on standard error. Not its text, which may quote a password."""
    where = error.__traceback__
    places = []
    while where is not None:
        code = where.tb_frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{where.tb_lineno}")
        where = where.tb_next
    tell(f"{type(error).__name__} at {' '.join(places)}")


def tell(line: str) -> None:
    """One line on standard error, which is that of the server."""
    try:
        os.write(2, f"popdrop helper: {line}\n".encode())
    except OSError:
        pass


def quiet_input() -> None:
    """Put /dev/null in the place of standard input and output."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


class Supervisor:
    """Starts the helper, again and again, until the lifeline ends."""

    def __init__(self, config: dict[str, Any], text: bytes) -> None:
        self._text = text
        self._down: bytes = bytes.fromhex(config["down"])
        self._lifeline = socket.socket(fileno=config["lifeline"])
        ends = [*config["slots"], *config["channels"]]
        self._slots = [socket.socket(fileno=number) for number in ends]
        self._handed = [*ends, *config["listeners"]]
        for number in self._handed:
            os.set_inheritable(number, True)
        os.set_inheritable(config["lifeline"], False)
        self._waiting = select.poll()
        # Nothing is ever sent on it: to be readable is to have ended.
        self._waiting.register(self._lifeline, select.POLLIN | select.POLLRDHUP)

    def run(self) -> None:
        """Returns when the network process has ended, and the helper too."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            pid = self._start()
            watch = os.pidfd_open(pid)
            try:
                self._waiting.register(watch, select.POLLIN)
                ends = self._lifeline.fileno() in dict(self._waiting.poll())
                self._waiting.unregister(watch)
                status = self._reap(pid, watch) if ends else os.waitpid(pid, 0)[1]
            finally:
                os.close(watch)
            if ends:
                return
            self._tell(status)
            if time.monotonic() - began > LONG_LIFE:
                pause = FIRST_PAUSE
            if self._waiting.poll(pause * 1000):
                return
            pause = min(pause * 2, LONGEST_PAUSE)

    def _start(self) -> int:
        text = config_file(self._text)
        try:
            return os.posix_spawn(
                sys.executable,
                command("helper"),
                environment(),
                file_actions=[(os.POSIX_SPAWN_DUP2, text, 0)],
            )
        finally:
            os.close(text)

    def _reap(self, pid: int, watch: int) -> int:
        ended = select.poll()
        ended.register(watch, select.POLLIN)
        if not ended.poll(PATIENCE * 1000):
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    def _tell(self, status: int) -> None:
        """Drop what no helper has read, since it is going to be given up, and say so."""
        code = os.waitstatus_to_exitcode(status)
        reason = f"signal {-code}" if code < 0 else f"exit status {code}"
        word = reason.encode("ascii")
        record = self._down + len(word).to_bytes(2, "big") + word
        for slot in self._slots:
            try:
                # A record is dropped whole, however little of it is taken.
                while slot.recv(1, socket.MSG_DONTWAIT):
                    pass
            except OSError:
                pass
            try:
                slot.send(record, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                pass  # the network process reads nothing, and will give up by its own clock


def main(config: dict[str, Any]) -> None:
    """The supervisor process, from `BOOT`."""
    settle(config["parent"])
    quiet_input()
    text = as_json({**config, "parent": os.getpid()})
    Supervisor(config, text).run()
