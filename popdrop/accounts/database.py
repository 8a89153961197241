"""`AccountsDatabase`: accounts in one SQLite file (`sqlitefile.py`).

The files are looked at before every use (decision 36). Every trouble while running is a
`TemporaryFailure`: a database that cannot be read lets nobody in.
"""

from __future__ import annotations

import os
import pwd
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final

from zope.interface import implementer

from popdrop.accounts.secrets import CannotOpen, Hasher, Vault, load_key, make_key
from popdrop.accounts.sqlitefile import Opened, SqliteFile, transaction
from popdrop.credentials import acceptable_name, prepared
from popdrop.errors import BadCredentials, ConfigError, TemporaryFailure
from popdrop.interfaces import IAccounts
from popdrop.values import Account, Secret

PASSWORD: Final = "password"  # noqa: S105 - the name of a kind of verifier
APOP: Final = "apop"

WORDS_OCTETS: Final = 248
"""The longest password: a command line is at most 255 octets (RFC 2449 section 4), with `PASS `
before it and CRLF behind it."""

_LOOKUP: Final = (
    "SELECT a.disabled, a.version, v.kind, v.value"
    " FROM account AS a LEFT JOIN verifier AS v ON v.name = a.name WHERE a.name = ?"
)
_ENTRIES: Final = (
    "SELECT a.name, a.disabled, a.changed, group_concat(v.kind)"
    " FROM account AS a LEFT JOIN verifier AS v ON v.name = a.name GROUP BY a.name ORDER BY a.name"
)

_NOT_OURS: Final = ("unable to open database file", "attempt to write a readonly database")
"""What SQLite says about files that we have no rights to."""
_NO_SPACE: Final = ("disk I/O error", "database or disk is full")
"""What it says on a full disk: the first already when it is opened."""


class Refused(Exception):
    """A change that was not made. The text says why, on one line, and quotes no client."""


class Keep(Enum):
    """What `change` does not touch."""

    KEEP = 0


KEEP: Final = Keep.KEEP


@dataclass(frozen=True, slots=True)
class Entry:
    """One account as listed. `changed` is in seconds since the epoch, UTC."""

    name: bytes
    has_password: bool
    has_apop: bool
    disabled: bool
    changed: int


class SystemFacts:
    """getpwnam(3), remembered for 60 s, absence too: name services can be slow.

    A name service that is down looks like an absent user to Python.
    """

    SECONDS: Final = 60.0
    NAMES: Final = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[bytes, tuple[float, pwd.struct_passwd | None]] = {}

    def of(self, name: bytes) -> pwd.struct_passwd | None:
        """The system account of that name. Blocking; from any thread."""
        now = self._clock()
        until, facts = self._known.get(name, (now, None))
        if now < until:
            return facts
        try:
            facts = pwd.getpwnam(os.fsdecode(name))
        except KeyError:
            facts = None
        if len(self._known) >= self.NAMES:
            self._known.clear()
        self._known[name] = (now + self.SECONDS, facts)
        return facts


@implementer(IAccounts)
class AccountsDatabase:
    """The accounts in the file `path`. All methods block and may be called from any thread.

    Making one raises `ConfigError` when the file is missing, damaged, of a newer Popdrop, or open
    to others. It leaves no connection open: rights may be dropped afterwards. `look_every` is in
    seconds: how long a look at the files' modes holds, for servers with many logins a second.
    """

    def __init__(
        self,
        path: str,
        hasher: Hasher | None = None,
        system: SystemFacts | None = None,
        look_every: float = 0.0,
    ) -> None:
        self._file = SqliteFile(path, look_every)
        self._hasher = hasher if hasher is not None else Hasher()
        self._system = system if system is not None else SystemFacts()
        self._vault: tuple[object, Vault | None] = (None, None)
        with self._administration() as opened:
            self._vault_of(opened)
        self.close()

    @classmethod
    def create(cls, path: str) -> bool:
        """Make an empty database and its key. `False` when there is one. Raises `ConfigError`."""
        file = SqliteFile(path)
        try:
            if not file.create():
                return False
            with file.use():
                _make_key(file)
            file.close()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{file.path}: {_reason(error)}") from None
        return True

    @property
    def path(self) -> str:
        """Where the file is, symbolic links resolved."""
        return self._file.path

    @property
    def can_apop(self) -> bool:
        """Whether there is a key, so that APOP secrets can be opened (decision 21)."""
        return self._vault[1] is not None

    def close(self) -> None:
        """Close what is open. A later call opens it again."""
        self._file.close()

    def lookup(self, name: bytes) -> Account | None:
        """The account of that canonical name, or `None`. Raises `TemporaryFailure`."""
        if not acceptable_name(name):
            return None
        try:
            with self._file.use() as opened:
                rows = opened.connection.execute(_LOOKUP, (name,)).fetchall()
            vault = self._vault_of(opened)
        except (ConfigError, OSError, sqlite3.Error) as error:
            raise TemporaryFailure(
                "Accounts cannot be read now, try again later.", f"{self.path}: {_reason(error)}"
            ) from None
        facts = self._system.of(name)  # for unknown names too: the same work
        if not rows:
            return None
        disabled, version = rows[0][:2]
        values = {kind: value for _, _, kind, value in rows}
        hashed = values.get(PASSWORD)
        apop = self._opened(vault, name, values[APOP]) if APOP in values else None
        return Account(
            name=name,
            password_hash=None if hashed is None else Secret(hashed),
            apop_secret=apop,
            disabled=bool(disabled),
            version=version,
            uid=None if facts is None else facts.pw_uid,
            gid=None if facts is None else facts.pw_gid,
            home=None if facts is None else facts.pw_dir,
            apop_sealed=APOP in values and apop is None,
        )

    def entries(self) -> list[Entry]:
        """All accounts, by name. Opens no secret. Raises `ConfigError`, as all below."""
        with self._administration() as opened:
            rows = opened.connection.execute(_ENTRIES).fetchall()
        found = []
        for name, disabled, changed, kinds in rows:
            has = (kinds or "").split(",")
            found.append(Entry(name, PASSWORD in has, APOP in has, bool(disabled), changed))
        return found

    def names(self) -> list[bytes]:
        """The canonical names of all accounts, in order."""
        return [entry.name for entry in self.entries()]

    def has(self, name: bytes) -> bool:
        """Whether there is an account of that canonical name."""
        with self._administration() as opened:
            return _exists(opened.connection, name)

    def add(self, name: bytes, password: Secret | None = None, apop: Secret | None = None) -> None:
        """A new account. Raises `Refused` for an existing or unacceptable name or bad words."""
        self._write(checked_name(name), True, password, apop, False)

    def change(
        self,
        name: bytes,
        *,
        password: Secret | Keep | None = KEEP,
        apop: Secret | Keep | None = KEEP,
        disabled: bool | Keep = KEEP,
    ) -> None:
        """Change several things of an account at once; `None` removes a verifier.

        Raises `Refused` for an unknown name or bad words.
        """
        self._write(name, False, password, apop, disabled)

    def set_password(self, name: bytes, password: Secret | None) -> None:
        """Set or remove the password, as `change`."""
        self.change(name, password=password)

    def set_apop(self, name: bytes, secret: Secret | None) -> None:
        """Set or remove the APOP secret, as `change`."""
        self.change(name, apop=secret)

    def disable(self, name: bytes) -> None:
        """No login from now on; the verifiers are kept. As `change`."""
        self.change(name, disabled=True)

    def enable(self, name: bytes) -> None:
        """Undo `disable`. As `change`."""
        self.change(name, disabled=False)

    def delete(self, name: bytes) -> None:
        """Remove the account and its verifiers. Raises `Refused` when there is none."""
        with self._administration() as opened, transaction(opened.connection):
            if not _exists(opened.connection, name):
                raise Refused(f"{shown(name)}: no such account")
            opened.connection.execute("DELETE FROM account WHERE name = ?", (name,))

    def _write(
        self,
        name: bytes,
        new: bool,
        password: Secret | Keep | None,
        apop: Secret | Keep | None,
        disabled: bool | Keep,
    ) -> None:
        hashed = (
            self._hasher.hash(checked_words(password)) if isinstance(password, Secret) else password
        )
        words = Secret(checked_words(apop)) if isinstance(apop, Secret) else apop
        with self._administration() as opened, transaction(opened.connection):
            connection = opened.connection
            if _exists(connection, name) is new:
                reason = "there is such an account already; `passwd` changes it"
                raise Refused(f"{shown(name)}: {reason if new else 'no such account'}")
            stamp = (secrets.randbits(62), int(time.time()), name)
            connection.execute(
                "INSERT INTO account (version, changed, name) VALUES (?, ?, ?)"
                if new
                else "UPDATE account SET version = ?, changed = ? WHERE name = ?",
                stamp,
            )
            if not isinstance(disabled, Keep):
                connection.execute(
                    "UPDATE account SET disabled = ? WHERE name = ?", (disabled, name)
                )
            if not isinstance(hashed, Keep):
                _put(connection, name, PASSWORD, None if hashed is None else hashed.reveal())
            if isinstance(words, Secret):
                # Looked at once more: until the transaction began another may have made the key.
                opened = opened._replace(seen=self._file.look())
                vault = self._vault_of(opened) or self._new_vault(opened)
                _put(connection, name, APOP, vault.seal(APOP, name, words))
            elif words is None:
                _put(connection, name, APOP, None)

    @contextmanager
    def _administration(self) -> Iterator[Opened]:
        try:
            with self._file.use() as opened:
                yield opened
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{self.path}: {_reason(error)}") from None

    def _vault_of(self, opened: Opened) -> Vault | None:
        """The vault under the key that was just looked at. Raises `ConfigError`, `OSError`."""
        stamp = (opened.database_id, opened.seen.key)
        known, vault = self._vault
        if known == stamp:
            return vault
        if opened.seen.key is not None:
            vault = Vault(load_key(self._file.key_path), opened.database_id)
        elif vault is not None:
            raise ConfigError(f"{self._file.key_path}: gone; restore it from the backup")
        self._vault = (stamp, vault)
        return vault

    def _new_vault(self, opened: Opened) -> Vault:
        sealed = "SELECT 1 FROM verifier WHERE kind = ?"
        if opened.connection.execute(sealed, (APOP,)).fetchone():
            raise Refused(
                f"{self._file.key_path} is missing, but secrets are sealed with it:"
                " restore it from the backup, or remove all APOP secrets first"
            )
        _make_key(self._file)
        return Vault(load_key(self._file.key_path), opened.database_id)

    def _opened(self, vault: Vault | None, name: bytes, sealed: bytes) -> Secret | None:
        try:
            return None if vault is None else vault.open(APOP, name, sealed)
        except CannotOpen:
            return None


def checked_name(name: bytes) -> bytes:
    """The canonical form of a name that an account may have. Raises `Refused`."""
    try:
        canonical = prepared(name)
    except BadCredentials:
        canonical = b""
    if not acceptable_name(canonical):
        raise Refused(
            "this name cannot be used: 1 to 64 octets of UTF-8, no `/`, no control characters,"
            " not beginning with `.` or `-`, not ending with `.`, `.lock`, `.pop`, `.popdrop`"
        )
    return canonical


def _make_key(file: SqliteFile) -> None:
    owner = os.lstat(file.path)
    try:
        if os.geteuid() == 0:
            make_key(file.key_path, owner.st_uid, owner.st_gid)
        else:
            make_key(file.key_path)
    except FileExistsError:
        pass  # kept from an earlier database, or made by another process just now


def checked_words(secret: Secret) -> bytes:
    """A new password or APOP secret as it is stored. Raises `Refused`."""
    if not secret.reveal():
        raise Refused("an empty password is no password")
    if len(secret.reveal()) > WORDS_OCTETS:
        raise Refused(f"longer than the {WORDS_OCTETS} octets that a client can send with PASS")
    try:
        return prepared(secret.reveal())
    except BadCredentials:
        pass
    raise Refused(
        "not UTF-8, or with characters that are not allowed in a password: control characters"
        " and those that SASLprep (RFC 4013) prohibits"
    )


def _exists(connection: sqlite3.Connection, name: bytes) -> bool:
    row = connection.execute("SELECT 1 FROM account WHERE name = ?", (name,)).fetchone()
    return row is not None


def _put(connection: sqlite3.Connection, name: bytes, kind: str, value: bytes | None) -> None:
    connection.execute("DELETE FROM verifier WHERE name = ? AND kind = ?", (name, kind))
    if value is not None:
        connection.execute(
            "INSERT INTO verifier (name, kind, value) VALUES (?, ?, ?)", (name, kind, value)
        )


def shown(name: bytes) -> str:
    """A name as text that a terminal or a log takes no harm from."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)


def _reason(error: Exception) -> str:
    """One line without the path, which the caller names."""
    text = error.strerror if isinstance(error, OSError) else None
    text = text or str(error)
    if isinstance(error, PermissionError) or text in _NOT_OURS:
        text += "; the file's owner or root can"
    if text in _NO_SPACE:
        text += "; look whether its disk is full"
    return text
