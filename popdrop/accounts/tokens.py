"""What a bearer token says, and whether to believe it: no files, no network, no clock.

A token is a JWT (RFC 7519, RFC 9068) that is verified with the issuer's public keys, or anything
that the issuer tells about when asked (RFC 7662). Both end as claims, and one function says whose
maildrop they open. PyJWT does the signatures and is imported when the first one is verified.

No exception from here quotes a token: PyJWT's do, so they are caught and never chained.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from popdrop.credentials import FAILED, acceptable_name, prepared
from popdrop.errors import BadCredentials, NoVerifierOfThisKind
from popdrop.values import Secret

_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
ALGORITHMS: Final = frozenset({*_RSA, *_CURVES.values(), "EdDSA"})
"""Those that are ever taken (RFC 7518 3.1, RFC 8037): a public key verifies and cannot sign.

`none` is no signature. With `HS256` and its like whoever verifies can sign, and a public key taken
for the shared secret would let anybody in (RFC 8725 section 2.1).
"""
TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt", "application/jwt"})
"""Values of `typ` in lower case. Others are made for other ends (RFC 8725 section 3.11)."""

TOKEN_OCTETS: Final = 16 * 1024
"""No longer token is looked at. A SASL response of 12,288 octets holds one of 9 KiB."""
KEYS: Final = 64
"""Keys taken of one set. The large providers have two to ten."""
TRIES: Final = 16
"""Keys that one token is tried with where it does not name its key."""
RSA_BITS: Final = range(2048, 16384 + 1)
"""RFC 7518 section 3.3 wants 2048 bits at least; OpenSSL verifies with 16384 at most."""

_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]+=*").fullmatch
_COMPACT = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)").fullmatch
_PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----", re.DOTALL)

Claims = Mapping[str, Any]


class UnknownKey(Exception):
    """No key fits this token: the issuer may have a new one."""


class BadKeys(Exception):
    """These are no keys. The text says why, and quotes none of it."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What claims must say, and which of them is the account's name.

    `issuer`     the `iss`, exactly
    `audience`   one of these must be in `aud`; empty: not asked (only where the issuer is asked)
    `claim`      the claim that is the name; `email` needs `email_verified`, too
    `domain`     names end in `@` and this, and the account's name is what stands before; `""`: any
    `scope`      words that must all be in `scope`
    `algorithms` of signatures
    `leeway`     seconds by which clocks may differ
    """

    issuer: str
    audience: frozenset[str]
    claim: str = "email"
    domain: str = ""
    scope: frozenset[str] = frozenset()
    algorithms: frozenset[str] = ALGORITHMS
    leeway: float = 60.0


@dataclass(frozen=True, slots=True)
class Key:
    """A public key of the issuer, its id if it has one, and what it may verify."""

    kid: str | None
    algorithms: frozenset[str]
    public: Any


@dataclass(frozen=True, slots=True)
class Jwt:
    """A JWT taken apart. Nothing in it is believed yet; `issuer` is `None` where it names none."""

    text: Secret
    header: Mapping[str, Any]
    issuer: str | None


def plausible(token: bytes) -> bool:
    """Whether this may be a token at all (RFC 6750 section 2.1)."""
    return len(token) <= TOKEN_OCTETS and _TOKEN(token) is not None


def taken_apart(token: bytes) -> Jwt | None:
    """The parts of a signed JWT (RFC 7515 section 3.1), `None` for what is not one."""
    parts = _COMPACT(token) if plausible(token) else None
    if parts is None:
        return None
    header, claims = _object(_decoded(parts[1])), _object(_decoded(parts[2]))
    if header is None or claims is None:
        return None
    issuer = claims.get("iss")
    return Jwt(Secret(token), header, issuer if isinstance(issuer, str) else None)


def signed_claims(token: Jwt, keys: Sequence[Key], rules: Rules) -> Claims:
    """The claims of `token` if one of `keys` has signed it. 0.1 ms of processor time.

    Raises `BadCredentials`, and `UnknownKey` where newer keys may change the answer.
    """
    algorithm, kid = token.header.get("alg"), token.header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in rules.algorithms:
        raise BadCredentials(FAILED, "token-algorithm")
    if not (kid is None or isinstance(kid, str)):
        raise BadCredentials(FAILED, "token-malformed")
    # `crit` and `b64` change what is signed, or what must be understood (RFC 7515 4.1.11).
    if "crit" in token.header or "b64" in token.header:
        raise BadCredentials(FAILED, "token-malformed")
    kind = token.header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in TYPES:
        raise BadCredentials(FAILED, "token-type")
    fitting = [key for key in keys if algorithm in key.algorithms]
    named = [key for key in fitting if kid is not None and key.kid == kid]
    candidates = named or [key for key in fitting if kid is None or key.kid is None]
    for key in candidates[:TRIES]:
        payload = _verified(token.text.reveal(), key, algorithm)
        if payload is not None:
            claims = _object(payload)
            if claims is None:
                break
            return claims
    if named:
        raise BadCredentials(FAILED, "token-signature")
    raise UnknownKey


def _verified(token: bytes, key: Key, algorithm: str) -> bytes | None:
    """What was signed, if `key` has signed it."""
    from jwt import PyJWS

    try:
        decoded = PyJWS().decode_complete(token, key.public, algorithms=[algorithm])
        payload: bytes = decoded["payload"]
        return payload
    except Exception:
        # Whatever the library says of it: not verified, and its words may quote the token.
        return None


def name_in(claims: Claims, rules: Rules, now: float, username: bytes) -> bytes:
    """The account that these claims open. `now` is in seconds since the epoch.

    `username` is what the client calls itself; it may be empty, and must not be another name.
    Raises `BadCredentials`, with a word for the log.
    """
    if claims.get("iss") != rules.issuer:
        raise BadCredentials(FAILED, "token-issuer")
    if rules.audience and not rules.audience.intersection(_words(claims.get("aud"), None)):
        raise BadCredentials(FAILED, "token-audience")
    _check_times(claims, rules.leeway, now)
    granted = {*_words(claims.get("scope"), " "), *_words(claims.get("scp"), " ")}
    if not rules.scope <= granted:
        raise BadCredentials(FAILED, "token-scope")
    # Bound to a key of the client's (RFC 7800): to whoever merely bears it, it is worth nothing.
    if "cnf" in claims:
        raise BadCredentials(FAILED, "token-bound")
    claimed = _claimed(claims, rules.claim)
    name = claimed
    if rules.domain:
        name, at, domain = claimed.rpartition(b"@")
        if not at or domain.lower() != rules.domain.lower().encode("utf-8"):
            raise BadCredentials(FAILED, "token-domain")
    if not acceptable_name(name):
        raise BadCredentials(FAILED, "token-name")
    if username and prepared(username) not in (claimed, name):
        raise BadCredentials(FAILED, "token-foreign-name")
    return name


def _claimed(claims: Claims, claim: str) -> bytes:
    value = claims.get(claim)
    if not isinstance(value, str) or not value:
        raise BadCredentials(FAILED, "token-claim")
    if claim == "email":
        # Some issuers write the word for the value (Cognito, Apple).
        proven = claims.get("email_verified")
        if proven is not True and proven != "true":
            raise BadCredentials(FAILED, "token-email-unverified")
    try:
        octets = value.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair; the exception would quote the name
        octets = b""
    return prepared(octets)


def _check_times(claims: Claims, leeway: float, now: float) -> None:
    expires, begins, made = (_seconds(claims, name) for name in ("exp", "nbf", "iat"))
    if expires is None:
        raise BadCredentials(FAILED, "token-expiry")
    if expires <= now - leeway:
        raise BadCredentials(FAILED, "token-expired")
    if any(time is not None and time > now + leeway for time in (begins, made)):
        raise BadCredentials(FAILED, "token-early")


def _seconds(claims: Claims, name: str) -> float | None:
    """A NumericDate (RFC 7519 section 2)."""
    value = claims.get(name)
    if value is None:
        return None
    # An integer may be too large for a float: it is compared, and nothing is added to it.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise BadCredentials(FAILED, "token-malformed")
    return value


def _words(value: object, separator: str | None) -> list[str]:
    """A claim that is a string or a list of strings; a string is split at `separator`."""
    if isinstance(value, str):
        return [value] if separator is None else value.split(separator)
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def told_claims(answer: bytes, rules: Rules) -> Claims | None:
    """The claims in an introspection response (RFC 7662 section 2.2). `None`: it is no response.

    Of `iss` and `exp`, which are optional there, `name_in` is told what the answer itself means:
    the issuer that was asked has answered, and for this moment. Raises `NoVerifierOfThisKind`
    for a token that the issuer does not know, or knows no more.
    """
    claims = _object(answer)
    if claims is None or not isinstance(claims.get("active"), bool):
        return None
    if not claims["active"]:
        raise NoVerifierOfThisKind(FAILED, "token-inactive")
    told = {name: value for name, value in claims.items() if value is not None}
    return {"iss": rules.issuer, "exp": math.inf} | told


def keys_in(octets: bytes, private: bool = True) -> tuple[Key, ...]:
    """The usable keys of a JWK set (RFC 7517 section 5), a single JWK, or PEM. Raises `BadKeys`.

    Of PEM: public keys and certificates, whose validity is not looked at. Keys of other kinds, for
    encryption, and RSA keys outside `RSA_BITS` are left out. `private`: whether to object to keys
    that are not public.
    """
    if octets.lstrip().startswith(b"-----BEGIN"):
        found = _pem_keys(octets)
    else:
        document = _object(octets)
        listed = document.get("keys", [document]) if document is not None else None
        if not isinstance(listed, list):
            raise BadKeys("neither a JWK set nor PEM")
        if private and any(isinstance(jwk, dict) and "d" in jwk for jwk in listed):
            raise BadKeys("holds a private key; the public one is enough, and all that is wanted")
        found = [key for jwk in listed if (key := _jwk(jwk)) is not None]
    if not found:
        raise BadKeys("holds no key that can verify a signature")
    return tuple(found[:KEYS])


def _pem_keys(octets: bytes) -> list[Key]:
    found: list[Key] = []
    for block in _PEM.finditer(octets):
        if b"PRIVATE" in block[1]:
            raise BadKeys("holds a private key; the public one is enough, and all that is wanted")
        public: Any = None
        try:
            if block[1] == b"CERTIFICATE":
                public = x509.load_pem_x509_certificate(block[0]).public_key()
            else:
                public = load_pem_public_key(block[0])
        except Exception:
            public = None
        algorithms = _algorithms(public)
        if not algorithms:
            raise BadKeys("holds PEM that is no public key of a kind that is taken")
        found.append(Key(None, algorithms, public))
    return found


def _jwk(jwk: object) -> Key | None:
    from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig":
        return None
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    # Its public half, whatever else there is.
    bare = {name: jwk[name] for name in ("kty", "crv", "n", "e", "x", "y") if name in jwk}
    readers: dict[str, Any] = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}
    reader = readers.get(str(jwk.get("kty")))
    try:
        public = None if reader is None else reader.from_jwk(bare)
    except Exception:  # one bad key of a set spoils none of the others
        public = None
    algorithms = _algorithms(public)
    only = jwk.get("alg")
    if only is not None:
        # RFC 9864 gives the curves of EdDSA names of their own.
        algorithms &= {"EdDSA" if only in ("Ed25519", "Ed448") else str(only)}
    kid = jwk.get("kid")
    if not algorithms or not (kid is None or isinstance(kid, str)):
        return None
    return Key(kid, algorithms, public)


def _algorithms(public: object) -> frozenset[str]:
    """What a signature by such a key can be; nothing for keys that are not taken."""
    if isinstance(public, rsa.RSAPublicKey):
        return frozenset(_RSA if public.key_size in RSA_BITS else ())
    if isinstance(public, ec.EllipticCurvePublicKey):
        return frozenset({_CURVES[public.curve.name]} if public.curve.name in _CURVES else ())
    if isinstance(public, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        return frozenset({"EdDSA"})
    return frozenset()


def _decoded(part: bytes) -> bytes:
    try:
        return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    except ValueError:
        return b""


def _object(octets: bytes) -> dict[str, Any] | None:
    """A JSON object, `None` for anything else."""
    try:
        value = json.loads(octets)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
