"""One mbox spool as a maildrop: photographed, read, identified, shortened.

A maildrop is photographed under both spool locks and then read without any; before anything is
believed or written again, the file is compared with the photograph (decisions 7 to 14). The spool
is rewritten in place, never replaced by rename: a deliverer that waits with the old file open
would deliver into nothing.

Over 400 lines since a session with one spool is one argument, from its checks to its last fsync.
"""

from __future__ import annotations

import errno
import os
import shlex
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Final, NamedTuple, Protocol

from twisted.logger import Logger
from zope.interface import implementer

from popdrop.errors import (
    Busy,
    PermanentFailure,
    TemporaryFailure,
)
from popdrop.interfaces import IBlockingMaildrop
from popdrop.listing import Ids, Listing
from popdrop.stores.mbox.identity import LONGEST_HEADER, base_in, digest_of, header_of, ids_of
from popdrop.stores.mbox.index import EAGER, SMALLEST, Damaged, Index, Indexes, Known, tail_of
from popdrop.stores.mbox.journal import Journals, NotCommitted, Piece, Range
from popdrop.stores.mbox.kinds import LOOK_AHEAD, LOOK_BACK, Form, is_mmdf
from popdrop.stores.mbox.locks import NoDotLock, NoFcntlLock, SessionLock, SpoolLocks
from popdrop.stores.mbox.recent import Photograph, Recent
from popdrop.stores.mbox.scan import BLOCK, NotAnMbox
from popdrop.stores.mbox.spans import FIELDS, QUOTED, REFUSED, Spans
from popdrop.stores.mbox.spool import (
    NO_RIGHT,
    SETTLED_NS,
    Key,
    Spool,
    is_settled,
    key_of,
    shows_changes,
    until_shown,
)
from popdrop.stores.mbox.status import Edit, as_read, edited, length_of, may_insert
from popdrop.stores.uidl import hash_in, text_of
from popdrop.stores.uidlform import UidlForm
from popdrop.values import Source

log = Logger()

CORRUPT: Final = (
    "Unable to process From lines (envelopes), change recognition modes "
    "or check for corrupted mail drop."
)
"""qpopper's words."""
UNREADABLE: Final = "maildrop cannot be opened"
TRY_LATER: Final = "maildrop is not available now, try again later"
TOO_LARGE: Final = "maildrop is larger than this server allows"
READ_ONLY: Final = "maildrop is read-only, nothing was deleted"
CHANGED: Final = "maildrop was changed by another program, try again later"
NOT_DELETED: Final = "maildrop was changed by another program, nothing was deleted"
NOT_LOCKED: Final = "maildrop cannot be locked now, nothing was deleted"
NO_FCNTL: Final = "maildrop cannot be locked, its file system has no fcntl locks"
NO_FOLDER: Final = "its folder is missing: make or mount it, or name another with --store"
NOT_WRITTEN: Final = "maildrop could not be rewritten"

clock_ns: Callable[[], int] = time.time_ns
"""The clock that file times are held against."""

VERIFIED_AT_ONCE: Final = 1 << 20
"""Octets of messages that are compared under the locks when one of them is asked for."""

LONGEST_WAIT_NS: Final = SETTLED_NS + 1
"""Nanoseconds after which times that still do not show a change are those of the future."""

TRIES: Final = 3
"""Reads under the locks, while a program that takes none writes."""

_NO_FIELDS: Final[frozenset[bytes]] = frozenset()
_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT}
_LASTING: Final = NO_RIGHT | {
    errno.ELOOP,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.ENAMETOOLONG,
}

Refresh = Callable[[], None]


def is_missing(folder: str) -> bool:
    """Whether there is no such folder; where that cannot be seen, as if there were."""
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


class told:  # noqa: N801 - used as a function
    """Turn what the system says into what a client is told; the facts go into the detail.

    Written out, since as a generator it costs a login twice as much.
    """

    __slots__ = ("_lasting", "_passing", "_path")

    def __init__(self, path: str, lasting: str = UNREADABLE, passing: str = TRY_LATER) -> None:
        self._path = path
        self._lasting = lasting
        self._passing = passing

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            detail = f"{self._path}: {errno.errorcode.get(error.errno or 0, '?')} {error.strerror}"
            if isinstance(error, NoFcntlLock):
                remedy = "run its lock daemon (NFS: lockd), or say locks=dot here and to the MTA"
                raise TemporaryFailure(NO_FCNTL, f"{detail}; {remedy}") from error
            if error.errno in _LASTING:
                raise PermanentFailure(self._lasting, detail) from error
            if error.errno == errno.ENOENT and is_missing(os.path.dirname(self._path)):
                detail = f"{self._path}: {NO_FOLDER}"
            raise TemporaryFailure(self._passing, detail) from error


class Home(Protocol):
    """What a maildrop needs of its store (`store.MboxStore` says what each is)."""

    form: Form
    locks: tuple[str, ...]
    strip: frozenset[bytes]
    spaced: bool
    uidl: UidlForm
    update_status: bool
    max_messages: int
    max_octets: int
    recent: Recent
    indexes: Indexes
    journals: Journals


_NO_SPANS: Final = Spans()
"""Of all maildrops that have none: six arrays without an octet are half a kilobyte."""
_PINNED: Final = [memoryview(column) for column in _NO_SPANS.columns()]
"""Arrays that are viewed cannot grow: no maildrop can leave anything in that of all."""


@implementer(IBlockingMaildrop)
class MboxDrop:
    """One spool, photographed. Made by `MboxStore.open`; `spool` is `None` where there is none."""

    @property
    def wants_seen(self) -> bool:
        """As `IBlockingMaildrop.wants_seen`."""
        return self._store.update_status

    def __init__(self, store: Home, session: SessionLock, spool: Spool | None) -> None:
        self._store = store
        self._session = session
        self._maybe_spool = spool
        self._reading_locks = store.locks
        self._read_only = ""
        self._spans = _NO_SPANS
        self._key: Key | None = None
        self._believed: Key | None = None
        self._settled = False
        self._proven = 0
        self._known: Known | None = None
        self._tail = _NO_SPANS
        self._unsaved = False
        self._doubted = False
        self._left: _Left | None = None
        self._atime = 0
        self._had_new_mail = False
        self._verified: dict[int, Key] = {}
        self._committed = False
        if spool:
            if not spool.writable:
                self._read_only = f"{spool.path}: no right to write it"
                log.warn("maildrop is read-only: {reason}", reason=self._read_only)
            if self._recall(spool):
                return
            self._photograph()
        else:
            self.listing = Listing(())
        self._keep()

    @property
    def _spool(self) -> Spool:
        if self._maybe_spool is None:
            raise IndexError("an empty maildrop has no messages")
        return self._maybe_spool

    # The photograph

    def _recall(self, spool: Spool) -> bool:
        """Take the photograph of an earlier session if nothing was written since."""
        key = key_of(spool.opened)
        recent = self._store.recent.get(spool.path, key)
        if recent is not None:
            self._key, self._spans, self.listing, self._proven = recent
        else:
            known = self._index.load()
            if known is None:
                return False
            if tail_of(spool, known.last, known.end) != known.tail:
                log.info("{path}: was rewritten, it is scanned anew", path=spool.path)
                return False
            self._known = known
            if not known.settled or known.key != key or known.end != spool.opened.st_size:
                return False
            self._check_limits(spool.opened.st_size, known.count)
            self._key, self._proven = key, known.proven
            self._take(known)
        self._believed = self._key
        self._settled = True
        self._look_at_times(spool.opened)
        return True

    @property
    def _index(self) -> Index:
        return self._store.indexes.of(self._session.name)

    def _take(self, known: Known) -> None:
        """Believe an index, and what was scanned behind its end; read it if it is small."""
        count = known.count + len(self._tail)
        self.listing = Listing.promised(count, known.octets + sum(self._tail.sizes))
        if count <= EAGER:
            with suppress(Damaged):
                self._load(known)

    def _load(self, known: Known) -> None:
        """Raises `Damaged`."""
        spans = known.places()
        ids = known.ids() if known.identified and not len(self._tail) else None
        if len(self._tail):
            spans.extend(self._tail, known.end)
        listing = Listing(spans.sizes, ids)
        if (len(listing), listing.octets) != (len(self.listing), self.listing.octets):
            raise Damaged(f"{self._index.path}: sums and sizes differ")
        self._spans, self.listing = spans, listing

    def measure(self) -> None:
        """As `IBlockingMaildrop.measure`. Raises `TemporaryFailure`, and `Busy`."""
        if self.listing.measured or self._known is None:
            return
        try:
            self._load(self._known)
        except Damaged as damage:
            log.info("{damage}: scanned anew", damage=str(damage))
            self._index.forget()
            with told(self._spool.path), self._locked_to_read() as locks:
                self._measure_locked(locks.refresh)

    def _measure_locked(self, refresh: Refresh) -> None:
        """The index is gone after its sums were told to the client: a scan must give the same."""
        end = self._known.end + self._tail.end if self._known else 0
        found = self._spool.stat()
        try:
            spans = self._scan(0, end, refresh)
        except NotAnMbox:
            spans = Spans()
        listing = Listing(spans.sizes)
        if (len(listing), listing.octets) != (len(self.listing), self.listing.octets):
            raise TemporaryFailure(CHANGED, f"{self._spool.path}: was rewritten")
        self._spans, self.listing, self._known = spans, listing, None
        self._proven = 0
        self._unsaved = True
        self._remember(found)

    def _keep(self) -> None:
        """For the next session: only what would still show a change made right now."""
        whole = self._reading_locks == self._store.locks and self._maybe_spool is not None
        whole = whole and self.listing.measured and not self._doubted
        if self._settled and self._key is not None and whole:
            photograph = Photograph(self._key, self._spans, self.listing, self._proven)
            self._store.recent.put(self._spool.path, photograph)

    def _settle(self) -> None:
        """What was too young to be kept when it was photographed may be old enough now."""
        if self._settled or self._believed is None:
            return
        found = self._spool.stat()
        if key_of(found) == self._believed and found.st_size == self._end:
            self._settled = is_settled(found, clock_ns())

    def _distrust(self) -> None:
        """The photograph is not true of the file: no later session shall go by it."""
        self._doubted = True
        self._index.forget()
        self._store.recent.forget(self._spool.path)

    def _look_at_times(self, found: os.stat_result) -> None:
        self._atime = found.st_atime_ns
        self._had_new_mail = found.st_atime_ns <= found.st_mtime_ns

    @contextmanager
    def _locked_to_read(self) -> Iterator[SpoolLocks]:
        with ExitStack() as stack:
            try:
                locks = stack.enter_context(self._locks_to_read())
            except NoDotLock as error:
                self._do_without_dot_lock(error)
                locks = stack.enter_context(self._locks_to_read())
            yield locks

    def _locks_to_read(self) -> SpoolLocks:
        spool = self._spool
        return SpoolLocks(spool.fd, spool.path, self._reading_locks, spool.writable)

    def _do_without_dot_lock(self, error: NoDotLock) -> None:
        # Mail that is there can be read all the same: a message that was still being delivered is
        # not deleted, since it will have changed.
        if error.errno in NO_RIGHT:
            self._read_only = (
                f"{self._spool.path}.lock cannot be made: {error.strerror}; run with the group of "
                "its folder (often mail), or say locks=fcntl"
            )
            log.warn("maildrop is read-only: {reason}", reason=self._read_only)
        elif error.errno not in _NO_SPACE:
            raise error
        self._reading_locks = tuple(name for name in self._store.locks if name != "dot")

    def _photograph(self) -> None:
        with self._locked_to_read() as locks:
            self._photograph_locked(locks.refresh)

    def _photograph_locked(self, refresh: Refresh) -> None:
        spool = self._spool
        if not spool.is_at_path():
            raise Busy("spool")  # it has just been replaced: the next try opens the new one
        found = spool.stat()
        self._check_limits(found.st_size, 0)
        if self._known is not None and self._grown(self._known, found, refresh):
            self._look_at_times(found)
            self._remember(found)
            return
        self._known = None
        try:
            spans = self._scan(0, found.st_size, refresh)
        except NotAnMbox as fault:
            raise PermanentFailure(CORRUPT, f"{spool.path}: {fault}{self._advice}") from None
        if spans.end < found.st_size:
            raise TemporaryFailure(CHANGED, f"{spool.path}: shrank while it was read")
        self._check_limits(0, len(spans))
        self._spans = spans
        self.listing = Listing(spans.sizes)
        self._unsaved = True
        self._look_at_times(found)
        self._remember(found)

    def _check_limits(self, size: int, count: int) -> None:
        store = self._store
        if store.max_octets and size > store.max_octets:
            raise PermanentFailure(TOO_LARGE, f"{self._spool.path}: {size} octets")
        if store.max_messages and count > store.max_messages:
            raise PermanentFailure(TOO_LARGE, f"{self._spool.path}: {count} messages")

    def _grown(self, known: Known, found: os.stat_result, refresh: Refresh) -> bool:
        """Whether nothing happened to the spool of an index but that mail was appended, if that.

        The new mail is scanned. Where it does not begin right behind the old, a scan of all might
        see the old differently, and is made.
        """
        same_file = known.key[:2] == (found.st_dev, found.st_ino)
        if not same_file or found.st_size < known.end:
            return False
        if found.st_size > known.end:
            if not (self._is_over(known.end) and self._begins(known.end)):
                return False
            if self._store.form.lengths and not self._may_grow(known):
                return False
            self._tail = self._scan(known.end, found.st_size, refresh, hide=False)
            if known.end + self._tail.end < found.st_size:
                return False
        self._check_limits(0, known.count + len(self._tail))
        # What is older is looked at again, message by message, before any of it is sent.
        self._proven = known.count
        self._take(known)
        return True

    def _may_grow(self, known: Known) -> bool:
        """Whether what was appended leaves the old as it was.

        A Content-Length that was not true may be now, and `auto` may be met by both its forms.
        """
        try:
            old = known.places()
        except Damaged:
            return False
        if not len(old) or any(altered & REFUSED for altered in old.altered):
            return False
        places = (old.starts[0], known.end)
        return len({is_mmdf(self._spool.read(at, at + LOOK_AHEAD)) for at in places}) == 1

    @property
    def _advice(self) -> str:
        """What to do about a spool that is corrupt."""
        kind = self._store.form.name
        words = "popdrop fsck " + ("" if kind == "mboxrd" else f"--kind {kind} ")
        return f"; `{words}{shlex.quote(self._spool.path)}` shows what is wrong"

    @property
    def _end(self) -> int:
        """Where the last message ends."""
        if self.listing.measured or self._known is None:
            return self._spans.end
        return self._known.end + self._tail.end

    def _remember(self, found: os.stat_result) -> None:
        """All of the photograph is true of the file in this state."""
        now = clock_ns()
        self._key = key_of(found)
        self._believed = self._key if shows_changes(found, now) else None
        # Mail behind the photograph is none of it: then the file's state does not stand for it.
        whole = found.st_size == self._end
        self._settled = whole and is_settled(found, now)

    def _scan(self, start: int, stop: int, refresh: Refresh, hide: bool = True) -> Spans:
        return self._scan_pieces([(start, stop)], refresh, hide)

    def _scan_pieces(self, pieces: list[Piece], refresh: Refresh, hide: bool = True) -> Spans:
        """As if these pieces were a file."""
        scanner = self._store.form.scanner(strip=self._store.strip, hide=hide)
        for piece in pieces:
            if isinstance(piece, bytes):
                scanner.feed(piece)
                continue
            for block in self._spool.blocks(*piece, BLOCK):
                scanner.feed(block)
                refresh()
        return scanner.close()

    # Reading one message

    def source(self, index: int) -> Source:
        """As `IBlockingMaildrop.source`."""
        spans, spaced = self._spans, self._store.spaced
        altered = spans.altered[index]
        return Source(
            self._spool.fd,
            spans.starts[index] + spans.heads[index],
            spans.lengths[index],
            spans.sizes[index],
            # Most mail goes out as it lies there: nothing need be looked for in it.
            self._store.strip if altered & FIELDS else _NO_FIELDS,
            altered & QUOTED > 0,
            spaced,
            partial(self._is_unchanged, index),
            partial(self._verify, index),
            partial(self._read_again, index),
        )

    def reach(self, index: int, count: int, octets: int) -> int:
        """As `IBlockingMaildrop.reach`."""
        spans = self._spans
        stop = min(index + count + 1, len(spans))
        last = bisect_left(spans.starts, spans.offset(index) + octets, index + 1, stop) - 1
        if self._verified or index < self._proven:
            expected = self._expected(index)
            others = (row for row in range(index + 1, last + 1) if self._expected(row) != expected)
            last = next(others, last + 1) - 1
        return spans.stop(last) - spans.offset(index)

    def _expected(self, index: int) -> Key | None:
        """The state of the file that message `index` is known to be the same in."""
        believed = self._believed if index >= self._proven else None
        return self._verified.get(index, believed)

    def _is_unchanged(self, index: int) -> bool:
        try:
            return key_of(self._spool.stat()) == self._expected(index)
        except OSError:
            return False

    def _verify(self, index: int) -> None:
        with self._verified_to_read(index):
            pass

    def _read_again(self, index: int, offset: int, length: int) -> bytes:
        """Octets of message `index`, which is verified, and not written to before they are read."""
        path = self._spool.path
        with self._verified_to_read(index) as (key, refresh):
            for _ in range(TRIES):
                block = self._spool.read(offset, offset + length)
                now = key_of(self._spool.stat())
                if block and now == key:
                    return block
                key = now
                self._must_be_same(index, refresh)
        raise TemporaryFailure(CHANGED, f"{path}: is written by a program that takes no lock")

    @contextmanager
    def _verified_to_read(self, index: int) -> Iterator[tuple[Key, Refresh]]:
        """Under the locks, with this message verified, and those that may be wanted next.

        Gives the state of the file that this is true of.
        """
        spans, path = self._spans, self._spool.path
        with told(path):
            self._let_times_show()
        with told(path), self._locked_to_read() as locks:
            found = self._spool.stat()
            key = key_of(found)
            self._must_be_same(index, locks.refresh)
            self._verified = {}
            # It may have been written again since the wait.
            if not 0 < until_shown(found, clock_ns()) <= LONGEST_WAIT_NS:
                self._verified[index] = key
                for following in range(index + 1, len(spans)):
                    if spans.stop(following) - spans.starts[index] > VERIFIED_AT_ONCE:
                        break
                    if not self._is_same(following, locks.refresh):
                        break
                    self._verified[following] = key
            yield key, locks.refresh

    def _must_be_same(self, index: int, refresh: Refresh) -> None:
        if not self._is_same(index, refresh):
            self._distrust()
            why = f"{self._spool.path}: message {index + 1} has changed"
            raise TemporaryFailure(CHANGED, why)

    def _let_times_show(self) -> None:
        """Wait until the next write will show: what is found now is believed until then.

        At most 2 s where times are whole seconds, else 20 ms. Times of the future tell nothing.
        """
        wait = until_shown(self._spool.stat(), clock_ns())
        if 0 < wait <= LONGEST_WAIT_NS:
            time.sleep(wait / 10**9)

    def _is_same(self, index: int, refresh: Refresh) -> bool:
        """Under the locks: is message `index` in its place, and the same as far as is known?"""
        spans = self._spans
        start, stop = spans.starts[index], spans.stop(index)
        if not self._may_begin(start) or (stop < spans.end and not self._begins(stop)):
            return False
        try:
            found = self._scan(start, stop, refresh, hide=False)
        except NotAnMbox:
            return False
        if (
            len(found) != 1
            or found.end != stop - start
            or (
                (found.heads[0], found.lengths[0], found.sizes[0], found.checks[0])
                != (
                    spans.heads[index],
                    spans.lengths[index],
                    spans.sizes[index],
                    spans.checks[index],
                )
            )
        ):
            return False
        # A reused id says nothing of the octets: then the check must do, as without any id.
        known = hash_in(self._mark(index))
        return known is None or self._hash(spans, index, refresh) == known

    def _may_begin(self, offset: int) -> bool:
        """Whether what is before `offset` lets a message begin there."""
        before = self._spool.read(max(offset - LOOK_BACK, 0), offset)
        return self._store.form.may_begin(before)

    def _is_over(self, offset: int) -> bool:
        """Whether what is before `offset` ends a message, whatever that says of its length."""
        return self._store.form.is_over(self._spool.read(max(offset - LOOK_BACK, 0), offset))

    def _begins(self, offset: int) -> bool:
        """Whether what stands at `offset` begins a message."""
        return self._store.form.begins(self._spool.read(offset, offset + LOOK_AHEAD))

    # Unique-ids

    def _mark(self, index: int) -> bytes:
        """By what message `index` is known again beside its check: its hash, or its reused id.

        Empty while the ids are not known.
        """
        if not self.listing.identified:
            return b""
        uid = self.listing.uid(index)
        return hash_in(uid) or uid

    def _hash(self, spans: Spans, index: int, refresh: Refresh) -> bytes:
        return text_of(digest_of(self._spool, spans, index, self._store.form.digest, refresh))

    def identify(self) -> None:
        """As `IBlockingMaildrop.identify`. Raises `TemporaryFailure`, and `Busy`."""
        if self.listing.identified:
            return
        if self._maybe_spool is None:
            self.listing = self.listing.with_ids([])
            return
        self.measure()
        if self.listing.identified:
            return
        known = self._known_ids()
        first = len(known) if known else 0
        with told(self._spool.path):
            sure = self._believed if first >= self._proven else None
            ids = self._ids(known) if sure else Ids.of(())
            if not sure or key_of(self._spool.stat()) != sure:
                ids = self._ids_locked(known)
        self.listing = self.listing.with_ids(known.followed_by(ids) if known is not None else ids)
        self._unsaved = True
        self._settle()
        self._keep()

    def _known_ids(self) -> Ids | None:
        """The ids that an index holds of the messages before the new ones."""
        if self._known is not None and self._known.identified:
            with suppress(Damaged):
                return self._known.ids()
        return None

    def _ids(self, known: Ids | None, refresh: Refresh = lambda: None) -> Ids:
        home = self._store
        ids = ids_of(self._spool, self._spans, home.uidl, known, home.form.digest, refresh)
        return Ids.of(ids)

    def _ids_locked(self, known: Ids | None) -> Ids:
        """Something was written: unless that was new mail only, ids would be of other octets."""
        spans, first = self._spans, len(known) if known else 0
        with self._locked_to_read() as locks:
            found = self._spool.stat()
            start = spans.starts[first] if first else 0
            try:
                again = self._scan(start, spans.end, locks.refresh, hide=not first)
            except NotAnMbox:
                again = Spans()
            if not spans.ends_with(again, first, start):
                self._distrust()
                raise TemporaryFailure(CHANGED, f"{self._spool.path}: was rewritten")
            ids = self._ids(known, locks.refresh)
            if not first:
                self._proven = 0
                self._remember(found)
        return ids

    # Deleting

    def commit(self, deleted: Collection[int], seen: Collection[int] = ()) -> None:
        """As `IBlockingMaildrop.commit`.

        All or nothing: over errors, a killed process and a power cut, by the journal. `seen` get
        `Status: RO` with `update-status=yes`, where that can be done beside the deletion.
        """
        rows = sorted(set(deleted))
        read = sorted(set(seen) - set(rows)) if self._store.update_status else []
        if not rows and not read:
            return
        if min(rows + read) < 0 or max(rows + read) >= len(self.listing):
            raise IndexError("no such message in this maildrop")
        if self._read_only:
            raise PermanentFailure(READ_ONLY, self._read_only)
        self.measure()
        spool = self._spool
        with (
            told(spool.path, READ_ONLY, NOT_LOCKED),
            SpoolLocks(spool.fd, spool.path, self._store.locks, True) as locks,
        ):
            self._commit_locked(rows, read, locks)

    def _commit_locked(self, rows: list[int], read: list[int], locks: SpoolLocks) -> None:
        spool = self._spool
        if not spool.is_at_path():
            raise TemporaryFailure(NOT_DELETED, f"{spool.path}: is another file now")
        found = spool.stat()
        size = found.st_size
        if rows:
            spans, places, end = self._agree(found, rows, locks.refresh)
        else:
            spans, places, end = self._look_again(found, read, locks.refresh), [], size
        marks = self._marks_as_read(found, spans, read, locks.refresh)
        first, kept = plan(spans, places, end, size) if places else (size, [])
        if places:
            self._check_seams(spans.starts[places[0]], kept, locks.refresh)
        known = bool(rows) and end == spans.end >= SMALLEST
        known = known and self._is_all_in_place(spans, found, locks.refresh)
        base = self._keep_base(spans, places, locks.refresh)
        # Nobody asked for the marks: without them, if it cannot be done with them.
        for edits in ([base + marks] if marks else []) + ([base] if rows else []):
            marked = len(edits) > len(base)
            if not self._stay_apart(spans, places, (first, kept), edits, marked, locks.refresh):
                continue
            if not locks.held():
                raise TemporaryFailure(NOT_DELETED, f"{spool.path}.lock: was removed by another")
            if self._write(first, kept, edits, size, locks, marked and bool(rows)):
                break
        else:
            return
        # A field that was put in has moved what is behind it.
        left = self._left_by(spans, places, end) if known and not edits else None
        self._set_times(has_new_mail=size > self._spans.end or self._had_new_mail)
        if left is not None:
            self._left = left._replace(key=key_of(spool.stat()))

    def _write(
        self,
        first: int,
        kept: list[Range],
        edits: list[Edit],
        size: int,
        locks: SpoolLocks,
        can_do_without: bool,
    ) -> bool:
        """Whether the spool was rewritten; with `can_do_without` it need not, where it would grow.

        A tail that grows must have a separator behind it, before and after.
        """
        spool = self._spool
        first, pieces = edited(first, kept, edits)
        journal = self._store.journals.of(spool.path)
        change = journal.replace_tail
        if length_of(pieces) >= size - first:
            change = journal.rewrite_tail
            last = pieces[-1]
            if isinstance(last, bytes) or not (self._is_over(size) and self._is_over(last[1])):
                return False
        self._committed = True
        self._unsaved = False
        self._store.recent.forget(spool.path)
        self._index.forget()
        with told(spool.path, NOT_WRITTEN, NOT_WRITTEN):
            try:
                change(spool.fd, first, pieces, size, locks.refresh, locks.held)
            except NotCommitted:
                if can_do_without:
                    return False
                raise
        return True

    def _is_sure(self, found: os.stat_result, index: int) -> bool:
        """Whether message `index` needs no look: the file is as it was, and was scanned there."""
        return self._settled and key_of(found) == self._key and index >= self._proven

    def _look_again(self, found: os.stat_result, read: list[int], refresh: Refresh) -> Spans:
        """Where all messages are now, if a look at those to be marked would not show it.

        Any octet may make a Content-Length true or false, and so move the ends of messages.
        """
        if not self._store.form.lengths or self._is_sure(found, read[0]):
            return self._spans
        try:
            return self._scan(0, found.st_size, refresh)
        except NotAnMbox as fault:
            raise TemporaryFailure(CHANGED, f"{self._spool.path}: {fault}") from None

    def _marks_as_read(
        self, found: os.stat_result, spans: Spans, read: list[int], refresh: Refresh
    ) -> list[Edit]:
        """What to change for messages that were read, those that are found again for certain."""
        if spans is self._spans:
            read = [
                index
                for index in read
                if self._is_sure(found, index) or self._is_same(index, refresh)
            ]
        elif not (self._store.form.lengths and self._has_grown(spans, read, refresh)):
            try:
                read = self._find_again(spans, read, refresh)
            except TemporaryFailure:
                return []
        marks = []
        for index in read:
            header = header_of(self._spool, spans, index, refresh)
            if spans.lengths[index] and len(header) < LONGEST_HEADER:
                place = spans.offset(index)
                crlf = self._spool.read(place - 2, place) == b"\r\n"
                mark = as_read(spans.starts[index], header, place, b"\r\n" if crlf else b"\n")
                marks += [mark] if mark else []
        return marks

    def _is_all_in_place(self, spans: Spans, found: os.stat_result, refresh: Refresh) -> bool:
        """Whether not only those to delete, but all of `spans` are where they were found.

        Where the last one is, nothing before it was cut out (`tail_of`).
        """
        return (
            spans is not self._spans
            or key_of(found) == self._believed
            or self._is_same(len(spans) - 1, refresh)
        )

    def _left_by(self, spans: Spans, rows: list[int], end: int) -> _Left | None:
        """What is left, for the index: nobody else has written since the locks were taken."""
        left = spans.without(rows, end)
        # Without a separator where it should be, where the next message begins is not certain.
        if left.end < SMALLEST or not self._is_over(left.end):
            return None
        ids = None
        if spans is self._spans and self.listing.identified:
            ids = self.listing.ids.without(rows)
        # Read before the times are set: reading sets one of them.
        tail = tail_of(self._spool, left.last, left.end)
        return _Left(key_of(self._spool.stat()), tail, left, ids)

    def _agree(
        self, found: os.stat_result, rows: list[int], refresh: Refresh
    ) -> tuple[Spans, list[int], int]:
        """Where the messages to delete are now, and where the last of all messages ends."""
        spans = self._spans
        if self._is_sure(found, rows[0]):
            return spans, rows, spans.end
        by_length = self._store.form.lengths
        # Any octet may make a Content-Length true or false, and so move the ends of messages.
        end = 0 if by_length else self._end_of_last(found.st_size)
        if end and all(self._is_same(index, refresh) for index in rows):
            return spans, rows, end
        self._distrust()
        try:
            spans = self._scan(0, found.st_size, refresh)
        except NotAnMbox as fault:
            raise TemporaryFailure(NOT_DELETED, f"{self._spool.path}: {fault}") from None
        if by_length and self._has_grown(spans, rows, refresh):
            return spans, rows, spans.end
        return spans, self._find_again(spans, rows, refresh), spans.end

    def _has_grown(self, spans: Spans, rows: list[int], refresh: Refresh) -> bool:
        """Whether these spans are those of the photograph, in their places, and perhaps more."""
        old = self._spans
        count = len(old)
        return (
            spans.starts[:count] == old.starts
            and spans.sizes[:count] == old.sizes
            and spans.checks[:count] == old.checks
            and all(
                hash_in(self._mark(index)) in (None, self._hash(spans, index, refresh))
                for index in rows
            )
        )

    def _end_of_last(self, size: int) -> int:
        """Where the last message ends, separator included, and new mail begins; 0: not known."""
        end = self._spans.end
        if size <= end:
            return end if size == end else 0
        end += self._store.form.gap(self._spool.read(end, end + LOOK_AHEAD))
        return end if self._begins(end) else 0

    def _find_again(self, spans: Spans, rows: list[int], refresh: Refresh) -> list[int]:
        """The same messages in a spool that was rewritten. Raises `TemporaryFailure`.

        By hash where it is known: equal copies are paired in order if there are as many as
        before. By a reused id, or else by check alone, only where that stands for one message
        before and after.
        """
        old: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        new: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        keys = [(check, self._mark(index)) for index, check in enumerate(self._spans.checks)]
        for index, key in enumerate(keys):
            old[key].append(index)
        wanted: dict[int, set[bytes]] = defaultdict(set)
        for index in rows:
            check, mark = keys[index]
            wanted[check].add(mark)
        for index, check in enumerate(spans.checks):
            for mark in self._marks_there(spans, index, wanted.get(check, set()), refresh):
                new[check, mark].append(index)
        found = []
        for index in rows:
            before, after = old[keys[index]], new[keys[index]]
            copies = len(before) > 1 and hash_in(keys[index][1]) is None
            if len(before) != len(after) or copies:
                raise TemporaryFailure(
                    NOT_DELETED, f"{self._spool.path}: message {index + 1} not found again"
                )
            found.append(after[before.index(index)])
        return sorted(found)

    def _marks_there(
        self, spans: Spans, index: int, wanted: set[bytes], refresh: Refresh
    ) -> set[bytes]:
        """Which of the marks `wanted` message `index` of a rewritten spool bears."""
        marks = wanted & {b""}
        if any(hash_in(mark) for mark in wanted):
            marks |= wanted & {self._hash(spans, index, refresh)}
        if any(mark and not hash_in(mark) for mark in wanted):
            form = self._store.uidl
            header = header_of(self._spool, spans, index, refresh)
            base = base_in(self._spool, spans, refresh) if form.wants_base else None
            marks |= wanted & {form.reused(header, base) or b""} - {b""}
        return marks

    def _check_seams(self, first: int, kept: list[tuple[int, int]], refresh: Refresh) -> None:
        """What is kept and what is not begin as messages do. Raises `TemporaryFailure`."""
        path = self._spool.path
        if not self._may_begin(first):
            raise TemporaryFailure(NOT_DELETED, f"{path}: no message may begin at {first}")
        for offset in (first, *(start for start, _ in kept)):
            refresh()
            if not self._begins(offset):
                raise TemporaryFailure(NOT_DELETED, f"{path}: no message begins at {offset}")

    def _stay_apart(
        self,
        spans: Spans,
        rows: list[int],
        left: tuple[int, list[Range]],
        edits: list[Edit],
        marked: bool,
        refresh: Refresh,
    ) -> bool:
        """Whether the messages left, with `edits` made, will begin and end as they do now.

        A Content-Length that is false now may point at a message when others are gone, or are
        longer. It would be believed then and hide all between, so what would be left is looked at
        first. Raises `TemporaryFailure` where the edits are not `marked`: then it is the deletion.
        """
        refused = any(altered & REFUSED for altered in spans.altered)
        if not self._store.form.lengths or not (refused or edits):
            return True
        first, pieces = edited(*left, edits)
        gone = set(rows)
        kept = [index for index in range(len(spans)) if index not in gone]
        found = self._scan_pieces([(0, first), *pieces], refresh)
        if all(
            list(have) == [had[index] for index in kept]
            for have, had in ((found.checks, spans.checks), (found.sizes, spans.sizes))
        ):
            return True
        why = f"{self._spool.path}: a Content-Length that is not true would join messages"
        what = "say kind=mboxo, or remove that field"
        if not marked:
            raise TemporaryFailure(NOT_DELETED, f"{why} if others were deleted; {what}")
        log.warn("{why} if Status were written; {what}", why=why, what=what)
        return False

    def _keep_base(self, spans: Spans, rows: list[int], refresh: Refresh) -> list[Edit]:
        """What to put in where the base of the UIDs would go with the file's first message.

        Other messages' ids are made of it, so it goes to the first one that stays, as Dovecot and
        c-client do. It takes no more octets than the message that held it leaves free.
        """
        wanted = self._store.uidl.wants_base and not spans.hidden
        if not wanted or not rows or rows[0] or len(rows) == len(spans):
            return []
        base = base_in(self._spool, spans, refresh)
        index = next(index for index in range(len(spans)) if index not in rows)
        place = spans.offset(index)
        if base and may_insert(self._spool.read(place, place + 1)):
            return [Edit(spans.starts[index], place, place, base.field)]
        return []

    def _set_times(self, has_new_mail: bool) -> None:
        """Keep "you have new mail" as true as it was: it is when atime is before mtime.

        The time of modification stays as it is, since others notice changes by it.
        """
        with suppress(OSError):  # only the file's owner may
            found = self._spool.stat()
            mtime = found.st_mtime_ns
            if found.st_size and has_new_mail:
                atime = min(self._atime, mtime - 1_000_000_000)
            else:
                atime = max(time.time_ns(), mtime)
            os.utime(self._spool.fd, ns=(atime, mtime))

    def release(self) -> None:
        """As `IBlockingMaildrop.release`."""
        try:
            if self._maybe_spool and self._maybe_spool.fd >= 0:
                self._leave_traces()
        except Exception:
            # What is kept for later is worth nothing beside the lock: its user could not log in.
            log.failure("{path}: no index of it", path=self._spool.path)
        finally:
            if self._maybe_spool:
                self._maybe_spool.close()
            self._session.release()

    def _leave_traces(self) -> None:
        """For the sessions to come."""
        if not self._settled and not self._committed:
            with suppress(OSError):
                self._settle()
                self._keep()
        if not self.quick_release:
            self._save()

    @property
    def quick_release(self) -> bool:
        """As `IBlockingMaildrop.quick_release`: there is no index to be written."""
        if self._left is not None:
            return False
        return (
            not self._unsaved
            or self._doubted
            or self._believed is None
            or self._end < SMALLEST
            or not self.listing.measured
            or self._reading_locks != self._store.locks
        )

    def _save(self) -> None:
        if self._left is not None:
            # What was written just now need not show in the key: nothing of it is proven.
            key, tail, spans, ids = self._left
            self._index.save(key, False, len(spans), tail, spans, ids)
        elif self._believed is not None:
            with suppress(OSError):
                tail = tail_of(self._spool, self._spans.last, self._end)
                if key_of(self._spool.stat()) != self._believed:
                    return  # the tail may be another one than was scanned
                ids = self.listing.ids if self.listing.identified else None
                self._index.save(
                    self._believed, self._settled, self._proven, tail, self._spans, ids
                )


class _Left(NamedTuple):
    """What a commit has left of the spool."""

    key: Key
    tail: bytes
    spans: Spans
    ids: Ids | None


def plan(spans: Spans, rows: list[int], end: int, size: int) -> tuple[int, list[tuple[int, int]]]:
    """What to do to a spool of `size` octets to take out messages `rows`, in ascending order.

    Gives the offset from which it changes, and the ranges behind it that are kept. A message goes
    with its separator; `end` is where the last message ends and new mail begins.
    """
    kept = []
    for index, following in zip(rows, [*rows[1:], len(spans)], strict=True):
        start = spans.starts[index + 1] if index + 1 < len(spans) else end
        stop = spans.starts[following] if following < len(spans) else size
        if start < stop:
            kept.append((start, stop))
    if not kept and rows[0] == 0 and not spans.hidden:
        return 0, kept  # only empty lines would be left
    return spans.starts[rows[0]], kept
