"""strace(1) on a server that runs: which system calls it makes, and faults at one of them.

Faults are counted per thread and per name of a call, from the moment of attaching, as strace does.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from twisted.trial.unittest import SkipTest

from tests.end_to_end.harness import DEADLINE

PATIENCE = 10
"""Seconds until a tracer that does not end is killed; no result depends on it."""
_LINE = re.compile(r"(?:(\d+) +)?(\w+)\((.*)")
_PATH = re.compile(r"(?:\d+|AT_FDCWD)<([^>]*)>|\"((?:[^\"\\]|\\.)*)\"")


class Call(NamedTuple):
    """A system call: the `nth` (1-based) of its name in its thread since the attaching."""

    thread: int
    name: str
    nth: int
    text: str

    @property
    def paths(self) -> list[str]:
        """The paths in its arguments, those of descriptors too."""
        found = [a or b for a, b in _PATH.findall(self.text.partition(") = ")[0])]
        return [path for path in found if path.startswith("/")]


class Strace:
    """Attached to a process with all its threads, or to one `thread`, until `detach`."""

    def __init__(
        self, output: Path, pid: int, names: list[str], fault: str = "", thread: int = 0
    ) -> None:
        program = shutil.which("strace")
        if program is None:
            raise SkipTest("needs the Debian package strace")
        self._output = output
        command = [program, "-y", "-s", "0", "-o", str(output), "-e", f"trace={','.join(names)}"]
        command += ["-e", f"inject={fault}"] if fault else []
        command += ["-p", str(thread)] if thread else ["-f", "-p", str(pid)]
        self._thread = thread
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        assert self._child.stderr is not None
        said = self._child.stderr.readline()
        if b"attached" not in said:
            self.detach()
            raise AssertionError(f"strace: {said!r}: tracing must be allowed (ptrace(2))")

    def detach(self) -> str:
        """Let the process go on without faults; what was traced."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                # At times it waits for ever for a process that its own SIGKILL has ended.
                self._child.kill()
                self._child.wait(DEADLINE)
        assert self._child.stderr is not None
        self._child.stderr.close()
        return self._output.read_text("utf-8", "replace") if self._output.exists() else ""

    def calls(self) -> list[Call]:
        """Detach; the calls in order."""
        counts: dict[tuple[int, str], int] = {}
        found = []
        for line in self.detach().splitlines():
            match = _LINE.match(line)
            if match:
                thread = int(match[1] or self._thread)
                key = (thread, match[2])
                counts[key] = counts.get(key, 0) + 1
                found.append(Call(thread, match[2], counts[key], match[3]))
        return found
