"""One question over HTTPS, and a bounded answer. By treq, which is imported when it is needed.

Redirects are not followed, compressed answers not taken, nothing is kept of cookies, and no
connection is used twice: what is asked is small and rare, and the answer decides who gets in.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Final
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, DNSLookupError, TimeoutError
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

ANSWER_OCTETS: Final = 64 * 1024
"""The longest answer that is read: key sets have 1 to 10 KiB, introspection responses less."""
ANSWER_SECONDS: Final = 10.0
"""From the question to the end of the answer. A client waits for its login meanwhile, and most
give up after 30 or 60."""

_COMPRESSED: Final = b"refused"


class Unanswered(Exception):
    """There is no usable answer. The text says why and quotes nothing of question or answer."""


def url_fault(url: str) -> str | None:
    """Why `url` may not be asked, `None` if it may: HTTPS, or HTTP to this machine itself."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "not a URL"
    if parts.scheme not in ("https", "http") or not host or not url.isascii():
        return "not a URL; write it as https://id.example.org/keys"
    if not url.isprintable() or " " in url:
        return "not a URL"
    if parts.username is not None or parts.fragment:
        return "a URL with a user name or a fragment"
    if parts.scheme == "http" and not _is_loopback(host):
        return "without TLS, so anybody in between could answer; use https"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class WebClient:
    """Asks. Certificates are checked against the system's authorities, or those in PEM `ca`.

    Raises `ImportError` where treq is not installed, `ValueError` where `ca` holds no certificate.
    """

    def __init__(self, reactor: Any, ca: bytes | None = None) -> None:
        import treq.client
        from twisted.internet.ssl import Certificate, trustRootFromCertificates
        from twisted.web.client import Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool

        roots: Any = None
        if ca is not None:
            begin = b"-----BEGIN CERTIFICATE-----"
            blocks = [begin + block for block in ca.split(begin)[1:]]
            if not blocks:
                raise ValueError("no certificate in it")
            try:
                roots = trustRootFromCertificates(list(map(Certificate.loadPEM, blocks)))  # type: ignore[no-untyped-call]
            except Exception:
                raise ValueError("a certificate in it cannot be read") from None
        self._reactor = reactor
        self._new = treq.client.HTTPClient
        policy = BrowserLikePolicyForHTTPS(roots)  # type: ignore[no-untyped-call]
        pool = HTTPConnectionPool(reactor, persistent=False)  # type: ignore[no-untyped-call]
        agent = Agent(reactor, policy, ANSWER_SECONDS, pool=pool)  # type: ignore[no-untyped-call]
        self._agent: Any = _Plain(agent)

    def ask(
        self, url: str, form: dict[str, str] | None = None, authorization: str | None = None
    ) -> Deferred[tuple[bytes, list[bytes]]]:
        """GET `url`, or POST `form` to it: the answer, and its `Cache-Control` fields.

        Fails with `Unanswered`. Cancelling gives up the connection.
        """
        asking = Deferred.fromCoroutine(self._asked(url, form, authorization))
        asking.addTimeout(ANSWER_SECONDS, self._reactor, _too_late)
        # Cut short, some parts of the library say that they cannot connect and the like.
        wanted = True

        def give_up(answer: object) -> None:
            nonlocal wanted
            wanted = False
            asking.cancel()

        def pass_on(result: Any) -> None:
            if wanted:
                answer.callback(result)

        answer: Deferred[tuple[bytes, list[bytes]]] = Deferred(give_up)
        asking.addErrback(_explained).addBoth(pass_on)
        return answer

    async def _asked(
        self, url: str, form: dict[str, str] | None, authorization: str | None
    ) -> tuple[bytes, list[bytes]]:
        headers: Any = {"Accept": "application/json", "User-Agent": "popdrop"}
        if authorization is not None:
            headers["Authorization"] = authorization
        response: Any = await self._new(self._agent).request(
            "GET" if form is None else "POST",
            url,
            headers=headers,
            data=form,
            allow_redirects=False,
            unbuffered=True,
            reactor=self._reactor,
        )
        body = _Bounded()
        if response.code != 200:
            body.refuse(f"status {response.code}")
        elif _COMPRESSED in response.headers.getRawHeaders(b"content-encoding", []):
            body.refuse("a compressed answer, which was not asked for")
        response.deliverBody(body)
        octets = await body.done
        return octets, response.headers.getRawHeaders(b"cache-control", [])


class _Plain:
    """An agent that does not ask for compression: 64 KiB of it may be 64 MiB of text."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def request(self, method: bytes, uri: bytes, headers: Any = None, body: Any = None) -> Any:
        headers.removeHeader(b"accept-encoding")
        answering = self._agent.request(method, uri, headers, body)
        return answering.addCallback(self._uncompressed)

    @staticmethod
    def _uncompressed(response: Any) -> Any:
        # treq takes gzip apart as soon as it sees the word; here it does not see it.
        encodings = response.headers.getRawHeaders(b"content-encoding", [])
        if any(encoding.strip().lower() != b"identity" for encoding in encodings):
            response.headers.setRawHeaders(b"content-encoding", [_COMPRESSED])
        else:
            response.headers.removeHeader(b"content-encoding")
        return response


class _Bounded(Protocol):
    """Collects a body, up to `ANSWER_OCTETS`."""

    def __init__(self) -> None:
        self.done: Deferred[bytes] = Deferred(lambda done: self._hang_up())
        self._blocks: list[bytes] = []
        self._left = ANSWER_OCTETS
        self._refusal: str | None = None

    def refuse(self, why: str) -> None:
        """Do not read the body."""
        self._refusal = why

    def connectionMade(self) -> None:
        if self._refusal is not None:
            self._give_up(self._refusal)

    def dataReceived(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._blocks.clear()
            self._give_up(f"over {ANSWER_OCTETS} octets")
        else:
            self._blocks.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        from twisted.web.client import ResponseDone
        from twisted.web.http import PotentialDataLoss

        if self.done.called:
            return
        # Without a length the end of the connection is that of the answer; JSON tells its own.
        if reason.check(ResponseDone, PotentialDataLoss):  # type: ignore[no-untyped-call]
            self.done.callback(b"".join(self._blocks))
        else:
            self.done.errback(Unanswered("the answer broke off"))

    def _give_up(self, why: str) -> None:
        if not self.done.called:
            self.done.errback(Unanswered(why))
        self._hang_up()

    def _hang_up(self) -> None:
        if self.transport is not None:
            self.transport.loseConnection()


def _too_late(result: object, seconds: float) -> Failure:
    return _unanswered(f"no answer within {seconds:g} s")


def _explained(failure: Failure) -> Failure:
    """`Unanswered`, in words that quote nothing."""
    from OpenSSL.SSL import Error as TLSError
    from service_identity import VerificationError

    error: Any = failure.value
    reasons = getattr(error, "reasons", None)
    inner = reasons[0].value if reasons else error
    if isinstance(inner, Unanswered):
        return failure
    if isinstance(inner, TimeoutError):
        return _too_late(None, ANSWER_SECONDS)
    words = type(inner).__name__
    # The text of any other error may quote the answer, which may quote the question.
    if isinstance(inner, ConnectError | DNSLookupError | TLSError | VerificationError):
        words = f"{words}: {' '.join(str(inner).split())[:200]}"
    return _unanswered(words)


def _unanswered(words: str) -> Failure:
    return Failure(Unanswered(words))  # type: ignore[no-untyped-call]
