"""`python -m benchmarks.logins`: what logins cost, and how long others wait for them.

- The longest wait of a logged-in session that sends NOOP after NOOP, while 200 others log in by
  password at once; and the longest in as much time without them, which is the machine's own.
- Processor time of the server for a login by APOP, over the same session without the work of
  authentication: with a checker that says yes at once, without a look at account and digest.
- Processor time of the server for all that a login brings, maildrop and log lines included: of the
  session `connect, CAPA, APOP, QUIT` over `connect, CAPA, QUIT`, one after another and sixteen at
  once. Of the same with a wrong digest, too, which is verification and log line without a maildrop.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from benchmarks.mechanisms import Client, apop, user_pass
from benchmarks.peers import Popdrop
from benchmarks.process import tree_cpu
from benchmarks.scene import serving

_UNCHECKED = """
from functools import lru_cache
from twisted.internet.defer import succeed
from popdrop.accounts.checkers import AccountsChecker
from popdrop.values import Account, Verified
seen = lru_cache(None)(lambda name: Verified(Account(name)))
AccountsChecker.requestAvatarId = lambda self, given: succeed(seen(given.username))
from twisted.scripts.twistd import run
run()
"""


class Unchecked(Popdrop):
    """Lets in whoever comes: nothing is looked up, and no digest is computed."""

    def _twistd(self) -> list[str]:
        return [sys.executable, "-c", _UNCHECKED]


SPOOLS = 64
"""Users who log in by turns, so that nobody finds his maildrop in use."""


def waits(port: int, password: bytes, users: list[str]) -> tuple[list[float], list[float], float]:
    """Round trips of NOOP in seconds, alone and during the logins, and how long these took."""
    watcher = Client(port)
    user_pass(watcher, b"watcher", password)
    clients = [Client(port) for _ in users]
    for client, user in zip(clients, users, strict=True):
        client.ask(b"USER " + user.encode())
    left = threading.Semaphore(0)

    def finish() -> None:
        for client in clients:
            if not client.line().startswith(b"+OK"):
                raise RuntimeError("a login failed")
        left.release()

    def watch(done: Callable[[], bool]) -> list[float]:
        found = []
        while not done():
            began = time.perf_counter()
            watcher.ask(b"NOOP")
            found.append(time.perf_counter() - began)
        return found

    began = time.perf_counter()
    reader = threading.Thread(target=finish)
    for client in clients:
        client.send(b"PASS " + password)
    reader.start()
    during = watch(lambda: left.acquire(blocking=False))
    took = time.perf_counter() - began
    reader.join()
    for client in clients:
        client.close()
    time.sleep(0.5)  # until they are forgotten
    until = time.perf_counter() + took
    alone = watch(lambda: time.perf_counter() >= until)
    watcher.close()
    return alone, during, took


def bare(port: int, user: bytes, password: bytes) -> None:
    """connect, CAPA, QUIT."""
    with Client(port) as client:
        client.capa()
        client.ask(b"QUIT")


def with_apop(port: int, user: bytes, password: bytes) -> None:
    """connect, CAPA, APOP, QUIT."""
    with Client(port) as client:
        client.capa()
        apop(client, user, password)
        client.ask(b"QUIT")


def with_wrong_apop(port: int, user: bytes, password: bytes) -> None:
    """The same with a wrong digest."""
    with_apop(port, user, b"not " + password)


def cpu(
    server: Popdrop, session: Callable[[int, bytes, bytes], None], count: int, at_once: int
) -> float:
    """Seconds of the server's processor time of one session, so many of them at once."""
    began = tree_cpu(server.pid)
    with ThreadPoolExecutor(at_once) as clients:
        for done in [
            clients.submit(session, server.port, b"u%d" % (i % SPOOLS), server.password.encode())
            for i in range(count)
        ]:
            done.result()
    return (tree_cpu(server.pid) - began) / count


def costs(server: Popdrop, count: int, runs: int, at_once: int) -> str:
    """A line with the medians of so many runs."""
    sessions = (bare, with_apop, with_wrong_apop)
    found: dict[str, list[float]] = {each.__name__: [] for each in sessions}
    for number in range(runs + 1):
        for session in sessions:
            used = cpu(server, session, count if number else 50, at_once)
            if number:
                found[session.__name__].append(used * 1e3)
    base, good, wrong = (median(each) for each in found.values())
    return (
        f"CPU of the server, {at_once} at once: bare session {base:.3f} ms, with APOP {good:.3f} ms"
        f" ({good - base:+.3f}), with a wrong digest {wrong:.3f} ms ({wrong - base:+.3f})"
    )


def authentication(server: Popdrop, unchecked: Popdrop, count: int, runs: int, at_once: int) -> str:
    """A line with the medians of so many runs, by turns."""
    found: dict[Popdrop, list[float]] = {server: [], unchecked: []}
    for number in range(runs + 1):
        for each, costs in found.items():
            used = cpu(each, with_apop, count if number else 50, at_once)
            if number:
                costs.append(used * 1e3)
    checked, bare = (median(each) for each in found.values())
    return (
        f"CPU of the server, {at_once} at once: APOP session {checked:.3f} ms,"
        f" without authentication {bare:.3f} ms ({checked - bare:+.3f})"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logins", description=__doc__)
    parser.add_argument("--logins", type=int, default=200, metavar="N", help="(%(default)s)")
    parser.add_argument("--sessions", type=int, default=500, metavar="N", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="(%(default)s)")
    given = parser.parse_args(argv)
    users = [f"u{number}" for number in range(max(given.logins, SPOOLS))]
    with serving(["watcher", *users]) as server:
        password = server.password.encode()
        for _ in range(given.runs):
            alone, during, took = waits(server.port, password, users)
            print(
                f"{given.logins} password logins in {took:.2f} s; NOOP meanwhile:"
                f" median {median(during) * 1e3:.2f} ms,"
                f" longest {max(during) * 1e3:.1f} ms (without logins {max(alone) * 1e3:.1f} ms)"
            )
        for at_once in (1, 16):
            print(costs(server, given.sessions, given.runs, at_once))
        with serving(["watcher", *users], Unchecked) as unchecked:
            for at_once in (1, 16):
                print(authentication(server, unchecked, given.sessions, given.runs, at_once))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
