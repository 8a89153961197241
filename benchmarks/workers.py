"""`python -m benchmarks.workers`: sessions/s of two workers on two cores, and of one on one.

Each session is connect, APOP, STAT, QUIT, 32 at once, by the load generator in C. The servers, one
process without `--workers`, one worker and two, take turns.

One process, or one worker and its parent, has a core for itself, and the generator the other. Two
workers have both cores, and so the generator takes time from them: it is counted apart. What it
used, and what other programs used or the hypervisor took, was not to be had for the server; the
rate for a client on another machine is that of the run divided by the share of the cores that was
left. A core that was idle counts as left, so it does not flatter. `by CPU` is the same from the
server's processor time alone, that of the parent included: sessions/s if its cores did nothing
else. Where both differ, the server was idle at times, or the machine was busy.

Two virtual processors are not always two: in each turn two processes that have nothing in common
also run at the same time, each with 16 sessions on a core of its own, for what the machine gives.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import tools
from benchmarks.generator import Generator, Run
from benchmarks.peers import Popdrop
from benchmarks.process import Failed, cores

MESSAGES = 10
USERS = 128
"""More than are at work at once, so that nobody finds his maildrop in use."""
AT_ONCE = 32
"""16 for each of two workers: fewer are less than a process can do in a turn of its reactor."""
BUSY = 0.2
"""Cores used by others, above which the times say little (benchmarks/README.md)."""


class OneProcess(Popdrop):
    """On one core."""

    key = "one"
    cores = 1
    on_second = False


class OneWorker(OneProcess):
    """One worker and its parent, on one core."""

    key = "worker"
    more_options = ("--workers", "1")


class TwoWorkers(OneProcess):
    """Two workers and their parent, on both cores."""

    key = "workers"
    cores = 2
    more_options = ("--workers", "2")


class Twin(OneProcess):
    """As the first, on the other core."""

    key = "twin"
    on_second = True


@dataclass(frozen=True)
class Rate:
    """Of one run. Rates are sessions per second, times milliseconds of processor a session."""

    measured: float
    apart: float
    """With what the generator and others used of the server's cores counted apart."""
    ceiling: float
    """By the server's processor time alone."""
    server: float
    generator: float
    others: float
    """Cores, of those that do not belong to the server alone."""

    @classmethod
    def of(cls, run: Run, count: int, shared: bool) -> Rate:
        """`count` is the number of the server's cores; `shared`: it shares them with the generator.

        Raises `Failed` where nothing was left for the server.
        """
        measured = run.count / run.seconds
        left = count - (run.generator + run.others if shared else 0.0)
        if left <= 0 or run.cpu <= 0:
            raise Failed("the machine is too busy: nothing was left for the server")
        return cls(
            measured,
            measured * count / left,
            run.count / run.cpu * count,
            run.cpu / run.count * 1e3,
            run.generator,
            run.others,
        )


def middle(rates: Sequence[Rate]) -> Rate:
    """The median of each figure."""
    columns = zip(*(vars(rate).values() for rate in rates), strict=True)
    return Rate(*map(median, columns))


@contextmanager
def serving(
    kinds: Sequence[type[OneProcess]], options: tuple[str, ...]
) -> Iterator[list[OneProcess]]:
    """All of them at once, with these options, idle until they are asked.

    Raises `Failed`, `tools.Missing`.
    """
    first, second = cores()
    folder = Path(tempfile.mkdtemp(prefix="popdrop-bench-", dir="/var/tmp"))
    folder.chmod(0o755)
    users = [f"s{number}" for number in range(USERS)]
    small, _ = tools.spool(messages=MESSAGES)
    password = secrets.token_hex(12)
    servers: list[OneProcess] = []
    try:
        for kind in kinds:
            own = second if kind.on_second else first
            server = kind(folder, own if kind.cores == 1 else (first, second), password)
            server.more_options += options
            servers.append(server)
            server.start(users)
            for user in users:
                server.place(small, user)
        yield servers
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def measure(server: OneProcess, count: int) -> Rate:
    """One run."""
    shared = server.cores > 1
    generator = Generator(cores() if shared else cores()[1])
    options = {"users": USERS, "concurrency": AT_ONCE, "messages": MESSAGES}
    run = generator.run(server, "session", "apop", user="s", count=count, **options)
    return Rate.of(run, server.cores, shared)


def together(servers: Sequence[OneProcess], count: int) -> float:
    """Milliseconds of processor a session, of processes that know nothing of each other."""

    def work(server: OneProcess) -> Run:
        options = {"users": USERS, "concurrency": AT_ONCE // 2, "messages": MESSAGES}
        return Generator(cores()).run(
            server, "session", "apop", user="s", count=count // 2, **options
        )

    with ThreadPoolExecutor(len(servers)) as pool:
        runs = list(pool.map(work, servers))
    return sum(run.cpu for run in runs) / sum(run.count for run in runs) * 1e3


def ceiling(alone: Sequence[Rate], both: Sequence[float]) -> str:
    """How many times as fast as one process two are that share nothing but the machine."""
    one = [rate.server for rate in alone]
    times = 2 * median(one) / median(both)
    best = 2 * min(one) / min(both)
    return (
        "two processes that share nothing / one: by CPU"
        f" {times:.2f}, in the best runs {best:.2f}: what the machine has for two"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__)
    parser.add_argument("--sessions", type=int, default=4000, metavar="N", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--throttle", default="off", metavar="TEXT", help="(%(default)s)")
    given = parser.parse_args(argv)
    kinds = (OneProcess, OneWorker, TwoWorkers)
    with serving((*kinds, Twin), ("--throttle", given.throttle)) as (*servers, twin):
        found: dict[str, list[Rate]] = {server.key: [] for server in servers}
        both: list[float] = []
        for number in range(given.runs + 1):
            for server in servers:
                rate = measure(server, given.sessions if number else 500)
                if number:
                    found[server.key].append(rate)
            apart = together((servers[0], twin), given.sessions if number else 500)
            if number:
                both.append(apart)
    print(table(kinds, found))
    print(ceiling(found[OneProcess.key], both))
    return 0


def table(kinds: Sequence[type[OneProcess]], found: Mapping[str, Sequence[Rate]]) -> str:
    """The medians of each, and how many times as fast the last is as each other.

    Its last figure is from the runs that took least processor time: the least disturbed ones.
    """
    middles = {key: middle(rates) for key, rates in found.items()}
    best = {key: max(rate.ceiling for rate in rates) for key, rates in found.items()}
    lines = ["sessions/s  measured  client apart  by CPU  CPU ms  generator  others"]
    for kind in kinds:
        rate = middles[kind.key]
        lines.append(
            f"{kind.key:10} {rate.measured:9.0f} {rate.apart:13.0f} {rate.ceiling:7.0f}"
            f" {rate.server:7.3f} {rate.generator:10.2f} {rate.others:7.2f}"
        )
    *others, last = (middles[kind.key] for kind in kinds)
    for kind, one in zip(kinds, others, strict=False):
        lines.append(
            f"{kinds[-1].key} / {kind.key}: {last.apart / one.apart:.2f}, with the client on the"
            f" same cores {last.measured / one.measured:.2f}; by CPU"
            f" {last.ceiling / one.ceiling:.2f}, in the best runs"
            f" {best[kinds[-1].key] / best[kind.key]:.2f}"
        )
    if max(rate.others for rate in middles.values()) > BUSY:
        lines.append(f"Others used over {BUSY} cores: measure again, or trust `by CPU` only.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
