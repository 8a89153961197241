"""Accounts of other servers: each format, and what is said of what cannot be taken."""

import fcntl
import os
import pwd
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts.importers import (
    FORMS,
    Found,
    Item,
    Trouble,
    Unreadable,
    Use,
    guess,
    read,
    serving,
)
from popdrop.values import Secret
from tests.olddbs import MAKERS


def hidden(secret: bytes) -> bytes:
    """As qpopper's popauth writes it."""
    return bytes(octet ^ 0xFF for octet in secret) + b"\0"


def plain(secret: Secret | None) -> bytes | None:
    return None if secret is None else secret.reveal()


class ReaderCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()

    def file(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        path.chmod(0o600)
        return str(path)

    def items(self, name: str, content: bytes, form: str = "auto") -> list[Item]:
        return read(self.file(name, content), form)

    def found(self, items: list[Item]) -> dict[bytes, Found]:
        return {item.name: item for item in items if isinstance(item, Found)}

    def troubles(self, items: list[Item]) -> dict[str, str]:
        """By what stands behind the last colon of `where`."""
        return {
            item.where.rpartition(":")[2].strip(): item.text
            for item in items
            if isinstance(item, Trouble)
        }

    def unreadable(self, path: str, form: str = "auto") -> str:
        error = self.assertRaises(Unreadable, read, path, form)
        self.assertIn(path, str(error))
        self.assertNotIn("\n", str(error))
        return str(error)


class QpopperTests(ReaderCase):
    PAIRS = {
        b"bob\0": hidden(b"tanstaaf"),
        b"eve\0": hidden(b"another one") + b"\x80\x81scram\0",
        b"none\0": b"\0",
        b"empty\0": b"",
        b"m\xc3\xbcller\0": hidden("pässword".encode()),
        b"odd": hidden(b"no NUL behind the name"),
        b"cut\0": hidden(b"no NUL behind the secret")[:-1],
    }

    def test_every_library(self) -> None:
        for kind, make in MAKERS.items():
            path = make(self.folder / kind, self.PAIRS.items(), ())
            items = read(str(path))
            found = self.found(items)
            self.assertEqual(
                {name: plain(item.apop) for name, item in found.items()},
                {
                    b"bob": b"tanstaaf",
                    b"eve": b"another one",
                    b"m\xc3\xbcller": "pässword".encode(),
                },
            )
            self.assertEqual(found[b"eve"].remarks, ("its SCRAM part",))
            self.assertEqual(found[b"bob"].remarks, ())
            self.assertTrue(all(item.password is None for item in found.values()))
            texts = {item.name: item.text for item in items if isinstance(item, Trouble)}
            self.assertEqual(
                {name: "no APOP secret" in text for name, text in texts.items()},
                {b"none": True, b"empty": True, b"odd": False, b"cut": False},
            )
            places = sorted(item.where for item in items)
            self.assertEqual(places, [f"{path}: record {n}" for n in range(1, 8)])

    def test_names_without_suffix(self) -> None:
        MAKERS["ndbm"](self.folder / "pop.auth", self.PAIRS.items(), ())
        MAKERS["berkeley"](self.folder / "pop.other", self.PAIRS.items(), ())
        for name in ("pop.auth", "pop.auth.dir", "pop.auth.pag", "pop.other", "pop.other.db"):
            self.assertEqual(len(self.found(read(str(self.folder / name)))), 3, name)

    def test_read_only_file_is_not_touched(self) -> None:
        path = MAKERS["gdbm"](self.folder / "auth", self.PAIRS.items(), ())
        path.chmod(0o400)
        before = (path.read_bytes(), path.stat().st_mtime_ns)
        read(str(path))
        self.assertEqual((path.read_bytes(), path.stat().st_mtime_ns), before)
        self.assertEqual(os.listdir(self.folder), ["auth"])

    def test_written_to(self) -> None:
        path = MAKERS["gdbm"](self.folder / "auth", self.PAIRS.items(), ())
        with path.open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            self.assertIn("another program writes", self.unreadable(str(path)))
        self.assertEqual(len(self.found(read(str(path)))), 3)

    def test_damaged(self) -> None:
        for kind, make in MAKERS.items():
            path = make(self.folder / kind, self.PAIRS.items(), ())
            path.write_bytes(path.read_bytes()[:5000])
            self.assertIn("damaged", self.unreadable(str(path)))
        self.assertIn("no gdbm", self.unreadable(self.file("x", b"bob:x\n"), "qpopper"))


class AuthuserTests(ReaderCase):
    def test_passwords(self) -> None:
        items = self.items(
            "authuser",
            b"# comment\n\nbob:secret  \neve@example.org:with: colon\r\n"
            b"md5:%900150983cd24fb0d6963f7d28e17f72\n"
            b"sha1:%A9993E364706816ABA3E25717850C26C9CD0D89D\n",
        )
        found = self.found(items)
        self.assertEqual(self.troubles(items), {})
        self.assertEqual(plain(found[b"bob"].password), b"secret")
        self.assertEqual(found[b"bob"].where.rpartition(":")[2], "3")
        self.assertEqual(plain(found[b"eve@example.org"].password), b"with: colon")
        self.assertEqual(
            plain(found[b"md5"].password_hash), b"{PLAIN-MD5}900150983cd24fb0d6963f7d28e17f72"
        )
        self.assertEqual(
            plain(found[b"sha1"].password_hash),
            b"{SHA.HEX}a9993e364706816aba3e25717850c26c9cd0d89d",
        )

    def test_what_cannot_be_taken(self) -> None:
        items = self.items(
            "authuser",
            b"a:?\nb:!\n@example.org:+\n@:&\nc:=\n*:?\nd:=secret\ne:%12\nf\n:x\ng:\nh:%"
            + b"g" * 32
            + b"\n",
        )
        self.assertEqual(self.found(items), {})
        self.assertEqual(sorted(self.troubles(items), key=int), [str(n) for n in range(1, 13)])

    def test_shut_out(self) -> None:
        items = self.items(
            "authuser", b"!Bob:\n!@gone.org:\n!nobody:x\nbob:secret\nx@gone.org:secret\ny:secret\n"
        )
        self.assertEqual(
            {name: item.disabled for name, item in self.found(items).items()},
            {b"bob": True, b"x@gone.org": True, b"y": False},
        )
        self.assertEqual(list(self.troubles(items)), ["3"])


class Spop3dTests(ReaderCase):
    # As pop_auth of Debian's solid-pop3d 0.15 wrote them for `abc`, `Hello World 9` and `é`.
    WRITTEN = (
        (b"9e9d9c", b"abc"),
        (b"b79a939390dfa8908d939bdfc6", b"Hello World 9"),
        (b"3c56", "é".encode()),
    )

    def test_secrets(self) -> None:
        for digits, secret in self.WRITTEN:
            path = self.file(".spop3d", b"APOPSecret " + digits + b" \n")
            [item] = read(path, name=b"bob")
            assert isinstance(item, Found)
            self.assertEqual((item.name, plain(item.apop)), (b"bob", secret))

    def test_other_maildrops(self) -> None:
        content = (
            b"MailDrop Mail/default mailbox\nAPOPSecret 9e9d9c\n"
            b"MailDrop Mail/b mailbox b\nAPOPSecret 9e9d b\nnonsense\n"
        )
        items = read(self.file("copy", content), name=b"bob")
        [item] = self.found(items).values()
        self.assertEqual(plain(item.apop), b"abc")
        self.assertEqual(item.remarks, ("MailDrop in line 1", "MailDrop in line 3"))
        self.assertEqual(sorted(self.troubles(items)), ["4", "5"])

    def test_nothing_to_take(self) -> None:
        for content in (b"MailDrop x mailbox\n", b"APOPSecret 9e9\n", b"APOPSecret zz\n"):
            items = read(self.file(".spop3d", content), name=b"bob")
            self.assertEqual([type(item) for item in items], [Trouble])

    def test_owner_names_the_account(self) -> None:
        path = self.file(".spop3d", b"APOPSecret 9e9d9c\n")
        if os.geteuid() == 0:
            self.assertIn("--name", self.unreadable(path))
            os.chown(path, 1, -1)  # `daemon` (Debian Policy 9.2.2)
        [item] = read(path)
        assert isinstance(item, Found)
        self.assertEqual(item.name, os.fsencode(pwd.getpwuid(os.stat(path).st_uid).pw_name))

    def test_others_may_not_have_written_it(self) -> None:
        path = self.file(".spop3d", b"APOPSecret 9e9d9c\n")
        os.chmod(path, 0o660)
        error = self.assertRaises(Unreadable, read, path, "auto", b"bob")
        self.assertIn("0600", str(error))

    def test_name_goes_with_no_other_format(self) -> None:
        path = self.file("authuser", b"eve:secret\n")
        error = self.assertRaises(Unreadable, read, path, "auto", b"bob")
        self.assertIn("--name", str(error))

    def test_link_is_not_followed(self) -> None:
        target = self.file("target", b"APOPSecret 9e9d9c\n")
        os.symlink(target, self.folder / ".spop3d")
        self.unreadable(str(self.folder / ".spop3d"))


class PasswdTests(ReaderCase):
    BCRYPT = b"$2y$05$bvIG6Nmid91Mu9RcmmWZfO5HJIMCT8riNW0hEp8f6/FuA2/mHZFpe"

    def test_forms(self) -> None:
        items = self.items(
            "passwd",
            b"dove:{BLF-CRYPT}" + self.BCRYPT + b":1000:1000::/home/dove::userdb_quota=1\n"
            b"clear:{plain}open sesame:::::\n"
            b"sha:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=\n"
            b"apache:$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/\n"
            b"shadow:$6$abcdefgh$" + b"x" * 86 + b":19000:0:99999:7:::\n"
            b"des:rqXexS6ZhobKA\n",
        )
        self.assertEqual(self.troubles(items), {})
        found = self.found(items)
        self.assertEqual(plain(found[b"dove"].password_hash), self.BCRYPT)
        self.assertEqual(
            found[b"dove"].remarks, ("uid 1000", "home /home/dove", "extra fields userdb_quota=1")
        )
        self.assertEqual(plain(found[b"clear"].password), b"open sesame")
        self.assertEqual(plain(found[b"sha"].password_hash), b"{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=")
        self.assertEqual(
            plain(found[b"apache"].password_hash), b"$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/"
        )
        self.assertEqual(found[b"shadow"].remarks, ())
        self.assertEqual(plain(found[b"des"].password_hash), b"rqXexS6ZhobKA")
        for item in found.values():
            self.assertEqual(item.password is None, item.name != b"clear")

    def test_never_an_open_door(self) -> None:
        lines = (
            b"empty::1000:1000::/home/empty:/bin/sh",
            b"elsewhere:x:1000:1000::/home/e:/bin/sh",
            b"locked:!$6$abcdefgh$xyz:19000:0:99999:7:::",
            b"star:*:19000:0:99999:7:::",
            b"expired:$6$abcdefgh$xyz:19000:0:99999:7::19500:",
            b"nets:{PLAIN}x::::::allow_nets=10.0.0.0/8",
            b"off:{PLAIN}x::::::nologin",
            b"unknown:{CRAM-MD5}abcdef",
            b"broken:{SHA512-CRYPT}x",
            b"dear:$6$rounds=999999999$abcdefgh$xyz",
            b"dearer:{ARGON2ID}$argon2id$v=19$m=4194304,t=9,p=1$c2FsdHNhbHQ$xyz",
            b"clear:hunter2",
            b"alone",
            b":$6$abcdefgh$xyz",
        )
        items = self.items("passwd", b"\n".join(lines), "passwd")
        self.assertEqual(self.found(items), {})
        self.assertEqual(len(self.troubles(items)), len(lines))

    def test_list(self) -> None:
        items = self.items("list", b"bob  a secret of words\n# no\neve\tx\nmallory\n", "list")
        found = self.found(items)
        self.assertEqual(plain(found[b"bob"].password), b"a secret of words")
        self.assertEqual(plain(found[b"eve"].password), b"x")
        self.assertEqual(list(self.troubles(items)), ["4"])


class AnyTests(ReaderCase):
    def test_guesses(self) -> None:
        for name, content, form in (
            ("x", b"bob $ecret\n", "list"),
            ("x", b"bob:$6$abcdefgh$xyz\n", "passwd"),
            ("x", b"bob:x:0:0:::\n", "passwd"),
            ("x", b"# c\n\nAPOPSecret 9e\n", "spop3d"),
            (".spop3d", b"\n", "spop3d"),
            ("authuser", b"bob:x\n", "authuser"),
            ("x.db", b"\0" * 100, "qpopper"),
        ):
            self.assertEqual(guess(name, content), form, content)
        for content in (b"", b"bob:secret\n", b"\x7fELF"):
            self.assertRaises(Unreadable, guess, "x", content)

    def test_files_that_are_none(self) -> None:
        self.unreadable(str(self.folder))
        self.unreadable(str(self.folder / "absent"))
        os.mkfifo(self.folder / "fifo")
        self.unreadable(str(self.folder / "fifo"))

    def test_uses(self) -> None:
        clear = Found(b"bob", "f:1", password=Secret(b"x"))
        apop = Found(b"bob", "f:1", apop=Secret(b"x"))
        hashed = Found(b"bob", "f:1", password_hash=Secret(b"$6$x$y"))
        for item in (clear, apop):
            for use, expected in (
                (Use.PASSWORD, (b"x", None)),
                (Use.APOP, (None, b"x")),
                (Use.BOTH, (b"x", b"x")),
            ):
                served = serving(item, use)
                assert isinstance(served, Found)
                self.assertEqual((plain(served.password), plain(served.apop)), expected)
            self.assertIs(serving(item, Use.AS_IS), item)
        self.assertIs(serving(hashed, Use.PASSWORD), hashed)
        self.assertIsInstance(serving(hashed, Use.BOTH), Trouble)

    def test_nothing_is_left_out_in_silence(self) -> None:
        texts = st.lists(
            st.one_of(
                st.binary(max_size=40),
                st.tuples(st.binary(max_size=10), st.binary(max_size=20)).map(b":".join),
            ),
            max_size=8,
        )

        @settings(max_examples=200, deadline=None)
        @given(texts, st.sampled_from(["authuser", "passwd", "list"]))
        def check(lines: list[bytes], form: str) -> None:
            content = b"\n".join(lines)
            items = list(FORMS[form]("f", content))
            wanted = {
                number
                for number, line in enumerate(content.split(b"\n"), 1)
                if line.strip() and not line.startswith(b"#")
            }
            said = {int(item.where.rpartition(":")[2]) for item in items}
            if form == "authuser":  # a line `!name` shows in the account that it disables
                self.assertLessEqual(said, wanted)
                shut = {n for n in wanted if content.split(b"\n")[n - 1].startswith(b"!")}
                self.assertLessEqual(wanted - shut, said)
            else:
                self.assertEqual(said, wanted)
            for item in items:
                self.assertNotIn("\n", item.where)
                if isinstance(item, Found):
                    self.assertTrue(item.password or item.password_hash or item.apop)

        check()
