"""kill -9 and errors at the system calls of a real `twistd popdrop`, by strace.

    python -m tests.crash.server                  # the sample that is in the test suite
    python -m tests.crash.server --long           # every point; some minutes
    python -m tests.crash.server --long --only kill

Prints a table: campaign, scenario, points tried, violations. The campaigns:

    kill    SIGKILL at each call of a QUIT that changes a file or a lock, and at the answer
    again   the same at each call of the login that recovers from such a kill
    errors  an error at each call of a QUIT, a login, a recovery: once, and from then on
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.crash.errors import Errors
from tests.crash.kills import Kills, KillsAgain
from tests.crash.points import HEADING, Row

SAMPLE = {"kill": 24, "again": 2, "errors": 12}
"""Points of the short form: in all, of each state, of each scene and phase; but all kinds of
calls, at a kill and an error."""


def campaign(name: str, limit: int) -> list[Row]:
    """One of those named above; a `limit` of 0 is every point."""
    if name == "kill":
        return Kills(limit).run()
    return KillsAgain(limit).run() if name == "again" else Errors(limit).run()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.server")
    parser.add_argument("--long", action="store_true", help="every point")
    parser.add_argument("--only", choices=list(SAMPLE), action="append")
    options = parser.parse_args(arguments)
    print(HEADING)
    failed = False
    begun = time.monotonic()
    for name in options.only or SAMPLE:
        for row in campaign(name, 0 if options.long else SAMPLE[name]):
            print(row.text(), *row.violations, sep="\n    ", flush=True)
            failed = failed or bool(row.violations)
    print(f"{time.monotonic() - begun:.0f} s, {'VIOLATIONS' if failed else 'no violation'}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
