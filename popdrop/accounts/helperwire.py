"""What the network process and the privileged helper say to each other: octets in, values out.

Each message is one record of a SOCK_SEQPACKET socket, so a process that dies leaves no half one and
several may write. A record is

    version (1 octet)   type (1)   source (1)   number (8)   fields

where a field is its length (2 octets) and so many octets; numbers are big-endian. Which fields a
type has and how long each may be is in `_SHAPES`. No octet is special, so none can end a field
early (CVE-2008-1218: a TAB in a password made fields of Dovecot's auth protocol). What is not
exactly of this form is `Malformed`: it is not repaired, and nothing behind it is read.

The socket of the self-service (`popdrop popauth`) speaks the same. Over 400 lines for both.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import ip_network
from typing import Final

from popdrop.values import ANYTHING, Account, Scope, Secret

VERSION: Final = 1
LONGEST: Final = 4096
"""Octets of a message. The longest that is allowed by the fields has 3,178."""

NAME_OCTETS: Final = 64
SECRET_OCTETS: Final = 512
"""The most that checkpassword's protocol has room for (behaviour: 512 in all)."""
CHALLENGE_OCTETS: Final = 400
"""Of a greeting's msg-id."""
DIGEST_OCTETS: Final = 32
PATH_OCTETS: Final = 1024
NETWORKS_OCTETS: Final = 1024
DETAIL_OCTETS: Final = 200

_HEAD: Final = struct.Struct("!BBBQ")
_LENGTH: Final = struct.Struct("!H")
_ID: Final = struct.Struct("!I")
_LIMITS: Final = struct.Struct("!B?q")
_DISABLED: Final = 1
_READ_ONLY: Final = 2


class Malformed(Exception):
    """Not a message of this protocol. The text quotes nothing of it."""


class Kind(IntEnum):
    """Types of messages."""

    PASSWORD = 1
    APOP = 2
    OPEN = 3
    HAS = 0x40
    SET = 0x41
    GOOD = 0x80
    NO_SUCH_USER = 0x81
    NO_VERIFIER = 0x82
    BAD = 0x83
    TEMPORARY = 0x84
    PERMANENT = 0x85
    HANDED = 0x88
    MISSING = 0x89
    HAS_REPLY = 0xC0
    DONE = 0xC1
    WRONG = 0xC2
    NONE = 0xC3
    REFUSED = 0xC4
    LATER = 0xC5
    FAILED = 0xC6
    HELLO = 0xF0
    DOWN = 0xF1


Bounds = tuple[tuple[int, int], ...]

_NAME: Final = (1, NAME_OCTETS)
_WORDS: Final = (0, SECRET_OCTETS)
_OPTIONAL_ID: Final = (0, _ID.size)
_PATH: Final = (0, PATH_OCTETS)
_DETAIL: Final[Bounds] = ((0, DETAIL_OCTETS),)

_SHAPES: Final[dict[int, Bounds]] = {
    Kind.PASSWORD: (_NAME, _WORDS),
    Kind.APOP: (_NAME, (DIGEST_OCTETS, DIGEST_OCTETS), (1, CHALLENGE_OCTETS)),
    Kind.OPEN: (_NAME,),
    # Self-service: an old secret is given or not, so there is an octet that says which.
    Kind.HAS: (),
    Kind.SET: ((0, 1), _WORDS, (1, SECRET_OCTETS)),
    Kind.GOOD: (
        *(_NAME, _OPTIONAL_ID, _OPTIONAL_ID, _PATH, _PATH),
        (_LIMITS.size, _LIMITS.size),
        (0, NETWORKS_OCTETS),
    ),
    Kind.NO_SUCH_USER: _DETAIL,
    Kind.NO_VERIFIER: _DETAIL,
    Kind.BAD: _DETAIL,
    Kind.TEMPORARY: _DETAIL,
    Kind.PERMANENT: _DETAIL,
    Kind.HANDED: (),
    Kind.MISSING: (),
    Kind.HAS_REPLY: ((1, 1),),
    Kind.DONE: (),
    Kind.WRONG: (),
    Kind.NONE: (),
    Kind.REFUSED: _DETAIL,
    Kind.LATER: (),
    Kind.FAILED: _DETAIL,
    Kind.HELLO: (_OPTIONAL_ID, _OPTIONAL_ID),
    Kind.DOWN: ((0, 40),),
}
"""The shortest and longest length of each field, in octets, by type."""

REQUESTS: Final = frozenset({Kind.PASSWORD, Kind.APOP})
ANSWERS: Final = frozenset(
    {
        Kind.GOOD,
        Kind.NO_SUCH_USER,
        Kind.NO_VERIFIER,
        Kind.BAD,
        Kind.TEMPORARY,
        Kind.PERMANENT,
    }
)
NOTICES: Final = frozenset({Kind.HELLO, Kind.DOWN})
OPENINGS: Final = frozenset({Kind.OPEN})
OPENED: Final = frozenset({Kind.HANDED, Kind.MISSING, Kind.TEMPORARY, Kind.PERMANENT})
"""Over connections of their own: a login never carries a descriptor."""
SELF_REQUESTS: Final = frozenset({Kind.HAS, Kind.SET})
SELF_ANSWERS: Final = frozenset(
    {
        Kind.HAS_REPLY,
        Kind.DONE,
        Kind.WRONG,
        Kind.NONE,
        Kind.REFUSED,
        Kind.LATER,
        Kind.FAILED,
    }
)


@dataclass(frozen=True, slots=True)
class Request:
    """One login to check. `source` is the 0-based place of a `helper:` string among such strings.

    `proof` is the password, or APOP's digest; `challenge` is empty for a password.
    """

    kind: Kind
    source: int
    number: int
    name: bytes
    proof: Secret
    challenge: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of request `number`. `account` comes with `GOOD`; `detail` is for the log."""

    kind: Kind
    number: int
    account: Account | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Opening:
    """Whose spool is to be opened: a canonical name. Where it lies, the helper knows itself."""

    number: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """What became of opening `number`. With `HANDED` comes a descriptor; `detail` is for the log.

    `MISSING`: there is no spool, which is an empty maildrop.
    """

    kind: Kind
    number: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Hello:
    """A helper has begun to serve."""

    pid: int
    uid: int


@dataclass(frozen=True, slots=True)
class Down:
    """The helper has ended, and with it all that it had been asked. `reason` is for the log."""

    reason: str


@dataclass(frozen=True, slots=True)
class SelfRequest:
    """A user about his own APOP secret: has he one (`HAS`), or set it (`SET`)."""

    kind: Kind
    old: Secret | None = None
    new: Secret | None = None


@dataclass(frozen=True, slots=True)
class SelfAnswer:
    """`DONE`; `WRONG` old secret; `NONE`: an old one was given, there is none; `HAS_REPLY`.

    `REFUSED`: this caller may not, `LATER`: too many tries, `FAILED`: ours or the database's fault.
    """

    kind: Kind
    has: bool = False
    detail: str = ""


def encode_request(request: Request) -> bytearray:
    """The record; wipe it once it is sent. Raises `ValueError` for fields that are too long."""
    fields = [request.name, request.proof.reveal()]
    if request.kind is Kind.APOP:
        fields.append(request.challenge)
    return _packed(request.kind, request.source, request.number, fields)


def decode_request(record: bytes | bytearray) -> Request:
    """Raises `Malformed`."""
    kind, source, number, fields = _unpacked(record, REQUESTS)
    challenge = fields[2] if kind is Kind.APOP else b""
    return Request(kind, source, number, fields[0], Secret(fields[1]), challenge)


def encode_answer(answer: Answer) -> bytearray:
    """The record. Raises `ValueError` for fields that are too long."""
    if answer.kind is not Kind.GOOD:
        return _packed(answer.kind, 0, answer.number, [_words(answer.detail, DETAIL_OCTETS)])
    account = answer.account
    assert account is not None
    fields = [
        account.name,
        _id(account.uid),
        _id(account.gid),
        _path(account.home),
        _path(account.shell),
        _limits(account),
        " ".join(map(str, account.scope.networks)).encode("ascii"),
    ]
    return _packed(answer.kind, 0, answer.number, fields)


def decode_reply(record: bytes | bytearray) -> Answer | Hello | Down:
    """What the network process is sent. Raises `Malformed`."""
    kind, _, number, fields = _unpacked(record, ANSWERS | NOTICES)
    if kind is Kind.HELLO:
        pid, uid = map(_id_of, fields)
        if pid is None or uid is None:
            raise Malformed("a greeting without numbers")
        return Hello(pid, uid)
    if kind is Kind.DOWN:
        return Down(_text(fields[0]))
    if kind is not Kind.GOOD:
        return Answer(kind, number, detail=_text(fields[0]))
    name, uid_field, gid_field, home, shell, limits, networks = fields
    disabled, scope = _limits_of(limits, networks)
    account = Account(
        name,
        uid=_id_of(uid_field),
        gid=_id_of(gid_field),
        home=_path_of(home),
        shell=_path_of(shell),
        disabled=disabled,
        scope=scope,
    )
    return Answer(kind, number, account)


def encode_hello(hello: Hello) -> bytearray:
    """The first record of each helper."""
    return _packed(Kind.HELLO, 0, 0, [_id(hello.pid), _id(hello.uid)])


def encode_down(down: Down) -> bytearray:
    """The record that the supervisor sends when a helper has ended."""
    return _packed(Kind.DOWN, 0, 0, [_words(down.reason, 40)])


def encode_opening(opening: Opening) -> bytearray:
    """The record. Raises `ValueError` for a name that is too long or empty."""
    return _packed(Kind.OPEN, 0, opening.number, [opening.name])


def decode_opening(record: bytes | bytearray) -> Opening:
    """Raises `Malformed`."""
    _, _, number, fields = _unpacked(record, OPENINGS)
    return Opening(number, fields[0])


def encode_opened(opened: Opened) -> bytearray:
    """The record."""
    fields = [_words(opened.detail, DETAIL_OCTETS)] if _SHAPES[opened.kind] else []
    return _packed(opened.kind, 0, opened.number, fields)


def decode_opened(record: bytes | bytearray) -> Opened | Down:
    """Raises `Malformed`."""
    kind, _, number, fields = _unpacked(record, OPENED | {Kind.DOWN})
    if kind is Kind.DOWN:
        return Down(_text(fields[0]))
    return Opened(kind, number, _text(fields[0]) if fields else "")


def encode_self_request(request: SelfRequest) -> bytearray:
    """The record; wipe it once it is sent. Raises `ValueError` for fields that are too long."""
    if request.kind is Kind.HAS:
        return _packed(request.kind, 0, 0, [])
    assert request.new is not None
    given = b"" if request.old is None else b"\1"
    old = b"" if request.old is None else request.old.reveal()
    return _packed(request.kind, 0, 0, [given, old, request.new.reveal()])


def decode_self_request(record: bytes | bytearray) -> SelfRequest:
    """Raises `Malformed`."""
    kind, _, _, fields = _unpacked(record, SELF_REQUESTS)
    if kind is Kind.HAS:
        return SelfRequest(kind)
    given, old, new = fields
    if given not in (b"", b"\1") or (old and not given):
        raise Malformed("neither with nor without an old secret")
    return SelfRequest(kind, Secret(old) if given else None, Secret(new))


def encode_self_answer(answer: SelfAnswer) -> bytearray:
    """The record."""
    if answer.kind is Kind.HAS_REPLY:
        return _packed(answer.kind, 0, 0, [b"\1" if answer.has else b"\0"])
    fields = [_words(answer.detail, DETAIL_OCTETS)] if _SHAPES[answer.kind] else []
    return _packed(answer.kind, 0, 0, fields)


def decode_self_answer(record: bytes | bytearray) -> SelfAnswer:
    """Raises `Malformed`."""
    kind, _, _, fields = _unpacked(record, SELF_ANSWERS)
    if kind is Kind.HAS_REPLY:
        if fields[0] not in (b"\0", b"\1"):
            raise Malformed("neither yes nor no")
        return SelfAnswer(kind, has=fields[0] == b"\1")
    return SelfAnswer(kind, detail=_text(fields[0]) if fields else "")


def wipe(record: bytearray) -> None:
    """Overwrite what may hold a secret. Copies that Python has made are not reached."""
    record[:] = bytes(len(record))


def _packed(kind: Kind, source: int, number: int, fields: list[bytes]) -> bytearray:
    record = bytearray(_HEAD.pack(VERSION, kind, source, number))
    for field, (least, most) in zip(fields, _SHAPES[kind], strict=True):
        if not least <= len(field) <= most:
            raise ValueError(f"a field of {kind.name} has {len(field)} octets")
        record += _LENGTH.pack(len(field))
        record += field
    return record


def _unpacked(
    record: bytes | bytearray, allowed: frozenset[Kind]
) -> tuple[Kind, int, int, list[bytes]]:
    if not _HEAD.size <= len(record) <= LONGEST:
        raise Malformed("too short or too long")
    version, word, source, number = _HEAD.unpack_from(record)
    if version != VERSION:
        raise Malformed("another version")
    try:
        kind = Kind(word)
    except ValueError:
        kind = None
    if kind is None or kind not in allowed:
        raise Malformed("a type that does not belong here")
    fields: list[bytes] = []
    place = _HEAD.size
    for least, most in _SHAPES[kind]:
        if len(record) - place < _LENGTH.size:
            raise Malformed("ends before a field")
        (length,) = _LENGTH.unpack_from(record, place)
        place += _LENGTH.size
        if not least <= length <= most:
            raise Malformed("a field is too short or too long")
        if len(record) - place < length:
            raise Malformed("ends within a field")
        fields.append(bytes(record[place : place + length]))
        place += length
    if place != len(record):
        raise Malformed("more than its fields")
    return kind, source, number, fields


def _id(number: int | None) -> bytes:
    # uid_t has 32 bits; what does not fit is an error and not another user.
    if number is None:
        return b""
    try:
        return _ID.pack(number)
    except struct.error:
        raise ValueError("a uid or gid is out of range") from None


def _id_of(field: bytes) -> int | None:
    if not field:
        return None
    if len(field) != _ID.size:
        raise Malformed("a number of another length")
    return int.from_bytes(field, "big")


def _limits(account: Account) -> bytes:
    """What a checker knows against a login that is good: left out, it would let in too many."""
    scope = account.scope
    marks = (_DISABLED if account.disabled else 0) | (_READ_ONLY if scope.read_only else 0)
    try:
        return _LIMITS.pack(marks, scope.expires is not None, scope.expires or 0)
    except struct.error:
        raise ValueError("the time at which it expires is out of range") from None


def _limits_of(field: bytes, networks: bytes) -> tuple[bool, Scope]:
    marks, ends, expires = _LIMITS.unpack(field)
    if marks & ~(_DISABLED | _READ_ONLY) or field[1] > 1 or (expires and not ends):
        raise Malformed("limits of another kind")
    try:
        found = tuple(map(ip_network, networks.decode("ascii").split()))
    except ValueError:
        raise Malformed("a network that is none") from None
    scope = Scope(bool(marks & _READ_ONLY), found, expires if ends else None)
    return bool(marks & _DISABLED), ANYTHING if scope == ANYTHING else scope


def _path(path: str | None) -> bytes:
    octets = b"" if path is None else path.encode("utf-8", "surrogateescape")
    if b"\0" in octets:
        raise ValueError("a path with a NUL")
    return octets


def _path_of(field: bytes) -> str | None:
    if b"\0" in field:
        raise Malformed("a path with a NUL")
    return field.decode("utf-8", "surrogateescape") or None


def _words(text: str, most: int) -> bytes:
    return "".join(c if " " <= c <= "~" else "?" for c in text[:most]).encode("ascii")


def _text(field: bytes) -> str:
    if not all(0x20 <= octet <= 0x7E for octet in field):
        raise Malformed("text with other than printable ASCII")
    return field.decode("ascii")
