"""Checkers: who is verified, what is asked of the pools, and when a chain goes on."""

import hashlib
import os
import sqlite3
from collections.abc import Callable
from typing import Any

from argon2 import PasswordHasher
from twisted.cred.checkers import (
    ANONYMOUS,
    AllowAnonymousAccess,
    ICredentialsChecker,
    InMemoryUsernamePasswordDatabaseDontUse,
)
from twisted.cred.credentials import (
    Anonymous,
    IAnonymous,
    IUsernameHashedPassword,
    IUsernamePassword,
)
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import IRealm, Portal
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import Interface, classImplements, implementer
from zope.interface.verify import verifyObject

from popdrop.accounts.checkers import AccountsChecker, Chain, Recent
from popdrop.accounts.database import AccountsDatabase, Incoming
from popdrop.accounts.secrets import Hasher
from popdrop.credentials import FAILED, ApopCredentials, Cleartext, ExternalCredentials
from popdrop.errors import (
    BadCredentials,
    ConfigError,
    NoSuchUser,
    NoVerifierOfThisKind,
    TemporaryFailure,
)
from popdrop.interfaces import IExternal, IScramCredentials
from popdrop.values import Account, Scope, Secret, Verified

CHALLENGE = b"<1896.697170952@dbc.mtview.ca.us>"


def apop(name: bytes, secret: bytes) -> ApopCredentials:
    return ApopCredentials(name, CHALLENGE, hashlib.md5(CHALLENGE + secret).hexdigest().encode())


class Hops:
    """A pool without threads that counts."""

    def __init__(self) -> None:
        self.count = 0

    def run(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        self.count += 1
        return maybeDeferred(work, *args, **kwargs)


class CountingHasher(Hasher):
    """Every verification that the library is asked for is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        real = self._argon2
        outer = self

        class Watching:
            def hash(self, password: bytes) -> str:
                return real.hash(password)

            def verify(self, hashed: bytes, password: bytes) -> bool:
                outer.calls += 1
                return real.verify(hashed, password)

            def check_needs_rehash(self, hashed: str) -> bool:
                return real.check_needs_rehash(hashed)

        self._argon2 = Watching()  # type: ignore[assignment]


class CheckerCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = os.path.abspath(self.mktemp())
        os.mkdir(folder, 0o700)
        self.path = os.path.join(folder, "accounts.db")
        AccountsDatabase.create(self.path)
        self.accounts = AccountsDatabase(self.path)
        self.addCleanup(self.accounts.close)
        self.lookups, self.hashes, self.hasher = Hops(), Hops(), CountingHasher()
        self.checker = self.make(True)

    def make(self, can_apop: bool) -> AccountsChecker:
        return AccountsChecker(
            self.accounts,
            self.lookups,  # type: ignore[arg-type]
            self.hashes,  # type: ignore[arg-type]
            can_apop,
            self.hasher,
        )

    def verified(self, credentials: object) -> Verified:
        result = self.successResultOf(self.checker.requestAvatarId(credentials))
        self.assertIsInstance(result, Verified)
        return result

    def refused(self, credentials: object, kind: type[Exception]) -> Any:
        failure = self.failureResultOf(self.checker.requestAvatarId(credentials))
        self.assertIs(failure.type, kind)
        return failure.value


class AppPasswordTests(CheckerCase):
    def test_logs_in_without_a_hash_and_brings_its_scope(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        scope = Scope(read_only=True, expires=5)
        words = self.accounts.add_app_password(b"bob", "phone", scope).reveal()
        account = self.verified(Cleartext(b"bob", words)).account
        self.assertEqual(account.app, scope)
        self.assertTrue(account.read_only)
        self.assertEqual(self.hasher.calls, 0)
        self.assertIsNotNone(self.accounts.app_passwords(b"bob")[0].used)

    def test_the_account_s_own_password_has_its_own_scope(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        self.accounts.add_app_password(b"bob", "phone", Scope(read_only=True))
        account = self.verified(Cleartext(b"bob", b"hunter2")).account
        self.assertIsNone(account.app)
        self.assertFalse(account.read_only)

    def test_another_s_is_a_wrong_password(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        self.accounts.add(b"eve", Secret(b"hunter3"))
        words = self.accounts.add_app_password(b"bob", "phone").reveal()
        self.refused(Cleartext(b"eve", words), BadCredentials)
        self.refused(Cleartext(b"nobody", words), NoSuchUser)

    def test_an_account_with_nothing_else(self) -> None:
        self.accounts.add(b"bob")
        words = self.accounts.add_app_password(b"bob", "phone").reveal()
        self.verified(Cleartext(b"bob", words))
        self.refused(Cleartext(b"bob", b"x"), NoVerifierOfThisKind)


class RecentTests(CheckerCase):
    def setUp(self) -> None:
        super().setUp()
        self.now = 0.0
        self.checker = AccountsChecker(
            self.accounts,
            self.lookups,  # type: ignore[arg-type]
            self.hashes,  # type: ignore[arg-type]
            True,
            self.hasher,
            Recent(60.0, lambda: self.now),
        )
        self.accounts.add(b"bob", Secret(b"hunter2"))

    def shown(self, password: bytes = b"hunter2", client: str = "192.0.2.1") -> Cleartext:
        credentials = Cleartext(b"bob", password)
        credentials.client = client
        return credentials

    def test_the_second_costs_no_hash(self) -> None:
        for _ in range(3):
            self.verified(self.shown())
        self.assertEqual(self.hasher.calls, 1)

    def test_for_so_long_and_not_for_ever(self) -> None:
        self.verified(self.shown())
        self.now = 59.0
        self.verified(self.shown())
        self.now = 61.0  # what was remembered at 59 does not count from there
        self.verified(self.shown())
        self.assertEqual(self.hasher.calls, 2)

    def test_wrong_ones_are_not_remembered(self) -> None:
        for _ in range(2):
            self.refused(self.shown(b"hunter3"), BadCredentials)
        self.verified(self.shown())
        self.refused(self.shown(b"hunter3"), BadCredentials)
        self.assertEqual(self.hasher.calls, 4)

    def test_from_elsewhere_it_is_another(self) -> None:
        self.verified(self.shown())
        self.verified(self.shown(client="192.0.2.2"))
        self.assertEqual(self.hasher.calls, 2)
        self.verified(self.shown(client="2001:db8::1"))
        self.verified(self.shown(client="2001:db8::2"))
        self.assertEqual(self.hasher.calls, 3)

    def test_a_changed_or_disabled_account_at_once(self) -> None:
        self.verified(self.shown())
        self.accounts.set_password(b"bob", Secret(b"hunter3"))
        self.refused(self.shown(), BadCredentials)
        self.verified(self.shown(b"hunter3"))
        self.accounts.disable(b"bob")
        self.assertTrue(self.verified(self.shown(b"hunter3")).account.disabled)

    def test_each_part_counts(self) -> None:
        recent = Recent(60.0)
        keys = {
            recent.key(Account(name, version=version), client, password)
            for name in (b"bob", b"eve")
            for version in (7, 8)
            for client in ("192.0.2.1", "")
            for password in (b"x", b"y")
        }
        self.assertEqual(len(keys), 16)

    def test_no_password_is_kept(self) -> None:
        recent = Recent(60.0)
        key = recent.key(Account(b"bob", version=7), "192.0.2.1", b"hunter2")
        self.assertNotIn(b"hunter2", key)
        self.assertEqual(len(key), 32)
        self.assertNotEqual(key, Recent(60.0).key(Account(b"bob", version=7), "", b"hunter2"))

    def test_bounded(self) -> None:
        recent = Recent(60.0)
        for number in range(Recent.MOST + 1):
            recent.add(b"%d" % number)
        self.assertFalse(recent.holds(b"0"))
        self.assertTrue(recent.holds(b"%d" % Recent.MOST))


class ImproveTests(CheckerCase):
    def test_an_outdated_hash_and_missing_scram_are_made_at_a_good_login(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        old = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(b"hunter2").encode()
        connection = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(connection.close)
        connection.execute("UPDATE verifier SET value = ? WHERE kind = 'password'", (old,))
        connection.execute("DELETE FROM verifier WHERE kind <> 'password'")
        self.refused(Cleartext(b"bob", b"hunter3"), BadCredentials)
        kept = connection.execute("SELECT kind, value FROM verifier").fetchall()
        self.assertEqual(kept, [("password", old)])
        self.verified(Cleartext(b"bob", b"hunter2"))
        kinds = dict(connection.execute("SELECT kind, value FROM verifier").fetchall())
        self.assertEqual(set(kinds), {"password", "scram-sha-1", "scram-sha-256"})
        self.assertIn(b"m=19456,t=2,p=1", kinds["password"])
        self.verified(Cleartext(b"bob", b"hunter2"))

    def test_missing_scram_alone(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        connection = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(connection.close)
        connection.execute("DELETE FROM verifier WHERE kind = 'scram-sha-1'")
        for hashes in (2, 1):
            before = self.hashes.count
            self.verified(Cleartext(b"bob", b"hunter2"))
            self.assertEqual(self.hashes.count - before, hashes)
        self.assertEqual(len(connection.execute("SELECT 1 FROM verifier").fetchall()), 3)

    def test_not_again_and_again_without_a_key(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        os.unlink(self.path + ".key")
        self.accounts = AccountsDatabase(self.path)
        self.addCleanup(self.accounts.close)
        self.checker = self.make(False)
        self.accounts.add(b"eve", Secret(b"hunter2"))  # without SCRAM, there being no key
        for name in (b"bob", b"eve"):
            before = self.hashes.count
            self.verified(Cleartext(name, b"hunter2"))
            self.assertEqual(self.hashes.count - before, 1)

    def test_an_imported_hash_is_verified_as_it_is_and_becomes_ours(self) -> None:
        digest = b"{SHA256.HEX}" + hashlib.sha256(b"hunter2").hexdigest().encode()
        self.accounts.merge([Incoming(b"bob", password_hash=Secret(digest))])
        self.refused(Cleartext(b"bob", b"hunter3"), BadCredentials)
        account = self.verified(Cleartext(b"bob", b"hunter2")).account
        assert account.password_hash is not None
        self.assertEqual(account.password_hash.reveal(), digest)
        account = self.verified(Cleartext(b"bob", b"hunter2")).account
        assert account.password_hash is not None
        self.assertTrue(account.password_hash.reveal().startswith(b"$argon2id$"))
        self.assertFalse(account.lacks_scram)


class Scram:
    """SCRAM credentials that are satisfied by anything, or by nothing."""

    algorithm = "SHA-256"

    def __init__(self, username: bytes, good: bool) -> None:
        self.username = username
        self.good = good

    def check(self, verifier: object) -> bool:
        return self.good


classImplements(Scram, IScramCredentials)


class AccountsCheckerTests(CheckerCase):
    def test_scram_goes_on_only_where_there_is_nothing_to_verify_with(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        self.accounts.add(b"old", Secret(b"hunter2"))
        self.accounts.add(b"apop", apop=Secret(b"tanstaaf"))
        connection = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(connection.close)
        connection.execute("DELETE FROM verifier WHERE kind LIKE 'scram%' AND name = ?", (b"old",))
        for name, kind in (
            (b"bob", BadCredentials),
            (b"old", NoVerifierOfThisKind),
            (b"apop", NoVerifierOfThisKind),
            (b"nobody", NoSuchUser),
        ):
            self.refused(Scram(name, False), kind)
        self.refused(Scram(b"nobody", True), NoSuchUser)
        self.assertEqual(self.verified(Scram("b\u00adob".encode(), True)), b"bob")

    def test_names_are_prepared_for_every_mechanism(self) -> None:
        """Other programs do not prepare them."""
        self.accounts.add(b"bob", apop=Secret(b"tanstaaf"))
        name = "b\u00adob".encode()
        for credentials in (apop(name, b"tanstaaf"), ExternalCredentials(name)):
            self.assertEqual(self.verified(credentials), b"bob")

    def test_deleted_between_the_two_look_ups(self) -> None:
        self.accounts.add(b"bob")
        words = self.accounts.add_app_password(b"bob", "phone").reveal()
        self.patch(self.accounts, "lookup", lambda name: None)
        self.refused(Cleartext(b"bob", words), NoSuchUser)

    def test_interfaces(self) -> None:
        verifyObject(ICredentialsChecker, self.checker)
        self.assertEqual(
            set(self.checker.credentialInterfaces),
            {IUsernamePassword, IUsernameHashedPassword, IExternal, IScramCredentials},
        )
        self.assertEqual(set(self.make(False).credentialInterfaces), {IUsernamePassword, IExternal})

    def test_missing_database(self) -> None:
        self.assertRaises(ConfigError, AccountsDatabase, self.path + ".missing")

    def test_password(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        verified = self.verified(Cleartext(b"bob", b"hunter2"))
        self.assertEqual(verified, b"bob")
        self.assertEqual(verified.account.name, b"bob")
        for wrong in (b"hunter3", b"", b"hunter2 ", b"Hunter2", b"\xff", b"hunter2\0"):
            failure = self.refused(Cleartext(b"bob", wrong), BadCredentials)
            self.assertEqual(failure.text, FAILED)

    def test_apop(self) -> None:
        self.accounts.add(b"mrose", apop=Secret(b"tanstaaf"))
        shown = ApopCredentials(b"mrose", CHALLENGE, b"c4c9334bac560ecc979e58001b3e22fb")
        self.assertEqual(self.verified(shown), b"mrose")
        self.refused(apop(b"mrose", b"tanstaag"), BadCredentials)
        self.refused(apop(b"mrose", b""), BadCredentials)

    def test_no_verifier_of_this_kind(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        self.accounts.add(b"mrose", apop=Secret(b"tanstaaf"))
        self.refused(Cleartext(b"mrose", b"tanstaaf"), NoVerifierOfThisKind)
        for guess in (b"hunter2", b"", b"\0" * 16):
            self.refused(apop(b"bob", guess), NoVerifierOfThisKind)

    def test_unknown(self) -> None:
        for name in (b"eve", b"", b"..", b"../bob", b"\xff", b"a\0", b"x" * 300):
            self.assertEqual(self.refused(Cleartext(name, b"x"), NoSuchUser).text, FAILED)
            for guess in (b"x", b"", b"\0" * 16):
                self.assertEqual(self.refused(apop(name, guess), NoSuchUser).text, FAILED)

    def test_prepared_before_comparing(self) -> None:
        self.accounts.add("jos\u00e9".encode(), Secret("\u00e9t\u00e9".encode()))
        shown = Cleartext("jose\u0301".encode(), "e\u0301te\u0301".encode())
        self.assertEqual(self.verified(shown), "jos\u00e9".encode())

    def test_disabled_is_verified_all_the_same(self) -> None:
        """The realm refuses it, after the same work (decision 22)."""
        self.accounts.add(b"bob", Secret(b"hunter2"), Secret(b"tanstaaf"))
        self.accounts.disable(b"bob")
        for shown in (Cleartext(b"bob", b"hunter2"), apop(b"bob", b"tanstaaf")):
            self.assertTrue(self.verified(shown).account.disabled)
        self.refused(Cleartext(b"bob", b"wrong"), BadCredentials)

    def test_same_work_for_everybody(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"))
        self.accounts.add(b"mrose", apop=Secret(b"tanstaaf"))
        self.accounts.add(b"gone", Secret(b"hunter2"))
        self.accounts.disable(b"gone")
        for name in (b"bob", b"mrose", b"gone", b"nobody", b"../x", b"\xff"):
            for password in (b"hunter2", b"wrong", b"", b"\xff"):
                before = (self.lookups.count, self.hashes.count, self.hasher.calls)
                self.checker.requestAvatarId(Cleartext(name, password)).addErrback(lambda _: None)
                after = (self.lookups.count, self.hashes.count, self.hasher.calls)
                self.assertEqual(
                    [b - a for a, b in zip(before, after, strict=True)], [1, 1, 1], name
                )

    def test_same_work_for_everybody_by_apop(self) -> None:
        """One hop, one digest, no hash."""
        compared: list[int] = []

        @implementer(IUsernameHashedPassword)
        class Watching:
            def __init__(self, name: bytes) -> None:
                self.username = name

            def checkPassword(self, password: bytes) -> bool:
                compared.append(len(password))
                return False

        self.accounts.add(b"bob", Secret(b"hunter2"))
        self.accounts.add(b"mrose", apop=Secret(b"x" * 16))
        self.accounts.add(b"gone", apop=Secret(b"x" * 16))
        self.accounts.disable(b"gone")
        names = (b"bob", b"mrose", b"gone", b"nobody", b"../x")
        for name in names:
            self.checker.requestAvatarId(Watching(name)).addErrback(lambda _: None)
        self.assertEqual(compared, [16] * len(names))
        self.assertEqual(
            (self.lookups.count, self.hashes.count, self.hasher.calls), (len(names), 0, 0)
        )

    def test_a_right_digest_of_the_decoy_is_not_enough(self) -> None:
        @implementer(IUsernameHashedPassword)
        class Yes:
            username = b"nobody"

            def checkPassword(self, password: bytes) -> bool:
                return True

        self.refused(Yes(), NoSuchUser)

    def test_database_in_trouble(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"), Secret(b"tanstaaf"))
        os.chmod(self.path, 0o644)
        for name in (b"bob", b"nobody"):
            self.refused(Cleartext(name, b"hunter2"), TemporaryFailure)
            self.refused(apop(name, b"tanstaaf"), TemporaryFailure)

    def test_sealed_secret_that_does_not_open(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"), Secret(b"tanstaaf"))
        self.accounts.close()
        os.unlink(self.path + ".key")
        self.accounts = AccountsDatabase(self.path)
        self.addCleanup(self.accounts.close)
        self.checker = self.make(True)
        for guess in (b"tanstaaf", b"", b"\0" * 16):
            failure = self.refused(apop(b"bob", guess), TemporaryFailure)
            self.assertNotIn("bob", failure.text)
        self.assertTrue(self.verified(Cleartext(b"bob", b"hunter2")).account.has_apop)

    def test_failures_hold_no_secret(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"), Secret(b"tanstaaf"))
        for shown in (
            Cleartext(b"bob", b"s3cret-guess"),
            Cleartext(b"nobody", b"s3cret-guess"),
            apop(b"bob", b"s3cret-guess"),
        ):
            failure = self.failureResultOf(self.checker.requestAvatarId(shown))
            text = failure.getTraceback() + repr(failure.value) + failure.value.detail
            for words in ("s3cret-guess", "hunter2", "tanstaaf", "argon2id"):
                self.assertNotIn(words, text)

    def test_behind_a_portal(self) -> None:
        self.accounts.add(b"bob", Secret(b"hunter2"), Secret(b"tanstaaf"))

        @implementer(IRealm)
        class Realm:
            def requestAvatar(self, avatarId: Any, mind: Any, *interfaces: Any) -> Any:
                return interfaces[0], avatarId, lambda: None

        portal = Portal(Realm(), [Chain([self.checker])])
        for shown in (Cleartext(b"bob", b"hunter2"), apop(b"bob", b"tanstaaf")):
            _, avatar, _ = self.successResultOf(portal.login(shown, None, Interface))
            self.assertEqual(avatar.account.name, b"bob")


class Fixed:
    """A checker with one answer."""

    def __init__(self, answer: object, *kinds: Any) -> None:
        self.answer = answer
        self.credentialInterfaces = kinds or (IUsernamePassword, IUsernameHashedPassword)
        self.asked = 0

    def requestAvatarId(self, credentials: object) -> Any:
        self.asked += 1
        return fail(self.answer) if isinstance(self.answer, Exception) else succeed(self.answer)


class Raising(Fixed):
    """As `Fixed`, without Deferreds, as some checkers are."""

    def requestAvatarId(self, credentials: object) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class ChainTests(SynchronousTestCase):
    shown = Cleartext(b"bob", b"hunter2")

    def test_interface(self) -> None:
        verifyObject(ICredentialsChecker, Chain([]))

    def test_goes_on(self) -> None:
        for make in (Fixed, Raising):
            for error in (NoSuchUser(FAILED), NoVerifierOfThisKind(FAILED)):
                last = make(b"bob")
                chain = Chain([make(error), make(error), last])
                self.assertEqual(self.successResultOf(chain.requestAvatarId(self.shown)), b"bob")

    def test_first_answer_counts(self) -> None:
        second = Fixed(b"other")
        chain = Chain([Fixed(Verified(Account(b"bob"))), second])
        self.assertEqual(self.successResultOf(chain.requestAvatarId(self.shown)), b"bob")
        self.assertEqual(second.asked, 0)

    def test_stops(self) -> None:
        for make in (Fixed, Raising):
            for error in (
                BadCredentials(FAILED),
                TemporaryFailure("later"),
                UnauthorizedLogin(),
                OSError("broken"),
            ):
                second = make(b"bob")
                chain = Chain([make(error), second])
                failure = self.failureResultOf(chain.requestAvatarId(self.shown))
                self.assertIs(failure.value, error)
                self.assertEqual(second.asked, 0)

    def test_stops_at_twisteds_own(self) -> None:
        second = Fixed(b"bob")
        chain = Chain([InMemoryUsernamePasswordDatabaseDontUse(bob=b"other"), second])
        self.failureResultOf(chain.requestAvatarId(self.shown), UnauthorizedLogin)
        self.assertEqual(second.asked, 0)

    def test_twisteds_own_verifies(self) -> None:
        chain = Chain(
            [Fixed(NoSuchUser(FAILED)), InMemoryUsernamePasswordDatabaseDontUse(bob=b"hunter2")]
        )
        self.assertEqual(self.successResultOf(chain.requestAvatarId(self.shown)), b"bob")

    def test_at_the_end(self) -> None:
        for checkers in ([], [Fixed(NoSuchUser("x"))], [Fixed(NoVerifierOfThisKind("x"))] * 2):
            failure = self.failureResultOf(Chain(checkers).requestAvatarId(self.shown))
            self.assertIs(failure.type, BadCredentials)
            self.assertEqual(failure.value.text, "Authentication failed.")

    def test_passes_over_those_that_do_not_know_the_kind(self) -> None:
        apop_only = Fixed(BadCredentials(FAILED), IUsernameHashedPassword)
        chain = Chain([apop_only, Fixed(b"bob", IUsernamePassword)])
        self.assertEqual(self.successResultOf(chain.requestAvatarId(self.shown)), b"bob")
        self.assertEqual(apop_only.asked, 0)
        chain = Chain([Fixed(b"bob", IUsernamePassword)])
        self.failureResultOf(chain.requestAvatarId(apop(b"bob", b"x")), BadCredentials)

    def test_interfaces_are_those_of_all(self) -> None:
        chain = Chain(
            [
                Fixed(b"", IUsernamePassword),
                Fixed(b"", IUsernamePassword, IUsernameHashedPassword),
                AllowAnonymousAccess(),
            ]
        )
        self.assertEqual(
            list(chain.credentialInterfaces),
            [IUsernamePassword, IUsernameHashedPassword, IAnonymous],
        )
        self.assertEqual(list(Chain([]).credentialInterfaces), [])
        answer = self.successResultOf(chain.requestAvatarId(Anonymous()))
        self.assertIs(answer, ANONYMOUS)

    def test_cancelling_reaches_the_one_being_asked(self) -> None:
        waiting: Deferred[bytes] = Deferred()
        second = Fixed(b"bob")

        class Slow(Fixed):
            def requestAvatarId(self, credentials: object) -> Any:
                return waiting

        asked = Chain([Slow(None), second]).requestAvatarId(self.shown)
        self.assertNoResult(asked)
        asked.cancel()
        self.failureResultOf(asked)
        self.assertTrue(waiting.called)
        self.assertEqual(second.asked, 0)
