"""Bearer tokens: which are believed, and whose maildrop they open."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import traceback
from functools import cache
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts import tokens
from popdrop.accounts.tokens import BadKeys, Key, Rules, UnknownKey
from popdrop.errors import BadCredentials, NoVerifierOfThisKind

ISSUER = "https://id.example.org/realms/mail"
NOW = 1_800_000_000.0
RULES = Rules(ISSUER, frozenset({"popdrop"}))


@cache
def private(kind: str) -> Any:
    """A private key of each kind, made once."""
    curves: dict[str, Any] = {
        "ES256": ec.SECP256R1(),
        "ES384": ec.SECP384R1(),
        "ES512": ec.SECP521R1(),
        "ES256K": ec.SECP256K1(),
    }
    if kind in curves or kind == "other":
        return ec.generate_private_key(curves.get(kind, ec.SECP256R1()))
    if kind == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if kind == "Ed448":
        return ed448.Ed448PrivateKey.generate()
    return rsa.generate_private_key(65537, 1024 if kind == "small" else 2048)


def signing(algorithm: str) -> Any:
    return private("RSA" if algorithm[:2] in ("RS", "PS") else algorithm)


def jwk(key: Any, kid: str | None = "k1", **more: Any) -> dict[str, Any]:
    """The public half of `key` as a JWK."""
    public = key.public_key()
    writer: Any = OKPAlgorithm
    if isinstance(public, rsa.RSAPublicKey):
        writer = RSAAlgorithm
    elif isinstance(public, ec.EllipticCurvePublicKey):
        writer = ECAlgorithm
    made = json.loads(writer.to_jwk(public))
    made.pop("key_ops", None)
    return made | ({} if kid is None else {"kid": kid}) | more


def jwks(*listed: dict[str, Any]) -> bytes:
    return json.dumps({"keys": listed}).encode()


def pem(key: Any) -> bytes:
    octets: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return octets


def said(**changes: Any) -> dict[str, Any]:
    """Claims of a good token; `None` takes one out."""
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": "popdrop",
        "exp": NOW + 300,
        "iat": NOW - 10,
        "sub": "248289761001",
        "email": "bob@example.org",
        "email_verified": True,
        "preferred_username": "bob",
    }
    claims |= changes
    return {name: value for name, value in claims.items() if value is not None}


def token(
    claims: dict[str, Any] | None = None,
    key: Any = None,
    algorithm: str = "ES256",
    **header: Any,
) -> bytes:
    """A signed token; by default a good one."""
    headers = {"kid": "k1"} | header
    made = jwt.encode(
        said() if claims is None else claims,
        key or signing(algorithm),
        algorithm,
        {name: value for name, value in headers.items() if value is not None},
    )
    return made.encode()


def part(value: object) -> bytes:
    octets = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(octets).rstrip(b"=")


def by_hand(header: dict[str, Any], claims: object, secret: bytes = b"") -> bytes:
    """A token as PyJWT would not make it, with an HMAC for its signature."""
    text = part(header) + b"." + part(claims)
    return text + b"." + part(hmac.new(secret, text, hashlib.sha256).digest())


def told(error: BaseException) -> str:
    """All that a traceback would say, with everything that is chained to it."""
    return "".join(traceback.format_exception(error)) + repr(error)


class TokenCase(SynchronousTestCase):
    keys = tokens.keys_in(jwks(jwk(private("ES256"))))

    def name(self, octets: bytes, rules: Rules = RULES, username: bytes = b"") -> bytes:
        apart = tokens.taken_apart(octets)
        if apart is None:
            raise BadCredentials("", "token-malformed")
        return tokens.name_in(tokens.signed_claims(apart, self.keys, rules), rules, NOW, username)

    def refused(
        self, octets: bytes, why: str, rules: Rules = RULES, username: bytes = b""
    ) -> BadCredentials:
        error = self.assertRaises(BadCredentials, self.name, octets, rules, username)
        self.assertEqual(error.detail, why)
        for piece in (octets, *octets.split(b".")):
            self.assertNotIn(piece.decode(), told(error))
        self.assertEqual((error.__context__, error.__cause__), (None, None))
        return error


class SignatureTests(TokenCase):
    def test_every_algorithm(self) -> None:
        for algorithm in tokens.ALGORITHMS:
            self.keys = tokens.keys_in(jwks(jwk(signing(algorithm))))
            self.assertEqual(self.name(token(algorithm=algorithm)), b"bob@example.org", algorithm)
        self.assertEqual(len(tokens.ALGORITHMS), 10)

    def test_ed448(self) -> None:
        self.keys = tokens.keys_in(jwks(jwk(private("Ed448"), alg="Ed448")))
        made = token(key=private("Ed448"), algorithm="EdDSA")
        self.assertEqual(self.name(made), b"bob@example.org")

    def test_another_key_of_that_id(self) -> None:
        self.refused(token(key=private("other")), "token-signature")

    def test_key_id_unknown(self) -> None:
        for made in (token(kid="k2"), token(kid="k2", key=private("other"))):
            self.assertRaises(UnknownKey, self.name, made)

    def test_no_key_id(self) -> None:
        self.keys = tokens.keys_in(jwks(jwk(private("other"), "k0"), jwk(private("ES256"))))
        self.assertEqual(self.name(token(kid=None)), b"bob@example.org")
        stranger = ec.generate_private_key(ec.SECP256R1())
        self.assertRaises(UnknownKey, self.name, token(kid=None, key=stranger))

    def test_key_without_id(self) -> None:
        self.keys = tokens.keys_in(pem(private("ES256")))
        self.assertEqual(self.name(token(kid="any")), b"bob@example.org")

    def test_key_of_the_same_id_and_another_kind(self) -> None:
        self.keys = tokens.keys_in(jwks(jwk(private("RSA")), jwk(private("ES256"))))
        for algorithm in ("RS256", "ES256"):
            self.assertEqual(self.name(token(algorithm=algorithm)), b"bob@example.org")

    def test_tries_are_bounded(self) -> None:
        others = [jwk(private("other"), f"o{n}") for n in range(tokens.TRIES)]
        self.keys = tokens.keys_in(jwks(*others, jwk(private("ES256"))))
        self.assertRaises(UnknownKey, self.name, token(kid=None))
        self.keys = tokens.keys_in(jwks(*others[1:], jwk(private("ES256"))))
        self.assertEqual(self.name(token(kid=None)), b"bob@example.org")

    def test_none(self) -> None:
        for word in ("none", "None", "NONE", "", None, 5, ["ES256"]):
            made = by_hand({"alg": word, "kid": "k1"}, said())
            self.refused(made, "token-algorithm")
        unsigned = jwt.encode(said(), None, "none").encode()
        self.assertTrue(unsigned.endswith(b"."))
        self.assertIsNone(tokens.taken_apart(unsigned))

    def test_public_key_as_shared_secret(self) -> None:
        """RFC 8725 section 2.1: the attacker signs by HMAC with what everybody knows."""
        key = private("RSA")
        der = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for secret in (pem(key), pem(key).strip(), der, jwks(jwk(key))):
            for keys in (pem(key), jwks(jwk(key)), jwks(jwk(key, alg="RS256"))):
                self.keys = tokens.keys_in(keys)
                self.refused(
                    by_hand({"alg": "HS256", "kid": "k1"}, said(), secret), "token-algorithm"
                )

    def test_not_even_if_the_rules_let_it(self) -> None:
        """A second wall: keys are objects that no HMAC takes."""
        key = private("RSA")
        self.keys = tokens.keys_in(pem(key))
        lax = Rules(ISSUER, frozenset({"popdrop"}), algorithms=frozenset({"HS256", "none"}))
        made = by_hand({"alg": "HS256"}, said(), pem(key))
        self.assertRaises(UnknownKey, self.name, made, lax)
        every = (Key(None, frozenset({"HS256", "none"}), key.public_key()),)
        self.keys = every
        self.assertRaises(UnknownKey, self.name, made, lax)
        self.assertRaises(UnknownKey, self.name, by_hand({"alg": "none"}, said()), lax)

    def test_algorithm_not_wanted(self) -> None:
        rules = Rules(ISSUER, frozenset({"popdrop"}), algorithms=frozenset({"RS256"}))
        self.refused(token(), "token-algorithm", rules)

    def test_algorithm_of_the_key(self) -> None:
        self.keys = tokens.keys_in(jwks(jwk(private("RSA"), alg="PS256")))
        self.assertEqual(self.name(token(algorithm="PS256")), b"bob@example.org")
        self.assertRaises(UnknownKey, self.name, token(algorithm="RS256"))

    def test_own_key_in_the_header(self) -> None:
        other = private("other")
        for header in ({"jwk": jwk(other)}, {"x5c": ["AAAA"]}, {"jku": "https://evil.example/"}):
            self.refused(token(key=other, **header), "token-signature")

    def test_critical_extensions(self) -> None:
        self.refused(token(crit=["exp"], exp=1), "token-malformed")
        self.refused(
            by_hand({"alg": "ES256", "crit": ["b64"], "b64": False}, said()), "token-malformed"
        )

    def test_key_id_that_is_no_string(self) -> None:
        self.refused(by_hand({"alg": "ES256", "kid": 7}, said()), "token-malformed")

    def test_type(self) -> None:
        for good in ("JWT", "at+jwt", "AT+JWT", "application/at+jwt"):
            self.assertEqual(self.name(token(typ=good)), b"bob@example.org")
        self.assertEqual(self.name(token(typ="")), b"bob@example.org")  # PyJWT leaves it out
        for bad in ("dpop+jwt", "logout+jwt", "secevent+jwt"):
            self.refused(token(typ=bad), "token-type")
        self.refused(by_hand({"alg": "ES256", "typ": 3}, said()), "token-type")

    def test_changed(self) -> None:
        head, body, signature = token().split(b".")
        other = part(said(email="eve@example.org"))
        self.refused(b".".join((head, other, signature)), "token-signature")
        self.refused(b".".join((head, body, part(b"\0" * 64))), "token-signature")
        self.refused(b".".join((head, body, part(b"short"))), "token-signature")

    def test_what_is_not_apart(self) -> None:
        good = token()
        for bad in (
            b"",
            b"a.b",
            b"a.b.c",
            good + b".x",
            good.replace(b".", b"..", 1),
            good + b"\n",
            b" " + good,
            good[:-1] + b"!",
            good + b"=",
            b"\xff" * 9,
            b"A" * (tokens.TOKEN_OCTETS + 1),
            by_hand({"alg": "ES256"}, [1]),
            by_hand({}, b"{"),
            by_hand({}, b"[" * 5000),
        ):
            self.assertIsNone(tokens.taken_apart(bad), bad)
        self.assertIsNotNone(tokens.taken_apart(good))

    def test_secret(self) -> None:
        self.assertNotIn(token().decode()[:20], repr(tokens.taken_apart(token())))


class ClaimTests(TokenCase):
    def test_issuer(self) -> None:
        for bad in (ISSUER + "/", ISSUER.upper(), "", "https://evil.example", None, 5, [ISSUER]):
            claims = said(iss=bad)
            error = self.assertRaises(BadCredentials, tokens.name_in, claims, RULES, NOW, b"")
            self.assertEqual(error.detail, "token-issuer")

    def test_audience(self) -> None:
        for good in ("popdrop", ["popdrop"], ["web", "popdrop"], ["popdrop", 5]):
            self.assertEqual(self.name(token(said(aud=good))), b"bob@example.org")
        for bad in (
            "web",
            "popdrop2",
            "pop",
            "",
            [],
            ["web"],
            None,
            5,
            {"popdrop": 1},
            [["popdrop"]],
            "popdrop web",
        ):
            self.refused(token(said(aud=bad)), "token-audience")
        either = Rules(ISSUER, frozenset({"a", "popdrop"}))
        self.assertEqual(self.name(token(), either), b"bob@example.org")

    def test_times(self) -> None:
        for why, changes, good in (
            ("token-expired", {"exp": NOW - 60}, {"exp": NOW - 59}),
            ("token-early", {"nbf": NOW + 61}, {"nbf": NOW + 60}),
            ("token-early", {"iat": NOW + 61}, {"iat": NOW + 60}),
            ("token-expiry", {"exp": None}, {"iat": None}),
        ):
            self.refused(token(said(**changes)), why)
            self.assertEqual(self.name(token(said(**good))), b"bob@example.org")

    def test_no_leeway(self) -> None:
        strict = Rules(ISSUER, frozenset({"popdrop"}), leeway=0)
        self.refused(token(said(exp=NOW)), "token-expired", strict)
        self.assertEqual(self.name(token(said(exp=NOW + 1)), strict), b"bob@example.org")

    def test_times_that_are_none(self) -> None:
        for bad in (True, str(int(NOW + 300)), [], {}, float("nan")):
            for name in ("exp", "nbf", "iat"):
                made = token_of(said(**{name: bad}))
                self.refused(made, "token-malformed")

    def test_large_times(self) -> None:
        self.assertEqual(self.name(token_of(said(exp=10**400))), b"bob@example.org")
        self.refused(token_of(said(nbf=10**400)), "token-early")

    def test_scope(self) -> None:
        rules = Rules(ISSUER, frozenset({"popdrop"}), scope=frozenset({"mail", "pop"}))
        for good in (
            {"scope": "openid pop mail"},
            {"scp": ["mail", "pop"]},
            {"scope": ["pop", "mail"]},
            {"scope": "pop", "scp": "mail"},
        ):
            self.assertEqual(self.name(token(said(**good)), rules), b"bob@example.org")
        for bad in (
            {},
            {"scope": "mail"},
            {"scope": "mail,pop"},
            {"scope": "mailpop"},
            {"scope": {"mail": 1, "pop": 1}},
        ):
            self.refused(token(said(**bad)), "token-scope", rules)

    def test_bound(self) -> None:
        self.refused(token(said(cnf={"jkt": "0ZcOCORZNYy"})), "token-bound")

    def test_claim(self) -> None:
        for claim, name in (("sub", b"248289761001"), ("preferred_username", b"bob")):
            rules = Rules(ISSUER, frozenset({"popdrop"}), claim)
            self.assertEqual(self.name(token(said(email=None)), rules), name)
        for bad in (None, "", 5, ["bob"], True, {"a": "b"}):
            self.refused(token(said(email=bad)), "token-claim")

    def test_email_must_be_verified(self) -> None:
        self.assertEqual(self.name(token(said(email_verified="true"))), b"bob@example.org")
        for bad in (None, False, 0, 1, "false", "yes", "True", [True]):
            self.refused(token(said(email_verified=bad)), "token-email-unverified")
        other = Rules(ISSUER, frozenset({"popdrop"}), "sub")
        self.assertEqual(self.name(token(said(email_verified=None)), other), b"248289761001")

    def test_domain(self) -> None:
        rules = Rules(ISSUER, frozenset({"popdrop"}), domain="example.org")
        for username in (b"", b"bob", b"bob@example.org"):
            self.assertEqual(self.name(token(), rules, username), b"bob")
        self.assertEqual(self.name(token(said(email="bob@Example.ORG")), rules), b"bob")
        for bad in (
            "bob@example.org.evil",
            "bob@sub.example.org",
            "bob",
            "example.org",
            "bob@evil@example.com",
            "bob@evilexample.org",
        ):
            self.refused(token(said(email=bad)), "token-domain", rules)
        self.refused(token(said(email="@example.org")), "token-name", rules)
        self.refused(token(), "token-foreign-name", rules, b"bob@example.com")

    def test_names(self) -> None:
        rules = Rules(ISSUER, frozenset({"popdrop"}), "sub")
        for bad in ("../eve", "eve/x", ".eve", "-eve", "bob.lock", "x" * 65, "e\u200bve\u2028"):
            error = self.assertRaises(BadCredentials, self.name, token(said(sub=bad)), rules)
            self.assertIn(error.detail, ("token-name", ""), bad)
        for bad in ("\0", "a\nb", "\ud800", "\x7f", "\u0378"):
            self.assertRaises(BadCredentials, self.name, token_of(said(sub=bad)), rules)

    def test_prepared(self) -> None:
        """SASLprep (RFC 4013) on both sides: full-width letters are the plain ones."""
        rules = Rules(ISSUER, frozenset({"popdrop"}), "sub")
        self.assertEqual(self.name(token(said(sub="\uff42ob")), rules, "\uff42ob".encode()), b"bob")

    def test_username(self) -> None:
        self.assertEqual(self.name(token(), RULES, b"bob@example.org"), b"bob@example.org")
        for foreign in (b"eve@example.org", b"bob", b"Bob@example.org", b"bob@example.org "):
            self.refused(token(), "token-foreign-name", RULES, foreign)
        for bad in (b"\xff", b"\0", b"bob\n"):
            self.assertRaises(BadCredentials, self.name, token(), RULES, bad)


def token_of(claims: object) -> bytes:
    """A rightly signed token of claims that PyJWT would refuse to sign."""
    made = jwt.PyJWS().encode(json.dumps(claims).encode(), private("ES256"), "ES256", {"kid": "k1"})
    return made.encode()


class AnswerTests(SynchronousTestCase):
    """RFC 7662."""

    def name(self, answer: object, rules: Rules = RULES) -> bytes:
        claims = tokens.told_claims(json.dumps(answer).encode(), rules)
        assert claims is not None
        return tokens.name_in(claims, rules, NOW, b"")

    def test_active(self) -> None:
        self.assertEqual(self.name(said(active=True)), b"bob@example.org")
        for brief in ("iss", "exp", "iat"):
            self.assertEqual(self.name(said(active=True, **{brief: None})), b"bob@example.org")
            self.assertEqual(self.name(said(active=True) | {brief: None}), b"bob@example.org")

    def test_inactive(self) -> None:
        self.assertRaises(NoVerifierOfThisKind, self.name, {"active": False})
        self.assertRaises(NoVerifierOfThisKind, self.name, said(active=False))

    def test_what_it_says_counts(self) -> None:
        for why, changes in (
            ("token-issuer", {"iss": "https://evil.example"}),
            ("token-expired", {"exp": NOW - 60}),
            ("token-audience", {"aud": "web"}),
            ("token-audience", {"aud": None}),
            ("token-bound", {"cnf": {"jkt": "x"}}),
        ):
            error = self.assertRaises(BadCredentials, self.name, said(active=True, **changes))
            self.assertEqual(error.detail, why)
        unasked = Rules(ISSUER, frozenset())
        self.assertEqual(self.name(said(active=True, aud=None), unasked), b"bob@example.org")

    def test_no_response(self) -> None:
        for bad in (b"", b"[]", b"{}", b'{"active": "true"}', b'{"active": 1}', b"\xff", b"null"):
            self.assertIsNone(tokens.told_claims(bad, RULES), bad)


class KeyTests(SynchronousTestCase):
    def test_kinds(self) -> None:
        every = [jwk(private(kind)) for kind in ("RSA", "ES256", "ES384", "ES512", "EdDSA")]
        found = tokens.keys_in(jwks(*every))
        self.assertEqual(
            [sorted(key.algorithms) for key in found],
            [
                ["PS256", "PS384", "PS512", "RS256", "RS384", "RS512"],
                ["ES256"],
                ["ES384"],
                ["ES512"],
                ["EdDSA"],
            ],
        )

    def test_left_out(self) -> None:
        good = jwk(private("ES256"), "good")
        for bad in (
            jwk(private("small")),
            jwk(private("ES256K")),
            jwk(private("RSA"), use="enc"),
            jwk(private("RSA"), key_ops=["encrypt"]),
            jwk(private("RSA"), alg="RSA-OAEP"),
            jwk(private("RSA"), alg="HS256"),
            jwk(private("RSA"), kty="EC"),
            jwk(private("ES256"), kid=5),
            jwk(private("ES256"), x="AA"),
            {"kty": "oct", "k": "c2VjcmV0", "kid": "k1", "alg": "HS256"},
            {"kty": "oct", "k": "c2VjcmV0", "kid": "k1"},
            {},
            5,
            None,
            "key",
            [],
            {"kty": ["RSA"]},
        ):
            found = tokens.keys_in(json.dumps({"keys": [bad, good]}).encode())
            self.assertEqual([key.kid for key in found], ["good"], bad)
            self.assertRaises(BadKeys, tokens.keys_in, json.dumps({"keys": [bad]}).encode())

    def test_no_keys(self) -> None:
        for bad in (
            b"",
            b"{}",
            b"[]",
            b'{"keys": {}}',
            b'{"keys": []}',
            b"\xff\xfe",
            b"<html>",
            b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
            b"-----BEGIN PUBLIC KEY-----",
            pem(private("small")),
        ):
            self.assertRaises(BadKeys, tokens.keys_in, bad)

    def test_single(self) -> None:
        (key,) = tokens.keys_in(json.dumps(jwk(private("ES256"), "one")).encode())
        self.assertEqual(key.kid, "one")

    def test_pem(self) -> None:
        key = private("RSA")
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "id")])
        day = datetime.datetime(2020, 1, 1)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), 1, day, day)
            .sign(key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )
        found = tokens.keys_in(pem(private("EdDSA")) + b"text\n" + certificate)
        self.assertEqual([key.kid for key in found], [None, None])
        self.assertEqual([sorted(key.algorithms)[-1] for key in found], ["EdDSA", "RS512"])

    def test_private_keys(self) -> None:
        """None is wanted from a file; of a server's only the public half is looked at."""
        key = private("ES256")
        secret = json.loads(ECAlgorithm.to_jwk(key)) | {"kid": "k1"}
        secret.pop("key_ops", None)
        octets = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        for bad in (octets, jwks(secret)):
            error = self.assertRaises(BadKeys, tokens.keys_in, bad)
            self.assertIn("private", str(error))
        (found,) = tokens.keys_in(jwks(secret), private=False)
        self.assertFalse(hasattr(found.public, "sign"))

    def test_bounded(self) -> None:
        many = [jwk(private("ES256"), str(n)) for n in range(tokens.KEYS + 5)]
        self.assertEqual(len(tokens.keys_in(jwks(*many))), tokens.KEYS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
NAMES = st.sampled_from([*said(), "alg", "kid", "typ", "crit", "b64", "scope", "cnf", "nbf"])
OBJECTS = st.dictionaries(NAMES, JSON | st.sampled_from([ISSUER, "popdrop", "ES256", "k1"]))


class GarbageTests(TokenCase):
    """Whatever comes, nothing but a refusal."""

    def try_it(self, octets: bytes, rules: Rules = RULES) -> None:
        try:
            self.name(octets, rules)
        except (BadCredentials, UnknownKey):
            return
        self.fail("garbage is believed")

    @given(st.binary(max_size=200))
    @settings(deadline=None, derandomize=True)
    def test_octets(self, octets: bytes) -> None:
        self.try_it(octets)

    @given(OBJECTS, st.binary(max_size=90) | OBJECTS, st.binary(max_size=64))
    @settings(deadline=None, derandomize=True)
    def test_parts(self, header: Any, claims: Any, signature: bytes) -> None:
        self.try_it(b".".join((part(header), part(claims), part(signature))))

    @given(st.data())
    @settings(deadline=None, derandomize=True)
    def test_one_octet_changed(self, data: Any) -> None:
        good = token()
        place = data.draw(st.integers(0, len(good) - 1))
        octet = data.draw(st.binary(min_size=1, max_size=1).filter(lambda o: o != good[place:][:1]))
        self.try_it(good[:place] + octet + good[place + 1 :])

    @given(OBJECTS)
    @settings(deadline=None, derandomize=True)
    def test_signed_claims(self, changes: dict[str, Any]) -> None:
        """An issuer may say what it likes: a name that can be used, or a refusal."""
        try:
            name = self.name(token_of(said() | changes))
        except BadCredentials:
            return
        self.assertNotIn(b"/", name)
        self.assertTrue(0 < len(name) <= 64)

    @given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps({"keys": value}).encode()))
    @settings(deadline=None, derandomize=True)
    def test_keys(self, octets: bytes) -> None:
        self.assertRaises(BadKeys, tokens.keys_in, octets)

    @given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
    @settings(deadline=None, derandomize=True)
    def test_answers(self, octets: bytes) -> None:
        try:
            claims = tokens.told_claims(octets, RULES)
            if claims is not None:
                tokens.name_in(claims, RULES, NOW, b"")
        except BadCredentials:
            return
        self.assertIsNone(claims)
