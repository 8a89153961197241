"""One SQLite file that only its owner can read: making it, looking at it, opening it.

Beside `NAME` lie SQLite's own `NAME-wal` and `NAME-shm`. The file is never opened here by anything
but SQLite while it is in use: closing a second descriptor would drop SQLite's locks (fcntl(2),
record locks).
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from popdrop.accounts.secrets import private_facts, sync_folder
from popdrop.asowner import as_owner
from popdrop.errors import ConfigError

PATIENCE: Final = 1.0
"""Seconds that SQLite waits for a lock. In WAL mode readers wait for nobody."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What one kind of file holds.

    `steps` are the statements that make it and bring it up to date; `PRAGMA user_version` counts
    the steps done. The first makes a table `meta`, where the file's id will stand. A step that an
    older server must not overlook renames the table it reads: its look-ups then fail, as they
    should. `title` names it in messages, `remedy` what makes a new one, where `{path}` is its path.
    `durable`: what is committed outlives a power cut.
    """

    application_id: int
    title: str
    remedy: str
    steps: tuple[tuple[str, ...], ...]
    durable: bool = True


META: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL) WITHOUT ROWID"
)
"""The statement that begins every first step."""


def resolved(path: str) -> str:
    """The path of a database without symbolic links.

    For root a link at its very end is left as it is, where somebody else may have put it there: no
    file will be found or made there.
    """
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    whole = os.path.join(folder, os.path.basename(path))
    if os.geteuid() == 0 and os.path.isdir(folder) and os.stat(folder).st_uid != 0:
        return whole
    return os.path.realpath(whole)


class Seen(NamedTuple):
    """What a look at the files found: which database and which key; `None`: there is no key."""

    database: tuple[int, int]
    key: Hashable | None


class Opened(NamedTuple):
    """A connection, the file it was opened on, and the id written in it."""

    connection: sqlite3.Connection
    seen: Seen
    database_id: bytes


class _AsOwner(sqlite3.Connection):
    """For root in somebody's folder: SQLite changes owners, and deletes what a journal names.

    So it has no more rights to files than the owner of the folder.
    """

    folder: str

    def execute(self, *args: Any) -> sqlite3.Cursor:
        """As in `Connection`."""
        with as_owner(self.folder):
            return super().execute(*args)

    def close(self) -> None:
        """As in `Connection`."""
        with as_owner(self.folder):
            super().close()


class SqliteFile:
    """The file and its connections. May be used from any thread; connections are kept for reuse.

    The files' modes are looked at when they are used, but not again within `look_every` seconds.
    `key_stamp` looks at the key, as `keys.KeySource.stamp`.
    """

    def __init__(
        self,
        path: str,
        schema: Schema,
        look_every: float = 0.0,
        key_stamp: Callable[[], Hashable | None] = lambda: None,
    ) -> None:
        self.path = resolved(path)
        self._schema = schema
        self._key_stamp = key_stamp
        self._look_every = look_every
        self._looked: tuple[float, Seen] | None = None
        self.folder = os.path.dirname(self.path)
        self._companions = (self.path + "-wal", self.path + "-shm")
        self._idle: deque[Opened] = deque()

    def create(self) -> bool:
        """Make the empty file, mode 0600, and its folder, mode 0700. `False`: there is one.

        What root makes in somebody's folder belongs to that somebody. Raises `ConfigError` when
        others may write to the folder, and `OSError`.
        """
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self._look_at_folder()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except FileExistsError:
            return False
        try:
            if os.geteuid() == 0:
                facts = os.stat(self.folder)
                os.fchown(descriptor, facts.st_uid, facts.st_gid)
        finally:
            os.close(descriptor)
        sync_folder(self.folder)
        return True

    def look(self) -> Seen:
        """Look at all files. Raises `ConfigError` where others have rights, and `OSError`.

        Five system calls; the files themselves are not opened.
        """
        self._look_at_folder()
        try:
            facts = private_facts(self.path)
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path}: no such {self._schema.title};"
                f" {self._schema.remedy.format(path=self.path)}"
            ) from None
        if facts.st_uid == 0 and os.geteuid() == 0:
            owner = os.stat(self.folder).st_uid
            if owner != 0:
                raise ConfigError(
                    f"{self.path}: belongs to root and its folder to uid {owner};"
                    f" chown {owner} {self.path}"
                )
        for companion in self._companions:
            try:
                private_facts(companion)
            except FileNotFoundError:
                continue
        return Seen((facts.st_dev, facts.st_ino), self._key_stamp())

    def forget_look(self) -> None:
        """Look again at the next use, however lately that was."""
        self._looked = None

    def _lately_seen(self) -> Seen:
        now = time.monotonic()
        if self._looked is not None and now - self._looked[0] < self._look_every:
            return self._looked[1]
        self._looked = None
        seen = self.look()
        self._looked = (now, seen)
        return seen

    @contextmanager
    def use(self) -> Iterator[Opened]:
        """A connection that nobody else has meanwhile, after a look at the files.

        Raises `ConfigError`, `OSError`, `sqlite3.Error`.
        """
        seen = self._lately_seen()
        opened = self._take(seen)
        try:
            yield opened
        except BaseException:
            opened.connection.close()
            raise
        self._idle.append(opened)

    def close(self) -> None:
        """Close the connections that are not in use."""
        while self._idle:
            self._idle.pop().connection.close()

    def _look_at_folder(self) -> None:
        if os.stat(self.folder).st_mode & 0o022:
            raise ConfigError(
                f"{self.folder}: group or others may write to the folder of the"
                f" {self._schema.title}; give it a folder of its own, or chmod go-w {self.folder}"
            )

    def _take(self, seen: Seen) -> Opened:
        while True:
            try:
                opened = self._idle.pop()
            except IndexError:
                return self._open(seen)
            if opened.seen == seen:
                return opened
            if opened.seen.database == seen.database:
                return opened._replace(seen=seen)
            # Another file has been put in its place, as when a backup is restored.
            opened.connection.close()

    def _open(self, seen: Seen) -> Opened:
        uri = f"file:{quote(os.fsencode(self.path))}?mode=rw"
        kind = _AsOwner if os.geteuid() == 0 else sqlite3.Connection
        with as_owner(self.folder):
            connection = sqlite3.connect(
                uri,
                uri=True,
                timeout=PATIENCE,
                isolation_level=None,
                check_same_thread=False,
                factory=kind,
            )
        if isinstance(connection, _AsOwner):
            connection.folder = self.folder
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA foreign_keys = ON")
            durable = self._schema.durable
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("PRAGMA secure_delete = ON")
            self._migrate(connection)
            with suppress(sqlite3.OperationalError):  # somebody else is at it just now
                connection.execute("PRAGMA journal_mode = WAL")
            row = connection.execute("SELECT value FROM meta WHERE name = 'id'").fetchone()
            if row is None:
                raise ConfigError(f"{self.path}: damaged, its id is gone; restore a backup")
            if self.look().database != seen.database:
                raise ConfigError(f"{self.path}: replaced while it was being opened; try again")
        except BaseException:
            connection.close()
            raise
        return Opened(connection, seen, row[0])

    def _migrate(self, connection: sqlite3.Connection) -> None:
        steps = self._schema.steps
        if self._steps_done(connection) == len(steps):
            return
        with transaction(connection):
            done = self._steps_done(connection)
            for statement in (line for step in steps[done:] for line in step):
                connection.execute(statement)
            if done == 0:
                connection.execute(
                    "INSERT INTO meta (name, value) VALUES ('id', ?)", (secrets.token_bytes(16),)
                )
            connection.execute(f"PRAGMA application_id = {self._schema.application_id}")
            connection.execute(f"PRAGMA user_version = {len(steps)}")

    def _steps_done(self, connection: sqlite3.Connection) -> int:
        # In this order, since another process may make the tables and their marks in between.
        tables = connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        mark = connection.execute("PRAGMA application_id").fetchone()[0]
        if tables and mark != self._schema.application_id:
            raise ConfigError(f"{self.path}: no {self._schema.title} of Popdrop")
        done: int = connection.execute("PRAGMA user_version").fetchone()[0]
        known = len(self._schema.steps)
        if done > known:
            raise ConfigError(
                f"{self.path}: made by a newer Popdrop (schema {done}, this one knows"
                f" {known}); use the newer one"
            )
        return done


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, and nobody else writes meanwhile."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
