"""The relay window's memory: who counts as one client, who gets in, and until when."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop import sqlitefile
from popdrop.errors import TemporaryFailure
from popdrop.ops.grants import (
    ANY,
    NAME,
    Grant,
    Grants,
    Rules,
    client_of,
    exim_map,
    may_be_granted,
)
from popdrop.policy import networks
from popdrop.values import PeerFacts

PROXIES = networks("--trusted-proxies", "203.0.113.0/24,2001:db8:ffff::/48")


class ClientTests(SynchronousTestCase):
    def test_one_form(self) -> None:
        for host, bits, client in (
            ("192.0.2.7", 128, "192.0.2.7"),
            ("192.0.2.7", 64, "192.0.2.7"),
            ("::ffff:192.0.2.7", 128, "192.0.2.7"),
            ("::FFFF:C000:207", 64, "192.0.2.7"),
            ("2001:DB8:0::7", 128, "2001:db8::7"),
            ("2001:db8::1:0:0:0:7", 64, "2001:db8:0:1::/64"),
            ("fe80::1%eth0", 128, "fe80::1"),
        ):
            self.assertEqual(client_of(host, bits), client, host)

    def test_what_else_an_mta_asks_for(self) -> None:
        words = ("", "example.org", "192.0.2", "192.0.2.", "1", "2001:db8", "192.0.2.7/32", "a b")
        for word in (*words, "192.0.2.07", "192.0.2.7 ", "\ufffd", "192.0.2.7\n"):
            self.assertIsNone(client_of(word), word)

    @given(st.integers(0, 2**128 - 1), st.integers(0, 2**64 - 1))
    def test_a_whole_network_of_64_bits_and_no_other(self, number: int, other: int) -> None:
        address = IPv6Address(number)
        client = client_of(str(address), 64)
        assert client is not None
        if address.ipv4_mapped:
            self.assertEqual(client, str(address.ipv4_mapped))
            return
        self.assertIn(address, ip_network(client))
        neighbour = IPv6Address((number >> 64 << 64) + other)
        if not neighbour.ipv4_mapped:
            self.assertEqual(client_of(str(neighbour), 64), client)
        beyond = IPv6Address((number ^ 1 << 64) & (2**128 - 1))
        self.assertNotEqual(client_of(str(beyond), 64), client)


class MayTests(SynchronousTestCase):
    def may(self, address: str | None, trusted: bool = True) -> bool:
        return may_be_granted(PeerFacts(address, trusted), PROXIES)

    def test_clients(self) -> None:
        for address in ("192.0.2.7", "10.0.0.1", "2001:db8::7", "fd00::1", "::ffff:192.0.2.7"):
            self.assertTrue(self.may(address), address)

    def test_nobody_in_particular(self) -> None:
        """Loopback, link-local, a trusted proxy, no address, one that is not to be believed."""
        for address in (
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
            "169.254.7.7",
            "fe80::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "203.0.113.9",
            "::ffff:203.0.113.9",
            "2001:db8:ffff::9",
            "not an address",
        ):
            self.assertFalse(self.may(address), address)
        self.assertFalse(self.may(None))
        self.assertFalse(self.may("192.0.2.7", trusted=False))


class RulesTests(SynchronousTestCase):
    def test_questions_too(self) -> None:
        """A proxy in somebody's /64 may not relay although he may."""
        rules = Rules(60.0, 64, networks("", "2001:db8::ff,192.0.2.0/28"))
        for host, client in (
            ("2001:db8::7", "2001:db8::/64"),
            ("2001:db8::ff", None),
            ("192.0.2.3", None),
            ("::ffff:192.0.2.3", None),
            ("192.0.2.33", "192.0.2.33"),
            ("127.0.0.1", None),
            ("fe80::1", None),
            ("mail.example.org", None),
        ):
            self.assertEqual(rules.client(host), client, host)


class GrantsCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.mkdir(self.folder, 0o700)
        self.time = 1_000_000.0
        self.told: list[list[str]] = []

    def open(self, publish: bool = False, rules: Rules = ANY) -> Grants:
        grants = Grants(self.folder, rules, self.publish if publish else None, lambda: self.time)
        self.addCleanup(grants.close)
        return grants

    def publish(self, grants: Sequence[Grant]) -> None:
        self.told.append([grant.client for grant in grants])

    def grant(self, client: str, seconds: float = 120.0, account: bytes = b"bob") -> Grant:
        return Grant(client, self.time + seconds, account)


class GrantsTests(GrantsCase):
    def test_until_then_and_no_longer(self) -> None:
        grants = self.open()
        grants.add([self.grant("192.0.2.7"), self.grant("2001:db8::7", 60)])
        self.assertTrue(grants.holds("192.0.2.7"))
        self.assertFalse(grants.holds("192.0.2.8"))
        self.time += 60
        self.assertFalse(grants.holds("2001:db8::7"))
        self.assertTrue(grants.holds("192.0.2.7"))
        self.assertEqual([grant.client for grant in grants.all()], ["192.0.2.7"])
        self.time += 60
        self.assertFalse(grants.holds("192.0.2.7"))

    def test_the_last_login_counts(self) -> None:
        grants = self.open()
        grants.add([self.grant("192.0.2.7", 300)])
        grants.add([self.grant("192.0.2.7", 500, b"alice")])
        self.assertEqual(grants.all(), [Grant("192.0.2.7", self.time + 500, b"alice")])

    def test_a_clock_that_was_ahead(self) -> None:
        """As before NTP had set it: what was granted then opens nothing when it is right again."""
        rules = Rules(120.0)
        grants = self.open(publish=True, rules=rules)
        self.time += 10 * 365 * 86_400
        grants.add([self.grant("192.0.2.7"), self.grant("192.0.2.8")])
        self.time -= 10 * 365 * 86_400
        self.assertFalse(grants.holds("192.0.2.7"))
        self.assertEqual(grants.all(), [])
        self.assertFalse(grants.end("192.0.2.7"))
        grants.add([self.grant("192.0.2.8")])
        self.assertTrue(grants.holds("192.0.2.8"))
        self.time += 120
        self.assertFalse(grants.holds("192.0.2.8"))
        grants.expire()
        self.assertEqual(self.told[1:], [["192.0.2.8"], []])

    def test_other_rules_than_at_the_last_start(self) -> None:
        """A shorter window, another length of networks, a proxy more."""
        old = self.open(rules=Rules(3600.0, 64))
        clients = ["192.0.2.7", "192.0.2.8", "2001:db8::/64"]
        old.add([self.grant(client, 3600) for client in clients])
        for rules, left in (
            (Rules(3600.0, 64), clients),
            (Rules(3600.0, 64, networks("", "192.0.2.8")), ["192.0.2.7", "2001:db8::/64"]),
            (Rules(3600.0, 128), ["192.0.2.7"]),
            (Rules(60.0, 128), []),
        ):
            self.told.clear()
            grants = self.open(publish=True, rules=rules)
            grants.begin()
            self.assertEqual(self.told, [left])
            self.assertEqual([grant.client for grant in grants.all()], left)

    def test_another_process_and_a_restart_agree(self) -> None:
        first, second = self.open(), self.open()
        first.add([self.grant("192.0.2.7")])
        self.assertTrue(second.holds("192.0.2.7"))
        first.close()
        second.close()
        self.assertTrue(self.open().holds("192.0.2.7"))

    def test_many_threads(self) -> None:
        self.patch(sqlitefile, "PATIENCE", 120.0)  # whatever else the machine does
        grants = self.open(publish=True)

        def work(number: int) -> None:
            for host in range(20):
                grants.add([self.grant(f"10.0.{number}.{host}")])
                if not grants.holds(f"10.0.{number}.{host}"):
                    lost.append((number, host))

        lost: list[tuple[int, int]] = []
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(lost, [])
        self.assertEqual(len(grants.all()), 80)
        # Each change was told after the one before it: the last to be told holds all.
        self.assertEqual([len(clients) for clients in self.told], list(range(1, 81)))

    def test_what_is_published(self) -> None:
        """Each change, what holds no more left out; and nothing where nothing has changed."""
        grants = self.open(publish=True)
        grants.add([self.grant("192.0.2.7", 10), self.grant("192.0.2.8")])
        grants.expire()
        self.time += 10
        grants.expire()
        grants.expire()
        grants.add([self.grant("192.0.2.9")])
        grants.begin()
        self.assertEqual(
            self.told,
            [
                ["192.0.2.7", "192.0.2.8"],
                ["192.0.2.8"],
                ["192.0.2.8", "192.0.2.9"],
                ["192.0.2.8", "192.0.2.9"],
            ],
        )

    def test_forgotten_for_good(self) -> None:
        grants = self.open()
        grants.add([self.grant("192.0.2.7", 10, b"someone in particular")])
        self.time += 10
        grants.expire()
        grants.close()
        for name in os.listdir(self.folder):
            with open(os.path.join(self.folder, name), "rb") as file:
                self.assertNotIn(b"someone in particular", file.read())

    def test_ended(self) -> None:
        """At once for look-ups; the file follows with the next look for what is over."""
        grants = self.open(publish=True)
        grants.add([self.grant("192.0.2.7"), self.grant("192.0.2.8")])
        self.assertTrue(grants.end("192.0.2.7"))
        self.assertFalse(grants.holds("192.0.2.7"))
        self.assertFalse(grants.end("192.0.2.7"))
        self.assertFalse(grants.end("192.0.2.9"))
        grants.expire()
        self.assertEqual(self.told[1:], [["192.0.2.8"]])
        grants.add([self.grant("192.0.2.7")])
        self.assertTrue(grants.holds("192.0.2.7"))


class FileTests(GrantsCase):
    def failure(self, grants: Grants) -> str:
        return self.assertRaises(TemporaryFailure, grants.holds, "192.0.2.7").detail

    def test_for_nobody_else(self) -> None:
        self.open().add([self.grant("192.0.2.7")])
        for name in os.listdir(self.folder):
            mode = stat.S_IMODE(os.stat(os.path.join(self.folder, name)).st_mode)
            self.assertEqual(mode, 0o600, name)

    def test_made_again_when_it_is_gone(self) -> None:
        grants = self.open()
        grants.add([self.grant("192.0.2.7")])
        for name in os.listdir(self.folder):
            os.unlink(os.path.join(self.folder, name))
        grants.add([self.grant("192.0.2.8")])
        self.assertEqual([grant.client for grant in self.open().all()], ["192.0.2.8"])

    def test_unreadable_is_never_yes(self) -> None:
        grants = self.open()
        self.assertIn("the server makes one at its start with --relay", self.failure(grants))
        self.assertIn(os.path.realpath(self.folder), self.failure(grants))
        path = os.path.join(self.folder, NAME)
        grants.add([self.grant("192.0.2.7")])
        grants.close()
        os.chmod(path, 0o644)
        self.assertIn("chmod 600", self.failure(self.open()))
        os.chmod(path, 0o600)
        with open(path, "r+b") as file:
            file.write(b"no database at all")
        for name in (NAME + "-wal", NAME + "-shm"):
            if os.path.exists(os.path.join(self.folder, name)):
                os.unlink(os.path.join(self.folder, name))
        self.assertIn("not a database", self.failure(self.open()))
        self.assertRaises(TemporaryFailure, self.open().add, [self.grant("192.0.2.7")])

    def test_somebody_elses_file(self) -> None:
        path = os.path.join(self.folder, NAME)
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE relay_grant (client, until, account)")
        connection.execute("INSERT INTO relay_grant VALUES ('192.0.2.7', 1e12, 'mallory')")
        connection.commit()
        connection.close()
        os.chmod(path, 0o600)
        self.assertIn("no relay database of Popdrop", self.failure(self.open()))

    def test_locked(self) -> None:
        """Look-ups go on while another writes; a change gives up, and says so."""
        self.patch(sqlitefile, "PATIENCE", 0.0)
        grants = self.open()
        grants.add([self.grant("192.0.2.7")])
        connection = sqlite3.connect(os.path.join(self.folder, NAME))
        self.addCleanup(connection.close)
        connection.execute("BEGIN IMMEDIATE")
        self.assertTrue(grants.holds("192.0.2.7"))
        failure = self.assertRaises(TemporaryFailure, grants.add, [self.grant("192.0.2.8")])
        self.assertIn("locked", failure.detail)


class EximTests(SynchronousTestCase):
    def test_lines(self) -> None:
        text = exim_map(
            [Grant("192.0.2.7", 1_795_000_000.9, b"bob"), Grant("2001:db8::/64", 7.0, b"a")]
        )
        rows = [row for row in text.splitlines() if not row.startswith("#")]
        self.assertEqual(rows, ["192.0.2.7: 1795000000", '"2001:db8::/64": 7'])
        self.assertTrue(text.endswith("\n"))
        self.assertNotIn("bob", text)
        proxies = networks("", "192.0.2.1,2001:db8::ff")
        text = exim_map([Grant("2001:db8::/64", 7.0, b"a")], proxies)
        wanted = ["192.0.2.1/32: 0", '"2001:db8::ff/128": 0', '"2001:db8::/64": 7']
        self.assertEqual(text.splitlines()[1:], wanted)
        self.assertEqual(ip_address(rows[0].partition(":")[0]).version, 4)
