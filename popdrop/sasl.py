"""SASL exchanges without input or output (RFC 4422, RFC 5034).

An exchange takes the client's decoded responses one by one and gives a challenge, a question to be
put to the accounts, or, at its end, credentials. The session does the base64 and the lines. What
credentials are worth is not judged here, but for SCRAM's proof, which decides who speaks next.

Each is taken apart here and not by pysasl or scramp. Credentials of pysasl compare a password but
do not hand it on to a checker. scramp (1.5) knows no tls-exporter, asks for the verifier in the
middle of a call, and costs 8 MB; it is the client in the tests.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from popdrop.credentials import (
    FAILED,
    BearerToken,
    Cleartext,
    CramCredentials,
    Credentials,
    ExternalCredentials,
    ScramCredentials,
)
from popdrop.errors import BadCredentials
from popdrop.values import PeerFacts, ScramVerifier

_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?").fullmatch
_NONCE = re.compile(rb"[\x21-\x2b\x2d-\x7e]+").fullmatch
_ATTRIBUTE = re.compile(rb"[A-Za-z]=[^\0,]+").fullmatch
_HEX_DIGEST = re.compile(rb"[0-9a-f]{32}").fullmatch
_TOKEN = re.compile(rb"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)").fullmatch
"""RFC 6750 section 2.1."""


CHANNEL_BINDING: Final = "channel-binding"
"""The detail of failures that may mean somebody between the client and the server."""


@dataclass(frozen=True, slots=True)
class ScramQuery:
    """What is kept of this name's password for `algorithm`? The answer is a `ScramVerifier`."""

    username: bytes
    algorithm: str


@dataclass(frozen=True, slots=True)
class ApopQuery:
    """Whether the account of that name has an APOP secret: qpopper 4 asks so at USER."""

    username: bytes


Query = ScramQuery | ApopQuery
"""Questions that the accounts answer before anybody has logged in."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an exchange may need to know.

    `nonce` gives 128 random bits at each call, as hexadecimal digits. `plus` says whether
    mechanisms with channel binding are offered on this connection.
    """

    nonce: Callable[[], bytes]
    hostname: str = "localhost"
    peer: PeerFacts = field(default_factory=PeerFacts)
    plus: bool = False


Step = bytes | ScramQuery | Credentials


class Exchange(Protocol):
    """One exchange of one mechanism."""

    error_challenge: bytes | None
    """What the client is told by a last challenge when its credentials are refused."""
    success_challenge: bytes | None
    """The same when they were good: the client answers with an empty response."""

    def step(self, response: bytes | None) -> Step:
        """Take a decoded response, `None` if there is none yet.

        Returns the next challenge, to be encoded, credentials, or a question, to be answered by
        `told`. Raises `BadCredentials`.
        """

    def told(self, answer: object) -> Step:
        """Take the answer. As `step`."""


class _Exchange:
    error_challenge: bytes | None = None
    success_challenge: bytes | None = None

    def __init__(self, mechanism: str, around: Surroundings) -> None:
        self._mechanism = mechanism
        self._around = around

    def told(self, answer: object) -> Step:
        raise RuntimeError(f"{self._mechanism} has asked nothing")


def _malformed(what: str) -> BadCredentials:
    return BadCredentials(FAILED, f"malformed {what}")


class Plain(_Exchange):
    """PLAIN (RFC 4616): one response, `authzid NUL authcid NUL password`."""

    def step(self, response: bytes | None) -> Step:
        """As `Exchange.step`. An authzid other than the authcid is refused: nobody may proxy."""
        if response is None:
            return b""
        fields = response.split(b"\0")
        if len(fields) != 3 or not fields[1] or not fields[2]:
            raise _malformed("PLAIN response")
        authzid, authcid, password = fields
        if authzid not in (b"", authcid):
            raise BadCredentials(FAILED, "foreign authzid")
        return Cleartext(authcid, password, "PLAIN")


class Login(_Exchange):
    """LOGIN (draft-murchison-sasl-login-00): name, then password. The name may come at once."""

    _name: bytes | None = None

    def step(self, response: bytes | None) -> Step:
        """As `Exchange.step`."""
        if response is None:
            return b"Username:"
        if not response or b"\0" in response:
            raise _malformed("LOGIN response")
        if self._name is None:
            self._name = response
            return b"Password:"
        return Cleartext(self._name, response, "LOGIN")


class CramMd5(_Exchange):
    """CRAM-MD5 (RFC 2195): the server speaks first, so an initial response is refused."""

    _challenge = b""

    def step(self, response: bytes | None) -> Step:
        """As `Exchange.step`."""
        if not self._challenge:
            if response is not None:
                raise _malformed("CRAM-MD5 exchange: the server begins")
            host = self._around.hostname.encode("ascii", "replace")
            self._challenge = b"<" + self._around.nonce() + b"@" + host + b">"
            return self._challenge
        name, _, digest = (response or b"").rpartition(b" ")
        if not name or b"\0" in name or not _HEX_DIGEST(digest):
            raise _malformed("CRAM-MD5 response")
        return CramCredentials(name, self._challenge, digest)


class External(_Exchange):
    """EXTERNAL (RFC 4422 appendix A): one response, the authzid, mostly empty."""

    def step(self, response: bytes | None) -> Step:
        """As `Exchange.step`. Without a name in the certificate there is no login at all."""
        if response is None:
            return b""
        name = (self._around.peer.certificate_name or "").encode("utf-8")
        if not name:
            raise BadCredentials(FAILED, "no certificate name")
        if response not in (b"", name):
            raise BadCredentials(FAILED, "foreign authzid")
        return ExternalCredentials(name)


class OAuthBearer(_Exchange):
    """OAUTHBEARER (RFC 7628): a gs2-header, then fields that each end in ^A."""

    error_challenge: bytes | None = b'{"status":"invalid_token"}'

    def step(self, response: bytes | None) -> Step:
        """As `Exchange.step`. `host` and `port` are not looked at, as in Dovecot."""
        if response is None:
            return b""
        header, _, rest = response.partition(b"\1")
        flag, authzid = _gs2(header)
        if flag not in (b"n", b"y"):
            raise BadCredentials(FAILED, CHANNEL_BINDING)
        return BearerToken(authzid, _token(rest), self._mechanism)


class XOAuth2(_Exchange):
    """XOAUTH2, as Google documents it: `user=NAME ^A auth=Bearer TOKEN ^A ^A`."""

    error_challenge: bytes | None = b'{"status":"401","schemes":"bearer"}'

    def step(self, response: bytes | None) -> Step:
        """As `Exchange.step`."""
        if response is None:
            return b""
        user, _, rest = response.partition(b"\1")
        if not user.startswith(b"user=") or b"\0" in user or len(user) == len(b"user="):
            raise _malformed("XOAUTH2 response")
        return BearerToken(user.removeprefix(b"user="), _token(rest), self._mechanism)


def _token(fields: bytes) -> bytes:
    """The token in `key=value ^A` fields, which end in one more ^A."""
    head, found, tail = fields.rpartition(b"\1\1")
    if not found or tail:
        raise _malformed("bearer response: no end")
    auths = [one[5:] for one in head.split(b"\1") if one.startswith(b"auth=")]
    token = _TOKEN(auths[0]) if len(auths) == 1 else None
    if token is None:
        raise _malformed("bearer response: no token")
    return token[1]


def _gs2(header: bytes) -> tuple[bytes, bytes]:
    """Flag and authzid of a gs2-header (RFC 5801 section 4), its last comma included."""
    parts = header.split(b",")
    if len(parts) != 3 or parts[2] or (parts[1] and not parts[1].startswith(b"a=")):
        raise _malformed("gs2-header")
    if parts[1] == b"a=":
        raise _malformed("gs2-header")
    return parts[0], _name(parts[1][2:]) if parts[1] else b""


def _name(saslname: bytes) -> bytes:
    """RFC 5802 section 5.1: `=2C` is a comma, `=3D` an equals sign, no other `=` may stand."""
    if re.sub(rb"=(?:2C|3D)", b"", saslname).count(b"=") or b"\0" in saslname:
        raise _malformed("saslname")
    try:
        saslname.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("saslname") from None
    return saslname.replace(b"=2C", b",").replace(b"=3D", b"=")


class Scram(_Exchange):
    """SCRAM-SHA-1 and SCRAM-SHA-256 (RFC 5802, RFC 7677), with channel binding and without.

    Client-first, a question to the accounts, server-first, client-final, and the credentials: they
    are verified against the account as it is then. The server shows its own proof only when they
    have let the client in: one who is told that the password of a disabled account is right would
    have learnt something.
    """

    def __init__(self, mechanism: str, around: Surroundings) -> None:
        super().__init__(mechanism, around)
        self._bound = mechanism.endswith("-PLUS")
        self._algorithm = mechanism.removeprefix("SCRAM-").removesuffix("-PLUS")
        self._next: Callable[[bytes | None], Step] = self._client_first

    def step(self, response: bytes | None) -> Step:
        """As `Exchange.step`."""
        return self._next(response)

    def _client_first(self, response: bytes | None) -> Step:
        if response is None:
            return b""
        parts = response.split(b",", 2)
        if len(parts) != 3:
            raise _malformed("client-first")
        header = b",".join(parts[:2]) + b","
        flag, authzid = _gs2(header)
        self._first = parts[2]
        fields = self._first.split(b",")
        attributes = [_attribute(one) for one in fields]
        if [name for name, _ in attributes[:2]] != [b"n", b"r"]:
            raise _malformed("client-first")
        self._user, self._client_nonce = _name(attributes[0][1]), attributes[1][1]
        if not _NONCE(self._client_nonce):
            raise _malformed("nonce")
        self._binding = header + self._channel(flag)
        if authzid not in (b"", self._user):
            raise BadCredentials(FAILED, "foreign authzid")
        self._next = self._unexpected
        return ScramQuery(self._user, self._algorithm)

    def _channel(self, flag: bytes) -> bytes:
        """The channel binding that the client must show. Raises `BadCredentials`."""
        if flag.startswith(b"p=") and self._bound:
            found = self._around.peer.bindings.get(flag[2:].decode("ascii", "replace"))
            if found is None:
                raise BadCredentials(FAILED, CHANNEL_BINDING)
            return found
        if self._bound or flag not in (b"n", b"y"):
            raise BadCredentials(FAILED, CHANNEL_BINDING)
        if flag == b"y" and self._around.plus:
            # The client can do it and has not seen that we can: somebody has changed our CAPA.
            raise BadCredentials(FAILED, CHANNEL_BINDING)
        return b""

    def _unexpected(self, response: bytes | None) -> Step:
        raise _malformed("exchange")

    def told(self, answer: object) -> Step:
        """As `Exchange.told`."""
        if not isinstance(answer, ScramVerifier):
            raise TypeError("a verifier was asked for")
        self._verifier = answer
        self._nonce = self._client_nonce + self._around.nonce()
        self._server_first = b"r=%s,s=%s,i=%d" % (
            self._nonce,
            b64encode(answer.salt),
            answer.iterations,
        )
        self._next = self._client_final
        return self._server_first

    def _client_final(self, response: bytes | None) -> Step:
        without, found, shown = (response or b"").rpartition(b",p=")
        attributes = [_attribute(one) for one in without.split(b",")]
        if not found or [name for name, _ in attributes[:2]] != [b"c", b"r"]:
            raise _malformed("client-final")
        if _octets(attributes[0][1]) != self._binding:
            raise BadCredentials(FAILED, CHANNEL_BINDING)
        if attributes[1][1] != self._nonce:
            raise BadCredentials(FAILED, "nonce")
        message = b",".join((self._first, self._server_first, without))
        credentials = ScramCredentials(
            self._user, self._mechanism, self._algorithm, message, _octets(shown)
        )
        self.success_challenge = b"v=" + b64encode(credentials.answer(self._verifier))
        self._next = self._unexpected
        return credentials


def _attribute(text: bytes) -> tuple[bytes, bytes]:
    """RFC 5802 section 5.1: a letter, `=`, a value. Extensions are passed over, but for `m`."""
    if not _ATTRIBUTE(text) or text[:1] == b"m":
        raise _malformed("attribute")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("attribute") from None
    return text[:1], text[2:]


def _octets(base64: bytes) -> bytes:
    try:
        return decoded(base64)
    except BadCredentials:
        raise _malformed("base64 in a message") from None


class Accepted(_Exchange):
    """What is left of an exchange whose client is logged in and was told so by a challenge.

    `welcome` is the reply that follows the client's empty response.
    """

    def __init__(self, welcome: bytes) -> None:
        self.welcome = welcome

    def step(self, response: bytes | None) -> Step:
        """Nothing is left to do."""
        return b""


class Refused(_Exchange):
    """What is left of an exchange whose client was told by a challenge that it has failed.

    Whatever it answers, the failure is `error`.
    """

    def __init__(self, error: BadCredentials) -> None:
        self.error = error

    def step(self, response: bytes | None) -> Step:
        """Raises the error."""
        raise self.error


MECHANISMS: Final[dict[bytes, Callable[[str, Surroundings], Exchange]]] = {
    b"SCRAM-SHA-256-PLUS": Scram,
    b"SCRAM-SHA-1-PLUS": Scram,
    b"SCRAM-SHA-256": Scram,
    b"SCRAM-SHA-1": Scram,
    b"EXTERNAL": External,
    b"OAUTHBEARER": OAuthBearer,
    b"XOAUTH2": XOAuth2,
    b"CRAM-MD5": CramMd5,
    b"PLAIN": Plain,
    b"LOGIN": Login,
}
"""The exchanges there are, by their names in upper case, the strongest first."""


def decoded(line: bytes) -> bytes:
    """A response in canonical base64. Raises `BadCredentials` for anything else."""
    try:
        if _BASE64(line):
            octets = b64decode(line, validate=True)
            if b64encode(octets) == line:
                return octets
    except Base64Error:
        pass
    raise BadCredentials("Invalid base64 in the response.", "bad base64")


def encoded(challenge: bytes) -> bytes:
    """A challenge as a continuation line: `+ ` with its blank even if nothing follows."""
    return b"+ " + b64encode(challenge) + b"\r\n"
