"""What systemd is told, over a real socket."""

from __future__ import annotations

import os
import poplib
import signal
import socket
import tempfile

from twisted.trial.unittest import SynchronousTestCase

from popdrop import notify
from tests.end_to_end.harness import DEADLINE, Folder, Twistd, mail


class NotifyCase(SynchronousTestCase):
    def listen(self, path: str) -> socket.socket:
        """Play systemd at `path`; `@` begins an abstract name."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(listening.close)
        listening.settimeout(DEADLINE)
        listening.bind("\0" + path[1:] if path.startswith("@") else path)
        return listening


class WordsTests(NotifyCase):
    def test_both_kinds_of_address(self) -> None:
        name = os.path.join(tempfile.mkdtemp(prefix="popdrop-test-"), "notify")
        self.addCleanup(os.rmdir, os.path.dirname(name))
        self.addCleanup(os.unlink, name)
        for path in (name, f"@{name}"):
            listening = self.listen(path)
            self.assertTrue(notify.tell(notify.READY, {"NOTIFY_SOCKET": path}))
            self.assertEqual(listening.recv(100), b"READY=1")

    def test_nobody_asks_or_listens(self) -> None:
        for path in (None, "", "notify", "/nonexistent/notify", "@popdrop-test-nobody", "/" * 500):
            environ = {} if path is None else {"NOTIFY_SOCKET": path}
            self.assertFalse(notify.tell(notify.READY, environ), path)

    def test_a_full_socket_blocks_nothing(self) -> None:
        path = f"@popdrop-test-{os.getpid()}-full"
        self.listen(path)
        for _ in range(100_000):
            if not notify.tell(notify.ALIVE, {"NOTIFY_SOCKET": path}):
                return
        self.fail("the socket is never full")

    def test_watchdog(self) -> None:
        """Half of what systemd waits, if it means this process (sd_watchdog_enabled(3))."""
        for more, wanted in (
            ({}, None),
            ({"WATCHDOG_USEC": "30000000"}, 15.0),
            ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
            ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
            ({"WATCHDOG_USEC": "0"}, None),
            ({"WATCHDOG_USEC": "-5"}, None),
            ({"WATCHDOG_USEC": "soon"}, None),
        ):
            self.assertEqual(notify.watchdog_seconds(more), wanted, more)


class ServerTests(NotifyCase):
    def test_life_of_a_server(self) -> None:
        """Ready once it serves, alive, ready again after SIGHUP, and then stopping."""
        folder = Folder(self)
        listening = self.listen(str(folder.path / "notify"))
        # Once a second: of ten words that nobody has read the next one would be lost (unix(7)).
        variables = {"NOTIFY_SOCKET": str(folder.path / "notify"), "WATCHDOG_USEC": "2000000"}
        server = Twistd(self, folder, variables=variables)

        def next_word() -> bytes:
            while (word := listening.recv(200)) == b"WATCHDOG=1":
                pass
            return word

        self.assertEqual(next_word(), b"READY=1")
        server.client().quit()
        self.assertEqual(listening.recv(200), b"WATCHDOG=1")
        server.process.send_signal(signal.SIGHUP)
        begun = next_word().split(b"\n")
        self.assertEqual(begun[0], b"RELOADING=1")
        self.assertRegex(begun[1], rb"\AMONOTONIC_USEC=[1-9][0-9]*\Z")
        self.assertEqual(next_word(), b"READY=1")
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(next_word(), b"STOPPING=1")
        self.assertEqual(server.process.wait(DEADLINE), -signal.SIGTERM)

    def test_lists_of_names_are_read_at_a_reload(self) -> None:
        """And a session beside it goes on."""
        folder = Folder(self)
        for name in ("alice", "bob"):
            folder.add(name, apop="a shared secret")
            folder.spool(name, mail(1))
        refused = folder.path / "refused"
        refused.write_text("")
        listening = self.listen(str(folder.path / "notify"))
        variables = {"NOTIFY_SOCKET": str(folder.path / "notify")}
        server = Twistd(self, folder, "--nonauth-file", str(refused), variables=variables)
        self.assertEqual(listening.recv(200), b"READY=1")
        beside = server.client()
        beside.apop("bob", "a shared secret")
        for names in ("alice\n", "", "alice\n", ""):
            refused.write_text(names)
            server.process.send_signal(signal.SIGHUP)
            self.assertEqual(listening.recv(200)[:11], b"RELOADING=1")
            self.assertEqual(listening.recv(200), b"READY=1")
            client = server.client()
            if names:
                self.assertRaises(poplib.error_proto, client.apop, "alice", "a shared secret")
            else:
                client.apop("alice", "a shared secret")
            client.quit()
        self.assertEqual(beside.stat()[0], 1)
        beside.quit()
