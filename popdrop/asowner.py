"""Work of root's in a folder that is somebody else's: with that somebody's rights to files.

Whoever may write to a folder chooses what root finds there: links to files of root's, a rollback
journal that has SQLite delete a file of his choice, a fifo. With his own rights nothing comes of
it that he could not do himself. The rights are those of one thread (setfsuid(2)), so other threads
keep theirs.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache


@contextmanager
def as_owner(folder: str) -> Iterator[None]:
    """Have the owner's rights to files meanwhile, where `folder` is not root's and we are root.

    Raises `OSError` where there is no such folder.
    """
    facts = os.stat(folder) if os.geteuid() == 0 else None
    if facts is None or facts.st_uid == 0:
        yield
        return
    with as_user(facts.st_uid, facts.st_gid):
        yield


@contextmanager
def as_user(uid: int, gid: int) -> Iterator[None]:
    """Have the rights to files of `uid` and `gid` meanwhile, in this thread only.

    The supplementary groups stay those of the process. Raises `PermissionError` where the system
    does not allow it; then nothing has been done with other rights than these.
    """
    libc = _libc()
    group, user = libc.setfsgid(gid), libc.setfsuid(uid)
    try:
        # They report no error; asked for an id that there is not, they tell what holds.
        if libc.setfsuid(-1) != _as_int(uid) or libc.setfsgid(-1) != _as_int(gid):
            raise PermissionError(1, f"cannot take the rights of uid {uid}, gid {gid}")
        yield
    finally:
        libc.setfsuid(user)
        libc.setfsgid(group)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _as_int(number: int) -> int:
    # What a C function that returns `int` makes of a uid_t.
    return ctypes.c_int(number).value


def give(path: str, uid: int, gid: int) -> None:
    """Give a file or folder of root's to a user; -1 for `gid` leaves the group.

    Nothing is done to a symbolic link, a file with a second name, or what is somebody else's:
    root has not made these. Raises `FileNotFoundError` and other `OSError`.
    """
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        ours = stat.S_ISDIR(facts.st_mode) or (stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1)
        if ours and facts.st_uid == 0:
            # The descriptor has no rights of its own, but a name of its own.
            os.chown(f"/proc/self/fd/{descriptor}", uid, gid)
    finally:
        os.close(descriptor)
