"""`passwd:FILE`: lines `name:hash...` as of passwd(5), shadow(5), htpasswd, and Dovecot."""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.logger import Logger
from zope.interface import implementer

from popdrop.accounts import foreign
from popdrop.credentials import FAILED, acceptable_name, prepared
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    TemporaryFailure,
)
from popdrop.interfaces import IBackend
from popdrop.values import Account, Network, Scope, Secret, network_of

log = Logger()

MOST_OCTETS: Final = 64 * 1024 * 1024
"""Of the file. It is held in memory."""
_YOUNG: Final = 2.0  # seconds: file systems with whole seconds show two changes in one as one
_SHADOW_FIELDS: Final = 9
_DAY: Final = 86400
_DAY_DIGITS: Final = 9
_SAMPLE: Final = 1000  # hashes among which the commonest scheme is looked for
_CANNOT: Final = "Accounts cannot be read now, try again later."


_NONE: Final = Secret(b"")


class _BadLine(Exception):
    """What is wrong with a line; it holds nothing of the line."""


class _BadFile(Exception):
    """What is wrong with the file, and the remedy."""


@dataclass(frozen=True, slots=True)
class _Line:
    account: Account
    hashed: Secret


@dataclass(slots=True)
class _Contents:
    """One reading of the file."""

    stamp: tuple[int, ...] = ()
    octets: int = 0
    lines: dict[bytes, _Line] = field(default_factory=dict)
    decoy: Secret = _NONE
    clear: bool = False


@implementer(IBackend)
class PasswdFile:
    """Verifies against a file that other programs keep, read anew whenever it has changed.

    `scheme` is how a field without `{SCHEME}` is to be read: `crypt` by its looks, `plain` as the
    password itself, or the name of one of libpass's handlers. Raises `ConfigError`.
    """

    def __init__(self, option: str, path: str, scheme: str = "crypt") -> None:
        self._path = path
        self._prefix = b"" if scheme == "crypt" else b"{" + scheme.upper().encode("utf-8") + b"}"
        self._contents = _Contents()
        self._said: tuple[int, ...] = ()
        if not path:
            raise ConfigError(f"{option}: name the file, as passwd:/etc/popdrop/passwd")
        if self._prefix and not foreign.known(scheme):
            raise ConfigError(f"{option}: scheme={scheme}: no such scheme; use crypt or plain")
        try:
            contents = self._read()
        except (OSError, _BadFile) as error:
            raise ConfigError(f"{option}: {_why(error)}") from None
        # What the greeting offers is fixed at the start, so this is, too.
        self.kinds = frozenset({"password", "apop"} if contents.clear else {"password"})

    def check(self, credentials: Any) -> Account:
        """As `IBackend.check`. Unknown users cost what those of the commonest scheme do."""
        try:
            contents = self._read()
        except (OSError, _BadFile) as error:
            raise TemporaryFailure(_CANNOT, f"{self._path}: {_why(error)}") from None
        try:
            line = contents.lines.get(prepared(credentials.username))
        except BadCredentials:
            line = None
        if IUsernamePassword.providedBy(credentials):
            return self._by_password(contents, line, credentials)
        if IUsernameHashedPassword.providedBy(credentials):
            return self._by_digest(line, credentials)
        raise NoVerifierOfThisKind(FAILED)

    def _by_password(self, contents: _Contents, line: _Line | None, credentials: Any) -> Account:
        name, password = credentials.username, credentials.password
        locked = line is None or foreign.is_locked(line.hashed.reveal())
        hashed = contents.decoy if line is None or locked else line.hashed
        try:
            good = foreign.verify(hashed.reveal(), password, name)
        except TemporaryFailure as error:
            if line is not None and not locked:
                raise TemporaryFailure(error.text, f"{self._path}: {error.detail}") from None
            good = False
        if line is None:
            raise NoSuchUser(FAILED)
        if line.hashed.reveal() == b"x":
            raise NoVerifierOfThisKind(FAILED)
        if locked or not good:
            raise BadCredentials(FAILED)
        return line.account

    def _by_digest(self, line: _Line | None, credentials: Any) -> Account:
        words = None if line is None else foreign.plain(line.hashed.reveal())
        # An empty secret would be one that everybody can guess.
        good = credentials.checkPassword(words or b"\0") and bool(words)
        if line is None:
            raise NoSuchUser(FAILED)
        if words is None:
            raise NoVerifierOfThisKind(FAILED)
        if not good:
            raise BadCredentials(FAILED)
        return line.account

    # Reading

    def _read(self) -> _Contents:
        """What the file holds now. Raises `OSError`, `_BadFile`."""
        contents = self._contents
        if contents.stamp and _stamp(os.stat(self._path)) == contents.stamp:
            return contents
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise _BadFile("not a regular file")
            if facts.st_mode & 0o002:
                raise _BadFile(f"anybody may write to it; chmod o-w {self._path}")
            octets = file.read(MOST_OCTETS + 1)
        if len(octets) > MOST_OCTETS:
            raise _BadFile(f"longer than {MOST_OCTETS} octets")
        young = time.time() - max(facts.st_mtime, facts.st_ctime) < _YOUNG
        same = bool(contents.lines) and contents.octets == hash(octets)
        fresh = contents if same else self._parsed(octets, _stamp(facts))
        if facts.st_mode & 0o004:
            if fresh.clear:
                raise _BadFile(
                    f"holds passwords in clear and anybody may read it; chmod 600 {self._path}"
                )
            if not self._contents.lines:
                log.warn(
                    "{path}: anybody may read the password hashes; chmod o-r {path}",
                    path=self._path,
                )
        fresh.stamp = () if young else _stamp(facts)
        self._contents = fresh
        return fresh

    def _parsed(self, octets: bytes, stamp: tuple[int, ...]) -> _Contents:
        contents = _Contents(octets=hash(octets))
        wrong: list[str] = []
        first: dict[bytes, int] = {}
        for number, text in enumerate(octets.split(b"\n"), 1):
            text = text.removesuffix(b"\r")
            if not text.strip() or text.startswith(b"#"):
                continue
            try:
                line = self._line(text)
                if line.account.name in first:
                    raise _BadLine(f"the name stands in line {first[line.account.name]} already")
            except _BadLine as error:
                wrong.append(f"line {number}: {error}")
                continue
            first[line.account.name] = number
            contents.lines[line.account.name] = line
        hashes = [line.hashed.reveal() for line in contents.lines.values()]
        contents.clear = any(foreign.plain(hashed) is not None for hashed in hashes)
        usable = [hashed for hashed in hashes if not foreign.is_locked(hashed)]
        commonest = Counter(map(foreign.cost_of, usable[:_SAMPLE])).most_common(1)
        if commonest:
            # A real one of somebody else's: what comes of it is thrown away.
            contents.decoy = Secret(
                next(each for each in usable if foreign.cost_of(each) == commonest[0][0])
            )
        self._complain(wrong, stamp)
        return contents

    def _complain(self, wrong: list[str], stamp: tuple[int, ...]) -> None:
        if wrong and stamp != self._said:
            self._said = stamp
            for words in wrong[:20]:
                log.warn("{path}: {words}; left out", path=self._path, words=words)
            if len(wrong) > 20:
                log.warn("{path}: {n} more such lines", path=self._path, n=len(wrong) - 20)

    def _line(self, text: bytes) -> _Line:
        parts = text.split(b":")
        if len(parts) < 2:
            raise _BadLine("no colon; it must be name:hash")
        try:
            name = prepared(parts[0])
        except BadCredentials:
            name = b""
        if not acceptable_name(name):
            raise _BadLine("not a name that can be used")
        hashed, rest = parts[1], parts[2:]
        if hashed[:1] != b"{" and not foreign.is_locked(hashed):
            hashed = self._prefix + hashed
        if len(parts) == _SHADOW_FIELDS and all(f.isdigit() or not f for f in rest):
            if len(rest[5]) > _DAY_DIGITS:
                raise _BadLine("the day on which it expires is out of range")
            expires = int(rest[5]) * _DAY if rest[5] else None
            return _Line(Account(name, scope=Scope(expires=expires)), Secret(hashed))
        return _Line(_account(name, rest), Secret(hashed))


def _account(name: bytes, rest: list[bytes]) -> Account:
    uid, gid, _, home, shell = (rest + [b""] * 5)[:5]
    for number in (uid, gid):
        if number and not (number.isdigit() and len(number) <= 10):
            raise _BadLine("uid and gid must be numbers")
    if home and not home.startswith(b"/"):
        raise _BadLine("the home must begin with /")
    networks: list[Network] = []
    disabled = False
    for word in b":".join(rest[5:]).decode("utf-8", "replace").split():
        key, _, value = word.partition("=")
        if key in ("allow_nets", "allow_real_nets"):
            networks += map(_network, value.split(","))
        disabled = disabled or key == "nologin"
    return Account(
        name,
        uid=int(uid) if uid else None,
        gid=int(gid) if gid else None,
        home=os.fsdecode(home) or None,
        shell=os.fsdecode(shell) or None,
        scope=Scope(networks=tuple(networks)),
        disabled=disabled,
    )


def _network(text: str) -> Network:
    try:
        return network_of(text)
    except ValueError:
        # Left out, it would let in more than the line says.
        raise _BadLine("allow_nets= holds something that is no network") from None


def _stamp(facts: os.stat_result) -> tuple[int, ...]:
    return (
        facts.st_dev,
        facts.st_ino,
        facts.st_size,
        facts.st_mtime_ns,
        facts.st_ctime_ns,
        facts.st_mode,
    )


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)
