"""`MemoryStore` keeps the contract, and does what tests need besides."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import Busy, NoSuchOwner, TemporaryFailure
from popdrop.testing import MemoryStore, StoreContract, as_sent
from popdrop.values import Owner

BOB = Owner("bob")


class MemoryStoreContract(StoreContract, SynchronousTestCase):
    store: MemoryStore

    def make_store(self) -> MemoryStore:
        return MemoryStore({"bob": [], "eve": []})

    def deliver(self, message: bytes) -> None:
        self.store.deliver("bob", message)


class MemoryStoreTests(SynchronousTestCase):
    def test_unknown_owner(self) -> None:
        self.assertRaises(NoSuchOwner, MemoryStore().open, BOB)

    def test_unfinished_message(self) -> None:
        """The line end that is added is counted."""
        drop = MemoryStore({"bob": [b".a\n.b"]}).open(BOB)
        self.addCleanup(drop.release)
        self.assertEqual(drop.listing.size(0), len(b".a\r\n.b\r\n"))
        self.assertEqual(as_sent(drop.source(0)), b".a\r\n.b\r\n")

    def test_injected_failures(self) -> None:
        """One a call, in order, and nothing has changed."""
        store = MemoryStore({"bob": [b"a\n"]})
        store.fail("open", Busy("spool"), Busy("session"))
        self.assertEqual(self.assertRaises(Busy, store.open, BOB).lock, "spool")
        self.assertEqual(self.assertRaises(Busy, store.open, BOB).lock, "session")
        drop = store.open(BOB)
        self.addCleanup(drop.release)
        wrong = TemporaryFailure("wrong")
        for operation in ("identify", "commit", "verify"):
            store.fail(operation, wrong)
        self.assertIdentical(self.assertRaises(TemporaryFailure, drop.identify), wrong)
        self.assertIdentical(self.assertRaises(TemporaryFailure, drop.commit, [0]), wrong)
        self.assertEqual(store.mail, {"bob": [b"a\n"]})
        source = drop.source(0)
        store.disturb("bob")
        self.assertFalse(source.unchanged())
        self.assertIdentical(self.assertRaises(TemporaryFailure, source.verify), wrong)
        self.assertFalse(source.unchanged())
        source.verify()
        self.assertTrue(source.unchanged())
        drop.commit([0])
        self.assertEqual(store.mail, {"bob": []})

    def test_unknown_operation(self) -> None:
        self.assertRaises(ValueError, MemoryStore().fail, "sync", Busy("spool"))
