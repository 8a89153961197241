"""GNU mailutils' pop3d: virtual users, a process a session, no index.

Its users are in a virtual domain, so neither system accounts nor a mount namespace are needed: the
login is `USER@bench`, the mailbox `INBOX` in the home folder that the domain's own passwd file
names. APOP does not know virtual users (its database says they are not there), so it is USER and
PASS. Passwords are hashed with the oldest crypt(3), a few microseconds: what it costs is not what
is measured. It reads the whole spool at each login, and at the first QUIT adds header fields to all
messages. Its default backlog is so short that the kernel forgets connections of sixteen at once.
"""

from __future__ import annotations

import ctypes
import grp
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tools
from benchmarks.peers import Peer
from benchmarks.process import Failed, start

PROGRAM = "/usr/sbin/pop3d"
_DOMAIN = "bench"
_CONFIGURATION = """\
mode daemon;
foreground yes;
max-children 200;
timeout 600;
pidfile "{folder}/run/pid";
server 127.0.0.1:{port} {{ tls-mode false; backlog 128; }};
tcp-wrappers {{ enable no; }};
logging {{ syslog no; }};
virtdomain {{ passwd-dir "{folder}/domains"; }};
auth {{
  authorization clear;
  authorization virtdomain;
  authentication clear;
  authentication generic;
}};
"""


def _crypt(password: str) -> str:
    # The standard library has had no crypt(3) since Python 3.13. pop3d needs this one itself.
    try:
        function = ctypes.CDLL("libcrypt.so.1").crypt
    except OSError:
        raise Failed("no libcrypt.so.1 (Debian package libcrypt1)") from None
    function.restype = ctypes.c_char_p
    hashed: bytes | None = function(password.encode(), b"ab")
    if not hashed or len(hashed) != 13:
        raise Failed("this libcrypt has no traditional crypt(3)")
    return hashed.decode()


class Mailutils(Peer):
    """pop3d as its own listener, in the foreground."""

    key = "mailutils"
    title = "mailutils"
    auth = ("pass",)
    suffix = f"@{_DOMAIN}"
    alters = True
    slow = True

    def check(self) -> None:
        if "Mailutils" not in tools.first_line([PROGRAM, "--version"]):
            raise tools.Missing("not installed: Debian package mailutils-pop3d")
        try:
            self._group = grp.getgrnam("mail").gr_gid
        except KeyError:
            raise tools.Missing("there is no group `mail`, on which it insists") from None
        if self.owner is None and os.getegid() != self._group:
            raise tools.Missing("it insists on the group `mail`: root's rights are needed")

    def spool(self, user: str) -> Path:
        return self.spools / user / "INBOX"

    def prepare(self, users: Sequence[str]) -> None:
        uid, gid = self.owner or (os.geteuid(), os.getegid())
        for name in ("run", "domains"):
            (self.folder / name).mkdir()
        for user in users:
            (self.spools / user).mkdir()
        hashed = _crypt(self.password)
        lines = (f"{user}:{hashed}:{uid}:{gid}::{self.spools / user}:/bin/sh\n" for user in users)
        (self.folder / "domains" / _DOMAIN).write_text("".join(lines))
        text = _CONFIGURATION.format(folder=self.folder, port=self.port)
        (self.folder / "pop3d.conf").write_text(text)

    def spawn(self) -> subprocess.Popen[bytes]:
        command = [PROGRAM, f"--config-file={self.folder / 'pop3d.conf'}"]
        user = None if self.owner is None else (self.owner[0], self._group)
        return start(command, self.core, log=self.log, user=user, cwd=self.folder)

    def version(self) -> str:
        return tools.first_line([PROGRAM, "--version"]).replace(
            "pop3d (GNU Mailutils)", "mailutils"
        )
