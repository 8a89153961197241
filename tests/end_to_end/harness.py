"""A real `twistd popdrop` as a child process, for tests through the socket."""

from __future__ import annotations

import os
import poplib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from popdrop.accounts.database import AccountsDatabase
from popdrop.values import Secret

DEADLINE = 120
"""Seconds after which a test gives up on a child; no result depends on it."""
ROOT = Path(__file__).parent.parent.parent


def environment(home: Path) -> dict[str, str]:
    """A small environment with this checkout first, and no configuration of the user's."""
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
    }


class Folder:
    """A folder of a test's own, mode 0700, gone when the test ends."""

    def __init__(self, case: object) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="popdrop-test-"))
        case.addCleanup(shutil.rmtree, self.path, True)  # type: ignore[attr-defined]
        self.spools = self.path / "mail"
        self.spools.mkdir(mode=0o700)
        self.state = self.path / "state"
        self.state.mkdir(mode=0o700)
        self.accounts = self.state / "accounts.db"
        AccountsDatabase.create(str(self.accounts))

    def add(self, name: str, password: str | None = None, apop: str | None = None) -> None:
        """An account."""
        database = AccountsDatabase(str(self.accounts))
        database.add(
            name.encode(),
            None if password is None else Secret(password.encode()),
            None if apop is None else Secret(apop.encode()),
        )
        database.close()

    def spool(self, name: str, octets: bytes) -> Path:
        """A spool, mode 0600."""
        path = self.spools / name
        path.write_bytes(octets)
        path.chmod(0o600)
        return path


def command(
    folder: Folder, *options: str, listen: tuple[str, ...], daemon: tuple[str, ...] = ()
) -> list[str]:
    """The words that start `twistd -n popdrop`; `daemon` are options of twistd's own.

    Behind a string of `listen`, after a space, may stand its own rules.
    """
    words = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
    words += ["-n", "--pidfile", "", *daemon, "popdrop", "--state-dir", str(folder.state)]
    if not any(option.startswith("--store") for option in options):
        words += ["--store", f"mbox:{folder.spools}/{{user}}"]
    if not any(option.startswith("--auth") for option in options):
        words += ["--auth", f"accounts:{folder.accounts}"]
    if not any(option.startswith("--throttle") for option in options):
        words += ["--throttle", "off"]
    for text in listen:
        where, _, policy = text.partition(" ")
        words += ["--listen", where]
        words += ["--listen-policy", policy] if policy else []
    return [*words, *options]


class Twistd:
    """`twistd -n popdrop` with ports of the kernel's choice."""

    def __init__(
        self,
        case: object,
        folder: Folder,
        *options: str,
        listen: tuple[str, ...] = (),
        preload: Path | None = None,
        variables: dict[str, str] | None = None,
    ):
        self.folder = folder
        more = {} if preload is None else {"LD_PRELOAD": str(preload)}
        more |= variables or {}
        listeners = listen or ("tcp:0:interface=127.0.0.1",)
        self.begin(case, command(folder, *options, listen=listeners), folder.path, more)
        told = [
            self.wait_for(r"POP3 on \S+ port (\d+)|POP3 on (?:haproxy:)?unix:") for _ in listeners
        ]
        self.ports = [int(match[1] or 0) for match in told]

    def begin(
        self,
        case: object,
        words: list[str],
        folder: Path,
        more: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        """Start `words` in `folder` and read what it says; the case ends it."""
        self.process = subprocess.Popen(
            [*self.around(), *words],
            cwd=folder,
            env=environment(folder) | (more or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        case.addCleanup(self.stop)  # type: ignore[attr-defined]
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def around(self) -> list[str]:
        """Words of a program that starts the server, and becomes it."""
        return []

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.decode("utf-8", "replace").rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The next line of the log that holds `pattern`."""
        while True:
            line = self._lines.get(timeout=DEADLINE)
            if line is None:
                raise AssertionError(f"twistd ended without {pattern!r}:\n" + "\n".join(self.log))
            self.log.append(line)
            match = re.search(pattern, line)
            if match:
                return match

    def told(self, pattern: str) -> re.Match[str]:
        """The first line of the log that holds `pattern`, also of those before what was waited for.

        For what one thread logs while another goes on.
        """
        for line in self.log:
            if match := re.search(pattern, line):
                return match
        return self.wait_for(pattern)

    @property
    def port(self) -> int:
        return self.ports[0]

    def client(self, port: int | None = None) -> poplib.POP3:
        """A connection by Python's poplib, closed when it is collected."""
        return poplib.POP3("127.0.0.1", port or self.port, timeout=DEADLINE)

    def kill(self) -> None:
        """As the kernel does it to a process that has used up the memory."""
        self.process.kill()
        self.process.wait(DEADLINE)

    def stop(self) -> str:
        """End it as an administrator does, and give all it has logged."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        while not self._lines.empty():
            line = self._lines.get()
            if line is not None:
                self.log.append(line)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return "\n".join(self.log)


def mail(number: int, body: bytes = b"", sender: str = "alice@example.org") -> bytes:
    """One mail of an mboxrd spool, with its From_ line and the empty line behind it."""
    return (
        f"From {sender} Sun Nov 22 10:{number // 60 % 60:02}:{number % 60:02} 2026\n"
        f"From: <{sender}>\nTo: <bob@example.org>\nSubject: mail {number}\n"
        f"Message-ID: <{number}@example.org>\n\n".encode()
        + (body or b"This is mail %d.\n" % number)
        + b"\n"
    )
