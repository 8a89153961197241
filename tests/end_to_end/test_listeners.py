"""Listeners of every kind, each with rules of its own, through real sockets."""

from __future__ import annotations

import json
import os
import poplib
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from typing import Any

from twisted.trial.unittest import SkipTest

from popdrop import certs
from tests.end_to_end.harness import DEADLINE, Twistd, command, environment
from tests.end_to_end.test_server import ServerCase, Wire
from tests.test_listeners import has_ipv6

OWN = "127.77.{}.{}".format(*divmod(os.getpid() % 2**16, 256))
"""An address of this process: systemd-socket-activate is given a port, and finds none itself."""

PASS_ON = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
names = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "pop3"}
os.execve(sys.argv[2], sys.argv[2:], os.environ | names)
"""


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


class KindCase(ServerCase):
    """Sessions over any connection, and servers on sockets of systemd's."""

    def setUp(self) -> None:
        super().setUp()
        self.pem = f"{self.folder.state}/self-made.pem"
        certs.self_made(str(self.folder.state), "localhost")

    def session(self, connection: socket.socket, context: ssl.SSLContext | None = None) -> None:
        """Read mail and QUIT, with TLS from the first octet where a context is given."""
        connection.settimeout(DEADLINE)
        if context is not None:
            connection = context.wrap_socket(connection, server_hostname="localhost")
        with connection, connection.makefile("rb") as file:
            self.assertEqual(file.readline()[:3], b"+OK")
            connection.sendall(b"USER bob\r\nPASS hunter2\r\nSTAT\r\nQUIT\r\n")
            answers = [file.readline() for _ in range(4)]
            self.assertEqual([answer[:3] for answer in answers], [b"+OK"] * 4)
            self.assertEqual(answers[2][:6], b"+OK 3 ")

    def upgraded(self, connection: socket.socket) -> ssl.SSLSocket:
        """STLS, and the session under it is tried by `session` without a greeting: not here."""
        connection.settimeout(DEADLINE)
        with connection.makefile("rb") as file:
            self.assertEqual(file.readline()[:3], b"+OK")
            connection.sendall(b"STLS\r\n")
            self.assertEqual(file.readline()[:3], b"+OK")
        secured = self.trusting().wrap_socket(connection, server_hostname="localhost")
        secured.sendall(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")
        with secured, secured.makefile("rb") as file:
            self.assertEqual([file.readline()[:3] for _ in range(3)], [b"+OK"] * 3)
        return secured

    def activated(
        self, addresses: tuple[str, ...], *listen: str, options: tuple[str, ...] = ()
    ) -> None:
        """Under `systemd-socket-activate`, which waits for a client and then becomes the server."""
        program = shutil.which("systemd-socket-activate")
        if program is None:
            raise SkipTest("needs the Debian package systemd")
        variables = environment(self.folder.path)
        passed = [word for name in variables for word in ("-E", name)]
        passed += [word for address in addresses for word in ("-l", address)]
        passed += ["--fdname", ":".join(["pop3"] * len(addresses))]
        words = command(self.folder, "--cleartext", "always", *options, listen=listen)
        child = subprocess.Popen(
            [program, *passed, *words],
            cwd=self.folder.path,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert child.stderr is not None
        self.addCleanup(child.stderr.close)
        self.addCleanup(child.wait, DEADLINE)
        self.addCleanup(child.kill)
        for _ in addresses:
            self.assertIn(b"Listening on", child.stderr.readline())
        threading.Thread(target=child.stderr.read, daemon=True).start()

    def free_ports(self, host: str, count: int = 1) -> list[int]:
        """Different ones."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        probes = [socket.create_server((host, 0), family=family) for _ in range(count)]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        return ports


class KindTests(KindCase):
    """Every kind of listener, on every family of addresses that this machine has."""

    def test_by_port(self) -> None:
        rows = [
            ("tcp:0:interface=127.0.0.1", ("127.0.0.1",), False),
            (f"ssl:0:privateKey={self.pem}:interface=127.0.0.1", ("127.0.0.1",), True),
            (f"tls:{self.pem}:0:interface=127.0.0.1", ("127.0.0.1",), True),
        ]
        if has_ipv6():
            rows += [
                ("tcp:0:interface=\\:\\:1", ("::1",), False),
                ("tcp6:0:interface=\\:\\:1", ("::1",), False),
                (f"ssl:0:privateKey={self.pem}:interface=\\:\\:1", ("::1",), True),
                (f"tls:{self.pem}:0:interface=\\:\\:1", ("::1",), True),
            ]
        server = self.serve(listen=tuple(text for text, _, _ in rows))
        for (_, hosts, secured), port in zip(rows, server.ports, strict=True):
            for host in hosts:
                there = socket.create_connection((host, port), DEADLINE)
                self.session(there, self.trusting() if secured else None)
                if not secured:
                    self.upgraded(socket.create_connection((host, port), DEADLINE))

    def test_unix(self) -> None:
        path = self.folder.path / "pop3"
        self.serve("--cleartext", "always", listen=(f"unix:{path}:mode=600",))
        self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        for use in (self.session, self.upgraded):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
            use(connection)

    # Sockets of systemd's

    def test_systemd(self) -> None:
        for host, domain in ((OWN, "INET"), ("::1", "INET6")):
            if domain == "INET6" and not has_ipv6():
                continue
            (port,) = self.free_ports(host)
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self.activated((where,), f"systemd:domain={domain}:index=0")
            self.session(socket.create_connection((host, port), DEADLINE))
            self.upgraded(socket.create_connection((host, port), DEADLINE))

    def test_systemd_with_tls(self) -> None:
        (port,) = self.free_ports(OWN)
        self.activated((f"{OWN}:{port}",), f"systemd:domain=INET:index=0:tls={self.pem}")
        self.session(socket.create_connection((OWN, port), DEADLINE), self.trusting())

    def test_systemd_unix(self) -> None:
        path = f"{self.folder.path}/pop3"
        self.activated((path,), "systemd:domain=UNIX:name=pop3")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            self.session(connection)

    def test_systemd_unix_is_left_alone(self) -> None:
        """No right to the path is needed; mode, path and socket are as before when it ends."""
        made, moved = (self.folder.path / name for name in ("made", "moved"))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(made))
            made.chmod(0o620)
            listening.listen(7)
            made.rename(moved)  # nothing can be done to what is not there
            for options in ((), ("--workers", "2")):
                server = self.on_socket(listening, "systemd:domain=UNIX:name=pop3", *options)
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(moved))
                    self.session(connection)
                server.send_signal(signal.SIGTERM)
                self.assertEqual(server.wait(DEADLINE), -signal.SIGTERM)
                made.touch()
            self.assertEqual(stat.S_IMODE(moved.stat().st_mode), 0o620)
            self.assertEqual(stat.S_IMODE(made.stat().st_mode) & 0o111, 0)
            with socket.socket(socket.AF_UNIX) as waiting:
                waiting.connect(str(moved))
                listening.accept()[0].close()

    def on_socket(self, listening: socket.socket, text: str, *options: str) -> Any:
        """A server to which this socket is passed as systemd does it: sd_listen_fds(3)."""
        words = command(self.folder, "--cleartext", "always", *options, listen=(text,))
        if os.geteuid() == 0:
            words[words.index("popdrop") : words.index("popdrop")] = ["--uid", "0", "--gid", "0"]
        child = subprocess.Popen(
            [sys.executable, "-c", PASS_ON, str(listening.fileno()), *words],
            cwd=self.folder.path,
            env=environment(self.folder.path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
        )
        self.addCleanup(child.wait, DEADLINE)
        self.addCleanup(child.kill)
        return child

    # Standard input

    def single(self, *options: str) -> list[str]:
        """The words for one session on standard input and output."""
        log = ("--logfile", f"{self.folder.path}/twistd.log")
        listen = ("stdio:",)
        words = ("--session-log", f"json:{self.folder.path}/log", *options)
        return command(self.folder, *words, listen=listen, daemon=log)

    def ended(self) -> list[dict[str, Any]]:
        rows = map(json.loads, (self.folder.path / "log").read_text().splitlines())
        return [row for row in rows if row["event"] == "end"]

    def inetd(self, words: list[str], host: str, use: Any) -> int:
        """As inetd's `nowait`: the connection is standard input, output and error."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as door:
            client = socket.create_connection(door.getsockname()[:2], DEADLINE)
            accepted, _ = door.accept()
        with accepted:
            child = subprocess.Popen(
                words,
                stdin=accepted,
                stdout=accepted,
                stderr=accepted,
                cwd=self.folder.path,
                env=environment(self.folder.path),
            )
        self.addCleanup(child.wait, DEADLINE)
        self.addCleanup(child.kill)
        port = client.getsockname()[1]
        use(client)
        self.assertEqual(child.wait(DEADLINE), 0)
        self.assertEqual(self.ended()[-1]["port"], port)
        self.assertEqual(self.ended()[-1]["address"], host)
        return port

    def test_inetd(self) -> None:
        """The client's address is known, STLS works, and the process ends with its session."""
        self.inetd(self.single(), "127.0.0.1", self.session)
        self.inetd(self.single("--stls", "require"), "127.0.0.1", self.upgraded)
        if has_ipv6():
            self.inetd(self.single(), "::1", self.session)

    def test_tcpserver(self) -> None:
        program = shutil.which("tcpserver")
        if program is None:
            raise SkipTest("needs the Debian package ucspi-tcp")
        child = subprocess.Popen(
            [program, "-1", "-RHl0", "127.0.0.1", "0", *self.single()],
            cwd=self.folder.path,
            env=environment(self.folder.path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.wait, DEADLINE)
        self.addCleanup(child.kill)
        port = int(child.stdout.readline())
        for use in (self.session, self.upgraded, self.session):
            use(socket.create_connection(("127.0.0.1", port), DEADLINE))

    def test_pipes(self) -> None:
        """As under sslserver: no socket, no STLS, and nobody is local."""
        done = subprocess.run(
            self.single("--cleartext", "local"),
            input=b"CAPA\r\nUSER bob\r\nQUIT\r\n",
            stdout=subprocess.PIPE,
            cwd=self.folder.path,
            env=environment(self.folder.path),
            timeout=DEADLINE,
            check=True,
        )
        rows = done.stdout.split(b"\r\n")
        self.assertNotIn(b"STLS", rows)
        self.assertEqual([row[:4] for row in rows[-4:-1]], [b".", b"-ERR", b"+OK "])
