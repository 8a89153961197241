"""The gate before the greeting: `--allow-net`, `--deny-net` and `--tcp-wrappers`.

The files are read again when they change; names are asked for only when a rule needs one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from popdrop.errors import ConfigError
from popdrop.ops.access import Client, NameNeeded, Rules, Verdict, decide, of_networks, read
from popdrop.ops.names import HOSTS, Names, hosts_names
from popdrop.values import Network

log = Logger()

HOSTS_ALLOW: Final = "/etc/hosts.allow"
HOSTS_DENY: Final = "/etc/hosts.deny"
LARGEST: Final = 1 << 20
"""Octets of a file of rules. More is no such file."""

_Stamp = tuple[int, int, int] | None


def resolver(reactor: Any) -> Any:
    """A client of the servers in /etc/resolv.conf."""
    from twisted.names.client import Resolver

    # Three tries within the time limit: a packet may be lost.
    return Resolver("/etc/resolv.conf", timeout=(1, 1, 2), reactor=reactor)  # type: ignore[no-untyped-call]


class Gate:
    """Who may connect.

    `files` are the paths of hosts.allow and hosts.deny, `None` where they are not asked. Raises
    `ConfigError` where one cannot be read or understood; a file that is not there is empty.
    """

    def __init__(
        self,
        clock: IReactorTime,
        allowed: tuple[Network, ...] = (),
        denied: tuple[Network, ...] = (),
        files: tuple[str, str] | None = None,
        make_resolver: Callable[[], Any] | None = None,
        hosts: str = HOSTS,
    ) -> None:
        self._allowed = allowed
        self._denied = denied
        self._files = files
        self._hosts = hosts
        self._names = Names(clock, make_resolver or (lambda: resolver(clock)))
        self._rules = Rules()
        self._stamps: tuple[_Stamp, ...] = ()
        self._read()

    # Asking

    def admits(self, address: str | None) -> bool | Deferred[bool]:
        """Whether a client may be served. A refusal is logged here, one line.

        `address` is normalised, `None` if it has none. A `Deferred` waits for a name; it may be
        cancelled, and fires within `names.LIMIT`.
        """
        verdict = of_networks(address, self._allowed, self._denied)
        if not verdict.allowed or self._files is None:
            return _told(verdict, address)
        try:
            return _told(decide(self._rules, Client(address)), address)
        except NameNeeded:
            return Deferred.fromCoroutine(self._named(str(address)))

    async def _named(self, address: str) -> bool:
        name = await self._names.of(address)
        return _told(decide(self._rules, Client(address, name)), address)

    # Reading

    def refresh(self) -> None:
        """Read what has changed. Blocking. If it cannot be understood the old rules stay."""
        try:
            self._read()
        except ConfigError as error:
            log.error("the old access rules stay: {why}", why=str(error))

    def _read(self) -> None:
        if self._files is None:
            return
        allow, deny, hosts = (_contents(path) for path in (*self._files, self._hosts))
        stamps = (allow[0], deny[0], hosts[0])
        if stamps == self._stamps:
            return
        # Told once, not each minute, if it is wrong.
        again, self._stamps = bool(self._stamps), stamps
        paths = self._files
        rules = read((paths[0], allow[1]), (paths[1], deny[1]))
        for why in rules.warnings:
            log.warn("{why}", why=why)
        self._rules, self._names.hosts = rules, hosts_names(hosts[1])
        if again:
            log.info("access rules read anew: {count} are for us", count=len(rules.rules))


def _told(verdict: Verdict, address: str | None) -> bool:
    if not verdict.allowed:
        log.info("{peer} refused by {where}", peer=address or "unknown", where=verdict.where)
    return verdict.allowed


def _contents(path: str) -> tuple[_Stamp, str]:
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            octets = file.read(LARGEST + 1)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        raise ConfigError(f"--tcp-wrappers: {path}: {error.strerror}; make it readable") from None
    if len(octets) > LARGEST:
        raise ConfigError(f"--tcp-wrappers: {path}: more than {LARGEST} octets")
    # Patterns are ASCII; what is not can only be a comment, or match nothing.
    text = octets.decode("utf-8", "replace")
    return (facts.st_ino, facts.st_size, facts.st_mtime_ns), text
