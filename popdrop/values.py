"""Plain frozen values that every room may know."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple, final


@final
class Secret:
    """Octets that refuse to be printed, formatted or pickled.

    The type, not each call, keeps passwords out of logs and tracebacks.
    """

    __slots__ = ("_octets",)

    def __init__(self, octets: bytes) -> None:
        self._octets = octets

    def reveal(self) -> bytes:
        """The octets themselves. The name makes each use easy to find."""
        return self._octets

    def __repr__(self) -> str:
        return "<Secret>"

    __str__ = __repr__

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Secret cannot be pickled")


@dataclass(frozen=True, slots=True)
class ScramVerifier:
    """What a server keeps of a password for SCRAM (RFC 5802 section 3).

    `iterations` is PBKDF2's count. Both keys are as long as the algorithm's hash.
    """

    salt: bytes
    iterations: int
    stored_key: Secret
    server_key: Secret


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Scope:
    """What a login may do, and from where and until when.

    `networks`: one of them must hold the client's address; none: from everywhere. `expires` is in
    seconds since the epoch, `None` for never. A `read_only` session deletes nothing.
    """

    read_only: bool = False
    networks: tuple[Network, ...] = ()
    expires: int | None = None


ANYTHING: Final = Scope()
"""From everywhere, for ever, and deletions too."""


class Account(NamedTuple):
    """What is known of one account: its verifiers and the facts a policy asks for.

    A named tuple, since one is made at each login and a frozen dataclass of so many fields takes
    ten times as long to make.

    `name` is the canonical name; a verifier that is absent is `None`. `apop_sealed` says that there
    is an APOP secret which cannot be opened (its key is gone or another one).
    `version` changes with every change of the account.
    `uid`, `gid`, `home` and `shell` are those of the system account of that name, if there is one.
    `scope` is the account's own, `app` that of the app password it has logged in by: both hold.
    `lacks_scram`: it has a password that was stored without what SCRAM needs.
    """

    name: bytes
    password_hash: Secret | None = None
    apop_secret: Secret | None = None
    disabled: bool = False
    version: int = 0
    uid: int | None = None
    gid: int | None = None
    home: str | None = None
    apop_sealed: bool = False
    shell: str | None = None
    scope: Scope = ANYTHING
    app: Scope | None = None
    lacks_scram: bool = False

    @property
    def has_apop(self) -> bool:
        """Whether this account logs in by APOP, so that cleartext is refused to it."""
        return self.apop_secret is not None or self.apop_sealed

    @property
    def read_only(self) -> bool:
        """Whether its session deletes nothing."""
        return self.scope.read_only or (self.app is not None and self.app.read_only)


class Verified(bytes):
    """An avatar id that brings the account it was verified against.

    It is an ordinary canonical name to any realm; Popdrop's realm is spared a second look-up.
    `foreign`: the account is what a checker reported that keeps no accounts of ours, so that the
    realm looks for one of that name all the same.
    """

    account: Account
    foreign: bool

    def __new__(cls, account: Account, foreign: bool = False) -> Verified:
        verified = super().__new__(cls, account.name)
        verified.account = account
        verified.foreign = foreign
        return verified


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose maildrop a store is asked to open.

    `user` is the whole canonical name, domain included, and `domain` what stands behind its last
    `@`, `""` where there is none. They fill path templates: they hold no `/` and are not `.` or
    `..` (`credentials.acceptable_name`). `uid` is that of the system account of that name, or
    `None` for a virtual user.
    """

    user: str
    domain: str = ""
    home: str | None = None
    uid: int | None = None


def _always() -> bool:
    return True


def _nothing() -> None:
    return None


class Source(NamedTuple):
    """Where the stored octets of one message lie, and how they become octets as sent.

    `fd`        an open descriptor; it stays open until the maildrop is released
    `offset`    of the first octet of the message (behind the From_ line), in octets, 0-based
    `length`    in octets as stored
    `octets`    in octets as sent: CRLF counted, dot-stuffing and the final dot not (RFC 1939 5)
    `strip`     lower-case names of header fields that are not sent
    `unquote`   whether `>From `, `>>From ` lose one `>` (mboxrd)
    `spaced`    whether a bare CR is sent as a blank
    `unchanged` cheap (one fstat), may be called in the reactor: nothing touched the file since
                the photograph or the last `verify`
    `verify`    blocking: under the store's locks, is this still the same message? Raises
                `TemporaryFailure` when it is not, `Busy` when a lock is held by another
    `read`      blocking: `verify`, and under the same locks as many octets of the file as the
                second number says (at least one) from the offset that the first one says. So a
                message can be read while mail comes all the time. Raises as `verify`, and
                `OSError`; `None`: the store cannot
    """

    fd: int
    offset: int
    length: int
    octets: int
    strip: frozenset[bytes] = frozenset()
    unquote: bool = False
    spaced: bool = False
    unchanged: Callable[[], bool] = _always
    verify: Callable[[], None] = _nothing
    read: Callable[[int, int], bytes] | None = None


def client_network(host: str) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 /64 (RFC 6177)."""
    address = normalised(host)
    if ":" not in address:
        return address
    try:
        packed = ipaddress.IPv6Address(address).packed
    except ValueError:
        return address
    return f"{ipaddress.IPv6Address(packed[:8] + bytes(8))}/64"


def normalised(host: str) -> str:
    """The one form of an IP address that policy, throttle, logs and relay know (decision 25).

    A v4-mapped IPv6 address (RFC 4291 section 2.5.5.2) becomes the IPv4 address, any other IPv6
    address its shortest form (RFC 5952) without a zone. What is no IP address comes back as it is.
    """
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return str(address.ipv4_mapped or address)


def network_of(text: str) -> Network:
    """A network in CIDR form, or an address. Raises `ValueError`.

    One of v4-mapped addresses is one of IPv4, as `normalised` has it: it would hold nobody.
    """
    found = ipaddress.ip_network(text, strict=False)
    if isinstance(found, ipaddress.IPv6Network) and found.prefixlen >= 96:
        mapped = found.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, found.prefixlen - 96))
    return found


_NO_BINDINGS: Final[Mapping[str, bytes]] = MappingProxyType({})
"""Of most connections: one for all."""


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What the shell knows of the other side of a connection.

    `address` is the normalised IP address, `None` where there is none (`unix:`, `stdio:`).
    `address_trusted` is false where a proxy may have made it up: no rule for local peers holds.
    `bindings` are TLS channel bindings by name (RFC 5929, RFC 9266).
    """

    address: str | None = None
    address_trusted: bool = True
    port: int | None = None
    local_port: int | None = None
    tls_version: str | None = None
    tls_cipher: str | None = None
    bindings: Mapping[str, bytes] = field(default_factory=lambda: _NO_BINDINGS)
    certificate_name: str | None = None


@dataclass(slots=True)
class Tally:
    """What one session did: counts of messages, and octets as sent.

    `top_octets` are those on the wire, with dot-stuffing and final dot: a TOP announces none.
    """

    retr: int = 0
    retr_octets: int = 0
    top: int = 0
    top_octets: int = 0
    deleted: int = 0
    deleted_octets: int = 0
    left: int = 0
    left_octets: int = 0


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One event for the session log.

    `event` is `login`, `failure` (of a login) or `end`. `user` is as the client sent it, and so
    raw: every emitter escapes it. `mechanism` is `USER`, `APOP` or a SASL mechanism. `reason` is
    one of our own words (`apop-account`, `bad-credentials`, `timeout`, ...). `duration` is in
    seconds since the connection was accepted.
    """

    event: str
    peer: PeerFacts
    user: bytes | None
    mechanism: str | None
    reason: str
    duration: float
    tally: Tally = field(default_factory=Tally)
    listener: str = ""
