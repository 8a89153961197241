"""Secrets at rest: Argon2id hashes of passwords, and APOP secrets sealed under a key.

APOP needs the shared secret itself (RFC 1939 section 7), so it cannot be hashed. It is sealed by
AES-256-GCM instead, with a key in a file of its own: who takes the database alone has nothing, and
a sealed secret opens only for the account, kind and database it was sealed for (decision 21).
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.values import Secret

ARGON2_MEMORY: Final = 19 * 1024
"""KiB (OWASP's second choice of Argon2id parameters: 19 MiB, two passes, one lane)."""
ARGON2_TIME: Final = 2
ARGON2_LANES: Final = 1

KEY_OCTETS: Final = 32
_KEY_ID_OCTETS: Final = 8
_NONCE_OCTETS: Final = 12
_TAG_OCTETS: Final = 16
_FORMAT: Final = b"\x01"
_HEAD: Final = len(_FORMAT) + _KEY_ID_OCTETS + _NONCE_OCTETS

# Nobody's password: 128 zero bits of salt and a 256-bit hash of all zero bits. Verifying against it
# costs what verifying against a real one does.
_NOBODY: Final = Secret(
    f"$argon2id$v=19$m={ARGON2_MEMORY},t={ARGON2_TIME},p={ARGON2_LANES}$".encode("ascii")
    + b"A" * 22
    + b"$"
    + b"A" * 43
)


class Hasher:
    """Argon2id. Each call takes some 20 ms of one processor and 19 MiB: call it in a pool.

    The library lets go of the interpreter's lock meanwhile. How many run at a time is for the pool
    to bound.
    """

    def __init__(self) -> None:
        self._argon2 = PasswordHasher(
            time_cost=ARGON2_TIME, memory_cost=ARGON2_MEMORY, parallelism=ARGON2_LANES
        )

    def hash(self, password: bytes) -> Secret:
        """A new salted hash in the PHC string format."""
        return Secret(self._argon2.hash(password).encode("ascii"))

    def verify(self, hashed: Secret | None, password: bytes) -> bool:
        """Whether `password` is the one hashed. `None`, for nobody, costs the same and is `False`.

        Raises `TemporaryFailure` when the hash itself is damaged.
        """
        known = hashed if hashed is not None else _NOBODY
        try:
            matches = self._argon2.verify(known.reveal(), password)
        except VerifyMismatchError:
            return False
        except (VerificationError, InvalidHashError, UnicodeDecodeError) as error:
            kind = type(error).__name__
        else:
            return matches and hashed is not None
        raise TemporaryFailure("Account cannot be verified.", f"damaged password hash: {kind}")

    def is_outdated(self, hashed: Secret) -> bool:
        """Whether today's parameters are others: the next good login makes a new hash."""
        try:
            return self._argon2.check_needs_rehash(hashed.reveal().decode("ascii"))
        except (InvalidHashError, UnicodeDecodeError):
            return True


class CannotOpen(Exception):
    """A sealed secret does not open: another key, another account, or damaged."""


class Vault:
    """Seals and opens the secrets of one database under one key.

    `key_id` tells keys apart and nothing of them. `decoy_key` is for `scram.decoy`: secret, and the
    same as long as the key is.
    """

    def __init__(self, key: Secret, database_id: bytes) -> None:
        self._cipher = AESGCM(key.reveal())
        self.key_id = hashlib.sha256(b"popdrop key id\0" + key.reveal()).digest()[:_KEY_ID_OCTETS]
        # All parts before the kind have a fixed length and a kind holds no NUL: no two sets of
        # facts give the same octets.
        self._bound = b"popdrop sealed 1\0" + database_id + self.key_id
        self.decoy_key = hashlib.sha256(b"popdrop decoys\0" + database_id + key.reveal()).digest()
        self._decoy = self.seal("decoy", b"", Secret(bytes(24)))

    def seal(self, kind: str, name: bytes, secret: Secret) -> bytes:
        """Format octet, key id, nonce, cipher text and tag."""
        nonce = secrets.token_bytes(_NONCE_OCTETS)
        text = self._cipher.encrypt(nonce, secret.reveal(), self._facts(kind, name))
        return _FORMAT + self.key_id + nonce + text

    def open(self, kind: str, name: bytes, sealed: bytes) -> Secret:
        """The secret. Raises `CannotOpen`."""
        if (
            len(sealed) < _HEAD + _TAG_OCTETS
            or sealed[: _HEAD - _NONCE_OCTETS] != _FORMAT + self.key_id
        ):
            raise CannotOpen("sealed with another key")
        nonce = sealed[_HEAD - _NONCE_OCTETS : _HEAD]
        try:
            return Secret(self._cipher.decrypt(nonce, sealed[_HEAD:], self._facts(kind, name)))
        except InvalidTag:
            raise CannotOpen("damaged, or sealed for another account") from None

    def open_decoy(self) -> None:
        """As long as `open` takes, for accounts that have no secret."""
        self.open("decoy", b"", self._decoy)

    def _facts(self, kind: str, name: bytes) -> bytes:
        return self._bound + kind.encode("ascii") + b"\0" + name


def load_key(path: str) -> Secret:
    """The key in file `path`.

    Raises `FileNotFoundError`; `ConfigError` when it is a symbolic link or no regular file, gives
    rights to group or others, or is not 32 octets long; `OSError` when it cannot be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ConfigError(f"{path}: a symbolic link; put the key itself there") from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(f"{path}: not a regular file; put the key itself there")
        if facts.st_mode & 0o077:
            raise ConfigError(f"{path}: group or others have rights; chmod 600 {path}")
        key = os.read(descriptor, KEY_OCTETS + 1)
    finally:
        os.close(descriptor)
    if len(key) != KEY_OCTETS:
        raise ConfigError(
            f"{path}: a key has {KEY_OCTETS} octets, this file has not; restore it from the backup"
        )
    return Secret(key)


def private_facts(path: str) -> os.stat_result:
    """lstat(2) of a regular file to which nobody but its owner has rights.

    Raises `ConfigError` for any other, and `OSError`.
    """
    facts = os.lstat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ConfigError(f"{path}: not a regular file")
    if facts.st_mode & 0o077:
        raise ConfigError(f"{path}: group or others have rights; chmod 600 {path}")
    return facts


def make_key(path: str, uid: int = -1, gid: int = -1) -> None:
    """Make a new random key, mode 0600, whole or not at all, and on disk.

    Raises `FileExistsError` when there is one: a key is never overwritten. `uid` and `gid` become
    its owners, -1 leaves them.
    """
    folder = os.path.dirname(path)
    draft = f"{path}.{secrets.token_hex(8)}.new"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            if (uid, gid) != (-1, -1):
                os.fchown(descriptor, uid, gid)
            os.write(descriptor, secrets.token_bytes(KEY_OCTETS))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(draft, path)
    finally:
        os.unlink(draft)
    sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Have the names in `folder` on disk. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
