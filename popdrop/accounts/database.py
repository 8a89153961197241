"""`AccountsDatabase`: accounts in one SQLite file (`popdrop.sqlitefile`).

The files are looked at before every use (decision 36). Every trouble while running is a
`TemporaryFailure`: a database that cannot be read lets nobody in.

Over 400 lines: what servers ask and what administrators change are two sides of the same rows, and
one vault.
"""

from __future__ import annotations

import hmac
import os
import pwd
import re
import secrets
import sqlite3
import time
from base64 import b32encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from zope.interface import implementer

from popdrop.accounts import rows, scram
from popdrop.accounts.keys import KeyFile, KeySource, key_source
from popdrop.accounts.rows import APOP, PASSWORD, AppPassword, Entry
from popdrop.accounts.schema import ACCOUNTS
from popdrop.accounts.secrets import CannotOpen, Hasher, Vault, make_key, sync_folder
from popdrop.credentials import acceptable_name, prepared
from popdrop.errors import BadCredentials, ConfigError, TemporaryFailure
from popdrop.interfaces import IAccounts, IScramAccounts
from popdrop.sqlitefile import Opened, SqliteFile, resolved, transaction
from popdrop.values import ANYTHING, Account, Network, Scope, ScramVerifier, Secret

WORDS_OCTETS: Final = 248
"""The longest password: a command line is at most 255 octets (RFC 2449 section 4), with `PASS `
before it and CRLF behind it."""

USED_SECONDS: Final = 3600
"""How exactly the last use of an app password is kept: a poller costs one write an hour."""

NEXT_KEY: Final = ".next"
"""Behind the name of a key file: the key that `rekey` is about to put there."""

_LABEL = re.compile(r"[^\s-][^\x00-\x1f\x7f]*").fullmatch
_NOT_OURS: Final = ("unable to open database file", "attempt to write a readonly database")
"""What SQLite says about files that we have no rights to."""
_LOCKED: Final = "database is locked"
_NO_SPACE: Final = ("disk I/O error", "database or disk is full")
"""What it says on a full disk: the first already when it is opened."""


class Refused(Exception):
    """A change that was not made. The text says why, on one line, and quotes no client."""


class Keep(Enum):
    """What `change` does not touch."""

    KEEP = 0


KEEP: Final = Keep.KEEP


@dataclass(frozen=True, slots=True)
class Incoming:
    """One account for `AccountsDatabase.merge`, under its canonical name.

    `password` and `apop` are in clear; `password_hash` is stored as it is and counts only where
    there is no `password`.
    """

    name: bytes
    password: Secret | None = None
    password_hash: Secret | None = None
    apop: Secret | None = None
    disabled: bool = False


class Merged(Enum):
    """What `AccountsDatabase.merge` did with an entry."""

    ADDED = "added"
    REPLACED = "replaced"
    KEPT = "kept"


def _no_progress() -> None:
    return None


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

    def completed(self, account: Account) -> Account:
        """`account` with the facts of the system account of its name. Blocking."""
        facts = self.of(account.name)
        if facts is None:
            return account
        return account._replace(
            uid=facts.pw_uid, gid=facts.pw_gid, home=facts.pw_dir, shell=facts.pw_shell
        )


@implementer(IAccounts, IScramAccounts)
class AccountsDatabase:
    """The accounts in the file `path`. All methods block and may be called from any thread.

    Making one raises `ConfigError` when the file is missing, damaged, of a newer Popdrop, or open
    to others. It leaves no connection open: rights may be dropped afterwards. `look_every` is in
    seconds: how long a look at the files' modes holds, for servers with many logins a second.
    `key` says where the key is, as `keys.key_source`.
    """

    def __init__(
        self,
        path: str,
        hasher: Hasher | None = None,
        system: SystemFacts | None = None,
        look_every: float = 0.0,
        key: str | None = None,
    ) -> None:
        self._key = key_source(key, resolved(path), os.environ)
        self._file = SqliteFile(path, ACCOUNTS, look_every, self._key.stamp)
        self._hasher = hasher if hasher is not None else Hasher()
        self._system = system if system is not None else SystemFacts()
        self._vault: tuple[object, Vault | None] = (None, None)
        with self._administration() as opened:
            self._vault_of(opened)
        self.close()

    @classmethod
    def create(cls, path: str, key: str | None = None) -> bool:
        """Make an empty database and its key. `False` when there is one. Raises `ConfigError`."""
        source = key_source(key, resolved(path), os.environ)
        file = SqliteFile(path, ACCOUNTS)
        try:
            if not file.create():
                return False
            with file.use():
                _make_key(file, source)
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

    # What a server asks

    def lookup(self, name: bytes) -> Account | None:
        """The account of that canonical name, or `None`. Raises `TemporaryFailure`."""
        if not acceptable_name(name):
            return None
        with self._serving() as opened:
            found = opened.connection.execute(rows.LOOKUP, (name,)).fetchone()
            # For unknown names too: the same work.
            facts = self._system.of(name)
            account = self._account(opened, name, found or rows.NOBODY, facts)
            return account if found else None

    def _account(
        self, opened: Opened, name: bytes, found: Any, facts: pwd.struct_passwd | None
    ) -> Account:
        disabled, version, expires, networks, read_only, scrams, hashed, sealed = found
        vault = self._vault_of(opened)
        apop = None
        if sealed is not None:
            apop = self._unsealed(opened, APOP, name, sealed)
        elif vault is not None:
            vault.open_decoy()
        return Account(
            name=name,
            password_hash=None if hashed is None else Secret(hashed),
            apop_secret=apop,
            disabled=bool(disabled),
            version=version,
            uid=None if facts is None else facts.pw_uid,
            gid=None if facts is None else facts.pw_gid,
            home=None if facts is None else facts.pw_dir,
            shell=None if facts is None else facts.pw_shell,
            apop_sealed=sealed is not None and apop is None,
            scope=rows.scope(read_only, networks, expires),
            lacks_scram=hashed is not None and vault is not None and scrams < len(scram.KINDS),
        )

    def scram(self, name: bytes, algorithm: str) -> ScramVerifier:
        """As `IScramAccounts.scram`. Raises `TemporaryFailure`."""
        kind = scram.KINDS[algorithm]
        with self._serving() as opened:
            sealed = None
            if acceptable_name(name):
                sealed = rows.verifier(opened.connection, name, kind)
            vault = self._vault_of(opened)
            if vault is None:
                raise TemporaryFailure("Account cannot be verified.", f"{self._key.what}: gone")
            # For unknown names too: the same work.
            made_up = scram.decoy(vault.decoy_key, algorithm, name)
            if sealed is None:
                vault.open_decoy()
                return made_up
            secret = self._unsealed(opened, kind, name, sealed)
        if secret is None:
            raise TemporaryFailure(
                "Account cannot be verified.", "a SCRAM verifier does not open: the wrong key?"
            )
        return scram.unpacked(algorithm, secret)

    def app_password(self, name: bytes, words: bytes) -> AppPassword | None:
        """The app password of an account that `words` are. Raises `TemporaryFailure`."""
        with self._serving() as opened:
            digest = rows.app_digest(opened.database_id, words)
            for each in rows.app_passwords(opened.connection, name):
                if hmac.compare_digest(each.digest.reveal(), digest):
                    return each
        return None

    def note_use(self, name: bytes, used: AppPassword, now: float) -> None:
        """Remember that an app password was used, once an hour. Raises `ConfigError`."""
        if used.used is not None and 0 <= now - used.used < USED_SECONDS:
            return
        with self._administration() as opened:
            opened.connection.execute(
                "UPDATE app_password SET used = ? WHERE name = ? AND label = ?",
                (int(now), name, used.label),
            )

    def improve(self, account: Account, password: Secret) -> bool:
        """Give `account` today's hash and SCRAM verifiers of the password it has just logged in by.

        `False` if it has changed meanwhile, or the words cannot be a password here.
        """
        try:
            words = checked_words(password)
        except Refused:
            return False
        made = self._made(words)
        with self._administration() as opened, transaction(opened.connection):
            row = opened.connection.execute(
                "SELECT 1 FROM accounts WHERE name = ? AND version = ?",
                (account.name, account.version),
            ).fetchone()
            if row is not None:
                self._put_password(opened, account.name, made)
        return row is not None

    # What administrators see

    def entries(self) -> list[Entry]:
        """All accounts, by name. Opens no secret. Raises `ConfigError`, as all below."""
        with self._administration() as opened:
            return rows.entries(opened.connection)

    def entry(self, name: bytes) -> Entry:
        """One account. Raises `Refused` when there is none."""
        with self._administration() as opened:
            found = rows.entries(opened.connection, name)
        if not found:
            raise Refused(f"{shown(name)}: no such account")
        return found[0]

    def names(self) -> list[bytes]:
        """The canonical names of all accounts, in order."""
        return [entry.name for entry in self.entries()]

    def has(self, name: bytes) -> bool:
        """Whether there is an account of that canonical name."""
        with self._administration() as opened:
            return rows.exists(opened.connection, name)

    def app_passwords(self, name: bytes) -> list[AppPassword]:
        """The app passwords of an account, by label."""
        with self._administration() as opened:
            return rows.app_passwords(opened.connection, name)

    # What they change

    def add(
        self,
        name: bytes,
        password: Secret | None = None,
        apop: Secret | None = None,
        scope: Scope = ANYTHING,
    ) -> None:
        """A new account. Raises `Refused` for an existing or unacceptable name or bad words."""
        facts: dict[str, object] = {
            "expires": scope.expires,
            "networks": rows.networks_text(scope.networks),
            "read_only": scope.read_only,
        }
        self._write(checked_name(name), True, password, apop, facts)

    def change(
        self,
        name: bytes,
        *,
        password: Secret | Keep | None = KEEP,
        apop: Secret | Keep | None = KEEP,
        disabled: bool | Keep = KEEP,
        expires: int | Keep | None = KEEP,
        networks: tuple[Network, ...] | Keep = KEEP,
        read_only: bool | Keep = KEEP,
    ) -> None:
        """Change several things of an account at once; `None` removes a verifier or the expiry.

        `expires` is in seconds since the epoch. Raises `Refused` for an unknown name or bad words.
        """
        facts: dict[str, object] = {
            "disabled": disabled,
            "expires": expires,
            "networks": networks if isinstance(networks, Keep) else rows.networks_text(networks),
            "read_only": read_only,
        }
        given = {key: value for key, value in facts.items() if value is not KEEP}
        self._write(name, False, password, apop, given)

    def set_password(self, name: bytes, password: Secret | None) -> None:
        """Set or remove the password, as `change`."""
        self.change(name, password=password)

    def set_apop(self, name: bytes, secret: Secret | None) -> None:
        """Set or remove the APOP secret, as `change`."""
        self.change(name, apop=secret)

    def drop_apop(self, name: bytes | None = None) -> int:
        """Remove the APOP secret of an account, or all there are. How many there were.

        As in qpopper's database, where nothing is left nobody is left: an account goes, too, unless
        it has a password, an app password, or is disabled or narrowed.
        """
        with self._administration() as opened, transaction(opened.connection):
            gone = rows.with_apop(opened.connection, name)
            for each in gone:
                rows.put(opened.connection, each, APOP, None)
                self._stamp(opened, each)
                rows.delete_if_bare(opened.connection, each)
        return len(gone)

    def disable(self, name: bytes) -> None:
        """No login from now on; the verifiers are kept. As `change`."""
        self.change(name, disabled=True)

    def enable(self, name: bytes) -> None:
        """Undo `disable`. As `change`."""
        self.change(name, disabled=False)

    def delete(self, name: bytes) -> None:
        """Remove the account and all that belongs to it. Raises `Refused` when there is none."""
        with self._administration() as opened, transaction(opened.connection):
            self._demand(opened, name)
            opened.connection.execute("DELETE FROM accounts WHERE name = ?", (name,))

    def rename(self, name: bytes, new: bytes) -> None:
        """Give an account another name; secrets are sealed for it anew. Its mail is not touched.

        Raises `Refused` when the one is not there, the other is, or a secret does not open.
        """
        new = checked_name(new)
        with self._administration() as opened, transaction(opened.connection):
            connection = opened.connection
            self._demand(opened, name)
            if rows.exists(connection, new):
                raise Refused(f"{shown(new)}: there is such an account already")
            connection.execute(
                "INSERT INTO accounts (name, disabled, version, changed, expires, networks,"
                " read_only) SELECT ?, disabled, ?, ?, expires, networks, read_only"
                " FROM accounts WHERE name = ?",
                (new, secrets.randbits(62), int(time.time()), name),
            )
            connection.execute("UPDATE app_password SET name = ? WHERE name = ?", (new, name))
            for _, kind, value in rows.verifiers(connection, name):
                if kind != PASSWORD:
                    value = self._resealed(self._vault_of(opened), kind, name, value, new)
                rows.put(connection, new, kind, value)
            connection.execute("DELETE FROM accounts WHERE name = ?", (name,))

    def add_app_password(
        self,
        name: bytes,
        label: str,
        scope: Scope = ANYTHING,
    ) -> Secret:
        """Make an app password: 26 letters and digits in groups, told this one time.

        Raises `Refused` for an unknown name, and a label that is taken or not fit to be one.
        """
        if len(label) > rows.LABEL_CHARACTERS or not _LABEL(label) or not label.isprintable():
            raise Refused(
                f"this label cannot be used: 1 to {rows.LABEL_CHARACTERS} printable characters,"
                " beginning with no blank or hyphen"
            )
        plain = b32encode(secrets.token_bytes(20))[:26].lower()
        words = b"-".join(plain[index : index + 5] for index in range(0, 25, 5)) + plain[25:]
        with self._administration() as opened, transaction(opened.connection):
            self._demand(opened, name)
            made = AppPassword(
                label,
                Secret(rows.app_digest(opened.database_id, words)),
                scope,
                int(time.time()),
            )
            try:
                rows.put_app_password(opened.connection, name, made)
            except sqlite3.IntegrityError:
                raise Refused(
                    f"{shown(name)} has an app password of that label already; delete it first"
                ) from None
        return Secret(words)

    def delete_app_password(self, name: bytes, label: str) -> None:
        """Take an app password back, at once. Raises `Refused` when there is none."""
        with self._administration() as opened, transaction(opened.connection):
            # A label that cannot be printed, as one that is not UTF-8, is nobody's.
            gone = opened.connection.execute(
                "DELETE FROM app_password WHERE name = ? AND label = ?",
                (name, label if label.isprintable() else ""),
            )
            if not gone.rowcount:
                raise Refused(f"{shown(name)} has no app password of that label")
            self._stamp(opened, name)

    def rekey(self, key: str | None = None) -> int:
        """Seal all secrets anew, under a new key; `key` names another source. How many there were.

        All or nothing: until the transaction is done the old key holds, from then on the new one,
        also where the new file has not got its name yet. Raises `Refused` where there is no key or
        a secret does not open.
        """
        source = self._key if key is None else key_source(key, self.path, os.environ)
        with self._administration() as opened, transaction(opened.connection):
            old = self._vault_of(opened)
            if old is None:
                raise Refused(f"{self._key.what} is missing: there is nothing to change")
            draft = self._next_key(source)
            vault = Vault(draft.load(), opened.database_id)
            if vault.key_id == old.key_id:
                raise Refused(f"{draft.what}: the same key as before")
            count = 0
            for name, kind, value in rows.verifiers(opened.connection):
                if kind != PASSWORD:
                    value = self._resealed(old, kind, name, value, name, vault)
                    rows.put(opened.connection, name, kind, value)
                    count += 1
            opened.connection.execute(
                "INSERT OR REPLACE INTO meta (name, value) VALUES ('key', ?)", (vault.key_id,)
            )
        if source is self._key:
            with self._administration() as opened:
                self._settle_key(opened, vault.key_id)
        self._key = source
        self._vault = (None, None)
        return count

    def _next_key(self, source: KeySource) -> KeySource:
        """A source that has the key to be: a new file beside the old one, or what is there."""
        if source.path is None:
            return source
        path = source.path if source is not self._key else source.path + NEXT_KEY
        with suppress(FileExistsError):
            _make_key_file(path, self._file)
        return KeyFile(path)

    def _settle_key(self, opened: Opened, wanted: bytes) -> None:
        """Give the key `wanted`, which all is sealed under now, its name, if that is still to do.

        Nobody else may write meanwhile: the new file could be that of the next `rekey` by now.
        """
        connection, path = opened.connection, self._key.path
        if path is None:
            return
        alone = nullcontext() if connection.in_transaction else transaction(connection)
        # Not there: another has done it, as a server that has looked.
        with alone, suppress(FileNotFoundError):
            following = Vault(KeyFile(path + NEXT_KEY).load(), opened.database_id)
            if following.key_id == wanted == rows.meta(connection, "key"):
                os.rename(path + NEXT_KEY, path)
                sync_folder(os.path.dirname(path))

    # Parts

    def _write(
        self,
        name: bytes,
        new: bool,
        password: Secret | Keep | None,
        apop: Secret | Keep | None,
        facts: dict[str, object],
    ) -> None:
        made = self._made(checked_words(password)) if isinstance(password, Secret) else password
        words = Secret(checked_words(apop)) if isinstance(apop, Secret) else apop
        with self._administration() as opened, transaction(opened.connection):
            connection = opened.connection
            if rows.exists(connection, name) is new:
                reason = "there is such an account already; `passwd` changes it"
                raise Refused(f"{shown(name)}: {reason if new else 'no such account'}")
            if new:
                connection.execute(
                    "INSERT INTO accounts (version, changed, name) VALUES (0, 0, ?)", (name,)
                )
            self._stamp(opened, name)
            for column, value in facts.items():
                connection.execute(
                    f"UPDATE accounts SET {column} = ? WHERE name = ?",  # noqa: S608 - our own words
                    (value, name),
                )
            if not isinstance(made, Keep):
                self._put_password(opened, name, made)
            if isinstance(words, Secret):
                vault = self._vault_for_writing(opened)
                rows.put(connection, name, APOP, vault.seal(APOP, name, words))
            elif words is None:
                rows.put(connection, name, APOP, None)

    def _made(self, words: bytes) -> dict[str, Secret]:
        """The verifiers of a new password, still open. Takes some 30 ms."""
        made = {PASSWORD: self._hasher.hash(words)}
        for algorithm, kind in scram.KINDS.items():
            made[kind] = scram.packed(scram.derived(algorithm, words))
        return made

    def _put_password(self, opened: Opened, name: bytes, made: dict[str, Secret] | None) -> None:
        for kind in (PASSWORD, *scram.KINDS.values()):
            rows.put(opened.connection, name, kind, None)
        if made is None:
            return
        rows.put(opened.connection, name, PASSWORD, made[PASSWORD].reveal())
        vault = self._vault_of(opened)
        for kind, secret in made.items():
            # Without a key there is no SCRAM; logins by password go on (decision 21).
            if kind != PASSWORD and vault is not None:
                rows.put(opened.connection, name, kind, vault.seal(kind, name, secret))

    def _demand(self, opened: Opened, name: bytes) -> None:
        """`name` has an account, and it is being changed."""
        if not rows.exists(opened.connection, name):
            raise Refused(f"{shown(name)}: no such account")
        self._stamp(opened, name)

    def _stamp(self, opened: Opened, name: bytes) -> None:
        opened.connection.execute(
            "UPDATE accounts SET version = ?, changed = ? WHERE name = ?",
            (secrets.randbits(62), int(time.time()), name),
        )

    def _resealed(
        self,
        vault: Vault | None,
        kind: str,
        name: bytes,
        value: bytes,
        new_name: bytes,
        new_vault: Vault | None = None,
    ) -> bytes:
        try:
            if vault is None:
                raise CannotOpen("no key")
            return (new_vault or vault).seal(kind, new_name, vault.open(kind, name, value))
        except CannotOpen as error:
            raise Refused(
                f"{shown(name)}: a secret does not open ({error}); set it anew, or remove it with"
                f" `popdrop user passwd --remove`"
            ) from None

    @contextmanager
    def _administration(self) -> Iterator[Opened]:
        try:
            with self._file.use() as opened:
                yield opened
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{self.path}: {_reason(error)}") from None

    @contextmanager
    def _serving(self) -> Iterator[Opened]:
        try:
            with self._file.use() as opened:
                yield opened
        except (ConfigError, OSError, sqlite3.Error, ValueError) as error:
            raise TemporaryFailure(
                "Accounts cannot be read now, try again later.", f"{self.path}: {_reason(error)}"
            ) from None

    def _vault_of(self, opened: Opened) -> Vault | None:
        """The vault under the key that was just looked at. Raises `ConfigError`, `OSError`."""
        stamp = (opened.database_id, opened.seen.key)
        known, vault = self._vault
        if known == stamp and not self._is_overtaken(opened, vault):
            return vault
        if opened.seen.key is not None:
            vault = self._finished_vault(opened, Vault(self._key.load(), opened.database_id))
        elif vault is not None:
            raise ConfigError(f"{self._key.what}: gone; restore it from the backup")
        self._vault = (stamp, vault)
        return vault

    def _is_overtaken(self, opened: Opened, vault: Vault | None) -> bool:
        """Whether a `rekey` was done since the last look, so that nothing may be sealed by `vault`.

        Asked by those who write: they alone see the end of it. Who reads sees what does not open.
        """
        if vault is None or not opened.connection.in_transaction:
            return False
        return rows.meta(opened.connection, "key") not in (None, vault.key_id)

    def _finished_vault(self, opened: Opened, vault: Vault) -> Vault:
        """`vault`, or the one of a `rekey` that was killed before the new key had its name."""
        wanted = rows.meta(opened.connection, "key")
        if wanted in (None, vault.key_id) or self._key.path is None:
            return vault
        try:
            following = Vault(KeyFile(self._key.path + NEXT_KEY).load(), opened.database_id)
        except FileNotFoundError:
            return vault
        if following.key_id != wanted:
            return vault
        # Who may only read leaves it to one who may write.
        with suppress(OSError, ConfigError, sqlite3.Error):
            self._settle_key(opened, following.key_id)
        return following

    def _vault_for_writing(self, opened: Opened) -> Vault:
        # Looked at once more: until the transaction began another may have made the key.
        opened = opened._replace(seen=self._file.look())
        vault = self._vault_of(opened)
        if vault is not None:
            return vault
        if any(kind == APOP for _, kind, _ in rows.verifiers(opened.connection)):
            raise Refused(
                f"{self._key.what} is missing, but secrets are sealed with it:"
                " restore it from the backup, or remove all APOP secrets first"
            )
        # What SCRAM needs is made anew at the next login by password.
        opened.connection.execute("DELETE FROM verifier WHERE kind != ?", (PASSWORD,))
        _make_key(self._file, self._key)
        return Vault(self._key.load(), opened.database_id)

    def _unsealed(self, opened: Opened, kind: str, name: bytes, sealed: bytes) -> Secret | None:
        vault = self._vault_of(opened)
        if vault is None:
            return None
        try:
            return vault.open(kind, name, sealed)
        except CannotOpen:
            pass
        # A new key may have come since the last look.
        self._vault = (None, vault)
        vault = self._vault_of(opened._replace(seen=self._file.look()))
        try:
            return None if vault is None else vault.open(kind, name, sealed)
        except CannotOpen:
            return None

    # What an import brings

    def merge(
        self,
        entries: Sequence[Incoming],
        replace: bool = False,
        progress: Callable[[], None] = _no_progress,
    ) -> list[Merged]:
        """Add many accounts in one transaction: all or none. What became of each, in order.

        Accounts that are there already are kept as they are, or with `replace` get the verifiers
        that the entry has. `progress` is called for each entry before anything is written: a
        password takes some 40 ms. Raises `Refused` for a name twice, and as `add`.
        """
        for entry in entries:
            if checked_name(entry.name) != entry.name:
                raise Refused(f"{shown(entry.name)}: not in its canonical form")
        if len({entry.name for entry in entries}) != len(entries):
            raise Refused("the same name twice")
        known = frozenset(self.names())
        wanted = [entry for entry in entries if replace or entry.name not in known]
        made = self._made_of(wanted, progress)
        outcomes = []
        with self._administration() as opened, transaction(opened.connection):
            for entry in entries:
                exists = rows.exists(opened.connection, entry.name)
                if exists is not (entry.name in known):
                    raise Refused(f"{shown(entry.name)}: changed meanwhile; import again")
                if exists and not replace:
                    outcomes.append(Merged.KEPT)
                    continue
                self._merge_one(opened, entry, exists, made[entry.name])
                outcomes.append(Merged.REPLACED if exists else Merged.ADDED)
        return outcomes

    def _made_of(
        self, entries: Sequence[Incoming], progress: Callable[[], None]
    ) -> dict[bytes, dict[str, Secret]]:
        """The verifiers by name. All processors work on them: hashing lets go of Python's lock."""

        def made(entry: Incoming) -> dict[str, Secret]:
            if entry.password is not None:
                return self._made(checked_words(entry.password))
            return {} if entry.password_hash is None else {PASSWORD: entry.password_hash}

        found = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for entry, verifiers in zip(entries, pool.map(made, entries), strict=True):
                    found[entry.name] = verifiers
                    progress()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _merge_one(
        self, opened: Opened, entry: Incoming, exists: bool, made: dict[str, Secret]
    ) -> None:
        connection = opened.connection
        if not exists:
            connection.execute(
                "INSERT INTO accounts (version, changed, name) VALUES (0, 0, ?)", (entry.name,)
            )
        self._stamp(opened, entry.name)
        if entry.disabled:
            connection.execute("UPDATE accounts SET disabled = 1 WHERE name = ?", (entry.name,))
        if made:
            self._put_password(opened, entry.name, made)
        if entry.apop is not None:
            words = Secret(checked_words(entry.apop))
            vault = self._vault_for_writing(opened)
            rows.put(connection, entry.name, APOP, vault.seal(APOP, entry.name, words))


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


def _make_key(file: SqliteFile, source: KeySource) -> None:
    """Make the key where it is ours to make."""
    if source.path is not None:
        with suppress(FileExistsError):
            # Kept from an earlier database, or made by another process just now.
            _make_key_file(source.path, file)


def _make_key_file(path: str, file: SqliteFile) -> None:
    owner = os.lstat(file.path)
    if os.geteuid() == 0:
        make_key(path, owner.st_uid, owner.st_gid)
    else:
        make_key(path)


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
    if text == _LOCKED:
        text += "; another program is changing it: try again"
    if text in _NO_SPACE:
        text += "; look whether its disk is full"
    return text
