"""What unique-ids are made of: the words of `uidl=`, and how a maildrop's ids are chosen by them.

Ids that another server has left in a message's header are used on, so that clients which leave
mail on the server need not fetch it all again. Whatever has none, or none that can be trusted,
gets the hash of `popdrop.stores.uidl`. Pure: no file is touched here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from popdrop.errors import ConfigError
from popdrop.stores.uidl import Taken, is_hash

LONGEST: Final = 70
"""Characters of a unique-id at most (RFC 1939 section 7)."""

QPOPPER: Final = (11, 32)
"""Characters of an `X-UIDL` that qpopper uses on (its pop_dropcopy.c): its own have 20 or 32."""

DOVECOT: Final = "%08Xu%08Xv"
"""Dovecot's default `pop3_uidl_format`."""

_LARGEST: Final = 2**32 - 1
_FORM: Final = re.compile(rb"[\x21-\x7e]{1,%d}" % LONGEST)
_WORD: Final = re.compile(r"(hash|x-uidl|x-uid)(?:\[([^\]]*)\])?(?:,|\Z)")
_LENGTHS: Final = re.compile(r"([0-9]{1,2})-([0-9]{1,2})")
_FIELD: Final = re.compile(r"%(?:(%)|(?:0([0-9]{1,2}))?([Xx]?)([uv]))")
_PLAIN: Final = re.compile(r"[\x21-\x24\x26-\x7e]*")
# A field's value goes up to the end of its last folded line. The LF before its name is sought
# first, since that is quick.
_VALUE: Final = rb":([^\n]*(?:\n[ \t][^\n]*)*)"
_X_UIDL: Final = re.compile(rb"\n(?i:X-UIDL)" + _VALUE)
_X_UID: Final = re.compile(rb"\n(?i:X-UID)" + _VALUE)
_X_IMAPBASE: Final = re.compile(rb"\n(?i:X-IMAP(?:base)?)" + _VALUE)
_NUMBER: Final = re.compile(rb"[0-9]{1,10}")
_BASE: Final = re.compile(rb"\s*([0-9]{1,10})[ \t]+([0-9]{1,10})(?:\s.*)?", re.DOTALL)

HASH_ONLY: Final = "hash"
EXAMPLE: Final = "uidl=x-uidl,hash"


class Base(NamedTuple):
    """What `X-IMAPbase` or `X-IMAP` says of all UIDs of a file (c-client, Dovecot).

    `validity` is the UIDVALIDITY of RFC 3501, `last` the highest UID given out so far. `field` is
    the header field as it stands, its line end with it, but always by the name `X-IMAPbase`:
    `X-IMAP` is a mark of c-client's pseudo message, which is hidden.
    """

    validity: int
    last: int
    field: bytes


def base_of(header: bytes) -> Base | None:
    """The base in the header of a file's first message; `None` without one of that form."""
    for found in _X_IMAPBASE.finditer(b"\n" + header):
        numbers = _BASE.fullmatch(found[1])
        if numbers:
            validity, last = int(numbers[1]), int(numbers[2])
            if 0 < validity <= _LARGEST and last <= _LARGEST:
                return Base(validity, last, b"X-IMAPbase:" + found[1] + b"\n")
    return None


class Unnamed(NamedTuple):
    """A message that has no id yet.

    `header` is empty where no word needs it; the From_ line is no part of it. `digest` gives the
    message's hash, 16 octets, and is called only if that is needed.
    """

    header: bytes
    digest: Callable[[], bytes]


class UidlForm:
    """The value of `uidl=`: words joined by commas, of which the first that fits a message counts.

    * `hash`: the hash of the message. Fits all; stands behind the others, said or not.
    * `x-uidl`: the header field `X-UIDL`, of 11 to 32 characters, or as `x-uidl[1-70]` says.
    * `x-uid`: the header fields `X-UID` and `X-IMAPbase`, in Dovecot's form `%08Xu%08Xv` or as
      `x-uid[TEMPLATE]` says: `%u` the UID, `%v` the UIDVALIDITY, `%Xu` in hexadecimal, `%08Xu`
      filled up by zeros, `%%` a percent sign.

    Raises `ConfigError`.
    """

    def __init__(self, text: str = HASH_ONLY) -> None:
        self._lengths: tuple[int, int] | None = None
        self._template = ""
        self._order: list[str] = []
        position = 0
        while position < len(text) or not self._order:
            word = _WORD.match(text, position)
            if word is None:
                raise ConfigError(
                    f"uidl={text}: must be some of x-uidl, x-uid, hash, joined by commas, "
                    f"as {EXAMPLE}"
                )
            self._take(text, word[1], word[2])
            position = word.end()
        if text.endswith(","):
            raise ConfigError(f"uidl={text}: ends with a comma; leave it out")
        if "hash" in self._order[:-1]:
            raise ConfigError(f"uidl={text}: hash fits every message; put it last")
        self._order = [name for name in self._order if name != "hash"]
        self.text = self._canonical()
        """The same value in one spelling, to tell whether ids were made by it."""

    def _canonical(self) -> str:
        words = {"x-uidl": "", "x-uid": f"x-uid[{self._template}]"}
        if self._lengths:
            words["x-uidl"] = "x-uidl[{}-{}]".format(*self._lengths)
        return ",".join([*(words[name] for name in self._order), "hash"])

    def _take(self, text: str, name: str, argument: str | None) -> None:
        if name in self._order:
            raise ConfigError(f"uidl={text}: {name} stands there twice; leave one out")
        self._order.append(name)
        if name == "x-uidl":
            self._lengths = QPOPPER if argument is None else _lengths_of(text, argument)
        elif name == "x-uid":
            self._template = DOVECOT if argument is None else _checked(text, argument)
        elif argument is not None:
            raise ConfigError(f"uidl={text}: hash takes no [...]")

    @property
    def reads_headers(self) -> bool:
        """Whether the headers of messages are needed."""
        return bool(self._order)

    @property
    def wants_base(self) -> bool:
        """Whether the base of the file is needed, which is in its first message."""
        return "x-uid" in self._order

    def reused(self, header: bytes, base: Base | None) -> bytes | None:
        """The id that another server has left in a header; `None` without a sound one.

        Not one in the form of a hash, so that a header cannot claim another message's id.
        """
        for name in self._order:
            text = self._x_uidl(header) if name == "x-uidl" else self._x_uid(header, base)
            if text and _FORM.fullmatch(text) and not is_hash(text):
                return text
        return None

    def _x_uidl(self, header: bytes) -> bytes | None:
        """The first of a sound length, as qpopper takes it."""
        least, most = self._lengths or QPOPPER
        for found in _X_UIDL.finditer(b"\n" + header):
            text = found[1].strip()
            if least <= len(text) <= most:
                return text
        return None

    def _x_uid(self, header: bytes, base: Base | None) -> bytes | None:
        uid = _uid_of(header) if base else 0
        if base is None or not 0 < uid <= base.last:
            return None
        return _filled(self._template, uid, base.validity).encode()

    def ids(
        self,
        known: Iterable[bytes],
        unnamed: Iterable[Unnamed],
        base: Base | None = None,
        text: bytes | None = None,
    ) -> Iterator[bytes]:
        """The ids of messages that follow others whose ids are `known`, in order.

        None of them is among `known`, and none comes twice: of messages with the same reused id
        the second gets its hash, of messages with the same hash the second gets `-2`, and so on.
        `base` is that of the file, and `None` for mail that was appended later: nobody but the
        server before this one gave out UIDs, and its UIDs ascend. `text` is that of `Taken`.
        """
        taken = Taken(known, text)
        last = 0
        for message in unnamed:
            uid = _uid_of(message.header) if base else 0
            text = self.reused(message.header, base if uid > last else None)
            if base and last < uid <= base.last:
                last = uid
            if text is None or not taken.take(text):
                text = taken.take_hash(message.digest())
            yield text


def _uid_of(header: bytes) -> int:
    found = _X_UID.search(b"\n" + header)
    text = found[1].strip() if found else b""
    return int(text) if _NUMBER.fullmatch(text) else 0


def _lengths_of(text: str, argument: str) -> tuple[int, int]:
    found = _LENGTHS.fullmatch(argument)
    least, most = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= least <= most <= LONGEST:
        raise ConfigError(
            f"uidl={text}: x-uidl[{argument}] must be two lengths from 1 to {LONGEST}, "
            "as x-uidl[1-70]"
        )
    return least, most


def _checked(text: str, template: str) -> str:
    """The template of `x-uid[...]`, if all that it can give are ids. Raises `ConfigError`."""
    fields = {found[4] for found in _FIELD.finditer(template)}
    if not _PLAIN.fullmatch(_FIELD.sub("", template)) or "u" not in fields:
        raise ConfigError(
            f"uidl={text}: x-uid[{template}] must hold %u, may hold %v and printable characters, "
            "as Dovecot 2.3's pop3_uidl_format: x-uid[%08Xu%08Xv]"
        )
    if len(_filled(template, _LARGEST, _LARGEST)) > LONGEST:
        raise ConfigError(
            f"uidl={text}: x-uid[{template}] makes ids of more than {LONGEST} characters"
        )
    return template


def _filled(template: str, uid: int, validity: int) -> str:
    def value(field: re.Match[str]) -> str:
        if field[1]:
            return "%"
        number = uid if field[4] == "u" else validity
        # Lower-case digits for `X`, too: so Dovecot writes them.
        return format(number, "x" if field[3] else "d").rjust(int(field[2] or 0), "0")

    return _FIELD.sub(value, template)
