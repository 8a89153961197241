"""The accounts database: real files, real SQLite."""

import contextlib
import os
import pwd
import shutil
import sqlite3
import struct
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from twisted.python.monkey import MonkeyPatcher
from twisted.trial.unittest import SkipTest, SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop import sqlitefile
from popdrop.accounts import database as module
from popdrop.accounts import rows
from popdrop.accounts.database import AccountsDatabase, Refused, SystemFacts
from popdrop.accounts.schema import ACCOUNTS
from popdrop.accounts.secrets import Hasher, load_key
from popdrop.asowner import give
from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.interfaces import IAccounts
from popdrop.sqlitefile import SqliteFile
from popdrop.values import Account, Secret


class QuickHasher(Hasher):
    """A stand-in without the cost."""

    def hash(self, password: bytes) -> Secret:
        return Secret(b"hash of " + password[::-1])


class DatabaseCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder, 0o700)
        self.path = os.path.join(self.folder, "accounts.db")
        self.key_path = self.path + ".key"

    def reachable(self) -> None:
        """A folder that other users can come to, as trial's may not be."""
        above = tempfile.mkdtemp(prefix="popdrop-test-")
        self.addCleanup(shutil.rmtree, above)
        os.chmod(above, 0o755)
        self.folder = os.path.join(above, "state")
        os.mkdir(self.folder, 0o700)
        self.path = os.path.join(self.folder, "accounts.db")
        self.key_path = self.path + ".key"

    def make(self) -> AccountsDatabase:
        AccountsDatabase.create(self.path)
        return self.open()

    def open(self) -> AccountsDatabase:
        accounts = AccountsDatabase(self.path, QuickHasher())
        self.addCleanup(accounts.close)
        return accounts

    def found(self, accounts: AccountsDatabase, name: bytes) -> Account:
        account = accounts.lookup(name)
        assert account is not None
        return account

    def sql(self, *statement: object) -> list[tuple[object, ...]]:
        connection = sqlite3.connect(self.path, isolation_level=None)
        try:
            return connection.execute(*statement).fetchall()  # type: ignore[arg-type]
        finally:
            connection.close()


class LifeTests(DatabaseCase):
    def test_interface(self) -> None:
        verifyObject(IAccounts, self.make())

    def test_add_and_look_up(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"hunter2"))
        accounts.add(b"mrose", apop=Secret(b"tanstaaf"))
        accounts.add(b"both", Secret(b"one"), Secret(b"two"))
        accounts.add(b"none")
        bob = self.found(accounts, b"bob")
        assert bob.password_hash is not None
        self.assertEqual(bob.password_hash.reveal(), b"hash of 2retnuh")
        self.assertIsNone(bob.apop_secret)
        self.assertFalse(bob.has_apop)
        self.assertEqual((bob.name, bob.disabled), (b"bob", False))
        mrose = self.found(accounts, b"mrose")
        assert mrose.apop_secret is not None
        self.assertEqual(mrose.apop_secret.reveal(), b"tanstaaf")
        self.assertIsNone(mrose.password_hash)
        self.assertTrue(mrose.has_apop)
        both = self.found(accounts, b"both")
        self.assertTrue(both.password_hash and both.apop_secret)
        none = self.found(accounts, b"none")
        self.assertFalse(none.password_hash or none.apop_secret or none.apop_sealed)
        self.assertEqual(accounts.names(), [b"bob", b"both", b"mrose", b"none"])

    def test_unknown(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        for name in (b"eve", b"Bob", b"bo", b"bob ", b"bob\0", b"%", b"b_b", b"", b"..", b"\xff"):
            self.assertIsNone(accounts.lookup(name), name)

    def test_survives_being_reopened(self) -> None:
        self.make().add(b"bob", Secret(b"x"), Secret(b"tanstaaf"))
        bob = self.found(self.open(), b"bob")
        assert bob.apop_secret is not None
        self.assertEqual(bob.apop_secret.reveal(), b"tanstaaf")

    def test_seen_by_others_at_once(self) -> None:
        server, command = self.make(), self.open()
        self.assertIsNone(server.lookup(b"bob"))
        command.add(b"bob", Secret(b"one"))
        self.assertIsNotNone(server.lookup(b"bob"))
        command.disable(b"bob")
        self.assertTrue(self.found(server, b"bob").disabled)
        command.enable(b"bob")
        self.assertFalse(self.found(server, b"bob").disabled)
        command.delete(b"bob")
        self.assertIsNone(server.lookup(b"bob"))

    def test_version_changes_with_each_change(self) -> None:
        accounts = self.make()
        changes: list[Callable[[], None]] = [
            lambda: accounts.add(b"bob", Secret(b"x")),
            lambda: accounts.set_password(b"bob", Secret(b"x")),
            lambda: accounts.set_apop(b"bob", Secret(b"y")),
            lambda: accounts.set_apop(b"bob", Secret(b"y")),
            lambda: accounts.disable(b"bob"),
            lambda: accounts.enable(b"bob"),
            lambda: accounts.set_apop(b"bob", None),
            lambda: accounts.set_password(b"bob", None),
            lambda: (accounts.delete(b"bob"), accounts.add(b"bob", Secret(b"x")))[1],
        ]
        versions = set()
        for change in changes:
            change()
            versions.add(self.found(accounts, b"bob").version)
        self.assertEqual(len(versions), len(changes))

    def test_version_of_others_stays(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        before = accounts.lookup(b"bob")
        accounts.add(b"eve", Secret(b"x"))
        accounts.set_password(b"eve", Secret(b"y"))
        after = accounts.lookup(b"bob")
        assert before and after
        self.assertEqual(before.version, after.version)

    def test_removing(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"), Secret(b"y"))
        accounts.set_apop(b"bob", None)
        self.assertFalse(self.found(accounts, b"bob").has_apop)
        self.assertIsNotNone(self.found(accounts, b"bob").password_hash)
        accounts.set_password(b"bob", None)
        self.assertIsNone(self.found(accounts, b"bob").password_hash)

    def test_deleted_verifiers_do_not_come_back(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"), Secret(b"y"))
        accounts.delete(b"bob")
        accounts.add(b"bob")
        bob = self.found(accounts, b"bob")
        self.assertFalse(bob.password_hash or bob.has_apop)

    def test_entries(self) -> None:
        accounts = self.make()
        self.assertEqual(accounts.entries(), [])
        accounts.add(b"both", Secret(b"x"), Secret(b"y"))
        accounts.add(b"a", apop=Secret(b"y"))
        accounts.add(b"none")
        accounts.disable(b"none")
        rows = [(e.name, e.has_password, e.has_apop, e.disabled) for e in accounts.entries()]
        self.assertEqual(
            rows,
            [
                (b"a", False, True, False),
                (b"both", True, True, False),
                (b"none", False, False, True),
            ],
        )

    def test_names_are_prepared(self) -> None:
        accounts = self.make()
        accounts.add("jose\u0301".encode(), Secret("e\u0301".encode()))
        name = "jos\u00e9".encode()
        self.assertEqual(accounts.names(), [name])
        hashed = self.found(accounts, name).password_hash
        assert hashed is not None
        self.assertEqual(hashed.reveal(), b"hash of " + "\u00e9".encode()[::-1])

    def test_real_hash(self) -> None:
        AccountsDatabase.create(self.path)
        accounts = AccountsDatabase(self.path)
        self.addCleanup(accounts.close)
        accounts.add(b"bob", Secret(b"hunter2"))
        hashed = self.found(accounts, b"bob").password_hash
        self.assertTrue(Hasher().verify(hashed, b"hunter2"))


class RefusalTests(DatabaseCase):
    def test_existing(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        before = accounts.lookup(b"bob")
        failure = self.assertRaises(Refused, accounts.add, b"bob", Secret(b"y"), Secret(b"z"))
        self.assertIn("passwd", str(failure))
        after = accounts.lookup(b"bob")
        assert before and after
        self.assertEqual(before.version, after.version)

    def test_unknown(self) -> None:
        accounts = self.make()
        for change in (
            lambda: accounts.set_password(b"bob", Secret(b"x")),
            lambda: accounts.set_apop(b"bob", Secret(b"x")),
            lambda: accounts.disable(b"bob"),
            lambda: accounts.enable(b"bob"),
            lambda: accounts.delete(b"bob"),
        ):
            self.assertIn("no such account", str(self.assertRaises(Refused, change)))
        self.assertEqual(accounts.names(), [])

    def test_names(self) -> None:
        accounts = self.make()
        for name in (b"", b"..", b"a/b", b"bob.lock", b".bob", b"-x", b"a\nb", b"\xff", b"x" * 65):
            self.assertRaises(Refused, accounts.add, name, Secret(b"x"))
        self.assertEqual(accounts.names(), [])

    def test_words(self) -> None:
        accounts = self.make()
        for words in (b"", b"a\0b", b"a\x1bb", b"a\nb", b"\xff", b"x" * 249, "\u00ad".encode()):
            self.assertRaises(Refused, accounts.add, b"bob", Secret(words))
            failure = self.assertRaises(Refused, accounts.add, b"bob", apop=Secret(words))
            self.assertEqual(len(str(failure).splitlines()), 1)
        self.assertEqual(accounts.names(), [])
        accounts.add(b"bob", Secret(b"x" * 248))


class SystemFactsTests(DatabaseCase):
    def test_system_account(self) -> None:
        accounts = self.make()
        me = pwd.getpwuid(os.getuid())
        accounts.add(me.pw_name.encode(), Secret(b"x"))
        account = self.found(accounts, me.pw_name.encode())
        self.assertEqual(
            (account.uid, account.gid, account.home), (me.pw_uid, me.pw_gid, me.pw_dir)
        )

    def test_virtual_account(self) -> None:
        accounts = self.make()
        accounts.add(b"nobody-has-this-name", Secret(b"x"))
        account = self.found(accounts, b"nobody-has-this-name")
        self.assertEqual((account.uid, account.gid, account.home), (None, None, None))

    def test_remembered_for_a_minute(self) -> None:
        now = 0.0
        asked = []

        def getpwnam(name: str) -> pwd.struct_passwd:
            asked.append(name)
            if name == "bob":
                return pwd.getpwuid(0)
            raise KeyError(name)

        self.patch(module.pwd, "getpwnam", getpwnam)
        facts = SystemFacts(lambda: now)
        for _ in range(3):
            self.assertIsNotNone(facts.of(b"bob"))
            self.assertIsNone(facts.of(b"eve"))
        self.assertEqual(asked, ["bob", "eve"])
        now = 59.9
        facts.of(b"bob")
        self.assertEqual(len(asked), 2)
        now = 60.0
        facts.of(b"bob")
        self.assertEqual(asked, ["bob", "eve", "bob"])

    def test_asked_for_unknown_names_too(self) -> None:
        asked = []

        class Watching(SystemFacts):
            def of(self, name: bytes) -> pwd.struct_passwd | None:
                asked.append(name)
                return None

        AccountsDatabase.create(self.path)
        accounts = AccountsDatabase(self.path, QuickHasher(), Watching())
        self.addCleanup(accounts.close)
        accounts.add(b"bob", Secret(b"x"))
        accounts.lookup(b"bob")
        accounts.lookup(b"eve")
        self.assertEqual(asked, [b"bob", b"eve"])

    def test_bounded(self) -> None:
        self.patch(SystemFacts, "NAMES", 10)
        facts = SystemFacts()
        for number in range(100):
            facts.of(b"nobody-has-this-name-%d" % number)
            self.assertTrue(len(facts._known) <= 10)


class RightsTests(DatabaseCase):
    def test_made_private(self) -> None:
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        folder = os.path.join(self.folder, "state", "popdrop")
        path = os.path.join(folder, "accounts.db")
        self.assertTrue(AccountsDatabase.create(path))
        self.assertFalse(AccountsDatabase.create(path))
        self.assertEqual(os.stat(folder).st_mode & 0o7777, 0o700)
        os.chmod(os.path.dirname(folder), 0o700)
        accounts = AccountsDatabase(path, QuickHasher())
        self.addCleanup(accounts.close)
        accounts.add(b"bob", Secret(b"x"), Secret(b"y"))
        accounts.lookup(b"bob")
        names = sorted(os.listdir(folder))
        self.assertEqual(
            names, ["accounts.db", "accounts.db-shm", "accounts.db-wal", "accounts.db.key"]
        )
        for name in names:
            self.assertEqual(os.stat(os.path.join(folder, name)).st_mode & 0o7777, 0o600, name)

    def test_rights_of_others(self) -> None:
        """Refused at start and, when they change while running, at the look-up."""
        running = self.make()
        running.add(b"bob", Secret(b"x"), Secret(b"y"))
        running.lookup(b"bob")
        for suffix in ("", "-wal", "-shm", ".key"):
            for mode in (0o640, 0o620, 0o604, 0o602, 0o660):
                os.chmod(self.path + suffix, mode)
                failure = self.assertRaises(ConfigError, self.open)
                self.assertIn(f"chmod 600 {self.path}{suffix}", str(failure))
                self.assertEqual(len(str(failure).splitlines()), 1)
                trouble = self.assertRaises(TemporaryFailure, running.lookup, b"bob")
                self.assertNotIn(self.path, trouble.text)
                self.assertIn(self.path, trouble.detail)
                self.assertRaises(TemporaryFailure, running.lookup, b"nobody")
                self.assertRaises(ConfigError, running.set_password, b"bob", Secret(b"z"))
            os.chmod(self.path + suffix, 0o600)
            self.assertIsNotNone(running.lookup(b"bob"))

    def test_folder(self) -> None:
        running = self.make()
        for mode in (0o770, 0o702, 0o1777):
            os.chmod(self.folder, mode)
            self.assertRaises(ConfigError, self.open)
            self.assertRaises(TemporaryFailure, running.lookup, b"bob")
        os.chmod(self.folder, 0o755)
        self.assertIsNone(running.lookup(b"bob"))

    def test_folder_that_others_may_write_to_gets_no_database(self) -> None:
        os.chmod(self.folder, 0o770)
        failure = self.assertRaises(ConfigError, AccountsDatabase.create, self.path)
        self.assertIn(f"chmod go-w {self.folder}", str(failure))
        self.assertEqual(os.listdir(self.folder), [])

    def test_owner_of_the_folder_gets_what_root_makes(self) -> None:
        # Only root can give files away; anybody can give them to himself.
        owner = (12345, 12346) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        self.reachable()
        os.chown(self.folder, *owner)
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"), Secret(b"y"))
        accounts.lookup(b"bob")
        for name in os.listdir(self.folder):
            facts = os.stat(os.path.join(self.folder, name))
            self.assertEqual((facts.st_uid, facts.st_gid), owner, name)


class RootTests(DatabaseCase):
    """Root in a folder of the server's user, who may have been taken over."""

    USER = (12345, 12346)

    def setUp(self) -> None:
        if os.geteuid() != 0:
            raise SkipTest("needs root's rights, to have files of two users")
        self.reachable()
        os.chown(self.folder, *self.USER)
        self.victim = os.path.join(os.path.dirname(self.folder), "victim")
        with open(self.victim, "w") as file:
            file.write("of root\n")
        os.chmod(self.victim, 0o600)

    def unharmed(self) -> None:
        facts = os.stat(self.victim)
        self.assertEqual((facts.st_uid, facts.st_mode & 0o777, facts.st_size), (0, 0o600, 8))

    def journal(self) -> None:
        """A rollback journal that asks for the file it is a part of to be deleted.

        SQLite's format 1.0: a header of one sector, then the name of the "super-journal".
        """
        magic, sector = bytes.fromhex("d9d505f920a163d7"), 512
        pages = os.path.getsize(self.path) // 4096
        name = self.victim.encode()
        head = magic + struct.pack(">5I", 0, 1, pages, sector, 4096)
        end = struct.pack(">2I", len(name), sum(name)) + magic
        with open(self.path + "-journal", "wb") as file:
            file.write(head.ljust(sector, b"\0") + struct.pack(">I", 2**30 // 4096 + 1))
            file.write(name + end)
        os.chown(self.path + "-journal", *self.USER)

    def test_a_journal_deletes_nothing_of_roots(self) -> None:
        self.make().close()
        self.journal()
        with contextlib.suppress(ConfigError):
            self.open()
        self.assertTrue(os.path.exists(self.victim))
        self.unharmed()

    def test_a_second_name_of_a_file_changes_no_owner(self) -> None:
        """SQLite gives journals to the owner of the database."""
        self.make().close()
        for ending in ("-journal", "-wal"):
            os.link(self.victim, self.path + ending)
            with contextlib.suppress(ConfigError):
                self.open().add(b"bob", Secret(b"x"))
            self.unharmed()
            os.unlink(self.path + ending)

    def test_a_link_makes_no_file_elsewhere(self) -> None:
        elsewhere = os.path.join(os.path.dirname(self.folder), "nologin")
        os.symlink(elsewhere, self.path)
        self.assertRaises(ConfigError, self.make)
        self.assertFalse(os.path.exists(elsewhere))

    def test_rights_come_back(self) -> None:
        self.make().add(b"bob", Secret(b"x"))
        with open(self.victim, "rb") as file:
            self.assertEqual(file.read(), b"of root\n")

    def test_a_database_of_roots_is_named(self) -> None:
        self.make().close()
        os.chown(self.path, 0, 0)
        failure = self.assertRaises(ConfigError, self.open)
        self.assertIn("chown 12345", str(failure))

    def test_nothing_of_others_is_given_away(self) -> None:
        """`give`: what root has made, and no link or second name of anything else."""
        mine = os.path.join(self.folder, "mine")
        with open(mine, "w"):
            pass
        link, second = os.path.join(self.folder, "link"), os.path.join(self.folder, "second")
        os.symlink(self.victim, link)
        os.link(self.victim, second)
        for path in (mine, link, second):
            give(path, *self.USER)
        self.unharmed()
        self.assertEqual(os.lstat(link).st_uid, 0)
        self.assertEqual((os.stat(mine).st_uid, os.stat(mine).st_gid), self.USER)
        give(mine, 0, 0)
        self.assertEqual(os.stat(mine).st_uid, self.USER[0])


class TroubleTests(DatabaseCase):
    def test_missing_at_start(self) -> None:
        failure = self.assertRaises(ConfigError, self.open)
        self.assertIn(f"popdrop user add --db {self.path}", str(failure))
        self.assertFalse(os.path.exists(self.path))

    def test_missing_while_running(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        os.rename(self.path, self.path + ".gone")
        self.assertRaises(TemporaryFailure, accounts.lookup, b"bob")
        self.assertRaises(TemporaryFailure, accounts.lookup, b"eve")
        self.assertFalse(os.path.exists(self.path))
        os.rename(self.path + ".gone", self.path)
        self.assertIsNotNone(accounts.lookup(b"bob"))

    def test_damaged(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        accounts.close()
        with open(self.path, "rb") as file:
            whole = file.read()
        for octets in (b"x" * len(whole), whole[:100] + b"\xff" * 8000, whole[:5000]):
            with open(self.path, "wb") as file:
                file.write(octets)
            self.assertRaises(TemporaryFailure, accounts.lookup, b"bob")
            self.assertRaises(ConfigError, accounts.names)
            accounts.close()
        with open(self.path, "wb") as file:
            file.write(b"not a database\n" * 100)
        failure = self.assertRaises(ConfigError, self.open)
        self.assertIn(self.path, str(failure))
        self.assertEqual(len(str(failure).splitlines()), 1)

    def test_not_a_file(self) -> None:
        os.mkdir(self.path, 0o700)
        self.assertRaises(ConfigError, self.open)
        os.rmdir(self.path)
        os.mkfifo(self.path, 0o600)
        self.assertRaises(ConfigError, self.open)

    def test_link_is_resolved(self) -> None:
        self.make().add(b"bob", Secret(b"x"))
        link = os.path.join(os.path.abspath(self.mktemp()))
        os.symlink(self.path, link)
        accounts = AccountsDatabase(link)
        self.addCleanup(accounts.close)
        self.assertEqual(accounts.path, self.path)
        self.assertIsNotNone(accounts.lookup(b"bob"))

    def test_locked(self) -> None:
        self.patch(sqlitefile, "PATIENCE", 0.0)
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        accounts.close()
        other = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        self.assertRaises(TemporaryFailure, accounts.lookup, b"bob")
        self.assertRaises(ConfigError, accounts.set_password, b"bob", Secret(b"y"))
        other.close()
        self.assertIsNotNone(accounts.lookup(b"bob"))

    def test_writer_does_not_lock_readers_out(self) -> None:
        self.patch(sqlitefile, "PATIENCE", 0.0)
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        other = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE accounts SET disabled = 1")
        self.assertFalse(self.found(accounts, b"bob").disabled)
        other.execute("COMMIT")
        self.assertTrue(self.found(accounts, b"bob").disabled)

    def test_newer_schema(self) -> None:
        running = self.make()
        running.close()
        self.sql("PRAGMA user_version = 99")
        self.assertIn("newer", str(self.assertRaises(ConfigError, self.open)))
        self.assertRaises(TemporaryFailure, running.lookup, b"bob")
        self.assertEqual(self.sql("PRAGMA user_version"), [(99,)])

    def test_somebody_elses_database(self) -> None:
        self.sql("CREATE TABLE account (name BLOB)")
        os.chmod(self.path, 0o600)
        self.assertIn("no accounts database", str(self.assertRaises(ConfigError, self.open)))
        self.assertEqual(self.sql("SELECT name FROM sqlite_master"), [("account",)])

    def test_crash_right_after_the_file_was_made(self) -> None:
        os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        accounts = self.open()
        accounts.add(b"bob", Secret(b"x"), Secret(b"y"))
        self.assertTrue(self.found(accounts, b"bob").has_apop)

    def test_id_gone(self) -> None:
        self.make().close()
        self.sql("DELETE FROM meta")
        self.assertIn("damaged", str(self.assertRaises(ConfigError, self.open)))

    def test_replaced_while_running(self) -> None:
        """A restored backup is read at once, not the file that was open."""
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        accounts.close()
        shutil.copy2(self.path, self.path + ".backup")
        accounts.add(b"eve", Secret(b"x"))
        self.assertIsNotNone(accounts.lookup(b"eve"))
        accounts.close()
        accounts.lookup(b"eve")
        for suffix in ("-wal", "-shm"):
            os.unlink(self.path + suffix)
        os.rename(self.path + ".backup", self.path)
        self.assertIsNone(accounts.lookup(b"eve"))
        self.assertIsNotNone(accounts.lookup(b"bob"))

    def test_failed_change_changes_nothing(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        before = self.found(accounts, b"bob")

        def broken(*args: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        self.patch(rows, "put", broken)
        self.assertRaises(
            ConfigError, accounts.change, b"bob", password=Secret(b"y"), disabled=True
        )
        after = self.found(accounts, b"bob")
        self.assertEqual((before.version, before.disabled), (after.version, after.disabled))


class SealedTests(DatabaseCase):
    SECRET = b"a long shared secret of bob"

    def files(self) -> bytes:
        octets = b""
        for name in os.listdir(self.folder):
            if not name.endswith(".key"):
                with open(os.path.join(self.folder, name), "rb") as file:
                    octets += file.read()
        return octets

    def test_stolen_without_the_key(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"password of bob"), Secret(self.SECRET))
        accounts.lookup(b"bob")
        self.assertIn(b"bob", self.files())
        key = load_key(self.key_path).reveal()
        for words in (self.SECRET, b"password of bob", key):
            self.assertNotIn(words, self.files())
        accounts.close()
        os.unlink(self.key_path)
        thief = self.open()
        bob = self.found(thief, b"bob")
        self.assertIsNone(bob.apop_secret)
        self.assertFalse(thief.can_apop)

    def test_without_the_key_cleartext_stays_refused(self) -> None:
        """`has_apop` decides whether a password may be used: it must not turn false."""
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"), Secret(self.SECRET))
        accounts.add(b"eve", Secret(b"x"))
        accounts.close()
        os.unlink(self.key_path)
        accounts = self.open()
        bob = self.found(accounts, b"bob")
        self.assertTrue(bob.apop_sealed and bob.has_apop)
        self.assertFalse(self.found(accounts, b"eve").has_apop)

    def test_key_vanishes_while_running(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"), Secret(self.SECRET))
        accounts.lookup(b"bob")
        os.rename(self.key_path, self.key_path + ".away")
        for name in (b"bob", b"eve"):
            self.assertRaises(TemporaryFailure, accounts.lookup, name)
        os.rename(self.key_path + ".away", self.key_path)
        self.assertIsNotNone(self.found(accounts, b"bob").apop_secret)

    def test_wrong_key(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"), Secret(self.SECRET))
        accounts.lookup(b"bob")
        os.rename(self.key_path, self.key_path + ".away")
        with open(self.key_path, "xb", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            file.write(os.urandom(32))
        for each in (accounts, self.open()):
            bob = self.found(each, b"bob")
            self.assertIsNone(bob.apop_secret)
            self.assertTrue(bob.has_apop)
        os.replace(self.key_path + ".away", self.key_path)
        self.assertIsNotNone(self.found(accounts, b"bob").apop_secret)

    def test_swapped_rows_do_not_open(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", apop=Secret(self.SECRET))
        accounts.add(b"eve", apop=Secret(b"known to eve alone, long"))
        self.sql(
            "UPDATE verifier SET value = (SELECT value FROM verifier WHERE name = ?)"
            " WHERE name = ?",
            (b"eve", b"bob"),
        )
        bob = self.found(accounts, b"bob")
        self.assertIsNone(bob.apop_secret)
        self.assertTrue(bob.has_apop)
        self.assertIsNotNone(self.found(accounts, b"eve").apop_secret)

    def test_renamed_rows_do_not_open(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", apop=Secret(self.SECRET))
        self.sql("UPDATE accounts SET name = ?", (b"eve",))
        self.sql("UPDATE verifier SET name = ?", (b"eve",))
        self.assertIsNone(self.found(accounts, b"eve").apop_secret)

    def test_rows_of_another_database_do_not_open(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", apop=Secret(self.SECRET))
        (row,) = self.sql("SELECT value FROM verifier")
        accounts.close()
        os.unlink(self.path)
        accounts = self.make()  # the key stays
        accounts.add(b"bob", apop=Secret(b"another"))
        self.assertIsNotNone(self.found(accounts, b"bob").apop_secret)
        self.sql("UPDATE verifier SET value = ?", row)
        self.assertIsNone(self.found(accounts, b"bob").apop_secret)

    def test_lost_key_is_not_replaced_silently(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"), Secret(self.SECRET))
        accounts.add(b"eve", Secret(b"x"))
        accounts.close()
        os.unlink(self.key_path)
        accounts = self.open()
        failure = self.assertRaises(Refused, accounts.set_apop, b"eve", Secret(b"y"))
        self.assertIn(self.key_path, str(failure))
        self.assertFalse(os.path.exists(self.key_path))
        accounts.set_password(b"eve", Secret(b"y"))
        accounts.set_apop(b"bob", None)
        accounts.set_apop(b"eve", Secret(b"y"))
        self.assertEqual(os.stat(self.key_path).st_mode & 0o7777, 0o600)
        self.assertIsNotNone(self.found(accounts, b"eve").apop_secret)

    def test_key_that_is_no_key(self) -> None:
        self.make().close()
        with open(self.key_path, "wb") as file:
            file.write(b"short")
        self.assertRaises(ConfigError, self.open)

    def test_no_secret_is_printed(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"), Secret(self.SECRET))
        text = repr(accounts.lookup(b"bob")) + repr(accounts.entries())
        self.assertNotIn(self.SECRET.decode(), text)
        self.assertNotIn("hash of", text)


class ThreadTests(DatabaseCase):
    def test_lookups_while_passwords_change(self) -> None:
        """Each look-up sees one state of the account, whole."""
        accounts = self.make()
        accounts.add(b"bob", Secret(b"0"), Secret(b"0"))
        done = threading.Event()
        troubles: list[object] = []
        seen: list[set[bytes]] = []

        def read() -> None:
            mine = set()
            try:
                while True:
                    last = done.is_set()
                    bob = self.found(accounts, b"bob")
                    assert bob.password_hash and bob.apop_secret
                    words = bob.apop_secret.reveal()
                    if bob.password_hash.reveal() != b"hash of " + words[::-1]:
                        troubles.append((bob.password_hash.reveal(), words))
                    mine.add(words)
                    if last:
                        break
            except Exception as error:
                troubles.append(error)
            seen.append(mine)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        writer = self.open()
        for number in range(1, 60):
            words = Secret(b"%d" % number)
            writer.change(b"bob", password=words, apop=words)
        done.set()
        for thread in threads:
            thread.join()
        self.assertEqual(troubles, [])
        self.assertTrue(all(b"59" in mine for mine in seen))

    def test_another_makes_the_tables_at_any_moment(self) -> None:
        """Between any two statements of one that finds the file still empty."""
        real = sqlite3.connect
        for moment in range(12):
            with self.subTest(moment=moment):
                path = os.path.join(self.mktemp(), "accounts.db")
                SqliteFile(path, ACCOUNTS).create()
                statements: list[str] = []

                class Late(sqlitefile._AsOwner):
                    folder = os.path.dirname(path)

                    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                        statements.append(sql)  # noqa: B023
                        if len(statements) == moment + 1:  # noqa: B023
                            racing.restore()  # noqa: B023
                            with SqliteFile(path, ACCOUNTS).use():  # noqa: B023
                                pass
                        return super().execute(sql, *parameters)

                racing = MonkeyPatcher(
                    (sqlite3, "connect", lambda *a, **k: real(*a, **{**k, "factory": Late}))
                )
                racing.patch()
                self.addCleanup(racing.restore)
                with SqliteFile(path, ACCOUNTS).use() as opened:
                    found = opened.connection.execute("SELECT name FROM meta").fetchall()
                self.assertEqual(found, [("id",)])
                self.assertGreater(len(statements), moment)
                if statements[moment] == "BEGIN IMMEDIATE":
                    break  # from here on nobody else can
        self.assertGreater(moment, 6)

    def test_two_make_it_at_once(self) -> None:
        barrier = threading.Barrier(4)
        made: list[object] = []

        def make(number: int) -> None:
            barrier.wait()
            try:
                made.append(AccountsDatabase.create(self.path))
                accounts = AccountsDatabase(self.path, QuickHasher())
                accounts.add(b"user%d" % number, apop=Secret(b"x"))
                accounts.close()
            except Exception as error:
                made.append(error)

        threads = [threading.Thread(target=make, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(map(str, made)), ["False", "False", "False", "True"])
        accounts = self.open()
        self.assertEqual(accounts.names(), [b"user0", b"user1", b"user2", b"user3"])
        for name in accounts.names():
            self.assertIsNotNone(self.found(accounts, name).apop_secret)
