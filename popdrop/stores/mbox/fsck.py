"""Looks through spools, and mends them in place: `popdrop fsck`.

A look takes the locks of a reader and changes nothing. To mend, the session lock and both spool
locks are held, a copy is kept first, and what is cut out of a spool goes through the journal. The
rest is appended, as deliverers do. Text that stands before the first message becomes the last
message, since to append is safe and to insert is not: in every moment all octets are in the spool
or in its journal. After a crash the same command goes on where it was.

Over 400 lines since to look and to mend is one order of locks and steps.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar

from popdrop.errors import Busy, ConfigError, PermanentFailure, PopdropError
from popdrop.stores.mbox.beside import Neighbours, StateOwner, look_at_rights, look_beside
from popdrop.stores.mbox.check import Content, examine
from popdrop.stores.mbox.findings import Finding, Severity, Watch, unwatched
from popdrop.stores.mbox.folders import former
from popdrop.stores.mbox.index import Damaged, Index, Indexes
from popdrop.stores.mbox.journal import Files, Journals, Recovered
from popdrop.stores.mbox.keepsake import Keepsake
from popdrop.stores.mbox.kinds import FORMS
from popdrop.stores.mbox.locks import (
    DotLock,
    NoDotLock,
    SessionLock,
    SpoolLocks,
    fcntl_holder,
    hold,
)
from popdrop.stores.mbox.mend import Failed, Mender, Refused, reader
from popdrop.stores.mbox.recovery import MboxForm
from popdrop.stores.mbox.spans import Spans
from popdrop.stores.mbox.spool import NO_RIGHT, Spool, key_of, open_spool
from popdrop.stores.mbox.store import recover

ROUNDS: Final = 12
"""Each round mends one thing and looks again. Damage of all kinds at once takes six."""

_CLOSED: Final = ("unsafe", "unreadable", "lock-odd")
_WAITS: Final = (0.05, 0.5)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to go about it.

    `state_dir` is the server's, `kind` one of `kinds.FORMS`, `locks` of `locks.KINDS`,
    `uids` those who may own a spool (`None`: anybody). `lock_timeout` is in seconds. Copies and
    reports go to `backup_dir`, or to `state_dir`/fsck.
    """

    state_dir: str
    kind: str = "mboxrd"
    locks: tuple[str, ...] = ("fcntl", "dot")
    uids: frozenset[int] | None = None
    lock_timeout: float = 30.0
    backup_dir: str | None = None


@dataclass(slots=True)
class Result:
    """What was found in one spool, what was done about it, and what is left to do.

    `refused` says why something was not mended that else is, and what to do about it. `copy` and
    `report` are paths, empty where there was nothing to keep.
    """

    path: str
    found: list[Finding]
    messages: int = 0
    octets: int = 0
    done: list[str] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)
    refused: str = ""
    copy: str = ""
    report: str = ""

    @property
    def status(self) -> str:
        """`clean`, `repaired`, or `left`: something is still to be done."""
        return "left" if self.left else "repaired" if self.done else "clean"


class Fsck:
    """Looks through spools of one server, one after another, and mends them."""

    def __init__(self, settings: Settings, files: Files | None = None) -> None:
        self.watch: Watch = unwatched
        """Told how the work on big files goes on."""
        self._set = settings
        self._files = files or StateOwner(settings.state_dir)
        known: tuple[str, ...] = ()
        with suppress(ConfigError):  # whoever may not read the state folder can mend nothing
            known = former(settings.state_dir)
        self._journals = Journals(settings.state_dir, self._files, former=known)
        self._neighbours = Neighbours(self._journals)

    # To look

    def look(self, path: str) -> Result:
        """What is wrong with the spool at `path`, absolute. Raises `Failed`."""
        with _failing(path):
            found = self._beside(path)
            spool = self._open(path, found)
            if spool is None:
                if not found:
                    raise Failed(f"{path}: there is no such file")
                return _concluded(Result(path, found))
            try:
                found += look_at_rights(path, spool.opened)
                content = self._look_inside(spool, found)
            finally:
                spool.close()
            if content is None:
                return _concluded(Result(path, found))
            result = Result(path, found + content.findings, content.messages, content.size)
            result.refused = content.refusal
            return _concluded(result)

    def _beside(self, path: str) -> list[Finding]:
        return look_beside(path, self._neighbours, self._journals, self._set.locks)

    def _open(self, path: str, found: list[Finding]) -> Spool | None:
        try:
            return open_spool(path, self._set.uids)
        except PermanentFailure as refused:
            found.append(Finding("unsafe", refused.detail.removeprefix(path).strip()))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise Failed(f"{path}: there is no such folder") from None
            found.append(Finding("unreadable", f"cannot be opened: {error.strerror}"))
        return None

    def _look_inside(self, spool: Spool, found: list[Finding]) -> Content | None:
        kinds = self._set.locks
        # A lock that cannot be taken without a change is not taken.
        if any(each.kind in ("lock-stale", "lock-odd") for each in found):
            kinds = tuple(name for name in kinds if name != "dot")
        patience = _Patience(self._set.lock_timeout)
        _read_without_trace(spool)
        with ExitStack() as stack:
            try:
                locks = self._lock(stack, spool, kinds, False, patience)
            except NoDotLock as error:
                if error.errno not in NO_RIGHT | {errno.ENOSPC, errno.EDQUOT}:
                    raise
                text = f"read without the dot-lock, which cannot be made: {error.strerror}"
                found.append(Finding("lock-none", text))
                kinds = tuple(name for name in kinds if name != "dot")
                locks = self._lock(stack, spool, kinds, False, patience)
            try:
                content = self._examine(spool, locks)
            except OSError as error:
                if error.errno is None:
                    raise Failed(f"{spool.path}: {error}: try again") from None
                found.append(Finding("unreadable", f"cannot be read: {error.strerror}"))
                return None
            if not content.first:
                found += self._look_at_index(spool, content.spans)
            return content

    def _index(self, path: str) -> Index:
        name = SessionLock(os.path.join(self._set.state_dir, "locks"), path).name
        return Indexes(self._set.state_dir, None).of(name)

    def _look_at_index(self, spool: Spool, spans: Spans) -> list[Finding]:
        """Whether what the server would believe of the spool is so. Under the locks."""
        index = self._index(spool.path)
        if not os.path.lexists(index.path):
            return []
        known = index.load()
        if known is None:
            return [Finding("index", "is damaged, or of another version", path=index.path)]
        if not known.settled or known.key != key_of(spool.stat()):
            return []  # it says nothing of the spool as it is
        try:
            places = known.places()
        except Damaged:
            return [Finding("index", "is damaged", path=index.path)]
        # Sizes depend on the server's options.
        if (places.starts, places.heads, places.lengths, places.checks) == (
            spans.starts,
            spans.heads,
            spans.lengths,
            spans.checks,
        ):
            return []
        return [Finding("index", "does not agree with the spool", path=index.path)]

    def _examine(self, spool: Spool, locks: SpoolLocks) -> Content:
        read = reader(spool, locks)
        return examine(read, spool.stat().st_size, self._set.kind, self.watch)

    # Locks

    def _lock(
        self,
        stack: ExitStack,
        spool: Spool,
        kinds: tuple[str, ...],
        write: bool,
        patience: _Patience,
    ) -> SpoolLocks:
        def take() -> SpoolLocks:
            return stack.enter_context(SpoolLocks(spool.fd, spool.path, kinds, write))

        locks = patience.outlast(take, lambda: _who(spool))
        if not spool.is_at_path():
            raise Failed(f"{spool.path}: has just been replaced by another file: try again")
        return locks

    def _hold(self, path: str, patience: _Patience) -> SessionLock:
        folder = os.path.join(self._set.state_dir, "locks")
        return patience.outlast(
            lambda: hold(folder, path),
            lambda: f"{path}: a POP3 session has the maildrop: wait for its end, or end it",
        )

    # To mend

    def mend(self, path: str) -> Result:
        """Look, and mend what can be. Raises `Failed`: what was done by then is in the report."""
        result = self.look(path)
        closed = any(each.kind in _CLOSED for each in result.found)
        if closed or not any(each.mendable for each in result.found):
            return result
        folder = self._set.backup_dir or os.path.join(self._set.state_dir, "fsck")
        keepsake = Keepsake(folder, path, result.found)
        try:
            with _failing(path), keepsake, ExitStack() as stack:
                self._check_state()
                self._mend(stack, result, keepsake)
        except Failed as failed:
            if keepsake.report:
                raise Failed(f"{failed} (what was done: {keepsake.report})") from failed
            raise
        with _failing(path):
            # Now that our own lock is gone.
            self._neighbours = Neighbours(self._journals)
            beside = self._beside(path)
        result.left = [each for each in beside + result.left if _matters(each)]
        result.copy, result.report = keepsake.copy, keepsake.report
        return result

    def _check_state(self) -> None:
        """Files that root makes there could not be opened by the server."""
        folder, uid = self._set.state_dir, os.geteuid()
        try:
            owner = os.stat(folder).st_uid
        except FileNotFoundError:
            if uid == 0:
                raise Failed(
                    f"{folder}: there is no such folder: name the server's with --state-dir"
                ) from None
            return
        if owner != uid:
            name = str(owner)
            with suppress(KeyError):
                name = pwd.getpwuid(owner).pw_name
            raise Failed(
                f"{folder}: belongs to {name}: run this as that user, in the group of the spools: "
                f"runuser -u {name} -g mail -- popdrop fsck --repair --state-dir {folder} SPOOL"
            )

    def _mend(self, stack: ExitStack, result: Result, keepsake: Keepsake) -> None:
        path, kinds = result.path, self._set.locks
        patience = _Patience(self._set.lock_timeout)
        session = self._hold(path, patience)
        stack.callback(session.release)
        was = {each.kind for each in result.found}
        result.left, result.refused = [], ""
        spool = open_spool(path, self._set.uids)
        if spool is None:
            for one in recover(self._journals.of(path), path, None, kinds, FORMS[self._set.kind]):
                _did(result, keepsake, _of_journal(one))
            keepsake.end(None, [], lambda: None)
            return
        stack.callback(spool.close)
        _read_without_trace(spool)
        if not spool.writable:
            raise Failed(f"{path}: no right to write it: run this as its owner or in its group")
        locks = self._lock(stack, spool, kinds, True, patience)
        if "index" in was:
            self._index(path).forget()
            _did(result, keepsake, f"removed the index {self._index(path).path}")
        if "lock-stale" in was:
            _did(result, keepsake, f"removed the stale dot-lock {path}.lock")
        self._sweep(result, keepsake)
        self._mend_locked(spool, locks, result, keepsake)

    def _sweep(self, result: Result, keepsake: Keepsake) -> None:
        for each in result.found:
            if each.kind == "lock-temporary":
                with suppress(FileNotFoundError):
                    os.unlink(each.path)
                    _did(result, keepsake, f"removed {each.path}")

    def _mend_locked(
        self, spool: Spool, locks: SpoolLocks, result: Result, keepsake: Keepsake
    ) -> None:
        before = spool.stat()
        # A journal that cannot be judged may still change the spool.
        foreign = any(each.kind == "journal-foreign" for each in self._beside(spool.path))
        if not foreign:
            paths = [spool.path, *self._neighbours.other_paths(spool.path)]
            if any(self._journals.of(each).pending() for each in paths):
                keepsake.keep(spool, locks.refresh, self.watch)
                form = MboxForm(FORMS[self._set.kind])
                for each in paths:
                    for one in self._journals.of(each).recover(spool.fd, form, locks.refresh):
                        _did(result, keepsake, _of_journal(one))
        content = self._examine(spool, locks)
        mender = Mender(self._files, self._journals, spool, locks)
        if not foreign:
            for _ in range(ROUNDS):
                if not any(each.mendable for each in content.findings):
                    break
                try:
                    step = mender.next_step(content)
                except Refused as refused:
                    result.refused = str(refused)
                    break
                keepsake.keep(spool, locks.refresh, self.watch)
                step.do()
                _did(result, keepsake, step.words)
                content = self._examine(spool, locks)
        result.left = content.findings
        result.messages, result.octets = content.messages, content.size
        if result.refused and result.done:
            keepsake.note(f"not mended: {result.refused}")
        if result.done:
            keepsake.end(spool, result.left, locks.refresh)
            _keep_new_mail_new(spool, before)


class _Patience:
    """Tries for so many seconds in all."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def outlast(self, take: Callable[[], _T], who: Callable[[], str]) -> _T:
        """What `take` gives when it is `Busy` no more. Raises `Failed` with the words of `who`."""
        while True:
            try:
                return take()
            except Busy:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise Failed(f"{who()} (tried for {self._seconds:g} s)") from None
                time.sleep(min(random.uniform(*_WAITS), left))  # noqa: S311 - no secret


@contextmanager
def _failing(path: str) -> Iterator[None]:
    """Turn what the system and the store say into `Failed`."""
    try:
        yield
    except PopdropError as error:
        raise Failed(error.detail or f"{path}: {error.text}") from error
    except OSError as error:
        name = error.filename or path
        raise Failed(f"{name}: {error.strerror or error}") from error


def _concluded(result: Result) -> Result:
    result.left = [each for each in result.found if _matters(each)]
    return result


def _matters(finding: Finding) -> bool:
    return finding.severity is not Severity.NOTE


def _did(result: Result, keepsake: Keepsake, what: str) -> None:
    result.done.append(what)
    keepsake.note(what)


def _of_journal(recovered: Recovered) -> str:
    kept = f", and kept it as {recovered.aside}" if recovered.aside else ""
    return f"ended the update of {recovered.journal}: {recovered.outcome.value}{kept}"


def _who(spool: Spool) -> str:
    held = DotLock(spool.path).look(time.time())
    if held is not None:
        return f"{spool.path}: {held.holder} has the dot-lock {spool.path}.lock"
    pid = 0
    with suppress(OSError):
        pid = fcntl_holder(spool.fd)
    return f"{spool.path}: {f'process {pid}' if pid > 0 else 'a process'} has locked it"


def _read_without_trace(spool: Spool) -> None:
    """Leave its atime as it is. Only the file's owner may."""
    with suppress(OSError):
        flags = fcntl.fcntl(spool.fd, fcntl.F_GETFL)
        fcntl.fcntl(spool.fd, fcntl.F_SETFL, flags | os.O_NOATIME)


def _keep_new_mail_new(spool: Spool, before: os.stat_result) -> None:
    """A shell says "you have new mail" where atime is before mtime. Only the owner may set it."""
    if before.st_atime_ns <= before.st_mtime_ns:
        with suppress(OSError):
            written = spool.stat().st_mtime_ns
            os.utime(spool.fd, ns=(min(before.st_atime_ns, written - 10**9), written))
