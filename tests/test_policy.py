"""Who may log in how: the table of all cases."""

from __future__ import annotations

import itertools
from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop import policy as rules
from popdrop.errors import ConfigError
from popdrop.policy import Folding, Policy, Rosters, account_refusal
from popdrop.values import Account, PeerFacts, Scope, Secret

OFFICE = ip_network("192.0.2.0/24")
NEAR, FAR = PeerFacts("127.0.0.1"), PeerFacts("198.51.100.7")
IN_OFFICE = PeerFacts("192.0.2.9")
UNTRUSTED = PeerFacts("192.0.2.9", address_trusted=False)
SIX = PeerFacts("::1")
NOWHERE = PeerFacts()
SECRET = Secret(b"shared")


class VariationTests(SynchronousTestCase):
    """What `--listen-policy` says, and what it makes of the rules of all."""

    def test_each_word(self) -> None:
        base = Policy(cleartext="tls", stls="offer", mechanisms=(b"PLAIN", b"SCRAM-SHA-256"))
        for text, wanted in (
            ("stls=require", ("require", "tls", base.mechanisms)),
            ("stls=off, cleartext=always", ("off", "always", base.mechanisms)),
            ("apop-only", ("offer", "never", ())),
            ("cleartext=always,apop-only", ("offer", "never", ())),
        ):
            found = rules.variation("--listen-policy", text)(base)
            self.assertEqual((found.stls, found.cleartext, found.mechanisms), wanted, text)
        self.assertEqual(rules.Variation()(base), base)

    def test_what_is_not_known(self) -> None:
        for text, told in (
            ("stls=maybe", "stls= takes one of offer, require, off"),
            ("cleartext=", "cleartext= takes one of default, never, always, local, tls"),
            ("stls", "stls is not known; write stls=WORD"),
            ("apop-only=yes", "apop-only=yes is not known"),
            ("", "(nothing) is not known"),
            ("stls=off,,", "(nothing) is not known"),
            ("stls=off,stls=offer", "stls is there twice"),
            ("apop-only,apop-only", "apop-only is there twice"),
        ):
            with self.assertRaises(ConfigError) as caught:
                rules.variation("--listen-policy", text)
            self.assertIn(f"--listen-policy {text}: {told}", str(caught.exception))


class CleartextTests(SynchronousTestCase):
    # For each of qpopper's words: open without TLS and far away; under TLS; from loopback.
    TABLE = (
        ("default", True, True, True),
        ("never", False, False, False),
        ("always", True, True, True),
        ("local", False, False, True),
        ("tls", False, True, True),
    )

    def test_table(self) -> None:
        self.assertEqual(tuple(row[0] for row in self.TABLE), rules.CLEARTEXT)
        for word, far, tls, near in self.TABLE:
            policy = Policy(cleartext=word)
            for peer, secured, wanted in (
                (FAR, False, far),
                (FAR, True, tls),
                (NEAR, False, near),
                (SIX, False, near),
                (None, False, far),
                (NOWHERE, False, far),
                (PeerFacts("127.0.0.1", address_trusted=False), False, far),
            ):
                self.assertEqual(
                    rules.cleartext_is_open(policy, secured, peer), wanted, (word, peer, secured)
                )

    def test_local_net(self) -> None:
        policy = Policy(cleartext="local", local=(*rules.LOOPBACK, OFFICE))
        self.assertTrue(rules.cleartext_is_open(policy, False, IN_OFFICE))
        self.assertFalse(rules.cleartext_is_open(policy, False, UNTRUSTED))
        self.assertFalse(rules.cleartext_is_open(policy, False, FAR))

    def test_accounts_with_an_apop_secret(self) -> None:
        for word, users in itertools.product(rules.CLEARTEXT, rules.APOP_USERS):
            policy = Policy(cleartext=word, apop_users=users)
            refused = word != "always" and users != "allow"
            account = Account(b"bob", apop_secret=SECRET)
            sealed = Account(b"bob", apop_sealed=True)
            for each in (account, sealed):
                reason = account_refusal(policy, each, cleartext=True)
                self.assertEqual(reason, "apop-account" if refused else None, (word, users))
                self.assertIsNone(account_refusal(policy, each, cleartext=False))
            self.assertIsNone(account_refusal(policy, Account(b"bob"), cleartext=True))


class AccountTests(SynchronousTestCase):
    TABLE = (
        (Account(b"bob"), {}, None),
        (Account(b"bob", disabled=True), {}, "disabled"),
        (Account(b"bob", uid=0), {}, "uid-floor"),
        (Account(b"bob", uid=10), {}, "uid-floor"),
        (Account(b"bob", uid=11), {}, None),
        (Account(b"bob"), {"rosters": Rosters(allowed=frozenset({b"bob"}))}, None),
        (Account(b"bob"), {"rosters": Rosters(allowed=frozenset({b"Bob"}))}, "not-allowed"),
        (Account(b"bob"), {"rosters": Rosters(allowed=frozenset())}, "not-allowed"),
        (Account(b"bob"), {"rosters": Rosters(denied=frozenset({b"bob"}))}, "denied"),
        (Account(b"eve"), {"rosters": Rosters(denied=frozenset({b"bob"}))}, None),
        (
            Account(b"bob"),
            {"rosters": Rosters(frozenset({b"bob"}), frozenset({b"bob"}))},
            "denied",
        ),
        (
            Account(b"bob", uid=99, shell="/bin/false"),
            {"rosters": Rosters(shells=frozenset({"/bin/sh"}))},
            "shell",
        ),
        (
            Account(b"bob", uid=99, shell="/bin/sh"),
            {"rosters": Rosters(shells=frozenset({"/bin/sh"}))},
            None,
        ),
        (Account(b"bob"), {"rosters": Rosters(shells=frozenset())}, None),
        (Account(b"bob", scope=Scope(networks=(OFFICE,))), {"peer": IN_OFFICE}, None),
        (Account(b"bob", scope=Scope(networks=(OFFICE,))), {"peer": FAR}, "network"),
        (Account(b"bob", scope=Scope(networks=(OFFICE,))), {"peer": UNTRUSTED}, "network"),
        (Account(b"bob", scope=Scope(networks=(OFFICE,))), {"peer": NOWHERE}, "network"),
        (Account(b"bob", scope=Scope(networks=(OFFICE,))), {}, "network"),
        (Account(b"bob", scope=Scope(networks=(OFFICE,))), {"peer": SIX}, "network"),
        (Account(b"bob", scope=Scope(expires=100)), {"now": 99.9}, None),
        (Account(b"bob", scope=Scope(expires=100)), {"now": 100.0}, "expired"),
        (Account(b"bob", scope=Scope(read_only=True)), {}, None),
        (Account(b"bob", app=Scope(expires=100)), {"now": 100.0}, "expired"),
        (Account(b"bob", app=Scope(networks=(OFFICE,))), {"peer": FAR}, "network"),
        (
            Account(b"bob", scope=Scope(networks=(ip_network("::/0"),)), app=Scope()),
            {"peer": FAR},
            "network",
        ),
        (
            Account(
                b"bob",
                scope=Scope(networks=(ip_network("192.0.0.0/8", strict=False),)),
                app=Scope(networks=(OFFICE,)),
            ),
            {"peer": PeerFacts("192.9.9.9")},
            "network",
        ),
    )

    def test_table(self) -> None:
        for mechanism_is_cleartext in (True, False):
            for account, facts, wanted in self.TABLE:
                found = account_refusal(Policy(), account, mechanism_is_cleartext, **facts)  # type: ignore[arg-type]
                self.assertEqual(found, wanted, (account, facts))

    def test_uid_0_is_refused_whatever_the_floor(self) -> None:
        self.assertEqual(
            account_refusal(Policy(min_uid=0), Account(b"r", uid=0), True), "uid-floor"
        )
        self.assertIsNone(account_refusal(Policy(min_uid=0), Account(b"r", uid=1), True))

    def test_read_only(self) -> None:
        for scope, app, wanted in (
            (Scope(), None, False),
            (Scope(read_only=True), None, True),
            (Scope(), Scope(read_only=True), True),
            (Scope(read_only=True), Scope(), True),
        ):
            self.assertEqual(Account(b"bob", scope=scope, app=app).read_only, wanted)


class FoldingTests(SynchronousTestCase):
    TABLE = (
        ("", b"Bob@Example.ORG", b"Bob@Example.ORG"),
        ("lower", b"Bob@Example.ORG", b"bob@example.org"),
        ("lower", "Ümit".encode(), "ümit".encode()),
        ("lower", b"\xff\xfe", b"\xff\xfe"),
        ("trim-domain", b"bob@example.org", b"bob"),
        ("trim-domain", b"bob@a@b", b"bob"),
        ("trim-domain", b"@x", b""),
        ("trim-domain, lower", b"BOB@X", b"bob"),
        ("default-domain=example.org", b"bob", b"bob@example.org"),
        ("default-domain=example.org", b"bob@x", b"bob@x"),
        ("lower,default-domain=Example.org", b"Bob", b"bob@example.org"),
    )

    def test_table(self) -> None:
        for words, name, wanted in self.TABLE:
            self.assertEqual(rules.folding("--user-names", words)(name), wanted, words)

    def test_wrong_words(self) -> None:
        for words in (
            "upper",
            "lower=1",
            "default-domain",
            "default-domain=",
            "default-domain=a/b",
            "default-domain=.a",
            "trim-domain,default-domain=x",
        ):
            failure = self.assertRaises(ConfigError, rules.folding, "--user-names", words)
            self.assertIn("--user-names", str(failure))

    @given(st.binary(max_size=80))
    def test_nothing_is_raised_and_folding_twice_is_folding_once(self, name: bytes) -> None:
        for each in (
            Folding(lower=True),
            Folding(trim_domain=True),
            Folding(False, False, "x.org"),
        ):
            self.assertEqual(each(each(name)), each(name))


class NetworksTests(SynchronousTestCase):
    def test_mapped_addresses(self) -> None:
        """RFC 4291 section 2.5.5.2: they are those of IPv4, as clients' addresses are."""
        for text, meant in (
            ("::ffff:192.0.2.8", "192.0.2.8/32"),
            ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
            ("::ffff:c000:208/128", "192.0.2.8/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::/0", "::/0"),
        ):
            self.assertEqual(str(rules.network("--deny-net", text)), meant)
        self.assertTrue(rules.is_in("192.0.2.8", rules.networks("--deny-net", "::ffff:192.0.2.8")))

    def test_several(self) -> None:
        self.assertEqual(
            rules.networks("--networks", "192.0.2.0/24, 2001:db8::/32"),
            (OFFICE, ip_network("2001:db8::/32")),
        )
        self.assertRaises(ConfigError, rules.networks, "--networks", "192.0.2.0/24,home")
