"""The session lock of a maildrop and the two locks of a spool. None of them ever waits.

The session lock keeps a second POP3 session out for as long as the first one lasts. The spool
locks keep deliverers and mail readers out, only while the spool is scanned or rewritten: fcntl
first, then the dot-lock (Debian Policy 11.6); when the second is busy the first is given up.

Over 400 lines since who may break whose lock is one question: its answers stand side by side.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
import threading
import time
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from secrets import token_hex
from types import TracebackType
from typing import ClassVar, Final, NamedTuple

from twisted.logger import Logger

from popdrop.errors import Busy
from popdrop.stores.mbox import dotlockfile

log = Logger()

KINDS: Final = ("fcntl", "dot")
"""The spool locks, in the order in which they are taken."""

STALE_AFTER: Final = 300.0
"""Seconds after which a dot-lock that names no process of this host is stale (liblockfile)."""

TOUCH_EVERY: Final = 60.0
"""Seconds between touches of our dot-lock; Postfix takes a lock of 500 s for stale."""

_FLOCK: Final = struct.Struct("hhqqi4x")
_HOLDER: Final = re.compile(rb"\s*([1-9][0-9]{0,9})(?::(\S+))?\s*(?:\n(\S+)\s*)?(?:\n|\Z)")
TEMPORARY: Final = ".popdrop-lock-"
"""What the names of dot-locks in the making hold, behind a dot and the name of the spool."""
_NO_FCNTL: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_TMPFILE: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}


def _lock_file(fd: int, kind: int) -> bool:
    """Lock or unlock all of a file for this open file description; whether that succeeded.

    Plain POSIX locks belong to the process: any close of the file in it would let them go.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def fcntl_holder(fd: int) -> int:
    """The PID that keeps a write lock from this description: 0 for nobody, -1 where none is told.

    Locks of an open file description, such as ours, tell none (fcntl(2), F_OFD_GETLK).
    """
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return 0 if answer[0] == fcntl.F_UNLCK else int(answer[4])


class NoDotLock(OSError):
    """The dot-lock can be neither made nor waited for: no rights, no space, or a broken folder."""


class NoFcntlLock(OSError):
    """The spool's file system has no fcntl locks, as NFS without a lock daemon."""


def identity(path: str) -> bytes:
    """What a spool is, whatever names lead to its folder: the folder itself, and the file's name.

    Raises `OSError` where there is no such folder.
    """
    folder, name = _split(path)
    found = os.stat(folder)
    return b"%d:%d/%s" % (found.st_dev, found.st_ino, os.fsencode(name))


_split: Final = lru_cache(maxsize=4096)(os.path.split)


@lru_cache(maxsize=4096)
def _name_of(spool: bytes) -> str:
    return sha256(spool).hexdigest()


class SessionLock:
    """Exclusive hold of one maildrop, over all processes of this machine.

    A private file for each spool in `folder`, named by the SHA-256 of its `identity`, so that all
    login names of one spool meet, and all links and mounts that lead to it (decision 11). The file
    stays: unlinking it would let two sessions lock two files of one name.
    """

    _held: ClassVar[set[str]] = set()
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: str, spool: str) -> None:
        """Raises `OSError` where the spool's folder is missing."""
        self.name = _name_of(identity(spool))
        """A name for all that is kept of this spool in the state folder."""
        self._path = f"{folder}/{self.name}"
        self._fd = -1

    def take(self) -> None:
        """Raises `Busy("session")`, or `OSError`."""
        with self._guard:
            if self._path in self._held:
                raise Busy("session")
            self._held.add(self._path)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o600)
            if not _lock_file(self._fd, fcntl.F_WRLCK):
                raise Busy("session")
        except BaseException:
            self._let_go()
            raise

    def release(self) -> None:
        """Idempotent, never raises; only the one that took the lock lets it go."""
        if self._fd >= 0:
            self._let_go()

    def _let_go(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)
        with self._guard:
            self._held.discard(self._path)


def hold(folder: str, spool: str) -> SessionLock:
    """Take the session lock of a spool. `folder` is made where it is missing, and its parent too.

    Raises `Busy("session")`, or `OSError`.
    """
    session = SessionLock(folder, spool)
    try:
        session.take()
    except FileNotFoundError:
        # Made at the first login: by then the rights of the start have been dropped.
        os.makedirs(os.path.dirname(folder), 0o700, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        session.take()
    return session


class Held(NamedTuple):
    """A dot-lock that lies there: `holder` in words; `stale` as `is_stale` judges.

    `fault` says what it is where it is no plain file, and is empty otherwise.
    """

    holder: str
    stale: bool
    fault: str


class SpoolLocks:
    """Both locks of a spool, as a context manager.

    Raises `Busy("spool")`, `NoDotLock`, `NoFcntlLock`, or another `OSError`.

    `fd` is the spool's descriptor, `kinds` those of `KINDS` to use, `write` whether the spool is
    to be written; a descriptor that is open for reading only can hold a read lock only.
    """

    def __init__(self, fd: int, path: str, kinds: tuple[str, ...], write: bool) -> None:
        self._fd = fd
        self._path = path
        self._kinds = kinds
        self._type = fcntl.F_WRLCK if write else fcntl.F_RDLCK
        self._locked = False
        self._dot = DotLock(path)

    def __enter__(self) -> SpoolLocks:
        if "fcntl" in self._kinds:
            self._lock()
        if "dot" in self._kinds:
            try:
                self._take_dot()
            except OSError as error:
                self._unlock()
                raise NoDotLock(error.errno, error.strerror, self._dot.path) from error
            except BaseException:
                self._unlock()
                raise
        if not self._locked:
            self._look_anew()
        return self

    def _look_anew(self) -> None:
        """NFS asks its server at an open and at an fcntl lock; else our facts may be minutes old,
        and without the mail that was delivered on another machine (nfs(5), "Close-to-open").
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with suppress(OSError):
            # To open a device may do something.
            if stat.S_ISREG(os.lstat(self._path).st_mode):
                os.close(os.open(self._path, flags))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._dot.release()
        self._unlock()

    def refresh(self) -> None:
        """As `DotLock.refresh`."""
        self._dot.refresh()

    def held(self) -> bool:
        """Whether the dot-lock is still ours: nobody has taken it for stale and removed it."""
        return "dot" not in self._kinds or self._dot.ours()

    def _lock(self) -> None:
        try:
            self._locked = _lock_file(self._fd, self._type)
        except OSError as error:
            if error.errno in _NO_FCNTL:
                raise NoFcntlLock(error.errno, error.strerror) from error
            raise
        if not self._locked:
            raise Busy("spool")

    def _unlock(self) -> None:
        if self._locked:
            self._locked = False
            with suppress(OSError):
                _lock_file(self._fd, fcntl.F_UNLCK)

    def _take_dot(self) -> None:
        if self._dot.take():
            return
        # A stale dot-lock is only broken by one who holds the other lock: two breakers could
        # remove each other's new locks.
        borrowed = not self._locked
        if borrowed:
            self._lock()
        try:
            if self._dot.break_stale() and self._dot.take():
                return
        finally:
            if borrowed:
                self._unlock()
        raise Busy("spool")


class DotLock:
    """`SPOOL.lock`: made whole and at once by a link, with our PID and host name inside.

    Counterparts are liblockfile, Dovecot, Postfix, Exim and procmail. Where we have no right to
    make it, dotlockfile(1) does, if it will; its locks bear our PID, and no host name.
    """

    _made: ClassVar[set[str]] = set()

    def __init__(self, spool: str) -> None:
        self.path = spool + ".lock"
        self._spool = spool
        self._folder, name = os.path.split(spool)
        self._folder = self._folder or "."
        self._temporary = os.path.join(self._folder, f".{name}{TEMPORARY}")
        self._fd = -1
        self._clock = 0.0
        self._touched = 0.0

    def take(self) -> bool:
        """One try; whether the lock is ours now. Raises `OSError` where it cannot be made."""
        try:
            return self._take_ourselves()
        except PermissionError as refused:
            return self._take_by_program(refused)

    def _take_ourselves(self) -> bool:
        fd = -1
        try:
            fd = os.open(self._folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        if fd >= 0:
            try:
                self._sign(fd)
                taken = _link_descriptor(fd, self._folder, self.path)
            except OSError as error:
                os.close(fd)
                # ENOENT: no /proc here.
                if error.errno != errno.ENOENT and error.errno not in _NO_TMPFILE:
                    raise
            else:
                return self._keep(fd, taken)
        return self._take_by_name()

    def _take_by_name(self) -> bool:
        temporary = self._temporary + token_hex(8)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o644)
        try:
            self._sign(fd)
            with suppress(FileExistsError):
                os.link(temporary, self.path)
            # On NFS the answer to a link that was made may be lost: the count tells.
            taken = os.fstat(fd).st_nlink == 2
        except BaseException:
            os.close(fd)
            raise
        finally:
            os.unlink(temporary)
        return self._keep(fd, taken)

    def _take_by_program(self, refused: PermissionError) -> bool:
        self._clock = time.time()
        # The program would replace a stale one at once, and not ask for the other lock first.
        if os.path.lexists(self.path) and dotlockfile.serves(self._spool):
            return False
        try:
            made = dotlockfile.make(self.path)
        except FileNotFoundError:
            reason = f"{refused.strerror}, and there is no {dotlockfile.PROGRAM}"
            raise PermissionError(refused.errno, reason) from None
        return made and self._adopt()

    def _adopt(self) -> bool:
        """Hold the lock that was made for us; `False` if it is another's by now."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags)
        except FileNotFoundError:
            return False
        try:
            ours = os.fstat(fd).st_uid == os.geteuid() and os.read(fd, 512) in _signatures()
        except BaseException:
            os.close(fd)
            raise
        return self._keep(fd, ours)

    def _sign(self, fd: int) -> None:
        try:
            whose = _signatures()[0]
            if os.write(fd, whose) < len(whose):
                os.ftruncate(fd, 0)  # half a PID is another's
        except OSError as error:
            # A lock without a PID holds for five minutes, and on a full disk mail must still
            # be deletable.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        self._clock = os.fstat(fd).st_mtime

    def _keep(self, fd: int, taken: bool) -> bool:
        if taken:
            self._fd = fd
            self._touched = time.monotonic()
            self._made.add(self.path)
        else:
            os.close(fd)
        return taken

    def break_stale(self) -> bool:
        """Remove the lock at the path if it is stale; whether it is worth to try again."""
        try:
            found = os.lstat(self.path)
            if not stat.S_ISREG(found.st_mode):
                return False
            content = self._content()
            # In a container each life of ours may have the same PID.
            of_a_former_life = content in _signatures() and self.path not in self._made
            if not of_a_former_life and not is_stale(content, found.st_mtime, self._clock):
                return False
            again = os.lstat(self.path)
            if (again.st_dev, again.st_ino, again.st_mtime_ns) != (
                found.st_dev,
                found.st_ino,
                found.st_mtime_ns,
            ):
                return False
            self._remove()
        except FileNotFoundError:
            return True
        except PermissionError:
            return False
        return True

    def _remove(self) -> None:
        try:
            os.unlink(self.path)
        except PermissionError as refused:
            try:
                dotlockfile.remove(self.path)
            except FileNotFoundError:
                raise refused from None

    def look(self, now: float) -> Held | None:
        """What lies at the path, `None` for nothing. Changes nothing. Raises `OSError`.

        `now` is in seconds since the epoch.
        """
        try:
            found = os.lstat(self.path)
            if not stat.S_ISREG(found.st_mode):
                return Held("", False, "is no plain file")
            content = self._content()
        except FileNotFoundError:
            return None
        holder = _HOLDER.match(content)
        words = "an unnamed process"
        if holder:
            host = os.fsdecode(holder[2] or holder[3] or b"")
            words = f"process {int(holder[1])}" + (f" of {host!a}" if host else "")
        return Held(words, is_stale(content, found.st_mtime, now), "")

    def _content(self) -> bytes:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags)
        except PermissionError:
            return b""
        try:
            return os.read(fd, 512)
        finally:
            os.close(fd)

    def ours(self) -> bool:
        """Whether the file at the path is the one that was made here."""
        if self._fd < 0:
            return False
        try:
            there, here = os.lstat(self.path), os.fstat(self._fd)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def refresh(self) -> None:
        """To be called often during long work: once a minute, set its times to now.

        So nobody takes it for stale. A lock that is not held is left alone.
        """
        now = time.monotonic()
        if self._fd >= 0 and now - self._touched >= TOUCH_EVERY:
            self._touched = now
            with suppress(OSError):
                os.utime(self._fd)

    def release(self) -> None:
        """Remove the lock if it is still ours. Idempotent, never raises."""
        if self._fd < 0:
            return
        if self.ours():
            try:
                self._remove()
            except OSError as error:
                log.error("{path} cannot be removed: {why}", path=self.path, why=error.strerror)
        self._made.discard(self.path)
        fd, self._fd = self._fd, -1
        with suppress(OSError):
            os.close(fd)


def _signatures() -> tuple[bytes, bytes]:
    """What our locks hold: those that we make ourselves, those that dotlockfile(1) makes."""
    alone = b"%d\n" % os.getpid()
    return alone + os.fsencode(os.uname().nodename) + b"\n", alone


def _link_descriptor(fd: int, folder: str, path: str) -> bool:
    """Give a nameless file its name, unless the name is taken (open(2), O_TMPFILE)."""
    # `os.link` follows the link in /proc only when it is given folder descriptors.
    at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(
            f"/proc/self/fd/{fd}",
            os.path.basename(path),
            src_dir_fd=at,
            dst_dir_fd=at,
            follow_symlinks=True,
        )
    except FileExistsError:
        return False
    finally:
        os.close(at)
    return True


def is_stale(content: bytes, made: float, now: float) -> bool:
    """Whether a dot-lock has lost its holder.

    `content` is what the lock says: a PID, then the host behind `:` or on the second line. `made`
    is its time of modification and `now` the file system's own clock, both in seconds. A PID
    without a host counts as of this host. A lock without a PID (procmail, Postfix) or of another
    host is never stale before `STALE_AFTER`.
    """
    holder = _HOLDER.match(content)
    if holder:
        host = holder[2] or holder[3]
        if host is None or os.fsdecode(host) == os.uname().nodename:
            if not _is_alive(int(holder[1])):
                return True
            # The PID may be another's by now. The age guards against a clock set after boot.
            return made < _boot_time() and now - made > STALE_AFTER
    return now - made > STALE_AFTER


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _boot_time() -> float:
    """When this machine was started, in seconds since the epoch; 0 where that is not known."""
    with suppress(OSError, ValueError), open("/proc/stat", "rb") as lines:
        for line in lines:
            if line.startswith(b"btime "):
                return float(line[6:])
    return 0.0


def sweep(folder: str) -> int:
    """Remove what a killed process of ours left of a dot-lock in the making; how many.

    Only regular files of our own uid, older than `STALE_AFTER`. Raises `OSError` where the folder
    cannot be read.
    """
    count = 0
    before = time.time() - STALE_AFTER
    with os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.name.startswith(".") and TEMPORARY in entry.name):
                continue
            with suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if (
                    stat.S_ISREG(found.st_mode)
                    and found.st_uid == os.geteuid()
                    and found.st_mtime < before
                ):
                    os.unlink(entry.path)
                    count += 1
    return count
