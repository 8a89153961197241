"""POP-before-SMTP: logins through a proxy, and what a real Postfix and a real Exim make of them."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import select
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from hashlib import md5
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest

from popdrop import certs
from popdrop.ops.grants import Grants
from tests.end_to_end import mtas
from tests.end_to_end.harness import DEADLINE, ROOT, Twistd, command, environment
from tests.end_to_end.test_proxy import PLAIN, PROXIES, TLS, HAProxy
from tests.end_to_end.test_server import ServerCase, Wire
from tests.end_to_end.test_workers import SERVES, may_run, shown

CLIENT = "192.0.2.7"
OTHER = "192.0.2.8"
SIX = "2001:db8::7"
PORT = r"--relay {}\S*: port (\d+): who may relay"
LOOPBACK = "tcp:0:interface=127.0.0.1"
HOWTO = ROOT / "docs/howto/pop-before-smtp.rst"


def header(client: str) -> bytes:
    """What a proxy says of a client."""
    family, ours = ("TCP6", "2001:db8::1") if ":" in client else ("TCP4", "192.0.2.1")
    return f"PROXY {family} {client} {ours} 40112 110\r\n".encode()


def unskipped(call: Callable[[], Any]) -> Any:
    """What `call` gives; a Debian package that is missing skips the test."""
    try:
        return call()
    except mtas.Missing as missing:
        raise SkipTest(str(missing)) from None


class RelayCase(ServerCase):
    def relay(self, *options: str, listen: tuple[str, ...] = (PLAIN,)) -> Twistd:
        """A server behind a proxy, with both kinds of table."""
        server = self.serve(
            *PROXIES,
            *("--cleartext", "always"),
            *("--relay", f"socketmap:{LOOPBACK}", "--relay", f"tcp-table:{LOOPBACK}"),
            *options,
            listen=listen,
        )
        ports = {kind: server.told(PORT.format(kind))[1] for kind in ("socketmap", "tcp-table")}
        self.tables = [
            f"socketmap:inet:127.0.0.1:{ports['socketmap']}:popdrop",
            f"tcp:127.0.0.1:{ports['tcp-table']}",
        ]
        return server

    def login(self, server: Twistd, client: str = CLIENT, words: bytes = b"") -> Wire:
        """A session of bob's, or of whoever says `words`, from this address."""
        wire = Wire(self, server.port)
        wire.send(header(client))
        self.assertEqual(wire.line()[:3], b"+OK")
        wire.send(words or b"USER bob\r\nPASS hunter2\r\n")
        for _ in range(1 if words else 2):
            self.assertEqual(wire.line()[:3], b"+OK")
        return wire

    def visit(self, server: Twistd, client: str = CLIENT) -> None:
        wire = self.login(server, client)
        wire.send(b"QUIT\r\n")
        wire.rest()

    def postmap(self, key: str, table: str) -> tuple[str, int]:
        """What Postfix' own client is told, and its exit status: 0 found, 1 not, or an error."""
        program = unskipped(lambda: mtas.find("postfix", "usr/sbin/postmap"))
        root = program.parents[2]
        settings = self.folder.path / "postfix"
        if not settings.exists():
            settings.mkdir()
            (settings / "main.cf").write_text(
                f"compatibility_level = 3.6\nshlib_directory = {root}/usr/lib/postfix\n"
                # Two accounts of nobody's, which Debian always has.
                f"meta_directory = {settings}\nmail_owner = list\nsetgid_group = uucp\n"
            )
        done = subprocess.run(
            [str(program), "-c", str(settings), "-q", key, table],
            env={"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": f"{root}/usr/lib/postfix"},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        return done.stdout.strip() or done.stderr.strip(), done.returncode

    def rows(self, path: Path) -> list[str]:
        """The clients in Exim's file, those that never may first."""
        found = re.findall(r'(?m)^"?([^#"\n]+?)"?: \d+$', path.read_text())
        return [str(each) for each in found]

    def may(self, client: str) -> bool:
        """What both tables say, which must be the same."""
        told = [self.postmap(client, table) for table in self.tables]
        self.assertIn(told, ([("OK", 0)] * 2, [("", 1)] * 2))
        return told[0][1] == 0


class WindowTests(RelayCase):
    def test_the_clients_own_address(self) -> None:
        """That of the PROXY header, and no other; the proxy's own never."""
        server = self.relay()
        self.visit(server)
        self.visit(server, SIX)
        wanted = {CLIENT: True, SIX: True, OTHER: False, "127.0.0.1": False, "2001:db8::8": False}
        self.assertEqual({client: self.may(client) for client in wanted}, wanted)
        self.assertFalse(self.may("mail.example.org"))

    def test_known_before_the_client_is_told(self) -> None:
        """Each time: by the moment of `+OK` the MTA lets it send."""
        server = self.relay()
        port = int(self.tables[1].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as mta:
            answers = mta.makefile("rb")
            for number in range(100):
                client = f"198.51.100.{number}"
                mta.sendall(f"get {client}\n".encode())
                self.assertEqual(answers.readline()[:4], b"500 ")
                wire = self.login(server, client)
                mta.sendall(f"get {client}\n".encode())
                self.assertEqual(answers.readline(), b"200 OK\n")
                wire.send(b"QUIT\r\n")
                wire.rest()
            answers.close()

    def test_real_proxy(self) -> None:
        """HAProxy, version 1 and 2, before STLS's port and that of TLS: who its client is, may.

        Here everybody is of loopback, which never may; so HAProxy is told by such a header, too.
        """
        certs.self_made(str(self.folder.state), "localhost")
        server = self.relay(listen=(PLAIN, TLS.format(state=self.folder.state)))
        plain, tls = server.ports
        words = ("send-proxy", "send-proxy-v2")
        pairs = [(port, word) for port in (plain, tls) for word in words]
        proxy = HAProxy(self, *pairs, bind="accept-proxy")
        context = self.trusting()
        context.check_hostname = False
        clients = [CLIENT, SIX, "192.0.2.9", "2001:db8::9"]
        for number, (port, client) in enumerate(zip(proxy.ports, clients, strict=True)):
            wire = Wire(self, port)
            wire.send(header(client))
            if number < 2:
                self.assertEqual(wire.line()[:3], b"+OK")
                wire.send(b"STLS\r\n")
                self.assertEqual(wire.line()[:3], b"+OK")
            wire.start_tls(context)
            wire.send(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")
            self.assertIn(b"+OK bob has", wire.rest())
        self.assertEqual([self.may(client) for client in clients], [True] * 4)
        wire = Wire(self, HAProxy(self, (plain, "send-proxy")).ports[0])
        wire.send(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")
        self.assertIn(b"+OK bob has", wire.rest())
        found = {grant.client for grant in Grants(str(self.folder.state)).all()}
        self.assertEqual(found, set(clients))

    def test_every_mechanism(self) -> None:
        """APOP and AUTH open it as USER/PASS does (SIMS: alike); a failed login does not."""
        server = self.relay()
        wire = Wire(self, server.port)
        wire.send(header("192.0.2.21"))
        challenge = re.search(rb"<[^>]+>", wire.line())
        assert challenge is not None
        digest = md5(challenge[0] + b"a shared secret of hers", usedforsecurity=False).hexdigest()
        wire.send(b"APOP alice " + digest.encode() + b"\r\n")
        self.assertEqual(wire.line()[:3], b"+OK")
        plain = b64encode(b"\0bob\0hunter2")
        self.login(server, "192.0.2.22", b"AUTH PLAIN " + plain + b"\r\n")
        wrong = Wire(self, server.port)
        wrong.send(header("192.0.2.23") + b"USER bob\r\nPASS wrong\r\nQUIT\r\n")
        self.assertIn(b"-ERR [AUTH]", wrong.rest())
        self.assertEqual(
            [self.may(f"192.0.2.{n}") for n in (21, 22, 23)],
            [True, True, False],
        )

    def test_it_ends(self) -> None:
        """For who asks, and in the file for who reads that."""
        path = self.folder.path / "relay.exim"
        server = self.relay("--relay-minutes", "0.5", "--relay", f"file:{path}")
        self.visit(server)
        self.assertTrue(self.may(CLIENT))
        self.assertIn(CLIENT, path.read_text())
        end = time.monotonic() + DEADLINE
        while CLIENT in path.read_text():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.1)
        self.assertFalse(self.may(CLIENT))

    def test_refused_at_the_start(self) -> None:
        """In one line, with what to do; no port stays behind, and no folder of a demo."""
        taken = self.folder.path / "taken"
        (self.folder.path / "open").mkdir(mode=0o777)
        (self.folder.path / "open").chmod(0o777)
        self.serve("--relay", f"socketmap:unix:{taken}", listen=("tcp:0:interface=127.0.0.1",))
        state = ["--state-dir", str(self.folder.state)]
        for words, said in (
            (["--relay", f"file:{self.folder.path}/none/relay"], "name a file in a folder"),
            (["--relay", f"socketmap:unix:{taken}"], "another server has it"),
            (["--demo", "--relay", f"socketmap:unix:{taken}"], "another server has it"),
            (
                ["--relay", f"socketmap:{LOOPBACK}", "--state-dir", f"{self.folder.path}/open"],
                "group or others may write",
            ),
        ):
            done = subprocess.run(
                [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
                + ["-n", "--pidfile", "", "popdrop", *words]
                + ([] if "--demo" in words else ["--listen", "tcp:0:interface=127.0.0.1"])
                + ([] if "--demo" in words else ["--auth", f"accounts:{self.folder.accounts}"])
                + ([] if {"--state-dir", "--demo"} & {*words} else state),
                env=environment(self.folder.path) | {"TMPDIR": str(self.folder.path)},
                cwd=self.folder.path,
                capture_output=True,
                text=True,
                timeout=DEADLINE,
            )
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertRegex(done.stderr, rf"(?m)^popdrop: --relay.*{said}.*$")
            self.assertNotIn("Traceback", done.stdout + done.stderr)
            left = [each.name for each in self.folder.path.iterdir() if "demo" in each.name]
            self.assertEqual(left, [])

    def test_local_flood(self) -> None:
        """Whoever asks without end gets answers without end, and POP3 goes on beside it."""
        server = self.relay()
        port = int(self.tables[1].rpartition(":")[2])
        floods = []
        for _ in range(20):
            flood = socket.create_connection(("127.0.0.1", port), DEADLINE)
            self.addCleanup(flood.close)
            flood.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(50):
                    flood.send(b"get x\n" * 10_000)
            floods.append(flood)
        self.visit(server)
        self.assertTrue(self.postmap(CLIENT, self.tables[0]) == ("OK", 0))
        unread = [select.select([flood], [], [], DEADLINE)[0] for flood in floods]
        self.assertEqual([len(each) for each in unread], [1] * 20)
        self.assertNotIn("Traceback", server.stop())

    def test_a_restart_agrees(self) -> None:
        server = self.relay("--relay-minutes", "1440")
        self.visit(server)
        server.kill()
        server = self.relay("--relay-minutes", "1440")
        self.assertTrue(self.may(CLIENT))

    def test_damaged(self) -> None:
        """Logins go on; to the MTA it is a temporary failure, never OK and never no."""
        server = self.relay()
        self.visit(server)
        (self.folder.state / "relay.db").chmod(0o644)
        end = time.monotonic() + DEADLINE
        while (told := self.postmap(CLIENT, self.tables[1]))[1] == 0:
            self.assertLess(time.monotonic(), end)  # a look at the mode holds for a second
        self.assertNotEqual(told, ("", 1))
        status = self.postmap(CLIENT, self.tables[0])
        self.assertNotIn(status, (("OK", 0), ("", 1)))
        self.visit(server, OTHER)
        self.assertIn("relay.db: group or others have rights; chmod 600", server.stop())

    def test_unix_socket(self) -> None:
        path = self.folder.path / "relay"
        server = self.serve(
            *PROXIES,
            *("--cleartext", "always", "--relay", f"socketmap:unix:{path}", "--relay-ipv6", "64"),
            listen=(PLAIN,),
        )
        self.visit(server, SIX)
        table = f"socketmap:unix:{path}:popdrop"
        self.assertEqual(self.postmap("2001:db8::1:2:3:4", table), ("OK", 0))
        self.assertEqual(self.postmap("2001:db8:0:1::7", table), ("", 1))
        server.stop()
        self.assertFalse(path.exists())

    def test_the_command(self) -> None:
        server = self.relay()
        self.visit(server)

        def popdrop(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "popdrop", "relay", *words]
                + ["--state-dir", str(self.folder.state)],
                env=environment(self.folder.path),
                cwd=self.folder.path,
                capture_output=True,
                text=True,
                timeout=DEADLINE,
            )

        self.assertRegex(popdrop("list").stdout, rf"\Aclient={CLIENT} until=\S+Z account=bob\n\Z")
        rows = json.loads(popdrop("list", "--json").stdout)
        self.assertEqual([(row["client"], row["account"]) for row in rows], [(CLIENT, "bob")])
        self.assertEqual(popdrop("end", CLIENT).returncode, 0)
        self.assertFalse(self.may(CLIENT))
        again = popdrop("end", CLIENT)
        self.assertEqual((again.returncode, again.stdout), (1, ""))
        self.assertIn("may not relay now", again.stderr)
        self.assertEqual(popdrop("list").stdout, "")


class WorkerTests(RelayCase):
    def test_all_open_it_and_one_is_asked(self) -> None:
        path = self.folder.path / "relay.exim"
        server = self.relay("--workers", "2", "--relay", f"file:{path}")
        clients = [f"192.0.2.{number}" for number in range(20, 36)]
        for client in clients:
            self.visit(server, client)
        self.assertEqual([self.may(client) for client in clients], [True] * len(clients))
        self.assertEqual(self.rows(path)[1:], clients)
        served = {line for line in server.log if re.search(SERVES, line)}
        self.assertEqual(len(served), 2)

    def test_rights_given_away(self) -> None:
        """As root with --uid, behind a start without: nothing in the state folder is root's."""
        if not may_run(self.folder):
            raise SkipTest("needs Debian package util-linux, and root's rights")
        user = pwd.getpwnam("games")
        server = self.relay()  # as root, on loopback: all that it makes is root's
        self.visit(server, OTHER)
        deleted = self.login(server)
        deleted.send(b"DELE 1\r\nQUIT\r\n")
        self.assertEqual([deleted.line()[:3], deleted.line()[:3]], [b"+OK"] * 2)
        server.stop()
        self.assertEqual((self.folder.state / "relay.db").stat().st_uid, 0)
        self.folder.path.chmod(0o711)
        for path in (self.folder.spools, self.spool):
            os.chown(path, user.pw_uid, user.pw_gid)
        around = shown(self.folder)

        class Rootless(Twistd):
            def around(self) -> list[str]:
                return around

        words = command(
            self.folder,
            *PROXIES,
            *("--cleartext", "always", "--relay", f"socketmap:{LOOPBACK}", "--min-uid", "1"),
            listen=(PLAIN,),
            daemon=("--uid", str(user.pw_uid), "--gid", str(user.pw_gid)),
        )
        server = Rootless.__new__(Rootless)
        server.folder = self.folder
        server.begin(self, words, self.folder.path)
        server.ports = [int(server.wait_for(r"POP3 on \S+ port (\d+)")[1])]
        port = server.told(PORT.format("socketmap"))[1]
        deleting = self.login(server, CLIENT)
        deleting.send(b"DELE 1\r\nQUIT\r\n")
        self.assertEqual([deleting.line()[:3], deleting.line()[:3]], [b"+OK"] * 2)
        table = f"socketmap:inet:127.0.0.1:{port}:popdrop"
        self.assertEqual(self.postmap(CLIENT, table), ("OK", 0))
        self.assertEqual(self.postmap(OTHER, table), ("OK", 0))
        for path in (self.folder.state, *self.folder.state.rglob("*")):
            self.assertEqual(path.stat().st_uid, user.pw_uid, path)
        server.stop()


class Relaying(mtas.Postfix):
    """A Postfix with an SMTP server on a Unix socket, which believes XCLIENT."""

    table = ""

    def _write(self, package: Path) -> None:
        super()._write(package)
        lines = re.search(r"(?ms)^   smtpd_relay_restrictions =\n(.*?)\n\n", HOWTO.read_text())
        assert lines is not None
        rules = lines[1].replace("socketmap:inet:127.0.0.1:10110:popdrop", self.table)
        if rules == lines[1]:
            raise AssertionError("the manual names another table")
        with (self._home / "conf/main.cf").open("a") as file:
            file.write(
                f"smtpd_relay_restrictions =\n{rules}\n"
                "inet_protocols = all\nsmtpd_authorized_xclient_hosts = 127.0.0.1\n"
                "local_recipient_maps =\n"
                "smtpd_recipient_restrictions =\nsmtpd_client_connection_count_limit = 0\n"
            )
        with (self._home / "conf/master.cf").open("a") as file:
            file.write("talk unix n - n - - smtpd\n")

    def answer(self, client: str, recipient: str = "somebody@elsewhere.example") -> bytes:
        """What it says to this recipient, when the client is this one."""
        with socket.socket(socket.AF_UNIX) as talk:
            talk.settimeout(DEADLINE)
            talk.connect(str(self._home / "queue/public/talk"))
            file = talk.makefile("rb")

            def said(words: str) -> bytes:
                if words:
                    talk.sendall(words.encode() + b"\r\n")
                while (line := file.readline())[3:4] == b"-":
                    pass
                return line

            said("")
            said("EHLO client.example.org")
            address = f"IPV6:{client}" if ":" in client else client
            for words, code in (
                (f"XCLIENT NAME=[UNAVAILABLE] ADDR={address}", b"220"),
                ("EHLO client.example.org", b"250"),
                ("MAIL FROM:<bob@example.org>", b"250"),
            ):
                if (line := said(words))[:3] != code:
                    raise AssertionError(f"{words}: {line!r}\n{self._said()}")
            line = said(f"RCPT TO:<{recipient}>")
            said("QUIT")
            file.close()
        return line


class PostfixTests(RelayCase):
    def test_relays_for_two_minutes(self) -> None:
        """The rules of the manual: denied, then allowed, put off while nobody can say."""
        server = self.relay()
        for table in self.tables:
            kind = type("Kind", (Relaying,), {"table": table})
            postfix = unskipped(lambda: kind(self, mtas.Site(self)))  # noqa: B023
            self.assertEqual(postfix.answer(OTHER)[:3], b"554")
            self.assertEqual(postfix.answer(SIX)[:3], b"554")
            self.visit(server, OTHER)
            self.visit(server, SIX)
            self.assertEqual(postfix.answer(OTHER)[:3], b"250")
            self.assertEqual(postfix.answer(SIX)[:3], b"250")
            self.assertEqual(postfix.answer(CLIENT)[:3], b"554")
            for client in (OTHER, SIX):
                self.assertTrue(Grants(str(self.folder.state)).end(client))
        server.stop()
        self.assertEqual(postfix.answer(OTHER)[:1], b"4")
        self.assertEqual(postfix.answer(OTHER, "postmaster@example.org")[:3], b"250")


class EximTests(RelayCase):
    def exim(self, path: Path) -> Callable[[str], bytes]:
        """A real Exim with the ACL of the manual: what it says to a client's RCPT."""
        site = mtas.Site(self)
        exim = unskipped(lambda: mtas.Exim(self, site))
        rule = re.search(r"(?m)^   accept condition = .*\n  .*$", HOWTO.read_text())
        assert rule is not None
        acl = rule[0].replace("/run/popdrop/relay.exim", str(path))
        self.assertNotEqual(acl, rule[0])
        configuration = site.home / "exim.conf"
        configuration.write_text(
            configuration.read_text().replace(
                "begin routers",
                "acl_smtp_rcpt = check\nbegin acl\ncheck:\n"
                f"{acl}\n  deny message = relay not permitted\nbegin routers",
            )
        )

        def answer(client: str) -> bytes:
            talk = b"EHLO x.example\r\nMAIL FROM:<bob@example.org>\r\n"
            talk += b"RCPT TO:<somebody@elsewhere.example>\r\nQUIT\r\n"
            said = exim._exim("-bh", client, octets=talk)
            rows = re.findall(rb"(?m)^(\d{3} .*)$", said)
            return bytes(rows[-2]).rstrip()

        return answer

    def test_relays_for_two_minutes(self) -> None:
        folder = self.folder.path / "out"
        folder.mkdir()
        path = folder / "relay.exim"
        for each in (self.folder.path, folder):
            each.chmod(0o755)
        server = self.relay("--relay", f"file:{path}")
        answer = self.exim(path)
        self.assertEqual(answer(CLIENT), b"550 relay not permitted")
        self.visit(server)
        self.visit(server, SIX)
        self.assertEqual(self.rows(path), [f"{PROXIES[1]}/32", CLIENT, SIX])
        self.assertEqual(answer(CLIENT)[:3], b"250")
        self.assertEqual(answer(SIX)[:3], b"250")
        self.assertEqual(answer(OTHER), b"550 relay not permitted")
        server.kill()  # nobody is left to take anything out of the file
        past = re.sub(r"(?m): \d+$", f": {int(time.time()) - 1}", path.read_text())
        path.write_text(past)
        self.assertEqual(answer(CLIENT), b"550 relay not permitted")
        path.unlink()
        self.assertEqual(answer(CLIENT), b"550 relay not permitted")
