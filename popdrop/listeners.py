"""`--listen` strings: Twisted's strports grammar over Popdrop's certificates.

Three meanings are narrower than Twisted's. `tcp6:` on all addresses is IPv6 alone, whatever
`net.ipv6.bindv6only` says, so that `tcp:110` and `tcp6:110` go together; `tls:` on all addresses is
both families. `tls:` wants its port named: Twisted's default is that of HTTPS. And the socket of
`haproxy:unix:` is for its owner and group, unless a mode is named. Two are wider:
`systemd:` takes a certificate, for implicit TLS on a socket of systemd's, and `stdio:` makes a
connection of a socket that inetd hands on.

Over 400 lines since each kind brings its own words and remedies.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, cast

from twisted.internet import defer
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, TCP6ServerEndpoint, serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IProtocolFactory,
    IReactorTime,
    IStreamServerEndpoint,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from popdrop import inherited
from popdrop.certs import Certificates, Keyring
from popdrop.errors import ConfigError
from popdrop.inherited import BACKLOG
from popdrop.proxied import ProxiedEndpoint
from popdrop.securing import TLSFactory
from popdrop.sending import prompt
from popdrop.spec import Spec, parse, quoted
from popdrop.values import Network, PeerFacts, normalised

__all__ = ["Listener", "from_parent", "from_spec", "listen", "normalised", "peer_facts"]

EXAMPLES = {
    "tcp": "tcp:110 or tcp:1110:interface=127.0.0.1",
    "tcp6": "tcp6:110 or tcp6:1110:interface=\\:\\:1",
    "tls": "tls:/etc/letsencrypt/live:995",
    "ssl": "ssl:995:privateKey=/etc/ssl/key.pem:certKey=/etc/ssl/cert.pem",
    "unix": "unix:/run/popdrop/pop3.sock:mode=660",
    "systemd": "systemd:domain=INET6:index=0 or systemd:domain=INET6:name=pop3s:tls=PEM",
    "stdio": "stdio:",
    "haproxy": "haproxy:tcp:1110:interface=127.0.0.1",
}

PROXY_MODE = "660"
"""Of a Unix socket behind `haproxy:` where no mode is named. With Twisted's 666 everybody on the
machine could name any address as his own."""

PATH_HINT = "another server has it (ss -lxp shows which), or it is no socket; choose another path"
HINTS = {
    errno.EACCES: "a port below 1024 needs root or CAP_NET_BIND_SERVICE; or choose tcp:1110",
    errno.EADDRINUSE: "another server has it (ss -ltnp shows which); stop that or choose another",
    errno.EADDRNOTAVAIL: "this machine has no such address (ip addr shows those it has)",
    errno.EAFNOSUPPORT: "this machine has no IPv6; add interface=0.0.0.0",
}


@dataclass(frozen=True, slots=True)
class Listener:
    """One `--listen` string, ready to listen.

    `endpoint` includes TLS where it is implicit. `trusted_address` says whether the peer address
    is the client's own, so that `local` exemptions may hold (decision 25): that of the socket, or
    that of a PROXY header from a trusted proxy.
    """

    text: str
    scheme: str
    endpoint: IStreamServerEndpoint
    trusted_address: bool
    certificates: Certificates | None = None
    descriptor: int | None = None
    """Of the socket that another program has opened for us, as long as we do not listen."""

    @property
    def implicit_tls(self) -> bool:
        """Whether every connection begins with a TLS handshake (RFC 8314 section 3.2)."""
        return self.certificates is not None

    @property
    def can_stls(self) -> bool:
        """Whether TLS can begin within a session (RFC 2595 section 4)."""
        return not (self.implicit_tls or self.is_pipe)

    @property
    def is_pipe(self) -> bool:
        """Whether it is standard input and output without a socket: no STLS, no address."""
        return self.scheme == "stdio" and not self.trusted_address


def from_spec(
    reactor: object, text: str, keyring: Keyring, proxies: tuple[Network, ...] = ()
) -> Listener:
    """What `--listen text` describes; `keyring` is shared by all options that name certificates.

    From `proxies` alone a `haproxy:` listener takes connections. Raises `ConfigError`, also when a
    certificate is not as it should be.
    """
    try:
        spec = parse("--listen", text)
    except ConfigError as error:
        raise ConfigError(f"{error}; for example tcp:110") from None
    scheme = spec.kind.lower()
    if scheme != "haproxy":
        return _direct(reactor, f"--listen {text}", text, spec, keyring)
    return _proxied(reactor, text, keyring, proxies)


def _direct(reactor: object, option: str, text: str, spec: Spec, keyring: Keyring) -> Listener:
    scheme = spec.kind.lower()
    if scheme in ("tcp", "tcp6"):
        return _tcp(reactor, option, text, scheme, spec)
    if scheme in ("tls", "ssl"):
        return _tls(reactor, option, text, scheme, spec, keyring)
    if scheme == "systemd":
        return _systemd(reactor, option, text, spec, keyring)
    if scheme == "stdio" and (family := inherited.family()) is not None:
        connection = cast(IStreamServerEndpoint, inherited.InheritedConnection(reactor, family))
        number = inherited.STANDARD_INPUT
        return Listener(text, scheme, connection, trusted_address=True, descriptor=number)
    if scheme == "unix":
        more = "" if "backlog" in spec.kwargs or len(spec.args) > 2 else f":backlog={BACKLOG}"
        endpoint = _twisteds(reactor, option, scheme, text + more)
        return Listener(text, scheme, endpoint, trusted_address=False)
    return Listener(text, scheme, _twisteds(reactor, option, scheme, text), trusted_address=False)


def _twisteds(reactor: object, option: str, scheme: str, text: str) -> IStreamServerEndpoint:
    try:
        endpoint = serverFromString(reactor, text)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ConfigError(_unusable(option, scheme, error)) from None
    return cast(IStreamServerEndpoint, endpoint)


def _systemd(reactor: object, option: str, text: str, spec: Spec, keyring: Keyring) -> Listener:
    path = spec.kwargs.get("tls")
    domain = spec.kwargs.get("domain") or (spec.args[0] if spec.args else "")
    words = [*spec.args, *(f"{k}={quoted(v)}" for k, v in spec.kwargs.items() if k != "tls")]
    adopted: Any = _twisteds(reactor, option, "systemd", ":".join(["systemd", *words]))
    certificates = None
    descriptor = adopted.fileno
    if domain == "UNIX":
        adopted = inherited.AdoptedUnixSocket(reactor, adopted.fileno)
    endpoint = cast(IStreamServerEndpoint, adopted)
    if path is not None:
        certificates = keyring.get(path, option=option)
        endpoint = _TLSEndpoint(endpoint, certificates, cast(IReactorTime, reactor))
    return Listener(text, "systemd", endpoint, domain != "UNIX", certificates, descriptor)


def _proxied(
    reactor: object, text: str, keyring: Keyring, proxies: tuple[Network, ...]
) -> Listener:
    """Any other listener, with a PROXY header before all else, TLS included."""
    option = f"--listen {text}"
    behind = text.partition(":")[2]
    try:
        spec = parse("--listen", behind)
    except ConfigError as error:
        raise ConfigError(_unusable(option, "haproxy", error)) from None
    kind = spec.kind.lower()
    if kind in ("haproxy", "stdio"):
        raise _wrong(option, "haproxy", f"{kind}: cannot be behind a proxy")
    if kind == "unix" and "mode" not in spec.kwargs and len(spec.args) < 2:
        behind += f":mode={PROXY_MODE}"
    inner = _direct(reactor, option, behind, spec, keyring)
    if not proxies and inner.trusted_address:
        raise ConfigError(
            f"{option}: whoever reaches it could name any address as his own; name the proxies,"
            " as --trusted-proxies 127.0.0.1,::1"
        )
    return _behind(reactor, text, inner, proxies)


def _behind(reactor: object, text: str, inner: Listener, proxies: tuple[Network, ...]) -> Listener:
    clock = cast(IReactorTime, reactor)
    if isinstance(inner.endpoint, _TLSEndpoint):
        plain = ProxiedEndpoint(inner.endpoint.plain, proxies, clock)
        assert inner.certificates is not None
        endpoint: Any = _TLSEndpoint(cast(IStreamServerEndpoint, plain), inner.certificates, clock)
    else:
        endpoint = ProxiedEndpoint(inner.endpoint, proxies, clock)
    return Listener(text, "haproxy", endpoint, True, inner.certificates, inner.descriptor)


def from_parent(
    reactor: object,
    text: str,
    keyring: Keyring,
    descriptor: int,
    trusted_address: bool,
    proxies: tuple[Network, ...] = (),
) -> Listener:
    """What `--listen text` describes, over a listening socket that the parent has bound.

    The descriptor is closed when it listens. Raises `ConfigError`.
    """
    option = f"--listen {text}"
    spec = parse("--listen", text)
    scheme = spec.kind.lower()
    if scheme == "haproxy":
        behind = text.partition(":")[2]
        inner = from_parent(reactor, behind, keyring, descriptor, trusted_address)
        return _behind(reactor, text, inner, proxies)
    plain = _Inherited(reactor, descriptor)
    if scheme in ("tls", "ssl"):
        certificates = _tls(reactor, option, text, scheme, spec, keyring).certificates
    elif scheme == "systemd" and "tls" in spec.kwargs:
        certificates = keyring.get(spec.kwargs["tls"], option=option)
    else:
        return Listener(text, scheme, plain, trusted_address)
    assert certificates is not None
    tls = _TLSEndpoint(plain, certificates, cast(IReactorTime, reactor))
    return Listener(text, scheme, tls, trusted_address, certificates)


def for_this_machine(reactor: object, option: str, text: str) -> Listener:
    """A listener for programs of this machine alone: loopback, or a Unix socket.

    `option` is what the user has typed. Raises `ConfigError`.
    """
    spec = parse(option, text)
    scheme = spec.kind.lower()
    if scheme not in ("tcp", "tcp6", "unix"):
        raise ConfigError(f"{option}: {scheme}: is not for this; use unix:PATH or tcp:PORT")
    if scheme != "unix":
        interface = spec.kwargs.get("interface", "")
        if _family(interface) is None or not interface or not ip_address(interface).is_loopback:
            loopback = "127.0.0.1" if scheme == "tcp" else "\\:\\:1"
            raise ConfigError(
                f"{option}: others could reach it, too; add :interface={loopback}, or use unix:PATH"
            )
        return _tcp(reactor, option, text, scheme, spec)
    return Listener(text, scheme, _twisteds(reactor, option, scheme, text), trusted_address=False)


def listen(
    listener: Listener, factory: IProtocolFactory, option: str = ""
) -> Deferred[IListeningPort]:
    """Listen; fails with `ConfigError` when the address cannot be had.

    `option` is what the user has typed, `--listen` and the string by default.
    """
    option = option or f"--listen {listener.text}"

    def explain(failure: Failure) -> Failure:
        problem = failure.value
        cause = problem.socketError if isinstance(problem, CannotListenError) else problem
        if not isinstance(problem, CannotListenError | OSError):
            return failure
        words = getattr(cause, "strerror", None) or str(cause)
        code = getattr(cause, "errno", None) or 0
        if "lock" in words and not code:
            code = errno.EADDRINUSE  # Twisted's words where a Unix socket is another server's
        hint = HINTS.get(code, "see the string for --listen in the manual")
        if code == errno.EADDRINUSE and "unix:" in listener.text:
            hint = PATH_HINT
        told = ConfigError(f"{option}: cannot listen: {words}; {hint}")
        return Failure(told)  # type: ignore[no-untyped-call]

    return listener.endpoint.listen(factory).addCallbacks(prompt, explain)


def peer_facts(peer: IAddress, local: IAddress | None = None, trusted: bool = True) -> PeerFacts:
    """What addresses alone tell. `trusted` is the listener's `trusted_address`.

    Anything but TCP has no address and no port.
    """
    ours = local.port if isinstance(local, IPv4Address | IPv6Address) else None
    if not isinstance(peer, IPv4Address | IPv6Address):
        return PeerFacts(address_trusted=False, local_port=ours)
    address = _address(peer.host)
    if address is None:
        return PeerFacts(address_trusted=False, local_port=ours)
    return PeerFacts(address, trusted, peer.port, ours)


@lru_cache(maxsize=4096)
def _address(host: str) -> str | None:
    """The address in its one form. A PROXY header may hold anything: `None` if it is none."""
    address = normalised(host)
    try:
        ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return address


def _tcp(reactor: object, option: str, text: str, scheme: str, spec: Spec) -> Listener:
    _known(option, scheme, spec, 1, {"port", "interface", "backlog"})
    port = _port(option, scheme, spec, 0)
    default = "" if scheme == "tcp" else "::"
    endpoint = _endpoint(reactor, option, scheme, spec, port, default, only_ipv6=scheme == "tcp6")
    return Listener(text, scheme, endpoint, trusted_address=True)


def _tls(
    reactor: object, option: str, text: str, scheme: str, spec: Spec, keyring: Keyring
) -> Listener:
    args, kwargs = spec.args, spec.kwargs
    if scheme == "tls":
        _known(option, scheme, spec, 2, {"path", "port", "interface", "backlog"})
        path = kwargs.get("path") or (args[0] if args else "")
        if not path:
            raise _wrong(option, scheme, "no certificate is named")
        port = _port(option, scheme, spec, 0 if "path" in kwargs else 1)
        certificates = keyring.get(path, option=option)
        default = "::"
    else:
        _known(
            option,
            scheme,
            spec,
            1,
            {"port", "interface", "backlog", "privateKey", "certKey", "extraCertChain"},
        )
        port = _port(option, scheme, spec, 0)
        key = kwargs.get("privateKey", "")
        if not key:
            raise _wrong(option, scheme, "privateKey= is missing")
        chain = kwargs.get("extraCertChain")
        certificates = keyring.get(kwargs.get("certKey", key), key=key, chain=chain, option=option)
        default = ""
    plain = _endpoint(reactor, option, scheme, spec, port, default, only_ipv6=False)
    endpoint = _TLSEndpoint(plain, certificates, cast(IReactorTime, reactor))
    return Listener(text, scheme, endpoint, trusted_address=True, certificates=certificates)


def _endpoint(
    reactor: object,
    option: str,
    scheme: str,
    spec: Spec,
    port: int,
    default: str,
    only_ipv6: bool,
) -> IStreamServerEndpoint:
    interface = spec.kwargs.get("interface", default)
    backlog = _number(option, scheme, "backlog", spec.kwargs.get("backlog", str(BACKLOG)), 1 << 31)
    family = _family(interface)
    if family is None or (scheme == "tcp6" and family != socket.AF_INET6):
        what = "an IPv6 address" if scheme == "tcp6" else "an IP address"
        raise _wrong(option, scheme, f"interface={interface} is not {what} of this machine")
    if interface == "::":
        return _EveryAddress(reactor, port, backlog, only_ipv6)
    if family == socket.AF_INET6:
        return TCP6ServerEndpoint(reactor, port, backlog, interface)  # type: ignore[no-untyped-call]
    return TCP4ServerEndpoint(reactor, port, backlog, interface)  # type: ignore[no-untyped-call]


def _family(interface: str) -> socket.AddressFamily | None:
    if interface == "":
        return socket.AF_INET
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, interface.partition("%")[0])
        except OSError:
            continue
        return family
    return None


def _known(option: str, scheme: str, spec: Spec, arguments: int, keywords: set[str]) -> None:
    """Refuse what has no meaning. An unquoted IPv6 address lands here, too."""
    strange = sorted(spec.kwargs.keys() - keywords)
    if strange:
        allowed = "=, ".join(sorted(keywords))
        raise _wrong(option, scheme, f"{strange[0]}= is unknown; {allowed}= are known")
    if len(spec.args) > arguments:
        raise _wrong(
            option,
            scheme,
            "there is a colon too many; a colon inside an argument is written \\:",
        )


def _port(option: str, scheme: str, spec: Spec, position: int) -> int:
    word = spec.kwargs.get("port") or (spec.args[position] if len(spec.args) > position else "")
    if not word:
        raise _wrong(option, scheme, "no port is named")
    return _number(option, scheme, "port", word, 1 << 16)


def _number(option: str, scheme: str, what: str, word: str, limit: int) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 11 and int(word) < limit):
        raise _wrong(option, scheme, f"{what} {word} is not a number from 0 to {limit - 1}")
    return int(word)


def _wrong(option: str, scheme: str, what: str) -> ConfigError:
    return ConfigError(f"{option}: {what}; for example {EXAMPLES[scheme]}")


def _unusable(option: str, scheme: str, error: Exception) -> str:
    """One line from whatever a parser of Twisted's or a third party's threw."""
    if scheme in EXAMPLES:
        words = " ".join(str(error).split()) or type(error).__name__
        if scheme == "systemd" and isinstance(error, LookupError):
            # Twisted takes none that has no name; sd_listen_fds_with_names(3) would.
            words = "systemd hands on no such socket; systemd-socket-activate needs --fdname=NAME"
        return f"{option}: cannot be used ({words}); for example {EXAMPLES[scheme]}"
    if isinstance(error, ValueError) and "Unknown endpoint type" in str(error):
        schemes = ", ".join(EXAMPLES)
        return f"{option}: {scheme} is no known kind of listener; use one of {schemes}"
    return f"{option}: cannot be used ({' '.join(str(error).split())})"


@implementer(IStreamServerEndpoint)
class _EveryAddress:
    """All IPv6 addresses, and all IPv4 ones unless `only_ipv6`, whatever the kernel's default."""

    def __init__(self, reactor: object, port: int, backlog: int, only_ipv6: bool) -> None:
        self._reactor: Any = reactor
        self._port = port
        self._backlog = backlog
        self._only_ipv6 = only_ipv6

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        return defer.execute(self._listen, factory)

    def _listen(self, factory: IProtocolFactory) -> IListeningPort:
        try:
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as listening:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self._only_ipv6)
                listening.bind(("::", self._port))
                listening.listen(self._backlog)
                listening.setblocking(False)
                # The reactor takes a duplicate.
                port = self._reactor.adoptStreamPort(listening.fileno(), socket.AF_INET6, factory)
        except OSError as error:
            refused = CannotListenError("::", self._port, error)  # type: ignore[no-untyped-call]
            raise refused from error
        return cast(IListeningPort, port)


@implementer(IStreamServerEndpoint)
class _Inherited:
    """A listening socket that the parent has bound, and that others accept from, too."""

    def __init__(self, reactor: object, descriptor: int) -> None:
        self._reactor: Any = reactor
        self._descriptor = descriptor

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        with socket.socket(fileno=os.dup(self._descriptor)) as duplicate:
            is_unix = duplicate.family == socket.AF_UNIX
        if is_unix:
            return inherited.AdoptedUnixSocket(self._reactor, self._descriptor).listen(factory)
        return defer.execute(self._listen, factory)

    def _listen(self, factory: IProtocolFactory) -> IListeningPort:
        with socket.socket(fileno=self._descriptor) as listening:
            port = self._reactor.adoptStreamPort(listening.fileno(), listening.family, factory)
        return cast(IListeningPort, port)


@implementer(IStreamServerEndpoint)
class _TLSEndpoint:
    def __init__(
        self, plain: IStreamServerEndpoint, certificates: Certificates, clock: IReactorTime
    ) -> None:
        self.plain = plain
        self._certificates = certificates
        self._clock = clock

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        wrapped = TLSFactory(self._certificates, factory, self._clock)
        return self.plain.listen(cast(IProtocolFactory, wrapped))
