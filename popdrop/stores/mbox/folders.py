"""The folder for journals that `journal-dir=` names, and those that it has named before.

A journal holds mail that may be nowhere else. So a folder that was named once is looked through
even when the option names another one now: `journal.folders` in the state folder lists them.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Final

from popdrop.errors import ConfigError

LIST: Final = "journal.folders"
"""One path a line, in the state folder."""


def private_folder(path: str) -> bool:
    """Make sure that journals can lie there; whether the folder was made now (mode 0700).

    Raises `ConfigError` for one that others could write to or read. Started as root, it may be of
    another: of whom, is looked at when the rights of the start are given up.
    """
    option = f"journal-dir={path}"
    if not os.path.isabs(path) or "\n" in path:
        raise ConfigError(f"{option}: must be a full path, as /var/lib/popdrop-journals")
    made = False
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
            made = True
        found = os.lstat(path)
    except OSError as error:
        raise ConfigError(
            f"{option}: {error.strerror}; make it with: install -d -m 0700 {path}"
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{option}: is no folder; name one of Popdrop's own")
    if os.geteuid() not in (0, found.st_uid):
        raise ConfigError(
            f"{option}: belongs to uid {found.st_uid}; use: chown {os.geteuid()} {path}"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{option}: mode {stat.S_IMODE(found.st_mode):04o} lets others in;"
            f" use: chmod 0700 {path}"
        )
    return made


def former(state_dir: str) -> tuple[str, ...]:
    """The folders in the list, none where there is no list. Raises `ConfigError`."""
    path = os.path.join(state_dir, LIST)
    try:
        with open(path, "rb") as lines:
            return tuple(os.fsdecode(line) for line in lines.read().split(b"\n") if line)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; it must be a file that this user may read"
        ) from None


def remember(state_dir: str, folder: str) -> None:
    """Put it into the list, safe against a crash. Raises `OSError`."""
    known = former(state_dir)
    if folder in known:
        return
    path = os.path.join(state_dir, LIST)
    text = b"".join(os.fsencode(each) + b"\n" for each in (*known, folder))
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as new:
        new.write(text)
        new.flush()
        os.fsync(fd)
    os.rename(path + ".new", path)
    above = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(above)
    finally:
        os.close(above)
