"""The servers that are measured, each with a configuration of its own on loopback.

Nothing of the system is used or changed: no service is started, no file under `/etc` is touched,
no system user is made. All spools, indexes and logs are in a temporary folder.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from importlib.metadata import version as distribution_version
from pathlib import Path

import popdrop
from benchmarks import tools
from benchmarks.process import Failed, free_port, start, stop, wait_for_greeting, wait_for_port
from popdrop import search


def _servant() -> tuple[int, int] | None:
    """Whom servers run as: `nobody` when we are root, else ourselves (`None`)."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam("nobody")
    return entry.pw_uid, entry.pw_gid


class Peer:
    """One server. `start` it, `place` spools, measure, `stop` it."""

    key = ""
    title = ""
    auth: tuple[str, ...] = ("apop", "pass")
    suffix = ""
    """What stands behind a user's name at login."""
    alters = False
    """Whether it writes header fields of its own into messages that stay."""
    slow = False
    """It takes tens of seconds for a large spool: one run has to do, and the short form, which has
    to end soon, leaves it out unless it is named."""
    maildrops = True
    """Whether there is any mail behind the answers."""

    def __init__(self, folder: Path, core: int | Collection[int], password: str) -> None:
        self.folder = folder / self.key
        self.spools = self.folder / "mail"
        self.core = core
        self.password = password
        self.owner = _servant()
        self.port = 0
        self.child: subprocess.Popen[bytes] | None = None
        self.log = self.folder / "log"

    @property
    def pid(self) -> int:
        """The root of the process tree whose CPU counts."""
        if self.child is None:
            raise Failed("not running")
        return self.child.pid

    def start(self, users: Sequence[str]) -> None:
        """Make the accounts and start. Raises `tools.Missing` or `Failed`."""
        self.check()
        self.spools.mkdir(parents=True)
        self.port = free_port()
        self.log.touch()
        self.prepare(users)
        self.give_away()
        self._run()

    def _run(self) -> None:
        self.child = self.spawn()
        wait_for_greeting(self.child, self.port, self.log)

    def restart(self) -> None:
        """End the server and start it again, with the same port, accounts and indexes."""
        self.stop()
        wait_for_port(self.port)
        self._run()

    def give_away(self) -> None:
        """Make the server's user the owner of its folder."""
        if self.owner is not None:
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, *self.owner, follow_symlinks=False)

    def check(self) -> None:
        """Raise `tools.Missing` if this server is not installed or cannot run here."""

    def prepare(self, users: Sequence[str]) -> None:
        """Write the configuration and the accounts."""

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the server in the foreground."""
        raise NotImplementedError

    def version(self) -> str:
        """Name and version for the table."""
        raise NotImplementedError

    def spool(self, user: str) -> Path:
        """Where this server looks for the mail of `user`."""
        return self.spools / user

    def place(self, source: Path, user: str) -> None:
        """Give `user` a fresh copy of a spool."""
        tools.place(source, self.spool(user), self.owner)

    def remove(self, user: str) -> None:
        """Take the spool of `user` away, to save room."""
        self.spool(user).unlink(missing_ok=True)

    def stop(self) -> None:
        """End the server."""
        if self.child is not None:
            stop(self.child)
            self.child = None


_ADD_USERS = """\
import sys
from click.testing import CliRunner
from popdrop.cli.main import popdrop
password = sys.stdin.read()
for user in sys.argv[2:]:
    words = ["user", "add", "--db", sys.argv[1], user, "--stdin", "--both"]
    ran = CliRunner().invoke(popdrop, words, input=password)
    if ran.exit_code:
        sys.exit(ran.output)
"""
"""`popdrop user add` for many users without starting an interpreter for each."""


class Popdrop(Peer):
    """Popdrop, as `twistd popdrop` runs it from this checkout or installation."""

    key = "popdrop"
    title = "Popdrop"
    more_options: tuple[str, ...] = ()

    def __init__(self, folder: Path, core: int | Collection[int], password: str) -> None:
        super().__init__(folder, core, password)
        if self.owner is not None and not self._may_run():
            # An interpreter below somebody's home folder, mode 0700: root's rights are needed.
            self.owner = None

    @staticmethod
    def _environment() -> dict[str, str]:
        # Not only an installed Popdrop is measured: this checkout's comes first.
        paths = [str(tools.HERE.parent), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def _may_run(self) -> bool:
        command = [sys.executable, "-c", "import popdrop, twisted"]
        try:
            child = start(
                command,
                self.core,
                log=Path(os.devnull),
                user=self.owner,
                env=self._environment(),
                cwd=Path("/"),
            )
        except PermissionError:
            return False
        return child.wait() == 0

    def check(self) -> None:
        command = [*self._twistd(), "popdrop", "--help"]
        ran = subprocess.run(command, capture_output=True, env=self._environment())
        # An unknown command makes twistd print its own help, with status 0.
        if ran.returncode != 0 or b"--store" not in ran.stdout:
            raise tools.Missing("`twistd popdrop` does not run: is Popdrop installed?")

    def _twistd(self) -> list[str]:
        return [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]

    def prepare(self, users: Sequence[str]) -> None:
        state = self.folder / "state"
        state.mkdir(mode=0o700)
        # Both kinds of secret, so that APOP and PASS are measured with the same accounts.
        child = subprocess.run(
            [sys.executable, "-c", _ADD_USERS, str(state / "users.db"), *users],
            input=self.password.encode() + b"\n",
            capture_output=True,
            env=self._environment(),
        )
        if child.returncode != 0:
            raise Failed("popdrop user add: " + child.stderr.decode(errors="replace")[-200:])

    def spawn(self) -> subprocess.Popen[bytes]:
        state = self.folder / "state"
        options = {
            "--listen": f"tcp:{self.port}:interface=127.0.0.1",
            "--auth": f"accounts:{state / 'users.db'}",
            "--store": f"mbox:{self.spools}/{{user}}",
            "--state-dir": str(state),
            "--cleartext": "always",
            "--throttle": "off",
        }
        given = [*(word for pair in options.items() for word in pair), *self.more_options]
        command = [*self._twistd(), "-n", "--pidfile=", f"--logfile={self.log}", "popdrop", *given]
        return start(
            command,
            self.core,
            log=self.log,
            user=self.owner,
            env=self._environment(),
            cwd=self.folder,
        )

    def version(self) -> str:
        twisted = distribution_version("twisted")
        return f"Popdrop {popdrop.__version__} (Twisted {twisted}, search: {search.IN_USE.name})"


_DOVECOT = """\
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
protocols = pop3
listen = 127.0.0.1
{tls}disable_plaintext_auth = no
auth_mechanisms = plain login apop
default_internal_user = {user}
default_internal_group = {group}
default_login_user = {user}
first_valid_uid = 1
mail_location = mbox:{folder}/home/%u:INBOX={folder}/mail/%u:INDEX={folder}/index/%u
mbox_read_locks = fcntl
mbox_write_locks = dotlock fcntl
passdb {{
  driver = passwd-file
  args = scheme=PLAIN username_format=%u {folder}/passwd
}}
userdb {{
  driver = static
  args = uid={uid} gid={gid} home={folder}/home/%u
}}
service anvil {{
  chroot =
}}
service stats {{
  chroot =
}}
service pop3-login {{
  chroot =
  inet_listener pop3 {{
    address = 127.0.0.1
    port = {port}
  }}
  inet_listener pop3s {{
    address = 127.0.0.1
    port = {tls_port}
  }}
{login}}}
service pop3 {{
{mail}}}
"""


class Dovecot(Peer):
    """Dovecot with mbox spools as Debian ships it: a process for each login and each session."""

    key = "dovecot-stock"
    title = "Dovecot stock"
    login = mail = ""
    tls = "ssl = no\n"
    """Lines of the configuration."""
    tls_port = 0
    """Of implicit TLS; 0 is none."""

    def check(self) -> None:
        if not (shutil.which("dovecot") and Path("/usr/lib/dovecot/pop3").exists()):
            raise tools.Missing("Dovecot is not installed: Debian package dovecot-pop3d")

    def prepare(self, users: Sequence[str]) -> None:
        uid, gid = self.owner or (os.geteuid(), os.getegid())
        settings = {
            "folder": self.folder,
            "user": pwd.getpwuid(uid).pw_name,
            "group": grp.getgrgid(gid).gr_name,
            "uid": uid,
            "gid": gid,
            "port": self.port,
            "tls": self.tls,
            "tls_port": self.tls_port,
            "login": self.login,
            "mail": self.mail,
        }
        for name in ("run", "state", "home", "index"):
            (self.folder / name).mkdir()
        (self.folder / "dovecot.conf").write_text(_DOVECOT.format(**settings))
        lines = (f"{user}:{{PLAIN}}{self.password}\n" for user in users)
        (self.folder / "passwd").write_text("".join(lines))

    def spawn(self) -> subprocess.Popen[bytes]:
        command = ["dovecot", "-F", "-c", str(self.folder / "dovecot.conf")]
        return start(command, self.core, log=self.log, user=self.owner)

    def version(self) -> str:
        return f"Dovecot {tools.first_line(['dovecot', '--version'])}"


class DovecotTuned(Dovecot):
    """Dovecot whose processes live on after a session: `service_count = 0`."""

    key = "dovecot-tuned"
    title = "Dovecot tuned"
    login = "  service_count = 0\n"
    mail = "  service_count = 0\n"


class Canned(Peer):
    """No mail server: ready-made answers from C, to see where generator and kernel end."""

    key = "canned"
    title = "Canned C"
    maildrops = False

    def __init__(
        self, folder: Path, core: int | Collection[int], password: str, messages: int
    ) -> None:
        super().__init__(folder, core, password)
        self.messages = messages

    def spawn(self) -> subprocess.Popen[bytes]:
        program = tools.compiled("canned")
        command = [str(program), str(self.port), str(self.messages), "11000"]
        return start(command, self.core, log=self.log)

    def place(self, source: Path, user: str) -> None:
        pass

    def version(self) -> str:
        return "canned.c"
