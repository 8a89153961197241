"""`popdrop.sasl`: the exchanges, on values alone."""

from __future__ import annotations

import hashlib
import hmac
import pickle
from base64 import b64decode, b64encode
from functools import lru_cache

from hypothesis import example, given, settings
from hypothesis import strategies as st
from scramp import ScramException
from twisted.cred.credentials import IUsernameHashedPassword
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.credentials import (
    FAILED,
    BearerToken,
    Cleartext,
    CramCredentials,
    ExternalCredentials,
    ScramCredentials,
)
from popdrop.errors import BadCredentials
from popdrop.interfaces import IBearerToken, IExternal, IScramCredentials
from popdrop.sasl import MECHANISMS, Exchange, ScramQuery, Step, Surroundings
from popdrop.values import PeerFacts, ScramVerifier, Secret
from tests.scram import ALGORITHMS, ALL, Client, verifier

BINDINGS = {"tls-exporter": b"E" * 32, "tls-server-end-point": b"P" * 32}
UNBOUND = [name for name in ALL if not name.endswith("-PLUS")]
BOUND = [name for name in ALL if name.endswith("-PLUS")]


def exchange(
    mechanism: str,
    nonce: bytes = b"0123456789abcdef" * 2,
    bindings: dict[str, bytes] | None = None,
    certificate: str | None = None,
    plus: bool = False,
) -> Exchange:
    peer = PeerFacts(bindings=bindings or {}, certificate_name=certificate)
    around = Surroundings(lambda: nonce, "mail.example.org", peer, plus)
    return MECHANISMS[mechanism.encode()](mechanism, around)


def algorithm_of(mechanism: str) -> str:
    return mechanism.removeprefix("SCRAM-").removesuffix("-PLUS")


class Case(SynchronousTestCase):
    def refused(self, run: Exchange, response: bytes | None) -> BadCredentials:
        with self.assertRaises(BadCredentials) as caught:
            run.step(response)
        self.assertEqual(caught.exception.text, FAILED)
        return caught.exception

    def octets(self, step: Step) -> bytes:
        assert isinstance(step, bytes), step
        return step


class PlainLoginTests(Case):
    def test_plain(self) -> None:
        run = exchange("PLAIN")
        self.assertEqual(run.step(None), b"")
        shown = run.step(b"bob\0bob\0 p w ")
        assert isinstance(shown, Cleartext)
        self.assertEqual((shown.username, shown.password), (b"bob", b" p w "))

    def test_plain_refused(self) -> None:
        for response in (
            b"",
            b"\0",
            b"\0\0",
            b"\0bob\0",
            b"\0\0x",
            b"bob\0x",
            b"\0bob\0x\0",
            b"\0bob\0x\0y",
            b"alice\0bob\0x",
            b"\0bob\0\0x",
        ):
            self.refused(exchange("PLAIN"), response)

    def test_login(self) -> None:
        for initial in (False, True):
            run = exchange("LOGIN")
            if not initial:
                self.assertEqual(run.step(None), b"Username:")
            self.assertEqual(run.step(b"bob"), b"Password:")
            shown = run.step(b" p w ")
            assert isinstance(shown, Cleartext)
            self.assertEqual(
                (shown.username, shown.password, shown.mechanism), (b"bob", b" p w ", "LOGIN")
            )

    def test_login_refused(self) -> None:
        for name, password in ((b"", None), (b"b\0b", None), (b"bob", b""), (b"bob", b"x\0y")):
            run = exchange("LOGIN")
            if password is not None:
                run.step(name)
            self.refused(run, name if password is None else password)


class CramTests(Case):
    def test_example_of_rfc_2195(self) -> None:
        """Section 2."""
        challenge = b"<1896.697170952@postoffice.reston.mci.net>"
        shown = CramCredentials(b"tim", challenge, b"b913a602c7eda7a495b4e6e7334d3890")
        self.assertTrue(shown.checkPassword(b"tanstaaftanstaaf"))
        self.assertFalse(shown.checkPassword(b"tanstaaftanstaag"))
        self.assertFalse(shown.checkPassword(b""))
        verifyObject(IUsernameHashedPassword, shown)

    def test_exchange(self) -> None:
        run = exchange("CRAM-MD5", b"a" * 32)
        challenge = self.octets(run.step(None))
        self.assertRegex(challenge, rb"\A<[A-Za-z0-9._+-]+@mail\.example\.org>\Z")
        self.assertIn(b"a" * 32, challenge)
        digest = hmac.digest(b"secret", challenge, "md5").hex().encode()
        shown = run.step(b"bob with blanks " + digest)
        assert isinstance(shown, CramCredentials)
        self.assertEqual(shown.username, b"bob with blanks")
        self.assertTrue(shown.checkPassword(b"secret"))
        self.assertIsNone(shown.proof(b"key"))

    def test_the_server_begins(self) -> None:
        self.refused(exchange("CRAM-MD5"), b"")
        self.refused(exchange("CRAM-MD5"), b"bob " + b"0" * 32)

    def test_refused(self) -> None:
        digest = b"0" * 32
        for response in (
            b"",
            b" ",
            b" " + digest,
            digest,
            b"bob " + digest[:-1],
            b"bob " + digest + b"0",
            b"bob " + b"G" * 32,
            b"bob " + b"A" * 32,
            b"bob " + digest + b" ",
            b"b\0b " + digest,
        ):
            run = exchange("CRAM-MD5")
            run.step(None)
            self.refused(run, response)


class ExternalTests(Case):
    def test_the_name_is_the_certificates(self) -> None:
        for response in (b"", b"bob@example.org"):
            run = exchange("EXTERNAL", certificate="bob@example.org")
            self.assertEqual(run.step(None), b"")
            shown = run.step(response)
            assert isinstance(shown, ExternalCredentials)
            self.assertEqual(shown.username, b"bob@example.org")

    def test_nobody_elses(self) -> None:
        for response in (b"alice", b"bob\0", b"BOB", b"\0bob", b"bo"):
            self.refused(exchange("EXTERNAL", certificate="bob"), response)

    def test_no_name_no_login(self) -> None:
        """CVE-2019-3814: a client that names himself would be anybody."""
        for certificate in (None, ""):
            for response in (b"", b"bob"):
                self.refused(exchange("EXTERNAL", certificate=certificate), response)


class BearerTests(Case):
    TOKEN = b"vF9dft4qmTc2Nvb3RlckBhbHRhdmlzdGEuY29tCg=="

    def test_example_of_rfc_7628(self) -> None:
        """Section 4.1, over POP3."""
        run = exchange("OAUTHBEARER")
        self.assertEqual(run.step(None), b"")
        shown = run.step(
            b"n,a=user@example.com,\1host=server.example.com\1port=143\1auth=Bearer "
            + self.TOKEN
            + b"\1\1"
        )
        assert isinstance(shown, BearerToken)
        self.assertEqual((shown.username, shown.token), (b"user@example.com", self.TOKEN))
        verifyObject(IBearerToken, shown)

    def test_without_a_name(self) -> None:
        shown = exchange("OAUTHBEARER").step(b"n,,\1auth=bearer abc\1\1")
        assert isinstance(shown, BearerToken)
        self.assertEqual((shown.username, shown.token), (b"", b"abc"))

    def test_googles_example(self) -> None:
        """XOAUTH2 as Google documents it for IMAP, POP and SMTP."""
        response = b64decode(
            b"dXNlcj1zb21ldXNlckBleGFtcGxlLmNvbQFhdXRoPUJlYXJlciB5YTI5LnZGOWRmdDRxbVRjMk52"
            b"YjNSbGNrQmhkSFJoZG1semRHRXVZMjl0Q2cBAQ=="
        )
        shown = exchange("XOAUTH2").step(response)
        assert isinstance(shown, BearerToken)
        self.assertEqual(shown.username, b"someuser@example.com")
        self.assertEqual(shown.token, b"ya29.vF9dft4qmTc2Nvb3RlckBhdHRhdmlzdGEuY29tCg")
        self.assertEqual(shown.mechanism, "XOAUTH2")

    def test_refused(self) -> None:
        for response in (
            b"",
            b"n,,\1\1",
            b"n,,\1auth=Bearer abc\1",
            b"n,,\1auth=Bearer abc\1\1x",
            b"n,,\1auth=Basic abc\1\1",
            b"n,,\1auth=Bearer \1\1",
            b"n,,\1auth=Bearer a b\1\1",
            b"n,,\1auth=Bearer a\1auth=Bearer b\1\1",
            b"n,,\1auth=Bearer \xff\1\1",
            b"p=tls-exporter,,\1auth=Bearer abc\1\1",
            b"n,a=,\1auth=Bearer abc\1\1",
            b"n,a=b=x,\1auth=Bearer abc\1\1",
            b"n,bob,\1auth=Bearer abc\1\1",
            b"auth=Bearer abc\1\1",
        ):
            self.refused(exchange("OAUTHBEARER"), response)
        for response in (b"", b"user=\1auth=Bearer abc\1\1", b"n,,\1auth=Bearer abc\1\1"):
            self.refused(exchange("XOAUTH2"), response)

    def test_the_error_challenge_is_json(self) -> None:
        for mechanism in ("OAUTHBEARER", "XOAUTH2"):
            challenge = exchange(mechanism).error_challenge
            assert challenge is not None
            self.assertRegex(challenge, rb'\A\{"status":"[a-z0-9_]+"')


class ScramTests(Case):
    def run_with(self, mechanism: str, binding: str | None = None, **options: object) -> Step:
        """A whole exchange by scramp, up to the credentials."""
        bound = None if binding is None else (binding, BINDINGS[binding])
        run = exchange(mechanism, bindings=BINDINGS if binding else {})
        client = Client(mechanism, str(options.get("user", "bob")), "secret", bound)
        self.assertEqual(run.step(None), b"")
        asked = run.step(client.first())
        assert isinstance(asked, ScramQuery)
        self.assertEqual(asked.algorithm, algorithm_of(mechanism))
        kept = verifier(str(options.get("password", "secret")).encode(), asked.algorithm)
        first = self.octets(run.told(kept))
        self.assertIn(b",i=4096", first)
        step = run.step(client.final(first))
        assert run.success_challenge is not None
        client.finish(run.success_challenge)
        return step

    def test_example_of_rfc_5802(self) -> None:
        """Section 5."""
        run = exchange("SCRAM-SHA-1", b"3rfcNHYJY1ZVvWVs7j")
        asked = run.step(b"n,,n=user,r=fyko+d2lbbFgONRv9qkxdawL")
        self.assertEqual(asked, ScramQuery(b"user", "SHA-1"))
        first = run.told(verifier(b"pencil", "SHA-1", b64decode(b"QSXCR+Q6sek8bf92")))
        self.assertEqual(
            first, b"r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096"
        )
        final = run.step(
            b"c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts="
        )
        self.assertIsInstance(final, ScramCredentials)
        self.assertEqual(run.success_challenge, b"v=rmF9pqV8S7suAoZWja4dJRkFsKQ=")

    def test_example_of_rfc_7677(self) -> None:
        """Section 3."""
        run = exchange("SCRAM-SHA-256", b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
        run.step(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO")
        run.told(verifier(b"pencil", "SHA-256", b64decode(b"W22ZaJ0SNY7soEsUEjb6gQ==")))
        final = run.step(
            b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
            b"p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        )
        self.assertIsInstance(final, ScramCredentials)
        self.assertEqual(run.success_challenge, b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")

    def test_scramp_and_all_mechanisms(self) -> None:
        ways = [(name, None) for name in UNBOUND]
        ways += [(name, binding) for name in BOUND for binding in BINDINGS]
        for mechanism, binding in ways:
            shown = self.run_with(mechanism, binding)
            assert isinstance(shown, ScramCredentials), mechanism
            self.assertEqual((shown.username, shown.mechanism), (b"bob", mechanism))
            self.assertTrue(shown.check(verifier(b"secret", shown.algorithm)))
            self.assertIsNone(shown.proof(b"key"))
            verifyObject(IScramCredentials, shown)

    def test_a_wrong_password_goes_to_the_checker(self) -> None:
        for mechanism in UNBOUND:
            run = exchange(mechanism)
            client = Client(mechanism, "bob", "wrong")
            run.step(client.first())
            kept = verifier(b"secret", algorithm_of(mechanism))
            shown = run.step(client.final(self.octets(run.told(kept))))
            assert isinstance(shown, ScramCredentials)
            self.assertFalse(shown.check(kept))

    def test_a_password_that_was_changed_meanwhile(self) -> None:
        shown = self.run_with("SCRAM-SHA-256")
        assert isinstance(shown, ScramCredentials)
        self.assertFalse(shown.check(verifier(b"changed", "SHA-256")))
        self.assertFalse(shown.check(verifier(b"secret", "SHA-256", b"another salt ...")))

    def test_scramp_refuses_a_server_that_knows_nothing(self) -> None:
        run = exchange("SCRAM-SHA-256")
        client = Client("SCRAM-SHA-256", "bob", "secret")
        run.step(client.first())
        kept = verifier(b"secret", "SHA-256")
        half = ScramVerifier(kept.salt, kept.iterations, kept.stored_key, Secret(b"?" * 32))
        run.step(client.final(self.octets(run.told(half))))
        self.assertRaises(ScramException, client.finish, run.success_challenge)

    def test_names_are_unescaped(self) -> None:
        shown = self.run_with("SCRAM-SHA-1", user="a=b,c")
        assert isinstance(shown, ScramCredentials)
        self.assertEqual(shown.username, b"a=b,c")

    def test_each_nonce_is_long_and_begins_with_the_clients(self) -> None:
        run = exchange("SCRAM-SHA-1")
        run.step(b"n,,n=bob,r=abc")
        first = self.octets(run.told(verifier(b"x", "SHA-1")))
        self.assertRegex(first, rb"\Ar=abc[!-+\--~]{32},s=")

    def test_channel_binding_flags(self) -> None:
        """`p=` belongs to -PLUS alone; `y` is a lie where -PLUS was offered (RFC 5802 6)."""
        tail = b",,n=bob,r=abc"
        for name in UNBOUND:
            self.refused(exchange(name, bindings=BINDINGS), b"p=tls-exporter" + tail)
            self.assertIsInstance(exchange(name, plus=True).step(b"n" + tail), ScramQuery)
            self.assertIsInstance(exchange(name).step(b"y" + tail), ScramQuery)
            self.refused(exchange(name, plus=True), b"y" + tail)
        for name in BOUND:
            for flag in (b"n", b"y", b"p=", b"p", b"p=tls-unique", b"p=\xff", b"P=tls-exporter"):
                self.refused(exchange(name, bindings=BINDINGS, plus=True), flag + tail)
            self.refused(exchange(name, plus=True), b"p=tls-exporter" + tail)

    def test_another_channel(self) -> None:
        """Somebody in the middle has two of them, and cannot change the proof."""
        for mechanism in BOUND:
            for binding in BINDINGS:
                run = exchange(mechanism, bindings=BINDINGS)
                client = Client(mechanism, "bob", "secret", (binding, b"M" * 32))
                run.step(client.first())
                first = run.told(verifier(b"secret", algorithm_of(mechanism)))
                self.refused(run, client.final(self.octets(first)))

    def test_authzid(self) -> None:
        self.assertIsInstance(exchange("SCRAM-SHA-1").step(b"n,a=bob,n=bob,r=x"), ScramQuery)
        self.refused(exchange("SCRAM-SHA-1"), b"n,a=alice,n=bob,r=x")

    def test_malformed_first(self) -> None:
        for response in (
            b"",
            b"n",
            b"n,,",
            b"n,,n=bob",
            b"n,,r=abc,n=bob",
            b"n,,n=,r=abc",
            b"n,,n=bob,r=",
            b"n,,n=b=b,r=abc",
            b"n,,n=b=2c,r=abc",
            b"n,,n=b\0b,r=abc",
            b"n,,n=\xff,r=abc",
            b"n,,n=bob,r=a\x7f",
            b"n,,n=bob,r=a b",
            b"n,,m=x,n=bob,r=abc",
            b"n,,n=bob,r=abc,m=x",
            b"n,,n=bob,r=abc,",
            b"n,,n=bob,r=abc,x",
            b"n,a=,n=bob,r=abc",
            b"n,b=x,n=bob,r=abc",
            b"x,,n=bob,r=abc",
            b",,n=bob,r=abc",
        ):
            for mechanism in UNBOUND:
                self.refused(exchange(mechanism), response)

    def final_of(self, change: tuple[bytes, bytes]) -> tuple[Exchange, bytes]:
        run = exchange("SCRAM-SHA-256", b"n" * 32)
        client = Client("SCRAM-SHA-256", "bob", "secret", nonce="abc")
        run.step(client.first())
        final = client.final(self.octets(run.told(verifier(b"secret", "SHA-256"))))
        self.assertEqual(final.count(change[0]), 1, (final, change))
        return run, final.replace(*change)

    def test_malformed_final(self) -> None:
        for change in (
            (b"c=biws", b"c=biw"),
            (b"c=biws", b"c=eSws"),
            (b"c=biws,", b""),
            (b"r=abc", b"r=abd"),
            (b"r=abcnn", b"r=abcn"),
            (b",p=", b",q="),
            (b",p=", b",p=="),
            (b",p=", b",m=x,p="),
            (b",p=", b",\xff=x,p="),
            (b"c=biws,r=", b"r=biws,c="),
        ):
            run, final = self.final_of(change)
            self.refused(run, final)

    def test_extensions_are_part_of_what_is_proved(self) -> None:
        run, final = self.final_of((b",p=", b",x=y,p="))
        self.assertIsInstance(run.step(final), ScramCredentials)

    def test_a_proof_of_another_length(self) -> None:
        run, final = self.final_of((b"c=biws", b"c=biws"))
        head, _, proof = final.partition(b",p=")
        longer = b64encode(b64decode(proof) + b"x")
        shown = run.step(head + b",p=" + longer)
        assert isinstance(shown, ScramCredentials)
        self.assertFalse(shown.check(KEPT["SHA-256"]))
        for proof in (b"", b"x", b"x" * 31, b"x" * 33, b"x" * 1000):
            shown = ScramCredentials(b"bob", "SCRAM-SHA-256", "SHA-256", b"message", proof)
            self.assertFalse(shown.check(verifier(b"secret", "SHA-256")))

    def test_more_than_an_empty_response_at_the_end(self) -> None:
        run = exchange("SCRAM-SHA-1")
        client = Client("SCRAM-SHA-1", "bob", "secret")
        run.step(client.first())
        run.step(client.final(self.octets(run.told(verifier(b"secret", "SHA-1")))))
        self.refused(run, b"x")


KEPT = {algorithm: verifier(b"secret", algorithm) for algorithm in ALGORITHMS}


@lru_cache
def valid_responses(mechanism: str) -> list[bytes | None]:
    """Responses of an exchange that ends well, with the answer for SCRAM in between."""
    name = mechanism
    if name.startswith("SCRAM-"):
        binding = ("tls-exporter", BINDINGS["tls-exporter"]) if name.endswith("PLUS") else None
        client = Client(name, "bob", "secret", binding, "abc")
        run = start(name)
        opening = client.first()
        run.step(opening)
        first = run.told(KEPT[algorithm_of(name)])
        assert isinstance(first, bytes)
        return [opening, client.final(first), b""]
    if name == "CRAM-MD5":
        return [None, b"bob " + b"0" * 32]
    return {
        "PLAIN": [b"\0bob\0secret"],
        "LOGIN": [b"bob", b"secret"],
        "EXTERNAL": [b"bob"],
        "OAUTHBEARER": [b"n,a=bob,\1auth=Bearer abc\1\1"],
        "XOAUTH2": [b"user=bob\1auth=Bearer abc\1\1"],
    }[name]


def start(mechanism: str) -> Exchange:
    bindings = BINDINGS if mechanism.endswith("PLUS") else {}
    return exchange(mechanism, bindings=bindings, certificate="bob")


def play(mechanism: str, responses: list[bytes | None]) -> Step:
    """All responses one after the other, as far as the exchange goes."""
    run = start(mechanism)
    step: Step = b""
    for response in responses:
        step = run.step(response)
        if isinstance(step, ScramQuery):
            step = run.told(KEPT[step.algorithm])
        if not isinstance(step, bytes):
            break
    return step


class GarbageTests(Case):
    """Whatever comes: a challenge, credentials or `BadCredentials`, and no other exception."""

    NAMES = tuple(name.decode() for name in MECHANISMS)

    def test_every_cut(self) -> None:
        """No beginning of an exchange that ends well logs anybody in."""
        for name in self.NAMES:
            whole = valid_responses(name)
            self.assertNotIsInstance(play(name, whole), bytes)
            for number, response in enumerate(whole):
                for end in range(len(response or b"")):
                    cut = (response or b"")[:end]
                    try:
                        step = play(name, [*whole[:number], cut])
                    except BadCredentials as error:
                        self.assertEqual(error.text, FAILED)
                        continue
                    if isinstance(step, ScramCredentials):
                        self.assertFalse(step.check(KEPT[step.algorithm]), cut)
                    elif isinstance(step, Cleartext):
                        self.assertNotEqual(step.password, b"secret")
                    elif isinstance(step, ExternalCredentials):
                        self.assertEqual(cut, b"")
                    else:
                        # A name may be cut, and a nonce.
                        self.assertIsInstance(step, bytes, (name, cut))

    @given(
        st.sampled_from(NAMES),
        st.lists(st.none() | st.binary(max_size=80), max_size=4),
        st.integers(0, 3),
    )
    @settings(deadline=None, derandomize=True, max_examples=300)
    def test_garbage(self, name: str, garbage: list[bytes | None], good: int) -> None:
        responses = valid_responses(name)[:good] + garbage
        try:
            play(name, responses)
        except BadCredentials as error:
            self.assertEqual(error.text, FAILED)

    @given(st.sampled_from(ALL), st.text("nrcpvsiam=,xy\0 2CD3é", max_size=40), st.booleans())
    @example("SCRAM-SHA-1", "n,,n==2C,r=x", True)
    @settings(deadline=None, derandomize=True, max_examples=300)
    def test_garbage_of_the_right_letters(self, name: str, text: str, first: bool) -> None:
        before = [] if first else valid_responses(name)[:1]
        try:
            play(name, [*before, text.encode()])
        except BadCredentials as error:
            self.assertEqual(error.text, FAILED)


class SecrecyTests(Case):
    def test_nothing_is_printed_or_pickled(self) -> None:
        for shown in (
            CramCredentials(b"hidden", b"<hidden@x>", b"hidden"),
            ScramCredentials(b"hidden", "SCRAM-SHA-1", "SHA-1", b"hidden", b"hidden"),
            BearerToken(b"hidden", b"hidden"),
            ExternalCredentials(b"hidden"),
        ):
            self.assertNotIn("hidden", f"{shown!r} {shown!s} {shown} {[shown]}")
            self.assertRaises(TypeError, pickle.dumps, shown)
            self.assertRaises(TypeError, vars, shown)
        verifyObject(IExternal, ExternalCredentials(b"bob"))

    def test_proofs(self) -> None:
        """The same token again is no new guess; another one is (decision 24)."""
        first = BearerToken(b"bob", b"abc").proof(b"key")
        self.assertEqual(first, BearerToken(b"bob", b"abc", "XOAUTH2").proof(b"key"))
        others = {
            BearerToken(b"bob", b"abd").proof(b"key"),
            BearerToken(b"bo", b"babc").proof(b"key"),
            BearerToken(b"bob", b"abc").proof(b"kez"),
        }
        self.assertEqual(len(others | {first}), 4)
        self.assertNotIn(hashlib.sha256(b"abc").digest(), others | {first})
