"""The privileged helper under a real `twistd`: who has which rights, and who opens what."""

from __future__ import annotations

import contextlib
import os
import poplib
import pwd
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.end_to_end.harness import DEADLINE, Folder, Twistd, mail

PLAIN = "from twisted.scripts.twistd import run; run()"
RUN = """
import tests.helper_backends
from popdrop.accounts import helper
helper.REGISTRY = tests.helper_backends.REGISTRY
from twisted.scripts.twistd import run
run()
"""


class Helped(Twistd):
    """`twistd` with the tests' backends and, where there are rights to drop, with `--uid`."""

    def __init__(
        self,
        case: SynchronousTestCase,
        folder: Folder,
        *options: str,
        trace: str = "",
        drop: bool = True,
    ):
        self.folder = folder
        self.dropped = None
        # The tests' own backends, but where Popdrop's are what is tried.
        code = RUN if any("helper:reads:" in option for option in options) else PLAIN
        command = [sys.executable, "-c", code, "-n", "--pidfile", ""]
        if os.geteuid() == 0 and drop:
            self.dropped = pwd.getpwnam("games")[2:4]
            command += ["--uid", str(self.dropped[0]), "--gid", str(self.dropped[1])]
            for path in (folder.path, *folder.path.rglob("*")):
                if path.name != "words":
                    os.chown(path, *self.dropped)
        command += ["popdrop", "--state-dir", str(folder.state), "--throttle", "off"]
        command += ["--store", f"mbox:{folder.spools}/{{user}}:owner=any"]
        command += ["--listen", "tcp:0:interface=127.0.0.1", *options]
        if trace:
            # Detached, so that the child is twistd and not strace.
            command = [*trace.split(), *command]
        self.begin(case, command, folder.path)
        self.helper = int(self.wait_for(r"helper pid (\d+) serves")[1])
        self.ports = [int(self.wait_for(r"POP3 on \S+ port (\d+)")[1])]
        self.supervisor = int(facts(self.helper)["PPid"][0])


def facts(pid: int) -> dict[str, list[str]]:
    """/proc/PID/status (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


def stop(pid: int) -> None:
    """Stop a process, and wait until all of its threads are."""
    os.kill(pid, signal.SIGSTOP)
    while True:
        with contextlib.suppress(OSError):  # a thread has ended meanwhile
            tasks = Path(f"/proc/{pid}/task").glob("*/status")
            if all("\nState:\tT" in task.read_text() for task in tasks):
                return
        time.sleep(0.01)


def threads(pid: int) -> set[str]:
    """Numbers of all threads of a process."""
    return set(os.listdir(f"/proc/{pid}/task"))


def openers(trace: Path, path: object) -> set[str]:
    """The threads that have tried to open `path`, by the record of strace(1)."""
    return {
        line.split()[0]
        for line in trace.read_text("utf-8", "replace").splitlines()
        if re.match(rf'\d+ +open(?:at)?\((?:\S+, )?"{re.escape(str(path))}"', line)
    }


class HelperTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = Folder(self)
        self.folder.spool("bob", mail(1))
        self.words = self.folder.path / "words"
        self.words.write_text("the words of everybody\n")
        self.words.chmod(0o600)

    def serve(self, *options: str, trace: str = "") -> Helped:
        auth = f"helper:reads:{self.words}"
        self.server = Helped(self, self.folder, "--auth", auth, *options, trace=trace)
        return self.server

    def login(self, password: str = "the words of everybody", name: str = "bob") -> poplib.POP3:
        client = self.server.client()
        self.addCleanup(client.close)
        client.user(name)
        client.pass_(password)
        return client

    def refused(self, *words: str) -> bytes:
        failure = self.assertRaises(poplib.error_proto, self.login, *words)
        octets = failure.args[0]
        assert isinstance(octets, bytes)
        return octets

    def test_rights(self) -> None:
        """The network process has none, and no way to any (CVE-2019-18862); the helper has."""
        server = self.serve()
        self.assertEqual(self.login().stat()[0], 1)
        self.assertEqual(self.refused("wrong"), b"-ERR [AUTH] Authentication failed.")
        network, helper = facts(server.process.pid), facts(server.helper)
        self.assertEqual(helper["Uid"], [str(os.geteuid())] * 4)
        if server.dropped is None:
            self.assertEqual(network["Uid"], helper["Uid"])
            self.assertIn("without root's rights", "\n".join(server.log))
            return
        uid, gid = map(str, server.dropped)
        # Real, effective, saved and that of the file system: no way back (setresuid(2)).
        self.assertEqual(network["Uid"], [uid] * 4)
        self.assertEqual(network["Gid"], [gid] * 4)
        self.assertLessEqual(set(network["Groups"]), {gid})
        for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            self.assertEqual(int(network[capabilities][0], 16), 0, capabilities)
        self.assertEqual(os.stat(self.words).st_uid, 0)

    def test_who_opens_the_words(self) -> None:
        """strace: the file of passwords is the helper's alone, and no setuid comes after ours."""
        if shutil.which("strace") is None:
            raise SkipTest("strace is missing: install the Debian package strace")
        trace = self.folder.path / "trace"
        calls = "open,openat,setuid,setgid,setreuid,setregid,setresuid,setresgid,setgroups"
        server = self.serve(trace=f"strace -D -f -qq -e trace={calls} -o {trace}")
        self.login()
        self.refused("wrong")
        pid = server.process.pid
        network, helper = threads(pid), threads(server.helper)
        server.stop()
        readers = openers(trace, self.words)
        # Without root's rights strace is not let in to read what the helper names to the kernel.
        self.assertEqual(bool(readers), os.geteuid() == 0)
        self.assertLessEqual(readers, helper)
        spool = openers(trace, self.folder.spools / "bob")
        self.assertTrue(spool & network)
        self.assertFalse(spool & helper)
        for secret in ("/etc/shadow", "/etc/gshadow"):
            self.assertFalse(openers(trace, secret) & network)
        if server.dropped is not None:
            lines = trace.read_text("utf-8", "replace").splitlines()
            ours = [line for line in lines if re.match(rf"{pid} +set(?:re)?s?(?:uid|gid)\(", line)]
            self.assertTrue(ours)
            numbers = {word for line in ours for word in re.findall(r"[(, ](\d+)(?=[,)])", line)}
            self.assertLessEqual(numbers, set(map(str, server.dropped)), ours)

    def test_killed_helper(self) -> None:
        """`[SYS/TEMP]` and not `[AUTH]` while there is none; then all is as before."""
        server = self.serve()
        self.login().quit()
        client, other = server.client(), server.client()
        self.addCleanup(client.close)
        self.addCleanup(other.close)
        client.user("bob")
        stop(server.helper)
        client._putcmd("PASS the words of everybody")
        # What comes later is answered: by then the helper has been asked.
        other.capa()
        os.kill(server.helper, signal.SIGKILL)
        failure = self.assertRaises(poplib.error_proto, client._getresp)
        self.assertTrue(failure.args[0].startswith(b"-ERR [SYS/TEMP] "), failure.args)
        second = int(server.wait_for(r"helper pid (\d+) serves")[1])
        self.assertNotEqual(second, server.helper)
        self.assertEqual(self.login().stat()[0], 1)

    def test_everything_ends(self) -> None:
        """With a stop in order, and with a kill."""
        for kill in (False, True):
            server = self.serve()
            self.login().quit()
            watches = [os.pidfd_open(pid) for pid in (server.supervisor, server.helper)]
            if kill:
                server.kill()
            else:
                log = server.stop()
                self.assertNotIn("Traceback", log)
                self.assertNotIn("the words", log)
            for watch in watches:
                self.assertTrue(select.select([watch], [], [], DEADLINE)[0])
                os.close(watch)

    def test_passwd_file(self) -> None:
        """Popdrop's own checker behind `helper:`, with a file that is only root's."""
        self.words.write_text("bob:{PLAIN}hunter2:4711:4711::/nonexistent:/bin/sh\n")
        self.server = Helped(self, self.folder, "--auth", f"helper:passwd:{self.words}")
        self.assertEqual(self.login("hunter2").stat()[0], 1)
        self.assertEqual(self.refused("wrong"), b"-ERR [AUTH] Authentication failed.")
        self.assertEqual(self.refused("wrong", "nobody"), b"-ERR [AUTH] Authentication failed.")
        self.assertIn("reason=bad-credentials", self.server.stop())

    def test_limits_of_a_passwd_file(self) -> None:
        """What the file says against a login holds behind `helper:` too."""
        home = ":4711:4711::/nonexistent:/bin/sh"
        self.words.write_text(
            f"bob:{{PLAIN}}hunter2{home}:allow_nets=127.0.0.0/8\n"
            f"carol:{{PLAIN}}hunter2{home}:nologin\n"
            f"dave:{{PLAIN}}hunter2{home}:allow_nets=192.0.2.0/24\n"
            "erin:{PLAIN}hunter2:0:0:99999:7::365:\n"  # shadow(5): expired on 1971-01-01
        )
        self.server = Helped(self, self.folder, "--auth", f"helper:passwd:{self.words}")
        self.assertEqual(self.login("hunter2").stat()[0], 1)
        for name in ("carol", "dave", "erin"):
            told = self.refused("hunter2", name)
            self.assertEqual(told, b"-ERR [AUTH] Authentication failed.", name)

    def test_a_start_that_fails(self) -> None:
        """One line that names the option; nothing stays behind."""
        unsafe = self.folder.path / "open"
        unsafe.mkdir()
        unsafe.chmod(0o777)
        options = (
            *("--auth", f"accounts:{self.folder.accounts}"),
            *("--popauth-socket", f"{unsafe}/popauth"),
        )
        failure = self.assertRaises(AssertionError, self.serve, *options)
        told = str(failure).splitlines()[-1]
        self.assertIn(f"popdrop: --popauth-socket {unsafe}/popauth: others may write", told)
        self.assertNotIn("Traceback", str(failure))

    def test_names_that_are_paths(self) -> None:
        self.serve()
        for name in ("../bob", "a/b", ".", "..", "bob.lock", "() { :;};", "LD_PRELOAD=x", "%s%n"):
            answer = self.refused("wrong", name)
            self.assertTrue(answer.startswith(b"-ERR "), answer)
            with contextlib.suppress(poplib.error_proto):
                self.login("the words of everybody", name)
        self.assertEqual(sorted(p.name for p in self.folder.spools.iterdir()), ["bob"])
        self.login().quit()
