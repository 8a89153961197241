"""`popdrop user import` and `export`, up to a login with an imported secret."""

import json
import os
import poplib
import pty
import stat
from ipaddress import ip_network
from pathlib import Path
from unittest import mock

from click.testing import CliRunner, Result
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts.database import AccountsDatabase, Incoming, Merged, Refused
from popdrop.accounts.secrets import Hasher
from popdrop.cli.imports import Row, _show
from popdrop.cli.main import popdrop
from popdrop.values import Secret
from tests.end_to_end.harness import Folder, Twistd, mail
from tests.olddbs import MAKERS
from tests.test_cli_user import CommandCase


def hidden(secret: bytes) -> bytes:
    """As qpopper's popauth writes it."""
    return bytes(octet ^ 0xFF for octet in secret) + b"\0"


PAIRS = {
    b"bob\0": hidden(b"a shared secret of bob's"),
    b"eve\0": hidden(b"short") + b"scram\0",
    b"../etc\0": hidden(b"a path"),
    b"lat\xef\xbf\0": hidden(b"a name that is not UTF-8"),
    b"latin\0": hidden(b"p\xe4ssword"),
    b"none\0": b"\0",
}


class ImportCase(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        self.old = MAKERS["gdbm"](Path(self.folder) / "pop.auth", PAIRS.items(), ())

    def take(self, *words: str) -> Result:
        return self.run_it("import", "--db", self.db, *words)

    def facts(self, result: Result) -> dict[str, dict[str, str]]:
        return {fact["name"]: fact for fact in json.loads(result.stdout)}

    def file(self, name: str, text: str) -> str:
        path = Path(self.folder) / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def snapshot(self) -> list[tuple[bytes, int]]:
        accounts = AccountsDatabase(self.db)
        self.addCleanup(accounts.close)
        found = []
        for name in accounts.names():
            account = accounts.lookup(name)
            assert account is not None
            found.append((name, account.version))
        return found


class ImportTests(ImportCase):
    def test_qpopper(self) -> None:
        result = self.take(str(self.old))
        self.assertEqual(result.exit_code, 1)
        self.assertIsInstance(result.exception, SystemExit)
        self.assertIn("Added 2, replaced 0, left 4", result.stdout)
        for name in ("../etc", "latin", "none", "lat"):
            self.assertIn(f"refuse {name}", result.stderr)
        self.assertIn("left out: its SCRAM part", result.stderr)
        self.assertIn("1 of the APOP secrets have fewer than 16 octets", result.stderr)
        self.assertIn("--apop-users allow", result.stderr)
        for secret in ("shared secret", "a path", "name that is"):
            self.assertNotIn(secret, result.output)
        self.assertEqual(self.apop_of(b"bob"), b"a shared secret of bob's")
        self.assertEqual(self.apop_of(b"eve"), b"short")
        self.assertIsNone(self.account(b"bob").password_hash)
        self.assertEqual([name for name, _ in self.snapshot()], [b"bob", b"eve"])

    def test_dry_run_makes_nothing(self) -> None:
        result = self.take("--dry-run", str(self.old))
        self.assertEqual(result.exit_code, 1)
        self.assertFalse(os.path.lexists(self.db))
        self.assertEqual(len(result.stdout.splitlines()), len(PAIRS))
        self.assertIn("add bob apop ", result.stdout)
        facts = self.facts(self.take("--dry-run", "--json", str(self.old)))
        self.assertEqual(facts["bob"]["outcome"], "add")
        self.assertEqual(facts["none"]["outcome"], "refuse")
        self.assertFalse(os.path.lexists(self.db))

    def test_exit_status_0_when_all_is_taken(self) -> None:
        result = self.take("--format", "list", self.file("l", "bob hunter2\n"))
        self.assertEqual((result.exit_code, result.exception), (0, None), result.output)
        self.assertTrue(self.has_password(b"bob", b"hunter2"))
        self.assertFalse(self.account(b"bob").lacks_scram)

    def test_uses(self) -> None:
        for word, password, apop in (
            ("--password", True, False),
            ("--apop", False, True),
            ("--both", True, True),
        ):
            path = self.file("l", f"user{word[2:]} of some words\n")
            self.assertEqual(self.take("--format", "list", word, path).exit_code, 0)
            name = f"user{word[2:]}".encode()
            self.assertEqual(self.apop_of(name), b"of some words" if apop else None)
            self.assertEqual(self.account(name).password_hash is not None, password)
            if password:
                self.assertTrue(self.has_password(name, b"of some words"))
        both = self.take("--both", "--apop", str(self.old))
        self.assertEqual(both.exit_code, 2)

    def test_hashes_are_kept(self) -> None:
        hashed = "$6$abcdefgh$" + "x" * 86
        path = self.file("passwd", f"bob:{{SHA512-CRYPT}}{hashed}:::::\n")
        self.assertEqual(self.take(path).exit_code, 0)
        account = self.account(b"bob")
        assert account.password_hash is not None
        self.assertEqual(account.password_hash.reveal(), hashed.encode())
        self.assertTrue(account.lacks_scram)

    def test_conflicts(self) -> None:
        self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"bob's own\n")
        before = self.snapshot()
        path = self.file("l", "bob theirs\neve hers\n")
        result = self.take("--format", "list", path)
        self.assertEqual(result.exit_code, 1)
        self.assertIn("keep bob", result.stderr)
        self.assertIn("--replace", result.stderr)
        self.assertTrue(self.has_password(b"bob", b"bob's own"))
        self.assertEqual(self.snapshot()[0], before[0])
        self.assertTrue(self.has_password(b"eve", b"hers"))
        result = self.take("--format", "list", "--replace", path)
        self.assertEqual(result.exit_code, 0, result.output)
        self.assertIn("Added 0, replaced 2, left 0", result.stdout)
        self.assertTrue(self.has_password(b"bob", b"theirs"))
        self.assertNotEqual(self.snapshot()[0], before[0])

    def test_replace_keeps_what_the_file_has_not(self) -> None:
        self.good("add", "--db", self.db, "bob", "--stdin", stdin=b"bob's own\n")
        self.good("disable", "--db", self.db, "bob")
        self.take("--replace", str(self.old))
        self.assertTrue(self.has_password(b"bob", b"bob's own"))
        self.assertEqual(self.apop_of(b"bob"), b"a shared secret of bob's")
        self.assertTrue(self.account(b"bob").disabled)

    def test_one_name_twice(self) -> None:
        first, second = self.file("a", "bob one\n"), self.file("b", "bob two\n")
        result = self.take("--format", "list", first, second)
        self.assertEqual(result.exit_code, 1)
        self.assertIn(f"{second}:1: the same account as in {first}:1", result.stderr)
        self.assertTrue(self.has_password(b"bob", b"one"))

    def test_shut_out_stays_so(self) -> None:
        result = self.take(self.file("authuser", "bob:secret\n!bob:\n"))
        self.assertEqual(result.exit_code, 0, result.output)
        self.assertTrue(self.account(b"bob").disabled)

    def test_damaged_file_leaves_all_as_it_was(self) -> None:
        good = self.file("l", "eve hers\n")
        content = self.old.read_bytes()
        self.old.write_bytes(content[: len(content) // 2])
        for words in ((str(self.old), good), (good, str(self.old)), (good, "absent")):
            line = self.refused("import", "--db", self.db, *words)
            self.assertIn("nothing was imported", line)
        self.assertFalse(os.path.lexists(self.db))

    def test_hostile_names(self) -> None:
        names = ["a\x1b[31mred", "$(id)", "[bold]x", "bob%s"]
        path = self.file("l", "".join(f"{name} words\n" for name in names))
        result = self.take("--format", "list", path)
        self.assertNotIn("\x1b", result.output)
        taken = [name for name, _ in self.snapshot()]
        self.assertEqual(taken, sorted(name.encode() for name in names[1:]))

    def test_table_on_a_terminal(self) -> None:
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        with open(slave, "w") as terminal, mock.patch("sys.stdout", terminal):
            _show([Row("[red]x", "refuse", "apop", "f:1", "why")], False)
        text = os.read(master, 65536).decode()
        self.assertIn("[red]x", text)
        self.assertIn("Outcome", text)


class MergeTests(ImportCase):
    def accounts(self) -> AccountsDatabase:
        AccountsDatabase.create(self.db)
        accounts = AccountsDatabase(self.db)
        self.addCleanup(accounts.close)
        return accounts

    def test_all_or_none(self) -> None:
        accounts = self.accounts()
        entries = [Incoming(b"u%d" % n, apop=Secret(b"secret %d" % n)) for n in range(50)]
        bad = Incoming(b"bad", apop=Secret(b"\0"))
        self.assertRaises(Refused, accounts.merge, [*entries, bad])
        self.assertEqual(accounts.names(), [])
        self.assertRaises(Refused, accounts.merge, [*entries, entries[0]])
        self.assertRaises(Refused, accounts.merge, [*entries, Incoming(b"a/b")])
        self.assertEqual(accounts.names(), [])
        self.assertEqual(accounts.merge(entries), [Merged.ADDED] * 50)
        self.assertEqual(accounts.merge(entries[:1]), [Merged.KEPT])
        self.assertEqual(accounts.merge(entries[:1], True), [Merged.REPLACED])

    def test_made_by_another_meanwhile(self) -> None:
        accounts = self.accounts()
        other = AccountsDatabase(self.db)
        self.addCleanup(other.close)
        entries = [Incoming(b"eve", apop=Secret(b"x")), Incoming(b"bob", apop=Secret(b"y"))]
        calls = []

        def step() -> None:
            if not calls:
                other.add(b"bob", apop=Secret(b"his own"))
            calls.append(1)

        self.assertRaises(Refused, accounts.merge, entries, False, step)
        self.assertEqual(accounts.names(), [b"bob"])
        self.assertEqual(self.apop_of(b"bob"), b"his own")
        self.assertEqual(len(calls), 2)

    def test_ten_thousand(self) -> None:
        pairs = {b"user%d\0" % n: hidden(b"secret number %d of many" % n) for n in range(10_000)}
        path = MAKERS["berkeley"](Path(self.folder) / "many", pairs.items(), ())
        result = self.take(str(path))
        self.assertEqual(result.exit_code, 0, result.output[-1000:])
        self.assertIn("Added 10000, replaced 0, left 0", result.stdout)
        self.assertEqual(self.apop_of(b"user7777"), b"secret number 7777 of many")


class ExportTests(ImportCase):
    def setUp(self) -> None:
        super().setUp()
        self.good("add", "--db", self.db, "bob", "--stdin", "--both", stdin=b"correct horse\n")
        self.good("add", "--db", self.db, "eve", "--stdin", stdin=b"battery staple\n")
        self.good("disable", "--db", self.db, "eve")

    def export(self, *words: str) -> Result:
        return self.good("export", "--db", self.db, *words)

    def test_no_secrets_unless_asked(self) -> None:
        for form in ("json", "passwd"):
            result = self.export("--format", form)
            self.assertNotIn("$argon2", result.output)
            self.assertNotIn("horse", result.output)
        facts = [json.loads(line) for line in self.export().stdout.splitlines()]
        self.assertEqual([fact["name"] for fact in facts], ["bob", "eve"])
        self.assertEqual(
            [(fact["apop"], fact["disabled"]) for fact in facts], [(True, False), (False, True)]
        )

    def test_with_hashes(self) -> None:
        result = self.export("--with-hashes")
        self.assertNotIn("horse", result.output)
        [bob, _] = [json.loads(line) for line in result.stdout.splitlines()]
        hashed = Secret(bob["password_hash"].encode())
        self.assertTrue(Hasher().verify(hashed, b"correct horse"))

    def test_back_again(self) -> None:
        path = self.file("passwd", self.export("--with-hashes", "--format", "passwd").stdout)
        other = os.path.join(self.folder, "other.db")
        result = self.run_it("import", "--db", other, path)
        self.assertIn("Added 1, replaced 0, left 1", result.stdout)
        self.assertIn("refuse eve", result.stderr)
        accounts = AccountsDatabase(other)
        self.addCleanup(accounts.close)
        account = accounts.lookup(b"bob")
        assert account is not None
        self.assertTrue(Hasher().verify(account.password_hash, b"correct horse"))

    def test_restrictions_go_with_it(self) -> None:
        accounts = AccountsDatabase(self.db)
        accounts.change(b"bob", networks=(ip_network("10.0.0.0/8"),))
        accounts.close()
        line = self.export("--with-hashes", "--format", "passwd").stdout.splitlines()[0]
        self.assertTrue(line.endswith("::::::allow_nets=10.0.0.0/8"), line)
        other = os.path.join(self.folder, "other.db")
        result = self.run_it("import", "--db", other, self.file("passwd", line + "\n"))
        self.assertIn("allow_nets", result.stderr)
        self.assertFalse(os.path.lexists(other))


class LoginTests(SynchronousTestCase):
    def test_imported_secret_logs_in(self) -> None:
        folder = Folder(self)
        pairs = {b"bob\0": hidden(b"from the old server"), b"eve\0": hidden(b"hers") + b"scram\0"}
        old = MAKERS["ndbm"](folder.path / "pop.auth", pairs.items(), ())
        folder.spool("bob", mail(1))
        words = ["user", "import", "--db", str(folder.accounts), str(old)]
        result = CliRunner().invoke(popdrop, words)
        self.assertEqual(result.exit_code, 0, result.output)
        self.assertEqual(stat.S_IMODE(folder.accounts.stat().st_mode), 0o600)
        server = Twistd(self, folder)
        client = server.client()
        self.assertTrue(client.apop("bob", "from the old server").startswith(b"+OK"))
        self.assertEqual(client.stat()[0], 1)
        client.quit()
        server.stop()

    def test_imported_hashes_log_in(self) -> None:
        """By openssl(1) and htpasswd(1) of `myPassword`; the first login makes ours of them."""
        folder = Folder(self)
        hashes = {
            "bob": "$6$saltsalt$REpTllT9/S/gg33eAxbXKSVehttBRbY4OJ0jTp669YR"
            "EedbYCJp8tD90LctevwvdnnuZN0qTJQVuUqDzHImPf1",
            "eve": "$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/",
            "mallory": "{SHA}VBPuJHI7uixaa6LQGWx4s+5GKNE=",
        }
        path = folder.path / "passwd"
        path.write_text("".join(f"{name}:{hashed}\n" for name, hashed in hashes.items()))
        words = ["user", "import", "--db", str(folder.accounts), str(path)]
        result = CliRunner().invoke(popdrop, words)
        self.assertEqual(result.exit_code, 0, result.output)
        server = Twistd(self, folder, "--cleartext", "always")
        for turn in range(2):
            for name in hashes:
                client = server.client()
                client.user(name)
                self.assertTrue(client.pass_("myPassword").startswith(b"+OK"), (turn, name))
                client.quit()
        client = server.client()
        client.user("bob")
        self.assertRaises(poplib.error_proto, client.pass_, "yourPassword")
        client.close()
        server.stop()
        accounts = AccountsDatabase(str(folder.accounts))
        self.addCleanup(accounts.close)
        for name in hashes:
            account = accounts.lookup(name.encode())
            assert account is not None
            self.assertTrue(Hasher().verify(account.password_hash, b"myPassword"))
            self.assertFalse(account.lacks_scram)
