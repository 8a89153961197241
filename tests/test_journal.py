"""The redo journal: all or nothing over kills, power cuts and errors, and what it refuses."""

from __future__ import annotations

import errno
import os
import random
import re
import stat
import struct
import sys
from collections import Counter
from collections.abc import Callable
from itertools import count, product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.stores.mbox import journal as journal_module
from popdrop.stores.mbox.journal import (
    BLOCK,
    HEADER,
    KEY_OCTETS,
    LARGEST_BLOCK,
    SECTOR,
    BadKey,
    Files,
    Journal,
    Journals,
    Kept,
    Leftover,
    NotCommitted,
    Outcome,
    Piece,
    Range,
    Refresh,
    Unfinished,
    Unsupported,
    Untrusted,
)
from tests.crash.disk import Disk, Fault, Killed, choices
from tests.crash.power import Campaign, cases
from tests.crash.scenario import (
    JOURNAL,
    SPOOL,
    Case,
    Violation,
    check,
    end,
    journal_of,
    kill_at,
    mail,
    recover,
    run,
    update,
)

OLD = b"a1\n" * 400 + b"b2\n" * 300 + b"c3\n" * 500 + b"d4\n" * 250
EXAMPLE = Case(OLD, 1200, ((2100, 3600),))
"""Of four messages of lines the second and the last are deleted."""

TAIL = Case(OLD, 1200, ())

PUT_IN = Case(OLD, 1200, ((2100, 2103), b"new\n" * 9, (2103, 3600)))
"""The same as `EXAMPLE`, and octets put in behind the first of what is kept."""

GROWING = Case(OLD, 1200, ((1200, 2100), b"new\n" * 9, (2100, 4350)))
"""Nothing is deleted, octets are put in: the spool grows by 36."""

SWAPPED = Case(OLD, 1200, ((2100, 4350), (1200, 2100)))
"""The spool keeps its size."""

# Strategies


@st.composite
def updates(draw: st.DrawFn) -> Case:
    """Any octets but those that new mail begins with, any ranges of a tail, octets put in."""
    octets = st.binary(min_size=1, max_size=60).map(lambda octets: octets.replace(b"\xff", b"\0"))
    spool = b"".join(
        piece * times
        for piece, times in draw(
            st.lists(st.tuples(octets, st.sampled_from([1, 7, 100])), min_size=1, max_size=6)
        )
    )
    edges = draw(st.sets(st.integers(0, len(spool)), min_size=1, max_size=7).map(sorted))
    first, *rest = edges
    ranges = tuple(zip(rest[0::2], rest[1::2], strict=False))
    if sum(stop - start for start, stop in ranges) >= len(spool) - first:
        ranges = ()
    if first == len(spool):
        first = 0
    kept: list[Piece] = list(ranges)
    if draw(st.booleans()):
        put_in = draw(octets) * draw(st.sampled_from([1, 1, 20, 200]))
        kept.insert(draw(st.integers(0, len(kept))), put_in)
    return Case(spool, first, tuple(kept), full=draw(st.booleans()))


kills = st.lists(st.tuples(st.integers(0, 24), st.booleans(), st.booleans()), max_size=3)
"""Of the recoveries that follow: number of the call, in its middle, and mail before it."""


class KillTests(SynchronousTestCase):
    """A killed process: all that it wrote is seen, nothing else happens."""

    @settings(deadline=None, max_examples=250)
    @given(updates(), st.integers(0, 24), st.booleans(), kills)
    def test_any(
        self, case: Case, number: int, torn: bool, later: list[tuple[int, bool, bool]]
    ) -> None:
        disk = case.disk()
        how = run(disk, lambda: update(disk, case), kill_at(number, torn))
        disk.kill()
        arrived = b""
        for each, (at, middle, with_mail) in enumerate(later):
            if with_mail:
                arrived += mail(each)
                disk.append(SPOOL, mail(each))
            run(disk, lambda: recover(disk), kill_at(at, middle))
            disk.kill()
        end(disk)
        check(disk, case, how, arrived)

    def test_without_a_fault(self) -> None:
        whole = Case(OLD, 0, ((0, len(OLD)), b"new\n" * 3000))
        others = (Case(OLD, 0, ()), Case(OLD, 0, ((1200, 2100),)), whole)
        for case in (EXAMPLE, PUT_IN, TAIL, GROWING, SWAPPED, *others):
            disk = case.disk()
            self.assertEqual(run(disk, lambda d=disk, c=case: update(d, c), Fault()), "done")
            self.assertEqual(disk.get(SPOOL), case.result)
            check(disk, case, "done", b"")

    def test_outcomes(self) -> None:
        """In the order in which they come as the kill comes later, with and without new mail."""
        for arrived, finished in (
            (b"", Outcome.FINISHED),
            (mail(1), Outcome.FINISHED_WITH_MAIL),
        ):
            seen: list[Outcome | None] = []
            for number in count():
                disk = EXAMPLE.disk()
                how = run(disk, lambda disk=disk: update(disk, EXAMPLE), kill_at(number))
                disk.kill()
                disk.append(SPOOL, arrived)
                done = recover(disk)
                outcome = done[0].outcome if done else None
                if outcome not in seen[-1:]:
                    seen.append(outcome)
                check(disk, EXAMPLE, how, arrived)
                if how == "done":
                    break
            self.assertEqual(
                seen,
                [
                    None,
                    Outcome.DISCARDED,  # only a new one
                    finished,
                    Outcome.DONE,
                    Outcome.DISCARDED,  # a void one
                    None,
                ],
            )

    def test_nothing_pending(self) -> None:
        disk = EXAMPLE.disk()
        self.assertFalse(journal_of(disk).pending())
        run(disk, lambda: update(disk, EXAMPLE), kill_at(2))
        disk.kill()
        self.assertTrue(journal_of(disk).pending())
        self.assertEqual(disk.get(SPOOL), OLD)
        recover(disk)
        self.assertFalse(journal_of(disk).pending())
        self.assertEqual(recover(disk), [])


class ErrorTests(SynchronousTestCase):
    """The system says no, at each call once or from then on."""

    ERRNOS = (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EROFS,
        errno.EINTR,
        errno.EACCES,
        errno.EINVAL,
    )

    @staticmethod
    def fault(code: int, number: int, forever: bool) -> Fault:
        def at(_: str, now: int) -> OSError | None:
            if now == number or (forever and now > number):
                return OSError(code, os.strerror(code))
            return None

        return Fault(at)

    def attempt(self, case: Case, fault: Fault) -> tuple[Disk, str]:
        disk = case.disk()
        fd = disk.descriptor(SPOOL)
        how = run(
            disk,
            lambda: update(disk, case, fd),
            fault,
        )
        self.assertNotEqual(how, "killed")
        return disk, how

    def test_update(self) -> None:
        seen: Counter[str] = Counter()
        for case in (EXAMPLE, PUT_IN, TAIL, GROWING, SWAPPED, Case(OLD, 0, ())):
            for code in self.ERRNOS:
                for forever in (False, True):
                    for number in count():
                        disk, how = self.attempt(case, self.fault(code, number, forever))
                        seen[how] += 1
                        if how == "not committed":
                            self.assertEqual(disk.get(SPOOL), case.spool)
                        if how == "done":
                            self.assertEqual(disk.get(SPOOL), case.result)
                        calls = len(disk.calls)
                        disk.kill()
                        disk.append(SPOOL, mail(1))
                        end(disk)
                        check(disk, case, how, mail(1))
                        if number >= calls:
                            break
        self.assertEqual(set(seen), {"done", "not committed", "unfinished"})

    def test_update_and_power_cut(self) -> None:
        """What was said after an error holds on the disk, too."""
        for case in (EXAMPLE, TAIL, GROWING):
            for number in count():
                disk, how = self.attempt(case, self.fault(errno.EIO, number, False))
                calls = len(disk.calls)
                for versions in (0, 1):
                    later = disk.cut(lambda many, new=versions: (many - 1) * new)
                    end(later)
                    check(later, case, how, b"")
                if number >= calls:
                    break

    def test_undone_and_power_cut(self) -> None:
        """The commit's own fsync fails. However the folder comes back, nothing is executed."""
        disk = EXAMPLE.disk()

        def at(name: str, number: int) -> OSError | None:
            after_rename = name == "fsync" and disk.calls[number - 1] == "rename"
            return OSError(errno.EIO, "") if after_rename or name == "unlink" else None

        how = run(disk, lambda: update(disk, EXAMPLE), Fault(at))
        self.assertEqual((how, disk.get(JOURNAL)), ("not committed", b""))
        for choose in choices(disk.cut, 0, lambda many: 0):
            later = disk.cut(choose)
            end(later)
            check(later, EXAMPLE, how, b"")

    def test_recovery(self) -> None:
        seen: Counter[str] = Counter()
        for case, killed in product((EXAMPLE, GROWING), range(14)):
            for forever in (False, True):
                for number in count():
                    disk = case.disk()
                    how = run(disk, lambda d=disk, c=case: update(d, c), kill_at(killed))
                    disk.kill()
                    disk.append(SPOOL, mail(1))
                    fault = self.fault(errno.EIO, number, forever)
                    seen[run(disk, lambda disk=disk: recover(disk), fault)] += 1
                    calls = len(disk.calls)
                    disk.kill()
                    end(disk)
                    check(disk, case, how, mail(1))
                    if number >= calls:
                        break
        self.assertEqual(set(seen), {"done", "unfinished"})

    def test_short_writes(self) -> None:
        for case, short in product((EXAMPLE, GROWING), (1, 511, 4095)):
            disk, how = self.attempt(case, Fault(short=short))
            self.assertEqual((how, disk.get(SPOOL)), ("done", case.result))

    def test_descriptors_are_closed(self) -> None:
        for number in range(60):
            disk, _ = self.attempt(EXAMPLE, self.fault(errno.ENOSPC, number, False))
            failed = disk.calls[number : number + 1] == ["close"]
            self.assertEqual(len(disk.handles), 1 + failed, disk.calls)

    def test_second_folder(self) -> None:
        """Where the first one has no space or gives no right, and only then."""
        for code, elsewhere in (
            (errno.ENOSPC, True),
            (errno.EDQUOT, True),
            (errno.EACCES, True),
            (errno.EPERM, True),
            (errno.ENAMETOOLONG, True),
            (errno.EROFS, False),
            (errno.EIO, False),
        ):
            disk = EXAMPLE.disk()
            seen = count()

            def at(name: str, _: int, code: int = code, seen: count[int] = seen) -> OSError | None:
                return OSError(code, "no") if name == "create" and not next(seen) else None

            how = run(disk, lambda disk=disk: update(disk, EXAMPLE), Fault(at))
            self.assertEqual(how, "done" if elsewhere else "not committed", code)
            self.assertEqual("journal" in disk.names("/state"), elsewhere)

    def test_tail_without_any_space(self) -> None:
        """Who is over quota can still delete the last message."""

        def at(name: str, _: int) -> OSError | None:
            return OSError(errno.EDQUOT, "no") if name in ("create", "mkdir", "pwrite") else None

        disk, how = self.attempt(TAIL, Fault(at))
        self.assertEqual((how, disk.get(SPOOL)), ("done", TAIL.result))

    def test_errno_is_kept(self) -> None:
        disk = EXAMPLE.disk()
        disk.fault = self.fault(errno.EROFS, 4, True)
        error = self.assertRaises(NotCommitted, update, disk, EXAMPLE)
        self.assertEqual(error.errno, errno.EROFS)

    def test_changed_or_unlocked(self) -> None:
        for case in (EXAMPLE, TAIL, GROWING, Case(OLD, 0, ())):
            disk = case.disk()
            fd = disk.descriptor(SPOOL)
            error = self.assertRaises(NotCommitted, update, disk, case, fd, held=lambda: False)
            self.assertEqual(error.errno, errno.ESTALE)
            disk.append(SPOOL, mail(1))
            self.assertRaises(NotCommitted, update, disk, case, fd)
            check(disk, case, "not committed", mail(1))

    def test_mail_without_a_lock(self) -> None:
        """Mail of one who ignores locks comes after the commit: it is not cut off."""
        disk = EXAMPLE.disk()

        def at(name: str, _: int) -> OSError | None:
            if name == "rename":
                disk.append(SPOOL, mail(1))
            return None

        self.assertEqual(run(disk, lambda: update(disk, EXAMPLE), Fault(at)), "unfinished")
        disk.kill()
        self.assertEqual(recover(disk)[0].outcome, Outcome.FINISHED_WITH_MAIL)
        check(disk, EXAMPLE, "unfinished", mail(1))

    def test_second_update(self) -> None:
        """Nothing is begun while another update is unfinished."""
        for case in (EXAMPLE, TAIL, GROWING, Case(OLD, 0, ())):
            disk = EXAMPLE.disk()
            run(disk, lambda disk=disk: update(disk, EXAMPLE), kill_at(6))
            disk.kill()
            before = disk.get(SPOOL), disk.get(JOURNAL)
            error = self.assertRaises(NotCommitted, update, disk, case)
            self.assertEqual(error.errno, errno.EEXIST)
            self.assertEqual((disk.get(SPOOL), disk.get(JOURNAL)), before)

    def test_wrong_ranges(self) -> None:
        disk = EXAMPLE.disk()
        size = len(OLD)
        for first, kept in (
            (1200, [(1200, size)]),
            (1200, [(1000, 1300)]),
            (1200, [(1300, 1300)]),
            (1200, [(size - 1, size + 1)]),
            (size, []),
            (1200, [b"x" * (size - 1200)]),
            (1200, [(1300, size), b"x" * 100]),
        ):
            self.assertRaises(ValueError, journal_of(disk).replace_tail, 3, first, kept, size)
        for first, kept in (
            (1200, [(1200, size - 1)]),
            (1200, [(1199, size)]),
            (1200, [(1200, size + 1)]),
            (size, []),
            (size, [b"x"]),
        ):
            self.assertRaises(ValueError, journal_of(disk).rewrite_tail, 3, first, kept, size)

    def test_growing_without_any_space(self) -> None:
        """However far the room came: it is taken back."""
        whole = GROWING.disk()
        run(whole, lambda: update(whole, GROWING), Fault(short=10))
        room = whole.calls.index("rename") + 1
        tried = 0
        for number in range(room, len(whole.calls)):
            if whole.calls[number] == "pwrite" and tried < 4:
                tried += 1
                disk, how = self.attempt_short(number)
                self.assertEqual((how, disk.get(SPOOL)), ("not committed", OLD))
                check(disk, GROWING, how, b"")
        self.assertEqual(tried, 4)

    def attempt_short(self, number: int) -> tuple[Disk, str]:
        fault = self.fault(errno.ENOSPC, number, False)
        fault.short = 10
        return self.attempt(GROWING, fault)

    def test_growing_and_mail_without_a_lock(self) -> None:
        """Mail at any call behind the commit, which fails or is the last: it is not touched."""
        whole = GROWING.disk()
        run(whole, lambda: update(whole, GROWING), Fault())
        for number in range(whole.calls.index("rename"), len(whole.calls)):
            for error in (OSError(errno.EIO, ""), Killed()):
                disk = GROWING.disk()

                def at(
                    _: str, now: int, d: Disk = disk, n: int = number, e: BaseException = error
                ) -> BaseException | None:
                    if now != n:
                        return None
                    d.append(SPOOL, mail(1))
                    return e

                how = run(disk, lambda disk=disk: update(disk, GROWING), Fault(at))
                disk.kill()
                end(disk)
                check(disk, GROWING, how, mail(1))


class PowerTests(SynchronousTestCase):
    """The short form of `python -m tests.crash.power`."""

    def test_campaign(self) -> None:
        campaign = Campaign(seed=1, cuts=1, inner=1)
        for case in cases(seed=1, number=5):
            campaign.run(case)
        self.assertGreater(campaign.tried["cuts"], 1000)

    def test_growing(self) -> None:
        for case in (GROWING, SWAPPED):
            campaign = Campaign(seed=3, cuts=1, inner=4)
            campaign.run(case)
            self.assertGreater(campaign.tried["cuts"], 100)

    SMALL = Case(OLD[:600], 116, (b"much\n" * 100, (116, 600)))

    def twice(self) -> None:
        """A kill at each call, a kill at each call of the recovery, and the power goes then."""
        chance = random.Random(1)
        for number in count():
            ended = ""
            first, torn = divmod(number, 2)
            for second in count():
                disk = self.SMALL.disk()
                fault = kill_at(first, torn > 0)
                ended = run(disk, lambda d=disk: update(d, self.SMALL), fault)
                disk.kill()
                again = run(disk, lambda d=disk: recover(d), kill_at(second))
                for choose in choices(disk.cut, 4, chance.randrange):
                    later = disk.cut(choose)
                    end(later)
                    check(later, self.SMALL, ended, b"")
                if again == "done":
                    break
            if ended == "done":
                break

    def test_growing_twice(self) -> None:
        self.twice()

    def test_growing_without_a_sync_of_the_recovery(self) -> None:
        """Journal and room are on the disk before P is, and the room's end before the journal's."""
        synced = Disk.fsync
        for caller in ("_go_on", "_take_back"):

            def fsync(disk: Disk, fd: int, caller: str = caller) -> None:
                if sys._getframe(1).f_code.co_name != caller:
                    synced(disk, fd)

            self.patch(Disk, "fsync", fsync)
            self.assertRaises(Violation, self.twice)
        self.patch(Disk, "fsync", synced)
        self.patch(journal_module._Record, "sync_folder", lambda record: None)
        self.assertRaises(Violation, self.twice)

    def lazy(self, forgets: Callable[[Disk, int], bool], case: Case = EXAMPLE) -> None:
        """The campaign notices a server that forgets some fsyncs."""
        synced = Disk.fsync

        def fsync(disk: Disk, fd: int) -> None:
            if not forgets(disk, fd):
                synced(disk, fd)

        self.patch(Disk, "fsync", fsync)
        self.assertRaises(Violation, Campaign(seed=2, cuts=20, inner=2).run, case)

    def test_without_fsync_of_the_spool(self) -> None:
        for case in (EXAMPLE, GROWING):
            self.lazy(lambda disk, fd: disk.mode_of(fd) == stat.S_IFREG | 0o660, case)

    def test_without_fsync_of_the_journal(self) -> None:
        for case in (EXAMPLE, GROWING):
            self.lazy(lambda disk, fd: disk.mode_of(fd) == stat.S_IFREG | 0o600, case)

    def test_without_fsync_of_the_folder(self) -> None:
        for case in (EXAMPLE, GROWING):
            self.lazy(lambda disk, fd: stat.S_ISDIR(disk.mode_of(fd)), case)

    def test_without_sums_of_sectors(self) -> None:
        """A torn cut is seen as the doing of another: the rest would be taken for mail."""

        def rest_of(journal: Journal, header: Any, fd: int, refresh: Any) -> journal_module._Rest:
            sums = journal._sums(fd, header.end, header.size, refresh)
            same = sums == (header.sectors, header.rest)
            return journal_module._Rest.SAME if same else journal_module._Rest.OTHER

        self.patch(Journal, "_rest_of", rest_of)
        self.assertRaises(Violation, Campaign(seed=2, cuts=20, inner=2).run, EXAMPLE)

    def test_torn_cut(self) -> None:
        """R2b, by hand: sector by sector of the last block zeroed or not, the old size."""
        for zeroed in ({0}, {1, 2}, {0, 1, 2, 3}, set(range(8))):
            disk = EXAMPLE.disk()
            run(disk, lambda disk=disk: update(disk, EXAMPLE), kill_at(7))
            disk.kill()
            spool = bytearray(EXAMPLE.result + OLD[2700:])
            for number in zeroed:
                start = max(2700, (2700 // SECTOR + number) * SECTOR)
                stop = min(len(spool), (2700 // SECTOR + number + 1) * SECTOR)
                if start < stop:
                    spool[start:stop] = bytes(stop - start)
            disk.overwrite(SPOOL, bytes(spool) + mail(1))
            self.assertEqual(recover(disk)[0].outcome, Outcome.FINISHED_WITH_MAIL)
            check(disk, EXAMPLE, "unfinished", mail(1))


class Lines:
    """A format whose messages are lines."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.error: OSError | None = None

    def arrived(self, fd: int, start: int, kept: Kept, refresh: Refresh) -> bool:
        rest = os.pread(fd, 1 << 20, start)
        self.asked.append(rest)
        ours = b"".join(kept.blocks(0, kept.length)).splitlines()
        return rest.startswith(b"new") and not set(rest.splitlines()) & set(ours)

    def missing(self, fd: int, kept: Kept, refresh: Refresh) -> tuple[bytes, list[Range]]:
        if self.error:
            raise self.error
        spool = os.pread(fd, 1 << 20, 0)
        there = Counter(spool.splitlines())
        ranges = []
        end = 0
        for line in b"".join(kept.blocks(0, kept.length)).splitlines(keepends=True):
            start, end = end, end + len(line)
            if there[line.rstrip(b"\n")]:
                there[line.rstrip(b"\n")] -= 1
            else:
                ranges.append((start, end))
        return b"" if spool.endswith(b"\n") or not spool else b"\n", ranges


class Watched(Files):
    """The real calls, with a fault and a note of each."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault or Fault()
        self.calls: list[str] = []
        self.largest = 0
        self.uid = os.geteuid()
        self.opened: set[int] = set()

    def _called(self, name: str) -> None:
        error = self.fault.at(name, len(self.calls))
        if error:
            raise error
        self.calls.append(name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        self._called("create" if flags & os.O_CREAT else "open")
        fd = os.open(path, flags, mode)
        self.opened.add(fd)
        return fd

    def close(self, fd: int) -> None:  # type: ignore[override]
        self.opened.discard(fd)
        os.close(fd)

    def pread(self, fd: int, size: int, offset: int) -> bytes:  # type: ignore[override]
        self.largest = max(self.largest, size)
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, octets: bytes, offset: int) -> int:  # type: ignore[override]
        self._called("pwrite")
        return os.pwrite(fd, octets[: self.fault.short or None], offset)

    def fsync(self, fd: int) -> None:  # type: ignore[override]
        self._called("fsync")
        os.fsync(fd)

    def ftruncate(self, fd: int, size: int) -> None:  # type: ignore[override]
        self._called("ftruncate")
        os.ftruncate(fd, size)

    def rename(self, old: str, new: str) -> None:  # type: ignore[override]
        self._called("rename")
        os.rename(old, new)

    def unlink(self, path: str) -> None:  # type: ignore[override]
        self._called("unlink")
        os.unlink(path)

    def geteuid(self) -> int:  # type: ignore[override]
        return self.uid


class RealCase(SynchronousTestCase):
    """A spool of ten lines; the third to the fifth are deleted."""

    OLD = b"".join(b"line %d\n" % number for number in range(10))
    FIRST = 14
    KEPT = ((35, 70),)
    NEW = OLD[:14] + OLD[35:]

    def setUp(self) -> None:
        self.folder = os.path.realpath(self.mktemp())
        self.state = os.path.join(self.folder, "state")
        self.spool = os.path.join(self.folder, "mail", "bob")
        self.path = os.path.join(self.folder, "mail", ".bob.popdrop")
        os.makedirs(os.path.dirname(self.spool))
        os.mkdir(self.state, 0o700)
        self.files = Watched()
        self.journals = Journals(self.state, self.files)
        self.journal = self.journals.of(self.spool)
        self.form = Lines()
        self.write(self.OLD)
        self.addCleanup(self.close)

    def close(self) -> None:
        for fd in self.files.opened:
            os.close(fd)

    def write(self, octets: bytes) -> None:
        with open(self.spool, "wb") as spool:
            spool.write(octets)

    def read(self, path: str = "") -> bytes:
        with open(path or self.spool, "rb") as file:
            return file.read()

    def update(self) -> None:
        with open(self.spool, "rb+") as spool:
            self.journal.replace_tail(spool.fileno(), self.FIRST, self.KEPT, len(self.OLD))

    def break_off(self, writes: int) -> None:
        """An update that is killed before a writing call of this number."""
        self.journals.key()
        self.files.fault = kill_at(writes)
        self.assertRaises(Killed, self.update)
        self.files.fault = Fault()

    def break_in_the_middle(self) -> bytes:
        """Committed, nothing moved yet. Gives the journal."""
        # create, P, header, fsync, rename, fsync of the folder
        self.break_off(6)
        return self.read(self.path)

    def recover(self) -> list[journal_module.Recovered]:
        with open(self.spool, "rb+") as spool:
            return self.journal.recover(spool.fileno(), self.form)

    def names(self) -> list[str]:
        return sorted(os.listdir(os.path.dirname(self.spool)))

    def put(self, octets: bytes) -> None:
        """A journal, as of ours."""
        with open(self.path, "wb", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            file.write(octets)


class UpdateTests(RealCase):
    def test_update(self) -> None:
        os.chmod(self.spool, 0o640)
        before = os.stat(self.spool)
        self.update()
        after = os.stat(self.spool)
        self.assertEqual(self.read(), self.NEW)
        self.assertEqual(self.names(), ["bob"])
        for fact in ("st_ino", "st_mode", "st_uid", "st_gid", "st_nlink"):
            self.assertEqual(getattr(before, fact), getattr(after, fact))
        self.assertEqual(self.files.opened, set())

    def test_order_of_calls(self) -> None:
        self.journals.key()
        self.files.calls.clear()
        self.update()
        journal = ["open", "create", "pwrite", "pwrite", "fsync", "rename", "fsync"]
        spool = ["pwrite", "fsync", "ftruncate", "fsync"]
        void = ["ftruncate", "fsync", "unlink", "fsync"]
        self.assertEqual(self.files.calls, journal + spool + void)

    def test_all_deleted(self) -> None:
        """At the start of a block a cut is one step: no journal, and so no space, is needed."""
        with open(self.spool, "rb+") as spool:
            self.journal.replace_tail(spool.fileno(), 0, [], len(self.OLD))
            self.assertEqual(self.read(), b"")
            self.assertEqual(self.files.calls, ["ftruncate", "fsync"])
            os.ftruncate(spool.fileno(), LARGEST_BLOCK + 10)
            self.journal.replace_tail(spool.fileno(), LARGEST_BLOCK, [], LARGEST_BLOCK + 10)
        self.assertEqual(os.stat(self.spool).st_size, LARGEST_BLOCK)
        self.assertNotIn("create", self.files.calls)

    def test_memory_is_bounded(self) -> None:
        old = os.urandom(5 * BLOCK + 77)
        self.write(old)
        ranges = [(BLOCK + 9, 3 * BLOCK), (3 * BLOCK + 1, 5 * BLOCK + 50)]
        refreshed: list[None] = []
        with open(self.spool, "rb+") as spool:
            self.journal.replace_tail(
                spool.fileno(), 5, ranges, len(old), lambda: refreshed.append(None)
            )
        self.assertEqual(self.read(), old[:5] + b"".join(old[a:b] for a, b in ranges))
        self.assertEqual(self.files.largest, BLOCK)
        self.assertGreaterEqual(len(refreshed), 8)  # P is read and written

    def test_mode_of_the_journal(self) -> None:
        previous = os.umask(0)
        self.addCleanup(os.umask, previous)
        self.break_in_the_middle()
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_folder_where_no_journal_would_be_trusted(self) -> None:
        """NFS with root_squash: the file belongs to another at once."""
        self.journals.key()
        self.files.uid += 1
        self.assertRaises(NotCommitted, self.update)
        self.assertEqual((self.names(), self.read()), (["bob"], self.OLD))

    def test_new_name_is_taken(self) -> None:
        """By a link to a victim: it is not followed, and the second folder serves."""
        victim = os.path.join(self.folder, "victim")
        with open(victim, "wb") as file:
            file.write(b"precious")
        os.symlink(victim, self.path + ".new")
        self.update()
        self.assertEqual((self.read(), self.read(victim)), (self.NEW, b"precious"))
        self.assertTrue(os.path.islink(self.path + ".new"))
        self.assertEqual(os.listdir(self.journals.folder), [])
        self.assertEqual(stat.S_IMODE(os.stat(self.journals.folder).st_mode), 0o700)


class RecoveryTests(RealCase):
    def test_nothing(self) -> None:
        self.assertFalse(self.journal.pending())
        self.assertEqual(self.recover(), [])

    def test_finished(self) -> None:
        self.break_in_the_middle()
        self.assertEqual(self.read(), self.OLD)
        self.assertEqual(self.recover(), [journal_module.Recovered(Outcome.FINISHED, self.path)])
        self.assertEqual((self.read(), self.names()), (self.NEW, ["bob"]))

    def test_in_the_second_folder(self) -> None:
        os.mkdir(self.path + ".new")
        self.break_off(8)  # one `create` that fails, and the second folder's own fsync
        self.assertEqual(self.names(), [".bob.popdrop.new", "bob"])
        self.assertEqual(len(os.listdir(self.journals.folder)), 1)
        self.assertTrue(self.journal.pending())
        self.assertEqual(self.read(), self.OLD)
        self.assertEqual([done.outcome for done in self.recover()], [Outcome.FINISHED])
        self.assertEqual(self.read(), self.NEW)
        self.assertEqual(os.listdir(self.journals.folder), [])

    def test_left_over_new(self) -> None:
        self.break_off(2)
        self.assertEqual(self.names(), [".bob.popdrop.new", "bob"])
        self.assertEqual(
            self.recover(), [journal_module.Recovered(Outcome.DISCARDED, self.path + ".new")]
        )
        self.assertEqual((self.read(), self.names()), (self.OLD, ["bob"]))

    def test_spool_is_missing(self) -> None:
        octets = self.break_in_the_middle()
        os.unlink(self.spool)
        (done,) = self.journal.recover(None, self.form)
        self.assertEqual((done.outcome, done.appended), (Outcome.ORPHANED, 0))
        assert done.aside
        self.assertEqual(self.names(), [os.path.basename(done.aside)])
        self.assertEqual(self.read(done.aside), octets)

    def test_spool_is_read_only(self) -> None:
        self.break_in_the_middle()
        with open(self.spool, "rb") as spool:
            self.assertRaises(Unfinished, self.journal.recover, spool.fileno(), self.form)
        self.assertEqual((self.read(), self.names()), (self.OLD, [".bob.popdrop", "bob"]))


class RefusedTests(RealCase):
    """Decision 1: what is none of our journals is neither executed nor removed."""

    def refused(self, kind: type[Exception] = Untrusted) -> None:
        before = self.names()
        self.assertTrue(self.journal.pending())
        self.assertRaises(kind, self.recover)
        self.assertEqual((self.read(), self.names()), (self.OLD, before))
        self.assertRaises(NotCommitted, self.update)
        self.assertEqual((self.read(), self.names()), (self.OLD, before))

    def test_forged(self) -> None:
        """All is right, but it is sealed by another key."""
        octets = self.break_in_the_middle()
        os.unlink(self.path)
        os.unlink(self.journals.key_path)
        self.journals = Journals(self.state, self.files)
        self.journal = self.journals.of(self.spool)
        self.put(octets)
        self.refused()

    def test_forged_offset(self) -> None:
        octets = bytearray(self.break_in_the_middle())
        (first,) = struct.unpack_from(">Q", octets, 28)
        self.assertEqual(first, self.FIRST)
        for position in (28 + 7, HEADER - 1, HEADER - 40):
            altered = bytearray(octets)
            altered[position] ^= 1
            self.put(bytes(altered))
            self.refused()

    def test_foreign(self) -> None:
        self.break_in_the_middle()
        self.files.uid += 1
        self.refused()

    def test_symbolic_link(self) -> None:
        octets = self.break_in_the_middle()
        elsewhere = os.path.join(self.folder, "elsewhere")
        os.rename(self.path, elsewhere)
        os.symlink(elsewhere, self.path)
        self.refused()
        self.assertEqual(self.read(elsewhere), octets)

    def test_hard_link(self) -> None:
        self.break_in_the_middle()
        os.link(self.path, os.path.join(self.folder, "elsewhere"))
        self.refused()

    def test_exchanged(self) -> None:
        """It gets another link between our look at it and its opening."""
        self.break_in_the_middle()
        elsewhere = os.path.join(self.folder, "elsewhere")
        opens = count()

        def at(name: str, _: int) -> None:
            if name == "open" and next(opens) == 1:  # the first is that of the folder
                os.link(self.path, elsewhere)

        self.files.fault = Fault(at)
        self.assertRaises(Untrusted, self.recover)
        self.assertTrue(os.path.samefile(self.path, elsewhere))
        self.assertEqual(self.read(), self.OLD)

    def test_mode(self) -> None:
        self.break_in_the_middle()
        for mode in (0o620, 0o666, 0o640, 0o604, 0o4600):
            os.chmod(self.path, mode)
            self.refused()

    def test_no_file(self) -> None:
        os.mkfifo(self.path)
        self.refused()
        os.unlink(self.path)
        os.mkdir(self.path)
        self.refused()

    def test_of_another_spool(self) -> None:
        """Carol's, moved to where Bob's would be: her mail is not given to him."""
        carol = os.path.join(self.folder, "mail", "carol")
        os.rename(self.spool, carol)
        self.spool, bob = carol, self.journal
        self.path, path = os.path.join(self.folder, "mail", ".carol.popdrop"), self.path
        self.journal = self.journals.of(carol)
        self.break_in_the_middle()
        os.rename(self.path, path)
        self.spool, self.journal = os.path.join(self.folder, "mail", "bob"), bob
        self.write(self.OLD)
        self.refused()

    def test_unknown_version(self) -> None:
        octets = self.break_in_the_middle()
        self.put(octets[:8] + struct.pack(">I", 3) + octets[12:])
        self.refused(Unsupported)

    def test_moved_folder(self) -> None:
        """Of the same spool, its folder has another name now: that is no forgery."""
        self.break_in_the_middle()
        moved = os.path.join(self.folder, "moved")
        os.rename(os.path.dirname(self.spool), moved)
        self.spool = os.path.join(moved, "bob")
        self.journal = self.journals.of(self.spool)
        self.assertEqual(self.recover()[0].outcome, Outcome.FINISHED)


class DamagedTests(RealCase):
    def damaged(self, octets: bytes) -> None:
        self.put(octets)
        (done,) = self.recover()
        self.assertEqual((done.outcome, done.journal), (Outcome.DAMAGED, self.path))
        assert done.aside
        self.assertEqual(self.read(done.aside), octets)
        self.assertEqual((self.read(), len(self.names())), (self.OLD, 2))
        os.unlink(done.aside)
        self.assertFalse(self.journal.pending())

    def test_truncated(self) -> None:
        octets = self.break_in_the_middle()
        for length in (1, 7, 12, HEADER - 1, HEADER, len(octets) - 1):
            self.damaged(octets[:length])

    def test_too_long(self) -> None:
        self.damaged(self.break_in_the_middle() + b"x")

    def test_kept_octets(self) -> None:
        octets = bytearray(self.break_in_the_middle())
        octets[-1] ^= 1
        self.damaged(bytes(octets))

    def test_something_else(self) -> None:
        self.damaged(b"From somebody else's program\n" * 1000)

    def test_void(self) -> None:
        self.put(b"")
        self.assertEqual(self.recover()[0].outcome, Outcome.DISCARDED)
        self.assertEqual((self.read(), self.names()), (self.OLD, ["bob"]))


class AnotherSpoolTests(RealCase):
    """R3 and R4: others wrote since the crash, or the journal is an old one."""

    def orphaned(self, expected: bytes) -> None:
        before = self.read(self.path)
        inode = os.stat(self.spool).st_ino
        (done,) = self.recover()
        self.assertEqual(done.outcome, Outcome.ORPHANED)
        self.assertEqual((self.read(), os.stat(self.spool).st_ino), (expected, inode))
        assert done.aside
        self.assertTrue(
            re.fullmatch(r"\.bob\.popdrop\.orphan-\d{8}T\d{6}Z-\d+", os.path.basename(done.aside))
        )
        self.assertEqual(self.read(done.aside), before)
        self.assertFalse(self.journal.pending())

    def resurrect(self) -> None:
        """The journal of a finished update is back."""
        octets = self.break_in_the_middle()
        self.recover()
        self.put(octets)

    def test_resurrected(self) -> None:
        self.resurrect()
        self.assertEqual(self.recover()[0].outcome, Outcome.DONE)
        self.assertEqual((self.read(), self.names()), (self.NEW, ["bob"]))
        self.assertEqual(self.form.asked, [])

    def test_resurrected_after_new_mail(self) -> None:
        for size in (1, 20, 200):
            self.write(self.OLD)
            self.resurrect()
            arrived = b"new %d\n" % size * size
            with open(self.spool, "ab") as spool:
                spool.write(arrived)
            self.assertEqual(self.recover()[0].outcome, Outcome.DONE)
            self.assertEqual((self.read(), self.names()), (self.NEW + arrived, ["bob"]))
            self.assertEqual(self.form.asked.pop(), arrived)

    def test_resurrected_after_another_update(self) -> None:
        """What was deleted since comes back at the end, rather than to lose anything."""
        self.resurrect()
        self.write(self.OLD[:7] + b"new\n")
        self.orphaned(self.OLD[:7] + b"new\n" + self.OLD[35:])

    def test_wrong_inode(self) -> None:
        """Another file of the same octets: it is only looked at, and lacks nothing."""
        self.break_in_the_middle()
        os.rename(self.spool, self.spool + "2")
        self.write(self.OLD)
        self.orphaned(self.OLD)

    def test_rewritten(self) -> None:
        self.break_in_the_middle()
        self.write(b"other\nline 6\n")
        self.orphaned(b"other\nline 6\nline 5\nline 7\nline 8\nline 9\n")

    def test_equal_messages(self) -> None:
        """Matched by number: of two equal ones that are to be kept one is there."""
        self.OLD, self.KEPT = b"gone.\ntwice\ntwice\nonce.\n", ((6, 24),)
        self.FIRST = 0
        self.write(self.OLD)
        self.break_in_the_middle()
        self.write(b"other\ntwice\n")
        self.orphaned(b"other\ntwice\ntwice\nonce.\n")

    def test_without_a_last_newline(self) -> None:
        self.break_in_the_middle()
        self.write(b"other")
        self.orphaned(b"other\n" + self.OLD[35:])

    def test_rest_was_changed(self) -> None:
        """P is in place, but what follows it is no new mail."""
        self.break_off(7)
        self.write(self.NEW + b"Line 7\nline 8\nline 9\n")
        self.orphaned(self.NEW + b"Line 7\nline 8\nline 9\n")
        self.assertEqual(self.form.asked, [b"Line 7\nline 8\nline 9\n"])

    def test_prefix_was_changed(self) -> None:
        self.break_in_the_middle()
        self.write(b"Line 0\n" + self.OLD[7:])
        self.orphaned(b"Line 0\n" + self.OLD[7:])

    def test_zeroed_by_another(self) -> None:
        """As after a torn cut, but P is not in place."""
        self.break_in_the_middle()
        zeroed = self.OLD[:49] + bytes(21)
        self.write(zeroed)
        self.orphaned(zeroed + b"\n" + self.OLD[49:])

    def test_cut_by_another(self) -> None:
        """To the size that our cut would give, but P is not in place."""
        self.break_in_the_middle()
        self.write(self.OLD[:49])
        self.orphaned(self.OLD)

    def break_large(self) -> bytes:
        """P is in place, nothing is cut off; all that is behind P."""
        self.OLD = b"".join(b"line %06d\n" % number for number in range(20000))
        self.KEPT = ((120, 12000),)
        self.FIRST = 12
        self.write(self.OLD)
        self.break_off(7)
        return self.OLD[self.FIRST + 11880 :]

    def test_rest_was_changed_far_behind(self) -> None:
        rest = self.break_large()
        changed = self.OLD[:12] + self.OLD[120:12000] + rest[:-2] + b"X\n"
        self.write(changed)
        self.orphaned(changed)

    def test_rest_was_zeroed(self) -> None:
        """By the disk, in the block of the cut, or everywhere."""
        for zeros in (3000, 64 * SECTOR, None):
            rest = self.break_large()
            start = 12 + 11880
            stop = len(self.OLD) if zeros is None else (start + zeros) // SECTOR * SECTOR
            moved = self.OLD[:12] + self.OLD[120:12000]
            self.write(moved + bytes(stop - start) + rest[stop - start :] + b"new\n")
            self.assertEqual(self.recover()[0].outcome, Outcome.FINISHED_WITH_MAIL)
            self.assertEqual((self.read(), self.names()), (moved + b"new\n", ["bob"]))

    def test_order_of_calls(self) -> None:
        self.break_in_the_middle()
        self.write(b"other\n")
        self.files.calls.clear()
        self.recover()
        append = ["pwrite"] * 5 + ["fsync"]
        aside = ["create", "rename", "fsync"]
        self.assertEqual(self.files.calls, ["open", "open", *append, *aside])

    def test_shrunk(self) -> None:
        self.break_in_the_middle()
        self.write(self.OLD[:20])
        self.orphaned(self.OLD[:20] + b"\n" + self.OLD[35:])

    def test_second_orphan(self) -> None:
        """No orphan is overwritten, even within one second."""
        for number in (1, 2, 3):
            self.write(self.OLD)
            self.break_in_the_middle()
            self.write(b"other\n")
            self.recover()
            self.assertEqual(len(self.names()), 1 + number)

    def test_nothing_to_lose(self) -> None:
        """The journal of a cut alone holds no mail: it is not kept."""
        self.KEPT = ()
        self.break_off(5)
        self.write(b"other\n")
        self.assertEqual(self.recover()[0].outcome, Outcome.DISCARDED)
        self.assertEqual((self.read(), self.names()), (b"other\n", ["bob"]))

    def test_no_space_to_append(self) -> None:
        """Half a message is taken back, and the next recovery tries again."""
        self.break_in_the_middle()
        self.write(b"other\n")
        writes = count()

        def at(name: str, _: int) -> OSError | None:
            return OSError(errno.ENOSPC, "") if name == "pwrite" and next(writes) > 3 else None

        self.files.fault = Fault(at, short=4)
        self.assertRaises(Unfinished, self.recover)
        self.assertEqual(self.read(), b"other\n")
        self.files.fault = Fault()
        self.orphaned(b"other\n" + self.OLD[35:])

    def test_killed_after_appending(self) -> None:
        self.break_in_the_middle()
        self.write(b"other\n")
        for number in range(5, 9):  # five lines; their fsync, the orphan's name, its rename
            self.files.fault = kill_at(number)
            with open(self.spool, "rb+") as spool:
                try:
                    self.journal.recover(spool.fileno(), self.form)
                except Killed:
                    pass
            self.files.fault = Fault()
            self.assertEqual(self.read(), b"other\n" + self.OLD[35:])

    def test_format_fails(self) -> None:
        self.break_in_the_middle()
        self.write(b"other\n")
        self.form.error = OSError(errno.EIO, "")
        self.assertRaises(Unfinished, self.recover)
        self.form.error = None
        self.orphaned(b"other\n" + self.OLD[35:])


class FolderTests(RealCase):
    """`journal-dir=`: a folder between that of the spool and the state folder's own."""

    def setUp(self) -> None:
        super().setUp()
        self.given = os.path.join(self.folder, "given")
        os.mkdir(self.given, 0o700)
        # A folder at the new journal's name has the same effect as a full disk.
        os.mkdir(self.path + ".new")

    def use(self, folder: str = "", former: tuple[str, ...] = ()) -> None:
        self.journals = Journals(self.state, self.files, folder, former)
        self.journal = self.journals.of(self.spool)

    def break_off_in(self, folder: str) -> None:
        """Committed, its journal in that folder, the spool not cut off yet."""
        self.journals.key()
        self.files.fault = Fault(
            lambda name, fd: Killed() if name == "ftruncate" and self.lies_in(folder) else None
        )
        self.assertRaises(Killed, self.update)
        self.files.fault = Fault()
        self.assertEqual(len(self.read()), len(self.OLD))

    def lies_in(self, folder: str) -> bool:
        try:
            return any(name.endswith(".popdrop") for name in os.listdir(folder))
        except FileNotFoundError:
            return False

    def test_given_first(self) -> None:
        self.use(self.given)
        self.break_off_in(self.given)
        self.assertFalse(self.lies_in(self.journals.folder))
        self.assertTrue(self.journal.pending())
        self.assertEqual([each.outcome for each in self.recover()], [Outcome.FINISHED])
        self.assertEqual((self.read(), os.listdir(self.given)), (self.NEW, []))

    def test_state_folder_last(self) -> None:
        """Where the given one is missing a level above, is no folder, or lets others in."""
        missing = os.path.join(self.folder, "no", "such")
        file = os.path.join(self.folder, "file")
        self.put_at(file)
        link = os.path.join(self.folder, "link")
        os.symlink(self.given, link)
        shared = os.path.join(self.folder, "shared")
        os.mkdir(shared)
        os.chmod(shared, 0o770)
        for folder in (missing, file, link, shared):
            self.write(self.OLD)
            self.use(folder)
            self.break_off_in(self.journals.folder)
            self.assertEqual([each.outcome for each in self.recover()], [Outcome.FINISHED], folder)
        self.assertEqual((os.listdir(self.given), os.listdir(shared)), ([], []))

    def put_at(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(b"x")

    def test_former(self) -> None:
        """What was named once is looked through, and never written to."""
        self.use(self.given)
        self.break_off_in(self.given)
        self.use("", (self.given,))
        self.assertTrue(self.journal.pending())
        found = self.journals.leftovers(self.given)
        self.assertEqual([each.spool for each in found], [self.spool])
        self.assertEqual([each.outcome for each in self.recover()], [Outcome.FINISHED])
        self.write(self.OLD)
        self.break_off_in(self.journals.folder)

    def test_named_twice(self) -> None:
        self.use(self.given, (self.given, "/old"))
        self.assertEqual(self.journals.folders, (self.given, self.journals.folder))
        self.assertEqual(self.journals.former, ("/old",))


class KeyTests(RealCase):
    def test_made_once(self) -> None:
        path = self.journals.key_path
        self.assertFalse(os.path.exists(path))
        key = self.journals.key().reveal()
        self.assertEqual((self.read(path), len(key)), (key, KEY_OCTETS))
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual(os.listdir(self.state), ["journal.key"])
        self.assertEqual(Journals(self.state).key().reveal(), key)
        os.unlink(path)
        self.assertNotEqual(Journals(self.state).key().reveal(), key)

    def test_never_printed(self) -> None:
        key = self.journals.key()
        self.assertNotIn(repr(key.reveal())[2:-1], repr(vars(self.journals)))

    def test_two_at_once(self) -> None:
        """Another process makes it between our look and our link: his is used."""
        theirs = bytes(range(KEY_OCTETS))

        def at(name: str, _: int) -> None:
            if name == "fsync" and not os.path.exists(self.journals.key_path):
                fd = os.open(self.journals.key_path, os.O_WRONLY | os.O_CREAT, 0o600)
                os.write(fd, theirs)
                os.close(fd)

        self.files.fault = Fault(at)
        self.assertEqual(self.journals.key().reveal(), theirs)
        self.assertEqual(os.listdir(self.state), ["journal.key"])

    def test_swept(self) -> None:
        """What was made and not used is removed once there is a key, and nothing else."""
        unused = self.journals.key_path + ".0123456789abcdef"
        kept = ["journal.key", "journal.key.0123456789ABCDEF", "journal.key.bak"]
        for name in [unused, *(os.path.join(self.state, name) for name in kept[1:])]:
            with open(name, "wb") as file:
                file.write(b"x" * KEY_OCTETS)
        self.journals.sweep()
        self.assertTrue(os.path.exists(unused))
        self.journals.key()
        self.journals.sweep()
        self.assertEqual(sorted(os.listdir(self.state)), kept)

    def test_swept_while_it_is_made(self) -> None:
        """Another process makes the key and sweeps between our look and our link."""

        def at(name: str, _: int) -> None:
            if name == "fsync" and not os.path.exists(self.journals.key_path):
                other = Journals(self.state)
                other.key()
                other.sweep()

        self.files.fault = Fault(at)
        key = self.journals.key().reveal()
        self.assertEqual(self.read(self.journals.key_path), key)
        self.assertEqual(os.listdir(self.state), ["journal.key"])

    def refused(self) -> None:
        self.assertRaises(BadKey, Journals(self.state, self.files).key)
        self.journal = Journals(self.state, self.files).of(self.spool)
        self.assertRaises(BadKey, self.update)
        self.assertEqual((self.read(), self.names()), (self.OLD, ["bob"]))

    def test_refused(self) -> None:
        path = self.journals.key_path
        key = self.journals.key().reveal()
        for mode in (0o640, 0o604, 0o660, 0o400):
            os.chmod(path, mode)
            self.refused()
        os.chmod(path, 0o600)
        for octets in (b"", key[:-1], key + b"x"):
            with open(path, "wb") as file:
                file.write(octets)
            self.refused()
        with open(path, "wb") as file:
            file.write(key)
        self.assertEqual(Journals(self.state).key().reveal(), key)
        self.files.uid += 1
        self.refused()
        self.files.uid -= 1
        os.rename(path, path + "2")
        os.symlink(path + "2", path)
        self.refused()
        os.unlink(path)
        os.mkfifo(path, 0o600)
        self.refused()


class LeftoverTests(RealCase):
    def test_beside_the_spool(self) -> None:
        self.break_in_the_middle()
        folder = os.path.dirname(self.spool)
        for name in (
            ".a.b.popdrop.new",
            ".bob.popdrop.orphan-20250101T000000Z-1",
            ".bob.popdrop-lock-0123",
            ".popdrop",
            "bob.lock",
            "x.popdrop",
        ):
            open(os.path.join(folder, name), "wb").close()

        def row(name: str, kind: str, spool: str) -> Leftover:
            return Leftover(os.path.join(folder, name), kind, os.path.join(folder, spool))

        self.assertEqual(
            self.journals.leftovers(folder),
            [
                row(".a.b.popdrop.new", "new", "a.b"),
                row(".bob.popdrop", "journal", "bob"),
                row(".bob.popdrop.orphan-20250101T000000Z-1", "orphan", "bob"),
            ],
        )

    def test_second_folder(self) -> None:
        """The names say nothing there, so the spool stands in the journal."""
        self.assertEqual(self.journals.leftovers(self.journals.folder), [])
        os.mkdir(self.path + ".new")
        self.break_off(8)
        with open(os.path.join(self.journals.folder, ".abc.popdrop"), "wb") as file:
            file.write(b"nothing of ours")
        found = self.journals.leftovers(self.journals.folder)
        self.assertEqual([each.kind for each in found], ["journal", "journal"])
        self.assertEqual({each.spool for each in found}, {self.spool, None})

    def test_no_folder(self) -> None:
        self.assertEqual(self.journals.leftovers(os.path.join(self.folder, "nowhere")), [])
