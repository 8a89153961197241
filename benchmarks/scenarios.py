"""What is measured: each scenario, its figures, and Popdrop's targets beside Dovecot tuned.

A target is the ratio of two figures in the design's table, Popdrop's and that of Dovecot tuned:
`release` for the first release, `goal` for later. Ratios are of the figure in that row, so below 1
is better where less is better. A `limit` is a bound for Popdrop's own figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks import tools
from benchmarks.bench import SESSION_USERS, SMALL, Bench, Figure
from benchmarks.generator import Run
from benchmarks.peers import Peer
from benchmarks.process import Failed, NotApplicable

CONCURRENCY = 16
GROWTH = 10
"""Messages that come to a large maildrop between two sessions."""
SETTLED = 3.0
"""Seconds after which a spool's times are old enough for every server's index."""


@dataclass(frozen=True)
class Scenario:
    """`measure(bench, peer, number)` does one run; number -1 is the one that is not counted."""

    key: str
    title: str
    measure: Callable[[Bench, Peer, int], Run]
    figures: Sequence[Figure]
    auth: str | None = None
    """`apop` or `pass` where the scenario is about that one; else what the peer can do."""
    after_open: bool = False
    """Whether it wants the large maildrop that `open` has left."""
    warm_up: bool = True

    def rounds(self, bench: Bench) -> Iterator[int]:
        """The numbers of the runs."""
        return iter(range(-1 if self.warm_up else 0, bench.sizes.runs))

    def takes(self, peer: Peer, number: int) -> bool:
        """Whether this peer takes part in this run: a slow one once, but for small maildrops."""
        return not peer.slow or number <= 0 or self.auth is not None


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
    user = f"big{number}"
    if (old := bench.opened.pop(peer.key, None)) is not None:
        peer.remove(old)
    bench.place_large(peer, user)
    run = _login(bench, peer, user, bench.large_messages)
    again = _login(bench, peer, user, bench.large_messages)
    bench.opened[peer.key] = user
    warm = {"warm_seconds": again.seconds, "warm_uidl_seconds": again.more["uidl_seconds"]}
    return replace(run, more={**run.more, **warm})


def _login(bench: Bench, peer: Peer, user: str, messages: int) -> Run:
    options = {"user": user, "probe_user": "probe", "messages": messages}
    return bench.generator.run(peer, "open", peer.auth[0], **options)


def _restart(bench: Bench, peer: Peer) -> None:
    """A server that has served some small sessions: what it loads or starts first is done."""
    peer.restart()
    bench.generator.run(
        peer,
        "session",
        peer.auth[0],
        user="s",
        users=SESSION_USERS,
        concurrency=4,
        count=SESSION_USERS,
        messages=SMALL,
    )


def _reopen(bench: Bench, peer: Peer, number: int) -> Run:
    user = bench.large_of(peer)
    if number == 0 and not peer.slow:
        # The sessions before may have seen a file that was too young for an index to trust.
        tools.let_settle(peer.spool(user), SETTLED)
        _login(bench, peer, user, bench.large_messages)
    _restart(bench, peer)
    return _login(bench, peer, user, bench.large_messages)


def _memory(bench: Bench, peer: Peer, number: int) -> Run:
    user = bench.large_of(peer)
    run, indexed = _weigh(bench, peer, user)
    if peer.slow:  # it reads all of it in any case
        return replace(run, more={"indexed": indexed, "scanned": indexed})
    bench.place_large(peer, "cold")
    run, scanned = _weigh(bench, peer, "cold")
    peer.remove("cold")
    return replace(run, more={"indexed": indexed, "scanned": scanned})


def _weigh(bench: Bench, peer: Peer, user: str) -> tuple[Run, float]:
    """Octets of memory a message: the large maildrop less an empty one, in the same server."""
    _restart(bench, peer)
    empty = bench.generator.run(peer, "hold", peer.auth[0], user="empty")
    if empty.count:
        raise Failed("the empty maildrop has messages")
    options = {"user": user, "messages": bench.large_messages}
    run = bench.generator.run(peer, "hold", peer.auth[0], **options)
    return run, (run.more["memory"] - empty.more["memory"]) / run.count


def _grown(bench: Bench, peer: Peer, number: int) -> Run:
    user = bench.large_of(peer)
    spool, here = peer.spool(user), bench.large_messages
    old, new, newer = (2 * number * GROWTH + extra for extra in (0, GROWTH, 2 * GROWTH))
    unchanged = {}
    if not peer.slow:
        unchanged["unchanged_seconds"] = _login(bench, peer, user, here + old).seconds
    peer.stop()
    tools.append(spool, bench.arriving(old, new))
    tools.let_settle(spool, SETTLED)
    _restart(bench, peer)
    run = _login(bench, peer, user, here + new)
    tools.append(spool, bench.arriving(new, newer))
    time.sleep(0.1)  # more than a tick of the file system's clock
    again = _login(bench, peer, user, here + newer)
    running = {"running_seconds": again.seconds}
    return replace(run, more={**run.more, **unchanged, **running})


def _rows(scenario: str) -> Callable[[Bench, Peer, int], Run]:
    def measure(bench: Bench, peer: Peer, number: int) -> Run:
        user = bench.large_of(peer)
        return bench.generator.run(
            peer,
            scenario,
            peer.auth[0],
            user=user,
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
    return lambda run: run.more.get(name, float("nan")) * factor


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
            Figure(
                "NOOP p99 during the open, ms", _more("open_p99_ms"), True, digits=2, limit=10.0
            ),
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
        after_open=True,
    ),
    Scenario(
        "uidl",
        "UIDL of the large maildrop, warm",
        _rows("uidl"),
        (Figure("UIDL of the large maildrop, ms", _ms_per_item, True, None, 25 / 82),),
        after_open=True,
    ),
    Scenario(
        "reopen",
        "Open the unchanged large spool after the server was restarted",
        _reopen,
        (
            Figure(
                "open after a restart, ms",
                lambda run: run.seconds * 1e3,
                True,
                None,
                5 / 46,
                may_bind=False,
            ),
            Figure("UIDL after it, ms", _more("uidl_seconds", 1e3), True, may_bind=False),
        ),
        warm_up=False,
        after_open=True,
    ),
    Scenario(
        "memory",
        "Memory of the large maildrop after LIST and UIDL, less that of an empty one",
        _memory,
        (
            Figure(
                "open maildrop that was indexed, octets of memory a message",
                _more("indexed"),
                True,
                may_bind=False,
                limit=64.0,
            ),
            Figure(
                "the same, never seen before",
                _more("scanned"),
                True,
                may_bind=False,
                limit=64.0,
            ),
        ),
        warm_up=False,
        after_open=True,
    ),
    Scenario(
        "grown",
        f"Open the large spool to which {GROWTH} messages were appended",
        _grown,
        (
            Figure(
                "open of the unchanged spool once more, ms",
                _more("unchanged_seconds", 1e3),
                True,
                may_bind=False,
            ),
            Figure(
                f"open with {GROWTH} new messages after a restart, ms; ratio to unchanged",
                lambda run: run.seconds * 1e3,
                True,
                None,
                8 / 46,
                may_bind=False,
                base=_more("unchanged_seconds", 1e3),
            ),
            Figure(
                f"{GROWTH} more, server running, ms; ratio to unchanged",
                _more("running_seconds", 1e3),
                True,
                None,
                8 / 46,
                may_bind=False,
                base=_more("unchanged_seconds", 1e3),
            ),
        ),
        warm_up=False,
        after_open=True,
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
