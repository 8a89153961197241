"""`popdrop fsck` for every kind of mbox: what it finds, and that mending harms no message."""

from __future__ import annotations

import contextlib  # not `suppress`: trial reads a module attribute of that name
import os
import re
from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.stores.mbox import mend as mend_module
from popdrop.stores.mbox.check import Content, examine
from popdrop.stores.mbox.findings import unwatched
from popdrop.stores.mbox.fsck import Result
from popdrop.stores.mbox.kinds import FORMS
from popdrop.stores.mbox.mend import MARK
from tests import oracle_mbox, test_fsck
from tests.test_fsck import reader
from tests.test_kinds import LENGTHS, SEP, anything, kinds
from tests.test_mbox_kinds import cl2, mmdf

FROM = test_fsck.FROM
GARBAGE = [b"", b"", b"lost\n", b"lost\n\n", b"\n\0\0", b"\0\0\0", b"\r", SEP, FROM]
ENDS = [b"", b"", b"\0" * 7, b"\n\n\0", SEP + b"\0\0", SEP[:-1], SEP[:2], FROM[:-1], b"\r", b"x"]


def damage(octets: bytes, first: bytes, last: bytes, cut: int, nuls: list[int]) -> bytes:
    """Garbage before, an end that is torn, and NULs before what may begin a message."""
    octets = first + octets[: len(octets) - cut] + last
    places = [found.start() for found in re.finditer(rb"From |\x01{4}\r?\n", octets)]
    for number in sorted({places[each % len(places)] for each in nuls if places}, reverse=True):
        octets = octets[:number] + b"\0\0" + octets[number:]
    return octets


damaged = st.one_of(
    st.builds(
        damage,
        anything,
        st.sampled_from(GARBAGE),
        st.sampled_from(ENDS),
        st.integers(0, 9),
        st.lists(st.integers(0, 9), max_size=2),
    ),
    test_fsck.octets_of_any_kind,
)
steady = settings(max_examples=400, deadline=None, derandomize=True)


def looked(octets: bytes, kind: str, step: int = 1 << 18) -> Content:
    return examine(reader(octets, step), len(octets), kind, unwatched)


def read(octets: bytes, kind: str, hide: bool = True) -> list[oracle_mbox.Message]:
    return oracle_mbox.read(octets, kind == "mboxrd", hide=hide, kind=kind)


class LookPropertyTests(SynchronousTestCase):
    @steady
    @given(damaged, kinds, st.integers(1, 70))
    def test_blocks_of_any_size(self, octets: bytes, kind: str, step: int) -> None:
        whole, pieces = looked(octets, kind), looked(octets, kind, step)
        self.assertEqual(pieces, whole)

    @steady
    @given(damaged, kinds)
    def test_agrees_with_the_server(self, octets: bytes, kind: str) -> None:
        content = looked(octets, kind)
        try:
            messages = read(octets, kind)
        except oracle_mbox.Corrupt as fault:
            where = (fault.line, fault.offset)
            found = [(each.line, each.offset) for each in content.findings]
            kinds_there = [
                each.kind for each in content.findings if (each.line, each.offset) == where
            ]
            self.assertIn(where, found)
            self.assertTrue({"garbage", "nul-gap"} & set(kinds_there))
        else:
            self.assertNotIn("garbage", [each.kind for each in content.findings])
            self.assertEqual(content.first, 0)
            self.assertEqual(list(content.spans.starts), [each.start for each in messages])


def made_part(after: bytes) -> re.Match[bytes] | None:
    """The header of the message that fsck has made, with what is before it."""
    return re.search(
        rb"(?:From MAILER-DAEMON [^\n]*|\x01{4})\nFrom: Mail [^\n]*\nDate: [^\n]*\n"
        rb"Subject: [^\n]*\n" + MARK + rb": [0-9a-f]{64}\n\n",
        after,
    )


def nothing_lost(before: bytes, after: bytes) -> bool:
    """Whether all octets are there but NULs, line ends at the end, and lines of ^A."""
    made = made_part(after)
    if made:
        after = after[made.end() :] + after[: made.start()]
    before, after = before.replace(b"\0", b""), after.replace(b"\0", b"")
    if made:
        before, after = before.replace(b"\x01", b""), after.replace(b"\x01", b"")
        return sorted(before.split()) == sorted(after.split())
    added = after[len(before) :]
    return (
        after.startswith(before) and re.fullmatch(rb"\n?(?:\r?\n|\x01{4}\r?\n)?", added) is not None
    )


def same(one: oracle_mbox.Message) -> tuple[bytes, bytes]:
    # A CR at the end of a file is half a line end, which is made a whole one.
    return one.immutable, one.sent.replace(b"\r\r\n", b"\r\n")


class NothingLostTests(test_fsck.Case):
    def mended(self, octets: bytes, kind: str) -> Result:
        self.put(octets)
        result = self.fsck(kind=kind).mend(self.bob)
        after = self.get()
        if not result.done:
            self.assertEqual(after, octets)
        else:
            self.assertEqual(self.get(result.copy), octets)
        return result

    @steady
    @given(damaged, kinds)
    def test_any_octets(self, octets: bytes, kind: str) -> None:
        result = self.mended(octets, kind)
        after = self.get()
        self.assertTrue(nothing_lost(octets, after), (octets, after))
        again = self.fsck(kind=kind).look(self.bob)
        if result.refused:
            self.assertEqual(result.status, "left")
            self.assertIn("left", again.status)
            self.assertEqual(again.left, result.left)
            once_more = self.fsck(kind=kind).mend(self.bob)
            self.assertEqual((once_more.refused, once_more.done), (result.refused, []))
            self.assertEqual(self.get(), after)
        else:
            self.assertEqual(again.status, "clean", again.left)
            self.assertEqual(result.status, "repaired" if result.done else "clean")
        self.check_messages(octets, after, kind)

    def check_messages(self, octets: bytes, after: bytes, kind: str) -> None:
        """All that the server would have shown it still shows, but for what NULs have joined."""
        with contextlib.suppress(oracle_mbox.Corrupt):
            before = read(octets, kind, hide=False)
            found = Counter(same(each) for each in read(after, kind, hide=False))
            torn = octets.rpartition(b"\n")[2]
            if before and (oracle_mbox.is_from_line(torn + b"\n") or torn.startswith(SEP[:-1])):
                before.pop()
            whole = Counter(same(each) for each in before if b"\0" not in each.stored)
            self.assertEqual(whole - found, Counter(), (octets, after, kind))
