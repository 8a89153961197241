"""Checkers of Twisted's cred: credentials in, `Verified` out.

What is checked here is only who somebody is. Whether he may log in (disabled, uid floor, networks)
is asked in the realm, whichever checker verified him (decision 22).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.internet.defer import Deferred, maybeDeferred
from zope.interface import implementer
from zope.interface.interface import InterfaceClass

from popdrop.accounts.secrets import Hasher
from popdrop.credentials import FAILED, prepared
from popdrop.errors import BadCredentials, NoSuchUser, NoVerifierOfThisKind, TemporaryFailure
from popdrop.interfaces import IAccounts
from popdrop.threads import Pool
from popdrop.values import Account, Verified

# What an APOP digest is compared with where there is no secret: octets that no client can know to
# be right, since the result is thrown away.
_DECOY = b"\0" * 16


@implementer(ICredentialsChecker)
class AccountsChecker:
    """Verifies against `accounts`. Unknown users cost what known ones do.

    `lookup_pool` does the look-ups, and APOP verification with them; `hash_pool` the Argon2 hashes:
    its number of threads is the cap on hashes in flight. `can_apop`: whether APOP is offered.
    """

    def __init__(
        self,
        accounts: IAccounts,
        lookup_pool: Pool,
        hash_pool: Pool,
        can_apop: bool,
        hasher: Hasher | None = None,
    ) -> None:
        self._accounts = accounts
        self._lookup_pool = lookup_pool
        self._hash_pool = hash_pool
        self._hasher = hasher if hasher is not None else Hasher()
        self.credentialInterfaces: tuple[InterfaceClass, ...] = (
            (IUsernamePassword, IUsernameHashedPassword) if can_apop else (IUsernamePassword,)
        )

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        """Fires with `Verified`.

        Fails with `NoSuchUser`, `NoVerifierOfThisKind`, `BadCredentials`, `TemporaryFailure`.
        """
        if IUsernamePassword.providedBy(credentials):
            return Deferred.fromCoroutine(self._by_password(credentials))
        return self._lookup_pool.run(self._by_digest, credentials)

    async def _by_password(self, credentials: Any) -> Verified:
        username: bytes = credentials.username
        password = _prepared_or_raw(credentials.password)
        account = await self._lookup_pool.run(self._lookup, username)
        hashed = None if account is None else account.password_hash
        good = await self._hash_pool.run(self._hasher.verify, hashed, password)
        if account is None:
            raise NoSuchUser(FAILED)
        if hashed is None:
            raise NoVerifierOfThisKind(FAILED)
        if not good:
            raise BadCredentials(FAILED)
        return Verified(account)

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

    def _lookup(self, username: bytes) -> Account | None:
        return self._accounts.lookup(_prepared_or_raw(username))


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


def _kinds(checker: Any) -> tuple[InterfaceClass, ...]:
    return tuple(checker.credentialInterfaces)


def _prepared_or_raw(text: bytes) -> bytes:
    """As stored if it can be: what cannot be prepared equals nothing that is stored."""
    try:
        return prepared(text)
    except BadCredentials:
        return text
