"""What systemd wants to hear of a service of `Type=notify`: sd_notify(3), one datagram each."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Final

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
ALIVE: Final = "WATCHDOG=1"


def tell(words: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send `words` to whoever started us; `False`: nobody asked, or he does not listen now."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.setblocking(False)
            sending.sendto(words.encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError:
        return False
    return True


def reloading() -> str:
    """The words for the begin of a reload, with the time that `Type=notify-reload` wants."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def watchdog_seconds(environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds between two signs of life, half of what systemd waits; `None`: it wants none."""
    word, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if pid not in ("", str(os.getpid())) or not (word.isascii() and word.isdigit() and int(word)):
        return None
    return int(word) / 2_000_000
