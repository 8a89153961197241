"""A child that deletes from a spool and kills itself at its N-th file call, for `test_kill`.

`killed.py STATE TEMPLATE USER DELETED SEEN N`: DELETED and SEEN are 0-based indexes joined by
commas, or nothing. With N of 0 it is not killed, and prints how many calls there were.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from popdrop.stores.mbox.journal import Files, Journals
from popdrop.stores.mbox.store import MboxStore
from popdrop.values import Owner


class Deadly(Files):
    """Counts the calls that change something, and dies before the one that was named."""

    def __init__(self, last: int) -> None:
        self.count = 0
        self._last = last
        for name in ("open", "pwrite", "fsync", "ftruncate", "rename", "link", "unlink"):
            setattr(self, name, self._counting(getattr(Files, name)))

    def _counting(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call


def main(state: str, template: str, user: str, deleted: str, seen: str, last: str) -> None:
    store = MboxStore(template, state, update_status=bool(seen))
    files = Deadly(int(last))
    store.journals = Journals(state, files)
    drop = store.open(Owner(user))
    rows, read = ([int(word) for word in each.split(",") if word] for each in (deleted, seen))
    drop.commit(rows, read)
    drop.release()
    print(files.count)


if __name__ == "__main__":
    main(*sys.argv[1:])
