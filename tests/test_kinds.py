"""Every kind of mbox against the slow reader; Content-Length and MMDF, rule by rule."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.stores.mbox.kinds import FORMS, LOOK_AHEAD, LOOK_BACK, Form
from popdrop.stores.mbox.scan import NotAnMbox
from popdrop.stores.mbox.spans import FIELDS, QUOTED, REFUSED, Spans
from popdrop.stores.uidl import STRIPPED
from popdrop.wire import Outgoing
from tests import oracle_mbox, test_scan, test_search
from tests.test_scan import FRAGMENTS, FROM, make_spool, rows

SEP = b"\x01\x01\x01\x01\n"
LENGTHS = ("mboxcl", "mboxcl2", "auto")
PSEUDO = test_scan.PseudoTests.PSEUDO


def spans_of(
    octets: bytes, kind: str, block: int = 1 << 20, strip: bool = True, hide: bool = True
) -> Spans:
    scanner = FORMS[kind].scanner(strip=STRIPPED if strip else frozenset(), hide=hide)
    for start in range(0, len(octets), block):
        scanner.feed(octets[start : start + block])
    return scanner.close()


def stored(octets: bytes, kind: str) -> list[bytes]:
    spans = spans_of(octets, kind)
    return [octets[spans.offset(i) : spans.content_end(i)] for i in range(len(spans))]


def expected(
    octets: bytes, kind: str, strip: bool = True, hide: bool = True
) -> list[tuple[int, int, int, int, int]]:
    return [
        (m.start, len(m.opening + m.from_line), len(m.stored), len(m.sent), m.check)
        for m in oracle_mbox.read(octets, kind == "mboxrd", strip, hide, kind)
    ]


def digests(octets: bytes, kind: str, block: int = LOOK_AHEAD) -> list[bytes]:
    spans = spans_of(octets, kind)
    found = []
    for index in range(len(spans)):
        one = octets[spans.starts[index] : spans.content_end(index)]
        pieces = [one[i : i + block] for i in range(0, len(one), block)]
        found.append(FORMS[kind].digest(pieces))
    return found


def lengthy(octets: bytes, aims: list[tuple[int, int]]) -> bytes:
    """Put numbers for `@@@@@@`, each an aim: the end of which From_ line after it, less how much.

    The one behind the last From_ line is the end of the file.
    """
    parts = octets.split(b"@@@@@@")
    places = [at for at in range(len(octets)) if octets.startswith(b"From bob", at)]
    places.append(len(octets))
    out, done = parts[0], len(parts[0])
    for part, (which, less) in zip(parts[1:], aims * len(parts), strict=False):
        lines = oracle_mbox.lines_of(octets[done:])
        body = done
        for line in lines:
            body += len(line)
            if line in (b"\n", b"\r\n"):
                break
        later = [place for place in places if place >= body] or [len(octets)]
        number = later[min(which, len(later) - 1)] - body - less
        out += b"%06d" % number + part
        done += 6 + len(part)
    return out


LENGTH = b"Content-Length: @@@@@@\n"
LENGTH_FRAGMENTS = [
    *[b"\n" + FROM + LENGTH + b"\n"] * 3,
    FROM + LENGTH + b"\n",
    b"\r\n" + FROM + b"A: b\r\ncontent-length:@@@@@@ \r\n\r\n",
    FROM + b"A: b\n" + LENGTH + b"Status: O\n\n",
    FROM + b"A: b\n",
    LENGTH,
    b"Content-Length: @@@@@@",
    b"Content-Length: 1" + b"0" * 30 + b"\n",
    b"Content-Length: -1\n",
    b"Content-Length:\n @@@@@@\n",
    b"Content-Length: @@@@@@\n folded\n",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\n\n\n",
    b"x",
    b"body\n",
]
MMDF_FRAGMENTS = [
    SEP,
    SEP + SEP,
    SEP + b"\n" + SEP,
    SEP + FROM,
    SEP + SEP + FROM,
    b"\x01\x01\x01\x01\r\n",
    b"\x01",
    b"\x01\x01\x01\x01",
    b"x" + SEP,
    SEP + b"Status: RO\n",
    SEP + b"\n",
]


def files(fragments: list[bytes], starts: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda first, parts, aims: lengthy(first + b"".join(parts), aims),
        st.sampled_from(starts),
        st.lists(st.one_of(st.sampled_from(fragments), st.binary(max_size=4)), max_size=25),
        st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 5)), min_size=1, max_size=8),
    )


anything = st.one_of(
    files(
        LENGTH_FRAGMENTS, [FROM + LENGTH + b"\n", FROM + LENGTH, FROM, b"\n\r\n" + FROM + LENGTH]
    ),
    files(LENGTH_FRAGMENTS + FRAGMENTS, [FROM + LENGTH + b"\n", PSEUDO, FROM]),
    files(
        MMDF_FRAGMENTS + FRAGMENTS, [SEP, SEP + FROM, b"\n\r\n" + SEP, b"\x01" * 4 + b"\r\n", b""]
    ),
    files(MMDF_FRAGMENTS, [SEP, SEP + PSEUDO, SEP + SEP]),
)
kinds = st.sampled_from(sorted(FORMS))


class PropertyTests(SynchronousTestCase):
    @settings(max_examples=1500, deadline=None, derandomize=True)
    @given(
        octets=anything,
        kind=kinds,
        strip=st.booleans(),
        hide=st.booleans(),
        seed=st.integers(0, 2**32),
        longest=st.sampled_from([1, 3, 60, 5000, 100_000]),
    )
    def test_any_octets_any_cut(
        self, octets: bytes, kind: str, strip: bool, hide: bool, seed: int, longest: int
    ) -> None:
        """The slow reader and the scanner agree on everything, however the octets come."""
        for way in test_search.WAYS:
            with test_search.searching(way):
                self.compare(octets, random.Random(seed), longest, kind, strip, hide)

    def compare(
        self,
        octets: bytes,
        chance: random.Random,
        longest: int,
        kind: str,
        strip: bool,
        hide: bool,
    ) -> None:
        scanner = FORMS[kind].scanner(strip=STRIPPED if strip else frozenset(), hide=hide)

        def scan() -> Spans:
            place = 0
            while place < len(octets):
                step = chance.randint(1, longest)
                scanner.feed(octets[place : place + step])
                place += step
            return scanner.close()

        try:
            wanted = expected(octets, kind, strip, hide)
        except oracle_mbox.Corrupt as bad:
            raised = self.assertRaises(NotAnMbox, scan)
            self.assertEqual((raised.line, raised.offset), bad.args)
            return
        found = scan()
        self.assertEqual(rows(found), wanted)
        self.assertEqual(found.end, len(octets))

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(octets=anything, kind=kinds)
    def test_ids(self, octets: bytes, kind: str) -> None:
        """What ids are made of has no line of ^A, no spool header and no separator in it."""
        try:
            wanted = oracle_mbox.read(octets, kind=kind)
        except oracle_mbox.Corrupt:
            return
        self.assertEqual(digests(octets, kind), [m.digest for m in wanted])

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(octets=anything, kind=kinds, fields=st.booleans())
    def test_sizes_are_what_is_sent(self, octets: bytes, kind: str, fields: bool) -> None:
        """LIST is what RETR sends, also of a message that a Content-Length has joined."""
        try:
            spans = spans_of(octets, kind, strip=fields)
        except NotAnMbox:
            return
        names = STRIPPED if fields else frozenset()
        for index, altered in enumerate(spans.altered):
            content = octets[spans.offset(index) : spans.content_end(index)]
            strip = names if altered & FIELDS else frozenset()
            sent = Outgoing(strip, altered & QUOTED > 0).whole(content)[:-3]
            stuffed = sent.count(b"\r\n.") + sent.startswith(b".")
            self.assertEqual(spans.sizes[index], len(sent) - stuffed)

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(octets=anything, kind=kinds, crlf=st.booleans())
    def test_mail_that_comes_changes_nothing_before_it(
        self, octets: bytes, kind: str, crlf: bool
    ) -> None:
        """Sizes, checks and ids stay. But for a length that was not true and becomes so."""
        octets = octets.rstrip(b"\r")
        try:
            before = spans_of(octets, kind)
        except NotAnMbox:
            return
        if not before or any(altered & REFUSED for altered in before.altered):
            return
        message = (SEP if octets[before.starts[0]] == 1 else b"") + FROM + b"A: 1\n\nnew\n"
        more = FORMS[kind].between(octets[-LOOK_BACK:], message) + message
        after = spans_of(octets + more, kind)
        count = len(before)
        self.assertEqual(len(after), count + 1)
        self.assertEqual(list(after.sizes[:count]), list(before.sizes))
        self.assertEqual(list(after.checks[:count]), list(before.checks))
        self.assertEqual(digests(octets + more, kind)[:count], digests(octets, kind))

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(octets=anything, kind=kinds)
    def test_each_message_by_itself(self, octets: bytes, kind: str) -> None:
        """A message that is scanned alone, with its separator, is what it was in the file.

        So are the octets from one message to the end: recovery scans such parts.
        """
        form = FORMS[kind]
        try:
            spans = spans_of(octets, kind, hide=False)
        except NotAnMbox:
            return
        whole = rows(spans)
        for index, (start, *rest) in enumerate(whole):
            self.assertTrue(form.begins(octets[start : start + LOOK_AHEAD]))
            if index:
                self.assertTrue(form.may_begin(octets[max(start - LOOK_BACK, 0) : start]))
            alone = rows(spans_of(octets[start : spans.stop(index)], kind, hide=False))
            self.assertEqual(alone, [(0, *rest)])
            behind = rows(spans_of(octets[start:], kind, hide=False))
            self.assertEqual([(start + row[0], *row[1:]) for row in behind], whole[index:])

    def test_realistic_spools(self) -> None:
        """Large ones, over many blocks, at odd block sizes: with true lengths, and as MMDF."""
        plain = make_spool(random.Random(7), 200)
        messages = oracle_mbox.read(plain, strip=False, hide=False)
        lengths, mmdf = bytearray(), bytearray()
        for number, message in enumerate(messages):
            header, empty_line, body = message.stored.partition(b"\n\n")
            body += b"\n" + FROM + b"Subject: inside\n\nx\n" if number % 5 == 0 else b""
            field = b"\nContent-Length: %d" % len(body) if empty_line and number % 3 else b""
            lengths += message.from_line + header + field + empty_line + body + b"\n"
            mmdf += SEP + (message.from_line if number % 2 else b"") + message.stored + SEP
        for kind, octets in (("mboxcl2", lengths), ("auto", lengths), ("mmdf", mmdf)):
            wanted = expected(bytes(octets), kind)
            self.assertGreater(len(wanted), 199)
            for block in (1 << 18, 65_536, 4099, 257):
                self.assertEqual(rows(spans_of(bytes(octets), kind, block)), wanted)


class LengthTests(SynchronousTestCase):
    NEXT = FROM + b"Subject: next\n\nnext\n"
    INNER = b"text\n\n" + FROM + b"Subject: inside\n\nmore\n"

    def message(self, value: bytes, body: bytes = INNER) -> bytes:
        return FROM + b"Content-Length:" + value + b"\n\n" + body

    def count(self, octets: bytes) -> int:
        counts = {len(spans_of(octets, kind)) for kind in LENGTHS}
        self.assertEqual(len(counts), 1)
        self.assertEqual(len(spans_of(octets, "mboxo")), octets.count(b"\n\nFrom bob") + 1)
        return counts.pop()

    def test_true(self) -> None:
        """A From_ line within a length that is true is text."""
        size = b" %d" % len(self.INNER)
        self.assertEqual(self.count(self.message(size) + b"\n" + self.NEXT), 2)
        self.assertEqual(self.count(self.message(size)), 1)
        self.assertEqual(self.count(self.message(size) + b"\n"), 1)

    def test_separator_may_be_counted(self) -> None:
        """Some programs count the empty line, too."""
        octets = self.message(b"%d" % (len(self.INNER) + 1)) + b"\n" + self.NEXT
        self.assertEqual(self.count(octets), 2)
        self.assertEqual(stored(octets, "mboxcl2")[0].count(b"From bob"), 1)

    def test_no_separator(self) -> None:
        """The next From_ line may stand right at the end of a length, with no empty line."""
        octets = self.message(b" %d" % len(self.INNER)) + self.NEXT
        self.assertEqual(
            [len(spans_of(octets, kind)) for kind in ("mboxcl", "mboxcl2", "auto", "mboxo")],
            [2, 2, 2, 2],
        )
        self.assertTrue(stored(octets, "mboxcl2")[0].endswith(self.INNER))
        self.assertTrue(stored(octets, "mboxo")[1].endswith(self.NEXT))

    def test_body_without_line_end(self) -> None:
        body = self.INNER[:-1]
        for behind in (b"\n" + self.NEXT, b"\n\n" + self.NEXT, b"\r\n" + self.NEXT):
            octets = self.message(b"%d" % len(body), body) + behind
            self.assertEqual(len(spans_of(octets, "mboxcl2")), 2, behind)

    def test_false(self) -> None:
        """Then the From_ lines decide: nothing is joined, nothing lost."""
        size = len(self.INNER)
        values = [b"%d" % n for n in (0, 1, size - 2, size + 2, 10**6, 10**30, 10**17, -1, -size)]
        values += [b"", b" ", b"x", b"%dx" % size, b"0x10", b"1 2", b"\n %d" % size]
        values += [b"%d\n folded" % size, b"\xc2\xb9"]
        values += [b"%d\nContent-Length: %d" % (size, size), b"%d\ncontent-length: 3" % size]
        for value in values:
            octets = self.message(value) + b"\n" + self.NEXT
            self.assertEqual(self.count(octets), 3, value)
            self.assertEqual(len(spans_of(octets, "mboxcl2", 1)), 3, value)
            spans = spans_of(octets, "mboxcl2")
            joined = b"".join(octets[s : spans.stop(i)] for i, s in enumerate(spans.starts))
            self.assertEqual(joined, octets)

    def test_false_one_over_many_true(self) -> None:
        """A length over the whole file that is not true hides none of the true ones behind it."""
        true = self.message(b"%d" % len(self.INNER)) + b"\n"
        octets = self.message(b"9999999", b"x\n") + b"\n" + true * 50
        self.assertEqual(self.count(octets), 51)
        spans = spans_of(octets, "mboxcl2", 100)
        self.assertEqual(list(spans.altered), [FIELDS | REFUSED] + [FIELDS] * 50)

    def test_crossing(self) -> None:
        """The first true one decides, whatever those within it say."""
        inner = self.message(b"@@@@@@", b"x\n\n" + FROM + b"\ny\n")
        rest = b"\n" + self.NEXT + b"\n" + self.NEXT
        octets = self.message(b"%d" % len(inner), inner) + rest
        body = octets.index(b"@@@@@@\n\n") + 8
        for target in (octets.rindex(b"From bob"), octets.rindex(b"\nFrom bob"), len(octets)):
            self.assertEqual(self.count(octets.replace(b"@@@@@@", b"%06d" % (target - body))), 3)

    def test_not_into_a_header(self) -> None:
        """Where a From_ line stands behind another one, in its header, no length ends."""
        inner = FROM + b"A: b\n"
        octets = self.message(b"%d" % len(b"x\n\n" + inner), b"x\n\n" + inner)
        for block in (1, 1 << 20):
            spans = spans_of(octets + FROM + b"B: c\n\ny\n", "mboxcl2", block)
            self.assertEqual(list(spans.starts), [0, octets.index(inner)])
            self.assertEqual(list(spans.altered), [FIELDS | REFUSED, 0])

    def test_only_in_the_header(self) -> None:
        octets = FROM + b"A: b\n\nContent-Length: 30\n\n" + FROM + b"\nnext\n"
        self.assertEqual(self.count(octets), 2)

    def test_no_body(self) -> None:
        self.assertEqual(self.count(FROM + b"Content-Length: 0\n\n\n" + self.NEXT), 2)
        self.assertEqual(self.count(FROM + b"Content-Length: 0\n\n" + self.NEXT), 2)
        self.assertEqual(self.count(FROM + b"Content-Length: 0\n"), 1)

    def test_as_sent(self) -> None:
        """Nothing is un-quoted, Content-Length is left out; inside the body it is text."""
        inner = b">From a\n\n" + FROM + b"Content-Length: 1\n\n>From b\n"
        octets = FROM + b"A: b\nContent-Length: %d\n\n" % len(inner) + inner + b"\n" + self.NEXT
        for kind in LENGTHS:
            size = spans_of(octets, kind).sizes[0]
            self.assertEqual(size, len(b"A: b\r\n\r\n") + len(inner) + inner.count(b"\n"))

    def test_far_away(self) -> None:
        """Over many blocks, with From_ lines all the way."""
        body = (b"text\n\n" + FROM + b"\n") * 3000
        octets = self.message(b"%d" % len(body), body) + b"\n" + self.NEXT
        for block in (257, 65_536):
            self.assertEqual(len(spans_of(octets, "mboxcl2", block)), 2)
            cut = octets[:-1000] + b"x" * 500
            self.assertEqual(len(spans_of(cut, "mboxcl2", block)), cut.count(b"\n\n" + FROM) + 1)

    def test_pseudo_message(self) -> None:
        body = b"data\n\n" + FROM + b"\nx\n"
        head = PSEUDO.partition(b"\n\n")[0]
        pseudo = head + b"\nContent-Length: %d\n\n" % len(body) + body
        for kind in LENGTHS:
            spans = spans_of(pseudo + b"\n" + self.NEXT, kind)
            self.assertEqual((spans.hidden, list(spans.starts)), (True, [len(pseudo) + 1]))


class MmdfTests(SynchronousTestCase):
    ONE = b"Subject: 1\n\nfirst\n"
    TWO = b"Subject: 2\n\nFrom bob to you\n>From me\n\n"

    def check(self, octets: bytes, *wanted: bytes) -> None:
        for kind in ("mmdf", "auto"):
            self.assertEqual(stored(octets, kind), list(wanted))

    def test_plain(self) -> None:
        """An empty line at the end is the message's own; nothing is un-quoted."""
        self.check(SEP + self.ONE + SEP + SEP + self.TWO + SEP, self.ONE, self.TWO)
        sizes = spans_of(SEP + self.TWO + SEP, "mmdf").sizes
        self.assertEqual(list(sizes), [len(self.TWO) + 5])

    def test_from_line(self) -> None:
        """One right behind the line of ^A is not sent; a dated one in a body is text."""
        body = self.ONE + b"\n" + FROM + b"x\n"
        self.check(SEP + FROM + body + SEP + SEP + self.TWO + SEP, body, self.TWO)

    def test_one_line_too_few_or_too_many(self) -> None:
        self.check(SEP + self.ONE + SEP + self.TWO + SEP, self.ONE, self.TWO)
        self.check(SEP + self.ONE + SEP + SEP + self.TWO, self.ONE, self.TWO)
        self.check(SEP * 5 + self.ONE + SEP * 4 + self.TWO + SEP * 3, self.ONE, self.TWO)

    def test_empty_lines_are_no_message(self) -> None:
        self.check(b"\n" + SEP + self.ONE + SEP + b"\r\n\n" + SEP + self.TWO + SEP + b"\n",
                   self.ONE, self.TWO)  # fmt: skip
        self.check(SEP)
        self.check(SEP + SEP + b"\n\n" + SEP)
        self.check(SEP + b"\nx\n" + SEP, b"\nx\n")

    def test_header_only(self) -> None:
        self.check(SEP + b"A: b\n" + SEP, b"A: b\n")
        self.check(SEP + FROM + SEP, b"")

    def test_crlf(self) -> None:
        sep, one = SEP.replace(b"\n", b"\r\n"), self.ONE.replace(b"\n", b"\r\n")
        self.check(sep + one + sep + sep + one + sep, one, one)

    def test_what_is_no_separator(self) -> None:
        for line in (
            b"\x01\x01\x01\n",
            b"\x01" * 5 + b"\n",
            b" " + SEP,
            b"x" + SEP,
            SEP[:-1] + b" \n",
        ):
            body = self.ONE + line + b"more\n"
            self.check(SEP + body + SEP, body)

    def test_separator_takes_part_in_nothing(self) -> None:
        """Sizes, checks and ids are the same with and without line of ^A behind, CRLF or LF."""
        for from_line in (b"", FROM):
            one = from_line + self.ONE
            several = [SEP + one, SEP + one + SEP, b"\x01\x01\x01\x01\r\n" + one + SEP + SEP + one]
            spans = [spans_of(octets, "mmdf") for octets in several]
            self.assertEqual(len({s.sizes[0] for s in spans}), 1)
            self.assertEqual(len({s.checks[0] for s in spans}), 1)
            self.assertEqual(len({digests(octets, "mmdf")[0] for octets in several}), 1)

    def test_ids(self) -> None:
        """Those of the same mail in a From_ file, and stable when the first line is Status."""
        self.assertEqual(
            digests(SEP + FROM + self.ONE + SEP, "mmdf"), digests(FROM + self.ONE, "mboxrd")
        )
        plain = digests(SEP + self.ONE + SEP, "mmdf")
        self.assertEqual(digests(SEP + b"Status: RO\n" + self.ONE + SEP, "mmdf"), plain)
        self.assertEqual(digests(SEP + b"X-UID: 1\n 2\n" + self.ONE, "auto"), plain)
        self.assertNotEqual(digests(SEP + FROM + self.ONE + SEP, "mmdf"), plain)

    def test_pseudo_message(self) -> None:
        octets = SEP + PSEUDO[:-1] + SEP + SEP + self.ONE + SEP
        for kind in ("mmdf", "auto"):
            spans = spans_of(octets, kind)
            self.assertTrue(spans.hidden)
            self.assertEqual(list(spans.starts), [octets.index(SEP + self.ONE)])
        self.assertEqual(len(spans_of(SEP + self.ONE + octets, "mmdf")), 3)


class FormTests(SynchronousTestCase):
    def test_kinds(self) -> None:
        self.assertEqual(
            {name for name, form in FORMS.items() if form.unquote},
            {"mboxrd"},
        )
        self.assertEqual(list(FORMS), ["mboxrd", "mboxo", "mboxcl", "mboxcl2", "mmdf", "auto"])

    def test_first_octets(self) -> None:
        """What is neither a From_ line nor, where it may be, a line of ^A is refused."""
        mmdf, plain, other = SEP + b"A: b\n" + SEP, FROM + b"\nx\n", b"\n\nA: b\n"
        refused: dict[str, list[bytes]] = {
            "mmdf": [plain, other, b"\x01\x01\x01\n", b"\x01\x01\x01\x01"],
            "auto": [other, b"\x01\x01\x01\n", b"\x01\x01\x01\x01", b"\x01" * 5000, b"From "],
        }
        for kind, form in FORMS.items():
            for octets in refused.get(kind, [mmdf, other]):
                raised = self.assertRaises(NotAnMbox, spans_of, octets, kind, 2)
                place = (3, 2) if octets is other else (1, 0)
                self.assertEqual((raised.line, raised.offset), place)
                self.assertEqual("From_ line" in str(raised), form.from_lines)
                self.assertEqual("four ^A" in str(raised), form.mmdf)

    def test_nothing(self) -> None:
        for kind in FORMS:
            for octets in (b"", b"\n", b"\r\n\n\n"):
                spans = spans_of(octets, kind, 1)
                self.assertEqual((len(spans), spans.end), (0, len(octets)))

    def questions(self, form: Form) -> tuple[bool, ...]:
        befores = (b"", b"\n", b"x\n\n", b"x\r\n\r\n", b"x\n", SEP, b"x")
        return (
            form.begins(FROM + b"x"),
            form.begins(SEP + b"x"),
            form.begins(b"From me\n"),
            *(form.may_begin(before) for before in befores),
        )

    def test_questions(self) -> None:
        yes, no = True, False
        for kind, wanted in {
            "mboxrd": (yes, no, no, yes, yes, yes, yes, no, no, no),
            "mboxo": (yes, no, no, yes, yes, yes, yes, no, no, no),
            "mboxcl2": (yes, no, no, yes, yes, yes, yes, yes, yes, no),
            "mmdf": (no, yes, no, yes, yes, yes, yes, yes, yes, no),
            "auto": (yes, yes, no, yes, yes, yes, yes, yes, yes, no),
        }.items():
            self.assertEqual(self.questions(FORMS[kind]), wanted, kind)

    def test_gap(self) -> None:
        gaps = [FORMS["mboxo"].gap(octets) for octets in (b"\nF", b"\r\n", b"\r", b"", b"x\n")]
        self.assertEqual(gaps, [1, 2, 0, 0, 0])
        ends = (SEP + b"A: b\n", SEP + SEP + b"x", b"\n" + SEP + SEP, b"\r\n" + SEP + FROM, b"x")
        self.assertEqual([FORMS["mmdf"].gap(octets) for octets in ends], [0, 5, 6, 2, 0])

    def test_between(self) -> None:
        """What recovery writes before mail that it puts back."""
        for kind, before, message, wanted in (
            ("mboxrd", b"", FROM, b""),
            ("mboxrd", b"x\n\n", FROM, b""),
            ("mboxrd", b"x\n\r\n", FROM, b""),
            ("mboxcl2", b"x\n", FROM, b"\n"),
            ("auto", b"x", FROM, b"\n\n"),
            ("mmdf", b"", SEP, b""),
            ("mmdf", b"x\n" + SEP, SEP, b""),
            ("auto", b"x\n" + SEP[:-1] + b"\r\n", SEP, b""),
            ("mmdf", SEP, SEP, b""),
            ("mmdf", b"text x\n", SEP, SEP),
            ("auto", b"text x", SEP, b"\n" + SEP),
        ):
            found = FORMS[kind].between(before[-LOOK_BACK:], message)
            self.assertEqual(found, wanted, (kind, before))
