"""Old hash databases: what the real libraries wrote, and what is left of it when damaged."""

import random
import struct
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from popdrop.accounts.dbmfiles import (
    BERKELEY,
    BERKELEY_185,
    GDBM,
    Damaged,
    Record,
    kind_of,
    records,
)
from tests.olddbs import MAKERS, certificates, gdbm

KEYS = st.binary(min_size=1, max_size=40)
PAIRS = st.dictionaries(KEYS, st.binary(min_size=1, max_size=60), max_size=60)


def entries(count: int) -> dict[bytes, bytes]:
    """As qpopper writes them, names with octets over 127 too."""
    return {
        b"us\xc3\xa9r\xff%d\0" % number: bytes(255 - octet for octet in b"se cret %d" % number)
        + b"\0"
        for number in range(count)
    }


class Made(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        self.number = 0

    def made(self, kind: str, pairs: dict[bytes, bytes], gone: set[bytes] | None = None) -> bytes:
        self.number += 1
        path = self.folder / f"{kind}{self.number}"
        return MAKERS[kind](path, pairs.items(), sorted(gone or ())).read_bytes()


class RealTests(Made):
    def same(self, kind: str, pairs: dict[bytes, bytes], gone: set[bytes] | None = None) -> None:
        content = self.made(kind, pairs, gone)
        left = {key: value for key, value in pairs.items() if key not in (gone or ())}
        self.assertEqual(dict(records(content)), left)
        self.assertEqual(kind_of(content), BERKELEY if kind == "berkeley" else GDBM)

    def test_ten_thousand(self) -> None:
        for kind in MAKERS:
            self.same(kind, entries(10_000))

    def test_empty(self) -> None:
        for kind in MAKERS:
            self.same(kind, {})

    def test_deleted_ones_are_gone(self) -> None:
        pairs = entries(2_000)
        gone = set(list(pairs)[::3])
        for kind in MAKERS:
            self.same(kind, pairs, gone)
            self.same(kind, pairs, set(pairs))

    def test_records_of_several_pages(self) -> None:
        pairs = {b"long%d" % n: bytes([n + 1]) * n * 997 for n in range(1, 30)}
        for kind in MAKERS:
            self.same(kind, pairs)

    def test_anything(self) -> None:
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(PAIRS, st.randoms(use_true_random=False))
        def check(pairs: dict[bytes, bytes], choice: random.Random) -> None:
            gone = {key for key in pairs if choice.random() < 0.2}
            for kind in MAKERS:
                self.same(kind, pairs, gone)

        check()

    def test_berkeley_185(self) -> None:
        content = certificates(self.folder / "nss", 40).read_bytes()
        found = dict(records(content))
        self.assertEqual(kind_of(content), BERKELEY_185)
        self.assertEqual(found[b"\0Version\0"], b"\x08\0\0")
        names = b" ".join(found)
        for number in range(40):
            self.assertIn(b"test%03d" % number, names)
        self.assertEqual(len(found), 1 + 3 * 40)


def translated(content: bytes, order: str, pointer: str) -> bytes:
    """A gdbm database of a 64-bit little-endian machine, as another machine would have written it.

    `order` is `<` or `>`; `pointer` is `i`: 32-bit `off_t`; `q`: 64-bit, aligned at 4 octets. The
    sizes and places of C's structures were asked of gcc -m32.
    """
    block, start, dir_size, bits, size, elements = struct.unpack_from("<IqIIII", content, 4)
    directory = struct.unpack_from(f"<{dir_size // 8}q", content, start)
    counts, table, least, step = (52, 60, 80, 20) if pointer == "i" else (76, 84, 108, 24)
    # Each bucket in 64-bit form fits into as many octets in the others.
    made = bytearray(content)
    for place in set(directory):
        bucket = content[place : place + size]
        used = bytearray(size)
        struct.pack_into(order + "ii", used, counts, *struct.unpack_from("<ii", bucket, 104))
        for index in range((size - least) // step + 1):
            element = (
                struct.unpack_from("<I4sqii", bucket, 112 + 24 * index)
                if index < elements
                else (0xFFFFFFFF, b"\0" * 4, 0, 0, 0)
            )
            struct.pack_into(f"{order}I4s{pointer}ii", used, table + step * index, *element)
        made[place : place + size] = used
    width = struct.calcsize(order + pointer)
    struct.pack_into(f"{order}{len(directory)}{pointer}", made, start, *directory)
    struct.pack_into(
        f"{order}II{pointer}IIII",
        made,
        0,
        0x13579ACE,
        block,
        start,
        len(directory) * width,
        bits,
        size,
        (size - least) // step + 1,
    )
    return bytes(made)


class ForeignTests(Made):
    def test_other_machines(self) -> None:
        pairs = entries(1_000)
        content = self.made("gdbm", pairs)
        for order, pointer in (("<", "i"), (">", "i"), ("<", "q")):
            self.assertEqual(dict(records(translated(content, order, pointer))), pairs)


class DamageTests(Made):
    def contents(self) -> list[bytes]:
        made = [self.made(kind, entries(400)) for kind in MAKERS]
        made.append(self.made("berkeley", {b"k%d" % n: b"x" * 900 * n for n in range(1, 20)}))
        made.append(translated(made[0], ">", "i"))
        made.append(certificates(self.folder / "nss", 12).read_bytes())
        return made

    def whole_or_damaged(self, content: bytes, wanted: list[Record]) -> bool:
        """`True` if it was found damaged. Fails unless all or nothing was given."""
        try:
            found = records(content)
        except Damaged as error:
            self.assertNotIn("\n", str(error))
            return True
        self.assertEqual(len(found), len(wanted))
        return False

    def test_cut_off(self) -> None:
        for content in self.contents():
            wanted = records(content)
            chosen = random.Random(1)
            lengths = {*range(0, 600, 7), *(chosen.randrange(len(content)) for _ in range(150))}
            damaged = 0
            for length in sorted(lengths):
                cut = content[:length]
                try:
                    self.assertEqual(records(cut), wanted)  # nothing but what is not used is gone
                except Damaged:
                    damaged += 1
            self.assertGreater(damaged, len(lengths) // 2)

    def test_flipped_bits(self) -> None:
        for content in self.contents():
            wanted = records(content)
            chosen = random.Random(2)
            damaged = 0
            for turn in range(300):
                # The first 600 octets are headers in all of them, and worth more tries.
                place = chosen.randrange(600 if turn % 2 else len(content))
                wrong = bytearray(content)
                wrong[place] ^= 1 << chosen.randrange(8)
                damaged += self.whole_or_damaged(bytes(wrong), wanted)
            self.assertGreater(damaged, 5)

    def test_garbage_behind_the_magic(self) -> None:
        contents = self.contents()

        @settings(max_examples=200, deadline=None)
        @given(st.sampled_from(contents), st.binary(max_size=300), st.integers(0, 5000))
        def check(content: bytes, garbage: bytes, place: int) -> None:
            wrong = content[:place] + garbage + content[place + len(garbage) :]
            try:
                records(wrong)
            except Damaged:
                pass

        check()

    def test_no_database(self) -> None:
        for content in (b"", b"bob:secret\n", b"\0" * 4096, b"SQLite format 3\0" * 100):
            self.assertRaises(Damaged, records, content)
            self.assertIsNone(kind_of(content))

    def test_ring_of_pages(self) -> None:
        content = bytearray(self.made("berkeley", {b"k%d" % n: b"x" * 100 for n in range(60)}))
        for number in range(1, len(content) // 4096):
            struct.pack_into("<I", content, number * 4096 + 16, number)
        self.assertRaises(Damaged, records, bytes(content))

    def test_enormous_directory(self) -> None:
        content = bytearray(gdbm(self.folder / "big", entries(10).items()).read_bytes())
        struct.pack_into("<II", content, 16, 8 << 28, 28)
        self.assertRaises(Damaged, records, bytes(content))
