"""Password hashes that other programs made.

`crypt(3)` is asked first, by ctypes: that way the interpreter's lock is free meanwhile. The
standard library's `crypt` (gone in Python 3.13) and crypt-r keep it, and with it the whole server,
for the 24 ms of one yescrypt. What `crypt(3)` does not know libpass may; the schemes of Dovecot
that both lack are here. libpass is imported when the first hash needs it.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
import hmac
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from popdrop.errors import TemporaryFailure

LONGEST: Final = 512
"""Octets of a password: crypt(3) of libxcrypt takes no more. A longer one matches nothing."""

PLAIN: Final = frozenset({"PLAIN", "CLEARTEXT", "CLEAR"})
"""Schemes, in Dovecot's words, of a password that is not hashed at all."""

_CRYPT_SCHEMES: Final = frozenset(
    ("CRYPT", "MD5-CRYPT", "SHA256-CRYPT", "SHA512-CRYPT", "BLF-CRYPT", "DES-CRYPT")
    + ("ARGON2I", "ARGON2ID")
)
_DIGESTS: Final = {
    "MD5": "md5",
    "PLAIN-MD5": "md5",
    "LDAP-MD5": "md5",
    "SMD5": "md5",
    "SHA": "sha1",
    "SHA1": "sha1",
    "SSHA": "sha1",
    "SHA256": "sha256",
    "SSHA256": "sha256",
    "SHA512": "sha512",
    "SSHA512": "sha512",
}
_SALTED: Final = frozenset({"SMD5", "SSHA", "SSHA256", "SSHA512"})
# Handlers of libpass that take anything or nothing for theirs, or that are no hashes.
_NO_HASH: Final = frozenset(
    ("plaintext", "ldap_plaintext", "roundup_plaintext")
    + ("unix_disabled", "unix_fallback", "django_disabled")
)
# These cannot be told from one another, nor from a password, by their looks: `{NAME}` says which.
_ASK_BY_NAME: Final = frozenset(
    ("hex_md4", "hex_md5", "hex_sha1", "hex_sha256", "hex_sha512", "ldap_hex_md5", "ldap_hex_sha1")
    + ("lmhash", "nthash", "msdcc", "msdcc2", "oracle10", "mysql323", "mysql41", "htdigest")
    + ("cisco_pix", "cisco_asa", "cisco_type7", "bigcrypt", "crypt16")
)
_PREFIX: Final = re.compile(r"\{([A-Za-z0-9_-]+)(?:\.(?:b64|base64|hex))?\}(.*)", re.I | re.S)
_LOOKS_LIKE_CRYPT: Final = re.compile(r"\$|_[./0-9A-Za-z]{19}\Z|[./0-9A-Za-z]{13}\Z").match
_SPACE: Final = 32768  # `sizeof(struct crypt_data)` of libxcrypt


class _Damaged(Exception):
    """The hash cannot be used. The text is for the log and holds nothing of the hash."""


def verify(hashed: bytes, password: bytes, user: bytes = b"") -> bool:
    """Whether `password` is the one that `hashed` was made of. Blocking; milliseconds of CPU.

    `hashed` is as it stands in a file: crypt(3)'s own forms, libpass's, or with a `{SCHEME}` before
    it as Dovecot and LDAP write, where SCHEME may also be the name of one of libpass's handlers.
    `user` is for the few schemes that hash the name too. Empty and locked (`*`, `!`) ones never
    match. Raises `TemporaryFailure` for a damaged one and for an unknown scheme.
    """
    if is_locked(hashed):
        return False
    try:
        text = hashed.decode("ascii" if plain(hashed) is None else "utf-8")
        # After the look at the hash, so that damage is seen; crypt(3) ends at a NUL.
        usable = 0 < len(password) <= LONGEST and b"\0" not in password
        return _verify(text, password if usable else b"x", user) and usable
    except _Damaged as error:
        why = str(error)
    except UnicodeDecodeError:
        why = "damaged password hash: not ASCII"
    raise TemporaryFailure("Account cannot be verified.", why)


def is_locked(hashed: bytes) -> bool:
    """Whether no password matches: empty, `*...`, `!...` (passwd(5), shadow(5)), or `x`."""
    return not hashed or hashed[:1] in b"*!" or hashed == b"x"


def plain(hashed: bytes) -> bytes | None:
    """The password itself, if it stands there with a scheme that says so."""
    name, end, rest = hashed.partition(b"}")
    if not end or name[:1] != b"{" or name[1:].decode("ascii", "replace").upper() not in PLAIN:
        return None
    return rest


def cost_of(hashed: bytes) -> bytes:
    """What two hashes have in common that cost the same to verify: the scheme and its numbers."""
    if plain(hashed) is not None:
        return b"{PLAIN}"
    brace, end, rest = hashed.rpartition(b"}")
    fields = rest.split(b"$")
    kept = (fields[:1] if fields[0] else fields[:2]) if len(fields) > 1 else []
    if kept[1:] and kept[1] in (b"y", b"gy", b"7"):
        kept.append(fields[2][:3])  # crypt(3) writes these costs as a short word
    kept += [f for f in fields[1:5] if _is_cost(f)]
    return brace + end + b"$".join(kept)


def _is_cost(field: bytes) -> bool:
    return len(field) < 24 and (b"=" in field.rstrip(b"=") or (field.isdigit() and len(field) < 8))


def known(scheme: str) -> bool:
    """Whether `{SCHEME}` before a hash, in any case, is understood."""
    name = scheme.upper()
    others = ("PBKDF2", "SCRAM-SHA-1", "SCRAM-SHA-256")
    return (
        name in PLAIN | _CRYPT_SCHEMES
        or name in _DIGESTS
        or name in others
        or _by_name(scheme.lower().replace("-", "_")) is not None
    )


def _verify(text: str, password: bytes, user: bytes) -> bool:
    match = _PREFIX.match(text)
    if match is None:
        return _bare(text, password, user)
    scheme, rest = match[1].upper(), match[2]
    if scheme in PLAIN:
        return bool(rest) and hmac.compare_digest(rest.encode("utf-8"), password)
    if scheme in _CRYPT_SCHEMES or (scheme == "MD5" and rest.startswith("$1$")):
        return _bare(rest, password, user)
    if scheme in _DIGESTS:
        return _digest(scheme, rest, password)
    if scheme == "PBKDF2" and rest.startswith("$1$"):
        return _dovecot_pbkdf2(rest, password)
    if scheme in ("SCRAM-SHA-1", "SCRAM-SHA-256"):
        return _scram(scheme.removeprefix("SCRAM-").replace("-", ""), rest, password)
    if handlers := _by_looks(text):
        return _by_libpass(handlers, text, password, user)
    handler = _by_name(match[1].lower().replace("-", "_"))
    if handler is None:
        raise _Damaged(f"unknown password scheme {{{match[1]}}}")
    return _by_libpass([handler], rest, password, user)


def _bare(text: str, password: bytes, user: bytes) -> bool:
    if not text or is_locked(text.encode("ascii")):
        return False
    if _LOOKS_LIKE_CRYPT(text) and not text.startswith("$argon2"):
        made = _crypt(password, text.encode("ascii"))
        if made is not None:
            if len(made) != len(text):
                raise _Damaged("damaged password hash: cut short, or with something behind it")
            return hmac.compare_digest(made, text.encode("ascii"))
    handlers = _by_looks(text)
    if not handlers:
        raise _Damaged(
            "unknown or damaged password hash; is a {SCHEME} missing before it, or the extra:"
            " pip install 'popdrop[crypt]'?"
        )
    return _by_libpass(handlers, text, password, user)


def _digest(scheme: str, rest: str, password: bytes) -> bool:
    """RFC 2307 and Dovecot: digest and salt in base64, or the digest alone in hexadecimal."""
    algorithm = _DIGESTS[scheme]
    size = hashlib.new(algorithm, usedforsecurity=False).digest_size
    try:
        in_hex = len(rest) == 2 * size
        octets = bytes.fromhex(rest) if in_hex else base64.b64decode(rest, validate=True)
    except (ValueError, binascii.Error):
        octets = b""
    salt = octets[size:]
    if len(octets) < size or bool(salt) is not (scheme in _SALTED):
        raise _Damaged(f"damaged password hash of {{{scheme}}}")
    made = hashlib.new(algorithm, password + salt, usedforsecurity=False).digest()
    return hmac.compare_digest(made, octets[:size])


def _dovecot_pbkdf2(rest: str, password: bytes) -> bool:
    """`$1$salt$rounds$hexadecimal`, of PBKDF2 with HMAC-SHA-1."""
    try:
        _, _, salt, rounds, digest = rest.split("$")
        made = hashlib.pbkdf2_hmac("sha1", password, salt.encode("ascii"), int(rounds))
        return hmac.compare_digest(made, bytes.fromhex(digest))
    except (ValueError, OverflowError):
        raise _Damaged("damaged password hash of {PBKDF2}") from None


def _scram(algorithm: str, rest: str, password: bytes) -> bool:
    """`iterations,salt,StoredKey,ServerKey`, as Dovecot writes them (RFC 5802 section 3)."""
    try:
        rounds, salt, stored, _ = rest.split(",")
        salted = hashlib.pbkdf2_hmac(algorithm, password, base64.b64decode(salt), int(rounds))
        client = hmac.digest(salted, b"Client Key", algorithm)
        made = hashlib.new(algorithm, client).digest()
        return hmac.compare_digest(made, base64.b64decode(stored))
    except (ValueError, OverflowError):
        raise _Damaged("damaged verifier of {SCRAM}") from None


# crypt(3)

Crypt = Callable[[bytes, bytes], bytes | None]


def _crypt(password: bytes, setting: bytes) -> bytes | None:
    made = _library()(password, setting)
    return None if not made or made.startswith(b"*") else made


@cache
def _library() -> Crypt:
    """crypt(3), re-entrant, from where there is one."""
    for name in ("libcrypt.so.2", "libcrypt.so.1"):
        try:
            function = ctypes.CDLL(name).crypt_rn
        except (OSError, AttributeError):
            continue
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]

        def by_libxcrypt(password: bytes, setting: bytes, function: Any = function) -> bytes | None:
            space = ctypes.create_string_buffer(_SPACE)
            try:
                made: bytes | None = function(password, setting, space, _SPACE)
                return made
            finally:
                ctypes.memset(space, 0, _SPACE)  # it holds the password

        return by_libxcrypt
    return _by_module()


def _by_module() -> Crypt:
    try:
        import crypt_r as module
    except ImportError:
        try:
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                import crypt as module
        except ImportError:
            return lambda password, setting: None

    def by_module(password: bytes, setting: bytes) -> bytes | None:
        try:
            # They take text and make UTF-8 of it.
            made = module.crypt(password.decode("utf-8"), setting.decode("ascii"))
        except (OSError, UnicodeDecodeError):
            return None
        return None if made is None else str(made).encode("ascii")

    return by_module


# libpass


def _by_libpass(handlers: list[Any], text: str, password: bytes, user: bytes) -> bool:
    why = ""
    for handler in handlers:  # two, where two forms begin alike
        more = {"user": user.decode("utf-8", "replace")} if "user" in handler.context_kwds else {}
        try:
            return bool(handler.verify(password, text, **more))
        except Exception as error:  # of many kinds; their texts may hold the hash
            why = f"damaged password hash of {handler.name}: {type(error).__name__}"
            if type(error).__name__ == "MissingBackendError":
                why = f"{handler.name} needs one more package; pip install bcrypt"
    raise _Damaged(why)


def _by_name(name: str) -> Any:
    from passlib import registry

    if name in _NO_HASH or name not in registry.list_crypt_handlers():
        return None
    return registry.get_crypt_handler(name)


def _by_looks(text: str) -> list[Any]:
    return [handler for handler in _handlers() if handler.identify(text)]


@cache
def _handlers() -> tuple[Any, ...]:
    from passlib import registry

    names = (n for n in registry.list_crypt_handlers() if n not in _NO_HASH | _ASK_BY_NAME)
    return tuple(map(registry.get_crypt_handler, names))
