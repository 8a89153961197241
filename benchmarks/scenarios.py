"""What is measured: each scenario, its figures, and Popdrop's targets beside Dovecot tuned.

A target is the ratio of two figures in the design's table, Popdrop's and that of Dovecot tuned:
`release` for the first release, `goal` for later. Ratios are of the figure in that row, so below 1
is better where less is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import tools
from benchmarks.generator import Generator, Run
from benchmarks.peers import Peer
from benchmarks.process import NotApplicable

SESSION_USERS = 32
CONCURRENCY = 16
SMALL = 10
"""Messages in the maildrop of a session."""


@dataclass(frozen=True)
class Figure:
    """One row of the table. `value` makes the figure from a run."""

    title: str
    value: Callable[[Run], float]
    less_is_better: bool
    release: float | None = None
    goal: float | None = None
    digits: int = 1
    may_bind: bool = True
    """Whether a generator near a whole core casts doubt on the row."""


@dataclass(frozen=True)
class Sizes:
    """How much is done: the short form, or the long one."""

    runs: int
    messages: int
    """In the spool of RETR, TOP and DELE."""
    large: int
    """Octets of the spool that is opened."""
    sessions: int
    seconds: float
    """Begin nothing new after so long: slow peers do less, not longer."""


SHORT = Sizes(runs=3, messages=10_000, large=500_000_000, sessions=3000, seconds=1.5)
LONG = Sizes(runs=7, messages=20_000, large=1_090_000_000, sessions=15_000, seconds=8.0)


class Bench:
    """All peers, one generator, the spools."""

    def __init__(self, generator: Generator, sizes: Sizes) -> None:
        self.generator = generator
        self.sizes = sizes
        self.small, _ = tools.spool(messages=SMALL)
        self.drop, _ = tools.spool(messages=sizes.messages)
        self.large: Path | None = None
        self.large_messages = 0

    def users(self) -> list[str]:
        """Every user that the scenarios need."""
        large = [f"big{i}" for i in range(self.sizes.runs)]
        return [f"s{i}" for i in range(SESSION_USERS)] + ["probe", "drop", "gone", *large]

    def furnish(self, peer: Peer) -> None:
        """The maildrops that stay."""
        for i in range(SESSION_USERS):
            peer.place(self.small, f"s{i}")
        peer.place(self.small, "probe")
        peer.place(self.drop, "drop")

    def place_large(self, peer: Peer, number: int) -> None:
        """A fresh large maildrop at a path that this server has never seen: no index."""
        if self.large is None:
            self.large, self.large_messages = tools.spool(octets=self.sizes.large)
        for old in range(number):
            peer.remove(f"big{old}")
        peer.place(self.large, f"big{number}")


@dataclass(frozen=True)
class Scenario:
    """`measure(bench, peer, number)` does one run; number -1 is the one that is not counted."""

    key: str
    title: str
    measure: Callable[[Bench, Peer, int], Run]
    figures: Sequence[Figure]
    auth: str | None = None
    """`apop` or `pass` where the scenario is about that one; else what the peer can do."""
    warm_up: bool = True

    def rounds(self, bench: Bench) -> Iterator[int]:
        """The numbers of the runs."""
        return iter(range(-1 if self.warm_up else 0, bench.sizes.runs))


def _sessions(auth: str) -> Callable[[Bench, Peer, int], Run]:
    def measure(bench: Bench, peer: Peer, number: int) -> Run:
        sizes = bench.sizes
        return bench.generator.run(
            peer,
            "session",
            auth,
            user="s",
            users=SESSION_USERS,
            concurrency=CONCURRENCY,
            count=sizes.sessions // 4 if number < 0 else sizes.sessions,
            seconds=sizes.seconds,
            messages=SMALL,
        )

    return measure


def _fetch(scenario: str, window: int, times: int) -> Callable[[Bench, Peer, int], Run]:
    def measure(bench: Bench, peer: Peer, number: int) -> Run:
        sizes = bench.sizes
        return bench.generator.run(
            peer,
            scenario,
            peer.auth[0],
            user="drop",
            window=window,
            count=sizes.messages * (1 if number < 0 else times),
            seconds=sizes.seconds,
        )

    return measure


def _open(bench: Bench, peer: Peer, number: int) -> Run:
    if not peer.maildrops:
        raise NotApplicable
    bench.place_large(peer, number)
    options = {"user": f"big{number}", "probe_user": "probe", "messages": bench.large_messages}
    run = bench.generator.run(peer, "open", peer.auth[0], **options)
    again = bench.generator.run(peer, "open", peer.auth[0], **options)
    warm = {"warm_seconds": again.seconds, "warm_uidl_seconds": again.more["uidl_seconds"]}
    return Run(**{**vars(run), "more": {**run.more, **warm}})


def _rows(scenario: str) -> Callable[[Bench, Peer, int], Run]:
    def measure(bench: Bench, peer: Peer, number: int) -> Run:
        last = f"big{bench.sizes.runs - 1}"
        if not peer.has(last):
            raise NotApplicable
        return bench.generator.run(
            peer,
            scenario,
            peer.auth[0],
            user=last,
            messages=bench.large_messages,
            count=10,
            seconds=5,
        )

    return measure


def _delete(bench: Bench, peer: Peer, number: int) -> Run:
    if not peer.maildrops:
        raise NotApplicable
    peer.place(bench.drop, "gone")
    return bench.generator.run(peer, "delete", peer.auth[0], user="gone")


def _ms_per_item(run: Run) -> float:
    return run.seconds * 1e3 / run.count


def _cpu_ms(run: Run) -> float:
    return run.cpu * 1e3 / run.count


def _rate(run: Run) -> float:
    return run.count / run.seconds


def _more(name: str, factor: float = 1.0) -> Callable[[Run], float]:
    return lambda run: run.more[name] * factor


SCENARIOS = (
    Scenario(
        "session-apop",
        f"APOP session: login, STAT, QUIT; {SMALL} messages, {CONCURRENCY} at once",
        _sessions("apop"),
        (
            Figure("CPU ms a session, APOP", _cpu_ms, True, 0.35 / 0.88, 0.25 / 0.88, 3),
            Figure("sessions/s, APOP", _rate, False, None, 4000 / 898, 0),
        ),
        auth="apop",
    ),
    Scenario(
        "session-pass",
        "The same with USER and PASS",
        _sessions("pass"),
        (
            Figure("CPU ms a session, USER/PASS", _cpu_ms, True, None, 0.25 / 0.88, 3),
            Figure("sessions/s, USER/PASS", _rate, False, None, 4000 / 898, 0),
        ),
        auth="pass",
    ),
    Scenario(
        "retr-1",
        "RETR, one at a time",
        _fetch("retr", 1, 1),
        (
            Figure(
                "RETR one at a time, messages/s",
                _rate,
                False,
                8000 / 13_332,
                14_500 / 13_332,
                0,
                may_bind=False,
            ),
            Figure("the same, CPU ms a message", _cpu_ms, True, digits=3, may_bind=False),
        ),
    ),
    Scenario(
        "retr-32",
        "RETR, 32 in flight",
        _fetch("retr", 32, 2),
        (
            Figure(
                "RETR 32 in flight, CPU s/GB",
                lambda run: run.cpu * 1e9 / run.octets,
                True,
                2.5 / 3.83,
                1.2 / 3.83,
                2,
            ),
            Figure(
                "the same, MB/s", lambda run: run.octets / 1e6 / run.seconds, False, None, 720 / 247
            ),
        ),
    ),
    Scenario(
        "top-32",
        "TOP n 0, 32 in flight",
        _fetch("top", 32, 4),
        (
            Figure("TOP n 0, 32 in flight, messages/s", _rate, False, None, 50_000 / 46_079, 0),
            Figure("the same, CPU ms a message", _cpu_ms, True, digits=3),
        ),
    ),
    Scenario(
        "open",
        "Open a large spool; another session sends NOOP at 1 kHz",
        _open,
        (
            Figure(
                "open without index, ms",
                lambda run: run.seconds * 1e3,
                True,
                2200 / 8541,
                1300 / 8541,
            ),
            Figure("the same and first UIDL, CPU s", lambda run: run.cpu, True, digits=2),
            Figure("NOOP p99 during the open, ms", _more("open_p99_ms"), True, digits=2),
            Figure("NOOP max during the open, ms", _more("open_max_ms"), True, digits=2),
            Figure("NOOP max with nothing else, ms", _more("idle_max_ms"), True, digits=2),
            Figure("first UIDL, ms", _more("uidl_seconds", 1e3), True),
            Figure("NOOP p99 during the first UIDL, ms", _more("uidl_p99_ms"), True, digits=2),
            Figure("NOOP max during the first UIDL, ms", _more("uidl_max_ms"), True, digits=2),
            Figure("open again, ms", _more("warm_seconds", 1e3), True, None, 5 / 46),
            Figure("UIDL after it, ms", _more("warm_uidl_seconds", 1e3), True),
        ),
        warm_up=False,
    ),
    Scenario(
        "list",
        "LIST of the large maildrop, warm",
        _rows("list"),
        (Figure("LIST of the large maildrop, ms", _ms_per_item, True, None, 15 / 16),),
    ),
    Scenario(
        "uidl",
        "UIDL of the large maildrop, warm",
        _rows("uidl"),
        (Figure("UIDL of the large maildrop, ms", _ms_per_item, True, None, 25 / 82),),
    ),
    Scenario(
        "delete",
        "DELE every tenth message; what is timed is QUIT",
        _delete,
        (
            Figure("QUIT with a tenth deleted, ms", lambda run: run.seconds * 1e3, True, None, 1.0),
            Figure("the same, CPU ms", lambda run: run.cpu * 1e3, True, digits=0),
        ),
        warm_up=False,
    ),
)
