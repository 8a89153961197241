"""A disk in memory that knows what would survive a power cut.

It stands in for `popdrop.stores.mbox.journal.Files`. A process that is killed loses its
descriptors only. A power cut leaves, of all that was not synced, any part: each unit of `tear`
octets is as of any moment since the last fsync of its file, the file's size too, and each change of
a folder since its last fsync is there or not. A cut-off file may have the rest of its last `block`
zeroed with either size.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

UID = 1000
DEV = 7

WRITES = frozenset({"pwrite", "fsync", "ftruncate", "rename", "link", "unlink", "mkdir", "create"})
"""The calls that change something, or what is on the disk."""


class Killed(BaseException):
    """The process is no more: nothing may catch this."""


class Node:
    """One file or folder, as the running system sees it and as it was synced last."""

    def __init__(self, number: int, mode: int, uid: int = UID) -> None:
        self.number = number
        self.mode = mode
        self.uid = uid
        self.links = 1
        self.data = bytearray()
        self.names: dict[str, int] = {}
        self.stable = b""
        self.stable_names: dict[str, int] = {}
        self.unsynced: list[tuple[Any, ...]] = []

    def settle(self) -> None:
        """All of it is on the disk."""
        self.stable, self.stable_names = bytes(self.data), dict(self.names)
        self.unsynced.clear()


@dataclass
class Fault:
    """What goes wrong: at each call `at` is asked, with its name and its 0-based number."""

    at: Callable[[str, int], OSError | BaseException | None] = lambda name, number: None
    short: int = 0
    """A `pwrite` writes so many octets at most; 0 for all."""
    torn: bool = False
    """A `pwrite` that is to raise `Killed` writes half before."""


@dataclass
class Handle:
    node: Node
    flags: int


@dataclass
class Disk:
    """Files by their absolute paths. Numbers of descriptors are its own."""

    tear: int = 512
    block: int = 4096
    fault: Fault = field(default_factory=Fault)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.handles: dict[int, Handle] = {}
        self.root = self._make(stat.S_IFDIR | 0o755)

    # For tests, without faults

    def _make(self, mode: int) -> Node:
        node = Node(len(self.nodes) + 1, mode)
        self.nodes[node.number] = node
        return node

    def put(self, path: str, octets: bytes = b"", mode: int = 0o600) -> Node:
        """Make a file; it is on the disk, and so are its folders."""
        parts = path.strip("/").split("/")
        folder = self.root
        for part in parts[:-1]:
            if part not in folder.names:
                folder.names[part] = self._make(stat.S_IFDIR | 0o755).number
            folder.settle()
            folder = self.nodes[folder.names[part]]
        node = self._make(stat.S_IFREG | mode)
        node.data[:] = octets
        folder.names[parts[-1]] = node.number
        for each in (folder, node):
            each.settle()
        return node

    def get(self, path: str) -> bytes:
        return bytes(self._find(path).data)

    def settle(self) -> None:
        """All is on the disk."""
        for node in self.nodes.values():
            node.settle()

    def names(self, path: str) -> set[str]:
        return set(self._find(path).names)

    def mode_of(self, fd: int) -> int:
        return self._open(fd).mode

    def overwrite(self, path: str, octets: bytes) -> None:
        """What another program does, or what the disk made of it."""
        node = self._find(path)
        node.data[:] = octets
        node.settle()

    def append(self, path: str, octets: bytes, synced: bool = True) -> None:
        """What a deliverer does."""
        node = self._find(path)
        node.unsynced.append(("write", len(node.data), octets))
        node.data += octets
        if synced:
            node.settle()

    def kill(self) -> None:
        """What was done is seen by the next process; descriptors are gone."""
        self.handles.clear()
        self.fault = Fault()
        self.calls = []

    def descriptor(self, path: str) -> int:
        return self._handle(self._find(path), os.O_RDWR)

    # The power cut

    def cut(self, choose: Callable[[int], int]) -> Disk:
        """The disk after a power cut. `choose` picks one of so many versions; 0 is the oldest."""
        after = Disk(self.tear, self.block)
        after.nodes = {}
        for number, node in self.nodes.items():
            new = after.nodes[number] = Node(number, node.mode, node.uid)
            if stat.S_ISDIR(node.mode):
                new.names = self._names(node, choose)
            else:
                new.data[:] = self._content(node, choose)
            new.settle()
        after.root = after.nodes[self.root.number]
        for node in after.nodes.values():
            node.links = 0
        after.root.links = 1
        for node in after.nodes.values():
            for number in node.names.values():
                after.nodes[number].links += 1
        return after

    def _names(self, node: Node, choose: Callable[[int], int]) -> dict[str, int]:
        names = dict(node.stable_names)
        for change in node.unsynced:
            if choose(2):
                for name, number in change:
                    names.pop(name, None)
                    if number:
                        names[name] = number
        return names

    def _content(self, node: Node, choose: Callable[[int], int]) -> bytes:
        image = bytearray(node.stable)
        sizes = [len(image)]
        units = {n: [image[n : n + self.tear]] for n in range(0, len(image), self.tear)}

        def changed(start: int, stop: int) -> None:
            for n in range(start - start % self.tear, stop, self.tear):
                units.setdefault(n, [bytearray()]).append(image[n : n + self.tear])

        for operation, offset, *octets in node.unsynced:
            if operation == "write":
                end = offset + len(octets[0])
                image.extend(bytes(max(0, end - len(image))))
                image[offset:end] = octets[0]
                changed(offset, end)
                sizes.append(max(sizes[-1], end))
            else:
                if offset < sizes[-1]:
                    end = min(-(-offset // self.block) * self.block, len(image))
                    image[offset:end] = bytes(end - offset)
                    changed(offset, end)
                sizes.append(offset)
        size = sizes[choose(len(sizes))] if len(sizes) > 1 else sizes[0]
        disk = bytearray(max(size, len(image)) + self.tear)
        for n, versions in units.items():
            unit = versions[choose(len(versions))] if len(versions) > 1 else versions[0]
            disk[n : n + len(unit)] = unit
        return bytes(disk[:size])

    # The calls

    def _called(self, name: str) -> None:
        number = len(self.calls)
        self.calls.append(name)
        error = self.fault.at(name, number)
        if error is not None:
            raise error

    def _walk(self, path: str) -> tuple[Node, str]:
        *folders, name = path.strip("/").split("/")
        node = self.root
        for part in folders:
            if part not in node.names:
                raise FileNotFoundError(errno.ENOENT, "no folder", path)
            node = self.nodes[node.names[part]]
        return node, name

    def _find(self, path: str) -> Node:
        folder, name = self._walk(path)
        if not name:
            return self.root
        if name not in folder.names:
            raise FileNotFoundError(errno.ENOENT, "no file", path)
        return self.nodes[folder.names[name]]

    def _handle(self, node: Node, flags: int) -> int:
        number = next(n for n in range(3, 1000) if n not in self.handles)
        self.handles[number] = Handle(node, flags)
        return number

    def _open(self, fd: int, write: bool = False) -> Node:
        if fd not in self.handles or (write and not self.handles[fd].flags & os.O_RDWR):
            raise OSError(errno.EBADF, "no such descriptor")
        return self.handles[fd].node

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        self._called("create" if flags & os.O_CREAT else "open")
        folder, name = self._walk(path)
        if not flags & os.O_CREAT:
            return self._handle(self._find(path), flags)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "is there", path)
        node = self._make(stat.S_IFREG | mode)
        folder.names[name] = node.number
        folder.unsynced.append(((name, node.number),))
        return self._handle(node, flags)

    def close(self, fd: int) -> None:
        self._called("close")
        self._open(fd)
        del self.handles[fd]

    def _stat(self, node: Node) -> os.stat_result:
        size = len(node.data)
        return os.stat_result((node.mode, node.number, DEV, node.links, node.uid, 0, size, 0, 0, 0))

    def fstat(self, fd: int) -> os.stat_result:
        self._called("fstat")
        return self._stat(self._open(fd))

    def lstat(self, path: str) -> os.stat_result:
        self._called("lstat")
        return self._stat(self._find(path))

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        self._called("pread")
        return bytes(self._open(fd).data[offset : offset + size])

    def pwrite(self, fd: int, octets: bytes | memoryview, offset: int) -> int:
        taken = bytes(octets)
        try:
            self._called("pwrite")
        except Killed:
            if self.fault.torn:
                self._write(fd, taken[: len(taken) // 2], offset)
            raise
        return self._write(fd, taken[: self.fault.short or None], offset)

    def _write(self, fd: int, octets: bytes, offset: int) -> int:
        node = self._open(fd, write=True)
        node.data.extend(bytes(max(0, offset - len(node.data))))
        node.data[offset : offset + len(octets)] = octets
        node.unsynced.append(("write", offset, octets))
        return len(octets)

    def fsync(self, fd: int) -> None:
        node = self._open(fd)
        self._called("fsync")
        node.settle()

    def ftruncate(self, fd: int, size: int) -> None:
        self._called("ftruncate")
        node = self._open(fd, write=True)
        if size < len(node.data):
            del node.data[size:]
        else:
            node.data.extend(bytes(size - len(node.data)))
        node.unsynced.append(("truncate", size))

    def rename(self, old: str, new: str) -> None:
        self._called("rename")
        node = self._find(old)
        folder, name = self._walk(old)
        there, other = self._walk(new)
        assert folder is there
        if other in folder.names:
            self.nodes[folder.names[other]].links -= 1
        del folder.names[name]
        folder.names[other] = node.number
        folder.unsynced.append(((name, 0), (other, node.number)))

    def link(self, old: str, new: str) -> None:
        self._called("link")
        node = self._find(old)
        folder, name = self._walk(new)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "is there", new)
        folder.names[name] = node.number
        node.links += 1
        folder.unsynced.append(((name, node.number),))

    def unlink(self, path: str) -> None:
        self._called("unlink")
        node = self._find(path)
        folder, name = self._walk(path)
        del folder.names[name]
        node.links -= 1
        folder.unsynced.append(((name, 0),))

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        self._called("mkdir")
        folder, name = self._walk(path)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "is there", path)
        folder.names[name] = self._make(stat.S_IFDIR | mode).number
        folder.unsynced.append(((name, folder.names[name]),))

    def listdir(self, path: str) -> list[str]:
        self._called("listdir")
        return list(self._find(path).names)

    def geteuid(self) -> int:
        return UID


def choices(
    count: Callable[[Callable[[int], int]], object], many: int, draw: Callable[[int], int]
) -> Iterator[Callable[[int], int]]:
    """Ways to choose at one power cut, `many` of them by chance.

    All old; all new; all new but one; all old but one; and each at random. `count` is called once
    to see how many choices there are.
    """
    sizes: list[int] = []

    def newest(versions: int) -> int:
        sizes.append(versions)
        return versions - 1

    count(newest)
    points = len(sizes)
    yield lambda versions: versions - 1
    if not points:
        return
    yield lambda versions: 0

    def except_for(odd: int, new: bool) -> Callable[[int], int]:
        seen = iter(range(points))
        return lambda versions: versions - 1 if (next(seen) == odd) != new else 0

    for odd in range(min(points, 40)):
        yield except_for(odd, True)
        yield except_for(odd, False)
    for _ in range(many):
        yield draw
