"""How the privileged helper opens a spool: as its user, where its own configuration says.

Looked up late by the helper (`accounts.helperspools`), as its checkers are.
"""

from __future__ import annotations

import errno
import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from popdrop.asowner import as_user
from popdrop.errors import PermanentFailure, TemporaryFailure
from popdrop.stores.mbox.spool import NO_RIGHT, open_spool
from popdrop.stores.template import Template
from popdrop.values import Owner

OPENER: Final = f"{__name__}:opener"
_LASTING: Final = NO_RIGHT | {errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.ENAMETOOLONG}
_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_NOT: Final = "maildrop cannot be opened"


def opener(
    template: str, owner: str | None, min_uid: int
) -> Callable[[bytes, int | None, int | None], int | None]:
    """What opens the spool of a name, with the ids that a checker told or `None`.

    `template` is the path of `--store`, `owner` the system account of its keyword `owner`; uids
    below `min_uid` are refused, but where `owner` names one, and root's always. The result gives
    a descriptor, or `None` where there is no spool; it raises `PermanentFailure` and
    `TemporaryFailure`.
    """
    places = Template(template)
    fixed = os.path.dirname(template[: template.index("{")])

    def open_for(name: bytes, uid: int | None, gid: int | None) -> int | None:
        if owner is not None and owner.isdecimal():
            uid, gid = int(owner), None
        elif owner is not None:
            uid, gid = _ids(owner)
        elif uid is None:
            # A login of digits is a name like any other, and never a uid.
            uid, gid = _ids(os.fsdecode(name))
        if uid == 0 or (owner is None and uid < min_uid):
            raise PermanentFailure(_NOT, f"uid {uid} is one whose spools are not handed out")
        if gid is None:
            gid = _group(uid)
        user = name.decode("utf-8")
        path = places.path(Owner(user, user.rpartition("@")[2] if "@" in user else "", None, uid))
        try:
            with as_user(uid, gid), _opened(fixed, path) as folder:
                spool = open_spool(path, frozenset({uid}), folder)
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "?")
            kind = PermanentFailure if error.errno in _LASTING else TemporaryFailure
            raise kind(_NOT, f"{path}: {code} {error.strerror}, as uid {uid}") from None
        return None if spool is None else spool.fd

    return open_for


@contextmanager
def _opened(fixed: str, path: str) -> Iterator[int]:
    """A descriptor of the folder of `path`. Raises `OSError`.

    No link is followed below `fixed`, the folder that the template names: the server may write to
    it, and one that was taken over would lead us to any file of the user's.
    """
    folder = os.open(fixed, _FOLDER)
    try:
        for name in os.path.dirname(path)[len(fixed) :].split("/"):
            if name:
                above, folder = folder, os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                os.close(above)
        yield folder
    finally:
        os.close(folder)


def _ids(name: str) -> tuple[int, int]:
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise PermanentFailure(_NOT, "there is no system account of that name") from None
    except OSError as error:
        raise TemporaryFailure(_NOT, f"getpwnam: {error.strerror}") from None
    return found.pw_uid, found.pw_gid


def _group(uid: int) -> int:
    """The group of a user that may have no name: then the group that nobody is in."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except (KeyError, OSError):
        return NOGROUP


NOGROUP: Final = 65534
"""Linux's gid for what has none."""
