"""Popdrop's checkers for other programs of Twisted's, by their `--auth`.

`twistd popdrop` makes its own, with pools that are bounded; elsewhere the reactor's threads serve.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.cred.strcred import InvalidAuthArgumentString
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from popdrop.accounts import backends
from popdrop.accounts.checkers import AccountsChecker, BackendChecker
from popdrop.accounts.database import AccountsDatabase
from popdrop.errors import ConfigError
from popdrop.spec import parse


class ReactorThreads:
    """The reactor's own pool of threads, as the checkers want a pool."""

    def run(self, work: Callable[..., Any], *args: Any) -> Deferred[Any]:
        """Do `work` in a thread and fire in the reactor."""
        return deferToThread(work, *args)


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
            return AccountsChecker(database, pool, pool, database.can_apop)
        return BackendChecker(backends.make("--auth", f"{kind}:{argument}"), pool)
    except ConfigError as error:
        raise InvalidAuthArgumentString(str(error)) from None
