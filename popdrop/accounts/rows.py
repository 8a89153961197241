"""The rows of an accounts database: what they mean, and the statements that read and write them.

Over an open connection; `database.py` says who may call and when.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, Final

from popdrop.values import ANYTHING, Network, Scope, Secret

PASSWORD: Final = "password"  # noqa: S105 - the name of a kind of verifier
APOP: Final = "apop"

LABEL_CHARACTERS: Final = 40
"""The longest name of an app password."""

LOOKUP: Final = (
    "SELECT a.disabled, a.version, a.expires, a.networks, a.read_only,"
    " (SELECT count(*) FROM verifier WHERE name = a.name AND kind > 'scram-'),"
    " (SELECT value FROM verifier WHERE name = a.name AND kind = 'password'),"
    " (SELECT value FROM verifier WHERE name = a.name AND kind = 'apop')"
    " FROM accounts AS a WHERE a.name = ?"
)
NOBODY: Final = (0, 0, None, "", 0, 0, None, None)
"""What a look-up finds for a name without an account, so that the rest takes as long."""
_ENTRIES: Final = (
    "SELECT a.name, a.disabled, a.changed, a.expires, a.networks, a.read_only,"
    " (SELECT group_concat(kind) FROM verifier WHERE name = a.name),"
    " (SELECT count(*) FROM app_password WHERE name = a.name)"
    " FROM accounts AS a"
)
_APP_PASSWORDS: Final = (
    "SELECT label, digest, read_only, networks, expires, created, used FROM app_password"
    " WHERE name = ? ORDER BY label"
)
_SEPARATORS: Final = re.compile(rb"[- ]+")


@dataclass(frozen=True, slots=True)
class Entry:
    """One account as listed. Times are in seconds since the epoch, UTC.

    `kinds` are those of its verifiers; `app_passwords` is their number.
    """

    name: bytes
    kinds: frozenset[str]
    disabled: bool
    changed: int
    scope: Scope = ANYTHING
    app_passwords: int = 0

    @property
    def has_password(self) -> bool:
        """Whether it can log in by password."""
        return PASSWORD in self.kinds

    @property
    def has_apop(self) -> bool:
        """Whether it has an APOP secret."""
        return APOP in self.kinds


@dataclass(frozen=True, slots=True)
class AppPassword:
    """A password of one program of an account, by its `label`.

    Times are in seconds since the epoch, UTC; `used` is when it was last used, to the hour, `None`
    for never.
    """

    label: str
    digest: Secret
    scope: Scope = ANYTHING
    created: int = 0
    used: int | None = None


def app_digest(database_id: bytes, words: bytes) -> bytes:
    """What is kept of an app password.

    They are always made here, of 130 random bits: a plain hash of so much cannot be guessed, and
    costs a login nothing. Blanks and hyphens, which only help to read them, do not count, nor does
    the case of letters.
    """
    plain = _SEPARATORS.sub(b"", words).lower()
    return hashlib.sha256(b"popdrop app password\0" + database_id + b"\0" + plain).digest()


def networks_text(networks: tuple[Network, ...]) -> str:
    """As they are stored: in CIDR form, a blank between two."""
    return " ".join(map(str, networks))


def scope(read_only: object, networks: str, expires: int | None) -> Scope:
    """Of three columns. Raises `ValueError`."""
    if not read_only and not networks and expires is None:
        return ANYTHING
    return Scope(bool(read_only), networks_of(networks), expires)


def networks_of(text: str) -> tuple[Network, ...]:
    """What `networks_text` made. Raises `ValueError`: damaged, and so let nobody in."""
    return tuple(map(ip_network, text.split())) if text else ()


def exists(connection: sqlite3.Connection, name: bytes) -> bool:
    """Whether there is an account of that canonical name."""
    row = connection.execute("SELECT 1 FROM accounts WHERE name = ?", (name,)).fetchone()
    return row is not None


def entries(connection: sqlite3.Connection, name: bytes | None = None) -> list[Entry]:
    """All accounts by name, or the one of that name."""
    if name is None:
        rows = connection.execute(_ENTRIES + " ORDER BY a.name").fetchall()
    else:
        rows = connection.execute(_ENTRIES + " WHERE a.name = ?", (name,)).fetchall()
    return [
        Entry(
            name,
            frozenset((kinds or "").split(",")) - {""},
            bool(disabled),
            changed,
            scope(read_only, networks, expires),
            count,
        )
        for name, disabled, changed, expires, networks, read_only, kinds, count in rows
    ]


def put(connection: sqlite3.Connection, name: bytes, kind: str, value: bytes | None) -> None:
    """Set a verifier, or remove it."""
    connection.execute("DELETE FROM verifier WHERE name = ? AND kind = ?", (name, kind))
    if value is not None:
        connection.execute(
            "INSERT INTO verifier (name, kind, value) VALUES (?, ?, ?)", (name, kind, value)
        )


def verifier(connection: sqlite3.Connection, name: bytes, kind: str) -> bytes | None:
    """One verifier of an account."""
    statement = "SELECT value FROM verifier WHERE name = ? AND kind = ?"
    row = connection.execute(statement, (name, kind)).fetchone()
    return None if row is None else row[0]


def verifiers(connection: sqlite3.Connection, name: bytes | None = None) -> list[Any]:
    """Rows of name, kind and value: of one account, or of all."""
    if name is None:
        return connection.execute("SELECT name, kind, value FROM verifier").fetchall()
    statement = "SELECT name, kind, value FROM verifier WHERE name = ?"
    return connection.execute(statement, (name,)).fetchall()


def with_apop(connection: sqlite3.Connection, name: bytes | None = None) -> list[bytes]:
    """The names of the accounts with an APOP secret, or the one of them that has that name."""
    statement = "SELECT name FROM verifier WHERE kind = ? AND (? IS NULL OR name = ?) ORDER BY name"
    return [row[0] for row in connection.execute(statement, (APOP, name, name))]


def delete_if_bare(connection: sqlite3.Connection, name: bytes) -> None:
    """Remove an account that cannot log in, and keeps nobody out either."""
    connection.execute(
        "DELETE FROM accounts WHERE name = ?1 AND NOT disabled AND NOT read_only"
        " AND networks = '' AND expires IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM verifier WHERE name = ?1)"
        " AND NOT EXISTS (SELECT 1 FROM app_password WHERE name = ?1)",
        (name,),
    )


def app_passwords(connection: sqlite3.Connection, name: bytes) -> list[AppPassword]:
    """Those of an account, by label."""
    rows = connection.execute(_APP_PASSWORDS, (name,)).fetchall()
    return [
        AppPassword(label, Secret(digest), scope(only, networks, expires), created, used)
        for label, digest, only, networks, expires, created, used in rows
    ]


def put_app_password(connection: sqlite3.Connection, name: bytes, made: AppPassword) -> None:
    """Add one. Raises `sqlite3.IntegrityError` where the label is taken."""
    connection.execute(
        "INSERT INTO app_password (name, label, digest, read_only, networks, expires, created,"
        " used) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            name,
            made.label,
            made.digest.reveal(),
            made.scope.read_only,
            networks_text(made.scope.networks),
            made.scope.expires,
            made.created,
            made.used,
        ),
    )


def meta(connection: sqlite3.Connection, name: str) -> bytes | None:
    """A fact about the database itself."""
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]
