"""`popdrop user`, in this process and as a child on a terminal of its own."""

import json
import os
import re
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

import popdrop as package
from popdrop.accounts.database import AccountsDatabase
from popdrop.places import default_database, default_state_dir
from popdrop.values import Secret
from tests.cli_cases import GUARD, ChildCase, CommandCase


class AddTests(CommandCase):
    def test_password_from_stdin(self) -> None:
        result = self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"hunter2\n")
        self.assertIn(f"Made the accounts database {self.db}", result.stdout)
        self.assertIn("Added bob", result.stdout)
        self.assertNotIn("hunter2", result.output)
        self.assertTrue(self.has_password(b"bob", b"hunter2"))
        self.assertFalse(self.account(b"bob").has_apop)
        for name in os.listdir(self.folder):
            self.assertEqual(os.stat(os.path.join(self.folder, name)).st_mode & 0o777, 0o600)
        again = self.good("add", "--db", self.db, "eve", "--stdin", stdin=b"x\n")
        self.assertNotIn("Made", again.output)

    def test_first_line_without_its_end(self) -> None:
        for number, (stdin, expected) in enumerate(
            [
                (b"secret", b"secret"),
                (b"secret\r\n", b"secret"),
                (b"secret\nmore\n", b"secret"),
                (b" two words \n", b" two words "),
            ]
        ):
            name = f"user{number}"
            self.good("add", "--db", self.db, name, "--stdin", stdin=stdin)
            self.assertTrue(self.has_password(name.encode(), expected))

    def test_apop(self) -> None:
        words = b"a long secret of bob"
        result = self.good("add", "--db", self.db, "bob", "--stdin", "--apop", stdin=words)
        self.assertEqual(self.apop_of(b"bob"), words)
        self.assertIsNone(self.account(b"bob").password_hash)
        self.assertIn("--cleartext always", result.stderr)
        self.assertIn("--apop-users allow", result.stderr)
        self.assertNotIn("Warning", result.stderr)
        self.assertNotIn(words.decode(), result.output)

    def test_both(self) -> None:
        words = b"a long secret of bob"
        result = self.good("add", "--db", self.db, "bob", "--stdin", "--both", stdin=words)
        self.assertEqual(self.apop_of(b"bob"), words)
        self.assertTrue(self.has_password(b"bob", words))
        self.assertIn("--cleartext always", result.stderr)

    def test_rule_is_said_only_for_apop(self) -> None:
        result = self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"x")
        self.assertEqual(result.stderr, "")

    def test_short_apop_secret(self) -> None:
        result = self.good("add", "--db", self.db, "bob", "--stdin", "--apop", stdin=b"x" * 15)
        self.assertIn("Warning", result.stderr)
        result = self.good("passwd", "--db", self.db, "bob", "--stdin", "--apop", stdin=b"x" * 16)
        self.assertNotIn("Warning", result.stderr)

    def test_existing(self) -> None:
        self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"one")
        text = self.refused("add", "--db", self.db, "bob", "--stdin", stdin=b"two")
        self.assertIn("passwd", text)
        self.assertTrue(self.has_password(b"bob", b"one"))

    def test_weak_words(self) -> None:
        for words in (b"", b"\n", b"a\0b", b"a\x1bb", b"\xff\xfe", b"x" * 249, b"x" * 9000):
            self.refused("add", "--db", self.db, "bob", "--stdin", stdin=words)
            self.assertFalse(os.path.exists(self.db))

    def test_names(self) -> None:
        for name in ("", "..", "a/b", "bob.lock", ".bob", "a\nb", "\x1b[2J", "x" * 65, "\udcff"):
            text = self.refused("add", "--db", self.db, "--stdin", "--", name, stdin=b"x")
            self.assertNotIn("\x1b", text)
        self.assertFalse(os.path.exists(self.db))

    def test_generate(self) -> None:
        result = self.good("add", "--db", self.db, "bob", "--both", "--generate")
        (words,) = result.stdout.splitlines()
        self.assertTrue(len(words) >= 32)
        self.assertEqual(self.apop_of(b"bob"), words.encode())
        self.assertTrue(self.has_password(b"bob", words.encode()))
        self.assertNotIn(words, result.stderr)
        other = self.good("passwd", "--db", self.db, "bob", "--apop", "--generate")
        self.assertNotEqual(other.stdout.strip(), words)

    def test_no_terminal(self) -> None:
        result = self.run_it("add", "--db", self.db, "bob")
        self.assertEqual(result.exit_code, 2)
        self.assertIn("--stdin", result.stderr)
        self.assertFalse(os.path.exists(self.db))

    def test_open_to_others(self) -> None:
        self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"x")
        os.chmod(self.db, 0o644)
        for words in (("list",), ("passwd", "bob", "--stdin"), ("add", "eve", "--stdin")):
            text = self.refused(*words, "--db", self.db, stdin=b"x")
            self.assertIn(f"chmod 600 {self.db}", text)

    def test_folder_instead_of_a_file(self) -> None:
        for words in (("list",), ("add", "bob", "--stdin")):
            text = self.refused(*words, "--db", self.folder, stdin=b"x")
            self.assertIn(f"{self.folder}: not a regular file", text)

    def test_cannot_be_made(self) -> None:
        with open(os.path.join(self.folder, "file"), "wb"):
            pass
        path = os.path.join(self.folder, "file", "accounts.db")
        self.assertIn(path, self.refused("add", "--db", path, "bob", "--stdin", stdin=b"x"))


class ChangeTests(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        AccountsDatabase.create(self.db)
        accounts = AccountsDatabase(self.db)
        accounts.add(b"bob", Secret(b"hunter2"), Secret(b"tanstaaf"))
        accounts.close()

    def test_passwd(self) -> None:
        result = self.good("passwd", "--db", self.db, "bob", "--stdin", stdin=b"hunter3\n")
        self.assertIn("Changed bob", result.stdout)
        self.assertTrue(self.has_password(b"bob", b"hunter3"))
        self.assertEqual(self.apop_of(b"bob"), b"tanstaaf")

    def test_passwd_apop(self) -> None:
        self.good("passwd", "--db", self.db, "bob", "--apop", "--stdin", stdin=b"changed\n")
        self.assertTrue(self.has_password(b"bob", b"hunter2"))
        self.assertEqual(self.apop_of(b"bob"), b"changed")

    def test_passwd_both(self) -> None:
        self.good("passwd", "--db", self.db, "bob", "--both", "--stdin", stdin=b"changed\n")
        self.assertTrue(self.has_password(b"bob", b"changed"))
        self.assertEqual(self.apop_of(b"bob"), b"changed")

    def test_remove(self) -> None:
        self.good("passwd", "--db", self.db, "bob", "--remove", "apop")
        self.assertFalse(self.account(b"bob").has_apop)
        self.assertTrue(self.has_password(b"bob", b"hunter2"))
        self.good("passwd", "--db", self.db, "bob", "--remove", "password")
        self.assertIsNone(self.account(b"bob").password_hash)

    def test_unknown(self) -> None:
        for words in (
            ("passwd", "--stdin"), ("delete", "--yes"), ("disable",), ("enable",),
            ("passwd", "--remove", "apop"),
        ):  # fmt: skip
            text = self.refused(*words, "--db", self.db, "eve", stdin=b"x")
            self.assertIn("no such account", text)
            text = self.refused(*words, "--db", self.db, "\x1b[2J", stdin=b"x")
            self.assertNotIn("\x1b", text)

    def test_no_database(self) -> None:
        path = os.path.join(self.folder, "other.db")
        for words in (
            ("passwd", "bob", "--stdin"),
            ("delete", "bob"),
            ("disable", "bob"),
            ("list",),
        ):
            text = self.refused(*words, "--db", path, stdin=b"x")
            self.assertIn(f"popdrop user add --db {path}", text)
        self.assertEqual(sorted(os.listdir(self.folder)), ["accounts.db", "accounts.db.key"])

    def test_delete(self) -> None:
        self.good("delete", "--db", self.db, "bob", "--yes")
        self.assertEqual(self.good("list", "--db", self.db).stdout, "")

    def test_disable_and_enable(self) -> None:
        self.good("disable", "--db", self.db, "bob")
        self.assertTrue(self.account(b"bob").disabled)
        self.good("enable", "--db", self.db, "bob")
        self.assertFalse(self.account(b"bob").disabled)

    def test_usage(self) -> None:
        for words in (
            ("passwd", "bob", "--apop", "--both"),
            ("passwd", "bob", "--stdin", "--generate"),
            ("passwd", "bob", "--remove", "apop", "--stdin"),
            ("passwd", "bob", "--remove", "apop", "--both"),
            ("passwd", "bob", "--remove", "all"),
            ("passwd",),
            ("frobnicate",),
        ):
            self.assertEqual(self.run_it(*words, "--db", self.db).exit_code, 2, words)

    def test_lost_key(self) -> None:
        os.unlink(self.db + ".key")
        text = self.refused("passwd", "--db", self.db, "bob", "--apop", "--stdin", stdin=b"x")
        self.assertIn(self.db + ".key", text)


class ListTests(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        AccountsDatabase.create(self.db)
        accounts = AccountsDatabase(self.db)
        accounts.add(b"mrose", apop=Secret(b"tanstaaf"))
        accounts.add(b"[bold]bob", Secret(b"hunter2"))
        accounts.disable(b"[bold]bob")
        accounts.close()

    def test_plain_lines(self) -> None:
        lines = self.good("list", "--db", self.db).stdout.splitlines()
        when = r"changed=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
        when += " app-passwords=0 read-only=no networks=any expires=never"
        self.assertEqual(len(lines), 2)
        self.assertRegex(lines[0], rf"^\[bold\]bob password=yes apop=no disabled=yes {when}$")
        self.assertRegex(lines[1], rf"^mrose password=no apop=yes disabled=no {when}$")

    def test_json(self) -> None:
        rows = json.loads(self.good("list", "--db", self.db, "--json").stdout)
        free = {"app_passwords": 0, "read_only": False, "networks": [], "expires": None}
        for row in rows:
            self.assertRegex(row.pop("changed"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertEqual(
            rows,
            [
                {"name": "[bold]bob", "password": True, "apop": False, "disabled": True, **free},
                {"name": "mrose", "password": False, "apop": True, "disabled": False, **free},
            ],
        )

    def test_no_secret(self) -> None:
        for words in ((), ("--json",)):
            output = self.good("list", "--db", self.db, *words).output
            for secret in ("tanstaaf", "hunter2", "argon2"):
                self.assertNotIn(secret, output)


class PlacesTests(SynchronousTestCase):
    def test_root(self) -> None:
        environ = {"XDG_STATE_HOME": "/x", "HOME": "/root"}
        self.assertEqual(default_state_dir(environ, 0), "/var/lib/popdrop")
        self.assertEqual(default_database(environ, 0), "/var/lib/popdrop/accounts.db")

    def test_others(self) -> None:
        for environ, expected in (
            ({"XDG_STATE_HOME": "/x", "HOME": "/home/bob"}, "/x/popdrop"),
            ({"HOME": "/home/bob"}, "/home/bob/.local/state/popdrop"),
            ({"XDG_STATE_HOME": "", "HOME": "/home/bob"}, "/home/bob/.local/state/popdrop"),
            ({"XDG_STATE_HOME": "x", "HOME": "/home/bob"}, "/home/bob/.local/state/popdrop"),
        ):
            self.assertEqual(default_state_dir(environ, 1000), expected)

    def test_without_home(self) -> None:
        self.assertTrue(os.path.isabs(default_state_dir({}, 2)))
        self.assertEqual(default_state_dir({}, 2**31 - 7), "/var/lib/popdrop")


class ChildTests(ChildCase):
    """`python -m popdrop` as an administrator meets it."""

    def test_version(self) -> None:
        done = self.child("--version")
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual(done.stdout, f"popdrop {package.__version__}\n".encode())

    def test_help(self) -> None:
        for words in ((), ("user",), ("user", "add"), ("user", "passwd"), ("user", "list")):
            done = self.child(*words, "--help")
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertIn(b"Usage: popdrop", done.stdout)

    def test_relative_path(self) -> None:
        done = self.child(
            "user", "add", "--db", "accounts.db", "bob", "--stdin", stdin=b"hunter2\n"
        )
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertTrue(self.has_password(b"bob", b"hunter2"))

    def test_somebody_elses(self) -> None:
        """A file that may not be read: one line that says who may."""
        self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"x")
        arguments = [sys.executable, "-m", "popdrop", "user"]
        if os.geteuid() == 0:
            # Root without the capability to read everything.
            without = ["--bounding-set", "-dac_override,-dac_read_search"]
            arguments = ["setpriv", *without, *arguments]
        os.chmod(self.db, 0)
        self.addCleanup(os.chmod, self.folder, 0o700)
        for mode, words in ((0o700, ["list"]), (0, ["list"]), (0, ["add", "eve", "--stdin"])):
            os.chmod(self.folder, mode)
            # Not from the folder: it may not be entered.
            done = subprocess.run(
                [*arguments, *words, "--db", self.db],
                input=b"x",
                capture_output=True,
                cwd="/",
                env=self.environ(),
                timeout=GUARD,
                check=False,
            )
            self.assertEqual((done.returncode, done.stdout), (1, b""))
            self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
            self.assertIn(b"owner or root", done.stderr)

    def test_no_traceback(self) -> None:
        with open(self.db, "wb", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            file.write(b"not a database\n" * 100)
        done = self.child("user", "list", "--db", self.db)
        self.assertEqual((done.returncode, done.stdout), (1, b""))
        self.assertEqual(len(done.stderr.splitlines()), 1)
        self.assertIn(self.db.encode(), done.stderr)

    def test_default_place(self) -> None:
        """An ordinary user's; root's is a system folder, where no test writes."""
        self.patch(os, "geteuid", lambda: 1000)
        self.patch(os, "environ", {"XDG_STATE_HOME": os.path.join(self.folder, "state")})
        self.good("add", "bob", "--stdin", stdin=b"x\n")
        path = os.path.join(self.folder, "state", "popdrop", "accounts.db")
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)

    def test_prompts_without_echo(self) -> None:
        code, shown, echoes = self.on_terminal(
            "user", "add", "--db", "accounts.db", "bob",
            answers=[("New password:", b"hunter2\n"), ("Retype new password:", b"hunter2\n")],
        )  # fmt: skip
        self.assertEqual((code, echoes), (0, [False, False]), shown)
        self.assertNotIn("hunter2", shown)
        self.assertIn("Added bob", shown)
        self.assertTrue(self.has_password(b"bob", b"hunter2"))

    def test_mismatch(self) -> None:
        code, shown, _ = self.on_terminal(
            "user", "add", "--db", "accounts.db", "bob",
            answers=[("New password:", b"hunter2\n"), ("Retype new password:", b"hunter3\n")],
        )  # fmt: skip
        self.assertEqual(code, 1)
        self.assertIn("\nMismatch - password unchanged.\r\n", shown)
        self.assertFalse(os.path.exists(self.db))

    def test_interrupt_at_the_prompt(self) -> None:
        for key in (b"\x03", b"\x04"):
            code, shown, _ = self.on_terminal(
                "user", "add", "--db", "accounts.db", "bob", answers=[("New password:", key)]
            )
            self.assertEqual(code, 1, shown)
            self.assertNotIn("Traceback", shown)
            self.assertFalse(os.path.exists(self.db))

    def test_delete_asks(self) -> None:
        self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"x")
        ask = ("user", "delete", "--db", "accounts.db", "bob")
        code, _, _ = self.on_terminal(*ask, answers=[("bob?", b"n\n")])
        self.assertEqual(code, 1)
        self.account(b"bob")
        code, _, _ = self.on_terminal(*ask, answers=[("bob?", b"y\n")])
        self.assertEqual(code, 0)
        self.assertEqual(self.good("list", "--db", self.db).stdout, "")

    def test_table(self) -> None:
        self.good("add", "--db", self.db, "[red]bob", "--stdin", stdin=b"x")
        self.good("disable", "--db", self.db, "[red]bob")
        code, shown, _ = self.on_terminal("user", "list", "--db", "accounts.db", answers=[])
        self.assertEqual(code, 0)
        self.assertIn("Changed (UTC)", re.sub(r"\x1b\[[0-9;]*m", "", shown))
        self.assertIn("[red]bob", re.sub(r"\x1b\[[0-9;]*m", "", shown))
        self.assertIn("\x1b[", shown)

    def test_no_colours_elsewhere(self) -> None:
        self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"x")
        for words in (("list",), ("list", "--json"), ("delete", "bob")):
            done = self.child("user", *words, "--db", self.db)
            self.assertEqual(done.returncode, 0)
            self.assertNotIn(b"\x1b", done.stdout + done.stderr)
