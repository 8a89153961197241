"""What `popdrop user` shows and changes beside passwords: facts, app passwords, names, keys."""

import json
import os
import re
from datetime import UTC, datetime
from ipaddress import ip_network

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts.database import AccountsDatabase
from popdrop.accounts.rows import AppPassword
from popdrop.cli.common import limits, moment
from popdrop.values import ANYTHING, Scope, Secret
from tests.cli_cases import ChildCase, CommandCase

NETWORKS = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
END = int(datetime(2033, 1, 31, 18, 30, tzinfo=UTC).timestamp())
TIME = r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z"
WORDS = re.compile(r"[a-z2-7]{5}(?:-[a-z2-7]{5}){4}[a-z2-7]")


class FactsCase(CommandCase):
    def setUp(self) -> None:
        super().setUp()
        AccountsDatabase.create(self.db)
        self.accounts = AccountsDatabase(self.db)
        self.addCleanup(self.accounts.close)
        self.accounts.add(b"bob", Secret(b"hunter2"))
        self.accounts.add(b"both", Secret(b"hunter2"), Secret(b"tanstaaf"))

    def do(self, *words: str, stdin: bytes = b"") -> str:
        return self.good(*words, "--db", self.db, stdin=stdin).stdout

    def no(self, *words: str) -> str:
        return self.refused(*words, "--db", self.db)

    def misused(self, *words: str) -> str:
        before = self.accounts.entries()
        result = self.run_it(*words, "--db", self.db, stdin=b"x")
        self.assertEqual(result.exit_code, 2, result.output)
        self.assertEqual(self.accounts.entries(), before)
        return result.stderr

    def scope(self, name: bytes = b"bob") -> Scope:
        return self.accounts.entry(name).scope


class ChangeTests(FactsCase):
    def test_each_alone(self) -> None:
        for words, field, value in (
            (("--expires", "2033-01-31T18:30"), "expires", END),
            (("--networks", "192.0.2.0/24,2001:db8::/32"), "networks", NETWORKS),
            (("--read-only",), "read_only", True),
        ):
            self.assertIn("Changed bob", self.do("change", "bob", *words))
            self.assertEqual(getattr(self.scope(), field), value)
        self.assertEqual(self.scope(), Scope(True, NETWORKS, END))
        for words, left in (
            (("--read-write",), Scope(False, NETWORKS, END)),
            (("--networks", "any"), Scope(False, (), END)),
            (("--expires", "never"), ANYTHING),
        ):
            self.do("change", "bob", *words)
            self.assertEqual(self.scope(), left)
        self.assertEqual(self.scope(b"both"), ANYTHING)
        self.assertTrue(self.has_password(b"bob", b"hunter2"))

    def test_moments(self) -> None:
        day = int(datetime(2033, 1, 31, tzinfo=UTC).timestamp())
        for text, expected in (
            ("2033-01-31", day),
            ("2033-01-31T18:30", END),
            ("2033-01-31T18:30Z", END),
            ("2033-01-31T18:30:00Z", END),
        ):
            self.do("change", "bob", "--expires", text)
            self.assertEqual(self.scope().expires, expected, text)

    def test_what_is_shown_is_taken(self) -> None:
        """The words of `list` are good for `change`."""
        self.do("change", "bob", "--expires", "2033-01-31", "--networks", "192.0.2.7/24")
        line = self.do("list").splitlines()[0]
        words = dict(word.split("=") for word in line.split()[1:])
        before = self.scope()
        self.do("change", "bob", "--expires", "never", "--networks", "any")
        self.do("change", "bob", "--expires", words["expires"], "--networks", words["networks"])
        self.assertEqual(self.scope(), before)

    def test_mapped_networks(self) -> None:
        """RFC 4291 section 2.5.5.2: an IPv4 client is known by its IPv4 address."""
        self.do("change", "bob", "--networks", "::ffff:192.0.2.0/120")
        self.assertEqual([*map(str, self.scope().networks)], ["192.0.2.0/24"])

    def test_past(self) -> None:
        result = self.good("change", "bob", "--db", self.db, "--expires", "2020-01-01")
        self.assertEqual(
            result.stderr, "Note: 2020-01-01T00:00:00Z is past: no login from now on.\n"
        )

    def test_words_that_are_none(self) -> None:
        """Nothing that is not understood opens or closes an account; no empty variable does."""
        for text in ("", "tomorrow", "2033", "2033-02-30", "33-01-31", "2033-01-31 18:30", "Never"):
            self.assertIn("never", self.misused("change", "bob", "--expires", text))
        for text in (
            "", ",", " ", "10.1", "192.0.2.0/33", "localhost", "all", "192.0.2.0/24;10.0.0.0/8",
            "any,10.0.0.0/8",
        ):  # fmt: skip
            self.assertIn("192.0.2.0/24", self.misused("change", "bob", "--networks", text))
        self.assertIn("--expires", self.misused("change", "bob"))

    def test_add(self) -> None:
        self.do(
            "add", "eve", "--stdin", "--read-only", "--expires", "2033-01-31T18:30",
            "--networks", "192.0.2.0/24,2001:db8::/32",
            stdin=b"hunter2\n",
        )  # fmt: skip
        self.assertEqual(self.scope(b"eve"), Scope(True, NETWORKS, END))
        self.assertIn("never", self.misused("add", "mallory", "--stdin", "--expires", "soon"))

    @settings(deadline=None, derandomize=True)
    @given(st.integers(-(2**62), 2**62))
    def test_any_number_can_be_shown(self, seconds: int) -> None:
        """A damaged one, too."""
        self.assertRegex(moment(seconds), r"\A(-?\d+-\d\d-\d\dT\d\d:\d\d:\d\dZ|damaged)\Z")


class RenameTests(FactsCase):
    def test_rename(self) -> None:
        self.do("change", "both", "--read-only")
        words = self.do("app-password", "add", "both", "telephone").strip()
        self.assertIn("Renamed both to robert", self.do("rename", "both", "robert"))
        self.assertEqual(self.accounts.names(), [b"bob", b"robert"])
        self.assertTrue(self.has_password(b"robert", b"hunter2"))
        self.assertEqual(self.apop_of(b"robert"), b"tanstaaf")
        self.assertTrue(self.scope(b"robert").read_only)
        self.assertIsNotNone(self.accounts.app_password(b"robert", words.encode()))

    def test_refused(self) -> None:
        self.assertIn("there is such an account", self.no("rename", "bob", "both"))
        self.assertIn("no such account", self.no("rename", "eve", "mallory"))
        for name in ("..", "a/b", "\x1b[2J", "\udcff", "bob.lock"):
            text = self.no("rename", "bob", name)
            self.assertNotIn("\x1b", text)
        self.assertEqual(self.accounts.names(), [b"bob", b"both"])


class AppPasswordTests(FactsCase):
    def add(self, *words: str) -> str:
        result = self.good("app-password", "add", *words, "--db", self.db)
        (line,) = result.stdout.splitlines()
        self.assertTrue(WORDS.fullmatch(line), line)
        self.assertNotIn(line, result.stderr)
        return line

    def test_add(self) -> None:
        """The password is all there is on standard output."""
        first, second = self.add("bob", "telephone"), self.add("bob", "Thunderbird at home")
        self.assertNotEqual(first, second)
        used = self.accounts.app_password(b"bob", first.encode())
        assert used is not None
        self.assertEqual(used.label, "telephone")
        self.assertEqual(used.scope, ANYTHING)

    def test_scope(self) -> None:
        words = self.add(
            "bob", "reader", "--read-only", "--networks", "192.0.2.0/24,2001:db8::/32",
            "--expires", "2033-01-31T18:30",
        )  # fmt: skip
        used = self.accounts.app_password(b"bob", words.encode())
        assert used is not None
        self.assertEqual(used.scope, Scope(True, NETWORKS, END))
        self.assertEqual(self.scope(), ANYTHING)

    def test_labels(self) -> None:
        self.add("bob", "telephone")
        self.assertIn("already", self.no("app-password", "add", "bob", "telephone"))
        for label in ("", " x", "\x1b[2J", "a\nb", "x" * 41, "\udcff", "\u202ex"):
            text = self.no("app-password", "add", "bob", label)
            self.assertTrue(text.isascii(), text)
            text = self.no("app-password", "delete", "bob", label)
            self.assertTrue(text.isascii(), text)
        self.assertEqual(len(self.accounts.app_passwords(b"bob")), 1)

    def test_delete(self) -> None:
        words, other = self.add("bob", "telephone"), self.add("bob", "tablet")
        self.assertIn("telephone of bob", self.do("app-password", "delete", "bob", "telephone"))
        self.assertIsNone(self.accounts.app_password(b"bob", words.encode()))
        self.assertIsNotNone(self.accounts.app_password(b"bob", other.encode()))
        self.assertIn("no app password", self.no("app-password", "delete", "bob", "telephone"))

    def test_unknown(self) -> None:
        for words in (("add", "eve", "x"), ("list", "eve"), ("delete", "eve", "x")):
            self.assertIn("no such account", self.no("app-password", *words))

    def test_own_words_are_not_taken(self) -> None:
        """What looks like a password behind the label is not repeated."""
        text = self.misused("app-password", "add", "bob", "telephone", "hunter3")
        self.assertNotIn("hunter3", text)

    def test_list(self) -> None:
        self.assertEqual(self.do("app-password", "list", "bob"), "")
        self.assertEqual(json.loads(self.do("app-password", "list", "bob", "--json")), [])
        words = self.add("bob", "the telephone", "--expires", "2033-01-31T18:30", "--read-only")
        self.accounts.note_use(b"bob", AppPassword("the telephone", Secret(b"")), END)
        (row,) = json.loads(self.do("app-password", "list", "bob", "--json"))
        self.assertRegex(row.pop("created"), TIME)
        expected = {
            "used": "2033-01-31T18:30:00Z", "read_only": True, "networks": [],
            "expires": "2033-01-31T18:30:00Z", "label": "the telephone",
        }  # fmt: skip
        self.assertEqual(row, expected)
        (line,) = self.do("app-password", "list", "bob").splitlines()
        self.assertRegex(
            line,
            r"\Acreated=\S+Z used=2033-01-31T18:30:00Z read-only=yes networks=any"
            r" expires=2033-01-31T18:30:00Z label=the telephone\Z",
        )
        self.assertNotIn(words, line)


class ShowTests(FactsCase):
    def show(self, name: str) -> dict[str, object]:
        shown: dict[str, object] = json.loads(self.do("show", name, "--json"))
        return shown

    def test_json(self) -> None:
        self.do("app-password", "add", "bob", "telephone")
        facts = self.show("bob")
        self.assertRegex(str(facts.pop("changed")), TIME)
        (program,) = facts.pop("app_password_list")  # type: ignore[misc]
        self.assertEqual(program["label"], "telephone")
        self.assertEqual(
            facts,
            {
                "name": "bob", "password": True, "apop": False, "disabled": False,
                "app_passwords": 1, "read_only": False, "networks": [], "expires": None,
                "mechanisms": ["USER", "PLAIN", "LOGIN", "SCRAM-SHA-1", "SCRAM-SHA-256"],
                "system": None, "notes": [],
            },
        )  # fmt: skip

    def test_mechanisms(self) -> None:
        cleartext, scram = ["USER", "PLAIN", "LOGIN"], ["SCRAM-SHA-1", "SCRAM-SHA-256"]
        self.accounts.add(b"apop", apop=Secret(b"tanstaaf"))
        self.accounts.add(b"program")
        self.accounts.add(b"nothing")
        self.accounts.add_app_password(b"program", "telephone")
        for name, expected in (
            ("bob", cleartext + scram),
            ("both", [*cleartext, *scram, "APOP", "CRAM-MD5"]),
            ("apop", ["APOP", "CRAM-MD5"]),
            ("program", cleartext),
            ("nothing", []),
        ):
            self.assertEqual(self.show(name)["mechanisms"], expected, name)

    def test_notes(self) -> None:
        self.assertEqual(self.show("bob")["notes"], [])
        (rule,) = self.show("both")["notes"]  # type: ignore[misc]
        self.assertIn("--apop-users allow", rule)
        self.do("disable", "both")
        disabled, _ = self.show("both")["notes"]  # type: ignore[misc]
        self.assertIn("enable", disabled)
        os.unlink(self.db + ".key")
        self.assertIn("does not open", str(self.show("both")["notes"]))

    def test_system_account(self) -> None:
        self.accounts.add(b"root", Secret(b"hunter2"))
        facts = self.show("root")
        expected = {"uid": 0, "home": "/root", "shell": "/bin/bash", "under_uid_floor": True}
        with open("/etc/passwd", encoding="utf-8") as file:
            (line,) = (line for line in file if line.startswith("root:"))
        *_, expected["home"], shell = line.split(":")
        expected["shell"] = shell.strip()
        self.assertEqual(facts["system"], expected)
        self.assertIn("--min-uid", str(facts["notes"]))
        self.assertRegex(self.do("show", "root"), r"(?m)^system: uid=0 home=\S+ shell=\S+ under-")

    def test_lines(self) -> None:
        self.do("change", "both", "--networks", "192.0.2.0/24")
        lines = self.do("show", "both").splitlines()
        self.assertEqual(lines[:4], ["name: both", "password: yes", "apop: yes", "disabled: no"])
        for line in ("networks: 192.0.2.0/24", "expires: never", "system: none"):
            self.assertIn(line, lines)

    def test_no_secret(self) -> None:
        words = self.do("app-password", "add", "both", "telephone").strip()
        with open(self.db + ".key", "rb") as file:
            key = file.read().hex()
        for command in (("show", "both"), ("show", "both", "--json"), ("list",),
                        ("app-password", "list", "both"),
                        ("app-password", "list", "both", "--json")):  # fmt: skip
            output = self.do(*command)
            for secret in ("hunter2", "tanstaaf", "argon2", words, words.replace("-", ""), key):
                self.assertNotIn(secret, output)

    def test_unknown(self) -> None:
        for name in ("eve", "\x1b[2J", "", "\udcff"):
            self.assertNotIn("\x1b", self.no("show", name))


class KeyTests(FactsCase):
    def key(self, name: str = "") -> str:
        return os.path.join(self.folder, name) if name else self.db + ".key"

    def octets(self, name: str = "") -> bytes:
        with open(self.key(name), "rb") as file:
            return file.read()

    def test_rekey(self) -> None:
        before = self.octets()
        # One APOP secret, and two SCRAM verifiers of two passwords.
        self.assertIn("Sealed 5 secrets", self.do("rekey"))
        self.assertNotEqual(self.octets(), before)
        self.assertEqual(self.apop_of(b"both"), b"tanstaaf")
        self.assertFalse(os.path.exists(self.db + ".key.next"))

    def test_to_another_place(self) -> None:
        source = f"file:{self.key('other')}"
        result = self.good("rekey", "--to", source, "--db", self.db)
        self.assertIn("--key", result.stderr)
        self.assertNotEqual(self.octets("other"), self.octets())
        facts = json.loads(self.do("show", "both", "--key", source, "--json"))
        self.assertNotIn("does not open", str(facts["notes"]))
        self.assertIn("does not open", self.do("show", "both"))
        self.do("passwd", "both", "--apop", "--stdin", "--key", source, stdin=b"a long secret")
        self.do("rename", "both", "robert", "--key", source)
        accounts = AccountsDatabase(self.db, key=source)
        self.addCleanup(accounts.close)
        account = accounts.lookup(b"robert")
        assert account is not None and account.apop_secret is not None
        self.assertEqual(account.apop_secret.reveal(), b"a long secret")

    def test_environment(self) -> None:
        path, source = self.key("other.db"), f"file:{self.key('other.key')}"
        self.patch(os, "environ", {**os.environ, "POPDROP_DB": path, "POPDROP_KEY": source})
        self.good("add", "bob", "--apop", "--stdin", stdin=b"a long secret")
        self.assertEqual(self.good("list").stdout.split()[:3], ["bob", "password=no", "apop=yes"])
        self.assertEqual(len(self.octets("other.key")), 32)
        self.assertFalse(os.path.exists(path + ".key"))

    def test_cannot(self) -> None:
        for source, told in (
            ("vault:x", "file:PATH"),
            ("file:relative", "whole path"),
            ("command:/nonexistent/program", "/nonexistent/program"),
        ):
            self.assertIn(told, self.no("rekey", "--to", source))
        self.assertIn("same key", self.no("rekey", "--to", f"file:{self.key()}"))
        self.assertEqual(self.apop_of(b"both"), b"tanstaaf")
        os.unlink(self.key())
        self.assertIn("accounts.db.key", self.no("rekey"))


class LimitsTests(SynchronousTestCase):
    def test_words(self) -> None:
        self.assertEqual(limits(ANYTHING), "")
        self.assertEqual(
            limits(Scope(True, NETWORKS, END), True),
            "disabled; read only; until 2033-01-31 18:30; from 192.0.2.0/24, 2001:db8::/32",
        )


class TableTests(ChildCase):
    """On a terminal; names and labels may hold what looks like mark-up."""

    def setUp(self) -> None:
        super().setUp()
        AccountsDatabase.create(self.db)
        accounts = AccountsDatabase(self.db)
        accounts.add(b"[red]bob", Secret(b"hunter2"), scope=Scope(True, NETWORKS))
        accounts.add_app_password(b"[red]bob", "[blink]phone")
        accounts.close()

    def table(self, *words: str) -> str:
        code, shown, _ = self.on_terminal("user", *words, "--db", self.db, answers=[])
        self.assertEqual(code, 0, shown)
        for secret in ("hunter2", "argon2"):
            self.assertNotIn(secret, shown)
        return re.sub(r"\x1b\[[0-9;]*m", "", shown)

    def test_tables(self) -> None:
        shown = self.table("list")
        for text in ("Limits", "[red]bob", "read only"):
            self.assertIn(text, shown)
        shown = self.table("show", "[red]bob")
        for text in ("[red]bob", "mechanisms", "USER,PLAIN,LOGIN", "label=[blink]phone"):
            self.assertIn(text, shown)
        shown = self.table("app-password", "list", "[red]bob")
        for text in ("Last use (UTC)", "[blink]phone", "never"):
            self.assertIn(text, shown)
        for line in shown.splitlines():
            self.assertLessEqual(len(line), 80)

    def test_no_colour(self) -> None:
        """$NO_COLOR takes the colours (no-color.org)."""
        self.patch(os, "environ", {**os.environ, "NO_COLOR": "1"})
        _, shown, _ = self.on_terminal("user", "list", "--db", self.db, answers=[])
        self.assertNotRegex(shown, r"\x1b\[[0-9;]*(?:3[0-7]|9[0-7]|4[0-7])m")
        self.assertIn("[red]bob", shown)
