"""Who may connect, through real sockets."""

from __future__ import annotations

import signal
import socket
import ssl

from tests.end_to_end.harness import DEADLINE, Twistd
from tests.end_to_end.test_server import ServerCase
from tests.test_listeners import has_ipv6

PLAIN = "tcp:0:interface=127.0.0.1"
SIX = "tcp6:0:interface=\\:\\:1"
OTHER = "127.0.0.9"
"""Another client on this machine."""
TLS = "tls:{state}/self-made.pem:0:interface=127.0.0.1"
PROXY = "haproxy:tcp:0:interface=127.0.0.1"


def hear(port: int, say: bytes = b"", client: str = "127.0.0.1") -> bytes:
    """All that a server says to `say` until it closes or has said two lines."""
    host = "::1" if ":" in client else "127.0.0.1"
    with socket.create_connection((host, port), DEADLINE, (client, 0)) as connection:
        connection.sendall(say)
        heard = b""
        while heard.count(b"\r\n") < (2 if say else 1):
            try:
                more = connection.recv(4096)
            except ConnectionResetError:
                break
            if not more:
                break
            heard += more
        return heard


class AccessTests(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        self.allow = self.folder.path / "hosts.allow"
        self.deny = self.folder.path / "hosts.deny"

    def wrapped(self, allow: str, deny: str, *listen: str) -> Twistd:
        self.allow.write_text(allow)
        self.deny.write_text(deny)
        files = ("--hosts-allow", str(self.allow), "--hosts-deny", str(self.deny))
        trust = ("--trusted-proxies", "127.0.0.1") if PROXY in listen else ()
        return self.serve("--tcp-wrappers", *files, *trust, listen=listen)

    def test_networks(self) -> None:
        server = self.serve("--deny-net", "127.0.0.0/29", listen=(PLAIN,))
        self.assertEqual(hear(server.port), b"")
        self.assertTrue(hear(server.port, client=OTHER).startswith(b"+OK"))
        log = server.stop()
        self.assertEqual(log.count("127.0.0.1 refused by --deny-net"), 1)
        self.assertNotIn("Traceback", log)

    def test_allowed_network(self) -> None:
        server = self.serve("--allow-net", f"{OTHER}/32", listen=(PLAIN,))
        self.assertEqual(hear(server.port), b"")
        self.assertTrue(hear(server.port, client=OTHER).startswith(b"+OK"))

    def test_both_families(self) -> None:
        """Where this machine has IPv6."""
        if not has_ipv6():
            return
        for options, six in ((("--deny-net", "127.0.0.0/8"), True), (("--deny-net", "::1"), False)):
            server = self.serve(*options, listen=(PLAIN, SIX))
            for port, client, inside in zip(
                server.ports, ("127.0.0.1", "::1"), (not six, six), strict=True
            ):
                self.assertEqual(hear(port, client=client).startswith(b"+OK"), inside)
            server.stop()

    def test_name_of_hosts_file(self) -> None:
        """Asked for, and found in /etc/hosts: nothing is sent to any name server."""
        server = self.wrapped("qpopper: localhost\n", "ALL: ALL\n", PLAIN)
        client = server.client()
        client.user("bob")
        self.assertTrue(client.pass_("hunter2").startswith(b"+OK bob"))
        client.close()

    def test_before_the_handshake(self) -> None:
        # The certificate is made at a start of its own.
        self.serve().stop()
        tls = TLS.format(state=self.folder.state)
        context = self.trusting()
        context.check_hostname = False
        server = self.wrapped("", "popdrop: 127.0.0.1\n", tls)
        with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as raw:
            self.assertRaises((ssl.SSLError, OSError), context.wrap_socket, raw)
        self.deny.write_text("popdrop: LOCAL\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("access rules read anew")
        # The name is known, so this is refused at the time when it has been asked for.
        with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as raw:
            self.assertRaises((ssl.SSLError, OSError), context.wrap_socket, raw)
        log = server.stop()
        self.assertNotIn("Traceback", log)
        self.assertNotIn("tls-error", log)

    def test_read_again(self) -> None:
        server = self.wrapped("", "popper: [::1] 127.0.0.1\n", PLAIN)
        self.assertEqual(hear(server.port), b"")
        self.deny.write_text("popper: bob@127.0.0.1\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(f"the old access rules stay: {self.deny} line 1")
        self.assertEqual(hear(server.port), b"")
        self.deny.write_text("sshd: ALL\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("access rules read anew")
        self.assertTrue(hear(server.port).startswith(b"+OK"))

    def test_behind_a_proxy(self) -> None:
        """Not the proxy is asked about, but whom it names."""
        server = self.wrapped("popdrop: 192.0.2.\n", "ALL: ALL\n", PROXY)
        here = server.port
        for client, admitted in (("192.0.2.7", True), ("198.51.100.7", False)):
            header = f"PROXY TCP4 {client} 127.0.0.1 40000 110\r\n".encode()
            lines = hear(here, header + b"QUIT\r\n").split(b"\r\n")
            self.assertEqual(lines[0].startswith(b"+OK Popdrop"), admitted, lines)
        self.assertIn("198.51.100.7 refused by", server.stop())

    def test_error_at_the_start(self) -> None:
        self.allow.write_text("popdrop: bob@host\n")
        server = self.assertRaises(
            AssertionError,
            self.serve,
            "--tcp-wrappers",
            "--hosts-allow",
            str(self.allow),
            "--hosts-deny",
            str(self.deny),
        )
        self.assertIn(f"popdrop: {self.allow} line 1: bob@host", str(server))
        server = self.assertRaises(AssertionError, self.serve, "--hosts-deny", str(self.deny))
        self.assertIn("--hosts-deny is given without --tcp-wrappers", str(server))
