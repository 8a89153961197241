"""`python -m benchmarks.enumeration`: does the time of a failed login tell who has an account?

For each mechanism the median time from the first command of the login to the answer of its last
one, of an account with a wrong secret and of a name without an account, in turns, each try on a
connection of its own. With `--throttle off`: with it all answers come after a second or more, to
the clock, and there is nothing to measure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

from benchmarks.mechanisms import MECHANISMS, Client, Mechanism
from benchmarks.scene import serving

TARGET = 5.0
"""Per cent, by which the medians may differ."""


def seconds(port: int, mechanism: Mechanism, name: bytes) -> float:
    """Of one failed login. Raises `RuntimeError` where it did not fail as it should."""
    with Client(port) as client:
        began = time.perf_counter()
        answers = mechanism(client, name, b"a wrong one")
        took = time.perf_counter() - began
        if not answers[-1].startswith(b"-ERR [AUTH]"):
            raise RuntimeError(f"answered {answers[-1]!r}")
        return took


def medians(tries: int, known: Callable[[], float], unknown: Callable[[], float]) -> list[float]:
    """Of so many tries each. They take turns, and each goes first as often as the other."""
    taken: list[list[float]] = [[], []]
    for number in range(tries):
        for which in (0, 1) if number % 2 else (1, 0):
            taken[which].append((known, unknown)[which]())
    return [median(each) for each in taken]


def difference(known: float, unknown: float) -> float:
    """Per cent of the smaller one."""
    return 100 * abs(known - unknown) / min(known, unknown)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 1 where a mechanism is over the target."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.enumeration", description=__doc__)
    parser.add_argument("--tries", type=int, default=200, metavar="N", help="(%(default)s)")
    parser.add_argument("--mechanisms", metavar="A,B", help="only these")
    given = parser.parse_args(argv)
    names = given.mechanisms.split(",") if given.mechanisms else list(MECHANISMS)
    over = 0
    print("| Mechanism | Account, ms | No account, ms | Difference, % |\n|---|---|---|---|")
    with serving(["bob"]) as server:
        for name in names:
            mechanism = MECHANISMS[name]

            def known(mechanism: Mechanism = mechanism) -> float:
                return seconds(server.port, mechanism, b"bob")

            def unknown(mechanism: Mechanism = mechanism) -> float:
                return seconds(server.port, mechanism, b"eve")

            medians(5, known, unknown)  # the threads are there then
            found = medians(given.tries, known, unknown)
            apart = difference(*found)
            over += apart >= TARGET
            print(f"| {name} | {found[0] * 1e3:.3f} | {found[1] * 1e3:.3f} | {apart:.1f} |")
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
