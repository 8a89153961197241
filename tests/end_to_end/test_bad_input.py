"""What broke other servers, sent to a real one: a class for each kind of harm.

The numbers are rows of the design's table of other servers' bugs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

from popdrop.accounts.database import AccountsDatabase
from popdrop.values import Secret
from tests.end_to_end.harness import DEADLINE, ROOT, environment
from tests.end_to_end.test_server import ServerCase, Wire

HOSTILE_NAMES = (
    b"%{x}",
    b"%s%n",
    b"%n%s",
    b"${HOME}",
    b"{0}",
    b"{home}",
    b"../x",
    b"../bob",
    b"a/b",
    b"/etc/passwd",
    b".",
    b"..",
    b"bob.",
    b"bob.lock",
    b"BOB.LOCK",
    b"bob.popdrop",
    b".bob",
    b"-bob",
    b"x" * 120,
    b"() { :;};",
    b"() { :;}; id",
    b"LD_PRELOAD=x",
    b"`id`",
    b"$(id)",
    b"root",
    b"bob:eve",
    b"bob\xff",
    "ʙᴏʙ".encode(),
    "bob\u202e".encode(),
)
"""Rows 20, 21, 23, 24, 32."""


def plain(name: bytes, password: bytes) -> bytes:
    return b"AUTH PLAIN " + b64encode(b"\0" + name + b"\0" + password) + b"\r\n"


class BadInputCase(ServerCase):
    def answers(self, octets: bytes) -> list[bytes]:
        """All replies to `octets`, the greeting left out, up to the close."""
        wire = Wire(self, self.server.port)
        wire.line()
        try:
            wire.send(octets)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return wire.rest().splitlines()

    def bob_still_gets_in(self) -> None:
        client = self.server.client()
        client.user("bob")
        client.pass_("hunter2")
        self.assertEqual(client.stat()[0], 3)
        client.quit()

    def nothing_leaks(self, answers: list[bytes]) -> None:
        for line in answers:
            self.assertRegex(line, rb"\A(\+OK|-ERR|\+ |\.)[\x20-\x7e]*\Z")
            for leak in (b"Traceback", b"Error", b"popdrop/", b"sqlite", str(ROOT).encode()):
                self.assertNotIn(leak, line)


class NameTests(BadInputCase):
    def test_no_name_is_expanded_or_becomes_a_path(self) -> None:
        """Rows 20, 23, 24, 32: -ERR, no file of that name looked for, the log has it as it is."""
        if shutil.which("strace") is None:
            self.skipTest("needs the Debian package strace")
        self.folder.spool("x", b"")
        (self.folder.path / "x").write_bytes(b"")
        self.serve()
        trace = self.folder.path / "trace"
        strace = subprocess.Popen(
            ["strace", "-f", "-qq", "-s", "300", "-e", "trace=%file", "-o", str(trace)]
            + ["-p", str(self.server.process.pid)],
            stderr=subprocess.PIPE,
        )
        self.addCleanup(strace.wait)
        self.addCleanup(strace.kill)
        while b"TracerPid:\t0" in Path(f"/proc/{self.server.process.pid}/status").read_bytes():
            self.assertIsNone(strace.poll())
        self.bob_still_gets_in()
        for name in HOSTILE_NAMES:
            answers = self.answers(b"USER " + name + b"\r\nPASS x\r\nQUIT\r\n")
            self.nothing_leaks(answers)
            self.assertTrue(answers[-2].startswith(b"-ERR"), (name, answers))
            answers = self.answers(plain(name, b"x") + plain(b"bob", name) + b"QUIT\r\n")
            self.nothing_leaks(answers)
            for line in answers[:2]:
                self.assertEqual(line, b"-ERR [AUTH] Authentication failed.", name)
        self.bob_still_gets_in()
        strace.terminate()
        strace.wait(DEADLINE)
        if strace.stderr is not None:
            strace.stderr.close()
        touched = trace.read_bytes()
        self.assertIn(os.fsencode(self.spool), touched)  # it sees what is opened
        for path in (b'/mail/x"', b'/x"', b"etc/passwd/", b"/mail/-", b"/mail/$", b"/mail/%"):
            self.assertNotIn(path, touched)
        self.assertNotRegex(touched, rb'mail/[^"]*(\.lock\.lock|\{|\$|%|\.\.|bob\.popdrop\.lock)')
        log = self.server.stop()
        self.assertIn("%n%s", log)
        self.assertNotIn("Traceback", log)

    def test_nul_tab_and_line_ends_inject_nothing(self) -> None:
        """Rows 19 and 21: bob's name and password with something in them are not bob's."""
        self.serve()
        for sting in (b"\0", b"\t", b"\r", b"\n", b":", b"\0\0", b"\x7f", b"\x1b[2J"):
            for name, password in (
                (b"bob" + sting, b"hunter2"),
                (sting + b"bob", b"hunter2"),
                (b"bob" + sting + b"eve", b"hunter2"),
                (b"bob", b"hunter2" + sting),
                (b"bob", sting + b"hunter2"),
                (b"bob", b"hunter2" + sting + b"more"),
            ):
                answers = self.answers(plain(name, password) + b"QUIT\r\n")
                self.assertEqual(
                    answers[0], b"-ERR [AUTH] Authentication failed.", (name, password)
                )
                if sting in (b"\r", b"\n"):
                    continue
                answers = self.answers(
                    b"USER " + name + b"\r\nPASS " + password + b"\r\nSTAT\r\nQUIT\r\n"
                )
                self.nothing_leaks(answers)
                self.assertFalse([line for line in answers if b"message(s)" in line])
        self.bob_still_gets_in()


class LengthTests(BadInputCase):
    def test_long_arguments(self) -> None:
        """Row 31: 1 KB, 10 KB and 1 MB to each command, before and after login."""
        self.serve()
        before = (b"USER", b"PASS", b"APOP", b"AUTH", b"STLS", b"CAPA", b"UTF8", b"LANG", b"NOOP")
        after = (b"LIST", b"UIDL", b"RETR", b"TOP", b"DELE", b"LAST", b"RSET", b"STAT", b"XTND")
        for size in (1000, 10_000, 1_000_000):
            for command in before:
                answers = self.answers(command + b" " + b"A" * size + b"\r\nQUIT\r\n")
                self.nothing_leaks(answers)
                self.assertTrue(answers[0].startswith(b"-ERR"), (command, size))
            for command in after:
                answers = self.answers(
                    b"USER bob\r\nPASS hunter2\r\n" + command + b" " + b"1" * size + b"\r\nQUIT\r\n"
                )
                self.nothing_leaks(answers)
                self.assertTrue(answers[2].startswith(b"-ERR"), (command, size))
        self.bob_still_gets_in()

    def test_lines_around_powers_of_two(self) -> None:
        """Row 33: 2^n - 1, 2^n, 2^n + 1 octets: one answer each, and the next command works."""
        self.serve()
        for power in range(4, 16):
            for size in (2**power - 1, 2**power, 2**power + 1):
                line = b"USER " + b"a" * (size - 7) + b"\r\n"
                answers = self.answers(line + b"UTF8\r\nQUIT\r\n")
                self.nothing_leaks(answers)
                self.assertEqual(answers.count(b"+OK UTF8 enabled"), 1, size)
                self.assertEqual(len([a for a in answers if b"signing off" in a]), 1, size)
                wanted = b"+OK" if len(line) <= 255 else b"-ERR"
                self.assertTrue(answers[0].startswith(wanted), (size, answers[0]))
        self.bob_still_gets_in()


class ReplayTests(BadInputCase):
    """Row 18."""

    def challenged(self) -> tuple[Wire, bytes]:
        wire = Wire(self, self.server.port)
        match = re.search(rb"<.*>", wire.line())
        assert match
        return wire, match[0]

    def digest(self, challenge: bytes) -> bytes:
        return hashlib.md5(challenge + b"a shared secret of hers").hexdigest().encode()

    def test_a_digest_is_good_on_its_own_connection_only(self) -> None:
        self.serve()
        first, challenge = self.challenged()
        digest = self.digest(challenge)
        first.send(b"APOP alice " + digest + b"\r\nQUIT\r\n")
        self.assertIn(b"+OK alice has 1", first.line())
        first.rest()
        for _ in range(3):
            again, another = self.challenged()
            self.assertNotEqual(another, challenge)
            again.send(b"APOP alice " + digest + b"\r\n")
            self.assertIn(b"-ERR [AUTH]", again.line())

    def test_a_digest_of_a_changed_secret(self) -> None:
        self.serve("--login-cache", "3600")
        wire, challenge = self.challenged()
        database = AccountsDatabase(str(self.folder.accounts))
        database.set_apop(b"alice", Secret(b"another shared secret"))
        database.close()
        wire.send(b"APOP alice " + self.digest(challenge) + b"\r\n")
        self.assertIn(b"-ERR [AUTH]", wire.line())

    def test_a_changed_password_in_spite_of_the_login_cache(self) -> None:
        self.serve("--login-cache", "3600")
        self.bob_still_gets_in()
        self.bob_still_gets_in()
        database = AccountsDatabase(str(self.folder.accounts))
        database.set_password(b"bob", Secret(b"hunter3"))
        database.close()
        answers = self.answers(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")
        self.assertEqual(answers[1], b"-ERR [AUTH] Authentication failed.")
        answers = self.answers(b"USER bob\r\nPASS hunter3\r\nQUIT\r\n")
        self.assertIn(b"3 message(s)", answers[1])


class DatabaseTests(BadInputCase):
    """Missing, locked, open to others, newer, corrupt: refused at the start, or nobody gets in."""

    def refused(self, *parts: str) -> None:
        """The start fails with one line that names the file and the remedy."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "twisted",
                "popdrop",
                "--auth",
                f"accounts:{self.folder.accounts}",
            ]
            + ["--state-dir", str(self.folder.state), "--listen", "tcp:0:interface=127.0.0.1"],
            cwd=self.folder.path,
            env=environment(self.folder.path),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        self.assertEqual(done.returncode, 1, done.stderr)
        lines = [line for line in done.stderr.splitlines() if line]
        self.assertEqual(len(lines), 1, done.stderr)
        for part in (str(self.folder.accounts), *parts):
            self.assertIn(part, lines[0])

    def nobody_gets_in(self) -> None:
        """Asked until the server has noticed; then for every mechanism and name alike."""
        while True:
            answers = self.answers(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")
            if b"message(s)" not in answers[1]:
                break
        for name in (b"bob", b"alice", b"nobody"):
            answers = self.answers(
                b"USER "
                + name
                + b"\r\nPASS hunter2\r\n"
                + plain(name, b"hunter2")
                + b"APOP "
                + name
                + b" "
                + b"0" * 32
                + b"\r\nQUIT\r\n"
            )
            for line in answers[1:4]:
                self.assertTrue(line.startswith(b"-ERR [SYS/TEMP]"), (name, answers))
            self.nothing_leaks(answers)

    def test_missing(self) -> None:
        self.folder.accounts.unlink()
        self.refused("popdrop user add")

    def test_goes_missing(self) -> None:
        self.serve()
        self.bob_still_gets_in()
        self.folder.accounts.rename(self.folder.path / "away")
        self.nobody_gets_in()
        (self.folder.path / "away").rename(self.folder.accounts)
        while b"3 message(s)" not in self.answers(b"USER bob\r\nPASS hunter2\r\nQUIT\r\n")[1]:
            pass

    def test_open_to_others(self) -> None:
        self.folder.accounts.chmod(0o604)
        self.refused("chmod 600")

    def test_becomes_open_to_others(self) -> None:
        self.serve()
        self.bob_still_gets_in()
        self.folder.accounts.chmod(0o604)
        self.nobody_gets_in()

    def test_newer(self) -> None:
        connection = sqlite3.connect(self.folder.accounts)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
        self.refused("newer Popdrop")

    def test_corrupt(self) -> None:
        self.folder.accounts.write_bytes(b"\0" * 8192)
        self.refused()
        self.folder.accounts.write_bytes(os.urandom(8192))
        self.refused()

    def test_becomes_corrupt(self) -> None:
        self.serve()
        self.bob_still_gets_in()
        rubbish = self.folder.path / "rubbish"
        rubbish.write_bytes(os.urandom(8192))
        rubbish.chmod(0o600)
        rubbish.rename(self.folder.accounts)
        self.nobody_gets_in()

    def test_locked_by_a_writer(self) -> None:
        """Who is known still gets in, and nobody else does."""
        self.serve()
        connection = sqlite3.connect(self.folder.accounts, isolation_level=None)
        self.addCleanup(connection.close)
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("UPDATE accounts SET disabled = 1")
        self.bob_still_gets_in()
        answers = self.answers(b"USER bob\r\nPASS wrong\r\nUSER eve\r\nPASS x\r\nQUIT\r\n")
        self.assertEqual(answers[1], b"-ERR [AUTH] Authentication failed.")
        self.assertEqual(answers[3], b"-ERR [AUTH] Authentication failed.")

    def test_the_key_goes_missing(self) -> None:
        self.serve()
        self.bob_still_gets_in()
        Path(f"{self.folder.accounts}.key").rename(self.folder.path / "away")
        self.nobody_gets_in()
