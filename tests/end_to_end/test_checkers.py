"""Logins through a socket, verified by programs, files and PAM; hostile names and passwords."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from popdrop.options import Options
from tests import programs
from tests.end_to_end.harness import DEADLINE, ROOT, Folder, Twistd, mail
from tests.end_to_end.test_server import Wire
from tests.test_checkpassword import STRANGE_NAMES
from tests.test_foreign import SETTINGS, program
from tests.test_pam import multiarch, services

OPEN = ("--cleartext", "always")
HOSTILE = (
    b"../x",
    b"a/b",
    b".",
    b"..",
    b"bob.lock",
    b"bob.",
    b"-x",
    b"b" * 65,
    b"%n%s",
    b"%{x}",
    b"${HOME}",
    b"{0}",
    b"() { :;};",
    b"LD_PRELOAD=x",
    b"a:b",
    b"bob:x",
)
"""Rows 20, 21, 23, 24, 31, 32 of the collection of other servers' bugs."""


class CheckerCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = Folder(self)
        self.folder.path.chmod(0o755)
        for name in ("bob", "carol"):
            self.folder.spool(name, mail(1))

    def give(self, *names: str) -> None:
        """Spools to the user that the programs become, if they can."""
        if os.geteuid() == 0:
            for name in names:
                os.chown(self.folder.spools / name, 1234, 1234)

    def serve(self, *auth: str, variables: dict[str, str] | None = None) -> Twistd:
        options = [word for text in auth for word in ("--auth", text)]
        return Twistd(self, self.folder, *OPEN, *options, variables=variables)

    def said(self, server: Twistd, name: bytes, password: bytes) -> bytes:
        wire = Wire(self, server.port)
        wire.line()
        wire.send(b"USER " + name + b"\r\n")
        answer = wire.line()
        if answer.startswith(b"+OK"):
            wire.send(b"PASS " + password + b"\r\n")
            answer = wire.line()
        wire.close()
        return answer

    def apop(self, server: Twistd, name: bytes, secret: bytes) -> bytes:
        wire = Wire(self, server.port)
        stamp = re.search(rb"<[^>]+>", wire.line())
        assert stamp is not None, "no challenge"
        digest = hashlib.md5(stamp[0] + secret).hexdigest().encode()
        wire.send(b"APOP " + name + b" " + digest + b"\r\n")
        answer = wire.line()
        wire.close()
        return answer

    def plain(self, server: Twistd, name: bytes, password: bytes) -> bytes:
        """AUTH PLAIN, which can hold what a line of PASS cannot."""
        wire = Wire(self, server.port)
        wire.line()
        words = base64.b64encode(b"\0" + name + b"\0" + password)
        wire.send(b"AUTH PLAIN\r\n")
        wire.line()
        wire.send(words + b"\r\n")
        answer = wire.line()
        wire.close()
        return answer

    def challenged(self, server: Twistd) -> bool:
        wire = Wire(self, server.port)
        greeting = wire.line()
        wire.close()
        return b"<" in greeting

    def good(self, answer: bytes, name: str = "bob") -> None:
        self.assertTrue(answer.startswith(f"+OK {name} has 1 ".encode()), answer)

    def refuses_everything(self, server: Twistd, password: bytes) -> None:
        """Hostile names with a good password, and hostile passwords of a good name."""
        for name in HOSTILE:
            self.assertTrue(self.said(server, name, password).startswith(b"-ERR"), name)
        for octets in (
            b"a\tb",
            b"a\nb",
            b"a\rb",
            b"a:b",
            password + b"\0",
            password + b"\n",
            b"\xff",
        ):
            self.assertTrue(self.plain(server, b"bob", octets).startswith(b"-ERR"), octets)
            self.assertTrue(self.plain(server, b"bob" + octets, password).startswith(b"-ERR"))
        for size in (1_000, 10_000, 1_000_000):
            self.assertTrue(self.said(server, b"b" * size, password).startswith(b"-ERR"))
            self.assertTrue(self.said(server, b"bob", b"x" * size).startswith(b"-ERR"))
        self.good(self.said(server, b"bob", password))

    def no_children(self, server: Twistd) -> None:
        """Each was waited for: none is left, not even as a zombie."""
        tasks = Path(f"/proc/{server.process.pid}/task")
        for each in tasks.glob("*/children"):
            with contextlib.suppress(OSError):  # the thread has ended, and its children by then
                self.assertEqual(each.read_text(), "")


class CheckpasswordTests(CheckerCase):
    def setUp(self) -> None:
        super().setUp()
        self.give("bob", "carol")

    def test_checkpassword(self) -> None:
        users = self.folder.path / "users"
        uid, gid = (1234, 1234) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        users.write_text(f"bob:correct horse:{uid}:{gid}:/:/bin/sh\nroot:x:0:0:/:/bin/sh\n")
        program = shlex.quote(str(programs.checkpassword(self.folder.path, users)))
        server = self.serve(f"checkpassword:{program}")
        self.assertFalse(self.challenged(server))
        self.good(self.said(server, b"bob", b"correct horse"))
        bad = b"-ERR [AUTH] Authentication failed.\r\n"
        self.assertEqual(self.said(server, b"bob", b"wrong"), bad)
        self.assertEqual(self.said(server, b"nobody", b"correct horse"), bad)
        self.assertEqual(self.said(server, b"root", b"x"), bad)  # under the uid floor
        self.refuses_everything(server, b"correct horse")
        users.unlink()
        self.assertEqual(
            self.said(server, b"bob", b"correct horse"),
            b"-ERR [SYS/TEMP] authorization failed, try again later\r\n",
        )
        self.no_children(server)
        log = server.stop()
        self.assertNotIn("correct horse", log)
        self.assertNotIn("Traceback", log)
        self.assertIn("exit status 111", log)

    def test_apop(self) -> None:
        (self.folder.path / "authuser.users").write_text("bob:tanstaaf\n")
        script = programs.script(self.folder.path, "authuser")
        server = self.serve(f"checkpassword:{script}:{self.folder.path}/authuser.users:apop=yes")
        self.assertTrue(self.challenged(server))
        self.good(self.apop(server, b"bob", b"tanstaaf"))
        self.good(self.said(server, b"bob", b"tanstaaf"))
        self.assertTrue(self.apop(server, b"bob", b"x").startswith(b"-ERR [AUTH]"))
        self.assertTrue(self.apop(server, b"carol", b"tanstaaf").startswith(b"-ERR [AUTH]"))
        self.no_children(server)

    def test_exit_codes(self) -> None:
        """Each as `behaviour` says, and the session goes on."""
        text = (
            "import os, sys\ncode = os.read(3, 512).split(b'\\0')[1]\n"
            "os.kill(os.getpid(), 9) if code == b'crash' else sys.exit(int(code))\n"
        )
        script = programs.script(self.folder.path, "exits", text)
        server = self.serve(f"checkpassword:'{script}'")
        for password, answer in (
            (b"1", b"-ERR [AUTH] Authentication failed.\r\n"),
            (b"2", b"-ERR [SYS/PERM] authorization failed\r\n"),
            (b"111", b"-ERR [SYS/TEMP] authorization failed, try again later\r\n"),
            (b"0", b"-ERR [SYS/TEMP] aack, child crashed\r\n"),
            (b"42", b"-ERR [SYS/TEMP] aack, child crashed\r\n"),
            (b"crash", b"-ERR [SYS/TEMP] aack, child crashed\r\n"),
        ):
            self.assertEqual(self.said(server, b"bob", password), answer)
        self.no_children(server)

    def test_nothing_reaches_the_environment(self) -> None:
        """Row 23, from the socket to the program."""
        seen = self.folder.path / "seen"
        script = programs.script(self.folder.path, "witness")
        server = self.serve(f"checkpassword:{script}:{seen}")
        for name in STRANGE_NAMES:
            self.said(server, name, name)
        reports = [json.loads(line) for line in seen.read_text().splitlines()]
        self.assertGreater(len(reports), 4)
        for report in reports:
            self.assertEqual(set(report["environ"]), {"PATH", "PROTO", "LC_ALL"})
            self.assertEqual(report["descriptors"], [0, 1, 2, 3])
        self.no_children(server)

    def test_many_at_once(self) -> None:
        """Other sessions go on while programs sleep."""
        gate = self.folder.path / "gate"
        os.mkfifo(gate)
        text = (
            "import os, sys\ngiven = os.read(3, 512).split(b'\\0')\n"
            f"if given[1] == b'slow': open('{gate}').read()\n"
            "if given[1] == b'bad': sys.exit(1)\n"
            "os.environ['USER'] = given[0].decode()\n"
            "if os.geteuid() == 0: os.setgid(1234); os.setuid(1234)\n"
            "os.execv(sys.argv[1], sys.argv[1:])\n"
        )
        script = programs.script(self.folder.path, "slow", text)
        server = self.serve(f"checkpassword:'{script}'")
        slow = Wire(self, server.port)
        slow.line()
        slow.send(b"USER bob\r\nPASS slow\r\n")
        slow.line()
        for _ in range(3):
            self.assertTrue(self.said(server, b"carol", b"bad").startswith(b"-ERR [AUTH]"))
            self.good(self.said(server, b"carol", b"good"), "carol")
        with open(gate, "w"):
            pass  # the other side sees the end
        self.good(slow.line())
        self.no_children(server)


class OtherCheckerTests(CheckerCase):
    def test_passwd(self) -> None:
        path = self.folder.path / "passwd"
        words = ("perl", "-e", "print crypt($ARGV[0], $ARGV[1])", "secret", SETTINGS[0].decode())
        path.write_text(f"bob:{program('perl-base', *words)}\nroot:{{PLAIN}}secret\n")
        path.chmod(0o600)
        server = self.serve(f"passwd:{path}")
        self.refuses_everything(server, b"secret")
        # A system account of that name has uid 0, whatever the file says.
        self.assertTrue(self.said(server, b"root", b"secret").startswith(b"-ERR [AUTH]"))
        path.write_text("bob:{CLEAR}new one\n")
        self.good(self.said(server, b"bob", b"new one"))
        self.good(self.apop(server, b"bob", b"new one"))
        path.chmod(0o644)
        self.assertTrue(self.said(server, b"bob", b"new one").startswith(b"-ERR [SYS/TEMP]"))
        log = server.stop()
        self.assertNotIn("new one", log)
        self.assertNotIn("Traceback", log)

    def test_pam(self) -> None:
        variables = services(self.folder.path)
        server = self.serve("pam:matrix", variables=variables)
        self.refuses_everything(server, b"secret")
        self.good(self.said(server, b"carol", b"x y"), "carol")

    def test_twisteds_own(self) -> None:
        """`file:`, `memory:` and `unix`, in this order and in another."""
        passwords = self.folder.path / "passwords"
        passwords.write_text("bob:from file\nempty:\n")
        hashed = program("openssl", "openssl", "passwd", "-6", "from unix")
        (self.folder.path / "nss").write_text(f"carol:{hashed}:1234:1234::/:/bin/sh\n")
        (self.folder.path / "group").write_text("carol:x:1234:\n")
        variables = {
            "LD_PRELOAD": multiarch("libnss_wrapper.so"),
            "NSS_WRAPPER_PASSWD": str(self.folder.path / "nss"),
            "NSS_WRAPPER_GROUP": str(self.folder.path / "group"),
        }
        sources = (f"file:{passwords}", "memory:dave:from memory:erin:x", "unix")
        self.folder.spool("dave", mail(1))
        self.give("carol")
        for auth in (sources, sources[::-1]):
            server = self.serve(*auth, variables=variables)
            self.good(self.said(server, b"bob", b"from file"))
            self.good(self.apop(server, b"bob", b"from file"))
            self.good(self.said(server, b"dave", b"from memory"), "dave")
            self.good(self.apop(server, b"dave", b"from memory"), "dave")
            self.good(self.said(server, b"carol", b"from unix"), "carol")
            for name, password in (
                (b"bob", b"from memory"),
                (b"dave", b"from file"),
                (b"carol", b"from file"),
                (b"empty", b""),
                (b"nobody", b"x"),
            ):
                self.assertTrue(self.said(server, name, password).startswith(b"-ERR"), name)
            self.assertTrue(self.apop(server, b"empty", b"").startswith(b"-ERR"))
            self.refuses_everything(server, b"from file")
            self.assertNotIn("Traceback", server.stop())

    def test_accounts_first(self) -> None:
        """Ours first, the old checker for those who are not there yet."""
        self.folder.add("bob", "new")
        passwords = self.folder.path / "passwords"
        passwords.write_text("bob:old\ncarol:old\n")
        server = self.serve(f"accounts:{self.folder.accounts}", f"file:{passwords}")
        self.good(self.said(server, b"bob", b"new"))
        self.assertTrue(self.said(server, b"bob", b"old").startswith(b"-ERR [AUTH]"))
        self.good(self.said(server, b"carol", b"old"), "carol")


class HelpTests(SynchronousTestCase):
    def test_kinds(self) -> None:
        listed = self.told("--help-auth")
        ours = ("accounts", "checkpassword", "passwd", "pam", "helper", "oidc")
        for kind in (*ours, "file", "memory", "unix"):
            self.assertRegex(listed, rf"(?m)^  {kind}\s")
            self.assertIn(f"--auth {kind}[:ArgString]", self.said("--help-auth-type", kind))
        self.assertNotIn("anonymous", listed)
        self.assertEqual(self.told("--help-auth-type", "pam"), self.said("--help-auth-type", "pam"))

    def said(self, *words: str) -> str:
        """As `told`, by this process."""
        said = io.StringIO()
        self.patch(Options, "authOutput", said)
        with self.assertRaises(SystemExit):
            Options().parseOptions(words)
        return said.getvalue()

    def told(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "twisted", "popdrop", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout
