"""Databases made by the real libraries, and what certutil of NSS makes of Berkeley DB 1.85."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest

Pairs = Iterable[tuple[bytes, bytes]]
Maker = Callable[[Path, Pairs, Iterable[bytes]], Path]


def library(name: str, package: str) -> ctypes.CDLL:
    """The library, or a skip that names the Debian package."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise SkipTest(f"needs the Debian package {package}") from None


class IntDatum(ctypes.Structure):
    """`datum` of gdbm: the size is an int."""

    _fields_ = [("dptr", ctypes.c_char_p), ("dsize", ctypes.c_int)]


class SizeDatum(ctypes.Structure):
    """`datum` of libdb's ndbm: the size is a size_t."""

    _fields_ = [("dptr", ctypes.c_char_p), ("dsize", ctypes.c_size_t)]


def _fill(
    lib: ctypes.CDLL, prefix: str, datum: Any, handle: int, pairs: Pairs, gone: Iterable[bytes]
) -> None:
    assert handle
    store, delete = getattr(lib, prefix + "store"), getattr(lib, prefix + "delete")
    close = getattr(lib, prefix + "close")
    store.argtypes = [ctypes.c_void_p, datum, datum, ctypes.c_int]
    delete.argtypes = [ctypes.c_void_p, datum]
    close.argtypes = [ctypes.c_void_p]
    for key, value in pairs:
        assert store(handle, datum(key, len(key)), datum(value, len(value)), 1) == 0
    for key in gone:
        assert delete(handle, datum(key, len(key))) == 0
    close(handle)


def gdbm(path: Path, pairs: Pairs, gone: Iterable[bytes] = (), flags: int = 3) -> Path:
    """A gdbm database; `gone` are deleted after all are stored."""
    lib = library("libgdbm.so.6", "libgdbm6")
    lib.gdbm_open.restype = ctypes.c_void_p
    lib.gdbm_open.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    handle = lib.gdbm_open(os.fsencode(path), 0, flags, 0o600, None)  # 3: GDBM_NEWDB
    _fill(lib, "gdbm_", IntDatum, handle, pairs, gone)
    return path


def numsync(path: Path, pairs: Pairs, gone: Iterable[bytes] = ()) -> Path:
    """A gdbm database in the extended format of version 1.21 and later (GDBM_NUMSYNC)."""
    return gdbm(path, pairs, gone, 3 | 0x1000)


def _ndbm(
    lib: ctypes.CDLL, prefix: str, datum: Any, path: Path, pairs: Pairs, gone: Iterable[bytes]
) -> None:
    opening = getattr(lib, prefix + "open")
    opening.restype = ctypes.c_void_p
    opening.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    handle = opening(os.fsencode(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    _fill(lib, prefix, datum, handle, pairs, gone)


def ndbm(path: Path, pairs: Pairs, gone: Iterable[bytes] = ()) -> Path:
    """`path`.dir and `path`.pag by gdbm's ndbm. The second is what holds the records."""
    lib = library("libgdbm_compat.so.4", "libgdbm-compat4")
    _ndbm(lib, "dbm_", IntDatum, path, pairs, gone)
    return path.with_name(path.name + ".pag")


def berkeley(path: Path, pairs: Pairs, gone: Iterable[bytes] = ()) -> Path:
    """`path`.db by libdb's ndbm."""
    lib = library("libdb-5.3.so", "libdb5.3")
    _ndbm(lib, "__db_ndbm_", SizeDatum, path, pairs, gone)
    return path.with_name(path.name + ".db")


MAKERS: dict[str, Maker] = {
    "gdbm": gdbm,
    "numsync": numsync,
    "ndbm": ndbm,
    "berkeley": berkeley,
}


def certificates(folder: Path, count: int) -> Path:
    """`cert8.db` of NSS, which still brings Berkeley DB 1.85: 1 + 3 * `count` records."""
    program = shutil.which("certutil")
    if program is None:
        raise SkipTest("needs the Debian package libnss3-tools")
    folder.mkdir()
    noise = folder / "noise"
    noise.write_bytes(b"no secret at all " * 200)
    place = ["-d", f"dbm:{folder}"]
    calls = [["-N", *place, "--empty-password"]]
    for number in range(count):
        words = f"-n number-{number:03} -s CN=test{number:03} -t ,, -x -m {number + 1}"
        kind = f"-k ec -q nistp256 -z {noise}"
        calls.append(["-S", *place, *words.split(), *kind.split()])
    for call in calls:
        subprocess.run([program, *call], check=True, capture_output=True, timeout=120)
    return folder / "cert8.db"
