"""Who may connect: networks, and the rules of hosts.allow and hosts.deny. Values only, no I/O.

The rules are a subset of hosts_access(5) and hosts_options(5) as libwrap 7.6 on Debian has them. A
pattern that is not in the subset is an error where it stands in a line for us, since what it would
have refused or admitted cannot be told.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from popdrop.errors import ConfigError
from popdrop.values import Network, normalised

DAEMONS: Final = ("popdrop", "qpopper", "popper")
"""The names under which a line of hosts.allow or hosts.deny is for us."""


class Unnamed(enum.Enum):
    """What stands in the place of a client's host name."""

    UNASKED = "not asked for yet"
    UNKNOWN = "has none"
    PARANOID = "has one that does not lead back to the address"


Name = str | Unnamed


@dataclass(frozen=True, slots=True)
class Client:
    """Whom the rules are asked about.

    `address` is normalised, `None` where there is none. `name` is in lower case, verified forward.
    """

    address: str | None
    name: Name = Unnamed.UNASKED


@dataclass(frozen=True, slots=True)
class Verdict:
    """`where` is the file and line, or the option, that decided; `""` if none did."""

    allowed: bool
    where: str = ""


class NameNeeded(Exception):
    """The rules cannot be answered until the client's name was asked for."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line that is for us. `clients` are the lists between the EXCEPTs, in order."""

    where: str
    clients: tuple[tuple[str, ...], ...]
    allow: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """Both files. `warnings` name the file and line each, for the log."""

    rules: tuple[Rule, ...] = ()
    warnings: tuple[str, ...] = ()


# Matching


def decide(rules: Rules, client: Client) -> Verdict:
    """What the first line that matches says; without one the client is allowed.

    Raises `NameNeeded` if `client.name` is `UNASKED` and a line depends on it.
    """
    for rule in rules.rules:
        if _listed(rule.clients, client):
            return Verdict(rule.allow, rule.where)
    return Verdict(True)


def within(address: str | None, networks: Iterable[Network]) -> bool:
    """Whether one of `networks` holds `address`, which is normalised. `None` is in none."""
    if address is None:
        return False
    known = ip_address(address)
    return any(known in network for network in networks)


def of_networks(
    address: str | None, allowed: tuple[Network, ...], denied: tuple[Network, ...]
) -> Verdict:
    """What `--deny-net` and `--allow-net` say; a network that is denied is, whatever is allowed."""
    if within(address, denied):
        return Verdict(False, "--deny-net")
    if allowed and not within(address, allowed):
        return Verdict(False, "--allow-net")
    return Verdict(True)


def _listed(lists: tuple[tuple[str, ...], ...], client: Client) -> bool:
    """`a EXCEPT b EXCEPT c` means `a EXCEPT (b EXCEPT c)`."""
    first, rest = lists[0], lists[1:]
    if not _any(first, client):
        return False
    return not (rest and _listed(rest, client))


def _any(patterns: tuple[str, ...], client: Client) -> bool:
    """Names are needed only if no pattern matches without."""
    needed = False
    for pattern in patterns:
        try:
            if _matches(pattern, client):
                return True
        except NameNeeded:
            needed = True
    if needed:
        raise NameNeeded
    return False


def _matches(pattern: str, client: Client) -> bool:
    """`pattern` is one that `_checked` let pass: in lower case, without brackets."""
    address = client.address
    if pattern == "all":
        return True
    if pattern in _OF_NAMES:
        return _of_name(pattern, client)
    if "/" in pattern:
        return _in_network(pattern, address)
    shown = "unknown" if address is None else address
    if ":" in pattern or not _NAMELIKE(pattern):
        return _looks_like(pattern, shown)
    if "*" in pattern or "?" in pattern:
        # Both are asked, the address first.
        return _looks_like(pattern, shown) or _looks_like(pattern, _name(client))
    return _looks_like(pattern, _name(client))


def _of_name(word: str, client: Client) -> bool:
    if word == "unknown":
        return client.address is None or _name(client) is Unnamed.UNKNOWN
    if word == "known":
        return client.address is not None and isinstance(_name(client), str)
    name = _name(client)
    if word == "local":
        return isinstance(name, str) and "." not in name
    return name is Unnamed.PARANOID


def _name(client: Client) -> Name:
    if client.address is None:
        return Unnamed.UNKNOWN
    if client.name is Unnamed.UNASKED:
        raise NameNeeded
    return client.name


def _looks_like(pattern: str, text: Name) -> bool:
    if not isinstance(text, str):
        return False
    if "*" in pattern or "?" in pattern:
        parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
        return re.fullmatch("".join(parts), text, re.DOTALL) is not None
    if pattern.startswith("."):
        return text.endswith(pattern) and len(text) > len(pattern)
    if pattern.endswith("."):
        return text.startswith(pattern)
    return text == pattern


def _in_network(pattern: str, address: str | None) -> bool:
    if address is None:
        return False
    base, _, mask = pattern.partition("/")
    client, network = ip_address(address), ip_address(base)
    if client.version != network.version:
        return False
    return int(client) & _mask(network, mask) == int(network)


def _mask(network: IPv4Address | IPv6Address, mask: str) -> int:
    if "." in mask:
        return int(IPv4Address(mask))
    bits = network.max_prefixlen
    return (1 << bits) - (1 << (bits - int(mask)))


# Reading

_OF_NAMES: Final = frozenset({"known", "unknown", "local", "paranoid"})
_NAMELIKE = re.compile(r".*[a-z_-].*|[*?.]*").fullmatch
"""A pattern of digits, dots and wildcards alone is one of addresses."""
_PREFIX = re.compile(r"(?:[0-9]{1,3}\.){1,3}").fullmatch
_HOST = re.compile(r"[a-z0-9._*?-]*[a-z_*?-][a-z0-9._*?-]*").fullmatch
_HEXADECIMAL = re.compile(r"[0-9a-f]{0,4}").fullmatch
_WILD = re.compile(r"[0-9.*?]*[*?][0-9.*?]*").fullmatch
_NUMBER = re.compile(r"[0-9]{1,3}").fullmatch
_SEPARATORS = re.compile(r"[, \t\r\n]+")

_NO_VALUE, _MAY, _MUST = range(3)
_OPTIONS: Final = {
    "allow": _NO_VALUE,
    "deny": _NO_VALUE,
    "keepalive": _NO_VALUE,
    "nice": _MAY,
    "rfc931": _MAY,
    "banners": _MUST,
    "linger": _MUST,
    "setenv": _MUST,
    "severity": _MUST,
    "umask": _MUST,
}
"""Options of hosts_options(5) that we can read, and whether they take a value."""
_NEVER: Final = frozenset({"spawn", "twist", "aclexec", "user", "group"})
"""They run programs or change rights: nothing of a text file's may do that here."""


def read(allow: tuple[str, str], deny: tuple[str, str]) -> Rules:
    """The rules of hosts.allow and hosts.deny, each given as (path, text).

    Raises `ConfigError`, naming file and line, where a line cannot be understood that is for us
    or may be.
    """
    rules: list[Rule] = []
    warnings: list[str] = []
    for (path, text), default in ((allow, True), (deny, False)):
        for number, line in _lines(path, text):
            where = f"{path} line {number}"
            rule = _rule(where, line, default, warnings)
            if rule is not None:
                rules.append(rule)
    return Rules(tuple(rules), tuple(warnings))


def _lines(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Lines with those that continue them, and the number of the last, as libwrap counts them."""
    waiting = ""
    *pieces, rest = text.split("\n")
    if rest or (pieces and pieces[-1].endswith("\\")):
        # It may be half written; libwrap then refuses everybody.
        number = len(pieces) + bool(rest)
        raise ConfigError(f"{path} line {number}: the file ends within it; add a line end")
    for number, piece in enumerate(pieces, 1):
        if piece.endswith("\\"):
            waiting += piece[:-1]
            continue
        line, waiting = waiting + piece, ""
        if not line.startswith("#") and line.strip(" \t\r"):
            yield number, line


def _rule(where: str, line: str, default: bool, warnings: list[str]) -> Rule | None:
    daemons, *rest = _fields(line)
    if not rest:
        raise ConfigError(f"{where}: no colon between daemons and clients; write popdrop : ALL")
    if not _for_us(where, daemons):
        return None
    lists = _split(rest[0])
    clients = tuple(tuple(_checked(where, token) for token in each) for each in lists)
    allow, problem = _outcome(rest[1:], default)
    if problem:
        warnings.append(f"{where}: {problem}; whoever matches this line is refused")
    return Rule(where, clients, allow)


def _fields(line: str) -> list[str]:
    """What stands between colons that are in no brackets and behind no backslash."""
    fields = [""]
    depth = 0
    for position, octet in enumerate(line):
        depth += (octet == "[") - (octet == "]" and depth > 0)
        if octet == ":" and depth == 0 and not (position and line[position - 1] == "\\"):
            fields.append("")
        else:
            fields[-1] += octet
    return fields


def _split(text: str) -> tuple[tuple[str, ...], ...]:
    lists: list[list[str]] = [[]]
    for token in filter(None, _SEPARATORS.split(text)):
        if token.upper() == "EXCEPT":
            lists.append([])
        else:
            lists[-1].append(token)
    return tuple(map(tuple, lists))


def _for_us(where: str, text: str) -> bool:
    """Any of our names will do, before EXCEPT and behind it."""

    def ours(token: str) -> bool:
        process, at, _ = token.lower().partition("@")
        known = process in ("all", "known")
        found = known or any(_looks_like(process, name) for name in DAEMONS)
        if at and found:
            raise ConfigError(f"{where}: {token}: rules for one address of ours are not known here")
        return found

    def listed(lists: tuple[tuple[str, ...], ...]) -> bool:
        # All of them are looked at, so that an error is told whatever stands before it.
        first = [ours(token) for token in lists[0]]
        behind = listed(lists[1:]) if lists[1:] else False
        return any(first) and not behind

    return listed(_split(text))


def _checked(where: str, token: str) -> str:
    """The pattern in the one form that `_matches` knows. Raises `ConfigError`."""
    pattern = token.lower()
    if pattern in _OF_NAMES or pattern == "all":
        return pattern
    base, slash, mask = pattern.partition("/")
    if slash and base:
        return _network(where, token, base, mask)
    if base.startswith("["):
        return _host_address(where, token, base)
    if pattern.startswith(("@", "/")) or "@" in pattern:
        raise ConfigError(
            f"{where}: {token}: netgroups, files of patterns and users are not known here; write"
            " addresses, networks, host names or .domains"
        )
    if _PREFIX(pattern) or (not _NAMELIKE(pattern) and _WILD(pattern)):
        return pattern
    if _HOST(pattern):
        return pattern
    try:
        return str(ip_address(pattern))
    except ValueError:
        raise ConfigError(
            f"{where}: {token}: no address, network, host name or .domain; write 192.0.2.7,"
            " 192.0.2., 192.0.2.0/24, [2001:db8::]/32, host.example.org or .example.org"
        ) from None


def _host_address(where: str, token: str, base: str) -> str:
    try:
        return normalised(str(IPv6Address(base.removeprefix("[").removesuffix("]"))))
    except ValueError:
        raise ConfigError(f"{where}: {token}: no IPv6 address; write [2001:db8::1]") from None


def _network(where: str, token: str, base: str, mask: str) -> str:
    try:
        if base.startswith("["):
            # libwrap, too, overlooks what stands behind the prefix of an IPv6 network alone.
            inner = IPv6Address(base.removeprefix("[").removesuffix("]"))
            if not _NUMBER(mask):
                raise ValueError(mask)
            found = ip_network(f"{inner}/{mask}", strict=False)
            return f"{found.network_address}/{mask}"
        network = IPv4Address(base)
        bits = _mask(network, mask) if "." in mask or (_NUMBER(mask) and int(mask) <= 32) else None
    except ValueError:
        bits = None
    if bits is None:
        raise ConfigError(
            f"{where}: {token}: not a network; write it as 192.0.2.0/24,"
            " 192.0.2.0/255.255.255.0 or [2001:db8::]/32"
        )
    if int(network) & ~bits:
        right = IPv4Address(int(network) & bits)
        raise ConfigError(f"{where}: {token}: matches no address; write {right}/{mask}")
    return f"{network}/{mask}"


def _outcome(options: list[str], default: bool) -> tuple[bool, str]:
    """Whether whoever matches is allowed, and what is wrong with the options."""
    outcome = default
    for position, option in enumerate(options):
        word, _, value = option.strip().partition("=")
        name, *more = word.split(None, 1) or [""]
        name, value = name.lower(), value.strip() or "".join(more)
        if name in _NEVER:
            return False, f"{name} is not done here"
        if name not in _OPTIONS:
            hint = "; an IPv6 address is written in brackets" if _HEXADECIMAL(name) else ""
            return False, f"{name or '(nothing)'} is no option{hint}"
        if value and _OPTIONS[name] == _NO_VALUE:
            return False, f"{name} takes no value"
        if not value and _OPTIONS[name] == _MUST:
            return False, f"{name} needs a value"
        if name in ("allow", "deny"):
            if position + 1 < len(options):
                return False, f"{name} must come last"
            outcome = name == "allow"
    return outcome, ""
