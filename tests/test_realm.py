"""From whoever verified an account to its maildrop: whose facts hold."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import BadCredentials
from popdrop.interfaces import IMaildrop
from popdrop.policy import Mind, Policy, Rosters
from popdrop.realm import Realm
from popdrop.values import Account, Owner, PeerFacts, Scope, Secret, Verified
from tests.doubles import Store
from tests.test_checkers import Hops

OFFICE = (ip_network("192.0.2.0/24"),)


class Accounts:
    def __init__(self, *accounts: Account) -> None:
        self.accounts = {account.name: account for account in accounts}

    def lookup(self, name: bytes) -> Account | None:
        return self.accounts.get(name)


class RealmTests(SynchronousTestCase):
    def ask(self, avatar: bytes, *ours: Account, **more: Any) -> tuple[Store, Any]:
        store = Store([b"a\r\n"])
        realm = Realm(
            store,
            Hops(),  # type: ignore[arg-type]
            more.get("databases", [Accounts(*ours)]),
            lambda account: account._replace(uid=500, home="/home/system"),
            Policy(),
            more.get("rosters", Rosters),
            more.get("clock", lambda: 0.0),
        )
        mind = Mind(Policy(), True, PeerFacts("192.0.2.7"))
        return store, realm.requestAvatar(avatar, mind, IMaildrop)

    def open(self, avatar: bytes, *ours: Account, **more: Any) -> Store:
        store, asked = self.ask(avatar, *ours, **more)
        self.successResultOf(asked)
        return store

    def refused(self, reason: str, avatar: bytes, *ours: Account, **more: Any) -> None:
        store, asked = self.ask(avatar, *ours, **more)
        error = self.failureResultOf(asked, BadCredentials).value
        self.assertEqual((error.text, error.detail), ("Authentication failed.", reason))
        self.assertEqual(store.owners, [])

    def test_our_own_account_is_asked_for_once(self) -> None:
        account = Account(b"bob@example.org", uid=77, home="/home/bob")
        store = self.open(Verified(account))
        self.assertEqual(store.owners, [Owner("bob@example.org", "example.org", "/home/bob", 77)])

    def test_a_stranger_s_report_is_completed_by_the_system(self) -> None:
        store = self.open(Verified(Account(b"bob"), foreign=True))
        self.assertEqual(store.owners, [Owner("bob", "", "/home/system", 500)])

    def test_what_a_stranger_reports_holds(self) -> None:
        store = self.open(Verified(Account(b"bob", uid=88, home="/srv/bob"), foreign=True))
        self.assertEqual(store.owners, [Owner("bob", "", "/srv/bob", 88)])

    def test_a_bare_name(self) -> None:
        self.assertEqual(self.open(b"bob").owners, [Owner("bob", "", "/home/system", 500)])

    def test_our_account_of_that_name_brings_its_rules(self) -> None:
        for ours, reason in (
            (Account(b"bob", disabled=True), "disabled"),
            (Account(b"bob", scope=Scope(expires=5)), "expired"),
            (Account(b"bob", scope=Scope(networks=(ip_network("10.0.0.0/8"),))), "network"),
            (Account(b"bob", uid=3), "uid-floor"),
        ):
            for avatar in (b"bob", Verified(Account(b"bob", uid=99), foreign=True)):
                self.refused(reason, avatar, ours, clock=lambda: 10.0)

    def test_what_the_stranger_refuses_stays_refused(self) -> None:
        ours = Account(b"bob", scope=Scope(networks=OFFICE))
        for reported, reason in (
            (Account(b"bob", disabled=True), "disabled"),
            (Account(b"bob", scope=Scope(expires=5)), "expired"),
            (Account(b"bob", scope=Scope(networks=(ip_network("10.0.0.0/8"),))), "network"),
        ):
            self.refused(reason, Verified(reported, foreign=True), ours, clock=lambda: 10.0)
        self.open(Verified(Account(b"bob"), foreign=True), ours)

    def test_lists_hold_for_all(self) -> None:
        rosters = Rosters(denied=frozenset({b"bob"}))
        for avatar in (b"bob", Verified(Account(b"bob")), Verified(Account(b"bob"), foreign=True)):
            self.refused("denied", avatar, rosters=lambda: rosters)

    def test_names_that_become_no_path(self) -> None:
        for name in (b"../x", b"", b"a/b", b".", b"bob.lock"):
            self.refused("name", Verified(Account(name), foreign=True))

    def test_the_rules_of_all_databases_hold(self) -> None:
        """The first has nothing to verify a password with, so that the chain has gone on."""
        second = Account(b"bob", Secret(b"hash"), uid=77)
        for rule, reason in (
            (Account(b"bob", disabled=True), "disabled"),
            (Account(b"bob", scope=Scope(expires=5)), "expired"),
            (Account(b"bob", apop_secret=Secret(b"s")), "apop-account"),
        ):
            for databases in (
                [Accounts(rule), Accounts(second)],
                [Accounts(second), Accounts(rule)],
                [Accounts(), Accounts(second), Accounts(rule)],
            ):
                for avatar in (Verified(second), Verified(Account(b"bob", uid=77), foreign=True)):
                    self.refused(reason, avatar, databases=databases, clock=lambda: 10.0)

    def test_read_only_in_one_database_is_read_only(self) -> None:
        second = Account(b"bob", Secret(b"hash"), uid=77, home="/home/bob")
        databases = [Accounts(Account(b"bob", scope=Scope(read_only=True))), Accounts(second)]
        seen: list[Account] = []
        realm = Realm(Store([]), Hops(), databases)  # type: ignore[arg-type]
        mind = Mind(Policy(), True, PeerFacts("192.0.2.7"), seen.append)
        self.successResultOf(realm.requestAvatar(Verified(second), mind, IMaildrop))
        self.assertTrue(seen[0].read_only)
        self.assertEqual((seen[0].uid, seen[0].home), (77, "/home/bob"))

    def test_whoever_verified_is_whose_maildrop_it_is(self) -> None:
        second = Account(b"bob", Secret(b"hash"), uid=78, home="/home/two", app=Scope(expires=99))
        databases = [Accounts(Account(b"bob", uid=77, home="/home/one")), Accounts(second)]
        store = self.open(Verified(second), databases=databases)
        self.assertEqual(store.owners, [Owner("bob", "", "/home/two", 78)])
