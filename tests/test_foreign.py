"""`popdrop.accounts.foreign`: hashes that other programs made."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import subprocess
import sys
from unittest import SkipTest

from hypothesis import given, settings
from hypothesis import strategies as st
from passlib import registry
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts import foreign
from popdrop.errors import TemporaryFailure
from tests.end_to_end.harness import DEADLINE, ROOT

PUBLISHED = (
    # U. Drepper, "Unix crypt using SHA-256 and SHA-512", test vectors.
    (b"Hello world!", b"$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5"),
    (
        b"Hello world!",
        b"$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCo"
        b"EOfaS35inz1",
    ),
    # The PHP manual's page of crypt().
    (b"rasmuslerdorf", b"rl.3StKT.4T8M"),
    (b"rasmuslerdorf", b"_J9..rasmBYk8r9AiWNc"),
    (b"rasmuslerdorf", b"$1$rasmusle$rISCgZzpwk3UhDidwXvin0"),
    (b"rasmuslerdorf", b"$2a$07$usesomesillystringfore2uDLvp1Ii2e./U9C8sBjqp8I90dH6hi"),
)
SETTINGS = (b"$y$j9T$F5Jx5fExrKuPp53xLKQ..1", b"$gy$j9T$F5Jx5fExrKuPp53xLKQ..1", b"$7$CU..../....x")


def program(package: str, *words: str) -> str:
    """What a program prints, without the line end."""
    if shutil.which(words[0]) is None:
        raise SkipTest(f"needs the Debian package {package}")
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=DEADLINE)
    return done.stdout.strip()


class VerifyCase(SynchronousTestCase):
    def good(self, hashed: bytes | str, password: bytes = b"secret", user: bytes = b"bob") -> None:
        """That password matches; those close to it do not."""
        octets = hashed.encode() if isinstance(hashed, str) else hashed
        self.assertTrue(foreign.verify(octets, password, user), octets)
        # DES looks at eight octets only.
        for other in (
            password[:5] + b"?" + password[6:],
            b"?" + password[1:],
            b"",
            password + b"\0",
        ):
            self.assertFalse(foreign.verify(octets, other, user), octets)

    def damaged(self, hashed: bytes, password: bytes = b"secret") -> TemporaryFailure:
        error = self.assertRaises(TemporaryFailure, foreign.verify, hashed, password)
        self.assertEqual(error.text, "Account cannot be verified.")
        return error


class LimitTests(VerifyCase):
    """A hash brings its own cost: bounded, whoever wrote it."""

    TOO_MUCH = (
        b"$6$rounds=999999999$saltstring$x",
        b"{SHA512-CRYPT}$6$rounds=999999999$saltstring$x",
        b"$5$rounds=10000001$saltstring$x",
        b"$md5,rounds=4294967295$x$x",
        b"$2b$31$usesomesillystringfore2uDLvp1Ii2e./U9C8sBjqp8I90dH6hi",
        b"{BLF-CRYPT}$2y$17$usesomesillystringfore2uDLvp1Ii2e./U9C8sBjqp8I90dH6hi",
        b"$bcrypt-sha256$v=2,t=2b,r=31$n79VH.0Q2TMWmt3Oqt9uku$Kq4Noyk3094Y2QlB8NdRT8SvGiI4ft2",
        b"$argon2id$v=19$m=4194304,t=1,p=1$c2FsdHNhbHQ$x",
        b"{ARGON2ID}$argon2id$v=19$m=65536,t=4294967295,p=1$c2FsdHNhbHQ$x",
        b"$scrypt$ln=31,r=8,p=1$c2FsdHNhbHQ$x",
        b"$scrypt$ln=16,r=8,p=1000$c2FsdHNhbHQ$x",
        b"$y$jZT$F5Jx5fExrKuPp53xLKQ..1$x",
        b"$7$LU..../....x$x",
        b"$pbkdf2-sha256$2000000000$c2FsdHNhbHQ$x",
        b"{PBKDF2}$1$salt$2000000000$00",
        b"{PBKDF2}$1$salt$" + b"9" * 5000 + b"$00",
        b"{SCRAM-SHA-256}2000000000,c2FsdA==,AA==,AA==",
        b"pbkdf2_sha256$2000000000$salt$x",
        b"$p5k2$77359400$salt$x",
        b"grub.pbkdf2.sha512.2000000000.00.00",
        b"{PBKDF2-SHA256}2000000000$c2FsdHNhbHQ$x",
        b"$sha1$2000000000$salt$x",
    )
    FAIR = (
        b"$6$rounds=656000$saltstring$x",
        b"$6$9999999999$x",
        b"$1$99999999$x",
        b"$2b$14$x",
        b"$argon2id$v=19$m=1048576,t=4,p=4$c2FsdHNhbHQ$x",
        b"$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$x",
        b"$scrypt$ln=16,r=8,p=1$c2FsdHNhbHQ$x",
        b"$y$jFT$F5Jx5fExrKuPp53xLKQ..1$x",
        b"$7$GU..../....x$x",
        b"$pbkdf2-sha512$600000$c2FsdHNhbHQ$x",
        b"{PBKDF2}$1$salt$1000000$00",
        b"{SCRAM-SHA-256}4096,c2FsdA==,AA==,AA==",
        b"{PLAIN}$6$rounds=999999999$saltstring$x",
    )

    def test_too_much(self) -> None:
        for hashed in self.TOO_MUCH:
            self.assertTrue(foreign.is_too_costly(hashed.decode()), hashed[:60])
            self.assertIn("costs too much", self.damaged(hashed).detail)

    def test_fair(self) -> None:
        for hashed in self.FAIR[:-1]:
            self.assertFalse(foreign.is_too_costly(hashed.decode()), hashed)
        self.assertTrue(foreign.verify(self.FAIR[-1], self.FAIR[-1].removeprefix(b"{PLAIN}")))


class SchemeTests(VerifyCase):
    def test_published(self) -> None:
        for password, hashed in PUBLISHED:
            self.good(hashed, password)
            self.good(b"{CRYPT}" + hashed, password)

    def test_openssl(self) -> None:
        for method in ("-1", "-apr1", "-5", "-6"):
            self.good(program("openssl", "openssl", "passwd", method, "secret"))

    def test_yescrypt(self) -> None:
        """Made by Perl's crypt()."""
        for setting in SETTINGS:
            words = ("perl", "-e", "print crypt($ARGV[0], $ARGV[1])", "secret", setting.decode())
            hashed = program("perl-base", *words)
            self.assertTrue(hashed.encode().startswith(setting))
            self.good(hashed)

    def test_without_the_library(self) -> None:
        """By crypt-r, or by Python's own crypt: the slower way, where there is no libxcrypt."""
        made = foreign._by_module()(b"rasmuslerdorf", b"$1$rasmusle$")
        if made is None:
            self.assertGreaterEqual(sys.version_info, (3, 13))
            return
        for password, hashed in PUBLISHED:
            self.assertEqual(foreign._by_module()(password, hashed), hashed)
        self.assertIsNone(foreign._by_module()(b"\xff", b"$1$rasmusle$"))

    def test_by_libpass_alone(self) -> None:
        """Where there is no crypt(3) at all, what libpass computes itself still works."""
        self.patch(foreign, "_library", lambda: lambda password, setting: None)
        for password, hashed in PUBLISHED[:-1]:
            self.good(hashed, password)
        error = self.damaged(SETTINGS[0] + b"$" + b"x" * 43)
        self.assertIn("pip install 'popdrop[crypt]'", error.detail)

    def test_digests(self) -> None:
        for name, algorithm in foreign._DIGESTS.items():
            salt = b"salt" if name in foreign._SALTED else b""
            digest = hashlib.new(algorithm, b"secret" + salt).digest() + salt
            hashed = base64.b64encode(digest)
            self.good(b"{%s}%s" % (name.encode(), hashed))
            self.good(b"{%s.b64}%s" % (name.lower().encode(), hashed))
            if not salt:
                self.good(b"{%s.HEX}%s" % (name.encode(), digest.hex().encode()))
                self.good(b"{%s}%s" % (name.encode(), digest.hex().upper().encode()))

    def test_dovecot(self) -> None:
        made = hashlib.pbkdf2_hmac("sha1", b"secret", b"0123456789abcdef", 5000).hex()
        self.good(f"{{PBKDF2}}$1$0123456789abcdef$5000${made}")
        for name in ("SHA-1", "SHA-256"):
            algorithm = name.replace("-", "").lower()
            salted = hashlib.pbkdf2_hmac(algorithm, b"secret", b"salt", 4096)
            stored = hashlib.new(algorithm, hmac.digest(salted, b"Client Key", algorithm)).digest()
            text = base64.b64encode(stored).decode()
            self.good(f"{{SCRAM-{name}}}4096,c2FsdA==,{text},{text}")
        self.good(b"{BLF-CRYPT}" + PUBLISHED[-1][1], b"rasmuslerdorf")
        self.good(b"{MD5}" + PUBLISHED[-2][1], b"rasmuslerdorf")

    def test_everything_that_libpass_makes(self) -> None:
        seen = 0
        for name in registry.list_crypt_handlers():
            handler = registry.get_crypt_handler(name)
            if name in foreign._NO_HASH or name == "htdigest":
                continue
            user = {"user": "bob"} if "user" in handler.context_kwds else {}
            if "rounds" in handler.setting_kwds:
                handler = handler.using(rounds=max(handler.min_rounds, 3))
            try:
                made = handler.hash("Secret9", **user)
            except Exception as error:
                self.assertEqual(type(error).__name__, "MissingBackendError", name)
                continue
            seen += 1
            text = f"{{{name}}}{made}" if name in foreign._ASK_BY_NAME else made
            self.assertTrue(foreign.verify(text.encode(), b"Secret9", b"bob"), name)
            self.assertFalse(foreign.verify(text.encode(), b"?ecret9", b"bob"), name)
        self.assertGreater(seen, 60)

    def test_plain(self) -> None:
        for name in ("PLAIN", "CLEARTEXT", "CLEAR", "plain"):
            self.good(f"{{{name}}}pa:}}ss".encode(), b"pa:}ss")
            self.assertEqual(foreign.plain(f"{{{name}}}pa:}}ss".encode()), b"pa:}ss")
        self.good("{PLAIN}pässword", "pässword".encode())
        self.assertFalse(foreign.verify(b"{PLAIN}", b""))
        self.assertFalse(foreign.verify(b"{PLAIN}", b"x"))
        self.assertIsNone(foreign.plain(b"plain"))
        self.assertIsNone(foreign.plain(b"{SHA}x"))

    def test_known(self) -> None:
        for name in (
            "PLAIN",
            "sha512-crypt",
            "SSHA",
            "Scram-SHA-256",
            "PBKDF2",
            "nthash",
            "mysql41",
        ):
            self.assertTrue(foreign.known(name), name)
        for name in ("", "rot13", "plaintext", "unix_disabled", "ldap_plaintext", "unix_fallback"):
            self.assertFalse(foreign.known(name), name)


class RefusalTests(VerifyCase):
    def test_locked(self) -> None:
        for hashed in (b"", b"*", b"!", b"!!", b"!" + PUBLISHED[0][1], b"*LK*", b"x"):
            for password in (b"", hashed, b"Hello world!", b"x"):
                self.assertFalse(foreign.verify(hashed, password), hashed)

    def test_locked_behind_a_scheme(self) -> None:
        for hashed in (b"{CRYPT}", b"{CRYPT}*", b"{CRYPT}!", b"{CRYPT}x", b"{CRYPT}*0"):
            for password in (b"", b"*", b"*0", b"x"):
                self.assertFalse(foreign.verify(hashed, password), hashed)

    def test_password(self) -> None:
        """NUL ends a password for crypt(3), so nothing with one matches; nor what is too long."""
        password, hashed = PUBLISHED[0]
        for other in (password + b"\0", password + b"\0x", b"\0", b"\0" + password, b""):
            self.assertFalse(foreign.verify(hashed, other))
        for size in (foreign.LONGEST, foreign.LONGEST + 1, 1_000_000):
            self.assertFalse(foreign.verify(hashed, b"x" * size))
        self.assertTrue(foreign.verify(b"{PLAIN}" + b"x" * foreign.LONGEST, b"x" * foreign.LONGEST))

    def test_strange_passwords(self) -> None:
        """Octets are octets (rows 20, 21, 23, 32)."""
        for password in (
            b"%n%s",
            b"${HOME}",
            b"a\tb",
            b"a\nb\rc",
            b"a:b",
            b"() { :;};",
            b"\xff\xfe",
        ):
            digest = base64.b64encode(hashlib.sha1(password).digest())
            self.good(b"{SHA}" + digest, password)
            self.assertFalse(foreign.verify(PUBLISHED[0][1], password))

    def test_damaged(self) -> None:
        for hashed in (
            b"$6$saltstring$svn8",
            b"$5$",
            b"$1$",
            b"$",
            b"$y$j9T$x$x",
            b"$argon2id$v=19$m=1",
            b"{SHA}",
            b"{SHA}x",
            b"{SSHA}" + base64.b64encode(hashlib.sha1(b"secret").digest()),
            b"{SHA}" + base64.b64encode(hashlib.sha1(b"secret").digest() + b"salt"),
            b"{PBKDF2}$1$x$y$z",
            b"{PBKDF2}$1$x$99999999999999999999$00",
            b"{SCRAM-SHA-1}x,y,z,w",
            b"{SCRAM-SHA-1}0,c2FsdA==,,",
            b"{NTHASH}",
            b"{nonsense}x",
            b"{}x",
            b"secret",
            b"\xff",
            b"{PLAIN}\xff",
            b"{plaintext}secret",
            b"{unix_disabled}secret",
        ):
            error = self.damaged(hashed)
            self.assertNotIn("svn8", error.detail)
            self.damaged(hashed, b"")  # damage shows whatever the password is

    def test_unknown_scheme_is_named(self) -> None:
        self.assertIn("unknown password scheme {nonsense}", self.damaged(b"{nonsense}x").detail)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                lambda head, rest: head + rest,
                st.sampled_from(
                    [
                        b"$1$",
                        b"$5$",
                        b"$apr1$",
                        b"$P$",
                        b"{SHA}",
                        b"{SSHA}",
                        b"{CRYPT}",
                        b"{NTHASH}",
                    ]
                    + [
                        b"{SCRAM-SHA-1}",
                        b"{PBKDF2}$1$",
                        b"$pbkdf2$",
                        b"$y$",
                        b"$argon2id$",
                        b"{MD5}",
                    ]
                ),
                st.binary(max_size=30),
            ),
        ).filter(lambda hashed: b"$" not in hashed[3:] or hashed.count(b"$") < 6),
        st.binary(min_size=1, max_size=20),
    )
    def test_nothing_else_is_raised(self, hashed: bytes, password: bytes) -> None:
        try:
            matches = foreign.verify(hashed, password)
        except TemporaryFailure:
            return
        self.assertFalse(matches and foreign.plain(hashed) != password)


class CostTests(SynchronousTestCase):
    def test_same_for_the_same_scheme_and_numbers(self) -> None:
        for one, other in (
            (PUBLISHED[0][1], b"$5$othersalt$" + b"x" * 43),
            (b"$6$rounds=656000$a.b$x", b"$6$rounds=656000$c$y"),
            (b"$2y$10$" + b"a" * 53, b"$2y$10$" + b"b" * 53),
            (b"$y$j9T$abc$def", b"$y$j9T$xyz$uvw"),
            (b"$argon2id$v=19$m=65536,t=3,p=4$abc$def", b"$argon2id$v=19$m=65536,t=3,p=4$x$y"),
            (b"rl.3StKT.4T8M", b"xx.3StKT.4T8M"),
            (b"{SSHA}abc", b"{SSHA}def"),
            (b"{PLAIN}a", b"{clear}b$c$d"),
            (b"{PBKDF2-SHA256}29000$abcd.e$fg", b"{PBKDF2-SHA256}29000$hijkl$mn"),
        ):
            self.assertEqual(foreign.cost_of(one), foreign.cost_of(other))

    def test_another_for_others(self) -> None:
        texts = (
            b"$5$salt$x $5$rounds=1000$salt$x $5$rounds=2000$salt$x $6$salt$x $2y$10$x $2y$12$x"
            b" $y$j9T$a$b $y$j8T$a$b {SSHA}x {SHA}x {PLAIN}x rl.3StKT.4T8M"
            b" {PBKDF2}1$a$b {PBKDF2}2$a$b"
        ).split()
        self.assertEqual(len(set(map(foreign.cost_of, texts))), len(texts))


class ImportTests(SynchronousTestCase):
    def test_libpass_is_not_needed_for_crypt(self) -> None:
        """It is imported for the first hash that crypt(3) does not know."""
        code = (
            "import sys\nfrom popdrop.accounts import foreign, passwdfile\n"
            f"assert foreign.verify({PUBLISHED[0][1]!r}, b'Hello world!')\n"
            "print('passlib' in sys.modules)\n"
            "foreign.verify(b'{NTHASH}' + b'0' * 32, b'x')\nprint('passlib' in sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        self.assertEqual(done.stdout.split(), ["False", "True"], done.stderr)
