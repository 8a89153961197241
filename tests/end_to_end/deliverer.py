"""A deliverer, run as a program: `deliverer.py STYLE SPOOL`, one mail for each octet it reads.

It says the number of each mail once that is in the spool and on disk, and ends with its standard
input. Shares nothing with the server. STYLE is the order of its locks: `fcntl-dot` (Debian Policy
11.6) or `dot-fcntl` (procmail), where it has the spool open before it waits.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random


def text(number: int) -> bytes:
    """Mail `number` as its sender wrote it, LF line ends: the same one each time."""
    random = Random(number)
    words = [b"word", b".", b"..", b"From here", b">From there", b"", b"x" * 70, b"\xe4\xf6\xfc"]
    lines = random.choices(words, k=1500 if number % 20 == 0 else random.randrange(40))
    head = b"From: <alice@example.org>\nSubject: mail %d\nMessage-ID: <%d@example.org>\n\n"
    return head % (number, number) + b"".join(line + b"\n" for line in [*lines, b"end"])


def stored(number: int) -> bytes:
    """Mail `number` as it lies in an mboxrd spool, separator included."""
    quoted = re.sub(rb"(?m)^(>*From )", rb">\1", text(number))
    return b"From alice@example.org Sun Nov 22 10:00:00 2026\n" + quoted + b"\n"


def number_of(octets: bytes) -> int:
    """Which mail these octets are."""
    found = re.search(rb"^Message-ID: <(\d+)@", octets, re.MULTILINE)
    if found is None:
        raise ValueError(f"no mail of this deliverer: {octets[:200]!r}")
    return int(found[1])


def take_dot_lock(spool: str) -> bool:
    """One try, by link(2)."""
    folder, name = os.path.split(spool)
    temporary = os.path.join(folder, f".lk.{name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(fd, b"%d\n" % os.getpid())
        os.link(temporary, spool + ".lock")
    except FileExistsError:
        return False
    finally:
        os.close(fd)
        os.unlink(temporary)
    return True


def wait() -> None:
    time.sleep(0.002)


@contextmanager
def fcntl_then_dot(spool: str) -> Iterator[int]:
    while True:
        fd = os.open(spool, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        if take_dot_lock(spool):
            break
        os.close(fd)
        wait()
    try:
        yield fd
    finally:
        os.unlink(spool + ".lock")
        os.close(fd)


@contextmanager
def dot_then_fcntl(spool: str) -> Iterator[int]:
    fd = os.open(spool, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    while not take_dot_lock(spool):
        wait()
    fcntl.lockf(fd, fcntl.LOCK_EX)
    try:
        yield fd
    finally:
        os.close(fd)
        os.unlink(spool + ".lock")


def main(style: str, spool: str) -> None:
    locked = {"fcntl-dot": fcntl_then_dot, "dot-fcntl": dot_then_fcntl}[style]
    number = 0
    while os.read(0, 1):
        number += 1
        octets = stored(number)
        with locked(spool) as fd:
            # In two halves, so that one who ignores the locks sees half a mail.
            for half in (octets[: len(octets) // 2], octets[len(octets) // 2 :]):
                if os.write(fd, half) != len(half):
                    raise OSError("short write")
                wait()
            os.fsync(fd)
        print(number, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
