"""`popdrop.accepting`: what is logged; the shortage itself is in `end_to_end.test_limits`."""

from __future__ import annotations

import socket

from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accepting import QUIET, Complaint, Listening, outlive_shortage
from popdrop.proxied import ProxiedFactory, ProxiedPort


class ComplaintTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.said: list[str] = []

        def observe(event: dict[str, object]) -> None:
            if event["log_namespace"] == "popdrop.accepting":
                self.said.append(str(event["log_format"]).format(**event))

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)

    def test_once_and_then_how_often(self) -> None:
        clock = Clock()
        complaint = Complaint(clock)  # type: ignore[arg-type]
        for _ in range(5):
            complaint.say("no room for {peer}", peer="192.0.2.1")
            clock.advance(QUIET / 10)
        self.assertEqual(self.said, ["no room for 192.0.2.1"])
        clock.advance(QUIET)
        complaint.say("no room for {peer}", peer="192.0.2.2")
        self.assertEqual(self.said[1:], ["no room for 192.0.2.2 (4 more since the last such line)"])
        clock.advance(QUIET)
        complaint.say("no room for {peer}", peer="192.0.2.3")
        self.assertEqual(self.said[2:], ["no room for 192.0.2.3"])


class Port:
    """Of Twisted's, what `Listening` uses."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setblocking(False)
        self.connected, self.disconnecting = True, False
        self.reading = True

    def stopReading(self) -> None:
        self.reading = False

    def startReading(self) -> None:
        self.reading = True


class ListeningTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.port = Clock(), Port()
        self.listening = Listening(self.port, self.clock, False)  # type: ignore[arg-type]
        self.addCleanup(self.listening.close)

    def test_nobody_waits(self) -> None:
        """Twisted's own way to hear of it."""
        self.assertRaises(BlockingIOError, self.listening.accept)
        self.assertTrue(self.port.reading)

    def test_not_after_it_has_stopped(self) -> None:
        """A pause that ends when nobody listens any more starts nothing."""
        for name, value in (("connected", False), ("disconnecting", True)):
            self.listening._pause(24)
            self.assertFalse(self.port.reading)
            setattr(self.port, name, value)
            self.clock.advance(10)
            self.assertFalse(self.port.reading)
            self.port.connected, self.port.disconnecting = True, False

    def test_again_after_the_pause(self) -> None:
        self.listening._pause(24)
        self.assertFalse(self.port.reading)
        self.clock.advance(10)
        self.assertTrue(self.port.reading)

    def test_behind_a_proxy(self) -> None:
        """Of a port over another it is the other that accepts."""
        plain = Port()
        factory = ProxiedFactory(Factory(), (), self.clock)  # type: ignore[arg-type]
        port = ProxiedPort(plain, factory)
        outlive_shortage(port, self.clock, False)  # type: ignore[arg-type]
        self.addCleanup(plain.socket.close)
        self.assertIsInstance(plain.socket, Listening)
        self.assertIs(port.socket, plain.socket)
