"""Checkers of Twisted's cred: credentials in, `Verified` out.

What is checked here is only who somebody is. Whether he may log in (disabled, uid floor, networks)
is asked in the realm, whichever checker verified him (decision 22).
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any, Final, cast

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.interface import InterfaceClass

from popdrop.accounts import foreign
from popdrop.accounts.backends import INTERFACES
from popdrop.accounts.rows import AppPassword
from popdrop.accounts.secrets import Hasher
from popdrop.credentials import FAILED, prepared_or_raw
from popdrop.errors import BadCredentials, NoSuchUser, NoVerifierOfThisKind, TemporaryFailure
from popdrop.interfaces import (
    IAccounts,
    IAnswers,
    IExternal,
    IScramAccounts,
    IScramCredentials,
)
from popdrop.sasl import ApopQuery, Query, ScramQuery
from popdrop.threads import Pool
from popdrop.values import Account, ScramVerifier, Secret, Verified, client_network

log = Logger()

# What an APOP digest is compared with where there is no secret: octets that no client can know to
# be right, since the result is thrown away.
_DECOY = b"\0" * 16


@implementer(ICredentialsChecker)
class AccountsChecker:
    """Verifies against `accounts`. Unknown users cost what known ones do.

    `lookup_pool` does the look-ups, and with them all verification but of passwords; `hash_pool`
    the Argon2 hashes: its number of threads is the cap on hashes in flight. `can_apop`: whether
    the sealed verifiers can be opened, without which there is no APOP, CRAM-MD5 and SCRAM.
    `recent` remembers logins by password that were good, `None`: none. `clock` is in seconds since
    the epoch.
    """

    def __init__(
        self,
        accounts: IAccounts,
        lookup_pool: Pool,
        hash_pool: Pool,
        can_apop: bool,
        hasher: Hasher | None = None,
        recent: Recent | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._recent = recent
        self._clock = clock
        self._accounts = accounts
        self._lookup_pool = lookup_pool
        self._hash_pool = hash_pool
        self._hasher = hasher if hasher is not None else Hasher()
        kinds: list[InterfaceClass] = [IUsernamePassword, IExternal]
        if can_apop:
            kinds.append(IUsernameHashedPassword)
        if can_apop and IScramAccounts.providedBy(accounts):
            kinds.append(IScramCredentials)
        self.credentialInterfaces: tuple[InterfaceClass, ...] = tuple(kinds)

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        """Fires with `Verified`.

        Fails with `NoSuchUser`, `NoVerifierOfThisKind`, `BadCredentials`, `TemporaryFailure`.
        """
        if IUsernamePassword.providedBy(credentials):
            return Deferred.fromCoroutine(self._by_password(credentials))
        if IUsernameHashedPassword.providedBy(credentials):
            return self._lookup_pool.run(self._by_digest, credentials)
        if IScramCredentials.providedBy(credentials):
            return self._lookup_pool.run(self._by_scram, credentials)
        return self._lookup_pool.run(self._by_certificate, credentials)

    async def _by_password(self, credentials: Any) -> Verified:
        username: bytes = credentials.username
        password = prepared_or_raw(credentials.password)
        account, used = await self._lookup_pool.run(self._find, username, password)
        if account is not None and used is not None:
            self._afterwards(
                self._lookup_pool, self._accounts.note_use, account.name, used, self._clock()
            )
            return Verified(account._replace(app=used.scope))
        hashed = None if account is None else account.password_hash
        key = self._key(account, credentials, password)
        good = key is not None and self._recent is not None and self._recent.holds(key)
        if not good:
            good = await self._hash_pool.run(self._matches, hashed, password, username)
        if account is None:
            raise NoSuchUser(FAILED)
        if hashed is None:
            raise NoVerifierOfThisKind(FAILED)
        if not good:
            raise BadCredentials(FAILED)
        if key is not None and self._recent is not None:
            self._recent.add(key)
        if account.lacks_scram or self._hasher.is_outdated(hashed):
            self._afterwards(self._hash_pool, self._accounts.improve, account, Secret(password))
        return Verified(account)

    def _matches(self, hashed: Secret | None, password: bytes, username: bytes) -> bool:
        """An imported hash is verified as it is; the first good login makes our own of it."""
        if hashed is None or (
            hashed.reveal().startswith(b"$argon2id$")
            and not foreign.is_too_costly(hashed.reveal().decode("ascii", "replace"))
        ):
            return self._hasher.verify(hashed, password)
        return foreign.verify(hashed.reveal(), password, username)

    def _find(self, username: bytes, password: bytes) -> tuple[Account | None, AppPassword | None]:
        username = prepared_or_raw(username)
        account = self._accounts.lookup(username)
        # Asked for unknown names too: the same work.
        return account, self._accounts.app_password(username, password)

    def _key(self, account: Account | None, credentials: Any, password: bytes) -> bytes | None:
        if self._recent is None or account is None:
            return None
        client: str = getattr(credentials, "client", "")
        return self._recent.key(account, client, password)

    def _afterwards(self, pool: Pool, work: Callable[..., object], *arguments: object) -> None:
        """What the client does not wait for; a login is good without it."""
        pool.run(work, *arguments).addErrback(_could_not)

    def _by_digest(self, credentials: Any) -> Verified:
        account = self._lookup(credentials.username)
        secret = None if account is None else account.apop_secret
        good = credentials.checkPassword(_DECOY if secret is None else secret.reveal())
        if account is None:
            raise NoSuchUser(FAILED)
        if account.apop_sealed:
            raise TemporaryFailure(
                "Account cannot be verified.",
                "an APOP secret does not open: its key is missing or another one, or it is damaged",
            )
        if secret is None:
            raise NoVerifierOfThisKind(FAILED)
        if not good:
            raise BadCredentials(FAILED)
        return Verified(account)

    def _by_scram(self, credentials: Any) -> Verified:
        name = prepared_or_raw(credentials.username)
        account = self._accounts.lookup(name)
        scram = cast("IScramAccounts", self._accounts).scram
        good = credentials.check(scram(name, credentials.algorithm))
        if account is None:
            raise NoSuchUser(FAILED)
        if not good and (account.lacks_scram or account.password_hash is None):
            raise NoVerifierOfThisKind(FAILED)
        if not good:
            raise BadCredentials(FAILED)
        return Verified(account)

    def _by_certificate(self, credentials: Any) -> Verified:
        if not credentials.username:
            raise BadCredentials(FAILED)  # CVE-2019-3814
        account = self._lookup(credentials.username)
        if account is None:
            raise NoSuchUser(FAILED)
        return Verified(account)

    def _lookup(self, username: bytes) -> Account | None:
        return self._accounts.lookup(prepared_or_raw(username))


@implementer(IAnswers)
class Answers:
    """Answers the questions of sessions, in the pool of look-ups.

    The first that has an account of the name gives a verifier. All `accounts` are looked through
    for every name, so that the time tells nothing. `with_scram` are those of them that provide
    `IScramAccounts` and have a key.
    """

    def __init__(
        self, accounts: Iterable[IAccounts], with_scram: Iterable[Any], lookup_pool: Pool
    ) -> None:
        self._accounts = tuple(accounts)
        self._with_scram: tuple[Any, ...] = tuple(with_scram)
        self._pool = lookup_pool

    async def answer(self, query: Query) -> object:
        """A `ScramVerifier` for each `ScramQuery`, for an `ApopQuery` whether there is a secret."""
        if isinstance(query, ApopQuery):
            return await self._pool.run(self._has_apop, query)
        return await self._pool.run(self._scram, query)

    def _scram(self, query: ScramQuery) -> ScramVerifier:
        name = prepared_or_raw(query.username)
        having = [each for each in self._with_scram if each.lookup(name) is not None]
        verifier: ScramVerifier = (having or self._with_scram)[0].scram(name, query.algorithm)
        return verifier

    def _has_apop(self, query: ApopQuery) -> bool:
        name = prepared_or_raw(query.username)
        having = [account for each in self._accounts if (account := each.lookup(name)) is not None]
        return any(account.has_apop for account in having)  # as the realm asks


@implementer(ICredentialsChecker)
class BackendChecker:
    """Asks an `IBackend` in a thread of `pool`: its number of threads is the cap on checks.

    Anything with `run(work, *args)` that fires in the reactor is a pool.
    """

    def __init__(self, backend: Any, pool: Pool) -> None:
        self._backend = backend
        self._pool = pool
        self.takes_cram = getattr(backend, "takes_cram", True)
        """Whether it can verify CRAM-MD5, if it can APOP: both are `IUsernameHashedPassword`."""
        self.credentialInterfaces: tuple[InterfaceClass, ...] = tuple(
            each for kind, each in INTERFACES.items() if kind in backend.kinds
        )

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        """Fires with a foreign `Verified`. Fails as `IBackend.check` does."""
        checked = self._pool.run(self._backend.check, credentials)
        return checked.addCallback(Verified, foreign=True)


@implementer(ICredentialsChecker)
class Chain:
    """Asks several checkers in order; each is offered only the credentials it knows.

    The next one is asked after `NoSuchUser` and `NoVerifierOfThisKind` alone: a wrong secret, a
    refusal and a failure are answers, also those of checkers that are not ours (decision 22).
    """

    def __init__(self, checkers: Iterable[Any]) -> None:
        self._checkers = tuple(checkers)
        self.credentialInterfaces: tuple[InterfaceClass, ...] = tuple(
            dict.fromkeys(kind for checker in self._checkers for kind in _kinds(checker))
        )

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        """Fires with the avatar id of the first checker that knows the user."""
        return Deferred.fromCoroutine(self._ask(credentials))

    async def _ask(self, credentials: Any) -> Any:
        for checker in self._checkers:
            if any(kind.providedBy(credentials) for kind in _kinds(checker)):
                try:
                    return await maybeDeferred(checker.requestAvatarId, credentials)
                except (NoSuchUser, NoVerifierOfThisKind):
                    continue
        raise BadCredentials(FAILED)


class Recent:
    """Logins by password that were good, for `seconds`: a poller pays for one hash of many.

    Kept are MACs under a key of this process, of name, version of the account, client network and
    password: a changed or disabled account is not found (decision 27). At most `MOST`, some 0.2 KB
    each.
    """

    MOST: Final = 10_000

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._mac_key = os.urandom(32)
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def key(self, account: Account, client: str, password: bytes) -> bytes:
        """Under which a good login is remembered. `client` is an IP address, or empty."""
        parts = (account.name, b"%d" % account.version, client_network(client).encode(), password)
        text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return blake2b(text, key=self._mac_key, digest_size=32).digest()

    def holds(self, key: bytes) -> bool:
        """Whether it was good a short time ago. From the reactor's thread, as `add`."""
        until = self._until.get(key)
        return until is not None and self._clock() < until

    def add(self, key: bytes) -> None:
        """It was good just now, or is still remembered to have been."""
        if key in self._until and self.holds(key):
            return  # the time runs from the last real verification
        self._until[key] = self._clock() + self._seconds
        self._until.move_to_end(key)
        if len(self._until) > self.MOST:
            self._until.popitem(last=False)


def _could_not(failure: Failure) -> None:
    log.warn("an account was not brought up to date: {why}", why=str(failure.value))


def _kinds(checker: Any) -> tuple[InterfaceClass, ...]:
    return tuple(checker.credentialInterfaces)
