"""Who may log in how: pure functions over plain values, a table an auditor can read.

What the connection alone decides (cleartext, STLS) is asked by the session; what an account decides
is asked by the realm, after the credentials were verified, so that a refusal tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Final

from popdrop.errors import ConfigError
from popdrop.values import Account, Network, PeerFacts, Scope, network_of

CLEARTEXT: Final = ("default", "never", "always", "local", "tls")
"""qpopper's five words of `clear-text-password`."""
STLS: Final = ("offer", "require", "off")
"""s/qmail's three: UCSPITLS set, `!`, `-`."""
APOP_USERS: Final = ("refuse", "allow")
WORDINGS: Final = ("vague", "strict")
"""How an account with an APOP secret is refused cleartext: at PASS as a wrong password, as the
oldest qpopper did, or at USER with the reason, as qpopper 4."""
STRONGER: Final = (
    "You must use stronger authentication such as AUTH or APOP to connect to this server"
)
"""qpopper 4's words for that."""

_DOMAIN = re.compile(r"[A-Za-z0-9_\u0080-\U0010ffff][A-Za-z0-9_.\u0080-\U0010ffff-]*").fullmatch

LOOPBACK: Final[tuple[Network, ...]] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


@dataclass(frozen=True, slots=True)
class Folding:
    """How the name that a client gives becomes the name of an account.

    `lower`: qpopper's `downcase-user`. `trim_domain`: its `trim-domain`, all from the first `@` on
    goes. `default_domain`: a name without `@` gets it.
    """

    lower: bool = False
    trim_domain: bool = False
    default_domain: str = ""

    def __call__(self, name: bytes) -> bytes:
        """The folded name. What is not UTF-8 stays as it is: no account has such a name."""
        if not (self.lower or self.trim_domain or self.default_domain):
            return name
        if self.trim_domain:
            name = name.partition(b"@")[0]
        if self.default_domain and b"@" not in name:
            name += b"@" + self.default_domain.encode("utf-8")
        if self.lower:
            try:
                name = name.decode("utf-8").lower().encode("utf-8")
            except UnicodeDecodeError:
                pass
        return name


@dataclass(frozen=True, slots=True)
class Rosters:
    """Lists of names, as they were read last.

    `allowed`: nobody else may log in (qpopper's `auth-file`); `None`: there is no such list.
    `denied` may not (its `nonauth-file`). `shells`: system accounts need one of these; `None`: any.
    """

    allowed: frozenset[bytes] | None = None
    denied: frozenset[bytes] = frozenset()
    shells: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """One listener's rules.

    `cleartext`  USER/PASS and AUTH PLAIN: one of `CLEARTEXT`
    `apop_users` whether an account with an APOP secret may also log in by cleartext
    `wording`    how that is refused: one of `WORDINGS`
    `folding`    what is done to names
    `stls`       one of `STLS`; `off` too where no certificate is configured
    `apop`       whether a checker can verify APOP: no challenge in the greeting otherwise
    `mechanisms` SASL mechanisms that may be tried at all, in the order of CAPA, upper case
    `hidden`     those of them that CAPA does not tell of
    `local`      networks that count as local, for `cleartext` `local` and `tls`
    `min_uid`    system accounts with a lower uid are refused by every mechanism (qpopper: 10 and
                 lower are blocked); 0 is refused always
    `hostname`   stands in the challenge and in the farewell
    """

    cleartext: str = "tls"
    apop_users: str = "refuse"
    wording: str = "vague"
    folding: Folding = Folding()
    stls: str = "off"
    apop: bool = True
    mechanisms: tuple[bytes, ...] = (b"PLAIN",)
    hidden: frozenset[bytes] = frozenset()
    local: tuple[Network, ...] = LOOPBACK
    min_uid: int = 11
    hostname: str = "localhost"
    implementation: str = "Popdrop"


@dataclass(frozen=True, slots=True)
class Variation:
    """What one listener has of its own (`--listen-policy`); `None`: what holds for all.

    `apop_only` adds to a rule and lifts none: what `--apop-only` forbids stays forbidden.
    """

    stls: str | None = None
    cleartext: str | None = None
    apop_only: bool = False

    def __call__(self, policy: Policy) -> Policy:
        """The listener's rules. STLS is as said only where there is a certificate for it."""
        if self.stls is not None:
            policy = replace(policy, stls=self.stls)
        if self.apop_only:
            return replace(policy, cleartext="never", mechanisms=())
        if self.cleartext is not None:
            policy = replace(policy, cleartext=self.cleartext)
        return policy


@dataclass(frozen=True, slots=True)
class Mind:
    """What the protocol tells the realm beside the name (cred's `mind`).

    `cleartext` is whether the password itself was sent; `verified` is called with the account once
    the credentials and its own rules were found good, before the maildrop is opened.
    """

    policy: Policy
    cleartext: bool = True
    peer: PeerFacts = field(default_factory=PeerFacts)
    verified: Callable[[Account], None] = field(default=lambda account: None)


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
        return network_of(text)
    except ValueError:
        raise ConfigError(
            f"{option} {text}: not a network; write it as 192.0.2.0/24 or 2001:db8::/32"
        ) from None


def is_local(policy: Policy, peer: PeerFacts | None) -> bool:
    """Whether the peer's own address, known and trusted, is in a local network."""
    if peer is None or peer.address is None or not peer.address_trusted:
        return False
    return is_in(peer.address, policy.local)


def is_in(address: str, networks: tuple[Network, ...]) -> bool:
    """Whether an IP address, normalised, is in one of the networks."""
    known = ip_address(address.partition("%")[0])
    return any(known in network for network in networks)


def networks(option: str, text: str) -> tuple[Network, ...]:
    """Several networks, a comma between two, given for `option`. Raises `ConfigError`."""
    return tuple(network(option, word.strip()) for word in text.split(",") if word.strip())


def folding(option: str, text: str) -> Folding:
    """What words like `lower,default-domain=example.org` ask for. Raises `ConfigError`."""
    known = {"lower": False, "trim-domain": False}
    domain = ""
    for word in filter(None, (word.strip() for word in text.split(","))):
        key, equals, value = word.partition("=")
        if not equals and key in known:
            known[key] = True
        elif key == "default-domain" and _DOMAIN(value):
            domain = value
        else:
            raise ConfigError(
                f"{option} {text}: {word} is not known; write lower, trim-domain and"
                " default-domain=EXAMPLE.ORG, a comma between two"
            )
    if known["trim-domain"] and domain:
        raise ConfigError(f"{option} {text}: trim-domain and default-domain exclude each other")
    return Folding(known["lower"], known["trim-domain"], domain)


def variation(option: str, text: str) -> Variation:
    """What words like `stls=require,cleartext=never` ask for. Raises `ConfigError`."""
    choices = {"stls": STLS, "cleartext": CLEARTEXT}
    found: dict[str, str] = {}
    for word in (word.strip() for word in text.split(",")):
        key, equals, value = word.partition("=")
        if key in choices and equals and value not in choices[key]:
            raise ConfigError(f"{option} {text}: {key}= takes one of {', '.join(choices[key])}")
        if not (key in choices and equals) and word != "apop-only":
            raise ConfigError(
                f"{option} {text}: {word or '(nothing)'} is not known; write stls=WORD,"
                " cleartext=WORD and apop-only, a comma between two"
            )
        if key in found:
            raise ConfigError(f"{option} {text}: {key} is there twice; leave one out")
        found[key] = value
    return Variation(found.get("stls"), found.get("cleartext"), "apop-only" in found)


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


def apop_accounts_are_refused(policy: Policy) -> bool:
    """Whether cleartext is refused to accounts with an APOP secret (qpopper; decision 23)."""
    return policy.cleartext != "always" and policy.apop_users != "allow"


def mechanism_is_open(
    policy: Policy, mechanism: bytes, secured: bool, peer: PeerFacts | None
) -> bool:
    """Whether one of `policy.mechanisms` may be tried on this connection now.

    Channel binding needs TLS that ends here. EXTERNAL needs a certificate with a name: one without
    would log in as anybody (CVE-2019-3814). Whoever reads a bearer token may use it until it
    expires, so RFC 7628 section 4 wants TLS. PLAIN and LOGIN are cleartext as USER/PASS are; all
    others never show a secret.
    """
    if tls_is_missing(policy, secured):
        return False
    if mechanism in (b"PLAIN", b"LOGIN"):
        return cleartext_is_open(policy, secured, peer)
    if mechanism in (b"OAUTHBEARER", b"XOAUTH2"):
        return secured or is_local(policy, peer)
    if mechanism == b"EXTERNAL":
        return secured and peer is not None and bool(peer.certificate_name)
    if mechanism.endswith(b"-PLUS"):
        return secured and peer is not None and bool(peer.bindings)
    return True


def user_is_asked_about(policy: Policy) -> bool:
    """Whether USER is refused to accounts with an APOP secret, and so asks who has one."""
    return policy.wording == "strict" and apop_accounts_are_refused(policy)


def account_refusal(
    policy: Policy,
    account: Account,
    cleartext: bool,
    peer: PeerFacts | None = None,
    now: float = 0.0,
    rosters: Rosters = Rosters(),
) -> str | None:
    """Why an account with good credentials is refused all the same, `None` if it is not.

    `now` is in seconds since the epoch. The word goes to the log as `reason=`; the client is told
    the one failure text.
    """
    if account.disabled:
        return "disabled"
    if account.uid is not None and (account.uid < policy.min_uid or account.uid == 0):
        return "uid-floor"
    if account.name in rosters.denied:
        return "denied"
    if rosters.allowed is not None and account.name not in rosters.allowed:
        return "not-allowed"
    if (
        rosters.shells is not None
        and account.uid is not None
        and account.shell not in rosters.shells
    ):
        return "shell"
    for scope in (account.scope, account.app):
        if scope is not None and (reason := _out_of(scope, peer, now)):
            return reason
    if cleartext and account.has_apop and apop_accounts_are_refused(policy):
        return "apop-account"
    return None


def _out_of(scope: Scope, peer: PeerFacts | None, now: float) -> str | None:
    if scope.expires is not None and now >= scope.expires:
        return "expired"
    if scope.networks:
        # Where the address is not known, or not to be believed, it is in no network.
        if peer is None or peer.address is None or not peer.address_trusted:
            return "network"
        if not is_in(peer.address, scope.networks):
            return "network"
    return None
