"""`--auth` strings: the plugins that other programs of Twisted's see, and `BackendChecker`."""

from __future__ import annotations

import os
import subprocess
import sys
from ipaddress import ip_network
from typing import Any

from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernameHashedPassword, IUsernamePassword, UsernamePassword
from twisted.cred.strcred import (
    ICheckerFactory,
    InvalidAuthArgumentString,
    findCheckerFactories,
    findCheckerFactory,
    makeChecker,
)
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from popdrop.accounts import backends, strcred
from popdrop.accounts.checkers import BackendChecker, Chain
from popdrop.accounts.database import AccountsDatabase
from popdrop.credentials import Cleartext
from popdrop.errors import BadCredentials, ConfigError, NoSuchUser, TemporaryFailure
from popdrop.values import Account, Scope, Secret, Verified
from tests.end_to_end.harness import DEADLINE, ROOT
from tests.test_checkers import Hops
from tests.test_checkpassword import REFUSED_NAMES, apop

KINDS = ("accounts", "checkpassword", "passwd", "pam")


class PluginTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.hops = Hops()
        self.patch(strcred, "ReactorThreads", lambda: self.hops)
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder, 0o700)

    def test_factories(self) -> None:
        found = {factory.authType: factory for factory in findCheckerFactories()}
        for kind in KINDS:
            verifyObject(ICheckerFactory, found[kind])
            self.assertIn(IUsernamePassword, found[kind].credentialInterfaces)
            self.assertTrue(found[kind].authHelp.strip())

    def test_passwd(self) -> None:
        path = os.path.join(self.folder, "passwd")
        with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write("bob:{PLAIN}secret\n")
        checker = makeChecker(f"passwd:{path}")
        verifyObject(ICredentialsChecker, checker)
        given = UsernamePassword(b"bob", b"secret")
        self.assertEqual(self.successResultOf(checker.requestAvatarId(given)), b"bob")
        self.assertIn(IUsernameHashedPassword, checker.credentialInterfaces)
        self.assertEqual(self.hops.count, 1)

    def test_accounts(self) -> None:
        path = os.path.join(self.folder, "accounts.db")
        AccountsDatabase.create(path)
        database = AccountsDatabase(path)
        database.add(b"bob", Secret(b"secret"))
        database.close()
        checker = makeChecker(f"accounts:{path}")
        given = UsernamePassword(b"bob", b"secret")
        self.assertEqual(self.successResultOf(checker.requestAvatarId(given)), b"bob")
        wrong = checker.requestAvatarId(UsernamePassword(b"bob", b"Secret"))
        self.failureResultOf(wrong, BadCredentials)

    def test_the_account_s_rules_hold_in_other_programs(self) -> None:
        """There is no realm of ours there, and a disabled account logged in."""
        path = os.path.join(self.folder, "accounts.db")
        AccountsDatabase.create(path)
        database = AccountsDatabase(path)
        database.add(b"bob", Secret(b"secret"))
        office = (ip_network("192.0.2.0/24"),)
        words = {
            label: database.add_app_password(b"bob", label, scope).reveal()
            for label, scope in (
                ("phone", Scope()),
                ("reader", Scope(read_only=True)),
                ("office", Scope(networks=office)),
                ("old", Scope(expires=1)),
            )
        }
        checker = makeChecker(f"accounts:{path}")

        def outcome(password: bytes) -> object:
            asked = checker.requestAvatarId(UsernamePassword(b"bob", password))
            found: list[Any] = []
            asked.addBoth(found.append)
            return getattr(getattr(found[0], "value", None), "detail", found[0])

        for password, wanted in (
            (b"secret", b"bob"),
            (words["phone"], b"bob"),
            (words["reader"], "read-only"),
            (words["office"], "network"),
            (words["old"], "expired"),
        ):
            self.assertEqual(outcome(password), wanted)
        database.disable(b"bob")
        database.close()
        for password in (b"secret", words["phone"]):
            self.assertEqual(outcome(password), "disabled")

    def test_wrong_arguments(self) -> None:
        for text in (
            "accounts",
            "accounts:/nonexistent",
            "accounts:a:b",
            "passwd:/nonexistent",
            "checkpassword:true",
            "pam:../x",
        ):
            factory = findCheckerFactory(text.partition(":")[0])
            self.assertRaises(
                InvalidAuthArgumentString, factory.generateChecker, text.partition(":")[2]
            )

    def test_another_program(self) -> None:
        """Those of Twisted's with `--auth` list them."""
        done = subprocess.run(
            [sys.executable, "-m", "twisted", "ftp", "--help-auth"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        for kind in KINDS:
            self.assertRegex(done.stdout, rf"(?m)^  {kind}\s")


class BackendDouble:
    kinds = frozenset({"password"})

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def check(self, credentials: object) -> Account:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome  # type: ignore[no-any-return]


class BackendCheckerTests(SynchronousTestCase):
    GIVEN = Cleartext(b"bob", b"x")

    def make(self, outcome: Any) -> BackendChecker:
        self.hops = Hops()
        checker = BackendChecker(BackendDouble(outcome), self.hops)  # type: ignore[arg-type]
        verifyObject(ICredentialsChecker, checker)
        return checker

    def test_good(self) -> None:
        account = Account(b"bob", uid=7, home="/h")
        checker = self.make(account)
        verified = self.successResultOf(checker.requestAvatarId(self.GIVEN))
        self.assertIsInstance(verified, Verified)
        self.assertEqual(verified.account, account)
        self.assertTrue(verified.foreign)
        self.assertEqual(self.hops.count, 1)

    def test_kinds(self) -> None:
        checker = self.make(None)
        self.assertEqual(checker.credentialInterfaces, (IUsernamePassword,))
        self.patch(BackendDouble, "kinds", frozenset({"apop"}))
        self.assertEqual(self.make(None).credentialInterfaces, (IUsernameHashedPassword,))

    def test_failures_pass(self) -> None:
        for error in (NoSuchUser("x"), BadCredentials("x"), TemporaryFailure("x")):
            failure = self.failureResultOf(self.make(error).requestAvatarId(self.GIVEN))
            self.assertIs(failure.value, error)

    def test_in_a_chain(self) -> None:
        last = self.make(Account(b"bob"))
        for error, goes_on in ((NoSuchUser("x"), True), (BadCredentials("x"), False)):
            asked = Chain([self.make(error), last]).requestAvatarId(self.GIVEN)
            if goes_on:
                self.assertEqual(self.successResultOf(asked), b"bob")
            else:
                self.failureResultOf(asked, BadCredentials)


class TwistedBackendTests(SynchronousTestCase):
    """Twisted's own checkers, as backends."""

    def setUp(self) -> None:
        self.path = os.path.abspath(self.mktemp())
        with open(self.path, "w") as file:
            file.write("bob:secret\nempty:\nlatin:\xe4\n")
        self.file = backends.make("--auth", f"file:{self.path}")
        self.memory = backends.make("--auth", "memory:bob:secret")

    def test_good(self) -> None:
        for backend in (self.file, self.memory):
            self.assertEqual(backend.check(Cleartext(b"bob", b"secret")), Account(b"bob"))
            self.assertEqual(backend.check(apop(b"bob", b"secret")), Account(b"bob"))

    def test_bad(self) -> None:
        for backend in (self.file, self.memory):
            for given in (Cleartext(b"bob", b"Secret"), apop(b"bob", b"Secret")):
                error = self.assertRaises(BadCredentials, backend.check, given)
                self.assertIs(type(error), BadCredentials)
            for given in (Cleartext(b"carol", b"secret"), apop(b"carol", b"secret")):
                self.assertRaises(NoSuchUser, backend.check, given)
            for name in REFUSED_NAMES:
                self.assertRaises(NoSuchUser, backend.check, Cleartext(name, b"secret"))

    def test_empty_password(self) -> None:
        """Twisted's file checker would let `empty` in."""
        for given in (Cleartext(b"empty", b""), apop(b"empty", b""), Cleartext(b"bob", b"")):
            self.assertRaises(BadCredentials, self.file.check, given)

    def test_unix(self) -> None:
        if sys.version_info >= (3, 13):
            error = self.assertRaises(ConfigError, backends.make, "--auth", "unix")
            self.assertIn("pam:SERVICE", str(error))
            return
        backend = backends.make("--auth", "unix")
        self.assertEqual(backend.kinds, {"password"})
        self.assertRaises(NoSuchUser, backend.check, Cleartext(b"no-such-user-here", b"x"))

    def test_others_are_not_ours(self) -> None:
        self.assertIsNone(backends.make("--auth", "anonymous"))
        self.assertIsNone(backends.make("--auth", "accounts:x"))
