"""Lists of names in files."""

from __future__ import annotations

import os

from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts import rosters as module
from popdrop.accounts.rosters import RosterFiles
from popdrop.errors import ConfigError
from popdrop.policy import Folding


class RosterTests(SynchronousTestCase):
    def write(self, name: str, text: bytes) -> str:
        folder = os.path.abspath(self.id())
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(text)
        return path

    def test_none(self) -> None:
        found = RosterFiles(None, None, False).current()
        self.assertIsNone(found.allowed)
        self.assertEqual(found.denied, frozenset())
        self.assertIsNone(found.shells)

    def test_names(self) -> None:
        allow = self.write("allow", b"bob\r\n\n# nobody\n  eve  # sister\n" + "Jürgen".encode())
        deny = self.write("deny", b"carol")
        found = RosterFiles(allow, deny, False).current()
        self.assertEqual(found.allowed, {b"bob", b"eve", "Jürgen".encode()})
        self.assertEqual(found.denied, {b"carol"})

    def test_names_mean_what_they_mean_in_user(self) -> None:
        """`Bob` in the list of the denied would have denied nobody where names are folded."""
        deny = self.write("deny", b"Bob\nEve@x.org\n")
        for folding, wanted in (
            (Folding(), {b"Bob", b"Eve@x.org"}),
            (Folding(lower=True), {b"Bob", b"bob", b"Eve@x.org", b"eve@x.org"}),
            (Folding(lower=True, trim_domain=True), {b"Bob", b"bob", b"Eve@x.org", b"eve"}),
            (Folding(default_domain="a.b"), {b"Bob", b"Bob@a.b", b"Eve@x.org"}),
        ):
            self.assertEqual(RosterFiles(None, deny, False, folding).current().denied, wanted)
            self.assertEqual(RosterFiles(deny, None, False, folding).current().allowed, wanted)

    def test_an_empty_list_of_the_allowed_lets_nobody_in(self) -> None:
        self.assertEqual(
            RosterFiles(self.write("allow", b""), None, False).current().allowed, set()
        )

    def test_read_again_when_changed(self) -> None:
        path = self.write("deny", b"bob\n")
        files = RosterFiles(None, path, False)
        files.refresh()
        self.assertEqual(files.current().denied, {b"bob"})
        os.replace(self.write("new", b"eve\n"), path)
        self.assertEqual(files.current().denied, {b"bob"})
        files.refresh()
        self.assertEqual(files.current().denied, {b"eve"})

    def test_a_list_that_is_gone_stays_as_it_was(self) -> None:
        path = self.write("deny", b"bob\n")
        files = RosterFiles(None, path, False)
        os.unlink(path)
        files.refresh()
        self.assertEqual(files.current().denied, {b"bob"})

    def test_missing_at_the_start(self) -> None:
        failure = self.assertRaises(ConfigError, RosterFiles, "/nonexistent/x", None, False)
        self.assertIn("--auth-file /nonexistent/x", str(failure))

    def test_shells(self) -> None:
        self.patch(module, "SHELLS", self.write("shells", b"# shells\n/bin/sh\n/bin/bash\n"))
        self.assertEqual(RosterFiles(None, None, True).current().shells, {"/bin/sh", "/bin/bash"})
