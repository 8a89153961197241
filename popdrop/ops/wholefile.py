"""A small file that is replaced as a whole: a reader never sees half of it."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress


def put(path: str, text: str, mode: int = 0o644) -> None:
    """Have the file say `text`. Blocking; raises `OSError`, and then it says what it said."""
    draft = f"{path}.{secrets.token_hex(8)}"
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)  # whatever the umask
            file.write(text)
        os.rename(draft, path)
    except OSError:
        with suppress(OSError):
            os.unlink(draft)
        raise
