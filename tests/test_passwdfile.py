"""`popdrop.accounts.passwdfile`."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from ipaddress import ip_network
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.accounts import foreign, passwdfile
from popdrop.accounts.passwdfile import PasswdFile
from popdrop.credentials import Cleartext
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    PopdropError,
    TemporaryFailure,
)
from popdrop.interfaces import IBackend
from popdrop.values import Account, Scope
from tests.test_checkpassword import REFUSED_NAMES, STRANGE_NAMES, apop
from tests.test_foreign import PUBLISHED, SETTINGS, program

HELLO = PUBLISHED[0][1].decode()  # of `Hello world!`


def sha(password: str, salt: bytes = b"") -> str:
    digest = hashlib.sha1(password.encode() + salt).digest() + salt
    return f"{{{'S' if salt else ''}SHA}}{base64.b64encode(digest).decode()}"


class FileCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = os.path.abspath(self.mktemp())
        self.said: list[str] = []
        globalLogPublisher.addObserver(self._observe)
        self.addCleanup(globalLogPublisher.removeObserver, self._observe)

    def _observe(self, event: dict[str, object]) -> None:
        if event.get("log_namespace") == passwdfile.__name__:
            self.said.append(str(event["log_format"]).format(**event))

    def write(self, text: str | bytes, mode: int = 0o600) -> None:
        Path(self.path).write_bytes(text.encode() if isinstance(text, str) else text)
        os.chmod(self.path, mode)

    def make(self, text: str | bytes | None = None, scheme: str = "crypt") -> PasswdFile:
        if text is not None:
            self.write(text)
        backend = PasswdFile("--auth passwd:x", self.path, scheme)
        verifyObject(IBackend, backend)
        return backend

    def refused(self, backend: PasswdFile, given: object, kind: type[PopdropError]) -> PopdropError:
        error = self.assertRaises(PopdropError, backend.check, given)
        self.assertIs(type(error), kind, error.detail)
        return error


class FormTests(FileCase):
    """Lines as several programs write them."""

    def test_hash_alone(self) -> None:
        backend = self.make(f"# people\n\nbob:{HELLO}\r\ncarol:{sha('x y', b'salt')}\n")
        self.assertEqual(backend.check(Cleartext(b"bob", b"Hello world!")), Account(b"bob"))
        self.assertEqual(backend.check(Cleartext(b"carol", b"x y")), Account(b"carol"))
        self.refused(backend, Cleartext(b"bob", b"x y"), BadCredentials)
        self.refused(backend, Cleartext(b"dave", b"x y"), NoSuchUser)
        self.refused(backend, Cleartext(b"# people", b"x"), NoSuchUser)
        self.assertEqual(backend.kinds, {"password"})
        self.refused(backend, apop(b"bob", b"Hello world!"), NoVerifierOfThisKind)
        self.assertEqual(self.said, [])

    def test_htpasswd(self) -> None:
        """The form of Apache's htpasswd."""
        backend = self.make(f"bob:{program('openssl', 'openssl', 'passwd', '-apr1', 'secret')}\n")
        self.assertEqual(backend.check(Cleartext(b"bob", b"secret")).name, b"bob")
        self.refused(backend, Cleartext(b"bob", b"Secret"), BadCredentials)

    def test_yescrypt_in_a_shadow_file(self) -> None:
        words = ("perl", "-e", "print crypt($ARGV[0], $ARGV[1])", "secret", SETTINGS[0].decode())
        hashed = program("perl-base", *words)
        backend = self.make(
            f"bob:{hashed}:19000:0:99999:7:::\ncarol:{hashed}:19000:0:99999:7::2:\n"
        )
        self.assertEqual(backend.check(Cleartext(b"bob", b"secret")), Account(b"bob"))
        # The account expires on 1970-01-03.
        self.assertEqual(
            backend.check(Cleartext(b"carol", b"secret")),
            Account(b"carol", scope=Scope(expires=172800)),
        )

    def test_a_day_of_many_digits(self) -> None:
        """One line that is left out, and not a file that cannot be read."""
        backend = self.make(
            f"carol:{HELLO}:1:0:9:7::{'9' * 5000}:\nbob:{HELLO}:1:0:9:7:::\n",
        )
        self.assertEqual(backend.check(Cleartext(b"bob", b"Hello world!")), Account(b"bob"))
        self.assertRaises(NoSuchUser, backend.check, Cleartext(b"carol", b"Hello world!"))

    def test_passwd(self) -> None:
        backend = self.make(f"bob:{HELLO}:1000:1001:Bob,,,:/home/bob:/bin/sh\n")
        self.assertEqual(
            backend.check(Cleartext(b"bob", b"Hello world!")),
            Account(b"bob", uid=1000, gid=1001, home="/home/bob", shell="/bin/sh"),
        )

    def test_dovecot(self) -> None:
        backend = self.make(
            f"bob:{{CRYPT}}{HELLO}:1000:1000::/home/bob::userdb_mail=maildir:~/Maildir"
            " allow_nets=192.0.2.0/24,2001:db8::/32,127.0.0.1\n"
            f"carol:{HELLO}::::::nologin\n"
        )
        bob = backend.check(Cleartext(b"bob", b"Hello world!"))
        self.assertEqual(
            bob.scope.networks,
            (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"), ip_network("127.0.0.1/32")),
        )
        self.assertEqual((bob.uid, bob.home, bob.disabled), (1000, "/home/bob", False))
        self.assertTrue(backend.check(Cleartext(b"carol", b"Hello world!")).disabled)

    def test_scheme_of_the_file(self) -> None:
        digest = hashlib.md5(b"secret").hexdigest()
        backend = self.make(f"bob:{digest}\ncarol:{sha('x')}\n", "hex_md5")
        self.assertEqual(backend.check(Cleartext(b"bob", b"secret")).name, b"bob")
        self.assertEqual(backend.check(Cleartext(b"carol", b"x")).name, b"carol")
        self.assertEqual(backend.kinds, {"password"})

    def test_plain(self) -> None:
        """Only with a word that says so; APOP works then."""
        for backend in (
            self.make("bob:tanstaaf\ncarol:{PLAIN}x y:1:2::/h\ndave:" + sha("x"), "plain"),
            self.make("bob:{CLEAR}tanstaaf\ncarol:{cleartext}x y:1:2::/h\ndave:" + sha("x")),
        ):
            self.assertEqual(backend.kinds, {"password", "apop"})
            self.assertEqual(backend.check(Cleartext(b"bob", b"tanstaaf")).name, b"bob")
            self.assertEqual(backend.check(apop(b"bob", b"tanstaaf")).name, b"bob")
            self.assertEqual(backend.check(apop(b"carol", b"x y")).home, "/h")
            self.refused(backend, apop(b"bob", b"tanstaa"), BadCredentials)
            self.refused(backend, apop(b"erin", b"tanstaaf"), NoSuchUser)
            self.refused(backend, apop(b"dave", b"x"), NoVerifierOfThisKind)
            self.refused(backend, Cleartext(b"bob", b"tanstaa"), BadCredentials)

    def test_a_bare_password_is_no_password(self) -> None:
        """Without the word, a password in clear is a damaged hash."""
        backend = self.make("bob:tanstaaf\n")
        error = self.refused(backend, Cleartext(b"bob", b"tanstaaf"), TemporaryFailure)
        self.assertNotIn("tanstaaf", error.detail)


class NoOpenDoorTests(FileCase):
    def test_locked(self) -> None:
        backend = self.make("a:\nb:*\nc:!\nd:!!\ne:*LK*\nf:!" + HELLO + "\ng:{PLAIN}\nh:{CRYPT}\n")
        for name in b"abcdefgh":
            for password in (b"", b"*", b"!", b"!!", b"x", b"Hello world!"):
                given = Cleartext(bytes([name]), password)
                self.refused(backend, given, BadCredentials)
            for secret in (b"", b"\0", b"*"):
                self.assertRaises(BadCredentials, backend.check, apop(bytes([name]), secret))

    def test_locked_in_a_plain_file(self) -> None:
        backend = self.make("a:\nb:*\nc:!x\nd:x\ne:{PLAIN}x\n", "plain")
        for name, password in ((b"a", b""), (b"b", b"*"), (b"c", b"!x"), (b"c", b"x")):
            self.refused(backend, Cleartext(name, password), BadCredentials)
            self.assertRaises(BadCredentials, backend.check, apop(name, password))
        self.refused(backend, Cleartext(b"d", b"x"), NoVerifierOfThisKind)
        self.assertEqual(backend.check(Cleartext(b"e", b"x")).name, b"e")

    def test_hash_is_elsewhere(self) -> None:
        """`x` of /etc/passwd says nothing about anybody: the next checker may be asked."""
        backend = self.make("bob:x:1000:1000::/home/bob:/bin/sh\n")
        self.refused(backend, Cleartext(b"bob", b"x"), NoVerifierOfThisKind)

    def test_bad_lines(self) -> None:
        """Named with their number, once for each version of the file, without what they hold."""
        bad = (
            "nonsense\n"
            f"good:{HELLO}\n"
            f"../x:{HELLO}\n"
            f":{HELLO}\n"
            f"uid:{HELLO}:root:0\n"
            f"home:{HELLO}:1:1::relative\n"
            f"nets:{HELLO}::::::allow_nets=everywhere\n"
            f"good:{sha('other')}\n"
        )
        backend = self.make(bad)
        numbers = [said.partition("line ")[2].partition(":")[0] for said in self.said]
        self.assertEqual(numbers, ["1", "3", "4", "5", "6", "7", "8"])
        self.assertNotIn(HELLO, "".join(self.said))
        self.assertNotIn("nonsense", "".join(self.said))
        for name in (b"../x", b"", b"uid", b"home", b"nets", b"nonsense"):
            self.refused(backend, Cleartext(name, b"Hello world!"), NoSuchUser)
        self.assertEqual(backend.check(Cleartext(b"good", b"Hello world!")).name, b"good")
        self.refused(backend, Cleartext(b"good", b"other"), BadCredentials)
        self.assertEqual(len(self.said), 7)

    def test_many_bad_lines(self) -> None:
        self.make("nonsense\n" * 500)
        self.assertEqual(len(self.said), 21)

    def test_names(self) -> None:
        """Rows 19-21, 23, 24, 31: strange names are names, others are nobody's."""
        lines = [name + b":" + HELLO.encode() for name in STRANGE_NAMES if b":" not in name]
        backend = self.make(b"\n".join(lines))
        for name in STRANGE_NAMES:
            given = Cleartext(name, b"Hello world!")
            if b":" in name:
                self.refused(backend, given, NoSuchUser)
            else:
                self.assertEqual(backend.check(given).name, name)
        for name in REFUSED_NAMES:
            self.assertRaises(NoSuchUser, backend.check, Cleartext(name, b"Hello world!"))

    def test_passwords(self) -> None:
        backend = self.make(f"bob:{HELLO}\n")
        for password in (b"", b"Hello world!\0", b"Hello world!\n", b"%n%s", b"x" * 1_000_000):
            self.refused(backend, Cleartext(b"bob", password), BadCredentials)

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(st.binary(max_size=200), st.sampled_from([b"", b"x", b"*", b"!", b"\0", b":"]))
    def test_any_file(self, octets: bytes, password: bytes) -> None:
        """Whatever is in it: nobody gets in by these, unless it says `{PLAIN}`."""
        if b"{" in octets:
            return
        backend = self.make(octets)
        for line in octets.split(b"\n"):
            given = Cleartext(line.partition(b":")[0], password)
            self.assertRaises(PopdropError, backend.check, given)


class ChangeTests(FileCase):
    def test_read_anew(self) -> None:
        backend = self.make(f"bob:{HELLO}\n")
        self.write(f"bob:{sha('new')}\ncarol:{HELLO}\n")
        self.assertEqual(backend.check(Cleartext(b"bob", b"new")).name, b"bob")
        self.refused(backend, Cleartext(b"bob", b"Hello world!"), BadCredentials)
        self.assertEqual(backend.check(Cleartext(b"carol", b"Hello world!")).name, b"carol")
        Path(self.path + ".new").write_text(f"carol:{HELLO}\n")
        os.rename(self.path + ".new", self.path)
        os.chmod(self.path, 0o600)
        self.refused(backend, Cleartext(b"bob", b"new"), NoSuchUser)

    def test_two_changes_that_look_the_same(self) -> None:
        """Same size, same times: file systems count in milliseconds, some in seconds."""
        backend = self.make(f"bob:{sha('one')}\n")
        before = os.stat(self.path)
        self.write(f"bob:{sha('two')}\n")
        os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.assertEqual(backend.check(Cleartext(b"bob", b"two")).name, b"bob")

    def test_not_read_again_for_nothing(self) -> None:
        backend = self.make(f"bob:{HELLO}\n")
        self.patch(time, "time", lambda: os.stat(self.path).st_ctime + 60)
        backend.check(Cleartext(b"bob", b"Hello world!"))

        def refuse(*args: object) -> int:
            raise AssertionError("opened")

        self.patch(os, "open", refuse)
        backend.check(Cleartext(b"bob", b"Hello world!"))

    def test_gone(self) -> None:
        backend = self.make(f"bob:{HELLO}\n")
        os.unlink(self.path)
        given = Cleartext(b"bob", b"Hello world!")
        error = self.refused(backend, given, TemporaryFailure)
        self.assertEqual(error.text, "Accounts cannot be read now, try again later.")
        self.write(f"bob:{HELLO}\n")
        self.assertEqual(backend.check(given).name, b"bob")

    def test_empty(self) -> None:
        backend = self.make("")
        self.refused(backend, Cleartext(b"bob", b"x"), NoSuchUser)


class ModeTests(FileCase):
    def test_anybody_may_write(self) -> None:
        self.write(f"bob:{HELLO}\n", 0o602)
        error = self.assertRaises(ConfigError, self.make)
        self.assertIn(f"chmod o-w {self.path}", str(error))

    def test_anybody_may_read_hashes(self) -> None:
        """As /etc/passwd was once: a warning."""
        self.write(f"bob:{HELLO}\n", 0o644)
        self.make()
        (said,) = self.said
        self.assertIn(f"chmod o-r {self.path}", said)

    def test_anybody_may_read_passwords(self) -> None:
        self.write("bob:{PLAIN}secret\n", 0o644)
        error = self.assertRaises(ConfigError, self.make)
        self.assertIn(f"chmod 600 {self.path}", str(error))

    def test_mode_changes_while_running(self) -> None:
        backend = self.make("bob:{PLAIN}secret\n")
        given = Cleartext(b"bob", b"secret")
        backend.check(given)
        os.chmod(self.path, 0o644)
        self.refused(backend, given, TemporaryFailure)
        os.chmod(self.path, 0o602)
        self.refused(backend, given, TemporaryFailure)
        os.chmod(self.path, 0o600)
        self.assertEqual(backend.check(given).name, b"bob")

    def test_no_file(self) -> None:
        self.assertRaises(ConfigError, self.make)
        os.mkfifo(self.path)
        self.assertIn("not a regular file", str(self.assertRaises(ConfigError, self.make)))
        os.unlink(self.path)
        os.mkdir(self.path)
        self.assertRaises(ConfigError, self.make)


class CostTests(FileCase):
    """An unknown user costs what a known one does."""

    def test_decoy(self) -> None:
        asked: list[bytes] = []
        real = foreign.verify

        def watch(hashed: bytes, password: bytes, user: bytes = b"") -> bool:
            asked.append(hashed)
            return real(hashed, password, user)

        self.patch(foreign, "verify", watch)
        rare = sha("rare", b"salt")
        backend = self.make(f"rare:{rare}\nbob:{HELLO}\ncarol:{HELLO}\nlocked:*\n")
        for name, kind in ((b"nobody", NoSuchUser), (b"locked", BadCredentials)):
            self.refused(backend, Cleartext(name, b"Hello world!"), kind)
            self.assertEqual(asked.pop(), HELLO.encode())
        self.refused(backend, Cleartext(b"../x", b"Hello world!"), NoSuchUser)
        backend.check(Cleartext(b"rare", b"rare"))
        self.assertEqual(asked.pop(), rare.encode())

    def test_damaged_decoy(self) -> None:
        """Somebody else's damage is not told to strangers."""
        backend = self.make("bob:$6$salt$cut\n")
        self.refused(backend, Cleartext(b"nobody", b"x"), NoSuchUser)
        self.refused(backend, Cleartext(b"bob", b"x"), TemporaryFailure)
