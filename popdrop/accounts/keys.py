"""Where the key of the sealed secrets comes from: a file, a systemd credential, or a command.

A key is 32 octets. A file beside the database, the default, is the only kind that Popdrop makes
itself.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from base64 import b64decode
from binascii import Error as Base64Error
from binascii import unhexlify
from collections.abc import Hashable, Mapping
from typing import Final, Protocol

from popdrop.accounts.secrets import KEY_OCTETS, load_key, private_facts
from popdrop.errors import ConfigError
from popdrop.values import Secret

COMMAND_SECONDS: Final = 30.0
"""Within which a command must have printed the key: it may ask a machine far away."""

WORDS: Final = "file:PATH, credential:NAME or command:PROGRAM ARGUMENTS"


class KeySource(Protocol):
    """Where a key comes from."""

    what: str
    """How error messages name it."""
    path: str | None
    """The file that may be made and replaced, `None` for sources that are not ours to change."""

    def stamp(self) -> Hashable | None:
        """Another one when there may be another key, `None`: there is none.

        Raises `ConfigError` where others have rights to it, and `OSError`.
        """

    def load(self) -> Secret:
        """The key. Raises `ConfigError` and `OSError`."""


class KeyFile:
    """A file of 32 octets that only its owner may read."""

    def __init__(self, path: str) -> None:
        self.path: str | None = path
        self._path = path
        self.what = path

    def stamp(self) -> Hashable | None:
        """As `KeySource.stamp`."""
        try:
            facts = private_facts(self._path)
        except FileNotFoundError:
            return None
        return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns

    def load(self) -> Secret:
        """As `KeySource.load`."""
        return load_key(self._path)


class Credential:
    """A file in systemd's `$CREDENTIALS_DIRECTORY` (systemd.exec(5), LoadCredential=).

    systemd has seen to its rights: it may well be readable for the service's group.
    """

    path: str | None = None

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        folder = environ.get("CREDENTIALS_DIRECTORY", "")
        self.what = f"credential {name}"
        if not folder:
            raise ConfigError(
                f"key=credential:{name}: systemd gave no credentials; add"
                f" LoadCredential={name}:FILE or LoadCredentialEncrypted= to the unit"
            )
        if "/" in name or name in ("", ".", ".."):
            raise ConfigError(f"key=credential:{name}: not the name of a credential")
        self._path = os.path.join(folder, name)

    def stamp(self) -> Hashable | None:
        """As `KeySource.stamp`."""
        try:
            facts = os.stat(self._path)
        except FileNotFoundError:
            return None
        return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns

    def load(self) -> Secret:
        """As `KeySource.load`."""
        with open(self._path, "rb") as file:
            return _key(self.what, file.read(128))


class Command:
    """What a program prints. It runs once, at the start, without a shell."""

    path: str | None = None

    def __init__(self, words: str) -> None:
        self.what = "the key's command"
        try:
            self._words = shlex.split(words)
        except ValueError:
            self._words = []
        if not self._words:
            raise ConfigError(f"key=command:{words}: name a program and its arguments")
        self._key: Secret | None = None

    def stamp(self) -> Hashable | None:
        """As `KeySource.stamp`: there is one key as long as this process lives."""
        return "command"

    def load(self) -> Secret:
        """As `KeySource.load`."""
        if self._key is None:
            self._key = self._run()
        return self._key

    def _run(self) -> Secret:
        name = self._words[0]
        try:
            done = subprocess.run(  # noqa: S603 - the administrator's own words
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except OSError as error:
            raise ConfigError(f"key=command: {name}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"key=command: {name}: printed no key within {COMMAND_SECONDS:g} s"
            ) from None
        if done.returncode:
            raise ConfigError(f"key=command: {name}: ended with status {done.returncode}")
        return _key(f"key=command: {name}", done.stdout)


def key_source(text: str | None, database: str, environ: Mapping[str, str]) -> KeySource:
    """The source that `text` names; `None`: the file beside `database`. Raises `ConfigError`."""
    if text is None:
        return KeyFile(database + ".key")
    kind, _, rest = text.partition(":")
    if kind == "file" and os.path.isabs(rest):
        return KeyFile(rest)
    if kind == "credential":
        return Credential(rest, environ)
    if kind == "command":
        return Command(rest)
    if kind == "file":
        raise ConfigError(f"key={text}: give the whole path, from / on")
    raise ConfigError(f"key={text}: not known; write {WORDS}")


def _key(what: str, octets: bytes) -> Secret:
    """32 octets as they are, or in hexadecimal or base64, which may end with a line end."""
    if len(octets) == KEY_OCTETS:
        return Secret(octets)
    text = octets.strip()
    try:
        key = unhexlify(text) if len(text) == 2 * KEY_OCTETS else b64decode(text, validate=True)
    except (Base64Error, ValueError):
        key = b""
    if len(key) != KEY_OCTETS:
        raise ConfigError(
            f"{what}: a key has {KEY_OCTETS} octets, also in hexadecimal or base64; this has not"
        )
    return Secret(key)
