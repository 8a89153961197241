"""`popdrop.accounts.checkpassword`, with real programs."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import SkipTest

from twisted.cred.credentials import UsernamePassword
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.accounts import checkpassword
from popdrop.accounts.checkpassword import (
    ENVIRONMENT,
    MOST_OCTETS,
    REPORTED,
    Checkpassword,
    read_report,
    run,
)
from popdrop.credentials import ApopCredentials, Cleartext
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoVerifierOfThisKind,
    PermanentFailure,
    PopdropError,
    TemporaryFailure,
)
from popdrop.interfaces import IBackend
from popdrop.values import Account
from tests import programs
from tests.end_to_end.harness import DEADLINE, ROOT

STAMP = b"<1896.697170952@dbc.mtview.ca.us>"  # RFC 1939, page 15
CAT = shutil.which("cat", path=ENVIRONMENT["PATH"]) or ""
NOBODY = 65534
STRANGE_NAMES = (
    b"() { :;};",
    b"%n%s",
    b"%{x}",
    b"${HOME}",
    b"{0}",
    b"LD_PRELOAD=x",
    b"bob ",
    b"a:b",
)
"""Acceptable as names: a program may see them, and nothing may come of it."""
REFUSED_NAMES = b"../x a/b . .. -x bob. relus1.lock bob\tx bob\nx bob\rx".split(b" ") + [
    b"",
    b"bob\0x",
    b"\0",
    b"b" * 65,
    b"b" * 300,
    b"\xff",
    b"b" * 1_000_000,
]
"""No program is run for these (`mbox-safety` rows 19, 21, 24, 31)."""


def apop(name: bytes, secret: bytes, stamp: bytes = STAMP) -> ApopCredentials:
    return ApopCredentials(name, stamp, hashlib.md5(stamp + secret).hexdigest().encode())


class ProgramCase(SynchronousTestCase):
    """A folder of programs that every user may look into."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="popdrop-test-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.folder.chmod(0o755)

    def tearDown(self) -> None:
        """Every child was waited for."""
        self.assertRaises(ChildProcessError, os.waitpid, -1, os.WNOHANG)

    def make(self, *words: object, **more: Any) -> Checkpassword:
        backend = Checkpassword("--auth x", tuple(map(str, words)), **more)
        verifyObject(IBackend, backend)
        return backend

    def answering(self, text: str, **more: Any) -> Checkpassword:
        """One whose program is this text of Python."""
        return self.make(programs.script(self.folder, "program", text), "-", **more)

    def refused(
        self, backend: Checkpassword, credentials: object, kind: type[PopdropError]
    ) -> PopdropError:
        error = self.assertRaises(PopdropError, backend.check, credentials)
        self.assertIs(type(error), kind, error.detail)
        return error

    def witness(self, **more: Any) -> Checkpassword:
        program = programs.script(self.folder, "witness")
        return self.make(program, self.folder / "seen", **more)

    def seen(self) -> list[dict[str, Any]]:
        path = self.folder / "seen"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class InterfaceTests(ProgramCase):
    """With a program that follows the description of the interface, in C."""

    def setUp(self) -> None:
        super().setUp()
        self.users = self.folder / "users"
        self.uid, self.gid = (1234, 4321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        self.users.write_text(
            f"bob:correct horse:{self.uid}:{self.gid}:{self.folder}:/bin/false\n"
            f"colon:x y:{self.uid}:{self.gid}:{self.folder}:/bin/sh\n"
        )
        self.users.chmod(0o644)
        program = programs.checkpassword(self.folder, self.users)
        self.backend = self.make(shlex.quote(str(program)))

    def test_good(self) -> None:
        account = self.backend.check(Cleartext(b"bob", b"correct horse"))
        known = os.geteuid() == 0  # otherwise our own uid is all that can be seen
        self.assertEqual(
            account,
            Account(
                b"bob",
                uid=self.uid if known else None,
                gid=self.gid if known else None,
                home=str(self.folder),
                shell="/bin/false",
            ),
        )

    def test_other_peoples_credentials(self) -> None:
        """As other programs of Twisted's make them."""
        self.assertEqual(
            self.backend.check(UsernamePassword(b"bob", b"correct horse")).name, b"bob"
        )

    def test_bad(self) -> None:
        for name, password in (
            (b"bob", b"correct hors"),
            (b"bob", b"correct horse "),
            (b"Bob", b"correct horse"),
            (b"nobody", b"correct horse"),
            (b"bob", b"1"),
        ):
            self.refused(self.backend, Cleartext(name, password), BadCredentials)

    def test_nothing_is_run(self) -> None:
        """NUL, emptiness and excess are refused here; the program would let `bob` in."""
        for password in (b"", b"correct horse\0", b"correct horse\0x", b"\0", b"x" * 1_000_000):
            self.refused(self.backend, Cleartext(b"bob", password), BadCredentials)

    def test_users_file_is_gone(self) -> None:
        self.users.unlink()
        error = self.refused(self.backend, Cleartext(b"bob", b"x"), TemporaryFailure)
        self.assertEqual(error.line(), b"-ERR [SYS/TEMP] authorization failed, try again later")
        self.assertIn("exit status 111", error.detail)

    def test_arguments(self) -> None:
        """One word is split as a shell does; with two, blanks belong to them."""
        folder = self.folder / "two  words"
        folder.mkdir()
        folder.chmod(0o755)
        program = programs.checkpassword(folder, self.users)
        env = shutil.which("env") or ""
        escaped = str(program).replace(" ", "\\ ")
        for words in (
            (f"'{program}'",),
            (f"{env}  --  '{program}'",),
            (f'{env} -- "{program}"',),
            (f"{env} -- {escaped}",),
            (env, "--", str(program)),
        ):
            self.assertEqual(
                self.make(*words).check(Cleartext(b"bob", b"correct horse")).name, b"bob", words
            )
        for word in (f"'{program}", f"{program} \\"):
            error = self.assertRaises(ConfigError, self.make, word)
            self.assertIn("a quote or a backslash has no end", str(error))
        error = self.assertRaises(ConfigError, self.make, str(program))
        self.assertIn("a name with a blank needs quotes", str(error))

    def test_kinds(self) -> None:
        self.assertEqual(self.backend.kinds, {"password"})
        self.refused(self.backend, apop(b"bob", b"correct horse"), NoVerifierOfThisKind)

    def test_rights_are_given_away_for_good(self) -> None:
        """Row 29: what runs as the user has all four ids of the user's, and no groups."""
        if os.geteuid() != 0:
            return
        program = self.folder / "checkpassword"
        given, into = os.pipe()
        os.write(into, b"bob\0correct horse\0<x@y>\0")
        os.close(into)
        self.addCleanup(os.close, given)
        said = subprocess.run(
            ["sh", "-c", 'exec "$0" cat /proc/self/status 3<&0', program],
            stdin=given,
            capture_output=True,
            check=True,
            timeout=DEADLINE,
        ).stdout.decode()
        self.assertIn(f"\nUid:\t{self.uid}\t{self.uid}\t{self.uid}\t{self.uid}\n", said)
        self.assertIn("\nGroups:\t \n", said)


class AuthuserTests(ProgramCase):
    """With a program that does APOP, too (`users/authuser`)."""

    def setUp(self) -> None:
        super().setUp()
        (self.folder / "authuser.users").write_text("bob:tanstaaf\nmrose:a:b c\n")
        program = programs.script(self.folder, "authuser")
        self.words = (program, self.folder / "authuser.users")
        self.backend = self.make(*self.words, apop="yes")

    def test_kinds(self) -> None:
        self.assertEqual(self.backend.kinds, {"password", "apop"})
        self.assertEqual(self.make(*self.words, apop="only").kinds, {"apop"})
        self.assertEqual(self.make(*self.words).kinds, {"password"})

    def test_apop(self) -> None:
        self.assertEqual(self.backend.check(apop(b"bob", b"tanstaaf")).name, b"bob")
        # The example of RFC 1939 page 15.
        digest = b"c4c9334bac560ecc979e58001b3e22fb"
        rfc = ApopCredentials(b"bob", STAMP, digest)
        self.assertEqual(self.backend.check(rfc).name, b"bob")

    def test_bad_apop(self) -> None:
        self.refused(self.backend, apop(b"bob", b"tanstaaF"), BadCredentials)
        self.refused(self.backend, apop(b"carol", b"tanstaaf"), BadCredentials)
        good = apop(b"bob", b"tanstaaf")
        replayed = ApopCredentials(b"bob", b"<2@host>", good.digest)
        self.refused(self.backend, replayed, BadCredentials)

    def test_password(self) -> None:
        self.assertEqual(self.backend.check(Cleartext(b"mrose", b"a:b c")).name, b"mrose")
        self.refused(self.backend, Cleartext(b"mrose", b"a"), BadCredentials)

    def test_a_digest_is_no_password(self) -> None:
        """PASS with a digest that a client could know beforehand."""
        for stamp in (b"", STAMP, b"<>", b"<@>"):
            digest = hashlib.md5(stamp + b"tanstaaf").hexdigest().encode()
            self.refused(self.backend, Cleartext(b"bob", digest), BadCredentials)

    def test_only(self) -> None:
        only = self.make(*self.words, apop="only")
        self.refused(only, Cleartext(b"bob", b"tanstaaf"), NoVerifierOfThisKind)
        self.assertEqual(only.check(apop(b"bob", b"tanstaaf")).name, b"bob")


class WitnessTests(ProgramCase):
    """What a program is given, octet by octet."""

    def test_message(self) -> None:
        backend = self.witness(apop="yes", user="login")
        backend.check(apop(b"bob", b"tanstaaf"))
        backend.check(Cleartext(b"bob", b"p:\xff\t\r\n%n%s"))
        backend.check(Cleartext(b"bob", b"x"))
        first, second, third = (each["given"].encode("latin-1") for each in self.seen())
        self.assertEqual(first, b"bob\0c4c9334bac560ecc979e58001b3e22fb\0" + STAMP + b"\0")
        name, password, stamp, rest = second.split(b"\0")
        self.assertEqual((name, password, rest), (b"bob", b"p:\xff\t\r\n%n%s", b""))
        self.assertRegex(stamp, rb"\A<[0-9a-f]{32}@localhost>\Z")
        self.assertNotIn(stamp, third)

    def test_surroundings(self) -> None:
        """Row 23: nothing of ours, nothing of the client's, no descriptor that is not its own."""
        extra = os.open(os.devnull, os.O_RDONLY)
        self.addCleanup(os.close, extra)
        os.set_inheritable(extra, True)
        os.environ["POPDROP_TEST"] = "1"
        self.addCleanup(os.environ.pop, "POPDROP_TEST")
        self.witness().check(Cleartext(b"bob", b"x"))
        (seen,) = self.seen()
        self.assertEqual(seen["environ"], ENVIRONMENT)
        self.assertEqual(seen["arguments"], [CAT, *REPORTED])
        self.assertEqual(seen["descriptors"], [0, 1, 2, 3])
        self.assertEqual(seen["0"], os.devnull)
        self.assertTrue(seen["leads"])

    def test_signals(self) -> None:
        """Python ignores SIGPIPE; a program of others' would not expect it."""
        status = run((CAT, "/proc/self/status"), bytearray(), DEADLINE).report.decode()
        for field in ("SigIgn", "SigBlk"):
            (mask,) = re.findall(rf"^{field}:	([0-9a-f]+)$", status, re.M)
            self.assertEqual(int(mask, 16) & 0x7FFFFFFF, 0, field)

    def test_length(self) -> None:
        """At most 512 octets in all."""
        backend = self.witness(apop="only")
        fits = MOST_OCTETS - len(b"bob") - len(STAMP) - 3
        backend.check(ApopCredentials(b"bob", STAMP, b"d" * fits))
        self.assertEqual(len(self.seen()[0]["given"]), MOST_OCTETS)
        longer = ApopCredentials(b"bob", STAMP, b"d" * (fits + 1))
        self.refused(backend, longer, BadCredentials)
        self.assertEqual(len(self.seen()), 1)

    def test_strange_names(self) -> None:
        """Rows 20, 23, 32: they arrive as they are, and in no environment."""
        backend = self.witness()
        for name in STRANGE_NAMES:
            self.assertEqual(backend.check(Cleartext(name, name)).name, name)
        for name, seen in zip(STRANGE_NAMES, self.seen(), strict=True):
            self.assertTrue(seen["given"].encode("latin-1").startswith(name + b"\0" + name + b"\0"))
            self.assertEqual(seen["environ"], ENVIRONMENT)
            self.assertEqual(seen["arguments"], [CAT, *REPORTED])

    def test_refused_names(self) -> None:
        """Rows 19, 21, 24, 31: no program sees these."""
        backend = self.witness(apop="yes")
        for name in REFUSED_NAMES:
            self.assertRaises(BadCredentials, backend.check, Cleartext(name, b"x"))
            self.assertRaises(BadCredentials, backend.check, apop(name, b"x"))
        self.assertEqual(self.seen(), [])

    def test_descriptors_are_closed(self) -> None:
        backend = self.witness()
        backend.check(Cleartext(b"bob", b"x"))
        gc.collect()
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(5):
            backend.check(Cleartext(b"bob", b"x"))
        self.assertLessEqual(set(os.listdir("/proc/self/fd")), before)


ENDS = "import os, sys\nos.set_blocking(3, True)\nos.read(3, 512)\n"
RUNS = "os.execv(sys.argv[2], sys.argv[2:])\n"


class EndTests(ProgramCase):
    """However a program ends (A-63, A-64)."""

    GIVEN = Cleartext(b"bob", b"secret")

    def test_exit_status(self) -> None:
        crashed = b"-ERR [SYS/TEMP] aack, child crashed"
        for ending, kind, line in (
            ("sys.exit(1)", BadCredentials, b"-ERR [AUTH] Authentication failed."),
            ("sys.exit(2)", PermanentFailure, b"-ERR [SYS/PERM] authorization failed"),
            (
                "sys.exit(111)",
                TemporaryFailure,
                b"-ERR [SYS/TEMP] authorization failed, try again later",
            ),
            ("sys.exit(3)", TemporaryFailure, crashed),
            ("sys.exit(100)", TemporaryFailure, crashed),
            ("sys.exit(255)", TemporaryFailure, crashed),
            ("os.kill(os.getpid(), 11)", TemporaryFailure, crashed),
            ("os.kill(os.getpid(), 9)", TemporaryFailure, crashed),
            ("sys.exit(0)", TemporaryFailure, crashed),
            ("os.execv('/bin/true', ['true'])", TemporaryFailure, crashed),
            ("os.write(1, b'Uid:\\t0\\t0\\t0\\t0\\n')", TemporaryFailure, crashed),
            ("os.write(1, b'hello\\n'); " + RUNS, TemporaryFailure, crashed),
            ("os.write(1, b'x' * 1000000)", TemporaryFailure, crashed),
            ("os.write(1, b'x' * 1000000); " + RUNS, TemporaryFailure, crashed),
        ):
            backend = self.answering(ENDS + ending)
            self.assertEqual(self.refused(backend, self.GIVEN, kind).line(), line, ending)

    def test_program_of_ones_own(self) -> None:
        error = self.refused(self.make("/bin/true", "-"), self.GIVEN, TemporaryFailure)
        self.assertIn("give it no program to run of your own", error.detail)

    def test_program_gone(self) -> None:
        backend = self.answering(ENDS)
        (self.folder / "program").unlink()
        error = self.refused(backend, self.GIVEN, TemporaryFailure)
        self.assertEqual(error.text, "aack, child crashed")
        self.assertIn("No such file", error.detail)

    def test_does_not_read(self) -> None:
        self.assertEqual(self.answering("import os, sys\n" + RUNS).check(self.GIVEN).name, b"bob")

    def test_user(self) -> None:
        sets = ENDS + "os.environ['USER'] = 'robert'\n" + RUNS
        error = self.refused(self.answering(sets), self.GIVEN, PermanentFailure)
        self.assertIn("user=reported", error.detail)
        self.assertEqual(self.answering(sets, user="reported").check(self.GIVEN).name, b"robert")
        self.assertEqual(self.answering(sets, user="login").check(self.GIVEN).name, b"bob")

    def test_user_that_is_no_name(self) -> None:
        for user in ("../bob", "", "bob\\n"):
            sets = ENDS + f"os.environ['USER'] = '{user}'\n" + RUNS
            for word in ("reported", "same"):
                self.refused(self.answering(sets, user=word), self.GIVEN, PermanentFailure)

    def test_nothing_can_be_slipped_into_the_report(self) -> None:
        """A variable with line ends in it, first of all."""
        sets = (
            "os.execve(sys.argv[2], sys.argv[2:],"
            " {'A': 'x\\nUid:\\t7\\t7\\t7\\t7\\nName:\\tcat', 'USER': 'bob'})\n"
        )
        account = self.answering(ENDS + sets).check(self.GIVEN)
        self.assertEqual(account.uid, 0 if os.geteuid() == 0 else None)

    def test_rights_kept_for_later(self) -> None:
        if os.geteuid() != 0:
            return
        text = ENDS + f"os.setresuid(0, {NOBODY}, {NOBODY})\n" + RUNS
        error = self.refused(self.answering(text), self.GIVEN, TemporaryFailure)
        self.assertIn("does it set all its ids?", error.detail)

    def test_time_limit(self) -> None:
        """It is killed, and what it has started too."""
        text = (
            "import os, sys, time\n"
            f"child = os.fork()\nopen('{self.folder}/pids', 'a').write(f'{{os.getpid()}} ')\n"
            "time.sleep(3600)\n"
        )
        path = self.folder / "pids"
        path.touch()
        # No time passes before both are there, however slow the machine is.
        clock = SimpleNamespace(monotonic=lambda: float(len(path.read_text().split()) == 2))
        self.patch(checkpassword, "time", clock)
        error = self.refused(self.answering(text, limit=0.1), self.GIVEN, TemporaryFailure)
        self.assertEqual(error.text, "aack, child crashed")
        self.assertIn("took longer than 0.1 s and was killed", error.detail)
        pids = path.read_text().split()
        deadline = time.monotonic() + DEADLINE
        for pid in pids:
            while self._runs(pid):
                self.assertLess(time.monotonic(), deadline, "still there")
                time.sleep(0.01)

    def test_cannot_be_killed(self) -> None:
        """Set-uid root programs: no login waits for them, and they are waited for all the same."""

        def refuse(pid: int, number: int) -> None:
            raise PermissionError(1, "Operation not permitted")

        gate = self.folder / "gate"
        os.mkfifo(gate)
        self.patch(os, "killpg", refuse)
        backend = self.answering(f"open('{gate}').read()\n", limit=0.5)
        before = set(threading.enumerate())
        self.refused(backend, self.GIVEN, TemporaryFailure)
        # It waits as long as nobody opens the gate.
        (waiting,) = set(threading.enumerate()) - before
        self.assertTrue(waiting.name.startswith("popdrop-wait-"))
        with open(gate, "w"):
            pass
        waiting.join(DEADLINE)

    def _runs(self, pid: str) -> bool:
        with contextlib.suppress(OSError):
            return ") Z " not in Path("/proc", pid, "stat").read_text()
        return False

    def test_somebody_holds_the_pipe(self) -> None:
        """A program that leaves a child behind is not waited for beyond its own end."""
        text = (
            ENDS + "if os.fork() == 0:\n    import time\n"
            f"    open('{self.folder}/new', 'w').write(str(os.getpid()))\n"
            f"    os.rename('{self.folder}/new', '{self.folder}/pid')\n"
            "    time.sleep(3600)\n"
            f"while not os.path.exists('{self.folder}/pid'): pass\n" + RUNS
        )
        self.assertEqual(self.answering(text, limit=3600).check(self.GIVEN).name, b"bob")
        os.kill(int((self.folder / "pid").read_text()), 9)

    def test_report(self) -> None:
        middle = b"cat\0"
        good = b"Name:\tcat\nUid:\t1\t1\t1\t1\nGid:\t2\t2\t2\t2\nA:\tb\ncat\0USER=x\0USER=y\0Z=\0"
        self.assertEqual(read_report(good, middle), (1, 2, {b"USER": b"x", b"Z": b""}))
        for ids in (b"1\t1\t0\t1", b"0\t1\t1\t1", b"1\t1\t1", b"x\t1\t1\t1"):
            bad = good.replace(b"1\t1\t1\t1", ids)
            self.assertRaises(ValueError, read_report, bad, middle)
        for end in range(good.index(middle) + len(middle)):
            self.assertRaises(ValueError, read_report, good[:end], middle)


BESIDE_SPAWN_PROCESS = """
import sys
from twisted.internet import reactor, defer, protocol
from popdrop.accounts.checkers import BackendChecker
from popdrop.accounts.checkpassword import Checkpassword
from popdrop.credentials import Cleartext
from popdrop.threads import Pool
pool = Pool(reactor, "auth", 4)
checker = BackendChecker(Checkpassword("--auth x", (sys.argv[1], sys.argv[2])), pool)
class Ends(protocol.ProcessProtocol):
    def __init__(self): self.done = defer.Deferred()
    def processEnded(self, reason): self.done.callback(reason.value.exitCode)
async def main():
    waiting = []
    for number in range(20):
        waiting.append(checker.requestAvatarId(Cleartext(b"bob", b"x")))
        ends = Ends()
        reactor.spawnProcess(ends, "/bin/sh", ["sh", "-c", "exit %d" % number])
        waiting.append(ends.done)
    results = await defer.gatherResults(waiting)
    assert results[1::2] == list(range(20)), results
    assert results[::2] == [b"bob"] * 20, results
    print("all", flush=True)
pool.start()
d = defer.Deferred.fromCoroutine(main())
d.addErrback(lambda f: f.printTraceback())
d.addBoth(lambda _: (pool.stop(), reactor.stop()))
reactor.run()
"""


class TwistedTests(ProgramCase):
    def test_beside_processes_of_the_reactors(self) -> None:
        """Twisted waits for its own children and leaves ours to us, and the other way round."""
        program = programs.script(self.folder, "witness")
        done = subprocess.run(
            [sys.executable, "-c", BESIDE_SPAWN_PROCESS, program, self.folder / "seen"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        self.assertEqual(done.stdout, "all\n", done.stderr)

    def test_needs_cat(self) -> None:
        if not CAT:
            raise SkipTest("needs the Debian package coreutils")
        self.assertTrue(os.path.isabs(CAT))
