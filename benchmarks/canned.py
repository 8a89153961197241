"""`python -m benchmarks.canned PORT TLS_PORT PEM`: ready-made answers from Twisted.

It shows what a session costs with Twisted and its own TLS where nothing is done: no login is
verified, no mail is there, nothing is logged. What it takes no POP3 server in Twisted can save.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from OpenSSL import crypto
from twisted.internet import epollreactor
from twisted.internet.protocol import ServerFactory, connectionDone
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure

GREETING = b"+OK <1.2@localhost>"
CAPABILITIES = (b"+OK", b"USER", b".")


class Answers(LineReceiver):
    """`+OK` to everything."""

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)
        self.sendLine(GREETING)

    def lineReceived(self, line: bytes) -> None:
        self.transport.writeSequence(
            [b"\r\n".join(CAPABILITIES if line == b"CAPA" else [b"+OK 10 100000"]), b"\r\n"]
        )
        if line == b"QUIT":
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        pass


def main(argv: list[str]) -> int:
    """Serve until a signal ends it."""
    epollreactor.install()
    from twisted.internet import reactor as installed
    from twisted.internet.ssl import CertificateOptions

    reactor: Any = installed
    plain, secure, pem = argv
    octets = Path(pem).read_bytes()
    # As `ssl:` would make them, but with tickets.
    options = CertificateOptions(
        privateKey=crypto.load_privatekey(crypto.FILETYPE_PEM, octets),
        certificate=crypto.load_certificate(crypto.FILETYPE_PEM, octets),
        enableSessionTickets=True,
    )
    factory = ServerFactory.forProtocol(Answers)
    reactor.listenTCP(int(plain), factory, interface="127.0.0.1")
    reactor.listenSSL(int(secure), factory, options, interface="127.0.0.1")
    reactor.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
