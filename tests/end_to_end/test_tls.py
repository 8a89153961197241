"""TLS at the network's edge: attacks, old versions, tickets and renewal, through real sockets."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from tests.end_to_end.harness import DEADLINE, Twistd
from tests.end_to_end.test_server import ServerCase, Wire

PLAIN = "tcp:0:interface=127.0.0.1"
AUTHORITY = trustme.CA()
HELLO_RECORD, ALERT_RECORD = 22, 21
PROTOCOL_VERSION, NO_APPLICATION_PROTOCOL = 70, 120
FATAL = 2


def hello(version: int, methods: bytes = b"\0") -> bytes:
    """A ClientHello of SSL 3.0 (0x300) to TLS 1.2 (0x303) that offers compression `methods`.

    RFC 5246 section 7.4.1.2; in a record of the same version (RFC 6101 for SSL 3.0).
    """
    suites = struct.pack(">5H", 0xC02B, 0xC02F, 0xC009, 0xC013, 0x002F)
    body = struct.pack(">H32sB", version, os.urandom(32), 0)
    body += struct.pack(">H", len(suites)) + suites + bytes([len(methods)]) + methods
    if version > 0x300:
        groups = struct.pack(">HHHHH", 10, 6, 4, 29, 23)
        algorithms = struct.pack(">HHHHHH", 13, 8, 6, 0x0403, 0x0401, 0x0804)
        body += struct.pack(">H", len(groups + algorithms)) + groups + algorithms
    message = b"\x01" + struct.pack(">I", len(body))[1:] + body
    return struct.pack(">BHH", HELLO_RECORD, version, len(message)) + message


def modern_hello() -> bytes:
    """The ClientHello of Python's own client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


class EdgeCase(ServerCase):
    """Certbot's folder with two names; port 0 is plain with STLS, port 1 is TLS."""

    def setUp(self) -> None:
        super().setUp()
        self.live = self.folder.path / "live"
        for name in ("localhost", "mail.example"):
            self.renew(name)

    def renew(self, name: str, **given: object) -> None:
        """A pair in `archive`, and links to it in `live`, as certbot makes them."""
        issued = AUTHORITY.issue_cert(name, **given)
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        number = 1 + len(list((self.folder.path / "archive" / name).glob("privkey*")))
        for what, octets in (("privkey", issued.private_key_pem.bytes()), ("fullchain", chain)):
            kept = self.folder.path / "archive" / name / f"{what}{number}.pem"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(octets)
            kept.chmod(0o600)
            link = self.live / name / f"{what}.pem"
            link.parent.mkdir(parents=True, exist_ok=True)
            fresh = link.with_suffix(".new")
            fresh.symlink_to(os.path.relpath(kept, link.parent))
            fresh.replace(link)

    def edge(self, *options: str) -> Twistd:
        return self.serve(
            "--starttls",
            str(self.live),
            *options,
            listen=(PLAIN, f"tls:{self.live}:0:interface=127.0.0.1"),
        )

    def context(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.create_default_context()
        AUTHORITY.configure_trust(context)
        context.maximum_version = version
        return context

    def both(self, server: Twistd) -> list[Wire]:
        """A connection to each port, ready for a ClientHello."""
        first, second = (Wire(self, port) for port in server.ports)
        first.line()
        first.send(b"STLS\r\n")
        self.assertTrue(first.line().startswith(b"+OK"))
        return [first, second]

    def secure(self, server: Twistd, **given: object) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", server.ports[1]), DEADLINE)
        context = given.pop("context", None) or self.context()
        given.setdefault("server_hostname", "localhost")
        client = context.wrap_socket(raw, **given)  # type: ignore[attr-defined]
        self.addCleanup(client.close)
        return client

    def log_in(self, server: Twistd) -> None:
        """Over TLS, with a list of the maildrop."""
        with self.secure(server) as client, client.makefile("rwb") as file:
            file.write(b"USER bob\r\nPASS hunter2\r\nSTAT\r\nQUIT\r\n")
            file.flush()
            lines = file.readlines()
        self.assertTrue(lines[3].startswith(b"+OK 3 "), lines)
        server.wait_for('end user="bob"')

    def descriptors(self, server: Twistd) -> list[str]:
        """What the server has open, sockets as `socket:[INODE]`."""
        found = []
        folder = f"/proc/{server.process.pid}/fd"
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"{folder}/{name}"))
        return found

    def sockets(self, server: Twistd) -> int:
        return sum(each.startswith("socket:") for each in self.descriptors(server))

    def until_sockets(self, server: Twistd, count: int) -> None:
        """Wait until the server has that many, neither more nor less."""
        deadline = time.monotonic() + DEADLINE
        while (found := self.sockets(server)) != count:
            self.assertLess(time.monotonic(), deadline, f"{found} sockets, not {count}")
            time.sleep(0.05)

    def s_client(self, *options: str, text: bytes = b"") -> str:
        """What `openssl s_client` prints, errors too."""
        if shutil.which("openssl") is None:
            self.skipTest("needs the Debian package openssl")
        found = subprocess.run(
            ["openssl", "s_client", "-servername", "localhost", *options],
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE,
            check=False,
        )
        return found.stdout.decode("utf-8", "replace")


class HalfOpenTests(EdgeCase):
    """CVE-2014-3430, CVE-2015-3420 (mbox-safety 38)."""

    def test_300_half_open_handshakes(self) -> None:
        """Others log in, each is closed by the login timeout, and nothing is left of it."""
        server = self.edge("--login-timeout", "20")
        listening = self.sockets(server)
        self.log_in(server)
        self.until_sockets(server, listening)
        memory = self.memory(server)
        held = []
        half = modern_hello()[:100]
        for number in range(150):
            plain, secure = self.both(server)
            for wire in (plain, secure):
                if number % 3:
                    wire.send(half[: 1 if number % 3 == 1 else 100])
                held.append(wire)
        self.log_in(server)
        self.until_sockets(server, listening + len(held))
        each = (self.memory(server) - memory) / len(held)
        self.assertLess(each, 192 << 10, "octets of a half-open handshake")
        for wire in held:
            wire.rest()
        self.until_sockets(server, listening)
        self.log_in(server)
        self.assertNotIn("Traceback", server.stop())

    def test_1000_aborted_handshakes(self) -> None:
        """In each state of the handshake, by FIN and by RST: no descriptor is left."""
        server = self.edge()
        listening = self.sockets(server)
        self.log_in(server)
        self.until_sockets(server, listening)
        before, memory = len(self.descriptors(server)), 0
        whole = modern_hello()
        starts = (b"", whole[:3], whole[:-1], whole, whole + b"\x14\x03\x03\0\x01\x01", b"\0" * 99)
        for number in range(500):
            if number % 25 == 0:
                # How many it has at a time depends on how fast it is, and its memory on that.
                self.until_sockets(server, listening)
            if number == 250:
                memory = self.memory(server)  # all has been allocated once
            for wire in self.both(server):
                with contextlib.suppress(OSError):
                    wire.send(starts[number % len(starts)])
                    if number % 4 == 1 and number % len(starts) == 3:
                        wire.socket.recv(1)
                if number % 2:
                    wire.reset()
                else:
                    wire.close()
        self.until_sockets(server, listening)
        self.assertLessEqual(len(self.descriptors(server)), before)
        self.assertLess(self.memory(server) - memory, 4 << 20)
        self.log_in(server)
        self.assertNotIn("Traceback", server.stop())

    def memory(self, server: Twistd) -> int:
        """Resident octets of the server."""
        with open(f"/proc/{server.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class InjectionTests(EdgeCase):
    """CVE-2021-38084, CVE-2021-38542 (mbox-safety 3 and 4)."""

    def test_a_second_segment_before_the_handshake(self) -> None:
        """It is taken for the handshake, which fails: no command of it is answered."""
        server = self.edge("--cleartext", "always")
        plain = self.both(server)[0]
        plain.send(b"USER bob\r\nPASS hunter2\r\n")
        answer = plain.rest()
        self.assertNotIn(b"+OK", answer)
        self.assertNotIn(b"-ERR", answer)
        server.wait_for("TLS with 127.0.0.1 failed")
        self.assertNotIn("login user", server.stop())

    def test_what_is_no_stls_begins_no_tls(self) -> None:
        """A blank behind it makes it another command, and what follows it is answered."""
        server = self.edge()
        for stls in (b"STLS \r\n", b"STLS now\r\n"):
            wire = Wire(self, server.ports[0])
            wire.line()
            wire.send(stls + b"UTF8\r\n")
            self.assertTrue(wire.line().startswith(b"-ERR"))
            self.assertEqual(wire.line(), b"+OK UTF8 enabled\r\n")


class VersionTests(EdgeCase):
    """POODLE, CRIME, Lucky13 (mbox-safety 41)."""

    def test_ssl3_to_tls11_get_an_alert(self) -> None:
        server = self.edge()
        for version in (0x300, 0x301, 0x302):
            for wire in self.both(server):
                wire.send(hello(version))
                answer = wire.rest()
                self.assertEqual(answer[0], ALERT_RECORD, (hex(version), answer))
                self.assertEqual(answer[5:7], bytes([FATAL, PROTOCOL_VERSION]))
        for wire in self.both(server):
            wire.send(b"\x80\x1c\x01\0\x02\0\x03\0\0\0\x10\x07\0\xc0" + bytes(16))  # SSL 2.0
            self.assertNotIn(b"\x04", wire.rest()[:1])
        self.log_in(server)
        self.assertNotIn("Traceback", server.stop())

    def test_no_compression(self) -> None:
        """Offered DEFLATE (RFC 3749), the ServerHello says none."""
        server = self.edge()
        for wire in self.both(server):
            wire.send(hello(0x303, b"\x01\0"))
            found = wire.socket.recv(4096)
            self.assertEqual((found[0], found[5]), (HELLO_RECORD, 2), found)
            after_id = 44 + found[43]
            self.assertEqual(found[after_id + 2], 0)

    def test_renegotiation_is_refused(self) -> None:
        """CVE-2009-3555, CVE-2011-1473 (mbox-safety 40): `R` in s_client."""
        server = self.edge()
        for port, more in zip(server.ports, (("-starttls", "pop3"), ()), strict=True):
            told = self.s_client(
                "-tls1_2", "-connect", f"127.0.0.1:{port}", *more, text=b"R\n" + b"NOOP\n" * 3
            )
            self.assertIn("RENEGOTIATING", told)
            self.assertIn("no renegotiation", told)
        self.log_in(server)
        self.assertNotIn("Traceback", server.stop())


class ALPNTests(EdgeCase):
    """ALPACA (mbox-safety 42); RFC 7301 section 3.2."""

    def test_pop3_alone(self) -> None:
        server = self.edge()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            for offered, chosen in ((["http/1.1", "pop3"], "pop3"), ([], None)):
                context = self.context(version)
                if offered:
                    context.set_alpn_protocols(offered)
                found = self.secure(server, context=context).selected_alpn_protocol()
                self.assertEqual(found, chosen)
        for port, more in zip(server.ports, (("-starttls", "pop3"), ()), strict=True):
            for version in ("-tls1_2", "-tls1_3"):
                told = self.s_client(
                    "-alpn", "http/1.1,imap", version, "-connect", f"127.0.0.1:{port}", *more
                )
                self.assertIn(f"SSL alert number {NO_APPLICATION_PROTOCOL}", told)


class TicketTests(EdgeCase):
    def test_resumed_after_a_renewal_and_between_the_ports(self) -> None:
        server = self.edge()
        held = self.secure(server)
        self.assertTrue(held.recv(100).startswith(b"+OK"))
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = self.context(version)
            first = self.secure(server, context=context)
            first.recv(100)
            self.assertFalse(first.session_reused)
            self.renew("localhost")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("read .*live again")
            second = self.secure(server, context=context, session=first.session)
            self.assertTrue(second.session_reused)
            wire = self.both(server)[0]
            again = context.wrap_socket(
                wire.socket, server_hostname="localhost", session=first.session
            )
            self.addCleanup(again.close)
            self.assertTrue(again.session_reused)
        held.sendall(b"CAPA\r\n")
        self.assertTrue(held.recv(100).startswith(b"+OK"))

    def test_no_early_data(self) -> None:
        """It could be replayed (RFC 8446 section 8)."""
        server = self.edge()
        target = f"127.0.0.1:{server.ports[1]}"
        told = self.s_client("-tls1_3", "-ign_eof", "-connect", target, text=b"QUIT\n")
        self.assertIn("Max Early Data: 0", told)


class RenewalTests(EdgeCase):
    def test_a_name_is_shown_its_own_and_a_broken_pair_changes_nothing(self) -> None:
        server = self.edge()
        before = {
            name: self.secure(server, server_hostname=name).getpeercert()
            for name in ("localhost", "mail.example")
        }
        self.assertEqual(before["mail.example"]["subjectAltName"][0], ("DNS", "mail.example"))
        (self.live / "mail.example" / "privkey.pem").unlink()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("mail.example/privkey.pem.*the old certificate stays in use")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("opening the session logs anew")
        for name, shown in before.items():
            self.assertEqual(self.secure(server, server_hostname=name).getpeercert(), shown, name)
        self.renew("mail.example")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("read .*live again")
        after = self.secure(server, server_hostname="mail.example").getpeercert()
        self.assertNotEqual(after["serialNumber"], before["mail.example"]["serialNumber"])
        self.assertEqual(server.stop().count("the old certificate stays in use"), 1)

    def test_one_that_ended_is_served_with_a_warning(self) -> None:
        shutil.rmtree(self.live)
        self.renew("localhost", not_after=datetime.now(UTC) - timedelta(days=1))
        server = self.edge()
        with self.assertRaises(ssl.SSLCertVerificationError) as caught:
            self.secure(server)
        self.assertIn("expired", str(caught.exception))
        lenient = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        lenient.check_hostname = False
        lenient.verify_mode = ssl.CERT_NONE
        self.assertTrue(self.secure(server, context=lenient).recv(100).startswith(b"+OK"))
        log = server.stop()
        self.assertEqual(log.count("only: renew it"), 1, log)
        self.assertIn(str(Path("live", "localhost", "fullchain.pem")), log)

    def test_metrics(self) -> None:
        """The end of what is shown, by file, and whether a pair is broken: as Prometheus reads."""
        path = self.folder.path / "popdrop.prom"
        ends = datetime.now(UTC).replace(microsecond=0) + timedelta(days=20)
        self.renew("localhost", not_after=ends)
        server = self.edge("--metrics", str(path))
        name = "popdrop_certificate_not_after_seconds"
        file = f"{self.live}/localhost/fullchain.pem"
        self.assertIn(f'{name}{{file="{file}"}} {ends.timestamp():.0f}', self.until(path, ""))
        self.assertEqual(path.stat().st_mode & 0o777, 0o644)
        self.assertIn("popdrop_certificates_refused 0", path.read_text())
        (self.live / "mail.example" / "privkey.pem").unlink()
        server.process.send_signal(signal.SIGHUP)
        self.until(path, "popdrop_certificates_refused 1\n")
        ends += timedelta(days=90)
        self.renew("mail.example")
        self.renew("localhost", not_after=ends)
        server.process.send_signal(signal.SIGHUP)
        found = self.until(path, "popdrop_certificates_refused 0\n")
        self.assertIn(f'{name}{{file="{file}"}} {ends.timestamp():.0f}', found)
        # An agent of the textfile collector reads the folder: no draft is left in it.
        self.assertEqual([each.name for each in path.parent.glob("*.prom*")], [path.name])

    def until(self, path: Path, words: str) -> str:
        """What the file says once these words are in it."""
        end = time.monotonic() + DEADLINE
        while not path.exists() or words not in path.read_text():
            self.assertLess(time.monotonic(), end, words)
            time.sleep(0.01)
        return path.read_text()
