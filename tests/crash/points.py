"""The system calls at which faults are put, and the table of what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeVar

from tests.crash.scene import Place
from tests.crash.strace import Call

T = TypeVar("T")

WRITES = [
    "write",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "fallocate",
    "ftruncate",
    "truncate",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "unlink",
    "unlinkat",
    "mkdir",
    "mkdirat",
    "openat",
    "utimensat",
    "fchmod",
    "fchmodat",
    "fchown",
    "fchownat",
    "fcntl",
]
"""Calls that change files or locks."""
ANSWER = "sendto"
READS = ["pread64", "newfstatat", "getdents64"]
"""Calls that only look."""


@dataclass
class Row:
    """One line of the table."""

    campaign: str
    scene: str
    points: int = 0
    tried: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def count(self, outcome: str) -> None:
        self.tried += 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def text(self) -> str:
        how = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.campaign:7} {self.scene:20} {self.tried:5} of {self.points:5} "
            f"{len(self.violations):10}   {how}"
        )


HEADING = f"{'':7} {'scenario':20} {'points tried':>14} {'violations':>10}   outcomes"


def role(place: Place, call: Call) -> str:
    """What a call is about, in a word; empty for what is none of the mail's."""
    spool = str(place.spool())
    state = str(place.folder.state)
    for path in reversed(call.paths):
        name = path.rpartition("/")[2]
        if path == spool:
            return "spool"
        if path.startswith(f"{state}/journal.key"):
            return "key"
        if path.startswith(f"{state}/locks"):
            return "session lock"
        if path.startswith(f"{state}/index"):
            return "index"
        if ".popdrop" in name:
            return "new journal" if name.endswith(".new") else "journal"
        if path.startswith((f"{spool}.lock", f"{place.home('bob')}/#")) or name == "bob.lock":
            return "dot-lock"
        if path in (str(place.home("bob")), state, f"{state}/journal"):
            return "folder"
    return ANSWER if call.name == ANSWER else ""


def creates(call: Call) -> bool:
    return "O_CREAT" in call.text or "O_TMPFILE" in call.text


def sample(kinds: dict[str, list[tuple[str, T]]], limit: int) -> dict[str, list[T]]:
    """At most `limit` points of all scenes: one of each kind first, then spread evenly."""
    chosen: dict[str, list[T]] = {scene: [] for scene in kinds}
    seen: set[str] = set()
    queues = [[(scene, kind, call) for kind, call in points] for scene, points in kinds.items()]
    # Each scene in turn, and each from another place on.
    turned = [_turn(queue, number, len(queues)) for number, queue in enumerate(queues)]
    mixed = [each for group in zip_longest(*turned) for each in group if each]
    rest = []
    for scene, kind, call in mixed:
        if kind in seen:
            rest.append((scene, call))
        else:
            seen.add(kind)
            chosen[scene].append(call)
    free = max(limit - len(seen), 0)
    for number in range(min(free, len(rest))):
        scene, call = rest[number * len(rest) // min(free, len(rest))]
        chosen[scene].append(call)
    return chosen


def _turn(queue: list[T], part: int, parts: int) -> list[T]:
    place = part * len(queue) // parts
    return queue[place:] + queue[:place]
