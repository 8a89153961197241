"""Listening sockets that outlive a shortage of descriptors.

When `accept` fails for want of descriptors or memory, Twisted closes what waits, if it still has a
descriptor in reserve; else it tries again at once and for ever, with a line in the log for each
time. A thread that opens a file at the wrong moment takes that reserve away for good. Here those
who wait go on waiting, in the kernel's queue, and are served as soon as there is room.
"""

from __future__ import annotations

import errno
import resource
import socket
from contextlib import suppress
from typing import Any, Final

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

log = Logger()

SCARCE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What `accept` says where descriptors or memory have run out (accept(2))."""
PAUSE: Final = 0.5
"""Seconds until it is tried again."""
QUIET: Final = 60.0
"""Seconds between two lines in the log about the same trouble."""
SPARED: Final = 8
"""One in so many descriptors is for the maildrops of those who are in: no connection gets it."""
FAREWELL: Final = b"-ERR [SYS/TEMP] too many connections, try again later\r\n"


class Complaint:
    """Says something in the log, and then for `quiet` seconds only counts how often it would."""

    def __init__(self, clock: IReactorTime, quiet: float = QUIET) -> None:
        self._clock = clock
        self._quiet = quiet
        self._said: float | None = None
        self._unsaid = 0

    def say(self, text: str, **fields: object) -> None:
        """`text` is a format for Twisted's log, of our own words."""
        now = self._clock.seconds()
        if self._said is not None and now - self._said < self._quiet:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more since the last such line)" if self._unsaid else ""
        self._said, self._unsaid = now, 0
        log.warn(text + more, **fields)


class Listening(socket.socket):
    """In the place of a Twisted port's own socket."""

    def __init__(self, port: Any, clock: IReactorTime, implicit_tls: bool) -> None:
        super().__init__(fileno=port.socket.detach())
        self._port = port
        self._clock = clock
        self._farewell = b"" if implicit_tls else FAREWELL
        self._scarcity = Complaint(clock)
        self._crowd = Complaint(clock)

    def accept(self) -> tuple[socket.socket, Any]:
        """As `socket.accept`; but what cannot be accepted now looks as if nobody waited."""
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            self._pause(error.errno)
            raise BlockingIOError(errno.EAGAIN, "nobody is let in now") from None
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # The kernel gives the lowest number that is free.
        if connection.fileno() < most - most // SPARED:
            return connection, address
        self._crowd.say(
            "too many connections for {most} descriptors: {peer} turned away; raise LimitNOFILE="
            " (ulimit -Hn), or lower total= of --throttle",
            most=most,
            peer=address[0] if address else "local",
        )
        with connection, suppress(OSError):
            connection.setblocking(False)
            connection.send(self._farewell)
        raise BlockingIOError(errno.EAGAIN, "turned away")

    def _pause(self, code: int) -> None:
        self._scarcity.say(
            "cannot accept connections ({code}): they wait; see ulimit -Hn, and what is open in"
            " /proc/PID/fd",
            code=errno.errorcode[code],
        )
        self._port.stopReading()
        self._clock.callLater(PAUSE, self._go_on)

    def _go_on(self) -> None:
        # It may have stopped listening meanwhile.
        if self._port.connected and not self._port.disconnecting:
            self._port.startReading()


def outlive_shortage(port: Any, clock: IReactorTime, implicit_tls: bool) -> None:
    """Let a listening port outlive a shortage, if it is one of Twisted's with a socket.

    Or if it is over such a one, which it has as `plain`.
    """
    port = getattr(port, "plain", port)
    if isinstance(getattr(port, "socket", None), socket.socket):
        port.socket = Listening(port, clock, implicit_tls)
        port.fileno = port.socket.fileno
