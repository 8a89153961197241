"""An identity provider for tests: a web server on loopback, as good or as bad as is wanted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import trustme
from cryptography.x509 import load_pem_x509_certificate
from twisted.internet import reactor as the_reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.ssl import CertificateOptions
from twisted.internet.task import deferLater
from twisted.protocols.policies import WrappingFactory
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

reactor: Any = the_reactor

STEP = 0.01


class Provider(Resource):
    """Answers each request by `answer(request)`, octets or `NOT_DONE_YET`, and keeps the forms."""

    isLeaf = True

    def __init__(self, case: Any, authority: trustme.CA | None = None) -> None:
        super().__init__()
        self.answer: Callable[[Request], Any] = lambda request: b"{}"
        self.forms: list[dict[bytes, list[bytes]]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self._case = case
        self._context: Any = None
        if authority is not None:
            self._context = context(authority.issue_cert("127.0.0.1"))
        self._site = WrappingFactory(Site(self))
        self.port = 0
        self.start()
        case.addCleanup(self.stop)

    def start(self) -> None:
        """Listen, on the same port as before."""
        if self._context is None:
            self._port = reactor.listenTCP(self.port, self._site, interface="127.0.0.1")
        else:
            self._port = reactor.listenSSL(
                self.port, self._site, self._context, interface="127.0.0.1"
            )
        self.port = self._port.getHost().port

    async def _stop(self) -> None:
        await maybeDeferred(self._port.stopListening)
        for protocol in list(self._site.protocols):
            with contextlib.suppress(Exception):
                protocol.transport.abortConnection()
        while self._site.protocols:
            await deferLater(reactor, STEP)

    def stop(self) -> Deferred[None]:
        """Be down."""
        return Deferred.fromCoroutine(self._stop())

    def url(self, path: str = "") -> str:
        scheme = "http" if self._context is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}/{path}"

    def serve(self, value: Any, **headers: str) -> None:
        """From now on answer with this, octets or JSON. `_` in a header's name is a `-`."""
        octets = value if isinstance(value, bytes) else json.dumps(value).encode()

        def answer(request: Request) -> bytes:
            for name, text in headers.items():
                request.setHeader(name.replace("_", "-").encode(), text.encode())
            return octets

        self.answer = answer

    def status(self, code: int, **headers: str) -> None:
        """From now on answer with this status and an empty object."""

        def answer(request: Request) -> bytes:
            request.setResponseCode(code)
            for name, text in headers.items():
                request.setHeader(name.encode(), text.encode())
            return b"{}"

        self.answer = answer

    def hang(self) -> None:
        """From now on do not answer."""
        self.answer = lambda request: NOT_DONE_YET

    @property
    def requests(self) -> int:
        return len(self.forms)

    def render(self, request: Request) -> Any:
        self.forms.append(dict(request.args or {}))
        self.headers.append(
            {name.lower(): values[0] for name, values in request.requestHeaders.getAllRawHeaders()}
        )
        return self.answer(request)


def context(leaf: trustme.LeafCert) -> CertificateOptions:
    """What Twisted listens with."""
    from OpenSSL import crypto

    key = crypto.load_privatekey(crypto.FILETYPE_PEM, leaf.private_key_pem.bytes())
    certificate = crypto.X509.from_cryptography(
        load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
    )
    made: CertificateOptions = CertificateOptions(privateKey=key, certificate=certificate)
    return made
