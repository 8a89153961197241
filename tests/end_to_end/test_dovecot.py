"""Unique-ids go on from a real Dovecot to Popdrop, and back."""

from __future__ import annotations

import os
import poplib
import pwd
import subprocess
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.end_to_end.harness import DEADLINE, Folder, Twistd, mail
from tests.end_to_end.mtas import Missing, find

LIBRARIES = "usr/lib/dovecot/libdovecot.so.0"
POP3 = "usr/lib/dovecot/pop3"


def settings(home: Path, spool: Path, form: str) -> dict[str, str]:
    """Dovecot's, as its own `doveconf` gives them to the programs that it starts."""
    return {
        "DOVECONF_ENV": "1",
        "MAIL_LOCATION": f"mbox:{home}/mail:INBOX={spool}:INDEX=MEMORY",
        "POP3_UIDL_FORMAT": form,
        "LOG_PATH": "/dev/stderr",
        "BASE_DIR": f"{home}/run",
        "STATE_DIR": f"{home}/state",
        "MBOX_READ_LOCKS": "fcntl",
        "MBOX_WRITE_LOCKS": "fcntl",
        "SSL": "no",
    }


class DovecotTests(SynchronousTestCase):
    """Dovecot serves nothing as root, so a spool is given to `nobody` for its sessions."""

    def setUp(self) -> None:
        try:
            self.program = find("dovecot-pop3d", POP3)
            self.libraries = find("dovecot-core", LIBRARIES).parent
        except Missing as missing:
            raise SkipTest(str(missing)) from None
        self.folder = Folder(self)
        self.folder.add("bob", "hunter2")
        self.spool = self.folder.spool("bob", b"".join(mail(i) for i in range(5)))
        self.home = self.folder.path / "dovecot"
        self.home.mkdir()
        root = os.geteuid() == 0
        self.uid, self.gid = pwd.getpwnam("nobody")[2:4] if root else (os.geteuid(), os.getegid())

    def give(self, uid: int, gid: int) -> None:
        for path in (self.home, self.spool, self.folder.spools, self.folder.path):
            os.chown(path, uid, gid)

    def dovecot(self, form: str, *commands: str) -> list[str]:
        """The ids of a session of Dovecot's, without any index of an earlier one."""
        self.give(self.uid, self.gid)
        rights = {"user": self.uid, "group": self.gid, "extra_groups": []}
        done = subprocess.run(
            [self.program],
            input="".join(line + "\r\n" for line in ("UIDL", *commands, "QUIT")).encode(),
            env={
                "USER": "bob",
                "HOME": str(self.home),
                "GID": str(self.gid),
                "LD_LIBRARY_PATH": str(self.libraries),
                **settings(self.home, self.spool, form),
            },
            capture_output=True,
            timeout=DEADLINE,
            check=False,
            **(rights if os.geteuid() == 0 else {}),  # type: ignore[call-overload]
        )
        self.give(os.geteuid(), os.getegid())
        lines = done.stdout.decode().split("\r\n")
        self.assertIn("+OK", lines, done)
        ids = lines[lines.index("+OK") + 1 : lines.index(".")]
        return [line.split()[1] for line in ids]

    def popdrop(self, server: Twistd, *deleted: int) -> list[str]:
        """The ids of a session of Popdrop's; `deleted` are message-numbers."""
        client: poplib.POP3 = server.client()
        client.user("bob")
        client.pass_("hunter2")
        ids = [row.split()[1].decode() for row in client.uidl()[1]]
        for number in deleted:
            client.dele(number)
        client.quit()
        return ids

    def go_on(self, form: str, keyword: str) -> None:
        ids = self.dovecot(form)
        self.assertEqual(len(set(ids)), 5)
        store = f"mbox:{self.folder.spools}/{{user}}:uidl={keyword}"
        server = Twistd(self, self.folder, "--store", store)
        self.assertEqual(self.popdrop(server, 1, 3), ids)
        ids = [ids[1], *ids[3:]]
        self.assertEqual(self.popdrop(server, 1), ids)
        self.assertEqual(self.popdrop(server), ids[1:])
        # And back, though another message holds the base now, and Dovecot knows nothing else.
        self.assertEqual(self.dovecot(form, "DELE 1"), ids[1:])
        self.assertEqual(self.popdrop(server), ids[2:])

    def test_default(self) -> None:
        self.go_on("%08Xu%08Xv", "x-uid")

    def test_as_uw_ipop3d(self) -> None:
        self.go_on("%08Xv%08Xu", "x-uid[%08Xv%08Xu],hash")

    def test_decimal(self) -> None:
        self.go_on("%v.%u", "x-uid[%v.%u]")
