"""Servers as children: started on one core, their CPU counted, ended by their process group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
START_SECONDS = 30.0
STOP_SECONDS = 10.0


class Failed(Exception):
    """A server or the generator did not do what it should. The text is for the table's notes."""


class NotApplicable(Failed):
    """This scenario says nothing about this server: a dash in the table, no note."""


def _stat(pid: str) -> tuple[int, float] | None:
    """Parent and CPU seconds of a process, its reaped children's included; `None` if it is gone."""
    try:
        text = Path("/proc", pid, "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold blanks: fields are counted from behind it (proc(5)).
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:15])) / TICK


def _tree(root: int) -> dict[int, float]:
    """CPU seconds of `root` and of all its descendants, by process id."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := _stat(name)) is not None:
            children.setdefault(found[0], []).append(int(name))
            used[int(name)] = found[1]
    tree: dict[int, float] = {}
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        tree[pid] = used.get(pid, 0.0)
        waiting += children.get(pid, [])
    return tree


def tree_cpu(root: int) -> float:
    """CPU seconds, user and system, that `root` and all its descendants have used so far.

    The living (and zombies) are added up; those that were waited for are in their parent's
    `cutime` and `cstime`. A process that leaves the tree would be lost: servers are started in
    the foreground for this reason.
    """
    return sum(_tree(root).values())


def tree_memory(root: int) -> int:
    """Octets of memory, resident set sizes added up, that `root` and all its descendants hold.

    Pages that several of them share count as often: so only differences of two moments tell
    something.
    """
    total = 0
    for pid in _tree(root):
        try:
            # Exact, where the figure in `stat` lags behind by up to 256 KB a thread (proc(5)).
            text = Path("/proc", str(pid), "smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Rss:")
    return total * 1024


@dataclass(frozen=True)
class Machine:
    """Seconds that all cores together were busy, or stolen by the hypervisor, since the start."""

    busy: float
    stolen: float

    @classmethod
    def now(cls) -> Machine:
        """From `/proc/stat` (proc(5))."""
        fields = [int(x) / TICK for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        return cls(user + nice + system + irq + softirq, steal)


def cores() -> tuple[int, int]:
    """The core of the servers and that of the generator."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise Failed("two cores are needed: one for the server, one for the generator")
    return allowed[0], allowed[1]


def start(
    command: Sequence[str],
    core: int | Collection[int],
    *,
    log: Path | None = None,
    user: tuple[int, int] | None = None,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    pipes: bool = False,
) -> subprocess.Popen[bytes]:
    """A child in its own session, pinned to `core`, or to these; as `user` (uid, gid) for root."""
    allowed = os.sched_getaffinity(0)
    output = log.open("ab") if log is not None else None
    # A child inherits the mask: set here, it holds from the child's first instruction on.
    os.sched_setaffinity(0, {core} if isinstance(core, int) else core)
    try:
        uid, gid = user if user is not None else (None, None)
        return subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else output,
            stderr=subprocess.PIPE if pipes else output,
            start_new_session=True,
            env=env,
            cwd=cwd,
            user=uid,
            group=gid,
            extra_groups=None if user is None else [],
        )
    finally:
        os.sched_setaffinity(0, allowed)
        if output is not None:
            output.close()


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and its process group; it has ten seconds to do so by itself."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        if child.poll() is not None and number == signal.SIGTERM:
            continue
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            pass
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int) -> None:
    """Until nobody listens on this port of loopback any more. Raises `Failed`."""
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        with socket.socket() as probe:
            # As servers do: what is left of closed connections does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Failed(f"its port is still in use: {error.strerror}") from None
        time.sleep(0.05)


def wait_for_greeting(child: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server greets with `+OK`. Raises `Failed` with the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
                if client.recv(512).startswith(b"+OK"):
                    client.sendall(b"QUIT\r\n")
                    return
        except OSError:
            pass
        time.sleep(0.1)
    tail = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
    raise Failed("did not start: " + " / ".join(tail))
