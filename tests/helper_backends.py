"""Backends for tests of the helper, one a word: `make` is given to it as registry."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from twisted.cred.credentials import IUsernameHashedPassword
from zope.interface import implementer

from popdrop.credentials import FAILED
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    PermanentFailure,
    TemporaryFailure,
)
from popdrop.interfaces import IBackend
from popdrop.values import Account

REGISTRY = f"{__name__}:make"

RAISED = {
    b"nobody": NoSuchUser(FAILED),
    b"keyless": NoVerifierOfThisKind(FAILED),
    b"temporary": TemporaryFailure("Not now.", "the reason why"),
    b"permanent": PermanentFailure("Never.", "another reason"),
    b"broken": RuntimeError("hunter2 stands in this text"),
}


@implementer(IBackend)
class Words:
    """Everybody's password is the name backwards; some names have a fate of their own.

    The file FOLDER/NAME says that NAME has begun; `waits` waits until FOLDER/go is there.
    """

    def __init__(self, folder: str, kinds: frozenset[str]) -> None:
        self.kinds = kinds
        self._folder = folder

    def check(self, credentials: Any) -> Account:
        name = credentials.username
        if self._folder:
            with open(os.path.join(self._folder, f"{os.fsdecode(name)}.began"), "a") as file:
                file.write(f"{os.geteuid()} {threading.active_count()}\n")
        if name == b"waits":
            while not os.path.exists(os.path.join(self._folder, "go")):
                time.sleep(0.01)
        if name in RAISED:
            raise RAISED[name]
        if IUsernameHashedPassword.providedBy(credentials):
            good = credentials.checkPassword(name[::-1])
        else:
            good = credentials.password == name[::-1]
        if not good:
            raise BadCredentials(FAILED, "bad-words")
        return Account(name, uid=4711, gid=815, home=f"/home/{os.fsdecode(name)}", shell="/bin/sh")


@implementer(IBackend)
class ReadsFile:
    """The password of everybody is the first line of a file, read anew each time."""

    kinds = frozenset({"password"})

    def __init__(self, path: str) -> None:
        self._path = path

    def check(self, credentials: Any) -> Account:
        with open(self._path, "rb") as file:
            if file.readline().strip() != credentials.password:
                raise BadCredentials(FAILED)
        return Account(credentials.username)


@implementer(IBackend)
class Numbered:
    """`uN` is the user with uid N, and the name backwards the password."""

    kinds = frozenset({"password"})

    def check(self, credentials: Any) -> Account:
        name = credentials.username
        if credentials.password != name[::-1]:
            raise BadCredentials(FAILED)
        return Account(name, uid=int(name[1:]), disabled=name.endswith(b"9999"))


def make(option: str, text: str) -> object:
    """`words:FOLDER`, `password:FOLDER`, `reads:FILE`, `numbered:`, `wrong:`; else `None`."""
    kind, _, argument = text.partition(":")
    if kind == "words":
        return Words(argument, frozenset({"password", "apop"}))
    if kind == "password":
        return Words(argument, frozenset({"password"}))
    if kind == "reads":
        return ReadsFile(argument)
    if kind == "numbered":
        return Numbered()
    if kind == "wrong":
        raise ConfigError(f"{option} {text}: that is wrong")
    return None
