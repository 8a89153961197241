"""Who may log in how: pure functions over plain values, a table an auditor can read.

What the connection alone decides (cleartext, STLS) is asked by the session; what an account decides
is asked by the realm, after the credentials were verified, so that a refusal tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final

from popdrop.errors import ConfigError
from popdrop.values import Account, PeerFacts

Network = IPv4Network | IPv6Network

CLEARTEXT: Final = ("default", "never", "always", "local", "tls")
"""qpopper's five words of `clear-text-password`."""
STLS: Final = ("offer", "require", "off")
"""s/qmail's three: UCSPITLS set, `!`, `-`."""
APOP_USERS: Final = ("refuse", "allow")

LOOPBACK: Final[tuple[Network, ...]] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


@dataclass(frozen=True, slots=True)
class Policy:
    """One listener's rules.

    `cleartext`  USER/PASS and AUTH PLAIN: one of `CLEARTEXT`
    `apop_users` whether an account with an APOP secret may also log in by cleartext
    `stls`       one of `STLS`; `off` too where no certificate is configured
    `apop`       whether a checker can verify APOP: no challenge in the greeting otherwise
    `mechanisms` SASL mechanisms in the order of CAPA, upper case
    `local`      networks that count as local, for `cleartext` `local` and `tls`
    `min_uid`    system accounts with a lower uid are refused by every mechanism (qpopper: 10 and
                 lower are blocked)
    `hostname`   stands in the challenge and in the farewell
    """

    cleartext: str = "tls"
    apop_users: str = "refuse"
    stls: str = "off"
    apop: bool = True
    mechanisms: tuple[bytes, ...] = (b"PLAIN",)
    local: tuple[Network, ...] = LOOPBACK
    min_uid: int = 11
    hostname: str = "localhost"
    implementation: str = "Popdrop"


@dataclass(frozen=True, slots=True)
class Mind:
    """What the protocol tells the realm beside the name (cred's `mind`).

    `cleartext` is whether the password itself was sent; `verified` is called with the
    canonical name once the credentials and the account's own rules were found good, before the
    maildrop is opened.
    """

    policy: Policy
    cleartext: bool = True
    peer: PeerFacts = field(default_factory=PeerFacts)
    verified: Callable[[bytes], None] = field(default=lambda name: None)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. `login`: from connect to verified credentials. `idle`: RFC 1939 wants 600 at least.
    `write`: without any progress of a client that has answers to read.
    """

    login: float = 60.0
    idle: float = 600.0
    write: float = 300.0


def network(option: str, text: str) -> Network:
    """One network in CIDR form, given for `option`. Raises `ConfigError`."""
    try:
        return ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(
            f"{option} {text}: not a network; write it as 192.0.2.0/24 or 2001:db8::/32"
        ) from None


def is_local(policy: Policy, peer: PeerFacts | None) -> bool:
    """Whether the peer's own address, known and trusted, is in a local network."""
    if peer is None or peer.address is None or not peer.address_trusted:
        return False
    address = ip_address(peer.address.partition("%")[0])
    return any(address in network for network in policy.local)


def tls_is_missing(policy: Policy, secured: bool) -> bool:
    """Whether nothing but STLS is served now (s/qmail: `UCSPITLS=!`)."""
    return policy.stls == "require" and not secured


def cleartext_is_open(policy: Policy, secured: bool, peer: PeerFacts | None) -> bool:
    """Whether USER/PASS and AUTH PLAIN may be tried on this connection now."""
    match policy.cleartext:
        case "default" | "always":
            return True
        case "local":
            return is_local(policy, peer)
        case "tls":
            return secured or is_local(policy, peer)
        case _:
            return False


def account_refusal(policy: Policy, account: Account, cleartext: bool) -> str | None:
    """Why an account with good credentials is refused all the same, `None` if it is not.

    The word goes to the log as `reason=`; the client is told the one failure text.
    """
    if account.disabled:
        return "disabled"
    if account.uid is not None and account.uid < policy.min_uid:
        return "uid-floor"
    if (
        cleartext
        and account.has_apop
        and policy.cleartext != "always"
        and policy.apop_users != "allow"
    ):
        return "apop-account"
    return None
