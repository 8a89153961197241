"""kill -9 at each file call of a QUIT, with mail that comes before the server is there again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from popdrop.stores.mbox.store import MboxStore
from popdrop.values import Owner
from tests.crash import killed
from tests.end_to_end.harness import DEADLINE, ROOT, environment, mail

COUNT = 6
LATE = mail(99)


def one(number: int) -> bytes:
    return mail(number, b"%d\n" % number * 900)


class KillTests(SynchronousTestCase):
    """All of what was to be deleted is gone, or nothing is; all else is there once, undamaged."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="popdrop-test-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.state = self.folder / "state"
        self.spools = self.folder / "mail"
        self.spool = self.spools / "bob"
        self.parent = subprocess.Popen(
            [sys.executable, "-m", killed.__name__],
            cwd=ROOT,
            env=environment(self.folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.addCleanup(self.parent.communicate, timeout=DEADLINE)

    def fresh(self) -> None:
        for folder in (self.state, self.spools):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        self.spool.write_bytes(
            b"".join(mail(number, b"%d\n" % number * 900) for number in range(COUNT))
        )
        self.spool.chmod(0o600)

    def ended(self, deleted: list[int], seen: list[int], last: int) -> list[int]:
        """Exit code and number of calls of a process that is killed at the `last` one."""
        given = [str(self.state), f"{self.spools}/{{user}}", "bob", deleted, seen, last]
        assert self.parent.stdin is not None and self.parent.stdout is not None
        self.parent.stdin.write(json.dumps(given).encode() + b"\n")
        self.parent.stdin.flush()
        found: list[int] = json.loads(self.parent.stdout.readline())
        return found

    def left(self) -> list[bytes]:
        """What the next login finds."""
        store = MboxStore(f"{self.spools}/{{user}}", str(self.state))
        drop = store.open(Owner("bob"))
        drop.release()
        return [b"From " + part for part in self.spool.read_bytes().split(b"From alice")[1:]]

    def campaign(self, deleted: list[int], seen: list[int] | None = None) -> None:
        seen = seen or []
        before = [one(number) for number in range(COUNT)]
        after = [
            one(number).replace(b"\n", b"\nStatus: RO\n", number in seen)
            for number in range(COUNT)
            if number not in deleted
        ]
        self.fresh()
        status, calls = self.ended(deleted, seen, 0)
        self.assertEqual(status, 0)
        self.assertEqual(self.spool.read_bytes(), b"".join(after))
        self.assertGreater(calls, 1)
        outcomes = set()
        for last in range(1, calls + 1):
            self.fresh()
            inode = self.spool.stat().st_ino
            self.assertEqual(self.ended(deleted, seen, last)[0], -9, last)
            with self.spool.open("ab") as spool:
                spool.write(LATE)
            self.left()
            octets = self.spool.read_bytes()
            self.assertIn(octets, (b"".join([*before, LATE]), b"".join([*after, LATE])), last)
            outcomes.add(len(octets))
            self.assertEqual(self.spool.stat().st_ino, inode)
            names = set(os.listdir(self.spools))
            self.assertEqual({name for name in names if "popdrop" in name}, set())
        self.assertEqual(len(outcomes), 2, "the kills were all on one side of the commit")

    def test_first(self) -> None:
        self.campaign([0])

    def test_every_second(self) -> None:
        self.campaign([0, 2, 4])

    def test_tail(self) -> None:
        self.campaign([4, 5])

    def test_marked_as_read(self) -> None:
        """The spool grows; mail that comes behind the room that was made stands for itself."""
        self.campaign([], [1, 2, 5])

    def test_deleted_and_marked_as_read(self) -> None:
        self.campaign([1, 3], [0, 2, 5])
