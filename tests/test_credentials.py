"""Credentials, names and SASLprep."""

import copy
import hashlib
import pickle

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.credentials import (
    PREPARED_OCTETS,
    ApopCredentials,
    Cleartext,
    acceptable_name,
    prepared,
    prepared_or_raw,
)
from popdrop.errors import BadCredentials

# The example of RFC 1939 section 7.
CHALLENGE = b"<1896.697170952@dbc.mtview.ca.us>"
SECRET = b"tanstaaf"
DIGEST = b"c4c9334bac560ecc979e58001b3e22fb"


class ApopTests(SynchronousTestCase):
    def test_interface(self) -> None:
        verifyObject(IUsernameHashedPassword, ApopCredentials(b"mrose", CHALLENGE, DIGEST))

    def test_example_of_rfc_1939(self) -> None:
        shown = ApopCredentials(b"mrose", CHALLENGE, DIGEST)
        self.assertTrue(shown.checkPassword(SECRET))
        self.assertFalse(shown.checkPassword(b"tanstaag"))
        self.assertFalse(shown.checkPassword(b""))

    def test_digest_in_any_case(self) -> None:
        self.assertTrue(ApopCredentials(b"m", CHALLENGE, DIGEST.upper()).checkPassword(SECRET))

    def test_another_challenge(self) -> None:
        self.assertFalse(ApopCredentials(b"m", b"<1@b>", DIGEST).checkPassword(SECRET))

    def test_digest_of_wrong_form(self) -> None:
        for digest in (b"", DIGEST[:-1], DIGEST + b"0", b"\xff" * 32, DIGEST + b"\0"):
            self.assertFalse(ApopCredentials(b"m", CHALLENGE, digest).checkPassword(SECRET))

    def test_never_printable(self) -> None:
        shown = ApopCredentials(b"mrose", CHALLENGE, DIGEST)
        for text in (repr(shown), str(shown), f"{shown}", repr([shown])):
            self.assertNotIn(DIGEST.decode(), text)
            self.assertNotIn("mrose", text)
        self.assertRaises(TypeError, pickle.dumps, shown)
        self.assertRaises(TypeError, copy.copy, shown)
        self.assertRaises(TypeError, vars, shown)

    def test_foreign_checkers_see_all_parts(self) -> None:
        shown = ApopCredentials(b"mrose", CHALLENGE, DIGEST)
        self.assertEqual(
            (shown.username, shown.challenge, shown.digest), (b"mrose", CHALLENGE, DIGEST)
        )

    @given(st.binary(), st.binary())
    @settings(deadline=None, derandomize=True)
    def test_md5_of_challenge_and_secret(self, challenge: bytes, secret: bytes) -> None:
        digest = hashlib.md5(challenge + secret).hexdigest().encode()
        self.assertTrue(ApopCredentials(b"m", challenge, digest).checkPassword(secret))
        self.assertFalse(ApopCredentials(b"m", challenge, digest).checkPassword(secret + b"x"))


class CleartextTests(SynchronousTestCase):
    def test_interface(self) -> None:
        verifyObject(IUsernamePassword, Cleartext(b"bob", b"hunter2"))

    def test_check_password(self) -> None:
        shown = Cleartext(b"bob", b"hunter2", "PLAIN")
        self.assertTrue(shown.checkPassword(b"hunter2"))
        self.assertFalse(shown.checkPassword(b"hunter"))
        self.assertEqual(shown.mechanism, "PLAIN")
        self.assertEqual(shown.password, b"hunter2")

    def test_never_printable(self) -> None:
        shown = Cleartext(b"bob", b"hunter2")
        for text in (repr(shown), str(shown), f"{shown}", repr({1: shown})):
            self.assertNotIn("hunter2", text)
            self.assertNotIn("bob", text)
        self.assertRaises(TypeError, pickle.dumps, shown)
        self.assertRaises(TypeError, vars, shown)


class ProofTests(SynchronousTestCase):
    def test_same_again_for_the_same_again(self) -> None:
        first = Cleartext(b"bob", b"hunter2", "USER").proof(b"key")
        self.assertEqual(first, Cleartext(b"bob", b"hunter2", "PLAIN").proof(b"key"))
        self.assertEqual(len(first), 32)
        self.assertNotIn(b"hunter2", first)

    def test_each_part_counts(self) -> None:
        proofs = {
            Cleartext(b"bob", b"hunter2").proof(b"key"),
            Cleartext(b"bob", b"hunter3").proof(b"key"),
            Cleartext(b"eve", b"hunter2").proof(b"key"),
            Cleartext(b"bob", b"hunter2").proof(b"another"),
            Cleartext(b"bobh", b"unter2").proof(b"key"),
            ApopCredentials(b"bob", CHALLENGE, DIGEST).proof(b"key"),
            ApopCredentials(b"eve", CHALLENGE, DIGEST).proof(b"key"),
        }
        self.assertEqual(len(proofs), 7)

    def test_case_of_a_digest_does_not_count(self) -> None:
        self.assertEqual(
            ApopCredentials(b"bob", CHALLENGE, DIGEST).proof(b"key"),
            ApopCredentials(b"bob", CHALLENGE, DIGEST.upper()).proof(b"key"),
        )


class NameTests(SynchronousTestCase):
    def test_accepted(self) -> None:
        for name in (
            b"bob", b"Bob", b"bob@example.org", b"user+recent", b"a.b-c_d", b"x" * 64, b"7",
            "jos\u00e9".encode(), b"two words", b"bob.lockwood", b"popdrop", b"lock", b"%{x}",
        ):  # fmt: skip
            self.assertTrue(acceptable_name(name), name)

    def test_refused(self) -> None:
        for name in (
            b"", b".", b"..", b"...", b".bob", b"-bob", b"-", b"../x", b"a/b", b"/", b"x" * 65,
            b"bob.", b"bob.lock", b"bob.LOCK", b"bob.Pop", b"bob.popdrop", b"bob.pOpDrOp",
            b"bob\0", b"b\tob", b"bob\r", b"bob\n", b"\x1b[2J", b"\x7f", b"\xff\xfe", b"b\xe9b",
            "a\u0085b".encode(), "a\u202eb".encode(), "a\u2028b".encode(), b"\xed\xa0\x80",
        ):  # fmt: skip
            self.assertFalse(acceptable_name(name), name)

    @given(st.one_of(st.binary(max_size=70), st.text(max_size=70).map(lambda t: t.encode("utf-8"))))
    @example(b"a\0")
    @settings(deadline=None, derandomize=True, max_examples=500)
    def test_nothing_accepted_leaves_a_folder_or_a_line(self, name: bytes) -> None:
        if acceptable_name(name):
            text = name.decode("utf-8")
            self.assertEqual(text.splitlines(), [text])
            self.assertNotIn("/", text)
            self.assertFalse(set(name) & {*range(32), 127})
            self.assertNotIn(text[0], ".-")
            self.assertTrue(len(name) <= 64)


class PreparedTests(SynchronousTestCase):
    def test_examples_of_rfc_4013(self) -> None:
        for given_, expected in (
            ("I\u00adX", "IX"), ("user", "user"), ("USER", "USER"), ("\u00aa", "a"),
            ("\u2168", "IX"),
        ):  # fmt: skip
            self.assertEqual(prepared(given_.encode()), expected.encode())

    def test_prohibited(self) -> None:
        for text in (b"\x07", b"a\tb", b"a\0b", b"\x7f", b"\xff", b"caf\xe9", b"a\r\nb"):
            self.assertRaises(BadCredentials, prepared, text)
        for character in ("\u0627\u0031", "\u200e", "\ue000", "\u0085", "\U0001f600"):
            self.assertRaises(BadCredentials, prepared, character.encode())

    def test_nothing_left(self) -> None:
        self.assertRaises(BadCredentials, prepared, "\u00ad".encode())

    def test_combining_and_composed_are_the_same(self) -> None:
        self.assertEqual(prepared("e\u0301".encode()), "\u00e9".encode())

    def test_what_is_too_long_is_not_looked_at(self) -> None:
        """9 KiB of U+FDFA took 95 ms, in the reactor where they were a password."""
        longest = "\u00e9" * (PREPARED_OCTETS // 2)
        self.assertEqual(prepared(longest.encode()), longest.encode())
        long = (longest + "\ufdfa").encode()
        self.assertRaises(BadCredentials, prepared, long)
        self.assertEqual(prepared_or_raw(long), long)
        self.assertEqual(prepared(b"a" * 9000), b"a" * 9000)

    def test_failure_does_not_quote(self) -> None:
        failure = self.assertRaises(BadCredentials, prepared, b"hunter2\x07")
        self.assertIsNone(failure.__context__)
        self.assertNotIn("hunter2", repr(failure) + str(failure) + failure.detail)

    @given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
    @settings(deadline=None, derandomize=True)
    def test_printable_ascii_stays(self, text: str) -> None:
        if text:
            self.assertEqual(prepared(text.encode()), text.encode())

    @given(st.binary())
    @settings(deadline=None, derandomize=True)
    def test_once_is_enough(self, text: bytes) -> None:
        try:
            once = prepared(text)
        except BadCredentials:
            return
        self.assertEqual(prepared(once), once)
