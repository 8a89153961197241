"""`python -m benchmarks.tls`: TLS with Popdrop and with its peers, for RSA-2048 and ECDSA P-256.

Processor time of the server for one session, sixteen clients at a time:

- `session-plain`: connect, APOP, STAT, QUIT without TLS.
- `session-tls-bare`: connect, handshake, CAPA, QUIT, without a login.
- `session-tls`: connect, handshake, APOP, STAT, QUIT, without tickets.
- `session-tls-resumed`: the same by the ticket of the client's last session.

MB/s, octets as sent before encryption, TLS 1.3, and what the server's and the client's processor
do meanwhile:

- `retr-32`, `retr-32-tls`: RETR of a spool, 32 in flight.
- `retr-big`, `retr-big-tls`: RETR of one large message.

The client is Python on the other core. What it cannot take the server cannot send: a rate at which
it used over 90 % of its core has a `*`, and is the client's.
"""

from __future__ import annotations

import argparse
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median

from benchmarks import tools
from benchmarks.process import Failed, Machine, tree_cpu
from benchmarks.scene import serving
from benchmarks.secure import KEYS, SERVERS, Secure
from benchmarks.visitor import NotResumed, Visitor, Waiting, crowd

AT_ONCE = 16
"""As in the measurements that the targets come from."""
MESSAGES = 10
BOUND = 0.9
"""Share of its core above which the client was the bottleneck."""
BUSY = 0.2
"""Cores used by others, above which the figures say little (benchmarks/README.md)."""
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
OURS, BASE, CANNED = "popdrop", "dovecot-tuned", "canned-twisted"
RSA = "RSA-2048"
WHOLE = ((RSA, "full", 1.0), ("ECDSA P-256", "full", 0.8), ("ECDSA P-256", "resumed", 0.5))
"""What was aimed at, in ms, where Dovecot tuned took 1.57 to 1.74 with RSA."""

LIMIT = ("canned Twisted", "resumed", 0.0)
"""Beside the last: the same key and way where nothing is done. Nothing was aimed at."""

Measured = tuple[float, float]
"""A figure, and the share of its core that the client used."""
Found = Mapping[str, Sequence[Measured] | str]
"""By server: one run after another, or why there is none."""


@dataclass(frozen=True)
class Figure:
    """A row: what is measured, and Popdrop's ratio to Dovecot tuned that is wanted."""

    title: str
    measure: Callable[[Secure], tuple[Measured, ...]]
    """One run: of this row, and of those of `more`."""
    less_is_better: bool = True
    target: tuple[float, float] | None = None
    """The same twice, or the range that follows from the range of the peer's figure."""
    mail: bool = False
    """Whether a maildrop is needed: ready-made answers have none."""
    more: tuple[tuple[str, bool], ...] = ()
    """Rows of what the same run has also told, less being better; whether they have a ratio."""


def sessions(
    version: ssl.TLSVersion | None, way: str, count: int, server: Secure
) -> tuple[Measured, ...]:
    """Milliseconds of the server's processor time of one session, `AT_ONCE` at a time.

    `way` is `bare`, `full` or `resumed`. Raises `NotResumed`, `Failed`.
    """
    resume = way == "resumed"
    visitors = [Visitor(server, f"s{number}", version, resume) for number in range(AT_ONCE)]
    each = max(count // AT_ONCE, 1)

    def visits(visitor: Visitor, times: int) -> Iterator[Waiting[None]]:
        return (visitor.look_in() if way == "bare" else visitor.visit() for _ in range(times))

    def work(times: int) -> None:
        crowd([visits(visitor, times) for visitor in visitors])

    work(1)  # not counted: what is loaded at the first session, and each client's first ticket
    began = tree_cpu(server.pid)
    work(each)
    # Not a rate: how busy the client is does not matter.
    return (((tree_cpu(server.pid) - began) * 1e3 / (each * AT_ONCE), 0.0),)


def fetched(
    version: ssl.TLSVersion | None, user: str, count: int, server: Secure
) -> tuple[Measured, ...]:
    """MB/s, the server's processor seconds per GB, and the client's share of its core in %."""
    ran = Visitor(server, user, version).fetch(count)
    share = ran.client / ran.seconds
    rate = ran.octets / 1e6 / ran.seconds
    return (rate, share), (ran.server * 1e9 / ran.octets, 0.0), (share * 100, 0.0)


def figures(sort: str, count: int, messages: int) -> Iterator[Figure]:
    """The rows of one sort of key. The targets are quotients of the figures that were aimed at."""
    yield Figure(
        "session-plain, CPU ms",
        partial(sessions, None, "full", count),
        target=(0.25 / 0.88, 0.25 / 0.88),
    )
    # 1.0 ms against Dovecot's 1.57 to 1.74, its certificate RSA.
    whole = (1.0 / 1.74, 1.0 / 1.57) if sort.startswith("RSA") else None
    for way, title in (("bare", "-bare"), ("full", ""), ("resumed", "-resumed")):
        for name, version in VERSIONS.items():
            yield Figure(
                f"session-tls{title} {name}, CPU ms",
                partial(sessions, version, way, count),
                target=whole if way == "full" else None,
            )
    for title, user, number, version, target in (
        ("retr-32", "drop", messages, None, 720 / 247),
        ("retr-32-tls", "drop", messages, VERSIONS["1.3"], 400 / 124),
        ("retr-big", "big", 1, None, 850 / 386),
        ("retr-big-tls", "big", 1, VERSIONS["1.3"], 450 / 178),
    ):
        yield Figure(
            f"{title}, MB/s",
            partial(fetched, version, user, number),
            less_is_better=False,
            target=(target, target),
            mail=True,
            more=(("  server, CPU s/GB", True), ("  client, % of its core", False)),
        )


def take_turns(figure: Figure, servers: Sequence[Secure], runs: int) -> list[Found]:
    """All runs of one figure, one server after another in each; for each of its rows."""
    rows: list[dict[str, list[Measured] | str]] = [
        {server.key: [] if server.maildrops or not figure.mail else "-" for server in servers}
        for _ in (figure.title, *figure.more)
    ]
    for number in range(runs + 1):
        for server in servers:
            if isinstance(rows[0][server.key], str):
                continue
            try:
                told = figure.measure(server)
            except NotResumed:
                rows[0][server.key] = "not resumed"
                continue
            except (Failed, OSError) as error:
                print(f"{server.title}, {figure.title}: {error or type(error).__name__}")
                rows[0][server.key] = "failed"
                continue
            # The first run only warms caches and indexes.
            for row, value in zip(rows, told if number else (), strict=False):
                values = row[server.key]
                if isinstance(values, list):
                    values.append(value)
    return list(rows)


def cell(found: Sequence[Measured] | str | None) -> str:
    """The median, with a `*` where the client was the bottleneck; or why there is none."""
    if not found or isinstance(found, str):
        return found or "-"
    middle = median(value for value, _ in found)
    digits = sum(middle < bound for bound in (1, 10, 100))
    return f"{middle:.{digits}f}" + "*" * (median(share for _, share in found) > BOUND)


def _ratios(found: Found, less_is_better: bool) -> tuple[float, float] | None:
    """Of the medians, and of the best runs."""
    ours, base = (
        [] if isinstance(runs, str) else [value for value, _ in runs]
        for runs in (found.get(OURS, ()), found.get(BASE, ()))
    )
    best = min if less_is_better else max
    # Nothing at all: less than a tick of the clock, so too few sessions.
    if not ours or not base or not best(base):
        return None
    return median(ours) / median(base), best(ours) / best(base)


def _verdict(figure: Figure, ratio: float | None) -> tuple[str, str]:
    if figure.target is None:
        return "-", ""
    low, high = figure.target
    word = "at most" if figure.less_is_better else "at least"
    text = f"{word} {low:.2f}" + (f"-{high:.2f}" if high > low else "")
    if ratio is None:
        return text, ""
    if figure.less_is_better:
        return text, "met" if ratio <= low else "missed" if ratio > high else "between"
    return text, "met" if ratio >= high else "missed" if ratio < low else "between"


def lines(figure: Figure, rows: Sequence[Found], keys: Sequence[str]) -> Iterator[str]:
    """A row of the table, and those of what the same runs have also told."""
    ratios = _ratios(rows[0], figure.less_is_better)
    cells = [cell(rows[0].get(key)) for key in keys]
    verdict = _verdict(figure, None if ratios is None else ratios[0])
    yield _row(figure.title, cells, [*_shown(ratios), *verdict])
    for (title, compared), found in zip(figure.more, rows[1:], strict=True):
        cells = [cell(found.get(key)) for key in keys]
        yield _row(title, cells, _shown(_ratios(found, True)) if compared else [])


def _shown(ratios: tuple[float, float] | None) -> list[str]:
    return ["-", "-"] if ratios is None else [f"{ratio:.2f}" for ratio in ratios]


def _row(title: str, cells: Sequence[str], rest: Sequence[str]) -> str:
    widths = (7, 7, 18, 8)
    ends = (f"{text:>{width}}" for text, width in zip(rest, widths, strict=False))
    return " ".join((f"{title:32}", *(f"{text:>14}" for text in cells), *ends)).rstrip()


def _start(
    sort: str, keys: Sequence[str], messages: int, big: int, stack: ExitStack
) -> list[Secure]:
    """Those that are installed, with their mail."""
    small, _ = tools.spool(messages=MESSAGES)
    drop, _ = tools.spool(messages=messages)
    large = tools.message(big)
    users = [f"s{number}" for number in range(AT_ONCE)]
    servers: list[Secure] = []
    for key in keys:
        kind = type(SERVERS[key].__name__, (SERVERS[key],), {"sort": sort})
        try:
            server = stack.enter_context(serving([*users, "drop", "big"], kind))
        except (tools.Missing, Failed) as error:
            print(f"{SERVERS[key].title} is left out: {error}")
            continue
        for user in users:
            server.place(small, user)
        server.place(drop, "drop")
        server.place(large, "big")
        servers.append(server)
    return servers


class Load:
    """What other programs use of the machine, from now on."""

    def __init__(self, servers: Sequence[Secure]) -> None:
        self._servers = servers
        self._began = self._now()

    def _now(self) -> tuple[float, float]:
        ours = time.process_time() + sum(tree_cpu(server.pid) for server in self._servers)
        return time.monotonic(), Machine.now().busy - ours

    def others(self) -> float:
        """Cores, so far."""
        began, now = self._began, self._now()
        return max(now[1] - began[1], 0.0) / (now[0] - began[0])


def _table(sort: str, given: argparse.Namespace) -> bool:
    """All that is measured with one sort of key; whether Popdrop did all that was asked."""
    well = True
    with ExitStack() as stack:
        servers = _start(sort, given.peers, given.messages, given.big, stack)
        keys = [server.key for server in servers]
        print("\n" + _row(sort, keys, ("ratio", "best", "target")))
        for name, version in VERSIONS.items():
            chosen = [Visitor(server, "", version).cipher() for server in servers]
            print(
                f"TLS {name}: "
                + ", ".join(f"{each} ({key})" for each, key in zip(chosen, keys, strict=True))
            )
        load = Load(servers)
        for figure in figures(sort, given.sessions, given.messages):
            rows = take_turns(figure, servers, given.runs)
            well = well and not isinstance(rows[0].get(OURS), str)
            print("\n".join(lines(figure, rows, keys)), flush=True)
        print(f"Other load: {load.others():.2f} cores; above {BUSY}, measure again.")
    return well and (OURS in keys or OURS not in given.peers)


def _beside_rsa(given: argparse.Namespace) -> None:
    """Sessions with both sorts of key beside Dovecot's with RSA, as the targets were set.

    And what a resumed one takes in Twisted without any work behind it.
    """
    print("\nSessions of Popdrop's beside a whole one of Dovecot tuned with RSA-2048, by turns")
    with ExitStack() as stack:
        place = partial(_start, messages=MESSAGES, big=MESSAGES, stack=stack)
        ours = {sort: server for sort in KEYS for server in place(sort, [OURS])}
        theirs, canned = place(RSA, [BASE]), place(WHOLE[-1][0], [CANNED])
        if len(ours) < len(KEYS) or not theirs or not canned:
            return
        for name, version in VERSIONS.items():
            run = partial(sessions, version, count=given.sessions)
            calls = [partial(run, "full", server=theirs[0])]
            calls += [partial(run, way, server=ours[sort]) for sort, way, _ in WHOLE]
            calls.append(partial(run, WHOLE[-1][1], server=canned[0]))
            runs = [[call()[0][0] for call in calls] for _ in range(given.runs + 1)][1:]
            base, *found = (median(each) for each in zip(*runs, strict=True))
            for (sort, way, wanted), middle in zip((*WHOLE, LIMIT), found, strict=True):
                target = f"at most {wanted / 1.74:.2f}-{wanted / 1.57:.2f}" if wanted else ""
                cells = [f"{middle:.3g}", f"{base:.3g}"]
                ratio = f"{middle / base:.2f}" if base else "-"
                print(_row(f"{sort}, {way} {name}, CPU ms", cells, [ratio, "", target]))


def _known(text: str) -> list[str]:
    keys = text.split(",")
    for key in keys:
        if key not in SERVERS:
            raise argparse.ArgumentTypeError(f"unknown: {key}; known: {', '.join(SERVERS)}")
    return keys


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return number


def main(argv: list[str] | None = None) -> int:
    """The command line. The status is 1 if Popdrop failed in anything."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"peers: {', '.join(SERVERS)}",
    )
    add = parser.add_argument
    add("--peers", type=_known, default=[OURS, BASE], metavar="A,B", help=f"({OURS},{BASE})")
    add("--sessions", type=_count, default=800, metavar="N", help="a run (%(default)s)")
    add("--messages", type=_count, default=10_000, metavar="N", help="of retr-32 (%(default)s)")
    add("--big", type=_count, default=100_000_000, metavar="OCTETS", help="(%(default)s)")
    add("--runs", type=_count, default=3, metavar="N", help="of each, and one more (%(default)s)")
    given = parser.parse_args(argv)
    well = [_table(sort, given) for sort in KEYS]
    if {OURS, BASE} <= {*given.peers}:
        _beside_rsa(given)
    print("\nratio: Popdrop / Dovecot tuned, of the medians; best: of the best runs.")
    print(f"*: the client used over {BOUND:.0%} of its core, so the server can do more.")
    return 0 if all(well) else 1


if __name__ == "__main__":
    raise SystemExit(main())
