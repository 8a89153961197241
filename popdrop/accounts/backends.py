"""From `--auth` strings to blocking backends: Popdrop's own, and Twisted's that block as well."""

from __future__ import annotations

import pwd
import sys
from collections.abc import Callable
from typing import Any, Final

from twisted.cred.checkers import InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword
from twisted.cred.error import LoginFailed
from zope.interface import implementer

from popdrop.credentials import FAILED, acceptable_name
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    TemporaryFailure,
)
from popdrop.interfaces import IBackend
from popdrop.spec import Spec, parse
from popdrop.values import Account

INTERFACES: Final = {"password": IUsernamePassword, "apop": IUsernameHashedPassword}
"""The credentials of each kind."""


@implementer(IBackend)
class TwistedBackend:
    """One of Twisted's checkers that do all their work before they return.

    `knows` says whether there is such a user, which they do not tell from a wrong password.
    """

    def __init__(self, checker: Any, knows: Callable[[bytes], bool]) -> None:
        self._checker = checker
        self._knows = knows
        offered = checker.credentialInterfaces
        self.kinds = frozenset(kind for kind, each in INTERFACES.items() if each in offered)

    def check(self, credentials: Any) -> Account:
        """As `IBackend.check`."""
        if not any(INTERFACES[kind].providedBy(credentials) for kind in self.kinds):
            raise NoVerifierOfThisKind(FAILED)
        if not acceptable_name(credentials.username):
            raise NoSuchUser(FAILED)
        if IUsernamePassword.providedBy(credentials):
            empty = not credentials.password or b"\0" in credentials.password
        else:
            empty = credentials.checkPassword(b"")  # a digest that anybody can make
        if empty:
            raise BadCredentials(FAILED)
        outcome: list[Any] = []
        try:
            self._checker.requestAvatarId(credentials).addBoth(outcome.append)
            if isinstance(name := outcome[0], str):
                return Account(name.encode("utf-8"))
            if isinstance(name, bytes):
                return Account(name)
            name.raiseException()
        except LoginFailed:
            pass
        except UnicodeDecodeError:
            raise NoSuchUser(FAILED) from None
        except Exception as error:
            why = type(error).__name__
            raise TemporaryFailure("Account cannot be verified.", why) from None
        raise (BadCredentials if self._knows(credentials.username) else NoSuchUser)(FAILED)


def make(option: str, text: str) -> Any:
    """The `IBackend` that `text` describes, `None` if it is of another kind.

    Raises `ConfigError`, which names `option`.
    """
    maker = _MAKERS.get(text.partition(":")[0])
    return None if maker is None else maker(f"{option} {text}", option, text)


def uses_processor(text: str) -> bool:
    """Whether verifying is mostly computing, and not waiting for others."""
    return text.partition(":")[0] == "passwd"


def _parsed(option: str, text: str, *keywords: str) -> Spec:
    spec = parse(option, text)
    for name in spec.kwargs:
        if name not in keywords:
            takes = ", ".join(f"{each}=" for each in keywords) or "no keyword"
            raise ConfigError(
                f"{option} {text}: {name}= is not known; it takes {takes};"
                " write \\= where it belongs to an argument"
            )
    return spec


def _checkpassword(where: str, option: str, text: str) -> Any:
    from popdrop.accounts.checkpassword import Checkpassword

    spec = _parsed(option, text, "apop", "user")
    more = spec.kwargs
    return Checkpassword(where, spec.args, more.get("apop", "no"), more.get("user", "same"))


def _passwd(where: str, option: str, text: str) -> Any:
    from popdrop.accounts.passwdfile import PasswdFile

    spec = _parsed(option, text, "scheme")
    if len(spec.args) != 1:
        raise ConfigError(f"{where}: name one file, as passwd:/etc/popdrop/passwd")
    return PasswdFile(where, spec.args[0], **spec.kwargs)


def _pam(where: str, option: str, text: str) -> Any:
    from popdrop.accounts.system import Pam

    spec = _parsed(option, text)
    if len(spec.args) > 1:
        raise ConfigError(f"{where}: name one service, as pam:popdrop")
    return Pam(where, *filter(None, spec.args))


def _file(where: str, option: str, text: str) -> Any:
    from twisted.cred.checkers import FilePasswordDB

    path = text.partition(":")[2]
    try:
        with open(path, "rb"):
            checker = FilePasswordDB(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; name a file of name:password") from None

    def knows(name: bytes) -> bool:
        try:
            checker.getUser(name)
        except KeyError:
            return False
        return True

    return TwistedBackend(checker, knows)


def _memory(where: str, option: str, text: str) -> Any:
    # Twisted's plugin keeps text, which equals no octets of any client.
    words = [word.encode("utf-8") for word in text.split(":")[1:]]
    if len(words) % 2 or not words or not all(words):
        raise ConfigError(f"{where}: takes pairs, as memory:bob:secret:carol:secret")
    checker = InMemoryUsernamePasswordDatabaseDontUse()
    for name, password in zip(words[::2], words[1::2], strict=True):
        checker.addUser(name, password)
    return TwistedBackend(checker, checker.users.__contains__)


def _unix(where: str, option: str, text: str) -> Any:
    if sys.version_info >= (3, 13):
        raise ConfigError(f"{where}: Python 3.13 cannot read /etc/shadow any more; use pam:SERVICE")
    from twisted.cred.strcred import makeChecker

    def knows(name: bytes) -> bool:
        try:
            pwd.getpwnam(name.decode("utf-8"))
        except (KeyError, ValueError):
            return False
        return True

    return TwistedBackend(makeChecker("unix"), knows)  # type: ignore[no-untyped-call]


_MAKERS: Final[dict[str, Callable[[str, str, str], Any]]] = {
    "checkpassword": _checkpassword,
    "passwd": _passwd,
    "pam": _pam,
    "file": _file,
    "memory": _memory,
    "unix": _unix,
}
