"""Every command that uses the accounts database, with one that is missing, locked, open to others,
newer, damaged or another program's: one line that says what to do, exit status 1, nothing changed.
"""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator

import click
from click.testing import CliRunner, Result

from popdrop import sqlitefile
from popdrop.accounts.database import AccountsDatabase
from popdrop.cli.main import popdrop
from popdrop.values import Secret
from tests.cli_cases import GUARD, ChildCase, CommandCase

COMMANDS: dict[str, tuple[str, ...]] = {
    "user add": ("eve", "--stdin"),
    "user passwd": ("bob", "--stdin"),
    "user delete": ("bob", "--yes"),
    "user rename": ("bob", "robert"),
    "user list": (),
    "user show": ("bob",),
    "user disable": ("bob",),
    "user enable": ("bob",),
    "user change": ("bob", "--read-only"),
    "user rekey": (),
    "user app-password add": ("bob", "tablet"),
    "user app-password list": ("bob",),
    "user app-password delete": ("bob", "telephone"),
    "user export": (),
    "user import": ("--format", "list", "--replace", "{list}"),
    "popauth": ("-list",),
}
"""With arguments that are good for the database of `setUp`; `{list}` is a file to import."""

POPAUTH = (("-user", "bob"), ("-delete", "bob"), ("-list", "bob"), ("-init",), ())
"""The other things that popauth does."""

READING = {"user list", "user show", "user app-password list", "user export"}


def leaves(command: click.Command, path: str) -> Iterator[str]:
    """The paths of all commands that take `--db`."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from leaves(below, f"{path} {name}".strip())
    elif any("--db" in parameter.opts for parameter in command.params):
        yield path


class DatabaseTests(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        AccountsDatabase.create(self.db)
        accounts = AccountsDatabase(self.db)
        accounts.add(b"bob", Secret(b"hunter2"), Secret(b"tanstaaf"))
        accounts.add_app_password(b"bob", "telephone")
        accounts.close()
        self.list = os.path.join(self.folder, "list")
        with open(self.list, "w", encoding="ascii") as file:
            file.write("bob hunter3\n")

    def test_all_commands_are_here(self) -> None:
        self.assertEqual(set(leaves(popdrop, "")), set(COMMANDS))

    def test_they_are_good(self) -> None:
        """Else nothing below would be proved."""
        for path, words in COMMANDS.items():
            self.setUp()
            result = self.invoke(path, words)
            self.assertEqual((result.exit_code, result.exception), (0, None), path)

    def invoke(self, path: str, words: tuple[str, ...]) -> Result:
        words = tuple(word.replace("{list}", self.list) for word in words)
        arguments = [*path.split(), "--db", self.db, *words]
        return CliRunner().invoke(popdrop, arguments, input=b"a long secret\na long secret\n")

    def every(self, *but: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        for path, words in COMMANDS.items():
            if path not in but:
                yield path, words
        for words in POPAUTH:
            yield "popauth", words

    def check(self, path: str, words: tuple[str, ...], *told: str) -> None:
        result = self.invoke(path, words)
        self.assertEqual(result.exit_code, 1, (path, words, result.output))
        self.assertIsInstance(result.exception, SystemExit)
        self.assertEqual(result.stdout, "", path)
        *_, last = lines = result.stderr.splitlines()
        self.assertEqual(len(lines), 1, (path, words, lines))
        for text in told:
            self.assertIn(text, last, path)
        for secret in ("hunter2", "tanstaaf", "a long secret"):
            self.assertNotIn(secret, result.output)

    def check_all(self, *told: str) -> None:
        for path, words in self.every():
            self.check(path, words, *told)

    def test_missing(self) -> None:
        os.unlink(self.db)
        before = sorted(os.listdir(self.folder))
        for path, words in self.every("user add", "user import"):
            if words == ("-init",) or (path == "popauth" and os.geteuid() != 0):
                continue
            self.check(path, words, f"{self.db}: no such accounts database", "popdrop user add")
        self.assertEqual(sorted(os.listdir(self.folder)), before)

    def test_open_to_others(self) -> None:
        for name in (self.db, self.db + ".key"):
            os.chmod(name, 0o640)
            self.check_all(f"chmod 600 {name}")
            os.chmod(name, 0o600)
        os.chmod(self.folder, 0o770)
        self.check_all(f"chmod go-w {self.folder}")

    def test_newer(self) -> None:
        connection = sqlite3.connect(self.db)
        connection.execute("PRAGMA user_version = 1000")
        connection.close()
        self.check_all(self.db, "made by a newer Popdrop", "use the newer one")

    def test_another_program(self) -> None:
        os.unlink(self.db)
        connection = sqlite3.connect(self.db)
        connection.execute("CREATE TABLE mail (x)")
        connection.commit()
        connection.close()
        os.chmod(self.db, 0o600)
        self.check_all(f"{self.db}: no accounts database of Popdrop")

    def test_damaged(self) -> None:
        with open(self.db, "r+b") as file:
            file.write(b"\xff" * 4096)
        self.check_all(self.db)
        with open(self.db, "r+b") as file:
            self.assertEqual(file.read(4096), b"\xff" * 4096)

    def test_damaged_key(self) -> None:
        with open(self.db + ".key", "wb") as file:
            file.write(b"short")
        self.check_all(self.db + ".key", "restore it from the backup")

    def test_no_file(self) -> None:
        os.unlink(self.db)
        os.mkdir(self.db, 0o700)
        self.check_all(f"{self.db}: not a regular file")

    def test_unknown_source_of_the_key(self) -> None:
        self.patch(os, "environ", {**os.environ, "POPDROP_KEY": "vault:popdrop"})
        self.check_all("key=vault:popdrop: not known", "file:PATH")

    def test_locked(self) -> None:
        """By another program that writes, in the way in which even readers must wait."""
        self.patch(sqlitefile, "PATIENCE", 0.02)
        connection = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(connection.close)
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("BEGIN EXCLUSIVE")
        for path, words in COMMANDS.items():
            self.check(path, words, self.db, "database is locked", "try again")
        connection.execute("ROLLBACK")
        for path in READING:
            self.assertEqual(self.invoke(path, COMMANDS[path]).exit_code, 0)

    def test_locked_for_writers(self) -> None:
        """Where another program only writes, readers need not wait."""
        self.patch(sqlitefile, "PATIENCE", 0.02)
        connection = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(connection.close)
        connection.execute("BEGIN IMMEDIATE")
        for path, words in COMMANDS.items():
            if path in READING or path == "popauth":
                self.assertEqual(self.invoke(path, words).exit_code, 0, path)
            else:
                self.check(path, words, "database is locked", "try again")


class PipeTests(ChildCase):
    def setUp(self) -> None:
        super().setUp()
        AccountsDatabase.create(self.db)
        accounts = AccountsDatabase(self.db)
        # More than a pipe holds, so that the writer meets its end.
        for number in range(1200):
            accounts.add(b"%04d" % number + b"x" * 60, apop=Secret(b"tanstaaf"))
        accounts.close()

    def test_reader_that_has_gone(self) -> None:
        """`| head -1`: its line, no traceback, no complaint."""
        for command in ("user list", "user list --json", "popauth -list"):
            done = subprocess.run(
                ["bash", "-c", f"{sys.executable} -m popdrop {command} --db {self.db} | head -1"],
                cwd=self.folder,
                env=self.environ(),
                capture_output=True,
                timeout=GUARD,
                check=False,
            )
            self.assertEqual((done.returncode, done.stderr), (0, b""), command)
            self.assertEqual(len(done.stdout.splitlines()), 1)
