"""`update-status=yes` through a real server, and what a mail reader makes of it."""

from __future__ import annotations

import os
import re
import socket

from twisted.trial.unittest import SynchronousTestCase

from tests.end_to_end.clients import in_terminal, need, private
from tests.end_to_end.harness import DEADLINE, Folder, Twistd, mail


def read(octets: bytes) -> bytes:
    return octets.replace(b"\n", b"\nStatus: RO\n", 1)


class StatusTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = Folder(self)
        self.folder.add("bob", "hunter2")
        self.mails = [mail(number) for number in range(4)]
        self.spool = self.folder.spool("bob", b"".join(self.mails))
        store = f"mbox:{self.folder.spools}/{{user}}:update-status=yes"
        self.server = Twistd(self, self.folder, "--store", store)

    def session(self, *commands: str, quits: bool = True) -> list[str]:
        """The replies to commands of one line each, behind the login."""
        lines = ["USER bob", "PASS hunter2", *commands, *(["QUIT"] if quits else [])]
        with socket.create_connection(("127.0.0.1", self.server.port), DEADLINE) as client:
            client.sendall("".join(line + "\r\n" for line in lines).encode())
            client.shutdown(socket.SHUT_WR)
            octets = b"".join(iter(lambda: client.recv(65536), b""))
        return octets.decode().split("\r\n")

    def test_marked_at_quit(self) -> None:
        before = self.session("UIDL", "LIST", quits=False)
        found = self.session("RETR 2", "TOP 3 0", "DELE 4", "RETR 1", "DELE 1", "UIDL")
        self.assertIn("signing off", found[-2])
        wanted = read(self.mails[1]) + self.mails[2]
        self.assertEqual(self.spool.read_bytes(), wanted)
        after = self.session("UIDL", "LIST")
        for number in (2, 3):
            # Ids and sizes are as they were, though the numbers are not.
            for row in (r.removeprefix(f"{number} ") for r in before if r.startswith(f"{number} ")):
                self.assertIn(f"{number - 1} {row}", after)
        self.assertEqual(self.spool.read_bytes(), wanted)

    def test_only_at_quit(self) -> None:
        for commands in (("RETR 1",), ("RETR 1", "DELE 2"), ("RETR 1", "QUI")):
            self.session(*commands, quits=False)
        for commands in (("TOP 1 10",), ("RETR 1", "RSET"), ("LIST",)):
            self.assertIn("signing off", self.session(*commands)[-2])
        self.assertEqual(self.spool.read_bytes(), b"".join(self.mails))

    def test_nothing_is_deleted_and_all_retrieved(self) -> None:
        for _ in range(2):
            self.session(*(f"RETR {number}" for number in range(1, 5)))
            self.assertEqual(self.spool.read_bytes(), b"".join(map(read, self.mails)))

    def test_what_mutt_shows(self) -> None:
        """Read, of what was retrieved; new, of what was not."""
        mutt = need("mutt", "mutt")
        self.session("RETR 2", "RETR 4")
        home = self.folder.path / "reader"
        home.mkdir()
        keys = "".join(
            f"<tag-pattern>{pattern}<enter><tag-prefix><copy-message><kill-line>"
            f"{home / name}<enter><untag-pattern>~A<enter>"
            for pattern, name in (("~R", "read"), ("~N", "new"))
        )
        rc = private(
            home / "rc",
            "set confirmappend=no confirmcreate=no quit=yes sleep_time=0 mbox_type=mbox\n"
            "unset wait_key move mark_old beep resolve\n"
            # Its cursor goes back to the first mail after the first thing that is typed.
            f'push "1<enter>{keys}<exit>"\n',
        )
        in_terminal(home, [mutt, "-n", "-R", "-F", rc, "-f", str(self.spool)])
        for name, numbers in (("read", ["1", "3"]), ("new", ["0", "2"])):
            text = (home / name).read_text() if os.path.exists(home / name) else ""
            self.assertEqual(re.findall(r"^Subject: mail (\d)$", text, re.MULTILINE), numbers)
