"""The sidecar index: what a scan of a spool has found, kept in the state folder for the next login.

It may be deleted at any time, and is believed only where it fits: a spool whose facts (device,
inode, size, mtime, ctime) and last message are those of the index holds what it held; to one that
has grown mail was appended, and only that is scanned. Anything else, a damaged index and one of
another format or of other options: the spool is scanned anew. Written whole to another name, then
renamed; not synced, since each part has a sum.

What a login needs (count, octets, where the last message ends) is in the first octets. The rest, 31
octets a message and about 30 for its unique-id, is read when a command asks for it.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from secrets import token_hex
from typing import Final

from twisted.logger import Logger

from popdrop.listing import Ids
from popdrop.stores.mbox.spans import Spans
from popdrop.stores.mbox.spool import Key, Spool

log = Logger()

MAGIC: Final = b"popdropX"
VERSION: Final = 1
"""Of the format, and of what the scan and the unique-ids make of a spool."""

SMALLEST: Final = 256 * 1024
"""Octets of a spool below which there is no index: to scan it takes less than a millisecond."""

TAIL: Final = 4096
"""Octets of the last message's beginning and of its end that are compared."""

EAGER: Final = 1000
"""Messages up to which all of the index is read at login, about 60 KB."""

LONGEST_ID: Final = 128
"""More octets than any id has, with the number of a copy."""

_TEMPORARY: Final = ".new-"
_SETTLED: Final = 1
_HIDDEN: Final = 2
_IDENTIFIED: Final = 4

# In the machine's own order of octets, as the arrays behind it: a foreign one is another format.
# Times are signed, since there are files from before 1970.
_HEADER: Final = struct.Struct("=8sII3Q2qQQQQQQ32s32s32s32s")
_SUM: Final = 32
_ROW: Final = 8 + 2 + 8 + 8 + 4 + 1


class Damaged(Exception):
    """An index is gone, or is not what it was."""


def tail_of(spool: Spool, last: int, end: int) -> bytes:
    """A sum of the last octets before `end`, and of the first of the last message, from `last` on.

    Its From_ line and its header are no other message's. So all before it has the length it had,
    even where messages are of one length and end alike. Raises `OSError`.
    """
    near = max(end - TAIL, 0)
    head = spool.read(last, min(last + TAIL, near)) if last < near else b""
    return sha256(head + spool.read(near, end)).digest()


@dataclass(frozen=True, slots=True)
class Known:
    """What an index says of a spool.

    `key`     the spool's facts
    `settled` whether any later write shows in them
    `proven`  messages from this one on (0-based) were scanned when the spool had this key; those
              before it in an earlier state, to which mail was appended since
    `last`    where the last message begins, in octets
    `end`     where it ends with its separator
    `tail`    `tail_of` it
    """

    key: Key
    settled: bool
    proven: int
    last: int
    end: int
    tail: bytes
    hidden: bool
    count: int
    octets: int
    identified: bool
    _index: Index = field(repr=False)
    _header: bytes = field(repr=False)
    _text: int
    _sums: tuple[bytes, bytes] = field(repr=False)

    def places(self) -> Spans:
        """Where the messages lie. Raises `Damaged`."""
        starts, heads, lengths, sizes, checks, altered = columns = tuple(
            array(column.typecode, (0,)) * self.count for column in Spans().columns()
        )
        self._index.fill(self._header, 0, columns, self._sums[0])
        return Spans(starts, heads, lengths, sizes, checks, altered, self.end, self.hidden)

    def ids(self) -> Ids:
        """Their unique-ids, where `identified`. Raises `Damaged`."""
        ends: array[int] = array("I", (0,)) * self.count
        text = bytearray(self._text)
        self._index.fill(self._header, self.count * _ROW, [ends, text], self._sums[1])
        return Ids(bytes(text), ends)


class Index:
    """The index of one spool. All methods block; the session lock is held."""

    def __init__(self, path: str, form: bytes | None) -> None:
        self.path = path
        self._form = form

    def load(self) -> Known | None:
        """What it says, `None` where there is none that can be used."""
        try:
            fd = self._open()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warn("{path}: cannot be read: {why}", path=self.path, why=error.strerror)
            return None
        try:
            header = os.pread(fd, _HEADER.size, 0)
        except OSError as error:
            log.warn("{path}: cannot be read: {why}", path=self.path, why=error.strerror)
            return None
        finally:
            os.close(fd)
        known = self._read(header)
        if known is None:
            log.info("{path}: is damaged or of another form, it will be made anew", path=self.path)
        return known

    def _open(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    def _read(self, header: bytes) -> Known | None:
        if len(header) != _HEADER.size or sha256(header[:-_SUM]).digest() != header[-_SUM:]:
            return None
        (magic, version, flags, dev, ino, size, mtime, ctime, proven, last, end, count, octets,
         text, form, tail, *rest) = _HEADER.unpack(header)  # fmt: skip
        wanted = form if self._form is None else self._form
        if (magic, version, form) != (MAGIC, VERSION, wanted):
            return None
        return Known(
            key=(dev, ino, size, mtime, ctime),
            settled=flags & _SETTLED > 0,
            proven=proven,
            last=last,
            end=end,
            tail=tail,
            hidden=flags & _HIDDEN > 0,
            count=count,
            octets=octets,
            identified=flags & _IDENTIFIED > 0,
            _index=self,
            _header=header,
            _text=text,
            _sums=(rest[0][:16], rest[0][16:]),
        )

    def fill(
        self, header: bytes, start: int, buffers: Sequence[array[int] | bytearray], total: bytes
    ) -> None:
        """Read what is behind the header from `start` on, right to where it stays.

        Raises `Damaged`.
        """
        try:
            fd = self._open()
            try:
                whole = os.pread(fd, _HEADER.size, 0) == header
                digest, place = sha256(), _HEADER.size + start
                for buffer in buffers:
                    with memoryview(buffer).cast("B") as octets:
                        whole = whole and _read_whole(fd, octets, place)
                        digest.update(octets)
                        place += len(octets)
            finally:
                os.close(fd)
        except OSError as error:
            raise Damaged(f"{self.path}: {error.strerror}") from None
        if not whole or digest.digest()[:16] != total:
            raise Damaged(f"{self.path}: is damaged or another one")

    def save(
        self,
        key: Key,
        settled: bool,
        proven: int,
        tail: bytes,
        spans: Spans,
        ids: Ids | None,
    ) -> None:
        """Write it; `Known` says what it holds. What goes wrong is logged: the next login scans."""
        try:
            places = b"".join(column.tobytes() for column in spans.columns())
            named = b"" if ids is None else ids.ends.tobytes() + ids.text
            sums = sha256(places).digest()[:16] + sha256(named).digest()[:16]
            flags = _SETTLED * settled | _HIDDEN * spans.hidden | _IDENTIFIED * (ids is not None)
            text = 0 if ids is None else len(ids.text)
            header = _HEADER.pack(
                MAGIC, VERSION, flags, *key, proven, spans.last, spans.end, len(spans),
                sum(spans.sizes), text, self._form, tail, sums, b"",
            )[:-_SUM]  # fmt: skip
            self._write(header + sha256(header).digest(), places, named)
        except (OSError, struct.error) as error:
            # A number may be too large for its place: a time after the year 2262.
            why = error.strerror if isinstance(error, OSError) else str(error)
            log.warn("{path}: cannot be written: {why}", path=self.path, why=why)
            self.forget()

    def _write(self, *parts: bytes) -> None:
        temporary = f"{self.path}{_TEMPORARY}{token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(temporary, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            fd = os.open(temporary, flags, 0o600)
        try:
            try:
                for part in parts:
                    view = memoryview(part)
                    while view:
                        view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
            os.rename(temporary, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def forget(self) -> None:
        """It is not to be believed any more."""
        with suppress(OSError):
            os.unlink(self.path)


class Indexes:
    """The folder of all indexes: STATE/index.

    `form` tells the options that they depend on; with `None` those of any are read.
    """

    def __init__(self, state_dir: str, form: bytes | None) -> None:
        self.folder = os.path.join(state_dir, "index")
        self._form = None if form is None else sha256(form).digest()

    def of(self, name: str) -> Index:
        """The index of the spool whose session lock has that name."""
        return Index(os.path.join(self.folder, name), self._form)

    def sweep(self) -> None:
        """At start: remove what a killed process has left half-written. Never raises."""
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if _TEMPORARY in entry.name:
                    with suppress(OSError):
                        os.unlink(entry.path)


def _read_whole(fd: int, octets: memoryview, start: int) -> bool:
    """Fill `octets` from `start` on; the kernel may give them in pieces. False: there are fewer."""
    done = 0
    while done < len(octets):
        count = os.preadv(fd, [octets[done:]], start + done)
        if not count:
            return False
        done += count
    return True
