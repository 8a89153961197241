"""Path templates: `/var/mail/{user}`, `{home}/mbox`, `/var/mail/{hash2}/{user}`."""

from __future__ import annotations

import os
import re
from typing import Final

from popdrop.errors import ConfigError, NoSuchOwner
from popdrop.values import Owner

FIELDS: Final = ("user", "domain", "home", "hash1", "hash2")
"""What may stand in braces. Nothing else is ever expanded, and no field twice over."""

_FIELD: Final = re.compile(r"\{([^{}]*)\}")


class Template:
    """A path with fields that an owner fills. Raises `ConfigError` where it cannot be one.

    `{user}`, `{domain}` and `{home}` are the owner's; `{hash1}` and `{hash2}` are qpopper's
    `hash-spool` 1 and 2: `v` and `b/o` for `bob`. Where there is a `{domain}`, the others are of
    the name without it; else of the whole name, so that two domains never share a path.
    """

    def __init__(self, text: str) -> None:
        for name in _FIELD.findall(text):
            if name not in FIELDS:
                allowed = ", ".join("{" + field + "}" for field in FIELDS)
                raise ConfigError(f"path {text}: no field {{{name}}}; there are {allowed}")
        plain = _FIELD.sub("", text)
        if "{" in plain or "}" in plain or "\0" in plain:
            raise ConfigError(f"path {text}: a brace or NUL that belongs to no field")
        if not text.startswith(("/", "{home}/")):
            raise ConfigError(f"path {text}: must begin with / or {{home}}/")
        if not {"{user}", "{home}"} & {"{" + name + "}" for name in _FIELD.findall(text)}:
            raise ConfigError(f"path {text}: needs {{user}} or {{home}}, or all would share it")
        if text.endswith("/") or {".", ".."} & set(text.split("/")):
            raise ConfigError(f"path {text}: must be a plain path to a file or folder, without ..")
        self.text = text
        # What is between the fields, and the fields: even and odd ones.
        self._pieces = _FIELD.split(text)

    def path(self, owner: Owner) -> str:
        """The owner's path. Raises `NoSuchOwner` where a field cannot be filled safely."""
        pieces = self._pieces.copy()
        for index in range(1, len(pieces), 2):
            pieces[index] = self._value(pieces[index], owner)
        return "".join(pieces)

    def _value(self, name: str, owner: Owner) -> str:
        if name == "home":
            if not owner.home or not owner.home.startswith("/") or "\0" in owner.home:
                raise NoSuchOwner(NO_PLACE, f"{self.text}: the account has no home folder")
            return owner.home.rstrip("/")
        value = owner.domain if name == "domain" else self._user(owner)
        # Names were checked before they came here; a path must not depend on that.
        if value in ("", ".", "..") or value[0] in ".-" or "/" in value or "\0" in value:
            raise NoSuchOwner(NO_PLACE, f"{self.text}: no {name} that could be part of a path")
        if name == "hash1":
            return _hash1(value)
        return _hash2(value) if name == "hash2" else value

    def _user(self, owner: Owner) -> str:
        suffix = "@" + owner.domain
        if not owner.domain or "domain" not in self._pieces[1::2]:
            return owner.user
        return owner.user.removesuffix(suffix)


NO_PLACE: Final = "There is no maildrop for this user."


def _hash1(user: str) -> str:
    """The sum of the first five octets of the name, modulo 26, as a letter (qpopper's 1)."""
    return chr(ord("a") + sum(os.fsencode(user)[:5]) % 26)


def _hash2(user: str) -> str:
    """The first two octets of the name as two folders; a single one twice (qpopper's 2)."""
    octets = os.fsencode(user)
    first, second = octets[:1], octets[1:2] or octets[:1]
    return os.fsdecode(first + b"/" + second)
