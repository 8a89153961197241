"""One update of one spool, crashes in the middle of it, and what may be left at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from popdrop.errors import PopdropError
from popdrop.stores.mbox.journal import (
    Files,
    Journal,
    Journals,
    Kept,
    NotCommitted,
    Outcome,
    Piece,
    Range,
    Recovered,
    Refresh,
    Unfinished,
)
from tests.crash.disk import WRITES, Disk, Fault, Killed

SPOOL = "/mail/bob"
JOURNAL = "/mail/.bob.popdrop"
STATE = "/state"
SECOND = "/state/journal"

NEW_MAIL = b"\xffMAIL "
"""New mail begins so, and nothing else holds the first octet."""


class Violation(AssertionError):
    """Mail was lost or doubled, or something was left behind."""


class Marked:
    """The format of these spools: it only knows new mail, by its mark."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def arrived(self, fd: int, start: int, kept: Kept, refresh: Refresh) -> bool:
        return self._files.pread(fd, len(NEW_MAIL), start) == NEW_MAIL

    def missing(self, fd: int, kept: Kept, refresh: Refresh) -> tuple[bytes, list[Range]]:
        raise Violation("a spool that only we and deliverers wrote was taken for another")


@dataclass(frozen=True)
class Case:
    """An update: `kept` are ranges of `spool` that move to `first`, and octets put in there."""

    spool: bytes
    first: int
    kept: tuple[Piece, ...]
    tear: int = 512
    block: int = 4096
    full: bool = False
    """No journal can be made beside the spool."""
    fresh: bool = False
    """There is no key yet."""

    @property
    def result(self) -> bytes:
        return self.spool[: self.first] + b"".join(
            piece if isinstance(piece, bytes) else self.spool[slice(*piece)] for piece in self.kept
        )

    def disk(self) -> Disk:
        disk = Disk(self.tear, self.block)
        disk.put(SPOOL, self.spool, 0o660)
        disk.put(STATE + "/locks")
        if not self.fresh:
            journals_of(disk).key()
            disk.settle()
            disk.kill()
        if self.full:
            # A folder of another at the new journal's name has the same effect as a full disk.
            disk.put(JOURNAL + ".new").uid = 0
        return disk


def journals_of(disk: Disk) -> Journals:
    return Journals(STATE, disk)  # type: ignore[arg-type]


def journal_of(disk: Disk) -> Journal:
    return journals_of(disk).of(SPOOL)


def update(disk: Disk, case: Case, fd: int | None = None, **options: Any) -> None:
    journal = journal_of(disk)
    shorter = len(case.result) < len(case.spool)
    change = journal.replace_tail if shorter else journal.rewrite_tail
    fd = disk.descriptor(SPOOL) if fd is None else fd
    change(fd, case.first, case.kept, len(case.spool), **options)


def recover(disk: Disk) -> list[Recovered]:
    return journal_of(disk).recover(disk.descriptor(SPOOL), Marked(disk))  # type: ignore[arg-type]


def run(disk: Disk, action: Callable[[], object], fault: Fault) -> str:
    """Do `action` with a fault; how it ended, in a word."""
    disk.calls = []
    disk.fault = fault
    try:
        action()
    except Killed:
        return "killed"
    except NotCommitted:
        return "not committed"
    except Unfinished:
        return "unfinished"
    finally:
        disk.fault = Fault()
    return "done"


def kill_at(number: int, torn: bool = False) -> Fault:
    """A kill before the writing call of this 0-based number; `torn`: in the middle of it."""
    seen = 0

    def at(name: str, _: int) -> BaseException | None:
        nonlocal seen
        if name not in WRITES:
            return None
        seen += 1
        return Killed() if seen > number else None

    return Fault(at, torn=torn)


def mail(number: int) -> bytes:
    return NEW_MAIL + b"%d\n" % number * 3


def check(disk: Disk, case: Case, how: str, arrived: bytes) -> None:
    """After the last recovery: all or nothing, once, and nothing left. Raises `Violation`.

    `how` is the end of the update in a word, as `run` gives it.
    """
    found = disk.get(SPOOL)
    allowed = {
        "done": [case.result],
        "not committed": [case.spool],
    }.get(how, [case.spool, case.result])
    if found not in [octets + arrived for octets in allowed]:
        lengths = [len(octets + arrived) for octets in allowed]
        raise Violation(f"{how}: {len(found)} octets are none of {lengths} allowed ones")
    names = disk.names("/mail") - {"bob"}
    if case.full:
        names.discard(".bob.popdrop.new")
    if "journal" in disk.names(STATE):
        names |= disk.names(SECOND)
    if names:
        raise Violation(f"{how}: {sorted(names)} left behind")


def end(disk: Disk) -> None:
    """A recovery without a fault ends everything, without a word about another's writing."""
    try:
        done = recover(disk)
    except PopdropError as error:
        raise Violation(f"{type(error).__name__}: {error.detail}") from error
    for each in done:
        if each.outcome in (Outcome.ORPHANED, Outcome.DAMAGED):
            raise Violation(f"recovered as {each}")
