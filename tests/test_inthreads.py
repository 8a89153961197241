"""`popdrop.inthreads`: a blocking store behind threads; waits on the reactor's clock."""

from __future__ import annotations

import os
import threading
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import TestCase

from popdrop import inthreads
from popdrop.errors import Busy, InUse, PermanentFailure, PopdropError, TemporaryFailure
from popdrop.inthreads import COLD_BLOCK, HOT_LIMIT, InThreads
from popdrop.stores.mbox.locks import SpoolLocks
from popdrop.stores.mbox.store import MboxStore
from popdrop.testing import MemoryStore
from popdrop.threads import Pool
from popdrop.values import Owner, Source

BOB = Owner("bob")


class Slow(MemoryStore):
    """A store whose `open` waits for the test."""

    def __init__(self, maildrops: Any) -> None:
        super().__init__(maildrops)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def open(self, owner: Owner) -> Any:
        drop = super().open(owner)
        self.begun.set()
        self.go_on.wait(60)
        return drop


class InThreadsTests(TestCase):
    def setUp(self) -> None:
        self.pool = Pool(reactor, "test", 4)  # type: ignore[arg-type]
        self.pool.start()
        self.addCleanup(self.pool.stop)

    def store(self, blocking: Any, lock_timeout: float = 60.0) -> InThreads:
        return InThreads(blocking, self.pool, reactor, lock_timeout)  # type: ignore[arg-type]

    async def octets(self, drop: Any, index: int, lines: int | None = None) -> bytes:
        blocks = await drop.fetch(index, lines)
        out = []
        while block := await blocks.read():
            self.assertIs(type(block), bytes)  # transports take nothing else
            out.append(block)
        blocks.close()
        return b"".join(out)

    async def test_ready_and_fetch_agree(self) -> None:
        """Small, large, dotted; whole and TOP; from memory and by blocks."""
        large = b"A: 1\n\n" + b"".join(b".%06d\n" % i for i in range(60_000))
        drop = await self.store(MemoryStore({"bob": [b"B: 2\n\n.x\n", large]})).open(BOB)
        small = b"B: 2\r\n\r\n..x\r\n.\r\n"
        self.assertEqual(await self.octets(drop, 0), small)
        self.assertIn(drop.ready(0, None), (small, None))
        self.assertIsNone(drop.ready(1, None))
        self.assertGreater(len(large), HOT_LIMIT)
        whole = await self.octets(drop, 1)
        self.assertEqual(whole.count(b"\r\n.."), 60_000)
        self.assertEqual(len(whole) - 60_000 - 3, drop.listing.size(1))
        top = b"A: 1\r\n\r\n..000000\r\n.\r\n"
        self.assertEqual(await self.octets(drop, 1, 1), top)
        self.assertIn(drop.ready(1, 1), (top, None))
        await drop.release()

    def reads(self) -> list[int]:
        """Octets of each read in the reactor from now on."""
        counts: list[int] = []
        read = os.preadv

        def counted(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
            # Not every file system knows RWF_NOWAIT: that of memfd_create(2) does not.
            counts.append(read(fd, buffers, offset))
            return counts[-1]

        self.patch(os, "preadv", counted)
        return counts

    async def test_what_waiting_commands_ask_for_is_read_along(self) -> None:
        messages = [b"A: %d\n\n%s" % (i, b"%07d\n" % i * (500 * i)) for i in range(12)]
        sent = [message.replace(b"\n", b"\r\n") + b".\r\n" for message in messages]
        drop: Any = await self.store(MemoryStore({"bob": messages})).open(BOB)
        counts = self.reads()
        for index, octets in enumerate(sent):
            self.assertEqual(drop.ready(index, None, 11 - index), octets)
        # 128 KiB hold the first eight.
        self.assertEqual(len(counts), 3)
        self.assertEqual(drop.ready(3, None, 5), sent[3])  # not the next one: alone
        self.assertEqual(counts[3:], [len(messages[3])])
        self.assertEqual(drop.ready(4, 0, 1), b"A: 4\r\n\r\n.\r\n")
        self.assertEqual(drop.ready(5, None, 0), sent[5])
        self.assertEqual(counts[4:], [len(messages[4] + messages[5])])
        await drop.release()

    async def test_what_is_read_along_is_forgotten_when_the_file_may_have_changed(self) -> None:
        messages = [b"A: %d\n\nx\n" % i for i in range(9)]
        store = MemoryStore({"bob": messages, "eve": messages[::-1]})
        drop: Any = await self.store(store).open(BOB)
        other: Any = await self.store(store).open(Owner("eve"))
        counts = self.reads()
        drop.ready(0, None, 8)
        drop.ready(1, None, 7)
        self.assertEqual(len(counts), 1)
        # Something was done in a thread, which may have found a new state of the file.
        await drop.identify()
        drop.ready(2, None, 6)
        self.assertEqual(len(counts), 2)
        # Another maildrop was read.
        self.assertEqual(other.ready(0, None, 8), b"A: 8\r\n\r\nx\r\n.\r\n")
        self.assertEqual(drop.ready(3, None, 5), b"A: 3\r\n\r\nx\r\n.\r\n")
        self.assertEqual(other.ready(1, None, 7), b"A: 7\r\n\r\nx\r\n.\r\n")
        self.assertEqual(len(counts), 5)
        # A change is seen behind the read: none of what was read goes out.
        read = drop.hot

        def changed(*arguments: int) -> bytes | None:
            block: bytes | None = read(*arguments)
            drop._drop.verified.clear()
            return block

        drop.hot = changed
        self.assertIsNone(drop.ready(4, None, 4))
        drop.hot = read
        self.assertIsNone(drop.ready(4, None, 4))
        drop._drop.verified |= {4, 5}
        drop.ready(4, None, 4)
        self.assertEqual(len(counts), 8)
        # What one look does not speak for is not taken along.
        self.assertEqual(drop.ready(5, None, 3), b"A: 5\r\n\r\nx\r\n.\r\n")
        self.assertEqual(len(counts), 8)
        self.assertIsNone(drop.ready(6, None, 2))
        await other.release()
        await drop.release()
        self.assertIsNone(inthreads._window.get(other, 0, 1))

    async def test_a_busy_lock_is_waited_for(self) -> None:
        store = MemoryStore({"bob": [b"x\n"]})
        store.fail("open", Busy("spool"), Busy("spool"))
        drop = await self.store(store).open(BOB)
        store.fail("commit", Busy("spool"))
        await drop.commit({0})
        await drop.release()
        self.assertEqual(len((await self.store(store).open(BOB)).listing), 0)

    async def test_not_for_ever(self) -> None:
        store = MemoryStore({"bob": [b"x\n"]})
        held = store.open(BOB)
        with self.assertRaises(InUse):
            await self.store(store, lock_timeout=0).open(BOB)
        held.release()
        drop = await self.store(store, lock_timeout=0).open(BOB)
        store.fail("commit", Busy("spool"))
        with self.assertRaises(TemporaryFailure):
            await drop.commit({0})
        await drop.release()

    async def test_what_was_retrieved(self) -> None:
        """Told only to a maildrop that wants it; where that alone fails nobody is troubled."""
        store = MemoryStore({"bob": [b"x\n", b"y\n"]})
        drop: Any = await self.store(store, lock_timeout=0).open(BOB)
        told: list[tuple[Any, ...]] = []
        wrong: list[Exception] = []

        def commit(*arguments: Any) -> None:
            told.append(arguments)
            if wrong:
                raise wrong[0]

        drop._drop.commit = commit
        await drop.commit(frozenset(), {0})
        await drop.commit({1}, {0})
        self.assertEqual(told, [({1},)])
        drop._drop.wants_seen = True
        await drop.commit(frozenset(), frozenset())
        await drop.commit(frozenset(), {0})
        await drop.commit({1}, {0})
        self.assertEqual(told[1:], [(frozenset(), {0}), ({1}, {0})])
        for error in (Busy("spool"), TemporaryFailure("no space"), PermanentFailure("read-only")):
            wrong[:] = [error]
            await drop.commit(frozenset(), {0})
            with self.assertRaises(PopdropError):
                await drop.commit({1}, {0})
        await drop.release()

    async def test_cancelled_open_lets_go(self) -> None:
        """The client is gone while a thread opens: what it opened is released."""
        store = Slow({"bob": [b"x\n"]})
        opening = Deferred.fromCoroutine(self.store(store).open(BOB))
        await self.pool.run(store.begun.wait, 60)
        opening.cancel()
        with self.assertRaises(CancelledError):
            await opening
        store.go_on.set()
        drop = await self.store(store).open(BOB)
        await drop.release()

    async def test_release_waits_for_the_call_in_progress(self) -> None:
        """A commit once begun runs to its end; only then the maildrop is free."""
        store = MemoryStore({"bob": [b"x\n", b"y\n"]})
        drop: Any = await self.store(store).open(BOB)
        begun, go_on = threading.Event(), threading.Event()
        commit, order = drop._drop.commit, []

        def slowly(deleted: Any) -> None:
            begun.set()
            go_on.wait(60)
            commit(deleted)
            order.append("commit")

        release = drop._drop.release

        def noted() -> None:
            order.append("release")
            release()

        drop._drop.commit, drop._drop.release = slowly, noted
        waiting = drop.commit({0})
        await self.pool.run(begun.wait, 60)
        waiting.addErrback(lambda failure: failure.trap(CancelledError))
        waiting.cancel()
        released = drop.release()
        self.assertFalse(released.called)
        go_on.set()
        await released
        self.assertEqual(order, ["commit", "release"])
        await drop.release()

    async def test_a_file_that_changes_is_verified_and_read_again(self) -> None:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(b"good\n")
        fd = os.open(path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        state = {"unchanged": False, "verified": 0}

        def verify() -> None:
            state["verified"] += 1
            state["unchanged"] = True

        source = Source(fd, 0, 5, 6, unchanged=lambda: bool(state["unchanged"]), verify=verify)
        drop: Any = await self.store(MemoryStore({"bob": [b"x\n"]})).open(BOB)
        drop._drop.source = lambda index: source
        self.assertIsNone(drop.ready(0, None))
        self.assertEqual(await self.octets(drop, 0), b"good\r\n.\r\n")
        self.assertEqual(state["verified"], 1)

        def wrong() -> None:
            raise TemporaryFailure("changed")

        state["unchanged"] = False
        source = source._replace(verify=wrong)
        with self.assertRaises(TemporaryFailure):
            await self.octets(drop, 0)
        await drop.release()

    async def test_reads_while_mail_comes_all_the_time(self) -> None:
        """A deliverer that waits for the locks writes as soon as they are let go."""
        folder = os.path.abspath(self.mktemp())
        os.makedirs(folder)
        spool = os.path.join(folder, "bob")
        bodies = [b"small\n", b"".join(b"%07d\n" % n for n in range(100_000)), b"last\n"]
        self.assertGreater(len(bodies[1]), 2 * COLD_BLOCK)
        mail = b"From a@example.org Mon Jan  1 00:00:00 2024\nSubject: x\n\n%s\n"

        def deliver(octets: bytes) -> None:
            with open(spool, "ab") as file:
                file.write(octets)

        deliver(b"".join(mail % body for body in bodies))
        blocking = MboxStore(os.path.join(folder, "{user}"), os.path.join(folder, "state"))
        drop = await self.store(blocking).open(BOB)
        released = SpoolLocks.__exit__
        deliveries = []

        def then_deliver(locks: SpoolLocks, *error: Any) -> None:
            released(locks, *error)
            deliver(mail % b"late\n")
            deliveries.append(1)

        self.patch(SpoolLocks, "__exit__", then_deliver)
        deliver(mail % b"late\n")
        for index, body in enumerate(bodies):
            wanted = (b"Subject: x\n\n" + body).replace(b"\n", b"\r\n") + b".\r\n"
            self.assertIsNone(drop.ready(index, None))
            self.assertEqual(await self.octets(drop, index), wanted)
        top = b"Subject: x\r\n\r\n0000000\r\n.\r\n"
        self.assertEqual(await self.octets(drop, 1, 1), top)
        self.assertGreater(len(deliveries), 5)
        await drop.release()

    async def test_a_file_that_became_shorter(self) -> None:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(b"good\n")
        fd = os.open(path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        drop: Any = await self.store(MemoryStore({"bob": [b"x\n"]})).open(BOB)
        drop._drop.source = lambda index: Source(fd, 0, 500, 600)
        with self.assertRaises(TemporaryFailure):
            await self.octets(drop, 0)
        await drop.release()

    async def test_a_file_that_cannot_be_read(self) -> None:
        """No traceback, and no "internal error": this happens to disks."""
        path = self.mktemp()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self.addCleanup(os.close, fd)
        drop: Any = await self.store(MemoryStore({"bob": [b"x\n"]})).open(BOB)
        drop._drop.source = lambda index: Source(fd, 3, 5, 6)
        with self.assertRaises(TemporaryFailure) as caught:
            await self.octets(drop, 0)
        self.assertEqual(caught.exception.detail, "EBADF at offset 3")
        await drop.release()
