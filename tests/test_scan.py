"""The scanner against a slow reader, and the rules one by one."""

from __future__ import annotations

import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.stores.mbox import scan
from popdrop.stores.mbox.scan import NotAnMbox, Scanner, Spans
from popdrop.stores.mbox.spans import QUOTED
from popdrop.stores.uidl import STRIPPED
from popdrop.wire import Outgoing
from tests import oracle_mbox, test_search

DATE = b"Wed Dec  2 05:53:22 1992"
FROM = b"From bob@example.org " + DATE + b"\n"


def spans_of(octets: bytes, block: int = 1 << 20, **options: bool) -> Spans:
    strip = options.pop("strip", True)
    scanner = Scanner(strip=STRIPPED if strip else frozenset(), **options)
    for start in range(0, len(octets), block):
        scanner.feed(octets[start : start + block])
    return scanner.close()


def rows(spans: Spans) -> list[tuple[int, int, int, int, int]]:
    return list(
        zip(spans.starts, spans.heads, spans.lengths, spans.sizes, spans.checks, strict=True)
    )


def expected(octets: bytes, **options: bool) -> list[tuple[int, int, int, int, int]]:
    return [
        (m.start, len(m.opening + m.from_line), len(m.stored), len(m.sent), m.check)
        for m in oracle_mbox.read(octets, **options)
    ]


def sizes(octets: bytes, **options: bool) -> list[int]:
    return list(spans_of(octets, **options).sizes)


def stored(octets: bytes, **options: bool) -> list[bytes]:
    spans = spans_of(octets, **options)
    return [octets[spans.offset(i) : spans.content_end(i)] for i in range(len(spans))]


FRAGMENTS = [
    FROM,
    FROM[:-1] + b"\r\n",
    b"\n" + FROM,
    b"\r\n" + FROM,
    b"From - Thu Jan 1 00:00 2015\n",
    b"From ",
    b">From ",
    b">>From x\n",
    b"\n>From y\n",
    b">" * 40,
    b">" * 9000,
    b"y" * 9000,
    b"F",
    b"rom ",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\r",
    b"\n\r\n",
    b" folded\n",
    b"\tfolded\r\n",
    b" \n",
    b"Status: RO\n",
    b"X-UID: 7",
    b"x-uidl: abc\n",
    b"X-Status: A\r\n",
    b"LINES: 4\n",
    b"Content-Length: 10\n",
    b"Status",
    b":",
    b"X-IMAP: 1 2\n",
    b"Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA\n",
    b"From: Mail System Internal Data <a@example.org>\n",
    b"Subject: hello\n",
    b".\n",
    b"..x\n",
    b"\x00\xff",
    b"words\n",
]

mboxes = st.builds(
    lambda first, parts: first + b"".join(parts),
    st.sampled_from([FROM, b"\n\r\n" + FROM, FROM + b"\n", FROM + b"Status: O\n", b""]),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=6)), max_size=40),
)


class PropertyTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=300)
    @given(mboxes)
    def test_mail_that_comes_changes_nothing_before_it(self, octets: bytes) -> None:
        """Sizes, checks and ids of what is there stay, also of a last line without its end.

        But for one that ends with a bare CR, which the LF to come makes part of a line end.
        """
        octets = octets.rstrip(b"\r")
        if octets.strip(b"\r\n") and not octets.startswith(b"From "):
            return
        end = b"" if octets.endswith(b"\n") or not octets else b"\n"
        if not octets.endswith((b"\n\n", b"\n\r\n")):
            end += b"\n"
        try:
            before = spans_of(octets)
        except NotAnMbox:
            return
        count = len(before)
        after = spans_of(octets + end + FROM + b"A: 1\n\nnew\n")
        self.assertEqual(list(after.sizes[:count]), list(before.sizes))
        self.assertEqual(list(after.checks[:count]), list(before.checks))

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(
        octets=mboxes,
        unquote=st.booleans(),
        strip=st.booleans(),
        hide=st.booleans(),
        seed=st.integers(0, 2**32),
        longest=st.sampled_from([1, 3, 60, 5000, 100_000]),
    )
    def test_any_octets_any_cut(
        self, octets: bytes, unquote: bool, strip: bool, hide: bool, seed: int, longest: int
    ) -> None:
        """The slow reader and the scanner agree on everything, however the octets come."""
        options = {"unquote": unquote, "strip": strip, "hide": hide}
        for way in test_search.WAYS:
            with test_search.searching(way):
                self.compare(octets, options, random.Random(seed), longest)

    def compare(
        self, octets: bytes, options: dict[str, bool], chance: random.Random, longest: int
    ) -> None:
        strip = STRIPPED if options["strip"] else frozenset[bytes]()
        scanner = Scanner(unquote=options["unquote"], strip=strip, hide=options["hide"])
        try:
            wanted = expected(octets, **options)
        except oracle_mbox.Corrupt as bad:
            with self.assertRaises(NotAnMbox) as raised:
                self.feed(scanner, octets, chance, longest)
            self.assertEqual((raised.exception.line, raised.exception.offset), bad.args)
            return
        found = self.feed(scanner, octets, chance, longest)
        self.assertEqual(rows(found), wanted)
        self.assertEqual(found.end, len(octets))
        for index, altered in enumerate(found.altered):
            content = b"\n" + octets[found.offset(index) : found.content_end(index)]
            quoted = options["unquote"] and re.search(rb"\n>+From ", content) is not None
            self.assertEqual(altered & QUOTED > 0, quoted)

    def feed(self, scanner: Scanner, octets: bytes, chance: random.Random, longest: int) -> Spans:
        place = 0
        while place < len(octets):
            step = chance.randint(1, longest)
            scanner.feed(octets[place : place + step])
            place += step
        return scanner.close()

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(octets=mboxes, unquote=st.booleans(), strip=st.booleans())
    def test_sizes_are_what_is_sent(self, octets: bytes, unquote: bool, strip: bool) -> None:
        """LIST is what RETR sends: the transformer of the wire makes as many octets."""
        octets = FROM + octets
        spans = spans_of(octets, unquote=unquote, strip=strip)
        names = STRIPPED if strip else frozenset()
        for index in range(len(spans)):
            content = octets[spans.offset(index) : spans.content_end(index)]
            sent = Outgoing(strip=names, unquote=unquote).whole(content)
            self.assertTrue(sent.endswith(b".\r\n"))
            lines = sent[:-3].split(b"\r\n.")
            stuffed = len(lines) - 1 + sent[:-3].startswith(b".")
            self.assertEqual(spans.sizes[index], len(sent) - 3 - stuffed)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(octets=mboxes, more=mboxes, ending=st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    def test_appending_changes_nothing(self, octets: bytes, more: bytes, ending: bytes) -> None:
        """A message that ends with its line end and an empty line is as it was after delivery."""
        octets = FROM + octets + ending
        before = rows(spans_of(octets))
        after = rows(spans_of(octets + FROM + more))
        self.assertEqual(after[: len(before)], before)

    def test_realistic_spool(self) -> None:
        """A large spool, headers and bodies over many blocks, at odd block sizes."""
        octets = make_spool(random.Random(7), 400)
        wanted = expected(octets)
        self.assertEqual(len(wanted), 400)
        for way in test_search.WAYS:
            with test_search.searching(way):
                for block in (scan.BLOCK, 65_536, 4099, 257):
                    self.assertEqual(rows(spans_of(octets, block)), wanted)


def make_spool(chance: random.Random, count: int) -> bytes:
    """Messages as they come: folded headers, spool headers, quoted lines, CRLF, long lines."""
    out = []
    for number in range(count):
        end = b"\r\n" if number % 7 == 3 else b"\n"
        sender = chance.choice([b"a@example.org", b"-", b"???@???", b'"a b" <c@example.org>'])
        date = chance.choice(
            [DATE, b"Wed Dec  2 05:53:22 1992 +0100", b"Wed Dec  2 05:53 PST 1992"]
        )
        header = [b"Received: from x", b"\tby y", b"Subject: %d" % number, b"Date: now"]
        for name in (b"Status: RO", b"X-UID: 5", b"Lines: 3", b"X-Keywords: a", b"X-UIDL: abcdef"):
            if chance.random() < 0.3:
                header.insert(chance.randrange(len(header)), name)
        body = []
        for _ in range(chance.randrange(120)):
            body.append(
                chance.choice(
                    [
                        b"",
                        b".",
                        b"..",
                        b">From here",
                        b">>From there",
                        b"From us, with love",
                        b"a\rb",
                    ]
                    + [b"word " * chance.randrange(30)] * 9
                )
            )
            if body[-1].startswith(b"From ") and body[-2:-1] == [b""]:
                body[-1] += b" on Monday"
        if number % 50 == 9:
            body.append(b"z" * 300_000)
        lines = [b"From " + sender + b" " + date, *header, b"", *body, b"last", b""]
        out.append(end.join(lines) + end)
    return b"".join(out)


class FromLineTests(SynchronousTestCase):
    GOOD = (
        b"From user Wed Dec  2 05:53 1992",
        b"From user Wed Dec  2 05:53:22 1992",
        b"From user Wed Dec  2 05:53 PST 1992",
        b"From user Wed Dec  2 05:53:22 PST 1992",
        b"From user Wed Dec  2 05:53 -0700 1992",
        b"From user Wed Dec  2 05:53:22 -0700 1992",
        b"From user Wed Dec  2 05:53 1992 PST",
        b"From user Wed Dec  2 05:53:22 1992 PST",
        b"From user Wed Dec  2 05:53 1992 -0700",
        b"From user Wed Dec  2 05:53:22 1992 -0700",
        b"From user Wed Dec  2 05:53:22 1992 remote from host",
        b"From user Wed Dec  2 05:53 PST 1992 remote from host.example.org",
        b"From - Wed Dec 12 05:53:22 1992",
        b"From ???@??? Wed Dec 12 05:53:22 1992",
        b"From John Q. Public Wed Dec 12 05:53:22 1992",
        b'From "Mon Jan  1 00:00 1999" Wed Dec 12 05:53:22 1992',
        b"From  Wed Dec 12 05:53:22 1992",
        b"From user Wed Dec 12 05:53:22 CEST 1992",
        b"From user Wed Dec 12 05:53:22 MET DST 1992",
    )
    BAD = (
        b"From user",
        b"From me to you",
        b"From user Wed Dec  2 1992",
        b"From user Dec  2 05:53 1992",
        b"From user Wed Dec  2 05.53 1992",
        b"From user Wed Dec  2 05:53 92",
        b"From user Wed Dec  2 05:53 1992 and more words",
        b"From user Wed Dec  2 05:53 1992 remote from",
        b"From: user Wed Dec  2 05:53 1992",
        b"from user Wed Dec  2 05:53 1992",
        b" From user Wed Dec  2 05:53 1992",
        b"From user " + b"x" * 4000 + b" Wed Dec  2 05:53 1992",
    )

    def test_forms(self) -> None:
        """Each date form of c-client begins a message, with LF and with CRLF."""
        for line in self.GOOD:
            for end in (b"\n", b"\r\n"):
                octets = FROM + b"\nbody\n\n" + line + end + b"\nsecond\n"
                self.assertEqual(len(spans_of(octets)), 2, line)
                self.assertEqual(len(spans_of(line + end + b"\nbody\n")), 1, line)
                self.assertTrue(oracle_mbox.is_from_line(line + end), line)

    def test_other_lines_are_body(self) -> None:
        """ "From " without a date is body, even after an empty line; first, it is no mbox."""
        for line in self.BAD:
            octets = FROM + b"\nbody\n\n" + line + b"\n\nmore\n"
            self.assertEqual(stored(octets), [b"\nbody\n\n" + line + b"\n\nmore\n"])
            self.assertRaises(NotAnMbox, spans_of, line + b"\n\nbody\n")
            self.assertFalse(oracle_mbox.is_from_line(line + b"\n"), line)

    def test_needs_an_empty_line_before(self) -> None:
        """A dated From_ line directly behind another line is body."""
        for before in (b"body\n", b"body\r\n", b" \n", b"\r\r\n", b">\n", b"."):
            octets = FROM + b"\n" + before + FROM + b"x\n"
            self.assertEqual(len(spans_of(octets)), 1, before)

    def test_unfinished_line_is_no_boundary(self) -> None:
        """A From_ line whose line end has not come is body, and does not begin an mbox."""
        self.assertEqual(stored(FROM + b"\nbody\n\n" + FROM[:-1]), [b"\nbody\n\n" + FROM[:-1]])
        self.assertRaises(NotAnMbox, spans_of, FROM[:-1])


class SeparatorTests(SynchronousTestCase):
    def test_separator_is_not_message(self) -> None:
        octets = FROM + b"A: b\n\nbody\n\n" + FROM + b"A: c\n\nbody\n\n"
        self.assertEqual(stored(octets), [b"A: b\n\nbody\n", b"A: c\n\nbody\n"])
        self.assertEqual(sizes(octets), [len(b"A: b\r\n\r\nbody\r\n")] * 2)

    def test_only_one_empty_line_separates(self) -> None:
        octets = FROM + b"\nbody\n\n\n\n" + FROM + b"\n\n\n"
        self.assertEqual(stored(octets), [b"\nbody\n\n\n", b"\n\n"])

    def test_crlf_separator(self) -> None:
        octets = FROM + b"\r\nbody\r\n\r\n" + FROM + b"\nbody\n\r\n"
        self.assertEqual(stored(octets), [b"\r\nbody\r\n", b"\nbody\n"])

    def test_no_separator_at_the_end(self) -> None:
        self.assertEqual(stored(FROM + b"\nbody\n"), [b"\nbody\n"])

    def test_no_content(self) -> None:
        """A From_ line and its separator: a message of no octets."""
        self.assertEqual(stored(FROM + b"\n" + FROM + b"\n"), [b"", b""])
        self.assertEqual(sizes(FROM), [0])

    def test_header_only(self) -> None:
        """The empty line behind a header without body is the separator."""
        self.assertEqual(stored(FROM + b"A: b\n\n" + FROM + b"C: d\n"), [b"A: b\n", b"C: d\n"])


class SizeTests(SynchronousTestCase):
    def size(self, content: bytes, **options: bool) -> int:
        (size,) = sizes(FROM + content, **options)
        return size

    def test_line_ends(self) -> None:
        """LF and CRLF count two octets, a bare CR one."""
        self.assertEqual(self.size(b"\na\nb\r\nc\rd\n"), len(b"\r\na\r\nb\r\nc\rd\r\n"))

    def test_missing_last_line_end(self) -> None:
        """The CRLF that is added to an unfinished last line is counted."""
        self.assertEqual(self.size(b"\nbody"), len(b"\r\nbody\r\n"))
        self.assertEqual(self.size(b"\nbody\r"), len(b"\r\nbody\r\r\n"))

    def test_long_line_cut_in_its_crlf(self) -> None:
        """A line too long to wait for, with a block that ends between its CR and LF."""
        for place in (b"A: ", b"Status: ", b"\n"):
            line = FROM + place + b"y" * 20_000 + b"\r"
            scanner = Scanner()
            scanner.feed(line)
            scanner.feed(b"\n\nx\n")
            self.assertEqual(rows(scanner.close()), expected(line + b"\n\nx\n"))

    def test_dots_count_once(self) -> None:
        self.assertEqual(self.size(b"\n.\n..\n.x\n"), len(b"\r\n.\r\n..\r\n.x\r\n"))

    def test_unquoting(self) -> None:
        content = b"\n>From a\n>>From b\nx >From c\n>Fromage\n> From d\n"
        self.assertEqual(self.size(content, unquote=False), len(content) + 6)
        self.assertEqual(self.size(content, unquote=True), len(content) + 6 - 2)

    def test_unquoting_in_the_header(self) -> None:
        self.assertEqual(self.size(b">From u at noon\nA: b\n"), len(b"From u at noon\r\nA: b\r\n"))

    def test_stripped_fields(self) -> None:
        """Spool headers are not counted, folded lines included; X-UIDL and Lines are."""
        kept = b"A: b\nX-UIDL: abc\nLines: 3\n"
        dropped = b"Status: RO\nX-Status: A\nX-KEYWORDS: x\n\ty\n z\nx-uid: 1\nX-IMAP: 1 2\n"
        dropped += b"X-IMAPbase: 1 2\nContent-Length: 99999999999999999999999999999\n"
        body = b"\nStatus: RO\n"
        sent = len(kept) + 3 + len(body) + 2
        self.assertEqual(self.size(kept + dropped + body), sent)
        self.assertEqual(self.size(dropped + kept + body), sent)
        everything = len(kept + dropped + body) + (kept + dropped + body).count(b"\n")
        self.assertEqual(self.size(kept + dropped + body, strip=False), everything)

    def test_names_that_only_look_alike(self) -> None:
        content = b"Statuses: 1\nX-Status-Info: 2\nMy-Status: 3\nStatus : 4\nStatus\n\n"
        self.assertEqual(self.size(content + b"x\n"), len(content) + 3 + 6 + 1 - 1)

    def test_unfinished_stripped_field(self) -> None:
        """Nothing is added where the unfinished line is not sent."""
        self.assertEqual(self.size(b"A: b\nStatus: R"), 6)
        self.assertEqual(self.size(b"A: b\nLines: 7"), 6 + 8 + 2)
        self.assertEqual(self.size(b"Status: R"), 0)

    def test_content_length_is_not_believed(self) -> None:
        """Whatever it says, From_ lines decide (mboxrd and mboxo)."""
        for value in (b"1000000", b"0", b"-1", b"1" + b"0" * 30, b"x"):
            octets = FROM + b"Content-Length: " + value + b"\n\nbody\n\n" + FROM + b"\nnext\n"
            self.assertEqual(sizes(octets), [8, 8])


class PseudoTests(SynchronousTestCase):
    PSEUDO = (
        b"From MAILER-DAEMON " + DATE + b"\nDate: x\n"
        b"From: Mail System Internal Data <MAILER-DAEMON@example.org>\n"
        b"Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA\n"
        b"X-IMAP: 123 4\nStatus: RO\n\nThis text is part of the format.\n\n"
    )

    def test_hidden(self) -> None:
        spans = spans_of(self.PSEUDO + FROM + b"\nmail\n")
        self.assertTrue(spans.hidden)
        self.assertEqual(list(spans.starts), [len(self.PSEUDO)])

    def test_two_of_three_marks(self) -> None:
        lines = self.PSEUDO.splitlines(keepends=True)
        marks = [n for n, line in enumerate(lines) if line[:4] in (b"From", b"Subj", b"X-IM") and n]
        self.assertEqual(len(marks), 3)
        for mark in marks:
            two = b"".join(line for n, line in enumerate(lines) if n != mark)
            self.assertEqual(len(spans_of(two)), 0)
            one = b"".join(line for n, line in enumerate(lines) if n not in marks or n == mark)
            self.assertEqual(len(spans_of(one)), 1)

    def test_only_as_the_first(self) -> None:
        self.assertEqual(len(spans_of(FROM + b"\nmail\n\n" + self.PSEUDO)), 2)

    def test_marks_in_a_body_do_not_count(self) -> None:
        self.assertEqual(len(spans_of(FROM + b"\n" + self.PSEUDO.partition(b"\n")[2])), 1)


class StartTests(SynchronousTestCase):
    def test_nothing(self) -> None:
        for octets in (b"", b"\n", b"\r\n\n\n"):
            spans = spans_of(octets)
            self.assertEqual((len(spans), spans.end), (0, len(octets)))

    def test_leading_empty_lines(self) -> None:
        self.assertEqual(list(spans_of(b"\n\r\n" + FROM + b"\nx\n").starts), [3])

    def test_where_it_is_no_mbox(self) -> None:
        for octets, place in (
            (b"Subject: x\n", (1, 0)),
            (b"\n\r\n\x01\x01\x01\x01\n", (3, 3)),
            (b"\r", (1, 0)),
            (b"\n" * 100_000 + b"x" * 100_000, (100_001, 100_000)),
        ):
            raised = self.assertRaises(NotAnMbox, spans_of, octets, 1000)
            self.assertEqual((raised.line, raised.offset), place)


class CheckTests(SynchronousTestCase):
    """The CRC that stands for a message whose hash is not known."""

    def check(self, content: bytes) -> int:
        (check,) = spans_of(FROM + content).checks
        return check

    def test_spool_headers_do_not_count(self) -> None:
        self.assertEqual(
            self.check(b"A: b\n\nx\n"), self.check(b"Status: O\nA: b\nLines: 1\n\nx\n")
        )

    def test_header_and_length_do(self) -> None:
        checks = [
            self.check(c) for c in (b"A: b\n\nx\n", b"A: c\n\nx\n", b"A: b\n\nxx\n", b"\nx\n")
        ]
        self.assertEqual(len(set(checks)), 4)
