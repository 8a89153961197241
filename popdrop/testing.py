"""For tests of stores, ours and other people's: `MemoryStore` and `StoreContract`.

A store is right when a test case with `StoreContract` as mixin passes; there is no base class to
inherit from. Over 400 lines since double and suite are one promise.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from zope.interface import implementer
from zope.interface.verify import verifyObject

from popdrop.errors import Busy, NoSuchOwner
from popdrop.interfaces import IBlockingMaildrop, IBlockingStore
from popdrop.listing import Listing
from popdrop.stores.uidl import unique_ids
from popdrop.values import Owner, Source
from popdrop.wire import Outgoing

if TYPE_CHECKING:
    from unittest import TestCase as _Base
else:
    _Base = object

OPERATIONS: Final = ("open", "identify", "commit", "verify")
"""What `MemoryStore.fail` can make fail."""


def as_sent(source: Source) -> bytes:
    """The octets of a message as a client has them after un-stuffing, without the final dot."""
    stored = os.pread(source.fd, source.length, source.offset)
    wire = Outgoing(source.strip, source.unquote, None, source.spaced).whole(stored)
    lines = wire.split(b"\r\n")[:-2]
    return b"".join(line[line.startswith(b".") :] + b"\r\n" for line in lines)


@implementer(IBlockingStore)
class MemoryStore:
    """An `IBlockingStore` over a dict of user name to stored messages, which tests may look at.

    A user that is not in `mail` has no place: `NoSuchOwner`.
    """

    def __init__(self, mail: Mapping[str, Iterable[bytes]] | None = None) -> None:
        self.mail = {user: list(messages) for user, messages in (mail or {}).items()}
        self._held: dict[str, MemoryDrop] = {}
        self._guard = threading.Lock()
        self._failures: dict[str, deque[Exception]] = defaultdict(deque)

    def fail(self, operation: str, *errors: Exception) -> None:
        """Let the next calls of `operation`, one of `OPERATIONS`, raise these, one each.

        `Busy` may be one of them. A call that fails changes nothing.
        """
        if operation not in OPERATIONS:
            raise ValueError(f"no such operation: {operation}")
        self._failures[operation].extend(errors)

    def deliver(self, user: str, message: bytes) -> None:
        """Add a message; a session in progress does not see it."""
        with self._guard:
            self.mail[user].append(message)
        self.disturb(user)

    def disturb(self, user: str) -> None:
        """As if something was written: sources are not `unchanged` until they are verified."""
        with self._guard:
            drop = self._held.get(user)
            if drop:
                drop.verified.clear()

    def tidy(self) -> None:
        """As `IBlockingStore.tidy`: nothing is left in memory."""

    def open(self, owner: Owner) -> MemoryDrop:
        """As `IBlockingStore.open`."""
        self.may_fail("open")
        with self._guard:
            if owner.user not in self.mail:
                raise NoSuchOwner("There is no maildrop for this user.")
            if owner.user in self._held:
                raise Busy("session")
            drop = MemoryDrop(self, owner.user, list(self.mail[owner.user]))
            self._held[owner.user] = drop
        return drop

    def may_fail(self, operation: str) -> None:
        """Raise the next of the errors given to `fail`, if there is one."""
        if self._failures[operation]:
            raise self._failures[operation].popleft()

    def remove(self, user: str, deleted: Collection[int]) -> None:
        """Of a drop's commit. Mail that came since is behind, and keeps its place."""
        with self._guard:
            self.mail[user] = [m for i, m in enumerate(self.mail[user]) if i not in deleted]

    def let_go(self, drop: MemoryDrop) -> None:
        """Of a drop's release."""
        with self._guard:
            if self._held.get(drop.user) is drop:
                del self._held[drop.user]


@implementer(IBlockingMaildrop)
class MemoryDrop:
    """Made by `MemoryStore.open`. Its octets are in a file without a name."""

    quick_release = False
    wants_seen = False

    def __init__(self, store: MemoryStore, user: str, messages: list[bytes]) -> None:
        self.user = user
        self.verified = set(range(len(messages)))
        self._store = store
        self._messages = messages
        self._fd = os.memfd_create("maildrop")
        with open(self._fd, "wb", closefd=False) as octets:
            octets.writelines(messages)
        self._sizes = [len(Outgoing().whole(m)) - 3 - _stuffed(m) for m in messages]
        self.listing = Listing(self._sizes)

    def measure(self) -> None:
        """As `IBlockingMaildrop.measure`: the sizes are there."""

    def identify(self) -> None:
        """As `IBlockingMaildrop.identify`."""
        self._store.may_fail("identify")
        if not self.listing.identified:
            digests = [sha256(message).digest()[:16] for message in self._messages]
            self.listing = self.listing.with_ids(unique_ids(digests))

    def source(self, index: int) -> Source:
        """As `IBlockingMaildrop.source`."""

        def verify() -> None:
            self._store.may_fail("verify")
            self.verified.add(index)

        return Source(
            fd=self._fd,
            offset=sum(len(message) for message in self._messages[:index]),
            length=len(self._messages[index]),
            octets=self._sizes[index],
            unchanged=lambda: index in self.verified,
            verify=verify,
        )

    def reach(self, index: int, count: int, octets: int) -> int:
        """As `IBlockingMaildrop.reach`."""
        following = range(index + 1, min(index + count + 1, len(self._messages)))
        reached = len(self._messages[index])
        for row in following:
            if reached >= octets or (row in self.verified) != (index in self.verified):
                break
            reached += len(self._messages[row])
        return reached

    def commit(self, deleted: Collection[int], seen: Collection[int] = ()) -> None:
        """As `IBlockingMaildrop.commit`."""
        if deleted:
            if not all(0 <= index < len(self._messages) for index in deleted):
                raise IndexError("no such message in this maildrop")
            self._store.may_fail("commit")
            self._store.remove(self.user, deleted)

    def release(self) -> None:
        """As `IBlockingMaildrop.release`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self._store.let_go(self)


def _stuffed(message: bytes) -> int:
    return message.startswith(b".") + message.count(b"\n.")


class StoreContract(_Base):
    """What every `IBlockingStore` must show. A mixin for a test case.

    `make_store` is called once a test, and must give a store in which `owner` and `other` have
    maildrops without messages.
    """

    owner: Owner = Owner("bob")
    other: Owner = Owner("eve")
    store: IBlockingStore

    MESSAGES: Final = (
        b"Subject: one\n\nbody\n",
        b".Subject: two\n\n.\n..\n.dots\n\n",
        b"Subject: three\n\n8 bit \xe4\xff and a NUL \x00 and a bare \r CR\n",
        b"Subject: four\r\n\r\nCRLF\r\n",
        b"Subject: five\n\n" + b"long " * 100_000 + b"\n",
        b"Subject: six\n\nlast\n",
    )

    def make_store(self) -> IBlockingStore:
        """A new store."""
        raise NotImplementedError

    def deliver(self, message: bytes) -> None:
        """Add a message for `owner`, as a deliverer does it: at any time, also in a session."""
        raise NotImplementedError

    def setUp(self) -> None:
        """Make the store."""
        self.store = self.make_store()

    def opened(self, owner: Owner | None = None) -> IBlockingMaildrop:
        """A session, released at the end of the test."""
        drop = self.store.open(owner or self.owner)
        self.addCleanup(drop.release)
        return drop

    def contents(self) -> list[bytes]:
        """All messages as sent, in a session of its own."""
        drop = self.store.open(self.owner)
        try:
            return [as_sent(drop.source(index)) for index in range(len(drop.listing))]
        finally:
            drop.release()

    def ids(self) -> list[bytes]:
        """All ids, in a session of its own."""
        drop = self.store.open(self.owner)
        try:
            drop.identify()
            return [drop.listing.uid(index) for index in range(len(drop.listing))]
        finally:
            drop.release()

    def fill(self) -> list[bytes]:
        """Deliver `MESSAGES`; what they are as sent."""
        for message in self.MESSAGES:
            self.deliver(message)
        return [m.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") for m in self.MESSAGES]

    def test_interfaces(self) -> None:
        """Store and maildrop provide what they must."""
        self.assertTrue(verifyObject(IBlockingStore, self.store))
        self.assertTrue(verifyObject(IBlockingMaildrop, self.opened()))

    def test_empty(self) -> None:
        """No messages, and nothing to go wrong."""
        drop = self.opened()
        self.assertEqual((len(drop.listing), drop.listing.octets), (0, 0))
        drop.identify()
        self.assertTrue(drop.listing.identified)
        drop.commit([])

    def test_messages_in_order_of_delivery(self) -> None:
        """What was delivered is what is sent, octet for octet but for line ends."""
        sent = self.fill()
        self.assertEqual(self.contents(), sent)

    def test_sizes_are_octets_as_sent(self) -> None:
        """Of listing and source alike (RFC 1939 section 11)."""
        sent = self.fill()
        drop = self.opened()
        sizes = [drop.listing.size(index) for index in range(len(drop.listing))]
        self.assertEqual(sizes, [len(octets) for octets in sent])
        self.assertEqual([drop.source(i).octets for i in range(len(sent))], sizes)
        self.assertEqual(drop.listing.octets, sum(sizes))

    def test_reach(self) -> None:
        """From the message on, whole ones, of as many as are asked for, and not of many more."""
        self.fill()
        drop = self.opened()
        sources = [drop.source(index) for index in range(len(drop.listing))]
        for index, source in enumerate(sources):
            for count in range(len(sources) + 1):
                reached = [drop.reach(index, count, octets) for octets in (1, 40, 1 << 40)]
                self.assertEqual(reached, sorted(reached))
                self.assertTrue(reached[2] == 0 or reached[0] >= source.length)
                behind = sources[index + count + 1 :]
                if reached[2] and behind:
                    self.assertLessEqual(source.offset + reached[2], behind[0].offset)

    def test_exclusive(self) -> None:
        """A second session is refused until the first is released; other owners are not."""
        drop = self.opened()
        for _ in range(2):
            with self.assertRaises(Busy) as raised:
                self.store.open(self.owner)
            self.assertEqual(raised.exception.lock, "session")
        self.opened(self.other)
        drop.release()
        self.opened()

    def test_exclusive_over_threads(self) -> None:
        """Of many that open at once, one gets it."""
        drops: list[IBlockingMaildrop] = []
        refused: list[Busy] = []
        gate = threading.Barrier(8)

        def open_it() -> None:
            gate.wait()
            try:
                drops.append(self.store.open(self.owner))
            except Busy as busy:
                refused.append(busy)

        threads = [threading.Thread(target=open_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for drop in drops:
            drop.release()
        self.assertEqual((len(drops), len(refused)), (1, 7))

    def test_release_is_idempotent(self) -> None:
        """And a second release does not end somebody else's session."""
        first = self.opened()
        first.release()
        self.opened()
        first.release()
        self.assertRaises(Busy, self.store.open, self.owner)

    def test_nothing_is_deleted_without_commit(self) -> None:
        """A session that just ends changes nothing."""
        sent = self.fill()
        self.opened().release()
        drop = self.opened()
        drop.commit([])
        drop.release()
        self.assertEqual(self.contents(), sent)

    def test_commit_removes_exactly_these(self) -> None:
        """The rest is as it was, ids too."""
        for deleted in ({0}, {5}, {1, 3}, {0, 1, 2}, {3, 4, 5}, {0, 5}, {0, 1, 2, 3, 4, 5}):
            self.store = self.make_store()
            sent = self.fill()
            ids = self.ids()
            drop = self.opened()
            drop.commit(deleted)
            drop.release()
            left = [index for index in range(len(sent)) if index not in deleted]
            self.assertEqual(self.contents(), [sent[index] for index in left])
            self.assertEqual(self.ids(), [ids[index] for index in left])

    def test_commit_twice(self) -> None:
        """One session after another."""
        sent = self.fill()
        for _ in range(2):
            drop = self.opened()
            drop.commit([1])
            drop.release()
        self.assertEqual(self.contents(), [sent[0], *sent[3:]])

    def test_ids_are_asked_for(self) -> None:
        """They are there once `identify` is through, and sizes do not change by it."""
        self.fill()
        drop = self.opened()
        before = list(drop.listing.size_rows(()))
        drop.identify()
        self.assertTrue(drop.listing.identified)
        self.assertEqual(list(drop.listing.size_rows(())), before)
        drop.identify()

    def test_ids_are_stable_and_unique(self) -> None:
        """Over sessions, and when mail comes (RFC 1939 section 7)."""
        self.fill()
        ids = self.ids()
        self.assertEqual(len(set(ids)), len(self.MESSAGES))
        for uid in ids:
            self.assertTrue(1 <= len(uid) <= 70 and all(0x21 <= c <= 0x7E for c in uid), uid)
        self.deliver(b"Subject: new\n\nnew\n")
        self.assertEqual(self.ids()[:-1], ids)

    def test_ids_of_equal_messages_differ(self) -> None:
        for _ in range(3):
            self.deliver(self.MESSAGES[0])
        self.assertEqual(len(set(self.ids())), 3)

    def test_late_mail_stays_out_of_the_session(self) -> None:
        """Mail that comes during a session is not in it, and is there in the next one."""
        sent = self.fill()
        drop = self.opened()
        self.deliver(b"Subject: late\n\nlate\n")
        self.assertEqual(len(drop.listing), len(sent))
        drop.identify()
        self.assertEqual(len(drop.listing), len(sent))
        drop.release()
        self.assertEqual(self.contents()[-1], b"Subject: late\r\n\r\nlate\r\n")

    def test_late_mail_survives_commit(self) -> None:
        """Whatever is deleted, and whether ids are known or not."""
        late = b"Subject: late\r\n\r\nlate\r\n"
        for identified in (False, True):
            for deleted in ({0}, {5}, {0, 1, 2, 3, 4, 5}):
                self.store = self.make_store()
                sent = self.fill()
                drop = self.opened()
                if identified:
                    drop.identify()
                self.deliver(b"Subject: late\n\nlate\n")
                drop.commit(deleted)
                drop.release()
                left = [m for index, m in enumerate(sent) if index not in deleted]
                self.assertEqual(self.contents(), [*left, late])

    def test_sources_hold_when_mail_comes(self) -> None:
        """A source that is in doubt can be verified, and then is not in doubt."""
        sent = self.fill()
        drop = self.opened()
        source = drop.source(1)
        if not source.unchanged():  # what was written just now may be in doubt from the start
            source.verify()
        self.assertTrue(source.unchanged())
        self.deliver(b"Subject: late\n\nlate\n")
        source.verify()
        self.assertTrue(source.unchanged())
        self.assertEqual(as_sent(source), sent[1])
        self.deliver(b"Subject: later\n\nlater\n")
        if source.read is not None:
            stored = os.pread(source.fd, source.length, source.offset)
            self.assertEqual(source.read(source.offset, source.length), stored)

    def test_no_such_message(self) -> None:
        """To delete what is not there is a mistake of the caller, and changes nothing."""
        sent = self.fill()
        drop = self.opened()
        self.assertRaises(IndexError, drop.commit, [0, len(sent)])
        drop.release()
        self.assertEqual(self.contents(), sent)
