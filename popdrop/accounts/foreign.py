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


MOST_ROUNDS: Final = 10_000_000
"""Rounds of one hash, for schemes that count them: some 5 s of PBKDF2 or sha512-crypt."""
MOST_BCRYPT: Final = 16
"""Of bcrypt's cost, whose power of two counts: 4 s."""
MOST_MEMORY: Final = 1 << 30
"""Octets of one hash: what the costliest setting of crypt_gensalt(3) takes."""
MOST_PASSES: Final = 8
"""How often so much memory may be gone over; less memory, more often: 5 s."""

_ROUNDS: Final = re.compile(
    r"\$(?:[56]|md5)[$,]rounds=(?P<crypt>\d+)"
    r"|(?i:pbkdf2[\w.-]*?|\$sha1|\$scram)[$.}](?P<counted>\d+)[$.]"
    r"|\{PBKDF2(?:\.\w+)?\}\$1\$[^$]*\$(?P<dovecot>\d+)\$"
    r"|\{SCRAM-SHA-(?:1|256)\}(?P<scram>\d+),",
).search
_P5K2: Final = re.compile(r"\$p5k2\$([0-9a-f]+)\$").search
_BCRYPT: Final = re.compile(r"\$2[a-z]?\$(\d\d)\$|\$bcrypt-sha256\$.*?(?:r=|,)(\d+)\$").search
_ARGON2: Final = re.compile(r"\$argon2\w*\$(?:v=\d+\$)?m=(\d+),t=(\d+),p=\d+").search
_SCRYPT: Final = re.compile(r"\$scrypt\$ln=(\d+),r=(\d+),p=(\d+)\$").search
_YESCRYPT: Final = re.compile(r"\$g?y\$([^$]*)\$").search
_USUAL_YESCRYPT: Final = re.compile(r"j[./0-9A-F].").fullmatch  # r of 64 at most, N of 2**18
_CRYPT_7: Final = re.compile(r"\$7\$([./0-9A-Za-z])([./0-9A-Za-z]{5})([./0-9A-Za-z]{5})").search
_DIGITS_64: Final = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


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
        clear = plain(hashed) is not None
        text = hashed.decode("utf-8" if clear else "ascii")
        if not clear and is_too_costly(text):
            raise _Damaged("this password hash costs too much; make one with fewer rounds")
        # After the look at the hash, so that damage is seen; crypt(3) ends at a NUL.
        usable = 0 < len(password) <= LONGEST and b"\0" not in password
        return _verify(text, password if usable else b"x", user) and usable
    except _Damaged as error:
        why = str(error)
    except UnicodeDecodeError:
        why = "damaged password hash: not ASCII"
    raise TemporaryFailure("Account cannot be verified.", why)


def is_too_costly(text: str) -> bool:
    """Whether one look at a hash would keep a processor for minutes, or take the memory.

    Its numbers stand in the hash: whoever may write one could stop the server with it, and a typing
    error can, too.
    """
    if found := _ROUNDS(text):
        return _above(found[found.lastindex or 0], MOST_ROUNDS)
    if found := _P5K2(text):
        return len(found[1]) > 8 or int(found[1], 16) > MOST_ROUNDS
    if found := _BCRYPT(text):
        return _above(found[1] or found[2], MOST_BCRYPT)
    if found := _ARGON2(text):
        kib, passes = found[1], found[2]
        if _above(kib, MOST_MEMORY >> 10) or _above(passes, MOST_ROUNDS):
            return True
        return int(kib) * int(passes) > MOST_PASSES * (MOST_MEMORY >> 10)
    if found := _SCRYPT(text):
        if any(_above(each, 1024) for each in found.groups()):
            return True
        return _is_much(int(found[1]), int(found[2]), int(found[3]))
    if found := _YESCRYPT(text):
        return not _USUAL_YESCRYPT(found[1])
    if found := _CRYPT_7(text):
        log, blocks, lanes = (_number(each) for each in found.groups())
        return _is_much(log, blocks, lanes)
    return False


def _is_much(log: int, blocks: int, lanes: int) -> bool:
    """scrypt's N = 2**log, r and p (RFC 7914 section 2)."""
    memory = 128 * blocks << min(log, 63)
    return memory > MOST_MEMORY or memory * lanes > MOST_PASSES * MOST_MEMORY


def _above(digits: str, most: int) -> bool:
    # A number of a thousand digits takes its time, too.
    return len(digits) > 9 or int(digits) > most


def _number(digits: str) -> int:
    """Six bits a digit, the lowest first, as crypt(5) writes the numbers of `$7$`."""
    return sum(_DIGITS_64.index(digit) << 6 * place for place, digit in enumerate(digits))


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
