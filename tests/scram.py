"""The client's side of SCRAM, by scramp, and accounts that know verifiers."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

from scramp import ScramClient
from scramp.core import CbName
from zope.interface import implementer

from popdrop.errors import TemporaryFailure
from popdrop.interfaces import IAccounts, IScramAccounts
from popdrop.values import Account, ScramVerifier, Secret

ALGORITHMS = ("SHA-1", "SHA-256")
ALL = tuple(f"SCRAM-{algorithm}{plus}" for plus in ("", "-PLUS") for algorithm in ALGORITHMS)
_HASHES = {"SHA-1": "sha1", "SHA-256": "sha256"}


def verifier(
    password: bytes, algorithm: str, salt: bytes = b"salt of 16 octets", iterations: int = 4096
) -> ScramVerifier:
    """RFC 5802 section 3."""
    name = _HASHES[algorithm]
    salted = hashlib.pbkdf2_hmac(name, password, salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", name)
    stored_key = hashlib.new(name, client_key).digest()
    server_key = hmac.digest(salted, b"Server Key", name)
    return ScramVerifier(salt, iterations, Secret(stored_key), Secret(server_key))


def knowing_exporter() -> AbstractContextManager[object]:
    """scramp computes with any binding, but has a list of their names without this one."""
    names = CbName.SUPPORTED_TYPES | {"tls-exporter"}
    return mock.patch.multiple(CbName, SUPPORTED_TYPES=names, UNSUPPORTED_TYPES=frozenset())


class Client:
    """One exchange. `binding` is a name and octets; without -PLUS it makes the flag `y`."""

    def __init__(
        self,
        mechanism: str,
        user: str,
        password: str,
        binding: tuple[str, bytes] | None = None,
        nonce: str | None = None,
    ) -> None:
        with knowing_exporter():
            self._client = ScramClient([mechanism], user, password, binding, nonce)

    def first(self) -> bytes:
        with knowing_exporter():
            return self._client.get_client_first().encode()

    def final(self, server_first: bytes) -> bytes:
        self._client.set_server_first(server_first.decode())
        return self._client.get_client_final().encode()

    def finish(self, server_final: bytes) -> None:
        """Raises if the server does not know the verifier."""
        self._client.set_server_final(server_final.decode())


@implementer(IAccounts, IScramAccounts)
class ScramAccounts:
    """Accounts by name and password, and made-up verifiers for all others."""

    def __init__(self, **passwords: str) -> None:
        self.passwords = {name.encode(): word.encode() for name, word in passwords.items()}
        self.trouble: Exception | None = None
        self.before: Callable[[bytes], None] = lambda name: None

    def lookup(self, name: bytes) -> Account | None:
        if self.trouble is not None:
            raise self.trouble
        if name not in self.passwords:
            return None
        return Account(name, password_hash=Secret(b"not looked at"))

    def scram(self, name: bytes, algorithm: str) -> ScramVerifier:
        self.before(name)
        if self.trouble is not None:
            raise self.trouble
        word = self.passwords.get(name)
        return verifier(b"\0" if word is None else word, algorithm, b"made up of " + name)


def unreadable() -> TemporaryFailure:
    return TemporaryFailure("Accounts cannot be read now, try again later.", "a detail")
