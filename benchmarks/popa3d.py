"""popa3d, run in a mount namespace of its own: it insists on system accounts.

Debian's package cannot be installed beside Dovecot's, so it is fetched and unpacked, not
installed. With root's rights the server gets its own view of the system: an `/etc/passwd` with the
benchmark's users, its own `/var/mail`. All that ends with it. Passwords are not hashed for it
(`pam_permit`), as they are not for Dovecot. It is started by `inetd.c`: as its own listener it
serves one address no more than ten times in ten seconds.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tools
from benchmarks.peers import Peer
from benchmarks.process import Failed, start

_SCRIPT = """\
set -e
mount --make-rprivate /
mount --bind {folder}/etc/passwd /etc/passwd
mount --bind {folder}/etc/group /etc/group
mount --bind {folder}/etc/pam.d /etc/pam.d
mount --bind {folder}/mail /var/mail
mount -t tmpfs -o mode=755 tmpfs /var/lib
mkdir -m 755 /var/lib/popa3d
exec {inetd} {port} {program}
"""
_PACKAGE_LIMIT = 200_000_000
"""Debian's popa3d refuses larger maildrops (MAX_MAILBOX_OPEN_BYTES), in octets."""


class Popa3d(Peer):
    """popa3d from inetd: two processes a session."""

    key = "popa3d"
    title = "popa3d"
    auth = ("pass",)

    def check(self) -> None:
        if os.geteuid() != 0:
            raise tools.Missing("its mount namespace needs root's rights")
        if shutil.which("unshare") is None:
            raise tools.Missing("no unshare (Debian package util-linux)")
        if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
            raise tools.Missing("a new mount namespace is not allowed here")
        self._program()

    def _folder(self) -> Path:
        return tools.cache_folder() / "popa3d"

    def _program(self) -> Path:
        folder = self._folder()
        program = folder / "usr" / "sbin" / "popa3d"
        if not program.exists():
            folder.mkdir(exist_ok=True)
            for command in (["apt-get", "download", "popa3d"], ["sh", "-c", "dpkg -x *.deb ."]):
                try:
                    subprocess.run(command, cwd=folder, capture_output=True, check=True)
                except (OSError, subprocess.SubprocessError):
                    raise tools.Missing("`apt-get download popa3d` failed") from None
        return program

    def prepare(self, users: Sequence[str]) -> None:
        if self.owner is None:
            raise Failed("needs root")
        uid, gid = self.owner
        etc = self.folder / "etc"
        (etc / "pam.d").mkdir(parents=True)
        lines = ["root:x:0:0::/:/bin/sh", "popa3d:x:65533:65533::/var/lib/popa3d:/bin/false"]
        lines += [f"{user}:x:{uid}:{gid}::/:/bin/sh" for user in users]
        (etc / "passwd").write_text("\n".join(lines) + "\n")
        (etc / "group").write_text(f"root:x:0:\nmail:x:8:\npopa3d:x:65533:\nusers:x:{gid}:\n")
        rules = "".join(f"{kind} required pam_permit.so\n" for kind in ("auth", "account"))
        (etc / "pam.d" / "popa3d").write_text(rules)

    def give_away(self) -> None:
        if self.owner is not None:  # the rest stays root's: PAM asks for that
            os.chown(self.spools, *self.owner)

    def spawn(self) -> subprocess.Popen[bytes]:
        script = _SCRIPT.format(
            folder=shlex.quote(str(self.folder)),
            inetd=shlex.quote(str(tools.compiled("inetd"))),
            port=self.port,
            program=shlex.quote(str(self._program())),
        )
        return start(["unshare", "-m", "sh", "-c", script], self.core, log=self.log)

    def place(self, source: Path, user: str) -> None:
        if source.stat().st_size > _PACKAGE_LIMIT:
            raise Failed("refuses maildrops over 200 MB (Debian's limit)")
        super().place(source, user)

    def version(self) -> str:
        packages = self._folder().glob("popa3d_*.deb")
        return "popa3d " + "".join(path.name.split("_")[1] for path in packages)
