"""The ways to search a block, against each other and against broken libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import LogEvent, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from popdrop import search
from popdrop.search import Search
from popdrop.stores.mbox.store import MboxStore

ROOT = Path(__file__).resolve().parent.parent


def library(**changes: Any) -> ModuleType:
    """What stands for stringzilla: the same calls, by the standard library."""
    made = ModuleType("popdrop_test_library")
    vars(made).update({"find": bytes.find, "count": bytes.count, "__version__": "0"} | changes)
    return made


WAYS = (search.STANDARD, search.choose(), search.fast(library()))
"""With stringzilla or without: the third takes its place where it is missing."""


@contextmanager
def searching(way: Search) -> Iterator[None]:
    """Scanners that are made in this context search by `way`."""
    before = search.IN_USE
    search.IN_USE = way
    try:
        yield
    finally:
        search.IN_USE = before


class WaysTests(SynchronousTestCase):
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        parts=st.lists(
            st.one_of(
                st.sampled_from(
                    [b"From ", b"Fro", b"F" * 70, b"\n", b"\r\n", b"\n.", b"\n\x01\x01\x01\x01"]
                ),
                st.binary(max_size=90),
            ),
            max_size=30,
        ),
        needle=st.sampled_from([b"From ", b"\n", b"\r\n", b"\n.", b"\n\x01\x01\x01\x01"]),
        data=st.data(),
    )
    def test_all_find_the_same(
        self, parts: list[bytes], needle: bytes, data: st.DataObject
    ) -> None:
        octets = b"".join(parts)
        start = data.draw(st.integers(0, len(octets)))
        end = data.draw(st.integers(start, len(octets)))
        wanted = [
            place
            for place in range(start, end - len(needle) + 1)
            if octets[place : place + len(needle)] == needle
        ]
        for way in WAYS:
            self.assertEqual(way.places(octets, needle, start, end), wanted, way.name)
            self.assertEqual(way.count(octets, needle, start, end), len(wanted), way.name)
            first = wanted[0] if wanted else -1
            self.assertEqual(way.find(octets, needle, start, end), first, way.name)


class ChoiceTests(SynchronousTestCase):
    def choose(self, made: ModuleType | None) -> Search:
        """The choice where that is installed, or nothing."""
        name = "popdrop_test_library"
        with patch.dict(sys.modules, {name: made}):
            return search.choose(name)

    def test_a_good_library_is_taken(self) -> None:
        chosen = self.choose(library())
        self.assertEqual((chosen.name, chosen.fault), ("popdrop_test_library 0", ""))

    def test_none_is_no_fault(self) -> None:
        self.assertIs(self.choose(None), search.STANDARD)

    def test_installed_means_used(self) -> None:
        """stringzilla of this environment, if it is there, passes the trial."""
        self.assertEqual(search.IN_USE.fault, "")

    def test_another_interface(self) -> None:
        made = library()
        del made.find
        self.assert_standard(made, "is not as expected (AttributeError)")

    def test_other_arguments(self) -> None:
        self.assert_standard(library(find=lambda text: -1), "is not as expected (TypeError)")

    def test_wrong_answers(self) -> None:
        """One octet overlooked at the border of a vector is enough."""

        def find(text: bytes, needle: bytes, start: int, end: int) -> int:
            found = text.find(needle, start, end)
            return found if found < 0 or found % 64 < 60 else text.find(needle, found + 1, end)

        def count(text: bytes, needle: bytes, start: int, end: int) -> int:
            return text.count(needle, start, end - end % 64)

        self.assert_standard(library(find=find), "does not find what it should")
        self.assert_standard(library(count=count), "does not find what it should")

    def assert_standard(self, made: ModuleType, fault: str) -> None:
        chosen = self.choose(made)
        self.assertEqual(chosen.name, search.STANDARD.name)
        self.assertIs(chosen.count, search.STANDARD.count)
        self.assertEqual(chosen.fault, fault)

    def test_broken_library(self) -> None:
        """One that cannot be loaded, as where the processor lacks something, is a fault."""
        folder = Path(self.mktemp())
        folder.mkdir()
        (folder / "stringzilla.py").write_text("raise ImportError('undefined symbol')\n")
        self.assertEqual(
            self.asked(f"sys.path.insert(0, {str(folder.absolute())!r})"),
            "standard library: cannot be imported (ImportError)",
        )

    def test_without_the_library(self) -> None:
        self.assertEqual(self.asked("sys.modules['stringzilla'] = None"), "standard library: ")

    def test_a_fault_is_logged_at_the_start(self) -> None:
        """Once, and with what to do; without a fault nothing is said."""
        said: list[LogEvent] = []
        globalLogPublisher.addObserver(said.append)
        self.addCleanup(globalLogPublisher.removeObserver, said.append)
        folder = Path(self.mktemp())
        (folder / "spools").mkdir(parents=True)
        (folder / "state").mkdir(mode=0o700)
        store = MboxStore(f"{folder.absolute()}/spools/{{user}}", str(folder / "state"))
        store.tidy()
        self.assertEqual(said, [])
        with searching(replace(search.STANDARD, fault="cannot be imported (ImportError)")):
            store.tidy()
        (text,) = (formatEvent(event) for event in said)
        self.assertIn("stringzilla cannot be imported (ImportError)", text)
        self.assertIn("pip install 'popdrop[fast]'", text)

    def asked(self, first: str) -> str:
        """What a new interpreter chooses after that statement."""
        program = (
            f"import sys; {first}\n"
            "from popdrop import search\n"
            "from popdrop.stores.mbox import kinds\n"
            "print(f'{search.IN_USE.name}: {search.IN_USE.fault}', end='')"
        )
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return run.stdout
