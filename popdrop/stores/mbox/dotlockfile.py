"""dotlockfile(1) of liblockfile: dot-locks in a folder that only group mail may write to.

Debian installs it setgid mail. With that right it makes and removes `SPOOL.lock` for the owner of
the spool, in a folder that group mail may write to, and for nobody else: so it helps a server whose
own user has all spools (and later one that becomes each user), not one that reads others' spools.
"""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import suppress
from typing import Final

PROGRAM: Final = "/usr/bin/dotlockfile"
"""Not looked for in PATH: a program with more rights than ours is the system's own or none."""

LIMIT: Final = 10.0
"""Seconds for one call, which never waits for a lock; only a file server that hangs takes long."""

_SUCCESS: Final = 0
_NO_RIGHT: Final = 2
_NOT_WRITTEN: Final = 3
_BUSY: Final = 4
"""Exit statuses: liblockfile's L_SUCCESS, L_TMPLOCK, L_TMPWRITE, L_MAXTRYS."""

_ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
_GRACE: Final = 2.0


def serves(spool: str) -> bool:
    """Whether there is such a program, and the spool is one that it would lock for us."""
    try:
        return os.path.exists(PROGRAM) and os.lstat(spool).st_uid == os.getuid()
    except OSError:
        return False


def make(path: str) -> bool:
    """Make the dot-lock `path` with our PID inside; `False` if there is one that holds.

    One that is stale by liblockfile's rules is replaced. Raises `FileNotFoundError` where the
    program is not installed, `PermissionError` where it will not help, and another `OSError`.
    """
    status, said = _run("-l", "-p", "-r", "0", path)
    if status == _NOT_WRITTEN:
        raise OSError(errno.ENOSPC, _words(status, said))
    if status not in (_SUCCESS, _BUSY):
        raise PermissionError(errno.EACCES, _words(status, said))
    return status == _SUCCESS


def remove(path: str) -> None:
    """Remove the dot-lock `path`, whoever made it; none there is no error. Raises as `make`."""
    status, said = _run("-u", path)
    if status != _SUCCESS:
        raise PermissionError(errno.EACCES, _words(status, said))


def _words(status: int, said: str) -> str:
    if status == _NO_RIGHT:
        return f"{PROGRAM} locks only for a spool's owner, where group mail may write ({said})"
    return f"{PROGRAM} ended with status {status} ({said})"


def _run(*arguments: str) -> tuple[int, str]:
    """The exit status, and what was said on one line."""
    with subprocess.Popen(  # noqa: S603 - a fixed program, and no shell
        [PROGRAM, *arguments],
        # It wants to know where it is, which may be a folder that our user may not enter.
        cwd="/",
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A terminal's interrupt is for the server, which then still has to remove its locks.
        start_new_session=True,
    ) as child:
        try:
            _, errors = child.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            _end(child)
            raise OSError(
                errno.ETIMEDOUT, f"{PROGRAM} did not end within {LIMIT:g} seconds"
            ) from None
    return child.returncode, ascii(errors[:200].decode("utf-8", "replace").strip())[1:-1]


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()  # it then removes what it has half made
    with suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE)
    child.kill()
