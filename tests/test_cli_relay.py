"""`popdrop relay`."""

from __future__ import annotations

import json
import time

from popdrop.ops.grants import Grant, Grants
from tests.cli_cases import ChildCase, CommandCase


class RelayTests(CommandCase):
    subject = "relay"

    def grants(self, *clients: str) -> Grants:
        grants = Grants(self.folder)
        self.addCleanup(grants.close)
        grants.add([Grant(client, time.time() + 1000, b"b\xc3\xa9b") for client in clients])
        return grants

    def test_without_a_window(self) -> None:
        for words in (("list",), ("end", "192.0.2.7")):
            said = self.refused(*words, "--state-dir", self.folder)
            self.assertIn("relay.db: no such relay database; the server makes one", said)

    def test_list(self) -> None:
        self.grants("192.0.2.7", "2001:db8::/64")
        rows = self.good("list", "--state-dir", self.folder).stdout.splitlines()
        self.assertEqual(len(rows), 2)
        self.assertRegex(rows[0], r"\Aclient=192\.0\.2\.7 until=\d{4}-\S+Z account=béb\Z")
        found = json.loads(self.good("list", "--state-dir", self.folder, "--json").stdout)
        self.assertEqual([row["client"] for row in found], ["192.0.2.7", "2001:db8::/64"])

    def test_end(self) -> None:
        """By any form of the address, also where a whole /64 may relay."""
        grants = self.grants("192.0.2.7", "192.0.2.8", "2001:db8::/64", "2001:db8:1::7")
        for text, client in (
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:DB8::9", "2001:db8::/64"),
            ("2001:db8:1:0::7/128", "2001:db8:1::7"),
        ):
            said = self.good("end", text, "--state-dir", self.folder).stdout
            self.assertEqual(said, f"{client} may not relay any more.\n")
        self.assertEqual([grant.client for grant in grants.all()], ["192.0.2.8"])
        self.assertIn(
            "may not relay now", self.refused("end", "192.0.2.7", "--state-dir", self.folder)
        )
        said = self.refused("end", "example.org", "--state-dir", self.folder)
        self.assertIn("write it as 192.0.2.7", said)
        self.grants("2001:db8::/64")
        self.good("end", "2001:db8::/64", "--state-dir", self.folder)
        self.assertEqual([grant.client for grant in grants.all()], ["192.0.2.8"])
        self.grants("192.0.2.7", "192.0.3.7", "2001:db8::/64")
        said = self.good("end", "::ffff:192.0.2.0/120", "--state-dir", self.folder).stdout
        self.assertEqual(len(said.splitlines()), 2)
        left = [grant.client for grant in grants.all()]
        self.assertEqual(left, ["192.0.3.7", "2001:db8::/64"])


class TerminalTests(ChildCase):
    subject = "relay"

    def test_table(self) -> None:
        grants = Grants(self.folder)
        grants.add([Grant("192.0.2.7", time.time() + 1000, b"bob")])
        grants.close()
        code, text, _ = self.on_terminal("relay", "list", "--state-dir", self.folder, answers=[])
        self.assertEqual(code, 0, text)
        for word in ("Client", "Until (UTC)", "Account", "192.0.2.7", "bob"):
            self.assertIn(word, text)
