"""Listeners of every kind, each with rules of its own, through real sockets."""

from __future__ import annotations

import poplib
import ssl

from tests.end_to_end.harness import Twistd
from tests.end_to_end.test_server import ServerCase, Wire


class PolicyTests(ServerCase):
    """`--listen-policy`: two ports of one server with different rules."""

    def setUp(self) -> None:
        super().setUp()
        self.server = Twistd(
            self,
            self.folder,
            "--cleartext",
            "always",
            listen=(
                "tcp:0:interface=127.0.0.1 stls=require,cleartext=never",
                "tcp:0:interface=127.0.0.1",
                "tcp:0:interface=127.0.0.1 apop-only",
                "tcp:0:interface=127.0.0.1 stls=off",
            ),
        )

    def capabilities(self, port: int) -> list[bytes]:
        wire = Wire(self, port)
        wire.line()
        wire.send(b"CAPA\r\n")
        return wire.lines()

    def test_each_port_keeps_its_rules(self) -> None:
        required, everything, apop, without = self.server.ports
        self.assertEqual(
            [b"STLS\r\n" in self.capabilities(port) for port in self.server.ports],
            [True, True, True, False],
        )
        for port, inside in ((required, False), (everything, True), (apop, False), (without, True)):
            wire = Wire(self, port)
            wire.line()
            wire.send(b"USER bob\r\nPASS hunter2\r\n")
            answers = [wire.line()[:3], wire.line()[:3]]
            self.assertEqual(answers[-1] == b"+OK", inside, port)
            wire.send(b"QUIT\r\n")
            wire.rest()
            self.assertEqual(b"USER\r\n" in self.capabilities(port), inside)

    def test_rules_hold_under_tls(self) -> None:
        """`cleartext=never` under STLS as well; APOP goes in."""
        context = ssl.create_default_context(cafile=f"{self.folder.state}/self-made.pem")
        context.check_hostname = False
        client = self.server.client(self.server.ports[0])
        client.stls(context)
        with self.assertRaises(poplib.error_proto):
            client.user("bob")
        client.close()
        for port in self.server.ports[0], self.server.ports[2]:
            client = self.server.client(port)
            client.stls(context)
            client.apop("alice", "a shared secret of hers")
            self.assertEqual(client.stat()[0], 1)
            client.quit()
