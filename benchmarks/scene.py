"""One server on a core of its own in a temporary folder, for the benchmarks of logins."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from benchmarks.peers import Peer, Popdrop
from benchmarks.process import cores

Server = TypeVar("Server", bound=Peer)


@lru_cache
def _cores() -> tuple[int, int]:
    """Found before this process keeps to its own, so that two may serve at the same time."""
    return cores()


@contextmanager
def serving(users: Sequence[str], kind: type[Server] = Popdrop) -> Iterator[Server]:
    """With these accounts, all of one password, and no mail. This process has the other core.

    Raises `Failed`, `tools.Missing`.
    """
    server_core, own_core = _cores()
    allowed = os.sched_getaffinity(0)
    folder = Path(tempfile.mkdtemp(prefix="popdrop-bench-", dir="/var/tmp"))
    folder.chmod(0o755)
    server = kind(folder, server_core, secrets.token_hex(12))
    try:
        server.start(users)
        os.sched_setaffinity(0, {own_core})
        yield server
    finally:
        os.sched_setaffinity(0, allowed)
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
