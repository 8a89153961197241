"""`popdrop fsck`: every finding with a spool that has it, and that mending loses nothing."""

from __future__ import annotations

import contextlib  # not `suppress`: trial reads a module attribute of that name
import errno
import hashlib
import json
import os
import pty
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

import popdrop as package
from popdrop.cli.main import popdrop
from popdrop.errors import PermanentFailure
from popdrop.stores.mbox import check as check_module
from popdrop.stores.mbox import drop as drop_module
from popdrop.stores.mbox import fsck as fsck_module
from popdrop.stores.mbox import mend as mend_module
from popdrop.stores.mbox.beside import look_at_rights
from popdrop.stores.mbox.check import examine
from popdrop.stores.mbox.findings import KINDS, MOST, Finding, printable, unwatched
from popdrop.stores.mbox.fsck import Fsck, Settings
from popdrop.stores.mbox.index import Index, Indexes
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.kinds import FORMS
from popdrop.stores.mbox.locks import STALE_AFTER, SessionLock, SpoolLocks, hold
from popdrop.stores.mbox.mend import MARK, Failed
from popdrop.stores.mbox.store import MboxStore
from popdrop.values import Owner
from tests import oracle_mbox

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(package.__file__)))
GUARD = 120.0
"""Seconds after which a child that says nothing is given up: no test depends on it."""

FROM = b"From bob@example.org Wed Dec  2 05:53:00 1992\n"
ONE = FROM + b"Subject: one\n\nfirst\n\n"
TWO = FROM + b"Subject: two\n\nsecond\n\n"
NEW = b"From eve Thu Dec  3 05:53:00 1992\nSubject: new\n\nlate\n\n"
DAMAGED = b"lost\n\nhalf\n\n" + ONE + b"\0" * 40 + TWO + b"From now on\n\n" + b"\0" * 700
"""All that can be mended at once, but for the ending, which the NULs hide."""

NOBODY = 99999999
"""No process: above the largest PID of Linux."""


class Killed(BaseException):
    """The process is no more."""


class Counting(Files):
    """Raises at one of the calls that may change something; their numbers are 0-based.

    A `pwrite` that is `torn` writes half before.
    """

    def __init__(
        self, at: int = -1, error: Callable[[], BaseException] = Killed, torn: bool = False
    ) -> None:
        self.count = 0
        self.torn = torn
        self.at = at
        self.error = error
        self.open = self._step(os.open)  # type: ignore[method-assign]
        self.pwrite = self._pwrite  # type: ignore[method-assign]
        for name in ("fsync", "ftruncate", "rename", "link", "unlink", "mkdir"):
            setattr(self, name, self._step(getattr(os, name)))

    def _next(self) -> bool:
        self.count += 1
        return self.count == self.at + 1

    def _step(self, call: Callable[..., Any]) -> Any:
        def step(*words: Any, **more: Any) -> Any:
            if self._next():
                raise self.error()
            return call(*words, **more)

        return step

    def _pwrite(self, fd: int, octets: Any, offset: int) -> int:
        if self._next():
            if self.torn:
                os.pwrite(fd, bytes(octets)[: len(octets) // 2], offset)
            raise self.error()
        return os.pwrite(fd, octets, offset)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def reader(octets: bytes, step: int) -> Callable[[int, int], Iterator[bytes]]:
    def read(start: int, stop: int) -> Iterator[bytes]:
        for place in range(start, stop, step):
            yield octets[place : min(place + step, stop)]

    return read


def findings(octets: bytes, step: int = 1 << 18) -> list[Finding]:
    return examine(reader(octets, step), len(octets), "mboxrd", unwatched).findings


def facts(octets: bytes) -> list[tuple[str, int | None, int | None]]:
    return [(each.kind, each.line, each.offset) for each in findings(octets)]


class ContentTests(SynchronousTestCase):
    """What is found in the octets of a spool, with line and offset."""

    def find(self, octets: bytes, *expected: tuple[str, int | None, int | None]) -> None:
        self.assertEqual(facts(octets), list(expected))

    def test_nothing(self) -> None:
        for octets in (b"", b"\n", b"\r\n\n", ONE, ONE + TWO, b"\n" + ONE):
            self.find(octets)

    def test_garbage(self) -> None:
        self.find(b"x\n\n" + ONE, ("garbage", 1, 0))
        self.find(b"\n\r\nx\n\n" + ONE, ("garbage", 3, 3))
        self.find(b"x\n\n", ("garbage", 1, 0))
        (found,) = findings(b"x\n\n" + ONE)
        self.assertIn("3 octets before the first message", found.text)
        # Not behind an empty line, so it is no message that could be the first.
        self.assertEqual(facts(b"x\n" + ONE)[0], ("garbage", 1, 0))

    def test_bare_cr_is_garbage(self) -> None:
        self.assertIn(("garbage", 1, 0), facts(b"\r"))

    def test_nuls_between_messages(self) -> None:
        self.find(ONE + b"\0\0" + TWO, ("nul-gap", ONE.count(b"\n") + 1, len(ONE)))
        self.find(ONE + b"\0" * 5000, ("nul-gap", ONE.count(b"\n") + 1, len(ONE)))
        self.find(b"\0" * 3 + ONE, ("nul-gap", 1, 0))
        self.find(b"\n\0" + ONE, ("nul-gap", 2, 1))
        self.find(b"\0\0\0", ("nul-gap", 1, 0))

    def test_nuls_in_text(self) -> None:
        start = len(FROM) + len(b"Subject: one\n\n")
        text = ONE[:start] + b"a\0\0b\0\n\n"
        self.find(text, ("nul", 4, start + 1), ("nul", 4, start + 4))
        self.assertIn("2 NULs", findings(text)[0].text)
        # Behind no separator: they may be the message's own end.
        self.assertEqual(facts(ONE[:-1] + b"\0")[0], ("nul", 5, len(ONE) - 1))

    def test_end(self) -> None:
        self.find(ONE[:-1], ("no-separator", 4, len(ONE) - 2))
        self.find(ONE[:-2], ("no-newline", 4, len(ONE) - 3))
        crlf = ONE[:-1].replace(b"\n", b"\r\n")
        self.assertEqual([kind for kind, _, _ in facts(crlf)], ["no-separator"])

    def test_from_lines(self) -> None:
        self.find(ONE + b"From now on\n\n", ("undated", 6, len(ONE)))
        self.find(ONE[:-1] + TWO, ("run-together", 5, len(ONE) - 1))
        self.find(ONE[:-2] + TWO, ("run-together", 4, len(ONE) - 2))
        # Quoted, or words of a sentence.
        self.find(ONE[:-1] + b">" + TWO)
        self.find(ONE[:-1] + b"It came From bob Wed Dec  2 05:53:00 1992\n\n")
        # Too long for a From_ line.
        self.find(
            ONE + b"From " + b"x" * 5000 + b" Wed Dec  2 05:53:00 1992\n\n",
            *facts(ONE + b"From " + b"x" * 5000 + b"\n\n"),
        )

    def test_nuls_and_a_message_run_together(self) -> None:
        kinds = [kind for kind, _, _ in facts(ONE[:-1] + b"\0\0" + TWO)]
        self.assertEqual(kinds, ["nul", "run-together"])

    def test_messages(self) -> None:
        self.find(FROM + b"Subject: x\n\n" + TWO, ("cut-header", 1, 0))
        self.find(FROM + b"What is this\n\n\n" + TWO, ("no-header", 1, 0))
        long = b"X-Long: " + b"x" * 70000 + b"\n"
        self.find(FROM + long + b"\nbody\n\n")
        self.find(FROM + long + b"\n" + TWO, ("cut-header", 1, 0))

    def test_large(self) -> None:
        length = len(TWO) - len(FROM) - 1
        self.patch(check_module, "LARGE", length)
        self.find(TWO)
        self.patch(check_module, "LARGE", length - 1)
        self.find(TWO, ("large", 1, 0))

    def test_duplicates(self) -> None:
        self.find(ONE + TWO + ONE, ("duplicate", 11, len(ONE + TWO)))
        (found,) = findings(ONE + TWO + ONE)
        self.assertIn("message 3 is equal to message 1", found.text)
        # What spool software adds makes no other message; another body of the same length does.
        status = ONE.replace(b"one\n", b"one\nStatus: RO\n")
        self.assertEqual([kind for kind, _, _ in facts(ONE + status)], ["duplicate"])
        self.find(ONE + ONE.replace(b"first", b"third"))

    def test_pseudo(self) -> None:
        pseudo = (
            FROM + b"Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA\n"
            b"X-IMAP: 1 2\n\ntext\n\n"
        )
        self.find(pseudo + ONE, ("pseudo", 1, 0))

    def test_many_of_one_kind(self) -> None:
        found = findings(ONE + b"From now\n\n" * (MOST + 7))
        self.assertEqual(len(found), MOST + 1)
        self.assertEqual((found[-1].kind, found[-1].line), ("undated", None))
        self.assertIn("7 more", found[-1].text)

    def test_file_that_becomes_shorter(self) -> None:
        self.assertRaises(OSError, examine, reader(ONE, 100), len(ONE) + 1, "mboxrd", unwatched)

    def test_every_kind_says_what_it_means(self) -> None:
        for name, kind in KINDS.items():
            self.assertRegex(name, r"^[a-z]+(-[a-z]+)*$")
            self.assertTrue(kind.meaning)


PIECES = [
    FROM,
    FROM[:-1],
    ONE,
    TWO,
    b"From now on\n",
    b"From eve Thu Dec  3 05:53 1992\r\n",
    b">" + FROM,
    b"\n",
    b"\r\n",
    b"\r",
    b"\0",
    b"\0" * 600,
    b"Subject: x\n",
    b"Status: RO\n",
    b"some text\n",
    b"no end",
    b"\xff\x00\x01",
]
octets_of_any_kind = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join), st.binary(max_size=200)
)
steady = settings(max_examples=150, deadline=None, derandomize=True)


class ContentPropertyTests(SynchronousTestCase):
    @steady
    @given(octets_of_any_kind, st.integers(1, 70))
    def test_blocks_of_any_size(self, octets: bytes, step: int) -> None:
        self.assertEqual(findings(octets, step), findings(octets))

    @steady
    @given(octets_of_any_kind)
    def test_from_lines_as_a_slow_reader_finds_them(self, octets: bytes) -> None:
        """Line by line, where no NUL stands before one."""
        octets = octets.replace(b"\0", b"")
        expected: list[tuple[str, int]] = []
        before, offset = b"\n", 0
        for line in oracle_mbox.lines_of(octets):
            if line.startswith(b"From "):
                separated = before in (b"\n", b"\r\n")
                dated = oracle_mbox.is_from_line(line)
                if separated and not dated:
                    expected.append(("undated", offset))
                elif dated and not separated:
                    expected.append(("run-together", offset))
            # The first in a line is all that is looked for.
            place = line.find(b"From ")
            inside = place > 0 and line[place - 1] not in b">\r \t"
            if inside and oracle_mbox.is_from_line(line[place:]):
                expected.append(("run-together", offset + place))
            before, offset = line, offset + len(line)
        found = [
            (each.kind, each.offset)
            for each in findings(octets)
            if each.kind in ("undated", "run-together") and each.offset is not None
        ]
        self.assertEqual(found, expected)

    @steady
    @given(octets_of_any_kind)
    def test_error_where_the_server_refuses(self, octets: bytes) -> None:
        try:
            oracle_mbox.read(octets)
            refused = None
        except oracle_mbox.Corrupt as fault:
            refused = (fault.line, fault.offset)
        garbage = [(line, at) for kind, line, at in facts(octets) if kind == "garbage"]
        gaps = [at for kind, _, at in facts(octets) if kind == "nul-gap"]
        if garbage:
            self.assertEqual(garbage, [refused])
        elif refused:
            self.assertEqual(gaps[:1], [refused[1]])


class Case(SynchronousTestCase):
    def setUp(self) -> None:
        self.top = os.path.realpath(self.mktemp())
        self.state = os.path.join(self.top, "state")
        self.mail = os.path.join(self.top, "mail")
        for folder in (self.top, self.state, self.mail):
            os.mkdir(folder, 0o700)
        self.bob = os.path.join(self.mail, "bob")

    def put(self, octets: bytes, path: str | None = None) -> None:
        with open(path or self.bob, "wb") as file:
            file.write(octets)
        os.chmod(path or self.bob, 0o660)

    def get(self, path: str | None = None) -> bytes:
        with open(path or self.bob, "rb") as file:
            return file.read()

    def fsck(self, files: Files | None = None, **more: Any) -> Fsck:
        return Fsck(Settings(self.state, **{"lock_timeout": 0.0, **more}), files)

    def kinds(self, **more: Any) -> list[str]:
        return [each.kind for each in self.fsck(**more).look(self.bob).found]

    def open(self, kind: str = "mboxrd") -> list[bytes]:
        """The ids that the server gives to bob's messages."""
        store = MboxStore(self.mail + "/{user}", self.state, kind, owner="any")
        drop = store.open(Owner("bob"))
        try:
            drop.identify()
            return [drop.listing.uid(index) for index in range(len(drop.listing))]
        finally:
            drop.release()

    def kept(self) -> dict[str, bytes]:
        folder = os.path.join(self.state, "fsck")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return {name: self.get(os.path.join(folder, name)) for name in names}


class BesideTests(Case):
    """What lies beside a spool, and who may open it."""

    def test_nothing(self) -> None:
        self.put(ONE)
        self.assertEqual(self.kinds(), [])

    def test_no_file(self) -> None:
        self.assertIn("no such file", str(self.assertRaises(Failed, self.kinds)))
        fsck = self.fsck()
        failed = self.assertRaises(Failed, fsck.look, os.path.join(self.top, "none", "bob"))
        self.assertIn("none", str(failed))

    def test_unsafe(self) -> None:
        self.put(ONE, self.bob + "2")
        os.symlink(self.bob + "2", self.bob)
        self.assertEqual(self.kinds(), ["unsafe"])
        self.assertEqual(self.fsck().mend(self.bob).status, "left")
        os.unlink(self.bob)
        os.link(self.bob + "2", self.bob)
        self.assertEqual(self.kinds(), ["unsafe"])
        os.unlink(self.bob)
        os.mkfifo(self.bob)
        self.assertEqual(self.kinds(), ["unsafe"])

    def test_owner(self) -> None:
        self.put(ONE)
        self.assertEqual(self.kinds(uids=frozenset({os.geteuid()})), [])
        self.assertEqual(self.kinds(uids=frozenset({os.geteuid() + 1})), ["unsafe"])

    def test_named_for_another(self) -> None:
        # As another user sees it: one's own spools are as one wants them.
        path = os.path.join(self.mail, "root")
        found = os.stat(self.mail)
        other = os.stat_result((0o100660, 1, 1, 1, 4711, *tuple(found)[5:]))
        said = look_at_rights(path, other)
        self.assertEqual(
            [(each.kind, each.text) for each in said], [("owner", "belongs to uid 4711, not 0")]
        )

    def test_mode(self) -> None:
        self.put(ONE)
        os.chmod(self.bob, 0o664)
        result = self.fsck().look(self.bob)
        self.assertEqual([each.kind for each in result.found], ["mode"])
        self.assertIn("0664 lets everybody read it", result.found[0].text)
        self.assertEqual(result.status, "clean")

    def test_unreadable(self) -> None:
        self.put(ONE)

        def refuse(path: str, uids: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        self.patch(fsck_module, "open_spool", refuse)
        result = self.fsck().look(self.bob)
        self.assertEqual([each.kind for each in result.found], ["unreadable"])
        self.assertEqual(result.status, "left")

    def test_medium_error(self) -> None:
        self.put(ONE)

        def broken(self: object, start: int, stop: int, size: int) -> Iterator[bytes]:
            raise OSError(errno.EIO, "Input/output error")

        self.patch(fsck_module.Spool, "blocks", broken)
        self.assertEqual(self.kinds(), ["unreadable"])

    def lock(self, text: bytes, age: float = 0.0) -> str:
        path = self.bob + ".lock"
        with open(path, "wb") as file:
            file.write(text)
        moment = time.time() - age
        os.utime(path, (moment, moment))
        return path

    def test_stale_dot_lock(self) -> None:
        self.put(ONE)
        path = self.lock(b"%d\n" % NOBODY)
        self.assertEqual(self.kinds(), ["lock-stale"])
        self.assertTrue(os.path.exists(path))
        self.assertEqual(self.kinds(locks=("fcntl",)), [])
        result = self.fsck().mend(self.bob)
        self.assertEqual((result.status, result.copy), ("repaired", ""))
        self.assertFalse(os.path.exists(path))
        self.assertEqual(self.kinds(), [])
        (report,) = self.kept().values()
        self.assertIn(b"removed the stale dot-lock", report)

    def test_held_dot_lock(self) -> None:
        self.put(ONE)
        self.lock(b"%d\n" % os.getppid())
        failed = self.assertRaises(Failed, self.fsck().look, self.bob)
        self.assertIn(f"process {os.getppid()} has the dot-lock {self.bob}.lock", str(failed))
        self.lock(b"0", STALE_AFTER / 2)
        failed = self.assertRaises(Failed, self.fsck().look, self.bob)
        self.assertIn("an unnamed process", str(failed))
        self.lock(b"0", STALE_AFTER + 60)
        self.assertEqual(self.kinds(), ["lock-stale"])

    def test_odd_dot_lock(self) -> None:
        self.put(ONE)
        self.put(ONE[:-1])
        os.mkdir(self.bob + ".lock")
        self.assertEqual(self.kinds(), ["lock-odd", "no-separator"])
        self.assertEqual(self.fsck().mend(self.bob).status, "left")

    def test_no_dot_lock(self) -> None:
        self.put(ONE)

        def refuse(self: object) -> bool:
            raise PermissionError(errno.EACCES, "Permission denied")

        self.patch(fsck_module.DotLock, "take", refuse)
        result = self.fsck().look(self.bob)
        self.assertEqual([each.kind for each in result.found], ["lock-none"])
        self.assertEqual(result.messages, 1)

    def test_dot_locks_in_the_making(self) -> None:
        self.put(ONE)
        old = os.path.join(self.mail, ".bob.popdrop-lock-0123")
        young = os.path.join(self.mail, ".bob.popdrop-lock-4567")
        others = os.path.join(self.mail, ".bobby.popdrop-lock-0123")
        for path in (old, young, others):
            self.put(b"", path)
        before = time.time() - STALE_AFTER - 60
        os.utime(old, (before, before))
        os.utime(others, (before, before))
        (found,) = self.fsck().look(self.bob).found
        self.assertEqual((found.kind, found.path), ("lock-temporary", old))
        self.assertEqual(self.fsck().mend(self.bob).status, "repaired")
        self.assertEqual([os.path.exists(path) for path in (old, young, others)], [0, 1, 1])

    def update(self, path: str | None = None) -> None:
        """Be killed in the middle of taking out the first of two messages."""
        self.put(ONE + TWO)
        journals = Journals(self.state, Counting())
        files = Counting()
        files.ftruncate = files._step(self.kill)  # type: ignore[method-assign]
        journals = Journals(self.state, files)
        with open(self.bob, "r+b") as file:
            size = len(ONE + TWO)
            journal = journals.of(path or self.bob)
            self.assertRaises(
                Killed, journal.replace_tail, file.fileno(), 0, [(len(ONE), size)], size
            )

    def kill(self, *words: object) -> None:
        raise Killed

    def test_journal(self) -> None:
        self.update()
        (found, *_) = self.fsck().look(self.bob).found
        self.assertEqual((found.kind, found.path), ("journal", self.mail + "/.bob.popdrop"))
        before = self.get()
        result = self.fsck().mend(self.bob)
        self.assertEqual((result.status, self.get()), ("repaired", TWO))
        self.assertEqual(self.get(result.copy), before)
        self.assertEqual(self.kinds(), [])

    def test_journal_of_a_spool_that_is_gone(self) -> None:
        self.update()
        os.unlink(self.bob)
        self.assertEqual(self.kinds(), ["journal"])
        result = self.fsck().mend(self.bob)
        self.assertEqual([each.kind for each in result.left], ["orphan"])

    def test_journal_in_the_second_folder(self) -> None:
        """Also when the server came to the spool by another path."""
        link = os.path.join(self.top, "link")
        os.symlink(self.mail, link)
        self.patch(sys.modules["popdrop.stores.mbox.journal"], "_ELSEWHERE", {errno.ENOSPC, 4711})
        real = Counting._step

        def no_room(files: Counting, call: Callable[..., Any]) -> Any:
            def step(*words: Any, **more: Any) -> Any:
                if call is os.open and str(words[0]).startswith(link + "/.bob"):
                    raise full()
                return real(files, call)(*words, **more)

            return step

        self.patch(Counting, "_step", no_room)
        self.update(os.path.join(link, "bob"))
        self.assertEqual(len(os.listdir(os.path.join(self.state, "journal"))), 1)
        self.assertEqual(self.kinds()[0], "journal")
        result = self.fsck().mend(self.bob)
        self.assertEqual((result.status, self.get()), ("repaired", TWO))
        self.put(ONE)
        self.update(os.path.join(link, "bob"))
        self.put(NEW)
        result = self.fsck().mend(self.bob)
        self.assertEqual((len(self.open()), result.left[0].kind), (2, "orphan"))

    def test_foreign_journal(self) -> None:
        self.put(b"x\n\n" + ONE)
        path = os.path.join(self.mail, ".bob.popdrop")
        self.put(b"no journal", path)
        os.chmod(path, 0o600)
        self.assertEqual(self.kinds()[0], "journal-foreign")  # there is no key
        Journals(self.state).key()
        os.chmod(path, 0o644)
        (found, *_) = self.fsck().look(self.bob).found
        self.assertEqual(found.kind, "journal-foreign")
        self.assertIn("has mode 0644", found.text)
        result = self.fsck().mend(self.bob)
        self.assertEqual((result.status, self.get()), ("left", b"x\n\n" + ONE))
        self.assertEqual(self.kept(), {})

    def test_looking_makes_no_key(self) -> None:
        self.put(ONE)
        os.mkdir(os.path.join(self.state, "journal"), 0o700)
        self.put(b"", os.path.join(self.state, "journal", ".x.popdrop"))
        self.assertEqual(self.kinds(), [])
        self.assertEqual(os.listdir(self.state), ["journal"])

    def test_damaged_journal(self) -> None:
        self.put(ONE)
        path = os.path.join(self.mail, ".bob.popdrop")
        self.put(b"no journal", path)
        os.chmod(path, 0o600)
        Journals(self.state).key()
        self.assertEqual(self.kinds(), ["journal"])
        result = self.fsck().mend(self.bob)
        self.assertEqual([each.kind for each in result.left], ["orphan"])
        self.assertTrue(result.done)
        # It stays until somebody has looked.
        again = self.fsck().mend(self.bob)
        self.assertEqual((again.status, again.done), ("left", []))
        os.unlink(again.left[0].path)
        self.assertEqual(self.kinds(), [])


class LookTests(Case):
    def test_changes_nothing(self) -> None:
        self.put(DAMAGED)
        long_ago = 10**9
        os.utime(self.bob, ns=(long_ago, 2 * long_ago))
        before, names = os.stat(self.bob), set(os.listdir(self.mail))
        self.assertEqual(self.fsck().look(self.bob).status, "left")
        after = os.stat(self.bob)
        self.assertEqual(
            (after.st_atime_ns, after.st_mtime_ns, after.st_ctime_ns),
            (before.st_atime_ns, before.st_mtime_ns, before.st_ctime_ns),
        )
        self.assertEqual(set(os.listdir(self.mail)), names)
        self.assertEqual(os.listdir(self.state), [])

    def test_takes_no_session(self) -> None:
        """It may last for hours. Nor does mending want it, where nothing is to be mended."""
        self.put(ONE)
        session = hold(os.path.join(self.state, "locks"), self.bob)
        self.addCleanup(session.release)
        self.assertEqual(self.fsck().look(self.bob).status, "clean")
        self.assertEqual(self.fsck().mend(self.bob).status, "clean")

    def test_index(self) -> None:
        """One that does not agree is found and removed; one that is out of date is no fault."""
        self.patch(drop_module, "SMALLEST", 0)
        self.patch(drop_module, "clock_ns", lambda: time.time_ns() + 3600 * 10**9)
        self.put(ONE + TWO + ONE)
        store = MboxStore(os.path.join(self.mail, "{user}"), self.state, owner="any")
        store.open(Owner("bob")).release()
        folder = os.path.join(self.state, "index")
        (name,) = os.listdir(folder)
        path = os.path.join(folder, name)
        self.assertEqual(self.kinds(), ["duplicate"])
        index = Indexes(self.state, None).of(name)
        known = index.load()
        assert known is not None
        wrong = known.places()
        wrong.starts[1] += 1
        Index(path, bytes(32)).save(known.key, True, 0, known.tail, wrong, None)
        self.assertEqual(self.kinds(), ["index", "duplicate"])
        result = self.fsck().mend(self.bob)
        self.assertEqual((result.status, os.listdir(folder)), ("repaired", []))
        self.assertEqual(self.kinds(), ["duplicate"])
        with open(path, "wb") as file:
            file.write(b"something else")
        self.assertEqual(self.kinds(), ["index", "duplicate"])
        Index(path, bytes(32)).save(known.key, True, 0, known.tail, wrong, None)
        self.put(TWO)
        self.assertEqual(self.kinds(), [])


class MendTests(Case):
    def mend(self, octets: bytes) -> bytes:
        self.put(octets)
        before = os.stat(self.bob)
        result = self.fsck().mend(self.bob)
        self.assertEqual(result.status, "repaired", result.left)
        after = os.stat(self.bob)
        for name in ("st_ino", "st_mode", "st_uid", "st_gid", "st_nlink"):
            self.assertEqual(getattr(after, name), getattr(before, name))
        self.assertEqual(self.fsck().look(self.bob).status, "clean")
        self.assertEqual(os.listdir(self.mail), ["bob"])
        return self.get()

    def test_garbage(self) -> None:
        mended = self.mend(b"lost\ntext\n\n" + ONE + TWO)
        self.assertTrue(mended.startswith(ONE + TWO + b"From MAILER-DAEMON "))
        last = oracle_mbox.read(mended)[2]
        self.assertIn(b"\nSubject: Text found before", last.sent)
        self.assertTrue(last.stored.endswith(b"\n\nlost\ntext\n"))

    def test_nothing_but_garbage(self) -> None:
        mended = self.mend(b"lost")
        self.assertTrue(mended.startswith(b"From MAILER-DAEMON "))
        self.assertTrue(mended.endswith(b"\n\nlost\n\n"))

    def test_ending(self) -> None:
        self.assertEqual(self.mend(ONE[:-1]), ONE)
        self.assertEqual(self.mend(ONE[:-2]), ONE)
        crlf = ONE.replace(b"\n", b"\r\n")
        self.assertEqual(self.mend(crlf[:-2]), crlf)

    def test_nuls(self) -> None:
        self.assertEqual(self.mend(ONE + b"\0" * 999), ONE)
        self.assertEqual(self.mend(ONE + b"\0" * 9 + TWO + b"\0" + ONE), ONE + TWO + ONE)
        self.assertEqual(self.mend(b"\n" + b"\0" * 9 + TWO), b"\n" + TWO)
        self.assertEqual(self.mend(b"\0" * 9), b"")

    def test_torn_from_line(self) -> None:
        """A deliverer was killed behind the From_ line but for its end: the message is empty."""
        self.assertEqual(self.mend(ONE + FROM[:-1]), ONE + FROM + b"\n")

    def test_all_at_once(self) -> None:
        mended = self.mend(DAMAGED)
        self.assertTrue(mended.startswith(ONE + TWO + b"From now on\n\nFrom MAILER-DAEMON "))

    def test_ids_stay(self) -> None:
        for octets in (ONE + TWO[:-1], ONE + TWO[:-2], ONE + TWO + b"\0" * 30):
            self.put(octets.rstrip(b"\0"))
            known = self.open()
            self.mend(octets)
            self.assertEqual(self.open(), known)

    def test_copy_and_report(self) -> None:
        self.put(DAMAGED)
        first = self.fsck().mend(self.bob)
        mended = self.get()
        self.put(DAMAGED)
        second = self.fsck().mend(self.bob)
        for result in (first, second):
            self.assertEqual(self.get(result.copy), DAMAGED)
            self.assertEqual(result.report, result.copy + ".txt")
            for path in (result.copy, result.report):
                self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        self.assertEqual(len(self.kept()), 4)
        report = self.get(first.report).decode()
        for octets in (DAMAGED, mended):
            digest = hashlib.sha256(octets).hexdigest()
            self.assertIn(f"{len(octets)} octets, SHA-256 {digest}", report)
        self.assertIn(f"{self.bob}:1: error: no From_ line", report)
        for done in first.done:
            self.assertIn(done, report)

    def test_backup_dir(self) -> None:
        self.put(DAMAGED)
        folder = os.path.join(self.top, "kept")
        result = self.fsck(backup_dir=folder).mend(self.bob)
        self.assertEqual(os.path.dirname(result.copy), folder)
        self.assertEqual(len(os.listdir(folder)), 2)

    def test_no_copy_no_change(self) -> None:
        self.put(DAMAGED)
        failed = self.assertRaises(
            Failed, self.fsck(backup_dir=os.path.join(self.bob, "x")).mend, self.bob
        )
        self.assertIn("Not a directory", str(failed))
        self.assertEqual(self.get(), DAMAGED)

    def test_new_mail_stays_new(self) -> None:
        self.put(ONE[:-1])
        os.utime(self.bob, ns=(10**9, 2 * 10**9))
        self.fsck().mend(self.bob)
        found = os.stat(self.bob)
        self.assertLess(found.st_atime_ns, found.st_mtime_ns)

    def test_mark_is_not_believed(self) -> None:
        """A mail that only says that it holds the text does not."""
        lost = b"lost\n\n"
        mark = MARK + b": " + hashlib.sha256(lost).hexdigest().encode()
        false = FROM + b"Subject: x\n" + mark + b"\n\nlooo\n\n"
        mended = self.mend(lost + ONE + false)
        self.assertEqual(mended.count(b"\n\nlost\n\n"), 1)

    def test_session(self) -> None:
        self.put(DAMAGED)
        session = SessionLock(os.path.join(self.state, "locks"), self.bob)
        os.mkdir(os.path.join(self.state, "locks"), 0o700)
        session.take()
        self.addCleanup(session.release)
        failed = self.assertRaises(Failed, self.fsck().mend, self.bob)
        self.assertIn("a POP3 session has the maildrop", str(failed))
        self.assertEqual(self.get(), DAMAGED)

    def test_locked_spool(self) -> None:
        self.put(DAMAGED)
        with open(self.bob, "r+b") as file:
            with SpoolLocks(file.fileno(), self.bob, ("fcntl", "dot"), True):
                failed = self.assertRaises(Failed, self.fsck().mend, self.bob)
                self.assertIn(f"process {os.getpid()} of", str(failed))
            with SpoolLocks(file.fileno(), self.bob, ("fcntl",), True):
                failed = self.assertRaises(Failed, self.fsck().mend, self.bob)
                self.assertIn("a process has locked it", str(failed))
        self.assertEqual(self.get(), DAMAGED)

    def test_waits_for_a_lock(self) -> None:
        self.put(ONE[:-1])
        path = self.bob + ".lock"
        self.put(b"%d\n" % os.getppid(), path)
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                os.unlink(path)

        self.patch(time, "sleep", sleep)
        self.assertEqual(self.fsck(lock_timeout=1e9).mend(self.bob).status, "repaired")
        self.assertEqual(len(pauses), 3)

    def test_state_folder_of_another(self) -> None:
        """What root makes there the server could not open."""
        self.put(ONE[:-1])
        uid = os.geteuid()
        self.patch(os, "geteuid", lambda: uid + 1)
        failed = self.assertRaises(Failed, self.fsck().mend, self.bob)
        name = pwd.getpwuid(uid).pw_name
        self.assertIn(f"belongs to {name}: run this as that user", str(failed))
        self.assertIn(f"runuser -u {name} -g mail -- popdrop fsck --repair", str(failed))
        self.assertEqual(os.listdir(self.state), [])

    def test_root_makes_no_state_folder(self) -> None:
        self.put(ONE[:-1])
        os.rmdir(self.state)
        self.patch(os, "geteuid", lambda: 0)
        failed = self.assertRaises(Failed, self.fsck().mend, self.bob)
        self.assertIn("--state-dir", str(failed))
        self.assertFalse(os.path.exists(self.state))

    def test_read_only(self) -> None:
        self.put(ONE[:-1])
        opened = fsck_module.open_spool

        def read_only(path: str, uids: frozenset[int] | None) -> Any:
            spool = opened(path, uids)
            assert spool is not None
            spool.writable = False
            return spool

        self.patch(fsck_module, "open_spool", read_only)
        failed = self.assertRaises(Failed, self.fsck().mend, self.bob)
        self.assertIn("no right to write it", str(failed))


def nothing_lost(before: bytes, after: bytes) -> bool:
    """Whether `after` is `before` but for NULs, line ends at the end, and what was moved there."""
    made = re.search(
        rb"From MAILER-DAEMON [^\n]*\nFrom: Mail [^\n]*\nDate: [^\n]*\nSubject: [^\n]*\n"
        + MARK
        + rb": [0-9a-f]{64}\n\n",
        after,
    )
    if made:
        after = after[made.end() :] + after[: made.start()]
    before, after = before.replace(b"\0", b""), after.replace(b"\0", b"")
    if made:
        # Line ends that were added stand where the message ended that is now before the other.
        return sorted(before.split()) == sorted(after.split())
    return after.startswith(before) and after[len(before) :] in (b"", b"\n", b"\n\n", b"\r\n")


class NothingLostTests(Case):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(octets_of_any_kind)
    @example(DAMAGED)
    @example(b"lost\n\n\0\0" + ONE)
    @example(b"\r")
    @example(FROM[:-1])
    @example(b"x" + ONE + b"\0")
    def test_any_octets(self, octets: bytes) -> None:
        self.put(octets)
        result = self.fsck().mend(self.bob)
        after = self.get()
        again = self.fsck().look(self.bob)
        self.assertEqual(again.status, "clean", again.left)
        self.assertEqual(result.status, "repaired" if result.done else "clean")
        self.assertTrue(nothing_lost(octets, after), (octets, after))
        if after != octets:
            self.assertEqual(self.get(result.copy), octets)
        self.assertEqual(len(self.open()), result.messages)
        torn = octets.rpartition(b"\n")[2] + b"\n"
        if b"\0" in octets or oracle_mbox.is_from_line(torn):
            return  # messages may have been parted
        with contextlib.suppress(oracle_mbox.Corrupt):
            before = oracle_mbox.read(octets, hide=False)
            found = oracle_mbox.read(after, hide=False)[: len(before)]
            self.assertEqual([m.immutable for m in found], [m.immutable for m in before])

    def test_any_octets_by_the_octet(self) -> None:
        """The message's octets themselves, where the one above compares words."""
        for garbage in (b"a\n b\r\n\n", b"\x80\xff\n\n", b"\n\n x \t\n\n"):
            self.put(garbage + ONE + TWO)
            self.fsck().mend(self.bob)
            after = self.get()
            self.assertTrue(after.startswith(ONE + TWO))
            self.assertTrue(after.endswith(b"\n\n" + garbage))


class CrashTests(Case):
    """Killed, or refused by the system, at every call that changes something."""

    def setUp(self) -> None:
        super().setUp()
        # So that what is appended takes some writes.
        self.patch(mend_module, "BLOCK", 5)

    def each_call(self, error: Callable[[], BaseException], torn: bool) -> int:
        for number in range(1000):
            shutil.rmtree(self.state)
            os.mkdir(self.state, 0o700)
            for name in os.listdir(self.mail):
                os.unlink(os.path.join(self.mail, name))
            self.put(DAMAGED)
            files = Counting(number, error, torn)
            with contextlib.suppress(Killed, Failed):
                self.fsck(files).mend(self.bob)
            if files.count <= number:
                return number
            # Mail comes in, then somebody tries again.
            with open(self.bob, "ab") as file:
                ended = self.get().endswith((b"\n\n", b"\0"))
                self.assertTrue(ended or torn, number)
                file.write(NEW if ended else b"\n\n" + NEW)
            while (result := self.fsck().mend(self.bob)).status == "left":
                # A journal that was kept aside is no loss: what it held is in the spool.
                for each in result.left:
                    self.assertEqual(each.kind, "orphan", (number, each))
                    os.unlink(each.path)
            self.check(number)
        raise AssertionError("it never came to its end")

    def check(self, number: int) -> None:
        found = Counter(m.immutable for m in oracle_mbox.read(self.get()))
        (one, two, new) = (oracle_mbox.read(each)[0].immutable for each in (ONE, TWO, NEW))
        self.assertEqual(found[one], 1, number)
        self.assertEqual(found[new], 1, number)
        self.assertEqual(found[two + b"\nFrom now on\n"], 1, number)
        # Killed while it was appended, the text is there in part and whole.
        wrapped = [each for each in found if each.startswith(b"From MAILER-DAEMON ")]
        whole = [found[each] for each in wrapped if each.endswith(b"\n\nlost\n\nhalf\n")]
        self.assertEqual(whole, [1], number)
        self.assertLessEqual(sum(found[each] for each in wrapped), 2)
        copies = [self.kept()[name] for name in self.kept() if not name.endswith(".txt")]
        self.assertIn(DAMAGED, copies)
        self.assertEqual(self.fsck().look(self.bob).status, "clean", number)

    def test_killed(self) -> None:
        self.assertGreater(self.each_call(Killed, False), 30)

    def test_torn(self) -> None:
        self.assertGreater(self.each_call(Killed, True), 30)

    def test_disk_full(self) -> None:
        """What was written in part is taken back, unless that fails, too."""
        self.assertGreater(self.each_call(full, True), 30)

    def test_what_was_done_before_an_error_is_said(self) -> None:
        self.put(DAMAGED)
        Journals(self.state).key()
        plain = Counting()
        self.fsck(plain).mend(self.bob)
        self.put(DAMAGED)
        files = Counting(plain.count - 3, full)
        failed = self.assertRaises(Failed, self.fsck(files).mend, self.bob)
        report = re.search(r"what was done: (\S+)\)", str(failed))
        assert report is not None
        self.assertIn(b"Not brought to its end", self.get(report[1]))


class CommandTests(Case):
    def run_it(self, *words: str) -> Result:
        words = ("fsck", "--state-dir", self.state, "--lock-timeout", "0", *words)
        return CliRunner().invoke(popdrop, words)

    def test_clean(self) -> None:
        self.put(ONE)
        result = self.run_it(self.bob)
        self.assertEqual(result.exit_code, 0)
        self.assertEqual(result.output, f"{self.bob}: clean (1 message, {len(ONE)} octets)\n")
        self.assertEqual(self.run_it("-q", self.bob).output, "")

    def test_notes_are_clean(self) -> None:
        self.put(ONE + ONE)
        result = self.run_it(self.bob)
        self.assertEqual(result.exit_code, 0)
        self.assertIn(f"{self.bob}:6: note: message 2 is equal", result.output)
        self.assertEqual(self.run_it("-q", self.bob).output, "")

    def test_damaged_and_repaired(self) -> None:
        self.put(DAMAGED)
        result = self.run_it(self.bob)
        self.assertEqual(result.exit_code, 4)
        self.assertIn(f"{self.bob}:1: error: no From_ line: ", result.output)
        self.assertIn("(offset 0)\n", result.output)
        self.assertIn("--repair mends it", result.output)
        self.assertEqual(self.get(), DAMAGED)
        result = self.run_it("--repair", self.bob)
        self.assertEqual(result.exit_code, 1)
        (copy,) = re.findall(r"copy: (.*)\n", result.output)
        (report,) = re.findall(r"report: (.*)\n", result.output)
        self.assertEqual(self.get(copy), DAMAGED)
        self.assertIn(b"Done\n", self.get(report))
        self.assertEqual(self.run_it("--repair", self.bob).exit_code, 0)

    def test_worst_of_all(self) -> None:
        self.put(ONE)
        torn, none, left = (os.path.join(self.mail, name) for name in ("eve", "none", "odd"))
        self.put(ONE[:-1], torn)
        self.assertEqual(self.run_it(self.bob, torn, self.bob).exit_code, 4)
        self.assertEqual(self.run_it("--repair", self.bob, torn, self.bob).exit_code, 1)
        os.mkfifo(left)
        self.assertEqual(self.run_it("--repair", self.bob, left).exit_code, 4)
        result = self.run_it("--repair", none, self.bob, left)
        self.assertEqual(result.exit_code, 8)
        self.assertEqual(result.stderr, f"Error: {none}: there is no such file\n")

    def test_locked(self) -> None:
        self.put(DAMAGED)
        self.put(b"%d\n" % os.getppid(), self.bob + ".lock")
        for words in ([], ["--repair"]):
            result = self.run_it(*words, self.bob)
            self.assertEqual(result.exit_code, 8)
            self.assertIn(f"process {os.getppid()} has the dot-lock", result.stderr)
        self.assertEqual(self.run_it("--locks", "fcntl", self.bob).exit_code, 4)

    def test_folder_and_dot_lock(self) -> None:
        self.put(ONE)
        self.put(b"%d\n" % NOBODY, os.path.join(self.mail, "eve.lock"))
        result = self.run_it(self.mail)
        self.assertEqual(result.exit_code, 8)
        self.assertIn(f"{self.mail}/*", result.stderr)
        result = self.run_it(os.path.join(self.mail, "eve.lock"), self.bob)
        self.assertEqual(result.exit_code, 0)
        self.assertIn("eve.lock: skipped", result.output)

    def test_usage(self) -> None:
        self.put(ONE)
        for words in (
            [],
            ["--kind", "maildir", self.bob],
            ["--locks", "flock", self.bob],
            ["--locks", "dot,dot", self.bob],
            ["--lock-timeout", "-1", self.bob],
            ["--owner", "no-such-account", self.bob],
        ):
            self.assertEqual(self.run_it(*words).exit_code, 2, words)

    def test_owner(self) -> None:
        self.put(ONE)
        self.assertEqual(self.run_it("--owner", "any", self.bob).exit_code, 0)
        self.assertEqual(self.run_it("--owner", str(os.geteuid()), self.bob).exit_code, 0)

    def test_relative_path(self) -> None:
        self.put(ONE)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.mail)
        self.assertIn(f"{self.bob}: clean", self.run_it("bob").output)

    def test_json(self) -> None:
        self.put(DAMAGED)
        result = self.run_it("--json", "--repair", self.bob, self.mail)
        self.assertEqual(result.exit_code, 8)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        *found, spool, failed = lines
        garbage = next(each for each in found if each["kind"] == "garbage")
        self.assertEqual(
            [garbage[key] for key in ("spool", "severity", "line", "offset", "mendable")],
            [self.bob, "error", 1, 0, True],
        )
        self.assertEqual((spool["status"], spool["left"]), ("repaired", []))
        self.assertEqual(self.get(spool["copy"]), DAMAGED)
        self.assertEqual((failed["status"], failed["spool"]), ("failed", self.mail))

    def test_odd_names(self) -> None:
        """No control characters, and nothing that is no UTF-8, reaches the terminal."""
        path = os.path.join(self.mail, os.fsdecode(b"a\x1b[2J\n\xff"))
        self.put(DAMAGED, path)
        for words in ([], ["--json"], ["--repair"], ["--repair", "-q"]):
            result = self.run_it(*words, path)
            self.assertIn(result.exit_code, (0, 1, 4))
            self.assertNotIn("\x1b", result.output)
        self.assertEqual(printable(os.fsdecode(b"\xc3\xa4\xff\n")), "ä\\xff\\n")
        for report in self.kept().values():
            self.assertNotIn(b"\x1b", report)

    def test_nothing_of_the_mail_is_shown(self) -> None:
        self.put(b"hush\n\n" + ONE.replace(b"first", b"hush\0hush\nFrom hush\n\nFrom hush"))
        self.assertNotIn("hush", self.run_it(self.bob).output)

    def test_stopped(self) -> None:
        self.put(ONE)

        def stop(*words: object) -> None:
            raise KeyboardInterrupt

        self.patch(fsck_module, "examine", stop)
        result = self.run_it(self.bob)
        self.assertEqual(result.exit_code, 8)
        self.assertIn("run the same command again", result.stderr)
        self.assertEqual(os.listdir(self.mail), ["bob"])

    def test_server_names_it(self) -> None:
        self.put(b"x\n\n")
        for kind in FORMS:
            failed = self.assertRaises(PermanentFailure, self.open, kind)
            option = "" if kind == "mboxrd" else f"--kind {kind} "
            self.assertIn(f"; `popdrop fsck {option}{self.bob}` shows", failed.detail)
            self.assertNotIn("fsck", failed.text)
            self.assertEqual(self.run_it(*option.split(), self.bob).exit_code, 4)

    def test_refused(self) -> None:
        """Said by a look, where that can know it, and by a repair; nothing is changed."""
        self.put(b"\x01\x01\x01\x01\nSubject: x\n\nx\n")
        before = self.get()
        for words, label in ([], "--repair will not mend it"), (["--repair"], "not mended"):
            result = self.run_it(*words, self.bob)
            self.assertEqual(result.exit_code, 4)
            self.assertIn(f"{self.bob}: {label}: it begins with a line of four ^A", result.output)
            self.assertNotIn("--repair mends it", result.output)
            result = self.run_it(*words, "--json", self.bob)
            self.assertIn("--kind mmdf", json.loads(result.stdout.splitlines()[-1])["refused"])
        self.assertEqual(self.get(), before)
        self.assertEqual(self.run_it("--repair", "--kind", "mmdf", self.bob).exit_code, 1)
        self.assertEqual(self.get(), before + b"\x01\x01\x01\x01\n")


class ProcessTests(Case):
    """As a process of its own."""

    def environ(self) -> dict[str, str]:
        known = ("PATH", "LANG", "COVERAGE_PROCESS_START")
        kept = {name: os.environ[name] for name in known if name in os.environ}
        return {**kept, "PYTHONPATH": ROOT, "HOME": self.top, "TERM": "xterm"}

    def child(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "popdrop", "fsck", "--state-dir", self.state, *words],
            env=self.environ(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GUARD,
            check=False,
        )

    def test_process(self) -> None:
        self.put(DAMAGED)
        self.assertEqual(
            [
                self.child(*words).returncode
                for words in ([self.bob], ["--repair", self.bob], [self.bob])
            ],
            [4, 1, 0],
        )
        plain = self.child(self.bob)
        self.assertEqual(plain.stderr, b"")
        self.assertNotIn(b"\x1b", plain.stdout)

    def test_names_the_process_that_has_locked(self) -> None:
        self.put(ONE)
        code = (
            "import fcntl, sys\n"
            f"file = open({self.bob!r}, 'r+b')\n"
            "fcntl.lockf(file, fcntl.LOCK_EX)\n"
            "print('locked', flush=True)\n"
            "sys.stdin.read()\n"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdin is not None and holder.stdout is not None
        try:
            self.assertEqual(holder.stdout.readline(), b"locked\n")
            failed = self.assertRaises(Failed, self.fsck().look, self.bob)
            self.assertIn(f"process {holder.pid} has locked it", str(failed))
        finally:
            holder.stdin.close()
            holder.wait(GUARD)
            holder.stdout.close()

    def shown(self, big: int, output: bool) -> bytes:
        """What comes on a terminal, with output on it as well or not."""
        code = (
            "import sys\n"
            "from popdrop.cli import fsck\n"
            f"fsck.BIG = {big}\n"
            "from popdrop.__main__ import main\n"
            "main()\n"
        )
        words = ["fsck", "--state-dir", self.state, self.bob]
        ours, theirs = pty.openpty()
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", code, *words],
                env=self.environ(),
                stdin=subprocess.DEVNULL,
                stdout=theirs if output else subprocess.DEVNULL,
                stderr=theirs,
            )
        finally:
            os.close(theirs)
        shown = b""
        try:
            while octets := os.read(ours, 65536):
                shown += octets
        except OSError as error:  # EIO: the other side has gone
            self.assertEqual(error.errno, errno.EIO)
        finally:
            os.close(ours)
            self.assertEqual(child.wait(GUARD), 4)
        return shown

    def test_progress_bar(self) -> None:
        """On a terminal, and for a big spool only."""
        self.put(ONE + ONE[:-1])
        self.assertIn(b"scanning", self.shown(0, False))
        self.assertEqual(self.shown(1 << 30, False), b"")

    def test_colours(self) -> None:
        self.put(ONE[:-1])
        shown = self.shown(1 << 30, True)
        self.assertIn(b"\x1b[33m", shown)
        self.assertIn(b"no empty line behind the last message", shown)
