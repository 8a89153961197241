"""A model of one spool, its sessions and everybody else who writes to it, against `MboxStore`.

`POPDROP_MODEL_EXAMPLES=20000` in the environment tries that many stories instead of a few.

What others do, they do under both locks, and it shows in the file's times: where it would not, it
is done again a moment later. So the store's clock may be set forward, which makes it believe
photographs that it would take for too young.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import Busy, PopdropError, TemporaryFailure
from popdrop.stores.mbox import drop as drop_module
from popdrop.stores.mbox import index as index_module
from popdrop.stores.mbox.drop import MboxDrop
from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.locks import SpoolLocks
from popdrop.stores.mbox.store import MboxStore
from popdrop.values import Owner
from popdrop.wire import Outgoing
from tests import oracle_mbox

EXAMPLES = int(os.environ.get("POPDROP_MODEL_EXAMPLES", "150"))
STEPS = 25
BOB = Owner("bob")
LATER = 10 * 10**9
"""Nanoseconds after which every file system shows a write."""


class Killed(BaseException):
    """The process is gone."""


class Deadly(Files):
    """Is killed before its call of this 1-based number that changes something."""

    def __init__(self, last: int) -> None:
        self.left = last
        for name in ("pwrite", "fsync", "ftruncate", "rename", "unlink"):
            setattr(self, name, self._counting(getattr(Files, name)))

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.left -= 1
            if self.left <= 0:
                raise Killed
            return real(*args)

        return call


BODIES = st.lists(
    st.sampled_from(
        [b"text", b"", b".", b"..x", b">From me", b">>From me", b"From me", b"\xff\0", b"a\rb"]
    ),
    max_size=4,
)


def piece(number: int, body: list[bytes], end: bytes, status: bytes) -> bytes:
    """One message with its separator. A number is used for one body only."""
    lines = [
        b"From a@example.org Sun Nov 22 10:%02d:%02d 2026" % (number // 60, number % 60),
        b"Subject: %d" % number,
        *([b"Status: " + status] if status else []),
        b"",
        *body,
        b"",
    ]
    return b"".join(line + end for line in lines)


MESSAGES = st.tuples(
    BODIES, st.sampled_from([b"\n", b"\n", b"\r\n"]), st.sampled_from([b"", b"O", b"RO"])
)


def cut(octets: bytes) -> list[bytes]:
    """A spool's messages with what is behind each, by the oracle."""
    edges = [*(message.start for message in oracle_mbox.read(octets)), len(octets)]
    return [octets[a:b] for a, b in pairwise(edges)]


def digests(octets: bytes) -> list[bytes]:
    return [message.digest for message in oracle_mbox.read(octets)]


def restated(octets: bytes, status: bytes) -> bytes:
    """A message with another Status field, as a mail reader writes it."""
    end = b"\r\n" if b"\r\n" in octets.partition(b"\n")[0] + b"\n" else b"\n"
    head, _, rest = octets.partition(end + end)
    lines = [line for line in head.split(end) if not line.startswith(b"Status: ")]
    lines += [b"Status: " + status] if status else []
    return end.join(lines) + end + end + rest


class Story(RuleBasedStateMachine):
    """`octets` is what the file must hold; after a crash, `either` of some."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="popdrop-test-"))
        self.spool = self.folder / "bob"
        self.state = self.folder / "state"
        self.state.mkdir(mode=0o700)
        self.number = 0
        self.drop: MboxDrop | None = None
        self.skew = 0
        self.real_clock = drop_module.clock_ns
        drop_module.clock_ns = lambda: time.time_ns() + self.skew
        self.crashed: list[bytes] = []
        self.ids: dict[bytes, bytes] = {}
        self.octets = b""
        self.start_store()

    def teardown(self) -> None:
        drop_module.clock_ns = self.real_clock
        if self.drop:
            self.drop.release()
        shutil.rmtree(self.folder)

    # The store's side

    def start_store(self) -> None:
        self.store = self.make_store()

    def make_store(self) -> MboxStore:
        store = MboxStore(f"{self.folder}/{{user}}", str(self.state))
        store.journals.key()
        return store

    @initialize(messages=st.lists(MESSAGES, max_size=6), twin=st.booleans(), open_end=st.booleans())
    def begin(self, messages: list[Any], twin: bool, open_end: bool) -> None:
        pieces = [piece(self.next(), *each) for each in messages]
        if twin and pieces:
            pieces.insert(0, pieces[-1])
        octets = b"".join(pieces)
        if open_end and len(octets) > 80:
            octets = octets.rstrip(b"\r\n")
        self.spool.write_bytes(octets)
        self.spool.chmod(0o600)
        self.octets = octets

    def next(self) -> int:
        self.number += 1
        return self.number

    @rule(ahead=st.booleans())
    def set_clock(self, ahead: bool) -> None:
        self.skew = LATER if ahead else 0

    @rule()
    def restart(self) -> None:
        if self.drop:
            self.drop.release()
            self.drop = None
        self.start_store()

    @precondition(lambda self: self.drop is None)
    @rule(busy=st.sampled_from(["", "", "", "fcntl", "dot"]))
    def login(self, busy: str) -> None:
        if busy and self.spool.exists():
            # What a session remembers needs no lock, and a recovery is another story.
            if self.crashed:
                return
            with self.locked(busy):
                try:
                    self.store.open(BOB).release()
                except Busy as refusal:
                    assert refusal.lock == "spool"
            self.check_file()
            return
        self.drop = self.store.open(BOB)
        self.settle_crash()
        self.seen = oracle_mbox.read(self.octets)
        self.appended_only = True
        self.restated_only = True
        # Who delivers behind a line without its end ends it first: that is seen as a rewriting,
        # and among equal copies nothing is sure then.
        self.unended = bool(self.octets) and not self.octets.endswith(b"\n")
        self.check_listing()
        self.check_file()

    def check_listing(self) -> None:
        assert self.drop
        listing = self.drop.listing
        assert len(listing) == len(self.seen)
        for index, message in enumerate(self.seen):
            assert listing.size(index) == len(message.sent)

    def check_file(self) -> None:
        assert self.spool.read_bytes() == self.octets
        others = set(os.listdir(self.folder)) - {"bob", "state"}
        assert all(".orphan-" in name for name in others), others

    @precondition(lambda self: self.drop is not None)
    @rule()
    def logout(self) -> None:
        assert self.drop
        self.drop.release()
        self.drop = None
        self.check_file()

    @precondition(lambda self: self.drop is not None)
    @rule()
    def uidl(self) -> None:
        assert self.drop
        try:
            self.drop.identify()
        except TemporaryFailure:
            assert not self.appended_only
            return
        self.check_ids([self.drop.listing.uid(index) for index in range(len(self.seen))])
        for message in self.seen:
            assert self.ids.setdefault(message.immutable, message.uid) == message.uid
        assert len(set(self.ids.values())) == len(self.ids)

    def check_ids(self, ids: list[bytes]) -> None:
        seen: Counter[bytes] = Counter()
        for message, uid in zip(self.seen, ids, strict=True):
            seen[message.uid] += 1
            copy = seen[message.uid]
            assert uid == (message.uid if copy == 1 else b"%s-%d" % (message.uid, copy))

    @precondition(lambda self: self.drop is not None and len(self.drop.listing) > 0)
    @rule(data=st.data())
    def retr(self, data: st.DataObject) -> None:
        assert self.drop
        index = data.draw(st.integers(0, len(self.drop.listing) - 1))
        try:
            octets = self.read(index)
        except TemporaryFailure:
            assert not self.appended_only
            return
        lines = octets.split(b"\r\n")
        assert lines[-2:] == [b".", b""]
        plain = [line[1:] if line.startswith(b".") else line for line in lines[:-2]]
        assert b"".join(line + b"\r\n" for line in plain) == self.seen[index].sent

    def read(self, index: int) -> bytes:
        """As `InThreads` does it: look at the file behind each read."""
        assert self.drop
        source = self.drop.source(index)
        outgoing = Outgoing(source.strip, source.unquote, None)
        block = b""
        for _ in range(3):
            block = os.pread(source.fd, source.length, source.offset)
            if len(block) == source.length and source.unchanged():
                break
            source.verify()
        else:
            raise TemporaryFailure("changes all the time")
        return outgoing.feed(block) + outgoing.end()

    def without(self, rows: list[int]) -> bytes | None:
        """The file without the k-th copies of the k-th ones, `None` if one is not there."""
        wanted = []
        known = [message.digest for message in self.seen]
        for row in rows:
            copy = known[:row].count(known[row])
            places = [n for n, each in enumerate(digests(self.octets)) if each == known[row]]
            if copy >= len(places):
                return None
            wanted.append(places[copy])
        pieces = cut(self.octets)
        start = self.octets[: len(self.octets) - sum(map(len, pieces))]
        left = b"".join(each for n, each in enumerate(pieces) if n not in wanted)
        return start + left if left else b""

    def rows(self, data: st.DataObject) -> list[int]:
        assert self.drop
        count = len(self.drop.listing)
        chosen = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count))
        return sorted(chosen)

    @precondition(lambda self: self.drop is not None and len(self.drop.listing) > 0)
    @rule(data=st.data(), busy=st.sampled_from(["", "", "", "fcntl", "dot"]))
    def quit(self, data: st.DataObject, busy: str) -> None:
        assert self.drop
        rows = self.rows(data)
        expected = self.without(rows)
        if busy and self.spool.exists():
            # Some of its calls may do without this lock, but not this one.
            with self.locked(busy):
                self.assert_refused(rows)
            self.check_file()
        try:
            self.drop.commit(rows)
        except TemporaryFailure:
            if self.restated_only:
                assert not (self.appended_only and not self.unended)
                assert not self.unique(rows)
        else:
            assert expected is not None, "deleted what was not there"
            self.octets = expected
        self.drop.release()
        self.drop = None
        self.check_file()

    @contextmanager
    def locked(self, kind: str) -> Iterator[None]:
        """Another program holds this lock."""
        with (
            self.spool.open("r+b") as other,
            SpoolLocks(other.fileno(), str(self.spool), (kind,), True),
        ):
            yield

    def assert_refused(self, rows: list[int]) -> None:
        assert self.drop
        try:
            self.drop.commit(rows)
        except (Busy, TemporaryFailure):
            return
        raise AssertionError("did not wait for the lock")

    def unique(self, rows: list[int]) -> bool:
        """Whether no other message looked, or looks now, like one of these."""
        now = [message.check for message in oracle_mbox.read(self.octets)]
        for seen in (now, [message.check for message in self.seen]):
            if any(seen.count(self.seen[row].check) > 1 for row in rows):
                return False
        return True

    @precondition(lambda self: self.drop is not None and len(self.drop.listing) > 0)
    @rule(data=st.data(), last=st.integers(1, 12))
    def crash(self, data: st.DataObject, last: int) -> None:
        """kill -9 in the middle of a QUIT, and a new server."""
        assert self.drop
        rows = self.rows(data)
        expected = self.without(rows)
        self.store.journals = Journals(str(self.state), Deadly(last))
        self.store.journals._key = Journals(str(self.state)).key()
        try:
            self.drop.commit(rows)
        except Killed:
            assert expected is not None, "began to delete what was not there"
            self.crashed = [self.octets, expected]
        except PopdropError:
            assert self.unended or not self.appended_only
        else:
            assert expected is not None
            self.octets = expected
        self.drop.release()
        self.drop = None
        self.start_store()

    def settle_crash(self) -> None:
        """After the login that recovers: one of what may be."""
        if not self.crashed:
            return
        found = self.spool.read_bytes()
        assert found in self.crashed, "neither all nor nothing"
        self.octets = found
        self.crashed = []

    # Everybody else's

    def write(self, octets: bytes, how: str = "whole") -> None:
        before = self.spool.stat()
        if how == "append":
            with self.spool.open("ab") as spool:
                spool.write(octets)
        else:
            with self.spool.open("r+b") as spool:
                spool.write(octets)
                spool.truncate()
        self.show(before)

    def show(self, before: os.stat_result) -> None:
        """See to it that it shows in the times, as it does where time passes."""
        while True:
            found = self.spool.stat()
            if (found.st_ino, found.st_ctime_ns) != (before.st_ino, before.st_ctime_ns):
                return
            time.sleep(0.002)
            os.utime(self.spool)

    @rule(message=MESSAGES, copy=st.booleans(), data=st.data())
    def deliver(self, message: Any, copy: bool, data: st.DataObject) -> None:
        pieces = cut(self.octets)
        if copy and pieces:
            new = data.draw(st.sampled_from(pieces))
        else:
            new = piece(self.next(), *message)
        now = self.spool.read_bytes()
        gap = b""
        if now and not now.endswith((b"\n\n", b"\n\r\n")):
            gap = b"\n" if now.endswith(b"\n") else b"\n\n"
        self.write(gap + new, "append")
        if self.crashed:
            # The gap is to what is there now; a spool in the middle of an update ends as before.
            self.crashed = [_appended(each, gap, new) for each in self.crashed]
        else:
            self.octets += gap + new

    @precondition(lambda self: not self.crashed)
    @rule(data=st.data())
    def restate(self, data: st.DataObject) -> None:
        """A mail reader writes Status fields."""
        pieces = cut(self.octets)
        if not pieces:
            return
        words = st.sampled_from([b"", b"O", b"RO"])
        self.octets = b"".join(restated(each, data.draw(words)) for each in pieces)
        self.write(self.octets)
        self.appended_only = False

    @precondition(lambda self: not self.crashed)
    @rule(data=st.data())
    def expunge(self, data: st.DataObject) -> None:
        pieces = cut(self.octets)
        if pieces:
            pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
            self.octets = b"".join(pieces)
            self.write(self.octets)
            self.appended_only = self.restated_only = False

    @precondition(lambda self: not self.crashed)
    @rule(empty=st.booleans())
    def replace(self, empty: bool) -> None:
        """By rename, as GNU mailutils does, or emptied."""
        before = self.spool.stat()
        if empty:
            self.octets = b""
            self.write(b"")
        else:
            new = self.folder / "new"
            new.write_bytes(self.octets)
            new.chmod(0o600)
            new.rename(self.spool)
            self.show(before)
        self.appended_only = self.restated_only = False

    appended_only = True
    restated_only = True
    unended = False


def _appended(octets: bytes, gap: bytes, new: bytes) -> bytes:
    return octets + (gap if octets else b"") + new


class Indexed(Story):
    """The same where each spool has an index, which may be lost or damaged at any time.

    Two processes take turns with one state folder.
    """

    eager = 0

    def __init__(self) -> None:
        self.was = (drop_module.SMALLEST, drop_module.EAGER, index_module.TAIL)
        drop_module.SMALLEST, drop_module.EAGER = 0, self.eager  # type: ignore[misc]
        # As much less than a message as the real one is less than a long message.
        index_module.TAIL = 60  # type: ignore[misc]
        super().__init__()

    def teardown(self) -> None:
        drop_module.SMALLEST, drop_module.EAGER, index_module.TAIL = self.was  # type: ignore[misc]
        super().teardown()

    def start_store(self) -> None:
        super().start_store()
        self.other = self.make_store()

    @property
    def index(self) -> Path | None:
        return next((self.state / "index").glob("*"), None)

    @initialize(messages=st.lists(MESSAGES, max_size=6), nightly=st.integers(0, 4))
    def begin(self, messages: list[Any], nightly: int) -> None:  # type: ignore[override]
        """Perhaps reports that differ in their headers only."""
        self.set_clock(ahead=True)
        pieces = [piece(self.next(), *each) for each in messages]
        if nightly:
            report = ([b"-" * 100], b"\n", b"")
            pieces = [piece(self.next(), *report) for _ in range(nightly)]
        self.octets = b"".join(pieces)
        self.spool.write_bytes(self.octets)
        self.spool.chmod(0o600)

    @rule()
    def take_turns(self) -> None:
        self.store, self.other = self.other, self.store

    @rule(uidl=st.booleans())
    def visit(self, uidl: bool) -> None:
        """A short session with a new server, which leaves an index."""
        self.restart()
        self.come()
        if uidl:
            self.uidl()
        self.logout()

    @rule()
    def come(self) -> None:
        self.restart()
        self.login(busy="")

    @rule(length=st.floats(0, 1), place=st.floats(0, 0.999), bit=st.integers(0, 7))
    def harm(self, length: float, place: float, bit: int) -> None:
        """Lost, cut off, or with one wrong bit."""
        self.index_lost = True
        if self.index is None:
            return
        octets = bytearray(self.index.read_bytes())
        if not length or not octets:
            self.index.unlink()
            return
        octets[int(place * len(octets))] ^= 1 << bit
        self.index.write_bytes(octets[: int(length * len(octets))])

    index_lost = False

    @precondition(lambda self: not self.crashed)
    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        """A message goes and another of its length comes: the file's size tells nothing."""
        pieces = cut(self.octets)
        if not pieces or not self.octets.endswith((b"\n\n", b"\n\r\n")):
            return
        old = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
        other = piece(self.next(), [], b"\n", b"").split(b"\n")
        new = re.sub(rb"10:\d\d:\d\d", other[0].split()[5], old, count=1)
        new = re.sub(rb"Subject: \d+", other[1], new, count=1)
        self.octets = b"".join([*pieces, new])
        self.write(self.octets)
        self.appended_only = self.restated_only = False

    def check_listing(self) -> None:
        """Sizes later: the index may be lost by then."""
        assert self.drop
        self.index_lost = False
        assert len(self.drop.listing) == len(self.seen)
        assert self.drop.listing.octets == sum(len(message.sent) for message in self.seen)

    @precondition(lambda self: self.drop is not None)
    @rule()
    def list_all(self) -> None:
        if self.measure():
            super().check_listing()

    def measure(self) -> bool:
        """Whether the sizes are known."""
        assert self.drop
        try:
            self.drop.measure()
        except TemporaryFailure:
            assert self.index_lost and not self.appended_only
            return False
        return True

    def read(self, index: int) -> bytes:
        if not self.measure():
            raise TemporaryFailure("not measured")
        return super().read(index)

    def check_ids(self, ids: list[bytes]) -> None:
        """Copies keep the numbers that they got."""
        for message, uid in zip(self.seen, ids, strict=True):
            assert re.fullmatch(re.escape(message.uid) + rb"(-[1-9][0-9]*)?", uid)
        assert len(set(ids)) == len(ids)


class Eager(Indexed):
    """The same where all of an index is read at login."""

    eager = 1000


class ModelTests(SynchronousTestCase):
    def test_stories(self) -> None:
        self.tell(Story)

    def test_stories_of_an_index(self) -> None:
        self.tell(Indexed)

    def test_stories_of_an_index_read_at_once(self) -> None:
        self.tell(Eager)

    def tell(self, story: type[Story]) -> None:
        run_state_machine_as_test(
            story,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                derandomize=EXAMPLES <= 1000,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
