"""Old hash databases, read without their libraries: gdbm, ndbm, Berkeley DB.

qpopper keeps its APOP secrets in whichever of them it was compiled with. The libraries of today
refuse files of another word size or byte order, and those of Berkeley DB 1.85; and they may loop or
abort on a damaged file. These readers take all three, only ever look at octets in memory, and
either give every record or raise `Damaged`: each pointer is checked, and no page is read twice.

The layouts are those of gdbm's `gdbmdefs.h` (1.7 to 1.23), `db_page.h` of Berkeley DB 3 to 5 and
`hash.h` of 4.4BSD. Names here are theirs.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

Record = tuple[bytes, bytes]
"""A key and its value."""


class Damaged(Exception):
    """No such database, or a damaged one. The text is the end of a sentence about the file."""


GDBM: Final = "gdbm"
BERKELEY: Final = "Berkeley DB"
BERKELEY_185: Final = "Berkeley DB 1.85"

_GDBM_MAGICS: Final = (0x13579ACE, 0x13579ACD, 0x13579ACF, 0x13579AD0, 0x13579AD1)
_HASH_MAGIC: Final = 0x061561
_BTREE_MAGIC: Final = 0x053162


def kind_of(content: bytes) -> str | None:
    """Which kind of database begins so: `GDBM`, `BERKELEY`, `BERKELEY_185` or `None`."""
    for order in ("<", ">"):
        if _number(content, 0, order) in _GDBM_MAGICS:
            return GDBM
        if _number(content, 12, order) in (_HASH_MAGIC, _BTREE_MAGIC):
            return BERKELEY
        if _number(content, 0, order) in (_HASH_MAGIC, _BTREE_MAGIC):
            return BERKELEY_185
    return None


def records(content: bytes) -> list[Record]:
    """All records of the database whose octets are `content`. Raises `Damaged`."""
    kind = kind_of(content)
    if kind == GDBM:
        found = list(_gdbm(content))
    elif kind == BERKELEY:
        found = _berkeley(content)
    elif kind == BERKELEY_185:
        found = _berkeley_185(content)
    else:
        raise Damaged("no gdbm, ndbm or Berkeley DB database")
    if len({key for key, _ in found}) != len(found):
        raise Damaged("damaged: the same key twice")
    return found


def _number(content: bytes, offset: int, order: str) -> int | None:
    if len(content) < offset + 4:
        return None
    return int(struct.unpack_from(order + "I", content, offset)[0])


def _unpack(layout: str, content: bytes, offset: int) -> tuple[int, ...]:
    if not 0 <= offset <= len(content) - struct.calcsize(layout):
        raise Damaged("damaged: cut off, or a pointer that leads out of it")
    return struct.unpack_from(layout, content, offset)


def _part(content: bytes, offset: int, length: int) -> bytes:
    if offset < 0 or length < 0 or offset + length > len(content):
        raise Damaged("damaged: cut off, or a pointer that leads out of it")
    return content[offset : offset + length]


# gdbm


class _Layout(NamedTuple):
    """One compiler's idea of gdbm's structures: the width of `off_t` and its alignment."""

    header: str  # block_size, dir, dir_size, dir_bits, bucket_size, bucket_elems; from offset 4
    pointer: str  # off_t
    counts: int  # where bucket_bits and count lie in a bucket
    table: int  # where its h_table begins
    element: str  # hash_value, key_start, data_pointer, key_size, data_size
    bucket: int  # sizeof (hash_bucket), with one element

    def fits(self, dir_size: int, dir_bits: int, bucket_size: int, bucket_elems: int) -> bool:
        """Whether a header's numbers were computed with this layout."""
        elements = (bucket_size - self.bucket) // struct.calcsize("<" + self.element) + 1
        width = struct.calcsize("<" + self.pointer)
        return 0 < elements == bucket_elems and dir_bits < 32 and dir_size == width << dir_bits


_LAYOUTS: Final = (
    _Layout("IqIIII", "q", 104, 112, "I4sqii", 136),  # 64-bit machines
    _Layout("IqIIII", "q", 76, 84, "I4sqii", 108),  # 32-bit ones with large files: i386
    _Layout("IiIIII", "i", 52, 60, "I4siii", 80),  # 32-bit ones
)
_EMPTY: Final = 0xFFFFFFFF  # hash_value of an element that is not used


def _gdbm(content: bytes) -> Iterator[Record]:
    order = "<" if _number(content, 0, "<") in _GDBM_MAGICS else ">"
    for layout in _LAYOUTS:
        _, start, dir_size, bits, size, elements = _unpack(order + layout.header, content, 4)
        if layout.fits(dir_size, bits, size, elements):
            break
    else:
        raise Damaged("damaged: its header makes no sense")
    width = struct.calcsize(order + layout.pointer)
    directory = [
        pointer
        for (pointer,) in struct.iter_unpack(
            order + layout.pointer, _part(content, start, dir_size)
        )
    ]
    buckets = Counter(directory)
    # They do not overlap: more than fit into the file are not read, however many there are.
    if len(buckets) * size > len(content) or len(directory) * width != dir_size:
        raise Damaged("damaged: its directory makes no sense")
    for place, mentions in buckets.items():
        bucket = _part(content, place, size)
        bucket_bits, count = _unpack(order + "ii", bucket, layout.counts)
        # Else a pointer of the directory was changed, and another bucket would be missed.
        if not 0 <= bucket_bits <= bits or mentions != 1 << (bits - bucket_bits):
            raise Damaged("damaged: its directory makes no sense")
        step = struct.calcsize(order + layout.element)
        table = _part(bucket, layout.table, elements * step)
        used = 0
        for value, _, pointer, key_size, data_size in struct.iter_unpack(
            order + layout.element, table
        ):
            if value == _EMPTY:
                continue
            used += 1
            key = _part(content, pointer, key_size)
            # An element proves itself: it is where its key's hash says.
            if value not in _gdbm_hashes(key) or directory[value >> (31 - bits)] != place:
                raise Damaged("damaged: a record is not where it belongs")
            yield key, _part(content, pointer + key_size, data_size)
        if used != count:
            raise Damaged("damaged: a bucket has not as many records as it says")


def _gdbm_hashes(key: bytes) -> tuple[int, int]:
    """gdbm's hash of a key, where C's `char` is signed (x86) and where not (ARM)."""
    signed = unsigned = 0x238F13AF * len(key)
    for index, octet in enumerate(key):
        shift = index * 5 % 24
        signed = (signed + ((octet - 256 if octet > 127 else octet) << shift)) & 0x7FFFFFFF
        unsigned = (unsigned + (octet << shift)) & 0x7FFFFFFF
    return (
        (1103515243 * signed + 12345) & 0x7FFFFFFF,
        (1103515243 * unsigned + 12345) & 0x7FFFFFFF,
    )


# Berkeley DB 3 to 5

_OLDEST: Final = 7  # of the hash format: Berkeley DB 3.1
_NEWEST: Final = 10
_PAGE_HEAD: Final = 26
_OVERFLOW_PAGE: Final = 7
_HASH_PAGES: Final = (2, 13)  # P_HASH_UNSORTED, P_HASH
_KEYDATA: Final = 1
_OFFPAGE: Final = 3


def _berkeley(content: bytes) -> list[Record]:
    order = "<" if _number(content, 12, "<") in (_HASH_MAGIC, _BTREE_MAGIC) else ">"
    if _number(content, 12, order) != _HASH_MAGIC:
        raise Damaged("a Berkeley DB database, but a B-tree: qpopper makes none")
    (version,) = _unpack(order + "I", content, 16)
    if not _OLDEST <= version <= _NEWEST:
        raise Damaged(
            f"Berkeley DB of hash version {version} cannot be read: let `db_upgrade` make a copy"
            " of it new"
        )
    (size,) = _unpack(order + "I", content, 20)
    encryption, kind, flags = _unpack("BBB", content, 24)
    if encryption or flags or kind != 8:
        raise Damaged("encrypted, partitioned or with checksums: not a database of qpopper's")
    if size & (size - 1) or not 512 <= size <= 65536:
        raise Damaged("damaged: its header makes no sense")
    last_page, last_bucket = _unpack(order + "32xI36xI", content, 0)
    spares = _unpack(order + "32I", content, 96)
    if not last_bucket <= last_page < len(content) // size:
        raise Damaged("damaged: cut off, or its header makes no sense")
    pages = _Pages(content, size, order, set())
    found: list[Record] = []
    for bucket in range(last_bucket + 1):
        number = bucket + spares[bucket.bit_length()]
        if not any(_part(content, number * size + 20, 6)):
            continue  # a page that was made room for, and never used: no entries, no type
        while number:
            page, number = pages.take(number, *_HASH_PAGES)
            found += _items(page, order, pages)
    # The count of records in the header is not exact (libdb writes 10,001 for 10,000).
    for number in range(1, last_page + 1):
        (entries,) = _unpack(order + "H", content, number * size + 20)
        if number not in pages.taken and content[number * size + 25] in _HASH_PAGES and entries:
            raise Damaged("damaged: a page with records belongs to no bucket")
    return found


class _Pages(NamedTuple):
    """The pages of a file. Each is given once: a ring of pages ends."""

    content: bytes
    size: int
    order: str
    taken: set[int]

    def take(self, number: int, *types: int) -> tuple[bytes, int]:
        """The page of that number, and the number of the next one of its chain, or 0."""
        page = _part(self.content, number * self.size, self.size)
        own, _, following = _unpack(self.order + "III", page, 8)
        if own != number or page[25] not in types or number in self.taken:
            raise Damaged("damaged: a page is not what it should be")
        self.taken.add(number)
        return page, following


def _items(page: bytes, order: str, pages: _Pages) -> Iterator[Record]:
    entries, lowest = _unpack(order + "HH", page, 20)
    offsets = _unpack(f"{order}{entries}H", page, _PAGE_HEAD)
    if entries % 2:
        raise Damaged("damaged: a key without a value")
    words = []
    end = len(page)
    for offset in offsets:
        if not _PAGE_HEAD + 2 * entries <= offset < end:
            raise Damaged("damaged: the records of a page overlap")
        words.append(_item(page[offset:end], order, pages))
        end = offset
    if end != (lowest or 65536):  # 65536, the end of the largest page, is written as 0
        raise Damaged("damaged: a page has not as many records as it says")
    yield from zip(words[::2], words[1::2], strict=True)


def _item(item: bytes, order: str, pages: _Pages) -> bytes:
    if item[0] == _KEYDATA:
        return item[1:]
    if item[0] != _OFFPAGE:
        raise Damaged("damaged, or with duplicates, which qpopper's has not")
    number, length = _unpack(order + "II", item, 4)
    text = b""
    while number:
        page, number = pages.take(number, _OVERFLOW_PAGE)
        (here,) = _unpack(order + "H", page, 22)
        text += _part(page, _PAGE_HEAD, here)
    if len(text) != length:
        raise Damaged("damaged: a long record is not as long as it says")
    return text


# Berkeley DB 1.85, as in 4.4BSD, FreeBSD, NetBSD, OpenBSD

_VERSIONS_185: Final = (2,)
_SPLIT_SHIFT: Final = 11
_REAL_KEY: Final = 4  # second numbers below it mark overflow pages and records over several pages
_OVERFLOW: Final = 0


def _berkeley_185(content: bytes) -> list[Record]:
    order = "<" if _number(content, 0, "<") in (_HASH_MAGIC, _BTREE_MAGIC) else ">"
    magic, version, pages_order, size = _unpack(order + "4I", content, 0)
    if magic != _HASH_MAGIC:
        raise Damaged("a Berkeley DB 1.85 database, but a B-tree: qpopper makes none")
    if version not in _VERSIONS_185 or size & (size - 1) or not 64 <= size <= 65536:
        raise Damaged("Berkeley DB 1.85 of an unknown version, or damaged")
    (last_bucket,) = _unpack(order + "I", content, 40)
    total, head_pages = _unpack(order + "II", content, 56)
    spares = _unpack(order + "32I", content, 68)
    if last_bucket >= len(content) // size:
        raise Damaged("damaged: more buckets than pages")
    pages = _Pages(content, size, "<" if pages_order == 1234 else ">", set())

    def page_of(bucket: int) -> int:
        depth = bucket.bit_length()
        return bucket + head_pages + (spares[depth - 1] if bucket else 0)

    found: list[Record] = []
    for bucket in range(last_bucket + 1):
        number = page_of(bucket)
        while number:
            address = _page_185(pages, number, found)
            split = address >> _SPLIT_SHIFT
            number = address and page_of((1 << split) - 1) + (address & ((1 << _SPLIT_SHIFT) - 1))
    if len(found) != total:
        raise Damaged("damaged: not as many records as it says")
    return found


def _page_185(pages: _Pages, number: int, found: list[Record]) -> int:
    """Put the records of a page into `found`. The address of its overflow page, or 0."""
    if number in pages.taken:
        raise Damaged("damaged: a page is not what it should be")
    pages.taken.add(number)
    start = number * pages.size
    if start >= len(pages.content):
        return 0  # a bucket that was never written is an empty one, at the end of the file
    page = _part(pages.content, start, pages.size)
    (entries,) = _unpack(pages.order + "H", page, 0)
    words = _unpack(f"{pages.order}{entries}H", page, 2)
    end = len(page)
    if entries % 2:
        raise Damaged("damaged: a key without a value")
    for first, second in zip(words[::2], words[1::2], strict=True):
        if second == _OVERFLOW:
            return first
        if second < _REAL_KEY:
            raise Damaged("holds a record longer than a page: not a database of qpopper's")
        if not 2 + 2 * entries <= second <= first <= end:
            raise Damaged("damaged: the records of a page overlap")
        found.append((page[first:end], page[second:first]))
        end = second
    return 0
