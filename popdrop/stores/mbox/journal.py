"""The redo journal: replaces the end of a spool from an offset on, all or nothing, in place.

Knows nothing of mbox, and touches files through one `Files` only. What is kept of the end (P) is
first written to a journal and synced; the journal's rename to its final name is the commit point.
From then on the work can be done again after any crash: P is written to its place, the spool is
cut off behind it, the journal is made void and removed. Both spool locks are held all the while,
at recovery too. Between crash and recovery others may append to the spool, and may rewrite it.

A truncate may reach the disk in two steps: the rest of the last block is zeroed while the old size
still stands (decision 3). Sums of each sector up to the end of that block tell such a state from
any other. So even P of no octets has a journal, unless the cut is at the start of a block.

A tail that does not become shorter needs more care: there is nothing behind P by which another's
rewriting would be noticed, and mail may be appended while the file grows. Its journal holds what
was there before, too, and room is made with empty lines first: mail behind them shows where they
end. Until the room is there the update can be taken back, and behind that it can be ended.

Counterparts are SQLite's journal (void by its length, checked by sums) and, for recovery in place,
c-client's careful order; no POP3 server has one. Over 400 lines since writing, judging and
repeating one journal are one argument.
"""

from __future__ import annotations

import errno
import hmac
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from enum import Enum
from hashlib import sha256
from itertools import pairwise
from secrets import token_bytes, token_hex
from types import TracebackType
from typing import Final, NamedTuple, Protocol

from twisted.logger import Logger

from popdrop.errors import PermanentFailure, TemporaryFailure
from popdrop.values import Secret

log = Logger()

MAGIC: Final = b"popdropJ"
VERSION: Final = 1
GROWING: Final = 2
"""The version of journals whose tail does not become shorter."""
HEADER: Final = 4096
"""Octets of the header, sums and HMAC in; P follows."""

BLOCK: Final = 1 << 20
"""Octets in memory at a time."""
SECTOR: Final = 512
"""Octets that a disk writes whole or not at all."""
LARGEST_BLOCK: Final = 1 << 16
"""Octets of the largest block, or page, of a file system."""

SUFFIX: Final = ".popdrop"
NEW: Final = ".new"
ORPHAN: Final = ".orphan-"
KEY_OCTETS: Final = 32
_UNUSED_KEY: Final = re.compile(r"\.[0-9a-f]{16}")

_VERSIONED: Final = struct.Struct(">8sI")
_SUM_OCTETS: Final = 16
_SUMS: Final = LARGEST_BLOCK // SECTOR * _SUM_OCTETS
_FIELDS: Final = struct.Struct(f">8sI5Q32s32s32s{_SUMS}sH")
_MAC_OCTETS: Final = 32
_LONGEST_PATH: Final = HEADER - _FIELDS.size - _MAC_OCTETS

# Not EROFS: the spool lies on the same file system and could not be written either.
_ELSEWHERE: Final = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAKE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_FILLER: Final = b"\n"
_ROOM: Final = b"\n\0"
"""What may be found where room was made: a power cut may leave NUL there."""

LEFT: Final = "maildrop has an unfinished update, try again later"
NEWER: Final = "maildrop has an unfinished update of another version"
NO_KEY: Final = "maildrop cannot be changed, its journal key is refused"

Range = tuple[int, int]
"""Offsets of the first octet and of the one behind the last, 0-based."""

Piece = Range | bytes
"""A range of the spool, or octets that are put in as they are."""

_Source = tuple[int, int, int] | bytes
"""What P is made of: a range of a descriptor, or octets."""

Refresh = Callable[[], None]


class NotCommitted(OSError):
    """The spool is as it was, and will stay so. `errno` is that of the first failure.

    `ESTALE`: the spool has another size than told, or its locks were lost.
    """


class Unfinished(TemporaryFailure):
    """The update could not be ended; the next recovery ends it. Nothing is lost."""


class Untrusted(TemporaryFailure):
    """What lies at the journal's name is none of our journals. It is left alone (decision 1)."""


class Unsupported(PermanentFailure):
    """The journal is of another version of the format (decision 2)."""


class BadKey(PermanentFailure):
    """The file with the journals' key cannot be trusted or is damaged."""


class _Damaged(Exception):
    """A journal of ours that is incomplete or does not fit its sums."""


class Outcome(Enum):
    """What a recovery did about one journal."""

    DISCARDED = "discarded"
    """It was never committed, or void already, or it could be taken back."""
    FINISHED = "finished"
    """The update was ended (R2)."""
    FINISHED_WITH_MAIL = "finished with new mail"
    """The same, and mail that came since the crash was moved down behind it."""
    DONE = "done"
    """The update had ended already (R3)."""
    ORPHANED = "orphaned"
    """The spool is another one now: what it lacked was appended, the journal kept aside (R4)."""
    DAMAGED = "damaged"
    """The journal was kept aside and not used."""


class Recovered(NamedTuple):
    """`aside` is where the journal was kept, `appended` counts octets that R4 appended."""

    outcome: Outcome
    journal: str
    aside: str | None = None
    appended: int = 0


class Leftover(NamedTuple):
    """A file of a journal. `kind` is `journal`, `new` or `orphan`.

    `spool` is the path of the spool it belongs to, `None` where that cannot be told.
    """

    path: str
    kind: str
    spool: str | None


class Files:
    """The file calls made here: those of `os`. Tests put others in their place."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    fstat = staticmethod(os.fstat)
    lstat = staticmethod(os.lstat)
    pread = staticmethod(os.pread)
    pwrite = staticmethod(os.pwrite)
    fsync = staticmethod(os.fsync)
    ftruncate = staticmethod(os.ftruncate)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    mkdir = staticmethod(os.mkdir)
    listdir = staticmethod(os.listdir)
    geteuid = staticmethod(os.geteuid)


class Kept:
    """P of a journal, to be read. Offsets are within P; all may raise `OSError`."""

    def __init__(self, files: Files, fd: int, length: int) -> None:
        self._files = files
        self._fd = fd
        self.length = length

    def blocks(self, start: int, stop: int, size: int = BLOCK) -> Iterator[bytes]:
        """The octets from `start` to `stop`, in blocks of at most `size`."""
        return _blocks(self._files, self._fd, HEADER + start, HEADER + stop, size)


class Format(Protocol):
    """What recovery has to know of the spool's format.

    Both are called under the spool locks, and call `refresh` often.
    """

    def arrived(self, fd: int, start: int, kept: Kept, refresh: Refresh) -> bool:
        """Whether spool `fd` holds nothing but new mail from `start` to its end.

        That is: a separator line stands there, and no message behind it equals one of `kept`.
        """

    def missing(self, fd: int, kept: Kept, refresh: Refresh) -> tuple[bytes, list[Range]]:
        """The messages of `kept` that spool `fd` lacks, as multisets (decision 5).

        Ranges of `kept`, each with its separator, and what must be written before them (an empty
        line, where the spool does not end with one). A message that is torn off at the spool's
        end, by a crash while it was appended, is lacking.
        """


def _unfinished(path: str, error: OSError) -> Unfinished:
    code = errno.errorcode.get(error.errno or 0, "?")
    return Unfinished(LEFT, f"{path}: {code} {error.strerror}")


def _length_of(kept: list[Piece], first: int, size: int) -> int:
    """Octets of the pieces; `ValueError` where a range is not of the tail."""
    length = 0
    for piece in kept:
        if isinstance(piece, bytes):
            length += len(piece)
        elif first <= piece[0] < piece[1] <= size:
            length += piece[1] - piece[0]
        else:
            raise ValueError("not a range of the tail")
    return length


def _nothing() -> None:
    return None


def _always() -> bool:
    return True


def _blocks(files: Files, fd: int, start: int, stop: int, size: int = BLOCK) -> Iterator[bytes]:
    """All octets from `start` to `stop`; `OSError` where the file ends before."""
    while start < stop:
        block = files.pread(fd, min(size, stop - start), start)
        if not block:
            raise OSError(errno.EIO, "file became shorter while it was read")
        yield block
        start += len(block)


def _pieces(octets: bytes, start: int) -> list[bytes]:
    """What stands at offset `start` of a file, sector by sector."""
    stop = start + len(octets)
    edges = [start, *range(start // SECTOR * SECTOR + SECTOR, stop, SECTOR), stop]
    return [octets[a - start : b - start] for a, b in pairwise(edges) if a < b]


def _chunks(start: int, stop: int) -> Iterator[Range]:
    """The range in parts of at most `BLOCK`, none of which divides a sector."""
    while start < stop:
        end = min(start - start % BLOCK + BLOCK, stop)
        yield start, end
        start = end


def _replaced(piece: bytes, new: bytes) -> int:
    """How many octets of `new` stand in `piece`, from its start on."""
    for number, (there, wanted) in enumerate(zip(piece, new, strict=True)):
        if there != wanted:
            return number
    return len(piece)


def _is_part_way(piece: bytes, old: bytes, new: bytes) -> bool:
    """Whether `piece` is a sector in which `new` has replaced `old`, maybe in part or not yet."""
    if piece == old:
        return True
    same = _replaced(piece, new)
    return piece[same:] == old[same:]


def _is_room(piece: bytes, new: bytes) -> bool:
    """The same where `old` is room that was made."""
    return not piece[_replaced(piece, new) :].strip(_ROOM)


def _octets(files: Files, source: _Source) -> Iterable[bytes]:
    return [source] if isinstance(source, bytes) else _blocks(files, *source)


def _write(files: Files, fd: int, octets: bytes, offset: int) -> int:
    """Write all of `octets`; gives the offset behind them."""
    rest = memoryview(octets)
    while rest:
        written = files.pwrite(fd, rest, offset)
        if not written:
            raise OSError(errno.EIO, "nothing was written")
        offset += written
        rest = rest[written:]
    return offset


def _block_end(offset: int, size: int) -> int:
    """The end of the largest block that may hold `offset`, in a file of `size` octets."""
    return min(offset - offset % LARGEST_BLOCK + LARGEST_BLOCK, size)


def _sum(sector: bytes) -> bytes:
    return sha256(sector).digest()[:_SUM_OCTETS]


class _Sums(NamedTuple):
    """Of what stands behind the place of P: of each sector in the block of the cut, then of all
    the rest.
    """

    sectors: bytes
    rest: bytes


class _Rest(Enum):
    """What became of the octets behind the place of P since the commit.

    `ZEROED` by a torn cut: each sector in the block of the cut is NUL or as it was; what lies
    behind that block is as it was, or NUL from one end to the other.
    """

    SAME = "same"
    ZEROED = "zeroed"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class _Header:
    """`first` is where P goes, `size` that of the spool at the commit, all in octets.

    `prefix` and `kept` are SHA-256 of the spool before `first` and of P. `dev` is for the log
    alone: it changes over reboots (decision 4).
    """

    dev: int
    ino: int
    first: int
    size: int
    length: int
    prefix: bytes
    kept: bytes
    rest: bytes
    sectors: bytes
    spool: bytes

    @property
    def end(self) -> int:
        """Where P ends in the spool, and the spool after it."""
        return self.first + self.length

    @property
    def grows(self) -> bool:
        """Whether the spool does not become shorter.

        What P replaces stands behind P in the journal then, and `rest` is its SHA-256.
        """
        return self.end >= self.size

    def pack(self, key: Secret) -> bytes:
        *fields, path = astuple(self)
        version = GROWING if self.grows else VERSION
        text: bytes = _FIELDS.pack(MAGIC, version, *fields, len(path)) + path
        text = text.ljust(HEADER - _MAC_OCTETS, b"\0")
        return text + _mac(key, text)

    @classmethod
    def unpack(cls, octets: bytes, key: Secret, path: str) -> _Header:
        """Raises `_Damaged`, `Untrusted` and `Unsupported`."""
        if len(octets) < _VERSIONED.size or not octets.startswith(MAGIC):
            raise _Damaged("no journal")
        version = _VERSIONED.unpack_from(octets)[1]
        if version not in (VERSION, GROWING):
            raise Unsupported(NEWER, f"{path}: journal of version {version}")
        if len(octets) < HEADER:
            raise _Damaged("header is cut off")
        text, mac = octets[:-_MAC_OCTETS], octets[-_MAC_OCTETS:]
        if not hmac.compare_digest(_mac(key, text), mac):
            raise Untrusted(LEFT, f"{path}: not sealed by the key of this server")
        *fields, length = _FIELDS.unpack_from(text)
        header = cls(*[*fields[2:], text[_FIELDS.size : _FIELDS.size + length]])
        if header.grows != (version == GROWING):
            raise _Damaged("version does not fit")
        return header


def _mac(key: Secret, text: bytes) -> bytes:
    return hmac.digest(key.reveal(), text, "sha256")


def _distrusted(found: os.stat_result, uid: int) -> str:
    """What speaks against a file being a journal of ours; empty if nothing does."""
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_uid != uid:
        return f"belongs to uid {found.st_uid}"
    if found.st_nlink != 1:
        return f"has {found.st_nlink} links"
    if stat.S_IMODE(found.st_mode) != 0o600:
        return f"has mode {stat.S_IMODE(found.st_mode):04o}, not 0600"
    return ""


class _Place(NamedTuple):
    """Where a journal may lie."""

    folder: str
    journal: str

    @property
    def new(self) -> str:
        return self.journal + NEW

    @classmethod
    def of(cls, folder: str, name: str) -> _Place:
        return cls(folder, os.path.join(folder, f".{name}{SUFFIX}"))


class _Record:
    """An open journal and its folder; closes both."""

    def __init__(self, files: Files, place: _Place) -> None:
        self.files = files
        self.place = place
        self.fd = -1
        self.folder = files.open(place.folder or ".", _FOLDER)

    def __enter__(self) -> _Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        for fd in (self.fd, self.folder):
            if fd >= 0:
                with suppress(OSError):
                    self.files.close(fd)
        self.fd = self.folder = -1

    def sync_folder(self) -> None:
        try:
            self.files.fsync(self.folder)
        except OSError as error:
            # Some file systems cannot; PostgreSQL goes on there, too.
            if error.errno != errno.EINVAL:
                raise

    def clear_new(self) -> bool:
        """Remove a journal that was never published; whether there was one of ours (R1)."""
        path = self.place.new
        try:
            found = self.files.lstat(path)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode) or found.st_uid != self.files.geteuid():
            log.warn("{path} is none of our files", path=path)
            return False
        self.unlink(path)
        return True

    def open_trusted(self) -> bool:
        """Open the journal; whether there is one. Raises `Untrusted` (decision 1)."""
        path, uid = self.place.journal, self.files.geteuid()
        try:
            # Before it is opened: to open a device may do something.
            fault = _distrusted(self.files.lstat(path), uid)
            if not fault:
                self.fd = self.files.open(path, _WRITE)
                fault = _distrusted(self.files.fstat(self.fd), uid)
        except FileNotFoundError:
            return False
        if fault:
            raise Untrusted(LEFT, f"{path}: {fault}")
        return True

    def is_at(self, path: str) -> bool:
        """Whether this very file bears that name."""
        try:
            there, here = self.files.lstat(path), self.files.fstat(self.fd)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def void(self) -> None:
        """Remove the journal, so that it has no effect even if it comes back (decision 6)."""
        self.files.ftruncate(self.fd, 0)
        self.files.fsync(self.fd)
        self.unlink(self.place.journal)

    def unlink(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.files.unlink(path)
        self.sync_folder()

    def publish(self) -> None:
        """The commit point."""
        self.files.rename(self.place.new, self.place.journal)
        self.sync_folder()

    def keep_aside(self) -> str:
        """Give the journal an orphan's name, without overwriting; gives that."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        for number in range(1, 10000):
            aside = f"{self.place.journal}{ORPHAN}{moment}-{number}"
            with suppress(FileExistsError):
                # The name is taken before it is renamed to: a second link would be distrusted.
                self.files.close(self.files.open(aside, _MAKE, 0o600))
                self.files.rename(self.place.journal, aside)
                self.sync_folder()
                return aside
        raise FileExistsError(errno.EEXIST, "too many orphans", self.place.journal)


def _sync_folder(files: Files, path: str) -> None:
    folder = files.open(path or ".", _FOLDER)
    try:
        files.fsync(folder)
    finally:
        files.close(folder)


class Journals:
    """All journals of one store, and their key.

    `state_dir` is a private folder that exists: the key lies there as `journal.key`, made at the
    first use, and `journal/` holds journals that can be made neither beside their spools nor in
    `folder`, a private folder, where one is given. `former` are folders that were given once:
    journals are looked for there, too.
    """

    def __init__(
        self,
        state_dir: str,
        files: Files | None = None,
        folder: str = "",
        former: tuple[str, ...] = (),
    ) -> None:
        self._files = files or Files()
        self.folder = os.path.join(state_dir, "journal")
        self.folders = (*filter(None, [folder]), self.folder)
        """Where journals are made that cannot be made beside their spools, in order."""
        self.former = tuple(each for each in former if each not in self.folders)
        self.elsewhere = self.folders + self.former
        """Where journals may lie that do not lie beside their spools."""
        self.key_path = os.path.join(state_dir, "journal.key")
        self._key: Secret | None = None

    def of(self, spool: str) -> Journal:
        """The journal of the spool at this path, which is resolved (`locks.resolved`)."""
        return Journal(spool, self.folders, self.key, self._files, self.former)

    def key(self) -> Secret:
        """The key, made if there is none. Raises `BadKey`, and `OSError`."""
        if self._key is None:
            key = self._load_key()
            if key is None:
                self._make_key()
                key = self._load_key()
            if key is None:
                raise BadKey(NO_KEY, f"{self.key_path}: vanished")
            # Not only by the one who made it: he may have been killed before.
            _sync_folder(self._files, os.path.dirname(self.key_path))
            self._key = key
        return self._key

    def _load_key(self) -> Secret | None:
        files = self._files
        try:
            fd = files.open(self.key_path, _READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise BadKey(NO_KEY, f"{self.key_path}: is a symbolic link") from None
        try:
            found = files.fstat(fd)
            fault = ""
            if not stat.S_ISREG(found.st_mode):
                fault = "is no regular file"
            elif found.st_uid != files.geteuid():
                fault = f"belongs to uid {found.st_uid}"
            elif stat.S_IMODE(found.st_mode) != 0o600:
                fault = f"has mode {stat.S_IMODE(found.st_mode):04o}, not 0600"
            octets = b"" if fault else files.pread(fd, KEY_OCTETS + 1, 0)
        finally:
            files.close(fd)
        if not fault and len(octets) != KEY_OCTETS:
            fault = f"does not hold {KEY_OCTETS} octets; restore it from the backup"
        if fault:
            raise BadKey(NO_KEY, f"{self.key_path}: {fault}")
        return Secret(octets)

    def _make_key(self) -> None:
        """Whole or not at all, and never over another."""
        files = self._files
        temporary = f"{self.key_path}.{token_hex(8)}"
        fd = files.open(temporary, _MAKE, 0o600)
        try:
            _write(files, fd, token_bytes(KEY_OCTETS), 0)
            files.fsync(fd)
            # Not found: another has made the key, and swept.
            with suppress(FileExistsError, FileNotFoundError):
                files.link(temporary, self.key_path)
        finally:
            files.close(fd)
            with suppress(FileNotFoundError):
                files.unlink(temporary)

    def sweep(self) -> None:
        """Remove what those left who were killed while they made the key. Raises `OSError`."""
        folder, name = os.path.split(self.key_path)
        if not self._is_there(self.key_path):
            return  # somebody may be making it
        for each in self._files.listdir(folder):
            if _UNUSED_KEY.fullmatch(each.removeprefix(name)):
                with suppress(FileNotFoundError):
                    self._files.unlink(os.path.join(folder, each))

    def _is_there(self, path: str) -> bool:
        try:
            self._files.lstat(path)
        except FileNotFoundError:
            return False
        return True

    def leftovers(self, folder: str) -> list[Leftover]:
        """The files of journals in a folder: one of spools, or one of `elsewhere`.

        An empty list where there is no such folder. Raises `OSError`. To be recovered, a journal
        needs its spool's locks; the file may be gone by then.
        """
        found = []
        with suppress(FileNotFoundError):
            for name in sorted(self._files.listdir(folder)):
                stem, suffix, rest = name[1:].rpartition(SUFFIX)
                kind = "journal" if not rest else "new" if rest == NEW else "orphan"
                known = rest in ("", NEW) or rest.startswith(ORPHAN)
                if name.startswith(".") and stem and suffix and known:
                    path = os.path.join(folder, name)
                    found.append(Leftover(path, kind, self._spool_of(folder, stem, path)))
        return found

    def _spool_of(self, folder: str, stem: str, path: str) -> str | None:
        if folder not in self.elsewhere:
            return os.path.join(folder, stem)
        with suppress(OSError, _Damaged, Untrusted, Unsupported, BadKey):
            if not _distrusted(self._files.lstat(path), self._files.geteuid()):
                fd = self._files.open(path, _READ)
                try:
                    octets = self._files.pread(fd, HEADER, 0)
                finally:
                    self._files.close(fd)
                return os.fsdecode(_Header.unpack(octets, self.key(), path).spool)
        return None


class Journal:
    """The journal of one spool: `.NAME.popdrop` beside it, or a hash's name in another folder.

    Made by `Journals.of`. Everything but `pending` wants both spool locks held, and the session
    lock.
    """

    def __init__(
        self,
        spool: str,
        folders: tuple[str, ...],
        key: Callable[[], Secret],
        files: Files | None = None,
        former: tuple[str, ...] = (),
    ) -> None:
        self._spool = os.fsencode(spool)
        self._key = key
        self._files = files or Files()
        name = sha256(self._spool).hexdigest()
        beside = _Place.of(*os.path.split(spool))
        self._usable = (beside, *(_Place.of(folder, name) for folder in folders))
        self._places = (*self._usable, *(_Place.of(folder, name) for folder in former))

    def pending(self) -> bool:
        """Whether there is something for `recover`. Two looks at names for each folder."""
        return any(
            self._exists(path) for place in self._places for path in (place.journal, place.new)
        )

    def _exists(self, path: str) -> bool:
        try:
            self._files.lstat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            return False
        return True

    def look(self) -> list[tuple[str, str]]:
        """What lies at the journal's names: paths, and what speaks against each, or nothing.

        Changes nothing; the key must be there. Raises `OSError`. Without the locks the answer may
        be old before it is given.
        """
        found = []
        for place in self._places:
            if self._exists(place.new):
                found.append((place.new, ""))
            if self._exists(place.journal):
                found.append((place.journal, self._fault(place)))
        return found

    def _fault(self, place: _Place) -> str:
        with _Record(self._files, place) as record:
            try:
                if record.open_trusted() and self._files.fstat(record.fd).st_size:
                    self._read(record, _nothing)
            except (Untrusted, Unsupported, BadKey) as refused:
                return refused.detail.removeprefix(f"{place.journal}: ")
            except _Damaged:
                pass  # a recovery keeps it aside
        return ""

    # The update

    def replace_tail(
        self,
        fd: int,
        first: int,
        kept: Iterable[Piece],
        size: int,
        refresh: Refresh = _nothing,
        held: Callable[[], bool] = _always,
    ) -> None:
        """Replace all from offset `first` by the pieces `kept`, and sync it.

        Ranges among them are of the same file and lie behind `first`; all are fewer octets than
        are there. They begin where a message does: recovery has the format read them. `size` is
        the file's, in octets. `refresh` is called often; `held` right before the commit: are the
        locks still ours? Raises `NotCommitted`, `Unfinished`, and `BadKey` (nothing has changed).
        """
        kept = list(kept)
        if _length_of(kept, first, size) >= size - first:
            raise ValueError("not pieces of a tail that becomes shorter")
        record = None
        if kept or first % LARGEST_BLOCK:
            try:
                record, header = self._commit(fd, first, kept, size, refresh, held)
            except NotCommitted:
                if kept:
                    raise
                # No space even for a header: a plain cut is all but safe, and makes space.
        if record is None:
            self._cut(fd, first, size, held)
            return
        with record:
            try:
                self._redo(record, header, fd, refresh)
            except OSError as error:
                raise _unfinished(record.place.journal, error) from error

    def rewrite_tail(
        self,
        fd: int,
        first: int,
        kept: Iterable[Piece],
        size: int,
        refresh: Refresh = _nothing,
        held: Callable[[], bool] = _always,
    ) -> None:
        """As `replace_tail`, for pieces that are as many octets as are there, or more.

        File and pieces must end with an empty line: mail that comes during a crash has to stand
        behind one. The disk needs room for the growth beside that for the journal.
        """
        kept = list(kept)
        if not _length_of(kept, first, size) >= size - first > 0:
            raise ValueError("not pieces of a tail that does not become shorter")
        record, header = self._commit(fd, first, kept, size, refresh, held)
        with record:
            try:
                try:
                    self._make_room(header, fd, refresh)
                except OSError as error:
                    self._take_back(record, header, fd, refresh)
                    raise NotCommitted(error.errno, error.strerror) from error
                self._overwrite(record, header, fd, refresh)
                record.void()
            except NotCommitted:
                raise
            except OSError as error:
                raise _unfinished(record.place.journal, error) from error

    def _blocked(self) -> bool:
        return any(self._exists(place.journal) for place in self._places)

    def _cut(self, fd: int, first: int, size: int, held: Callable[[], bool]) -> None:
        try:
            if self._blocked():
                raise FileExistsError(errno.EEXIST, "a journal is there already")
            self._check_ready(fd, size, held)
            self._files.ftruncate(fd, first)
        except OSError as error:
            raise NotCommitted(error.errno, error.strerror) from error
        try:
            self._files.fsync(fd)
        except OSError as error:
            raise _unfinished(os.fsdecode(self._spool), error) from error

    def _check_ready(self, fd: int, size: int, held: Callable[[], bool]) -> None:
        if self._files.fstat(fd).st_size != size or not held():
            raise OSError(errno.ESTALE, "spool was changed or its locks were lost")

    def _commit(
        self,
        fd: int,
        first: int,
        kept: list[Piece],
        size: int,
        refresh: Refresh,
        held: Callable[[], bool],
    ) -> tuple[_Record, _Header]:
        """Up to the commit point, beside the spool or else in another folder."""
        sources: list[_Source] = [
            piece if isinstance(piece, bytes) else (fd, *piece) for piece in kept
        ]
        for number, place in enumerate(self._usable):
            try:
                if self._blocked():
                    raise FileExistsError(errno.EEXIST, "a journal is there already")
                if number:
                    self._check_folder(place.folder)
                record, header = self._prepare(place, fd, first, size, sources, refresh)
                try:
                    self._check_ready(fd, size, held)
                    record.publish()
                except OSError as error:
                    self._undo(record, error)
                    raise
            except OSError as error:
                last = place is self._usable[-1]
                if last or (number == 0 and error.errno not in _ELSEWHERE):
                    raise NotCommitted(error.errno, error.strerror, place.journal) from error
            else:
                return record, header
        raise AssertionError("there is a last place")

    def _check_folder(self, folder: str) -> None:
        """Make it if need be. Nobody else may put in or take out journals there."""
        with suppress(FileExistsError):
            self._files.mkdir(folder, 0o700)
        found = self._files.lstat(folder)
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != self._files.geteuid()
            or stat.S_IMODE(found.st_mode) & 0o077
        ):
            raise PermissionError(errno.EPERM, "not a private folder of ours", folder)
        _sync_folder(self._files, os.path.dirname(folder))

    def _prepare(
        self,
        place: _Place,
        fd: int,
        first: int,
        size: int,
        sources: list[_Source],
        refresh: Refresh,
    ) -> tuple[_Record, _Header]:
        """Write a whole journal under its new name, and sync it. On `OSError` it is removed."""
        files, key = self._files, self._key()
        if len(self._spool) > _LONGEST_PATH:
            raise OSError(errno.EINVAL, "path of the spool is too long")
        record = _Record(files, place)
        try:
            record.clear_new()
            record.fd = files.open(place.new, _MAKE, 0o600)
            if _distrusted(files.fstat(record.fd), files.geteuid()):
                raise OSError(errno.EPERM, "a journal made here would not be trusted")
            kept = sha256()
            end = HEADER
            for source in sources:
                for block in _octets(files, source):
                    kept.update(block)
                    end = _write(files, record.fd, block, end)
                    refresh()
            length = end - HEADER
            grows = first + length >= size
            prefix = self._hash(fd, 0, first, refresh)
            if grows:
                sums = _Sums(b"", self._copy_old(record.fd, end, fd, first, size, refresh))
            else:
                sums = self._sums(fd, first + length, size, refresh)
            spool = files.fstat(fd)
            header = _Header(
                dev=spool.st_dev,
                ino=spool.st_ino,
                first=first,
                size=size,
                length=length,
                prefix=prefix,
                kept=kept.digest(),
                rest=sums.rest,
                sectors=sums.sectors,
                spool=self._spool,
            )
            _write(files, record.fd, header.pack(key), 0)
            files.fsync(record.fd)
        except BaseException as error:
            if record.fd >= 0 and isinstance(error, OSError):
                with suppress(OSError):
                    files.unlink(place.new)
            record.close()
            raise
        return record, header

    def _undo(self, record: _Record, error: OSError) -> None:
        """Make a journal void that may have been published already."""
        with record:
            try:
                # By its descriptor: whichever of the two names it bears on the disk.
                record.files.ftruncate(record.fd, 0)
                record.files.fsync(record.fd)
            except OSError:
                raise _unfinished(record.place.journal, error) from error
            for path in record.place.new, record.place.journal:
                if record.is_at(path):
                    with suppress(OSError):
                        record.unlink(path)

    def _redo(self, record: _Record, header: _Header, fd: int, refresh: Refresh) -> None:
        """From the commit point to the end. May be repeated any number of times."""
        files = self._files
        self._overwrite(record, header, fd, refresh)
        if files.fstat(fd).st_size != header.size:
            raise OSError(errno.ESTALE, "mail was delivered without a lock")
        files.ftruncate(fd, header.end)
        files.fsync(fd)
        record.void()

    def _overwrite(self, record: _Record, header: _Header, fd: int, refresh: Refresh) -> None:
        """Put P in its place, on the disk: before a cut, so that "cut off" means that it is."""
        position = header.first
        for block in Kept(self._files, record.fd, header.length).blocks(0, header.length):
            position = _write(self._files, fd, block, position)
            refresh()
        self._files.fsync(fd)

    # A tail that does not become shorter

    def _copy_old(
        self, journal: int, at: int, fd: int, first: int, size: int, refresh: Refresh
    ) -> bytes:
        """Write what P will replace to offset `at` of the journal; gives its hash."""
        digest = sha256()
        for block in _blocks(self._files, fd, first, size):
            digest.update(block)
            at = _write(self._files, journal, block, at)
            refresh()
        return digest.digest()

    def _make_room(self, header: _Header, fd: int, refresh: Refresh) -> None:
        """Lengthen the spool by empty lines, on the disk."""
        if self._files.fstat(fd).st_size != header.size:
            raise OSError(errno.ESTALE, "mail was delivered without a lock")
        for start, stop in _chunks(header.size, header.end):
            _write(self._files, fd, _FILLER * (stop - start), start)
            refresh()
        if header.end > header.size:
            self._files.fsync(fd)

    def _take_back(self, record: _Record, header: _Header, fd: int, refresh: Refresh) -> None:
        """Take the room away again, from before the mail behind it, and void the journal."""
        files = self._files
        start, size = header.size, files.fstat(fd).st_size
        for begin, stop in _chunks(header.size, min(header.end, size)):
            octets = b"".join(_blocks(files, fd, begin, stop))
            start = stop - len(octets.lstrip(_ROOM))
            if start < stop:
                break
            refresh()
        if header.size < start < size:
            sources: list[_Source] = [(fd, start, size)]
            new, cut = self._prepare(record.place, fd, header.size, size, sources, refresh)
            with new:
                new.publish()
                self._redo(new, cut, fd, refresh)
            return
        if header.size < start:
            files.ftruncate(fd, header.size)
        # Also where there is no room to be seen: it may be on the disk still.
        files.fsync(fd)
        record.void()

    def _go_on(
        self, record: _Record, header: _Header, fd: int, size: int, refresh: Refresh
    ) -> Outcome | None:
        """Recover a growing update, in a spool not shorter now; `None` where another wrote."""
        new = Kept(self._files, record.fd, header.length)
        untouched = ours = True
        for start, stop in _chunks(header.first, header.size):
            a, b = start - header.first, stop - header.first
            found = b"".join(_blocks(self._files, fd, start, stop))
            old = b"".join(new.blocks(header.length + a, header.length + b))
            if found != old:
                untouched = False
                wanted = b"".join(new.blocks(a, b))
                ours = ours and all(
                    map(
                        _is_part_way,
                        *(_pieces(octets, start) for octets in (found, old, wanted)),
                    )
                )
            refresh()
        if ours and size >= header.end and self._has_room(new, header, fd, refresh):
            # The writer may have been killed before the journal, or the room, was on the disk; both
            # must be before anything is overwritten.
            record.sync_folder()
            self._files.fsync(fd)
            self._overwrite(record, header, fd, refresh)
            record.void()
            return Outcome.FINISHED
        if untouched:
            self._take_back(record, header, fd, refresh)
            return Outcome.DISCARDED
        return None

    def _has_room(self, kept: Kept, header: _Header, fd: int, refresh: Refresh) -> bool:
        """Whether there is nothing but room, and what P has to put there, where the spool grew."""
        for start, stop in _chunks(header.size, header.end):
            found = b"".join(_blocks(self._files, fd, start, stop))
            wanted = b"".join(kept.blocks(start - header.first, stop - header.first))
            if not all(map(_is_room, _pieces(found, start), _pieces(wanted, start))):
                return False
            refresh()
        return True

    # What stands in files

    def _hash(self, fd: int, start: int, stop: int, refresh: Refresh) -> bytes:
        digest = sha256()
        for block in _blocks(self._files, fd, start, stop):
            digest.update(block)
            refresh()
        return digest.digest()

    def _sectors(self, fd: int, start: int, size: int) -> list[bytes]:
        """The sectors from `start` to the end of the largest block or of the file."""
        stop = _block_end(start, size)
        return _pieces(b"".join(_blocks(self._files, fd, start, stop)), start)

    def _sums(self, fd: int, start: int, size: int, refresh: Refresh) -> _Sums:
        sectors = b"".join(map(_sum, self._sectors(fd, start, size)))
        rest = self._hash(fd, _block_end(start, size), size, refresh)
        return _Sums(sectors.ljust(_SUMS, b"\0"), rest)

    def _rest_of(self, header: _Header, fd: int, refresh: Refresh) -> _Rest:
        """What stands behind the place of P, in a spool of at least the old size."""
        sums = self._sums(fd, header.end, header.size, refresh)
        if sums == (header.sectors, header.rest):
            return _Rest.SAME
        for number, sector in enumerate(self._sectors(fd, header.end, header.size)):
            known = header.sectors[number * _SUM_OCTETS : (number + 1) * _SUM_OCTETS]
            if sector.strip(b"\0") and _sum(sector) != known:
                return _Rest.OTHER
        if sums.rest != header.rest:
            start = _block_end(header.end, header.size)
            for block in _blocks(self._files, fd, start, header.size):
                if block.strip(b"\0"):
                    return _Rest.OTHER
                refresh()
        return _Rest.ZEROED

    def _may_redo(self, header: _Header, fd: int, size: int, refresh: Refresh) -> bool:
        """R2 and R2b: the spool was not cut off yet, or not wholly so on the disk."""
        if size < header.size:
            return False
        rest = self._rest_of(header, fd, refresh)
        return rest is _Rest.SAME or (
            rest is _Rest.ZEROED and self._is_in_place(header, fd, refresh)
        )

    def _is_in_place(self, header: _Header, fd: int, refresh: Refresh) -> bool:
        """Whether P stands where it goes, in a spool that is long enough."""
        return self._hash(fd, header.first, header.end, refresh) == header.kept

    # Recovery

    def recover(self, fd: int | None, form: Format, refresh: Refresh = _nothing) -> list[Recovered]:
        """End what was left unfinished; what was done, an empty list for nothing.

        `fd` is the spool, open for writing and still at its path; `None` if there is no spool.
        Raises `Unfinished` (may be tried again), `Untrusted`, `Unsupported` and `BadKey`.
        """
        done = []
        for place in self._places:
            try:
                if self._exists(place.journal) or self._exists(place.new):
                    with _Record(self._files, place) as record:
                        recovered = self._recover(record, fd, form, refresh)
                    if recovered:
                        done.append(recovered)
            except OSError as error:
                raise _unfinished(place.journal, error) from error
        return done

    def _recover(
        self, record: _Record, fd: int | None, form: Format, refresh: Refresh
    ) -> Recovered | None:
        path = record.place.journal
        cleared = record.clear_new()
        if not record.open_trusted():
            return Recovered(Outcome.DISCARDED, record.place.new) if cleared else None
        if self._files.fstat(record.fd).st_size == 0:
            record.void()
            return Recovered(Outcome.DISCARDED, path)
        try:
            header = self._read(record, refresh)
        except _Damaged as fault:
            aside = record.keep_aside()
            log.error("damaged journal kept as {aside}: {fault}", aside=aside, fault=str(fault))
            return Recovered(Outcome.DAMAGED, path, aside)
        if fd is None:
            return self._orphan(record, header, None, form, refresh)
        found = self._files.fstat(fd)
        size = found.st_size
        if (
            found.st_ino == header.ino
            and size >= header.first
            and self._hash(fd, 0, header.first, refresh) == header.prefix
        ):
            if header.grows:
                outcome = size >= header.size and self._go_on(record, header, fd, size, refresh)
                if outcome:
                    return Recovered(outcome, path)
                return self._orphan(record, header, fd, form, refresh)
            if self._may_redo(header, fd, size, refresh):
                return self._finish(record, header, fd, size, refresh)
            if size >= header.end and self._is_in_place(header, fd, refresh):
                kept = Kept(self._files, record.fd, header.length)
                if size == header.end or form.arrived(fd, header.end, kept, refresh):
                    # Cut off for us to see, but maybe not yet on the disk.
                    self._files.fsync(fd)
                    record.void()
                    return Recovered(Outcome.DONE, path)
        return self._orphan(record, header, fd, form, refresh)

    def _read(self, record: _Record, refresh: Refresh) -> _Header:
        """The header of a journal that is whole. Raises `_Damaged` and what `unpack` does."""
        path = record.place.journal
        header = _Header.unpack(self._files.pread(record.fd, HEADER, 0), self._key(), path)
        # A folder may have been moved. Another's journal moved here would give away his mail.
        if os.path.basename(header.spool) != os.path.basename(self._spool):
            raise Untrusted(LEFT, f"{path}: journal of another spool")
        end = HEADER + header.length
        stop = end
        if header.grows:
            stop += header.size - header.first
        if self._files.fstat(record.fd).st_size != stop:
            raise _Damaged("of a wrong length")
        if self._hash(record.fd, HEADER, end, refresh) != header.kept:
            raise _Damaged("kept octets do not fit their sum")
        if header.grows and self._hash(record.fd, end, stop, refresh) != header.rest:
            raise _Damaged("replaced octets do not fit their sum")
        return header

    def _finish(
        self, record: _Record, header: _Header, fd: int, size: int, refresh: Refresh
    ) -> Recovered:
        """R2. Mail that came since the crash gets into a new journal, which replaces the old."""
        path = record.place.journal
        if size == header.size:
            # Its writer may have been killed between the rename and this.
            record.sync_folder()
            self._redo(record, header, fd, refresh)
            return Recovered(Outcome.FINISHED, path)
        kept: _Source = (record.fd, HEADER, HEADER + header.length)
        sources = [kept, (fd, header.size, size)]
        new, header = self._prepare(record.place, fd, header.first, size, sources, refresh)
        with new:
            # When it fails here either journal may be the one: the spool was not touched yet.
            new.publish()
            self._redo(new, header, fd, refresh)
        return Recovered(Outcome.FINISHED_WITH_MAIL, path)

    def _orphan(
        self,
        record: _Record,
        header: _Header,
        fd: int | None,
        form: Format,
        refresh: Refresh,
    ) -> Recovered:
        """R4: never overwrite what another wrote. Only append, and keep the journal."""
        path = record.place.journal
        if not header.length:
            record.void()
            return Recovered(Outcome.DISCARDED, path)
        appended = 0
        if fd is not None:
            kept = Kept(self._files, record.fd, header.length)
            before, ranges = form.missing(fd, kept, refresh)
            if ranges:
                appended = self._append(fd, before, kept, ranges, refresh)
        aside = record.keep_aside()
        log.error(
            "spool was rewritten during an unfinished update: {appended} octets appended to it, "
            "journal kept as {aside} (inode {ino}, device {dev})",
            appended=appended,
            aside=aside,
            ino=header.ino,
            dev=header.dev,
        )
        return Recovered(Outcome.ORPHANED, path, aside, appended)

    def _append(
        self, fd: int, before: bytes, kept: Kept, ranges: list[Range], refresh: Refresh
    ) -> int:
        """Append ranges of P behind the octets `before`; how many octets in all.

        As deliverers do: what cannot be written whole is taken back.
        """
        if not all(0 <= start < stop <= kept.length for start, stop in ranges):
            raise ValueError("not ranges of the journal")
        size = self._files.fstat(fd).st_size
        most = size + len(before) + sum(stop - start for start, stop in ranges)
        try:
            end = _write(self._files, fd, before, size)
            for start, stop in ranges:
                for block in kept.blocks(start, stop):
                    end = _write(self._files, fd, block, end)
                    refresh()
            self._files.fsync(fd)
        except OSError:
            with suppress(OSError):
                if self._files.fstat(fd).st_size <= most:
                    self._files.ftruncate(fd, size)
            raise
        return end - size
