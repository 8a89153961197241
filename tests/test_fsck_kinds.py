"""`popdrop fsck` for every kind of mbox: what it finds, and that mending harms no message."""

from __future__ import annotations

import contextlib  # not `suppress`: trial reads a module attribute of that name
import itertools
import os
import re
import shutil
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.stores.mbox import mend as mend_module
from popdrop.stores.mbox.check import Content, examine
from popdrop.stores.mbox.findings import MOST, unwatched
from popdrop.stores.mbox.fsck import Result
from popdrop.stores.mbox.kinds import FORMS
from popdrop.stores.mbox.mend import MARK, Failed
from tests import oracle_mbox, test_fsck
from tests.test_fsck import reader
from tests.test_kinds import LENGTHS, PSEUDO, SEP, anything, kinds
from tests.test_mbox_kinds import cl2

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

    @steady
    @given(damaged, st.sampled_from(LENGTHS))
    def test_from_lines_as_a_slow_reader_finds_them(self, octets: bytes, kind: str) -> None:
        """What the rules of plain mbox say, but for what a length makes text or a message."""
        octets = octets.replace(b"\0", b"")
        try:
            messages = read(octets, kind)
        except oracle_mbox.Corrupt:
            return
        if not messages or messages[0].opening or len(messages) < len(read(octets, kind, False)):
            return
        lines = oracle_mbox.lines_of(octets)
        offsets = [len(b"".join(lines[:number])) for number in range(len(lines) + 1)]
        text = {each.start for each in messages}
        for start, stop in itertools.pairwise([*(each.start for each in messages), len(octets)]):
            place = offsets.index(start)
            if oracle_mbox._by_length(octets, lines, offsets, place) is not None:
                body = re.compile(rb"\n\r?\n").search(octets, start)
                assert body is not None
                text.update(range(body.end(), stop))
        kinds_of_text = ("undated", "run-together")
        plain, found = (
            [
                (each.kind, each.offset)
                for each in looked(octets, one_kind).findings
                if each.kind in kinds_of_text and each.offset is not None
            ]
            for one_kind in ("mboxo", kind)
        )
        if len(plain) < MOST:  # none of them counted only
            self.assertEqual(found, [each for each in plain if each[1] not in text])

    @steady
    @given(damaged)
    def test_lines_of_four_as_a_slow_reader_finds_them(self, octets: bytes) -> None:
        octets = octets.replace(b"\0", b"")
        try:
            messages = read(octets, "mmdf")
        except oracle_mbox.Corrupt:
            return
        single, end = [], -1
        for each in messages:
            single += [each.start] if each.start == end else []
            end = each.start + len(each.opening + each.from_line + each.stored)
        content = looked(octets, "mmdf")
        found = [each.offset for each in content.findings if each.kind == "one-line"]
        if len(messages) < MOST:
            self.assertEqual(found, single)
        if len(messages) == len(read(octets, "mmdf", False)):
            ended = not {"no-newline", "no-separator"} & {each.kind for each in content.findings}
            self.assertEqual(ended, not messages or end < len(octets))


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
    return one.immutable, re.sub(rb"\r+\n", b"\r\n", one.sent)


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

    @settings(max_examples=200, deadline=None, derandomize=True)
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


def one(text: bytes, from_line: bytes = b"") -> bytes:
    """An MMDF message with both lines of ^A."""
    return SEP + from_line + b"Subject: x\n\n" + text + b"\n" + SEP


def lengthy(length: int, body: bytes) -> bytes:
    return FROM + b"Content-Length: %d\n\n" % length + body


PLAIN = FROM + b"Subject: plain\n\nb\n\n"


class FindingTests(SynchronousTestCase):
    def find(self, octets: bytes, kind: str, *expected: tuple[str, int | None, int | None]) -> None:
        found = [(each.kind, each.line, each.offset) for each in looked(octets, kind).findings]
        self.assertEqual(found, list(expected))

    def test_mmdf_clean(self) -> None:
        crlf = one(b"a", FROM).replace(b"\n", b"\r\n")
        for octets in (b"", b"\n", SEP, one(b"a") + one(b"b", FROM), crlf, one(b"a") + b"\n\r\n"):
            self.find(octets, "mmdf")
            self.find(octets, "auto")

    def test_mmdf_garbage(self) -> None:
        self.find(b"lost\n" + one(b"a"), "mmdf", ("garbage", 1, 0))
        self.find(b"\nlost\n\n" + one(b"a"), "auto", ("garbage", 2, 1))
        # Nothing but a line of its own.
        self.find(b"x" + one(b"a")[:-5], "mmdf", *[("garbage", 1, 0), ("run-together", 1, 1)])
        text = looked(b"lost\n" + one(b"a"), "mmdf").findings[0].text
        self.assertEqual(text, "no line of four ^A: 5 octets before the first message")
        text = looked(b"lost\n" + one(b"a"), "auto").findings[0].text
        self.assertIn("no From_ line or line of four ^A: 5 octets", text)

    def test_mmdf_ending(self) -> None:
        octets = one(b"a") + one(b"b")
        self.find(octets[:-5], "mmdf", ("no-separator", 9, len(octets) - 6))
        self.find(octets[:-6], "mmdf", ("no-newline", 9, len(octets) - 7))
        self.find(octets[:-1], "mmdf", ("no-newline", 10, len(octets) - 2))
        self.find(
            octets + b"x\n",
            "mmdf",
            ("no-header", 10, len(octets) - 5),
            ("cut-header", 10, len(octets) - 5),
            ("one-line", 10, len(octets) - 5),
            ("no-separator", 11, len(octets) + 1),
        )

    def test_mmdf_one_line(self) -> None:
        octets = one(b"a") + one(b"b")[len(SEP) :]
        self.find(octets, "mmdf", ("one-line", 5, len(one(b"a")) - len(SEP)))

    def test_mmdf_run_together(self) -> None:
        octets = one(b"a")[: -len(SEP) - 1]
        place = ("run-together", 4, len(octets))
        self.find(octets + one(b"b"), "mmdf", place)
        octets = one(b"a\n")[: -len(SEP)]
        self.find(octets + FROM + b"\n" + SEP, "mmdf", ("run-together", 6, len(octets)))

    def test_what_is_nothing_in_mmdf(self) -> None:
        """From_ lines without a date or an empty line before, and any Content-Length."""
        self.find(one(b"a\n\nFrom now on\n" + FROM + b"x"), "mmdf")
        self.find(SEP + b"Content-Length: 99\n\na\n" + SEP, "mmdf")

    def test_mmdf_nuls(self) -> None:
        first = len(one(b"a"))
        self.find(one(b"a") + b"\0\0" + one(b"b"), "mmdf", ("nul-gap", 6, first))
        self.find(one(b"a") + b"\0\0", "mmdf", ("nul-gap", 6, first))
        self.find(b"\n\0" + one(b"a"), "mmdf", ("nul-gap", 2, 1))
        # Not behind a line of ^A.
        self.find(one(b"a\n\n\0"), "mmdf", ("nul", 6, first - len(SEP) + 1))

    def test_length(self) -> None:
        for kind in LENGTHS:
            self.find(cl2(1) + lengthy(9, b"a\n\n") + PLAIN, kind, ("length", 12, len(cl2(1))))
            self.find(lengthy(2, b"a\n\n"), kind)

    def test_text_by_length(self) -> None:
        """Whatever it looks like."""
        for text in (PLAIN, b"From now on\n", b"x" + FROM, b"x\n" + FROM):
            body = b"a\n\n" + text + b"b\n"
            for kind in LENGTHS:
                self.find(lengthy(len(body), body) + b"\n" + PLAIN, kind)
        for text in (FROM + b"b\n", b""):
            body = b"a\n\n\0\0" + text
            octets = lengthy(len(body), body)
            end = [("no-newline", 6, len(octets) - 1)] * (not text)
            for kind in LENGTHS:
                self.find(octets, kind, ("nul", 6, octets.index(b"\0")), *end)

    def test_not_text_by_length(self) -> None:
        """What stands in another message, or in the header."""
        body = b"a\n\n" + PLAIN
        octets = lengthy(len(body), body) + b"\n" + FROM + FROM + b"\n\nFrom now on\n\n"
        places = [octets.rindex(FROM), octets.rindex(b"From now")]
        for kind in LENGTHS:
            found = [(each.kind, each.offset) for each in looked(octets, kind).findings]
            self.assertIn(("run-together", places[0]), found)
            self.assertIn(("undated", places[1]), found)
            self.assertEqual([each for each, _ in found].count("undated"), 1)

    def test_no_empty_line_after_a_length(self) -> None:
        first, second = lengthy(2, b"a\n"), lengthy(2, b"b\n")
        for kind in LENGTHS:
            self.find(first + second, kind)
        end = ("no-separator", 8, len(first + second) - 1)
        self.find(first + second, "mboxo", ("run-together", 5, len(first)), end)

    def test_end_that_a_length_gives(self) -> None:
        octets = lengthy(2, b"a\n")
        for kind in LENGTHS:
            self.find(octets, kind)
            self.find(octets[:-1], kind, ("length", 1, 0), ("no-newline", 4, len(octets) - 2))
            false = lengthy(7, b"a\n")
            self.find(false, kind, ("length", 1, 0), ("no-separator", 4, len(octets) - 1))

    def test_nuls_where_a_length_ends(self) -> None:
        octets = cl2(1) + b"\0\0" + cl2(2)
        for kind in LENGTHS:
            found = [(each.kind, each.offset) for each in looked(octets, kind).findings]
            self.assertIn(("nul-gap", len(cl2(1))), found)


class MendTests(test_fsck.Case):
    def mend(self, octets: bytes, kind: str) -> bytes:
        self.put(octets)
        result = self.fsck(kind=kind).mend(self.bob)
        self.assertEqual((result.status, result.refused), ("repaired", ""), result.left)
        return self.get()

    def test_mmdf_ending(self) -> None:
        octets = one(b"a")
        for cut in (1, 5, 6):
            self.assertEqual(self.mend(octets[:-cut], "mmdf"), octets)
            self.assertEqual(self.mend(octets[:-cut], "auto"), octets)
        # Half a line of ^A is text.
        self.assertEqual(self.mend(octets[:-2], "mmdf"), octets[:-2] + b"\n" + SEP)
        self.assertEqual(self.mend(octets + SEP[:-1], "mmdf"), octets + SEP)
        crlf = octets.replace(b"\n", b"\r\n")
        self.assertEqual(self.mend(crlf[:-6], "mmdf"), crlf)
        self.assertEqual(self.mend(crlf[:-1], "mmdf"), crlf)

    def test_mmdf_garbage(self) -> None:
        for kind in ("mmdf", "auto"):
            mended = self.mend(b"lost\n" + one(b"a") + one(b"b"), kind)
            *_, last = read(mended, "mmdf")
            self.assertTrue(mended.startswith(one(b"a") + one(b"b") + SEP + b"From: Mail system <"))
            self.assertEqual(last.from_line, b"")
            self.assertTrue(last.stored.endswith(b"\n\nlost\n"))
            self.assertTrue(mended.endswith(b"\nlost\n" + SEP))

    def test_nothing_but_garbage(self) -> None:
        for octets in (b"lost", b"lost\n"):
            mended = self.mend(octets, "mmdf")
            self.assertTrue(mended.startswith(SEP + b"From: Mail system <"))
            self.assertTrue(mended.endswith(b"\n\nlost\n" + SEP))

    def test_mmdf_nuls(self) -> None:
        octets = one(b"a") + b"\0" * 9 + one(b"b") + b"\0" * 600
        self.assertEqual(self.mend(octets, "mmdf"), one(b"a") + one(b"b"))
        self.assertEqual(self.mend(b"\n\0" + one(b"b"), "auto"), b"\n" + one(b"b"))
        self.assertEqual(self.mend(b"\0\0" + SEP, "mmdf"), SEP)

    def test_lengths(self) -> None:
        """NULs go, and the length before them is true again."""
        first, second = lengthy(2, b"a\n\n"), lengthy(2, b"b\n\n")
        for kind in LENGTHS:
            mended = self.mend(first + b"\0" * 7 + second + b"\0", kind)
            self.assertEqual(mended, first + second)
            self.assertEqual(looked(mended, kind).findings, [])
            mended = self.mend(b"lost\n\n" + cl2(1), kind)
            self.assertEqual(len(read(mended, kind)), 2)
            self.assertTrue(mended.startswith(cl2(1) + b"From MAILER-DAEMON"))

    def test_hidden_message(self) -> None:
        """It is there before and after, and counts as none."""
        for kind in FORMS:
            first = SEP + PSEUDO + SEP if kind == "mmdf" else PSEUDO
            last = one(b"a") if kind == "mmdf" else PLAIN
            for octets in (first + b"\0" * 9 + last, b"\0" + first + last, first + last + b"\0"):
                self.assertEqual(self.mend(octets, kind), first + last)
            self.assertEqual(self.mend(first[:-1], kind), first)
            self.assertTrue(self.mend(b"lost\n\n" + first, kind).startswith(first))

    def test_ids_stay(self) -> None:
        for kind in FORMS:
            octets = lengthy(2, b"a\n\n") + lengthy(2, b"b\n\n")
            if kind == "mmdf":
                octets = one(b"a") + one(b"b")
            for end in (octets[:-2], octets[:-6], octets + b"\0" * 9):
                self.put(end.rstrip(b"\0"))
                known = self.open(kind)
                self.assertEqual(len(known), 2)
                self.mend(end, kind)
                self.assertEqual(self.open(kind), known)

    def test_last_block_of_one_octet(self) -> None:
        """The end that is written in between, should we be killed, does not stay behind it."""
        self.patch(mend_module, "BLOCK", 8)
        for size in range(14, 30):
            for kind in FORMS:
                lost = b"l" * size + b"\n\n"
                first = one(b"a") if kind == "mmdf" else cl2(1)
                end = lost + SEP if kind == "mmdf" else lost
                mended = self.mend(lost + first, kind)
                self.assertTrue(mended.endswith(b"\n\n" + end), (size, kind))
                self.assertEqual(mended.count(lost), 1)


class RefusalTests(test_fsck.Case):
    def refused(self, octets: bytes, kind: str) -> str:
        self.put(octets)
        result = self.fsck(kind=kind).mend(self.bob)
        self.assertEqual((result.status, result.done, result.copy), ("left", [], ""))
        self.assertEqual(self.get(), octets)
        self.assertEqual(self.kept(), {})
        return result.refused

    def test_length_that_an_ending_makes_true(self) -> None:
        inside = b"a\n\n" + PLAIN[:-1]
        octets = lengthy(len(inside) + 1, inside)
        for kind in LENGTHS:
            words = self.refused(octets, kind)
            self.assertIn("that of message 1, would hide messages behind it: if they", words)
        # One octet farther, and it is harmless.
        octets = lengthy(len(inside) + 2, inside)
        self.put(octets)
        self.assertEqual(self.fsck(kind="mboxcl2").mend(self.bob).status, "repaired")
        self.assertEqual(self.get(), octets + b"\n")

    def test_length_that_a_cut_makes_true(self) -> None:
        inside = b"a\n\n" + PLAIN
        octets = cl2(1) + lengthy(len(inside), inside) + b"\0" * 9 + PLAIN
        for kind in LENGTHS:
            self.assertIn("that of message 2, would hide", self.refused(octets, kind))
        octets = cl2(1) + lengthy(len(inside), inside) + b"\0" * 9
        for kind in LENGTHS:
            self.assertIn("that of message 2, would hide", self.refused(octets, kind))

    def test_length_that_ends_with_what_is_appended(self) -> None:
        inside = b"a\n\n" + PLAIN
        self.put(b"lost\n\n" + lengthy(99, inside))
        self.assertEqual(self.fsck(kind="mboxcl2").mend(self.bob).status, "repaired")
        shutil.rmtree(os.path.join(self.state, "fsck"))
        more = len(self.get()) - len(lengthy(99, inside))
        octets = b"lost\n\n" + lengthy(len(inside) + more, inside)
        self.assertIn("that of message 1, would hide", self.refused(octets, "mboxcl2"))

    def test_what_was_mended_before(self) -> None:
        inside = b"a\n\n" + PLAIN[:-1]
        self.put(lengthy(len(inside) + 1, inside) + b"\n" + b"\0" * 9)
        self.assertIn("would hide", self.refused(self.get(), "auto"))

    def test_another_kind(self) -> None:
        for kind in FORMS:
            if kind not in ("mmdf", "auto"):
                self.assertIn("--kind mmdf", self.refused(one(b"a"), kind))
                self.assertIn("--kind mmdf", self.refused(b"\n" + one(b"a") + PLAIN, kind))
        self.assertIn("right --kind", self.refused(PLAIN, "mmdf"))
        self.assertIn("right --kind", self.refused(b"\n" + PLAIN + one(b"a"), "mmdf"))

    def test_no_kind(self) -> None:
        self.assertIn("--kind mmdf or --kind mboxcl2", self.refused(b"lost\n", "auto"))


class CrashTests(test_fsck.Case):
    """Killed at every call that changes something, as in `test_fsck`, for two other kinds."""

    def each_call(self, kind: str, octets: bytes, new: bytes, torn: bool) -> int:
        for number in range(1000):
            for folder in (self.state, self.mail):
                shutil.rmtree(folder)
                os.mkdir(folder, 0o700)
            self.put(octets)
            files = test_fsck.Counting(number, test_fsck.Killed, torn)
            with contextlib.suppress(test_fsck.Killed, Failed):
                self.fsck(files, kind=kind).mend(self.bob)
            if files.count <= number:
                return number
            # Mail comes in, then somebody tries again.
            with open(self.bob, "ab") as file:
                end = SEP if kind == "mmdf" else b"\n\n"
                ended = self.get().endswith((end, b"\0"))
                self.assertTrue(ended or torn, number)
                file.write(new if ended else b"\n" + end + new)
            while (result := self.fsck(kind=kind).mend(self.bob)).status == "left":
                for each in result.left:
                    self.assertEqual(each.kind, "orphan", (number, each))
                    os.unlink(each.path)
            self.check(number, kind)
        raise AssertionError("it never came to its end")

    def check(self, number: int, kind: str) -> None:
        found = [each.stored.replace(b"\0", b"") for each in read(self.get(), kind)]
        for body in (b"\n\na\n", b"\n\nb\n", b"\n\nnew\n", b"\n\nlost\n\nhalf\n"):
            count = sum(each.rstrip(b"\n") == each[:-1] and each.endswith(body) for each in found)
            self.assertEqual(count, 1, (number, body, found))
        # Killed while it was appended, the text may be there in part and whole.
        self.assertLessEqual(len(found), 5)
        self.assertEqual(self.fsck(kind=kind).look(self.bob).status, "clean", number)

    def test_mmdf(self) -> None:
        self.patch(mend_module, "BLOCK", 7)
        octets = b"lost\n\nhalf\n" + one(b"a") + b"\0" * 40 + one(b"b") + b"\0" * 700
        for torn in (False, True):
            self.assertGreater(self.each_call("mmdf", octets, one(b"new"), torn), 30)

    def test_mboxcl2(self) -> None:
        self.patch(mend_module, "BLOCK", 7)
        octets = b"lost\n\nhalf\n\n" + lengthy(2, b"a\n\n") + b"\0" * 40
        octets += lengthy(2, b"b\n\n") + b"\0" * 700
        for torn in (False, True):
            self.assertGreater(self.each_call("mboxcl2", octets, lengthy(4, b"new\n\n"), torn), 30)
