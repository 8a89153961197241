"""Popdrop's checkers for other programs of Twisted's, by their `--auth`.

`twistd popdrop` makes its own, with pools that are bounded; elsewhere the reactor's threads serve.
Popdrop's realm is not there to ask what an account may do: so that is asked here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.strcred import InvalidAuthArgumentString
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from zope.interface import implementer

from popdrop.accounts import backends
from popdrop.accounts.checkers import AccountsChecker, BackendChecker
from popdrop.accounts.database import AccountsDatabase
from popdrop.credentials import FAILED
from popdrop.errors import BadCredentials, ConfigError
from popdrop.policy import Policy, account_refusal
from popdrop.spec import parse
from popdrop.values import Verified


class ReactorThreads:
    """The reactor's own pool of threads, as the checkers want a pool."""

    def run(self, work: Callable[..., Any], *args: Any) -> Deferred[Any]:
        """Do `work` in a thread and fire in the reactor."""
        return deferToThread(work, *args)


@implementer(ICredentialsChecker)
class Ruled:
    """What `checker` has verified, unless the account's own rules refuse it (decision 22).

    Disabled, expired, and restricted to networks, which nothing here knows of. A read-only login is
    refused too: other programs cannot tell it from any other.
    """

    def __init__(self, checker: Any, clock: Callable[[], float] = time.time) -> None:
        self._checker = checker
        self._clock = clock
        self.credentialInterfaces = tuple(checker.credentialInterfaces)

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        """As the checker. Fails with `BadCredentials` where an account is refused."""
        verified: Deferred[Any] = self._checker.requestAvatarId(credentials)
        return verified.addCallback(self._allowed)

    def _allowed(self, avatar: Verified) -> Verified:
        # How a password travelled, and which uids may log in, is the other program's affair.
        account = avatar.account._replace(uid=None)
        refusal = account_refusal(_OWN_RULES, account, False, None, self._clock())
        if refusal is not None or account.read_only:
            raise BadCredentials(FAILED, refusal or "read-only")
        return avatar


_OWN_RULES: Final = Policy()


def checker(kind: str, argument: str) -> Any:
    """An `ICredentialsChecker` for `KIND:ARGUMENT`. Raises `InvalidAuthArgumentString`."""
    pool: Any = ReactorThreads()
    try:
        if kind == "accounts":
            spec = parse("--auth", f"accounts:{argument}")
            if len(spec.args) != 1 or not spec.args[0] or spec.kwargs.keys() - {"key"}:
                raise ConfigError("--auth accounts: name one file, as accounts:/srv/accounts.db")
            path = os.path.abspath(spec.args[0])
            database = AccountsDatabase(path, key=spec.kwargs.get("key"))
            return Ruled(AccountsChecker(database, pool, pool, database.can_apop))
        return Ruled(BackendChecker(backends.make("--auth", f"{kind}:{argument}"), pool))
    except ConfigError as error:
        raise InvalidAuthArgumentString(str(error)) from None
