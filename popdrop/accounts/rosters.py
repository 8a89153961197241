"""Lists of names from files, and the shells of this machine; read again when they change.

qpopper's `auth-file` and `nonauth-file`: a name a line; blank lines and what follows a `#` do not
count.
"""

from __future__ import annotations

import os

from twisted.logger import Logger

from popdrop.credentials import prepared
from popdrop.errors import BadCredentials, ConfigError
from popdrop.policy import Folding, Rosters

log = Logger()

SHELLS = "/etc/shells"
"""shells(5)."""

UNFOLDED = Folding()

_Stamp = tuple[int, int, int]


class RosterFiles:
    """The lists as they were read last. Raises `ConfigError` where one cannot be read.

    `shells`: whether system accounts need a shell of `/etc/shells`. `folding` is what is done to
    the names of clients: a name in a list means what it means in USER, and itself, too, since a
    checker may report it.
    """

    def __init__(
        self, allow: str | None, deny: str | None, shells: bool, folding: Folding = UNFOLDED
    ) -> None:
        self._folding = folding
        self._allow = _File("--auth-file", allow) if allow is not None else None
        self._deny = _File("--nonauth-file", deny) if deny is not None else None
        self._shells = _File("--require-shell", SHELLS) if shells else None
        self._rosters = Rosters()
        for each in self._files():
            each.read()
        self._gather()

    def current(self) -> Rosters:
        """The lists, for `Realm`. Never blocks."""
        return self._rosters

    def refresh(self) -> None:
        """Read what has changed. Blocking. What cannot be read stays as it was, and is logged."""
        changed = False
        for each in self._files():
            try:
                changed = each.read() or changed
            except ConfigError as error:
                log.error("the old list stays: {why}", why=str(error))
        if changed:
            self._gather()

    def _files(self) -> list[_File]:
        return [each for each in (self._allow, self._deny, self._shells) if each is not None]

    def _gather(self) -> None:
        shells = self._shells
        self._rosters = Rosters(
            allowed=self._allow.names(self._folding) if self._allow is not None else None,
            denied=self._deny.names(self._folding) if self._deny is not None else frozenset(),
            shells=None if shells is None else frozenset(map(os.fsdecode, shells.lines)),
        )


class _File:
    def __init__(self, option: str, path: str) -> None:
        self._option = option
        self._path = os.path.abspath(path)
        self._stamp: _Stamp | None = None
        self.lines: list[bytes] = []

    def read(self) -> bool:
        """Whether it has changed."""
        try:
            with open(self._path, "rb") as file:
                facts = os.fstat(file.fileno())
                stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
                if stamp == self._stamp:
                    return False
                text = file.read()
        except OSError as error:
            raise ConfigError(f"{self._option} {self._path}: {error.strerror}") from None
        bare = (line.partition(b"#")[0].strip() for line in text.split(b"\n"))
        self.lines = [line for line in bare if line]
        self._stamp = stamp
        return True

    def names(self, folding: Folding) -> frozenset[bytes]:
        found = set()
        for line in self.lines:
            try:
                name = prepared(line)
                found |= {name, folding(name)}
            except BadCredentials:
                log.warn("{path}: a line is no name, so left out", path=self._path)
        return frozenset(found)
