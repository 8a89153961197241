"""`haproxy:` listeners: behind a real HAProxy, and before somebody who plays one."""

from __future__ import annotations

import json
import poplib
import re
import shutil
import socket
import ssl
import struct
import subprocess
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest

from popdrop import certs
from tests.end_to_end.harness import DEADLINE, Twistd, environment
from tests.end_to_end.supervised import Door, Served
from tests.end_to_end.test_server import ServerCase, Wire
from tests.test_listeners import has_ipv6

HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
CLIENT = "127.0.0.9"
"""Where clients come from, so that they are told from the proxy on 127.0.0.1."""
PROXIES = ("--trusted-proxies", "127.0.0.1")
PLAIN = "haproxy:tcp:0:interface=127.0.0.1"
SIX = "haproxy:tcp6:0:interface=127.0.0.1"
TLS = "haproxy:tls:{state}/self-made.pem:0:interface=127.0.0.1"


def where(host: str, port: int) -> str:
    """As HAProxy writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class HAProxy:
    """A real HAProxy on ports of the kernel's choice: for each a server's port and its words.

    It listens at `host`, and reaches the servers at `behind`. `bind` are words about its clients.
    """

    def __init__(
        self,
        case: ServerCase,
        *servers: tuple[int, str],
        host: str = "127.0.0.1",
        behind: str = "127.0.0.1",
        bind: str = "",
    ) -> None:
        if HAPROXY is None:
            raise SkipTest("needs the Debian package haproxy")
        lines = ["defaults", " mode tcp", " timeout connect 60s"]
        # A connection that is refused must be counted once: HAProxy would try thrice more.
        lines += [" timeout client 120s", " timeout server 120s", " retries 0"]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        doors = [socket.create_server((host, 0), family=family) for _ in servers]
        self.ports = [door.getsockname()[1] for door in doors]
        for door, (port, words) in zip(doors, servers, strict=True):
            lines += [f"listen at{port}{words.replace(' ', '')}"]
            lines += [f" bind fd@{door.fileno()} {bind}"]
            lines += [f" server popdrop {where(behind, port)} {words}"]
        path = case.folder.path / "haproxy.cfg"
        path.write_text("\n".join(lines) + "\n")
        self.process = subprocess.Popen(
            [HAPROXY, "-db", "-f", str(path)],
            pass_fds=[door.fileno() for door in doors],
            env=environment(case.folder.path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        case.addCleanup(self.stop)
        for door in doors:
            door.close()  # the kernel keeps those who connect until HAProxy takes them

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)


class From:
    """Clients from an address of their own."""

    def __init__(self, port: int, host: str = CLIENT) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE, (host, 0))
        self.port = self.socket.getsockname()[1]
        self.file = self.socket.makefile("rb")


class Client(poplib.POP3):
    """poplib, from an address of its own."""

    def _create_socket(self, timeout: float) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout, (CLIENT, 0))


class SecureClient(poplib.POP3_SSL):
    def _create_socket(self, timeout: float) -> socket.socket:
        plain = socket.create_connection((self.host, self.port), timeout, (CLIENT, 0))
        return self.context.wrap_socket(plain, server_hostname="localhost")


class HAProxyTests(ServerCase):
    def context(self) -> ssl.SSLContext:
        context = self.trusting()
        context.check_hostname = False
        return context

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder.path / "log").read_text().splitlines()]

    def proxied(self, *options: str) -> tuple[Twistd, HAProxy]:
        """Four ports: PROXY version 1 and 2 before STLS, then both before TLS."""
        log = ("--session-log", f"json:{self.folder.path}/log")
        certs.self_made(str(self.folder.state), "localhost")
        server = self.serve(
            *PROXIES, *log, *options, listen=(PLAIN, TLS.format(state=self.folder.state))
        )
        plain, tls = server.ports
        words = ("send-proxy", "send-proxy-v2")
        pairs = [(port, word) for port in (plain, tls) for word in words]
        return server, HAProxy(self, *pairs)

    def test_whole_sessions(self) -> None:
        """By STLS and by TLS, each with both versions: mail is read, and the client is known."""
        server, proxy = self.proxied("--stls", "require")
        mine = []
        for number, port in enumerate(proxy.ports):
            if number < 2:
                client: Any = Client("127.0.0.1", port, DEADLINE)
                client.stls(self.context())
            else:
                client = SecureClient("127.0.0.1", port, timeout=DEADLINE, context=self.context())
            client.user("bob")
            client.pass_("hunter2")
            self.assertEqual(client.stat()[0], 3)
            self.assertIn(b"..", client.retr(2)[1] + [b".."])
            mine.append(client.sock.getsockname()[1])
            client.quit()
        server.stop()  # all has been logged by then
        ended = [each for each in self.records() if each["event"] == "end"]
        self.assertEqual([each["address"] for each in ended], [CLIENT] * 4)
        self.assertEqual([each["port"] for each in ended], mine)

    def test_two_files(self) -> None:
        """`haproxy:ssl:`, certificate and key apart, as `haproxy:tls:`."""
        pair = Path(certs.self_made(str(self.folder.state), "localhost"))
        parts = re.findall(r"(?s)-----BEGIN.*?-----END[^\n]*\n", pair.read_text())
        for part in parts:
            name = "key" if "KEY" in part else "cert"
            (self.folder.state / f"{name}.pem").write_text(part)
            (self.folder.state / f"{name}.pem").chmod(0o600)
        keys = f"privateKey={self.folder.state}/key.pem:certKey={self.folder.state}/cert.pem"
        log = ("--session-log", f"json:{self.folder.path}/log")
        server = self.serve(*PROXIES, *log, listen=(f"haproxy:ssl:0:{keys}:interface=127.0.0.1",))
        proxy = HAProxy(self, (server.port, "send-proxy"), (server.port, "send-proxy-v2"))
        for port in proxy.ports:
            client = SecureClient("127.0.0.1", port, timeout=DEADLINE, context=self.context())
            client.user("bob")
            client.pass_("hunter2")
            client.quit()
        server.stop()
        ended = [each for each in self.records() if each["event"] == "end"]
        self.assertEqual([each["address"] for each in ended], [CLIENT] * 2)

    def test_on_ipv6(self) -> None:
        """The proxy on IPv6 too, for clients on IPv6 and on IPv4: not its address counts."""
        if not has_ipv6():
            raise SkipTest("needs IPv6 on loopback")
        certs.self_made(str(self.folder.state), "localhost")
        log = ("--session-log", f"json:{self.folder.path}/log")
        six = tuple(text.replace("127.0.0.1", "\\:\\:1") for text in (SIX, TLS))
        listen = tuple(text.format(state=self.folder.state) for text in six)
        server = self.serve("--trusted-proxies", "::1", "--stls", "require", *log, listen=listen)
        words = ("send-proxy", "send-proxy-v2")
        pairs = [(port, word) for port in server.ports for word in words]
        mine = []
        for host, client in (("::1", "::1"), ("127.0.0.1", CLIENT)):
            proxy = HAProxy(self, *pairs, host=host, behind="::1")
            for number, port in enumerate(proxy.ports):
                connection = socket.create_connection((host, port), DEADLINE, (client, 0))
                mine.append((client, connection.getsockname()[1]))
                if number < 2:
                    with connection.makefile("rb") as file:
                        self.assertEqual(file.readline()[:4], b"+OK ")
                        connection.sendall(b"STLS\r\n")
                        self.assertEqual(file.readline()[:4], b"+OK ")
                with (
                    self.context().wrap_socket(connection) as secured,
                    secured.makefile("rb") as file,
                ):
                    secured.sendall(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")
                    wanted = 3 if number < 2 else 4  # with the greeting
                    self.assertEqual(
                        [file.readline()[:4] for _ in range(wanted)], [b"+OK "] * wanted
                    )
        server.stop()
        ended = [each for each in self.records() if each["event"] == "end"]
        self.assertEqual([(each["address"], each["port"]) for each in ended], mine)

    def test_access_rules_ask_about_the_client(self) -> None:
        """`--deny-net`, `--allow-net` and `--tcp-wrappers`, by STLS's port and by that of TLS."""
        rules = self.folder.path / "hosts.deny"
        rules.write_text(f"popdrop: {CLIENT}\n")
        allowed = self.folder.path / "hosts.allow"
        allowed.write_text("")
        files = ("--hosts-allow", str(allowed), "--hosts-deny", str(rules))
        for options in (
            ("--deny-net", f"{CLIENT}/32"),
            ("--allow-net", "127.0.0.8/32"),
            ("--tcp-wrappers", *files),
        ):
            server, proxy = self.proxied(*options)
            for number, port in enumerate(proxy.ports):
                answers = []
                for host in (CLIENT, "127.0.0.8"):
                    connection = socket.create_connection(("127.0.0.1", port), DEADLINE, (host, 0))
                    with connection:
                        try:
                            if number >= 2:
                                connection = self.context().wrap_socket(connection)
                            answers.append(connection.recv(4))
                        except OSError:
                            answers.append(b"")
                        finally:
                            connection.close()
                self.assertEqual(answers, [b"", b"+OK "], (options, number))
            proxy.stop()
            said = server.stop()
            self.assertEqual(said.count(f"{CLIENT} refused by"), len(proxy.ports), said)

    def test_limits_count_the_clients(self) -> None:
        """One connection an address: the proxy's own is none of them."""
        _, proxy = self.proxied("--throttle", "memory:per-address=1")
        for port in proxy.ports[:2]:
            first = From(port)
            self.assertEqual(first.file.readline()[:3], b"+OK")
            second = From(port)
            self.assertEqual(second.file.readline()[:15], b"-ERR [SYS/TEMP]")
            other = From(port, "127.0.0.8")
            self.assertEqual(other.file.readline()[:3], b"+OK")
            for each in (first, other):
                each.socket.sendall(b"QUIT\r\n")
            for each in (first, second, other):
                each.file.read()
                each.file.close()
                each.socket.close()

    def test_half_closed_clients_get_their_answers(self) -> None:
        _, proxy = self.proxied()
        for port in proxy.ports[:2]:
            client = From(port)
            client.socket.sendall(b"USER bob\r\nPASS hunter2\r\nSTAT\r\nQUIT\r\n")
            client.socket.shutdown(socket.SHUT_WR)
            rows = client.file.read().split(b"\r\n")
            client.file.close()
            client.socket.close()
            self.assertEqual([row[:3] for row in rows], [b"+OK"] * 5 + [b""])
            self.assertEqual(rows[3][:6], b"+OK 3 ")


class HeaderTests(ServerCase):
    """What a proxy says decides, and only where it is one of ours."""

    def signed_on(self, port: int, header: bytes) -> bytes:
        """The answer to USER behind this header."""
        wire = Wire(self, port)
        wire.send(header + b"USER bob\r\n")
        self.assertEqual(wire.line()[:3], b"+OK")
        return wire.line()

    def test_local_is_who_comes_from_here(self) -> None:
        """`--cleartext local` asks where the client is, not the proxy."""
        port = self.serve(*PROXIES, "--cleartext", "local", listen=(PLAIN,)).port
        near = b"PROXY TCP4 127.0.0.1 127.0.0.1 4 110\r\n"
        far = b"PROXY TCP4 192.0.2.7 127.0.0.1 4 110\r\n"
        mapped = b"PROXY TCP6 ::ffff:127.0.0.1 ::1 4 110\r\n"
        own_check = bytes.fromhex("0d0a0d0a000d0a515549540a2000") + struct.pack("!H", 0)
        for header, inside in (
            (near, True),
            (mapped, True),
            (far, False),
            (own_check, False),
            (b"PROXY UNKNOWN\r\n", False),
        ):
            self.assertEqual(self.signed_on(port, header)[:3] == b"+OK", inside, header)

    def test_nobody_else_may_send_one(self) -> None:
        server = self.serve("--trusted-proxies", "192.0.2.1,2001:db8::/32", listen=(PLAIN,))
        wire = Wire(self, server.port)
        self.assertEqual(wire.rest(), b"")
        self.assertIn("127.0.0.1 is not in --trusted-proxies", server.stop())

    def test_no_header_no_greeting(self) -> None:
        server = self.serve(*PROXIES, listen=(PLAIN,))
        wire = Wire(self, server.port)
        wire.send(b"CAPA\r\n")
        self.assertEqual(wire.rest(), b"")
        self.assertIn("no PROXY header from 127.0.0.1", server.stop())

    def test_header_is_no_command_elsewhere(self) -> None:
        """A plain listener takes it for a bad command, and the client for who he is."""
        wire = Wire(self, self.serve("--cleartext", "never").port)
        wire.line()
        wire.send(b"PROXY TCP4 127.0.0.1 127.0.0.1 4 110\r\n")
        self.assertEqual(wire.line()[:4], b"-ERR")

    def test_through_a_unix_socket(self) -> None:
        path = self.folder.path / "pop3"
        self.serve(listen=(f"haproxy:unix:{path}:mode=600",))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            client.connect(str(path))
            client.sendall(b"PROXY TCP4 127.0.0.1 127.0.0.1 4 110\r\nQUIT\r\n")
            answers = client.makefile("rb").read().split(b"\r\n")
        self.assertEqual([answer[:3] for answer in answers], [b"+OK", b"+OK", b""])

    def test_through_a_socket_of_systemds(self) -> None:
        for host in ("127.0.0.1", "::1"):
            if ":" in host and not has_ipv6():
                continue
            door = Door(self, (host, 0))
            domain = "INET6" if ":" in host else "INET"
            listen = f"haproxy:systemd:domain={domain}:index=0"
            log = ("--session-log", f"json:{self.folder.path}/log{domain}")
            trusted = ("--trusted-proxies", host, "--cleartext", "always")
            server = Served(self, self.folder, door, (listen,), *trusted, *log)
            with socket.create_connection((host, door.ports[0]), DEADLINE) as client:
                client.sendall(b"PROXY TCP6 2001:db8::7 2001:db8::1 40112 110\r\n")
                client.sendall(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")
                answers = client.makefile("rb").read().split(b"\r\n")
            self.assertEqual([answer[:3] for answer in answers], [b"+OK"] * 4 + [b""])
            server.stop()
            text = (self.folder.path / f"log{domain}").read_text()
            self.assertIn("2001:db8::7", text)
            self.assertIn("40112", text)
