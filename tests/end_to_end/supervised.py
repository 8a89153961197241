"""What systemd does with a socket unit: it listens itself, and starts one server after another.

sd_listen_fds(3): the sockets are descriptors 3 and up, `LISTEN_PID` and `LISTEN_FDS` say so.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

from tests.end_to_end.harness import Folder, Twistd, command

FIRST: int = 3
"""sd_listen_fds(3) calls it SD_LISTEN_FDS_START."""
HANDED_ON = f"""
import os
numbers = [int(word) for word in os.environ.pop("HANDED_ON").split()]
safe = [os.dup2(number, 100 + place) for place, number in enumerate(numbers)]
for place, number in enumerate(safe):
    os.dup2(number, {FIRST} + place)
for number in {{*numbers, *safe}} - set(range({FIRST}, {FIRST} + len(numbers))):
    os.close(number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(numbers))
os.environ["LISTEN_FDNAMES"] = ":".join("pop3" for _ in numbers)
from twisted.scripts.twistd import run
run()
"""
"""What runs in the child in place of `twistd`: it is started as systemd starts it, and is it."""


def backlog_limit(listening: socket.socket) -> int:
    """How many connections may wait at a listening TCP socket: `tcpi_sacked` of tcp(7)."""
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", info, 28)[0])


class Door:
    """Listening sockets that outlive servers: any number, at addresses as of `socket.bind`.

    A string is the path of a Unix socket, with mode 0600.
    """

    def __init__(self, case: object, *addresses: tuple[str, int] | str) -> None:
        self.sockets: list[socket.socket] = []
        for address in addresses:
            family = socket.AF_UNIX
            if not isinstance(address, str):
                family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            listening = socket.socket(family, socket.SOCK_STREAM)
            case.addCleanup(listening.close)  # type: ignore[attr-defined]
            listening.bind(address)
            if isinstance(address, str):
                os.chmod(address, 0o600)
            listening.listen(4096)
            self.sockets.append(listening)

    @property
    def ports(self) -> list[int]:
        """Of the TCP sockets."""
        names = [each.getsockname() for each in self.sockets]
        return [name[1] for name in names if not isinstance(name, str)]

    def waiting(self) -> int:
        """How many connections nobody has taken as yet, at all TCP sockets: `tcpi_unacked`."""
        total = 0
        for each in self.sockets:
            if each.family != socket.AF_UNIX:
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                total += int(struct.unpack_from("=I", info, 24)[0])
        return total


class Served(Twistd):
    """`twistd -n popdrop` on the sockets of a `Door`; it may not be ready yet when this returns."""

    def __init__(
        self, case: object, folder: Folder, door: Door, listen: tuple[str, ...], *options: str
    ) -> None:
        self.folder = folder
        numbers = [each.fileno() for each in door.sockets]
        words = command(folder, *options, listen=listen)
        words[:3] = [sys.executable, "-c", HANDED_ON]
        more = {"HANDED_ON": " ".join(map(str, numbers))}
        self.begin(case, words, folder.path, more, tuple(numbers))

    def ready(self) -> None:
        """Wait until it serves."""
        self.wait_for(r"POP3 on ")
