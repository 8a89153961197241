"""`popdrop user` and `popdrop popauth` beside a running server: each change holds at once."""

from __future__ import annotations

import os
import poplib
import pwd
import shutil

from click.testing import CliRunner
from twisted.trial.unittest import SkipTest

from popdrop.cli.main import popdrop
from popdrop.credentials import FAILED
from tests.cli_cases import ChildCase
from tests.end_to_end.harness import Folder, Twistd, mail


class RunningCase(ChildCase):
    """A server with a memory of good logins, which must not outlive a change."""

    options: tuple[str, ...] = ("--login-cache", "600")

    def setUp(self) -> None:
        super().setUp()
        self.home = Folder(self)
        self.home.add("bob", "hunter2")
        self.home.add("mrose", apop="tanstaaf")
        for name in ("bob", "mrose", "robert"):
            self.home.spool(name, mail(1))
        self.server = Twistd(self, self.home, *self.options)

    def do(self, *words: str, stdin: bytes = b"") -> str:
        """A command that is carried out; what it prints on standard output."""
        environ = {"POPDROP_DB": str(self.home.accounts)}
        result = CliRunner().invoke(popdrop, list(words), input=stdin, env=environ)
        self.assertEqual((result.exit_code, result.exception), (0, None), result.output)
        return result.stdout

    def enters(self, name: str, password: str, apop: bool = False) -> bool:
        """Whether that login is good; if not, it is told nothing but that."""
        client = self.server.client()
        try:
            if apop:
                client.apop(name, password)
            else:
                client.user(name)
                client.pass_(password)
        except poplib.error_proto as error:
            self.assertEqual(error.args[0], b"-ERR [AUTH] " + FAILED.encode())
            return False
        else:
            return True
        finally:
            client.close()

    def can(self, name: str, password: str) -> None:
        self.assertTrue(self.enters(name, password))

    def cannot(self, name: str, password: str) -> None:
        self.assertFalse(self.enters(name, password))


class UserTests(RunningCase):
    def test_password(self) -> None:
        self.can("bob", "hunter2")
        self.do("user", "passwd", "bob", "--stdin", stdin=b"hunter3\n")
        self.cannot("bob", "hunter2")
        self.can("bob", "hunter3")
        self.do("user", "passwd", "bob", "--remove", "password")
        self.cannot("bob", "hunter3")

    def test_disable(self) -> None:
        self.can("bob", "hunter2")
        self.do("user", "disable", "bob")
        self.cannot("bob", "hunter2")
        self.do("user", "enable", "bob")
        self.can("bob", "hunter2")
        self.do("user", "delete", "bob", "--yes")
        self.cannot("bob", "hunter2")

    def test_facts(self) -> None:
        self.can("bob", "hunter2")
        for closed, opened in (
            (("--expires", "2020-01-01"), ("--expires", "never")),
            (("--networks", "10.0.0.0/8,2001:db8::/32"), ("--networks", "any")),
        ):
            self.do("user", "change", "bob", *closed)
            self.cannot("bob", "hunter2")
            self.do("user", "change", "bob", *opened)
            self.can("bob", "hunter2")
        self.do("user", "change", "bob", "--networks", "10.0.0.0/8,127.0.0.0/8")
        self.can("bob", "hunter2")

    def test_read_only(self) -> None:
        self.do("user", "change", "bob", "--read-only")
        client = self.server.client()
        client.user("bob")
        client.pass_("hunter2")
        with self.assertRaises(poplib.error_proto) as caught:
            client.dele(1)
        self.assertIn(b"[SYS/PERM]", caught.exception.args[0])
        client.quit()

    def test_rename(self) -> None:
        self.do("user", "rename", "bob", "robert")
        self.cannot("bob", "hunter2")
        self.can("robert", "hunter2")
        self.do("user", "rename", "mrose", "bob")
        self.assertTrue(self.enters("bob", "tanstaaf", apop=True))

    def test_rekey(self) -> None:
        before = self.home.accounts.with_name("accounts.db.key").read_bytes()
        self.assertTrue(self.enters("mrose", "tanstaaf", apop=True))
        self.do("user", "rekey")
        self.assertNotEqual(self.home.accounts.with_name("accounts.db.key").read_bytes(), before)
        self.assertTrue(self.enters("mrose", "tanstaaf", apop=True))
        self.can("bob", "hunter2")

    def test_app_password(self) -> None:
        words = self.do("user", "app-password", "add", "bob", "telephone").strip()
        other = self.do("user", "app-password", "add", "bob", "tablet").strip()
        self.assertIn("used=never", self.do("user", "app-password", "list", "bob"))
        self.can("bob", words)
        self.can("bob", words)
        # Nobody waits for the note of the last use; it is written once a session is over at last.
        self.server.stop()
        lines = self.do("user", "app-password", "list", "bob").splitlines()
        self.assertRegex(lines[0], r" used=never .* label=tablet$")
        self.assertRegex(lines[1], r" used=20\d\d-\S+Z .* label=telephone$")
        self.server = Twistd(self, self.home, *self.options)
        self.can("bob", words)
        self.do("user", "app-password", "delete", "bob", "telephone")
        self.cannot("bob", words)
        self.can("bob", other)
        self.can("bob", "hunter2")

    def test_scopes_of_app_passwords(self) -> None:
        add = ("user", "app-password", "add", "bob")
        past = self.do(*add, "past", "--expires", "2020-01-01").strip()
        far = self.do(*add, "far", "--networks", "10.0.0.0/8").strip()
        reader = self.do(*add, "reader", "--read-only").strip()
        self.cannot("bob", past)
        self.cannot("bob", far)
        client = self.server.client()
        client.user("bob")
        client.pass_(reader)
        with self.assertRaises(poplib.error_proto) as caught:
            client.dele(1)
        self.assertIn(b"[SYS/PERM]", caught.exception.args[0])
        client.quit()


class PopauthTests(RunningCase):
    def test_entries(self) -> None:
        """An entry is refused cleartext; without one, the password is good again."""
        self.can("bob", "hunter2")
        self.do("popauth", "-user", "bob", stdin=b"a long secret\na long secret\n")
        self.assertTrue(self.enters("bob", "a long secret", apop=True))
        self.cannot("bob", "hunter2")
        self.do("popauth", "-delete", "bob")
        self.assertFalse(self.enters("bob", "a long secret", apop=True))
        self.can("bob", "hunter2")
        self.do("popauth", "-init", stdin=b"y\n")
        self.assertFalse(self.enters("mrose", "tanstaaf", apop=True))
        self.can("bob", "hunter2")


class SelfServiceTests(RunningCase):
    """A user of the system, on his own terminal, through the server's socket."""

    def setUp(self) -> None:
        self.me = pwd.getpwuid(os.geteuid()).pw_name
        self.before: tuple[str, ...] = ()
        if os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                raise SkipTest("setpriv is missing: install the Debian package util-linux")
            self.me = "nobody"
            facts = pwd.getpwnam(self.me)
            ids = ("--reuid", str(facts.pw_uid), "--regid", str(facts.pw_gid))
            self.before = ("setpriv", *ids, "--clear-groups")
        shared = Folder(self)
        shared.path.chmod(0o755)
        self.socket = str(shared.path / "run" / "popauth")
        self.options = ("--popauth-socket", self.socket, "--min-uid", "11")
        super().setUp()
        self.home.spool(self.me, mail(1))

    def environ(self) -> dict[str, str]:
        # The own state folder is not the server's, as it never is of a user.
        return {**super().environ(), "XDG_STATE_HOME": "/nonexistent", "HOME": "/nonexistent"}

    def test_own_secret(self) -> None:
        changing = f"Changing only APOP password for {self.me}.\r\n"
        ask = ("popauth", "--socket", self.socket)
        new, again = ("New password:", b"first secret\n"), ("Retype new", b"first secret\n")
        code, shown, echoes = self.on_terminal(*ask, before=self.before, answers=[new, again])
        self.assertEqual((code, echoes), (0, [False, False]), shown)
        self.assertTrue(shown.startswith(changing + "New password:"), shown)
        self.assertTrue(self.enters(self.me, "first secret", apop=True))

        answers = [("New password:", b"second secret\n"), ("Retype new", b"second secret\n")]
        code, shown, _ = self.on_terminal(
            *ask, before=self.before, answers=[("Old password:", b"wrong\n"), *answers]
        )
        self.assertEqual(code, 1)
        self.assertTrue(shown.endswith("popauth: Sorry, password entered incorrectly\r\n"), shown)
        self.assertTrue(self.enters(self.me, "first secret", apop=True))

        code, shown, _ = self.on_terminal(
            *ask, before=self.before, answers=[("Old password:", b"first secret\n"), *answers]
        )
        self.assertEqual(code, 0, shown)
        self.assertTrue(self.enters(self.me, "second secret", apop=True))
        self.assertFalse(self.enters(self.me, "first secret", apop=True))
        self.assertEqual(self.do("popauth", "-list"), "\n".join(sorted(["mrose", self.me])) + "\n")

    def test_nothing_else(self) -> None:
        """Another's entry, the list, the database: all that is not for users."""
        # Without root's rights everybody is the owner; of another file he is not.
        database = str(self.home.accounts) if self.before else "/etc/passwd"
        for words in (("-list",), ("-user", "mrose"), ("-delete", "mrose"), ("-init",)):
            code, shown, _ = self.on_terminal(
                "popauth", "--db", database, "--socket", self.socket, *words,
                before=self.before, answers=[],
            )  # fmt: skip
            self.assertEqual(code, 1)
            self.assertRegex(shown, r"\Apopauth: Only superuser or the owner of \S+ can .*\r\n\Z")
        self.assertTrue(self.enters("mrose", "tanstaaf", apop=True))
