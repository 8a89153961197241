"""What an issuer of tokens has said: its keys, from a file or a URL, and its answers when asked.

Both are kept for a time, and that time is how long a withdrawn key or token still works. Nothing
here decides what a token is good for: that is `tokens`.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Awaitable
from hashlib import blake2b
from typing import Any, Final, Protocol
from urllib.parse import quote_plus

from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.logger import Logger

from popdrop.accounts import tokens
from popdrop.accounts.tokens import Claims, Key, Rules
from popdrop.accounts.webclient import ANSWER_OCTETS, Unanswered, WebClient
from popdrop.credentials import FAILED
from popdrop.errors import BadCredentials, NoVerifierOfThisKind, TemporaryFailure
from popdrop.threads import Pool
from popdrop.values import Secret

log = Logger()

SHORTEST_AGE: Final = 300.0
"""Seconds that fetched keys are good for at least, whatever the server says of it."""
LONGEST_AGE: Final = 86_400.0
"""Seconds after which keys are fetched again at the latest: so long a withdrawn key is believed."""
USUAL_AGE: Final = 3600.0
"""Seconds that keys are good for where the server does not say."""
STALE_AGE: Final = 86_400.0
"""Seconds after their fetch for which keys are believed while the server does not answer."""
AGAIN: Final = 60.0
"""Seconds between two fetches that unknown key ids cause: anybody can make one up."""
RETRY: Final = 10.0
"""Seconds after a failed fetch until the next, where there are no keys at all."""
LOOK_AGAIN: Final = 10.0
"""Seconds between two looks at the file of keys."""
ANSWER_AGE: Final = 60.0
"""Seconds that an answer to an introspection is kept: so long a withdrawn token still works."""
ANSWERS: Final = 4096
"""Answers kept, of at most 64 KiB and mostly under 1 KiB."""
QUESTIONS: Final = 16
"""Introspections at a time; more wait."""

UNVERIFIABLE: Final = "Account cannot be verified."

_AGE = re.compile(rb"max-age=\"?([0-9]{1,9})")


class Keys(Protocol):
    """Where the issuer's keys come from."""

    def current(self) -> Awaitable[tuple[Key, ...]]:
        """The keys. Raises `TemporaryFailure`."""

    def renewed(self) -> Awaitable[tuple[Key, ...]]:
        """They did not do: newer ones, or the same again."""


class FileKeys:
    """Keys in a file, which is looked at again now and then. A bad new one leaves the old keys."""

    def __init__(self, path: str, pool: Pool, reactor: Any) -> None:
        """Raises `BadKeys` and `OSError`."""
        self._path, self._pool, self._reactor = path, pool, reactor
        self._facts: object = None
        self._keys: tuple[Key, ...] = ()
        self._looked: float = reactor.seconds()
        self._load()

    def _load(self) -> None:
        facts = os.stat(self._path)
        now = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if now != self._facts:
            self._facts = now
            self._keys = tokens.keys_in(small_file(self._path))

    def _look(self) -> None:
        try:
            self._load()
        except (OSError, tokens.BadKeys) as error:
            log.error(
                "keys={path}: {why}; the keys read before stay", path=self._path, why=why(error)
            )

    async def current(self) -> tuple[Key, ...]:
        """As `Keys.current`."""
        now = self._reactor.seconds()
        if now - self._looked >= LOOK_AGAIN:
            self._looked = now
            await self._pool.run(self._look)
        return self._keys

    async def renewed(self) -> tuple[Key, ...]:
        """As `Keys.renewed`."""
        return await self.current()


class FetchedKeys:
    """A JWK set from a URL, fetched at the first login, and again when it is too old.

    Logins that come while it is fetched wait for the one fetch.
    """

    def __init__(self, client: WebClient, url: str, reactor: Any) -> None:
        self._client, self._url, self._reactor = client, url, reactor
        self._keys: tuple[Key, ...] = ()
        self._fetched = 0.0
        self._fresh_until = 0.0
        self._tried: float | None = None
        self._fault = "not fetched yet"
        self._waiting: list[Deferred[None]] | None = None

    async def current(self) -> tuple[Key, ...]:
        """As `Keys.current`."""
        if not self._keys or self._reactor.seconds() >= self._fresh_until:
            await self._fetch_unless(AGAIN if self._is_usable() else RETRY)
        if not self._is_usable():
            raise TemporaryFailure(UNVERIFIABLE, f"no keys from {self._url}: {self._fault}")
        return self._keys

    async def renewed(self) -> tuple[Key, ...]:
        """As `Keys.renewed`."""
        await self._fetch_unless(AGAIN)
        return self._keys

    def _is_usable(self) -> bool:
        return bool(self._keys) and self._reactor.seconds() - self._fetched < STALE_AGE

    async def _fetch_unless(self, seconds: float) -> None:
        """Fetch, or wait for the fetch under way, unless the last began less than `seconds` ago."""
        now = self._reactor.seconds()
        if self._waiting is None:
            if self._tried is not None and now - self._tried < seconds:
                return
            self._tried, self._waiting = now, []
            # Not of this login alone: it goes on when the client has gone.
            Deferred.fromCoroutine(self._fetch()).addErrback(
                lambda failure: log.failure("fetching keys failed", failure=failure)
            )
        if self._waiting is not None:
            waiter: Deferred[None] = Deferred()
            self._waiting.append(waiter)
            await waiter

    async def _fetch(self) -> None:
        try:
            octets, cache_control = await self._client.ask(self._url)
            self._keys = tokens.keys_in(octets, private=False)
            self._fetched = self._reactor.seconds()
            self._fresh_until = self._fetched + _age(cache_control)
        except (Unanswered, tokens.BadKeys) as error:
            self._fault = str(error)
            log.warn("keys from {url}: {why}", url=self._url, why=self._fault)
        finally:
            waiting, self._waiting = self._waiting or [], None
            for waiter in waiting:
                if not waiter.called:
                    waiter.callback(None)


def _age(cache_control: list[bytes]) -> float:
    """Seconds that an answer with these `Cache-Control` fields is good for (RFC 9111 5.2.2)."""
    fields = b",".join(cache_control).lower()
    if b"no-cache" in fields or b"no-store" in fields:
        return SHORTEST_AGE
    found = _AGE.search(fields)
    return min(max(float(found[1]), SHORTEST_AGE), LONGEST_AGE) if found else USUAL_AGE


class Signatures:
    """Verifies tokens by the issuer's keys."""

    def __init__(self, keys: Keys, rules: Rules, pool: Pool) -> None:
        self._keys, self._rules, self._pool = keys, rules, pool

    async def claims(self, token: bytes) -> Claims:
        """What `token` says, signed. Raises `BadCredentials`, `TemporaryFailure`."""
        jwt = tokens.taken_apart(token)
        if jwt is None:
            raise NoVerifierOfThisKind(FAILED, "token-malformed")
        if jwt.issuer != self._rules.issuer:
            raise NoVerifierOfThisKind(FAILED, "token-issuer")
        keys = await self._keys.current()
        claims = await self._by(keys, jwt)
        if claims is None:
            newer = await self._keys.renewed()
            claims = None if newer is keys else await self._by(newer, jwt)
        if claims is None:
            raise BadCredentials(FAILED, "token-key")
        return claims

    async def _by(self, keys: tuple[Key, ...], jwt: tokens.Jwt) -> Claims | None:
        try:
            return await self._pool.run(tokens.signed_claims, jwt, keys, self._rules)
        except tokens.UnknownKey:
            return None


class Introspection:
    """Asks the issuer about each token (RFC 7662), as the client `client_id`."""

    def __init__(
        self,
        client: WebClient,
        url: str,
        client_id: str,
        secret: Secret,
        rules: Rules,
        reactor: Any,
    ) -> None:
        self._client, self._url, self._rules, self._reactor = client, url, rules, reactor
        # RFC 6749 section 2.3.1: both are encoded as in a form before they are joined.
        pair = f"{quote_plus(client_id)}:{quote_plus(secret.reveal())}"
        self._authorization = Secret(b"Basic " + b64encode(pair.encode("ascii")))
        self._digest_key = secrets.token_bytes(32)
        self._answers: OrderedDict[bytes, tuple[float, Claims]] = OrderedDict()
        self._turns = DeferredSemaphore(QUESTIONS)

    async def claims(self, token: bytes) -> Claims:
        """What the issuer says of `token`. Raises `BadCredentials`, `TemporaryFailure`."""
        jwt = tokens.taken_apart(token)
        if jwt is not None and jwt.issuer not in (None, self._rules.issuer):
            # Another's: whoever is shown it could use it.
            raise NoVerifierOfThisKind(FAILED, "token-issuer")
        digest = blake2b(token, key=self._digest_key, digest_size=32).digest()
        until, known = self._answers.get(digest, (0.0, None))
        if known is not None and self._reactor.seconds() < until:
            return known
        claims = await self._turns.run(lambda: Deferred.fromCoroutine(self._told(token)))
        self._answers[digest] = (self._reactor.seconds() + ANSWER_AGE, claims)
        self._answers.move_to_end(digest)
        while len(self._answers) > ANSWERS:
            self._answers.popitem(last=False)
        return claims

    async def _told(self, token: bytes) -> Claims:
        form = {"token": token.decode("ascii"), "token_type_hint": "access_token"}
        try:
            answer, _ = await self._client.ask(
                self._url, form, self._authorization.reveal().decode("ascii")
            )
            claims = tokens.told_claims(answer, self._rules)
            fault = "no introspection response"
        except Unanswered as error:
            claims, fault = None, str(error)
        if claims is None:
            # What the library has raised may quote an answer that quotes the token.
            raise TemporaryFailure(UNVERIFIABLE, f"{self._url}: {fault}") from None
        return claims


def small_file(path: str, private: bool = False) -> bytes:
    """What is in a small file; `private`: of which others have no rights.

    Raises `OSError` and `BadKeys`.
    """
    # Opening a named pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise tokens.BadKeys("not a regular file")
        if private and mode & 0o077:
            raise tokens.BadKeys(f"group or others have rights; chmod 600 {path}")
        octets = file.read(ANSWER_OCTETS + 1)
    if len(octets) > ANSWER_OCTETS:
        raise tokens.BadKeys(f"over {ANSWER_OCTETS} octets")
    return octets


def why(error: Exception) -> str:
    """What is the matter, without the path, which stands in front of it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
