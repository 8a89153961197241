"""Compiled helpers, cached spools, and the facts of this machine that a table must name."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import corpus

HERE = Path(__file__).parent


class Missing(Exception):
    """Something is not installed; the text says what, and the Debian package that has it."""


def cache_folder() -> Path:
    """Where compiled programs, spools and unpacked packages are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "popdrop-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiled(name: str, folder: Path | None = None) -> Path:
    """The program made of `benchmarks/NAME.c`, built when its source is new. Raises `Missing`."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Missing("no C compiler `cc`: install the Debian package gcc and libc6-dev")
    sources = [HERE / f"{name}.c", *sorted(HERE.glob("*.h"))]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    program = (folder or cache_folder()) / f"{name}-{digest[:16]}"
    if not program.exists():
        part = program.with_name(f"{program.name}.{os.getpid()}")
        command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(part), str(sources[0]), "-lm"]
        subprocess.run(command, check=True)
        part.replace(program)
    return program


def spool(messages: int | None = None, octets: int | None = None) -> tuple[Path, int]:
    """A cached spool of so many messages, or octets; and how many messages it holds."""
    name = f"v{corpus.VERSION}-{messages or 0}m-{octets or 0}o.mbox"
    path = cache_folder() / name
    note = path.with_suffix(".count")
    if not (path.exists() and note.exists()):
        count, _ = corpus.write_spool(path, messages, octets)
        note.write_text(str(count))
    return path, int(note.read_text())


def message(octets: int) -> Path:
    """A cached spool of one message of so many octets."""
    path = cache_folder() / f"v{corpus.VERSION}-one-{octets}o.mbox"
    if not path.exists():
        corpus.write_message(path, octets)
    return path


def place(source: Path, target: Path, owner: tuple[int, int] | None) -> None:
    """Copy a spool to where a server looks for it: on disk, an hour old, mode 0600.

    An hour, because an index is right not to trust a file that has just changed.
    """
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o600)
    if owner is not None:
        os.chown(target, *owner)
    with target.open("rb") as written:
        os.fsync(written.fileno())
    past = target.stat().st_mtime - 3600
    os.utime(target, (past, past))


def append(spool: Path, messages: Sequence[bytes]) -> None:
    """Append messages to a spool that no server has open; its owner and mode stay.

    Without locks: to be called only between two sessions.
    """
    with spool.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 2, 0))
        # Each message ends with its empty line (mbox(5)); a server may have left the last without.
        if end and file.read(2) != b"\n\n":
            file.write(b"\n")
        file.write(b"".join(messages))


def let_settle(path: Path, seconds: float) -> None:
    """Wait until the last change of a file, of its times also, is so long ago."""
    time.sleep(max(0.0, path.stat().st_ctime + seconds - time.time()))


def empty_spool() -> Path:
    """A spool without mail."""
    path = cache_folder() / "empty.mbox"
    path.touch()
    return path


def first_line(command: list[str]) -> str:
    """The first line that a program prints, `?` if it does not run."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "?"
    return (ran.stdout.splitlines() or ["?"])[0].strip()


def machine() -> str:
    """Processor, memory and system in one line."""
    model = "?"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = os.cpu_count()
    return (
        f"{cores} cores ({model}), {pages / 2**30:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )
