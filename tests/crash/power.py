"""Kills and power cuts at every writing call of the journal, with mail that arrives meanwhile.

    python -m tests.crash.power            # the short form, which is in the test suite too
    python -m tests.crash.power --long     # minutes
    python -m tests.crash.power --seed 7 --cuts 200 --cases 500

Each crash is followed by a recovery, which is hit in turn, by kills and power cuts, and recovered.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count

from popdrop.stores.mbox.journal import Piece
from tests.crash.disk import Disk, choices
from tests.crash.scenario import (
    SPOOL,
    Case,
    check,
    end,
    kill_at,
    mail,
    recover,
    run,
    update,
)


class Campaign:
    """`cuts` random disks at each power cut of the update, `inner` at each of a recovery."""

    def __init__(self, seed: int, cuts: int, inner: int) -> None:
        self.random = random.Random(seed)
        self.cuts = cuts
        self.inner = inner
        self.tried: Counter[str] = Counter()

    def _draw(self, versions: int) -> int:
        return self.random.randrange(versions)

    def run(self, case: Case) -> None:
        """Every crash of one update. Raises `Violation`."""
        for number in count():
            ended = "killed"
            for torn in (False, True):
                disk = case.disk()
                ended = run(disk, lambda disk=disk: update(disk, case), kill_at(number, torn))
                self.tried["points"] += 1
                for each in self.after(disk, self.cuts):
                    self._go_on(each, case, ended)
            if ended == "done":
                return

    def after(self, disk: Disk, many: int) -> Iterator[Disk]:
        """What the next start finds: after a kill, and after power cuts."""
        killed = copy.deepcopy(disk)
        killed.kill()
        self.tried["kills"] += 1
        yield killed
        for choose in choices(disk.cut, many, self._draw):
            self.tried["cuts"] += 1
            yield disk.cut(choose)

    def _go_on(self, disk: Disk, case: Case, ended: str) -> None:
        """Recover, and at one call of it, crash again; then at the last without a fault."""
        for arrived in (b"", mail(1)):
            start = copy.deepcopy(disk)
            if arrived:
                start.append(SPOOL, arrived)
            whole = copy.deepcopy(start)
            self._end(whole, case, ended, arrived)
            writes = sum(name in WRITING for name in whole.calls)
            if not writes or not self.inner:
                continue
            number = self.random.randrange(writes)
            run(start, lambda start=start: recover(start), kill_at(number, self._draw(2) > 0))
            self.tried["points"] += 1
            for again in self._some(start):
                late = self._draw(2) * mail(2)
                if late:
                    again.append(SPOOL, late)
                self._end(again, case, ended, arrived + late)

    def _some(self, disk: Disk) -> Iterator[Disk]:
        killed = copy.deepcopy(disk)
        killed.kill()
        self.tried["kills"] += 1
        yield killed
        for _ in range(self.inner):
            self.tried["cuts"] += 1
            yield disk.cut(self._draw)

    def _end(self, disk: Disk, case: Case, ended: str, arrived: bytes) -> None:
        disk.kill()
        end(disk)
        disk.handles.clear()
        check(disk, case, ended, arrived)
        # What was answered must hold even if the power goes right then.
        for choose in (lambda versions: 0, self._draw):
            later = disk.cut(choose)
            end(later)
            check(later, case, ended, arrived)
        self.tried["ends"] += 1


WRITING = frozenset({"pwrite", "fsync", "ftruncate", "rename", "unlink", "create"})


def cases(seed: int, number: int) -> Iterator[Case]:
    """Spools of a few sectors and blocks; every fourth is made of two octets only."""
    draw = random.Random(seed)
    for _ in range(number):
        size = draw.choice([40, 600, 1500, 5000, 9000, 13000])
        kind = draw.randrange(4)
        spool = bytes(draw.randrange(255) if kind else draw.randrange(2) for _ in range(size))
        edges = sorted(draw.sample(range(size + 1), draw.choice([2, 3, 3, 4, 5])))
        first, *rest = edges
        ranges = list(zip(rest[0::2], rest[1::2], strict=False))
        if len(rest) % 2 and rest[-1] < size and draw.randrange(2):
            ranges.append((rest[-1], size))
        if sum(b - a for a, b in ranges) == size - first:
            ranges = []
        kept: list[Piece] = list(ranges)
        if draw.randrange(2) and first < size:
            # Sometimes so many octets that the spool grows.
            many = draw.choice([1, 12, 700, 5000])
            put_in = bytes(draw.choice(b"\n\nab\0") for _ in range(many))
            kept.insert(draw.randint(0, len(kept)), put_in)
        yield Case(
            spool,
            first,
            tuple(kept),
            tear=draw.choice([512, 4096]),
            block=draw.choice([512, 4096, 65536]),
            full=draw.randrange(6) == 0,
            fresh=draw.randrange(3) == 0,
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.power")
    parser.add_argument("--long", action="store_true", help="some minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--cuts", type=int)
    options = parser.parse_args(arguments)
    campaign = Campaign(options.seed, options.cuts or (40 if options.long else 2), 4)
    for case in cases(options.seed, options.cases or (60 if options.long else 6)):
        campaign.run(case)
    figures = ", ".join(f"{number} {name}" for name, number in sorted(campaign.tried.items()))
    print(f"{figures}: no violation")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
