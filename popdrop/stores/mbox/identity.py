"""What is read of a spool to give its messages their unique-ids.

All is done under the spool locks at times, so `refresh` is called often.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

from popdrop.listing import Ids
from popdrop.stores.mbox.scan import LONGEST_FROM
from popdrop.stores.mbox.spans import Spans
from popdrop.stores.mbox.spool import COPY_BLOCK, Spool
from popdrop.stores.uidl import EMPTY_LINE
from popdrop.stores.uidlform import Base, UidlForm, Unnamed, base_of

LONGEST_HEADER: Final = 1 << 20
"""Octets of a header in which fields are looked for."""

_FIRST: Final = 8192
"""Octets read of a header at first: as good as all headers are shorter."""

# What may stand before the header of a file's first message: lines of ^A in MMDF files alone,
# and there a From_ line may be lacking.
_OPENING: Final = re.compile(rb"(?:\x01{0,4}\r?\n)*(?:From [^\n]*\n)?")

Digest = Callable[[Iterable[bytes]], bytes]
"""`kinds.Form.digest` of the kind of the spool."""

Refresh = Callable[[], None]


def digest_of(spool: Spool, spans: Spans, index: int, digest: Digest, refresh: Refresh) -> bytes:
    """The hash of message `index`, 16 octets. Raises `OSError`, as all of these."""

    def blocks() -> Iterator[bytes]:
        for block in spool.blocks(spans.starts[index], spans.content_end(index), COPY_BLOCK):
            yield block
            refresh()

    return digest(blocks())


def header_of(spool: Spool, spans: Spans, index: int, refresh: Refresh) -> bytes:
    """The header of message `index`, without From_ line, line of ^A and empty line."""
    return _header(spool, spans.offset(index), spans.content_end(index), refresh)


def _header(spool: Spool, start: int, stop: int, refresh: Refresh) -> bytes:
    size = _FIRST
    while True:
        end = min(start + size, stop)
        # As if a line ended before it: a header may be empty.
        octets = b"\n" + spool.read(start, end)
        refresh()
        empty = EMPTY_LINE.search(octets)
        if empty:
            return octets[1 : empty.start() + 1]
        if end == stop or size >= LONGEST_HEADER:
            return octets[1:]
        size *= 4


def base_in(spool: Spool, spans: Spans, refresh: Refresh) -> Base | None:
    """The base of the spool's UIDs: in its first message, which may be the hidden one."""
    if spans.hidden:
        stop = spans.starts[0] if spans else spans.end
        opening = _OPENING.match(spool.read(0, min(stop, LONGEST_FROM * 2)))
        return base_of(_header(spool, opening.end() if opening else 0, stop, refresh))
    return base_of(header_of(spool, spans, 0, refresh)) if spans else None


def unnamed(
    spool: Spool, spans: Spans, first: int, headers: bool, digest: Digest, refresh: Refresh
) -> Iterator[Unnamed]:
    """The messages from `first` on; their headers only with `headers`."""
    for index in range(first, len(spans)):
        header = header_of(spool, spans, index, refresh) if headers else b""
        yield Unnamed(header, partial(digest_of, spool, spans, index, digest, refresh))


def ids_of(
    spool: Spool,
    spans: Spans,
    form: UidlForm,
    known: Ids | None,
    digest: Digest,
    refresh: Refresh,
) -> list[bytes]:
    """The ids of all messages, or of those behind the ones whose ids are `known`."""
    base = base_in(spool, spans, refresh) if form.wants_base and known is None else None
    first = len(known) if known is not None else 0
    new = unnamed(spool, spans, first, form.reads_headers, digest, refresh)
    text = known.text if known is not None else None
    return list(form.ids(known or (), new, base, text))
