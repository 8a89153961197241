"""The folder of `journal-dir=`: what is refused, and what is kept on record."""

from __future__ import annotations

import os
import stat
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from popdrop.errors import ConfigError
from popdrop.stores.mbox.folders import LIST, former, private_folder, remember


class FolderTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder, 0o700)
        self.path = os.path.join(self.folder, "journals")

    def refused(self, path: str, words: str) -> None:
        text = str(self.assertRaises(ConfigError, private_folder, path))
        self.assertIn(f"journal-dir={path}: ", text)
        self.assertIn(words, text)

    def test_made(self) -> None:
        self.assertTrue(private_folder(self.path))
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o700)
        self.assertFalse(private_folder(self.path))

    def test_refused(self) -> None:
        self.refused("journals", "must be a full path")
        deep = os.path.join(self.path, "deep")
        self.refused(deep, f"No such file or directory; make it with: install -d -m 0700 {deep}")
        os.mkdir(self.path)
        for mode in (0o755, 0o710, 0o702):
            os.chmod(self.path, mode)
            self.refused(self.path, f"mode {mode:04o} lets others in; use: chmod 0700 {self.path}")
        os.chmod(self.path, 0o700)
        with patch("os.geteuid", lambda: os.stat(self.path).st_uid + 1):
            self.refused(self.path, f"use: chown {os.stat(self.path).st_uid + 1} {self.path}")
        link = os.path.join(self.folder, "link")
        os.symlink(self.path, link)
        self.refused(link, "is no folder")
        file = os.path.join(self.folder, "file")
        with open(file, "wb"):
            self.refused(file, "is no folder")

    def test_record(self) -> None:
        self.assertEqual(former(self.folder), ())
        odd = "/j\udcff"
        for path in ("/a b", odd, "/a b"):
            remember(self.folder, path)
        self.assertEqual(former(self.folder), ("/a b", odd))
        self.assertEqual(os.listdir(self.folder), [LIST])
        self.assertEqual(stat.S_IMODE(os.stat(os.path.join(self.folder, LIST)).st_mode), 0o600)

    def test_record_that_cannot_be_read(self) -> None:
        path = os.path.join(self.folder, LIST)
        os.mkdir(path)
        text = str(self.assertRaises(ConfigError, former, self.folder))
        self.assertTrue(text.startswith(f"{path}: "), text)
