"""One run of `load.c` against one peer, with the server's CPU read at both barriers."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import IO

from benchmarks import tools
from benchmarks.peers import Peer
from benchmarks.process import Failed, Machine, start, stop, tree_cpu, tree_memory

LIMIT = 120
"""Seconds after which a run has failed."""


@dataclass(frozen=True)
class Run:
    """What one run gave. Times are in seconds; `more` are further figures of the scenario."""

    count: int
    octets: int
    seconds: float
    cpu: float
    """Of the server's whole process tree."""
    generator: float
    """Share of one core that the generator used: near 1, it was the bottleneck."""
    others: float
    """Cores that neither server nor generator used, but were busy or stolen."""
    more: dict[str, float] = field(default_factory=dict)


class Generator:
    """Runs scenarios from one core, or from any of these."""

    def __init__(self, core: int | Collection[int]) -> None:
        self.core = core
        self.program = tools.compiled("load")
        self.others: list[float] = []

    def run(self, peer: Peer, scenario: str, auth: str, **options: object) -> Run:
        """One run. Raises `Failed` on a wrong answer or after `LIMIT` seconds."""
        options = {"suffix": peer.suffix, **options}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        words += ["--alters"] if peer.alters else []
        fixed = [f"--port={peer.port}", f"--auth={auth}", f"--limit={LIMIT}", "--sync"]
        command = [str(self.program), scenario, *fixed, *words]
        env = {**os.environ, "POP_PASSWORD": peer.password}
        child = start(command, self.core, env=env, pipes=True)
        # The generator ends itself by its --limit; this is for a generator that is stuck.
        guard = threading.Timer(LIMIT + 10, child.kill)
        guard.start()
        try:
            return self._converse(child, peer, scenario == "hold")
        finally:
            guard.cancel()
            stop(child)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    stream.close()

    def _converse(self, child: subprocess.Popen[bytes], peer: Peer, weigh: bool) -> Run:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        if child.stdout.readline() != b"ready\n":
            raise _failure(child.stderr)
        more = {"memory": tree_memory(peer.pid)} if weigh else {}
        cpu, machine = tree_cpu(peer.pid), Machine.now()
        _go(child.stdin)
        line = child.stdout.readline()
        machine_after, cpu_after = Machine.now(), tree_cpu(peer.pid)
        if not line.startswith(b"{"):
            raise _failure(child.stderr)
        _go(child.stdin)
        if child.wait() != 0:
            raise _failure(child.stderr)
        found = json.loads(line)
        count, octets = found.pop("count"), found.pop("octets")
        seconds, own = found.pop("seconds"), found.pop("own_cpu")
        cpu = cpu_after - cpu
        busy = machine_after.busy - machine.busy + machine_after.stolen - machine.stolen
        # The clock of /proc ticks at 10 ms: shorter runs say nothing about the neighbours.
        others = max(0.0, busy - cpu - own) / seconds if seconds > 0.3 else 0.0
        if seconds > 0.3:
            self.others.append(others)
        share = own / seconds if seconds else 0.0
        return Run(count, octets, seconds, cpu, share, others, {**found, **more})


def _go(stdin: IO[bytes]) -> None:
    try:
        stdin.write(b"\n")
        stdin.flush()
    except BrokenPipeError:
        pass


def _failure(stderr: IO[bytes]) -> Failed:
    text = stderr.read().decode(errors="replace").strip()
    return Failed(text.removeprefix("load: ")[:200] or "the generator has ended")
