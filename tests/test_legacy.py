"""`popdrop.legacy`: twisted.mail's mailboxes under Popdrop's protocol, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import IO, Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.cred.portal import IRealm, Portal
from twisted.internet.defer import Deferred, succeed
from twisted.internet.testing import StringTransport
from twisted.mail.interfaces import IMailboxPOP3
from twisted.mail.pop3 import POP3, Mailbox
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import Interface, implementer

from popdrop.interfaces import IMaildrop
from popdrop.legacy import adapted
from popdrop.policy import Policy
from popdrop.realm import Realm
from tests.doubles import Checker, NoPool, Server, Store, octets_as_sent


@implementer(IMailboxPOP3)
class OldMailbox(Mailbox):
    """As its authors' tutorial has it: sizes as stored, deletion by name, sync at the end."""

    def __init__(self, messages: list[bytes], deferred: bool = False) -> None:
        self.messages: list[bytes | None] = list(messages)
        self.marked: set[int] = set()
        self.deferred = deferred
        self.logouts = 0
        self.broken = False

    def _answer(self, value: Any) -> Any:
        return succeed(value) if self.deferred else value

    def listMessages(self, i: int | None = None) -> Any:
        if i is None:
            return self._answer([len(m or b"") for m in self.messages])
        return self._answer(len(self.messages[i] or b""))

    def getMessage(self, index: int) -> Any:
        return self._answer(BytesIO(self.messages[index] or b""))

    def getUidl(self, index: int) -> Any:
        return b"old-%d" % index

    def deleteMessage(self, index: int) -> None:
        self.marked.add(index)

    def undeleteMessages(self) -> None:
        self.marked.clear()

    def sync(self) -> Any:
        if self.broken:
            raise OSError(28, "no space")
        self.messages = [m for i, m in enumerate(self.messages) if i not in self.marked]
        return self._answer(None)


@implementer(IRealm)
class OldRealm:
    """A realm that knows IMailboxPOP3 alone."""

    def __init__(self, mailbox: OldMailbox) -> None:
        self.mailbox = mailbox

    def requestAvatar(self, avatarId: Any, mind: object, *interfaces: type[Interface]) -> Any:
        assert IMailboxPOP3 in interfaces

        def logout() -> None:
            self.mailbox.logouts += 1

        return IMailboxPOP3, self.mailbox, logout


class MailboxUnderPopdropTests(SynchronousTestCase):
    messages = [b"A: 1\n\n.dot\nlast", b"B: 2\r\n\r\nx\r\n", b""]

    def serve(self, mailbox: OldMailbox) -> Any:
        server = Server()
        server.factory.portal.realm = OldRealm(mailbox)
        return server

    def test_session(self) -> None:
        for deferred in (False, True):
            mailbox = OldMailbox(self.messages, deferred)
            protocol, transport = self.serve(mailbox).logged_in()
            protocol.dataReceived(b"LIST\r\nUIDL 2\r\nRETR 1\r\nTOP 1 0\r\nDELE 2\r\nQUIT\r\n")
            self.assertEqual(
                transport.value(),
                b"+OK 3 messages (31 octets)\r\n1 20\r\n2 11\r\n3 0\r\n.\r\n"
                b"+OK 2 old-1\r\n"
                b"+OK 20 octets\r\nA: 1\r\n\r\n..dot\r\nlast\r\n.\r\n"
                b"+OK\r\nA: 1\r\n\r\n.\r\n"
                b"+OK message 2 deleted\r\n"
                b"+OK Pop server at mail.example.org signing off.\r\n",
            )
            self.assertEqual(mailbox.messages, [self.messages[0], self.messages[2]])
            self.assertEqual(mailbox.logouts, 1)

    def test_failing_sync(self) -> None:
        """`sync` that fails is said, and nothing counts as deleted (twisted.mail: C11)."""
        mailbox = OldMailbox(self.messages)
        mailbox.broken = True
        protocol, transport = self.serve(mailbox).logged_in()
        protocol.dataReceived(b"DELE 1\r\nQUIT\r\n")
        self.assertIn(b"\r\n-ERR [SYS/TEMP]", transport.value())
        self.assertEqual(len(mailbox.messages), 3)
        self.assertEqual((mailbox.marked, mailbox.logouts), (set(), 1))
        self.flushLoggedErrors(OSError)

    def test_logout_if_it_cannot_be_read(self) -> None:
        mailbox = OldMailbox(self.messages)

        def getMessage(index: int) -> IO[bytes]:
            raise OSError(5, "x")

        mailbox.getMessage = getMessage  # type: ignore[method-assign]
        protocol, transport = self.serve(mailbox).connect()
        protocol.dataReceived(b"USER bob\r\nPASS secret\r\n")
        self.assertIn(b"-ERR [SYS/TEMP]", transport.value())
        self.assertEqual(mailbox.logouts, 1)
        self.flushLoggedErrors(OSError)

    pieces = st.lists(st.sampled_from([b"\r", b"\n", b"a", b".", b"\r\n"]), max_size=12).map(
        b"".join
    )

    @settings(deadline=None, max_examples=300)
    @given(pieces, st.integers(1, 4))
    def test_sizes(self, stored: bytes, step: int) -> None:
        """What LIST says is what is sent, for any line ends and any reads."""

        class Slow(BytesIO):
            def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
                return super().read(step)

        mailbox = OldMailbox([stored])
        mailbox.getMessage = lambda index: Slow(stored)  # type: ignore[method-assign]
        drop = self.successResultOf(Deferred.fromCoroutine(adapted(mailbox, lambda: None)))
        self.assertEqual(drop.listing.size(0), octets_as_sent(stored))


class MaildropUnderTwistedTests(SynchronousTestCase):
    """Popdrop's realm under the class it does not subclass."""

    def connect(self, store: Store) -> tuple[POP3, StringTransport]:
        portal = Portal(Realm(store, NoPool()))  # type: ignore[arg-type]
        portal.registerChecker(Checker())
        protocol = POP3()
        protocol.portal = portal
        protocol.factory = None
        transport = StringTransport()
        protocol.makeConnection(transport)
        protocol.dataReceived(b"USER bob\r\n")
        protocol.dataReceived(b"PASS secret\r\n")
        self.pump(transport)
        self.assertIn(b"+OK Authentication succeeded", transport.value())
        transport.clear()
        return protocol, transport

    def pump(self, transport: StringTransport) -> None:
        """Let that class send: it pulls, and its long answers wait for the cooperator."""
        while transport.producer is not None:
            transport.producer.resumeProducing()

    def say(self, protocol: POP3, transport: StringTransport, line: bytes) -> bytes:
        transport.clear()
        protocol.dataReceived(line + b"\r\n")
        self.pump(transport)
        return transport.value()

    def test_session(self) -> None:
        store = Store([b"A: 1\n\nbody\n.dot\n", b"B: 2\n\nx\n"])
        protocol, transport = self.connect(store)
        self.assertEqual(self.say(protocol, transport, b"LIST 1"), b"+OK 1 20\r\n")
        self.assertEqual(self.say(protocol, transport, b"UIDL 2"), b"+OK id1\r\n")
        self.assertEqual(
            self.say(protocol, transport, b"RETR 1"),
            b"+OK 20\r\nA: 1\r\n\r\nbody\r\n..dot\r\n.\r\n",
        )
        self.assertTrue(self.say(protocol, transport, b"DELE 1").startswith(b"+OK"))
        self.assertTrue(self.say(protocol, transport, b"QUIT").startswith(b"+OK"))
        self.assertEqual(store.messages, [b"B: 2\n\nx\n"])
        protocol.connectionLost(None)
        self.assertEqual(store.opened[0].released, 1)

    def test_refusal(self) -> None:
        store = Store([])
        portal = Portal(Realm(store, NoPool(), policy=Policy(min_uid=11)))  # type: ignore[arg-type]
        checker = Checker()
        portal.registerChecker(checker)
        interface, drop, logout = self.login(portal, IMaildrop)
        self.assertIs(interface, IMaildrop)
        self.assertTrue(IMaildrop.providedBy(drop))
        logout()
        interface, mailbox, logout = self.login(portal, IMailboxPOP3)
        self.assertTrue(IMailboxPOP3.providedBy(mailbox))
        self.assertRaises(ValueError, mailbox.getUidl, 0)
        logout()
        self.assertEqual([d.released for d in store.opened], [1, 1])

    def login(
        self, portal: Portal, interface: type[Interface]
    ) -> tuple[type[Interface], Any, Callable[[], None]]:
        from popdrop.credentials import Cleartext

        return self.successResultOf(portal.login(Cleartext(b"bob", b"secret"), None, interface))
