"""Processes that delete from a spool and kill themselves at their N-th file call, for `test_kill`.

Each line of standard input is `[STATE, TEMPLATE, USER, DELETED, SEEN, N]` in JSON, DELETED and SEEN
lists of 0-based indexes. For each a process is forked, so that what it needs is imported once, and
`[EXIT_CODE, CALLS]` is printed when it has ended: the exit code is -9 where it was killed, and the
number of calls is told where it was not, as with N of 0.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
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


def delete(
    state: str, template: str, user: str, deleted: list[int], seen: list[int], last: int
) -> int:
    """How many calls there were."""
    store = MboxStore(template, state, update_status=bool(seen))
    files = Deadly(last)
    store.journals = Journals(state, files)
    drop = store.open(Owner(user))
    drop.commit(deleted, seen)
    drop.release()
    return files.count


def forked(*given: Any) -> tuple[int, int]:
    """Exit code and number of calls of a process that does this."""
    told, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(tells, b"%d" % delete(*given))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(tells)
    with os.fdopen(told) as file:
        calls = int(file.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), calls


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(forked(*json.loads(line))), flush=True)
