"""Spools of mode 0600 under a real `twistd` that has no right to them: `open=helper`."""

from __future__ import annotations

import os
import poplib
import pwd
import signal
import stat
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.end_to_end.harness import DEADLINE, Folder, Twistd, environment, mail
from tests.end_to_end.test_helper import RUN, facts, stop

ROOT = os.geteuid() == 0
UIDS = (70001, 70002, 70003)
TRY = 'cat "$1" && exit 1; true <>"$1" && exit 2; true >>"$1" && exit 3; exit 0'
"""What a shell of some user's is asked to do with a spool; the status is 0 where it could not."""


KILLED = """
import os, sys
from popdrop.stores.mbox.journal import Files
from popdrop.stores.mbox.store import MboxFactory
from popdrop.values import Owner

path, state, uid = sys.argv[1:]
spool = os.open(path, os.O_RDWR)
os.setgroups([])
os.setgid(8)
os.setuid(int(uid))
folder, name = os.path.split(path)
store = MboxFactory().make(None, state, folder + "/{user}", open="helper")
store.opener = lambda name: os.dup(spool)
drop = store.open(Owner(name, uid=int(name[1:])))
Files.ftruncate = staticmethod(lambda fd, size: os._exit(9))
drop.commit([0])
"""
"""A server that ends after the journal and before the spool is cut."""


class Server(Twistd):
    """`twistd --uid games --gid mail`: the fourth uid, in the group of the folder."""

    def __init__(self, case: SynchronousTestCase, folder: Folder, *options: str):
        self.folder = folder
        command = [sys.executable, "-c", RUN, "-n", "--pidfile", ""]
        if ROOT:
            uid, gid = pwd.getpwnam("games").pw_uid, 8
            command += ["--uid", str(uid), "--gid", str(gid)]
            for path in (folder.state, *folder.state.rglob("*")):
                os.chown(path, uid, gid)
        command += ["popdrop", "--state-dir", str(folder.state), "--throttle", "off"]
        command += ["--listen", "tcp:0:interface=127.0.0.1", *options]
        self.begin(case, command, folder.path)

    def ready(self) -> None:
        self.helper = int(self.wait_for(r"helper pid (\d+) serves")[1])
        self.ports = [int(self.wait_for(r"POP3 on \S+ port (\d+)")[1])]


class OpenHelperTests(SynchronousTestCase):
    kind: type[Server] = Server

    def setUp(self) -> None:
        self.folder = Folder(self)
        self.folder.path.chmod(0o711)
        self.spools = self.folder.spools
        if ROOT:
            os.chown(self.spools, 0, 8)
        # As Debian's /var/mail.
        self.spools.chmod(0o2775)

    def serve(self, *options: str, opening: str = "helper") -> Server | None:
        """`None` without root's rights: then it has said that it needs them."""
        store = f"mbox:{self.spools}/{{user}}" + (f":open={opening}" if opening else "")
        server = self.kind(self, self.folder, "--store", store, *(options or self.helped))
        if not ROOT:
            self.assertIsNotNone(server.wait_for("the helper needs root's rights; start as root"))
            return None
        server.ready()
        return server

    helped = ("--auth", "helper:numbered:")

    def spool(self, name: str, uid: int, octets: bytes) -> Path:
        path = self.folder.spool(name, octets)
        if ROOT:
            os.chown(path, uid, uid)
        return path

    def login(self, server: Server, name: str) -> poplib.POP3:
        client = server.client()
        self.addCleanup(client.close)
        client.user(name)
        client.pass_(name[::-1])
        return client

    def refused(self, server: Server, name: str) -> bytes:
        error = self.assertRaises(poplib.error_proto, self.login, server, name)
        octets = error.args[0]
        assert isinstance(octets, bytes)
        return octets

    def test_three_users(self) -> None:
        """Listed, fetched, deleted, with mail that comes meanwhile; none of it by the server's
        own rights."""
        kept = [mail(number) for number in range(4)]
        paths = [self.spool(f"u{uid}", uid, b"".join(kept)) for uid in UIDS]
        before = [os.stat(path) for path in paths]
        server = self.serve()
        if server is None:
            return
        clients = [self.login(server, f"u{uid}") for uid in UIDS]
        network = facts(server.process.pid)
        games = str(pwd.getpwnam("games").pw_uid)
        self.assertEqual((network["Uid"], network["Gid"]), ([games] * 4, ["8"] * 4))
        self.assertLessEqual(set(network["Groups"]), {"8"})
        for capabilities in ("CapPrm", "CapEff", "CapAmb"):
            self.assertEqual(int(network[capabilities][0], 16), 0, capabilities)
        for path in paths:
            tried = subprocess.run(
                ["/bin/sh", "-c", TRY, "sh", str(path)],
                user=int(network["Uid"][1]),
                group=int(network["Gid"][1]),
                extra_groups=[int(each) for each in network["Groups"]],
                env={"LC_ALL": "C"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=DEADLINE,
                check=False,
            )
            self.assertEqual(tried.returncode, 0, tried.stderr)
            self.assertEqual(tried.stderr.lower().count(b"permission denied"), 3)
        for client, path, found in zip(clients, paths, before, strict=True):
            self.assertEqual(client.stat()[0], 4)
            body = b"\n".join(client.retr(2)[1])
            self.assertEqual(body, kept[1].partition(b"\n")[2].rstrip(b"\n"))
            client.dele(2)
            with path.open("ab") as delivery:
                delivery.write(mail(9))
            self.assertTrue(client.quit().startswith(b"+OK"))
            self.assertEqual(path.read_bytes(), kept[0] + kept[2] + kept[3] + mail(9))
            after = os.stat(path)
            for name in ("st_ino", "st_uid", "st_gid", "st_mode"):
                self.assertEqual(getattr(after, name), getattr(found, name), name)
        # Neither a dot-lock nor a journal is left.
        self.assertEqual(sorted(os.listdir(self.spools)), sorted(path.name for path in paths))
        for uid in UIDS:
            client = self.login(server, f"u{uid}")
            self.assertEqual(client.stat()[0], 4)
            for number in range(1, 5):
                client.dele(number)
            client.quit()
        self.assertEqual([path.read_bytes() for path in paths], [b""] * 3)

    def test_by_default(self) -> None:
        """Where root starts it and the helper verifies all logins: nothing need be said."""
        if not ROOT:
            self.serve()
            return
        spool = self.spool("u70001", UIDS[0], mail(1))
        server = self.serve(opening="")
        assert server is not None
        client = self.login(server, "u70001")
        client.dele(1)
        client.quit()
        self.assertEqual(spool.read_bytes(), b"")
        # What can be read without it is not written by means of it.
        readable = self.spool("u70003", UIDS[2], mail(1))
        os.chown(readable, UIDS[2], 8)
        readable.chmod(0o640)
        client = self.login(server, "u70003")
        client.dele(1)
        self.assertRaises(poplib.error_proto, client.quit)
        self.assertEqual(readable.read_bytes(), mail(1))
        server.stop()
        # With another --auth beside it the helper does not know of all logins.
        self.spool("u70002", UIDS[1], mail(1))
        server = self.serve(*self.helped, "--auth", f"accounts:{self.folder.accounts}", opening="")
        assert server is not None
        self.assertTrue(self.refused(server, "u70002").startswith(b"-ERR [SYS/PERM]"))

    def test_without_it(self) -> None:
        """The same by `open=direct`: refused, so that the helper is what makes it possible."""
        self.spool("u70001", UIDS[0], mail(1))
        if not ROOT:
            self.serve()
            return
        server = self.serve(opening="direct")
        assert server is not None
        self.assertTrue(self.refused(server, "u70001").startswith(b"-ERR [SYS/PERM]"))

    def test_what_is_no_spool(self) -> None:
        other = self.spool("other", UIDS[1], mail(1))
        path = self.spools / "u70001"
        server = self.serve()
        if server is None:
            return
        makers = (
            lambda: path.symlink_to(other),
            lambda: os.link(other, path),
            lambda: os.mkfifo(path),
            lambda: self.spool("u70001", UIDS[1], mail(2)),
        )
        for make in makers:
            make()
            self.assertTrue(self.refused(server, "u70001").startswith(b"-ERR [SYS/PERM]"))
            path.unlink()
        self.assertEqual(self.login(server, "u70001").stat(), (0, 0))
        self.assertEqual(other.read_bytes(), mail(1))

    def test_helper_is_killed(self) -> None:
        """A session that is open needs it no more; the next ones are served by a new one."""
        path = self.spool("u70001", UIDS[0], mail(1) + mail(2))
        self.spool("u70002", UIDS[1], mail(3))
        server = self.serve()
        if server is None:
            return
        client = self.login(server, "u70001")
        stop(server.helper)
        waiting = server.client()
        self.addCleanup(waiting.close)
        waiting.user("u70002")
        # Not answered before the helper, which does not run, has died.
        waiting.sock.sendall(b"PASS 20007u\r\n")
        client.dele(1)
        os.kill(server.helper, signal.SIGKILL)
        self.assertIn(b"\n-ERR [SYS/TEMP]", b"\n" + waiting.file.readline())
        self.assertTrue(client.quit().startswith(b"+OK"))
        self.assertEqual(path.read_bytes(), mail(2))
        self.assertNotEqual(int(server.wait_for(r"helper pid (\d+) serves")[1]), server.helper)
        self.assertEqual(self.login(server, "u70002").stat()[0], 1)

    def test_accounts_of_our_own(self) -> None:
        """Their logins the helper cannot know: `helper-all` says that it shall open for all."""
        names = ("backup", "list", "irc")
        for name in names:
            self.folder.add(name, name[::-1])
        auth = ("--auth", f"accounts:{self.folder.accounts}")
        store = f"mbox:{self.spools}/{{user}}:open=helper"
        strict = self.kind(self, self.folder, "--store", store, *auth)
        words = "logins that it has verified itself" if ROOT else "needs root's rights"
        self.assertIsNotNone(strict.wait_for(words))
        paths = [
            self.spool(name, pwd.getpwnam(name).pw_uid if ROOT else 0, mail(1)) for name in names
        ]
        server = self.serve(*auth, opening="helper-all")
        if server is None:
            return
        for name, path in zip(names, paths, strict=True):
            client = self.login(server, name)
            self.assertEqual(client.stat()[0], 1)
            client.dele(1)
            client.quit()
            self.assertEqual(path.read_bytes(), b"")
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)

    def test_a_journal_of_a_crash(self) -> None:
        """At the start the server cannot end it; the user's login does."""
        kept = [mail(number) for number in range(4)]
        path = self.spool("u70001", UIDS[0], b"".join(kept))
        if not ROOT:
            self.serve()
            return
        games = pwd.getpwnam("games").pw_uid
        os.chown(self.folder.state, games, 8)
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(self.folder.state), str(games)],
            env=environment(self.folder.path),
            timeout=DEADLINE,
            check=False,
        )
        self.assertEqual(killed.returncode, 9)
        journal = self.spools / ".u70001.popdrop"
        self.assertTrue(journal.exists())
        torn = path.read_bytes()
        self.assertNotEqual(torn, b"".join(kept[1:]))
        server = self.serve()
        assert server is not None
        self.assertIsNotNone(server.told("waits for its user's login"))
        self.assertEqual(path.read_bytes(), torn)
        self.assertEqual(self.login(server, "u70001").stat()[0], 3)
        self.assertEqual(path.read_bytes(), b"".join(kept[1:]))
        self.assertFalse(journal.exists())
