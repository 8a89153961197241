"""`popdrop.accounts.system`, with the real libpam and services of our own (pam_wrapper)."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import SkipTest

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.accounts import system
from popdrop.accounts.system import Pam
from popdrop.credentials import Cleartext
from popdrop.errors import BadCredentials, ConfigError, NoSuchUser, NoVerifierOfThisKind
from popdrop.interfaces import IBackend
from tests.end_to_end.harness import DEADLINE, ROOT, environment
from tests.test_checkpassword import REFUSED_NAMES, apop

ASK = """
import json, sys
from popdrop.accounts.system import Pam
from popdrop.credentials import Cleartext
from popdrop.errors import PopdropError
for service, name, password in json.load(sys.stdin):
    try:
        account = Pam("--auth x", service).check(Cleartext(name.encode(), password.encode()))
        print(json.dumps(["good", account.name.decode(), account.uid, account.home]))
    except PopdropError as error:
        print(json.dumps([type(error).__name__, error.detail]))
"""
WRAPPED = """
import ctypes.util
_real = ctypes.util.find_library
ctypes.util.find_library = lambda name: {wrapper!r} if name == "pam" else _real(name)
"""
"""ctypes asks the library itself, where a preloaded one does not stand before it."""
SERVICES = {
    "permit": "auth required pam_permit.so\naccount required pam_permit.so\n",
    "deny": "auth required pam_deny.so\naccount required pam_permit.so\n",
    "expired": "auth required pam_permit.so\naccount required pam_deny.so\n",
    "matrix": "auth required {matrix} [passdb={folder}/passdb]\n"
    "account required {matrix} [passdb={folder}/passdb]\n",
    "none": "auth required pam_no_such_module.so\naccount required pam_permit.so\n",
    "pwdfile": "auth required pam_pwdfile.so [pwdfile={folder}/pwdfile]\n"
    "account required pam_permit.so\n",
}


def multiarch(name: str) -> str:
    """A file under /usr/lib/<machine>/, as Debian has it."""
    found = [
        path for lib in ("/usr/lib", "/lib") for path in Path(lib).glob(f"*-linux-gnu*/{name}")
    ]
    if not found:
        raise SkipTest("needs the Debian packages libpam-wrapper and libpam-pwdfile")
    return str(found[0])


def services(folder: Path) -> dict[str, str]:
    """PAM services in `folder`, and the variables that let libpam see them only."""
    wrapper = multiarch("libpam_wrapper.so")
    matrix = multiarch("pam_wrapper/pam_matrix.so")
    multiarch("security/pam_pwdfile.so")
    (folder / "pam.d").mkdir()
    for name, text in SERVICES.items():
        (folder / "pam.d" / name).write_text(text.format(matrix=matrix, folder=folder))
    (folder / "passdb").write_text("bob:secret:matrix\ncarol:x y:matrix\nelse:secret:other\n")
    # `secret`, from `openssl passwd -1 -salt salt secret`; the file is of that module's own form.
    hashed = subprocess.run(
        ["openssl", "passwd", "-1", "-salt", "salt", "secret"],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    ).stdout.strip()
    (folder / "pwdfile").write_text(f"bob:{hashed}\n")
    (folder / "sitecustomize.py").write_text(WRAPPED.format(wrapper=wrapper))
    return {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "LD_PRELOAD": wrapper,
        "PAM_WRAPPER": "1",
        "PAM_WRAPPER_SERVICE_DIR": str(folder / "pam.d"),
    }


class PamTests(SynchronousTestCase):
    """What the library answers, and what is made of it."""

    def ask(self, *questions: tuple[str, str, str]) -> list[list[Any]]:
        folder = Path(self.mktemp()).absolute()
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            env=environment(folder) | services(folder),
            input=json.dumps(questions),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def test_matrix(self) -> None:
        """Users and passwords of a file."""
        answers = self.ask(
            ("matrix", "bob", "secret"),
            ("matrix", "carol", "x y"),
            ("matrix", "bob", "Secret"),
            ("matrix", "bob", "secret "),
            ("matrix", "bob", "secret\0"),
            ("matrix", "bob", ""),
            ("matrix", "else", "secret"),
            ("matrix", "erin", "secret"),
            ("matrix", "() { :;};", "%n%s"),
            ("matrix", "bob", "x" * 100_000),
        )
        self.assertEqual(
            [answer[0] for answer in answers],
            ["good", "good", *["BadCredentials"] * 8],
        )
        # They are no users of the system.
        self.assertEqual(answers[0][1:], ["bob", None, None])

    def test_account_phase(self) -> None:
        """Who proves himself may still not be let in."""
        answers = self.ask(
            ("permit", "root", "anything"), ("expired", "root", "x"), ("deny", "root", "x")
        )
        self.assertEqual(answers[0], ["good", "root", 0, "/root"])
        self.assertEqual([answer[0] for answer in answers[1:]], ["BadCredentials"] * 2)

    def test_pwdfile(self) -> None:
        """A module as administrators use it."""
        answers = self.ask(
            ("pwdfile", "bob", "secret"), ("pwdfile", "bob", "other"), ("pwdfile", "x", "y")
        )
        kinds = [answer[0] for answer in answers]
        self.assertEqual(kinds, ["good", "BadCredentials", "NoSuchUser"])

    def test_module_missing(self) -> None:
        (answer,) = self.ask(("none", "bob", "secret"))
        self.assertEqual(answer[0], "TemporaryFailure")
        self.assertIn("pam:none: ", answer[1])


class AuthenticatorDouble:
    """What python-pam does, with codes of the test's choice."""

    code = 0
    reason: object = "Words"

    def __init__(self) -> None:
        self.messages = ["Hello\n"]
        self.asked: list[object] = []

    def authenticate(self, *args: object, **kwargs: object) -> bool:
        self.asked.append((args, kwargs))
        if isinstance(self.reason, Exception):
            raise self.reason
        return not self.code


class CodeTests(SynchronousTestCase):
    def setUp(self) -> None:
        if ctypes.util.find_library("pam") is None:
            raise SkipTest("needs the Debian package libpam0g")
        self.backend = Pam("--auth pam:x", "x")
        verifyObject(IBackend, self.backend)
        self.backend._make = AuthenticatorDouble
        self.given = Cleartext(b"no-such-user-here", b"secret")

    def answer(self, code: int, reason: object = "Words") -> str:
        self.patch(AuthenticatorDouble, "code", code)
        self.patch(AuthenticatorDouble, "reason", reason)
        try:
            self.backend.check(self.given)
        except Exception as error:
            return type(error).__name__
        return "good"

    def test_codes(self) -> None:
        """The numbers of Linux-PAM's `_pam_types.h`."""
        names = {0: "good", 10: "NoSuchUser"}
        names |= dict.fromkeys((6, 7, 8, 11, 12, 13, 16, 17, 27), "BadCredentials")
        for code in range(-1, 33):
            self.assertEqual(self.answer(code), names.get(code, "TemporaryFailure"), code)

    def test_library_fails(self) -> None:
        self.assertEqual(self.answer(0, OSError("secret")), "TemporaryFailure")

    def test_refused_before(self) -> None:
        """Rows 19, 21, 24, 31: PAM sees none of these."""
        self.backend._make = None
        for name in REFUSED_NAMES:
            self.assertRaises(BadCredentials, self.backend.check, Cleartext(name, b"x"))
        self.assertRaises(NoSuchUser, self.backend.check, Cleartext(b"../x", b"x"))
        for password in (b"", b"\0", b"x\0y", b"x" * 512, b"x" * 1_000_000):
            self.assertRaises(BadCredentials, self.backend.check, Cleartext(b"bob", password))
        self.assertRaises(NoVerifierOfThisKind, self.backend.check, apop(b"bob", b"x"))

    def test_extra_is_missing(self) -> None:
        self.patch(system.importlib, "import_module", self._missing)
        error = self.assertRaises(ConfigError, Pam, "--auth pam:x", "x")
        self.assertIn("pip install 'popdrop[pam]'", str(error))

    def _missing(self, name: str) -> object:
        raise ImportError(name)

    def test_service(self) -> None:
        for name in ("", "../login", "/etc/pam.d/login", "a b", "x" * 65, "a\0"):
            self.assertRaises(ConfigError, Pam, "--auth pam", name)

    def test_system_facts(self) -> None:
        self.patch(AuthenticatorDouble, "code", 0)
        account = self.backend.check(Cleartext(b"root", b"x"))
        self.assertEqual((account.uid, account.gid), (0, 0))
        self.assertEqual(account.home, os.path.expanduser("~root"))
