"""The accounts database beyond a password and a secret: SCRAM, app passwords, keys, names."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from scramp import ScramClient, ScramMechanism
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts import database as module
from popdrop.accounts import rows, scram
from popdrop.accounts.database import AccountsDatabase, Incoming, Refused
from popdrop.accounts.schema import ACCOUNTS
from popdrop.accounts.secrets import Vault
from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.sqlitefile import SqliteFile
from popdrop.values import Scope, ScramVerifier, Secret
from tests.test_database import DatabaseCase

HOME = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))


def scram_login(verifier: ScramVerifier, algorithm: str, password: str) -> bool:
    """Whether scramp's client gets in where scramp's server has this verifier."""
    mechanism = f"SCRAM-{algorithm}"
    client = ScramClient([mechanism], "bob", password)
    server = ScramMechanism(mechanism).make_server(
        lambda name: (
            verifier.salt,
            verifier.stored_key.reveal(),
            verifier.server_key.reveal(),
            verifier.iterations,
        )
    )
    server.set_client_first(client.get_client_first())
    client.set_server_first(server.get_server_first())
    try:
        server.set_client_final(client.get_client_final())
    except Exception:
        return False
    client.set_server_final(server.get_server_final())
    return True


class ScramTests(DatabaseCase):
    def test_a_password_taken_away_takes_scram_with_it(self) -> None:
        accounts = self.make()
        for change in (
            lambda: accounts.set_password(b"bob", None),
            lambda: accounts.merge(
                [Incoming(b"bob", password_hash=Secret(b"$1$x$y"))], replace=True
            ),
        ):
            with contextlib.suppress(Refused):
                accounts.delete(b"bob")
            accounts.add(b"bob", Secret(b"one"))
            for algorithm in scram.KINDS:
                self.assertTrue(scram_login(accounts.scram(b"bob", algorithm), algorithm, "one"))
            change()
            for algorithm in scram.KINDS:
                found = accounts.scram(b"bob", algorithm)
                self.assertFalse(scram_login(found, algorithm, "one"))

    def test_a_lost_key_s_verifiers_go_when_there_is_a_new_key(self) -> None:
        """Until the next login by password there are made-up ones; none that do not open."""
        self.make().add(b"bob", Secret(b"one"))
        os.unlink(self.key_path)
        accounts = self.open()
        accounts.add(b"eve", apop=Secret(b"secret"))
        bob = self.found(accounts, b"bob")
        self.assertTrue(bob.lacks_scram)
        self.assertFalse(scram_login(accounts.scram(b"bob", "SHA-1"), "SHA-1", "one"))
        self.assertTrue(accounts.improve(bob, Secret(b"one")))
        self.assertTrue(scram_login(accounts.scram(b"bob", "SHA-1"), "SHA-1", "one"))

    def test_the_same_number_of_secrets_is_opened_for_every_name(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"))
        accounts.add(b"both", Secret(b"one"), Secret(b"two"))
        accounts.add(b"apop", apop=Secret(b"two"))
        opened: list[int] = []
        real = Vault.open

        def watched(*args: Any) -> Secret:
            opened.append(1)
            return real(*args)

        self.patch(Vault, "open", watched)
        for name in (b"bob", b"both", b"apop", b"nobody"):
            opened.clear()
            accounts.lookup(name)
            self.assertEqual(len(opened), 1, name)
            accounts.scram(name, "SHA-256")
            self.assertEqual(len(opened), 2, name)

    def test_a_password_makes_verifiers(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret("pässword".encode()))
        for algorithm in scram.KEY_OCTETS:
            verifier = accounts.scram(b"bob", algorithm)
            self.assertGreaterEqual(verifier.iterations, 4096)
            self.assertTrue(scram_login(verifier, algorithm, "pässword"))
            self.assertFalse(scram_login(verifier, algorithm, "password"))

    def test_a_changed_password_changes_them(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"))
        accounts.set_password(b"bob", Secret(b"two"))
        verifier = accounts.scram(b"bob", "SHA-256")
        self.assertTrue(scram_login(verifier, "SHA-256", "two"))
        self.assertFalse(scram_login(verifier, "SHA-256", "one"))

    def test_an_apop_secret_is_no_scram_password(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", apop=Secret(b"secret"))
        self.assertFalse(scram_login(accounts.scram(b"bob", "SHA-1"), "SHA-1", "secret"))

    def test_strangers_get_one_of_the_same_look(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"))
        accounts.add(b"none")
        real = accounts.scram(b"bob", "SHA-1")
        seen = set()
        for name in (b"none", b"eve", b"", b"../x", b"a" * 300, "ü".encode()):
            for algorithm in scram.KEY_OCTETS:
                verifier = accounts.scram(name, algorithm)
                self.assertEqual(verifier.salt, accounts.scram(name, algorithm).salt, name)
                seen.add(verifier.salt)
                self.assertEqual(verifier.iterations, real.iterations)
                self.assertEqual(len(verifier.salt), len(real.salt))
                self.assertEqual(len(verifier.stored_key.reveal()), scram.KEY_OCTETS[algorithm])
        self.assertEqual(len(seen), 12)

    def test_strangers_are_the_same_after_a_restart(self) -> None:
        before = self.make().scram(b"eve", "SHA-1")
        self.assertEqual(self.open().scram(b"eve", "SHA-1").salt, before.salt)

    def test_verifiers_are_sealed(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"))
        verifier = accounts.scram(b"bob", "SHA-1")
        accounts.close()
        with open(self.path, "rb") as file:
            octets = file.read()
        for part in (verifier.stored_key.reveal(), verifier.server_key.reveal(), verifier.salt):
            self.assertNotIn(part, octets)

    def test_without_a_key(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"))
        os.unlink(self.key_path)
        accounts = self.open()
        self.assertRaises(TemporaryFailure, accounts.scram, b"bob", "SHA-1")
        self.assertRaises(TemporaryFailure, accounts.scram, b"eve", "SHA-1")
        self.assertIsNotNone(self.found(accounts, b"bob").password_hash)

    def test_damaged(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"))
        self.sql("UPDATE verifier SET value = x'00' WHERE kind LIKE 'scram%'")
        self.assertRaises(TemporaryFailure, accounts.scram, b"bob", "SHA-1")

    def test_made_at_a_login_where_it_lacks(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"))
        self.assertFalse(self.found(accounts, b"bob").lacks_scram)
        self.sql("DELETE FROM verifier WHERE kind LIKE 'scram%'")
        before = self.found(accounts, b"bob")
        self.assertTrue(before.lacks_scram)
        self.assertTrue(accounts.improve(before, Secret(b"one")))
        self.assertFalse(self.found(accounts, b"bob").lacks_scram)
        self.assertTrue(scram_login(accounts.scram(b"bob", "SHA-1"), "SHA-1", "one"))
        # The account is not a changed one for that: a cached login stays good.
        self.assertEqual(self.found(accounts, b"bob").version, before.version)

    def test_not_made_where_the_password_was_changed_meanwhile(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"))
        before = self.found(accounts, b"bob")
        accounts.set_password(b"bob", Secret(b"two"))
        self.assertFalse(accounts.improve(before, Secret(b"one")))
        self.assertTrue(scram_login(accounts.scram(b"bob", "SHA-1"), "SHA-1", "two"))

    def test_an_account_without_a_password_lacks_nothing(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", apop=Secret(b"secret"))
        self.assertFalse(self.found(accounts, b"bob").lacks_scram)


class PackingTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(
        st.binary(min_size=1, max_size=64),
        st.integers(1, 2**31),
        st.sampled_from(("SHA-1", "SHA-256")),
    )
    def test_round_trip(self, salt: bytes, count: int, algorithm: str) -> None:
        size = scram.KEY_OCTETS[algorithm]
        stored, server = bytes(range(size)), bytes(range(1, size + 1))
        packed = scram.packed(ScramVerifier(salt, count, Secret(stored), Secret(server)))
        found = scram.unpacked(algorithm, packed)
        self.assertEqual((found.salt, found.iterations), (salt, count))
        self.assertEqual((found.stored_key.reveal(), found.server_key.reveal()), (stored, server))

    def test_too_short(self) -> None:
        self.assertRaises(ValueError, scram.unpacked, "SHA-1", Secret(bytes(44)))

    def test_nothing_is_printed(self) -> None:
        verifier = scram.derived("SHA-1", b"hunter2")
        self.assertNotIn(repr(verifier.stored_key.reveal()), repr(verifier))


class AppPasswordTests(DatabaseCase):
    def test_made_and_found(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        words = accounts.add_app_password(b"bob", "phone").reveal()
        plain = words.replace(b"-", b"")
        self.assertEqual(len(plain), 26)
        for form in (words, plain, plain.upper(), words.replace(b"-", b" ")):
            found = accounts.app_password(b"bob", form)
            assert found is not None
            self.assertEqual(found.label, "phone")
        for wrong in (b"", b"x", plain[:-1], plain + b"a", b"a" * 26):
            self.assertIsNone(accounts.app_password(b"bob", wrong))

    def test_facts(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        words = accounts.add_app_password(
            b"bob", "reader", Scope(read_only=True, networks=HOME, expires=1_900_000_000)
        )
        found = accounts.app_password(b"bob", words.reveal())
        assert found is not None
        self.assertEqual((found.scope, found.used), (Scope(True, HOME, 1_900_000_000), None))
        self.assertEqual([each.label for each in accounts.app_passwords(b"bob")], ["reader"])
        self.assertEqual(accounts.entry(b"bob").app_passwords, 1)

    def test_each_is_of_one_account(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        accounts.add(b"eve", Secret(b"x"))
        words = accounts.add_app_password(b"bob", "phone").reveal()
        self.assertIsNone(accounts.app_password(b"eve", words))
        self.assertIsNone(accounts.app_password(b"nobody", words))

    def test_a_stolen_database_holds_none(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        words = accounts.add_app_password(b"bob", "phone").reveal()
        accounts.close()
        with open(self.path, "rb") as file:
            octets = file.read()
        for form in (words, words.replace(b"-", b"")):
            self.assertNotIn(form, octets)

    def test_labels(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        accounts.add_app_password(b"bob", "my phone")
        for label in ("my phone", "", " x", "-x", "a\nb", "a\x1b[2J", "x" * 41, "\u202e"):
            self.assertRaises(Refused, accounts.add_app_password, b"bob", label)
        self.assertRaises(Refused, accounts.add_app_password, b"eve", "phone")
        self.assertEqual(len(accounts.app_passwords(b"bob")), 1)

    def test_taken_back(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        words = accounts.add_app_password(b"bob", "phone").reveal()
        before = self.found(accounts, b"bob").version
        accounts.delete_app_password(b"bob", "phone")
        self.assertIsNone(accounts.app_password(b"bob", words))
        self.assertNotEqual(self.found(accounts, b"bob").version, before)
        self.assertRaises(Refused, accounts.delete_app_password, b"bob", "phone")

    def test_last_use_is_kept_to_the_hour(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        words = accounts.add_app_password(b"bob", "phone").reveal()

        def use(now: float) -> int | None:
            found = accounts.app_password(b"bob", words)
            assert found is not None
            accounts.note_use(b"bob", found, now)
            return accounts.app_passwords(b"bob")[0].used

        self.assertEqual(use(1_000_000.5), 1_000_000)
        self.assertEqual(use(1_000_000 + 3599), 1_000_000)
        self.assertEqual(use(1_000_000 + 3600), 1_003_600)
        self.assertEqual(use(5.0), 5)  # a clock that went back

    def test_they_go_with_the_account(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        words = accounts.add_app_password(b"bob", "phone").reveal()
        accounts.delete(b"bob")
        accounts.add(b"bob", Secret(b"x"))
        self.assertIsNone(accounts.app_password(b"bob", words))


class FactTests(DatabaseCase):
    def test_kept(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        accounts.change(b"bob", expires=1_900_000_000, networks=HOME, read_only=True)
        scope = Scope(True, HOME, 1_900_000_000)
        self.assertEqual(self.found(accounts, b"bob").scope, scope)
        self.assertEqual(accounts.entry(b"bob").scope, scope)
        accounts.change(b"bob", expires=None, networks=(), read_only=False)
        self.assertEqual(self.found(accounts, b"bob").scope, Scope())

    def test_damaged_networks_let_nobody_in(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        self.sql("UPDATE accounts SET networks = 'rubbish'")
        self.assertRaises(TemporaryFailure, accounts.lookup, b"bob")

    def test_no_such_entry(self) -> None:
        self.assertRaises(Refused, self.make().entry, b"eve")


class RenameTests(DatabaseCase):
    def test_a_new_name_is_a_new_version(self) -> None:
        """The memory of good logins goes by name and version: an earlier eve's do not count."""
        accounts = self.make()
        versions = set()
        for _ in range(3):
            accounts.add(b"bob", Secret(b"one"))
            accounts.rename(b"bob", b"eve")
            versions.add(self.found(accounts, b"eve").version)
            accounts.delete(b"eve")
        self.assertEqual(len(versions), 3)

    def test_everything_comes_along(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"), Secret(b"secret"))
        accounts.change(b"bob", networks=HOME, disabled=True)
        words = accounts.add_app_password(b"bob", "phone").reveal()
        accounts.rename(b"bob", b"robert@example.org")
        self.assertFalse(accounts.has(b"bob"))
        found = self.found(accounts, b"robert@example.org")
        assert found.apop_secret is not None
        self.assertEqual(found.apop_secret.reveal(), b"secret")
        self.assertEqual((found.scope.networks, found.disabled), (HOME, True))
        self.assertTrue(scram_login(accounts.scram(b"robert@example.org", "SHA-1"), "SHA-1", "one"))
        self.assertIsNotNone(accounts.app_password(b"robert@example.org", words))
        self.assertEqual(len(self.sql("SELECT * FROM verifier")), 4)

    def test_refused(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"x"))
        accounts.add(b"eve", Secret(b"x"))
        for old, new in (
            (b"bob", b"eve"),
            (b"carol", b"dave"),
            (b"bob", b"../x"),
            (b"bob", b"bob"),
        ):
            self.assertRaises(Refused, accounts.rename, old, new)
        self.assertEqual(accounts.names(), [b"bob", b"eve"])

    def test_a_secret_that_does_not_open_stays(self) -> None:
        accounts = self.make()
        accounts.add(b"bob", apop=Secret(b"secret"))
        self.sql("UPDATE verifier SET value = x'0102'")
        self.assertRaises(Refused, accounts.rename, b"bob", b"eve")
        self.assertEqual(accounts.names(), [b"bob"])


class Killed(BaseException):
    """As SIGKILL: nothing after it runs."""


class RekeyTests(DatabaseCase):
    def secrets(self, accounts: AccountsDatabase) -> list[Any]:
        bob = self.found(accounts, b"bob")
        assert bob.apop_secret is not None
        return [
            bob.apop_secret.reveal(),
            scram_login(accounts.scram(b"bob", "SHA-256"), "SHA-256", "one"),
        ]

    def filled(self) -> AccountsDatabase:
        accounts = self.make()
        accounts.add(b"bob", Secret(b"one"), Secret(b"secret"))
        return accounts

    def key(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def test_another_key_opens_the_same(self) -> None:
        accounts = self.filled()
        running = self.open()
        before = self.key(self.key_path)
        self.assertEqual(accounts.rekey(), 3)
        self.assertNotEqual(self.key(self.key_path), before)
        self.assertEqual(stat.S_IMODE(os.stat(self.key_path).st_mode), 0o600)
        for each in (accounts, running, self.open()):
            self.assertEqual(self.secrets(each), [b"secret", True])
        self.assertEqual(sorted(os.listdir(self.folder))[:2], ["accounts.db", "accounts.db-shm"])
        self.assertNotIn("accounts.db.key.next", os.listdir(self.folder))

    def test_a_server_with_a_look_every_second_follows_at_once(self) -> None:
        accounts = self.filled()
        running = AccountsDatabase(self.path, look_every=1000.0)
        self.addCleanup(running.close)
        self.assertEqual(self.secrets(running), [b"secret", True])
        accounts.rekey()
        self.assertEqual(self.secrets(running), [b"secret", True])

    def test_the_old_key_opens_nothing_any_more(self) -> None:
        accounts = self.filled()
        old = self.key(self.key_path)
        accounts.rekey()
        accounts.close()
        with open(self.key_path, "wb") as file:
            file.write(old)
        bob = self.found(self.open(), b"bob")
        self.assertTrue(bob.apop_sealed)
        self.assertIsNone(bob.apop_secret)

    def test_a_leftover_of_another_key_is_not_taken_for_the_key(self) -> None:
        """The old key was restored, and a `rekey` was killed before it had sealed anything."""
        accounts = self.filled()
        old = self.key(self.key_path)
        accounts.rekey()
        accounts.close()
        for path, key in ((self.key_path, old), (self.key_path + ".next", b"N" * 32)):
            with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(key)
        self.open().add(b"eve", apop=Secret(b"new"))
        os.unlink(self.key_path + ".next")
        eve = self.found(self.open(), b"eve")
        assert eve.apop_secret is not None
        self.assertEqual(eve.apop_secret.reveal(), b"new")
        self.assertEqual(self.key(self.key_path), old)

    def test_killed_at_each_call(self) -> None:
        """Whatever was done when it was killed: the secrets open, and `rekey` can be run again."""
        points = ["rename", "sync_folder", "_make_key_file", "put", "transaction"]
        for point in points:
            for when in ("before", "after"):
                with self.subTest(point=point, when=when):
                    self.killed_at(point, when)

    def killed_at(self, point: str, when: str) -> None:
        self.path = os.path.join(self.folder, f"{point}-{when}.db")
        self.key_path = self.path + ".key"
        accounts = self.filled()
        owner: Any = {"rename": module.os, "put": rows}.get(point, module)
        name = point
        real = getattr(owner, name)

        def killed(*args: Any, **kwargs: Any) -> Any:
            if when == "after":
                result = real(*args, **kwargs)
                if point == "transaction":
                    with result:
                        pass
            raise Killed

        patch = self.patch(owner, name, killed)
        try:
            accounts.rekey()
        except Killed:
            pass
        else:
            self.fail("never came there")
        finally:
            patch.restore()
        for each in (self.open(), self.open()):
            self.assertEqual(self.secrets(each), [b"secret", True])
        again = self.open()
        self.assertEqual(again.rekey(), 3)
        self.assertEqual(self.secrets(self.open()), [b"secret", True])

    def between(self, accounts: AccountsDatabase, what: Callable[[], object]) -> None:
        """`rekey`, and `what` when all is sealed anew but the new key has not got its name."""
        real = accounts._settle_key

        def settle(*args: Any) -> None:
            patch.restore()
            what()
            real(*args)

        patch = self.patch(accounts, "_settle_key", settle)
        accounts.rekey()

    def test_a_server_that_looks_in_between_gives_the_key_its_name(self) -> None:
        accounts, running = self.filled(), self.open()
        self.between(accounts, lambda: self.assertEqual(self.secrets(running), [b"secret", True]))
        for each in (accounts, running, self.open()):
            self.assertEqual(self.secrets(each), [b"secret", True])

    def test_what_a_server_writes_meanwhile_is_sealed_with_the_new_key(self) -> None:
        """Its look at the files may be a second old, and what it sealed then opened no more."""
        accounts = self.filled()
        running = AccountsDatabase(self.path, look_every=1000.0)
        self.addCleanup(running.close)
        bob = self.found(running, b"bob")
        self.between(accounts, lambda: self.assertTrue(running.improve(bob, Secret(b"one"))))
        self.assertEqual(self.secrets(self.open()), [b"secret", True])
        accounts.rekey()
        self.assertTrue(running.improve(bob, Secret(b"one")))
        running.change(b"bob", password=Secret(b"one"), apop=Secret(b"secret"))
        self.assertEqual(self.secrets(self.open()), [b"secret", True])

    def test_the_key_gets_its_name_under_the_write_lock(self) -> None:
        accounts = self.filled()
        real, renamed = os.rename, []

        def rename(*names: str) -> None:
            other = sqlite3.connect(self.path, timeout=0, isolation_level=None)
            self.addCleanup(other.close)
            self.assertRaises(sqlite3.OperationalError, other.execute, "BEGIN IMMEDIATE")
            renamed.append(names)
            real(*names)

        self.patch(module.os, "rename", rename)
        accounts.rekey()
        self.assertEqual(renamed, [(self.key_path + ".next", self.key_path)])

    def test_another_rekey_in_between_takes_no_key_away(self) -> None:
        """The first gave the name to the new key of the second, which then came to nothing."""
        accounts, other = self.filled(), self.open()

        def fails(*args: Any) -> None:
            raise Killed

        def rekey() -> None:
            patch = self.patch(other, "_resealed", fails)
            self.assertRaises(Killed, other.rekey)
            patch.restore()

        self.between(accounts, rekey)
        self.assertEqual(self.secrets(self.open()), [b"secret", True])
        self.between(self.open(), self.open().rekey)
        self.assertEqual(self.secrets(self.open()), [b"secret", True])
        self.assertNotIn("accounts.db.key.next", os.listdir(self.folder))

    def test_a_secret_that_does_not_open_stops_it(self) -> None:
        accounts = self.filled()
        before = self.key(self.key_path)
        self.sql("UPDATE verifier SET value = x'01' WHERE kind = 'scram-sha-1'")
        failure = self.assertRaises(Refused, accounts.rekey)
        self.assertIn("bob", str(failure))
        self.assertEqual(self.key(self.key_path), before)
        bob = self.found(self.open(), b"bob")
        self.assertIsNotNone(bob.apop_secret)

    def test_to_the_same_key(self) -> None:
        accounts = self.filled()
        new = os.path.join(self.folder, "copy.key")
        shutil.copy(self.key_path, new)
        failure = self.assertRaises(Refused, accounts.rekey, f"file:{new}")
        self.assertIn("copy.key: the same key as before", str(failure))

    def test_to_another_source(self) -> None:
        accounts = self.filled()
        new = os.path.join(self.folder, "elsewhere.key")
        accounts.rekey(f"file:{new}")
        self.assertEqual(self.secrets(accounts), [b"secret", True])
        other = AccountsDatabase(self.path, key=f"file:{new}")
        self.addCleanup(other.close)
        self.assertEqual(self.secrets(other), [b"secret", True])
        self.assertTrue(self.found(self.open(), b"bob").apop_sealed)


class KeySourceTests(DatabaseCase):
    KEY = bytes(range(32))

    def with_key(self, key: str) -> AccountsDatabase:
        AccountsDatabase.create(self.path, key)
        accounts = AccountsDatabase(self.path, key=key)
        self.addCleanup(accounts.close)
        return accounts

    def works(self, key: str) -> None:
        accounts = self.with_key(key)
        self.assertTrue(accounts.can_apop)
        accounts.add(b"bob", apop=Secret(b"secret"))
        again = AccountsDatabase(self.path, key=key)
        self.addCleanup(again.close)
        bob = self.found(again, b"bob")
        assert bob.apop_secret is not None
        self.assertEqual(bob.apop_secret.reveal(), b"secret")
        self.assertFalse(os.path.exists(self.key_path))

    def test_file(self) -> None:
        self.works("file:" + os.path.join(self.folder, "some.key"))

    def test_credential(self) -> None:
        folder = os.path.join(self.folder, "credentials")
        os.mkdir(folder)
        with open(os.path.join(folder, "seal"), "wb") as file:
            file.write(self.KEY.hex().encode() + b"\n")
        os.chmod(file.name, 0o440)
        self.patch(os, "environ", {**os.environ, "CREDENTIALS_DIRECTORY": folder})
        self.works("credential:seal")

    def test_no_credentials(self) -> None:
        environ = {k: v for k, v in os.environ.items() if k != "CREDENTIALS_DIRECTORY"}
        self.patch(os, "environ", environ)
        failure = self.assertRaises(ConfigError, self.with_key, "credential:seal")
        self.assertIn("LoadCredential", str(failure))

    def test_command(self) -> None:
        path = os.path.join(self.folder, "a key")
        with open(path, "wb") as file:
            file.write(self.KEY)
        self.works(f"command:cat '{path}'")

    def test_commands_that_give_none(self) -> None:
        for words, part in (
            ("false", "status 1"),
            ("echo no", "32 octets"),
            ("/nonexistent/x", "No such file"),
            ("", "name a program"),
            ("'", "name a program"),
        ):
            failure = self.assertRaises(ConfigError, self.with_key, f"command:{words}")
            self.assertIn(part, str(failure))

    def test_unknown_words(self) -> None:
        for key in ("x", "file:relative", "http://x", "credential:../x"):
            self.patch(os, "environ", {**os.environ, "CREDENTIALS_DIRECTORY": self.folder})
            self.assertRaises(ConfigError, self.with_key, key)

    def test_a_file_that_others_may_read(self) -> None:
        path = os.path.join(self.folder, "some.key")
        with open(path, "wb") as file:
            file.write(self.KEY)
        os.chmod(path, 0o640)
        failure = self.assertRaises(ConfigError, self.with_key, f"file:{path}")
        self.assertIn("chmod 600", str(failure))


class MigrationTests(DatabaseCase):
    def first_schema(self) -> None:
        file = SqliteFile(self.path, replace(ACCOUNTS, steps=ACCOUNTS.steps[:1]))
        file.create()
        with file.use() as opened:
            opened.connection.execute(
                "INSERT INTO account (name, disabled, version, changed) VALUES (?, 1, 5, 7)",
                (b"bob",),
            )
            opened.connection.execute(
                "INSERT INTO verifier (name, kind, value) VALUES (?, 'password', ?)",
                (b"bob", b"hash of x"),
            )
        file.close()

    def test_accounts_are_kept(self) -> None:
        self.first_schema()
        accounts = self.open()
        bob = self.found(accounts, b"bob")
        assert bob.password_hash is not None
        self.assertEqual((bob.disabled, bob.version), (True, 5))
        self.assertEqual(bob.password_hash.reveal(), b"hash of x")
        accounts.add_app_password(b"bob", "phone")
        accounts.delete(b"bob")
        self.assertEqual(self.sql("SELECT * FROM verifier"), [])

    def test_a_server_of_the_first_schema_lets_nobody_in(self) -> None:
        """It would overlook networks and expiry; it is still running while an account gets them."""
        self.first_schema()
        connection = sqlite3.connect(self.path)
        self.addCleanup(connection.close)
        connection.execute("SELECT name FROM account").fetchall()
        self.open()
        self.assertRaises(sqlite3.OperationalError, connection.execute, "SELECT name FROM account")
