"""What a server may do once it serves: no right of root's, and two folders to write to."""

from __future__ import annotations

import os
import poplib
import pwd
import re
import shutil
import signal
import time
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.end_to_end.harness import DEADLINE, ROOT, Folder, Twistd, command, mail
from tests.end_to_end.test_helper import facts

IS_ROOT = os.geteuid() == 0
GROUPS = "import os; os.setgroups([0, 4, 27]) if os.geteuid() == 0 else None\n"
"""Started with groups of root's: root, adm and sudo."""
OPENED = re.compile(r"open(?:at)?\((?:[^,]*, )?\"[^\"]*\", ([A-Z_|0-9]+).* = \d+<(.*)>$")
CHANGED = re.compile(
    r"(?:rename|renameat2?|link|linkat|unlink|unlinkat|mkdir|mkdirat|rmdir|symlink|symlinkat|"
    r"chmod|fchmodat|chown|lchown|fchownat|truncate|mknod|mknodat)\((.*)\) = 0$"
)
PLACE = re.compile(r"(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?\"([^\"]*)\"")
"""The folder that a path is relative to, where the call names one, and the path."""


def written(trace: str) -> set[str]:
    """The files that calls of this trace have changed, made or opened to be written to."""
    found = set()
    for line in trace.splitlines():
        call = line.partition(" ")[2].strip()  # behind the process's number
        opened = OPENED.match(call)
        if opened and re.search("O_(WRONLY|RDWR|CREAT|TRUNC)", opened[1]):
            found.add(opened[2])
        changed = CHANGED.match(call)
        if changed:
            for folder, name in PLACE.findall(changed[1]):
                found.add(os.path.join(folder or "/", name))
    return found


class RightsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = Folder(self)
        self.folder.path.chmod(0o711)
        self.folder.add("bob", password="hunter2")

    def test_nothing_of_roots_is_left(self) -> None:
        """Uids, gids and supplementary groups, of the process that meets the network."""
        words = command(self.folder, listen=("tcp:0:interface=127.0.0.1",))
        words[2] = GROUPS + words[2]
        if IS_ROOT:
            them = pwd.getpwnam("games")
            uid, gid = them.pw_uid, 8
            words[words.index("popdrop") : words.index("popdrop")] = [
                *("--uid", str(uid)),
                *("--gid", str(gid)),
            ]
            for path in (self.folder.state, *self.folder.state.rglob("*")):
                os.chown(path, uid, gid)
            groups = set(os.getgrouplist(them.pw_name, gid))
        else:
            uid, gid, groups = os.geteuid(), os.getegid(), set(os.getgroups())
        server = Twistd.__new__(Twistd)
        server.folder = self.folder
        server.begin(self, words, self.folder.path)
        server.wait_for(r"POP3 on \S+ port (\d+)")
        found = facts(server.process.pid)
        self.assertEqual(found["Uid"], [str(uid)] * 4)
        self.assertEqual(found["Gid"], [str(gid)] * 4)
        self.assertEqual(set(map(int, found["Groups"])), groups)
        if IS_ROOT:
            self.assertNotIn(0, groups)
            self.assertEqual([int(found[name][0], 16) for name in ("CapPrm", "CapEff")], [0, 0])

    def test_the_group_of_root_is_refused(self) -> None:
        """Its files are many; the name of the user is not enough."""
        words = command(self.folder, listen=("tcp:0:interface=127.0.0.1",))
        number = "5" if IS_ROOT else str(os.geteuid())
        words[words.index("popdrop") : words.index("popdrop")] = ["--uid", number, "--gid", "0"]
        if IS_ROOT:
            for path in (self.folder.state, *self.folder.state.rglob("*")):
                os.chown(path, 5, 0)
        server = Twistd.__new__(Twistd)
        server.folder = self.folder
        server.begin(self, words, self.folder.path)
        self.assertNotEqual(server.process.wait(DEADLINE), 0)
        said = server.stop()
        self.assertNotIn("POP3 on", said)
        if IS_ROOT:
            self.assertIn("popdrop: --uid: rights of root's are left", said)

    def test_it_writes_to_two_folders(self) -> None:
        """From the start to the end, with a deletion, a reload and a failed login between."""
        program = shutil.which("strace")
        if program is None:
            raise SkipTest("needs the Debian package strace")
        self.folder.spool("bob", mail(1) + mail(2) + mail(3, b"x" * 79 + b"\n" * 5000))
        trace = self.folder.path / "trace"
        traced = [program, "-D", "-f", "-y", "-o", str(trace), "-e", "trace=%file"]
        server = Twistd.__new__(Twistd)
        server.folder = self.folder
        words = command(self.folder, listen=("tcp:0:interface=127.0.0.1",))
        server.begin(self, traced + words, self.folder.path)
        server.ports = [int(server.wait_for(r"POP3 on \S+ port (\d+)")[1])]
        for password in ("wrong", "hunter2", "hunter2"):
            client = server.client()
            client.user("bob")
            try:
                client.pass_(password)
                client.dele(1)
            except poplib.error_proto:
                pass
            client.quit()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("opening the session logs anew")
        server.stop()
        places = written(self.ended(trace, server.process.pid))
        inside = {
            path
            for path in places
            for folder in (self.folder.state, self.folder.spools)
            if Path(path).is_relative_to(folder)
        }
        # What begins so is a file without a name, which gets one by linkat(2).
        outside = {path for path in places - inside if not path.startswith("/proc/self/fd/")}
        self.assertEqual(outside - {"/dev/null"}, set())
        # It has been seen to write where it has to.
        self.assertIn(str(self.folder.spools / "bob"), inside)
        self.assertIn(f"{self.folder.spools}/.bob.popdrop", inside)
        self.assertTrue(any(path.startswith(str(self.folder.state)) for path in inside))

    def test_nothing_of_a_users_is_read_before_the_drop(self) -> None:
        """CVE-2005-1151: neither a spool nor what lies beside it, a journal of a crash included."""
        program = shutil.which("strace")
        if program is None:
            raise SkipTest("needs the Debian package strace")
        spool = self.folder.spool("bob", mail(1))
        journal = self.folder.spools / ".bob.popdrop"
        journal.write_bytes(b"a user wrote this")
        (self.folder.spools / ".bob.popdrop.idx").write_bytes(b"and this")
        words = command(self.folder, listen=("tcp:0:interface=127.0.0.1",))
        if IS_ROOT:
            games = pwd.getpwnam("games").pw_uid
            words[words.index("popdrop") : words.index("popdrop")] = [
                *("--uid", str(games)),
                *("--gid", "8"),
            ]
            for path in (self.folder.state, *self.folder.state.rglob("*"), spool, journal):
                os.chown(path, games, 8)
            os.chown(self.folder.spools, 0, 8)
            self.folder.spools.chmod(0o2775)
        trace = self.folder.path / "trace"
        calls = "trace=%file,setuid,setreuid,setresuid"
        server = Twistd.__new__(Twistd)
        server.folder = self.folder
        traced = [program, "-D", "-f", "-y", "-o", str(trace), "-e", calls]
        server.begin(self, traced + words, self.folder.path)
        server.ports = [int(server.wait_for(r"POP3 on \S+ port (\d+)")[1])]
        client = server.client()
        client.user("bob")
        # What lies there is no journal, so nobody knows whether the spool is whole.
        self.assertRaises(poplib.error_proto, client.pass_, "hunter2")
        client.quit()
        server.stop()
        text = self.ended(trace, server.process.pid)
        dropped = re.search(r" set(?:res|re)?uid\([1-9]\d*.* = 0$", text, re.MULTILINE)
        self.assertEqual(dropped is not None, IS_ROOT)
        before = text[: dropped.start()] if dropped else ""
        for inside in (f"{self.folder.spools}/", f"{self.folder.spools}>"):
            self.assertNotIn(inside, before)
        # And later it is: the trace shows what is looked for.
        self.assertIn(str(journal), text[len(before) :])

    def ended(self, trace: Path, pid: int) -> str:
        """What strace has written, once it has written the end of process `pid`."""
        text, end = "", time.monotonic() + DEADLINE
        while not re.search(rf"^{pid} +\+\+\+ ", text, re.MULTILINE):
            self.assertLess(time.monotonic(), end, "strace has not ended")
            time.sleep(0.01)
            text = trace.read_text()
        return text

    def test_the_unit_allows_no_more(self) -> None:
        """The same two folders are all that the service may write to under systemd."""
        text = (ROOT / "contrib" / "systemd" / "popdrop.service").read_text()
        lines = dict(line.partition("=")[::2] for line in text.splitlines() if "=" in line)
        self.assertEqual(lines["ProtectSystem"], "strict")
        folders = {f"/var/lib/{lines['StateDirectory']}", *lines["ReadWritePaths"].split()}
        self.assertEqual(folders, {"/var/lib/popdrop", "/var/mail"})
        for name in ("CacheDirectory", "LogsDirectory", "RuntimeDirectory", "BindPaths"):
            self.assertNotIn(name, lines)
