"""A real server through real sockets: TLS, attacks and bad input."""

from __future__ import annotations

import hashlib
import os
import poplib
import re
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
from base64 import b64encode

from twisted.trial.unittest import SynchronousTestCase

from tests.end_to_end.harness import DEADLINE, Folder, Twistd, environment, mail

TLS = "tls:{state}/self-made.pem:0:interface=127.0.0.1"


class Wire:
    """A client that sends what it likes."""

    def __init__(self, case: object, port: int) -> None:
        self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        case.addCleanup(self.close)  # type: ignore[attr-defined]
        self._file = self.socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def send(self, octets: bytes) -> None:
        self.socket.sendall(octets)

    def line(self) -> bytes:
        return self._file.readline()

    def lines(self) -> list[bytes]:
        """A multi-line reply, its first line included."""
        rows = [self.line()]
        while rows[-1] != b".\r\n":
            row = self.line()
            if not row:
                raise AssertionError(f"closed within a reply: {rows}")
            rows.append(row)
        return rows

    def rest(self) -> bytes:
        """All until the server closes."""
        try:
            return self._file.read()
        except ConnectionResetError:
            return b""

    def start_tls(self, context: ssl.SSLContext) -> None:
        self._file.close()
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        self._file = self.socket.makefile("rb")

    def reset(self) -> None:
        """Go away with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class ServerCase(SynchronousTestCase):
    options: tuple[str, ...] = ()
    listen: tuple[str, ...] = ("tcp:0:interface=127.0.0.1",)

    def setUp(self) -> None:
        self.folder = Folder(self)
        self.folder.add("bob", password="hunter2")
        self.folder.add("alice", apop="a shared secret of hers")
        self.spool = self.folder.spool("bob", mail(1) + mail(2, b".\n..\nend\n") + mail(3))
        self.folder.spool("alice", mail(7))

    def serve(self, *options: str, listen: tuple[str, ...] = ()) -> Twistd:
        self.server = Twistd(self, self.folder, *options, listen=listen or self.listen)
        return self.server

    def trusting(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder.state / "self-made.pem"))
        return context


class SessionTests(ServerCase):
    def test_apop(self) -> None:
        server = self.serve()
        client = server.client()
        self.assertTrue(client.apop("alice", "a shared secret of hers").startswith(b"+OK alice"))
        self.assertEqual(client.stat()[0], 1)
        client.quit()

    def test_apop_account_is_refused_cleartext(self) -> None:
        self.folder.add("carol", password="right words", apop="other words altogether")
        server = self.serve()
        client = server.client()
        client.user("carol")
        failure = self.assertRaises(poplib.error_proto, client.pass_, "right words")
        self.assertEqual(failure.args[0], b"-ERR [AUTH] Authentication failed.")
        client.close()
        self.assertIn("apop-account", server.stop())

    def test_strict_wording(self) -> None:
        """At USER, as qpopper 4; others go on; while the accounts cannot be read nobody does."""
        self.folder.add("carol", password="right words", apop="other words altogether")
        server = self.serve("--wording", "strict", "--user-names", "lower")
        words = (
            b"-ERR [AUTH] You must use stronger authentication such as AUTH or APOP to connect to"
            b" this server\r\n"
        )
        wire = Wire(self, server.port)
        wire.line()
        wire.send(b"USER CAROL\r\nPASS right words\r\nUSER nobody\r\nPASS x\r\nUSER bob\r\n")
        self.assertEqual(wire.line(), words)
        self.assertEqual(wire.line(), b"-ERR USER first\r\n")
        self.assertEqual(wire.line(), b"+OK Password required for nobody.\r\n")
        self.assertEqual(wire.line(), b"-ERR [AUTH] Authentication failed.\r\n")
        self.assertEqual(wire.line(), b"+OK Password required for bob.\r\n")
        self.folder.accounts.chmod(0o644)
        for _ in range(2):
            while True:
                other = Wire(self, server.port)
                other.line()
                other.send(b"USER carol\r\n")
                answer = other.line()
                if answer != words:
                    break
            self.assertIn(b"-ERR [SYS/TEMP]", answer)
            other.send(b"PASS right words\r\n")
            self.assertEqual(other.line(), b"-ERR USER first\r\n")
        self.folder.accounts.chmod(0o600)
        again = b""
        while b"[SYS/TEMP]" in again or not again:
            response = b64encode(b"\0carol\0right words")
            wire = Wire(self, server.port)
            wire.line()
            wire.send(b"AUTH PLAIN " + response + b"\r\n")
            again = wire.line()
        self.assertEqual(again, words)
        self.assertIn("apop-account", server.stop())

    def test_after_a_restart_all_is_as_before(self) -> None:
        """A large spool, of which there is an index then; any command may be the first."""
        filler = b"a line of some thirty octets..\n" * 10
        self.folder.spool("bob", b"".join(mail(i, filler) for i in range(1500)))
        seen: list[object] = []
        for visit in range(4):
            client = self.serve().client()
            client.user("bob")
            client.pass_("hunter2")
            ask = [
                lambda client=client: ("list", client.list()[1]),
                lambda client=client: ("uidl", client.uidl()[1]),
                lambda client=client: ("retr", client.retr(1500)[1]),
                lambda client=client: ("dele", client.dele(7), client.rset()),
            ]
            answers = [ask[(i + visit) % len(ask)]() for i in range(len(ask))]
            seen.append((client.stat(), sorted(answers, key=lambda each: str(each[0]))))
            client.quit()
            self.server.stop()
            self.assertTrue(os.listdir(self.folder.state / "index"))
        for later in seen[1:]:
            self.assertEqual(later, seen[0])

    def test_sizes_are_what_is_sent(self) -> None:
        client = self.serve().client()
        client.user("bob")
        client.pass_("hunter2")
        for row in client.list()[1]:
            number, octets = row.split()
            # poplib counts what it reads, dot-stuffing included.
            _, lines, _ = client.retr(int(number))
            self.assertEqual(sum(len(line) + 2 for line in lines), int(octets))
        client.quit()

    def test_a_session_deletes(self) -> None:
        before = os.stat(self.spool)
        client = self.serve().client()
        client.user("bob")
        client.pass_("hunter2")
        client.dele(2)
        client.quit()
        self.assertEqual(self.spool.read_bytes(), mail(1) + mail(3))
        after = os.stat(self.spool)
        self.assertEqual((after.st_ino, after.st_mode), (before.st_ino, before.st_mode))
        self.assertEqual(sorted(p.name for p in self.folder.spools.iterdir()), ["alice", "bob"])

    def test_nothing_is_deleted_without_quit(self) -> None:
        """FIN, RST, and `QUIT` without its line end (behaviour 10.8)."""
        server = self.serve()
        for ending in ("fin", "reset", "quit"):
            wire = Wire(self, server.port)
            wire.send(b"USER bob\r\nPASS hunter2\r\nDELE 1\r\n")
            for _ in range(4):
                self.assertTrue(wire.line().startswith(b"+OK"))
            if ending == "quit":
                wire.send(b"QUIT")
            if ending == "reset":
                wire.reset()
            else:
                wire.socket.shutdown(socket.SHUT_WR)
                self.assertEqual(wire.rest(), b"")
            server.wait_for(r"end user=\"bob\"")
        self.assertEqual(self.spool.read_bytes().count(b"Subject: mail"), 3)

    def test_hold_is_exclusive_and_ends(self) -> None:
        server = self.serve()
        first = server.client()
        first.user("bob")
        first.pass_("hunter2")
        second = server.client()
        second.user("bob")
        failure = self.assertRaises(poplib.error_proto, second.pass_, "hunter2")
        self.assertTrue(failure.args[0].startswith(b"-ERR [IN-USE]"), failure.args)
        other = server.client()
        self.assertTrue(other.apop("alice", "a shared secret of hers").startswith(b"+OK"))
        first.quit()
        second.user("bob")
        self.assertTrue(second.pass_("hunter2").startswith(b"+OK"))
        second.close()
        other.quit()

    def test_pipelined_session(self) -> None:
        wire = Wire(self, self.serve().port)
        wire.send(
            b"USER bob\r\nPASS hunter2\r\nSTAT\r\nRETR 2\r\nUIDL 1\r\nDELE 3\r\nQUIT\r\nNOOP\r\n"
        )
        answer = wire.rest()
        self.assertIn(b"\r\n..\r\n...\r\nend\r\n.\r\n+OK 1 ", answer)
        self.assertTrue(answer.endswith(b" signing off.\r\n"))
        self.assertEqual(self.spool.read_bytes(), mail(1) + mail(2, b".\n..\nend\n"))

    def test_mail_that_comes_meanwhile(self) -> None:
        """It is invisible in the session and survives its QUIT (behaviour 10.9)."""
        client = self.serve().client()
        client.user("bob")
        client.pass_("hunter2")
        with self.spool.open("ab") as spool:
            spool.write(mail(4))
        self.assertEqual(client.stat()[0], 3)
        client.dele(1)
        client.dele(3)
        client.quit()
        self.assertEqual(self.spool.read_bytes(), mail(2, b".\n..\nend\n") + mail(4))

    def test_unique_ids_stay(self) -> None:
        seen = []
        server = self.serve()
        for _ in range(2):
            client = server.client()
            client.user("bob")
            client.pass_("hunter2")
            seen.append(dict(row.split() for row in client.uidl()[1]))
            if len(seen) == 1:
                client.dele(1)
            client.quit()
        self.assertEqual(len(set(seen[0].values())), 3)
        self.assertEqual(seen[1], {b"1": seen[0][b"2"], b"2": seen[0][b"3"]})

    def test_large_message_from_disk(self) -> None:
        body = b"".join(b"%07d %s\n" % (i, b"." * (i % 90)) for i in range(40_000))
        self.folder.spool("bob", mail(1, body))
        client = self.serve().client()
        client.user("bob")
        client.pass_("hunter2")
        lines = client.retr(1)[1]
        text = b"\n".join(lines) + b"\n"
        self.assertEqual(text.partition(b"\n\n")[2], body)
        client.quit()


class KindTests(ServerCase):
    """Spools that are no plain files of From_ lines, with mail that comes in the session."""

    HEADER = b"From: <alice@example.org>\nSubject: mail %d\n"
    BODY = b">From here\n\n" + mail(99) + b"\x01 end\n"

    def retrieve(self, client: poplib.POP3, number: int) -> bytes:
        return b"".join(line + b"\r\n" for line in client.retr(number)[1])

    def session(self, kind: str, spool: list[bytes], new: bytes, sent: bytes) -> None:
        """Three messages that are all sent as `sent`, but for their number; the second goes."""
        self.spool.write_bytes(b"".join(spool))
        server = self.serve("--store", f"mbox:{self.folder.spools}/{{user}}:kind={kind}")
        client = server.client()
        client.user("bob")
        client.pass_("hunter2")
        wanted = [sent.replace(b"\n", b"\r\n") % number for number in (1, 2, 3)]
        sizes = [int(line.split()[1]) for line in client.list()[1]]
        self.assertEqual(sizes, [len(each) for each in wanted])
        self.assertEqual([self.retrieve(client, number) for number in (1, 2, 3)], wanted)
        ids = [line.split()[1] for line in client.uidl()[1]]
        self.assertEqual(len(set(ids)), 3)
        client.dele(2)
        with self.spool.open("ab") as file:
            file.write(new)
        client.quit()
        self.assertEqual(self.spool.read_bytes(), spool[0] + spool[2] + new)
        client = server.client()
        client.user("bob")
        client.pass_("hunter2")
        again = [line.split()[1] for line in client.uidl()[1]]
        self.assertEqual((again[:2], len(again)), ([ids[0], ids[2]], 3))
        client.dele(1)
        client.dele(2)
        client.quit()
        self.assertEqual(self.spool.read_bytes(), new)

    def test_mmdf(self) -> None:
        line = b"\x01\x01\x01\x01\n"
        from_line = mail(1).partition(b"\n")[0] + b"\n"
        message = self.HEADER + b"\n" + self.BODY
        spool = [
            line + from_line + b"Status: RO\n" + message % 1 + line,
            line + message % 2 + line,
            line + b"X-UID: 7\n" + message % 3 + line,
        ]
        self.session("mmdf", spool, line + message % 4 + line, message)

    def test_mboxcl2(self) -> None:
        from_line = mail(1).partition(b"\n")[0] + b"\n"
        header = self.HEADER + b"Content-Length: %d\n\n" % len(self.BODY)
        spool = [from_line + header % number + self.BODY + b"\n" for number in (1, 2, 3, 4)]
        self.session("mboxcl2", spool[:3], spool[3], self.HEADER + b"\n" + self.BODY)


class TLSTests(ServerCase):
    def test_implicit(self) -> None:
        server = self.serve(listen=("tcp:0:interface=127.0.0.1",))
        self.assertTrue((self.folder.state / "self-made.pem").exists())
        server.stop()
        server = self.serve(listen=(TLS.format(state=self.folder.state),))
        client = poplib.POP3_SSL(
            "localhost", server.port, context=self.trusting(), timeout=DEADLINE
        )
        client.user("bob")
        client.pass_("hunter2")
        self.assertEqual(client.stat()[0], 3)
        self.assertNotIn("STLS", client.capa())
        client.quit()

    def test_stls(self) -> None:
        server = self.serve("--stls", "require", "--cleartext", "tls")
        client = server.client()
        self.assertIn("STLS", client.capa())
        self.assertNotIn("USER", client.capa())
        failure = self.assertRaises(poplib.error_proto, client.user, "bob")
        self.assertEqual(failure.args[0], b"-ERR [AUTH] TLS required but not negotiated")
        client.host = "localhost"
        client.stls(self.trusting())
        self.assertNotIn("STLS", client.capa())
        client.user("bob")
        client.pass_("hunter2")
        self.assertEqual(len(client.list()[1]), 3)
        client.quit()
        log = server.stop()
        self.assertIn("reason=tls-required", log)
        self.assertRegex(log, r"login user=\"bob\".*tls=TLSv1\.3")

    def test_the_challenge_stays_valid_after_stls(self) -> None:
        """mpop and fetchmail use that of the greeting (behaviour 10.18)."""
        wire = Wire(self, self.serve().port)
        challenge = re.search(rb"<.*>", wire.line())
        assert challenge
        wire.send(b"STLS\r\n")
        wire.line()
        wire.start_tls(self.trusting())
        digest = hashlib.md5(challenge[0] + b"a shared secret of hers").hexdigest().encode()
        wire.send(b"APOP alice " + digest + b"\r\nQUIT\r\n")
        self.assertTrue(wire.line().startswith(b"+OK alice"))

    def test_octets_behind_stls_are_thrown_away(self) -> None:
        """CVE-2011-0411 and its kin: in one segment, in many forms, and 100 KB of them."""
        server = self.serve()
        for stls in (b"STLS\r\n", b"stls\n", b"sTlS\r\n"):
            for behind in (b"CAPA\r\n", b"USER bob\r\nPASS hunter2\r\n", b"NOOP\r\n" * 17_000):
                wire = Wire(self, server.port)
                wire.line()
                wire.send(stls + behind[:1000])
                self.assertTrue(wire.line().startswith(b"+OK"))
                try:
                    wire.start_tls(self.trusting())
                except (ssl.SSLError, OSError):
                    continue  # some of it came late and was no TLS: closed, as it should be
                wire.send(b"STAT\r\n")
                self.assertEqual(wire.line(), b"-ERR log in first\r\n")
                wire.send(b"QUIT\r\n")
                self.assertIn(b"signing off", wire.rest())
        self.assertNotIn('login user="bob"', server.stop())

    def test_injection_while_an_answer_is_pending(self) -> None:
        """CVE-2021-38542: STLS queued behind a slow command; what follows it is gone too."""
        server = self.serve()
        wire = Wire(self, server.port)
        wire.line()
        wire.send(b"USER bob\r\nPASS wrong\r\nSTLS\r\nUSER bob\r\nPASS hunter2\r\n")
        self.assertTrue(wire.line().startswith(b"+OK"))
        self.assertTrue(wire.line().startswith(b"-ERR [AUTH]"))
        self.assertTrue(wire.line().startswith(b"+OK Begin"))
        wire.start_tls(self.trusting())
        wire.send(b"PASS hunter2\r\n")
        self.assertEqual(wire.line(), b"-ERR USER first\r\n")

    def test_rubbish_on_both_ports(self) -> None:
        """TLS on a plain port, plain text on a TLS port: a close and one line in the log."""
        server = self.serve()
        server.stop()
        server = self.serve(
            listen=("tcp:0:interface=127.0.0.1", TLS.format(state=self.folder.state))
        )
        plain, secure = server.ports
        self.assertRaises(
            (ssl.SSLError, OSError),
            poplib.POP3_SSL,
            "localhost",
            plain,
            context=self.trusting(),
            timeout=DEADLINE,
        )
        server.wait_for("speaks TLS on a plain port")
        wire = Wire(self, secure)
        wire.send(b"USER bob\r\nPASS hunter2\r\n")
        wire.rest()
        server.wait_for("TLS with 127.0.0.1 failed")
        client = server.client(plain)
        client.user("bob")
        client.pass_("hunter2")
        client.quit()
        self.assertNotIn("Traceback", server.stop())

    def test_truncated_tls_deletes_nothing(self) -> None:
        server = self.serve()
        wire = Wire(self, server.port)
        wire.line()
        wire.send(b"STLS\r\n")
        wire.line()
        wire.start_tls(self.trusting())
        wire.send(b"USER bob\r\nPASS hunter2\r\nDELE 1\r\n")
        for _ in range(3):
            self.assertTrue(wire.line().startswith(b"+OK"))
        wire.reset()
        server.wait_for(r"end user=\"bob\"")
        self.assertEqual(self.spool.read_bytes().count(b"Subject: mail"), 3)


class AttackTests(ServerCase):
    def test_bad_input_harms_nobody(self) -> None:
        """Each gets a clear answer or a close; a session beside them goes on (issue: bad input)."""
        server = self.serve()
        beside = server.client()
        beside.user("bob")
        beside.pass_("hunter2")
        for octets in (
            b"\0\0\0\0\r\n",
            b"\xff\xfe\xfd\r\n",
            b"RETR " + b"9" * 200 + b"\r\n",
            b"USER " + b"A" * 1000 + b"\r\n",
            b"USER " + b"A" * 1_000_000 + b"\r\n",
            b"A" * 300_000,
            b"LIST \xd9\xa1\r\nTOP 1 -1\r\nDELE 1_0\r\n",
            b"USER ../x\r\nPASS y\r\n",
            b"USER %n%s\r\nPASS %x\r\n",
            b"USER () { :;}; id\r\nPASS x\r\n",
            b"USER ${HOME}\r\nPASS {0}\r\n",
            b"AUTH PLAIN\r\n*\r\nAUTH PLAIN\r\n====\r\nAUTH PLAIN " + b"A" * 20_000 + b"\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\r\n\r\n\r\n",
        ):
            wire = Wire(self, server.port)
            wire.line()
            try:
                wire.send(octets + b"\r\nQUIT\r\n")
            except (BrokenPipeError, ConnectionResetError):
                pass
            answer = wire.rest()
            for line in answer.splitlines(keepends=True):
                self.assertRegex(line, rb"\A(\+OK|-ERR|\+ )[\x20-\x7e]*\r\n\Z")
            for leak in (b"Traceback", b"Error:", b"popdrop/", b"%n", b"AAAA", b"root"):
                self.assertNotIn(leak, answer)
            beside.noop()
        self.assertEqual(beside.stat()[0], 3)
        beside.quit()
        log = server.stop()
        self.assertNotIn("Traceback", log)

    def test_log_injection_and_secrets(self) -> None:
        """One escaped line for a hostile name; no password and no digest anywhere."""
        server = self.serve()
        wire = Wire(self, server.port)
        challenge = re.search(rb"<.*>", wire.line())
        assert challenge
        digest = hashlib.md5(challenge[0] + b"a shared secret of hers").hexdigest()
        response = b64encode(b"\0x\rroot logged in\x1b[2J\0s3cr3t-one")
        wire.send(b"AUTH PLAIN " + response + b"\r\n")
        wire.send(b"USER bob\r\nPASS s3cr3t-two\r\n")
        wire.send(b"APOP alice " + digest.encode() + b"\r\nQUIT\r\n")
        self.assertIn(b"signing off", wire.rest())
        log = server.stop()
        self.assertIn(r"x\x0droot", log.replace("\\\\", "\\"))
        for secret in ("s3cr3t", digest, "hunter2", "a shared secret", "\x1b"):
            self.assertNotIn(secret, log)

    def test_half_read_pipelines_cost_little_memory(self) -> None:
        """A million commands from a client that reads nothing: it is not read from."""
        server = self.serve()
        wire = Wire(self, server.port)
        wire.send(b"USER bob\r\nPASS hunter2\r\n")
        for _ in range(3):
            wire.line()
        before = self.memory(server)
        wire.socket.setblocking(False)
        sent = 0
        for _ in range(2000):
            try:
                sent += wire.socket.send(b"LIST\r\n" * 1000)
            except BlockingIOError:
                break
        other = server.client()
        self.assertIn("UIDL", other.capa())
        self.assertLess(self.memory(server) - before, 32 << 20)

    def test_no_core_file(self) -> None:
        """It would hold passwords and the key."""
        before = resource.getrlimit(resource.RLIMIT_CORE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_CORE, before)
        resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
        server = self.serve()
        found, _ = resource.prlimit(server.process.pid, resource.RLIMIT_CORE)
        self.assertEqual(found, 0)

    def memory(self, server: Twistd) -> int:
        """Resident octets of the server."""
        with open(f"/proc/{server.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def test_pipelined_retrs_in_order_for_a_slow_reader(self) -> None:
        """100 RETRs of 200 KB unread, then read: all there, in order (behaviour 10.22)."""
        body = b"".join(b"%06d\n" % i for i in range(30_000))
        self.folder.spool("bob", mail(1, body))
        server = self.serve()
        wire = Wire(self, server.port)
        wire.send(b"USER bob\r\nPASS hunter2\r\n" + b"RETR 1\r\n" * 100 + b"QUIT\r\n")
        wire.socket.shutdown(socket.SHUT_WR)
        for _ in range(3):
            wire.line()
        first: list[bytes] | None = None
        for _ in range(100):
            rows = wire.lines()
            first = first or rows
            self.assertEqual(rows, first)
        assert first is not None
        self.assertEqual(len(first), 30_000 + 7)
        self.assertIn(b"signing off", wire.rest())


class SignalTests(ServerCase):
    def test_hangup_opens_the_session_log_anew(self) -> None:
        """As logrotate wants it; the session beside it goes on."""
        path = self.folder.path / "sessions.log"
        server = self.serve("--session-log", f"plain:{path}", "--session-log", "plain")
        client = server.client()
        client.user("bob")
        client.pass_("hunter2")
        server.wait_for('login user="bob"')
        path.rename(self.folder.path / "sessions.log.1")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("opening the session logs anew")
        self.assertEqual(client.stat()[0], 3)
        client.quit()
        server.wait_for('end user="bob"')
        server.stop()
        self.assertIn("login user", (self.folder.path / "sessions.log.1").read_text())
        self.assertIn("end user", path.read_text())

    def test_a_stop_tells_idle_clients(self) -> None:
        server = self.serve()
        wire = Wire(self, server.port)
        wire.send(b"USER bob\r\nPASS hunter2\r\nDELE 1\r\n")
        for _ in range(4):
            wire.line()
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(wire.rest(), b"-ERR [SYS/TEMP] server is shutting down\r\n")
        server.stop()
        # Twisted ends itself by the signal that it was sent.
        self.assertEqual(server.process.returncode, -signal.SIGTERM)
        self.assertEqual(self.spool.read_bytes().count(b"Subject: mail"), 3)


class OptionTests(ServerCase):
    def refused(self, *options: str) -> str:
        """The one line that a wrong option gives."""
        base = ["-n", "--pidfile", "", "popdrop", "--state-dir", str(self.folder.state)]
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from twisted.scripts.twistd import run; run()",
                *base,
                *options,
            ],
            cwd=self.folder.path,
            env=environment(self.folder.path),
            capture_output=True,
            timeout=DEADLINE,
            check=False,
            text=True,
        )
        self.assertNotEqual(done.returncode, 0, done.stdout)
        told = [line for line in done.stderr.splitlines() if line]
        self.assertEqual(len(told), 1, done.stderr + done.stdout)
        self.assertNotIn("Traceback", done.stderr + done.stdout)
        return told[0]

    def test_wrong_options(self) -> None:
        """One line on standard error and a status that is not 0; the rest is in `test_tap`."""
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        port = taken.getsockname()[1]
        for options, words in (
            (("--nonsense",), "nonsense"),
            (("--cleartext", "sometimes"), "--cleartext"),
            (("--listen", f"tcp:{port}:interface=127.0.0.1"), f"--listen tcp:{port}"),
            (("--auth", "accounts:/nonexistent/accounts.db"), "/nonexistent/accounts.db"),
        ):
            base = () if options[0] == "--listen" else ("--listen", "tcp:0:interface=127.0.0.1")
            self.assertIn(words, self.refused(*base, *options))
