"""Unique-ids of mbox messages: a hash over what no spool software ever changes.

Nothing has to be stored, so nothing can be lost: the id of a message is the same after a restart,
after another program wrote `Status` fields, and on another machine.
"""

from __future__ import annotations

import re
from base64 import b32encode
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Final

SPOOL_HEADERS: Final = frozenset(
    {
        b"status",
        b"x-status",
        b"x-keywords",
        b"x-uid",
        b"x-uidl",
        b"x-imap",
        b"x-imapbase",
        b"content-length",
        b"lines",
    }
)
"""Lower-case names of the header fields that spool software adds and rewrites.

They are no part of a message's identity (qpopper, UW c-client, Dovecot and popa3d write them).
"""

STRIPPED: Final = SPOOL_HEADERS - {b"x-uidl", b"lines"}
"""Those of `SPOOL_HEADERS` that are not sent to clients."""

EMPTY_LINE: Final = re.compile(rb"\n\r?\n")
"""The end of a line and the empty line behind it, which ends a header."""

_INITIALS: Final = bytes({name[0] for name in SPOOL_HEADERS})
_FIELD: Final = rb"(%s):[^\n]*(?:\n[ \t][^\n]*)*" % b"|".join(sorted(SPOOL_HEADERS))
# The look at the initial halves the time of lines that are something else.
FIELD: Final = re.compile(rb"(?i)\n(?=[%s])%s" % (_INITIALS, _FIELD))
"""One spool header with its folded lines: from the LF before it up to, not with, its own LF."""

FIELD_OR_END: Final = re.compile(rb"(?i)\n(?=[\r\n%s])(?:%s|\r?\n)" % (_INITIALS, _FIELD))
"""The same, or, without a name, what `EMPTY_LINE` finds."""

LONGEST_NAME: Final = 64
"""Octets of a line after which its field name is known for certain."""

DIGEST_OCTETS: Final = 16

HASH_CHARACTERS: Final = 26
"""Characters of a digest as text."""

_HASH: Final = re.compile(rb"[a-z2-7]{%d}(?:-[1-9][0-9]*)?" % HASH_CHARACTERS)


class HeaderCut:
    """Takes the spool headers out of a header that comes in pieces.

    A piece ends behind a LF, or within a line of which more than `LONGEST_NAME` octets have come
    (and then not between CR and LF).
    """

    __slots__ = ("_dropping", "_midline", "_strip", "unsent")

    def __init__(self, strip: frozenset[bytes] = frozenset(), *, midline: bool = False) -> None:
        self._strip = strip
        self._midline = midline
        self._dropping = b""
        self.unsent = 0
        """Octets as sent of the fields named in `strip`, which are not sent."""

    @property
    def in_unsent_field(self) -> bool:
        """Whether the last octets belong to a field that is not sent."""
        return self._dropping.lower() in self._strip

    @property
    def in_spool_field(self) -> bool:
        """Whether the last octets belong to a field that is taken out."""
        return bool(self._dropping)

    def cut(self, piece: bytes) -> bytes:
        """The piece without spool headers."""
        # The pattern looks for a LF and a name, so what was before the piece is put in front of it.
        before = b"" if self._midline else b"\n"
        if self._dropping:
            before = b"\n" + self._dropping + b":" + before
            if self.in_unsent_field:
                self.unsent -= as_sent(before[1:])
        text = before + piece
        self._midline = not piece.endswith(b"\n")
        end = len(text) - (not self._midline)
        kept = []
        position = 0
        self._dropping = b""
        for field in FIELD.finditer(text):
            kept.append(text[position : field.start()])
            position = field.end()
            if field[1].lower() in self._strip:
                self.unsent += as_sent(text[field.start() + 1 : position + 1])
            if position == end:
                self._dropping = field[1]
        kept.append(text[position:])
        # A field was dropped with the LF before it, not with its own: one LF is over.
        return b"".join(kept)[before.startswith(b"\n") :]


def as_sent(octets: bytes) -> int:
    """How many there are when each LF is sent as CRLF."""
    return len(octets) + octets.count(b"\n") - octets.count(b"\r\n")


class MessageHash:
    """The first 128 bits of SHA-256 over a message's immutable octets (decision 14).

    Those are the From_ line, the header without `SPOOL_HEADERS`, and the body as stored; the
    empty line before the next From_ line is not among them. Fed by blocks of any size. An MMDF
    message may have no From_ line: then `from_line` is false.
    """

    __slots__ = ("_cut", "_hash", "_header", "_last", "_rest", "_taken")

    def __init__(self, *, from_line: bool = True) -> None:
        self._hash = sha256(usedforsecurity=False)
        # A From_ line is no field, so with one the beginning counts as within a line.
        self._cut = HeaderCut(midline=from_line)
        self._header = True
        self._rest = b"" if from_line else b"\n"
        self._taken = len(self._rest)
        self._last = b""

    def update(self, block: bytes) -> None:
        """Take the next octets, those of a From_ line first."""
        self._last = block[-1:] or self._last
        if not self._header:
            self._hash.update(block)
            return
        # At a line's start `_rest` begins with the LF before it, which has been taken already:
        # so an empty line is seen wherever the blocks are cut.
        text, taken = self._rest + block, self._taken
        empty = EMPTY_LINE.search(text)
        if empty:
            end = empty.start() + 1
            self._take(text[taken:end])
            self._hash.update(text[end:])
            self._header = False
            self._rest = b""
            return
        end = text.rfind(b"\n") + 1
        if end > taken:
            self._take(text[taken:end])
            text, taken = text[end - 1 :], 1
        if len(text) - taken > LONGEST_NAME:
            self._take(text[taken:])
            text, taken = b"", 0
        self._rest, self._taken = text, taken

    def digest(self) -> bytes:
        """The hash, 16 octets. Ends the feeding.

        A last line without its end counts as one with LF: the next deliverer will end it.
        """
        self._take(self._rest[self._taken :])
        self._rest = b""
        out = self._header and self._cut.in_spool_field
        if self._last not in (b"", b"\n") and not out:
            self._hash.update(b"\n")
        return self._hash.digest()[:DIGEST_OCTETS]

    def _take(self, header: bytes) -> None:
        if header:
            self._hash.update(self._cut.cut(header))


def text_of(digest: bytes) -> bytes:
    """A digest as 26 characters of base32, in lower case (RFC 1939 section 7 allows 1 to 70)."""
    return b32encode(digest).rstrip(b"=").lower()


def is_hash(uid: bytes) -> bool:
    """Whether an id has the form of those made here, with the number of a copy or without."""
    return _HASH.fullmatch(uid) is not None


def hash_in(uid: bytes) -> bytes | None:
    """The hash in an id, without the number of a copy; `None` for an id that is no hash."""
    return uid[:HASH_CHARACTERS] if is_hash(uid) else None


class Taken:
    """The ids of one maildrop so far. None is given out twice.

    `known` are those of messages before these, which keep what they have (decision 14). `text`
    may hold all of them: what does not stand there is no copy, and they need not be parted.
    """

    def __init__(self, known: Iterable[bytes] = (), text: bytes | None = None) -> None:
        self._known = known
        self._text = text
        self._ids: set[bytes] = set()
        self._parted = False
        self._copies: dict[bytes, int] = {}

    def take(self, uid: bytes) -> bool:
        """Take this id; whether it was free."""
        if not self._parted and (self._text is None or uid in self._text):
            self._ids.update(self._known)
            self._parted = True
        free = uid not in self._ids
        self._ids.add(uid)
        return free

    def take_hash(self, digest: bytes) -> bytes:
        """An id for a digest: the second of two equal messages gets `-2`, and so on.

        A number that an earlier copy has left free may be given again (decision 14).
        """
        plain = text_of(digest)
        number = self._copies.get(plain, 0) + 1
        while not self.take(uid := plain if number == 1 else b"%s-%d" % (plain, number)):
            number += 1
        self._copies[plain] = number
        return uid


def unique_ids(digests: Iterable[bytes]) -> Iterator[bytes]:
    """The ids of one maildrop in order, where all are hashes."""
    return map(Taken().take_hash, digests)
