"""One spool file: opened safely, read by places, shortened in place. Knows nothing of mbox."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from popdrop.errors import PermanentFailure

UNSAFE: Final = "maildrop is not a plain file of its user"

COPY_BLOCK: Final = 1 << 20
"""Octets to read at a time for a hash."""

PACE: Final = 1 << 20
"""Octets read by blocks until other threads are let in."""

PAUSE: Final = 20e-6
"""Seconds to sleep then; the kernel makes 70 us of it.

A system call gives up the interpreter, but on one core it is taken back before the reactor has
woken up, and so again until a time slice is over. Who sleeps lets it in.
"""

NO_RIGHT: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

SETTLED_NS: Final = 2 * 10**9
"""Nanoseconds after a write in which another one may leave the same times, at the worst."""

FINE_NS: Final = 20 * 10**6
"""The same where times are finer than a second: kernels tick every 4 to 10 ms."""

Key = tuple[int, int, int, int, int]


def key_of(found: os.stat_result) -> Key:
    """What is different when anything was written to the file, or when it is another file."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def is_settled(found: os.stat_result, now_ns: int) -> bool:
    """Whether any later write will show in the file's times, whatever its file system.

    By ctime as well: a mail reader may put the old mtime back.
    """
    return now_ns - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_NS


def shows_changes(found: os.stat_result, now_ns: int) -> bool:
    """The same, if whole seconds in the ctime tell of a coarse file system and others do not."""
    return until_shown(found, now_ns) == 0


def until_shown(found: os.stat_result, now_ns: int) -> int:
    """Nanoseconds until `shows_changes`, 0 for now."""
    wanted = SETTLED_NS if found.st_ctime_ns % 10**9 == 0 else FINE_NS
    age = now_ns - max(found.st_mtime_ns, found.st_ctime_ns)
    return max(wanted + 1 - age, 0)


class Spool:
    """An open spool file. Offsets and lengths are in octets; all may raise `OSError`."""

    def __init__(self, fd: int, path: str, writable: bool) -> None:
        self.fd = fd
        self.path = path
        self.writable = writable
        self.opened = os.fstat(fd)
        """The file's facts when it was opened."""
        self._unpaced = 0

    def stat(self) -> os.stat_result:
        """The file's facts as they are now."""
        return os.fstat(self.fd)

    def is_at_path(self) -> bool:
        """Whether this is still the file that a deliverer would find, and under one name only."""
        try:
            there, here = os.lstat(self.path), self.stat()
        except OSError as error:
            # ESTALE: removed on another machine (NFS).
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return False
        return (there.st_dev, there.st_ino, there.st_nlink) == (here.st_dev, here.st_ino, 1)

    def read(self, start: int, stop: int) -> bytes:
        """The octets from `start` to `stop`, fewer where the file ends before."""
        return os.pread(self.fd, max(stop - start, 0), start)

    def blocks(self, start: int, stop: int, size: int) -> Iterator[bytes]:
        """As `read`, in blocks of at most `size`. Not for the reactor: pauses now and then."""
        while start < stop:
            block = os.pread(self.fd, min(size, stop - start), start)
            if not block:
                return
            yield block
            start += len(block)
            self._unpaced += len(block)
            if self._unpaced >= PACE:
                self._unpaced = 0
                time.sleep(PAUSE)

    def close(self) -> None:
        """Idempotent, never raises."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


def open_spool(path: str, uids: frozenset[int] | None, folder: int | None = None) -> Spool | None:
    """Open a spool to be read and, where the rights allow it, written; `None` if there is none.

    Only a regular file under one name, owned by one of `uids` (`None`: by anybody), so that
    nobody is led to another's mail (CVE-2008-1199, CVE-2010-2023). `folder` is a descriptor of the
    folder of `path`, where that is to be taken whatever the path leads to. Raises
    `PermanentFailure` for anything else, `OSError` where the system refuses.
    """
    name = path if folder is None else os.path.basename(path)
    within = {} if folder is None else {"dir_fd": folder}
    try:
        # Before it is opened: to open a device may do something.
        _check(path, os.lstat(name, **within), uids)
    except FileNotFoundError:
        # No file is no mail. No folder is a wrong template or a missing mount, and clients forget
        # what they have seen when they are shown an empty maildrop.
        if folder is None:
            os.lstat(os.path.dirname(path))
        return None
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd, writable = os.open(name, flags | os.O_RDWR, **within), True
    except OSError as error:
        if error.errno not in NO_RIGHT:
            raise
        fd, writable = os.open(name, flags | os.O_RDONLY, **within), False
    spool = Spool(fd, path, writable)
    try:
        _check(path, spool.opened, uids)
    except BaseException:
        spool.close()
        raise
    return spool


def take_spool(fd: int, path: str, uids: frozenset[int] | None) -> Spool:
    """The spool at `path` that another process has opened as `fd`, which is closed on an error.

    It is looked at as by `open_spool`. Raises as that does.
    """
    try:
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        spool = Spool(fd, path, writable)
        _check(path, spool.opened, uids)
    except BaseException:
        os.close(fd)
        raise
    return spool


_TYPES: Final = {
    stat.S_IFLNK: "symbolic link",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def _check(path: str, found: os.stat_result, uids: frozenset[int] | None) -> None:
    fault = ""
    if not stat.S_ISREG(found.st_mode):
        fault = f"is a {_TYPES.get(stat.S_IFMT(found.st_mode), 'special file')}"
    elif found.st_nlink > 1:
        fault = f"has {found.st_nlink} links"
    elif uids is not None and found.st_uid not in uids:
        fault = f"belongs to uid {found.st_uid}, not {' or '.join(map(str, sorted(uids)))}"
    if fault:
        raise PermanentFailure(UNSAFE, f"{path} {fault}")
