"""Hashes, sealed secrets and key files."""

import os

from argon2 import extract_parameters
from argon2.low_level import Type
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts import secrets as module
from popdrop.accounts.secrets import CannotOpen, Hasher, Vault, load_key, make_key
from popdrop.errors import ConfigError, TemporaryFailure
from popdrop.values import Secret

KEY = Secret(bytes(range(32)))
OTHER = Secret(bytes(range(1, 33)))
DATABASE = b"d" * 16


class HasherTests(SynchronousTestCase):
    def test_round_trip(self) -> None:
        hasher = Hasher()
        hashed = hasher.hash(b"hunter2")
        self.assertTrue(hasher.verify(hashed, b"hunter2"))
        self.assertFalse(hasher.verify(hashed, b"hunter3"))
        self.assertFalse(hasher.verify(hashed, b""))
        self.assertNotIn("argon2", repr(hashed))

    def test_salted(self) -> None:
        self.assertNotEqual(Hasher().hash(b"x").reveal(), Hasher().hash(b"x").reveal())

    def test_parameters(self) -> None:
        found = extract_parameters(Hasher().hash(b"x").reveal().decode())
        self.assertIs(found.type, Type.ID)
        self.assertEqual((found.memory_cost, found.time_cost, found.parallelism), (19 * 1024, 2, 1))

    def test_nobody_costs_the_same(self) -> None:
        """The same parameters, hence the same work; and the library is really asked."""
        hasher = Hasher()
        asked = []
        verify = hasher._argon2.verify

        class Watching:
            def verify(self, hashed: bytes, password: bytes) -> bool:
                asked.append((extract_parameters(hashed.decode()), password))
                return verify(hashed, password)

        hasher._argon2 = Watching()  # type: ignore[assignment]
        self.assertFalse(hasher.verify(None, b"hunter2"))
        self.assertFalse(hasher.verify(Hasher().hash(b"x"), b"hunter2"))
        self.assertEqual(asked[0], asked[1])

    def test_nobody_is_never_right(self) -> None:
        """Not even if somebody found the words of that hash."""
        hasher = Hasher()

        class Yes:
            def verify(self, hashed: bytes, password: bytes) -> bool:
                return True

        hasher._argon2 = Yes()  # type: ignore[assignment]
        self.assertFalse(hasher.verify(None, b"anything"))

    def test_damaged_hash(self) -> None:
        good = Hasher().hash(b"x").reveal()
        for damaged in (b"", b"x", good[:-30], b"\xff" + good, good.replace(b"v=19", b"v=x")):
            failure = self.assertRaises(TemporaryFailure, Hasher().verify, Secret(damaged), b"x")
            self.assertNotIn(good[-20:].decode(), failure.detail)


class VaultTests(SynchronousTestCase):
    @given(st.binary(max_size=100), st.binary(min_size=1, max_size=64))
    @settings(deadline=None, derandomize=True)
    def test_round_trip(self, secret: bytes, name: bytes) -> None:
        vault = Vault(KEY, DATABASE)
        sealed = vault.seal("apop", name, Secret(secret))
        self.assertEqual(vault.open("apop", name, sealed).reveal(), secret)

    def test_bound_to_its_facts(self) -> None:
        sealed = Vault(KEY, DATABASE).seal("apop", b"bob", Secret(b"tanstaaf"))
        for vault, kind, name in (
            (Vault(KEY, DATABASE), "apop", b"eve"),
            (Vault(KEY, DATABASE), "apop", b"bo"),
            (Vault(KEY, DATABASE), "apop", b"bob\0"),
            (Vault(KEY, DATABASE), "cram", b"bob"),
            (Vault(KEY, b"e" * 16), "apop", b"bob"),
            (Vault(OTHER, DATABASE), "apop", b"bob"),
        ):
            self.assertRaises(CannotOpen, vault.open, kind, name, sealed)

    def test_each_octet_counts(self) -> None:
        vault = Vault(KEY, DATABASE)
        sealed = vault.seal("apop", b"bob", Secret(b"tanstaaf"))
        for at in range(len(sealed)):
            changed = bytearray(sealed)
            changed[at] ^= 1
            self.assertRaises(CannotOpen, vault.open, "apop", b"bob", bytes(changed))
        for length in range(len(sealed)):
            self.assertRaises(CannotOpen, vault.open, "apop", b"bob", sealed[:length])

    def test_new_nonce_each_time(self) -> None:
        vault = Vault(KEY, DATABASE)
        sealed = {vault.seal("apop", b"bob", Secret(b"tanstaaf")) for _ in range(50)}
        self.assertEqual(len({octets[9:21] for octets in sealed}), 50)

    def test_unreadable(self) -> None:
        sealed = Vault(KEY, DATABASE).seal("apop", b"bob", Secret(b"tanstaaf"))
        self.assertNotIn(b"tanstaaf", sealed)
        self.assertNotIn(KEY.reveal()[:8], sealed)


class KeyFileTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.mkdir(self.folder, 0o700)
        self.path = os.path.join(os.path.abspath(self.folder), "accounts.db.key")

    def test_made_private_and_random(self) -> None:
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        make_key(self.path)
        self.assertEqual(os.stat(self.path).st_mode & 0o7777, 0o600)
        key = load_key(self.path).reveal()
        self.assertEqual(len(key), 32)
        self.assertTrue(len(set(key)) > 8)
        self.assertEqual(os.listdir(self.folder), ["accounts.db.key"])

    def test_never_overwritten(self) -> None:
        make_key(self.path)
        key = load_key(self.path).reveal()
        self.assertRaises(FileExistsError, make_key, self.path)
        self.assertEqual(load_key(self.path).reveal(), key)
        self.assertEqual(os.listdir(self.folder), ["accounts.db.key"])

    def test_not_through_a_dangling_link(self) -> None:
        os.symlink(os.path.join(self.folder, "elsewhere"), self.path)
        self.assertRaises(FileExistsError, make_key, self.path)
        self.assertEqual(os.listdir(self.folder), ["accounts.db.key"])

    def test_rights_of_others(self) -> None:
        make_key(self.path)
        for mode in (0o640, 0o620, 0o604, 0o602, 0o601, 0o610):
            os.chmod(self.path, mode)
            failure = self.assertRaises(ConfigError, load_key, self.path)
            self.assertIn(f"chmod 600 {self.path}", str(failure))
        os.chmod(self.path, 0o400)
        load_key(self.path)

    def test_length(self) -> None:
        for length in (0, 31, 33, 64):
            with open(self.path, "wb") as file:
                os.chmod(self.path, 0o600)
                file.write(b"k" * length)
            failure = self.assertRaises(ConfigError, load_key, self.path)
            self.assertNotIn("kkk", str(failure))

    def test_symbolic_link(self) -> None:
        make_key(self.path)
        link = self.path + ".link"
        os.symlink(self.path, link)
        self.assertRaises(ConfigError, load_key, link)

    def test_no_regular_file(self) -> None:
        os.mkfifo(self.path, 0o600)
        self.assertRaises(ConfigError, load_key, self.path)

    def test_missing(self) -> None:
        self.assertRaises(FileNotFoundError, load_key, self.path)

    def test_owner(self) -> None:
        # Only root can give files away; anybody can give them to himself.
        owner = (12345, 12346) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        make_key(self.path, *owner)
        facts = os.stat(self.path)
        self.assertEqual((facts.st_uid, facts.st_gid), owner)

    def test_failure_leaves_nothing(self) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        self.patch(module.os, "fsync", full)
        self.assertRaises(OSError, make_key, self.path)
        self.assertEqual(os.listdir(self.folder), [])
