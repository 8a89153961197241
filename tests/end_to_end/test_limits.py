"""What a server must bear: attacks on memory, descriptors and patience, through real sockets.

Each holds the server's memory or descriptors against what they were before. Rows are those of
`mbox-safety.md` section 2.
"""

from __future__ import annotations

import contextlib
import os
import poplib
import re
import resource
import select
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from tests.crash.strace import Strace
from tests.descriptors import descriptors
from tests.end_to_end.harness import DEADLINE, Twistd, mail
from tests.end_to_end.test_server import TLS, ServerCase, Wire

LOG_IN = b"USER bob\r\nPASS hunter2\r\n"
BUSY = b"-ERR [SYS/TEMP] too many connections, try again later\r\n"


def memory(server: Twistd) -> int:
    """Resident octets of the server."""
    for line in Path(f"/proc/{server.process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no Rss")


def processor_time(server: Twistd) -> float:
    """Seconds that the server has used so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class LimitCase(ServerCase):
    def until(self, what: str, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not is_so():
            self.assertLess(time.monotonic(), deadline, what)
            time.sleep(0.02)

    def wire(self, source: str = "127.0.0.1") -> Wire:
        """A connection from another address of loopback, its greeting not read yet."""
        wire = Wire.__new__(Wire)
        wire.socket = socket.create_connection(
            ("127.0.0.1", self.server.port), DEADLINE, (source, 0)
        )
        wire._file = wire.socket.makefile("rb")
        self.addCleanup(wire.close)
        return wire

    def log_in(self, name: bytes = b"bob", source: str = "127.0.0.1") -> Wire:
        wire = self.wire(source)
        wire.send(b"USER " + name + b"\r\nPASS hunter2\r\n")
        for _ in range(3):
            line = wire.line()
            self.assertTrue(line.startswith(b"+OK"), line)
        return wire

    def whole_session(self, name: str = "bob") -> None:
        """Somebody else comes, reads his mail and goes."""
        client = self.server.client()
        client.user(name)
        client.pass_("hunter2")
        self.assertGreater(client.stat()[0], 0)
        client.retr(1)
        client.quit()

    def users(self, count: int) -> list[bytes]:
        """More accounts, quickly made, each with a message."""
        names = [f"user{number}" for number in range(count)]
        for name in names:
            self.folder.add(name, password="hunter2")
            self.folder.spool(name, mail(1))
        return [name.encode() for name in names]


class SlowlorisTests(LimitCase):
    """CVE-2007-6750 and its kin (row 39)."""

    def test_octets_do_not_prolong_the_login(self) -> None:
        """One octet after another, and no end of the line: closed all the same."""
        server = self.serve("--login-timeout", "3", "--cleartext", "always")
        self.whole_session()
        server.wait_for("end user")
        before, room = descriptors(server.process.pid), memory(server)
        wires = [self.wire() for _ in range(50)]
        for wire in wires:
            self.assertTrue(wire.line().startswith(b"+OK"))
        left = {wire.socket: wire for wire in wires}
        deadline = time.monotonic() + DEADLINE
        octets = 0
        while left:
            self.assertLess(time.monotonic(), deadline, "still open")
            for wire in left.values():
                with contextlib.suppress(OSError):
                    wire.send(b"A")
                    octets += 1
            for each in select.select(list(left), [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.assertEqual(each.recv(100), b"")
                del left[each]
        self.assertGreaterEqual(octets, len(wires))
        self.until("descriptors", lambda: descriptors(server.process.pid) <= before)
        self.assertLess(memory(server) - room, 4 << 20)
        self.whole_session()

    def test_commands_do_not_either(self) -> None:
        """Nor does a failed login, or an exchange that is never ended."""
        self.serve("--login-timeout", "3", "--cleartext", "always")
        beside = self.log_in()
        for octets in (b"UTF8\r\n", b"AUTH PLAIN\r\n", b"USER bob\r\nPASS x\r\n"):
            wire = self.wire()
            deadline = time.monotonic() + DEADLINE
            with contextlib.suppress(OSError):
                while time.monotonic() < deadline:
                    wire.send(octets)
                    if not wire.line():
                        break
                    time.sleep(0.1)
                else:
                    self.fail("still open")
        beside.send(b"NOOP\r\n")
        self.assertEqual(beside.line(), b"+OK\r\n")


class UnreadTests(LimitCase):
    """Pipelines of a client that reads nothing (rows 12 and 49)."""

    def stuff(self, wire: Wire, octets: bytes) -> int:
        """Send until the server takes no more; how many octets it took."""
        wire.socket.setblocking(False)
        sent = 0
        for _ in range(4000):
            # Not taken within this time, on a busy machine too soon: the less is sent.
            if not select.select([], [wire.socket], [], 0.5)[1]:
                return sent
            with contextlib.suppress(BlockingIOError):
                sent += wire.socket.send(octets)
        raise AssertionError(f"{sent} octets, and it takes still more")

    def test_memory_stays_and_others_are_served(self) -> None:
        body = b"".join(b"%06d\n" % i for i in range(150_000))
        names = self.users(11)
        for name in names[:10]:
            self.folder.spool(name.decode(), mail(1, body) + mail(2))
        server = self.serve("--cleartext", "always")
        self.whole_session(names[10].decode())
        wires = [self.log_in(name) for name in names[:10]]
        before = memory(server)
        kinds = (b"RETR 1\r\n", b"LIST\r\n", b"TOP 1 99999\r\nRETR 2\r\n", b"UIDL\r\nRETR 1\r\n")
        for number, wire in enumerate(wires):
            taken = self.stuff(wire, kinds[number % len(kinds)] * 5000)
            self.assertGreater(taken, 0)
        self.assertLess((memory(server) - before) / len(wires), 1 << 20)
        self.whole_session(names[10].decode())
        for wire in wires:
            wire.reset()
        self.whole_session(names[0].decode())
        self.assertNotIn("Traceback", server.stop())

    def test_it_ends(self) -> None:
        """Once `--write-timeout` is over; his maildrop is free again."""
        self.folder.spool("bob", mail(1) + mail(2, b"y\n" * 3_000_000))
        server = self.serve("--cleartext", "always", "--write-timeout", "1")
        wire = self.log_in()
        wire.send(b"RETR 2\r\n" * 10)  # more than all buffers take
        server.wait_for(r"end user=\"bob\".* reason=write-timeout")
        self.whole_session()

    def test_a_thousand_answers_in_order(self) -> None:
        """Messages from disk beside lines from memory: nothing overtakes."""
        self.folder.spool("bob", mail(1, b"x" * 70 + b"\n") + mail(2, b"y\n" * 60_000) + mail(3))
        self.serve("--cleartext", "always")
        wire = self.log_in()
        wanted = []
        multi = (b"RETR 1", b"RETR 2", b"TOP 3 1", b"LIST")
        single = (b"LIST 1", b"NOOP", b"LIST 2", b"STAT")
        for command in multi:
            wire.send(command + b"\r\n")
            wanted.append(wire.lines())
        for command in single:
            wire.send(command + b"\r\n")
            wanted.append([wire.line()])
        self.assertEqual(len({tuple(each) for each in wanted}), 8)
        commands = [multi[i // 2 % 4] if i % 2 else single[i // 2 % 4] for i in range(1000)]
        for begin in range(0, 1000, 250):  # what waits must fit into the sockets' buffers
            wire.send(b"".join(each + b"\r\n" for each in commands[begin : begin + 250]))
            for command in commands[begin : begin + 250]:
                if command in multi:
                    self.assertEqual(wire.lines(), wanted[multi.index(command)])
                else:
                    self.assertEqual([wire.line()], wanted[4 + single.index(command)])


class EndlessLineTests(LimitCase):
    """CVE-2026-27857, CVE-2022-21716, CVE-2026-27858 (rows 14, 15, 49)."""

    def test_100_megabytes_without_an_end(self) -> None:
        server = self.serve("--cleartext", "always")
        beside = self.log_in()
        for begin in (b"", b"USER ", b"AUTH PLAIN "):
            wire = self.wire()
            self.assertTrue(wire.line().startswith(b"+OK"))
            before = memory(server)
            sent = 0
            with contextlib.suppress(OSError):
                wire.send(begin)
                while sent < 100_000_000:
                    sent += wire.socket.send(b"A" * 100_000)
            self.assertLess(sent, 100_000_000, "it was not closed")
            self.assertLess(memory(server) - before, 4 << 20)
            beside.send(b"NOOP\r\n")
            self.assertEqual(beside.line(), b"+OK\r\n")
        wire = self.wire()
        wire.line()
        wire.send(b"A" * 65_537)
        self.assertEqual(wire.rest(), b"-ERR line too long\r\n")

    def held(self, octets: bytes, answers: int) -> float:
        """Octets of memory for each of 300 strangers, who sent this and go on waiting."""
        for number in range(310):
            if number == 10:
                before = memory(self.server)
            wire = self.wire()
            self.assertTrue(wire.line().startswith(b"+OK"))
            wire.send(octets)
            for _ in range(answers):
                wire.line()
        self.settle()
        return (memory(self.server) - before) / 300

    def settle(self) -> None:
        """Until the server has read all that was sent before."""
        pid = self.server.process.pid
        last = processor_time(self.server)

        def quiet() -> bool:
            nonlocal last
            time.sleep(0.2)
            now, earlier = processor_time(self.server), last
            last = now
            return now == earlier and Path(f"/proc/{pid}/wchan").exists()

        self.until("quiet", quiet)

    def test_300_strangers_with_half_a_line(self) -> None:
        self.serve()
        self.assertLess(self.held(b"A" * 65_000, 0), 16 << 10)

    def test_300_strangers_with_half_a_response(self) -> None:
        """All of a line that is allowed must be kept: 12 KiB."""
        self.serve()
        self.assertLess(self.held(b"AUTH PLAIN " + b"A" * 12_000, 0), 32 << 10)

    def test_300_strangers_after_a_long_pipeline(self) -> None:
        """What they sent has been answered: nothing of it stays."""
        self.serve()
        self.assertLess(self.held(b"UTF8\r\n" * 10_000 + b"UT", 10_000), 16 << 10)


class CrowdTests(LimitCase):
    """Connections of an address, in all, and of a user (row 52)."""

    def test_a_flood_from_one_address(self) -> None:
        """It is turned away with an answer; others come in, and nothing of it stays."""
        server = self.serve("--throttle", "memory:per-address=20:total=60", "--cleartext", "always")
        beside = self.log_in(source="127.0.0.2")
        held = [self.wire() for _ in range(20)]
        for wire in held:
            self.assertTrue(wire.line().startswith(b"+OK"))
        open_now, room = descriptors(server.process.pid), memory(server)
        for _ in range(500):
            self.assertEqual(self.wire().rest(), BUSY)
        self.until("descriptors", lambda: descriptors(server.process.pid) <= open_now)
        self.assertLess(memory(server) - room, 2 << 20)
        beside.send(b"NOOP\r\n")
        self.assertEqual(beside.line(), b"+OK\r\n")
        self.assertTrue(self.wire("127.0.0.3").line().startswith(b"+OK"))
        held.pop().close()
        self.until("a place", lambda: self.wire().line().startswith(b"+OK"))
        told = re.findall("turned away", server.stop())
        self.assertLess(len(told), 100, "a line for each of 500")

    def test_connections_in_all(self) -> None:
        """Nobody else gets in, whatever his address; who is in goes on, and leaves a place."""
        self.serve("--throttle", "memory:per-address=20:total=60", "--cleartext", "always")
        beside = self.log_in(source="127.0.0.2")
        held = [self.wire(f"127.0.1.{1 + number // 20}") for number in range(59)]
        for wire in held:
            self.assertTrue(wire.line().startswith(b"+OK"))
        self.assertEqual(self.wire("127.0.0.3").rest(), BUSY)
        beside.send(b"RETR 1\r\n")
        self.assertTrue(beside.lines()[0].startswith(b"+OK"))
        held.pop().reset()
        self.until("a place", lambda: self.wire("127.0.0.3").line().startswith(b"+OK"))

    def test_a_flood_on_the_tls_port(self) -> None:
        """Closed before the handshake, which would cost a millisecond each."""
        server = self.serve(
            "--throttle",
            "memory:per-address=5",
            listen=(TLS.format(state=self.folder.state), "tcp:0:interface=127.0.0.1"),
        )
        held = []
        for _ in range(5):
            wire = Wire(self, server.port)
            wire.start_tls(self.trusting())
            self.assertTrue(wire.line().startswith(b"+OK"))
            held.append(wire)
        used, open_now = processor_time(server), descriptors(server.process.pid)
        for _ in range(100):
            self.assertRaises((ssl.SSLError, OSError), self.come_securely)
        self.assertLess((processor_time(server) - used) / 100, 0.005)
        self.until("descriptors", lambda: descriptors(server.process.pid) <= open_now)
        held[0].send(b"CAPA\r\n")
        self.assertIn(b"UIDL\r\n", held[0].lines())

    def come_securely(self) -> None:
        Wire(self, self.server.port).start_tls(self.trusting())

    def test_sessions_of_a_user(self) -> None:
        """Counted from the good password on; another user is not concerned."""
        self.serve("--throttle", "memory:per-user=1", "--cleartext", "always")
        self.folder.add("carol", password="hunter2")
        self.folder.spool("carol", mail(9))
        first = self.log_in()
        other = self.wire()
        other.send(LOG_IN)
        self.assertTrue(other.line().startswith(b"+OK"))
        self.assertTrue(other.line().startswith(b"+OK"))
        self.assertEqual(
            other.line(), b"-ERR [SYS/TEMP] too many connections of this user, try again later\r\n"
        )
        self.whole_session("carol")
        first.send(b"QUIT\r\n")
        self.assertIn(b"signing off", first.rest())
        other.send(LOG_IN)
        other.line()
        self.assertTrue(other.line().startswith(b"+OK bob"))


class DescriptorTests(LimitCase):
    """Too few descriptors (row 52)."""

    def limit(self, number: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.prlimit(self.server.process.pid, resource.RLIMIT_NOFILE, (number, hard))

    def test_none_left_for_another_connection(self) -> None:
        """They wait, and are served when there are some again; nothing spins, nothing floods."""
        server = self.serve("--cleartext", "always")
        beside = self.log_in()
        self.limit(3)
        waiting = [self.wire() for _ in range(10)]
        server.wait_for("EMFILE")
        used = processor_time(server)
        time.sleep(1.5)  # as long as a few tries
        self.assertLess(processor_time(server) - used, 0.75, "it spins")
        beside.send(b"NOOP\r\n")
        self.assertEqual(beside.line(), b"+OK\r\n")
        self.assertFalse(select.select([each.socket for each in waiting], [], [], 0)[0])
        self.limit(1000)
        for wire in waiting:
            self.assertTrue(wire.line().startswith(b"+OK"))
        beside.send(b"QUIT\r\n")
        beside.rest()
        self.whole_session()
        log = server.stop()
        self.assertNotIn("Traceback", log)
        self.assertEqual(len(re.findall("EMFILE", log)), 1, log)

    def test_none_left_in_the_system(self) -> None:
        """As when the whole machine has none, or no memory: who has come waits, and is served."""
        server = self.serve("--cleartext", "always")
        for name in ("ENFILE", "ENOBUFS", "ENOMEM"):
            output = self.folder.path / name
            fault = f"accept4:error={name}:when=1..2"
            trace = Strace(output, server.process.pid, ["accept4"], fault)
            wire = self.wire()
            self.assertTrue(wire.line().startswith(b"+OK"))
            failed = [name in call.text for call in trace.calls()]
            self.assertEqual(failed[:3], [True, True, False])
            wire.send(b"QUIT\r\n")
            wire.rest()
        log = server.stop()
        self.assertNotIn("Traceback", log)
        self.assertEqual(len(re.findall("ENFILE|ENOBUFS|ENOMEM", log)), 1, log)

    def test_none_left_for_a_maildrop(self) -> None:
        """A login that cannot open its maildrop is told to try again, and nothing is left open."""
        names = self.users(3)
        server = self.serve("--cleartext", "always")
        for name in names:
            self.whole_session(name.decode())  # what is opened once and kept is open now
        beside = self.log_in()
        wires = [self.wire() for _ in names]
        for wire in wires:
            self.assertTrue(wire.line().startswith(b"+OK"))
        held = descriptors(server.process.pid)
        highest = max(map(int, os.listdir(f"/proc/{server.process.pid}/fd")))
        self.assertEqual(highest, held - 1, "a gap among the descriptors")
        for more in (0, 1):
            self.limit(highest + 1 + more)
            for wire, name in zip(wires, names, strict=True):
                wire.send(b"USER " + name + b"\r\nPASS hunter2\r\n")
                self.assertTrue(wire.line().startswith(b"+OK"))
                self.assertTrue((line := wire.line()).startswith(b"-ERR [SYS/TEMP]"), line)
            self.until("descriptors", lambda: descriptors(server.process.pid) <= held)
        beside.send(b"RETR 1\r\n")
        self.assertTrue(beside.lines()[0].startswith(b"+OK"))
        beside.send(b"DELE 1\r\nQUIT\r\n")
        self.assertTrue(beside.line().startswith(b"+OK"))
        farewell = beside.rest()
        kept = self.spool.read_bytes().count(b"\nSubject: mail")
        # Honest either way: a journal may need a descriptor that there is not.
        self.assertEqual(farewell.startswith(b"+OK"), kept == 2, farewell)
        self.limit(1000)
        for wire, name in zip(wires, names, strict=True):
            wire.send(b"USER " + name + b"\r\nPASS hunter2\r\nSTAT\r\n")
            wire.line()
            self.assertTrue((line := wire.line()).startswith(b"+OK " + name), line)
            self.assertTrue(wire.line().startswith(b"+OK 1 "))
        self.assertNotIn("Traceback", server.stop())

    def test_the_last_are_for_those_who_are_in(self) -> None:
        """Long before the end newcomers are told, so that who is in can log in."""
        names = self.users(2)
        server = self.serve("--cleartext", "always")
        for name in names:
            self.whole_session(name.decode())
        held = []
        self.limit(most := descriptors(server.process.pid) + 64)
        while (line := (wire := self.wire()).line()) != BUSY:
            self.assertTrue(line.startswith(b"+OK"), line)
            held.append(wire)
        self.assertEqual(wire.rest(), b"")
        self.assertGreater(len(held), 5)
        self.assertLessEqual(descriptors(server.process.pid), most - most // 8)
        for wire, name in zip(held, names, strict=False):
            wire.send(b"USER " + name + b"\r\nPASS hunter2\r\n")
            wire.line()
            self.assertTrue((line := wire.line()).startswith(b"+OK " + name), line)
        for _ in range(100):
            self.assertEqual(self.wire().rest(), BUSY)
        log = server.stop()
        self.assertEqual(len(re.findall("turned away", log)), 1)
        self.assertIn("LimitNOFILE", log)


class HeaderTests(LimitCase):
    """CVE-2024-23184, CVE-2024-23185, CVE-2020-12100 (rows 36 and 37)."""

    FIELDS = 500_000

    def test_many_fields_and_long_ones(self) -> None:
        """500,000 header fields, 60 MB in one: their TOP costs as their RETR does, others go on."""
        from_line = b"From alice@example.org Sun Nov 22 10:00:00 2026\n"
        many = b"".join(b"To: <user%d@example.org>\n" % i for i in range(self.FIELDS))
        folded = b"To: " + b"<a@example.org>,\n " * 1_000_000 + b"<b@example.org>\n"
        long = b"Subject: " + b"x" * 60_000_000 + b"\n"
        self.folder.spool(
            "bob", b"".join(from_line + each + b"\nbody\n\n" for each in (many, folded, long))
        )
        self.folder.add("carol", password="hunter2")
        self.folder.spool("carol", mail(9))
        server = self.serve("--cleartext", "always")
        wire = self.log_in()
        before = memory(server)
        for number, header in ((1, many), (2, folded), (3, long)):
            costs = []
            for command in (b"RETR %d\r\n", b"TOP %d 0\r\n"):
                used = processor_time(server)
                wire.send(command % number)
                # Nothing of it is read yet, and somebody else comes meanwhile.
                self.whole_session("carol")
                sent = b"".join(wire.lines()[1:-1]).replace(b"\r\n", b"\n")
                self.assertTrue(sent.startswith(header + b"\n"), number)
                costs.append(processor_time(server) - used)
            self.assertLess(costs[1], 3 * costs[0] + 0.5)
        self.assertLess(memory(server) - before, 32 << 20)

    def test_no_structure_is_looked_at(self) -> None:
        """10,000 nested multiparts and no end of any are octets like others."""
        nested = b"".join(
            b"--%d\nContent-Type: multipart/mixed; boundary=%d\n\n" % (i, i + 1)
            for i in range(10_000)
        )
        self.folder.spool("bob", mail(1) + mail(2, nested))
        self.serve("--cleartext", "always")
        wire = self.log_in()
        wire.send(b"RETR 2\r\n")
        sent = b"".join(wire.lines()[1:-1]).replace(b"\r\n", b"\n")
        self.assertEqual(sent.partition(b"\n\n")[2], nested)


class PortTests(LimitCase):
    def test_only_those_that_were_asked_for(self) -> None:
        """No port for the administrator, none of a debugger (row 51)."""
        tls = TLS.format(state=self.folder.state)
        server = self.serve(listen=("tcp:0:interface=127.0.0.1", tls))
        self.whole_session_over(server.ports[1])
        sockets = set()
        for name in os.listdir(f"/proc/{server.process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                sockets.add(os.readlink(f"/proc/{server.process.pid}/fd/{name}"))
        found = []
        for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
            for line in Path(f"/proc/{server.process.pid}/net/{kind}").read_text().splitlines()[1:]:
                fields = line.split()
                is_open = fields[3] == "0A" or not kind.startswith("tcp")
                if is_open and f"socket:[{fields[9]}]" in sockets:
                    found.append((kind, int(fields[1].rpartition(":")[2], 16)))
        self.assertEqual(sorted(found), sorted(("tcp", port) for port in server.ports))

    def whole_session_over(self, port: int) -> None:
        client = poplib.POP3_SSL("localhost", port, context=self.trusting(), timeout=DEADLINE)
        client.user("bob")
        client.pass_("hunter2")
        client.quit()
