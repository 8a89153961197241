"""`IMailboxPOP3` and `IMaildrop`, both ways.

So any existing twisted.mail mailbox is served by Popdrop's protocol, and Popdrop's realm works
under `twisted.mail.pop3.POP3` - with that class's limits, which its users know.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from io import BytesIO
from typing import IO, Any, Final, overload

from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.logger import Logger
from twisted.mail.interfaces import IMailboxPOP3
from zope.interface import implementer

from popdrop.errors import TemporaryFailure
from popdrop.interfaces import IBlocks, IMaildrop
from popdrop.listing import Listing
from popdrop.wire import Outgoing

log = Logger()

BLOCK: Final = 65_536
"""Octets taken from a mailbox's file at a time."""
_STUFFED = re.compile(rb"(?m)^\.")


class _Counter:
    """Octets of a message as sent, without dot-stuffing and final dot."""

    def __init__(self) -> None:
        self._octets = 0
        self._last = b"\n"

    def feed(self, block: bytes) -> None:
        with_last = self._last + block  # a CRLF may be cut in two
        self._octets += len(block) + block.count(b"\n") - with_last.count(b"\r\n")
        self._last = with_last[-1:]

    def end(self) -> int:
        return self._octets + (0 if self._last == b"\n" else 2)


async def adapted(mailbox: Any, logout: Callable[[], object]) -> MailboxAsMaildrop:
    """An `IMailboxPOP3` as an `IMaildrop`; `logout` is called once, when it is released.

    Every message is read once to know its octets as sent: the sizes a mailbox gives are those of
    its own storage, and a client takes what LIST says for what RETR sends.
    """
    try:
        stored = await maybeDeferred(mailbox.listMessages)
        sizes = []
        for index in range(len(list(stored))):
            file = await maybeDeferred(mailbox.getMessage, index)
            counter = _Counter()
            try:
                while block := file.read(BLOCK):
                    counter.feed(block)
            finally:
                file.close()
            sizes.append(counter.end())
        return MailboxAsMaildrop(mailbox, Listing(sizes), logout)
    except BaseException:
        logout()
        raise


@implementer(IMaildrop)
class MailboxAsMaildrop:
    """A twisted.mail mailbox, under Popdrop's protocol."""

    wants_seen = False

    def __init__(self, mailbox: Any, listing: Listing, logout: Callable[[], object]) -> None:
        self._mailbox = mailbox
        self._logout: Callable[[], object] | None = logout
        self.listing = listing

    async def measure(self) -> None:
        """As `IMaildrop.measure`: sizes were asked for when it was opened."""

    async def identify(self) -> None:
        """As `IMaildrop.identify`."""
        ids = [
            await maybeDeferred(self._mailbox.getUidl, index) for index in range(len(self.listing))
        ]
        self.listing = self.listing.with_ids(ids)

    def ready(self, index: int, lines: int | None, ahead: int = 0) -> bytes | None:
        """As `IMaildrop.ready`: a mailbox may always make us wait."""
        return None

    async def fetch(self, index: int, lines: int | None) -> IBlocks:
        """As `IMaildrop.fetch`."""
        return FileBlocks(
            await maybeDeferred(self._mailbox.getMessage, index), Outgoing(lines=lines)
        )

    async def commit(self, deleted: Collection[int], seen: Collection[int] = ()) -> None:
        """As `IMaildrop.commit`, as far as the mailbox keeps such a promise."""
        if not deleted:
            return
        try:
            for index in sorted(deleted):
                await maybeDeferred(self._mailbox.deleteMessage, index)
            await maybeDeferred(self._mailbox.sync)
        except Exception:
            log.failure("a mailbox failed to delete")
            self._mailbox.undeleteMessages()
            raise TemporaryFailure("messages could not be deleted, try again later") from None

    def release(self) -> Awaitable[None]:
        """As `IMaildrop.release`."""
        logout, self._logout = self._logout, None
        if logout is not None:
            try:
                logout()
            except Exception:
                log.failure("a mailbox failed to log out")
        return succeed(None)


@implementer(IBlocks)
class FileBlocks:
    """A file of a mailbox on its way out."""

    def __init__(self, file: IO[bytes], outgoing: Outgoing) -> None:
        self._file: IO[bytes] | None = file
        self._outgoing = outgoing

    async def read(self) -> bytes:
        """As `IBlocks.read`."""
        while self._file is not None:
            block = self._file.read(BLOCK)
            if not block or self._outgoing.finished:
                self.close()
                return self._outgoing.end()
            out = self._outgoing.feed(block)
            if out:
                return out
        return b""

    def close(self) -> None:
        """As `IBlocks.close`."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


@implementer(IMailboxPOP3)
class MaildropAsMailbox:
    """Popdrop's maildrop, under `twisted.mail.pop3.POP3`.

    The maildrop must have been identified. Sizes of deleted messages read as 0, as that interface
    wants; `sync` gives a Deferred, which that class does not wait for.
    """

    loginDelay = 0
    messageExpiration = None

    def __init__(self, drop: IMaildrop) -> None:
        self._drop = drop
        self._deleted: set[int] = set()

    def _known(self, index: int) -> int:
        if not 0 <= index < len(self._drop.listing):
            raise ValueError("no such message")
        return index

    @overload
    def listMessages(self) -> list[int]: ...

    @overload
    def listMessages(self, i: int) -> int: ...

    def listMessages(self, i: int | None = None) -> int | list[int]:
        """Octets as sent of message `i` (0-based), or of all."""
        if i is None:
            return [
                0 if index in self._deleted else self._drop.listing.size(index)
                for index in range(len(self._drop.listing))
            ]
        return 0 if i in self._deleted else self._drop.listing.size(self._known(i))

    def getMessage(self, index: int) -> Deferred[IO[bytes]]:
        """A file of the message with LF line ends, as that class wants it. Held in memory."""
        return Deferred.fromCoroutine(self._message(self._known(index)))

    async def _message(self, index: int) -> IO[bytes]:
        blocks = await self._drop.fetch(index, None)
        parts = []
        try:
            while part := await blocks.read():
                parts.append(part)
        finally:
            blocks.close()
        text = b"".join(parts)[: -len(b".\r\n")].replace(b"\r\n", b"\n")
        return BytesIO(_STUFFED.sub(b"", text))

    def getUidl(self, index: int) -> bytes:
        """The unique-id of message `index` (0-based)."""
        return self._drop.listing.uid(self._known(index))

    def deleteMessage(self, index: int) -> None:
        """Mark message `index` (0-based)."""
        self._deleted.add(self._known(index))

    def undeleteMessages(self) -> None:
        """Forget all marks."""
        self._deleted.clear()

    def sync(self) -> Deferred[None]:
        """Remove the marked messages."""
        deleted = frozenset(self._deleted)

        async def commit() -> None:
            await self._drop.commit(deleted)

        return Deferred.fromCoroutine(commit())
