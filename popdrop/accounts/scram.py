"""What is kept of a password for SCRAM: made by scramp, packed for sealing, made up for nobody.

Neither key is the password, but whoever steals them can log in by SCRAM (the client key follows
from one recorded login) or guess off line at PBKDF2's price: so they are sealed, too (decision 21).
"""

from __future__ import annotations

from hashlib import blake2b
from secrets import token_bytes
from typing import Final

from popdrop.values import ScramVerifier, Secret

ITERATIONS: Final = 10_000
"""Of PBKDF2. RFC 7677 section 4 asks for 4,096 at least; clients on telephones count them, too."""

KEY_OCTETS: Final = {"SHA-1": 20, "SHA-256": 32}
"""The algorithms, and the length of their hashes in octets."""

KINDS: Final = {algorithm: f"scram-{algorithm.lower()}" for algorithm in KEY_OCTETS}
"""The kinds of verifiers in the accounts database, by algorithm."""

ALL_KINDS: Final = frozenset(KINDS.values())

SALT_OCTETS: Final = 32
"""scramp's own length; the made-up ones must not stand out."""

_COUNT_OCTETS: Final = 4


def derived(algorithm: str, password: bytes) -> ScramVerifier:
    """A new verifier of a prepared password, under a random salt. Takes some 4 ms.

    For one that scramp does not take it is a verifier that nobody can satisfy.
    """
    from scramp import ScramException, ScramMechanism

    mechanism = ScramMechanism(f"SCRAM-{algorithm}")
    try:
        salt, stored, server, count = mechanism.make_auth_info(
            password.decode("utf-8"), ITERATIONS, token_bytes(SALT_OCTETS)
        )
    except (ScramException, UnicodeDecodeError):
        return decoy(token_bytes(64), algorithm, b"")
    return ScramVerifier(salt, count, Secret(stored), Secret(server))


def packed(verifier: ScramVerifier) -> Secret:
    """Iterations, both keys, salt: the octets to seal."""
    return Secret(
        verifier.iterations.to_bytes(_COUNT_OCTETS, "big")
        + verifier.stored_key.reveal()
        + verifier.server_key.reveal()
        + verifier.salt
    )


def unpacked(algorithm: str, secret: Secret) -> ScramVerifier:
    """What `packed` packed. Raises `ValueError` for anything too short."""
    octets, size = secret.reveal(), KEY_OCTETS[algorithm]
    keys = _COUNT_OCTETS + 2 * size
    if len(octets) <= keys:
        raise ValueError("a SCRAM verifier is damaged")
    return ScramVerifier(
        octets[keys:],
        int.from_bytes(octets[:_COUNT_OCTETS], "big"),
        Secret(octets[_COUNT_OCTETS : _COUNT_OCTETS + size]),
        Secret(octets[_COUNT_OCTETS + size : keys]),
    )


def decoy(key: bytes, algorithm: str, name: bytes) -> ScramVerifier:
    """A verifier that no password has, always the same for the same `key` and name.

    `key` is 64 octets at most and must be secret: the challenge would tell otherwise that there is
    no such account.
    """

    def octets(purpose: bytes, size: int) -> bytes:
        text = purpose + b"\0" + algorithm.encode("ascii") + b"\0" + name
        return blake2b(text, key=key, digest_size=size, person=b"popdrop scram").digest()

    size = KEY_OCTETS[algorithm]
    return ScramVerifier(
        octets(b"salt", SALT_OCTETS),
        ITERATIONS,
        Secret(octets(b"stored", size)),
        Secret(octets(b"server", size)),
    )
