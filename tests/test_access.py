"""Access rules as values, and the real libwrap beside them."""

from __future__ import annotations

import ctypes.util
import json
import shutil
import subprocess
import sys
import tempfile
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from popdrop.errors import ConfigError
from popdrop.ops.access import (
    Client,
    NameNeeded,
    Rules,
    Unnamed,
    Verdict,
    decide,
    of_networks,
    read,
    within,
)

LIBWRAP = Path(__file__).parent / "programs" / "libwrap.py"
DENY_ALL = "ALL: ALL\n"
SPECIAL = {"unknown": Unnamed.UNKNOWN, "paranoid": Unnamed.PARANOID}


def rules(allow: str = "", deny: str = "") -> Rules:
    return read(("allow", allow), ("deny", deny))


def allowed(given_rules: Rules, name: str, address: str) -> bool:
    """`name` may be libwrap's `unknown` and `paranoid`, `address` its `unknown`."""
    client = Client(None if address == "unknown" else address, SPECIAL.get(name, name.lower()))
    return decide(given_rules, client).allowed


def error_of(allow: str = "", deny: str = "") -> str:
    try:
        rules(allow, deny)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"no error: {allow!r} {deny!r}")


class MatchTests(SynchronousTestCase):
    """One pattern for us in hosts.allow, everybody else refused."""

    TABLE = (
        ("192.0.2.7", "192.0.2.7", "192.0.2.70"),
        ("192.0.2.", "192.0.2.7", "192.0.20.7"),
        ("192.0.2.0/24", "192.0.2.255", "192.0.3.0"),
        ("192.0.2.0/255.255.255.0", "192.0.2.255", "192.0.3.0"),
        ("192.0.2.7/255.255.255.255", "192.0.2.7", "192.0.2.6"),
        ("[2001:db8::]/32", "2001:db8::1", "2001:db9::1"),
        ("[2001:DB8:0::1]", "2001:db8::1", "2001:db8::2"),
        ("[::1]", "::1", "192.0.2.7"),
        ("[::ffff:192.0.2.7]", "192.0.2.7", "192.0.2.8"),
        ("192.0.2.*", "192.0.2.7", "192.0.3.7"),
    )

    def test_addresses(self) -> None:
        for pattern, inside, outside in self.TABLE:
            found = rules(f"popdrop: {pattern}\n", DENY_ALL)
            self.assertTrue(allowed(found, "unknown", inside), pattern)
            self.assertFalse(allowed(found, "unknown", outside), pattern)

    def test_everybody_by_no_bits(self) -> None:
        """libwrap does not know /0 for IPv4."""
        found = rules(deny="popdrop: 0.0.0.0/0\n")
        self.assertFalse(allowed(found, "unknown", "192.0.2.7"))
        self.assertTrue(allowed(found, "unknown", "::1"))

    def test_a_name_is_no_address(self) -> None:
        """libwrap lets in who owns the reverse zone here."""
        found = rules("popdrop: 192.*\n", DENY_ALL)
        self.assertFalse(allowed(found, "192.example.org", "198.51.100.1"))

    def test_our_names(self) -> None:
        for daemons, ours in (
            ("qpopper", True),
            ("sshd, popper", True),
            ("POPDROP", True),
            ("sshd", False),
            ("ALL EXCEPT qpopper", False),
            ("ALL EXCEPT sshd", True),
            ("pop3d", False),
        ):
            found = rules(deny=f"{daemons}: ALL\n")
            self.assertEqual(allowed(found, "unknown", "192.0.2.7"), not ours, daemons)

    def test_where(self) -> None:
        found = rules("# x\n\npopdrop: 192.0.2.\n", "sshd: ALL\nALL: \\\n ALL\n")
        self.assertEqual(decide(found, Client("192.0.2.1")), Verdict(True, "allow line 3"))
        self.assertEqual(decide(found, Client("192.0.3.1")), Verdict(False, "deny line 3"))
        self.assertEqual(decide(rules(), Client("192.0.3.1")), Verdict(True))

    def test_names_only_when_needed(self) -> None:
        found = rules("popdrop: .example.org 192.0.2.\n", "popdrop: ALL\n")
        self.assertTrue(decide(found, Client("192.0.2.7")).allowed)
        for pattern in ("KNOWN", "UNKNOWN", "LOCAL", "PARANOID", "mail.example.org", "*.org", "a."):
            asked = rules(f"popdrop: {pattern}\n")
            self.assertRaises(NameNeeded, decide, asked, Client("192.0.2.7"))
        self.assertRaises(NameNeeded, decide, found, Client("198.51.100.1"))
        # There is nothing to ask for.
        self.assertFalse(decide(found, Client(None)).allowed)
        self.assertTrue(decide(rules("ALL: UNKNOWN\n", DENY_ALL), Client(None)).allowed)

    def test_programs_are_never_run(self) -> None:
        for option in ("spawn (touch /x) &", "twist /bin/echo", "aclexec /bin/true", "user root"):
            found = rules(f"popdrop: 192.0.2. : {option} : allow\n")
            self.assertFalse(allowed(found, "unknown", "192.0.2.7"), option)
            (warning,) = found.warnings
            self.assertTrue(warning.startswith(f"allow line 1: {option.split()[0]}"), warning)
        self.assertEqual(rules(f"sshd: ALL: spawn x\n{DENY_ALL}").warnings, ())

    def test_bare_ipv6(self) -> None:
        found = rules("popdrop: db8:1::7\n")
        self.assertIn("brackets", found.warnings[0])
        self.assertIn("[2001:db8::]/32", error_of("popdrop: 2001:db8::1\n"))


class ErrorTests(SynchronousTestCase):
    def test_named(self) -> None:
        for line, word in (
            ("popdrop: bob@host", "users"),
            ("popdrop: @netgroup", "netgroups"),
            ("popdrop: /etc/hosts.mine", "files"),
            ("popdrop@192.0.2.1: ALL", "one address of ours"),
            ("popdrop: 192.0.2.7/24", "192.0.2.0/24"),
            ("popdrop: 192.0.2.0/33", "network"),
            ("popdrop: x.y/8", "network"),
            ("popdrop: [2001:db8::]/129", "network"),
            ("popdrop: 10.1", "192.0.2."),
            ("popdrop: .5", "192.0.2."),
            ("popdrop: [192.0.2.7]", "IPv6"),
            ("popdrop: ALL EXCEPT 10.1", "192.0.2."),
            ("popdrop ALL", "colon"),
        ):
            for where, text in (("allow", (f"\n{line}\n", "")), ("deny", ("", f"\n{line}\n"))):
                message = error_of(*text)
                self.assertTrue(message.startswith(f"{where} line 2: "), message)
                self.assertIn(word, message)

    def test_lines_of_others(self) -> None:
        self.assertEqual(rules("sshd: bob@host @x 10.1\n"), Rules())

    def test_half_a_file(self) -> None:
        self.assertIn("deny line 2", error_of(deny="\nALL: 192.0.2. \\\n"))
        self.assertIn("allow line 2", error_of("ALL: .example.org\nALL: 192.0.2."))

    @given(st.text("AL:popdr[]/.@#\\ \n1*?x=", max_size=40))
    @settings(deadline=None, max_examples=300)
    def test_no_other_error(self, text: str) -> None:
        try:
            found = rules(text + "\n")
        except ConfigError as error:
            self.assertRegex(str(error), r"\Aallow line \d+: ")
        else:
            decide(found, Client("192.0.2.7", "x.l"))


class NetworkTests(SynchronousTestCase):
    def test_within(self) -> None:
        nets = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
        for address, inside in (("192.0.2.1", 1), ("192.0.3.1", 0), ("2001:db8::1", 1), (None, 0)):
            self.assertEqual(within(address, nets), bool(inside), address)

    def test_deny_wins(self) -> None:
        wide, one = (ip_network("192.0.2.0/24"),), (ip_network("192.0.2.7/32"),)
        self.assertEqual(of_networks("192.0.2.7", wide, one), Verdict(False, "--deny-net"))
        self.assertEqual(of_networks("192.0.2.8", wide, one), Verdict(True))
        self.assertEqual(of_networks("192.0.3.8", wide, one), Verdict(False, "--allow-net"))
        self.assertEqual(of_networks("192.0.3.8", (), one), Verdict(True))
        self.assertEqual(of_networks(None, wide, ()), Verdict(False, "--allow-net"))
        self.assertEqual(of_networks(None, (), wide), Verdict(True))


ADDRESSES = ("192.0.2.7", "192.0.3.7", "10.1.2.3", "127.0.0.1", "::1", "2001:db8::7", "fe80::1")
NAMES = ("unknown", "paranoid", "localhost", "mail.example.org", "MX.Example.org", "a.example.net")
PATTERNS = (
    "ALL",
    "all",
    "KNOWN",
    "UNKNOWN",
    "LOCAL",
    "PARANOID",
    "192.0.2.7",
    "192.0.",
    "192.0.2.",
    "10.",
    "192.0.2.0/24",
    "192.0.0.0/255.255.0.0",
    "192.0.3.0/255.0.255.0",
    "10.0.0.0/8",
    "192.0.2.7/32",
    "[::1]",
    "[2001:db8::]/32",
    "[2001:db8::5]/32",
    "[fe80::]/10",
    "[::]/0",
    ".example.org",
    ".org",
    "example.org",
    "mail.example.org",
    "localhost",
    "mx.",
    "*.example.org",
    "m?.*",
    "*",
)
DAEMON_TOKENS = ("popdrop", "sshd", "ALL", "PopDrop", "pop*", "KNOWN", "in.ftpd")
OPTIONS = (
    "allow",
    "deny",
    "DENY",
    "severity mail.info : allow",
    "severity = mail.info : deny",
    "keepalive",
    "rfc931",
    "deny : allow",
    "allow yes",
    "severity",
    "no-such-option",
    "",
    " : allow",
    "allow:",
)


def lists(tokens: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Tokens and EXCEPTs in any order, with any separators."""
    word = st.sampled_from((*tokens, *tokens, "EXCEPT", "except", "EXCEPT"))
    gap = st.sampled_from((" ", ", ", ",", "\t", " \\\n ", "  "))
    pairs = st.lists(st.tuples(word, gap), max_size=6)
    return pairs.map(lambda found: "".join(a + b for a, b in found))


LINES = st.one_of(
    st.sampled_from(("\n", "# popdrop: ALL\n", " \t\n", "#x \\\npopdrop: ALL\n", "ALL: ALL\r\n")),
    st.builds(
        lambda daemons, clients, option: f"{daemons}:{clients}{option}\n",
        lists(DAEMON_TOKENS),
        lists(PATTERNS),
        st.one_of(st.just(""), st.sampled_from(OPTIONS).map(lambda text: f": {text}")),
    ),
)
FILES = st.lists(LINES, max_size=4).map("".join)
CLIENTS = [(name, address) for name in NAMES for address in ADDRESSES]
CLIENTS.append(("unknown", "unknown"))


class LibwrapTests(SynchronousTestCase):
    """The same verdicts as libwrap's."""

    def setUp(self) -> None:
        if ctypes.util.find_library("wrap") is None:
            raise SkipTest("needs the Debian package libwrap0")
        folder = tempfile.mkdtemp(prefix="popdrop-test-")
        self.addCleanup(shutil.rmtree, folder, True)
        self.process = subprocess.Popen(
            [sys.executable, str(LIBWRAP), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(self._end)
        self.assertEqual(self._hear(), "ready")

    def _end(self) -> None:
        self.process.communicate()

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def libwrap(self, allow: str, deny: str, clients: list[tuple[str, str]]) -> list[bool]:
        asked = {"allow": allow, "deny": deny, "daemon": "popdrop", "clients": clients}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return [bool(verdict) for verdict in self._hear()]

    def compare(self, allow: str, deny: str) -> list[bool]:
        found = rules(allow, deny)
        ours = [allowed(found, name, address) for name, address in CLIENTS]
        theirs = self.libwrap(allow, deny, CLIENTS)
        different = [
            (client, mine)
            for client, mine, other in zip(CLIENTS, ours, theirs, strict=True)
            if mine is not other
        ]
        self.assertEqual(different, [], f"{allow!r} {deny!r}")
        return ours

    def test_each_pattern(self) -> None:
        for pattern in PATTERNS:
            verdicts = self.compare(f"popdrop: {pattern}\n", DENY_ALL)
            if pattern != "example.org":
                self.assertIn(True, verdicts, pattern)
            self.compare(f"popdrop: ALL EXCEPT {pattern}\n", DENY_ALL)
            self.compare("", f"popdrop: {pattern}\n")

    def test_each_option(self) -> None:
        for option in OPTIONS:
            for separator in (":", " : "):
                self.compare(f"popdrop: 192.0.2. {separator}{option}\n", DENY_ALL)
                self.compare("", f"popdrop: 192.0.2. {separator}{option}\nALL: KNOWN: allow\n")

    def test_any_files(self) -> None:
        seen: set[bool] = set()

        @given(FILES, FILES)
        @settings(deadline=None, max_examples=400, derandomize=True)
        def same(allow: str, deny: str) -> None:
            seen.update(self.compare(allow, deny))

        same()
        self.assertEqual(seen, {True, False})

    def test_where_we_differ_on_purpose(self) -> None:
        """So that the manual's list of differences stays true."""
        one = [("unknown", "192.0.2.7")]
        self.assertEqual(self.libwrap("ALL: 0.0.0.0/0\n", DENY_ALL, one), [False])
        self.assertEqual(self.libwrap("ALL: 192.0.2.7/255.255.255.255\n", DENY_ALL, one), [False])
        self.assertEqual(self.libwrap("ALL: 192.0.2.7/24\n", DENY_ALL, one), [False])
        for text in ("ALL: 10.", "#"):
            self.assertEqual(self.libwrap("", text, one), [False])
        evil = [("192.example.org", "198.51.100.1")]
        self.assertEqual(self.libwrap("ALL: 192.*\n", DENY_ALL, evil), [True])
