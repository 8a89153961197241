"""What is kept of a spool that is mended: a copy of it as it was, and a report."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from types import TracebackType
from typing import Final

from popdrop.stores.mbox.findings import Finding, Watch, printable
from popdrop.stores.mbox.spool import COPY_BLOCK, Spool

_MAKE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MOST: Final = 10000

REPORT: Final = ".txt"


class Keepsake:
    """The copy and the report of one spool, in `folder`; made when they are first needed.

    `NAME-UTC-NUMBER`, and the same with `.txt` behind; mode 0600, of the spool's owner where we
    are root. Neither ever takes another file's place. All methods may raise `OSError`.
    """

    def __init__(self, folder: str, path: str, found: list[Finding]) -> None:
        self.copy = ""
        """Path of the copy, once it is whole and synced."""
        self.report = ""
        """Path of the report, once there is one."""
        self._folder = os.path.abspath(folder)
        self._path = path
        self._found = found
        self._fd = -1

    def __enter__(self) -> Keepsake:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if error is not None:
                with suppress(OSError):
                    os.write(fd, b"\nNot brought to its end. Run the same command again.\n")
            os.close(fd)

    def note(self, what: str) -> None:
        """Write down what was done."""
        self._write(f"  {what}\n")

    def keep(self, spool: Spool, refresh: Callable[[], None], watch: Watch) -> None:
        """Copy the spool, unless that was done before. The locks are held."""
        if self.copy:
            return
        self._begin()
        copy = self.report.removesuffix(REPORT)
        fd = os.open(copy, _MAKE, 0o600)
        try:
            if os.geteuid() == 0:
                os.fchown(fd, spool.opened.st_uid, -1)
            digest = sha256()
            size = spool.stat().st_size
            for block in spool.blocks(0, size, COPY_BLOCK):
                rest = memoryview(block)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                digest.update(block)
                refresh()
                watch("copying", len(block))
            os.fsync(fd)
            self._sync_folder()
        except BaseException:
            os.unlink(copy)
            raise
        finally:
            os.close(fd)
        self.copy = copy
        self._write(
            f"  kept a copy: {printable(copy)}\n  before: {_facts(size, digest.hexdigest())}\n"
        )

    def end(self, spool: Spool | None, left: list[Finding], refresh: Callable[[], None]) -> None:
        """Write down how the spool is now, and what is left to do."""
        if spool is not None:
            digest = sha256()
            size = spool.stat().st_size
            for block in spool.blocks(0, size, COPY_BLOCK):
                digest.update(block)
                refresh()
            self._write(f"  after: {_facts(size, digest.hexdigest())}\n")
        self._write("\nIn it now\n" + (_lines(left, self._path) or "  nothing to be said of\n"))
        os.fsync(self._fd)
        self._sync_folder()

    def _begin(self) -> None:
        if self._fd >= 0:
            return
        # A folder that was named must be there; ours is made, and so is the one it lies in.
        with suppress(FileExistsError):
            os.makedirs(self._folder, 0o700)
        moment = datetime.now(UTC)
        stem = f"{os.path.basename(self._path)}-{moment:%Y%m%dT%H%M%SZ}"
        for number in range(1, _MOST):
            report = os.path.join(self._folder, f"{stem}-{number}{REPORT}")
            if os.path.lexists(report.removesuffix(REPORT)):
                continue
            with suppress(FileExistsError):
                self._fd = os.open(report, _MAKE, 0o600)
                break
        else:
            raise FileExistsError(f"{self._folder}: too many copies")
        self.report = report
        self._write(
            f"popdrop fsck --repair {printable(self._path)}\n{moment:%Y-%m-%d %H:%M:%S} UTC\n\n"
            f"Found\n{_lines(self._found, self._path)}\nDone\n"
        )

    def _write(self, text: str) -> None:
        if self._fd < 0:
            self._begin()
        rest = memoryview(text.encode("utf-8"))
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def _sync_folder(self) -> None:
        fd = os.open(self._folder, _FOLDER)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _facts(size: int, digest: str) -> str:
    return f"{size} octets, SHA-256 {digest}"


def _lines(findings: list[Finding], path: str) -> str:
    lines = []
    for each in findings:
        place = "" if each.line is None else f":{each.line}"
        offset = "" if each.offset is None else f" (offset {each.offset})"
        where = printable(each.path or path)
        lines.append(f"  {where}{place}: {each.severity.value}: {each.text}{offset}\n")
    return "".join(lines)
