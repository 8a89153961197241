"""What a client has shown of itself, and which names and words are taken at all.

The credentials are Twisted's (`twisted.cred.credentials`), so any checker understands them; these
ones compare in constant time and refuse to be printed.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from functools import lru_cache
from hashlib import blake2b
from typing import final

from pysasl.prep import saslprep
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from zope.interface import implementer

from popdrop.errors import BadCredentials
from popdrop.interfaces import IBearerToken, IExternal, IScramCredentials
from popdrop.values import ScramVerifier, Secret

FAILED = "Authentication failed."
"""The one text of every failed login: it does not say which part was wrong (RFC 3206 4)."""

NAME_OCTETS = 64
PREPARED_OCTETS = 256
"""The longest text that SASLprep looks at: no name or password that is kept is longer. AUTH can
bring 9 KiB, on which it took 95 ms, of the reactor's time for a password."""
_RESERVED_ENDINGS = (".lock", ".pop", ".popdrop")
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


@lru_cache(maxsize=4096)  # asked twice at each login
def acceptable_name(name: bytes) -> bool:
    """Whether `name` may become part of a path or a log line (decision 26).

    Refused: empty; over 64 octets; not UTF-8; beginning with `.` or `-`; ending with `.`, or in any
    case with `.lock`, `.pop`, `.popdrop`, which are names of files beside a spool; holding `/`,
    NUL, or a control, format or line separating character.
    """
    if not 0 < len(name) <= NAME_OCTETS or name[0] in b".-" or name[-1] in b"." or b"/" in name:
        return False
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    if text.lower().endswith(_RESERVED_ENDINGS):
        return False
    if text.isascii():
        return text.isprintable()
    return not any(unicodedata.category(character) in _UNPRINTABLE for character in text)


def prepared(text: bytes) -> bytes:
    """A name or password in UTF-8, as it is stored and compared: SASLprep (RFC 4013).

    Printable ASCII stays as it is. Raises `BadCredentials` for what is not UTF-8, holds characters
    that SASLprep prohibits (control characters among them), vanishes altogether, or is over
    `PREPARED_OCTETS` long.
    """
    result = _prepared(text)
    if result is None:
        # Raised here and not where it was found out: the exceptions there quote the text.
        raise BadCredentials(FAILED)
    return result


def prepared_or_raw(text: bytes) -> bytes:
    """As `prepared`, else `text` itself: what cannot be prepared equals nothing that is kept."""
    found = _prepared(text)
    return text if found is None else found


def _prepared(text: bytes) -> bytes | None:
    try:
        characters = text.decode("utf-8")
        if characters.isascii() and characters.isprintable():
            return text
        if len(text) > PREPARED_OCTETS:
            return None
        return saslprep(characters).encode("utf-8") or None
    except ValueError:
        return None


def _proof(key: bytes, user: bytes, secret: bytes) -> bytes:
    # Keyed BLAKE2b (RFC 7693) is a MAC; an HMAC by OpenSSL took ten times as long, 28 us a login.
    return blake2b(user + b"\0" + secret, key=key, digest_size=32).digest()


@final
@implementer(IUsernamePassword)
class Cleartext:
    """A name and a password, shown by USER and PASS or by a SASL mechanism.

    `mechanism` is `USER`, `PLAIN` or `LOGIN`. `client` is the client's address as far as it is
    known and trusted, for a memory of good logins; else empty.
    """

    __slots__ = ("_password", "client", "mechanism", "username")

    def __init__(self, username: bytes, password: bytes, mechanism: str = "USER") -> None:
        self.username = username
        self.client = ""
        self.mechanism = mechanism
        self._password = Secret(password)

    @property
    def password(self) -> bytes:
        """The octets, for checkers that want them. Never log them."""
        return self._password.reveal()

    def checkPassword(self, password: bytes) -> bool:
        """Whether `password` is the same, in constant time."""
        return hmac.compare_digest(self._password.reveal(), password)

    def proof(self, key: bytes) -> bytes:
        """A MAC of name and password: the same again for the same again (decision 24)."""
        return _proof(key, self.username, self._password.reveal())

    def __repr__(self) -> str:
        return f"<Cleartext by {self.mechanism}>"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("credentials cannot be pickled")


@final
@implementer(IUsernameHashedPassword)
class ApopCredentials:
    """A name and the MD5 digest of challenge and shared secret (RFC 1939 section 7, APOP).

    `challenge` is the msg-id of the greeting, angle brackets included. `digest` is what the client
    sent, 32 hexadecimal digits; the RFC asks for lower case, both are taken.
    """

    __slots__ = ("_digest", "challenge", "username")

    mechanism = "APOP"

    def __init__(self, username: bytes, challenge: bytes, digest: bytes) -> None:
        self.username = username
        self.challenge = challenge
        self._digest = Secret(digest)

    @property
    def digest(self) -> bytes:
        """As the client sent it, for checkers that pass it on. Never log it."""
        return self._digest.reveal()

    def checkPassword(self, password: bytes) -> bool:
        """Whether the client knows the secret `password`, in constant time."""
        expected = hashlib.md5(self.challenge + password, usedforsecurity=False).hexdigest()
        return hmac.compare_digest(self._digest.reveal().lower(), expected.encode("ascii"))

    def proof(self, key: bytes) -> bytes:
        """A MAC of name and digest. Each challenge makes another one of the same secret."""
        return _proof(key, self.username, self._digest.reveal().lower())

    def __repr__(self) -> str:
        return "<ApopCredentials>"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("credentials cannot be pickled")


@final
@implementer(IUsernameHashedPassword)
class CramCredentials:
    """A name and the HMAC-MD5 of a challenge under the shared secret (RFC 2195 section 2).

    The secret is that of APOP, so checkers take both alike; one that hands the digest on to a
    program must ask which it is. `challenge` is a msg-id, angle brackets included. `digest` is 32
    hexadecimal digits in lower case.
    """

    __slots__ = ("_digest", "challenge", "username")

    mechanism = "CRAM-MD5"

    def __init__(self, username: bytes, challenge: bytes, digest: bytes) -> None:
        self.username = username
        self.challenge = challenge
        self._digest = Secret(digest)

    def checkPassword(self, password: bytes) -> bool:
        """Whether the client knows the secret `password`, in constant time."""
        expected = hmac.digest(password, self.challenge, "md5").hex()
        return hmac.compare_digest(self._digest.reveal(), expected.encode("ascii"))

    def proof(self, key: bytes) -> None:
        """None: of the same secret each challenge makes another digest."""

    def __repr__(self) -> str:
        return "<CramCredentials>"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("credentials cannot be pickled")


_HASHES = {"SHA-1": "sha1", "SHA-256": "sha256"}
"""Those of SCRAM (RFC 5802, RFC 7677), by hashlib's names."""


@final
@implementer(IScramCredentials)
class ScramCredentials:
    """A name and the proof that the client knows the password (RFC 5802 section 3).

    `algorithm` is `SHA-1` or `SHA-256`. `auth_message` is AuthMessage of the RFC: all that both
    sides have said, with the nonces and the channel binding. The proof is as long as the hash.
    """

    __slots__ = ("_auth_message", "_proof", "algorithm", "mechanism", "username")

    def __init__(
        self, username: bytes, mechanism: str, algorithm: str, auth_message: bytes, proof: bytes
    ) -> None:
        self.username = username
        self.mechanism = mechanism
        self.algorithm = algorithm
        self._auth_message = Secret(auth_message)
        self._proof = Secret(proof)

    def check(self, verifier: ScramVerifier) -> bool:
        """Whether this is the proof of the password that `verifier` was made of."""
        name = _HASHES[self.algorithm]
        stored = verifier.stored_key.reveal()
        signature = hmac.digest(stored, self._auth_message.reveal(), name)
        shown = self._proof.reveal()
        key = bytes(a ^ b for a, b in zip(shown, signature, strict=False))
        hashed = hashlib.new(name, key, usedforsecurity=False).digest()
        return len(shown) == len(signature) and hmac.compare_digest(hashed, stored)

    def answer(self, verifier: ScramVerifier) -> bytes:
        """ServerSignature: the server's own proof that it knows the verifier."""
        server = verifier.server_key.reveal()
        return hmac.digest(server, self._auth_message.reveal(), _HASHES[self.algorithm])

    def proof(self, key: bytes) -> None:
        """None: of the same password each nonce makes another proof."""

    def __repr__(self) -> str:
        return f"<ScramCredentials by {self.mechanism}>"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("credentials cannot be pickled")


@final
@implementer(IBearerToken)
class BearerToken:
    """A name and a token: of OAUTHBEARER (RFC 7628), or of XOAUTH2, which Google has made.

    The name may be empty: then it is the token's.
    """

    __slots__ = ("_token", "mechanism", "username")

    def __init__(self, username: bytes, token: bytes, mechanism: str = "OAUTHBEARER") -> None:
        self.username = username
        self.mechanism = mechanism
        self._token = Secret(token)

    @property
    def token(self) -> bytes:
        """For checkers. Never log it."""
        return self._token.reveal()

    def proof(self, key: bytes) -> bytes:
        """A MAC of name and token."""
        return _proof(key, self.username, self._token.reveal())

    def __repr__(self) -> str:
        return f"<BearerToken by {self.mechanism}>"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("credentials cannot be pickled")


@final
@implementer(IExternal)
class ExternalCredentials:
    """The name in a client certificate that TLS has verified (RFC 4422 appendix A)."""

    __slots__ = ("username",)

    mechanism = "EXTERNAL"

    def __init__(self, username: bytes) -> None:
        self.username = username

    def proof(self, key: bytes) -> bytes:
        """A MAC of the name."""
        return _proof(key, self.username, b"")

    def __repr__(self) -> str:
        return "<ExternalCredentials>"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("credentials cannot be pickled")


Credentials = (
    Cleartext
    | ApopCredentials
    | CramCredentials
    | ScramCredentials
    | BearerToken
    | ExternalCredentials
)
"""All that a session may ask a checker to verify."""
