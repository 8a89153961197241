"""`popdrop.wire`: the line splitter and messages on their way out."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.wire import (
    COMMAND_LIMIT,
    ENDLESS_LIMIT,
    SASL_LIMIT,
    Lines,
    Outgoing,
    Overlong,
    as_stored,
    has_control,
    number,
)


def cut(data: bytes, points: list[int]) -> list[bytes]:
    """`data` in pieces, cut at `points` modulo its length."""
    places = sorted({p % (len(data) + 1) for p in points})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def split(pieces: list[bytes]) -> list[bytes | Overlong]:
    lines = Lines()
    out: list[bytes | Overlong] = []
    for piece in pieces:
        lines.feed(piece)
        while (line := lines.next()) is not None:
            out.append(line)
            if line is Overlong.ENDLESS:
                return out
    return out


cuts = st.lists(st.integers(0, 1 << 20), max_size=12)


class LinesTests(SynchronousTestCase):
    def test_line_ends(self) -> None:
        """CRLF and LF end a line, a bare CR does not (behaviour: "Lines")."""
        self.assertEqual(split([b"a\r\nb\nc\rd\r\n\r\n"]), [b"a", b"b", b"c\rd", b""])

    def test_unfinished(self) -> None:
        self.assertEqual(split([b"QUIT"]), [])
        self.assertEqual(split([b"QUIT\r"]), [])

    def test_limit(self) -> None:
        """255 octets with CRLF are a command, 256 are not (RFC 2449 section 4)."""
        longest = b"x" * (COMMAND_LIMIT - 2)
        self.assertEqual(split([longest + b"\r\n"]), [longest])
        self.assertEqual(split([longest + b"\n"]), [longest])
        self.assertEqual(split([longest + b"x\r\nok\r\n"]), [Overlong.LINE, b"ok"])

    def test_initial_response(self) -> None:
        """AUTH may be as long as a SASL response: mpop sends tokens with the command."""
        for word in (b"AUTH ", b"auth "):
            longest = word.ljust(SASL_LIMIT - 2, b"x")
            for data in (longest + b"\r\n", longest + b"\n"):
                self.assertEqual(split([data]), [longest])
                self.assertEqual(split([data[:3], data[3:300], data[300:-1], data[-1:]]), [longest])
            self.assertEqual(split([longest + b"x\r\nok\r\n"]), [Overlong.LINE, b"ok"])
            self.assertEqual(split([longest, b"xx", b"\r\nok\r\n"]), [Overlong.LINE, b"ok"])
        for other in (b"AUTHX ", b" AUTH ", b"AUTH\t", b"xAUTH "):
            self.assertEqual(split([other.ljust(COMMAND_LIMIT) + b"\r\n"]), [Overlong.LINE])

    def test_tail_of_an_overlong_line_is_no_command(self) -> None:
        data = b"x" * 5000 + b" QUIT\r\nNOOP\r\n"
        self.assertEqual(split([data]), [Overlong.LINE, b"NOOP"])
        self.assertEqual(split([data[:300], data[300:4990], data[4990:]]), [Overlong.LINE, b"NOOP"])

    def test_endless(self) -> None:
        self.assertEqual(split([b"x" * 1000] * 66), [Overlong.ENDLESS])
        self.assertEqual(split([b"x" * ENDLESS_LIMIT + b"\r\n"]), [Overlong.LINE])
        self.assertEqual(split([b"x" * (ENDLESS_LIMIT + 1) + b"\r\n"]), [Overlong.ENDLESS])

    def test_memory_of_an_overlong_line(self) -> None:
        lines = Lines()
        for _ in range(60):
            lines.feed(b"x" * 1000)
            self.assertIsNone(lines.next())
            self.assertLessEqual(len(lines), 1)

    def test_clear(self) -> None:
        lines = Lines()
        lines.feed(b"STLS\r\nCAPA\r\nNO")
        self.assertEqual(lines.next(), b"STLS")
        lines.clear()
        self.assertIsNone(lines.next())
        lines.feed(b"OP\r\n")
        self.assertEqual(lines.next(), b"OP")

    @settings(deadline=None, max_examples=300)
    @given(
        st.lists(
            st.one_of(
                st.binary(max_size=20),
                st.sampled_from(
                    [
                        b"\r\n",
                        b"\n",
                        b"\r",
                        b"x" * 253,
                        b"y" * 254,
                        b"z" * 70_000,
                        b"AUTH ",
                        b"t" * 6_000,
                    ]
                ),
            ),
            max_size=12,
        ),
        cuts,
    )
    def test_every_cut_gives_the_same_lines(self, parts: list[bytes], points: list[int]) -> None:
        data = b"".join(parts)
        self.assertEqual(split(cut(data, points)), split([data]))


class NumberTests(SynchronousTestCase):
    def test_digits_only(self) -> None:
        self.assertEqual(number(b"1"), 1)
        self.assertEqual(number(b"01"), 1)
        self.assertEqual(number(b"4294967297"), 4294967297)
        for bad in (
            b"",
            b"+1",
            b"-1",
            b"1_0",
            b" 1",
            b"1 ",
            b"0x1",
            b"\xd9\xa1",
            b"1" * 11,
            b"1\n",
        ):
            self.assertIsNone(number(bad), bad)
        self.assertIsNone(number(b"9" * 1_000_000))

    def test_control(self) -> None:
        for bad in (b"NOOP\0", b"\x1b[2J", b"a\tb", b"a\rb", b"\x7f"):
            self.assertTrue(has_control(bad), bad)
        self.assertFalse(has_control(b"USER b\xc3\xb6b"))


STRIP = frozenset({b"status", b"x-status"})


def reference(stored: bytes, strip: frozenset[bytes], unquote: bool, lines: int | None) -> bytes:
    """The same message, line by line, in plain words."""
    pieces = stored.replace(b"\r\n", b"\n").split(b"\n")
    last = pieces.pop()
    rows = [piece + b"\n" for piece in pieces] + ([last] if last else [])
    if unquote:
        rows = [row[1:] if re.match(rb">+From ", row) else row for row in rows]
    out: list[bytes] = []
    in_header = True
    skipping = False
    left = lines
    for row in rows:
        if in_header:
            if row == b"\n":
                in_header = False
                out.append(row)
                continue
            if row[:1] not in (b" ", b"\t"):
                name, colon, _ = row.partition(b":")
                skipping = bool(colon) and name.lower() in strip
            if not skipping:
                out.append(row)
        else:
            if left is not None:
                if left == 0:
                    break
                left -= 1
            out.append(row)
    text = b"".join(b"." + row if row.startswith(b".") else row for row in out)
    if text and not text.endswith(b"\n"):
        text += b"\n"
    return text.replace(b"\n", b"\r\n") + b".\r\n"


def by_lines(stored: bytes, unquote: bool, spaced: bool) -> bytes:
    """A message as sent, in as many words as the rules have."""
    stored = stored.replace(b"\r\n", b"\n")
    if spaced:
        stored = stored.replace(b"\r", b" ")
    rows = stored.split(b"\n")
    if not rows[-1]:
        rows.pop()
    if unquote:
        rows = [row[1:] if re.match(rb">+From ", row) else row for row in rows]
    rows = [b"." + row if row.startswith(b".") else row for row in rows]
    return b"".join(row + b"\r\n" for row in [*rows, b"."])


def send(pieces: list[bytes], *args: object) -> bytes:
    outgoing = Outgoing(*args)  # type: ignore[arg-type]
    return b"".join([outgoing.feed(piece) for piece in pieces]) + outgoing.end()


class OutgoingTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=1000)
    @given(
        st.lists(
            st.sampled_from(
                [b"\n", b"\r", b".", b"a", b"\r\n", b"\n.", b">", b"\n>From ", b"From "]
            )
        ).map(b"".join),
        st.sampled_from([1, 2, 20]),
        st.booleans(),
        st.booleans(),
    )
    def test_the_short_way_gives_the_same(
        self, stored: bytes, times: int, unquote: bool, spaced: bool
    ) -> None:
        """Also where there is more to change than is changed piece by piece."""
        stored *= times
        whole = send([stored], frozenset(), unquote, None, spaced)
        self.assertEqual(as_stored(stored, unquote, spaced), whole)
        self.assertEqual(whole, by_lines(stored, unquote, spaced))

    def test_many_dots_and_quotes(self) -> None:
        """Those that are changed one by one, and those that are left then."""
        for count in (15, 16, 17, 40):
            stored = b".\n>From a\n>>From >From b\n" * count
            sent = b"..\r\nFrom a\r\n>From >From b\r\n" * count + b".\r\n"
            self.assertEqual(as_stored(stored, unquote=True), sent)
            self.assertEqual(Outgoing(unquote=True).whole(stored), sent)
            self.assertEqual(as_stored(b".\n" * count), b"..\r\n" * count + b".\r\n")
            self.assertEqual(
                as_stored(b"> >From a\n" * count + b">From b", unquote=True),
                b"> >From a\r\n" * count + b"From b\r\n.\r\n",
            )

    def test_dots(self) -> None:
        """A dot at every line start is doubled, at the first octet too (RFC 1939 section 3)."""
        self.assertEqual(send([b".\nhello\n.\n..\n"]), b"..\r\nhello\r\n..\r\n...\r\n.\r\n")

    def test_dot_after_a_cut(self) -> None:
        self.assertEqual(send([b"a\n", b".", b"\n"]), b"a\r\n..\r\n.\r\n")

    def test_line_ends(self) -> None:
        self.assertEqual(send([b"a\r\nb\nc\rd"]), b"a\r\nb\r\nc\rd\r\n.\r\n")
        self.assertEqual(send([b"a\r", b"\nb\r"]), b"a\r\nb\r\r\n.\r\n")
        self.assertEqual(send([b"\r.\r\n"]), b"\r.\r\n.\r\n")

    def test_empty(self) -> None:
        self.assertEqual(send([]), b".\r\n")
        self.assertEqual(send([b""]), b".\r\n")

    def test_strip(self) -> None:
        stored = b"Status: RO\nA: 1\nX-STATUS: A\n folded\n\tagain\nB: 2\n\nStatus: body\n"
        self.assertEqual(send([stored], STRIP), b"A: 1\r\nB: 2\r\n\r\nStatus: body\r\n.\r\n")

    def test_a_field_that_only_looks_alike_stays(self) -> None:
        stored = b"Statuses: 1\nX-Y: Status: x\n Status: folded\n\n"
        self.assertEqual(send([stored], STRIP), stored.replace(b"\n", b"\r\n") + b".\r\n")

    def test_long_header_lines(self) -> None:
        stored = b"Status: " + b"x" * 5000 + b"\n y\nA: " + b"z" * 5000 + b"\n\nbody\n"
        pieces = [stored[i : i + 77] for i in range(0, len(stored), 77)]
        self.assertEqual(send(pieces, STRIP), reference(stored, STRIP, False, None))

    def test_top(self) -> None:
        stored = b"A: 1\n\n1\n2\n3"
        self.assertEqual(send([stored], frozenset(), False, 0), b"A: 1\r\n\r\n.\r\n")
        self.assertEqual(send([stored], frozenset(), False, 2), b"A: 1\r\n\r\n1\r\n2\r\n.\r\n")
        everything = b"A: 1\r\n\r\n1\r\n2\r\n3\r\n.\r\n"
        self.assertEqual(send([stored], frozenset(), False, 3), everything)
        self.assertEqual(send([stored], frozenset(), False, 9_999_999_999), everything)

    def test_top_without_body_or_header(self) -> None:
        self.assertEqual(send([b"A: 1\n"], frozenset(), False, 5), b"A: 1\r\n.\r\n")
        self.assertEqual(send([b"\nbody\nmore\n"], frozenset(), False, 1), b"\r\nbody\r\n.\r\n")

    def test_top_is_finished_early(self) -> None:
        outgoing = Outgoing(lines=1)
        outgoing.feed(b"A: 1\n\n1\n2\n")
        self.assertTrue(outgoing.finished)

    def test_unquote(self) -> None:
        stored = b">From a\nx >From b\n>>From c\n>Fromage\n"
        self.assertEqual(
            send([stored], frozenset(), True),
            b"From a\r\nx >From b\r\n>From c\r\n>Fromage\r\n.\r\n",
        )

    def test_endless_quoting_is_not_held_back(self) -> None:
        outgoing = Outgoing(unquote=True)
        sent = b"".join(outgoing.feed(b">" * 1000) for _ in range(100))
        self.assertGreaterEqual(len(sent), 99_990)
        sent += outgoing.feed(b"From x\n") + outgoing.end()
        self.assertEqual(sent, b">" * 99_999 + b"From x\r\n.\r\n")

    fragments = st.sampled_from(
        [
            b"\n",
            b"\r\n",
            b"\r",
            b".",
            b">",
            b">From ",
            b"From ",
            b"Fro",
            b"\n>",
            b"m ",
            b"Status: x",
        ]
        + [
            b"X-Status:",
            b" folded",
            b"\t",
            b"A: 1",
            b"\n\n",
            b"body",
            b"S",
            b"tatus",
            b":",
            b"\0\xff",
        ]
        + [b"y" * 70]
    )

    @settings(deadline=None, max_examples=1500)
    @given(
        st.lists(fragments, max_size=30).map(b"".join),
        cuts,
        st.sampled_from([frozenset[bytes](), STRIP]),
        st.booleans(),
        st.one_of(st.none(), st.integers(0, 6)),
    )
    def test_as_the_reference_under_every_cut(
        self,
        stored: bytes,
        points: list[int],
        strip: frozenset[bytes],
        unquote: bool,
        lines: int | None,
    ) -> None:
        expected = reference(stored, strip, unquote, lines)
        self.assertEqual(send(cut(stored, points), strip, unquote, lines), expected)
        self.assertEqual(Outgoing(strip, unquote, lines).whole(stored), expected)
        # A bare CR is one octet, and so is the blank that may be sent for it.
        spaced = re.sub(rb"\r(?!\n)", b" ", stored)
        expected = reference(spaced, strip, unquote, lines)
        self.assertEqual(send(cut(stored, points), strip, unquote, lines, True), expected)
