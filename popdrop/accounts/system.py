"""`pam:SERVICE`: system accounts, verified by PAM with the extra `pam` (python-pam)."""

from __future__ import annotations

import importlib
import os
import pwd
import re
from typing import Any, Final

from twisted.cred.credentials import IUsernamePassword
from zope.interface import implementer

from popdrop.credentials import FAILED, acceptable_name, prepared
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    TemporaryFailure,
)
from popdrop.interfaces import IBackend
from popdrop.values import Account

DEFAULT_SERVICE: Final = "popdrop"
_LONGEST: Final = 512  # PAM_MAX_RESP_SIZE of Linux-PAM
_SERVICE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}").fullmatch

# Of <security/_pam_types.h>. All others mean that PAM could not find out.
_USER_UNKNOWN: Final = 10
_REFUSALS: Final = {
    6: "pam-permission",
    7: "bad-credentials",
    8: "pam-permission",
    11: "bad-credentials",
    12: "pam-password-expired",
    13: "pam-account-expired",
    17: "bad-credentials",
    16: "pam-password-expired",
    27: "pam-password-expired",
}


@implementer(IBackend)
class Pam:
    """Asks a PAM service: first who it is (`auth`), then whether he may (`account`). Blocking.

    An expired account or password is a refusal. Nobody is asked anything but the password.
    Modules may sleep, as pam_unix does for 2 s after a wrong password. Raises `ConfigError`.
    """

    kinds = frozenset({"password"})

    def __init__(self, option: str, service: str = DEFAULT_SERVICE) -> None:
        if not _SERVICE(service):
            raise ConfigError(f"{option}: {service}: no name of a PAM service, as in /etc/pam.d")
        self._service = service
        try:
            # By this name: in Python 3.12 `pam` would be looked for here as well.
            self._make = importlib.import_module("pam").PamAuthenticator
            self._make()
        except (ImportError, AttributeError, OSError, TypeError):
            raise ConfigError(
                f"{option}: needs the extra `pam` and libpam0g: pip install 'popdrop[pam]'"
            ) from None

    def check(self, credentials: Any) -> Account:
        """As `IBackend.check`."""
        if not IUsernamePassword.providedBy(credentials):
            raise NoVerifierOfThisKind(FAILED)
        name, password = prepared(credentials.username), credentials.password
        if not acceptable_name(name):
            raise NoSuchUser(FAILED)
        # Many services let accounts without a password in with an empty one (`nullok`).
        if not password or len(password) >= _LONGEST or b"\0" in password:
            raise BadCredentials(FAILED)
        code, reason = self._ask(name, password)
        if code == _USER_UNKNOWN:
            raise NoSuchUser(FAILED)
        if code in _REFUSALS:
            raise BadCredentials(FAILED, _REFUSALS[code])
        if code:
            raise TemporaryFailure(
                "Account cannot be verified.", f"pam:{self._service}: {code}: {reason}"
            )
        return _account(name)

    def _ask(self, name: bytes, password: bytes) -> tuple[int, str]:
        """PAM's code, 0 for good, and its words."""
        asked = self._make()  # one for each: they are not for two threads
        try:
            # The rights of the user are not wanted here, so no `setcred`.
            asked.authenticate(name, password, self._service, resetcreds=False)
        except Exception as error:  # its text may hold anything
            return -1, type(error).__name__
        # Messages of modules may hold the name as it was sent.
        asked.messages.clear()
        return int(asked.code), str(asked.reason)


def _account(name: bytes) -> Account:
    """With what the system knows of it; a name that only PAM knows is a virtual user's."""
    try:
        found = pwd.getpwnam(os.fsdecode(name))
    except KeyError:
        return Account(name)
    except OSError as error:
        raise TemporaryFailure(
            "Accounts cannot be read now, try again later.", f"getpwnam: {error.strerror}"
        ) from None
    return Account(
        name,
        uid=found.pw_uid,
        gid=found.pw_gid,
        home=found.pw_dir or None,
        shell=found.pw_shell or None,
    )
