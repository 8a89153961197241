"""SASL exchanges without input or output (RFC 4422, RFC 5034).

An exchange takes the client's decoded responses one by one and gives a challenge or, at its end,
credentials. The session does the base64 and the lines.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from typing import Final, Protocol

from popdrop.credentials import FAILED, Cleartext
from popdrop.errors import BadCredentials

_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?").fullmatch


class Exchange(Protocol):
    """One exchange of one mechanism."""

    def step(self, response: bytes | None) -> bytes | Cleartext:
        """Take a decoded response, `None` if there is none yet.

        Returns the next challenge, to be encoded, or credentials. Raises `BadCredentials`.
        """


class Plain:
    """PLAIN (RFC 4616): one response, `authzid NUL authcid NUL password`.

    Taken apart here and not by pysasl, whose credentials compare a password but do not hand it on
    to a checker.
    """

    def step(self, response: bytes | None) -> bytes | Cleartext:
        """As `Exchange.step`. An authzid other than the authcid is refused: nobody may proxy."""
        if response is None:
            return b""
        fields = response.split(b"\0")
        if len(fields) != 3 or not fields[1] or not fields[2]:
            raise BadCredentials(FAILED, "malformed PLAIN response")
        authzid, authcid, password = fields
        if authzid not in (b"", authcid):
            raise BadCredentials(FAILED, "foreign authzid")
        return Cleartext(authcid, password, "PLAIN")


MECHANISMS: Final[dict[bytes, type[Plain]]] = {b"PLAIN": Plain}
"""The exchanges there are, by their names in upper case."""

CLEARTEXT_MECHANISMS: Final = frozenset({b"PLAIN"})
"""Those that send the password itself: `--cleartext` holds for them as for USER/PASS."""


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
