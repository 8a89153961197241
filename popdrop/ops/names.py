"""Host names of clients, by DNS and /etc/hosts: asked in reverse and verified forward."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.names import dns
from twisted.names.error import DNSNameError, DomainError

from popdrop.ops.access import Name, Unnamed
from popdrop.values import normalised

log = Logger()

HOSTS: Final = "/etc/hosts"
"""hosts(5)."""
LIMIT: Final = 5.0
"""Seconds until a client counts as having no name. Its greeting waits for so long, at most."""
KEPT_SECONDS: Final = 60.0
"""How long an answer holds. libwrap asks at each connection, but has a resolver that keeps them."""
KEPT: Final = 4096
"""Answers kept: of some 200 octets each."""
AT_ONCE: Final = 256
"""Addresses asked for at the same time; others have no name. Each takes a UDP socket."""

_HOST = re.compile(r"(?=.*[a-z])[a-z0-9_]([a-z0-9._-]{0,253}[a-z0-9_])?").fullmatch


class Names:
    """The names of addresses.

    `resolver` gives a twisted.names client; it is made when first needed. `hosts` is the text of
    a hosts(5) file, asked first, as gethostbyaddr(3) does with Debian's nsswitch.conf.
    """

    def __init__(self, clock: IReactorTime, resolver: Callable[[], Any], hosts: str = "") -> None:
        self._clock = clock
        self._make = resolver
        self._resolver: Any = None
        self._kept: OrderedDict[str, tuple[float, Name]] = OrderedDict()
        self._asked: dict[str, list[Deferred[Name]]] = {}
        self.hosts = hosts_names(hosts)

    def of(self, address: str) -> Deferred[Name]:
        """The name of a normalised address, within `LIMIT`. Never fails; may be cancelled."""
        answer: Deferred[Name] = Deferred(lambda gone: self._drop(address, gone))
        known = self._known(address)
        if known is not None:
            answer.callback(known)
        elif address in self._asked:
            self._asked[address].append(answer)
        elif len(self._asked) >= AT_ONCE:
            log.warn("too many names are asked for: {address} counts as unknown", address=address)
            answer.callback(Unnamed.UNKNOWN)
        else:
            self._asked[address] = [answer]
            self._begin(address)
        return answer

    def _known(self, address: str) -> Name | None:
        name = self.hosts.get(address)
        if name is not None:
            return name
        until, kept = self._kept.get(address, (0.0, None))
        return kept if self._clock.seconds() < until else None

    def _drop(self, address: str, gone: Deferred[Name]) -> None:
        waiting = self._asked.get(address, [])
        if gone in waiting:
            waiting.remove(gone)

    def _begin(self, address: str) -> None:
        asking = Deferred.fromCoroutine(self._look_up(address))
        late = self._clock.callLater(LIMIT, asking.cancel)

        def tell(result: Any) -> None:
            if late.active():
                late.cancel()
            # A failure is the resolver's or the time limit's.
            name = result if isinstance(result, str | Unnamed) else Unnamed.UNKNOWN
            self._keep(address, name)
            for waiting in self._asked.pop(address):
                waiting.callback(name)

        asking.addBoth(tell)

    def _keep(self, address: str, name: Name) -> None:
        self._kept[address] = (self._clock.seconds() + KEPT_SECONDS, name)
        self._kept.move_to_end(address)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    async def _look_up(self, address: str) -> Name:
        try:
            if self._resolver is None:
                self._resolver = self._make()
            asked = ip_address(address)
            pointers = await self._resolver.lookupPointer(asked.reverse_pointer)
            found = _first_pointer(pointers)
            if found is None:
                return Unnamed.UNKNOWN
            name = found.lower().removesuffix(".")
            if not _HOST(name):
                return Unnamed.PARANOID
            look = self._resolver.lookupAddress
            if asked.version == 6:
                look = self._resolver.lookupIPV6Address
            return name if address in await _addresses(look(name)) else Unnamed.PARANOID
        except (DomainError, DNSNameError):
            return Unnamed.UNKNOWN
        except CancelledError:
            log.warn("the name of {address} did not come in time", address=address)
            raise
        except Exception as error:
            log.warn(
                "the name of {address} cannot be had: {kind}",
                address=address,
                kind=type(error).__name__,
            )
            return Unnamed.UNKNOWN


def _first_pointer(answer: Any) -> str | None:
    """The name in the first PTR record; before it may stand a CNAME (RFC 2317)."""
    for record in answer[0]:
        if record.type == dns.PTR:
            return str(record.payload.name.name, "ascii", "replace")
    return None


async def _addresses(looking: Awaitable[Any]) -> set[str]:
    """The addresses of a name. One that does not exist has none."""
    try:
        answers, _, _ = await looking
    except (DomainError, DNSNameError):
        return set()
    return {
        normalised(record.payload.dottedQuad() if record.type == dns.A else _ipv6(record.payload))
        for record in answers
        if record.type in (dns.A, dns.AAAA)
    }


def _ipv6(payload: Any) -> str:
    return str(ip_address(payload.address))


def hosts_names(text: str) -> dict[str, str]:
    """The first name of each address in the text of a hosts(5) file, in lower case."""
    found: dict[str, str] = {}
    for line in text.split("\n"):
        words = line.partition("#")[0].lower().split()
        if len(words) > 1 and _HOST(words[1]):
            found.setdefault(normalised(words[0]), words[1])
    return found
