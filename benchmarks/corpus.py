"""A deterministic mail spool: `python -m benchmarks.corpus OUT --messages N`.

Sizes are log-normal: median 8,000 octets, mean near 11,000. The mails are of the kinds that fill
real spools: plain text, text with HTML, attachments in base64 lines of 76; some text is 8 bit,
some lines begin with a dot or with `From `. The file is mboxrd (`From ` and `>From ` at the start
of a line get one more `>`) with LF line ends. All mail of one seed is the same octets each time.
"""

from __future__ import annotations

import argparse
import base64
import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from email.utils import formatdate
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from time import asctime, gmtime

VERSION = 1
"""Raised with each change of the octets, so that cached spools are made anew."""

MEDIAN = 8000
"""Median size of a message, in octets as stored."""

SIGMA = 0.8
"""Of the logarithm of the size: the mean is then 1.38 times the median."""

SMALLEST, LARGEST = 900, 4_000_000
"""Bounds of the size, in octets: no mail is shorter than its header."""

_WORDS = (
    b"the of and to in is that for it with as was on be at by this had not are but from or have "
    b"an they which one you were all her she there would their we him been has when who will no "
    b"more if out so up said what its about than into them can only other time new some could "
    b"these two may first then do any like my now over such our man me even most made after also "
    b"did many off before must well back through years much where your way down should because "
    b"long each just state those people too mail server meeting report invoice order project "
    b"schedule regards attached please confirm delivery account thread question answer version"
).split()
_WORDS_8BIT = ["Grüße", "naïve", "café", "Zürich", "señor", "größer", "привет", "会議", "10 €"]
_HOSTS = [b"mail", b"mx1", b"smtp", b"relay", b"out3", b"lists"]
_DOMAINS = [b"example.org", b"example.net", b"example.com", b"mail.example", b"lists.example"]
_NAMES = [b"alice", b"bob", b"carol", b"dave", b"erin", b"frank", b"grace", b"heidi", b"ivan"]
_EPOCH = 1_700_000_000
_FROM = re.compile(rb"\n(>*From )")


def quote(message: bytes) -> bytes:
    """`message` as mboxrd stores it: each `From `, `>From ` ... line gets one more `>`."""
    if b"From " not in message:
        return message
    return _FROM.sub(rb"\n>\1", b"\n" + message)[1:]


class _Pool:
    """Lines made once, of which each mail takes a random run: making a gigabyte stays quick."""

    def __init__(self, lines: list[bytes]) -> None:
        self._text = b"".join(lines)
        self._starts = [0, *accumulate(map(len, lines))]

    def take(self, random: Random, octets: int) -> bytes:
        """Whole lines, at least one, near `octets` in all."""
        parts = []
        while octets > 0:
            first = int(random.random() * (len(self._starts) - 1))
            start = self._starts[first]
            stop = min(bisect_left(self._starts, start + octets), len(self._starts) - 1)
            parts.append(self._text[start : self._starts[stop]])
            octets -= len(parts[-1])
        return b"".join(parts) or b"\n"


def _pick(random: Random, choices: list[bytes]) -> bytes:
    # `Random.choice` may change between Python versions, `random()` does not.
    return choices[int(random.random() * len(choices))]


def _text_line(random: Random, eight_bit: bool) -> bytes:
    kind = random.random()
    if kind < 0.12:
        return b"\n"
    words = [_pick(random, _WORDS) for _ in range(3 + int(random.random() * 9))]
    if eight_bit and kind > 0.7:
        words[0] = _WORDS_8BIT[int(random.random() * len(_WORDS_8BIT))].encode()
    line = b" ".join(words)[:76].rstrip()
    prefixes = ((0.003, b"."), (0.005, b"From "), (0.006, b">From "), (0.08, b"> "))
    for bound, prefix in prefixes:
        if kind - 0.12 < bound:
            return prefix + line + b"\n"
    return line + b"\n"


class Corpus:
    """Mails from one `seed`, one after the other."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random = Random(seed)
        self._plain = _Pool([_text_line(random, False) for _ in range(12_000)])
        self._utf8 = _Pool([_text_line(random, True) for _ in range(6_000)])
        html = [b"<p>" + _text_line(random, False).strip(b"\n.>") + b"</p>\n" for _ in range(6_000)]
        self._html = _Pool(html)
        encoded = base64.encodebytes(random.randbytes(750_000 // 57 * 57))
        self._base64 = _Pool(encoded.splitlines(keepends=True))

    def __iter__(self) -> Iterator[bytes]:
        """Each a message as it stands in the spool: From_ line, quoted mail, one empty line."""
        number = 0
        while True:
            yield self._message(number)
            number += 1

    def _octets(self) -> int:
        # Box and Muller's way to a normal deviate from two uniform ones.
        radius = math.sqrt(-2.0 * math.log(1.0 - self._random.random()))
        deviate = radius * math.cos(2.0 * math.pi * self._random.random())
        return min(max(int(MEDIAN * math.exp(SIGMA * deviate)), SMALLEST), LARGEST)

    def _message(self, number: int) -> bytes:
        random, octets = self._random, self._octets()
        when = _EPOCH + number * 37
        sender = _pick(random, _NAMES) + b"@" + _pick(random, _DOMAINS)
        header = self._header(number, when, sender)
        kind = random.random()
        room = octets - len(header) - 100
        if octets > 12_000 and kind < 0.8:
            mail = header + self._mixed(room, number)
        elif kind < 0.5:
            mail = header + self._alternative(room, number)
        else:
            mail = header + self._single(room)
        from_line = b"From %s %s\n" % (sender, asctime(gmtime(when)).encode())
        return from_line + quote(mail) + b"\n"

    def _header(self, number: int, when: int, sender: bytes) -> bytes:
        random = self._random
        date = formatdate(when).encode()
        fields = [b"Return-Path: <%s>\n" % sender]
        for _ in range(2 + int(random.random() * 4)):
            by = _pick(random, _HOSTS) + b"." + _pick(random, _DOMAINS)
            via = _pick(random, _HOSTS) + b"." + _pick(random, _DOMAINS)
            queue = b"%012X" % random.getrandbits(48)
            fields.append(
                b"Received: from %s (%s [192.0.2.%d])\n\tby %s (Postfix) with ESMTPS id %s\n"
                b"\tfor <reader@example.org>; %s\n"
                % (via, via, int(random.random() * 255), by, queue, date)
            )
        if random.random() < 0.5:
            signature = base64.b64encode(random.randbytes(192))
            folded = b"\n\t ".join(signature[i : i + 70] for i in range(0, len(signature), 70))
            fields.append(b"DKIM-Signature: v=1; a=rsa-sha256; d=example.org; s=s1;\n\tb=")
            fields.append(folded + b"\n")
        if random.random() < 0.05:
            fields.append(b"Status: O\n")
        subject = b" ".join(_pick(random, _WORDS) for _ in range(5))
        fields.append(
            b"Message-ID: <%d.%016x@%s>\nDate: %s\nFrom: %s\nTo: reader@example.org\n"
            b"Subject: %s\nMIME-Version: 1.0\n"
            % (number, random.getrandbits(64), _pick(random, _DOMAINS), date, sender, subject)
        )
        return b"".join(fields)

    def _single(self, room: int) -> bytes:
        if self._random.random() < 0.6:
            return (
                b"Content-Type: text/plain; charset=us-ascii\nContent-Transfer-Encoding: 7bit\n\n"
                + self._plain.take(self._random, room)
            )
        return (
            b"Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\n"
            + self._utf8.take(self._random, room)
        )

    def _alternative(self, room: int, number: int) -> bytes:
        edge = b"=_alt_%d" % number
        return (
            b'Content-Type: multipart/alternative; boundary="%b"\n\n--%b\n%b'
            b"\n--%b\nContent-Type: text/html; charset=utf-8\n\n<html><body>\n%b"
            b"</body></html>\n\n--%b--\n"
        ) % (
            edge,
            edge,
            self._single(room // 3),
            edge,
            self._html.take(self._random, room - room // 3 - 200),
            edge,
        )

    def _mixed(self, room: int, number: int) -> bytes:
        edge = b"=_mixed_%d" % number
        text = min(room // 4, 2500)
        return (
            b'Content-Type: multipart/mixed; boundary="%b"\n\n--%b\n%b\n--%b\n'
            b'Content-Type: application/pdf; name="scan.pdf"\n'
            b"Content-Transfer-Encoding: base64\n"
            b'Content-Disposition: attachment; filename="scan.pdf"\n\n%b\n--%b--\n'
        ) % (
            edge,
            edge,
            self._single(text),
            edge,
            self._base64.take(self._random, room - text - 300),
            edge,
        )


def write_spool(
    path: Path, messages: int | None = None, octets: int | None = None, seed: int = 1
) -> tuple[int, int]:
    """Write a spool of `messages` mails, or of the fewest that make `octets`, or what comes first.

    Returns how many mails and octets were written. The file appears whole, under its name, only
    when it is ready.
    """
    if messages is None and octets is None:
        raise ValueError("messages or octets must be given")
    part = path.with_name(path.name + ".part")
    count = total = 0
    with part.open("wb", buffering=1 << 20) as spool:
        for message in islice(Corpus(seed), messages):
            if octets is not None and total >= octets:
                break
            spool.write(message)
            count += 1
            total += len(message)
    part.replace(path)
    return count, total


def write_message(path: Path, octets: int, seed: int = 1) -> int:
    """Write a spool of one mail, an attachment in base64 lines of 76; how many octets it has.

    These are `octets`, or up to a line more. The file appears whole, as with `write_spool`.
    """
    lines = base64.encodebytes(Random(seed).randbytes(750_000 // 57 * 57))
    part = path.with_name(path.name + ".part")
    with part.open("wb", buffering=1 << 20) as spool:
        total = spool.write(
            b"From alice@example.org %s\nFrom: alice@example.org\nTo: reader@example.org\n"
            b"Subject: one large attachment\nMIME-Version: 1.0\n"
            b"Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n\n"
            % asctime(gmtime(_EPOCH)).encode()
        )
        while octets - 1 - total > len(lines):
            total += spool.write(lines)
        # Whole lines of 77 with their LF, and the empty line that ends a mail.
        wanted = max(-(-(octets - 1 - total) // 77), 1) * 77
        total += spool.write(lines[:wanted] + b"\n")
    part.replace(path)
    return total


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus",
        description="Write a deterministic mboxrd spool of realistic mail.",
    )
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--messages", type=int, metavar="N", help="how many mails")
    parser.add_argument("--octets", type=int, metavar="N", help="stop when the file has so many")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other mail")
    given = parser.parse_args(argv)
    if given.messages is None and given.octets is None:
        parser.error("give --messages or --octets")
    count, total = write_spool(given.out, given.messages, given.octets, given.seed)
    print(f"{given.out}: {count} messages, {total} octets")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
