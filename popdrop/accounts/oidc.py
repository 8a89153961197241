"""`--auth oidc:ISSUER:...`: the checker of bearer tokens, for OAUTHBEARER and XOAUTH2.

An identity provider has verified somebody and signed it, or answers for it when asked. Which of
its words are believed is `tokens.Rules`; how its keys and answers are come by is in `issuer`. PyJWT
and treq (extra `oidc`) are imported only when there is such a checker.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Final

from twisted.cred.checkers import ICredentialsChecker
from twisted.internet.defer import Deferred
from zope.interface import implementer

from popdrop.accounts import tokens
from popdrop.accounts.issuer import (
    FetchedKeys,
    FileKeys,
    Introspection,
    Signatures,
    small_file,
    why,
)
from popdrop.accounts.tokens import Rules
from popdrop.accounts.webclient import WebClient, url_fault
from popdrop.credentials import FAILED
from popdrop.errors import BadCredentials, ConfigError
from popdrop.interfaces import IBearerToken
from popdrop.spec import Spec, parse
from popdrop.threads import Pool
from popdrop.values import Account, Secret, Verified

LONGEST_LEEWAY: Final = 600
"""Seconds: a clock that is off by more is to be set, not to be waited for."""


@implementer(ICredentialsChecker)
class OidcChecker:
    """Verifies `IBearerToken`.

    Nothing of the account is known here but its name: the realm looks up whether it is disabled and
    the like, as for any checker that does not keep accounts (decision 22).
    """

    credentialInterfaces = (IBearerToken,)

    def __init__(
        self,
        source: Signatures | Introspection,
        rules: Rules,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._source, self._rules, self._now = source, rules, now

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        """Fires with a foreign `Verified`. Fails with `BadCredentials`, `TemporaryFailure`.

        With `NoVerifierOfThisKind` for a token of another issuer, or one that cannot be told to be
        this issuer's: the next checker may know it.
        """
        return Deferred.fromCoroutine(self._verified(credentials))

    async def _verified(self, credentials: Any) -> Verified:
        token: bytes = credentials.token
        if not tokens.plausible(token):
            raise BadCredentials(FAILED, "token-malformed")
        claims = await self._source.claims(token)
        name = tokens.name_in(claims, self._rules, self._now(), credentials.username)
        return Verified(Account(name), foreign=True)


# The string

_COMMON: Final = ("audience", "claim", "domain", "scope", "leeway", "ca")
_SOURCES: Final = {
    "keys": ("algorithms",),
    "jwks": ("algorithms",),
    "introspect": ("client-id", "secret-file"),
}
KEYWORDS: Final = (*_SOURCES, *_COMMON, "algorithms", "client-id", "secret-file")
"""Of the string behind `--auth oidc:`."""


def from_spec(text: str, reactor: Any, pool: Pool) -> OidcChecker:
    """The checker that `--auth TEXT` describes. `pool` reads files and verifies signatures.

    Raises `ConfigError`.
    """
    option = f"--auth {text}"
    spec = parse("--auth", _quoted(text))
    issuer = spec.args[0] if len(spec.args) == 1 else ""
    if not issuer:
        raise ConfigError(
            f"{option}: name one issuer, the iss of its tokens: oidc:https://id.example.org:..."
        )
    source = _source_of(option, spec)
    rules = _rules(option, spec, issuer, source)
    try:
        return OidcChecker(_made(option, spec, source, rules, reactor, pool), rules)
    except ImportError as error:
        raise ConfigError(
            f"{option}: {error.name or error} is not installed; pip install popdrop[oidc]"
        ) from None


def _quoted(text: str) -> str:
    r"""URLs may stand in the string as they are: their own colons get the `\` that they need."""
    host = r"(?:\[[0-9A-Fa-f:.]*\]|[^:/=\\\[\]]*)"
    return re.sub(
        rf"(?<!\\):(//{host})(:(?=[0-9]+(?:[:/]|$)))?",
        lambda found: "\\:" + found[1].replace(":", "\\:") + ("\\:" if found[2] else ""),
        text,
    )


def _source_of(option: str, spec: Spec) -> str:
    given = [name for name in _SOURCES if name in spec.kwargs]
    if len(given) != 1:
        raise ConfigError(f"{option}: give one of keys=FILE, jwks=URL, introspect=URL")
    for name in spec.kwargs:
        if name not in (*_COMMON, given[0], *_SOURCES[given[0]]):
            fault = f"not used with {given[0]}=" if name in KEYWORDS else "unknown"
            raise ConfigError(f"{option}: {name}= is {fault}")
        if not spec.kwargs[name]:
            raise ConfigError(f"{option}: {name}= is empty; leave it out or fill it in")
    for name in ("jwks", "introspect"):
        wrong = url_fault(spec.kwargs[name]) if name in spec.kwargs else None
        if wrong is not None:
            raise ConfigError(f"{option}: {name}=: {wrong}")
    return given[0]


def _rules(option: str, spec: Spec, issuer: str, source: str) -> Rules:
    given = spec.kwargs
    if "audience" not in given and source != "introspect":
        raise ConfigError(
            f"{option}: audience= is missing: without it a token made for any other service of this"
            " issuer would open mailboxes; name what its tokens for mail have as aud"
        )
    algorithms = _set(given.get("algorithms", "")) or tokens.ALGORITHMS
    for name in sorted(algorithms - tokens.ALGORITHMS):
        raise ConfigError(
            f"{option}: algorithms={name}: not taken; of signatures by a public key there are"
            f" {', '.join(sorted(tokens.ALGORITHMS))}"
        )
    leeway = given.get("leeway", "60")
    if not re.fullmatch("[0-9]{1,3}", leeway) or int(leeway) > LONGEST_LEEWAY:
        raise ConfigError(f"{option}: leeway= takes seconds, 0 to {LONGEST_LEEWAY}")
    return Rules(
        issuer,
        _set(given.get("audience", "")),
        given.get("claim", "email"),
        given.get("domain", "").removeprefix("@"),
        _set(given.get("scope", "").replace(" ", ",")),
        algorithms,
        float(leeway),
    )


def _set(text: str) -> frozenset[str]:
    return frozenset(filter(None, text.split(",")))


def _made(
    option: str, spec: Spec, source: str, rules: Rules, reactor: Any, pool: Pool
) -> Signatures | Introspection:
    given = spec.kwargs
    if source != "introspect":
        import jwt  # noqa: F401  (if it is missing, it is to be missed now)
    if source == "keys":
        try:
            return Signatures(FileKeys(given["keys"], pool, reactor), rules, pool)
        except (OSError, tokens.BadKeys) as error:
            raise ConfigError(f"{option}: keys={given['keys']}: {why(error)}") from None
    try:
        client = WebClient(reactor, small_file(given["ca"]) if "ca" in given else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: ca={given.get('ca')}: {why(error)}") from None
    if source == "jwks":
        return Signatures(FetchedKeys(client, given["jwks"], reactor), rules, pool)
    for name in _SOURCES["introspect"]:
        if name not in given:
            raise ConfigError(f"{option}: introspect= needs {name}=, too")
    secret = _secret(option, given["secret-file"])
    return Introspection(client, given["introspect"], given["client-id"], secret, rules, reactor)


def _secret(option: str, path: str) -> Secret:
    """The first line of a file that only its owner can read."""
    try:
        secret = small_file(path, private=True).split(b"\n", 1)[0].rstrip(b"\r")
    except (OSError, tokens.BadKeys) as error:
        raise ConfigError(f"{option}: secret-file={path}: {why(error)}") from None
    if not secret:
        raise ConfigError(f"{option}: secret-file={path}: its first line is empty")
    return Secret(secret)
