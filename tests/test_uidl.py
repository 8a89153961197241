"""Unique-ids: frozen values, and what they depend on."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.stores.uidl import MessageHash, text_of, unique_ids
from tests import oracle_mbox
from tests.test_scan import FROM, mboxes


def uid(octets: bytes) -> bytes:
    message = MessageHash()
    message.update(octets)
    return text_of(message.digest())


class GoldenTests(SynchronousTestCase):
    """Frozen for ever: clients that leave mail on the server remember these ids.

    The values were made with sha256sum and base32.
    """

    def test_folded_header(self) -> None:
        octets = (
            b"From bob@example.org Wed Dec  2 05:53:22 1992\n"
            b"Status: O\nReceived: from mx.example.org\n\tby example.com\nX-Keywords: a\n  b\n"
            b"Subject: golden\nContent-Length: 21\nLines: 2\nMessage-ID: <1@example.org>\n"
            b"X-UID: 3\nX-UIDL: abc\nX-IMAPbase: 1 3\nX-IMAP: 1 3\nX-Status: F\n"
            b"\nThe body.\nStatus: RO\n"
        )
        self.assertEqual(uid(octets), b"yug5gmh6siudhknarbi53k3ed4")

    def test_from_line_alone(self) -> None:
        self.assertEqual(
            uid(b"From a@example.org Thu Jan  1 00:00:00 1970\n"), b"3m7egstcl67hogqe7q3wieppji"
        )

    def test_crlf_and_8_bit(self) -> None:
        octets = b"From - Thu Jan  1 00:00:00 1970\r\nstatus: O\r\n\r\n8 bit \xe4\xf6\xfc\r\n"
        self.assertEqual(uid(octets), b"mzbizx3gan54opp3kauqhwlwq4")


class HashTests(SynchronousTestCase):
    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(
        octets=mboxes, seed=st.integers(0, 2**32), longest=st.sampled_from([1, 3, 60, 5000, 10**6])
    )
    def test_any_octets_any_cut(self, octets: bytes, seed: int, longest: int) -> None:
        """The same as the slow reader's, however the octets of a message come."""
        chance = random.Random(seed)
        for wanted in oracle_mbox.read(FROM + octets, hide=False):
            octets = wanted.from_line + wanted.stored
            message = MessageHash()
            place = 0
            while place < len(octets):
                step = chance.randint(1, longest)
                message.update(octets[place : place + step])
                place += step
            self.assertEqual(message.digest(), wanted.digest)

    def test_spool_headers_change_nothing(self) -> None:
        for line in (b"Status: RO\n", b"X-UID: 4\n", b"x-keywords: a\n\tb\n", b"LINES: 1\r\n"):
            plain = uid(FROM + b"A: b\n\nbody\n")
            self.assertEqual(uid(FROM + line + b"A: b\n\nbody\n"), plain)
            self.assertEqual(uid(FROM + b"A: b\n" + line + b"\nbody\n"), plain)
            self.assertNotEqual(uid(FROM + b"A: b\n\n" + line + b"body\n"), plain)

    def test_all_else_counts(self) -> None:
        ids = {
            uid(octets)
            for octets in (
                FROM + b"A: b\n\nbody\n",
                FROM[:-1] + b"\r\nA: b\n\nbody\n",
                FROM + b"A: c\n\nbody\n",
                FROM + b"A: b\n\nbod",
                FROM + b"A: b\n\nbody\n\n",
            )
        }
        self.assertEqual(len(ids), 5)

    def test_a_missing_last_line_end_does_not_count(self) -> None:
        """The next deliverer adds it: a client must not download the message again for that."""
        for octets in (
            b"A: b\n\nbody",
            b"A: b",
            b"A: b\n\n\xff\r",
            b"A: b\nLines: 3",
            b"A: b\n\n\0",
        ):
            self.assertEqual(uid(FROM + octets), uid(FROM + octets + b"\n"), octets)


class UniqueTests(SynchronousTestCase):
    def test_copies_are_numbered(self) -> None:
        a, b = bytes(16), bytes([255] * 16)
        texts = list(unique_ids([a, b, a, a, b]))
        zero, ones = b"a" * 26, b"7" * 25 + b"4"
        self.assertEqual(texts, [zero, ones, zero + b"-2", zero + b"-3", ones + b"-2"])

    @settings(deadline=None, derandomize=True)
    @given(st.lists(st.binary(min_size=16, max_size=16)))
    def test_form_of_rfc_1939(self, digests: list[bytes]) -> None:
        """1 to 70 characters of 0x21 to 0x7E, and none twice."""
        texts = list(unique_ids(digests * 2))
        self.assertEqual(len(set(texts)), len(texts))
        for text in texts:
            self.assertTrue(1 <= len(text) <= 70)
            self.assertTrue(all(0x21 <= c <= 0x7E for c in text))
