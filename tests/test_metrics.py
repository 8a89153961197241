"""Figures in the text format of Prometheus."""

from __future__ import annotations

import os
import re
import stat

from twisted.trial.unittest import SynchronousTestCase

from popdrop.ops import metrics

SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
    r'(?:\{file="(?P<file>(?:[^"\\\n]|\\["\\n])*)"\})?'
    r" (?P<value>-?\d+)"
)
"""A line of the exposition format, with the only label that there is here."""


class TextTests(SynchronousTestCase):
    def test_every_line_is_of_the_format(self) -> None:
        files = ("/etc/a.pem", '/a "b" c.pem', "/back\\slash.pem", "/line\nend.pem", "/\udcff.pem")
        text = metrics.certificates([(file, 1e9 + n) for n, file in enumerate(files)], 2)
        self.assertTrue(text.endswith("\n"))
        found = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                match = SAMPLE.fullmatch(line)
                assert match is not None, line
                found[match["file"]] = int(match["value"])
        self.assertEqual(found["/etc/a.pem"], 1_000_000_000)
        self.assertEqual(found['/a \\"b\\" c.pem'], 1_000_000_001)
        self.assertEqual(found["/back\\\\slash.pem"], 1_000_000_002)
        self.assertEqual(found["/line\\nend.pem"], 1_000_000_003)
        self.assertEqual(found["/?.pem"], 1_000_000_004)
        self.assertEqual(found[None], 2)
        for name in {
            SAMPLE.fullmatch(line)["name"] for line in text.splitlines() if line[0] != "#"
        }:
            self.assertIn(f"# TYPE {name} gauge\n", text)

    def test_without_certificates(self) -> None:
        self.assertIn("popdrop_certificates_refused 0\n", metrics.certificates([], 0))


class FileTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = self.mktemp()
        os.mkdir(self.folder)
        self.path = os.path.join(self.folder, "popdrop.prom")
        self.lines: list[str] = []
        self.patch(
            metrics.log, "error", lambda text, **said: self.lines.append(text.format(**said))
        )

    def test_whole_and_readable(self) -> None:
        before = os.umask(0o077)
        self.addCleanup(os.umask, before)
        file = metrics.MetricsFile(self.path)
        for text in ("one 1\n", "two 2\n"):
            file.write(text)
            with open(self.path) as written:
                self.assertEqual(written.read(), text)
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o644)
        self.assertEqual(os.listdir(self.folder), ["popdrop.prom"])

    def test_written_when_something_is_new_or_gone(self) -> None:
        file = metrics.MetricsFile(self.path)
        file.write("one 1\n")
        first = os.stat(self.path).st_ino
        file.write("one 1\n")
        self.assertEqual(os.stat(self.path).st_ino, first)
        os.unlink(self.path)
        file.write("one 1\n")
        self.assertTrue(os.path.exists(self.path))

    def test_a_failure_is_told_once_and_with_a_remedy(self) -> None:
        file = metrics.MetricsFile(os.path.join(self.folder, "nowhere", "popdrop.prom"))
        for _ in range(3):
            file.write("one 1\n")
        self.assertEqual(len(self.lines), 1)
        self.assertIn(f"--metrics {file.path}: cannot be written: No such file", self.lines[0])
        self.assertIn("name a file in a folder", self.lines[0])
        os.mkdir(os.path.dirname(file.path))
        file.write("one 1\n")
        self.assertEqual(os.listdir(os.path.dirname(file.path)), ["popdrop.prom"])

    def test_no_draft_is_left(self) -> None:
        os.mkdir(self.path)
        metrics.MetricsFile(self.path).write("one 1\n")
        self.assertEqual((os.listdir(self.folder), len(self.lines)), (["popdrop.prom"], 1))
