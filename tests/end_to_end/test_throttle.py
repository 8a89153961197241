"""Two servers on one machine that count together."""

from __future__ import annotations

import contextlib
import poplib

from twisted.internet.address import IPv4Address

from benchmarks.mechanisms import Client
from popdrop.throttle import Shared
from tests.end_to_end.harness import Twistd
from tests.end_to_end.test_server import ServerCase
from tests.test_throttle import limits

TURNED_AWAY = b"-ERR [SYS/TEMP] too many connections, try again later"
HERE = IPv4Address("TCP", "127.0.0.1", 1)


class SharedTests(ServerCase):
    def setUp(self) -> None:
        super().setUp()
        self.table = self.folder.state / "throttle"

    def serve_two(self, words: str) -> tuple[Twistd, Twistd]:
        text = f"shared:{self.table}{words}"
        first, second = (
            Twistd(self, self.folder, "--throttle", text, listen=self.listen) for _ in range(2)
        )
        return first, second

    def test_connections_of_both(self) -> None:
        first, second = self.serve_two(":per-address=2")
        with contextlib.ExitStack() as stack:
            one = stack.enter_context(Client(first.port))
            self.assertTrue(one.greeting.startswith(b"+OK"))
            two = stack.enter_context(Client(second.port))
            self.assertTrue(two.greeting.startswith(b"+OK"))
            for server in (first, second):
                with Client(server.port) as other:
                    self.assertEqual(other.greeting, TURNED_AWAY)
            # What a killed server counted is nobody's any more.
            first.kill()
            three = stack.enter_context(Client(second.port))
            self.assertTrue(three.greeting.startswith(b"+OK"), three.greeting)
            with Client(second.port) as other:
                self.assertEqual(other.greeting, TURNED_AWAY)

    def test_failures_of_both(self) -> None:
        first, second = self.serve_two(":total=30:tracked=100")
        shared = Shared.open(str(self.table), limits(total=30, tracked=100))
        self.addCleanup(shared.close)
        for number, server in enumerate((first, second), 1):
            client = server.client()
            client.user("bob")
            failure = self.assertRaises(poplib.error_proto, client.pass_, f"wrong {number}")
            self.assertEqual(failure.args[0], b"-ERR [AUTH] Authentication failed.")
            client.close()
            self.assertEqual(shared.delay(HERE, b"bob"), number)
        # The same wrong password at the other server is known there.
        client = first.client()
        client.user("bob")
        self.assertRaises(poplib.error_proto, client.pass_, "wrong 2")
        self.assertEqual(shared.delay(HERE, b"bob"), 2)
        # And the right one is not delayed by any of it, nor counted.
        client.user("bob")
        self.assertTrue(client.pass_("hunter2").startswith(b"+OK"))
        client.quit()
        self.assertEqual(shared.delay(HERE, b"bob"), 2)
        first.stop()
        self.assertEqual(shared.delay(HERE, b"bob"), 2)

    def test_other_keywords_are_refused_while_it_is_in_use(self) -> None:
        self.serve("--throttle", f"shared:{self.table}:total=30")
        failure = self.assertRaises(
            AssertionError, self.serve, "--throttle", f"shared:{self.table}:total=31"
        )
        self.assertIn("in use with total=30:per-address=50", str(failure))
