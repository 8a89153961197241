"""The units in contrib/systemd: systemd accepts them, and the server takes their words."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SkipTest

from popdrop import certs
from tests.end_to_end.harness import DEADLINE, ROOT
from tests.end_to_end.test_listeners import KindCase
from tests.test_listeners import has_ipv6

UNITS = ROOT / "contrib" / "systemd"
MOST_EXPOSED = 20
"""Tenths, of 100: `systemd-analyze security` calls 2.0 and less OK, its second best word."""


def analyze(*words: str | Path) -> str:
    """What systemd-analyze says; the test fails unless it ends well."""
    program = shutil.which("systemd-analyze")
    if program is None:
        raise SkipTest("needs the Debian package systemd")
    done = subprocess.run(
        [program, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    if done.returncode:
        raise AssertionError(done.stdout)
    return done.stdout


class UnitTests(KindCase):
    def setUp(self) -> None:
        super().setUp()
        text = (UNITS / "popdrop.service").read_text()
        self.copy = self.folder.path / "popdrop.service"
        # verify wants programs that are there.
        self.copy.write_text(text.replace("/opt/popdrop/bin/twistd", sys.executable))
        shutil.copy(UNITS / "popdrop.socket", self.folder.path)
        command = re.search(r"^ExecStart=(.*?[^\\])\n", text, re.MULTILINE | re.DOTALL)
        assert command is not None
        self.command = shlex.split(command[1].replace("\\\n", " "))

    def test_systemd_accepts_them(self) -> None:
        """Without a word: what it does not know it warns about."""
        said = analyze("verify", self.copy, self.folder.path / "popdrop.socket")
        about = [line for line in said.splitlines() if "popdrop" in line]
        self.assertEqual(about, [])

    def test_they_are_hardened(self) -> None:
        analyze("security", "--offline=yes", f"--threshold={MOST_EXPOSED}", self.copy)

    def test_the_server_takes_their_words(self) -> None:
        """STLS and TLS, by the command line and the order of ports of the units themselves."""
        socket_unit = (UNITS / "popdrop.socket").read_text()
        ports = re.findall(r"^ListenStream=\[::\]:(\d+)$", socket_unit, re.MULTILINE)
        self.assertEqual(ports, ["110", "995"])
        credentials = self.folder.path / "credentials"
        credentials.mkdir()
        pem = certs.self_made(str(self.folder.state), "localhost")
        for name in ("fullchain.pem", "privkey.pem"):
            shutil.copy(pem, credentials / name)
        # The units' own are [::]; root, whom the tests may run as, serves loopback only.
        host, domain = ("::1", "INET6") if has_ipv6() else ("127.0.0.1", "INET")
        changes = {
            "%d": str(credentials),
            "/var/lib/popdrop": str(self.folder.state),
            "INET6": domain,
        }
        words = []
        for word in self.command[self.command.index("popdrop") + 1 :]:
            for old, new in changes.items():
                word = word.replace(old, new)
            words.append(word)
        free = self.free_ports(host, len(ports))
        places = tuple(f"[::1]:{port}" if host == "::1" else f"{host}:{port}" for port in free)
        self.activated(places, options=tuple(words))
        for port, implicit in zip(free, (False, True), strict=True):
            there = socket.create_connection((host, port), DEADLINE)
            if implicit:
                self.session(there, self.trusting())
            else:
                self.upgraded(there)
