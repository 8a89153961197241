"""Accounts of other servers, read from their files.

Each reader gives `Found` for what can be taken and `Trouble` for what cannot: nothing is left out
without a word. Files are opened for reading only, and let go of before anything is made of them.
Over 400 lines since each format is a few of them.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from popdrop.accounts import dbmfiles, foreign
from popdrop.values import Secret

FILE_OCTETS: Final = 256 * 1024 * 1024
"""The longest file that is read: a million accounts of qpopper's are about 100 MB."""

_DIGITS: Final = re.compile(rb"[0-9]*\Z")
_DES: Final = re.compile(rb"[./0-9A-Za-z]{13}\Z")
_MODULAR: Final = re.compile(rb"\$[0-9A-Za-z_-]+\$[\x21-\x7e]+\Z")
_SCHEME: Final = re.compile(rb"\{([0-9A-Za-z._-]+)\}(.+)\Z", re.DOTALL)
_PRINTABLE: Final = re.compile(rb"[\x21-\x7e]+\Z")
_CLEAR: Final = frozenset({b"PLAIN", b"CLEAR", b"CLEARTEXT"})
_CRYPT: Final = frozenset({b"CRYPT", b"BLF-CRYPT", b"MD5-CRYPT", b"SHA256-CRYPT", b"SHA512-CRYPT"})
_ARGON: Final = frozenset({b"ARGON2I", b"ARGON2ID"})
_DIGESTS: Final = frozenset(
    b"PLAIN-MD5 LDAP-MD5 SMD5 SHA SHA1 SSHA SHA256 SSHA256 SHA512 SSHA512 PBKDF2"
    b" SCRAM-SHA-1 SCRAM-SHA-256".split()
)
_ENCODINGS: Final = (b"", b"HEX", b"B64", b"BASE64")


class Unreadable(Exception):
    """A file of which nothing can be taken. The text is one line and begins with its path."""


@dataclass(frozen=True, slots=True)
class Found:
    """An account of another server, by the name it has there.

    `password` and `apop` are in clear. `password_hash` is one of crypt(3)'s, or has its `{SCHEME}`
    before it as in Dovecot. `where` is `FILE:LINE` (1-based) or `FILE: record N` (1-based, in the
    order of the file). `remarks` say what belongs to the account and is not taken.
    """

    name: bytes
    where: str
    password: Secret | None = None
    password_hash: Secret | None = None
    apop: Secret | None = None
    disabled: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trouble:
    """What cannot be taken, and why. `text` is one line without secrets."""

    where: str
    text: str
    name: bytes | None = None


Item = Found | Trouble


class Use(Enum):
    """What a secret in clear becomes."""

    AS_IS = "as it was"
    PASSWORD = "the password"  # noqa: S105 - words for a report
    APOP = "the APOP secret"
    BOTH = "password and APOP secret"


def serving(item: Item, use: Use) -> Item:
    """`item` with its secret in clear put to `use`. A hash can only be a password: `Trouble`."""
    if isinstance(item, Trouble) or use is Use.AS_IS:
        return item
    clear = item.password or item.apop
    if clear is not None:
        return replace(
            item,
            password=clear if use is not Use.APOP else None,
            apop=clear if use is not Use.PASSWORD else None,
        )
    if use is Use.PASSWORD:
        return item
    return Trouble(item.where, "only a hash is known: no APOP secret can be made of it", item.name)


def read(path: str, form: str = "auto", name: bytes | None = None) -> list[Item]:
    """All accounts in the file `path`. `form` is one of `FORMS` or `auto`.

    `name` is whose secret it is, for formats that do not say (`spop3d`). Raises `Unreadable`.
    """
    if form in ("auto", "qpopper"):
        path = _database_of(path)
    content, facts = _content(path)
    if form == "auto":
        form = guess(path, content)
    if form == "spop3d":
        if facts.st_mode & 0o077:
            text = "others have rights; solid-pop3d believes it only with mode 0600"
            raise Unreadable(f"{path}: {text}")
        whose = name if name is not None else _owner_name(path, facts.st_uid)
        return list(_spop3d(path, content, whose))
    if name is not None:
        raise Unreadable(f"{path}: brings its own names; --name is for files like ~/.spop3d")
    return list(FORMS[form](path, content))


def guess(path: str, content: bytes) -> str:
    """Which of `FORMS` or `spop3d` the file looks like. Raises `Unreadable`."""
    last = os.path.basename(path)
    if dbmfiles.kind_of(content) is not None or last.endswith((".pag", ".db", ".gdbm")):
        return "qpopper"
    if last in (".spop3d", "authuser"):
        return last.removeprefix(".")
    for _, line in _lines(content):
        if line.split()[0].lower() in (b"apopsecret", b"maildrop"):
            return "spop3d"
        fields = line.split(b":")
        if len(fields) == 1 and len(line.split(None, 1)) == 2:
            return "list"
        if len(fields) >= 7 or (len(fields) > 1 and _looks_hashed(fields[1])):
            return "passwd"
        break
    raise Unreadable(f"{path}: cannot tell what kind of file this is; say so with --format")


# qpopper


def _database_of(path: str) -> str:
    """The file that holds the records: ndbm's is called by the name without its suffix."""
    if path.endswith(".dir") and os.path.lexists(path[:-4] + ".pag"):
        return path[:-4] + ".pag"
    if not os.path.lexists(path):
        for suffix in (".pag", ".db", ".gdbm"):
            if os.path.lexists(path + suffix):
                return path + suffix
    return path


def _qpopper(path: str, content: bytes) -> Iterator[Item]:
    """qpopper's `popauth.c`: the name with a NUL; the secret, each octet XOR 0xFF, and a NUL.

    Version 4 may put what it needs for SCRAM behind that. An entry that begins with NUL is none.
    """
    try:
        records = dbmfiles.records(content)
    except dbmfiles.Damaged as error:
        raise Unreadable(f"{path}: {error}") from None
    for number, (key, value) in enumerate(records, start=1):
        where = f"{path}: record {number}"
        name = key.removesuffix(b"\0")
        hidden, nul, rest = value.partition(b"\0")
        if not hidden:
            yield Trouble(where, "no APOP secret in it", name)
        elif name == key or not nul:
            yield Trouble(where, "no NUL at its end: not a record of qpopper's", name)
        else:
            remarks = ("its SCRAM part",) if rest else ()
            secret = Secret(bytes(octet ^ 0xFF for octet in hidden))
            yield Found(name, where, apop=secret, remarks=remarks)


# s/qmail

_OTHERS: Final = {
    b"?": "the system's password",
    b"!": "the system's password",
    b"+": "vmailmgr (checkvpw)",
    b"&": "vpopmail (vchkpw)",
    b"=": "Dovecot",
}
_HEX_HASHES: Final = {32: b"{PLAIN-MD5}", 40: b"{SHA.HEX}", 64: b"{SHA256.HEX}"}


def _authuser(path: str, content: bytes) -> Iterator[Item]:
    """s/qmail's `users/authuser`, as qmail-authuser(8) and the comments of its source say.

    `name:password`, `name:%HASH` in hexadecimal digits (MD5, SHA-1 or SHA-256 by their number),
    `!name` for a name that is shut out; one character after the colon, or `@` or `*` for a name,
    sends to another program.
    """
    entries = []
    shut = {}
    for number, line in _lines(content):
        name, colon, token = line.rstrip().partition(b":")
        if name.startswith(b"!"):
            shut[name[1:].lower()] = number
        else:
            entries.append((number, name, colon, token))
    used: set[bytes] = set()
    for number, name, colon, token in entries:
        where = f"{path}:{number}"
        domain = b"@" + name.rpartition(b"@")[2] if b"@" in name else b""
        keys = {name.lower(), domain.lower()} & shut.keys()
        used |= keys
        item = _authuser_entry(name, colon, token, where)
        yield replace(item, disabled=True) if keys and isinstance(item, Found) else item
    for name, number in shut.items():
        if name not in used:
            text = "shut out there; no account of that name here, so nothing to disable"
            yield Trouble(f"{path}:{number}", text, name)


def _authuser_entry(name: bytes, colon: bytes, token: bytes, where: str) -> Item:
    if not colon or not name or not token:
        return Trouble(where, "not of the form NAME:PASSWORD", name)
    if name == b"*" or name.startswith(b"@"):
        return Trouble(where, "stands for many accounts: add each", name)
    if len(token) == 1:
        other = _OTHERS.get(token)
        text = f"its password is checked by {other}" if other else "a password of one character"
        return Trouble(where, f"{text}; nothing to import", name)
    if token.startswith(b"%"):
        digits = token[1:].lower()
        scheme = _HEX_HASHES.get(len(digits))
        if scheme is None or not re.fullmatch(rb"[0-9a-f]+", digits):
            return Trouble(where, "a hash of an unknown kind after the `%`", name)
        return Found(name, where, password_hash=Secret(scheme + digits))
    if token.startswith(b"="):
        text = "begins with `=`, which some versions take as part of the password and some do not"
        return Trouble(where, f"{text}; set it with `popdrop user add`", name)
    return Found(name, where, password=Secret(token))


# solid-pop3d


def _owner_name(path: str, owner: int) -> bytes:
    """Whose file in his home this is. Not by its folder: anybody may have a folder called bob."""
    try:
        name = os.fsencode(pwd.getpwuid(owner).pw_name)
    except KeyError:
        name = b""
    if not name or owner == 0:
        raise Unreadable(f"{path}: its owner tells not whose it is; say so with --name NAME")
    return name


def _spop3d(path: str, content: bytes, name: bytes) -> Iterator[Item]:
    """dot-spop3d(5): `APOPSecret HEX [MAILBOX]`, the octets XOR 0xFF as pop_auth(1) writes them."""
    remarks = []
    digits: bytes | None = None
    where = path
    for number, line in _lines(content):
        here = f"{path}:{number}"
        words = line.split()
        keyword = words[0].lower()
        if keyword == b"maildrop":
            remarks.append(f"MailDrop in line {number}")
        elif keyword != b"apopsecret" or not 2 <= len(words) <= 3:
            yield Trouble(here, "neither MailDrop nor APOPSecret", name)
        elif len(words) == 3:
            text = "the secret of another maildrop, which has its own login name: add that account"
            yield Trouble(here, text, name)
        elif digits is not None:
            yield Trouble(here, "a second APOPSecret; the first one counts", name)
        else:
            digits, where = words[1], here
    if digits is None:
        yield Trouble(path, "no APOPSecret of the default maildrop in it", name)
    elif len(digits) % 2 or not re.fullmatch(rb"[0-9A-Fa-f]+", digits):
        yield Trouble(where, "the secret is not in hexadecimal digits, two an octet", name)
    else:
        secret = Secret(bytes(octet ^ 0xFF for octet in bytes.fromhex(digits.decode("ascii"))))
        yield Found(name, where, apop=secret, remarks=tuple(remarks))


# files of passwords


def _passwd(path: str, content: bytes) -> Iterator[Item]:
    """Fields between colons: Dovecot's passwd-file, Apache's htpasswd, /etc/shadow."""
    for number, line in _lines(content):
        where = f"{path}:{number}"
        fields = line.split(b":")
        name = fields[0]
        if len(fields) < 2 or not name:
            yield Trouble(where, "not of the form NAME:HASH", name)
            continue
        trouble = _fenced(fields)
        if trouble:
            yield Trouble(where, trouble, name)
            continue
        verifier = _verifier(fields[1])
        if isinstance(verifier, str):
            yield Trouble(where, verifier, name)
            continue
        clear, octets = verifier
        remarks = _remarks(fields)
        secret = Secret(octets)
        yield Found(
            name,
            where,
            password=secret if clear else None,
            password_hash=None if clear else secret,
            remarks=remarks,
        )


_SHADOW_FIELDS: Final = 9  # shadow(5)
_FENCES: Final = (b"nologin", b"allow_nets", b"allow_real_nets", b"user", b"proxy", b"nopassword")


def _of_shadow(fields: list[bytes]) -> bool:
    return len(fields) == _SHADOW_FIELDS and all(_DIGITS.match(field) for field in fields[2:])


def _remarks(fields: list[bytes]) -> tuple[str, ...]:
    """What a line of a passwd-file says besides name and password; shadow's are dates only."""
    if _of_shadow(fields):
        return ()
    words = ((2, "uid"), (5, "home"), (7, "extra fields"))
    return tuple(
        f"{what} {_shown(fields[index])}"
        for index, what in words
        if len(fields) > index and fields[index]
    )


def _fenced(fields: list[bytes]) -> str | None:
    """Why a line must not become an account that is free to log in from everywhere."""
    if _of_shadow(fields):
        if fields[7]:
            return "the account expires there; add it by hand, with its date"
    elif len(fields) >= 8:
        for extra in b":".join(fields[7:]).split():
            key = extra.partition(b"=")[0]
            if key in _FENCES:
                text = key.decode("ascii")
                return f"has Dovecot's extra field {text}, which is not imported: add it by hand"
    return None


def _verifier(field: bytes) -> tuple[bool, bytes] | str:
    """Whether it is in clear, and the password or hash itself; or why there is none."""
    if not field:
        return "an empty password field"
    if field == b"x":
        return "the password is elsewhere, in /etc/shadow"
    if field[0] in b"!*":
        return "locked, or without a password"
    if foreign.plain(field) is None and foreign.is_too_costly(field.decode("ascii", "replace")):
        return "a hash that costs too much to verify; set a new password"
    found = _SCHEME.match(field)
    if found:
        scheme, octets = found[1].upper(), found[2]
        if scheme in _CLEAR:
            return True, octets
        if scheme in _CRYPT or scheme in _ARGON:
            return (False, octets) if _is_crypt(octets) else "a damaged hash"
        digest, _, encoding = scheme.partition(b".")
        if digest not in _DIGESTS or encoding not in _ENCODINGS:
            return f"hashes of the kind {{{scheme.decode('ascii')}}} are not known here"
        if not _PRINTABLE.match(octets):
            return "a damaged hash"
        return False, b"{" + scheme + b"}" + octets
    if _is_crypt(field):
        return False, field
    return "no hash of a known kind; a password in clear must begin with {PLAIN}"


def _is_crypt(field: bytes) -> bool:
    return bool(_MODULAR.match(field) or _DES.match(field))


def _looks_hashed(field: bytes) -> bool:
    return field in (b"x", b"*", b"!", b"!!", b"!*") or bool(
        _is_crypt(field) or _SCHEME.match(field)
    )


def _list(path: str, content: bytes) -> Iterator[Item]:
    """`NAME PASSWORD` a line, in clear: blanks or tabs between them, all behind them counts."""
    for number, line in _lines(content):
        words = line.split(None, 1)
        if len(words) != 2:
            yield Trouble(f"{path}:{number}", "not of the form NAME PASSWORD", words[0])
        else:
            yield Found(words[0], f"{path}:{number}", password=Secret(words[1]))


FORMS: Final[dict[str, Callable[[str, bytes], Iterable[Item]]]] = {
    "qpopper": _qpopper,
    "authuser": _authuser,
    "passwd": _passwd,
    "list": _list,
}
FORMATS: Final = ("auto", "qpopper", "authuser", "spop3d", "passwd", "list")


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, 1-based, without ends, blank lines and those that begin with #."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if line.strip() and not line.startswith(b"#"):
            yield number, line


def _shown(text: bytes) -> str:
    return ascii(text.decode("utf-8", "backslashreplace"))[1:-1]


def _content(path: str) -> tuple[bytes, os.stat_result]:
    """The octets of a file, and what fstat(2) says of it. Raises `Unreadable`.

    Writers of all three kinds of database take flock(2): a shared lock, for as long as one read(2)
    takes, sees none of their halves.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | _no_link(path))
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise Unreadable(f"{path}: not a regular file")
            if facts.st_size > FILE_OCTETS:
                raise Unreadable(f"{path}: longer than {FILE_OCTETS} octets")
            _lock(descriptor, path)
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read(FILE_OCTETS), facts
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None


def _no_link(path: str) -> int:
    # A file in somebody's home: a link there could name anybody's.
    return os.O_NOFOLLOW if os.path.basename(path) == ".spop3d" else 0


def _lock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Unreadable(f"{path}: another program writes to it; try again") from None
    except OSError:
        pass  # a file system without locks: nobody can hold one
