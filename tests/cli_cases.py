"""Cases for commands: in this process, as a child, and as a child on a terminal of its own."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

from click.testing import CliRunner, Result
from twisted.trial.unittest import SynchronousTestCase

import popdrop as package
from popdrop.accounts.database import AccountsDatabase
from popdrop.accounts.secrets import Hasher
from popdrop.cli.main import popdrop
from popdrop.values import Account

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(package.__file__)))
GUARD = 120.0
"""Seconds after which a child that says nothing is given up: no test depends on it."""

INTERRUPT = b"\x03"


class CommandCase(SynchronousTestCase):
    subject = "user"

    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder, 0o700)
        self.db = os.path.join(self.folder, "accounts.db")

    def run_it(self, *words: str, stdin: bytes = b"") -> Result:
        return CliRunner().invoke(popdrop, [self.subject, *words], input=stdin)

    def good(self, *words: str, stdin: bytes = b"") -> Result:
        result = self.run_it(*words, stdin=stdin)
        self.assertEqual((result.exit_code, result.exception), (0, None), result.output)
        return result

    def refused(self, *words: str, stdin: bytes = b"") -> str:
        """Exit status 1 and one line on standard error alone."""
        result = self.run_it(*words, stdin=stdin)
        self.assertEqual(result.exit_code, 1, result.output)
        self.assertIsInstance(result.exception, SystemExit)
        self.assertEqual(result.stdout, "")
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        return result.stderr

    def account(self, name: bytes) -> Account:
        accounts = AccountsDatabase(self.db)
        self.addCleanup(accounts.close)
        account = accounts.lookup(name)
        assert account is not None
        return account

    def has_password(self, name: bytes, password: bytes) -> bool:
        return Hasher().verify(self.account(name).password_hash, password)

    def apop_of(self, name: bytes) -> bytes | None:
        secret = self.account(name).apop_secret
        return None if secret is None else secret.reveal()


class ChildCase(CommandCase):
    """`python -m popdrop` as an administrator meets it."""

    def environ(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": ROOT, "TERM": "xterm", "LC_ALL": "C.UTF-8"}

    def child(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "popdrop", *words],
            input=stdin,
            capture_output=True,
            cwd=self.folder,
            env=self.environ(),
            timeout=GUARD,
            check=False,
        )

    def on_terminal(
        self, *words: str, answers: list[tuple[str, bytes]], before: tuple[str, ...] = ()
    ) -> tuple[int, str, list[bool]]:
        """Exit status, all that the terminal showed, and for each answer whether echo was on.

        `before` is a program that runs the command, with its own arguments.
        """
        command = [*before, sys.executable, "-m", "popdrop", *words]
        pid, terminal = pty.fork()
        if pid == 0:
            try:
                os.chdir(self.folder)
                os.execvpe(command[0], command, self.environ())
            finally:
                os._exit(127)
        shown = answer = b""
        echoes = []
        left = list(answers)
        deadline = time.monotonic() + GUARD
        seen = 0
        try:
            while time.monotonic() < deadline:
                if not select.select([terminal], [], [], 1.0)[0]:
                    if answer == INTERRUPT:
                        # It came between Python's last look for signals and its read(2).
                        os.write(terminal, answer)
                    continue
                try:
                    octets = os.read(terminal, 65536)
                except OSError:  # EIO: the other side has gone
                    break
                if not octets:
                    break
                shown += octets
                if left and left[0][0].encode() in shown[seen:]:
                    seen = len(shown)
                    _, answer = left.pop(0)
                    echoes.append(bool(termios.tcgetattr(terminal)[3] & termios.ECHO))
                    os.write(terminal, answer)
            else:
                os.kill(pid, signal.SIGKILL)
                self.fail(f"the child says nothing more: {shown!r}")
        finally:
            os.close(terminal)
            with contextlib.suppress(ChildProcessError):
                _, status = os.waitpid(pid, 0)
        self.assertEqual(left, [], shown)
        return os.waitstatus_to_exitcode(status), shown.decode(), echoes
