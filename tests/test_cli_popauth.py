"""`popdrop popauth`, with qpopper's words and prompts.

What they were is told by its source, popper/popauth.c.
"""

import os
import pwd

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts.database import AccountsDatabase
from popdrop.accounts.helperwire import Kind, Malformed, SelfAnswer, SelfRequest
from popdrop.cli import popauth
from popdrop.cli.popauth import LONGER, NON_NUMERIC, weakness
from popdrop.values import Scope, Secret
from tests.cli_cases import ChildCase, CommandCase

CHANGING = "Changing only APOP password for {}."
QUESTION = "Really initialize POP authorization DB? "
OLD, NEW, AGAIN = "Old password:", "New password:", "Retype new password:"


class PopauthCase(CommandCase):
    subject = "popauth"

    def setUp(self) -> None:
        super().setUp()
        AccountsDatabase.create(self.db)
        self.accounts = AccountsDatabase(self.db)
        self.addCleanup(self.accounts.close)

    def names(self) -> list[str]:
        return self.good("--db", self.db, "-list").stdout.splitlines()


class UserTests(PopauthCase):
    def user(self, name: str, stdin: bytes) -> tuple[int, str, str]:
        result = self.run_it("--db", self.db, "-user", name, stdin=stdin)
        if result.exit_code:
            self.assertIsInstance(result.exception, SystemExit)
        return result.exit_code, result.stdout, result.stderr

    def test_add(self) -> None:
        """A name that the system does not know, too."""
        code, out, error = self.user("bob", b"tanstaaf\ntanstaaf\n")
        self.assertEqual((code, out), (0, ""))
        first, rule = error.splitlines()
        self.assertEqual(first, CHANGING.format("bob"))
        self.assertIn("--apop-users allow", rule)
        self.assertEqual(self.apop_of(b"bob"), b"tanstaaf")
        self.assertIsNone(self.account(b"bob").password_hash)

    def test_change(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"), Secret(b"tanstaaf"))
        code, out, error = self.user("bob", b"another\nanother\n")
        self.assertEqual((code, out, error), (0, "", CHANGING.format("bob") + "\n"))
        self.assertEqual(self.apop_of(b"bob"), b"another")
        self.assertTrue(self.has_password(b"bob", b"hunter2"))

    def test_account_without_secret(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        self.assertEqual(self.user("bob", b"another\nanother\n")[0], 0)
        self.assertEqual(self.apop_of(b"bob"), b"another")
        self.assertTrue(self.has_password(b"bob", b"hunter2"))

    def test_nothing_changes(self) -> None:
        self.accounts.add(b"bob", apop=Secret(b"tanstaaf"))
        for stdin, last in (
            (b"another\nanothe\n", "Mismatch - password unchanged."),
            (b"another\n", "Mismatch - password unchanged."),
            (b"\n\n", "Password unchanged."),
            (b"", "Password unchanged."),
        ):
            code, out, error = self.user("bob", stdin)
            self.assertEqual((code, out), (1, ""))
            self.assertEqual(error.splitlines(), [CHANGING.format("bob"), last])
        self.assertEqual(self.apop_of(b"bob"), b"tanstaaf")

    def test_weak_twice_then_taken(self) -> None:
        code, out, _ = self.user("bob", b"12345678\nabc\n1234\n1234\n")
        self.assertEqual(code, 0)
        self.assertEqual(
            out.splitlines(),
            ["Please use at least one non-numeric character.", "Please use a longer password."],
        )
        self.assertEqual(self.apop_of(b"bob"), b"1234")
        code, out, _ = self.user("bob", b"abc\nlonger words\nlonger words\n")
        self.assertEqual((code, out), (0, "Please use a longer password.\n"))
        self.assertEqual(self.apop_of(b"bob"), b"longer words")

    def test_words_that_cannot_be(self) -> None:
        for words in (b"a\0bcdef", b"\xff\xfe\xff\xfe", b"\x1b[2Jabc", b"x" * 249):
            code, _, error = self.user("bob", words + b"\n" + words + b"\n")
            self.assertEqual(code, 1)
            self.assertEqual(len(error.splitlines()), 2, error)
            self.assertNotIn("\x1b", error)
        self.assertEqual(self.names(), [])

    def test_names(self) -> None:
        for name in ("..", "a/b", "bob.lock", "\x1b[2J", "x" * 65, "\udcff"):
            code, out, error = self.user(name, b"tanstaaf\ntanstaaf\n")
            self.assertEqual((code, out), (1, ""))
            self.assertNotIn("\x1b", error)
        self.assertEqual(self.names(), [])

    def test_a_secret_as_an_argument(self) -> None:
        result = self.run_it("--db", self.db, "-user", "bob", "tanstaaf", stdin=b"x\nx\n")
        self.assertEqual(result.exit_code, 2)
        self.assertIn("never given as an argument", result.stderr)
        self.assertNotIn("tanstaaf", result.output)
        self.assertEqual(self.names(), [])


class EntryTests(PopauthCase):
    def setUp(self) -> None:
        super().setUp()
        self.accounts.add(b"apop", apop=Secret(b"tanstaaf"))
        self.accounts.add(b"both", Secret(b"hunter2"), Secret(b"tanstaaf"))
        self.accounts.add(b"password", Secret(b"hunter2"))
        self.accounts.add(b"program", apop=Secret(b"tanstaaf"))
        self.program = self.accounts.add_app_password(b"program", "telephone")
        self.accounts.add(b"off", apop=Secret(b"tanstaaf"))
        self.accounts.disable(b"off")
        self.accounts.add(b"narrow", apop=Secret(b"tanstaaf"), scope=Scope(read_only=True))
        self.accounts.add(b"ended", apop=Secret(b"tanstaaf"), scope=Scope(expires=1))
        self.entries = ["apop", "both", "ended", "narrow", "off", "program"]

    def all_names(self) -> list[bytes]:
        return self.accounts.names()

    def test_list(self) -> None:
        """Names alone, and only of those that have a secret."""
        for words in (("-list",), ("-list", "ALL")):
            result = self.good("--db", self.db, *words)
            self.assertEqual(result.output.splitlines(), self.entries)

    def test_list_one(self) -> None:
        for words in (("-list", "both"), ("-list", "-user", "both"), ("-user", "both", "-list")):
            self.assertEqual(self.good("--db", self.db, *words).output, "both\n")
        for name in ("password", "nobody", "\x1b[2J", "al\nl", "\udcff"):
            self.assertEqual(
                self.refused("--db", self.db, "-list", name),
                "popauth: no such entry in POP authorization DB\n",
            )

    def test_delete(self) -> None:
        """Passwords stay, and who is kept out is kept out; who has nothing goes."""
        for name in self.entries:
            result = self.good("--db", self.db, "-delete", name)
            self.assertEqual(result.output, "")
        self.assertEqual(self.names(), [])
        self.assertEqual(
            self.all_names(), [b"both", b"ended", b"narrow", b"off", b"password", b"program"]
        )
        self.assertTrue(self.has_password(b"both", b"hunter2"))
        self.assertIsNotNone(self.accounts.app_password(b"program", self.program.reveal()))
        self.assertTrue(self.account(b"off").disabled)

    def test_delete_nobody(self) -> None:
        for name in ("password", "nobody"):
            self.assertEqual(
                self.refused("--db", self.db, "-delete", name),
                f"popauth: User '{name}' not found in apop database\n",
            )
        self.assertNotIn("\x1b", self.refused("--db", self.db, "-delete", "\x1b[2J"))
        self.assertEqual(self.names(), self.entries)

    def test_initialize(self) -> None:
        for answer in (b"y\n", b"Y\n", b"yes\n", b"yellow"):
            if not self.names():
                self.accounts.add(b"apop", apop=Secret(b"tanstaaf"))
            result = self.good("--db", self.db, "-init", stdin=answer)
            self.assertEqual(result.stdout, QUESTION)
            self.assertEqual(self.names(), [], answer)
            self.assertEqual(
                self.all_names(), [b"both", b"ended", b"narrow", b"off", b"password", b"program"]
            )
        self.assertTrue(self.has_password(b"both", b"hunter2"))

    def test_do_not_initialize(self) -> None:
        before = os.stat(self.db).st_ino
        for answer in (b"n\n", b"\n", b"", b" y\n", b"no, yes\n", b"\xff\n", b"\0y"):
            result = self.run_it("--db", self.db, "-init", stdin=answer)
            self.assertEqual((result.exit_code, result.output), (1, QUESTION))
        self.assertEqual(self.names(), self.entries)
        self.assertEqual(os.stat(self.db).st_ino, before)

    def test_initialize_with_a_lost_key(self) -> None:
        """It is the way out: what the key had sealed is of no use any more."""
        os.unlink(self.db + ".key")
        self.good("--db", self.db, "-init", stdin=b"y\n")
        result = self.run_it("--db", self.db, "-user", "apop", stdin=b"tanstaaf\ntanstaaf\n")
        self.assertEqual(result.exit_code, 0, result.output)
        self.assertEqual(self.apop_of(b"apop"), b"tanstaaf")


class RulesTests(CommandCase):
    subject = "popauth"

    def test_new_database(self) -> None:
        """Without a question, private, and with its key."""
        path = os.path.join(self.folder, "deeper", "accounts.db")
        self.assertEqual(self.good("--db", path, "-init").output, "")
        for name in (path, path + ".key"):
            self.assertEqual(os.stat(name).st_mode & 0o777, 0o600)
        result = self.run_it("--db", path, "-user", "bob", stdin=b"tanstaaf\ntanstaaf\n")
        self.assertEqual(result.exit_code, 0)

    def test_one_thing_at_a_time(self) -> None:
        AccountsDatabase.create(self.db)
        for words in (
            ("-init", "-list"),
            ("-init", "-user", "bob"),
            ("-delete", "bob", "-user", "bob"),
            ("-list", "-delete", "bob"),
            ("-user",),
            ("-delete",),
            ("-dump",),
        ):
            result = self.run_it("--db", self.db, *words, stdin=b"y\n")
            self.assertEqual(result.exit_code, 2, words)

    def test_only_the_owner(self) -> None:
        """Nobody else is let in, by file modes already; he is told who is."""
        AccountsDatabase.create(self.db)
        owner = os.stat(self.db).st_uid
        self.patch(os, "geteuid", lambda: owner + 1)
        for words, what in (
            (("-init",), "init the database"),
            (("-user", "bob"), "perform the requested function"),
            (("-list",), "perform the requested function"),
            (("-delete", "bob"), "delete entries"),
        ):
            text = self.refused("--db", self.db, *words, stdin=b"y\n")
            self.assertEqual(
                text, f"popauth: Only superuser or the owner of {self.db} can {what}\n"
            )

    def test_missing_database(self) -> None:
        for words in (("-user", "bob"), ("-list",), ("-delete", "bob")):
            text = self.refused("--db", self.db, *words)
            if os.geteuid() == 0:
                self.assertIn("no such accounts database", text)
            else:
                self.assertIn("Only superuser or the owner", text)
        self.assertEqual(os.listdir(self.folder), [])

    def test_own_by_the_owner(self) -> None:
        """No server is asked, and no old secret."""
        AccountsDatabase.create(self.db)
        own = pwd.getpwuid(os.geteuid()).pw_name
        for words in (b"tanstaaf", b"another"):
            result = self.run_it("--db", self.db, stdin=words + b"\n" + words + b"\n")
            self.assertEqual(result.exit_code, 0, result.output)
            self.assertIn(CHANGING.format(own), result.stderr)
            self.assertEqual(self.apop_of(own.encode()), words)

    def test_uid_without_a_name(self) -> None:
        self.patch(os, "geteuid", lambda: 2**31 - 7)
        text = self.refused("--db", self.db)
        self.assertEqual(text, f"popauth: Sorry, don't know who uid {2**31 - 7} is.\n")


class ServerCase(CommandCase):
    """An ordinary user; the server's answers are the test's."""

    subject = "popauth"

    def setUp(self) -> None:
        super().setUp()
        self.answers: list[SelfAnswer] = []
        self.asked: list[tuple[str, Kind, bytes | None, bytes | None]] = []
        self.patch(popauth, "self_service", self.answer)
        self.own = pwd.getpwnam("nobody")
        self.patch(os, "geteuid", lambda: self.own.pw_uid)
        self.patch(os, "environ", {"XDG_STATE_HOME": self.folder})
        self.path = os.path.join(self.folder, "popauth")

    def answer(self, path: str, request: SelfRequest) -> SelfAnswer:
        old = None if request.old is None else request.old.reveal()
        new = None if request.new is None else request.new.reveal()
        self.asked.append((path, request.kind, old, new))
        answer = self.answers.pop(0)
        if answer.kind is Kind.HELLO:
            raise Malformed("no answer")
        return answer

    def own_secret(self, *answers: SelfAnswer, stdin: bytes) -> tuple[int, str, str]:
        self.answers = list(answers)
        result = self.run_it("--socket", self.path, stdin=stdin)
        self.assertEqual(self.answers, [])
        return result.exit_code, result.stdout, result.stderr

    def changing(self) -> str:
        return CHANGING.format("nobody") + "\n"


class SelfServiceTests(ServerCase):
    def test_first_time(self) -> None:
        code, out, error = self.own_secret(
            SelfAnswer(Kind.HAS_REPLY, has=False),
            SelfAnswer(Kind.DONE),
            stdin=b"tanstaaf\ntanstaaf\n",
        )
        self.assertEqual((code, out), (0, ""))
        self.assertTrue(error.startswith(self.changing()))
        self.assertIn("--apop-users allow", error)
        self.assertEqual(
            self.asked,
            [(self.path, Kind.HAS, None, None), (self.path, Kind.SET, None, b"tanstaaf")],
        )

    def test_change(self) -> None:
        code, out, error = self.own_secret(
            SelfAnswer(Kind.HAS_REPLY, has=True),
            SelfAnswer(Kind.DONE),
            stdin=b"old words\ntanstaaf\ntanstaaf\n",
        )
        self.assertEqual((code, out, error), (0, "", self.changing()))
        self.assertEqual(self.asked[1], (self.path, Kind.SET, b"old words", b"tanstaaf"))

    def test_wrong_old_secret(self) -> None:
        code, out, error = self.own_secret(
            SelfAnswer(Kind.HAS_REPLY, has=True),
            SelfAnswer(Kind.WRONG),
            stdin=b"old words\ntanstaaf\ntanstaaf\n",
        )
        self.assertEqual((code, out), (1, ""))
        expected = self.changing() + "popauth: Sorry, password entered incorrectly\n"
        self.assertEqual(error, expected)

    def test_nothing_is_asked_of_the_server(self) -> None:
        for stdin, last in (
            (b"old words\nold words\n", "Password unchanged."),
            (b"old words\n\n", "Password unchanged."),
            (b"old words\ntanstaaf\ntanstaa\n", "Mismatch - password unchanged."),
        ):
            self.asked.clear()
            code, _, error = self.own_secret(SelfAnswer(Kind.HAS_REPLY, has=True), stdin=stdin)
            self.assertEqual((code, error), (1, f"{self.changing()}{last}\n"))
            self.assertEqual(len(self.asked), 1)

    def test_refusals(self) -> None:
        has = SelfAnswer(Kind.HAS_REPLY, has=False)
        for answers, last in (
            ([SelfAnswer(Kind.REFUSED, detail="not for this user")], "not for this user"),
            ([SelfAnswer(Kind.FAILED, detail="not now")], "not now"),
            ([SelfAnswer(Kind.REFUSED)], "refused; ask the administrator"),
            ([SelfAnswer(Kind.LATER)], "too many tries; try again in some minutes"),
            ([SelfAnswer(Kind.HELLO)], f"{self.path}: no answer that makes sense"),
            ([has, SelfAnswer(Kind.NONE)], "the entry has changed meanwhile; try again"),
            ([has, SelfAnswer(Kind.WRONG)], "Sorry, password entered incorrectly"),
        ):
            code, out, error = self.own_secret(*answers, stdin=b"tanstaaf\ntanstaaf\n")
            self.assertEqual((code, out), (1, ""))
            self.assertTrue(error.splitlines()[-1].startswith(f"popauth: {last}"), error)
            self.assertNotIn("tanstaaf", error)

    def test_no_server(self) -> None:
        from popdrop.accounts.selfservice import self_service

        self.patch(popauth, "self_service", self_service)
        text = self.refused("--socket", self.path)
        self.assertIn(self.path, text)
        self.assertIn("--popauth-socket", text)


class WeaknessTests(SynchronousTestCase):
    """The rule of popauth.c: its sum of flags is 1 for digits, 2, 4 for letters, 8 for others."""

    CLASSES = (
        (1, frozenset(b"0123456789")),
        (2, frozenset(b"abcdefghijklmnopqrstuvwxyz")),
        (4, frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
    )

    def oracle(self, words: bytes) -> str | None:
        flags = 0
        for octet in words:
            flags |= next((flag for flag, octets in self.CLASSES if octet in octets), 8)
        size = len(words)
        if (
            (flags >= 7 and size >= 4)
            or (flags in (2, 4) and size >= 6)
            or (flags in (3, 5, 6) and size >= 5)
        ):
            return None
        return NON_NUMERIC if flags == 1 else LONGER

    @settings(deadline=None, derandomize=True)
    @given(st.text(alphabet="abAB01 .é", min_size=1, max_size=8))
    def test_property(self, text: str) -> None:
        self.assertEqual(weakness(text.encode()), self.oracle(text.encode()), text)

    def test_examples(self) -> None:
        for words, expected in (
            (b"1234567890", NON_NUMERIC),
            (b"abcde", LONGER),
            (b"abcdef", None),
            (b"abc1", LONGER),
            (b"abcD1", None),
            (b"aB1d", None),
            (b"a b ", None),
            (b"a.b", LONGER),
        ):
            self.assertEqual(weakness(words), expected, words)


class TerminalTests(ChildCase):
    """Prompts, and what happens there."""

    def setUp(self) -> None:
        super().setUp()
        AccountsDatabase.create(self.db)

    def test_prompts(self) -> None:
        code, shown, echoes = self.on_terminal(
            "popauth", "--db", self.db, "-user", "bob",
            answers=[
                (NEW, b"12345678\n"),
                (f"Please use {NON_NUMERIC}.\r\n{NEW}", b"tanstaaf\n"),
                (AGAIN, b"tanstaaf\n"),
            ],
        )  # fmt: skip
        self.assertEqual((code, echoes), (0, [False] * 3), shown)
        self.assertTrue(shown.startswith(CHANGING.format("bob") + f"\r\n{NEW}"), shown)
        self.assertNotIn("tanstaaf", shown)
        self.assertEqual(self.apop_of(b"bob"), b"tanstaaf")

    def test_mismatch(self) -> None:
        code, shown, _ = self.on_terminal(
            "popauth", "--db", self.db, "-user", "bob",
            answers=[(NEW, b"tanstaaf\n"), (AGAIN, b"tanstaff\n")],
        )  # fmt: skip
        self.assertEqual(code, 1)
        self.assertTrue(shown.endswith("\nMismatch - password unchanged.\r\n"), shown)

    def test_keys_that_end_it(self) -> None:
        """^C, ^D, and what is no UTF-8."""
        for key in (b"\x03", b"\x04", b"\xff\xfe\n"):
            for answers in ([(NEW, key)], [(NEW, b"tanstaaf\n"), (AGAIN, key)]):
                code, shown, _ = self.on_terminal(
                    "popauth", "--db", self.db, "-user", "bob", answers=answers
                )
                self.assertEqual(code, 1, shown)
                self.assertNotIn("Traceback", shown)
                self.assertNotIn("tanstaaf", shown)
        code, shown, _ = self.on_terminal(
            "popauth", "--db", self.db, "-init", answers=[(QUESTION, b"\x03")]
        )
        self.assertEqual(code, 1, shown)
        self.assertNotIn("Traceback", shown)
        with_names = AccountsDatabase(self.db)
        self.assertEqual(with_names.names(), [])
        with_names.close()

    def test_initialize(self) -> None:
        accounts = AccountsDatabase(self.db)
        self.addCleanup(accounts.close)
        accounts.add(b"bob", apop=Secret(b"tanstaaf"))
        code, shown, _ = self.on_terminal(
            "popauth", "--db", self.db, "-init", answers=[(QUESTION, b"no\n")]
        )
        self.assertEqual(code, 1)
        self.assertEqual(accounts.names(), [b"bob"])
        code, shown, _ = self.on_terminal(
            "popauth", "--db", self.db, "-init", answers=[(QUESTION, b"yes\n")]
        )
        self.assertEqual(code, 0, shown)
        self.assertEqual(accounts.names(), [])

    def test_help(self) -> None:
        for option in ("-help", "-h", "--help"):
            done = self.child("popauth", option)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            for word in (b"-init", b"-user NAME", b"-delete NAME", b"-list [NAME|ALL]"):
                self.assertIn(word, done.stdout)
